"""Verbs that change a domain: pause, unpause, shutdown, reboot, destroy, rename, sysrq, mem-set, mem-max."""

import time
from typing import Any

import click

from nonroot.cli.display import domain_argument, json_option
from nonroot.cli.output import TIMED_OUT, Reporter
from nonroot.cli.xl_common import act, find, nothing, print_json
from nonroot.domain.options import parse_size
from nonroot.errors import BadOptionError, NotRunningError, TransientError, UnsupportedError, WaitTimeoutError

__all__ = ["destroy", "mem_max", "mem_set", "pause", "reboot", "rename", "shutdown", "sysrq", "unpause"]


@click.command(short_help="Stop a domain's time.", epilog="\b\nExample:\n  nonroot pause web")
@json_option
@domain_argument
def pause(domain: str, as_json: bool) -> int:
    """Stop DOMAIN between two instructions; its time stands still until `unpause`."""
    return act("pause", domain, as_json)


@click.command(short_help="Let a paused domain go on.", epilog="\b\nExample:\n  nonroot unpause web")
@json_option
@domain_argument
def unpause(domain: str, as_json: bool) -> int:
    """Let DOMAIN go on, or begin if it was made with `create -p`."""
    return act("unpause", domain, as_json)


@click.command(short_help="End a domain at once.", epilog="\b\nExample:\n  nonroot destroy web")
@json_option
@domain_argument
def destroy(domain: str, as_json: bool) -> int:
    """End DOMAIN at once, without asking it: like the plug pulled out. What it has not written is lost."""
    return act("destroy", domain, as_json)


@click.command(
    short_help="Ask a domain to shut down.",
    epilog="\b\nExamples:\n  nonroot shutdown web\n  nonroot shutdown -w web          wait until it has\n"
    "  nonroot shutdown -a -w --timeout 60\n\n"
    "\b\nExit status: 0; with -w 124 if a domain still runs after --timeout; 125 for what was refused.",
)
@click.option("-w", "--wait", is_flag=True, help="Wait until it has shut down.")
@click.option("-a", "--all", "everything", is_flag=True, help="All domains that `create` has made.")
@click.option("-F", "acpi", is_flag=True, help="Press the power button, even of a guest that listens to XenStore.")
@click.option("--timeout", metavar="SECONDS", type=float, help="With -w: wait no longer.")
@json_option
@click.argument("domain", metavar="[DOMAIN]", required=False)
def shutdown(wait: bool, everything: bool, acpi: bool, timeout: float | None, as_json: bool, domain: str | None) -> int:
    """Ask DOMAIN to shut down: through XenStore, or by its power button. Whether it does is its own decision."""
    return _ask("shutdown", domain, everything, wait, timeout, as_json, acpi=acpi)


@click.command(
    short_help="Ask a domain to reboot.",
    epilog="\b\nExamples:\n  nonroot reboot web\n  nonroot reboot -F web          at once, like its reset button\n\n"
    "\b\nExit status: as that of shutdown.",
)
@click.option("-w", "--wait", is_flag=True, help="Wait until the old domain has ended.")
@click.option("-a", "--all", "everything", is_flag=True, help="All domains that `create` has made.")
@click.option("-F", "force", is_flag=True, help="Reset it, unasked.")
@click.option("--timeout", metavar="SECONDS", type=float, help="With -w: wait no longer.")
@json_option
@click.argument("domain", metavar="[DOMAIN]", required=False)
def reboot(wait: bool, everything: bool, force: bool, timeout: float | None, as_json: bool, domain: str | None) -> int:
    """Ask DOMAIN to shut down; when it has, do what on_reboot says: normally start it again.

    A guest that asks for a reset itself, as `reboot` in it does, is restarted without this.
    """
    return _ask("reboot", domain, everything, wait, timeout, as_json, force=force)


