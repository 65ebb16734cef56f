"""Domain zero's end of a domain's control socket.

Domain zero trusts a domain's process no further than it must: messages have a limit, what is in them is checked where
it is used, and after ``watch`` only states and replies come, in which there is no word of the guest's.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from typing import IO, Any

from nonroot import programs
from nonroot.domain.client import PROGRAM
from nonroot.domain.wire import VERSION, Kind, WireDecoder, WireError, pack_json
from nonroot.errors import (
    DomainLostError,
    InternalError,
    NonrootError,
    TransientError,
    WaitTimeoutError,
    error_from_wire,
)

__all__ = ["Link"]

REPLY_SECONDS = 10.0
END_SECONDS = 3.0


class Link:
    """One domain's process, and the connection to it."""

    def __init__(self, on_state: Callable[[str, str], None], on_lost: Callable[[], None]) -> None:
        """``on_state(state, reason)`` is called for news, ``on_lost()`` once when the process has gone."""
        self._on_state = on_state
        self._on_lost = on_lost
        self.pid = 0
        self._pidfd = -1
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 1
        self.gone = asyncio.Event()
        """Set when the connection has ended."""

    async def spawn(self, output: IO[bytes]) -> None:
        """Start a process; what it prints goes to ``output``. It dies with us until it is told ``detach``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            # In the main thread, which lives as long as we do: the kernel watches the thread that started the process.
            program = [*PROGRAM, "--control-fd", str(theirs.fileno())]
            self._process = programs.start(program, stdout=output, stderr=output, fds=[theirs.fileno()])
        except OSError as error:
            ours.close()
            raise TransientError(f"the domain's process cannot be started: {error.strerror or error}") from None
        finally:
            theirs.close()
        self._adopt(self._process.pid)
        await self._open(ours)

    async def connect(self, path: str | os.PathLike[str]) -> None:
        """Connect to a running process. DomainLostError if nobody answers."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, os.fspath(path))
            record = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        except OSError as error:
            sock.close()
            raise DomainLostError(f"the domain does not answer: {(error.strerror or str(error)).lower()}") from None
        self._adopt(int.from_bytes(record[:4], "little"))
        await self._open(sock)

    def _adopt(self, pid: int) -> None:
        self.pid = pid
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(pid)

    async def _open(self, sock: socket.socket) -> None:
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        self._task = asyncio.create_task(self._read(self._reader))
        hello = await self.request("hello")
        if hello.get("version") != VERSION:
            raise InternalError("the domain's process is of another version of nonroot")

    async def request(self, method: str, timeout: float = REPLY_SECONDS, **params: Any) -> dict[str, Any]:
        """The result. Raises the error that came instead; WaitTimeoutError, DomainLostError."""
        if self._writer is None or self.gone.is_set():
            raise DomainLostError("the domain has ended")
        number, self._next = self._next, self._next + 1
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            self._writer.write(pack_json({"id": number, "method": method, "params": params}))
            return await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise WaitTimeoutError(f"the domain's process did not answer in {timeout:g} seconds") from None
        finally:
            self._waiting.pop(number, None)

    async def end(self) -> None:
        """Destroy the domain, by force if its process does not end by itself. Returns when it has ended."""
        with contextlib.suppress(NonrootError):
            await self.request("destroy", END_SECONDS)
        if not await self._ended(END_SECONDS):
            self.kill()
            await self._ended(END_SECONDS)
        self.close()

    def kill(self) -> None:
        """End the process, unasked."""
        if self._pidfd >= 0:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _ended(self, seconds: float) -> bool:
        """Whether the process ends in that time: a pidfd is readable from then on."""
        if self._pidfd < 0:
            return True
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def ended() -> None:
            if not future.done():
                future.set_result(None)

        loop.add_reader(self._pidfd, ended)
        try:
            await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pidfd)
        if self._process is not None:
            self._process.poll()
        return True

    def close(self) -> None:
        """End the connection and leave the domain alone. Safe to call again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._lose()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        decoder = WireDecoder()
        try:
            while data := await reader.read(1 << 16):
                for message in decoder.feed(data):
                    if message.kind == Kind.JSON:
                        self._take(message.record)
        except (OSError, WireError):
            pass
        if self._process is not None:
            deadline = time.monotonic() + 1
            while self._process.poll() is None and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
        first = not self.gone.is_set()
        self._lose()
        if first:
            self._on_lost()

    def _take(self, record: dict[str, Any]) -> None:
        number, event = record.get("id"), record.get("event")
        if isinstance(number, int):
            future = self._waiting.get(number)
            if future is None or future.done():
                return
            error, result = record.get("error"), record.get("result")
            if isinstance(error, dict):
                future.set_exception(error_from_wire(error))
            else:
                future.set_result(result if isinstance(result, dict) else {})
        elif event == "state":
            self._on_state(str(record.get("state"))[:40], str(record.get("reason"))[:40])

    def _lose(self) -> None:
        self.gone.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(DomainLostError("the domain has ended"))
