"""The VGA's window at 0xA0000: where it is memory as it is, and the planes' logic where it is not."""

from dataclasses import dataclass
from typing import Final, Self

from nonroot.devices.pci_device import DeviceRam
from nonroot.devices.vga_state import SHADOW, SHADOW_SIZE, VRAM_SIZE

__all__ = ["PlaneAccess", "Target"]

WINDOW_BASE: Final = 0xA_0000
PATIENCE: Final = 4
"""Accesses as exits before the window is mapped."""
PLANES: Final = tuple(sum(0xFF << 8 * plane for plane in range(4) if mask >> plane & 1) for mask in range(16))
"""Four bits, one a plane, as a mask of a doubleword."""
SPREAD: Final = 0x0101_0101
"""Times a byte: that byte in each plane."""


@dataclass(frozen=True, slots=True)
class Target:
    """The window as memory: ``length`` bytes at ``base`` are video memory from ``offset`` on."""

    base: int
    length: int
    offset: int
    is_text: bool = False

    @classmethod
    def linear(cls, offset: int, length: int) -> Self:
        """Memory as it is, at 0xA0000."""
        return cls(WINDOW_BASE, length, offset)

    @classmethod
    def text(cls, place: int) -> Self:
        """Characters and attributes in turns, ``place`` bytes into the window."""
        return cls(WINDOW_BASE + place, SHADOW_SIZE, SHADOW, True)

    @classmethod
    def nothing(cls) -> Self:
        """A bank beyond the memory: loads float, stores are lost."""
        return cls(WINDOW_BASE, 0, 0)


