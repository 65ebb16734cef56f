"""The MC146818 real-time clock and its 128 bytes of CMOS memory.

Time is UTC: the wall time of power-on plus machine time, plus what the guest has set. Flags are worked out when
somebody looks, or at the deadline of an interrupt that is enabled; nothing ticks.
Source: Motorola MC146818A datasheet; memory sizes in CMOS as PC firmware leaves them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import (
    NO_EVENTS,
    Clock,
    Events,
    IrqLine,
    StateRecord,
    array,
    assign,
    blob,
    capture,
    expect,
    flag,
    i64,
    u8,
)

__all__ = ["CENTURY", "Rtc", "RtcState", "memory_registers"]

# Device offsets; the machine maps 0x70 here.
INDEX: Final = 0
DATA: Final = 1

SECONDS: Final = 0x00
SECONDS_ALARM: Final = 0x01
MINUTES: Final = 0x02
MINUTES_ALARM: Final = 0x03
HOURS: Final = 0x04
HOURS_ALARM: Final = 0x05
DAY_OF_WEEK: Final = 0x06
DAY: Final = 0x07
MONTH: Final = 0x08
YEAR: Final = 0x09
REG_A: Final = 0x0A
REG_B: Final = 0x0B
REG_C: Final = 0x0C
REG_D: Final = 0x0D
CENTURY: Final = 0x32
"""The FADT names this register."""
NVRAM_SIZE: Final = 128

A_UIP: Final = 0b1000_0000
A_DIVIDER: Final = 0b0111_0000
A_DIVIDER_32K: Final = 0b0010_0000
A_DIVIDER_RESET: Final = 0b0110_0000
A_RATE: Final = 0b0000_1111
B_SET: Final = 0b1000_0000
B_PERIODIC: Final = 0b0100_0000
B_ALARM: Final = 0b0010_0000
B_UPDATE: Final = 0b0001_0000
B_BINARY: Final = 0b0000_0100
B_24_HOURS: Final = 0b0000_0010
C_IRQ: Final = 0b1000_0000
C_PERIODIC: Final = B_PERIODIC
C_ALARM: Final = B_ALARM
C_UPDATE: Final = B_UPDATE
D_VALID: Final = 0b1000_0000
PM: Final = 0b1000_0000
ALARM_ANY: Final = 0b1100_0000

SECOND: Final = 1_000_000_000
UIP_NS: Final = 244_000
"""UIP is set for this long before an update."""
CRYSTAL_HZ: Final = 32_768
DAY_SECONDS: Final = 86_400

_TIME_REGISTERS: Final = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY, MONTH, YEAR, CENTURY)
_SLOT: Final = {register: slot for slot, register in enumerate(_TIME_REGISTERS)}
_BIG: Final = 1 << 61


@dataclass(slots=True)
class RtcState(StateRecord):
    """Control registers, memory, and how civil time follows from machine time."""

    NAME: ClassVar[str] = "rtc"

    index: int = u8(maximum=NVRAM_SIZE - 1)
    reg_a: int = u8(default=A_DIVIDER_32K | 6, maximum=0x7F)
    reg_b: int = u8(default=B_24_HOURS)
    reg_c: int = u8(maximum=C_PERIODIC | C_ALARM | C_UPDATE)
    epoch: int = i64(minimum=-_BIG, maximum=_BIG)
    phase_ns: int = i64(minimum=-_BIG, maximum=_BIG)
    seen_ns: int = i64(minimum=0, maximum=_BIG)
    day_of_week_offset: int = u8(maximum=6)
    stopped: bool = flag()
    stopped_fields: tuple[int, ...] = array("B", len(_TIME_REGISTERS))
    nvram: bytes = blob(NVRAM_SIZE)


def memory_registers(below_4g: int, above_4g: int) -> dict[int, int]:
    """The CMOS bytes in which firmware leaves memory sizes; arguments in bytes of RAM below and above 4 GiB."""
    extended = min(max(below_4g - (1 << 20), 0) >> 10, 0xFFFF)
    above_16m = min(max(below_4g - (16 << 20), 0) >> 16, 0xFFFF)
    above = min(above_4g >> 16, 0xFF_FFFF)
    return {
        0x15: 640 & 0xFF,
        0x16: 640 >> 8,
        0x17: extended & 0xFF,
        0x18: extended >> 8,
        0x30: extended & 0xFF,
        0x31: extended >> 8,
        0x34: above_16m & 0xFF,
        0x35: above_16m >> 8,
        0x5B: above & 0xFF,
        0x5C: above >> 8 & 0xFF,
        0x5D: above >> 16,
    }


def days_from_civil(year: int, month: int, day: int) -> int:
    """Days since 1970-01-01 in the proleptic Gregorian calendar; months and days out of range carry over."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    year -= month <= 2
    era = year // 400
    year_of_era = year - era * 400
    day_of_year = (153 * (month - 3 if month > 2 else month + 9) + 2) // 5 + day - 1
    return era * 146_097 + year_of_era * 365 + year_of_era // 4 - year_of_era // 100 + day_of_year - 719_468


