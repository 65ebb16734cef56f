"""The pair of 8259A interrupt controllers with the PC's edge/level control register.

Source: Intel 8259A datasheet (231468), 82371AB (PIIX4) datasheet for ELCR.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Events, StateError, StateRecord, array, expect

__all__ = ["PicPair", "PicState"]

# Device offsets: the machine maps 0x20, 0xA0 and 0x4D0 here.
MASTER_COMMAND: Final = 0
MASTER_DATA: Final = 1
SLAVE_COMMAND: Final = 2
SLAVE_DATA: Final = 3
MASTER_ELCR: Final = 4
SLAVE_ELCR: Final = 5

ICW1_START: Final = 0b0001_0000
ICW1_NEEDS_ICW4: Final = 0b0000_0001
ICW1_SINGLE: Final = 0b0000_0010
ICW4_AUTO_EOI: Final = 0b0000_0010
ICW4_SPECIAL_NESTED: Final = 0b0001_0000
OCW3_SELECT: Final = 0b0000_1000
OCW3_READ: Final = 0b0000_0010
OCW3_READ_ISR: Final = 0b0000_0001
OCW3_POLL: Final = 0b0000_0100
OCW3_MASK_COMMAND: Final = 0b0100_0000
OCW3_MASK_SET: Final = 0b0010_0000

# OCW2, bits 7:5
ROTATE_IN_AEOI_CLEAR: Final = 0
EOI: Final = 1
EOI_SPECIFIC: Final = 3
ROTATE_IN_AEOI_SET: Final = 4
ROTATE_ON_EOI: Final = 5
SET_PRIORITY: Final = 6
ROTATE_ON_EOI_SPECIFIC: Final = 7

CASCADE: Final = 2
"""The master's input that the slave drives."""
SPURIOUS: Final = 7
"""The input reported if a request went away before it was acknowledged."""
ELCR_WRITABLE: Final = (0xF8, 0xDE)
"""IRQ 0, 1, 2, 8 and 13 are always edge-triggered."""


@dataclass(slots=True)
class PicState(StateRecord):
    """State of both chips: every tuple is (master, slave)."""

    NAME: ClassVar[str] = "pic"

    irr: tuple[int, ...] = array("B", 2)
    isr: tuple[int, ...] = array("B", 2)
    imr: tuple[int, ...] = array("B", 2)
    lines: tuple[int, ...] = array("B", 2)
    elcr: tuple[int, ...] = array("B", 2)
    vector_base: tuple[int, ...] = array("B", 2)
    lowest: tuple[int, ...] = array("B", 2, default=7, maximum=7)
    icw_step: tuple[int, ...] = array("B", 2, maximum=4)
    needs_icw4: tuple[int, ...] = array("B", 2, maximum=1)
    single: tuple[int, ...] = array("B", 2, maximum=1)
    auto_eoi: tuple[int, ...] = array("B", 2, maximum=1)
    rotate_in_aeoi: tuple[int, ...] = array("B", 2, maximum=1)
    special_mask: tuple[int, ...] = array("B", 2, maximum=1)
    special_nested: tuple[int, ...] = array("B", 2, maximum=1)
    read_isr: tuple[int, ...] = array("B", 2, maximum=1)
    poll: tuple[int, ...] = array("B", 2, maximum=1)

    def check_consistency(self) -> None:
        """Fixed bits are what the chip makes them."""
        for chip in (0, 1):
            if self.vector_base[chip] & 7:
                raise StateError("pic state: vector_base is not a multiple of 8")
            if self.elcr[chip] & ~ELCR_WRITABLE[chip]:
                raise StateError("pic state: elcr makes a fixed edge input level-triggered")
            if self.icw_step[chip] == 1:
                raise StateError("pic state: icw_step 1 does not exist")


_FIELDS: Final = tuple(f.name for f in fields(PicState))


