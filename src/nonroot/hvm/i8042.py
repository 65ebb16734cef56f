"""The 8042 keyboard controller: what its registers mean, and a controller with nothing plugged in.

:mod:`nonroot.devices.ps2` is the whole one, with keyboard and mouse.

Source: IBM PS/2 technical reference, keyboard and auxiliary device controller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Events, StateRecord, assign, capture, expect, flag, u8

__all__ = ["I8042", "I8042State"]

# Device offsets; the machine maps 0x60 and 0x64 here.
DATA: Final = 0
COMMAND: Final = 1

STATUS_FULL: Final = 0b0000_0001
STATUS_SYSTEM: Final = 0b0000_0100
STATUS_COMMAND: Final = 0b0000_1000
STATUS_NOT_INHIBITED: Final = 0b0001_0000

READ_MODE: Final = 0x20
WRITE_MODE: Final = 0x60
TEST_MOUSE: Final = 0xA9
SELF_TEST: Final = 0xAA
TEST_KEYBOARD: Final = 0xAB
READ_OUTPUT_PORT: Final = 0xD0
WRITE_OUTPUT_PORT: Final = 0xD1
PULSE_FIRST: Final = 0xF0

MODE_SYSTEM: Final = 0b0000_0100
MODE_KEYBOARD_OFF: Final = 0b0001_0000
MODE_MOUSE_OFF: Final = 0b0010_0000
MODE_AT_RESET: Final = MODE_KEYBOARD_OFF | MODE_MOUSE_OFF
OUTPUT_NO_RESET: Final = 0b0000_0001
OUTPUT_A20: Final = 0b0000_0010
SELF_TEST_OK: Final = 0x55
INTERFACE_STUCK: Final = 0x01
"""The answer to an interface test: the clock line is stuck low, because nothing is plugged in."""


@dataclass(slots=True)
class I8042State(StateRecord):
    """Registers of the keyboard controller."""

    NAME: ClassVar[str] = "i8042"

    mode: int = u8(default=MODE_AT_RESET)
    output_port: int = u8(default=OUTPUT_NO_RESET | OUTPUT_A20)
    output: int = u8()
    output_full: bool = flag()
    command: int = u8()
    last_was_command: bool = flag()


class I8042:
    """A keyboard controller with nothing plugged in: status, self-test, A20 gate and the reset pulse."""

    name = "i8042"
    _mode: int
    _output_port: int
    _output: int
    _output_full: bool
    _command: int
    _last_was_command: bool

    def __init__(self, request_reset: Callable[[], object], events: Events = NO_EVENTS) -> None:
        self._request_reset = request_reset
        self._events = events
        self._load(I8042State())

    def reset(self) -> None:
        """Power-on state."""
        self._load(I8042State())

    def read(self, offset: int, size: int) -> int:
        """The output buffer (and empties it), or the status register."""
        if offset == DATA:
            self._output_full = False
            return self._output
        status = STATUS_NOT_INHIBITED | (self._mode & MODE_SYSTEM)
        if self._output_full:
            status |= STATUS_FULL
        if self._last_was_command:
            status |= STATUS_COMMAND
        return status

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, or its data byte; bytes for the keyboard go nowhere."""
        value &= 0xFF
        if offset == DATA:
            self._last_was_command = False
            command, self._command = self._command, 0
            self._data(command, value)
            return
        self._last_was_command = True
        self._command = value if value in (WRITE_MODE, WRITE_OUTPUT_PORT) else 0
        if value == READ_MODE:
            self._answer(self._mode)
        elif value == SELF_TEST:
            self._mode |= MODE_SYSTEM
            self._answer(SELF_TEST_OK)
        elif value in (TEST_KEYBOARD, TEST_MOUSE):
            self._answer(INTERFACE_STUCK)
        elif value == READ_OUTPUT_PORT:
            self._answer(self._output_port)
        elif value >= PULSE_FIRST:
            # The low bits name output lines to leave alone; line 0 is the CPU's reset.
            if not value & 1:
                self._request_reset()
        elif not self._command:
            self._events(self.name, "unknown-command", value)

    def _data(self, command: int, value: int) -> None:
        if command == WRITE_MODE:
            self._mode = value
        elif command == WRITE_OUTPUT_PORT:
            self._output_port = value | OUTPUT_NO_RESET
            if not value & OUTPUT_NO_RESET:
                self._request_reset()
        else:
            self._events(self.name, "no-keyboard", value)

    def _answer(self, value: int) -> None:
        self._output = value
        self._output_full = True

    def state(self) -> I8042State:
        """All registers."""
        return capture(I8042State, self)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; requests nothing."""
        self._load(expect(I8042State, state))

    def _load(self, state: I8042State) -> None:
        assign(self, state)
