"""Guest memory through the extension: the p2m, and clear refusals."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonroot import _engine
from nonroot._engine import Memory

FRAMES = 64


def backing(memory: Memory, frames: int = FRAMES) -> int:
    descriptor = os.memfd_create("test")
    try:
        os.ftruncate(descriptor, frames * 4096)
        return memory.add_backing(descriptor, frames * 4096)
    finally:
        os.close(descriptor)


def test_map_and_look() -> None:
    memory = Memory()
    first, second = backing(memory), backing(memory)
    assert (first, second) == (0, 1)
    memory.map(0, 8, first, 0x4000)
    memory.map(8, 2, first, 0xC000)
    memory.map(10, 1, second, 0, writable=False)
    assert memory.runs() == [(0, 10, 0, 0x4000, True), (10, 1, 1, 0, False)]
    assert memory.lookup(9) == (0, 0xD000, True)
    assert memory.lookup(10) == (1, 0, False)
    assert memory.lookup(11) is None
    memory.unmap(1, 8)
    assert [run[:2] for run in memory.runs()] == [(0, 1), (9, 1), (10, 1)]


def test_the_dirty_log_of_a_range() -> None:
    memory = Memory()
    memory.map(0, 8, backing(memory, 8), 0)
    for gfn in (1, 3, 4, 6):
        memory.write(gfn << 12, b"x")
    assert memory.take_dirty_in(2, 3) == [3, 4]
    assert memory.take_dirty_in(2, 3) == []
    assert memory.take_dirty_in(0, 0) == []
    assert memory.take_dirty_in((1 << 28) - 1, 1 << 60) == []
    assert memory.take_dirty() == [1, 6]


def test_all_kinds_of_buffers() -> None:
    memory = Memory()
    memory.map(0, 2, backing(memory), 0)
    memory.write(0xFFE, b"abcd")
    memory.write(0x100, bytearray(b"xyz"))
    memory.write(0x103, memoryview(b"0-1-2-")[::2])
    memory.write(0x200, b"")
    assert memory.read(0xFFE, 4) == b"abcd"
    assert memory.read(0x100, 6) == b"xyz012"
    assert memory.read(0, 0) == b""
    assert memory.take_dirty() == [0, 1]
    assert memory.take_dirty() == []
    with pytest.raises(TypeError):
        memory.write(0, "text")  # type: ignore[arg-type]


def test_rom_is_written_from_outside() -> None:
    memory = Memory()
    memory.map(0, 1, backing(memory), 0, writable=False)
    memory.write(0, b"BIOS")
    assert memory.read(0, 4) == b"BIOS"


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (lambda m: m.read(0x3FFF, 2), "0x4000 is not RAM"),
        (lambda m: m.write(0x4000, b"x"), "0x4000 is not RAM"),
        (lambda m: m.read((1 << 64) - 1, 2), "beyond"),
        (lambda m: m.read(0, 1 << 50), "beyond"),
        (lambda m: m.map(0, 1, 5, 0), "not inside the backing"),
        (lambda m: m.map(0, FRAMES, 0, 4096), "not inside the backing"),
        (lambda m: m.map(0, 1, 0, 5), "not inside the backing"),
        (lambda m: m.map(1 << 28, 1, 0, 0), "40-bit"),
        (lambda m: m.map(0, (1 << 64) - 1, 0, 0), "not inside the backing|40-bit"),
        (lambda m: m.unmap(5, (1 << 64) - 1), "40-bit"),
        (lambda m: m.add_backing(0, 5), "no multiple of 4096"),
        (lambda m: m.add_backing(0, 0), "no multiple of 4096"),
        (lambda m: _engine.agent(16), "16 bits"),
    ],
)
def test_refusals(action: Callable[[Memory], object], reason: str) -> None:
    memory = Memory()
    memory.map(0, 4, backing(memory), 0)
    with pytest.raises(ValueError, match=reason):
        action(memory)
    assert memory.runs() == [(0, 4, 0, 0, True)]


def test_backing_files() -> None:
    memory = Memory()
    with pytest.raises(OSError) as caught:
        memory.add_backing(10**6, 4096)
    assert caught.value.errno == 9
    descriptor = os.memfd_create("short")
    try:
        os.ftruncate(descriptor, 4096)
        with pytest.raises(ValueError, match="has 4096 bytes, not the 8192"):
            memory.add_backing(descriptor, 8192)
    finally:
        os.close(descriptor)


def test_a_failed_write_changes_nothing() -> None:
    memory = Memory()
    memory.map(0, 1, backing(memory), 0)
    with pytest.raises(ValueError, match="not RAM"):
        memory.write(0xFFE, b"abcd")
    assert memory.read(0xFFE, 2) == b"\0\0"


@given(st.permutations(range(16)), st.integers(0, 16 * 4096 - 1), st.binary(max_size=9000))
def test_scrambled_frames_look_contiguous(order: list[int], at: int, data: bytes) -> None:
    memory = Memory()
    number = backing(memory, 16)
    for gfn, frame in enumerate(order):
        memory.map(gfn, 1, number, frame * 4096)
    data = data[: 16 * 4096 - at]
    memory.write(at, data)
    assert memory.read(at, len(data)) == data
    assert sum(memory.read(0, 16 * 4096)) == sum(data)
    touched = range(at >> 12, (at + len(data) - 1 >> 12) + 1) if data else range(0)
    assert memory.take_dirty() == list(touched)


@pytest.fixture
def content(tmp_path: Path) -> Iterator[int]:
    """A file of 16 pages, all different, in the page cache; on a disk, as a rule."""
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"".join(number.to_bytes(2, "little") * 8 for number in range(4096)))
    try:
        os.preadv(descriptor, [bytearray(16)], 0, os.RWF_NOWAIT)
    except BlockingIOError:
        pass
    except OSError:
        pytest.skip("this file system does not say what is at hand")
    yield descriptor
    os.close(descriptor)


def test_a_file_is_read_into_scrambled_frames(content: int) -> None:
    memory = Memory()
    number = backing(memory, 16)
    for gfn in range(16):
        memory.map(gfn, 1, number, (gfn * 5 % 16) * 4096)
    data = os.pread(content, 1 << 16, 0)
    memory.write(0, b"\xee" * 16 * 4096)
    memory.take_dirty()
    parts = [(0x1FF0, 0x2020), (0x8004, 6), (0xC000, 0x1000)]
    assert memory.read_file(content, 512, parts) == 0x2020 + 6 + 0x1000
    assert memory.take_dirty() == [1, 2, 3, 4, 8, 12]
    expected = bytearray(b"\xee" * 16 * 4096)
    at = 512
    for address, length in parts:
        expected[address : address + length] = data[at : at + length]
        at += length
    assert memory.read(0, 16 * 4096) == expected


def test_a_file_read_up_to_its_end_and_not_at_all(content: int) -> None:
    memory = Memory()
    memory.map(0, 2, backing(memory), 0)
    assert memory.read_file(content, 0x1_0000 - 100, [(0, 4096)]) == 100
    assert memory.read_file(content, 0x1_0000, [(0, 4096)]) == 0
    assert memory.read_file(content, 0, []) == memory.read_file(content, 0, [(0, 0)]) == 0
    assert memory.read_file(content, 0, [(2 * (number % 2), 1) for number in range(2000)]) == 0, "too many pieces"
    os.posix_fadvise(content, 0, 0, os.POSIX_FADV_DONTNEED)
    assert memory.read_file(content, 0, [(0, 64)]) in (0, 64), "nothing is waited for"


def test_a_file_is_not_read_where_it_cannot_be(content: int) -> None:
    memory = Memory()
    number = backing(memory)
    memory.map(0, 1, number, 0)
    memory.map(1, 1, number, 4096, writable=False)
    for parts, place in (
        ([(0, 4097)], "0x1000"),
        ([(0, 16), (0x1FFF, 1)], "0x1fff"),
        ([(0, 1), (0x2000, 1)], "0x2000"),
    ):
        with pytest.raises(ValueError, match=f"{place} is not RAM"):
            memory.read_file(content, 0, parts)
    for parts in ([((1 << 64) - 1, 2)], [(0, (1 << 64) - 1)]):
        with pytest.raises(ValueError, match="RAM|beyond"):
            memory.read_file(content, 0, parts)
    with pytest.raises(ValueError, match="beyond"):
        memory.read_file(content, (1 << 64) - 1, [(0, 1)])
    assert memory.read(0, 4096) == bytes(4096)
    with pytest.raises(OSError, match="Bad file descriptor"):
        memory.read_file(10**6, 0, [(0, 1)])


@pytest.mark.parametrize("name", ["agent64", "agent32", "tiny_guest"])
def test_guest_software(name: str) -> None:
    try:
        image = _engine.tiny_guest() if name == "tiny_guest" else _engine.agent(int(name[5:]))
    except ValueError as error:
        pytest.skip(str(error))
    assert image.startswith(b"\x7fELF")
    assert image[4] == (1 if name == "agent32" else 2), "ELF class"
