"""The 8254 interval timer and system control port B (0x61), which gates and reads its third counter.

Counting is a function of machine time: nothing ticks. Counter 0's output is ISA interrupt 0; while its edges would
change nothing there is no deadline.
Source: Intel 82C54 datasheet (231244); port 0x61: 82371SB (PIIX3) datasheet.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Clock, Events, IrqLine, StateError, StateRecord, array, expect, flag, i64, u8

__all__ = ["PIT_HZ", "Pit", "PitState"]

# Device offsets: the machine maps 0x40..0x43 to 0..3 and 0x61 to 4.
COUNTER_2: Final = 2
CONTROL: Final = 3
PORT_B: Final = 4

PIT_HZ: Final = 1_193_182
SECOND: Final = 1_000_000_000

ACCESS_LATCH: Final = 0
ACCESS_LOW: Final = 1
ACCESS_HIGH: Final = 2
ACCESS_BOTH: Final = 3
READ_BACK: Final = 3

STATUS_OUT: Final = 0b1000_0000
STATUS_NULL: Final = 0b0100_0000

PORT_B_GATE: Final = 0b0000_0001
PORT_B_WRITABLE: Final = 0b0000_1111
PORT_B_REFRESH: Final = 0b0001_0000
PORT_B_OUT: Final = 0b0010_0000
REFRESH_NS: Final = 15_085
"""Port B's refresh bit toggles once in this many ns."""

_BIG: Final = 1 << 62


@dataclass(slots=True)
class PitState(StateRecord):
    """State of the three counters (tuples) and of port B. Times are in ticks of the 1.193182 MHz clock."""

    NAME: ClassVar[str] = "pit"

    mode: tuple[int, ...] = array("B", 3, default=3, maximum=5)
    access: tuple[int, ...] = array("B", 3, default=ACCESS_BOTH, minimum=1, maximum=3)
    bcd: tuple[int, ...] = array("B", 3, maximum=1)
    gate: tuple[int, ...] = array("B", 3, default=1, maximum=1)
    loaded: tuple[int, ...] = array("B", 3, maximum=1)
    counting: tuple[int, ...] = array("B", 3, maximum=1)
    reload: tuple[int, ...] = array("I", 3, default=0x1_0000, minimum=1, maximum=0x1_0000)
    start: tuple[int, ...] = array("q", 3, minimum=-_BIG, maximum=_BIG)
    held: tuple[int, ...] = array("q", 3, minimum=0, maximum=_BIG)
    next_reload: tuple[int, ...] = array("I", 3, maximum=0x1_0000)
    next_start: tuple[int, ...] = array("q", 3, minimum=-_BIG, maximum=_BIG)
    latched: tuple[int, ...] = array("q", 3, default=-1, minimum=-1, maximum=0xFFFF)
    latched_status: tuple[int, ...] = array("q", 3, default=-1, minimum=-1, maximum=0xFF)
    written_low: tuple[int, ...] = array("q", 3, default=-1, minimum=-1, maximum=0xFF)
    read_high: tuple[int, ...] = array("B", 3, maximum=1)
    seen: int = i64(minimum=0, maximum=_BIG)
    line: bool = flag()
    port_b: int = u8(maximum=PORT_B_WRITABLE)

    def check_consistency(self) -> None:
        """Counter 2's gate is port B's; what counts has been loaded."""
        if self.gate[:2] != (1, 1):
            raise StateError("pit state: gate of counter 0 or 1 is low")
        if any(c and not loaded for c, loaded in zip(self.counting, self.loaded, strict=True)):
            raise StateError("pit state: counting without a count")


_COUNTER_FIELDS: Final = tuple(f.name for f in fields(PitState) if f.name not in ("seen", "line", "port_b"))


