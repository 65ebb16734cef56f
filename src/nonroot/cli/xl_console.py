"""``nonroot console``: a running domain's console, with what it said before."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nonroot.cli.display import domain_argument
from nonroot.cli.output import Reporter
from nonroot.cli.terminal import is_terminal, pump_keys, raw_terminal, write_all
from nonroot.cli.xl_common import find
from nonroot.domain.client import DomainClient
from nonroot.domain.wire import Kind
from nonroot.errors import (
    BadFileError,
    BadOptionError,
    DomainLostError,
    NonrootError,
    NotRunningError,
    TransientError,
    UnsupportedError,
)
from nonroot.toolstack.client import Toolstack

__all__ = ["attach", "console"]

KEYS_AT_ONCE = 4096


@click.command(
    short_help="Use a domain's console.",
    epilog="\b\nExamples:\n  nonroot console web                Ctrl-] leaves; the domain goes on\n"
    "  nonroot console --log web          what it said so far, from its log file\n"
    "  echo poweroff | nonroot console web\n\n"
    "\b\nExit status: 0 when you leave or the domain ends; 125 if there is no such domain.",
)
@click.option("-t", "--type", "kind", metavar="TYPE", help="serial or pv, which are one here: the domain's console.")
@click.option("-n", "--num", metavar="N", type=int, default=0, help="Its number.  [default: 0]")
@click.option("--log", "only_log", is_flag=True, help="Print the console's log file and end.")
@click.option("--no-replay", is_flag=True, help="Begin with what comes now.")
@domain_argument
def console(kind: str | None, num: int, only_log: bool, no_replay: bool, domain: str) -> int:
    """Use DOMAIN's console: first what is kept of the past, then what comes. Ctrl-] leaves; the domain goes on.

    The past is also in a log file of up to 1 MiB. A domain that restarts keeps its console.
    """
    if kind not in (None, "serial", "pv"):
        raise UnsupportedError(f"nonroot's domains have no console of type {kind[:20]!r}; there are: serial, pv")
    if num != 0:
        raise BadOptionError("a domain has one console, number 0")
    found = find(domain)
    if only_log:
        return _print_log(found)
    if found["state"] == "unknown":
        raise NotRunningError(f"the process of {found['name']} does not answer")
    return attach(found, replay=not no_replay)


def _print_log(found: dict[str, Any]) -> int:
    path = found.get("console_log")
    if not path:
        raise UnsupportedError(f"{found['name']} was not made by nonroot create, so its console has no log file")
    older = Path(f"{path}.1")
    try:
        began = found["started"] - 2
        if older.exists() and older.stat().st_mtime >= began:
            write_all(1, older.read_bytes())
        write_all(1, Path(path).read_bytes())
    except OSError as error:
        raise BadFileError(f"the log {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
    return 0


class _Watch:
    """Tells when what follows the domain's stop has been done, over a connection of its own."""

    def __init__(self, domid: int) -> None:
        self.done = threading.Event()
        self.next: int | None = None
        self._domid = domid
        self._closed = False
        self._toolstack: Toolstack | None = None
        threading.Thread(target=self._run, name="nonroot-watch", daemon=True).start()

    def _run(self) -> None:
        while not self._closed:
            try:
                self._toolstack = Toolstack()
                self.next = self._toolstack.request("wait", None, domain=str(self._domid)).get("next")
                break
            except TransientError:
                continue  # domain zero was killed; the next one finds the domain again
            except (NonrootError, ValueError):
                break
        self.done.set()

    def close(self) -> None:
        self._closed = True
        if self._toolstack is not None:
            self._toolstack.hang_up()


def attach(found: dict[str, Any], *, begin: bool = False, replay: bool = True, reporter: Reporter | None = None) -> int:
    """Be the console of a domain and of those that take its place; ``begin`` unpauses it first. The exit status."""
    terminal = is_terminal(0) and is_terminal(1)
    reporter = reporter or Reporter()
    if terminal and not reporter.quiet:
        reporter.line(f"the console of {found['name']}; Ctrl-] leaves")
    current: list[DomainClient] = []
    left, over = threading.Event(), threading.Event()

    def send(data: bytes) -> None:
        for at in range(0, len(data), KEYS_AT_ONCE):
            with contextlib.suppress(NonrootError):
                current[-1].send(Kind.CONSOLE, data[at : at + KEYS_AT_ONCE])

    wake_read, wake_write = os.pipe()
    with raw_terminal(0) if terminal else contextlib.nullcontext(False) as raw:
        typist: threading.Thread | None = None

        def keys() -> None:
            if pump_keys(0, wake_read, send, bool(raw)) == "left":
                left.set()
                over.set()

        try:
            while True:
                client, watch = DomainClient(), _Watch(int(found["domid"]))
                stopped = threading.Event()
                client.on_console = lambda data: (write_all(1, data), None)[1]
                client.on_event = _on_stop(stopped)
                client.on_lost = lambda error, stopped=stopped: stopped.set()  # type: ignore[misc]
                current.append(client)
                try:
                    _open(client, found["socket"], replay, begin, stopped)
                    if typist is None:
                        typist = threading.Thread(target=keys, name="nonroot-keys", daemon=True)
                        typist.start()
                    _until(watch, over)
                    if not left.is_set():
                        stopped.wait(2)
                finally:
                    client.close()
                    watch.close()
                following = None if left.is_set() else _successor(watch.next)
                if following is None:
                    break
                found, begin, replay = following, False, True
        finally:
            os.write(wake_write, b"x")
            if typist is not None:
                typist.join(2)
    os.close(wake_read)
    os.close(wake_write)
    if terminal and left.is_set():
        reporter.raw("\r\n")
    return 0


def _open(client: DomainClient, path: str, replay: bool, begin: bool, stopped: threading.Event) -> None:
    """Connect; a domain that has gone meanwhile has stopped."""
    try:
        client.connect(path)
        client.request("attach_console", 60, replay=replay)
        if begin:
            client.request("start", 60)
    except DomainLostError:
        stopped.set()


def _successor(domid: int | None) -> dict[str, Any] | None:
    """The domain ``domid``, or the one that has taken its place by now; None if there is none."""
    while domid is not None:
        try:
            return find(str(domid))
        except NotRunningError:
            with Toolstack() as toolstack:
                domid = toolstack.request("wait", domain=str(domid)).get("next")
    return None


def _on_stop(stopped: threading.Event) -> Callable[[dict[str, Any]], None]:
    def event(record: dict[str, Any]) -> None:
        if record.get("event") == "stopped":
            stopped.set()

    return event


def _until(watch: _Watch, over: threading.Event) -> None:
    """Wait for the domain's end or the user's."""

    def pass_on() -> None:
        watch.done.wait()
        over.set()

    threading.Thread(target=pass_on, name="nonroot-over", daemon=True).start()
    while not over.wait(1):
        pass  # in steps, so that signals are seen
    if watch.done.is_set():
        over.clear()
