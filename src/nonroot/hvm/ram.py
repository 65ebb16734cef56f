"""A domain's RAM: a sealed memfd, and the p2m that puts its frames where the memory map wants them."""

import fcntl
import os
import random
from collections.abc import Iterator

from nonroot._engine import Memory
from nonroot.errors import OutOfMemoryError
from nonroot.hvm.memory_map import PAGE_SIZE, MemoryMap

__all__ = ["close_files", "create_ram"]


def create_ram(memory_map: MemoryMap, scramble_seed: int | None = None, files: list[int] | None = None) -> Memory:
    """
    RAM as ``memory_map`` says, zeroed.

    The backing is as large as it will ever be and sealed against shrinking, growing and further sealing, so that no
    holder can truncate it under another. With ``scramble_seed`` every frame lies at a random place of the backing: the
    guest must not notice. ``files`` gets a read-only descriptor of each backing, in order, for those who look at guest
    memory from outside; without it, only the mappings keep the memory. OutOfMemoryError if the host has not enough.
    """
    memory = Memory()
    size = memory_map.memory_bytes
    fd = os.memfd_create("nonroot-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        backing = memory.add_backing(fd, size)
        if files is not None:
            files.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise OutOfMemoryError(f"the host cannot give {size >> 20} MiB of memory: {error.strerror}") from None
    finally:
        os.close(fd)
    if scramble_seed is None:
        for ram in memory_map.ram():
            memory.map(ram.base // PAGE_SIZE, ram.length // PAGE_SIZE, backing, ram.offset)
    else:
        for gfn, offset in _scrambled(memory_map, scramble_seed):
            memory.map(gfn, 1, backing, offset)
    return memory


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