class PlaneAccess:
    """Video memory through the legacy window."""

    def __init__(self, ram: DeviceRam) -> None:
        self._ram = ram
        self._bytes = ram.view
        self._dwords = ram.view[:VRAM_SIZE].cast("I")
        self._sequencer = bytes(5)
        self._graphics = bytes(9)
        self._target: Target | None = None
        self._bank = 0
        self._mapped: Target | None = None
        self._hidden = False
        self._patience = PATIENCE
        self.latch = 0
        """The four planes' bytes of the last load."""
        self.shadow = False
        """Whether the text window's contents are in its own memory."""
        self._low = MEMORY_END
        self._high = 0
        self._derive()

    # ── for the device ──

    def configure(self, sequencer: bytes, graphics: bytes, target: Target | None, bank: int) -> None:
        """Registers that say what the window means have changed."""
        self._sequencer, self._graphics, self._bank = sequencer, graphics, bank
        self._derive()
        if target == self._target:
            return
        before, self._target = self._target, target
        self._patience = PATIENCE
        if self._mapped is not None or self.shadow:
            self._unmap()
            # Another bank of the same kind: it will be used at once.
            if before is not None and target is not None and not before.is_text and not target.is_text:
                self._map()

    def restore(self, latch: int, shadow: bool) -> None:
        """From a record: ``shadow`` says where the text window's contents are; nothing is mapped."""
        if self._mapped is not None:
            self._ram.hide(self._mapped.base, self._mapped.length)
            self._mapped = None
        self.latch, self.shadow = latch, shadow
        # A record made in a text mode has that mode's registers; one that does not is corrected by configure().
        self._target = Target.text(0x1_8000) if shadow else None
        self.touch(0, MEMORY_END)

    def hide(self, hidden: bool) -> None:
        """Something else is decoded in the window, or no more."""
        self._hidden = hidden
        if hidden:
            self.settle()

    def settle(self) -> None:
        """Take the window away; everything is in the planes then."""
        self._unmap()
        self._patience = PATIENCE

    def clear(self, length: int) -> None:
        """Zero the first bytes."""
        self._bytes[:length] = bytes(length)
        self.touch(0, length)

    def touch(self, low: int, high: int) -> None:
        """Bytes of video memory have been changed, and not by the guest's own stores."""
        self._low, self._high = min(self._low, low), max(self._high, high)

    def take_damage(self) -> list[tuple[int, int]]:
        """Ranges (offset, length) of video memory that may have changed since the last call."""
        ranges = []
        if self._low < self._high:
            ranges.append((self._low, self._high - self._low))
            self._low, self._high = MEMORY_END, 0
        first = last = -2
        for page in sorted(self._ram.take_dirty()):
            if page != last + 1:
                if first >= 0:
                    ranges.append((first << 12, last + 1 - first << 12))
                first = page
            last = page
        if first >= 0:
            ranges.append((first << 12, last + 1 - first << 12))
        return ranges

    # ── mapping ──

    def _map(self) -> None:
        target = self._target
        if target is None or self._hidden or not target.length:
            return
        if target.is_text and not self.shadow:
            memory = self._bytes
            shadow = memory[SHADOW : SHADOW + SHADOW_SIZE]
            shadow[0::2] = memory[0 : 2 * SHADOW_SIZE : 4]
            shadow[1::2] = memory[1 : 2 * SHADOW_SIZE : 4]
            self.shadow = True
        self._ram.show(target.base, target.offset, target.length)
        self._mapped = target

    def _unmap(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            for page in self._ram.take_dirty():
                self.touch(page << 12, page + 1 << 12)
            self._ram.hide(mapped.base, mapped.length)
        if self.shadow:
            memory = self._bytes
            shadow = memory[SHADOW : SHADOW + SHADOW_SIZE]
            memory[0 : 2 * SHADOW_SIZE : 4] = shadow[0::2]
            memory[1 : 2 * SHADOW_SIZE : 4] = shadow[1::2]
            self.shadow = False
            self.touch(0, 2 * SHADOW_SIZE)

    def _derive(self) -> None:
        """What the accesses look at."""
        sequencer, graphics = self._sequencer, self._graphics
        self._chained = bool(sequencer[4] & 8)
        self._odd_even = not self._chained and bool(graphics[5] & 0x10)
        self._plane_mask = sequencer[2] & 0xF
        self._write_planes = PLANES[sequencer[2] & 0xF]
        self._kept_planes = 0xFFFF_FFFF ^ self._write_planes
        self._write_mode = graphics[5] & 3
        self._compares = bool(graphics[5] & 8)
        self._read_plane = graphics[4] & 3
        self._rotate = graphics[3] & 7
        self._function = graphics[3] >> 3 & 3
        self._bits = graphics[8] * SPREAD
        self._other_bits = 0xFFFF_FFFF ^ self._bits
        self._set_mask = PLANES[graphics[1] & 0xF]
        self._set_value = PLANES[graphics[0] & 0xF]
        self._place = graphics[6] >> 2 & 3

    def _address(self, offset: int) -> int:
        """Address in the planes (or the bank) of a window offset; -1 outside of what is decoded."""
        place = self._place
        if place == 1:
            return offset + self._bank if offset < 0x1_0000 else -1
        if place == 0:
            return offset + self._bank
        offset -= 0x1_0000 if place == 2 else 0x1_8000
        return offset if 0 <= offset < 0x8000 else -1

    # ── accesses ──

    def read(self, offset: int, size: int) -> int:
        """A load of ``size`` bytes, low address first."""
        self._consider()
        value = 0
        for index in range(size):
            value |= self._read(offset + index) << 8 * index
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of ``size`` bytes, low address first."""
        self._consider()
        for index in range(size):
            self._write(offset + index, value >> 8 * index & 0xFF)

    def _consider(self) -> None:
        """Map the window once it is used for a while; accesses that are on their way already go on as exits."""
        if self._target is None or self._mapped is not None or self._hidden:
            return
        self._patience -= 1
        if self._patience <= 0:
            self._patience = PATIENCE
            self._map()

    def _plain(self, offset: int) -> int:
        """Byte of video memory if the window is memory as it is there; -1 if the planes' logic is to be asked."""
        target = self._target
        if target is None or (target.is_text and not self.shadow):
            return -1
        place = WINDOW_BASE + offset - target.base
        return target.offset + place if 0 <= place < target.length else -2

    def _read(self, offset: int) -> int:
        plain = self._plain(offset)
        if plain != -1:
            return self._bytes[plain] if plain >= 0 else 0xFF
        address = self._address(offset)
        if address < 0:
            return 0xFF
        if self._chained:
            place = address
            index = address >> 2
        elif self._odd_even:
            index = address >> 1
            place = (index << 2) | (self._read_plane & 2) | (address & 1)
        else:
            index = address
            place = (index << 2) | self._read_plane
        if place >= VRAM_SIZE:
            return 0xFF
        self.latch = latch = self._dwords[index]
        if not self._compares or self._chained or self._odd_even:
            return self._bytes[place]
        graphics = self._graphics
        different = (latch ^ PLANES[graphics[2] & 0xF]) & PLANES[graphics[7] & 0xF]
        different |= different >> 16
        different |= different >> 8
        return ~different & 0xFF

    def _write(self, offset: int, value: int) -> None:
        plain = self._plain(offset)
        if plain != -1:
            if plain >= 0:
                self._bytes[plain] = value
                self._touched(plain)
            return
        address = self._address(offset)
        if address < 0:
            return
        if self._chained or self._odd_even:
            if self._chained:
                plane, place = address & 3, address
            else:
                # Even addresses go to planes 0 and 2, odd ones to 1 and 3.
                plane = address & 1
                place = (address >> 1 << 2) | plane
                if self._plane_mask >> 2 + plane & 1 and place + 2 < VRAM_SIZE:
                    self._bytes[place + 2] = value
                    self._touched(place + 2)
            if self._plane_mask >> plane & 1 and place < VRAM_SIZE:
                self._bytes[place] = value
                self._touched(place)
            return
        if address >= VRAM_SIZE >> 2:
            return
        self._dwords[address] = self._dwords[address] & self._kept_planes | self._logic(value) & self._write_planes
        self._touched(address << 2)

    def _logic(self, value: int) -> int:
        """What the graphics controller makes of a byte: a byte for each plane."""
        mode = self._write_mode
        latch = self.latch
        if mode == 1:
            return latch
        bits, others = self._bits, self._other_bits
        if mode == 2:
            value = PLANES[value & 0xF]
        else:
            rotate = self._rotate
            if rotate:
                value = (value >> rotate | value << 8 - rotate) & 0xFF
            if mode == 3:
                bits &= value * SPREAD
                others = 0xFFFF_FFFF ^ bits
                value = self._set_value
            else:
                set_mask = self._set_mask
                value = value * SPREAD & ~set_mask | self._set_value & set_mask
        function = self._function
        if function == 1:
            value &= latch
        elif function == 2:
            value |= latch
        elif function == 3:
            value ^= latch
        return value & bits | latch & others

    def _touched(self, place: int) -> None:
        if place < self._low:
            self._low = place
        if place >= self._high:
            self._high = place + 1


MEMORY_END: Final = SHADOW + SHADOW_SIZE
