"""The memory map and the RAM that is made from it."""

from itertools import pairwise

import pytest

from nonroot.errors import BadOptionError
from nonroot.hvm.memory_map import E820Type, MemoryMap
from nonroot.hvm.ram import close_files, create_ram

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize("size", [4 * MIB, 128 * MIB, 3 * GIB, 3 * GIB + 4096, 8 * GIB])
def test_ram_adds_up_and_lies_apart(size: int) -> None:
    memory = MemoryMap(size)
    ranges = memory.ram()
    assert sum(r.length for r in ranges) == size - 0x2_0000  # the VGA window hides some
    for before, after in pairwise(ranges):
        assert before.base + before.length <= after.base
        assert before.offset + before.length <= after.offset
    assert ranges[-1].offset + ranges[-1].length == size
    assert all(r.base + r.length <= 3 * GIB or r.base >= 4 * GIB for r in ranges)


@pytest.mark.parametrize("size", [128 * MIB, 5 * GIB])
def test_e820_ram_is_backed(size: int) -> None:
    memory = MemoryMap(size)
    for entry in memory.e820():
        if entry.type == E820Type.RAM:
            assert any(r.base <= entry.base and entry.base + entry.length <= r.base + r.length for r in memory.ram())
    usable = sum(e.length for e in memory.e820() if e.type == E820Type.RAM)
    assert size - MIB < usable < size


def test_usable() -> None:
    memory = MemoryMap(64 * MIB)
    assert memory.usable(MIB, 63 * MIB)
    for base, length in ((MIB, 63 * MIB + 1), (0x9_F000, 0x1000), (0xE_0000, 1), (0xF_FFFF, 2), (64 * MIB, 1)):
        assert not memory.usable(base, length)


@pytest.mark.parametrize("size", [0, -1, 4 * MIB - 4096, 4 * MIB + 1, 513 * GIB, 1 << 62])
def test_absurd_sizes_are_refused(size: int) -> None:
    with pytest.raises(BadOptionError):
        MemoryMap(size)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_ram_reads_back(seed: int | None) -> None:
    memory = create_ram(MemoryMap(8 * MIB), seed)
    pattern = bytes(range(256)) * 64
    memory.write(MIB - 100, pattern)
    assert memory.read(MIB - 100, len(pattern)) == pattern
    for hole in (0xA_0000, 8 * MIB):
        with pytest.raises(ValueError):
            memory.read(hole, 1)


def test_scrambling_is_a_permutation_that_the_seed_decides() -> None:
    def places(seed: int | None) -> list[int]:
        memory = create_ram(MemoryMap(4 * MIB), seed)
        found = (memory.lookup(gfn) for gfn in range(1024))
        return [place[1] for place in found if place is not None]

    assert places(7) == places(7)
    assert places(7) != places(8)
    assert len(set(places(7))) == len(places(7)) == 1024 - 32
    assert sum(a + 4096 == b for a, b in zip(places(7), places(7)[1:], strict=False)) < 10


def test_descriptors_are_read_only_and_sealed() -> None:
    import os

    files: list[int] = []
    memory = create_ram(MemoryMap(4 * MIB), None, files)
    memory.write(0x1000, b"seen from outside")
    assert os.pread(files[0], 17, 0x1000) == b"seen from outside"
    with pytest.raises(OSError):
        os.pwrite(files[0], b"x", 0)
    with pytest.raises(OSError):
        os.ftruncate(files[0], 4096)
    close_files(files)
    assert files == []
