"""The process that serves one shared folder: FUSE requests from a socket, answers to it.

It sees nothing but the folder: Landlock forbids every other file, a filter every other system call, and files are found
by single names in folders (:mod:`nonroot.backends.share_nodes`). What the guest says is hostile; nothing that it says
ends the process. In a folder that is read-only, this process refuses changes, has no rights to make any, and its filter
lacks the system calls for them.

Everything belongs to the user who runs it, and is shown to the guest as root's; what belongs to others on this machine
is shown as nobody's. The guest cannot give files away, nor make set-user-ID programs or device nodes.
"""

import contextlib
import ctypes
import errno
import os
import resource
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from nonroot.backends import fuse_abi as fuse
from nonroot.backends.fuse_abi import Init, Opcode, Set
from nonroot.backends.helper import run_helper
from nonroot.backends.share_nodes import Node, Nodes, check_name
from nonroot.confine import FOLDER_READER, FOLDER_WRITER, confine
from nonroot.errors import BadFileError

__all__ = ["LONGEST_REQUEST", "MOST_DATA", "FolderServer", "serve"]

MOST_DATA: Final = 1 << 20
"""Bytes that one request reads or writes at most."""
LONGEST_REQUEST: Final = MOST_DATA + 8192
MOST_FILES: Final = 1 << 16
"""Descriptors, if the system allows as many."""
VALID_SECONDS: Final = 1
"""How long the guest may believe in names and attributes without asking."""
NOBODY: Final = 65534
UNSAFE_BITS: Final = stat.S_ISUID | stat.S_ISGID
OPEN_FLAGS: Final = os.O_ACCMODE | os.O_APPEND | os.O_SYNC | os.O_DSYNC
"""What is taken over from the guest's flags."""
SAFE_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
RENAME_FLAGS: Final = 3
"""RENAME_NOREPLACE and RENAME_EXCHANGE."""

Parts = tuple[bytes, ...]
_libc = ctypes.CDLL(None, use_errno=True)

_WRITES: Final = frozenset(
    (
        Opcode.SETATTR, Opcode.SYMLINK, Opcode.MKNOD, Opcode.MKDIR, Opcode.UNLINK, Opcode.RMDIR, Opcode.RENAME,
        Opcode.LINK, Opcode.WRITE, Opcode.CREATE, Opcode.FALLOCATE, Opcode.RENAME2,
    )
)  # fmt: skip


class _Handle:
    """An open file or folder."""

    __slots__ = ("entries", "fd", "node")

    def __init__(self, fd: int, node: Node) -> None:
        self.fd, self.node = fd, node
        self.entries: list[tuple[bytes, int, int]] = []
        """Of a folder: (name, inode, type), as it was when it was read from the start."""


