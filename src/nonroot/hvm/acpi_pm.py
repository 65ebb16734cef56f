"""ACPI power management: PM1 event and control blocks, the PM timer, S5 power-off, the power button, and one GPE block.

The FADT (:mod:`nonroot.hvm.acpi`) gives these blocks' ports, their lengths and the timer's width; they must match.
Source: ACPI specification 6.5, chapter 4.8.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Clock, Events, IrqLine, StateRecord, expect, u8, u16, u64

__all__ = ["GPE_GENERATION", "PM_TIMER_HZ", "AcpiPm", "AcpiPmState"]

# Device offsets; the machine maps 0x600 here.
PM1_STS: Final = 0x00
PM1_EN: Final = 0x02
PM1_CNT: Final = 0x04
PM_TMR: Final = 0x08
GPE0_STS: Final = 0x0C
GPE0_EN: Final = 0x0D
LENGTH: Final = 0x0E

PM_TIMER_HZ: Final = 3_579_545
SECOND: Final = 1_000_000_000

TMR: Final = 1 << 0
GBL: Final = 1 << 5
PWRBTN: Final = 1 << 8
RTC: Final = 1 << 10
WAK_STS: Final = 1 << 15
STATUS_BITS: Final = TMR | GBL | PWRBTN | RTC | WAK_STS
ENABLE_BITS: Final = TMR | GBL | PWRBTN | RTC

SCI_EN: Final = 1 << 0
SLP_TYP_SHIFT: Final = 10
SLP_EN: Final = 1 << 13
CONTROL_BITS: Final = 0b0001_1100_0000_0011
"""SCI_EN, BM_RLD and SLP_TYP keep what is written; SLP_EN and GBL_RLS read as zero."""

GPE_GENERATION: Final = 1 << 0
"""General-purpose event 0: the VM generation ID has changed."""
GPE_BITS: Final = GPE_GENERATION

S5: Final = 5
"""SLP_TYP of soft-off; the DSDT's \\_S5 says the same."""


@dataclass(slots=True)
class AcpiPmState(StateRecord):
    """PM1 registers; the timer is a function of machine time and has no state but the last half-period seen."""

    NAME: ClassVar[str] = "acpi-pm"
    VERSION: ClassVar[int] = 2

    status: int = u16(maximum=STATUS_BITS)
    enable: int = u16(maximum=ENABLE_BITS)
    control: int = u16(default=SCI_EN, maximum=CONTROL_BITS)
    half_period: int = u64()
    gpe_status: int = u8(maximum=GPE_BITS)
    gpe_enable: int = u8(maximum=GPE_BITS)


class AcpiPm:
    """The fixed hardware of ACPI. There is no SMI command port: the machine is always in ACPI mode."""

    name = "acpi-pm"

    def __init__(self, clock: Clock, irq: IrqLine, power_off: Callable[[], object], events: Events = NO_EVENTS) -> None:
        """``irq`` is the SCI; ``power_off`` is called when the guest enters S5."""
        self._clock = clock
        self._irq = irq
        self._power_off = power_off
        self._events = events
        self._status = 0
        self._enable = 0
        self._control = SCI_EN
        self._half_period = self._ticks() >> 31
        self._gpe_status = self._gpe_enable = 0

    def reset(self) -> None:
        """Power-on state; the timer goes on."""
        self._load(AcpiPmState(half_period=self._ticks() >> 31))

    def press_power_button(self) -> None:
        """The user presses the power button: an SCI if the guest has enabled it."""
        self._status |= PWRBTN
        self._update()

    def raise_event(self, bit: int) -> None:
        """A general-purpose event (``GPE_…``): an SCI if the guest has enabled it."""
        self._gpe_status |= bit & GPE_BITS
        self._update()

    def read(self, offset: int, size: int) -> int:
        """Registers by their ACPI sizes or in bytes; reserved ones read as zero."""
        if offset == PM_TMR and size == 4:
            return self._ticks() & 0xFFFF_FFFF
        if offset >= GPE0_STS:
            return (self._gpe_status | self._gpe_enable << 8) >> 8 * (offset - GPE0_STS) & (1 << 8 * size) - 1
        if offset >= PM_TMR:
            return self._ticks() >> 8 * (offset - PM_TMR) & (1 << 8 * size) - 1
        if offset >= PM1_CNT + 4:
            self._events(self.name, "unknown-register", offset)
            return 0
        self.advance(self._clock.now_ns())
        block = self._status | self._enable << 16 | self._control << 32
        return block >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Status bits are cleared by writing ones; SLP_EN with the type of S5 powers off."""
        self.advance(self._clock.now_ns())
        for index in range(size):
            self._write_byte(offset + index, value >> 8 * index & 0xFF)
        self._update()

    def _write_byte(self, offset: int, value: int) -> None:
        if offset >= GPE0_STS:
            if offset == GPE0_STS:
                self._gpe_status &= ~value
            else:
                self._gpe_enable = value & GPE_BITS
            return
        register, shift = offset & ~1, 8 * (offset & 1)
        value <<= shift
        if register == PM1_STS:
            self._status &= ~value
        elif register == PM1_EN:
            self._enable = self._enable & ~(0xFF << shift) | value & ENABLE_BITS
        elif register == PM1_CNT:
            self._control = (self._control & ~(0xFF << shift) | value & CONTROL_BITS) | SCI_EN
            if value & SLP_EN:
                self._sleep(self._control >> SLP_TYP_SHIFT & 7)
        else:
            self._events(self.name, "unknown-register", offset)

    def _sleep(self, kind: int) -> None:
        if kind == S5:
            self._power_off()
        else:
            self._events(self.name, "unsupported-sleep-type", kind)

    def deadline(self) -> int | None:
        """The next change of the timer's bit 31, if the guest wants an interrupt for it."""
        if not self._enable & TMR or self._status & TMR:
            return None
        ticks = (self._half_period + 1) << 31
        return -(-ticks * SECOND // PM_TIMER_HZ)

    def advance(self, now_ns: int) -> None:
        """Sets TMR_STS if the timer's bit 31 has changed."""
        half_period = now_ns * PM_TIMER_HZ // SECOND >> 31
        if half_period != self._half_period:
            self._half_period = half_period
            self._status |= TMR
            self._update()

    def state(self) -> AcpiPmState:
        """PM1 registers."""
        return AcpiPmState(
            self._status, self._enable, self._control, self._half_period, self._gpe_status, self._gpe_enable
        )

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives the SCI."""
        self._load(expect(AcpiPmState, state))

    def _load(self, state: AcpiPmState) -> None:
        self._status = state.status & STATUS_BITS
        self._enable = state.enable & ENABLE_BITS
        self._control = state.control & CONTROL_BITS | SCI_EN
        self._half_period = state.half_period
        self._gpe_status, self._gpe_enable = state.gpe_status, state.gpe_enable
        self._update()

    def _ticks(self) -> int:
        return self._clock.now_ns() * PM_TIMER_HZ // SECOND

    def _update(self) -> None:
        self._irq(bool(self._status & self._enable | self._gpe_status & self._gpe_enable))
        self._clock.rearm()
