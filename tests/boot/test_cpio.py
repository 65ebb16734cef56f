"""The archive writer, judged by the system's cpio where there is one and by a reader of our own."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from nonroot.boot.cpio import Cpio, append


def read(archive: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """name -> (mode, data, device number); stops at the trailer."""
    found: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        _, mode, uid, gid, _, mtime, size, _, _, major, minor, name_size, _ = fields
        assert (uid, gid, mtime) == (0, 0, 0)
        name = archive[at + 110 : at + 110 + name_size - 1].decode()
        at = (at + 110 + name_size + 3) & ~3
        data = archive[at : at + size]
        at = (at + size + 3) & ~3
        if name == "TRAILER!!!":
            assert not any(archive[at:])
            return found
        found[name] = (mode, data, (major, minor))


def sample() -> Cpio:
    archive = Cpio()
    archive.directory("dev")
    archive.device("dev/console", 5, 1)
    archive.device("dev/vda", 254, 0, block=True)
    archive.file("init", b"#!/bin/sh\n", 0o755)
    archive.file("empty", b"")
    archive.symlink("link", "init")
    return archive


def test_entries() -> None:
    assert read(sample().finish()) == {
        "dev": (0o040755, b"", (0, 0)),
        "dev/console": (0o020600, b"", (5, 1)),
        "dev/vda": (0o060600, b"", (254, 0)),
        "init": (0o100755, b"#!/bin/sh\n", (0, 0)),
        "empty": (0o100644, b"", (0, 0)),
        "link": (0o120777, b"init", (0, 0)),
    }


def test_same_calls_give_the_same_bytes() -> None:
    assert sample().finish() == sample().finish()
    archive = sample()
    assert archive.finish() == archive.finish()


def test_size_is_whole_blocks_and_a_second_archive_starts_aligned() -> None:
    assert len(sample().finish()) % 512 == 0
    both = append(b"x" * 513, sample().finish())
    assert both[1024:1030] == b"070701"


@pytest.mark.parametrize("name", ["", "/init", "a\0b", "TRAILER!!!"])
def test_bad_names(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        Cpio().file(name, b"")


def test_nothing_after_the_end() -> None:
    archive = Cpio()
    archive.finish()
    with pytest.raises(ValueError, match="finished"):
        archive.file("late", b"")


@pytest.mark.skipif(shutil.which("cpio") is None, reason="there is no cpio on this machine")
def test_cpio_unpacks_it(tmp_path: Path) -> None:
    archive = Cpio()
    archive.directory("d")
    archive.file("d/f", b"content", 0o640)
    archive.symlink("d/l", "f")
    subprocess.run(["cpio", "-id", "--quiet"], input=archive.finish(), cwd=tmp_path, check=True)
    assert (tmp_path / "d/f").read_bytes() == b"content"
    assert (tmp_path / "d/f").stat().st_mode & 0o777 == 0o640
    assert os.readlink(tmp_path / "d/l") == "f"  # noqa: PTH115
