"""The i6300ESB: unlocking, two stages, reset."""

import pytest

from nonroot.devices.i6300esb import I6300Esb
from tests.hvm.makers import Outside

SECOND = 10**9
TICK = (1 << 15) * SECOND // 33_000_000


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def dog(outside: Outside) -> I6300Esb:
    return I6300Esb(outside.clock, outside.call, events=outside.event)


def unlock(dog: I6300Esb) -> None:
    dog.write(0xC, 1, 0x80)
    dog.write(0xC, 1, 0x86)


def start(dog: I6300Esb, first: int = 100, second: int = 200) -> None:
    for register, value in ((0, first), (4, second)):
        unlock(dog)
        dog.write(register, 4, value)
    dog.config_write(0x68, 1, 2)


def test_it_sleeps_until_it_is_enabled(dog: I6300Esb, outside: Outside) -> None:
    assert dog.config_read(0, 4) == 0x25AB_8086
    assert dog.deadline() is None
    outside.clock.run(dog, 3600 * SECOND)
    assert outside.calls == []


def test_two_stages_then_reset(dog: I6300Esb, outside: Outside) -> None:
    start(dog)
    outside.clock.run(dog, 100 * TICK + 1000)
    assert dog.read(8, 1) == 1
    assert outside.calls == []
    outside.clock.run(dog, 200 * TICK + 1000)
    assert outside.calls == [()]
    assert dog.read(0xC, 2) & 0x200
    dog.reset()
    assert dog.deadline() is None
    assert dog.read(0xC, 2) & 0x200, "the system asks for the reason of the reset"
    unlock(dog)
    dog.write(0xC, 2, 0x200)
    assert dog.read(0xC, 2) == 0


def test_a_ping_begins_again(dog: I6300Esb, outside: Outside) -> None:
    start(dog)
    for _ in range(10):
        outside.clock.run(dog, 250 * TICK)
        unlock(dog)
        dog.write(0xC, 2, 0x100)
    assert outside.calls == []


def test_a_ping_needs_the_key(dog: I6300Esb, outside: Outside) -> None:
    start(dog)
    outside.clock.run(dog, 250 * TICK)
    dog.write(0xC, 2, 0x100)
    dog.write(0xC, 1, 0x86)
    dog.write(0xC, 2, 0x100)
    outside.clock.run(dog, 60 * TICK)
    assert len(outside.calls) == 1


def test_fast_clock_and_no_reset(dog: I6300Esb, outside: Outside) -> None:
    dog.config_write(0x60, 2, 0x24)
    start(dog, 1000, 1000)
    outside.clock.run(dog, 2 * 1000 * 32 * SECOND // 33_000_000 + 1000)
    assert ("i6300esb", "timed-out", 0x24) in outside.events
    assert outside.calls == []


def test_locked_it_cannot_be_stopped(dog: I6300Esb, outside: Outside) -> None:
    start(dog)
    dog.config_write(0x68, 1, 3)
    dog.config_write(0x68, 1, 0)
    assert dog.config_read(0x68, 1) == 3
    outside.clock.run(dog, 301 * TICK)
    assert len(outside.calls) == 1


def test_disabled_it_stops(dog: I6300Esb, outside: Outside) -> None:
    start(dog)
    dog.config_write(0x68, 1, 0)
    outside.clock.run(dog, 1000 * TICK)
    assert outside.calls == []


def test_free_running_never_resets(dog: I6300Esb, outside: Outside) -> None:
    dog.config_write(0x68, 1, 6)
    unlock(dog)
    dog.write(0, 4, 10)
    outside.clock.run(dog, 3 * 0xF_FFFF * TICK)
    assert dog.read(8, 1) == 1
    assert outside.calls == []
