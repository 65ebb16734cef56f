"""The requests that save a domain."""

import ipaddress
import os
import time
from collections.abc import Callable
from typing import Any

from nonroot.domain.agent import AgentSession
from nonroot.domain.connection import Connection
from nonroot.domain.options import DomainOptions
from nonroot.domain.saving import check_can_be_saved
from nonroot.domain.sealing import SEALED
from nonroot.domain.wire import Kind
from nonroot.errors import BadOptionError, NonrootError, TransientError, UnsupportedError

__all__ = ["SaveRequests"]

TRIES = 50
"""How often a guest that is in the middle of a request to XenStore is let go on, before the save is given up."""
ENTROPY = 64
RENAME = """\
dev=$(ls /sys/bus/xen/devices/vif-{index}/net 2>/dev/null) && {{
    ifconfig "$dev" 0.0.0.0 down
    ifconfig "$dev" hw ether {mac}
    ifconfig "$dev" {address} up
}}"""


class SaveRequests:
    """A part of :class:`~nonroot.domain.process.DomainProcess`."""

    _session: AgentSession | None
    _options: DomainOptions | None
    _stop_error: NonrootError | None
    _snapshot_greeting: bytes = b""
    _sealed: bool = False

    def _need(self) -> Any:
        raise NotImplementedError

    def _say(self, text: str) -> None:
        raise NotImplementedError

    def _tell_watchers(self) -> None:
        raise NotImplementedError

    def _resume_session(self, greeting: bytes) -> None:
        """The agent of a saved domain has greeted already."""
        if self._session is not None and greeting:
            self._session.resume(greeting)

    def _freshen(self) -> None:
        """What a guest that was saved cannot know by itself: that it is a copy, the time, randomness of its own."""
        session, options = self._session, self._options
        if options is None or options.virtual_time:
            return
        self._need().renew_generation()
        if session is not None and session.hello is not None:
            session.freshen(time.time_ns(), os.urandom(ENTROPY))

    def _rename_cards(self) -> None:
        """A copy's cards are on the same networks as those of the domain that it comes from: they get new addresses.

        The guest's software of ours is told before its next command; a fork's IP addresses are the other's, and are
        given up.
        """
        addresses = getattr(self._need(), "new_addresses", {})
        if addresses and self._session is not None and self._session.hello is not None:
            lines = []
            for index, (mac, ip) in addresses.items():
                wanted = ipaddress.IPv4Interface(ip) if ip else None
                address = "" if wanted is None else f"{wanted.ip} netmask {wanted.netmask}"
                lines.append(RENAME.format(index=index, mac=mac, address=address))
            script = "\n".join(lines)
            self._session.run(_Nobody(), 0, {"argv": ["/bin/sh", "-c", script]})

    def _restart_session(self, greeting: bytes) -> None:
        """The guest has gone back to a moment at which its agent had nothing to do."""
        raise NotImplementedError

    def _do_fork(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        """Descriptors that a fork of the domain is made from: its records, and its RAM; for ``prepare``, what it is."""
        greeting = self._check(forking=True)
        runner = self._need()
        self._standing(connection, request, lambda: runner.fork(greeting), lambda fds: (runner.recipe(), fds))

    def _do_snapshot(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        """Remember the domain's state."""
        self._check_devices("have a snapshot")
        self._snapshot_greeting = self._check()
        self._standing(connection, request, self._need().snapshot, lambda nothing: ({}, None))

    def _do_revert(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        """Go back to the remembered state. What is under way is given up."""
        self._check_devices("go back to its snapshot")

        def reverted(nothing: Any) -> tuple[dict[str, Any], None]:
            self._restart_session(self._snapshot_greeting)
            if params.get("freshen", True):
                self._freshen()
            return {}, None

        self._standing(connection, request, self._need().revert, reverted)

    def _check_devices(self, what: str) -> None:
        """UnsupportedError for a domain with disks or cards: what these wrote and sent cannot be taken back."""
        if self._need().has_devices:
            raise UnsupportedError(f"a domain with disks or network cards cannot {what}: fork it instead")

    def _check(self, forking: bool = False) -> bytes:
        """What the agent has said, of a domain that can be saved, or forked. UnsupportedError, TransientError."""
        runner = self._need()
        if self._stop_error is not None:
            raise self._stop_error
        check_can_be_saved(runner.options, self._session)
        runner.check_can_be_saved(forking)
        return b"" if self._session is None else self._session.greeting

    def _standing(
        self,
        connection: Connection,
        request: int,
        question: Callable[[], Any],
        reply: Callable[[Any], tuple[dict[str, Any], list[int] | None]],
        after: Callable[[], bool] = lambda: True,
        finally_: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Answer with what ``question`` gives while the guest stands, in the vCPU's thread.

        Asked again after a moment while the guest is in the middle of a request to XenStore. The guest goes on
        afterwards, unless it was paused, or ``after`` says no.
        """
        runner = self._need()
        was_paused = runner.state == "paused"
        tries = 0

        def done(result: Any) -> None:
            nonlocal tries
            if isinstance(result, TransientError) and result.details.get("again") and tries < TRIES and not was_paused:
                tries += 1
                runner.unpause()
                runner.work(lambda: time.sleep(0.01), lambda nothing: go())
                return
            finally_()
            if isinstance(result, NonrootError):
                connection.fail(request, result)
            else:
                connection.reply(request, *reply(result))
            if not was_paused and (isinstance(result, NonrootError) or after()):
                runner.unpause()
            self._tell_watchers()

        def go() -> None:
            runner.pause(lambda standing: runner.call(question, done))

        go()

    def _do_save(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        """Write the domain to the file ``path``; afterwards it goes on, unless ``stay`` is set or it was paused.

        ``fork``: others are to go on from the file while this one does.
        """
        path, packed, stay = params.get("path"), bool(params.get("packed", True)), bool(params.get("stay", False))
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            raise BadOptionError(f"{path!r} is no absolute path")
        file: int | None = None
        if params.get("file"):
            (file,) = connection.take_fds(1)
        elif self._sealed:
            raise UnsupportedError(f"{SEALED}: it can be saved by the program that made it only")
        toolstack = params.get("toolstack")
        if toolstack is not None and not isinstance(toolstack, dict):
            raise BadOptionError("what the toolstack wants to be saved is no record")
        forking = bool(params.get("fork", False))
        try:
            greeting = self._check(forking)
        except NonrootError:
            _close(file)
            raise
        runner = self._need()
        began = time.monotonic()

        def said(result: dict[str, Any]) -> tuple[dict[str, Any], None]:
            seconds = time.monotonic() - began
            self._say(f"saved to {path} in {seconds:.2f} s, {result['bytes'] >> 20} MiB")
            return result | {"seconds": seconds}, None

        def save() -> Any:
            return runner.save(path, packed, greeting, toolstack, file, stay, forking)

        self._standing(connection, request, save, said, lambda: not stay, lambda: _close(file))


class _Nobody:
    """Who asks for a command whose output nobody wants; a :class:`~nonroot.domain.agent.Client`."""

    def emit(self, kind: Kind, body: bytes) -> None:
        """Drop it."""

    def reply(self, request: int, result: dict[str, Any]) -> None:
        """Drop it."""

    def fail(self, request: int, error: NonrootError) -> None:
        """Drop it."""

    def event(self, name: str, **fields: Any) -> None:
        """Drop it."""

    def backlog(self) -> int:
        """Nothing waits."""
        return 0


def _close(file: int | None) -> None:
    if file is not None:
        os.close(file)
