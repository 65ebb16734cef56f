"""One-byte debug ports: POST codes (0x80) and the debug console of Bochs (0xE9).

The machine maps 0x80 to offset 0 and 0xE9 to offset 1.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Events, Sink, StateRecord, expect, u8

__all__ = ["DebugPort", "DebugPortState"]

POST: Final = 0
CONSOLE: Final = 1
CONSOLE_PRESENT: Final = 0xE9


@dataclass(slots=True)
class DebugPortState(StateRecord):
    """The last POST code."""

    NAME: ClassVar[str] = "debug"

    post_code: int = u8()


class DebugPort:
    """Keeps the last POST code and passes console bytes on."""

    name = "debug"

    def __init__(self, sink: Sink, events: Events = NO_EVENTS) -> None:
        """``sink`` takes the bytes written to the debug console."""
        self._sink = sink
        self._events = events
        self.post_code = 0

    def reset(self) -> None:
        """No POST code."""
        self.post_code = 0

    def read(self, offset: int, size: int) -> int:
        """The last POST code; 0xE9 says that the debug console is there."""
        if offset == POST:
            return self.post_code
        if offset == CONSOLE:
            return CONSOLE_PRESENT
        self._events(self.name, "unknown-register", offset)
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """A POST code, or a byte for the debug console."""
        if offset == POST:
            self.post_code = value & 0xFF
        elif offset == CONSOLE:
            self._sink(value & 0xFF)
        else:
            self._events(self.name, "unknown-register", offset)

    def state(self) -> DebugPortState:
        """The last POST code."""
        return DebugPortState(self.post_code)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        self.post_code = expect(DebugPortState, state).post_code
