"""Links between network backends: Unix sockets of packets, each of which is one frame."""

import contextlib
import errno
import socket
from collections import deque
from typing import Final

from nonroot.backends.frame import HEADER_BYTES, LONGEST_FRAME, Frame, FrameError

__all__ = ["Link", "LinkClosedError", "link_pair"]

BUFFER_BYTES: Final = 4 << 20
"""What the kernel may hold for us, if its own limit allows."""
BACKLOG_BYTES: Final = 4 << 20


class LinkClosedError(ConnectionError):
    """The other end is gone."""


class Link:
    """One end. Never blocks; what does not fit goes to a bounded backlog; more is dropped, as on any wire."""

    def __init__(self, sock: socket.socket) -> None:
        """``sock`` is the link's from now on. ValueError if it is no packet socket."""
        if sock.type & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) != socket.SOCK_SEQPACKET:
            raise ValueError("a link is a SOCK_SEQPACKET socket")
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        self._socket = sock
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self.dropped = 0
        """Frames that did not fit."""
        self.malformed = 0
        """Messages that were no frames."""

    def fileno(self) -> int:
        """For poll(2)."""
        return self._socket.fileno()

    @property
    def busy(self) -> bool:
        """Whether there is a backlog: :meth:`drain` wants to be called when the socket can be written."""
        return bool(self._backlog)

    def send(self, frame: Frame) -> bool:
        """Send, or queue. False if the frame was dropped. LinkClosedError."""
        return self.send_message(frame.pack())

    def send_message(self, message: bytes) -> bool:
        """The same with a frame that is packed already."""
        if not self._backlog and self._try(message):
            return True
        if self._backlog_bytes + len(message) > BACKLOG_BYTES:
            self.dropped += 1
            return False
        self._backlog.append(message)
        self._backlog_bytes += len(message)
        return True

    def drain(self) -> None:
        """Send as much of the backlog as fits. LinkClosedError."""
        while self._backlog and self._try(self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.popleft())

    def _try(self, message: bytes) -> bool:
        try:
            self._socket.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in (errno.ENOBUFS, errno.EMSGSIZE):
                return error.errno == errno.EMSGSIZE  # too long for the socket's buffer: gone, as on a wire
            raise LinkClosedError(error.errno, "the link is closed") from None
        return True

    def receive(self) -> bytes | None:
        """The next message, as it came; None if there is none now. LinkClosedError."""
        try:
            message = self._socket.recv(HEADER_BYTES + LONGEST_FRAME + 1)
        except BlockingIOError:
            return None
        except OSError as error:
            raise LinkClosedError(error.errno, "the link is closed") from None
        if not message:
            raise LinkClosedError(errno.EPIPE, "the link is closed")
        return message

    def receive_frame(self) -> Frame | None:
        """The next frame; malformed messages are counted and passed over. LinkClosedError."""
        while (message := self.receive()) is not None:
            try:
                return Frame.unpack(message)
            except FrameError:
                self.malformed += 1
        return None

    def close(self) -> None:
        """Close. Safe to call again."""
        with contextlib.suppress(OSError):
            self._socket.close()


def link_pair() -> tuple[socket.socket, socket.socket]:
    """The two ends of a new link, not inherited by other programs."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
