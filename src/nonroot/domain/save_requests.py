"""The requests that save a domain."""

import os
import time
from typing import Any

from nonroot.domain.agent import AgentSession
from nonroot.domain.connection import Connection
from nonroot.domain.options import DomainOptions
from nonroot.domain.saving import check_can_be_saved
from nonroot.errors import BadOptionError, NonrootError, TransientError

__all__ = ["SaveRequests"]

TRIES = 50
"""How often a guest that is in the middle of a request to XenStore is let go on, before the save is given up."""
ENTROPY = 64


class SaveRequests:
    """A part of :class:`~nonroot.domain.process.DomainProcess`."""

    _session: AgentSession | None
    _options: DomainOptions | None

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
        """What a guest that was saved cannot know by itself: the time, and randomness of its own."""
        session, options = self._session, self._options
        if session is not None and session.hello is not None and options is not None and not options.virtual_time:
            session.freshen(time.time_ns(), os.urandom(ENTROPY))

    def _do_save(self, connection: Connection, request: int, params: dict[str, Any], blob: bytes) -> None:
        """Write the domain to the file ``path``; afterwards it goes on, unless ``stay`` is set or it was paused."""
        path, packed, stay = params.get("path"), bool(params.get("packed", True)), bool(params.get("stay", False))
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            raise BadOptionError(f"{path!r} is no absolute path")
        toolstack = params.get("toolstack")
        if toolstack is not None and not isinstance(toolstack, dict):
            raise BadOptionError("what the toolstack wants to be saved is no record")
        runner = self._need()
        options = runner.options
        check_can_be_saved(options, self._session)
        greeting = b"" if self._session is None else self._session.greeting
        was_paused = runner.state == "paused"
        began = time.monotonic()
        tries = 0

        def done(result: Any) -> None:
            nonlocal tries
            if isinstance(result, TransientError) and result.details.get("again") and tries < TRIES and not was_paused:
                tries += 1
                runner.unpause()
                runner.work(lambda: time.sleep(0.01), lambda nothing: go())
                return
            failed = isinstance(result, NonrootError)
            if not was_paused and (failed or not stay):
                runner.unpause()
            if isinstance(result, NonrootError):
                connection.fail(request, result)
            else:
                seconds = time.monotonic() - began
                self._say(f"saved to {path} in {seconds:.2f} s, {result['bytes'] >> 20} MiB")
                connection.reply(request, result | {"seconds": seconds})
            self._tell_watchers()

        def save() -> Any:
            return runner.save(path, packed, greeting, toolstack)

        def go() -> None:
            runner.pause(lambda standing: runner.call(save, done))

        go()
