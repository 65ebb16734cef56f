"""What the guest sees at 0xA0000..0xFFFFF and below 4 GiB: the firmware's ROM, or RAM, as the host bridge says.

Each 16 KiB (the last 64 KiB as one) has two bits: reads from RAM, writes to RAM. The p2m holds the choice, so that no
access needs an exit. RAM that is written but not read (shadowing through a ROM) is not emulated: reads and writes
both go to the ROM then; SeaBIOS copies with both bits set.

Behind the VGA's window lies RAM for system management mode. There is no such mode here, but firmware prepares that
RAM before it would be needed: it is seen while the SMRAM register has it open.

Source: Intel 82441FX datasheet (290549), PAM[6:0] and SMRAM.
"""

from collections.abc import Callable
from typing import Final

from nonroot._engine import Memory
from nonroot.devices.pci_device import DeviceRam
from nonroot.hvm.memory_map import FIRMWARE_END, PAGE_SIZE, VGA_END, VGA_START

__all__ = ["FIRMWARE_SIZES", "SMRAM_SIZE", "ShadowRam", "SystemManagementRam"]

FIRMWARE_SIZES: Final = tuple(128 << 10 + doubling for doubling in range(6))
"""Bytes that a firmware image can have."""
ISA_WINDOW: Final = 128 << 10
"""The image's end is seen below 1 MiB too, so much of it."""
FOUR_GIB: Final = 1 << 32
SMRAM_SIZE: Final = VGA_END - VGA_START
READ: Final = 1
WRITE: Final = 2
SEGMENT: Final = 16 << 10


def segments(pam: bytes) -> list[tuple[int, int, int]]:
    """(address, bytes, attribute) of each part, ascending."""
    result = []
    for index in range(12):
        value = pam[1 + index // 2] >> 4 * (index & 1) & 3
        result.append((VGA_END + index * SEGMENT, SEGMENT, value))
    return [*result, (0xF_0000, 4 * SEGMENT, pam[0] >> 4 & 3)]


class ShadowRam:
    """The p2m between 0xC0000 and 1 MiB, and the ROM at the end of the 32-bit addresses."""

    def __init__(self, memory: Memory, rom_backing: int, rom_size: int) -> None:
        """``memory`` has RAM there as yet; the ROM image lies at the beginning of its backing."""
        self._memory = memory
        self._backing = rom_backing
        self._size = rom_size
        self._ram: dict[int, tuple[int, int]] = {}
        for gfn in range(VGA_END // PAGE_SIZE, FIRMWARE_END // PAGE_SIZE):
            frame = memory.lookup(gfn)
            if frame is not None:
                self._ram[gfn] = frame[:2]
        self._now: dict[int, int] = {}
        memory.map((FOUR_GIB - rom_size) // PAGE_SIZE, rom_size // PAGE_SIZE, rom_backing, 0, False)

    def apply(self, pam: bytes) -> None:
        """Show what the seven registers say."""
        for base, length, attribute in segments(pam):
            if self._now.get(base) != attribute:
                self._now[base] = attribute
                self._show(base, length, attribute)

    def _show(self, base: int, length: int, attribute: int) -> None:
        for gfn in range(base // PAGE_SIZE, (base + length) // PAGE_SIZE):
            place = self._ram.get(gfn)
            if attribute & READ and place is not None:
                self._memory.map(gfn, 1, *place, bool(attribute & WRITE))
                continue
            offset = self._size - FIRMWARE_END + gfn * PAGE_SIZE
            if gfn * PAGE_SIZE >= FIRMWARE_END - ISA_WINDOW and offset >= 0:
                self._memory.map(gfn, 1, self._backing, offset, False)
            else:
                self._memory.unmap(gfn, 1)


class SystemManagementRam:
    """The RAM at 0xA0000..0xBFFFF, seen instead of the VGA's window while it is open."""

    def __init__(self, ram: DeviceRam, hide_window: Callable[[bool], object]) -> None:
        """``ram``: :data:`SMRAM_SIZE` bytes. ``hide_window`` is told that the window is covered, or no more."""
        self._ram = ram
        self._hide_window = hide_window
        self._open = False

    def apply(self, is_open: bool) -> None:
        """Show it or not, from now on."""
        if is_open == self._open:
            return
        self._open = is_open
        if is_open:
            self._hide_window(True)
            self._ram.show(VGA_START, 0, SMRAM_SIZE)
        else:
            self._ram.hide(VGA_START, SMRAM_SIZE)
            self._hide_window(False)
