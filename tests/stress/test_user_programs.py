"""User programs print the same in a guest as on the host, byte for byte: see programs/*.c for what they do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stress.userland import CannotBuildError, Guest, build, difference, names, runs_here

pytestmark = [pytest.mark.slow, pytest.mark.guest, pytest.mark.timeout(600)]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("bits", [64, 32])
def test_it_does_what_it_does_on_the_host(guest: Guest, programs: Path, name: str, bits: int) -> None:
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
