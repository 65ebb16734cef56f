"""ACPI fixed hardware, by register."""

import pytest

from nonroot.hvm.acpi_pm import GPE_GENERATION, PM_TIMER_HZ, AcpiPm
from tests.hvm.makers import Outside

SECOND = 10**9
STS, EN, CNT, TMR, GPE_STS, GPE_EN = 0, 2, 4, 8, 12, 13
TMR_BIT, GBL, PWRBTN, RTC, WAK = 1, 0x20, 0x100, 0x400, 0x8000


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.fixture
def pm(outside: Outside) -> AcpiPm:
    return AcpiPm(outside.clock, outside.irq, outside.call, outside.event)


@pytest.mark.parametrize("seconds", [0, 1, 60, 3600, 86_400, 40 * 86_400])
def test_timer_is_exact_at_any_time(pm: AcpiPm, outside: Outside, seconds: int) -> None:
    outside.clock.time_ns = seconds * SECOND
    assert pm.read(TMR, 4) == seconds * PM_TIMER_HZ & 0xFFFF_FFFF


def test_timer_in_bytes(pm: AcpiPm, outside: Outside) -> None:
    outside.clock.time_ns = 1234 * SECOND
    whole = pm.read(TMR, 4)
    assert [pm.read(TMR + n, 1) for n in range(4)] == [whole >> 8 * n & 0xFF for n in range(4)]
    assert pm.read(TMR + 2, 2) == whole >> 16


def test_timer_is_read_only(pm: AcpiPm, outside: Outside) -> None:
    pm.write(TMR, 4, 0x1234_5678)
    assert pm.read(TMR, 4) == 0
    assert outside.events


def test_timer_interrupt_at_each_half_period(pm: AcpiPm, outside: Outside) -> None:
    pm.write(EN, 2, TMR_BIT)
    deadline = pm.deadline()
    assert deadline is not None
    assert deadline == -(-(1 << 31) * SECOND // PM_TIMER_HZ)
    outside.clock.run(pm, deadline)
    assert outside.high()
    assert pm.read(STS, 2) == TMR_BIT
    assert pm.deadline() is None
    pm.write(STS, 2, TMR_BIT)
    assert not outside.high()
    second = pm.deadline()
    assert second is not None
    assert second == -(-(2 << 31) * SECOND // PM_TIMER_HZ)


def test_timer_status_without_interrupt(pm: AcpiPm, outside: Outside) -> None:
    outside.clock.time_ns = 700 * SECOND
    assert pm.read(STS, 2) == TMR_BIT
    assert outside.edges == 0


def test_power_button(pm: AcpiPm, outside: Outside) -> None:
    pm.press_power_button()
    assert not outside.high()
    assert pm.read(STS, 2) == PWRBTN
    pm.write(EN, 2, PWRBTN)
    assert outside.high()
    pm.write(STS, 2, PWRBTN)
    assert not outside.high()


def test_enable_keeps_only_what_there_is(pm: AcpiPm) -> None:
    pm.write(EN, 2, 0xFFFF)
    assert pm.read(EN, 2) == TMR_BIT | GBL | PWRBTN | RTC


def test_status_is_cleared_by_ones_only(pm: AcpiPm) -> None:
    pm.press_power_button()
    pm.write(STS, 2, 0)
    assert pm.read(STS, 2) == PWRBTN
    pm.write(STS + 1, 1, 1)
    assert pm.read(STS, 2) == 0


def test_status_and_enable_as_one_doubleword(pm: AcpiPm) -> None:
    pm.press_power_button()
    pm.write(STS, 4, PWRBTN << 16 | PWRBTN)
    assert pm.read(STS, 4) == PWRBTN << 16


def test_always_in_acpi_mode(pm: AcpiPm) -> None:
    assert pm.read(CNT, 2) == 1
    pm.write(CNT, 2, 0)
    assert pm.read(CNT, 2) == 1


@pytest.mark.parametrize("kind", range(8))
def test_sleep(pm: AcpiPm, outside: Outside, kind: int) -> None:
    pm.write(CNT, 2, kind << 10)
    assert outside.calls == []
    pm.write(CNT, 2, kind << 10 | 1 << 13)
    if kind == 5:
        assert outside.calls == [()]
    else:
        assert outside.calls == []
        assert outside.events == [("acpi-pm", "unsupported-sleep-type", kind)]
    assert pm.read(CNT, 2) == kind << 10 | 1


def test_sleep_enable_by_byte_access(pm: AcpiPm, outside: Outside) -> None:
    pm.write(CNT + 1, 1, (5 << 10 | 1 << 13) >> 8)
    assert outside.calls == [()]


def test_reserved_registers_read_as_zero(pm: AcpiPm) -> None:
    assert pm.read(6, 2) == 0


def test_general_purpose_events(pm: AcpiPm, outside: Outside) -> None:
    pm.raise_event(GPE_GENERATION)
    assert not outside.high()
    assert pm.read(GPE_STS, 1) == GPE_GENERATION
    pm.write(GPE_EN, 1, 0xFF)
    assert pm.read(GPE_STS, 2) == GPE_GENERATION | GPE_GENERATION << 8
    assert outside.high()
    state = pm.state()
    pm.write(GPE_STS, 1, 0)
    assert outside.high()
    pm.write(GPE_STS, 2, GPE_GENERATION)
    assert not outside.high()
    assert pm.read(GPE_EN, 1) == 0
    pm.from_state(state)
    assert outside.high()
    pm.reset()
    assert not outside.high()
    assert pm.read(GPE_STS, 2) == 0
