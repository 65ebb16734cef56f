"""The files of a shared folder that a guest knows, each by a number and a descriptor that leads to nothing else.

A file is looked up by one name in one folder, never by a path, and no symbolic link is followed: so there is no way out
of the folder. A descriptor is opened with O_PATH: it names the file whatever becomes of its name. Of more files than
there may be descriptors, those that were not used for long are opened again when they are, by their folders and names;
if another file is there by then, the guest is told that its own is gone.
"""

import ctypes
import errno
import os
import stat
from collections import OrderedDict
from typing import Final

from nonroot.backends.fuse_abi import ROOT_ID

__all__ = ["Node", "Nodes", "check_name"]

LONGEST_NAME: Final = 255
LOOK: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
AT_EMPTY_PATH: Final = 0x1000
HANDLE_BYTES: Final = 128

_libc = ctypes.CDLL(None, use_errno=True)


class _FileHandle(ctypes.Structure):
    _fields_ = [
        ("handle_bytes", ctypes.c_uint),
        ("handle_type", ctypes.c_int),
        ("f_handle", ctypes.c_ubyte * HANDLE_BYTES),
    ]


def identity(fd: int) -> bytes:
    """What tells a file from a later one with the same inode number: its type, and its handle if the system has one."""
    handle = _FileHandle(handle_bytes=HANDLE_BYTES)
    mount = ctypes.c_int()
    kind = stat.S_IFMT(os.fstat(fd).st_mode).to_bytes(4, "little")
    if _libc.name_to_handle_at(fd, b"", ctypes.byref(handle), ctypes.byref(mount), AT_EMPTY_PATH):
        return kind
    return kind + bytes(handle.f_handle[: handle.handle_bytes])


def check_name(name: bytes) -> bytes:
    """A name of one file in a folder. OSError for what is none."""
    if len(name) > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, "name too long")
    if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, "no name")
    return name


class Node:
    """One file, folder, link or other thing."""

    __slots__ = ("fd", "handles", "identity", "key", "lookups", "name", "number", "parent")

    def __init__(self, number: int, key: tuple[int, int], parent: "Node | None", name: bytes) -> None:
        self.number = number
        """The guest's name for it."""
        self.key = key
        """Device and inode: what it is."""
        self.parent, self.name = parent, name
        """Where it was seen last."""
        self.fd = -1
        """An O_PATH descriptor, or -1."""
        self.lookups = 0
        """How often the guest has been told of it and has not forgotten."""
        self.identity = b""
        """While there is no descriptor: see :func:`identity`."""
        self.handles: list[int] = []
        """Open files of it: while there are some, its descriptor stays."""


