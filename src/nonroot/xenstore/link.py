"""A domain's process and XenStore's: what pumps the guest's ring needs no more than this.

The link speaks as one introduced domain. It finds the process again when that was restarted, and has it answer what the
earlier one left unanswered, so that the guest does not notice.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from nonroot.xenstore import place
from nonroot.xenstore.errors import XenStoreLostError
from nonroot.xenstore.relay import Relay
from nonroot.xenstore.wire import HEADER, Kind, pack

__all__ = ["DomainLink"]

_PATIENCE: Final = (0.0, 0.01, 0.1, 0.5, 2.0)
"""Seconds to wait before the process is looked for again."""
_PIECE: Final = 1024
"""Bytes given on at once: with what may be without an answer, less than a socket holds, so that sending never waits."""


class _UnknownError(XenStoreLostError):
    """The domain was released, or never introduced: looking again is of no use."""


class DomainLink:
    """A connection as domain ``domid``, with a thread that reads from it."""

    def __init__(
        self,
        domid: int,
        to_guest: Callable[[bytes], None],
        *,
        path: Path | None = None,
        on_lost: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """
        ``to_guest`` gets whole messages, in the link's thread or in the one that calls :meth:`from_guest`, never in two
        at once; it must not call the link. ``path``: of the socket; without one, the user's own process is used, and
        started if need be. ``on_lost``: called once, with half a sentence, if the process cannot be had any more, or
        does not know the domain any more.

        XenStoreLostError if it is so from the beginning.
        """
        self._domid = domid
        self._path = path
        self._on_lost = on_lost
        self._lock = threading.Condition()
        """Notified when an answer has come, or none will."""
        self._closed = False
        self._ended = False
        self._relay = Relay(self._send, to_guest)
        self._socket = self._connect()
        self._thread = threading.Thread(target=self._run, name=f"xenstore-{domid}", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> str | None:
        """Why the guest's bytes make no sense any more, as half a sentence."""
        with self._lock:
            return self._relay.broken

    def from_guest(self, data: bytes) -> None:
        """
        Bytes of the ring's request half, cut anywhere. Waits while the guest has too many requests without an answer:
        one that asks and does not listen for answers holds up itself.
        """
        for at in range(0, len(data), _PIECE):
            with self._lock:
                self._lock.wait_for(lambda: self._ended or self._relay.room or self._relay.broken)
                self._relay.from_guest(data[at : at + _PIECE])

    def reset(self) -> None:
        """The guest starts again; events of its earlier watches may still come."""
        with self._lock:
            self._relay.reset()

    def close(self) -> None:
        """End the link; the domain's watches stay until it is released. Not from ``to_guest``."""
        with self._lock:
            self._closed = True
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _connect(self) -> socket.socket:
        try:
            connection = place.open_socket(self._path or place.ensure())
        except OSError as error:
            raise XenStoreLostError(f"XenStore's socket cannot be used: {error.strerror or error}") from error
        if connection is None:
            raise XenStoreLostError(f"nobody serves XenStore at {self._path}")
        try:
            connection.sendall(pack(Kind.CONTROL, 0, 0, b"attach\0%d\0" % self._domid))
            kind, _, _, length = HEADER.unpack(_exactly(connection, HEADER.size))
            _exactly(connection, length)
        except OSError as error:
            connection.close()
            raise XenStoreLostError("XenStore's process went away") from error
        if kind == Kind.ERROR:
            connection.close()
            raise _UnknownError(f"XenStore does not know domain {self._domid}")
        return connection

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the thread notices; what was not answered is sent again
            self._socket.sendall(data)

    def _run(self) -> None:
        while True:
            try:
                data = self._socket.recv(16 << 10)
            except OSError:
                data = b""
            if data:
                with self._lock:
                    self._relay.from_store(data)
                    self._lock.notify_all()
            elif not self._again():
                with self._lock:
                    self._ended = True
                    self._lock.notify_all()
                return

    def _again(self) -> bool:
        """Find the process once more."""
        reason = ""
        for patience in _PATIENCE:
            with self._lock:
                if self._closed:
                    return False
                if self._relay.broken:
                    reason = self._relay.broken
                    break
            time.sleep(patience)
            try:
                connection = self._connect()
            except XenStoreLostError as error:
                reason = str(error)
                if isinstance(error, _UnknownError):
                    break
            else:
                return self._take(connection)
        self._on_lost(reason)
        return False

    def _take(self, connection: socket.socket) -> bool:
        with self._lock:
            self._socket.close()
            self._socket = connection
            if not self._closed:
                self._relay.resend()
            return not self._closed


def _exactly(connection: socket.socket, count: int) -> bytes:
    """So many bytes. ConnectionError if there are fewer."""
    data = connection.recv(count, socket.MSG_WAITALL) if count else b""
    if len(data) != count:
        raise ConnectionResetError
    return data
