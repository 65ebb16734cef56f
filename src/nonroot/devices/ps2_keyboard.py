"""A PS/2 keyboard: scan-code sets 1 and 2, LEDs, identification. It does not repeat keys: who types does.

Source: IBM PS/2 technical reference, keyboards (101- and 102-key).
"""

from collections.abc import Callable
from typing import Final

from nonroot.devices.ps2_codes import scan_codes

__all__ = ["KEY_FIFO", "REPLY_FIFO", "Keyboard"]

KEY_FIFO: Final = 16
REPLY_FIFO: Final = 16
ACKNOWLEDGE: Final = 0xFA
RESEND: Final = 0xFE
BAT_GOOD: Final = 0xAA
ECHO: Final = 0xEE
OVERRUN_ROOM: Final = 8
"""The longest sequence of a key."""

SET_LEDS: Final = 0xED
SET_SCAN_CODES: Final = 0xF0
IDENTIFY: Final = 0xF2
SET_TYPEMATIC: Final = 0xF3
ENABLE: Final = 0xF4
DISABLE: Final = 0xF5
DEFAULTS: Final = 0xF6
RESET: Final = 0xFF
WITH_ARGUMENT: Final = (SET_LEDS, SET_SCAN_CODES, SET_TYPEMATIC, 0xFB, 0xFC, 0xFD)


class Keyboard:
    """The keyboard's side of the cable. Bytes leave through :meth:`take`, answers to commands first."""

    def __init__(self, changed: Callable[[], object]) -> None:
        """``changed`` is called when there may be a new byte to take."""
        self._changed = changed
        self.keys = bytearray()
        self.replies = bytearray()
        self.power_on()

    def power_on(self) -> None:
        """As after a successful self-test."""
        self.keys.clear()
        self.replies.clear()
        self.enabled = True
        self.scan_set = 2
        self.leds = 0
        self.command = 0
        self.last = 0

    @property
    def has_room(self) -> bool:
        """Whether the next key fits."""
        return len(self.keys) <= KEY_FIFO - OVERRUN_ROOM

    def key(self, key: int, pressed: bool) -> bool:
        """A key goes down or up; false if there is no room for it. Keys while scanning is off are lost."""
        if not self.has_room:
            return False
        if self.enabled:
            self.keys += scan_codes(key, pressed, self.scan_set)
            self._changed()
        return True

    def waiting(self) -> bool:
        """Whether there is a byte to take."""
        return bool(self.replies or self.keys)

    def take(self) -> int:
        """The next byte; call it only if one is waiting."""
        self.last = self.replies.pop(0) if self.replies else self.keys.pop(0)
        return self.last

    def write(self, value: int) -> None:
        """A byte from the host: a command, or its argument."""
        command, self.command = self.command, 0
        if command and value < 0x80:
            self._argument(command, value)
        elif value in WITH_ARGUMENT:
            self.command = value
            self._reply(ACKNOWLEDGE)
        elif value == ECHO:
            self._reply(ECHO)
        elif value == IDENTIFY:
            self._reply(ACKNOWLEDGE, 0xAB, 0x83)
        elif value == RESEND:
            self._reply(self.last)
        elif value == RESET:
            self.power_on()
            self._reply(ACKNOWLEDGE, BAT_GOOD)
        elif value in (ENABLE, DISABLE, DEFAULTS):
            self.enabled = value != DISABLE
            self.keys.clear()
            self._reply(ACKNOWLEDGE)
        elif 0xF7 <= value <= 0xFA:
            self._reply(ACKNOWLEDGE)  # how single keys behave, in set 3
        else:
            self._reply(RESEND)

    def _argument(self, command: int, value: int) -> None:
        if command == SET_LEDS:
            self.leds = value & 7
        elif command == SET_SCAN_CODES:
            if value == 0:
                self._reply(ACKNOWLEDGE, self.scan_set)
                return
            if value not in (1, 2):
                self._reply(RESEND)
                return
            self.scan_set = value
            self.keys.clear()
        self._reply(ACKNOWLEDGE)

    def _reply(self, *values: int) -> None:
        if len(self.replies) + len(values) <= REPLY_FIFO:
            self.replies += bytes(values)
        self._changed()