class _Chip:
    """One 8259A. Attributes are the fields of :class:`PicState`."""

    __slots__ = _FIELDS
    irr: int
    isr: int
    imr: int
    lines: int
    elcr: int
    vector_base: int
    lowest: int
    icw_step: int
    needs_icw4: int
    single: int
    auto_eoi: int
    rotate_in_aeoi: int
    special_mask: int
    special_nested: int
    read_isr: int
    poll: int

    def pending(self, cascade: int) -> int:
        """The input that requests service and is not blocked by one in service; -1 if there is none."""
        requests = self.irr & ~self.imr
        if not requests:
            return -1
        blocked = self.isr
        if self.special_mask:
            blocked &= ~self.imr
        if self.special_nested:
            blocked &= ~cascade
        first = self.lowest + 1
        for step in range(8):
            line = (first + step) & 7
            if blocked >> line & 1:
                return -1
            if requests >> line & 1:
                return line
        return -1

    def set_line(self, line: int, level: bool) -> None:
        bit = 1 << line
        if level:
            if self.elcr & bit or not self.lines & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit

    def take(self, line: int) -> None:
        """The effect of an interrupt acknowledge cycle for ``line``."""
        bit = 1 << line
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_in_aeoi:
            self.lowest = line

    def highest_in_service(self) -> int:
        blocked = self.isr
        if self.special_mask:
            blocked &= ~self.imr
        for step in range(8):
            line = (self.lowest + 1 + step) & 7
            if blocked >> line & 1:
                return line
        return -1

    def command(self, value: int) -> None:
        if value & ICW1_START:
            self.imr = self.isr = 0
            self.irr = self.lines & self.elcr
            self.lowest = 7
            self.special_mask = self.read_isr = self.poll = 0
            self.auto_eoi = self.special_nested = self.rotate_in_aeoi = 0
            self.needs_icw4 = value & ICW1_NEEDS_ICW4
            self.single = (value & ICW1_SINGLE) >> 1
            self.icw_step = 2
        elif value & OCW3_SELECT:
            if value & OCW3_POLL:
                self.poll = 1
            if value & OCW3_READ:
                self.read_isr = value & OCW3_READ_ISR
            if value & OCW3_MASK_COMMAND:
                self.special_mask = (value & OCW3_MASK_SET) >> 5
        else:
            self._end_of_interrupt(value >> 5, value & 7)

    def _end_of_interrupt(self, operation: int, line: int) -> None:
        if operation == ROTATE_IN_AEOI_CLEAR:
            self.rotate_in_aeoi = 0
        elif operation == ROTATE_IN_AEOI_SET:
            self.rotate_in_aeoi = 1
        elif operation == SET_PRIORITY:
            self.lowest = line
        elif operation in (EOI, ROTATE_ON_EOI):
            line = self.highest_in_service()
            if line >= 0:
                self.isr &= ~(1 << line)
                if operation == ROTATE_ON_EOI:
                    self.lowest = line
        elif operation in (EOI_SPECIFIC, ROTATE_ON_EOI_SPECIFIC):
            self.isr &= ~(1 << line)
            if operation == ROTATE_ON_EOI_SPECIFIC:
                self.lowest = line

    def data(self, value: int) -> None:
        step = self.icw_step
        if step == 0:
            self.imr = value
        elif step == 2:
            self.vector_base = value & 0xF8
            self.icw_step = 3 if not self.single else 4 if self.needs_icw4 else 0
        elif step == 3:
            # ICW3 wires the cascade; the PC's is fixed.
            self.icw_step = 4 if self.needs_icw4 else 0
        else:
            self.auto_eoi = (value & ICW4_AUTO_EOI) >> 1
            self.special_nested = (value & ICW4_SPECIAL_NESTED) >> 4
            self.icw_step = 0


def _nothing() -> None:
    pass