def _ask(
    method: str, domain: str | None, everything: bool, wait: bool, timeout: float | None, as_json: bool, **params: Any
) -> int:
    from nonroot.toolstack.client import Toolstack

    if everything == (domain is not None):
        raise BadOptionError("name the DOMAIN, or say --all")
    if timeout is not None and (not wait or not 0 < timeout < 1e9):
        raise BadOptionError("--timeout needs --wait and a positive number of seconds")
    deadline = None if timeout is None else time.monotonic() + timeout
    if domain is not None:
        nothing(domain)
    elif Toolstack.nothing_runs():
        return 0
    results: list[dict[str, Any]] = []
    status = 0
    with Toolstack() as toolstack:
        if domain is not None:
            chosen = [domain]
        else:
            chosen = [str(d["domid"]) for d in toolstack.request("list")["domains"] if d["managed"]]
        asked: list[tuple[str, dict[str, Any]]] = []
        for one in chosen:
            try:
                asked.append((one, toolstack.request(method, domain=one, **params)))
            except NotRunningError:
                if domain is not None:
                    raise
        for one, answer in asked:
            result: dict[str, Any] = {"domain": one, "done": method} | answer
            if wait:
                try:
                    result |= _wait(int(answer["domid"]), deadline)
                except WaitTimeoutError:
                    Reporter().error(f"domain {one} still runs after {timeout:g} seconds")
                    result, status = result | {"state": "running"}, TIMED_OUT
            results.append(result)
    if as_json:
        print_json(results[0] if domain is not None else results)
    return status


def _wait(domid: int, deadline: float | None) -> dict[str, Any]:
    from nonroot.toolstack.client import Toolstack

    while True:
        try:
            with Toolstack() as toolstack:
                left = None if deadline is None else max(deadline - time.monotonic(), 0.01)
                return toolstack.request("wait", left, domain=str(domid))
        except WaitTimeoutError:
            raise
        except TransientError:
            continue  # domain zero was killed; the next one knows more


@click.command(short_help="Give a domain another name.", epilog="\b\nExample:\n  nonroot rename web web-old")
@json_option
@domain_argument
@click.argument("name", metavar="NEW-NAME")
def rename(domain: str, name: str, as_json: bool) -> int:
    """Call DOMAIN by NEW-NAME from now on."""
    return act("rename", domain, as_json, name=name)


@click.command(
    short_help="Press a magic SysRq key in a domain.",
    epilog="\b\nExample:\n  nonroot sysrq web s          Linux: sync its disks",
)
@json_option
@domain_argument
@click.argument("letter", metavar="LETTER")
def sysrq(domain: str, letter: str, as_json: bool) -> int:
    """Press the SysRq key LETTER of DOMAIN: through XenStore, or on its keyboard if it is no Xen domain.

    What that does is the guest's decision (Linux: kernel.sysrq).
    """
    from nonroot.connecting import connect
    from nonroot.toolstack.client import Toolstack

    if len(letter) != 1 or not letter.isascii() or not letter.isalnum():
        raise BadOptionError(f"{letter[:20]!r} is no SysRq key: use one letter or digit")
    found, by = find(domain), "xenstore"
    try:
        with Toolstack() as toolstack:
            toolstack.request("sysrq", domain=domain, key=letter)
    except UnsupportedError:
        if not found.get("display"):
            raise UnsupportedError(f"{found['name']} is no Xen domain, and has no keyboard") from None
        by = "keyboard"
        with connect(found["name"]) as running:
            running.keyboard.type(f"<alt-print-{letter.lower()}>")
    if as_json:
        print_json({"domain": domain, "done": "sysrq", "key": letter, "by": by})
    return 0


def _size(text: str) -> int:
    """xl's sizes: KiB without a unit. BadOptionError."""
    if text.isascii() and text.isdigit():
        return int(text) << 10
    return parse_size({"k": text[:-1] + "K", "b": text[:-1]}.get(text[-1:].lower(), text), "memory size")


@click.command("mem-set", short_help="Change a domain's memory.", epilog="\b\nExample:\n  nonroot mem-set web 512m")
@json_option
@domain_argument
@click.argument("size", metavar="SIZE")
def mem_set(domain: str, size: str, as_json: bool) -> int:
    """Ask DOMAIN to do with SIZE of memory (KiB without a unit, as xl has it), by its balloon driver."""
    return act("set_memory", domain, as_json, bytes=_size(size))


@click.command("mem-max", short_help="Limit a domain's memory.", epilog="\b\nExample:\n  nonroot mem-max web 1g")
@json_option
@domain_argument
@click.argument("size", metavar="SIZE")
def mem_max(domain: str, size: str, as_json: bool) -> int:
    """Let DOMAIN have SIZE of memory at most (KiB without a unit), until it is started again.

    What it has beyond that it keeps until its balloon driver gives it back: see mem-set. The limit cannot be above the
    memory that it was made with.
    """
    return act("limit_memory", domain, as_json, bytes=_size(size))
