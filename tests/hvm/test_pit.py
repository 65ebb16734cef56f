"""The 8254, by mode."""

import pytest

from nonroot.hvm.pit import PIT_HZ, Pit
from tests.hvm.makers import Outside

SECOND = 10**9
CONTROL, PORT_B = 3, 4


class Bench:
    """A PIT and a clock that is set by ticks of the PIT."""

    def __init__(self) -> None:
        self.outside = Outside()
        self.pit = Pit(self.outside.clock, self.outside.irq, self.outside.event)

    def at(self, tick: int) -> "Bench":
        time_ns = -(-tick * SECOND // PIT_HZ)
        self.outside.clock.run(self.pit, time_ns - self.outside.clock.time_ns)
        return self

    def program(self, counter: int, mode: int, count: int, access: int = 3, bcd: int = 0) -> None:
        self.pit.write(CONTROL, 1, counter << 6 | access << 4 | mode << 1 | bcd)
        if access != 2:
            self.pit.write(counter, 1, count & 0xFF)
        if access != 1:
            self.pit.write(counter, 1, count >> 8 & 0xFF)

    def latch(self, counter: int) -> int:
        self.pit.write(CONTROL, 1, counter << 6)
        return self.pit.read(counter, 1) | self.pit.read(counter, 1) << 8

    def status(self, counter: int) -> int:
        self.pit.write(CONTROL, 1, 0xE0 | 2 << counter)
        return self.pit.read(counter, 1)

    def out(self, counter: int) -> bool:
        return bool(self.status(counter) & 0x80)

    def gate2(self, level: int) -> None:
        self.pit.write(PORT_B, 1, level)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nothing_happens_before_programming(bench: Bench) -> None:
    assert bench.pit.deadline() is None
    bench.at(1_000_000)
    assert bench.outside.edges == 0


def test_mode_0_counts_once(bench: Bench) -> None:
    bench.program(0, 0, 100)
    assert not bench.out(0)
    bench.at(100)
    assert not bench.outside.high()
    bench.at(101)
    assert bench.outside.high()
    assert bench.out(0)
    bench.at(10_000)
    assert bench.outside.edges == 1
    assert bench.pit.deadline() is None


def test_mode_0_wraps_after_terminal_count(bench: Bench) -> None:
    bench.program(0, 0, 10)
    bench.at(1 + 12)
    assert bench.latch(0) == 0xFFFE


def test_mode_0_first_byte_stops_it(bench: Bench) -> None:
    bench.program(0, 0, 1000)
    bench.at(500)
    bench.pit.write(0, 1, 10)
    bench.at(5000)
    assert bench.outside.edges == 0
    bench.pit.write(0, 1, 0)
    bench.at(5000 + 11)
    assert bench.outside.edges == 1


def test_mode_0_gate_holds_the_count(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 100)
    bench.at(51)
    bench.gate2(0)
    held = bench.latch(2)
    assert held == 50
    bench.at(1000)
    assert bench.latch(2) == held
    bench.gate2(1)
    bench.at(1000 + 49)
    assert not bench.out(2)
    bench.at(1000 + 50)
    assert bench.out(2)


def test_mode_1_is_triggered_by_the_gate(bench: Bench) -> None:
    bench.program(2, 1, 20)
    assert bench.out(2)
    bench.gate2(1)
    assert not bench.out(2)
    bench.at(20)
    assert not bench.out(2)
    bench.at(21)
    assert bench.out(2)
    bench.gate2(0)
    bench.gate2(1)
    assert not bench.out(2)


def test_mode_2_divides(bench: Bench) -> None:
    bench.program(0, 2, 100)
    edges = bench.outside.edges
    bench.at(1 + 100)
    assert bench.outside.edges == edges + 1
    bench.at(1 + 1000)
    assert bench.outside.edges == edges + 10


def test_mode_2_output_is_low_for_one_tick(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 5)
    levels = [bench.at(1 + tick).out(2) for tick in range(10)]
    assert levels == [True] * 4 + [False] + [True] * 4 + [False]


def test_mode_2_new_count_waits_for_the_end_of_the_period(bench: Bench) -> None:
    bench.program(0, 2, 1000)
    bench.at(501)
    edges = bench.outside.edges
    bench.pit.write(0, 1, 10)
    bench.pit.write(0, 1, 0)
    assert bench.status(0) & 0x40
    bench.at(1000)
    assert bench.outside.edges == edges
    bench.at(1 + 1000 + 50)
    assert bench.outside.edges == edges + 1 + 5
    assert not bench.status(0) & 0x40


def test_mode_2_gate_low_forces_output_high_and_rise_restarts(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 100)
    bench.at(61)
    bench.gate2(0)
    assert bench.out(2)
    bench.at(500)
    bench.gate2(1)
    bench.at(501)
    assert bench.latch(2) == 100


@pytest.mark.parametrize(("count", "high"), [(10, 5), (11, 6), (2, 1), (3, 2)])
def test_mode_3_is_a_square_wave(bench: Bench, count: int, high: int) -> None:
    bench.gate2(1)
    bench.program(2, 3, count)
    levels = [bench.at(1 + tick).out(2) for tick in range(2 * count)]
    assert levels == ([True] * high + [False] * (count - high)) * 2


def test_mode_3_counts_by_two(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 3, 10)
    values = [bench.at(1 + tick).latch(2) for tick in range(10)]
    assert values == [10, 8, 6, 4, 2] * 2


def test_mode_3_interrupts_once_per_period(bench: Bench) -> None:
    bench.program(0, 3, 0)
    edges = bench.outside.edges
    bench.at(1 + 65536 * 3)
    assert bench.outside.edges == edges + 3


def test_mode_4_strobes_once(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 4, 5)
    levels = [bench.at(1 + tick).out(2) for tick in range(9)]
    assert levels == [True] * 5 + [False] + [True] * 3


def test_mode_5_strobes_after_the_trigger(bench: Bench) -> None:
    bench.program(2, 5, 5)
    bench.at(100)
    assert bench.out(2)
    bench.gate2(1)
    levels = [bench.at(101 + tick).out(2) for tick in range(8)]
    assert levels == [True] * 5 + [False] + [True] * 2


@pytest.mark.parametrize(("selector", "mode"), [(6, 2), (7, 3)])
def test_modes_6_and_7_are_2_and_3(bench: Bench, selector: int, mode: int) -> None:
    bench.program(2, selector, 100)
    assert bench.status(2) >> 1 & 7 == mode


@pytest.mark.parametrize(("access", "count", "expected"), [(1, 0x34, 0x34), (2, 0x1200, 0x1200), (3, 0x1234, 0x1234)])
def test_access_modes(bench: Bench, access: int, count: int, expected: int) -> None:
    bench.gate2(1)
    bench.program(2, 0, count, access)
    bench.at(1)
    bench.pit.write(CONTROL, 1, 0x80)
    if access == 3:
        assert bench.pit.read(2, 1) | bench.pit.read(2, 1) << 8 == expected
    else:
        assert bench.pit.read(2, 1) == expected >> (8 if access == 2 else 0)
        assert bench.status(2) >> 4 & 3 == access


def test_bcd(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 0x1000, bcd=1)
    bench.at(2)
    assert bench.latch(2) == 0x0999
    bench.at(1 + 1001)
    assert bench.latch(2) == 0x9999
    assert bench.out(2)


def test_bcd_zero_is_ten_thousand(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 0, 0, bcd=1)
    bench.at(10_000)
    assert not bench.out(2)
    bench.at(10_001)
    assert bench.out(2)


def test_latch_holds_until_read(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 1000)
    bench.at(101)
    bench.pit.write(CONTROL, 1, 0x80)
    bench.at(601)
    bench.pit.write(CONTROL, 1, 0x80)  # ignored: one is waiting
    assert bench.pit.read(2, 1) | bench.pit.read(2, 1) << 8 == 900
    assert bench.pit.read(2, 1) | bench.pit.read(2, 1) << 8 == 400


def test_read_back_latches_status_before_count(bench: Bench) -> None:
    bench.gate2(1)
    bench.program(2, 2, 1000)
    bench.at(101)
    bench.pit.write(CONTROL, 1, 0b1100_1000)
    assert bench.pit.read(2, 1) == 0b1011_0100
    assert bench.pit.read(2, 1) | bench.pit.read(2, 1) << 8 == 900


def test_null_count_until_loaded(bench: Bench) -> None:
    bench.pit.write(CONTROL, 1, 0xB0)
    assert bench.status(2) & 0x40
    bench.pit.write(2, 1, 1)
    bench.pit.write(2, 1, 1)
    assert not bench.status(2) & 0x40


def test_count_of_one_in_a_periodic_mode_is_two(bench: Bench) -> None:
    bench.program(0, 2, 1)
    first = bench.pit.deadline()
    assert first is not None
    bench.pit.advance(first)
    second = bench.pit.deadline()
    assert second is not None
    assert second - first >= 2 * SECOND // PIT_HZ - 1


def test_missed_periods_are_one_interrupt(bench: Bench) -> None:
    bench.program(0, 2, 100)
    edges = bench.outside.edges
    bench.outside.clock.time_ns = SECOND
    bench.pit.advance(SECOND)
    assert bench.outside.edges == edges + 1


def test_port_b(bench: Bench) -> None:
    bench.pit.write(PORT_B, 1, 0xFF)
    assert bench.pit.read(PORT_B, 1) & 0x0F == 0x0F
    bench.program(2, 0, 50)
    assert not bench.pit.read(PORT_B, 1) & 0x20
    bench.at(60)
    assert bench.pit.read(PORT_B, 1) & 0x20


def test_refresh_bit_toggles(bench: Bench) -> None:
    seen = set()
    for time_ns in range(0, 60_000, 5_000):
        bench.outside.clock.time_ns = time_ns
        seen.add(bench.pit.read(PORT_B, 1) & 0x10)
    assert seen == {0, 0x10}


def test_control_register_reads_as_ones(bench: Bench) -> None:
    assert bench.pit.read(CONTROL, 1) == 0xFF
    assert bench.outside.events == [("pit", "unknown-register", 3)]


def test_no_drift_over_a_day(bench: Bench) -> None:
    bench.program(0, 2, 11_932)
    count, deadline = 0, 0
    while (deadline := bench.pit.deadline() or 0) <= 100 * SECOND:
        bench.pit.advance(deadline)
        count += 1
    assert count == 100 * PIT_HZ // 11_932