class _Counter:
    """One counter. Attributes are the fields of :class:`PitState`; every method takes the current tick."""

    __slots__ = _COUNTER_FIELDS
    mode: int
    access: int
    bcd: int
    gate: int
    loaded: int
    counting: int
    reload: int
    start: int
    held: int
    next_reload: int
    next_start: int
    latched: int
    latched_status: int
    written_low: int
    read_high: int

    def settle(self, tick: int) -> None:
        """Switch to a new count of a periodic mode at the end of the period it was written in."""
        if self.next_reload and tick >= self.next_start:
            self.reload, self.start, self.next_reload = self.next_reload, self.next_start, 0

    def elapsed(self, tick: int) -> int:
        return max(0, tick - self.start) if self.counting else self.held

    def out(self, tick: int) -> bool:
        if not self.loaded:
            return self.mode != 0
        elapsed, count = self.elapsed(tick), self.reload
        mode = self.mode
        if mode == 0:
            return elapsed >= count
        if mode == 1:
            return not self.counting or elapsed >= count
        if not self.counting:
            return True
        if mode == 2:
            return elapsed % count != count - 1
        if mode == 3:
            return elapsed % count < (count + 1) // 2
        return elapsed != count

    def value(self, tick: int) -> int:
        """The counting element as the guest reads it (16 bits, BCD if chosen)."""
        elapsed, count = self.elapsed(tick), self.reload
        modulus = 10_000 if self.bcd else 0x1_0000
        if self.mode == 2:
            value = count - elapsed % count
        elif self.mode == 3:
            phase, high = elapsed % count, (count + 1) // 2
            value = (count & ~1) - 2 * (phase if phase < high else phase - high)
        else:
            value = count - elapsed
        value %= modulus
        return _to_bcd(value) if self.bcd else value

    def next_rise(self, after: int) -> int | None:
        """The first tick later than ``after`` at which OUT rises; None if it does not by itself."""
        if not self.counting:
            return None
        start, count = self.start, self.reload
        if self.mode in (2, 3):
            periods = max(0, after - start) // count + 1
            return start + periods * count
        rise = start + count + (1 if self.mode >= 4 else 0)
        return rise if rise > after else None

    def control(self, mode: int, access: int, bcd: int) -> None:
        self.mode, self.access, self.bcd = mode, access, bcd
        self.loaded = self.counting = self.held = self.next_reload = self.read_high = 0
        self.latched = self.written_low = -1

    def load(self, tick: int, written: int) -> None:
        """A complete count was written."""
        count = _from_bcd(written) if self.bcd else written
        count = count or (10_000 if self.bcd else 0x1_0000)
        if self.mode in (2, 3):
            count = max(count, 2)
            if self.counting:
                periods = max(0, tick - self.start) // self.reload + 1
                self.next_reload, self.next_start = count, self.start + periods * self.reload
                return
        self.reload = count
        self.loaded = 1
        if self.mode in (1, 5):
            return
        self.held = 0
        self.start = tick + 1
        self.counting = self.gate

    def suspend(self, tick: int) -> None:
        self.held = self.elapsed(tick)
        self.counting = 0

    def set_gate(self, tick: int, level: int) -> None:
        if level == self.gate:
            return
        self.gate = level
        if not self.loaded:
            return
        if self.mode in (0, 4):
            if level:
                self.start, self.counting = tick - self.held, 1
            else:
                self.suspend(tick)
        elif level:
            if self.next_reload:
                self.reload, self.next_reload = self.next_reload, 0
            self.start, self.counting = tick + 1, 1
        elif self.mode in (2, 3):
            self.suspend(tick)

    def latch_count(self, tick: int) -> None:
        if self.latched < 0:
            self.latched = self.value(tick)

    def latch_status(self, tick: int) -> None:
        if self.latched_status < 0:
            status = STATUS_OUT if self.out(tick) else 0
            if not self.loaded or self.next_reload:
                status |= STATUS_NULL
            self.latched_status = status | self.access << 4 | self.mode << 1 | self.bcd

    def read(self, tick: int) -> int:
        if self.latched_status >= 0:
            value, self.latched_status = self.latched_status, -1
            return value
        value = self.latched if self.latched >= 0 else self.value(tick)
        last = True
        if self.access == ACCESS_BOTH:
            high = self.read_high
            self.read_high ^= 1
            last = bool(high)
        else:
            high = self.access == ACCESS_HIGH
        if last:
            self.latched = -1
        return value >> 8 if high else value & 0xFF

    def write(self, tick: int, value: int) -> None:
        if self.access == ACCESS_LOW:
            self.load(tick, value)
        elif self.access == ACCESS_HIGH:
            self.load(tick, value << 8)
        elif self.written_low < 0:
            self.written_low = value
            if self.mode == 0 and self.loaded:
                # The first byte stops the counter and takes OUT low.
                self.loaded = self.counting = 0
        else:
            low, self.written_low = self.written_low, -1
            self.load(tick, value << 8 | low)


def _to_bcd(value: int) -> int:
    return value % 10 | value // 10 % 10 << 4 | value // 100 % 10 << 8 | value // 1000 % 10 << 12


def _from_bcd(value: int) -> int:
    number = (value & 15) + (value >> 4 & 15) * 10 + (value >> 8 & 15) * 100 + (value >> 12 & 15) * 1000
    return number % 10_000


def _always() -> bool:
    return True


