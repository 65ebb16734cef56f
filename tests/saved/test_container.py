"""The file of a saved domain: what comes out is what went in, or a sentence."""

import errno
import os
import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.errors import BadFileError, TransientError
from nonroot.hvm.ram import data_extents
from nonroot.saved.container import PAGE_SIZE, Reader, Writer

PAGES = 600
RECORDS = {"vcpu0": b"state" * 100, "empty": b"", "noise": os.urandom(5000)}


def memory() -> bytes:
    contents = bytearray(PAGES * PAGE_SIZE)
    for page in (0, 1, 2, 300, 301, PAGES - 1):
        contents[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([page % 251 + 1]) * PAGE_SIZE
    contents[400 * PAGE_SIZE + 17] = 1
    return bytes(contents)


def write(path: Path, packed: bool, contents: bytes) -> None:
    with Writer(path, packed) as writer:
        for name, record in RECORDS.items():
            writer.record(name, record)
        writer.memory("ram", memoryview(contents), iter([(0, len(contents))]))


def read_memory(reader: Reader) -> bytes:
    contents = bytearray(reader.memories["ram"])
    for run in reader.runs("ram"):
        contents[run.first * PAGE_SIZE : (run.first + run.count) * PAGE_SIZE] = run.contents
    return bytes(contents)


@pytest.mark.parametrize("packed", [False, True])
def test_what_went_in_comes_out(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / "a.saved"
    write(path, packed, memory())
    with Reader(path) as reader:
        assert reader.names == set(RECORDS)
        assert {name: reader.record(name) for name in RECORDS} == RECORDS
        assert read_memory(reader) == memory()
        assert sum(run.count for run in reader.runs("ram")) == 7
        with pytest.raises(BadFileError, match="no record 'other'"):
            reader.record("other")
    assert (path.stat().st_mode & 0o777) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.saved"]


def test_what_goes_wrong_while_writing_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.saved"
    path.write_bytes(b"before")

    def fail() -> None:
        with Writer(path) as writer:
            writer.record("a", b"b")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_bytes() == b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.saved"]


def test_a_file_that_cannot_grow(tmp_path: Path) -> None:
    path = tmp_path / "a.saved"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))  # Python ignores SIGXFSZ
    try:
        with pytest.raises(TransientError, match=f"cannot be written: {os.strerror(errno.EFBIG).lower()}"):
            write(path, False, memory())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["none/a.saved", "."])
def test_no_place_for_it(tmp_path: Path, place: str) -> None:
    with pytest.raises((BadFileError, TransientError), match="cannot be written"):
        write(tmp_path / place, True, memory())


def test_other_files(tmp_path: Path) -> None:
    cases = {"short": b"x", "empty": b"", "other": b"\x7fELF" + bytes(9000)}
    for name, contents in cases.items():
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(BadFileError, match="no saved domain that could be restored"):
            Reader(tmp_path / name)
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(BadFileError, match="cannot be read"):
            Reader(path)


def test_a_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "a.saved"
    write(path, True, memory())
    data = bytearray(path.read_bytes())
    data[8] = 99
    path.write_bytes(data)
    with pytest.raises(BadFileError, match="version 99, this nonroot reads version 1"):
        Reader(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "a.saved"
    write(path, True, memory())
    return path


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_is_noticed(written: Path, data: st.DataObject) -> None:
    good = written.read_bytes()
    bad = bytearray(good)
    if data.draw(st.booleans()):
        del bad[data.draw(st.integers(0, len(bad) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            bad[data.draw(st.integers(0, len(bad) - 1))] ^= data.draw(st.integers(1, 255))
    other = written.with_name("b.saved")
    other.write_bytes(bad)
    try:
        with Reader(other) as reader:
            found = {name: reader.record(name) for name in reader.names}
            contents = read_memory(reader)
    except BadFileError:
        return
    # What is not in the header, the table or a record (the header's rest, gaps) may be anything.
    assert (found, contents) == (RECORDS, memory())


def test_holes_are_not_filled_by_looking(tmp_path: Path) -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 64 << 20)
    os.pwrite(fd, b"x" * 5000, 1 << 20)
    assert list(data_extents(fd)) == [(1 << 20, 8192)]
    assert os.fstat(fd).st_blocks * 512 == 8192
    os.close(fd)
