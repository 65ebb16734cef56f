"""Routing of port and memory-mapped accesses to devices.

A device sees only its own offset. Ranges that overlap are refused when they are added. An access that lies inside one
range and has one of its sizes goes to the device as it is; any other is split into bytes, low address first, each
routed by itself, as the ISA bus does. What nobody answers floats: reads are all ones, writes are lost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, cast

from nonroot.hvm.device import NO_EVENTS, BlockDevice, Device, Events

__all__ = ["Bus", "BusError", "Range"]

DIRECT_LIMIT: Final = 0x1000
"""Ranges up to this length get one table entry per address and size: an access is one dictionary lookup."""


class BusError(ValueError):
    """A range that cannot be added: empty, beyond the address space, or overlapping another."""


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses ``base`` … ``base + length - 1`` reach ``device`` at ``offset`` and up."""

    base: int
    length: int
    device: Device
    offset: int
    sizes: tuple[int, ...]

    def overlaps(self, other: "Range") -> bool:
        """Whether some access could be meant for both."""
        apart = self.base + self.length <= other.base or other.base + other.length <= self.base
        return not apart and bool(set(self.sizes) & set(other.sizes))


@cache
def _takes_blocks(kind: type[Device]) -> bool:
    """Whether devices of this class are a :class:`BlockDevice`; asking that of each of them takes milliseconds."""
    return all(callable(getattr(kind, name, None)) for name in ("read_block", "write_block"))


class Bus:
    """One address space (ports, or guest-physical addresses that are not RAM)."""

    def __init__(self, name: str, address_bits: int, events: Events = NO_EVENTS) -> None:
        self.name = name
        self._limit = 1 << address_bits
        self._mask = self._limit - 1
        self._events = events
        self._ranges: list[Range] = []
        self._long: list[Range] = []
        # key: address << 4 | size; value: the device's method and its offset. The exit handlers look here themselves.
        self.reads: dict[int, tuple[Callable[[int, int], int], int]] = {}
        self.writes: dict[int, tuple[Callable[[int, int, int], None], int]] = {}
        self._blocks: dict[int, tuple[BlockDevice, int]] = {}

    def add(self, base: int, length: int, device: Device, offset: int = 0, sizes: tuple[int, ...] = (1,)) -> None:
        """Route a range. ``sizes`` are the access sizes that the device takes whole. BusError if it cannot be."""
        new = Range(base, length, device, offset, sizes)
        if length < 1 or base < 0 or base + length > self._limit:
            raise BusError(f"{self.name} range {base:#x}+{length:#x} of {device.name} is empty or out of bounds")
        for old in self._ranges:
            if new.overlaps(old):
                place = f"{base:#x}+{length:#x} of {device.name}"
                raise BusError(f"{self.name} range {place} overlaps {old.device.name} at {old.base:#x}")
        self._ranges.append(new)
        if length > DIRECT_LIMIT:
            self._long.append(new)
            return
        block = cast(BlockDevice, device) if _takes_blocks(type(device)) else None
        for size in sizes:
            for delta in range(length - size + 1):
                key = base + delta << 4 | size
                self.reads[key] = (device.read, offset + delta)
                self.writes[key] = (device.write, offset + delta)
                if block is not None:
                    self._blocks[key] = (block, offset + delta)

    def remove(self, base: int, length: int, device: Device) -> None:
        """Take back what :meth:`add` routed to ``device`` from ``base`` on. BusError if there is no such range."""
        for old in self._ranges:
            if (old.base, old.length) == (base, length) and old.device is device:
                break
        else:
            raise BusError(f"{self.name} range {base:#x}+{length:#x} of {device.name} does not exist")
        self._ranges.remove(old)
        if old in self._long:
            self._long.remove(old)
            return
        for size in old.sizes:
            for address in range(base, base + length - size + 1):
                key = address << 4 | size
                del self.reads[key], self.writes[key]
                self._blocks.pop(key, None)

    def is_free(self, base: int, length: int) -> bool:
        """Whether nobody answers at any of these addresses, in any size."""
        return all(base + length <= old.base or old.base + old.length <= base for old in self._ranges)

    @property
    def ranges(self) -> tuple[Range, ...]:
        """All ranges in the order they were added."""
        return tuple(self._ranges)

    def read(self, address: int, size: int) -> int:
        """A load of ``size`` bytes."""
        entry = self.reads.get(address << 4 | size)
        if entry is not None:
            return entry[0](entry[1], size)
        if self._long and (wide := self._long_range(address, size)) is not None:
            return wide.device.read(wide.offset + address - wide.base, size)
        if size == 1:
            self._events(self.name, "floating-read", address)
            return 0xFF
        value = 0
        for index in range(size):
            value |= (self.read(address + index & self._mask, 1) & 0xFF) << 8 * index
        return value

    def write(self, address: int, size: int, value: int) -> None:
        """A store of ``size`` bytes."""
        entry = self.writes.get(address << 4 | size)
        if entry is not None:
            entry[0](entry[1], size, value)
        elif self._long and (wide := self._long_range(address, size)) is not None:
            wide.device.write(wide.offset + address - wide.base, size, value)
        elif size == 1:
            self._events(self.name, "floating-write", address)
        else:
            for index in range(size):
                self.write(address + index & self._mask, 1, value >> 8 * index & 0xFF)

    def read_block(self, address: int, size: int, count: int) -> bytes:
        """``count`` loads from the same address (REP INS); one call of a device that takes blocks."""
        entry = self._blocks.get(address << 4 | size)
        if entry is not None:
            return entry[0].read_block(entry[1], size, count)
        return b"".join(self.read(address, size).to_bytes(size, "little") for _ in range(count))

    def write_block(self, address: int, size: int, data: bytes) -> None:
        """Stores to the same address (REP OUTS); one call of a device that takes blocks."""
        entry = self._blocks.get(address << 4 | size)
        if entry is not None:
            entry[0].write_block(entry[1], size, data)
            return
        for start in range(0, len(data), size):
            self.write(address, size, int.from_bytes(data[start : start + size], "little"))

    def _long_range(self, address: int, size: int) -> Range | None:
        for wide in self._long:
            if wide.base <= address and address + size <= wide.base + wide.length and size in wide.sizes:
                return wide
        return None
