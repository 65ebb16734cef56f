"""A domain's RAM: a sealed memfd, and the p2m that puts its frames where the memory map wants them."""

import errno
import fcntl
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nonroot._engine import Memory
from nonroot.errors import OutOfMemoryError
from nonroot.hvm.memory_map import PAGE_SIZE, MemoryMap

if TYPE_CHECKING:
    from nonroot.hvm.guest_ram import RamBase

__all__ = ["BoardRam", "DirtyLog", "close_files", "create_ram", "create_rom", "data_extents", "ram_file"]


def create_ram(
    memory_map: MemoryMap,
    scramble_seed: int | None = None,
    files: list[int] | None = None,
    base: "RamBase | None" = None,
) -> Memory:
    """
    RAM as ``memory_map`` says, zeroed.

    The backing is as large as it will ever be and sealed against shrinking, growing and further sealing, so that no
    holder can truncate it under another. With ``scramble_seed`` every frame lies at a random place of the backing: the
    guest must not notice. ``files`` gets a read-only descriptor of each backing, in order, for those who look at guest
    memory from outside; without it, only the mappings keep the memory. OutOfMemoryError if the host has not enough.
    ``base``: what is in there instead of zeros, and stays as it is.
    """
    memory = Memory()
    size = memory_map.memory_bytes
    if base is not None:
        backing = _add_private(memory, base, size, files)
    else:
        with _sealed_file("nonroot-ram", size) as fd:
            backing = _add_backing(memory, fd, size, files)
    if scramble_seed is None:
        for ram in memory_map.ram():
            memory.map(ram.base // PAGE_SIZE, ram.length // PAGE_SIZE, backing, ram.offset)
    else:
        for gfn, offset in _scrambled(memory_map, scramble_seed):
            memory.map(gfn, 1, backing, offset)
    return memory


def ram_file(files: list[int]) -> int:
    """A new descriptor of the RAM in ``files``, to read and write; its offsets are those of the RAM's backing."""
    return os.open(f"/proc/self/fd/{files[0]}", os.O_RDWR | os.O_CLOEXEC)


def create_rom(memory: Memory, image: bytes, files: list[int] | None = None) -> int:
    """A backing with a ROM's contents (whole pages); its number. OutOfMemoryError if the host has not enough."""
    with _sealed_file("nonroot-rom", len(image), image) as fd:
        return _add_backing(memory, fd, len(image), files)


@contextmanager
def _sealed_file(name: str, size: int, contents: bytes = b"") -> Iterator[int]:
    """A memfd of a size that nobody can change. OutOfMemoryError."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        os.pwrite(fd, contents, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        yield fd
    except OSError as error:
        raise OutOfMemoryError(f"the host cannot give {size >> 20} MiB of memory: {error.strerror}") from None
    finally:
        os.close(fd)


def _add_private(memory: Memory, base: "RamBase", size: int, files: list[int] | None) -> int:
    first, offset = base.layers[0]
    try:
        backing = memory.add_backing(first, size, offset, private=True)
        base.map_runs(memory)
    except OSError as error:
        raise OutOfMemoryError(f"the host cannot map {size >> 20} MiB of memory: {error.strerror}") from None
    if files is not None:
        files.append(os.dup(first))
    return backing


def _add_backing(memory: Memory, fd: int, size: int, files: list[int] | None) -> int:
    backing = memory.add_backing(fd, size)
    if files is not None:
        files.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    return backing


def data_extents(fd: int, place: int = 0) -> Iterator[tuple[int, int]]:
    """(offset, bytes) of what in a file, from ``place`` on, is no hole: reading one of those may fill it."""
    while True:
        try:
            start = os.lseek(fd, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        place = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, place - start


class DirtyLog:
    """Shares the memory's one dirty log: each board memory gets its own pages, the rest is kept for whoever asks."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._windows: dict[int, tuple[set[int], int]] = {}
        self._runs: list[tuple[int, int]] | None = []

    def watch(self, gfn: int, pages: set[int], page: int) -> None:
        """From now on, writes to ``gfn`` add ``page`` to ``pages``."""
        self._windows[gfn] = (pages, page)
        self._runs = None

    def forget(self, gfn: int) -> None:
        """Undo :meth:`watch`."""
        self._windows.pop(gfn, None)
        self._runs = None

    def collect(self) -> None:
        """Hand out the board memories' part of the engine's log; the rest stays there."""
        if self._runs is None:
            self._runs = _runs(sorted(self._windows))
        for first, count in self._runs:
            for gfn in self._memory.take_dirty_in(first, count):
                pages, page = self._windows[gfn]
                pages.add(page)

    def take_rest(self) -> set[int]:
        """Frames of ordinary memory written since the last call."""
        rest = set()
        for gfn in self._memory.take_dirty():
            window = self._windows.get(gfn)
            if window is None:
                rest.add(gfn)
            else:
                window[0].add(window[1])
        return rest


def _runs(gfns: list[int]) -> list[tuple[int, int]]:
    """Ascending frame numbers as (first, count)."""
    runs: list[tuple[int, int]] = []
    for gfn in gfns:
        if runs and sum(runs[-1]) == gfn:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((gfn, 1))
    return runs


class BoardRam:
    """Memory of a device; see :class:`nonroot.devices.pci_device.DeviceRam`. For the vCPU's thread, but ``view``."""

    def __init__(self, memory: Memory, log: DirtyLog, name: str, size: int, files: list[int] | None = None) -> None:
        """``size`` bytes of zeros. ValueError if that is no whole number of pages; OutOfMemoryError."""
        if size < PAGE_SIZE or size % PAGE_SIZE:
            raise ValueError(f"{name} of {size} bytes is no whole number of pages")
        self.size = size
        self.file = len(files) if files is not None else -1
        """Which of ``files`` is this memory's."""
        self._memory = memory
        self._log = log
        with _sealed_file(f"nonroot-{name}", size) as fd:
            self._backing = _add_backing(memory, fd, size, files)
            self._map = mmap.mmap(fd, size)
        self.view = memoryview(self._map)
        self._dirty: set[int] = set()

    def show(self, address: int, offset: int, length: int, writable: bool = True) -> None:
        """Map a part at a guest-physical address. ValueError if something is not whole pages, or outside."""
        if (address | offset | length) % PAGE_SIZE or not 0 <= offset <= offset + length <= self.size:
            raise ValueError(f"no part of {self.size} bytes: {length:#x} bytes from {offset:#x}")
        gfn, count, page = address // PAGE_SIZE, length // PAGE_SIZE, offset // PAGE_SIZE
        self._log.collect()
        self._memory.map(gfn, count, self._backing, offset, writable)
        for index in range(count):
            self._log.watch(gfn + index, self._dirty, page + index)

    def hide(self, address: int, length: int) -> None:
        """Unmap."""
        gfn, count = address // PAGE_SIZE, length // PAGE_SIZE
        self._log.collect()
        self._memory.unmap(gfn, count)
        for index in range(count):
            self._log.forget(gfn + index)

    def take_dirty(self) -> set[int]:
        """Numbers of the pages written by the guest since the last call."""
        self._log.collect()
        dirty = set(self._dirty)
        self._dirty.clear()
        return dirty


def close_files(files: list[int]) -> None:
    """Close the descriptors that :func:`create_ram` opened; mappings stay."""
    while files:
        os.close(files.pop())


def _scrambled(memory_map: MemoryMap, seed: int) -> Iterator[tuple[int, int]]:
    """(guest frame number, offset in the backing) of every frame of RAM."""
    frames = list(range(memory_map.memory_bytes // PAGE_SIZE))
    random.Random(seed).shuffle(frames)
    for ram in memory_map.ram():
        first = ram.base // PAGE_SIZE
        place = ram.offset // PAGE_SIZE
        for index in range(ram.length // PAGE_SIZE):
            yield first + index, frames[place + index] * PAGE_SIZE
