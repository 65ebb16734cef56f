"""User programs print the same in a guest as on the host, byte for byte: see programs/*.c for what they do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot import _engine
from nonroot.engines.native import WINDOWS_AFTER
from tests.stress.conftest import need
from tests.stress.userland import CannotBuildError, Guest, boot, build, difference, names, runs_here

ONLY_64 = ("windows",)

pytestmark = [pytest.mark.slow, pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("bits", [64, 32])
def test_it_does_what_it_does_on_the_host(guest: Guest, programs: Path, name: str, bits: int) -> None:
    if name in ONLY_64 and bits == 32:
        pytest.skip("it is about addresses of 64 bits")
    if bits == 64 and guest.domain.wait_ready()["bits"] == 32:
        pytest.skip("a 32-bit kernel runs no 64-bit programs")
    try:
        program = build(name, bits, programs)
    except CannotBuildError as error:
        pytest.skip(str(error))
    if not runs_here(bits):
        pytest.skip("this machine's kernel does not run 32-bit programs")
    expected = guest.here(program)
    assert expected.status == 0, expected.output
    assert expected.output, "a program that prints nothing compares nothing"
    assert guest.here(program) == expected, "the program's output is not the same twice on the host"
    found = difference(expected, guest.there(program), guest.domain.engine)
    assert found is None, found


@pytest.fixture(scope="module")
def guest_with_windows(programs: Path) -> Iterator[Guest]:
    """A guest whose programs have windows as soon as they run."""
    unavailable = _engine.translate_unavailable()
    if unavailable is not None:
        pytest.skip(unavailable)
    need("cloud-amd64")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WINDOWS_AFTER, "1")
        with boot("translate", "cloud-amd64") as domain:
            yield Guest(domain)


@pytest.mark.parametrize("name", names())
def test_it_does_so_with_windows_at_once(guest_with_windows: Guest, programs: Path, name: str) -> None:
    try:
        program = build(name, 64, programs)
    except CannotBuildError as error:
        pytest.skip(str(error))
    before = guest_with_windows.domain.stats.engine["window_pages"]
    found = difference(guest_with_windows.here(program), guest_with_windows.there(program), "translate")
    assert found is None, found
    assert guest_with_windows.domain.stats.engine["window_pages"] > before
