"""The control requests about screens, keyboards, VNC, the registry and logs; :class:`DomainProcess` has the others."""

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nonroot.domain.console import ConsoleFile, ConsoleLog
from nonroot.domain.display import DisplayService
from nonroot.domain.messages import MessageLog
from nonroot.domain.registry import Registration, runtime_dir
from nonroot.domain.sealing import SEALED
from nonroot.domain.viewers import Viewers
from nonroot.errors import BadFileError, BadOptionError, NotRunningError, UnsupportedError

if TYPE_CHECKING:
    from nonroot.domain.connection import Connection

__all__ = ["DisplayRequests"]


class DisplayRequests:
    """A part of :class:`nonroot.domain.process.DomainProcess`."""

    _display: DisplayService | None = None
    _registration: Registration | None = None
    _sealed: bool = False
    """Whether this process has given up the host; see :mod:`nonroot.domain.sealing`."""

    def __init__(self) -> None:
        self._log = ConsoleLog()
        self._messages = MessageLog()
        self._viewers = Viewers(
            lambda sock: self._accept(sock, primary=False),
            lambda: runtime_dir() / f"{self._registration.name if self._registration else os.getpid()}.vnc",
            lambda: self._registration.name if self._registration else "nonroot",
        )

    def _accept(self, sock: socket.socket, primary: bool) -> "Connection":
        raise NotImplementedError

    def _listen(self, listener: socket.socket) -> None:
        """Take clients there, and no longer at the place before."""
        raise NotImplementedError

    def _close_display(self) -> None:
        self._viewers.close()
        if self._registration is not None:
            self._registration.close()

    def _screen(self) -> DisplayService:
        if self._display is None:
            raise NotRunningError("the domain has not been created yet")
        return self._display

    def _own_facts(self) -> dict[str, Any]:
        """What the list of running domains says of this one besides what its client says."""
        return {}

    def _do_register(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        name, facts = params.get("name"), params.get("facts", {})
        if not (name is None or isinstance(name, str)) or not isinstance(facts, dict):
            raise BadOptionError("a domain's name is text")
        if self._registration is None:
            self._registration = Registration(name, **self._own_facts() | facts)
            self._listen(self._registration.listen())
        return {"name": self._registration.name, "socket": os.fspath(self._registration.socket_path)}

    def _do_describe(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        """Add to what the registry's entry says."""
        registration, facts = self._registered(), params.get("facts")
        if not isinstance(facts, dict):
            raise BadOptionError("what a domain says of itself is an object")
        registration.describe(**registration.facts | facts)
        return {}

    def _do_rename(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> dict[str, Any]:
        before, name = self._registered(), params.get("name")
        if not isinstance(name, str):
            raise BadOptionError("a domain's name is text")
        if name != before.name:
            if self._sealed:
                raise UnsupportedError(f"{SEALED}: it cannot be renamed")
            self._registration = Registration(name, before.since, **before.facts)
            self._listen(self._registration.listen())
            before.close()
            self._messages.say(f"renamed from {before.name} to {name}")
        return {"name": self._registration.name if self._registration else name}

    def _registered(self) -> Registration:
        if self._registration is None:
            raise NotRunningError("the domain is in no list of running domains")
        return self._registration

    def _do_keep_console(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        """Write the console's output to a file of bounded size as well."""
        path, limit = params.get("path"), params.get("limit", 1 << 20)
        if self._sealed:
            raise UnsupportedError(f"{SEALED}: its console cannot be kept in a file")
        if not isinstance(path, str) or not isinstance(limit, int) or limit < 1:
            raise BadOptionError("the console is kept in a file of a size")
        try:
            self._log.file = ConsoleFile(Path(path), limit)
        except (OSError, ValueError) as error:
            raise BadFileError(f"the console cannot be kept in {path}: {error}") from None
        return {}

    def _do_messages(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        return {"messages": self._messages.to_wire()}

    def _do_screen_memory(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._screen().memory(connection, request)

    def _do_screen(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._screen().screen(connection, request)

    def _do_screen_wait(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._screen().wait(connection, request, params)

    def _do_type(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._screen().type(connection, request, params)

    def _do_pointer(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._screen().pointer(connection, request, params)

    def _do_vnc(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._screen().check()
        self._viewers.serve(connection, request, params)

    def _do_vnc_ready(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        self._viewers.ready(connection, params)
        return {}

    def _do_web(self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes) -> None:
        self._viewers.web(connection, request, params)

    def _do_web_ready(
        self, connection: "Connection", request: int, params: dict[str, Any], blob: bytes
    ) -> dict[str, Any]:
        self._viewers.web_ready(connection, params)
        return {}
