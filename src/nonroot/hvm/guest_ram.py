"""A domain's RAM and the file behind it: shared with other processes, or its own over a base that stays as it is.

Private RAM shows a file that nobody changes any more (a kept boot, or the memory that a domain had when it was forked);
the host copies a page when it is first written. So a domain that goes on from there has its memory at once, and pays
for what it changes. Others cannot see such changes through the file. Whoever needs that (backends, tools that look at
guest memory, a save) has the RAM shared first: its contents are put into a file of its own, at the same host addresses.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from typing import Final

from nonroot._engine import Memory
from nonroot.errors import OutOfMemoryError
from nonroot.hvm.ram import data_extents

__all__ = ["GuestRam"]

RAM: Final = 0
"""The number of the RAM's backing."""
COPY_STEP: Final = 64 << 20


class GuestRam:
    """The RAM of one machine. In the vCPU's thread, between two instructions; while nobody else writes to it."""

    def __init__(self, memory: Memory, files: list[int], size: int, base: tuple[int, int] | None) -> None:
        """``files``: of each backing a descriptor, the RAM's first. ``base``: (file, offset) of private RAM."""
        self._memory = memory
        self._files = files
        self._size = size
        self._base: tuple[int, int] | None = None
        self._frozen = -1
        if base is not None:
            self._base = (os.dup(base[0]), base[1])
        self.on_change: Callable[[], object] = lambda: None
        """Called when another file is behind the RAM."""

    @property
    def is_private(self) -> bool:
        """Whether others cannot see it."""
        return self._base is not None

    def share(self) -> None:
        """Have it in a file of its own, ``files[0]``. Nothing happens if it is. OutOfMemoryError."""
        base = self._base
        if base is None:
            return
        fd = os.memfd_create("nonroot-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, self._size)
            self._copy_base(base, fd)
            self._memory.write_private(RAM, fd)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._memory.remap(RAM, fd, 0, False)
            self._show(fd)
        except OSError as error:
            raise OutOfMemoryError(f"the host cannot give {self._size >> 20} MiB of memory: {error.strerror}") from None
        finally:
            os.close(fd)
        os.close(base[0])
        self._base = None
        self.on_change()

    def freeze(self) -> int:
        """
        Have it in a file that stays as it is now, over which it is private from now on. A new descriptor of that.

        OutOfMemoryError.
        """
        self.share()
        fd = os.open(f"/proc/self/fd/{self._files[RAM]}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._memory.remap(RAM, fd, 0, True)
        except OSError as error:
            os.close(fd)
            raise OutOfMemoryError(f"the host cannot map the memory again: {error.strerror}") from None
        self._base = (os.dup(fd), 0)
        self._forget_frozen()
        self._frozen = os.dup(fd)
        self.on_change()
        return fd

    def revert(self) -> None:
        """As it was when it was frozen last; nothing happens if it was not. The vCPUs are to be flushed."""
        if self._frozen < 0:
            return
        if self._base is not None:
            self._memory.revert(RAM)
            return
        self._memory.remap(RAM, self._frozen, 0, True)  # it has been shared meanwhile
        self._base = (os.dup(self._frozen), 0)
        self._show(self._frozen)
        self.on_change()

    def close(self) -> None:
        """For the end of the machine."""
        base, self._base = self._base, None
        if base is not None:
            os.close(base[0])
        self._forget_frozen()

    def _forget_frozen(self) -> None:
        frozen, self._frozen = self._frozen, -1
        if frozen >= 0:
            os.close(frozen)

    def _show(self, fd: int) -> None:
        shown = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(shown, self._files[RAM], inheritable=False)
        os.close(shown)

    def _copy_base(self, base: tuple[int, int], fd: int) -> None:
        file, offset = base
        for start, length in _within(data_extents(file, offset), offset, self._size):
            place, end = start, start + length
            while place < end:
                os.lseek(fd, place - offset, os.SEEK_SET)
                done = os.sendfile(fd, file, place, min(COPY_STEP, end - place))
                if done == 0:
                    return  # the file ends there: zeros
                place += done


def _within(extents: Iterator[tuple[int, int]], offset: int, size: int) -> Iterator[tuple[int, int]]:
    for start, length in extents:
        first, end = max(start, offset), min(start + length, offset + size)
        if first >= offset + size:
            return
        if end > first:
            yield first, end - first
