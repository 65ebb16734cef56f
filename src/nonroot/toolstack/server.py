"""Domain zero's socket: one JSON object a line, ``{"id": 1, "method": "list", "params": {}}``.

Answers are ``{"id": 1, "result": {...}}`` or ``{"id": 1, "error": {...}}``, in the order in which they are ready. Only
processes of the same user are served; the process ends when it has had nothing to do for a while.
"""

import asyncio
import contextlib
import fcntl
import json
import os
import socket
import struct
import time
from pathlib import Path
from typing import Any, Final

from nonroot.errors import InternalError, NonrootError, UsageError
from nonroot.toolstack import place
from nonroot.toolstack.dom0 import DomainZero

__all__ = ["IDLE_SECONDS", "MAX_LINE", "serve"]

IDLE_SECONDS: Final = 10.0
"""Without a client and without a domain of its own, the process ends after this long."""
MAX_LINE: Final = 4 << 20
"""Bytes of a request."""
_PATIENT: Final = frozenset(("wait",))
"""Requests that end with their client."""


class Server:
    """The clients of one :class:`DomainZero`."""

    def __init__(self, zero: DomainZero, idle: float) -> None:
        self._zero = zero
        self._idle = idle
        self._clients = 0
        self._since = time.monotonic()
        self._methods = {name.removeprefix("do_"): getattr(zero, name) for name in dir(zero) if name.startswith("do_")}

    async def run(self, path: Path, ready_fd: int) -> None:
        """Serve at ``path`` until there is nothing to do any more."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path.unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        path.chmod(0o600)
        await self._zero.refresh()
        server = await asyncio.start_unix_server(self._client, sock=listener, limit=MAX_LINE)
        if ready_fd >= 0:
            os.write(ready_fd, b"+")
            os.close(ready_fd)
        try:
            await self._until_idle()
        finally:
            path.unlink(missing_ok=True)
            server.close()

    async def _until_idle(self) -> None:
        while True:
            if self._clients or self._zero.busy:
                self._since = time.monotonic()
            left = self._since + self._idle - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 1.0))

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if peer_uid(writer.get_extra_info("socket")) != os.getuid():
            writer.close()
            return
        self._clients += 1
        patient: set[asyncio.Task[None]] = set()
        others: set[asyncio.Task[None]] = set()
        try:
            while line := await reader.readline():
                task, method = self._begin(line, writer)
                group = patient if method in _PATIENT else others
                group.add(task)
                task.add_done_callback(group.discard)
        except (OSError, ValueError):
            pass  # it has gone, or its line is too long or no request
        finally:
            for task in patient:
                task.cancel()
            if others:
                await asyncio.wait(others)  # what has been asked for is done, whether or not somebody waits for it
            self._clients -= 1
            writer.close()

    def _begin(self, line: bytes, writer: asyncio.StreamWriter) -> tuple["asyncio.Task[None]", str]:
        """ValueError if ``line`` is no request."""
        try:
            record = json.loads(line)
        except RecursionError:
            raise ValueError("a request that is nested too deeply") from None
        if not isinstance(record, dict):
            raise ValueError("a request that is no object")
        number, method, params = record.get("id"), record.get("method"), record.get("params", {})
        if not isinstance(number, int) or not isinstance(method, str) or not isinstance(params, dict):
            raise ValueError("a request without id, method or params")
        return asyncio.create_task(self._answer(number, method, params, writer)), method

    async def _answer(self, number: int, method: str, params: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        answer: dict[str, Any] = {"id": number}
        try:
            if method not in self._methods:
                raise UsageError(f"domain zero knows no request {method[:40]!r}")
            answer["result"] = await self._methods[method](params)
        except NonrootError as error:
            answer["error"] = error.to_wire()
        except Exception as unexpected:
            import traceback

            trace = "".join(traceback.format_exception(unexpected))[-8000:]
            answer["error"] = InternalError(f"nonroot itself failed: {unexpected!r}", trace=trace).to_wire()
        with contextlib.suppress(OSError):
            writer.write(json.dumps(answer, separators=(",", ":")).encode() + b"\n")
            await writer.drain()


def peer_uid(sock: socket.socket) -> int:
    """The user of the process at a Unix socket's other end."""
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(uid)


def serve(idle: float = IDLE_SECONDS, ready_fd: int = -1) -> int:
    """Be domain zero. Returns the exit status: 0 when there was nothing to do any more, 3 if there is one already."""
    os.umask(0o077)
    lock = os.open(place.lock_path(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return 3

    async def main() -> None:
        await Server(DomainZero(), idle).run(place.socket_path(), ready_fd)

    asyncio.run(main())
    return 0
