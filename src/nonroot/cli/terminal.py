"""The user's terminal as the guest's console: raw, with a key to leave."""

import contextlib
import os
import selectors
import sys
import termios
import tty
from collections.abc import Callable, Iterator

__all__ = ["LEAVE", "pump_keys", "raw_terminal", "window_size", "write_all"]

LEAVE = b"\x1d"
"""Ctrl-]"""


def window_size(fd: int = 0) -> tuple[int, int]:
    """(rows, columns) of a terminal; 24 × 80 if it does not say."""
    with contextlib.suppress(OSError, ValueError):
        columns, rows = os.get_terminal_size(fd)
        if rows > 0 and columns > 0:
            return rows, columns
    return 24, 80


@contextlib.contextmanager
def raw_terminal(fd: int) -> Iterator[bool]:
    """Raw mode for the duration, if ``fd`` is a terminal; gives whether it is."""
    if not os.isatty(fd):
        yield False
        return
    saved = termios.tcgetattr(fd)
    try:
        tty.setraw(fd, termios.TCSANOW)
        yield True
    finally:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def pump_keys(fd: int, wake: int, send: Callable[[bytes], None], terminal: bool) -> str:
    """Pass input on until it ends (gives ``end``), the user leaves (``left``) or ``wake`` can be read (``done``)."""
    with selectors.DefaultSelector() as selector:
        selector.register(wake, selectors.EVENT_READ)
        pollable = True
        try:
            selector.register(fd, selectors.EVENT_READ)
        except PermissionError:  # a regular file
            pollable = False
        except ValueError:
            return "end"
        while True:
            if any(key.fd == wake for key, _ in selector.select(None if pollable else 0)):
                return "done"
            try:
                data = os.read(fd, 4096)
            except OSError:
                data = b""
            if not data:
                return "end"
            if terminal and LEAVE in data:
                send(data[: data.index(LEAVE)])
                return "left"
            send(data)


def write_all(fd: int, data: bytes) -> bool:
    """Write everything; false if nobody reads there any more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            with selectors.DefaultSelector() as selector:
                selector.register(fd, selectors.EVENT_WRITE)
                selector.select()
        except OSError:
            return False
    return True


def is_terminal(fd: int) -> bool:
    """Whether ``fd`` is a terminal; a closed one is none."""
    try:
        return os.isatty(fd)
    except OSError:
        return False


def stdout_fd() -> int:
    """The descriptor of standard output, with Python's own buffer empty."""
    sys.stdout.flush()
    return 1
