"""RAM over a base file: what is written stays its own until it is shared, and can be forgotten."""

import os
import random
from collections.abc import Iterator

import pytest

from nonroot._engine import Memory
from nonroot.hvm.device import StateError
from nonroot.hvm.guest_ram import MOST_LAYERS, GuestRam, RamBase
from nonroot.hvm.memory_map import MemoryMap
from nonroot.hvm.ram import close_files, create_ram

SIZE = 16 << 20
OFFSET = 8192
"""Of the base in its file."""


class Ram:
    def __init__(self, base: RamBase | None) -> None:
        self.files: list[int] = []
        self.memory: Memory = create_ram(MemoryMap(SIZE), None, self.files, base)
        self.ram = GuestRam(self.memory, self.files, SIZE, base)

    def file(self) -> bytes:
        return os.pread(self.files[0], SIZE, 0)

    def all(self) -> bytes:
        """As it lies in the file."""
        whole = bytearray(SIZE)
        for gfn, count, _, offset, _ in self.memory.runs():
            whole[offset : offset + (count << 12)] = self.memory.read(gfn << 12, count << 12)
        return bytes(whole)

    def close(self) -> None:
        self.ram.close()
        close_files(self.files)


@pytest.fixture
def base() -> Iterator[int]:
    fd = os.memfd_create("base")
    os.ftruncate(fd, OFFSET + SIZE)
    os.pwrite(fd, b"before", OFFSET + 0x5000)
    os.pwrite(fd, b"last", OFFSET + SIZE - 4)
    os.pwrite(fd, b"not RAM", 0)
    yield fd
    os.close(fd)


@pytest.fixture
def private(base: int) -> Iterator[Ram]:
    ram = Ram(RamBase([(base, OFFSET)]))
    yield ram
    ram.close()


def test_it_shows_the_base_and_does_not_change_it(base: int, private: Ram) -> None:
    whole = os.pread(base, OFFSET + SIZE, 0)
    assert private.memory.read(0x5000, 6) == b"before"
    assert private.ram.is_private
    private.memory.write(0x5000, b"after!")
    private.memory.write(0x700000, b"new")
    assert private.memory.read(0x5000, 6) == b"after!"
    assert os.pread(base, OFFSET + SIZE, 0) == whole


def test_others_see_it_once_it_is_shared(base: int, private: Ram) -> None:
    seen: list[bool] = []
    private.ram.on_change = lambda: seen.append(private.ram.is_private)
    private.memory.write(0x5000, b"after!")
    private.memory.write(0x700FFE, b"cross")
    private.ram.share()
    assert seen == [False]
    assert os.fstat(private.files[0]).st_size == SIZE
    assert os.fstat(private.files[0]).st_blocks * 512 < 1 << 20  # holes have stayed holes
    assert private.all() == private.file()
    assert (private.memory.read(0x5000, 6), private.memory.read(0x700FFE, 5)) == (b"after!", b"cross")
    private.memory.write(0x5000, b"seen")
    assert os.pread(private.files[0], 4, 0x5000) == b"seen"
    assert os.pread(base, 6, OFFSET + 0x5000) == b"before"
    private.ram.share()
    assert seen == [False]


def fork(ram: Ram) -> Ram:
    base = ram.ram.freeze()
    described = RamBase.described(base.description(), [os.dup(file) for file, _ in base.layers], SIZE)
    base.close()
    child = Ram(described)
    described.close()
    return child


def test_frozen_memory_is_a_base_for_others(private: Ram) -> None:
    private.memory.write(0x5000, b"parent")
    child = fork(private)
    private.memory.write(0x5000, b"later!")
    child.memory.write(0x6000, b"child")
    assert child.memory.read(0x5000, 6) == b"parent"
    assert private.memory.read(0x6000, 5) == bytes(5)
    second = fork(private)
    assert second.memory.read(0x5000, 6) == b"later!"
    assert child.memory.read(0x5000, 6) == b"parent"
    child.close()
    second.close()


def test_generations_of_forks_keep_their_own(private: Ram) -> None:
    """Layers over layers, until there are so many that they become one file."""
    generator = random.Random(7)
    expected = bytearray(private.all())
    family: list[tuple[Ram, bytes]] = []
    current = private
    for generation in range(2 * MOST_LAYERS):
        for _ in range(generator.randrange(40)):
            place, data = generator.randrange(SIZE - 20000), generator.randbytes(generator.randrange(1, 20000))
            current.memory.write(place, data)
            expected[place : place + len(data)] = data
        child = fork(current)
        assert child.all() == current.all() == expected
        family.append((current, bytes(expected)))
        if generation % 5 != 4:
            current = child
        else:
            child.close()
            family.pop()
    family.append((current, bytes(expected)))
    for ram, contents in family:
        assert ram.all() == contents
    for ram, contents in family:
        ram.ram.share()
        assert ram.file() == ram.all() == contents
        if ram is not private:
            ram.close()


def test_what_was_written_can_be_forgotten(private: Ram) -> None:
    private.memory.write(0x7000, b"kept")
    private.ram.remember()
    private.memory.write(0x5000, b"after!")
    private.memory.write(0x900000, b"x" * 100_000)
    for then in ("nothing", "share", "fork", "fork and write"):
        if then == "share":
            private.ram.share()
        elif then != "nothing":
            fork(private).close()
        if then == "fork and write":
            private.memory.write(0x7000, b"lost")
        private.ram.revert()
        assert private.memory.read(0x5000, 6) == b"before"
        assert private.memory.read(0x7000, 4) == b"kept"
        assert private.memory.read(0x900000, 100_000) == bytes(100_000)
        private.memory.write(0x5000, b"again!")


@pytest.mark.parametrize(
    "record",
    [
        {"layers": [1], "runs": []},
        {"layers": [0, 0], "runs": []},
        {"layers": [0], "runs": [0, 4096]},
        {"layers": [0], "runs": [0, 4096, 1]},
        {"layers": [1 << 30], "runs": []},
        {"layers": [], "runs": []},
        {"runs": []},
        [],
    ],
)
def test_descriptions_that_are_not_of_these_files(base: int, record: object) -> None:
    with pytest.raises(StateError):
        RamBase.described(record, [base], SIZE)


@pytest.mark.parametrize("runs", [[4096, 4096, 1, 0, 4096, 1], [0, 0, 1], [0, 100, 1], [SIZE, 4096, 1], [0, 4096, 0]])
def test_pieces_that_are_none(base: int, runs: list[int]) -> None:
    with pytest.raises(StateError):
        RamBase.described({"layers": [0, 0], "runs": runs}, [base, base], SIZE)


def test_ordinary_memory_is_shared_and_can_be_frozen() -> None:
    ram = Ram(None)
    assert ram.ram.is_private is False
    ram.memory.write(0x1000, b"a")
    ram.ram.remember()
    base = ram.ram.freeze()
    ram.memory.write(0x1000, b"b")
    assert os.pread(base.layers[0][0], 1, 0x1000) == b"a"
    ram.ram.revert()
    assert ram.memory.read(0x1000, 1) == b"a"
    base.close()
    ram.close()


def test_what_cannot_be() -> None:
    memory = Memory()
    with pytest.raises(ValueError, match="no such backing|not inside the backing"):
        memory.revert(0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.add_backing(-1, 4096, 0, True)
    fd = os.memfd_create("short")
    os.ftruncate(fd, 8192)
    with pytest.raises(ValueError, match="has 8192 bytes"):
        memory.add_backing(fd, 8192, 4096, True)
    with pytest.raises(ValueError, match="no place for a backing"):
        memory.add_backing(fd, 4096, 100, True)
    os.close(fd)