class FolderServer:
    """Answers requests about one folder. For one thread."""

    def __init__(self, root_fd: int, links_fd: int, read_only: bool, most_files: int = 1024) -> None:
        """
        ``root_fd``: the folder, open for reading; it is this object's. ``links_fd``: this process's ``/proc/self/fd``.
        ``most_files``: descriptors that there may be at one time.
        """
        self._links = links_fd
        self._read_only = read_only
        self._nodes = Nodes(root_fd, most_files // 2)
        self._most_handles = max(most_files // 4, 8)
        self._handles: dict[int, _Handle] = {}
        self._next_handle = 1
        self._uid, self._gid = os.geteuid(), os.getegid()
        self._methods: dict[int, Callable[[int, memoryview], Parts]] = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.STATFS: self._statfs,
            Opcode.RELEASE: self._release,
            Opcode.RELEASEDIR: self._release,
            Opcode.FSYNC: self._fsync,
            Opcode.FSYNCDIR: self._fsync,
            Opcode.SYNCFS: self._syncfs,
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: lambda number, body: self._readdir(body, False),
            Opcode.READDIRPLUS: lambda number, body: self._readdir(body, True),
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.DESTROY: self._destroy,
        }

    def handle(self, message: memoryview) -> Parts:
        """The answer to one whole request, in parts to be sent together; empty if there is none."""
        _, opcode, unique, number, *_ = fuse.IN_HEADER.unpack_from(message)
        body = message[fuse.IN_HEADER.size :]
        if opcode in fuse.NO_REPLY:
            with contextlib.suppress(struct.error):
                self._forget(opcode, number, body)
            return ()
        method = self._methods.get(opcode)
        if method is None:
            return (fuse.error_reply(unique, errno.ENOSYS),)
        if self._read_only and opcode in _WRITES:
            return (fuse.error_reply(unique, errno.EROFS),)
        try:
            parts = method(number, body)
        except OSError as error:
            return (fuse.error_reply(unique, error.errno or errno.EIO),)
        except (struct.error, ValueError, OverflowError):
            return (fuse.error_reply(unique, errno.EINVAL),)
        except MemoryError:
            return (fuse.error_reply(unique, errno.ENOMEM),)
        length = fuse.OUT_HEADER.size + sum(map(len, parts))
        return (fuse.OUT_HEADER.pack(length, 0, unique), *parts)

    def close(self) -> None:
        """Close all but the folder itself. Safe to call again."""
        for handle in self._handles.values():
            os.close(handle.fd)
        self._handles.clear()
        self._nodes.clear()

    # ── the session ──

    def _init(self, number: int, body: memoryview) -> Parts:
        major, minor, readahead, offered = fuse.INIT_IN.unpack_from(body)
        if major < fuse.MAJOR or (major == fuse.MAJOR and minor < 27):
            raise OSError(errno.EPROTO, "too old")
        self.close()  # a guest that has booted anew
        wanted = (
            Init.ASYNC_READ
            | Init.BIG_WRITES
            | Init.AUTO_INVAL_DATA
            | Init.DO_READDIRPLUS
            | Init.READDIRPLUS_AUTO
            | Init.ASYNC_DIO
            | Init.PARALLEL_DIROPS
            | Init.MAX_PAGES
        )
        pages = MOST_DATA // 4096
        return (
            fuse.INIT_OUT.pack(
                fuse.MAJOR, min(minor, fuse.MINOR) if major == fuse.MAJOR else fuse.MINOR,
                min(readahead, MOST_DATA), offered & wanted, 64, 48, MOST_DATA, 1, pages, 0,
            ),
        )  # fmt: skip

    def _destroy(self, number: int, body: memoryview) -> Parts:
        self.close()
        return ()

    def _forget(self, opcode: int, number: int, body: memoryview) -> None:
        if opcode == Opcode.FORGET:
            self._nodes.forget(number, fuse.FORGET_IN.unpack_from(body)[0])
        elif opcode == Opcode.BATCH_FORGET:
            count = min(fuse.BATCH_FORGET_IN.unpack_from(body)[0], len(body) // fuse.FORGET_ONE.size)
            for index in range(count):
                at = fuse.BATCH_FORGET_IN.size + index * fuse.FORGET_ONE.size
                self._nodes.forget(*fuse.FORGET_ONE.unpack_from(body, at))

    # ── attributes ──

    def _attributes(self, status: os.stat_result) -> bytes:
        owner = 0 if status.st_uid == self._uid else NOBODY
        group = 0 if status.st_gid == self._gid else NOBODY
        return fuse.attributes(status, self._nodes.inode(status), owner, group)

    def _attr_reply(self, node: Node) -> Parts:
        return (fuse.ATTR_OUT.pack(VALID_SECONDS, 0), self._attributes(os.fstat(self._nodes.fd(node))))

    def _entry(self, parent: Node, name: bytes) -> bytes:
        node, status = self._nodes.look_up(parent, name)
        head = fuse.ENTRY_OUT.pack(node.number, 0, VALID_SECONDS, VALID_SECONDS, 0, 0)
        return head + self._attributes(status)

    def _lookup(self, number: int, body: memoryview) -> Parts:
        (name,) = _names(body, 1)
        return (self._entry(self._nodes.get(number), name),)

    def _getattr(self, number: int, body: memoryview) -> Parts:
        return self._attr_reply(self._nodes.get(number))

    def _setattr(self, number: int, body: memoryview) -> Parts:
        valid, fh, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, uid, gid = fuse.SETATTR_IN.unpack_from(body)
        node = self._nodes.get(number)
        fd = self._nodes.fd(node)
        status = os.fstat(fd)
        link = str(fd)
        if valid & Set.UID and uid != (0 if status.st_uid == self._uid else NOBODY):
            raise OSError(errno.EPERM, "files are not given away")
        if valid & Set.GID and gid != (0 if status.st_gid == self._gid else NOBODY):
            raise OSError(errno.EPERM, "files are not given away")
        if valid & Set.MODE:
            if stat.S_ISLNK(status.st_mode):
                raise OSError(errno.EOPNOTSUPP, "a link has no mode")
            os.chmod(link, self._mode(mode, stat.S_ISDIR(status.st_mode)), dir_fd=self._links)
        if valid & Set.SIZE:
            handle = self._handles.get(fh) if valid & Set.HANDLE else None
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "no file")
            if handle is not None and handle.node is node:
                os.ftruncate(handle.fd, size)
            else:
                other = os.open(link, os.O_WRONLY | SAFE_FLAGS, dir_fd=self._links)
                try:
                    os.ftruncate(other, size)
                finally:
                    os.close(other)
        if valid & (Set.ATIME | Set.MTIME):
            now = time.time_ns()
            times = [status.st_atime_ns, status.st_mtime_ns]
            if valid & Set.ATIME:
                times[0] = now if valid & Set.ATIME_NOW else _signed(atime) * 1_000_000_000 + atime_ns
            if valid & Set.MTIME:
                times[1] = now if valid & Set.MTIME_NOW else _signed(mtime) * 1_000_000_000 + mtime_ns
            os.utime(link, ns=(times[0], times[1]), dir_fd=self._links)
        return self._attr_reply(node)

    @staticmethod
    def _mode(mode: int, is_folder: bool) -> int:
        """Permission bits as they may be set."""
        if mode & UNSAFE_BITS and not is_folder:
            raise OSError(errno.EPERM, "no programs that run as somebody else")
        return mode & 0o7777 & ~stat.S_ISUID

    # ── names ──

    def _readlink(self, number: int, body: memoryview) -> Parts:
        return (os.readlink(b"", dir_fd=self._nodes.fd(self._nodes.get(number))),)

    def _symlink(self, number: int, body: memoryview) -> Parts:
        name, target = _names(body, 2)
        parent = self._nodes.get(number)
        os.symlink(target, check_name(name), dir_fd=self._nodes.fd(parent))
        return (self._entry(parent, name),)

    def _mknod(self, number: int, body: memoryview) -> Parts:
        mode, _, _ = fuse.MKNOD_IN.unpack_from(body)
        (name,) = _names(body[fuse.MKNOD_IN.size :], 1)
        parent = self._nodes.get(number)
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise OSError(errno.EPERM, "no device nodes")
        permissions = self._mode(mode, False)
        os.mknod(check_name(name), stat.S_IFMT(mode) | permissions, dir_fd=self._nodes.fd(parent))
        return (self._entry(parent, name),)

    def _mkdir(self, number: int, body: memoryview) -> Parts:
        mode, _ = fuse.MKDIR_IN.unpack_from(body)
        (name,) = _names(body[fuse.MKDIR_IN.size :], 1)
        parent = self._nodes.get(number)
        os.mkdir(check_name(name), self._mode(mode, True), dir_fd=self._nodes.fd(parent))
        return (self._entry(parent, name),)

    def _unlink(self, number: int, body: memoryview) -> Parts:
        (name,) = _names(body, 1)
        os.unlink(check_name(name), dir_fd=self._nodes.fd(self._nodes.get(number)))
        return ()

    def _rmdir(self, number: int, body: memoryview) -> Parts:
        (name,) = _names(body, 1)
        os.rmdir(check_name(name), dir_fd=self._nodes.fd(self._nodes.get(number)))
        return ()

    def _rename(self, number: int, body: memoryview) -> Parts:
        (target,) = fuse.RENAME_IN.unpack_from(body)
        return self._move(number, target, 0, body[fuse.RENAME_IN.size :])

    def _rename2(self, number: int, body: memoryview) -> Parts:
        target, flags = fuse.RENAME2_IN.unpack_from(body)
        return self._move(number, target, flags, body[fuse.RENAME2_IN.size :])

    def _move(self, number: int, target: int, flags: int, body: memoryview) -> Parts:
        old, new = map(check_name, _names(body, 2))
        if flags & ~RENAME_FLAGS:
            raise OSError(errno.EINVAL, "unknown flags")
        source, goal = self._nodes.get(number), self._nodes.get(target)
        source_fd, goal_fd = self._nodes.fds(source, goal)
        if flags:
            _check(_libc.renameat2(source_fd, old, goal_fd, new, flags))
        else:
            os.rename(old, new, src_dir_fd=source_fd, dst_dir_fd=goal_fd)
        self._nodes.moved(goal, new)
        if flags:
            self._nodes.moved(source, old)
        return ()

    def _link(self, number: int, body: memoryview) -> Parts:
        (old,) = fuse.LINK_IN.unpack_from(body)
        (name,) = _names(body[fuse.LINK_IN.size :], 1)
        parent = self._nodes.get(number)
        old_fd, parent_fd = self._nodes.fds(self._nodes.get(old), parent)
        source = str(old_fd).encode()
        os.link(source, check_name(name), src_dir_fd=self._links, dst_dir_fd=parent_fd, follow_symlinks=True)
        return (self._entry(parent, name),)

    # ── open files ──

    def _handle(self, number: int) -> _Handle:
        try:
            return self._handles[number]
        except KeyError:
            raise OSError(errno.EBADF, "no such handle") from None

    def _add_handle(self, node: Node, fd: int) -> bytes:
        number = self._next_handle
        self._next_handle += 1
        self._handles[number] = _Handle(fd, node)
        node.handles.append(number)
        return fuse.OPEN_OUT.pack(number, 0)

    def _open_node(self, node: Node, flags: int) -> int:
        """A descriptor of a regular file: nothing else is ever opened for its contents."""
        if self._read_only and flags & os.O_ACCMODE != os.O_RDONLY:
            raise OSError(errno.EROFS, "read-only")
        if len(self._handles) >= self._most_handles:
            raise OSError(errno.ENFILE, "too many open files")
        fd = self._nodes.fd(node)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "no file")
        return os.open(str(fd), flags & OPEN_FLAGS | SAFE_FLAGS, dir_fd=self._links)

    def _open(self, number: int, body: memoryview) -> Parts:
        flags, _ = fuse.OPEN_IN.unpack_from(body)
        node = self._nodes.get(number)
        return (self._add_handle(node, self._open_node(node, flags)),)

    def _create(self, number: int, body: memoryview) -> Parts:
        flags, mode, _, _ = fuse.CREATE_IN.unpack_from(body)
        (name,) = _names(body[fuse.CREATE_IN.size :], 1)
        parent = self._nodes.get(number)
        if len(self._handles) >= self._most_handles:
            raise OSError(errno.ENFILE, "too many open files")
        exclusive = flags & OPEN_FLAGS | SAFE_FLAGS | os.O_CREAT | os.O_EXCL
        permissions = self._mode(mode, False)
        fd = -1
        try:
            fd = os.open(check_name(name), exclusive, permissions, dir_fd=self._nodes.fd(parent))
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
        try:
            entry = self._entry(parent, name)
            node = self._nodes.get(fuse.ENTRY_OUT.unpack_from(entry)[0])
            if fd < 0:
                try:
                    fd = self._open_node(node, flags)
                except OSError:
                    self._nodes.forget(node.number, 1)
                    raise
        except OSError:
            if fd >= 0:
                os.close(fd)
            raise
        return (entry, self._add_handle(node, fd))

    def _read(self, number: int, body: memoryview) -> Parts:
        fh, offset, size, *_ = fuse.READ_IN.unpack_from(body)
        return (os.pread(self._handle(fh).fd, min(size, MOST_DATA), offset),)

    def _write(self, number: int, body: memoryview) -> Parts:
        fh, offset, size, *_ = fuse.WRITE_IN.unpack_from(body)
        data = body[fuse.WRITE_IN.size :]
        if len(data) != size:
            raise OSError(errno.EINVAL, "not so many bytes")
        return (fuse.WRITE_OUT.pack(os.pwrite(self._handle(fh).fd, data, offset)),)

    def _release(self, number: int, body: memoryview) -> Parts:
        fh, *_ = fuse.RELEASE_IN.unpack_from(body)
        handle = self._handles.pop(fh, None)
        if handle is not None:
            os.close(handle.fd)
            self._nodes.released(handle.node, fh)
        return ()

    def _fsync(self, number: int, body: memoryview) -> Parts:
        fh, flags = fuse.FSYNC_IN.unpack_from(body)
        fd = self._handle(fh).fd
        if flags & 1:
            os.fdatasync(fd)
        else:
            os.fsync(fd)
        return ()

    def _syncfs(self, number: int, body: memoryview) -> Parts:
        if not self._read_only:
            _check(_libc.syncfs(self._nodes.root.fd))
        return ()

    def _fallocate(self, number: int, body: memoryview) -> Parts:
        fh, offset, length, mode = fuse.FALLOCATE_IN.unpack_from(body)
        long = ctypes.c_long
        if max(offset, length) >= 1 << 63:
            raise OSError(errno.EINVAL, "too far")
        _check(_libc.fallocate(self._handle(fh).fd, mode, long(offset), long(length)))
        return ()

    def _lseek(self, number: int, body: memoryview) -> Parts:
        fh, offset, whence = fuse.LSEEK_IN.unpack_from(body)
        if whence not in (os.SEEK_DATA, os.SEEK_HOLE):
            raise OSError(errno.EINVAL, "nothing to seek")
        return (fuse.LSEEK_OUT.pack(os.lseek(self._handle(fh).fd, offset, whence)),)

    def _statfs(self, number: int, body: memoryview) -> Parts:
        found = os.fstatvfs(self._nodes.root.fd)
        numbers = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        return (fuse.STATFS_OUT.pack(*numbers, found.f_bsize, found.f_namemax, found.f_frsize),)

    # ── folders ──

    def _opendir(self, number: int, body: memoryview) -> Parts:
        node = self._nodes.get(number)
        if len(self._handles) >= self._most_handles:
            raise OSError(errno.ENFILE, "too many open files")
        flags = os.O_RDONLY | os.O_DIRECTORY | SAFE_FLAGS
        return (self._add_handle(node, os.open(str(self._nodes.fd(node)), flags, dir_fd=self._links)),)

    def _entries(self, handle: _Handle) -> Iterator[tuple[bytes, int, int]]:
        number = handle.node.key[1]
        yield b".", number, stat.S_IFDIR >> 12
        above = handle.node.parent
        yield b"..", number if above is None else above.key[1], stat.S_IFDIR >> 12
        os.lseek(handle.fd, 0, os.SEEK_SET)
        with os.scandir(handle.fd) as found:
            for entry in found:
                kind = 0
                if entry.is_symlink():
                    kind = stat.S_IFLNK >> 12
                elif entry.is_dir(follow_symlinks=False):
                    kind = stat.S_IFDIR >> 12
                elif entry.is_file(follow_symlinks=False):
                    kind = stat.S_IFREG >> 12
                yield os.fsencode(entry.name), entry.inode(), kind

    def _readdir(self, body: memoryview, plus: bool) -> Parts:
        fh, offset, size, *_ = fuse.READ_IN.unpack_from(body)
        handle = self._handle(fh)
        if offset == 0:
            handle.entries = list(self._entries(handle))
        size = min(size, MOST_DATA)
        parts: list[bytes] = []
        extra = fuse.ENTRY_OUT.size + 88 if plus else 0
        for index in range(offset, len(handle.entries)):
            name, number, kind = handle.entries[index]
            record = fuse.direntry(number, index + 1, name, kind)
            size -= len(record) + extra
            if size < 0:
                break
            if plus:
                parts.append(self._plus(handle.node, name))
            parts.append(record)
        return (b"".join(parts),)

    def _plus(self, parent: Node, name: bytes) -> bytes:
        if name not in (b".", b".."):
            with contextlib.suppress(OSError):
                return self._entry(parent, name)
        return bytes(fuse.ENTRY_OUT.size + 88)


