"""XenStore's process: one loop over a listening Unix socket, its clients, and the rings that dom0 hands over."""

import array  # noqa: F401 - socket.recv_fds imports it when it is called: too late for a confined process
import contextlib
import fcntl
import os
import selectors
import signal
import socket
import struct
import time
import traceback
from pathlib import Path
from typing import Final

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.journal import Journal
from nonroot.xenstore.store import Store
from nonroot.xenstore.wire import Connection

__all__ = ["Busy", "Server"]

_READ_SIZE: Final = 16 << 10
_UNREAD_MAX: Final = 64 << 10
"""A client that leaves more bytes unread is not read from."""
_FDS_MAX: Final = 4
_LOCK_SECONDS: Final = 5.0


class Busy(Exception):  # noqa: N818
    """Another process serves this folder."""


class _Client:
    """A socket and its connection to the store."""

    def __init__(self, server: "Server", sock: socket.socket, domid: int = 0) -> None:
        self.sock = sock
        self.out = bytearray()
        self.fds: list[int] = []
        self._server = server
        self.connection = Connection(
            server.store,
            self.send,
            domid,
            backlog=lambda: len(self.out),
            on_introduce=self._introduced,
            on_broken=lambda: server.leaving.add(self),
        )

    def send(self, data: bytes) -> None:
        """For the client; leaves when the loop comes round, or at once."""
        self.out += data
        self._server.pending.add(self)

    def _introduced(self, domid: int) -> None:
        for fd in self.fds:
            self._server.add(socket.socket(fileno=fd), domid)
        self.fds.clear()

    def receive(self) -> None:
        """Take what the client sent. ConnectionError when it has gone."""
        data, fds, _, _ = socket.recv_fds(self.sock, _READ_SIZE, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
        self.fds += fds
        while len(self.fds) > _FDS_MAX:
            os.close(self.fds.pop())
        if not data:
            raise ConnectionResetError
        self.connection.feed(data)

    def transmit(self) -> None:
        """Give the client what it takes. ConnectionError when it has gone."""
        while self.out:
            with contextlib.suppress(BlockingIOError):
                count = self.sock.send(memoryview(self.out)[:_UNREAD_MAX])
                del self.out[:count]
                self.connection.drained()
                continue
            break

    def close(self) -> None:
        """Forget it."""
        self.connection.close()
        self.sock.close()
        for fd in self.fds:
            os.close(fd)


class Server:
    """Serves one folder: ``socket``, ``journal`` and ``lock`` are its files."""

    def __init__(self, folder: Path, idle_seconds: float) -> None:
        """
        Take the folder, read the saved state, listen. ``idle_seconds``: without clients for so long,
        :meth:`serve` returns; the state stays.

        Busy if another process has the folder; OSError; ValueError for a saved state that cannot be read.
        """
        self.store = Store()
        self.pending: set[_Client] = set()
        self.leaving: set[_Client] = set()
        self._path = folder / "socket"
        self._idle_seconds = idle_seconds
        self._clients: set[_Client] = set()
        self._selector = selectors.DefaultSelector()
        self._lock = _lock(folder / "lock")
        self._journal = Journal(folder / "journal", self.store)
        self.store.initialise()
        self._listener = self._listen()
        self._stop_reading, self._stop_writing = os.pipe()
        os.set_blocking(self._stop_writing, False)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        draft = self._path.with_name(".socket.new")
        draft.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            listener.bind(os.fspath(draft))
        finally:
            os.umask(mask)
        listener.listen(64)
        draft.rename(self._path)
        self._selector.register(listener, selectors.EVENT_READ)
        return listener

    def add(self, sock: socket.socket, domid: int = 0) -> None:
        """Another client."""
        sock.setblocking(False)
        try:
            client = _Client(self, sock, domid)
        except StoreError:
            sock.close()
            return
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)
        self.pending.add(client)

    def sign(self) -> None:
        """Write our process id into the lock's file, for who looks for us."""
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def stop(self) -> None:
        """Let :meth:`serve` return soon; for signal handlers."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._stop_writing, b"x")

    def serve(self) -> None:
        """Until it is stopped or has been idle for long enough."""
        self._selector.register(self._stop_reading, selectors.EVENT_READ)
        busy_at = time.monotonic()
        while True:
            if self._clients:  # a running domain is one
                busy_at = time.monotonic()
                patience = None
            else:
                patience = busy_at + self._idle_seconds - time.monotonic()
                if patience <= 0:
                    if self._leave():
                        return
                    continue
            for key, mask in self._selector.select(patience):
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj == self._stop_reading:
                    self._path.unlink(missing_ok=True)
                    self._close()
                    return
                elif key.data in self._clients:
                    self._run(key.data, mask)
            self._settle()
            self._journal.maintain()

    def _run(self, client: _Client, mask: int) -> None:
        try:
            if mask & selectors.EVENT_READ:
                client.receive()
            if mask & selectors.EVENT_WRITE:
                client.transmit()
        except BlockingIOError:
            pass
        except OSError:
            self.leaving.add(client)
        except Exception:  # a defect, and what one client does shall not stop the others
            with contextlib.suppress(Exception):
                traceback.print_exc()
            self.leaving.add(client)
        self.pending.add(client)

    def _settle(self) -> None:
        """Send what there is to send, see off who has gone, and choose what to wait for."""
        while self.pending or self.leaving:
            for client in list(self.pending):
                self.pending.discard(client)
                if client not in self._clients:
                    continue
                try:
                    client.transmit()
                except OSError:
                    self.leaving.add(client)
                    continue
                wanted = selectors.EVENT_WRITE if client.out else 0
                if len(client.out) <= _UNREAD_MAX:
                    wanted |= selectors.EVENT_READ
                if self._selector.get_key(client.sock).events != wanted:
                    self._selector.modify(client.sock, wanted, client)
            for client in list(self.leaving):
                self.leaving.discard(client)
                if client in self._clients:
                    self._clients.discard(client)
                    self._selector.unregister(client.sock)
                    client.close()
                    self.leaving.discard(client)

    def _accept(self) -> bool:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # nobody, or too many files: they wait
            return False
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        if struct.unpack("3i", credentials)[1] not in (0, os.getuid()):
            sock.close()
            return False
        self.add(sock)
        return True

    def _leave(self) -> bool:
        """Stop serving, unless a client comes just then."""
        self._path.unlink(missing_ok=True)
        if self._accept():
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = self._listen()
            return False
        self._close()
        return True

    def _close(self) -> None:
        for client in list(self._clients):
            client.close()
        self._clients.clear()
        self._selector.close()
        self._listener.close()
        self._journal.close()
        os.close(self._stop_reading)
        os.close(self._stop_writing)
        os.close(self._lock)


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + _LOCK_SECONDS  # a predecessor may be on its way out
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(fd)
                raise Busy(f"another process serves {path.parent}") from None
        time.sleep(0.01)


def install_signals(server: Server) -> None:
    """SIGTERM and SIGINT end the process in order; nothing is lost either way."""
    signal.signal(signal.SIGTERM, lambda number, frame: server.stop())
    signal.signal(signal.SIGINT, lambda number, frame: server.stop())
