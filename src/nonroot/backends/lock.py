"""Locks of images: one writer, or any number of readers.

The locks are open-file-description locks on single bytes, laid out as QEMU lays out its own, so that neither opens an
image that the other is writing: for each permission, byte 100 + n is locked by who uses it, and byte 200 + n by who
wants nobody else to use it. All are shared locks; who opens looks for the opposite ones after taking its own.

Source: QEMU, docs/system/images (image locking) and `block/file-posix.c` for the numbers.
"""

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from nonroot.errors import BadFileError

__all__ = ["check_lock", "holders", "lock_image"]

USES: Final = 100
FORBIDS: Final = 200
READING: Final = 0
WRITING: Final = 1

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


def _lock(fd: int, command: int, kind: int, byte: int) -> int:
    answer = fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    return int(_FLOCK.unpack(answer)[0])


def _is_held(fd: int, byte: int) -> bool:
    """Whether another open file holds a lock on ``byte``."""
    return _lock(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK


def lock_image(fd: int, path: str, write: bool, what: str = "disk image") -> None:
    """Lock the open file ``fd`` for reading, or for reading and writing; closing it unlocks.

    BadFileError naming who has it if it is locked the other way.
    """
    uses = (READING, WRITING) if write else (READING,)
    try:
        for number in uses:
            _lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, USES + number)
        _lock(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, FORBIDS + WRITING)
        taken = any(_is_held(fd, FORBIDS + number) for number in uses if number == WRITING or not write)
        taken = taken or _is_held(fd, USES + WRITING) or _is_held(fd, FORBIDS + READING)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            taken = True
        else:
            reason = (error.strerror or str(error)).lower()
            raise BadFileError(f"the {what} {path} cannot be locked on its file system: {reason}") from None
    if taken:
        raise BadFileError(_sentence(fd, path, write, what))


def check_lock(path: str, write: bool, what: str = "disk image") -> None:
    """BadFileError if somebody has locked the image; no lock is kept. For images that another program will lock."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock_image(fd, path, write, what)
    finally:
        os.close(fd)


def holders(fd: int) -> list[tuple[int, str]]:
    """(process id, name) of the other processes that have this file open, as far as we may look."""
    mine = os.fstat(fd)
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            for link in (process / "fd").iterdir():
                theirs = os.stat(link)  # noqa: PTH116 - follows the magic link
                if (theirs.st_dev, theirs.st_ino) == (mine.st_dev, mine.st_ino):
                    found.append((int(process.name), (process / "comm").read_text().strip()))
                    break
        except OSError:
            continue
    return found


def _sentence(fd: int, path: str, write: bool, what: str) -> str:
    who = ", ".join(f"process {pid} ({name})" for pid, name in holders(fd)[:3]) or "this or another process"
    if write:
        return f"the {what} {path} is in use by {who}, and two writers would destroy it; add ,overlay or take a copy"
    return f"the {what} {path} is being written by {who}; wait until it has ended, or take a copy"
