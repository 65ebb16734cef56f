"""Guests that work, boot and go on working: not one wrong byte, not one boot that fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nonroot.errors import NonrootError
from tests.stress.conftest import KERNELS, need
from tests.stress.userland import CannotBuildError, Guest, boot
from tests.stress.workload import Report, work

ROUND = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
BOOTS, BATCH = 500, 10
PARTS, PART = 10, 180  # guests, and seconds for each


def worked(guest: Guest, folder: Path, *, first: int, rounds: int, seconds: int) -> Report:
    try:
        return work(guest, folder, first=first, rounds=rounds, seconds=seconds)
    except CannotBuildError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.timeout(600)
def test_a_short_while_under_load(guest: Guest, programs: Path) -> None:
    report = worked(guest, programs, first=1, rounds=10, seconds=20)
    assert report.wrong == []
    assert report.rounds > 0


@pytest.mark.soak
@pytest.mark.guest
@pytest.mark.parametrize("flavour", KERNELS)
def test_thirty_minutes_under_load(engine: str, flavour: str, programs: Path) -> None:
    need(flavour)
    with boot(engine, flavour) as domain:
        report = worked(Guest(domain), programs, first=1000 * (ROUND + 1), rounds=1_000_000, seconds=1800)
    print(f"{report.rounds} rounds")
    assert report.wrong == []
    assert report.rounds > 10


@pytest.mark.soak
@pytest.mark.guest
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("flavour", KERNELS)
def test_minutes_under_load(engine: str, flavour: str, part: int, programs: Path) -> None:
    """As long in all, in guests of their own, so that an interrupted run goes on where it was."""
    need(flavour)
    with boot(engine, flavour) as domain:
        first = 1_000_000 * (ROUND + 1) + 10_000 * part
        report = worked(Guest(domain), programs, first=first, rounds=1_000_000, seconds=PART)
    print(f"{report.rounds} rounds")
    assert report.wrong == []
    assert report.rounds > 1


@pytest.mark.soak
@pytest.mark.guest
@pytest.mark.parametrize("batch", range(BOOTS // BATCH))
def test_boots(engine: str, batch: int) -> None:
    """In all 500 boots, in batches so that an interrupted run goes on where it was; each fifth with a 32-bit kernel."""
    for number in range(batch * BATCH, (batch + 1) * BATCH):
        flavour = KERNELS[number % 5 == 4]
        need(flavour)
        text = f"boot {ROUND} {number}"
        try:
            with boot(engine, flavour, "128M") as domain:
                result = domain.run("cat; ls / | wc -l; cat /proc/uptime > /dev/null", stdin=text.encode(), check=True)
                assert result.stdout.startswith(text), result.stdout
                assert domain.shutdown(60).reason == "poweroff"
        except NonrootError as error:
            pytest.fail(f"boot {number} of {flavour} under {engine}: {error}", pytrace=False)
