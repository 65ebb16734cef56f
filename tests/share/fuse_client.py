"""FUSE requests as a guest's kernel makes them, to a server in this process."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from nonroot.backends import fuse_abi as fuse
from nonroot.backends.fuse_abi import Opcode
from nonroot.backends.share_server import FolderServer

Ask = Callable[[int, int, bytes], tuple[int, bytes]]
"""(opcode, node, body) -> (errno, what came back)."""


class Attributes:
    """struct fuse_attr."""

    def __init__(self, data: bytes) -> None:
        fields = struct.unpack_from("<QQQqqqIIIIIIIIII", data)
        self.inode, self.size = fields[0], fields[1]
        self.mtime = fields[4]
        self.mode, self.links, self.uid, self.gid = fields[9:13]


class Client:
    """Each method is one request. OSError for a refusal."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.request(Opcode.INIT, 0, fuse.INIT_IN.pack(7, 36, 1 << 17, 0xFFFFFFFF) + bytes(48))

    def request(self, opcode: int, node: int, body: bytes = b"") -> bytes:
        error, data = self.ask(opcode, node, body)
        if error:
            raise OSError(error, os.strerror(error))
        return data

    def lookup(self, name: str | bytes, node: int = 1) -> tuple[int, Attributes]:
        return entry(self.request(Opcode.LOOKUP, node, os.fsencode(name) + b"\0"))

    def walk(self, path: str) -> int:
        node = 1
        for name in path.split("/"):
            node = self.lookup(name, node)[0]
        return node

    def getattr(self, node: int) -> Attributes:
        return Attributes(self.request(Opcode.GETATTR, node, fuse.GETATTR_IN.pack(0, 0))[16:])

    def setattr(
        self, node: int, valid: int, *, size: int = 0, mode: int = 0, uid: int = 0, mtime: int = 0
    ) -> Attributes:
        body = fuse.SETATTR_IN.pack(valid, 0, size, 0, 0, mtime, 0, 0, 0, 0, mode, uid, 0)
        return Attributes(self.request(Opcode.SETATTR, node, body)[16:])

    def open(self, node: int, flags: int = os.O_RDONLY, opcode: int = Opcode.OPEN) -> int:
        return int(fuse.OPEN_OUT.unpack_from(self.request(opcode, node, fuse.OPEN_IN.pack(flags, 0)))[0])

    def create(self, name: str, node: int = 1, flags: int = os.O_RDWR, mode: int = 0o644) -> tuple[int, int]:
        """(node, handle)."""
        data = self.request(Opcode.CREATE, node, fuse.CREATE_IN.pack(flags, mode, 0, 0) + os.fsencode(name) + b"\0")
        return entry(data)[0], int(fuse.OPEN_OUT.unpack_from(data, 128)[0])

    def read(self, handle: int, size: int, offset: int = 0, opcode: int = Opcode.READ) -> bytes:
        return self.request(opcode, 1, fuse.READ_IN.pack(handle, offset, size, 0, 0, 0))

    def write(self, handle: int, data: bytes, offset: int = 0) -> int:
        body = fuse.WRITE_IN.pack(handle, offset, len(data), 0, 0, 0) + data
        return int(fuse.WRITE_OUT.unpack(self.request(Opcode.WRITE, 1, body))[0])

    def release(self, handle: int, opcode: int = Opcode.RELEASE) -> None:
        self.request(opcode, 1, fuse.RELEASE_IN.pack(handle, 0, 0, 0))

    def names(self, opcode: int, node: int, *names: str | bytes, head: bytes = b"") -> bytes:
        return self.request(opcode, node, head + b"".join(os.fsencode(name) + b"\0" for name in names))

    def list(self, node: int = 1, plus: bool = False, size: int = 4096) -> dict[str, int]:
        """Names and types (with plus: nodes)."""
        handle = self.open(node, opcode=Opcode.OPENDIR)
        opcode = Opcode.READDIRPLUS if plus else Opcode.READDIR
        found: dict[str, int] = {}
        offset = 0
        while data := self.read(handle, size, offset, opcode):
            assert len(data) <= size
            while data:
                number = 0
                if plus:
                    number, data = fuse.ENTRY_OUT.unpack_from(data)[0], data[128:]
                _, offset, length, kind = fuse.DIRENT.unpack_from(data)
                found[os.fsdecode(data[24 : 24 + length])] = number if plus else kind
                data = data[24 + length + -length % 8 :]
        self.release(handle, Opcode.RELEASEDIR)
        return found


def entry(data: bytes) -> tuple[int, Attributes]:
    """struct fuse_entry_out."""
    return int(fuse.ENTRY_OUT.unpack_from(data)[0]), Attributes(data[40:])


@contextlib.contextmanager
def local(folder: Path, read_only: bool = False, most_files: int = 1024) -> Iterator[tuple[Client, FolderServer]]:
    """A server in this process, not confined; with the context everything that it opened is closed."""
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    links = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY)
    server = FolderServer(root, links, read_only, most_files)

    def ask(opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        message = fuse.IN_HEADER.pack(40 + len(body), opcode, 4, node, 0, 0, 1, 0, 0) + body
        reply = b"".join(server.handle(memoryview(message)))
        if not reply:
            return errno.EAGAIN, b""
        length, error, unique = fuse.OUT_HEADER.unpack_from(reply)
        assert (length, unique) == (len(reply), 4)
        assert error <= 0
        return -error, reply[16:]

    try:
        yield Client(ask), server
    finally:
        server.close()
        os.close(root)
        os.close(links)
