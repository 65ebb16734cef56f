"""
System test guests: what they print is compared with the expectation files, on our engine with every optimisation on
and with each one off; and with what QEMU and Bochs print.

An expectation file holds what the manuals say. After a change of a guest, `python -m tests.system.expect` writes what
the engine prints; the diff is to be read against the manuals, and the slow tests against both emulators.
"""

import pytest

from nonroot.engines.native import InterpretEngine
from nonroot.testing.system_guest import SystemGuest
from nonroot.testing.system_guest_run import missing, run_bochs, run_engine, run_qemu
from tests.system.catalogue import EXPECTED, GUESTS

RUNNERS = {"qemu": run_qemu, "bochs": run_bochs}


def expected(guest: SystemGuest) -> str:
    return (EXPECTED / f"{guest.name}.txt").read_text()


@pytest.mark.parametrize("guest", GUESTS, ids=lambda g: g.name)
def test_engine(guest: SystemGuest) -> None:
    assert run_engine(InterpretEngine(), guest.build()) == expected(guest)


@pytest.mark.parametrize("guest", GUESTS, ids=lambda g: g.name)
def test_engine_without_optimisations(guest: SystemGuest) -> None:
    """Each switched off by itself, and all at once."""
    engine, program, wanted = InterpretEngine(), guest.build(), expected(guest)
    names = tuple(engine.optimisations())
    assert names
    for off in [*((name,) for name in names), names]:
        assert run_engine(engine, program, off=off) == wanted, f"without {', '.join(off)}"


def test_every_expectation_has_its_guest() -> None:
    assert {path.stem for path in EXPECTED.glob("*.txt")} == {guest.name for guest in GUESTS}


@pytest.mark.slow
@pytest.mark.parametrize("emulator", RUNNERS)
@pytest.mark.parametrize("guest", GUESTS, ids=lambda g: g.name)
def test_emulator_prints_the_same(guest: SystemGuest, emulator: str) -> None:
    if reason := missing(emulator) or guest.unlike.get(emulator):
        pytest.skip(reason)
    output = RUNNERS[emulator](guest.build())
    assert guest.comparable(output, emulator) == guest.comparable(expected(guest), emulator)