def _names(body: memoryview, count: int) -> list[bytes]:
    """So many texts, each ended by a NUL. OSError."""
    *names, rest = bytes(body).split(b"\0")
    if len(names) != count or rest:
        raise OSError(errno.EINVAL, "no names")
    return names


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), "refused")


def serve(link: socket.socket, server: FolderServer) -> None:
    """Answer what comes through a stream socket, until it ends or what comes is no request."""
    buffer = bytearray(LONGEST_REQUEST)
    view = memoryview(buffer)
    filled = 0
    while received := link.recv_into(view[filled:]):
        filled += received
        done = 0
        while filled - done >= fuse.IN_HEADER.size:
            length = int.from_bytes(view[done : done + 4], "little")
            if not fuse.IN_HEADER.size <= length <= LONGEST_REQUEST:
                return
            if filled - done < length:
                break
            _send(link, server.handle(view[done : done + length]))
            done += length
        if done:
            buffer[: filled - done] = buffer[done:filled]
            filled -= done


def _send(link: socket.socket, parts: Parts) -> None:
    left: list[bytes | memoryview] = [part for part in parts if part]
    while left:
        sent = link.sendmsg(left)
        while left and sent >= len(left[0]):
            sent -= len(left.pop(0))
        if sent:
            left[0] = memoryview(left[0])[sent:]


def _main(work: dict[str, Any], ready: Callable[[dict[str, Any]], None]) -> None:
    link = socket.socket(fileno=work["link"])
    path, read_only = work["folder"], work["read_only"]
    try:
        root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadFileError(f"the folder {path} cannot be shared: {reason}") from None
    links = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most_files = MOST_FILES if allowed == resource.RLIM_INFINITY else min(MOST_FILES, allowed)
    os.umask(0)
    with contextlib.suppress(OSError):
        os.chdir("/")
    force = confine(FOLDER_READER if read_only else FOLDER_WRITER, folder=root, files=most_files)
    server = FolderServer(root, links, read_only, most_files)
    ready(force.facts())
    with contextlib.suppress(ConnectionError):
        serve(link, server)


if __name__ == "__main__":
    run_helper(_main)