class PicPair:
    """Master and slave 8259A. Inputs are :meth:`set_line`, the output is the vCPU's INTR pin."""

    name = "pic"

    def __init__(self, intr: Callable[[bool], object], events: Events = NO_EVENTS) -> None:
        """``intr`` takes the level of the INTR output; it is called only when that changes."""
        self._intr = intr
        self._events = events
        self._output = False
        self._before_timer: Callable[[], object] = _nothing
        self._master = _Chip()
        self._slave = _Chip()
        self._load(PicState())

    def reset(self) -> None:
        """Power-on state; the input lines keep their levels, which others drive."""
        self._before_timer()
        lines = (self._master.lines, self._slave.lines)
        self._load(PicState(lines=lines))
        self._update()

    def set_line(self, irq: int, level: bool) -> None:
        """Drive ISA interrupt line ``irq`` (0..15, not 2)."""
        if irq < 8:
            self._master.set_line(irq, level)
        else:
            self._slave.set_line(irq - 8, level)
        self._update()

    @property
    def timer_waits(self) -> bool:
        """Whether a request of ISA interrupt 0 waits, masked or not: then another edge of it changes nothing."""
        return bool(self._master.irr & 1)

    def watch_timer(self, before: Callable[[], object]) -> None:
        """Have ``before`` called before a waiting request of ISA interrupt 0 is taken, or forgotten."""
        self._before_timer = before

    def acknowledge(self) -> int:
        """The interrupt acknowledge cycle: the vector for the vCPU (spurious ones included)."""
        master = self._master
        line = master.pending(1 << CASCADE)
        if line < 0:
            self._events(self.name, "spurious", SPURIOUS)
            return master.vector_base + SPURIOUS
        if line == 0:
            self._before_timer()
        master.take(line)
        vector = master.vector_base + line
        if line == CASCADE:
            slave = self._slave
            line = slave.pending(0)
            if line < 0:
                self._events(self.name, "spurious", 8 + SPURIOUS)
                vector = slave.vector_base + SPURIOUS
            else:
                slave.take(line)
                vector = slave.vector_base + line
            # The slave's INT falls during the cycle; a further request is a new edge.
            master.set_line(CASCADE, False)
        self._update()
        return vector

    def pending(self) -> bool:
        """Whether INTR is asserted."""
        return self._output

    def read(self, offset: int, size: int) -> int:
        """Port read: command gives IRR, ISR or a poll; data gives IMR; ELCR."""
        if offset in (MASTER_ELCR, SLAVE_ELCR):
            return (self._master if offset == MASTER_ELCR else self._slave).elcr
        if offset > SLAVE_ELCR:
            self._events(self.name, "unknown-register", offset)
            return (1 << 8 * size) - 1
        chip = self._master if offset < SLAVE_COMMAND else self._slave
        if chip.poll:
            chip.poll = 0
            return self._poll(chip)
        if offset & 1:
            return chip.imr
        return chip.isr if chip.read_isr else chip.irr

    def write(self, offset: int, size: int, value: int) -> None:
        """Port write: initialisation and operation command words, IMR, ELCR."""
        value &= 0xFF
        if offset > SLAVE_ELCR:
            self._events(self.name, "unknown-register", offset)
            return
        if offset in (MASTER_ELCR, SLAVE_ELCR):
            which = offset - MASTER_ELCR
            chip = (self._master, self._slave)[which]
            old = chip.elcr
            chip.elcr = value & ELCR_WRITABLE[which]
            # Inputs that became level-triggered request while they are high.
            chip.irr = chip.irr & ~(old | chip.elcr) | chip.lines & chip.elcr
        else:
            chip = self._master if offset < SLAVE_COMMAND else self._slave
            if offset & 1:
                chip.data(value)
            else:
                if value & ICW1_START and chip is self._master:
                    self._before_timer()
                chip.command(value)
        self._update()

    def state(self) -> PicState:
        """Both chips."""
        return PicState(*((getattr(self._master, f), getattr(self._slave, f)) for f in _FIELDS))

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives INTR."""
        record = expect(PicState, state)
        self._before_timer()
        self._load(record)
        self._update()

    def _load(self, state: PicState) -> None:
        for f in _FIELDS:
            master, slave = getattr(state, f)
            setattr(self._master, f, master)
            setattr(self._slave, f, slave)

    def _poll(self, chip: _Chip) -> int:
        line = chip.pending(1 << CASCADE if chip is self._master else 0)
        if line < 0:
            return SPURIOUS
        if line == 0 and chip is self._master:
            self._before_timer()
        chip.take(line)
        self._update()
        return 0x80 | line

    def _update(self) -> None:
        master = self._master
        slave_requests = self._slave.pending(0) >= 0
        if slave_requests != bool(master.lines & 1 << CASCADE):
            master.set_line(CASCADE, slave_requests)
            if not slave_requests:
                # A withdrawn cascade request leaves nothing to serve.
                master.irr &= ~(1 << CASCADE)
        output = master.pending(1 << CASCADE) >= 0
        if output != self._output:
            self._output = output
            self._intr(output)
