"""The 8042 keyboard controller with a PS/2 keyboard and mouse: ports 0x60 and 0x64, ISA interrupts 1 and 12.

Keys that are typed faster than a person could wait here, and go to the keyboard one by one in machine time.

Source: IBM PS/2 technical reference, keyboard and auxiliary device controller.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.ps2_codes import SET2_TO_SET1
from nonroot.devices.ps2_keyboard import KEY_FIFO, REPLY_FIFO, WITH_ARGUMENT, Keyboard
from nonroot.devices.ps2_mouse import LIMIT, MOUSE_FIFO, SET_RATE, SET_RESOLUTION, Mouse
from nonroot.hvm.device import (
    NO_EVENTS,
    Clock,
    Events,
    IrqLine,
    StateError,
    StateRecord,
    assign,
    blob,
    capture,
    expect,
    fifo,
    flag,
    i64,
    u8,
)
from nonroot.hvm.i8042 import (
    COMMAND,
    DATA,
    MODE_KEYBOARD_OFF,
    MODE_MOUSE_OFF,
    MODE_SYSTEM,
    OUTPUT_A20,
    OUTPUT_NO_RESET,
    PULSE_FIRST,
    READ_OUTPUT_PORT,
    SELF_TEST,
    SELF_TEST_OK,
    STATUS_COMMAND,
    STATUS_FULL,
    STATUS_NOT_INHIBITED,
    TEST_KEYBOARD,
    TEST_MOUSE,
    WRITE_OUTPUT_PORT,
)

__all__ = ["COMMAND", "DATA", "KEYS_WAITING", "KEY_NS", "LENGTH", "Ps2Controller", "Ps2State"]

LENGTH: Final = 2

KEY_NS: Final = 10_000_000
"""Machine time between two key events."""
KEYS_WAITING: Final = 8192
"""Bytes of key events that wait (two an event); of more, the last are lost."""

STATUS_MOUSE: Final = 0x20

MODE_KEYBOARD_IRQ: Final = 0x01
MODE_MOUSE_IRQ: Final = 0x02
MODE_TRANSLATE: Final = 0x40
MODE_AT_RESET: Final = MODE_KEYBOARD_OFF | MODE_MOUSE_OFF | MODE_TRANSLATE
MODE_WRITABLE: Final = 0x7F

OUTPUT_KEYBOARD_IRQ: Final = 0x10
OUTPUT_MOUSE_IRQ: Final = 0x20

READ_RAM: Final = 0x20
WRITE_RAM: Final = 0x60
RAM_SIZE: Final = 0x20
MOUSE_OFF: Final = 0xA7
MOUSE_ON: Final = 0xA8
KEYBOARD_OFF: Final = 0xAD
KEYBOARD_ON: Final = 0xAE
READ_INPUT_PORT: Final = 0xC0
WRITE_KEYBOARD_OUTPUT: Final = 0xD2
WRITE_MOUSE_OUTPUT: Final = 0xD3
WRITE_MOUSE: Final = 0xD4
A20_OFF: Final = 0xDD
A20_ON: Final = 0xDF
TEST_INPUTS: Final = 0xE0
WITH_DATA: Final = (WRITE_OUTPUT_PORT, WRITE_KEYBOARD_OUTPUT, WRITE_MOUSE_OUTPUT, WRITE_MOUSE)

INPUT_PORT: Final = 0x80
"""The keyboard is not locked."""
BREAK: Final = 0xF0

SOURCE_CONTROLLER: Final = 0
SOURCE_KEYBOARD: Final = 1
SOURCE_MOUSE: Final = 2


@dataclass(slots=True)
class Ps2State(StateRecord):
    """Controller, keyboard, mouse, and keys on their way."""

    NAME: ClassVar[str] = "ps2"

    mode: int = u8(default=MODE_AT_RESET, maximum=MODE_WRITABLE)
    ram: bytes = blob(RAM_SIZE)
    port: int = u8(default=OUTPUT_NO_RESET | OUTPUT_A20)
    output: int = u8()
    output_full: bool = flag()
    source: int = u8(maximum=SOURCE_MOUSE)
    command: int = u8()
    last_was_command: bool = flag()
    released: bool = flag()
    """Translation has held back a break prefix."""
    keys: bytes = fifo(KEY_FIFO)
    key_replies: bytes = fifo(REPLY_FIFO)
    scanning: bool = flag(default=True)
    scan_set: int = u8(default=2, maximum=2)
    leds: int = u8(maximum=7)
    key_command: int = u8()
    key_last: int = u8()
    packets: bytes = fifo(MOUSE_FIFO)
    mouse_replies: bytes = fifo(MOUSE_FIFO)
    kind: int = u8(maximum=4)
    knock: bytes = blob(3)
    mouse_command: int = u8()
    mouse_last: int = u8()
    buttons: int = u8(maximum=0x1F)
    sent_buttons: int = u8(maximum=0x1F)
    wrap: bool = flag()
    reporting: bool = flag()
    remote: bool = flag()
    scaling: bool = flag()
    resolution: int = u8(default=2, maximum=3)
    rate: int = u8(default=100)
    dx: int = i64(minimum=-LIMIT, maximum=LIMIT - 1)
    dy: int = i64(minimum=-LIMIT, maximum=LIMIT - 1)
    dz: int = i64(minimum=-LIMIT, maximum=LIMIT - 1)
    waiting: bytes = fifo(KEYS_WAITING)
    next_key_at: int = i64(minimum=0)

    def check_consistency(self) -> None:
        """Commands that wait for data are ones that take some; events are whole."""
        if self.command and self.command not in WITH_DATA and not 0 <= self.command - WRITE_RAM < RAM_SIZE:
            raise StateError(f"ps2 state: command {self.command:#x} takes no data")
        if self.key_command not in (0, *WITH_ARGUMENT) or self.mouse_command not in (0, SET_RATE, SET_RESOLUTION):
            raise StateError("ps2 state: key_command or mouse_command takes no argument")
        if self.scan_set == 0 or self.kind in (1, 2):
            raise StateError("ps2 state: scan_set or kind does not exist")
        if len(self.waiting) % 2:
            raise StateError("ps2 state: waiting has half an event")


PLUGGED_IN: Final = (
    *("keys", "key_replies", "scanning", "scan_set", "leds", "key_command", "key_last"),
    *("packets", "mouse_replies", "kind", "knock", "mouse_command", "mouse_last", "buttons", "sent_buttons", "wrap"),
    *("reporting", "remote", "scaling", "resolution", "rate", "dx", "dy", "dz"),
)
"""Fields of the record that are the keyboard's and the mouse's."""


class Ps2Controller:
    """Ports 0x60 and 0x64, and what is plugged into the two sockets."""

    name = "ps2"
    _mode: int
    _ram: bytearray
    _port: int
    _output: int
    _output_full: bool
    _source: int
    _command: int
    _last_was_command: bool
    _released: bool
    _waiting: bytearray
    _next_key_at: int

    def __init__(
        self,
        clock: Clock,
        keyboard_irq: IrqLine,
        mouse_irq: IrqLine,
        request_reset: Callable[[], object],
        events: Events = NO_EVENTS,
        set_a20: Callable[[bool], object] = lambda on: None,
    ) -> None:
        """``set_a20`` is told when the guest moves the A20 gate."""
        self._clock = clock
        self._keyboard_irq = keyboard_irq
        self._mouse_irq = mouse_irq
        self._request_reset = request_reset
        self._events = events
        self._set_a20 = set_a20
        self._loading = True
        self.keyboard = Keyboard(self._next)
        self.mouse = Mouse(self._next)
        self._load(Ps2State())

    # ── input from outside, in the vCPU's thread ──

    def key(self, key: int, pressed: bool) -> bool:
        """A key (set-1 code, plus 0x80 for E0 keys) goes down or up. False if too many wait already."""
        if len(self._waiting) + 2 > KEYS_WAITING:
            self._events(self.name, "keys-lost", key)
            return False
        self._waiting += bytes((key & 0xFF, pressed))
        self._feed(self._clock.now_ns())
        return True

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int | None = None) -> None:
        """The mouse: right, down, wheel down, and the buttons held (bit 0 left, 1 right, 2 middle)."""
        self.mouse.move(dx, dy, dz, buttons)

    @property
    def leds(self) -> int:
        """Bit 0 scroll lock, 1 num lock, 2 caps lock."""
        return self.keyboard.leds

    @property
    def keys_waiting(self) -> int:
        """Key events that the keyboard has not taken yet."""
        return len(self._waiting) // 2

    # ── ports ──

    def read(self, offset: int, size: int) -> int:
        """The output buffer (and empties it), or the status register."""
        if offset == DATA:
            value = self._output
            if self._output_full:
                self._output_full = False
                self._drive()
                self._next()
                if self._waiting:
                    self._feed(self._clock.now_ns())
            return value
        status = STATUS_NOT_INHIBITED | (self._mode & MODE_SYSTEM)
        if self._output_full:
            status |= STATUS_FULL | (STATUS_MOUSE if self._source == SOURCE_MOUSE else 0)
        return status | STATUS_COMMAND if self._last_was_command else status

    def write(self, offset: int, size: int, value: int) -> None:
        """A command, or a byte for the keyboard or of a command."""
        value &= 0xFF
        self._last_was_command = offset == COMMAND
        command, self._command = self._command, 0
        if offset == COMMAND:
            self._do(value)
        elif command:
            self._data(command, value)
        else:
            self._mode &= ~MODE_KEYBOARD_OFF
            self.keyboard.write(value)

    def _do(self, value: int) -> None:
        if READ_RAM <= value < READ_RAM + RAM_SIZE:
            self._answer(self._mode if value == READ_RAM else self._ram[value - READ_RAM])
        elif WRITE_RAM <= value < WRITE_RAM + RAM_SIZE or value in WITH_DATA:
            self._command = value
        elif value == SELF_TEST:
            self._mode |= MODE_SYSTEM
            self._answer(SELF_TEST_OK)
        elif value in (TEST_MOUSE, TEST_KEYBOARD, TEST_INPUTS):
            self._answer(0)
        elif value in (MOUSE_OFF, MOUSE_ON, KEYBOARD_OFF, KEYBOARD_ON):
            bit = MODE_MOUSE_OFF if value in (MOUSE_OFF, MOUSE_ON) else MODE_KEYBOARD_OFF
            off = value in (MOUSE_OFF, KEYBOARD_OFF)
            self._set_mode(self._mode | bit if off else self._mode & ~bit)
        elif value == READ_INPUT_PORT:
            self._answer(INPUT_PORT)
        elif value == READ_OUTPUT_PORT:
            port = self._port
            if self._output_full:
                port |= OUTPUT_MOUSE_IRQ if self._source == SOURCE_MOUSE else OUTPUT_KEYBOARD_IRQ
            self._answer(port)
        elif value in (A20_OFF, A20_ON):
            self._write_port(self._port & ~OUTPUT_A20 | (OUTPUT_A20 if value == A20_ON else 0))
        elif value >= PULSE_FIRST:
            # The low bits name output lines to leave alone; line 0 is the CPU's reset.
            if not value & 1:
                self._request_reset()
        else:
            self._events(self.name, "unknown-command", value)

    def _data(self, command: int, value: int) -> None:
        if command == WRITE_RAM:
            self._set_mode(value & MODE_WRITABLE)
        elif command == WRITE_OUTPUT_PORT:
            self._write_port(value)
            if not value & OUTPUT_NO_RESET:
                self._request_reset()
        elif command == WRITE_KEYBOARD_OUTPUT:
            self._put(value, SOURCE_KEYBOARD)
        elif command == WRITE_MOUSE_OUTPUT:
            self._put(value, SOURCE_MOUSE)
        elif command == WRITE_MOUSE:
            self._mode &= ~MODE_MOUSE_OFF
            self.mouse.write(value)
        else:
            self._ram[command - WRITE_RAM] = value

    def _set_mode(self, mode: int) -> None:
        self._mode = mode
        self._drive()
        self._next()

    def _write_port(self, value: int) -> None:
        before, self._port = self._port, value & 0xCF | OUTPUT_NO_RESET
        if (before ^ value) & OUTPUT_A20:
            self._set_a20(bool(value & OUTPUT_A20))

    # ── the output buffer ──

    def _answer(self, value: int) -> None:
        """The controller's own bytes take the place of what is in the buffer."""
        self._put(value, SOURCE_CONTROLLER)

    def _put(self, value: int, source: int) -> None:
        if self._output_full:
            self._output_full = False
            self._drive()
        self._output, self._source, self._output_full = value, source, True
        self._drive()

    def _next(self) -> None:
        """Put the next byte of keyboard or mouse into the buffer, if it is free."""
        if self._loading:
            return
        while not self._output_full:
            mode = self._mode
            if not mode & MODE_KEYBOARD_OFF and self.keyboard.waiting():
                value = self.keyboard.take()
                if mode & MODE_TRANSLATE:
                    if value == BREAK:
                        self._released = True
                        continue
                    value = SET2_TO_SET1[value] | (0x80 if self._released else 0)
                    self._released = False
                self._put(value, SOURCE_KEYBOARD)
            elif not mode & MODE_MOUSE_OFF and self.mouse.waiting():
                self._put(self.mouse.take(), SOURCE_MOUSE)
            else:
                return

    def _drive(self) -> None:
        mouse = self._source == SOURCE_MOUSE
        self._keyboard_irq(self._output_full and not mouse and bool(self._mode & MODE_KEYBOARD_IRQ))
        self._mouse_irq(self._output_full and mouse and bool(self._mode & MODE_MOUSE_IRQ))

    # ── keys on their way ──

    def _feed(self, now_ns: int) -> None:
        """Give the keyboard the next key, if it is time."""
        waiting = self._waiting
        if waiting and now_ns >= self._next_key_at and self.keyboard.has_room:
            key, pressed = waiting[0], bool(waiting[1])
            del waiting[:2]
            self._next_key_at = now_ns + KEY_NS
            self.keyboard.key(key, pressed)
        self._clock.rearm()

    def deadline(self) -> int | None:
        """When the next key is due."""
        return self._next_key_at if self._waiting and self.keyboard.has_room else None

    def advance(self, now_ns: int) -> None:
        """Keys that are due go to the keyboard."""
        if self._waiting and now_ns >= self._next_key_at:
            self._feed(now_ns)

    # ── what every device is ──

    def reset(self) -> None:
        """Power-on state of controller, keyboard and mouse; keys on their way are lost."""
        self._load(Ps2State())

    def state(self) -> Ps2State:
        """Everything the guest could notice, now or later."""
        keyboard, mouse = self.keyboard, self.mouse
        return capture(
            Ps2State,
            self,
            keys=bytes(keyboard.keys),
            key_replies=bytes(keyboard.replies),
            scanning=keyboard.enabled,
            scan_set=keyboard.scan_set,
            leds=keyboard.leds,
            key_command=keyboard.command,
            key_last=keyboard.last,
            packets=bytes(mouse.packets),
            mouse_replies=bytes(mouse.replies),
            kind=mouse.kind,
            knock=mouse.knock,
            mouse_command=mouse.command,
            mouse_last=mouse.last,
            buttons=mouse.buttons,
            sent_buttons=mouse.sent_buttons,
            wrap=mouse.wrap,
            reporting=mouse.reporting,
            remote=mouse.remote,
            scaling=mouse.scaling,
            resolution=mouse.resolution,
            rate=mouse.rate,
            dx=mouse.dx,
            dy=mouse.dy,
            dz=mouse.dz,
        )

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives the interrupt lines, requests nothing."""
        self._load(expect(Ps2State, state))

    def _load(self, state: Ps2State) -> None:
        self._loading = True
        assign(self, state, *PLUGGED_IN)
        keyboard, mouse = self.keyboard, self.mouse
        keyboard.keys[:] = state.keys
        keyboard.replies[:] = state.key_replies
        keyboard.enabled = state.scanning
        keyboard.scan_set = state.scan_set
        keyboard.leds = state.leds
        keyboard.command = state.key_command
        keyboard.last = state.key_last
        mouse.packets[:] = state.packets
        mouse.replies[:] = state.mouse_replies
        mouse.kind = state.kind
        mouse.knock = state.knock
        mouse.command = state.mouse_command
        mouse.last = state.mouse_last
        mouse.buttons = state.buttons
        mouse.sent_buttons = state.sent_buttons
        mouse.wrap = state.wrap
        mouse.reporting = state.reporting
        mouse.remote = state.remote
        mouse.scaling = state.scaling
        mouse.resolution = state.resolution
        mouse.rate = state.rate
        mouse.dx, mouse.dy, mouse.dz = state.dx, state.dy, state.dz
        self._loading = False
        self._clock.rearm()
        self._drive()
