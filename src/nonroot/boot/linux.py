"""The Linux boot protocol in its 32-bit and 64-bit forms: a bzImage that decompresses itself in the guest.

Source: the kernel's Documentation/arch/x86/boot.rst and zero-page.rst.
"""

import struct
from typing import Final

from nonroot.boot import layout as places
from nonroot.boot.bzimage import DEFAULT_LOAD, HEADER_START, BzImage
from nonroot.boot.entry import EntryState
from nonroot.boot.errors import BootError
from nonroot.boot.layout import Layout

__all__ = ["plan_linux32", "plan_linux64"]

ZERO_PAGE_SIZE: Final = 4096

# Offsets in the zero page
ACPI_RSDP: Final = 0x070
E820_ENTRIES: Final = 0x1E8
VIDEO_MODE: Final = 0x1FA
TYPE_OF_LOADER: Final = 0x210
CODE32_START: Final = 0x214
RAMDISK_IMAGE: Final = 0x218
RAMDISK_SIZE: Final = 0x21C
CMD_LINE_PTR: Final = 0x228
E820_TABLE: Final = 0x2D0

LOADER_UNKNOWN: Final = 0xFF
VIDEO_NORMAL: Final = 0xFFFF

BOOT_CS: Final = 0x10
BOOT_DS: Final = 0x18
GDT_CODE_32: Final = 0x00CF_9B00_0000_FFFF
GDT_CODE_64: Final = 0x00AF_9B00_0000_FFFF
GDT_DATA: Final = 0x00CF_9300_0000_FFFF

ENTRY_64: Final = 0x200
PAGE_PRESENT_WRITABLE: Final = 0b11
PAGE_LARGE: Final = 1 << 7
IDENTITY_GIB: Final = 4


def plan_linux64(
    layout: Layout, image: BzImage, cmdline: bytes, initrd: bytes | memoryview | None, rsdp: int
) -> EntryState:
    """64-bit entry with 4 GiB mapped one to one. BootError if the kernel has none, or something does not fit."""
    if not image.entry_64:
        raise BootError("the kernel has no 64-bit entry")
    load = _place(layout, image, cmdline, initrd, rsdp)
    tables = places.PAGE_TABLES
    layout.put(tables, _identity_map(tables))
    return _entry(layout, load + ENTRY_64, GDT_CODE_64, long_mode=True, cr3=tables)


def plan_linux32(
    layout: Layout, image: BzImage, cmdline: bytes, initrd: bytes | memoryview | None, rsdp: int
) -> EntryState:
    """32-bit entry without paging. BootError if something does not fit."""
    load = _place(layout, image, cmdline, initrd, rsdp)
    return _entry(layout, load, GDT_CODE_32, long_mode=False, cr3=0)


def _entry(layout: Layout, rip: int, code: int, long_mode: bool, cr3: int) -> EntryState:
    gdt = struct.pack("<4Q", 0, 0, code, GDT_DATA)
    layout.put(places.GDT, gdt)
    return EntryState(
        rip=rip,
        registers={"rsi": places.ZERO_PAGE},
        long_mode=long_mode,
        cr3=cr3,
        gdt=(places.GDT, len(gdt) - 1),
        code_selector=BOOT_CS,
        data_selector=BOOT_DS,
    )


def _place(layout: Layout, image: BzImage, cmdline: bytes, initrd: bytes | memoryview | None, rsdp: int) -> int:
    """Everything that both forms share; returns the kernel's load address."""
    if image.relocatable:
        wanted = [a for a in (image.alignment, image.minimum_alignment) if a]
        load = layout.place_anywhere(image.init_size, wanted or [1 << 20], image.preferred_address, "the kernel")
    else:
        load = DEFAULT_LOAD
        layout.reserve(load, image.init_size, "the kernel")
    layout.pieces.append((load, image.kernel))
    page = bytearray(ZERO_PAGE_SIZE)
    page[HEADER_START : HEADER_START + len(image.header)] = image.header

    def put(code: str, offset: int, value: int) -> None:
        struct.pack_into("<" + code, page, offset, value)

    put("H", VIDEO_MODE, VIDEO_NORMAL)
    put("B", TYPE_OF_LOADER, LOADER_UNKNOWN)
    put("I", CODE32_START, load)
    put("I", CMD_LINE_PTR, places.CMDLINE)
    put("I", RAMDISK_IMAGE, 0)
    put("I", RAMDISK_SIZE, 0)
    put("Q", ACPI_RSDP, rsdp)
    if initrd:
        put("I", RAMDISK_IMAGE, layout.place_initrd(initrd, image.initrd_max))
        put("I", RAMDISK_SIZE, len(initrd))
    entries = layout.memory.e820()
    put("B", E820_ENTRIES, len(entries))
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, entry.base, entry.length, entry.type)
    layout.put(places.ZERO_PAGE, bytes(page))
    layout.put(places.CMDLINE, cmdline)
    return load


def _identity_map(base: int) -> bytes:
    """Page tables for the first 4 GiB in 2 MiB pages: one PML4, one PDPT, four page directories."""
    page = 4096
    pml4 = struct.pack("<Q", base + page | PAGE_PRESENT_WRITABLE).ljust(page, b"\0")
    directories = [base + (2 + gib) * page | PAGE_PRESENT_WRITABLE for gib in range(IDENTITY_GIB)]
    pdpt = struct.pack(f"<{IDENTITY_GIB}Q", *directories).ljust(page, b"\0")
    count = 512 * IDENTITY_GIB
    entries = struct.pack(f"<{count}Q", *(n << 21 | PAGE_LARGE | PAGE_PRESENT_WRITABLE for n in range(count)))
    return pml4 + pdpt + entries
