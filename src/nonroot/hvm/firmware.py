"""A machine that starts in firmware: what SeaBIOS is told by the firmware configuration device and the CMOS memory.

Source: SeaBIOS' documentation (Runtime_config), and its sources for the legacy items.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from nonroot.errors import BadOptionError
from nonroot.hvm.memory_map import MemoryMap
from nonroot.hvm.shadow import FIRMWARE_SIZES

__all__ = ["BOOT_LETTERS", "Firmware", "boot_files", "boot_registers", "firmware_items"]

BOOT_LETTERS: Final = {"a": 1, "c": 2, "d": 3}
"""Floppy, disk, CD: the numbers that the CMOS boot order has for them."""
BOOT_PATHS: Final = {
    "a": ("/pci@i0cf8/isa@1/fdc@03f0/floppy@0",),
    "c": ("/pci@i0cf8/ide@1,1/drive@0/disk@0", "/pci@i0cf8/ide@1,1/drive@0/disk@1"),
    "d": ("/pci@i0cf8/ide@1,1/drive@1/disk@0", "/pci@i0cf8/ide@1,1/drive@1/disk@1"),
}
"""Open Firmware paths by which SeaBIOS knows the drives; disks are on the primary channel, CDs on the secondary."""
CMOS_BOOT_FIRST: Final = 0x3D
CMOS_BOOT_THIRD: Final = 0x38
CMOS_NO_FLOPPY_CHECK: Final = 1

KEY_RAM_SIZE: Final = 0x03
KEY_CPUS: Final = 0x05
KEY_BOOT_MENU: Final = 0x0E
KEY_MAXIMUM_CPUS: Final = 0x0F
KEY_IRQ0_OVERRIDE: Final = 0x8002

E820_RAM: Final = 1
E820_RESERVED: Final = 2


@dataclass(frozen=True, slots=True)
class Firmware:
    """What a machine starts in."""

    image: bytes
    """The ROM, as it lies at the end of the 32-bit addresses; a power of two from 128 KiB to 4 MiB."""
    boot: str = "cd"
    """What to boot from, in order: a floppy, c disk, d CD."""
    boot_menu: bool = False
    """Let the user choose, with a key."""
    boot_menu_wait_ms: int = 0
    """How long that offer stands."""
    serial_console: bool = False
    """Have SeaBIOS show text on the first serial port too (and take its keys)."""
    option_roms: Mapping[str, bytes] = field(default_factory=dict)
    """ROMs by file name, ``pci1234,1111.rom`` for that PCI device or ``vgaroms/NAME``."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Further files."""

    def check(self) -> None:
        """BadOptionError for what cannot be."""
        if len(self.image) not in FIRMWARE_SIZES:
            raise BadOptionError(f"a firmware image of {len(self.image)} bytes cannot be used")
        if not self.boot or any(letter not in BOOT_LETTERS for letter in self.boot):
            raise BadOptionError(f"{self.boot!r} is no boot order: use the letters a (floppy), c (disk) and d (CD)")
        if len(set(self.boot)) != len(self.boot):
            raise BadOptionError(f"the boot order {self.boot!r} names a device twice")


def boot_registers(firmware: Firmware) -> dict[int, int]:
    """The CMOS bytes of the boot order."""
    order = [BOOT_LETTERS[letter] for letter in firmware.boot] + [0, 0, 0]
    return {CMOS_BOOT_FIRST: order[1] << 4 | order[0], CMOS_BOOT_THIRD: order[2] << 4 | CMOS_NO_FLOPPY_CHECK}


def boot_files(firmware: Firmware, memory: MemoryMap) -> dict[str, bytes]:
    """The files that tell SeaBIOS of the memory and of the user's wishes."""
    ram = [(0, memory.low_end)]
    if memory.high_bytes:
        ram.append((1 << 32, memory.high_bytes))
    paths = [path for letter in firmware.boot for path in BOOT_PATHS[letter]]
    files = {
        "etc/e820": b"".join(
            [struct.pack("<QQI", base, length, E820_RAM) for base, length in ram]
            + [struct.pack("<QQI", base, length, E820_RESERVED) for base, length in memory.reserved]
        ),
        "bootorder": "\n".join(paths).encode() + b"\n\0",
        "etc/boot-menu-wait": struct.pack("<Q", firmware.boot_menu_wait_ms),
    }
    if firmware.serial_console:
        files["etc/sercon-port"] = struct.pack("<Q", 0x3F8)
    return files | dict(firmware.option_roms) | dict(firmware.files)


def firmware_items(firmware: Firmware, memory: MemoryMap, processors: int) -> dict[int, bytes]:
    """The items without names."""
    return {
        KEY_RAM_SIZE: struct.pack("<Q", memory.low_end),
        KEY_CPUS: struct.pack("<H", processors),
        KEY_MAXIMUM_CPUS: struct.pack("<H", processors),
        KEY_BOOT_MENU: struct.pack("<H", int(firmware.boot_menu)),
        KEY_IRQ0_OVERRIDE: b"\x01",
    }
