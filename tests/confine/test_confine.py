"""Confinement, tried from inside: every profile, as root and as an ordinary user."""

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nonroot import _engine
from nonroot.confine import host

NOBODY = 65534
ATTEMPTS = Path(__file__).with_name("attempts.py")
LANDLOCK, SECCOMP = _engine.confinement_of_host()
needs_both = pytest.mark.skipif(not (LANDLOCK and SECCOMP), reason="this kernel lacks Landlock or seccomp")

# What each may still do of all that is tried.
MAY: dict[str, set[str]] = {
    "PLAIN": set(),
    "SWITCH": set(),
    "BACKEND": {"thread"},
    "STUB": {"thread"},
    "NETWORK": {"inet socket"},
    "DOMAIN": {"thread", "executable memory"},
    "FOLDER_READER": set(),
    "FOLDER_WRITER": set(),
}


@pytest.fixture
def sibling() -> Iterator[int]:
    """A process of the same user's that sleeps."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


@pytest.fixture
def sealed() -> Iterator[int]:
    fd = os.memfd_create("sealed", os.MFD_ALLOW_SEALING)
    os.write(fd, b"guest")
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    yield fd
    assert os.pread(fd, 5, 0) == b"guest"
    os.close(fd)


def attempt(profile: str, sibling: int, sealed: int, user: int | None = None) -> dict[str, Any]:
    """What a process of its own could do, confined."""
    stranger = os.open(os.devnull, os.O_RDONLY)
    command = [sys.executable, "-P", os.fspath(ATTEMPTS), profile, str(sibling), str(sealed), str(stranger)]
    try:
        result = subprocess.run(
            [*command, *([] if user is None else [str(user)])],
            pass_fds=[sealed, stranger],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    finally:
        os.close(stranger)
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@needs_both
@pytest.mark.parametrize("profile", sorted(MAY))
def test_nothing_that_a_process_must_not_can_be_done(profile: str, sibling: int, sealed: int) -> None:
    found = attempt(profile, sibling, sealed)
    assert set(found["done"]) == MAY[profile]
    assert {"limits", "no-new-privileges", "capabilities", "landlock", "seccomp"} <= set(found["names"])
    assert [reason for reason in found["missing"] if "network of its user" not in reason] == []


@needs_both
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can try both")
@pytest.mark.parametrize("profile", ["BACKEND", "NETWORK", "STUB"])
def test_an_ordinary_user_is_confined_alike(profile: str, sealed: int) -> None:
    with subprocess.Popen(["sleep", "60"], user=NOBODY) as sibling:
        found = attempt(profile, sibling.pid, sealed, user=NOBODY)
        sibling.kill()
    assert set(found["done"]) == MAY[profile]
    assert {"landlock", "seccomp"} <= set(found["names"])


def test_the_host_is_described_in_one_sentence() -> None:
    facts = host.offers()
    assert facts["landlock"] == LANDLOCK
    assert facts["seccomp"] is SECCOMP
    assert bool(facts["why"]) != (bool(LANDLOCK) and SECCOMP and facts["namespaces"])
    assert "no Landlock" in host.shortcoming(0, True)
    assert host.shortcoming(7, True) == ""


def test_what_is_in_force_is_read_from_the_kernel(sibling: int) -> None:
    assert "seccomp" not in host.observe(sibling) or "seccomp" in host.observe(os.getpid())
    assert host.observe(2**22 + 1) == []
    assert sibling in dict(host.descendants(os.getpid()))


def test_names_that_are_no_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="no system call"):
        _engine.restrict_calls(["reed"], refuse=False, threads=False, executable=False, families=[], all_threads=False)
    with pytest.raises(ValueError, match="no access"):
        _engine.restrict_files([(0, "fly")], False)
