"""Reset and A20 ports: the PIIX reset control register (0xCF9) and system control port A (0x92).

Source: Intel 82371SB datasheet (RC register); IBM PS/2 technical reference (port 0x92).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Events, StateRecord, expect, u8

__all__ = ["ResetControl", "ResetControlState"]

RESET_CONTROL: Final = 0
"""Device offset; the machine maps 0xCF9 here."""
PORT_A: Final = 1
"""Device offset; the machine maps 0x92 here."""

RC_HARD: Final = 0b0000_0010
RC_RESET_CPU: Final = 0b0000_0100
RC_WRITABLE: Final = 0b0000_1110
PORT_A_FAST_RESET: Final = 0b0000_0001
PORT_A_A20: Final = 0b0000_0010


@dataclass(slots=True)
class ResetControlState(StateRecord):
    """Both registers as last written."""

    NAME: ClassVar[str] = "reset"

    control: int = u8(maximum=RC_WRITABLE)
    port_a: int = u8(default=PORT_A_A20)


class ResetControl:
    """Asks the machine for a reset when the guest sets the right bit."""

    name = "reset"

    def __init__(self, request_reset: Callable[[], object], events: Events = NO_EVENTS) -> None:
        self._request_reset = request_reset
        self._events = events
        self._control = 0
        self._port_a = PORT_A_A20

    def reset(self) -> None:
        """Nothing requested; A20 passes."""
        self._control = 0
        self._port_a = PORT_A_A20

    def read(self, offset: int, size: int) -> int:
        """What was written."""
        if offset == RESET_CONTROL:
            return self._control
        if offset == PORT_A:
            return self._port_a
        self._events(self.name, "unknown-register", offset)
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """A rising RESET_CPU or FAST_RESET bit resets the machine. A20 is kept and has no effect."""
        value &= 0xFF
        if offset == RESET_CONTROL:
            rising = value & ~self._control & RC_RESET_CPU
            self._control = value & RC_WRITABLE
        elif offset == PORT_A:
            rising = value & ~self._port_a & PORT_A_FAST_RESET
            self._port_a = value
        else:
            self._events(self.name, "unknown-register", offset)
            return
        if rising:
            self._request_reset()

    def state(self) -> ResetControlState:
        """Both registers."""
        return ResetControlState(self._control, self._port_a)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; requests nothing."""
        record = expect(ResetControlState, state)
        self._control = record.control
        self._port_a = record.port_a
