"""The VNC server's end of the control socket: requests whose answers are awaited, in an asyncio loop."""

import asyncio
import base64
import mmap
import os
import socket
from collections.abc import Callable
from typing import Any

from nonroot.devices.vga_state import MEMORY_SIZE, VgaState
from nonroot.domain.wire import WireDecoder, pack_json
from nonroot.errors import DomainLostError, InternalError, NonrootError, error_from_wire

__all__ = ["ControlLink", "parse_screen"]


class ControlLink:
    """Set up with blocking calls, then handed to a loop with :meth:`attach`."""

    def __init__(self, sock: socket.socket) -> None:
        self.on_event: Callable[[dict[str, Any]], None] = lambda record: None
        self.on_lost: Callable[[], None] = lambda: None
        self._socket = sock
        self._decoder = WireDecoder()
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 1
        self._fds: list[int] = []
        self._early: list[dict[str, Any]] = []
        self._out = bytearray()
        self._loop: asyncio.AbstractEventLoop | None = None

    # ── before there is a loop ──

    def wait_event(self, name: str) -> dict[str, Any]:
        """Block until that event comes. EOFError if the domain goes first."""
        while True:
            for index, record in enumerate(self._early):
                if record.get("event") == name:
                    return self._early.pop(index)
            self._early += self._receive()

    def ask(self, method: str) -> dict[str, Any]:
        """Ask and block. The domain's error, or EOFError."""
        number, self._next = self._next, self._next + 1
        self._socket.sendall(pack_json({"id": number, "method": method, "params": {}}))
        while True:
            for index, record in enumerate(self._early):
                if record.get("id") == number:
                    return _result(self._early.pop(index))
            self._early += self._receive()

    def memory(self) -> mmap.mmap:
        """The adapter's memory, read-only; blocks."""
        self.ask("screen_memory")
        fd = self._fds.pop(0)
        try:
            return mmap.mmap(fd, MEMORY_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(fd)

    def _receive(self) -> list[dict[str, Any]]:
        data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 4)
        self._fds += fds
        if not data:
            raise EOFError
        return [message.record for message in self._decoder.feed(data)]

    # ── in a loop ──

    def attach(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, answers are awaited."""
        self._loop = loop
        self._socket.setblocking(False)
        loop.add_reader(self._socket.fileno(), self._ready)
        early, self._early = self._early, []
        for record in early:
            self._dispatch(record)

    async def request(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask, and await the result. The domain's error; DomainLostError if it goes."""
        assert self._loop is not None
        number, self._next = self._next, self._next + 1
        future: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._pending[number] = future
        self._send(pack_json({"id": number, "method": method, "params": params}))
        try:
            return await future
        finally:
            self._pending.pop(number, None)

    def _send(self, data: bytes) -> None:
        self._out += data
        self._write()

    def _write(self) -> None:
        assert self._loop is not None
        try:
            sent = self._socket.send(self._out)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._lost()
            return
        del self._out[:sent]
        if self._out:
            self._loop.add_writer(self._socket.fileno(), self._write)
        else:
            self._loop.remove_writer(self._socket.fileno())

    def _ready(self) -> None:
        try:
            records = self._receive()
        except BlockingIOError:
            return
        except (EOFError, OSError, ValueError):
            self._lost()
            return
        for record in records:
            self._dispatch(record)

    def _dispatch(self, record: dict[str, Any]) -> None:
        number = record.get("id")
        if not isinstance(number, int):
            self.on_event(record)
            return
        future = self._pending.get(number)
        if future is None or future.done():
            return
        try:
            future.set_result(_result(record))
        except NonrootError as error:
            future.set_exception(error)

    def _lost(self) -> None:
        assert self._loop is not None
        self._loop.remove_reader(self._socket.fileno())
        for future in self._pending.values():
            if not future.done():
                future.set_exception(DomainLostError("the domain has ended"))
        self.on_lost()


def _result(record: dict[str, Any]) -> dict[str, Any]:
    if "error" in record:
        raise error_from_wire(record["error"])
    result = record.get("result")
    if not isinstance(result, dict):
        raise InternalError("the domain's answer has no result")
    return result


def parse_screen(reply: dict[str, Any]) -> tuple[int, VgaState]:
    """(serial, record) of a screen request's answer."""
    return int(reply["serial"]), VgaState.unpack(base64.b64decode(reply["record"]))
