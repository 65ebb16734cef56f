"""Guest memory as bus masters see it: nothing raises, ROM stays as it is, holes float."""

from nonroot._engine import Memory
from nonroot.hvm.device import NO_EVENTS, Events
from nonroot.hvm.memory_map import FIRMWARE_END, PAGE_SIZE, VGA_END

__all__ = ["GuestDma"]

LONGEST = 16 << 20
"""Bytes of one transfer; no device has more."""


class GuestDma:
    """Reads and writes of guest-physical memory for devices; see :class:`nonroot.devices.pci_device.Dma`."""

    def __init__(self, memory: Memory, low_end: int, events: Events = NO_EVENTS) -> None:
        """``low_end``: address after the RAM below 4 GiB."""
        self._memory = memory
        self._low_end = low_end
        self._events = events

    def read(self, address: int, length: int) -> bytes:
        """Guest-physical bytes; all ones where there is no RAM."""
        if not 0 <= length <= LONGEST:
            return b""
        try:
            return self._memory.read(address, length)
        except (ValueError, OverflowError):
            pass
        self._events("dma", "read-outside-ram", address)
        result = bytearray()
        for start, size in _pages(address, length):
            try:
                result += self._memory.read(start, size)
            except (ValueError, OverflowError):
                result += b"\xff" * size
        return bytes(result)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Guest-physical bytes; lost where there is no RAM, and in ROM."""
        end = address + len(data)
        if (address >= 0 and end <= VGA_END) or (address >= FIRMWARE_END and end <= self._low_end):
            try:
                self._memory.write(address, data)
                return
            except ValueError:
                pass
        view = memoryview(data)
        done = 0
        for start, size in _pages(address, len(view)):
            piece = view[done : done + size]
            done += size
            frame = self._memory.lookup(start // PAGE_SIZE) if 0 <= start < 1 << 40 else None
            if frame is None or not frame[2]:
                self._events("dma", "write-outside-ram", start)
                continue
            self._memory.write(start, piece)

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        """Bytes of a host file to ``parts``, as far as they are at hand and all of it is RAM that can be written."""
        try:
            return self._memory.read_file(descriptor, offset, parts)
        except (ValueError, OverflowError):
            return 0
        except OSError:
            return -1


def _pages(address: int, length: int) -> list[tuple[int, int]]:
    """(address, length) of each page's part."""
    parts = []
    end = address + length
    while address < end:
        size = min(end - address, PAGE_SIZE - address % PAGE_SIZE)
        parts.append((address, size))
        address += size
    return parts
