"""Records of device memory: exact, sparse, and refused where they are hostile."""

import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.hvm.device import StateError
from nonroot.hvm.memory_record import HEADER, RUN, MemoryRecord

PAGE = 4096


def memory(pages: int, seed: int = 0, used: float = 1.0) -> bytearray:
    source = random.Random(seed)
    return bytearray(b"".join(source.randbytes(PAGE) if source.random() < used else bytes(PAGE) for _ in range(pages)))


@settings(max_examples=40, deadline=None)
@given(
    pages=st.integers(1, 40),
    seed=st.integers(0, 1000),
    used=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    before=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_contents_come_back(pages: int, seed: int, used: float, before: float) -> None:
    data = memory(pages, seed, used)
    record = MemoryRecord.of("vga", memoryview(data))
    other = memory(pages, seed + 1, before)
    MemoryRecord.unpack("vga", len(data), record.pack()).apply(memoryview(other))
    assert other == data
    assert MemoryRecord.of("vga", memoryview(other)) == record


def test_long_runs_are_split() -> None:
    data = memory(600)
    record = MemoryRecord.of("vga", memoryview(data))
    assert [(first, len(contents) // PAGE) for first, contents in record.runs] == [(0, 256), (256, 256), (512, 88)]
    other = bytearray(len(data))
    MemoryRecord.unpack("vga", len(data), record.pack()).apply(memoryview(other))
    assert other == data


def test_zeros_cost_nothing_and_pictures_little() -> None:
    assert len(MemoryRecord.of("vga", memoryview(bytearray(16 << 20))).pack()) == HEADER.size
    picture = bytearray(b"\x12\x34\x56\x00" * (1280 * 800)) + bytes(12 << 20)
    assert len(MemoryRecord.of("vga", memoryview(picture)).pack()) < len(picture) // 100


def raw(pages: int, *runs: tuple[int, int, bytes], name: bytes = b"vga", version: int = 1, count: int = -1) -> bytes:
    """A record as somebody hostile would write it."""
    body = b"".join(RUN.pack(first, length, len(data)) + data for first, length, data in runs)
    return HEADER.pack(name, version, 0, pages, len(runs) if count < 0 else count) + body


ONE = zlib.compress(bytes(PAGE))
HOSTILE = {
    "empty": b"",
    "another's": raw(4, name=b"smram"),
    "another version": raw(4, version=2),
    "reserved": HEADER.pack(b"vga", 1, 1, 4, 0),
    "another size": raw(5),
    "no runs": raw(4, count=1),
    "too many bytes": raw(4) + b"x",
    "beyond the end": raw(4, (4, 1, ONE)),
    "far beyond the end": raw(4, (0xFFFF_FFFF, 1, ONE)),
    "no pages": raw(4, (0, 0, zlib.compress(b""))),
    "too many pages": raw(4, (0, 257, ONE)),
    "backwards": raw(4, (2, 1, ONE), (1, 1, ONE)),
    "overlap": raw(4, (1, 1, ONE), (1, 1, ONE)),
    "cut": raw(4, (0, 1, ONE))[:-3],
    "cut in a run's header": raw(4, (0, 1, ONE), count=2) + b"\0" * 5,
    "no zlib": raw(4, (0, 1, b"garbage")),
    "too short": raw(4, (0, 2, ONE)),
    "too long": raw(4, (0, 1, zlib.compress(bytes(PAGE + 1)))),
    "a bomb": raw(4, (0, 1, zlib.compress(bytes(64 << 20)))),
    "something after the stream": raw(4, (0, 1, ONE + b"x")),
    "a stream without its end": raw(4, (0, 1, ONE[:-4])),
    "a wrong checksum": raw(4, (0, 1, ONE[:-4] + b"\xff\xff\xff\xff")),
    "a huge length": HEADER.pack(b"vga", 1, 0, 4, 1) + struct.pack("<III", 0, 1, 0xFFFF_FFFF) + ONE,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_records_are_refused(data: bytes) -> None:
    with pytest.raises(StateError, match="memory vga"):
        MemoryRecord.unpack("vga", 4 * PAGE, data)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_records_are_refused_or_fit(data: st.DataObject) -> None:
    packed = bytearray(MemoryRecord.of("vga", memoryview(memory(6, used=0.5))).pack())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), min_size=1)):
        packed[place] = value
    try:
        record = MemoryRecord.unpack("vga", 6 * PAGE, bytes(packed))
    except StateError:
        return
    record.apply(memoryview(bytearray(6 * PAGE)))


def test_a_record_is_for_memory_of_its_size() -> None:
    record = MemoryRecord.of("vga", memoryview(bytearray(PAGE)))
    with pytest.raises(ValueError, match="8192 bytes"):
        record.apply(memoryview(bytearray(2 * PAGE)))
