"""A domain's frames as a table that other processes can read: what lies behind each, one 32-bit word a frame.

The table is a memfd. The process that has the domain writes a word whenever its p2m changes, before the guest learns of
the change; a backend process looks frames up in it without asking anybody.
"""

import array
import fcntl
import mmap
import os
from collections.abc import Iterable
from typing import Final

from nonroot.errors import OutOfMemoryError

__all__ = ["OWN", "PRESENT", "SHIFT", "WRITABLE", "FrameTable", "Run"]

LEAST_FRAMES: Final = 1 << 20
"""The first 4 GiB are in every table."""
PRESENT: Final = 1 << 0
WRITABLE: Final = 1 << 1
OWN: Final = 1 << 2
"""In the backing of pages that Xen and the guest share, not in RAM."""
SHIFT: Final = 3
"""The bits above: the page's number in its backing."""

Run = tuple[int, int, int, bool, bool]
"""(first frame, frames, offset in bytes, in the shared pages' backing, writable)."""


def _word(offset: int, own: bool, writable: bool) -> int:
    return offset >> 12 << SHIFT | PRESENT | (OWN if own else 0) | (WRITABLE if writable else 0)


class FrameTable:
    """The writer's end. One thread at a time."""

    def __init__(self, runs: Iterable[Run]) -> None:
        """``runs``: the frames as they are now. OutOfMemoryError."""
        found = list(runs)
        self.frames = max([LEAST_FRAMES, *(first + count for first, count, *_ in found)])
        size = self.frames * 4
        self.fd = os.memfd_create("nonroot-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._words = memoryview(mmap.mmap(self.fd, size)).cast("I")
        except OSError as error:
            os.close(self.fd)
            raise OutOfMemoryError(f"the host cannot give {size >> 10} KiB of memory: {error.strerror}") from None
        for first, count, offset, own, writable in found:
            start = _word(offset, own, writable)
            step = 1 << SHIFT
            self._words[first : first + count] = memoryview(array.array("I", range(start, start + count * step, step)))

    def put(self, gfn: int, offset: int, own: bool, writable: bool) -> None:
        """A frame has memory behind it."""
        if gfn < self.frames:
            self._words[gfn] = _word(offset, own, writable)

    def drop(self, gfn: int) -> None:
        """A frame has no memory any more."""
        if gfn < self.frames:
            self._words[gfn] = 0

    def close(self) -> None:
        """Give the table back. Safe to call again."""
        if self.fd >= 0:
            self._words.release()
            os.close(self.fd)
            self.fd = -1