def civil_from_days(days: int) -> tuple[int, int, int]:
    """(year, month, day) of a day counted from 1970-01-01."""
    days += 719_468
    era, day_of_era = divmod(days, 146_097)
    year_of_era = (day_of_era - day_of_era // 1460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year_of_era + year_of_era // 4 - year_of_era // 100)
    shifted = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * shifted + 2) // 5 + 1
    month = shifted + 3 if shifted < 10 else shifted - 9
    return year_of_era + era * 400 + (month <= 2), month, day


class Rtc:
    """The clock and its memory; the interrupt is ISA 8."""

    name = "rtc"
    _index: int
    _reg_a: int
    _reg_b: int
    _reg_c: int
    _epoch: int
    _phase_ns: int
    _seen_ns: int
    _day_of_week_offset: int
    _stopped: bool
    _stopped_fields: list[int]
    _nvram: bytearray

    def __init__(
        self,
        clock: Clock,
        irq: IrqLine,
        base_wall_ns: int = 0,
        nvram: Mapping[int, int] | None = None,
        events: Events = NO_EVENTS,
    ) -> None:
        """``base_wall_ns``: UTC at power-on, ns since 1970. ``nvram``: initial CMOS bytes (register to value)."""
        self._clock = clock
        self._irq = irq
        self._events = events
        initial = bytearray(NVRAM_SIZE)
        for register, value in (nvram or {}).items():
            initial[register] = value
        epoch, fraction = divmod(base_wall_ns, SECOND)
        self._load(RtcState(epoch=epoch, phase_ns=-fraction, nvram=bytes(initial)))

    def preset(self, registers: Mapping[int, int]) -> None:
        """Put bytes into the CMOS memory (register to value), as a setup program would."""
        for register, value in registers.items():
            self._nvram[register] = value & 0xFF

    def skip(self, seconds: int) -> None:
        """So much time has gone by in which the machine stood still; alarms in between are missed, as with no power."""
        self._epoch = max(-_BIG, min(_BIG, self._epoch + seconds))
        self._clock.rearm()

    def reset(self) -> None:
        """The RESET pin: interrupts are disabled and their flags cleared; the battery keeps the rest."""
        self._reg_b &= ~(B_PERIODIC | B_ALARM | B_UPDATE)
        self._reg_c = 0
        self._update()

    # ── registers ──

    def read(self, offset: int, size: int) -> int:
        """The index port reads as all ones; the data port gives the indexed byte."""
        if offset != DATA:
            return 0xFF
        index = self._index
        if index in _SLOT:
            return self._read_time(index)
        if index == REG_A:
            return self._reg_a | (A_UIP if self._update_in_progress() else 0)
        if index == REG_B:
            return self._reg_b
        if index == REG_C:
            self.advance(self._clock.now_ns())
            value = self._reg_c | (C_IRQ if self._reg_c & self._reg_b else 0)
            self._reg_c = 0
            self._update()
            return value
        if index == REG_D:
            return D_VALID
        return self._nvram[index]

    def write(self, offset: int, size: int, value: int) -> None:
        """Index or data; registers C and D are read-only."""
        value &= 0xFF
        if offset == INDEX:
            # Bit 7 masks NMI on the PC; this machine has no NMI source that it would mask.
            self._index = value & 0x7F
            return
        if offset != DATA:
            self._events(self.name, "unknown-register", offset)
            return
        index = self._index
        if index in (REG_C, REG_D):
            self._events(self.name, "read-only-register", index)
            return
        self.advance(self._clock.now_ns())
        if index in _SLOT:
            self._write_time(index, value)
        elif index == REG_A:
            self._write_reg_a(value & 0x7F)
        elif index == REG_B:
            self._write_reg_b(value)
        else:
            self._nvram[index] = value
        self._update()

    def _write_reg_a(self, value: int) -> None:
        was_reset = self._reg_a & A_DIVIDER_RESET == A_DIVIDER_RESET
        self._stop_if(self._reg_b & B_SET, value)
        self._reg_a = value
        if was_reset and value & A_DIVIDER_RESET != A_DIVIDER_RESET:
            # The first update comes half a second after the divider is released.
            self._phase_ns = self._clock.now_ns() - SECOND // 2
        self._start_if_free()

    def _write_reg_b(self, value: int) -> None:
        self._stop_if(value & B_SET, self._reg_a)
        if value & B_SET:
            value &= ~B_UPDATE
        self._reg_b = value
        self._start_if_free()

    def _stop_if(self, set_bit: int, reg_a: int) -> None:
        halted = set_bit or reg_a & A_DIVIDER != A_DIVIDER_32K
        if halted and not self._stopped:
            self._stopped_fields = self._fields()
            self._stopped = True

    def _start_if_free(self) -> None:
        if not self._stopped or self._reg_b & B_SET or self._reg_a & A_DIVIDER != A_DIVIDER_32K:
            return
        now = self._clock.now_ns()
        self._phase_ns = now - (now - self._phase_ns) % SECOND
        self._set_civil(self._stopped_fields)
        self._stopped = False
        self._seen_ns = now

    # ── civil time ──

    def _seconds(self, now_ns: int) -> int:
        return self._epoch + (now_ns - self._phase_ns) // SECOND

    def _fields(self) -> list[int]:
        """Second, minute, hour, day of week, day, month, year, century."""
        if self._stopped:
            return list(self._stopped_fields)
        days, second = divmod(self._seconds(self._clock.now_ns()), DAY_SECONDS)
        year, month, day = civil_from_days(days)
        day_of_week = (days + 4 + self._day_of_week_offset) % 7 + 1
        century = year // 100 % 100
        return [second % 60, second // 60 % 60, second // 3600, day_of_week, day, month, year % 100, century]

    def _set_civil(self, fields: list[int]) -> None:
        """Civil time from fields, as of ``_phase_ns``; out-of-range fields carry over."""
        second, minute, hour, day_of_week, day, month, year, century = fields
        days = days_from_civil(century * 100 + year, month, day)
        self._epoch = days * DAY_SECONDS + hour * 3600 + minute * 60 + second
        self._day_of_week_offset = (day_of_week - 1 - (self._epoch // DAY_SECONDS + 4)) % 7

    def _read_time(self, register: int) -> int:
        value = self._fields()[_SLOT[register]]
        return self._encode_hour(value) if register == HOURS else self._encode(value)

    def _write_time(self, register: int, value: int) -> None:
        fields = self._fields()
        fields[_SLOT[register]] = self._decode_hour(value) if register == HOURS else self._decode(value)
        if self._stopped:
            self._stopped_fields = fields
            return
        now = self._clock.now_ns()
        self._phase_ns = now - (now - self._phase_ns) % SECOND
        self._set_civil(fields)

    def _encode(self, value: int) -> int:
        if self._reg_b & B_BINARY:
            return value & 0xFF
        return value // 10 % 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        if self._reg_b & B_BINARY:
            return value
        return (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self._reg_b & B_24_HOURS:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (PM if hour % 24 >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self._reg_b & B_24_HOURS:
            return self._decode(value)
        return self._decode(value & ~PM) % 12 + (12 if value & PM else 0)

    def _update_in_progress(self) -> bool:
        if self._stopped:
            return False
        return (self._clock.now_ns() - self._phase_ns) % SECOND >= SECOND - UIP_NS

    # ── interrupts ──

    def deadline(self) -> int | None:
        """The next enabled interrupt whose flag is not set yet."""
        wanted = self._reg_b & ~self._reg_c
        candidates = []
        if not self._stopped:
            second = (self._seen_ns - self._phase_ns) // SECOND
            if wanted & B_UPDATE:
                candidates.append(self._phase_ns + (second + 1) * SECOND)
            if wanted & B_ALARM:
                alarm = self._next_alarm(self._epoch + second)
                if alarm is not None:
                    candidates.append(self._phase_ns + (alarm - self._epoch) * SECOND)
        if wanted & B_PERIODIC:
            period = self._period()
            if period:
                ticks = (self._periods(self._seen_ns, period) + 1) * period
                candidates.append(self._phase_ns - (-ticks * SECOND // CRYSTAL_HZ))  # rounded up
        return min(candidates, default=None)

    def advance(self, now_ns: int) -> None:
        """Set the flags of what has happened since the last call."""
        seen, self._seen_ns = self._seen_ns, max(now_ns, self._seen_ns)
        flags = 0
        if not self._stopped:
            before, after = self._seconds(seen), self._seconds(now_ns)
            if after > before:
                flags |= C_UPDATE
                alarm = self._next_alarm(before)
                if alarm is not None and alarm <= after:
                    flags |= C_ALARM
        period = self._period()
        if period and self._periods(now_ns, period) > self._periods(seen, period):
            flags |= C_PERIODIC
        if flags & ~self._reg_c:
            self._reg_c |= flags
            self._update()

    def _period(self) -> int:
        """Period of the periodic interrupt in crystal ticks; 0 for none."""
        rate = self._reg_a & A_RATE
        if rate == 0 or self._reg_a & A_DIVIDER != A_DIVIDER_32K:
            return 0
        return 1 << (rate - 1 if rate > 2 else rate + 6)

    def _periods(self, now_ns: int, period: int) -> int:
        return (now_ns - self._phase_ns) * CRYSTAL_HZ // SECOND // period

    def _next_alarm(self, after: int) -> int | None:
        """The first second later than ``after`` that the alarm registers match."""
        hour, minute, second = (self._nvram[r] for r in (HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM))
        hours = None if hour & ALARM_ANY == ALARM_ANY else self._decode_hour(hour)
        minutes = None if minute & ALARM_ANY == ALARM_ANY else self._decode(minute)
        seconds = None if second & ALARM_ANY == ALARM_ANY else self._decode(second)
        day, rest = divmod(after + 1, DAY_SECONDS)
        h, m, s = rest // 3600, rest // 60 % 60, rest % 60
        tries = (
            (day, h, h + 1, m, m + 1, s),
            (day, h, h + 1, m + 1, 60, 0),
            (day, h + 1, 24, 0, 60, 0),
            (day + 1, 0, 24, 0, 60, 0),
        )
        for try_day, hour_low, hour_end, minute_low, minute_end, second_low in tries:
            found_hour = _first(hours, hour_low, hour_end)
            found_minute = _first(minutes, minute_low, minute_end)
            found_second = _first(seconds, second_low, 60)
            if found_hour is not None and found_minute is not None and found_second is not None:
                return try_day * DAY_SECONDS + found_hour * 3600 + found_minute * 60 + found_second
        return None

    def _update(self) -> None:
        self._irq(bool(self._reg_c & self._reg_b & (C_PERIODIC | C_ALARM | C_UPDATE)))
        self._clock.rearm()

    # ── state ──

    def state(self) -> RtcState:
        """Registers, memory and time."""
        return capture(RtcState, self)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives the interrupt line."""
        self._load(expect(RtcState, state))

    def _load(self, state: RtcState) -> None:
        assign(self, state)
        self._update()


def _first(wanted: int | None, low: int, end: int) -> int | None:
    """The smallest value in low..end-1 that is ``wanted`` (None: any)."""
    if low >= end:
        return None
    if wanted is None:
        return low
    return wanted if low <= wanted < end else None