class Nodes:
    """The table. For one thread."""

    def __init__(self, root_fd: int, most_open: int) -> None:
        """``root_fd``: the shared folder, this table's from now on. ``most_open``: descriptors to use, at least 8."""
        status = os.fstat(root_fd)
        self.device = status.st_dev
        self.root = Node(ROOT_ID, (status.st_dev, status.st_ino), None, b"")
        self.root.fd = root_fd
        self._most_open = max(most_open, 8)
        self._next = ROOT_ID + 1
        self._by_number: dict[int, Node] = {ROOT_ID: self.root}
        self._by_key: dict[tuple[int, int], Node] = {self.root.key: self.root}
        self._open: OrderedDict[int, Node] = OrderedDict()
        self._devices: dict[int, int] = {status.st_dev: 0}

    def __len__(self) -> int:
        return len(self._by_number)

    def get(self, number: int) -> Node:
        """The node of that number. OSError (ESTALE) if the guest has invented it."""
        try:
            return self._by_number[number]
        except KeyError:
            raise OSError(errno.ESTALE, "no such node") from None

    def inode(self, status: os.stat_result) -> int:
        """The inode number that the guest sees: of several file systems below the folder, different ones."""
        index = self._devices.setdefault(status.st_dev, len(self._devices))
        return status.st_ino ^ (index & 0xFFFF) << 48

    # ── descriptors ──

    def fd(self, node: Node) -> int:
        """Its descriptor, good until the next call here. OSError (ESTALE) if it cannot be found any more."""
        if node.fd >= 0:
            if node is not self.root:
                self._open.move_to_end(node.number)
            return node.fd
        way: list[Node] = []
        at: Node | None = node
        while at is not None and at.fd < 0:
            way.append(at)
            at = at.parent
        if at is None:
            raise OSError(errno.ESTALE, "no way to the node")
        while way:
            at, below = way.pop(), at.fd
            try:
                found = os.open(at.name, LOOK, dir_fd=below)
            except OSError:
                raise OSError(errno.ESTALE, "the node is gone") from None
            status = os.fstat(found)
            if (status.st_dev, status.st_ino) != at.key or identity(found) != at.identity:
                os.close(found)
                raise OSError(errno.ESTALE, "another file is there")
            self._keep(at, found)
        return node.fd

    def fds(self, one: Node, other: Node) -> tuple[int, int]:
        """Both descriptors, good at the same time. OSError (ESTALE)."""
        first = self.fd(one)
        one.handles.append(-1)
        try:
            return first, self.fd(other)
        finally:
            one.handles.remove(-1)

    def _keep(self, node: Node, fd: int) -> None:
        node.fd = fd
        self._open[node.number] = node
        for _ in range(len(self._open)):
            if len(self._open) <= self._most_open:
                break
            number, oldest = next(iter(self._open.items()))
            if oldest is node or oldest.handles:
                self._open.move_to_end(number)
                continue
            oldest.identity = identity(oldest.fd)
            self._close(oldest)

    def _close(self, node: Node) -> None:
        self._open.pop(node.number, None)
        if node.fd >= 0 and node is not self.root:
            os.close(node.fd)
            node.fd = -1

    # ── names ──

    def look_up(self, parent: Node, name: bytes) -> tuple[Node, os.stat_result]:
        """What is there now; the guest knows it once more. OSError."""
        found = os.open(check_name(name), LOOK, dir_fd=self.fd(parent))
        status = os.fstat(found)
        key = (status.st_dev, status.st_ino)
        node = self._by_key.get(key)
        if node is not None and node.fd < 0 and identity(found) != node.identity:
            node = None  # that file is gone, and its inode number has a new one
        if node is None:
            node = Node(self._next, key, parent, name)
            self._next += 1
            self._by_number[node.number] = self._by_key[key] = node
        elif node is not self.root and not _above(node, parent):
            node.parent, node.name = parent, name
        if node.fd >= 0:
            os.close(found)
        else:
            self._keep(node, found)
        node.lookups += 1
        return node, status

    def moved(self, parent: Node, name: bytes) -> None:
        """Something has been put there under that name."""
        try:
            status = os.stat(name, dir_fd=self.fd(parent), follow_symlinks=False)
        except OSError:
            return
        node = self._by_key.get((status.st_dev, status.st_ino))
        if node is not None and node is not self.root and not _above(node, parent):
            node.parent, node.name = parent, name

    def forget(self, number: int, count: int) -> None:
        """The guest has forgotten it so often."""
        node = self._by_number.get(number)
        if node is None or node is self.root:
            return
        node.lookups -= min(count, node.lookups)
        if not node.lookups and not node.handles:
            self._drop(node)

    def released(self, node: Node, handle: int) -> None:
        """An open file of it has been closed."""
        node.handles.remove(handle)
        if not node.handles and not node.lookups and node is not self.root:
            self._drop(node)

    def _drop(self, node: Node) -> None:
        self._close(node)
        self._by_number.pop(node.number, None)
        if self._by_key.get(node.key) is node:
            del self._by_key[node.key]

    def clear(self) -> None:
        """The guest has forgotten everything."""
        for node in list(self._by_number.values()):
            if node is not self.root:
                node.handles.clear()
                self._drop(node)
        for node in list(self._open.values()):  # folders that were forgotten before what they hold
            self._close(node)
        self.root.handles.clear()


def _above(node: Node, below: Node) -> bool:
    """Whether ``below`` lies in ``node``, as far as we know."""
    at: Node | None = below
    while at is not None:
        if at is node:
            return True
        at = at.parent
    return False
