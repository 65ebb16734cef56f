"""The guest's console as a pseudo-terminal, for programs that want one: screen, minicom, expect.

As xenconsoled has it: the terminal is raw and there from the start, and XenStore's ``console/tty`` says where.
"""

import contextlib
import os
import selectors
import tty
from collections.abc import Callable
from typing import Final

from nonroot.errors import UnsupportedError

__all__ = ["ConsolePty"]

KEPT: Final = 256 << 10
"""Bytes of output that wait for a reader; of more, the oldest are lost."""
READ_SIZE: Final = 4096


class ConsolePty:
    """Both ends of a pseudo-terminal; the process keeps the other end open, so that its users may come and go."""

    def __init__(self, selector: selectors.BaseSelector, keys: Callable[[bytes], None]) -> None:
        """``keys`` gets what users type, in the selector's loop. UnsupportedError if the host has none left."""
        try:
            self._fd, self._other = os.openpty()
        except OSError as error:
            raise UnsupportedError(f"no pseudo-terminal for the console: {error.strerror}") from None
        tty.setraw(self._other)
        with contextlib.suppress(OSError):
            os.fchmod(self._other, 0o600)
        os.set_blocking(self._fd, False)
        self.path = os.ttyname(self._other)
        """Of the device that users open."""
        self._keys = keys
        self._waiting = bytearray()
        self._selector = selector
        self._events = selectors.EVENT_READ
        selector.register(self._fd, self._events, self._ready)

    def add(self, data: bytes) -> None:
        """Output of the guest; never waits."""
        self._waiting += data
        self._flush()

    def close(self) -> None:
        """Users get an end of file. Safe to call again."""
        if self._fd >= 0:
            self._selector.unregister(self._fd)
            os.close(self._fd)
            os.close(self._other)
            self._fd = self._other = -1

    def _ready(self, events: int) -> None:
        if events & selectors.EVENT_READ:
            with contextlib.suppress(BlockingIOError):
                self._keys(os.read(self._fd, READ_SIZE))
        if events & selectors.EVENT_WRITE:
            self._flush()

    def _flush(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._waiting:
                del self._waiting[: os.write(self._fd, self._waiting)]
        # Without a reader the terminal's own few KiB are full; then it is not writable, and costs nothing.
        del self._waiting[: max(0, len(self._waiting) - KEPT)]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._waiting else 0)
        if events != self._events:
            self._events = events
            self._selector.modify(self._fd, events, self._ready)
