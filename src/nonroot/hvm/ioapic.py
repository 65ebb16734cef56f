"""The I/O APIC: 24 inputs, edge and level, with the EOI register of version 0x20.

Source: Intel 82093AA datasheet (290566); EOI register: ICH datasheets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Events, StateError, StateRecord, array, expect, u8, u32

__all__ = ["PINS", "Deliver", "IoApic", "IoApicState"]

Deliver = Callable[[int, bool, int, int, bool], object]
"""Takes an interrupt message: (destination, logical, vector, delivery mode, level-triggered)."""

# Memory-mapped registers
IOREGSEL: Final = 0x00
IOWIN: Final = 0x10
EOI: Final = 0x40

# Indirect registers
IOAPICID: Final = 0x00
IOAPICVER: Final = 0x01
IOAPICARB: Final = 0x02
IOREDTBL: Final = 0x10

PINS: Final = 24
VERSION: Final = 0x20 | (PINS - 1) << 16

# Redirection table entry
RTE_VECTOR: Final = 0xFF
RTE_REMOTE_IRR: Final = 1 << 14
RTE_LEVEL: Final = 1 << 15
RTE_MASKED: Final = 1 << 16
RTE_WRITABLE: Final = 0xFF00_0000_0001_AFFF
RTE_RESET: Final = RTE_MASKED
RTE_ALLOWED: Final = RTE_WRITABLE | RTE_REMOTE_IRR


@dataclass(slots=True)
class IoApicState(StateRecord):
    """Registers and the levels of the inputs."""

    NAME: ClassVar[str] = "ioapic"

    select: int = u8()
    identity: int = u8(maximum=0x0F)
    lines: int = u32(maximum=(1 << PINS) - 1)
    redirection: tuple[int, ...] = array("Q", PINS, default=RTE_RESET)

    def check_consistency(self) -> None:
        """Reserved bits are zero; only level inputs have a remote IRR."""
        for entry in self.redirection:
            if entry & ~RTE_ALLOWED:
                raise StateError("ioapic state: redirection has reserved bits set")
            if entry & RTE_REMOTE_IRR and not entry & RTE_LEVEL:
                raise StateError("ioapic state: redirection has remote IRR on an edge input")


class IoApic:
    """One I/O APIC. Inputs are :meth:`set_line` (logical levels), messages go to ``deliver``."""

    name = "ioapic"

    def __init__(self, deliver: Deliver, events: Events = NO_EVENTS, identity: int = 0) -> None:
        self._deliver = deliver
        self._events = events
        self._identity_at_reset = identity
        self._select = 0
        self._identity = identity
        self._lines = 0
        self._redirection = [RTE_RESET] * PINS
        self._watched: dict[int, Callable[[], object]] = {}

    def reset(self) -> None:
        """Everything masked; the input lines keep their levels, which others drive."""
        self._announce_all()
        self._select = 0
        self._identity = self._identity_at_reset
        self._redirection = [RTE_RESET] * PINS

    def set_line(self, pin: int, level: bool) -> None:
        """Drive input ``pin``; true asserts it, whatever polarity the guest has chosen."""
        bit = 1 << pin
        if not level:
            self._lines &= ~bit
            return
        if self._lines & bit:
            return
        self._lines |= bit
        entry = self._redirection[pin]
        if entry & RTE_LEVEL:
            self._serve_level(pin)
        elif not entry & RTE_MASKED:
            self._send(entry)

    def heeds(self, pin: int) -> bool:
        """Whether a rising edge of input ``pin`` would send a message now."""
        return not self._redirection[pin] & (RTE_MASKED | RTE_REMOTE_IRR)

    def watch(self, pin: int, before: Callable[[], object]) -> None:
        """Have ``before`` called before anything but an edge itself may change what :meth:`heeds` says of ``pin``."""
        self._watched[pin] = before

    def eoi(self, vector: int) -> None:
        """A local APIC ended the level-triggered interrupt ``vector`` (EOI broadcast)."""
        for pin, entry in enumerate(self._redirection):
            if entry & RTE_REMOTE_IRR and entry & RTE_VECTOR == vector:
                self._announce(pin)
                self._redirection[pin] = entry & ~RTE_REMOTE_IRR
                self._serve_level(pin)

    def read(self, offset: int, size: int) -> int:
        """32-bit loads at IOREGSEL and IOWIN; anything else reads as zero."""
        if size != 4 or offset not in (IOREGSEL, IOWIN):
            self._events(self.name, "unknown-register", offset)
            return 0
        if offset == IOREGSEL:
            return self._select
        index = self._select
        if index in (IOAPICID, IOAPICARB):
            return self._identity << 24
        if index == IOAPICVER:
            return VERSION
        pin, half = divmod(index - IOREDTBL, 2)
        if 0 <= pin < PINS:
            return self._redirection[pin] >> 32 * half & 0xFFFF_FFFF
        self._events(self.name, "unknown-index", index)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """32-bit stores at IOREGSEL, IOWIN and EOI; anything else is dropped."""
        if size != 4 or offset not in (IOREGSEL, IOWIN, EOI):
            self._events(self.name, "unknown-register", offset)
        elif offset == IOREGSEL:
            self._select = value & 0xFF
        elif offset == EOI:
            self.eoi(value & RTE_VECTOR)
        else:
            self._write_indirect(self._select, value)

    def _write_indirect(self, index: int, value: int) -> None:
        pin, half = divmod(index - IOREDTBL, 2)
        if index == IOAPICID:
            self._identity = value >> 24 & 0x0F
        elif 0 <= pin < PINS:
            self._announce(pin)
            shift = 32 * half
            writable = RTE_WRITABLE & 0xFFFF_FFFF << shift
            entry = self._redirection[pin] & ~writable | value << shift & writable
            if not entry & RTE_LEVEL:
                entry &= ~RTE_REMOTE_IRR
            self._redirection[pin] = entry
            self._serve_level(pin)
        else:
            self._events(self.name, "unknown-index", index)

    def state(self) -> IoApicState:
        """All registers and input levels."""
        return IoApicState(self._select, self._identity, self._lines, tuple(self._redirection))

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; sends nothing: what was sent is in the local APICs' state."""
        record = expect(IoApicState, state)
        self._announce_all()
        self._select = record.select
        self._identity = record.identity
        self._lines = record.lines
        self._redirection = list(record.redirection)

    def _announce(self, pin: int) -> None:
        if pin in self._watched:
            self._watched[pin]()

    def _announce_all(self) -> None:
        for before in self._watched.values():
            before()

    def _serve_level(self, pin: int) -> None:
        entry = self._redirection[pin]
        if entry & RTE_LEVEL and self._lines >> pin & 1 and not entry & RTE_MASKED and not entry & RTE_REMOTE_IRR:
            self._redirection[pin] = entry | RTE_REMOTE_IRR
            self._send(entry)

    def _send(self, entry: int) -> None:
        self._deliver(entry >> 56, bool(entry >> 11 & 1), entry & RTE_VECTOR, entry >> 8 & 7, bool(entry & RTE_LEVEL))
