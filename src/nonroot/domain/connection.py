"""One client of a domain's process, as its loop sees it: what waits for it, and what it sends."""

import os
import selectors
import socket
from collections import deque
from typing import Any, Protocol

from nonroot.domain.wire import Kind, Message, WireDecoder, WireError, pack, pack_json
from nonroot.errors import BadOptionError, NonrootError

__all__ = ["Connection", "Process"]

SEND_SIZE = 1 << 18
MOST_FDS = 64
"""Descriptors that come with one piece."""


class Process(Protocol):
    """Whose client it is."""

    def watch(self, connection: "Connection", writing: bool) -> None:
        """Ask the selector whether ``connection`` can be written."""

    def gone(self, connection: "Connection") -> None:
        """The client has closed its end."""

    def message(self, connection: "Connection", message: Message) -> None:
        """One message from the client."""


class Connection:
    """One client."""

    def __init__(self, process: Process, sock: socket.socket, primary: bool) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.primary = primary
        self.console = False
        """Whether it gets the guest's console output."""
        self.watcher = False
        """Whether it is told the domain's state and nothing else: no word of the guest's reaches it."""
        self.open = True
        self._process = process
        self._decoder = WireDecoder()
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._waiting = 0
        self._writing = False
        self._received: list[int] = []

    # ── what a session's client is ──

    def emit(self, kind: Kind, body: bytes) -> None:
        """Send a stream message."""
        self._push(pack(kind, body))

    def reply(self, request: int, result: dict[str, Any], fds: list[int] | None = None) -> None:
        """Answer a request; ``fds`` are copied to the client."""
        record: dict[str, Any] = {"id": request, "result": result}
        if fds:
            record["fds"] = len(fds)
        self._push(pack_json(record), fds)

    def fail(self, request: int, error: NonrootError) -> None:
        """Answer a request with an error."""
        self._push(pack_json({"id": request, "error": error.to_wire()}))

    def event(self, name: str, **fields: Any) -> None:
        """Tell what happened."""
        if self.watcher and name != "state":
            return
        self._push(pack_json({"event": name, **fields}))

    def backlog(self) -> int:
        """Bytes that wait for the client to take them."""
        return self._waiting

    # ── the socket ──

    def _push(self, data: bytes, fds: list[int] | None = None) -> None:
        if not self.open:
            return
        self._out.append((memoryview(data), fds or []))
        self._waiting += len(data)
        if not self._writing:
            self.write()

    def write(self) -> None:
        """Send what the client takes now."""
        while self._out:
            data, fds = self._out[0]
            try:
                if fds:
                    sent = socket.send_fds(self.socket, [data[:SEND_SIZE]], fds)
                else:
                    sent = self.socket.send(data[:SEND_SIZE])
            except BlockingIOError:
                break
            except OSError:
                self._out.clear()
                self._waiting = 0
                break  # the reading side notices that it has gone
            self._waiting -= sent
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], [])
        self._process.watch(self, bool(self._out))
        self._writing = bool(self._out)

    def ready(self, events: int) -> None:
        """The socket can be read or written."""
        if events & selectors.EVENT_WRITE:
            self.write()
        if events & selectors.EVENT_READ:
            try:
                data, fds, _, _ = socket.recv_fds(self.socket, 1 << 18, MOST_FDS)
            except BlockingIOError:
                return
            except OSError:
                data, fds = b"", []
            self._received += fds
            if not data:
                self._drop_received()
                self._process.gone(self)
                return
            try:
                for message in self._decoder.feed(data):
                    self._process.message(self, message)
            except WireError:
                self._drop_received()
                self._process.gone(self)

    def take_fds(self, count: object) -> list[int]:
        """The next descriptors that the client has sent, for a request that says how many are its. BadOptionError."""
        if not isinstance(count, int) or not 0 <= count <= len(self._received):
            raise BadOptionError(f"{count!r} descriptors were not sent")
        taken, self._received[:] = self._received[:count], self._received[count:]
        return taken

    def _drop_received(self) -> None:
        while self._received:
            os.close(self._received.pop())
