"""FUSE's protocol: numbers and layouts, little-endian, as version 7.31 has them.

Source: Linux's include/uapi/linux/fuse.h.
"""

import os
import stat
import struct
from enum import IntEnum
from typing import Final

__all__ = [
    "ATTR_OUT",
    "BATCH_FORGET_IN",
    "CREATE_IN",
    "DIRENT",
    "ENTRY_OUT",
    "FALLOCATE_IN",
    "FORGET_IN",
    "FORGET_ONE",
    "FSYNC_IN",
    "GETATTR_IN",
    "INIT_IN",
    "INIT_OUT",
    "IN_HEADER",
    "LINK_IN",
    "LSEEK_IN",
    "LSEEK_OUT",
    "MAJOR",
    "MINOR",
    "MKDIR_IN",
    "MKNOD_IN",
    "NO_REPLY",
    "OPEN_IN",
    "OPEN_OUT",
    "OUT_HEADER",
    "READ_IN",
    "RELEASE_IN",
    "RENAME2_IN",
    "RENAME_IN",
    "ROOT_ID",
    "SETATTR_IN",
    "STATFS_OUT",
    "WRITE_IN",
    "WRITE_OUT",
    "Init",
    "Opcode",
    "Set",
    "attributes",
    "direntry",
    "error_reply",
]

MAJOR: Final = 7
MINOR: Final = 31
ROOT_ID: Final = 1


class Opcode(IntEnum):
    """What is asked."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    REMOVEXATTR = 24
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SYNCFS = 50
    TMPFILE = 51


NO_REPLY: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))
"""These are not answered."""


class Init:
    """Flags of INIT."""

    ASYNC_READ: Final = 1 << 0
    BIG_WRITES: Final = 1 << 5
    AUTO_INVAL_DATA: Final = 1 << 12
    DO_READDIRPLUS: Final = 1 << 13
    READDIRPLUS_AUTO: Final = 1 << 14
    ASYNC_DIO: Final = 1 << 15
    PARALLEL_DIROPS: Final = 1 << 18
    MAX_PAGES: Final = 1 << 22


class Set:
    """Flags of SETATTR."""

    MODE: Final = 1 << 0
    UID: Final = 1 << 1
    GID: Final = 1 << 2
    SIZE: Final = 1 << 3
    ATIME: Final = 1 << 4
    MTIME: Final = 1 << 5
    HANDLE: Final = 1 << 6
    ATIME_NOW: Final = 1 << 7
    MTIME_NOW: Final = 1 << 8


IN_HEADER: Final = struct.Struct("<IIQQIIIHH")
"""len, opcode, unique, nodeid, uid, gid, pid, length of extensions, padding."""
OUT_HEADER: Final = struct.Struct("<IiQ")
"""len, error (0 or negative), unique."""

FORGET_IN: Final = struct.Struct("<Q")
FORGET_ONE: Final = struct.Struct("<QQ")
BATCH_FORGET_IN: Final = struct.Struct("<I4x")
GETATTR_IN: Final = struct.Struct("<I4xQ")
SETATTR_IN: Final = struct.Struct("<I4xQQQQQQIIII4xII4x")
"""valid, fh, size, lock owner, atime, mtime, ctime, their nanoseconds, mode, uid, gid."""
MKNOD_IN: Final = struct.Struct("<III4x")
MKDIR_IN: Final = struct.Struct("<II")
RENAME_IN: Final = struct.Struct("<Q")
RENAME2_IN: Final = struct.Struct("<QI4x")
LINK_IN: Final = struct.Struct("<Q")
OPEN_IN: Final = struct.Struct("<II")
CREATE_IN: Final = struct.Struct("<IIII")
OPEN_OUT: Final = struct.Struct("<QI4x")
READ_IN: Final = struct.Struct("<QQIIQI4x")
WRITE_IN: Final = struct.Struct("<QQIIQI4x")
WRITE_OUT: Final = struct.Struct("<I4x")
RELEASE_IN: Final = struct.Struct("<QIIQ")
FSYNC_IN: Final = struct.Struct("<QI4x")
FALLOCATE_IN: Final = struct.Struct("<QQQI4x")
LSEEK_IN: Final = struct.Struct("<QQI4x")
LSEEK_OUT: Final = struct.Struct("<Q")
STATFS_OUT: Final = struct.Struct("<QQQQQIII4x24x")
INIT_IN: Final = struct.Struct("<IIII")
INIT_OUT: Final = struct.Struct("<IIIIHHIIHH32x")
"""major, minor, readahead, flags, background, congestion, max_write, granularity of times, max_pages, alignment."""

_ATTR: Final = struct.Struct("<QQQqqqIIIIIIIIII")
ATTR_OUT: Final = struct.Struct("<QI4x")
"""Seconds and nanoseconds for which the attributes behind it hold."""
ENTRY_OUT: Final = struct.Struct("<QQQQII")
"""nodeid, generation, seconds for the name and for the attributes, nanoseconds likewise; attributes follow."""
DIRENT: Final = struct.Struct("<QQII")
"""ino, offset of the next entry, length of the name, type."""


def attributes(status: os.stat_result, number: int, owner: int, group: int) -> bytes:
    """struct fuse_attr, with another inode number, owner and group."""
    special = stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode)
    device = _device(status.st_rdev) if special else 0
    times = (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)
    return _ATTR.pack(
        number,
        status.st_size,
        status.st_blocks,
        *(when // 1_000_000_000 for when in times),
        *(when % 1_000_000_000 for when in times),
        status.st_mode & 0xFFFF_FFFF,
        min(status.st_nlink, 0xFFFF_FFFF),
        owner,
        group,
        device,
        min(status.st_blksize, 0xFFFF_FFFF),
        0,
    )


def _device(number: int) -> int:
    """As Linux packs a device number into 32 bits."""
    major, minor = os.major(number), os.minor(number)
    return (minor & 0xFF | major << 8 | (minor & ~0xFF) << 12) & 0xFFFF_FFFF


def direntry(number: int, following: int, name: bytes, kind: int) -> bytes:
    """struct fuse_dirent with its name, padded to 8 bytes. ``kind``: DT_…, the upper bits of a mode."""
    return DIRENT.pack(number, following, len(name), kind) + name + bytes(-len(name) % 8)


def error_reply(unique: int, error: int) -> bytes:
    """An answer that says no; ``error``: an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -error, unique)
