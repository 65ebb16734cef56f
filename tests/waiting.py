"""Waiting for what happens soon. Patience is long, because only a test that fails needs all of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

PATIENCE: Final = 60.0
"""Seconds: what takes a moment may take long on a machine that is busy with other tests."""


def wait_until(condition: Callable[[], T], seconds: float = PATIENCE, pause: float = 0.005) -> T:
    """What ``condition`` gives as soon as that is true. AssertionError after ``seconds``."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"it did not happen in {seconds} seconds"
        time.sleep(pause)
    return found


def wait_until_quiet(cost: Callable[[], float], most: float, window: float, seconds: float = PATIENCE) -> None:
    """
    Wait for ``window`` seconds in which ``cost``, which only grows, grows by ``most`` or less. AssertionError if there
    have been none in ``seconds``: then something goes on for ever, and it is not only that a beginning took its time.
    """
    grown: list[float] = []

    def quiet() -> bool:
        before = cost()
        time.sleep(window)
        grown.append(cost() - before)
        return grown[-1] <= most

    try:
        wait_until(quiet, seconds)
    except AssertionError:
        raise AssertionError(f"in each {window} s it was more than {most}: {grown}") from None


def lives(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
