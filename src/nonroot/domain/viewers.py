"""The domain's VNC server: a process of its own, a client of the control socket like any other.

A viewer that finds a way to crash or hang the server reaches a process that has a read-only view of the screen's memory
and can press keys; the guest runs on. The server is started when somebody asks for it, and ends with the domain.
"""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from nonroot import programs
from nonroot.errors import BadOptionError, InternalError, NonrootError, TransientError

__all__ = ["PROGRAM", "Address", "Viewers", "parse_address"]

PROGRAM: Final = [sys.executable, "-P", "-m", "nonroot.display"]
"""What is run as the VNC server's process."""
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, slots=True)
class Address:
    """Where a VNC server listens: a Unix socket's path, or a port of 127.0.0.1 (or ::1)."""

    path: str | None = None
    port: int = 0
    host: str = "127.0.0.1"

    @property
    def is_unix(self) -> bool:
        """Whether it is a Unix socket."""
        return self.path is not None

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.is_unix else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """``unix:PATH``, ``127.0.0.1:PORT`` (0: any free one). BadOptionError for others; other hosts are refused.

    >>> parse_address("127.0.0.1:5901").port
    5901
    """
    if text.startswith("unix:"):
        path = os.path.abspath(text.removeprefix("unix:"))  # noqa: PTH100 - resolve() would follow links
        if len(text) == 5 or "\0" in text or len(os.fsencode(path)) > 100:
            raise BadOptionError(f"{text[:120]!r} is no path for a Unix socket: up to 100 bytes after unix:")
        return Address(path)
    match = re.fullmatch(r"(\S*):(\d{1,5})", text)
    if match is None:
        raise BadOptionError(f"{text[:60]!r} is no address for VNC: use unix:PATH or 127.0.0.1:PORT")
    host, port = match[1], int(match[2])
    if host not in _LOOPBACK:
        raise BadOptionError(
            f"VNC listens on this machine only (unix:PATH or 127.0.0.1:PORT), not on {host[:60] or 'all addresses'}; "
            "tunnel it, for example with ssh -L"
        )
    if port > 65535:
        raise BadOptionError(f"there is no port {port}")
    return Address(None, port, "::1" if host == "[::1]" else "127.0.0.1")


class Connection(Protocol):
    """A client of the domain's process, the VNC server's process among them."""

    open: bool

    def reply(self, request: int, result: dict[str, Any], fds: list[int] | None = None) -> None:
        """Answer."""

    def fail(self, request: int, error: NonrootError) -> None:
        """Answer with an error."""

    def event(self, name: str, **fields: Any) -> None:
        """Tell."""


@dataclass
class Viewers:
    """The VNC server's process, seen from the domain's."""

    accept: Callable[[socket.socket], Connection]
    """Make a connection of our end of a socket pair."""
    default_path: Callable[[], Path]
    """Where the private socket is."""
    title: Callable[[], str]
    _process: subprocess.Popen[bytes] | None = None
    _connection: Connection | None = None
    _address: str | None = None
    _waiting: list[tuple[Connection, int]] = field(default_factory=list)
    _tokens: dict[int, tuple[Connection, int]] = field(default_factory=dict)
    _next: int = 1

    # ── what clients ask ──

    def serve(self, client: Connection, request: int, params: dict[str, Any]) -> None:
        """Start the server unless it runs; answered with its ``address``."""
        given, password = params.get("address"), params.get("password")
        if given is not None and not isinstance(given, str):
            raise BadOptionError("the address of a VNC server is text")
        if password is not None and (not isinstance(password, str) or not 1 <= len(password.encode()) <= 8):
            raise BadOptionError("a VNC password has 1 to 8 bytes")
        if self._address is not None and self.running:
            if given is not None and str(parse_address(given)) != self._address:
                raise BadOptionError(f"this domain's VNC server listens at {self._address} already")
            client.reply(request, {"address": self._address})
            return
        address = parse_address(given) if given is not None else Address(os.fspath(self.default_path()))
        if not address.is_unix and password is None:
            raise BadOptionError("VNC on a TCP port needs a password")
        self._waiting.append((client, request))
        if not self.running:
            self._start(address, password)

    def web(self, client: Connection, request: int, params: dict[str, Any]) -> None:
        """A link that opens the screen in a browser, once; answered with ``url``. The server must run."""
        root = params.get("root")
        if not isinstance(root, str) or not Path(root).is_dir():
            raise BadOptionError("there is no noVNC in that folder")
        if self._connection is None or self._address is None:
            raise BadOptionError("the domain's VNC server has to be started first")
        self._tokens[self._next] = (client, request)
        self._connection.event("web", number=self._next, root=root)
        self._next += 1

    # ── what the server says ──

    def ready(self, connection: Connection, params: dict[str, Any]) -> None:
        """The server listens, or says why it cannot."""
        if connection is not self._connection:
            return
        if "error" in params:
            self._connection = None  # it ends by itself; another can be started
            self._fail(TransientError(str(params["error"])[:300]))
            return
        self._address = str(params.get("address"))
        for client, request in self._waiting:
            client.reply(request, {"address": self._address})
        self._waiting.clear()

    def web_ready(self, connection: Connection, params: dict[str, Any]) -> None:
        """A link, or why there is none."""
        waiter = self._tokens.pop(params.get("number", 0), None)
        if connection is not self._connection or waiter is None:
            return
        client, request = waiter
        if "error" in params:
            client.fail(request, TransientError(str(params["error"])[:300]))
        else:
            client.reply(request, {"url": str(params.get("url"))})

    def forget(self, connection: Connection) -> None:
        """A client has gone; it may be the server."""
        self._waiting = [waiter for waiter in self._waiting if waiter[0] is not connection]
        self._tokens = {number: waiter for number, waiter in self._tokens.items() if waiter[0] is not connection}
        if connection is self._connection:
            self._connection, self._address = None, None
            self._fail(InternalError("the domain's VNC server has ended"))

    @property
    def running(self) -> bool:
        """Whether there is a server."""
        return self._connection is not None

    @property
    def address(self) -> str | None:
        """Where it listens."""
        return self._address

    def close(self) -> None:
        """End the server."""
        if self._process is not None:
            self._process.terminate()
            self._process = None
        if self._address is not None and self._address.startswith("unix:"):
            # The server dies with this process and may not come to it.
            Path(self._address.removeprefix("unix:")).unlink(missing_ok=True)

    def _fail(self, error: NonrootError) -> None:
        for client, request in (*self._waiting, *self._tokens.values()):
            client.fail(request, error)
        self._waiting.clear()
        self._tokens.clear()

    def _start(self, address: Address, password: str | None) -> None:
        if self._process is not None:
            self._process.poll()  # an earlier one, which could not listen
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            program = [*PROGRAM, "--control-fd", str(theirs.fileno())]
            self._process = programs.start(program, stdout=subprocess.DEVNULL, fds=[theirs.fileno()])
        except OSError as error:
            ours.close()
            self._fail(TransientError(f"the VNC server cannot be started: {error.strerror or error}"))
            return
        finally:
            theirs.close()
        connection = self.accept(ours)
        self._connection = connection
        place = {"path": address.path, "port": address.port, "host": address.host}
        connection.event("serve", **place, password=password, title=self.title())
