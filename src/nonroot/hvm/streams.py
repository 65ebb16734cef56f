"""Byte streams between devices and the rest of the process: output in pieces, input held until it is wanted."""

from collections.abc import Callable
from typing import Final

from nonroot.hvm.device import Clock

__all__ = ["InputQueue", "OutputBuffer"]

FLUSH_NS: Final = 5_000_000
"""Output waits at most this long (machine time) for the rest of its line."""
NEWLINE: Final = 0x0A


class OutputBuffer:
    """A sink that passes bytes on in pieces: at a line's end, at a halt, or after 5 ms."""

    def __init__(self, clock: Clock, consumer: Callable[[bytes], object]) -> None:
        self._clock = clock
        self._consumer = consumer
        self._data = bytearray()
        self._append = self._data.append
        self._waiting = False
        self._since = 0

    def put(self, byte: int) -> None:
        """One byte (0..255)."""
        self._append(byte)
        if byte == NEWLINE:
            self.flush()
        elif not self._waiting:
            self._waiting = True
            self._since = self._clock.now_ns()
            self._clock.rearm()

    def flush(self) -> None:
        """Pass on what there is."""
        if self._data:
            data = bytes(self._data)
            self._data.clear()
            self._waiting = False
            self._consumer(data)

    def deadline(self) -> int | None:
        """When :meth:`advance` will flush (machine time, ns)."""
        return self._since + FLUSH_NS if self._waiting else None

    def advance(self, now_ns: int) -> None:
        """Flush what has waited long enough."""
        if self._waiting and now_ns >= self._since + FLUSH_NS:
            self.flush()


class InputQueue:
    """Bytes on their way into a device that takes them in small amounts, in its own time."""

    def __init__(self, receive: Callable[[bytes], int], piece: int) -> None:
        """``receive`` takes some of the bytes and says how many; it is offered at most ``piece`` at once."""
        self._receive = receive
        self._piece = piece
        self._waiting = bytearray()
        self._feeding = False

    def add(self, data: bytes) -> None:
        """More bytes; as many as possible go to the device now."""
        self._waiting += data
        self.feed()

    def feed(self) -> None:
        """Offer bytes to the device until it refuses. Devices call this when they have become empty."""
        if self._feeding:
            return
        self._feeding = True
        try:
            while self._waiting:
                accepted = self._receive(bytes(self._waiting[: self._piece]))
                if accepted <= 0:
                    return
                del self._waiting[:accepted]
        finally:
            self._feeding = False

    def take(self) -> bytes:
        """What is waiting; it stays."""
        return bytes(self._waiting)

    def put(self, data: bytes) -> None:
        """Have ``data`` waiting, and nothing else; the device has been offered it."""
        self._waiting[:] = data

    def __len__(self) -> int:
        return len(self._waiting)
