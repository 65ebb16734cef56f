"""A client of the Network Block Device protocol: fixed newstyle handshake, simple replies, one request at a time.

Source: the NBD protocol, https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

import contextlib
import errno
import socket
import struct
from typing import Final

from nonroot.backends.image import whole_sectors

__all__ = ["NbdError", "NbdImage"]

INIT_MAGIC: Final = 0x4E42444D41474943
OPTION_MAGIC: Final = 0x49484156454F5054
REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698

FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1
OPTION_GO: Final = 7
REPLY_ACK: Final = 1
REPLY_INFO: Final = 3
REPLY_ERROR: Final = 1 << 31
INFO_EXPORT: Final = 0

TRANSMIT_READ_ONLY: Final = 1 << 1
TRANSMIT_FLUSH: Final = 1 << 2

READ: Final = 0
WRITE: Final = 1
DISCONNECT: Final = 2
FLUSH: Final = 3

_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
LONGEST_TEXT: Final = 64 * 1024


class NbdError(OSError):
    """The server has gone, or does not speak as it should."""


class NbdImage:
    """An export of an NBD server, over a connected socket that is ours from now on."""

    def __init__(self, sock: socket.socket, export: str, read_only: bool = False, timeout: float = 30.0) -> None:
        """NbdError if the handshake fails. ``timeout`` (seconds) is for the handshake; requests wait as they must."""
        self._socket = sock
        self._cookie = 0
        self._open = True
        sock.settimeout(timeout)
        try:
            self._handshake(export)
        except (OSError, struct.error) as error:
            sock.close()
            raise error if isinstance(error, NbdError) else NbdError(errno.EIO, str(error)) from None
        sock.settimeout(None)
        self._read_only = read_only or bool(self._flags & TRANSMIT_READ_ONLY)

    @property
    def size(self) -> int:
        """Bytes, whole sectors."""
        return whole_sectors(self._size)

    @property
    def read_only(self) -> bool:
        """Whether the export or its user says so."""
        return self._read_only

    def _receive(self, length: int) -> bytes:
        data = bytearray(length)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise NbdError(errno.EIO, "the NBD server has gone")
            view = view[got:]
        return bytes(data)

    def _handshake(self, export: str) -> None:
        magic, option_magic, flags = struct.unpack(">QQH", self._receive(18))
        if magic != INIT_MAGIC or option_magic != OPTION_MAGIC or not flags & FLAG_FIXED_NEWSTYLE:
            raise NbdError(errno.EPROTO, "this is no NBD server of today")
        self._socket.sendall(struct.pack(">I", flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)))
        name = export.encode()
        body = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">QII", OPTION_MAGIC, OPTION_GO, len(body)) + body)
        self._size = self._flags = -1
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != REPLY_MAGIC or option != OPTION_GO or length > LONGEST_TEXT:
                raise NbdError(errno.EPROTO, "the NBD server answers something else")
            payload = self._receive(length)
            if kind & REPLY_ERROR:
                raise NbdError(errno.EIO, f"the NBD server refuses: {payload.decode('utf-8', 'replace')}")
            if kind == REPLY_INFO and len(payload) >= 12 and payload[:2] == b"\0\0":
                self._size, self._flags = struct.unpack(">QH", payload[2:12])
            elif kind == REPLY_ACK:
                break
        if self._size < 0:
            raise NbdError(errno.EPROTO, "the NBD server does not tell the size")

    def _request(self, kind: int, offset: int, length: int, data: bytes = b"") -> None:
        """Send a request and take the head of its reply. OSError with the server's errno."""
        if not self._open:
            raise NbdError(errno.EIO, "the image is closed")
        self._cookie = self._cookie + 1 & (1 << 64) - 1
        header = _REQUEST.pack(REQUEST_MAGIC, 0, kind, self._cookie, offset, length)
        try:
            self._socket.sendall(header + data)
            magic, error, cookie = _REPLY.unpack(self._receive(_REPLY.size))
            if magic != SIMPLE_REPLY_MAGIC or cookie != self._cookie:
                raise NbdError(errno.EPROTO, "the NBD server answers something else")
        except OSError:
            self._open = False  # what comes now could be taken for another answer
            raise
        if error:
            raise OSError(error, "the NBD server could not do it")

    def read(self, offset: int, length: int) -> bytes:
        """Bytes; zeros behind the export's end, in its last sector."""
        inside = max(0, min(length, self._size - offset))
        if not inside:
            return bytes(length)
        self._request(READ, offset, inside)
        return self._receive(inside).ljust(length, b"\0")

    def descriptor(self, offset: int, length: int) -> int | None:
        """None: the bytes come through a socket."""
        return None

    def write(self, offset: int, data: bytes) -> None:
        """All of ``data``; an export does not grow, what lies behind its end is an error."""
        if self._read_only:
            raise OSError(errno.EROFS, "the image is read-only")
        if offset + len(data) > self._size:
            raise OSError(errno.ENOSPC, "behind the end")
        self._request(WRITE, offset, len(data), data)

    def flush(self) -> None:
        """FLUSH, where the server has it."""
        if self._flags & TRANSMIT_FLUSH and not self._read_only:
            self._request(FLUSH, 0, 0)

    def close(self) -> None:
        """Say goodbye and close. Safe to call again."""
        if self._open:
            self._open = False
            with contextlib.suppress(OSError):
                self._socket.sendall(_REQUEST.pack(REQUEST_MAGIC, 0, DISCONNECT, 0, 0, 0))
        self._socket.close()
