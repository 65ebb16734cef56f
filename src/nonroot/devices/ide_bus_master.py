"""The bus master of one IDE channel: its registers, and the way along its table of memory regions.

Source: Programming Interface for Bus Master IDE Controller 1.0; Intel 82371SB (290550), chapter 2.7.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from nonroot.devices.ide_record import BUS_MASTER_FIELDS, CHUNK
from nonroot.devices.pci_device import PciConnection
from nonroot.hvm.device import Events

__all__ = ["BusMaster", "BusMemory", "Walk"]

# Command register
START: Final = 0x01
TO_MEMORY: Final = 0x08

# Status register
ACTIVE: Final = 0x01
ERROR: Final = 0x02
INTERRUPT: Final = 0x04
DRIVES: Final = 0x60

TABLE_PART: Final = 1024
"""Bytes of the table that are read at once; within one move, not kept."""
MOST_PARTS: Final = 1024
"""Parts of memory that a file is read to at once."""
_ENTRY: Final = struct.Struct("<II")


class BusMemory(Protocol):
    """The way to guest memory."""

    connection: PciConnection

    @property
    def bus_master(self) -> bool:
        """Whether the guest has switched it on."""


@dataclass(slots=True)
class Walk:
    """A stretch of the table that has been looked at, and not used up yet."""

    parts: list[tuple[int, int]]
    """(address, bytes)"""
    end: tuple[int, int, int, int]
    """Where the walk stands behind it."""


class BusMaster:
    """Attributes are fields of :class:`nonroot.devices.ide_record.IdeState` for one channel."""

    bm_command: int
    bm_status: int
    bm_table: int
    prd_next: int
    prd_address: int
    prd_left: int
    prd_last: int

    def __init__(self, name: str, memory: BusMemory, events: Events) -> None:
        self.name = name
        self._memory = memory
        self._events = events
        self._table = b""
        self._table_at = 0
        self._walk: Walk | None = None
        self.clear()

    def clear(self) -> None:
        """Power-on."""
        for name in BUS_MASTER_FIELDS:
            setattr(self, name, 0)
        self._walk = None

    # ── registers ──

    def read(self, register: int) -> int:
        """A byte: 0 command, 2 status, 4..7 table."""
        if register == 0:
            return self.bm_command
        if register == 2:
            return self.bm_status
        if register >= 4:
            return self.bm_table >> 8 * (register - 4) & 0xFF
        return 0

    def write(self, register: int, value: int) -> bool:
        """A byte. True if this starts the bus master."""
        if register == 0:
            before, self.bm_command = self.bm_command, value & (START | TO_MEMORY)
            self._walk = None
            if value & START and not before & START:
                self.bm_status |= ACTIVE
                self._go_to((self.bm_table, 0, 0, 0))
                return True
            if not value & START:
                self.bm_status &= ~ACTIVE
        elif register == 2:
            cleared = value & (ERROR | INTERRUPT)
            self.bm_status = (self.bm_status & ~cleared & ~DRIVES) | value & DRIVES
        elif register >= 4:
            shift = 8 * (register - 4)
            self.bm_table = (self.bm_table & ~(0xFF << shift) | value << shift) & 0xFFFF_FFFC
        return False

    @property
    def active(self) -> bool:
        """Whether it has been started, and has not come to the end of its table."""
        return bool(self.bm_status & ACTIVE)

    def runs(self, to_memory: bool) -> bool:
        """Whether it is active, in this direction, and may use the bus."""
        direction = bool(self.bm_command & TO_MEMORY)
        return self.active and direction == to_memory and self._memory.bus_master

    def interrupted(self) -> None:
        """The unit has asserted its interrupt."""
        self.bm_status |= INTERRUPT

    def settle(self) -> None:
        """A command is done: a table that is used up exactly ends the activity, a longer one leaves it."""
        if self.prd_last and not self.prd_left:
            self.bm_status &= ~ACTIVE

    # ── moves ──

    def scatter(self, data: bytes, position: int) -> int:
        """``data``, from ``position`` on, to where the table says. Returns the position at which the table ends."""
        write, size = self._memory.connection.dma.write, len(data)
        self._table = b""
        with memoryview(data) as view:
            while position < size and (self.prd_left or self._next_region()):
                part = min(self.prd_left, size - position)
                write(self.prd_address, view[position : position + part])
                self.prd_address += part
                self.prd_left -= part
                position += part
        return position

    def gather(self, size: int) -> bytes | None:
        """``size`` bytes from where the table says; None if the table ends before."""
        parts = []
        self._table = b""
        while size:
            if not self.prd_left and not self._next_region():
                return None
            part = min(self.prd_left, size)
            parts.append(self._memory.connection.dma.read(self.prd_address, part))
            self.prd_address += part
            self.prd_left -= part
            size -= part
        return b"".join(parts)

    def look_ahead(self, size: int) -> Callable[[int, int], int] | None:
        """
        What puts ``size`` bytes of a file where the table says; see :attr:`BlockRequest.place`.

        None if the table ends before, or is of very small parts, or odd. Nothing is used up until :meth:`use_walk`.
        """
        place = self.prd_next
        address, left, last = self.prd_address, self.prd_left, self.prd_last
        parts: list[tuple[int, int]] = []
        dma = self._memory.connection.dma
        if left:
            parts.append((address, min(left, size)))
        missing = size - left
        while missing > 0:
            # The table lies within 64 KiB: the address wraps there.
            room = (0x1_0000 - (place & 0xFFFF)) & ~7
            if last or not room or len(parts) >= MOST_PARTS:
                return None
            for low, high in _ENTRY.iter_unpack(dma.read(place, min(TABLE_PART, room))):
                place = place & ~0xFFFF | place + 8 & 0xFFFF
                address, left, last = low & ~1, high & 0xFFFE or 0x1_0000, high >> 31
                parts.append((address, min(left, missing)))
                missing -= left
                if missing <= 0 or last:
                    break
        if not parts:
            return None
        used = parts[-1][1]
        self._walk = Walk(parts, (place, address + used, left - used, last))
        read_file = dma.read_file
        return lambda descriptor, offset: read_file(descriptor, offset, parts)

    def use_walk(self) -> bool:
        """What :meth:`look_ahead` saw is used up. False if it holds no more: the guest has written the command."""
        walk, self._walk = self._walk, None
        if walk is None:
            return False
        self._go_to(walk.end)
        return True

    def forget_walk(self) -> None:
        """A record has been applied, or the request is another one."""
        self._walk = None

    def _go_to(self, place: tuple[int, int, int, int]) -> None:
        self.prd_next, self.prd_address, self.prd_left, self.prd_last = place

    # ── the table ──

    def _next_region(self) -> bool:
        """The next entry of the table. False after the last: the bus master stops, and the unit waits for ever."""
        if self.prd_last:
            self.bm_status &= ~ACTIVE
            self._events(self.name, "table-too-short", self.bm_table)
            return False
        address, count, self.prd_last = self._next_entry()
        # Neighbours become one region: a guest's buffer is often one stretch of memory, page by page.
        while not self.prd_last and count < CHUNK:
            following = self._peek_entry()
            if following[0] != address + count:
                break
            self._next_entry()
            count += following[1]
            self.prd_last = following[2]
        self.prd_address, self.prd_left = address, count
        return True

    def _peek_entry(self) -> tuple[int, int, int]:
        """(address, bytes, whether it is the last) of the entry at ``prd_next``."""
        if not self._table:
            # As much as is likely to be wanted, at once. The table lies within 64 KiB: the address wraps there.
            read = self._memory.connection.dma.read
            before_wrap = 0x1_0000 - (self.prd_next & 0xFFFF)
            if before_wrap >= 8:
                self._table = read(self.prd_next, min(TABLE_PART, before_wrap & ~7))
            else:
                self._table = read(self.prd_next, 4) + read(self.prd_next & ~0xFFFF, 4)
            self._table_at = 0
        address, count = _ENTRY.unpack_from(self._table, self._table_at)
        return address & ~1, count & 0xFFFE or 0x1_0000, count >> 31

    def _next_entry(self) -> tuple[int, int, int]:
        entry = self._peek_entry()
        self.prd_next = self.prd_next & ~0xFFFF | self.prd_next + 8 & 0xFFFF
        self._table_at += 8
        if self._table_at + 8 > len(self._table):
            self._table = b""
        return entry
