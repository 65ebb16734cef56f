"""What the guest sees at 0xC0000..0xFFFFF and below 4 GiB: the firmware's ROM, or RAM, as the PAM registers say.

Each 16 KiB (the last 64 KiB as one) has two bits: reads from RAM, writes to RAM. The p2m holds the choice, so that no
access needs an exit. RAM that is written but not read (shadowing through a ROM) is not emulated: reads and writes
both go to the ROM then; SeaBIOS copies with both bits set.

Source: Intel 82441FX datasheet (290549), PAM[6:0].
"""

from typing import Final

from nonroot._engine import Memory
from nonroot.hvm.memory_map import FIRMWARE_END, PAGE_SIZE, VGA_END

__all__ = ["FIRMWARE_SIZES", "ShadowRam"]

FIRMWARE_SIZES: Final = tuple(128 << 10 + doubling for doubling in range(6))
"""Bytes that a firmware image can have."""
ISA_WINDOW: Final = 128 << 10
"""The image's end is seen below 1 MiB too, so much of it."""
FOUR_GIB: Final = 1 << 32
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