class Pit:
    """Three counters; OUT0 drives the timer interrupt, OUT2 is seen in port B (there is no speaker)."""

    name = "pit"

    def __init__(
        self, clock: Clock, irq: IrqLine, events: Events = NO_EVENTS, heeded: Callable[[], bool] = _always
    ) -> None:
        """
        ``irq`` is ISA interrupt 0. ``heeded``: whether a rising edge of it would change anything now; before that
        becomes true again, :meth:`wake` has to be called.
        """
        self._clock = clock
        self._irq = irq
        self._events = events
        self._heeded = heeded
        self._asleep = False
        self._counters = (_Counter(), _Counter(), _Counter())
        self._seen = 0
        self._line = False
        self._port_b = 0
        self._load(self._initial())

    def _initial(self) -> PitState:
        return PitState(gate=(1, 1, 0), seen=self._tick())

    def reset(self) -> None:
        """Nothing counts until it is programmed."""
        self._load(self._initial())
        self._clock.rearm()

    def read(self, offset: int, size: int) -> int:
        """Counters, port B; the control register reads as all ones."""
        tick = self._tick()
        if offset == PORT_B:
            refresh = PORT_B_REFRESH if self._clock.now_ns() // REFRESH_NS & 1 else 0
            counter = self._counters[COUNTER_2]
            counter.settle(tick)
            return self._port_b | refresh | (PORT_B_OUT if counter.out(tick) else 0)
        if offset <= COUNTER_2:
            counter = self._counters[offset]
            counter.settle(tick)
            return counter.read(tick)
        self._events(self.name, "unknown-register", offset)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Counters, control word, port B."""
        self.advance(self._clock.now_ns())
        tick = self._tick()
        value &= 0xFF
        if offset <= COUNTER_2:
            counter = self._counters[offset]
            counter.settle(tick)
            counter.write(tick, value)
        elif offset == CONTROL:
            self._control(tick, value)
        elif offset == PORT_B:
            self._port_b = value & PORT_B_WRITABLE
            counter = self._counters[COUNTER_2]
            counter.settle(tick)
            counter.set_gate(tick, value & PORT_B_GATE)
            return
        else:
            self._events(self.name, "unknown-register", offset)
            return
        if offset == 0 or (offset == CONTROL and value >> 6 == 0):
            self._drive(self._counters[0].out(tick))
            self._clock.rearm()

    def _control(self, tick: int, value: int) -> None:
        select = value >> 6
        if select == READ_BACK:
            for index, counter in enumerate(self._counters):
                if value >> index + 1 & 1:
                    counter.settle(tick)
                    if not value & 0b0010_0000:
                        counter.latch_count(tick)
                    if not value & 0b0001_0000:
                        counter.latch_status(tick)
            return
        counter = self._counters[select]
        counter.settle(tick)
        access = value >> 4 & 3
        if access == ACCESS_LATCH:
            counter.latch_count(tick)
            return
        mode = value >> 1 & 7
        counter.control(mode if mode < 6 else mode - 4, access, value & 1)

    def deadline(self) -> int | None:
        """When OUT0 rises next; None also while nobody heeds it."""
        counter = self._counters[0]
        rise = counter.next_rise(self._seen)
        if rise is None:
            return None
        self._asleep = not self._heeded()
        if self._asleep:
            return None
        if counter.next_reload and rise > counter.next_start:
            rise = counter.next_start
        return -(-rise * SECOND // PIT_HZ)

    def advance(self, now_ns: int) -> None:
        """Pulse the interrupt if OUT0 has risen since the last call; rises that were missed are one."""
        tick = now_ns * PIT_HZ // SECOND
        counter = self._counters[0]
        rise = counter.next_rise(self._seen)
        if rise is not None and rise <= tick:
            self._drive(False)
            self._drive(True)
            self._clock.rearm()
        counter.settle(tick)
        self._seen = max(self._seen, tick)

    def wake(self) -> None:
        """Edges will be heeded from now on: those until now were not, and there is a deadline again."""
        if self._asleep:
            self._asleep = False
            self.advance(self._clock.now_ns())
            self._clock.rearm()

    def state(self) -> PitState:
        """All counters."""
        columns = {f: tuple(getattr(c, f) for c in self._counters) for f in _COUNTER_FIELDS}
        return PitState(**columns, seen=self._seen, line=self._line, port_b=self._port_b)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives the interrupt line."""
        self._load(expect(PitState, state))
        self._clock.rearm()

    def _load(self, state: PitState) -> None:
        for index, counter in enumerate(self._counters):
            for f in _COUNTER_FIELDS:
                setattr(counter, f, getattr(state, f)[index])
        self._seen = state.seen
        self._port_b = state.port_b
        self._drive(state.line)

    def _tick(self) -> int:
        return self._clock.now_ns() * PIT_HZ // SECOND

    def _drive(self, level: bool) -> None:
        self._line = level
        self._irq(level)
