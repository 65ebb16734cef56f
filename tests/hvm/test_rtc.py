"""The MC146818, by register."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonroot.hvm.rtc import Rtc, civil_from_days, days_from_civil, memory_registers
from tests.hvm.makers import Outside

SECOND = 10**9
START = datetime(2023, 12, 31, 23, 59, 58, tzinfo=UTC)
SEC, SEC_A, MIN, MIN_A, HOUR, HOUR_A, DOW, DAY, MONTH, YEAR, A, B, C, D = range(14)
CENTURY = 0x32


class Clock(Rtc):
    """Shorter access for the tests."""

    def put(self, register: int, value: int) -> None:
        self.write(0, 1, register)
        self.write(1, 1, value)

    def get(self, register: int) -> int:
        self.write(0, 1, register)
        return self.read(1, 1)

    def civil(self) -> list[int]:
        return [self.get(r) for r in (CENTURY, YEAR, MONTH, DAY, HOUR, MIN, SEC)]


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def rtc(outside: Outside) -> Clock:
    return Clock(
        outside.clock, outside.irq, int(START.timestamp()) * SECOND, memory_registers(128 << 20, 0), outside.event
    )


def test_shows_utc_in_bcd(rtc: Clock) -> None:
    assert rtc.civil() == [0x20, 0x23, 0x12, 0x31, 0x23, 0x59, 0x58]
    assert rtc.get(DOW) == START.isoweekday() % 7 + 1


def test_new_year(rtc: Clock, outside: Outside) -> None:
    outside.clock.time_ns = 2 * SECOND
    assert rtc.civil() == [0x20, 0x24, 0x01, 0x01, 0, 0, 0]


def test_binary_and_twelve_hours(rtc: Clock) -> None:
    rtc.put(B, 0x06)
    assert rtc.civil() == [20, 23, 12, 31, 23, 59, 58]
    rtc.put(B, 0x00)
    assert rtc.get(HOUR) == 0x80 | 0x11
    rtc.put(B, 0x04)
    assert rtc.get(HOUR) == 0x80 | 11


@pytest.mark.parametrize(("hour", "shown"), [(0, 0x12), (1, 0x01), (11, 0x11), (12, 0x92), (13, 0x81), (23, 0x91)])
def test_twelve_hour_encoding_round_trips(rtc: Clock, hour: int, shown: int) -> None:
    rtc.put(B, 0x86)
    rtc.put(HOUR, hour)
    rtc.put(B, 0x80)
    assert rtc.get(HOUR) == shown
    rtc.put(HOUR, shown)
    rtc.put(B, 0x86)
    assert rtc.get(HOUR) == hour


def test_set_as_linux_does(rtc: Clock, outside: Outside) -> None:
    rtc.put(B, rtc.get(B) | 0x80)
    for register, value in (
        (YEAR, 0x00),
        (MONTH, 0x02),
        (DAY, 0x29),
        (HOUR, 0x12),
        (MIN, 0x34),
        (SEC, 0x56),
        (CENTURY, 0x20),
    ):
        rtc.put(register, value)
    outside.clock.time_ns = 5 * SECOND
    assert rtc.get(SEC) == 0x56
    rtc.put(B, rtc.get(B) & ~0x80)
    outside.clock.time_ns = 7 * SECOND
    assert rtc.civil() == [0x20, 0x00, 0x02, 0x29, 0x12, 0x34, 0x58]


def test_setting_while_running(rtc: Clock, outside: Outside) -> None:
    rtc.put(MIN, 0x10)
    outside.clock.time_ns = 3 * SECOND
    assert [rtc.get(r) for r in (HOUR, MIN, SEC)] == [0x23, 0x11, 0x01]


def test_out_of_range_fields_carry(rtc: Clock) -> None:
    rtc.put(B, 0x86)
    rtc.put(MONTH, 13)
    rtc.put(SEC, 70)
    rtc.put(B, 0x06)
    assert rtc.civil() == [20, 24, 2, 1, 0, 0, 10]


def test_divider_reset_starts_half_a_second_before_an_update(rtc: Clock, outside: Outside) -> None:
    rtc.put(A, 0x60)
    outside.clock.time_ns = 10 * SECOND + 123
    assert rtc.get(SEC) == 0x58
    rtc.put(A, 0x26)
    outside.clock.time_ns += SECOND // 2 - 1
    assert rtc.get(SEC) == 0x58
    outside.clock.time_ns += 1
    assert rtc.get(SEC) == 0x59


def test_update_in_progress_before_the_second_ends(rtc: Clock, outside: Outside) -> None:
    assert not rtc.get(A) & 0x80
    outside.clock.time_ns = SECOND - 244_000
    assert rtc.get(A) & 0x80
    outside.clock.time_ns = SECOND
    assert not rtc.get(A) & 0x80


def test_update_interrupt(rtc: Clock, outside: Outside) -> None:
    rtc.put(B, 0x12)
    assert rtc.deadline() == SECOND
    outside.clock.run(rtc, SECOND)
    assert outside.high()
    assert rtc.deadline() is None  # the flag is set: nothing more happens until it is read
    assert rtc.get(C) & 0x90 == 0x90
    assert not outside.high()
    assert rtc.deadline() == 2 * SECOND


def test_flags_are_set_without_interrupts_too(rtc: Clock, outside: Outside) -> None:
    assert rtc.deadline() is None
    outside.clock.time_ns = SECOND
    assert rtc.get(C) & 0x10
    assert rtc.get(C) & 0x10 == 0
    assert outside.edges == 0


@pytest.mark.parametrize(("rate", "hertz"), [(6, 1024), (15, 2), (3, 8192), (1, 256), (2, 128)])
def test_periodic_interrupt(rtc: Clock, outside: Outside, rate: int, hertz: int) -> None:
    rtc.put(A, 0x20 | rate)
    rtc.put(B, 0x42)
    count = 0
    while (deadline := rtc.deadline()) is not None and deadline <= SECOND:
        outside.clock.time_ns = deadline
        rtc.advance(deadline)
        assert rtc.get(C) & 0xC0 == 0xC0
        count += 1
    assert count == hertz


def test_periodic_rate_zero_is_off(rtc: Clock) -> None:
    rtc.put(A, 0x20)
    rtc.put(B, 0x42)
    assert rtc.deadline() is None


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x00, 0x00, 0x05), 7),
        ((0xFF, 0xFF, 0x59), 1),
        ((0xFF, 0xFF, 0xFF), 1),
        ((0xFF, 0x00, 0x00), 2),
        ((0x23, 0x59, 0x58), 86_400),
        ((0x12, 0xC0, 0x30), 2 + 12 * 3600 + 30),
        ((0x23, 0x59, 0x57), 86_399),
    ],
)
def test_alarm(rtc: Clock, outside: Outside, alarm: tuple[int, int, int], seconds: int) -> None:
    for register, value in zip((HOUR_A, MIN_A, SEC_A), alarm, strict=True):
        rtc.put(register, value)
    rtc.put(B, 0x22)
    assert rtc.deadline() == seconds * SECOND
    outside.clock.run(rtc, seconds * SECOND)
    assert rtc.get(C) & 0xA0 == 0xA0


def test_impossible_alarm_never_comes(rtc: Clock) -> None:
    rtc.put(HOUR_A, 0x30)
    rtc.put(B, 0x22)
    assert rtc.deadline() is None


def test_alarm_missed_while_nobody_looked_is_not_lost(rtc: Clock, outside: Outside) -> None:
    for register in (HOUR_A, MIN_A):
        rtc.put(register, 0xFF)
    rtc.put(SEC_A, 0x30)
    outside.clock.time_ns = 100 * SECOND
    assert rtc.get(C) & 0x20


def test_set_bit_clears_update_interrupt_enable(rtc: Clock) -> None:
    rtc.put(B, 0x92)
    assert rtc.get(B) == 0x82


def test_read_only_and_index_port(rtc: Clock, outside: Outside) -> None:
    rtc.put(D, 0)
    assert rtc.get(D) == 0x80
    assert ("rtc", "read-only-register", D) in outside.events
    assert rtc.read(0, 1) == 0xFF
    rtc.write(0, 1, 0x80 | D)
    assert rtc.read(1, 1) == 0x80


def test_memory_keeps_bytes(rtc: Clock) -> None:
    for register in (0x0E, 0x40, 0x7F):
        rtc.put(register, register ^ 0xFF)
        assert rtc.get(register) == register ^ 0xFF


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (128 << 20, 0, {0x15: 0x80, 0x16: 0x02, 0x17: 0xFF, 0x18: 0xFF, 0x34: 0x00, 0x35: 0x07, 0x5B: 0}),
        (8 << 20, 0, {0x17: 0x00, 0x18: 0x1C, 0x30: 0x00, 0x31: 0x1C, 0x34: 0, 0x35: 0}),
        (3 << 30, 5 << 30, {0x17: 0xFF, 0x18: 0xFF, 0x34: 0x00, 0x35: 0xBF, 0x5B: 0x00, 0x5C: 0x40, 0x5D: 0x01}),
    ],
)
def test_memory_size_registers(low: int, high: int, expected: dict[int, int]) -> None:
    registers = memory_registers(low, high)
    assert {r: registers[r] for r in expected} == expected


@given(st.dates())
def test_calendar_agrees_with_pythons(day: "datetime") -> None:
    ordinal = day.toordinal() - datetime(1970, 1, 1, tzinfo=UTC).toordinal()
    assert days_from_civil(day.year, day.month, day.day) == ordinal
    assert civil_from_days(ordinal) == (day.year, day.month, day.day)


@given(st.integers(0, 250 * 365 * 86_400))
def test_any_time_is_shown_right(seconds: int) -> None:
    outside = Outside()
    rtc = Clock(outside.clock, outside.irq, int(START.timestamp()) * SECOND)
    rtc.put(B, 0x06)
    outside.clock.time_ns = seconds * SECOND
    expected = START + timedelta(seconds=seconds)
    assert rtc.civil() == [
        *(expected.year // 100, expected.year % 100, expected.month, expected.day),
        *(expected.hour, expected.minute, expected.second),
    ]
    assert rtc.get(DOW) == expected.isoweekday() % 7 + 1
