"""A PS/2 mouse: the standard one, IntelliMouse (a wheel) and IntelliMouse Explorer (two more buttons).

Source: IBM PS/2 technical reference, mouse; Microsoft's IntelliMouse identification by sample rates.
"""

from collections.abc import Callable
from typing import Final

__all__ = ["MOUSE_FIFO", "Mouse"]

MOUSE_FIFO: Final = 16
LONGEST: Final = 4
"""Bytes of a packet."""
ACKNOWLEDGE: Final = 0xFA
RESEND: Final = 0xFE
BAT_GOOD: Final = 0xAA

SCALING_1: Final = 0xE6
SCALING_2: Final = 0xE7
SET_RESOLUTION: Final = 0xE8
STATUS: Final = 0xE9
STREAM_MODE: Final = 0xEA
READ_DATA: Final = 0xEB
LEAVE_WRAP: Final = 0xEC
WRAP_MODE: Final = 0xEE
REMOTE_MODE: Final = 0xF0
IDENTIFY: Final = 0xF2
SET_RATE: Final = 0xF3
ENABLE: Final = 0xF4
DISABLE: Final = 0xF5
DEFAULTS: Final = 0xF6
RESET: Final = 0xFF

WHEEL: Final = 3
FIVE_BUTTONS: Final = 4
KNOCKS: Final = {bytes((200, 100, 80)): WHEEL, bytes((200, 200, 80)): FIVE_BUTTONS}
"""Sample rates set one after the other -> what the mouse becomes."""
LIMIT: Final = 1 << 15
"""Movement that has not been sent is kept up to here."""


class Mouse:
    """The mouse's side of the cable. Bytes leave through :meth:`take`, answers to commands first."""

    def __init__(self, changed: Callable[[], object]) -> None:
        """``changed`` is called when there may be a new byte to take."""
        self._changed = changed
        self.replies = bytearray()
        self.packets = bytearray()
        self.power_on()

    def power_on(self) -> None:
        """As after a successful self-test: reporting is off."""
        self.replies.clear()
        self.packets.clear()
        self.kind = 0
        self.knock = bytes(3)
        self.command = 0
        self.last = 0
        self.buttons = 0
        self.wrap = False
        self.dx = self.dy = self.dz = 0
        self.sent_buttons = 0
        self.defaults()

    def defaults(self) -> None:
        """Settings of command 0xF6."""
        self.reporting = False
        self.remote = False
        self.scaling = False
        self.resolution = 2
        self.rate = 100

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int | None = None) -> None:
        """Movement (right, down, wheel down), and the buttons held (bit 0 left, 1 right, 2 middle, 3 and 4 sides)."""
        if buttons is not None:
            buttons &= 0x1F
            unsent = self.buttons not in (buttons, self.sent_buttons)
            if unsent and self._may_report() and len(self.packets) + LONGEST <= MOUSE_FIFO:
                # A press and its release are both told, however long the host takes for what was before.
                self.packets += bytes(self._packet())
            self.buttons = buttons
        self.dx = _bounded(self.dx + dx)
        self.dy = _bounded(self.dy - dy)
        self.dz = _bounded(self.dz + dz)
        self._report()

    def waiting(self) -> bool:
        """Whether there is a byte to take."""
        return bool(self.replies or self.packets)

    def take(self) -> int:
        """The next byte; call it only if one is waiting."""
        self.last = self.replies.pop(0) if self.replies else self.packets.pop(0)
        if not self.packets:
            self._report(quietly=True)
        return self.last

    def write(self, value: int) -> None:
        """A byte from the host: a command, or its argument."""
        if self.wrap and value not in (RESET, LEAVE_WRAP):
            self._reply(value)
            return
        command, self.command = self.command, 0
        if command == SET_RATE and value < 0xE6:
            self.rate = value
            self.knock = self.knock[1:] + bytes((value,))
            kind = KNOCKS.get(self.knock)
            if kind is not None:
                self.kind = kind
            self._reply(ACKNOWLEDGE)
        elif command == SET_RESOLUTION and value < 4:
            self.resolution = value
            self._reply(ACKNOWLEDGE)
        elif command:
            self._reply(RESEND)
        else:
            self._command(value)

    def _command(self, value: int) -> None:
        if value in (SET_RATE, SET_RESOLUTION):
            self.command = value
            self._reply(ACKNOWLEDGE)
        elif value in (SCALING_1, SCALING_2):
            self.scaling = value == SCALING_2
            self._reply(ACKNOWLEDGE)
        elif value == STATUS:
            flags = (self.remote << 6) | (self.reporting << 5) | (self.scaling << 4)
            held = (self.buttons & 1) << 2 | (self.buttons & 4) >> 1 | (self.buttons & 2) >> 1
            self._reply(ACKNOWLEDGE, flags | held, self.resolution, self.rate)
        elif value in (STREAM_MODE, REMOTE_MODE):
            self.remote = value == REMOTE_MODE
            self._reply(ACKNOWLEDGE)
        elif value in (WRAP_MODE, LEAVE_WRAP):
            self.wrap = value == WRAP_MODE
            self._reply(ACKNOWLEDGE)
        elif value == READ_DATA:
            self._reply(ACKNOWLEDGE, *self._packet())
        elif value == IDENTIFY:
            self._reply(ACKNOWLEDGE, self.kind)
        elif value in (ENABLE, DISABLE, DEFAULTS):
            if value == DEFAULTS:
                self.defaults()
            self.reporting = value == ENABLE
            self.packets.clear()
            self.dx = self.dy = self.dz = 0
            self._reply(ACKNOWLEDGE)
        elif value == RESEND:
            self._reply(self.last)
        elif value == RESET:
            buttons = self.buttons
            self.power_on()
            self.buttons = self.sent_buttons = buttons
            self._reply(ACKNOWLEDGE, BAT_GOOD, 0)
        else:
            self._reply(RESEND)

    def _report(self, quietly: bool = False) -> None:
        """Make a packet of what has happened, if nobody waits for an earlier one."""
        if self.packets or not self._may_report():
            return
        if not (self.dx or self.dy or self.dz or self.buttons != self.sent_buttons):
            return
        self.packets += bytes(self._packet())
        if not quietly:
            self._changed()

    def _may_report(self) -> bool:
        return self.reporting and not self.remote and not self.wrap

    def _packet(self) -> list[int]:
        dx, self.dx = _part(self.dx, 255)
        dy, self.dy = _part(self.dy, 255)
        dz, self.dz = _part(self.dz, 7) if self.kind else (0, 0)
        self.sent_buttons = self.buttons
        first = self.buttons & 7 | 0x08 | (0x10 if dx < 0 else 0) | (0x20 if dy < 0 else 0)
        packet = [first, dx & 0xFF, dy & 0xFF]
        if self.kind == WHEEL:
            packet.append(dz & 0xFF)
        elif self.kind == FIVE_BUTTONS:
            packet.append(dz & 0x0F | (self.buttons & 0x18) << 1)
        return packet

    def _reply(self, *values: int) -> None:
        if len(self.replies) + len(values) <= MOUSE_FIFO:
            self.replies += bytes(values)
        self._changed()


def _bounded(value: int) -> int:
    return max(-LIMIT, min(LIMIT - 1, value))


def _part(value: int, limit: int) -> tuple[int, int]:
    """What fits into a packet, and what is left."""
    part = max(-limit, min(limit, value))
    return part, value - part
