"""The guest-physical memory map: RAM below and above the hole at 4 GiB, fixed addresses, and the e820 table.

0x0000_0000 … 0x0009_FFFF   RAM (its last KiB reserved)
0x000A_0000 … 0x000B_FFFF   hole: VGA window
0x000C_0000 … 0x000F_FFFF   RAM; 0xE0000 and up hold the ACPI tables and are reserved
0x0010_0000 … 0xBFFF_FFFF   RAM, as much as there is
0xC000_0000 … 0xFFFF_FFFF   hole: PCI, I/O APIC at 0xFEC0_0000, local APIC at 0xFEE0_0000
0x1_0000_0000 …             the rest of RAM
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from nonroot.errors import BadOptionError

__all__ = ["E820Entry", "E820Type", "MemoryMap", "MemorySizeError", "RamRange"]

PAGE_SIZE: Final = 4096
MIB: Final = 1 << 20
GIB: Final = 1 << 30

RAM_LOW_END: Final = 3 * GIB
RAM_HIGH_START: Final = 4 * GIB
VGA_START: Final = 0xA_0000
VGA_END: Final = 0xC_0000
EBDA_START: Final = 0x9_FC00
FIRMWARE_START: Final = 0xE_0000
FIRMWARE_END: Final = 0x10_0000
IOAPIC_BASE: Final = 0xFEC0_0000
LAPIC_BASE: Final = 0xFEE0_0000

MEMORY_MINIMUM: Final = 4 * MIB
MEMORY_MAXIMUM: Final = 512 * GIB
"""The engine's guest-physical addresses have 40 bits; half of them are left to devices."""


class MemorySizeError(BadOptionError):
    """The domain cannot have that much, or that little, memory."""

    code = "memory_size"


class E820Type(IntEnum):
    """Types of e820 entries; PVH's memory map uses the same numbers."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4


@dataclass(frozen=True, slots=True)
class E820Entry:
    """One line of the e820 table; bytes."""

    base: int
    length: int
    type: E820Type


@dataclass(frozen=True, slots=True)
class RamRange:
    """RAM at ``base``, backed at ``offset`` of the domain's memory; bytes."""

    base: int
    length: int
    offset: int


class MemoryMap:
    """Where a domain of ``memory_bytes`` has its RAM."""

    def __init__(self, memory_bytes: int, reserved: Sequence[tuple[int, int]] = ()) -> None:
        """
        ``reserved``: (base, length) of parts of the hole that the guest is told to keep away from, ascending.

        MemorySizeError if the size is not a whole number of pages or out of bounds.
        """
        if memory_bytes % PAGE_SIZE:
            raise MemorySizeError(f"memory of {memory_bytes} bytes is not a whole number of {PAGE_SIZE}-byte pages")
        if not MEMORY_MINIMUM <= memory_bytes <= MEMORY_MAXIMUM:
            raise MemorySizeError(
                f"memory of {memory_bytes} bytes is outside {MEMORY_MINIMUM // MIB} MiB..{MEMORY_MAXIMUM // GIB} GiB"
            )
        self.memory_bytes = memory_bytes
        self.reserved = tuple(reserved)
        self.low_end = min(memory_bytes, RAM_LOW_END)
        """Address after the RAM below 4 GiB."""
        self.high_bytes = memory_bytes - self.low_end
        """Bytes of RAM from 4 GiB on."""

    def ram(self) -> list[RamRange]:
        """All RAM, ascending. The bytes behind the VGA window stay unused."""
        ranges = [RamRange(0, VGA_START, 0), RamRange(VGA_END, self.low_end - VGA_END, VGA_END)]
        if self.high_bytes:
            ranges.append(RamRange(RAM_HIGH_START, self.high_bytes, self.low_end))
        return ranges

    def e820(self) -> list[E820Entry]:
        """What the guest is told, ascending."""
        entries = [
            E820Entry(0, EBDA_START, E820Type.RAM),
            E820Entry(EBDA_START, VGA_START - EBDA_START, E820Type.RESERVED),
            E820Entry(FIRMWARE_START, FIRMWARE_END - FIRMWARE_START, E820Type.RESERVED),
            E820Entry(FIRMWARE_END, self.low_end - FIRMWARE_END, E820Type.RAM),
        ]
        entries += [E820Entry(base, length, E820Type.RESERVED) for base, length in self.reserved]
        if self.high_bytes:
            entries.append(E820Entry(RAM_HIGH_START, self.high_bytes, E820Type.RAM))
        return entries

    def usable(self, base: int, length: int) -> bool:
        """Whether the e820 table calls all of ``base`` … ``base + length - 1`` RAM."""
        return any(
            entry.type == E820Type.RAM and entry.base <= base and base + length <= entry.base + entry.length
            for entry in self.e820()
        )
