"""What is read from busybox binaries without running them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nonroot.guests import cached
from nonroot.guests.busybox import applets, static_bits
from tests.guests.repository import static_program


def test_the_applet_table(tmp_path: Path) -> None:
    assert applets(static_program(tmp_path)) == ["[", "[[", "ash", "cat", "sh"]


@pytest.mark.parametrize(
    "data", [b"", b"no table here", b"\0[\0[[\0", b"\0[\0[[\0unfinished", b"\0[\0[[\0BAD NAME\0x\0"]
)
def test_files_without_a_whole_table(data: bytes) -> None:
    assert set(applets(data)) <= {"[", "[["}


def test_only_static_programs_count(tmp_path: Path) -> None:
    static_program(tmp_path)
    assert static_bits(tmp_path / "busybox") == 64
    assert static_bits(Path(sys.executable).resolve()) in (None, 64)
    shell = shutil.which("sh")
    assert shell is not None
    assert static_bits(Path(shell).resolve()) is None  # dynamic on every distribution that has apt
    for data in (b"", b"\x7fELF", b"#!/bin/sh\n", b"\x7fELF\x02\x01\x01" + b"\xff" * 100):
        (tmp_path / "other").write_bytes(data)
        assert static_bits(tmp_path / "other") is None
    assert static_bits(tmp_path) is None
    assert static_bits(tmp_path / "absent") is None


@pytest.mark.guest
def test_the_real_busybox_agrees_with_itself() -> None:
    guest = cached("cloud-amd64")
    if guest is None:
        pytest.skip("the cloud kernel has not been fetched")
    program = guest.kernel.parents[1] / "bin" / "busybox"
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert applets(program.read_bytes()) == listed
