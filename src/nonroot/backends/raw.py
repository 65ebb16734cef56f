"""Raw images: a regular file or a block device of the host, byte for byte."""

import ctypes
import errno
import os
import stat
from collections.abc import Sequence
from typing import Final

from nonroot.backends.image import whole_sectors
from nonroot.backends.lock import lock_image
from nonroot.errors import BadFileError

__all__ = ["RawImage", "open_file"]

PUNCH_HOLE: Final = 3
"""FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, of linux/falloc.h."""

_libc = ctypes.CDLL(None, use_errno=True)


def open_file(path: str, read_only: bool, what: str) -> int:
    """A descriptor of an image. BadFileError, one sentence, for what is no readable (and writable) file."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not hang us
    try:
        fd = os.open(path, flags | (os.O_RDONLY if read_only else os.O_RDWR))
    except OSError as error:
        raise BadFileError(f"the {what} {path} {_reason(error, read_only)}") from None
    except ValueError:
        raise BadFileError(f"the {what}'s path {path!r} is no path") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise BadFileError(f"the {what} {path} is {kind}")
    os.set_blocking(fd, True)
    return fd


def _reason(error: OSError, read_only: bool) -> str:
    if error.errno == errno.EISDIR:
        return "is a directory"
    if error.errno == errno.ENOENT:
        return "does not exist"
    reason = (error.strerror or str(error)).lower()
    if not read_only and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"cannot be written ({reason}); add ,ro to use it read-only, or ,overlay to throw the changes away"
    return f"cannot be opened: {reason}"


class RawImage:
    """A file as it is. What was never written stays a hole; reading beyond a truncation is an error, not zeros."""

    def __init__(self, path: str, read_only: bool = False, what: str = "disk image") -> None:
        """Open and lock. BadFileError if that cannot be, or if the file is empty."""
        self.path = path
        self._read_only = read_only
        self._fd = open_file(path, read_only, what)
        try:
            self._end = os.lseek(self._fd, 0, os.SEEK_END)
            if self._end == 0:
                raise BadFileError(f"the {what} {path} is empty")
            lock_image(self._fd, path, write=not read_only, what=what)
        except BaseException:
            self.close()
            raise
        self._size = whole_sectors(self._end)

    @classmethod
    def adopt(cls, fd: int, path: str, read_only: bool) -> "RawImage":
        """The image behind a descriptor that another process has opened and locked; it is the image's from now on."""
        image = cls.__new__(cls)
        image.path, image._read_only, image._fd = path, read_only, fd
        image.look_again()
        return image

    @property
    def size(self) -> int:
        """Bytes, whole sectors."""
        return self._size

    @property
    def read_only(self) -> bool:
        """Whether it was opened for reading only."""
        return self._read_only

    def read(self, offset: int, length: int) -> bytes:
        """Bytes; zeros behind the end of the file, in its last sector."""
        parts: list[bytes] = []
        done = 0
        stop = min(offset + length, self._end)
        while offset + done < stop:
            try:
                part = os.pread(self._fd, stop - offset - done, offset + done)
                if not part:
                    raise OSError(errno.EIO, "the image has become shorter")
            except OSError:
                if not parts:
                    raise
                return b"".join(parts)
            parts.append(part)
            done += len(part)
        return (b"".join(parts) if len(parts) != 1 else parts[0]).ljust(length, b"\0")

    def descriptor(self, offset: int, length: int) -> int | None:
        """The file's, up to its end."""
        return self._fd if offset >= 0 and offset + length <= self._end and self._fd >= 0 else None

    def write(self, offset: int, data: bytes) -> None:
        """All of ``data``; a file that ended in the middle of its last sector may become longer, up to its end."""
        if self._read_only:
            raise OSError(errno.EROFS, "the image is read-only")
        view = memoryview(data)
        at = offset
        while view:
            count = os.pwrite(self._fd, view, at)
            if count == 0:
                raise OSError(errno.EIO, "nothing could be written")
            at += count
            view = view[count:]
        self._end = max(self._end, at)

    def read_into(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Fill ``parts``, one after the other. OSError: some of it may have been filled."""
        wanted = sum(map(len, parts))
        if offset + wanted <= self._end and os.preadv(self._fd, parts, offset) == wanted:
            return
        data = self.read(offset, wanted)
        if len(data) < wanted:
            raise OSError(errno.EIO, "the image has become shorter")
        at = 0
        for part in parts:
            part[:] = data[at : at + len(part)]
            at += len(part)

    def write_from(self, offset: int, parts: Sequence[memoryview]) -> None:
        """Write ``parts``, one after the other. OSError: some of it may have been written."""
        if self._read_only:
            raise OSError(errno.EROFS, "the image is read-only")
        wanted = sum(map(len, parts))
        done = os.pwritev(self._fd, parts, offset)
        self._end = max(self._end, offset + done)
        if done != wanted:
            self.write(offset + done, b"".join(parts)[done:])

    def discard(self, offset: int, length: int) -> None:
        """Make a hole, which reads as zeros. OSError where the file system has none."""
        if self._read_only:
            raise OSError(errno.EROFS, "the image is read-only")
        if _libc.fallocate(self._fd, PUNCH_HOLE, ctypes.c_int64(offset), ctypes.c_int64(length)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def look_again(self) -> None:
        """Take the file's size anew: somebody has made it longer, or shorter."""
        self._end = os.lseek(self._fd, 0, os.SEEK_END)
        self._size = whole_sectors(self._end)

    def flush(self) -> None:
        """fdatasync."""
        if not self._read_only:
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file; the lock goes with it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
