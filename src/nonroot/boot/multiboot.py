"""The Multiboot protocol, version 1: Xen, GRUB's own programs and hobby kernels, entered in flat 32-bit mode.

An ELF image is loaded by its program headers, any other by the addresses in its Multiboot header.
Source: the Multiboot specification 0.6.96.
"""

import struct
from dataclasses import dataclass
from typing import Final

from nonroot.boot import layout as places
from nonroot.boot.elf import is_elf, parse_elf
from nonroot.boot.entry import EntryState
from nonroot.boot.errors import BootError
from nonroot.boot.layout import Buffer, Layout
from nonroot.hvm.memory_map import EBDA_START, FIRMWARE_END

__all__ = ["find_header", "plan_multiboot"]

SEARCH: Final = 8192
HEADER_MAGIC: Final = 0x1BAD_B002
ENTRY_MAGIC: Final = 0x2BAD_B002

FLAG_MODULES_ALIGNED: Final = 1 << 0
FLAG_MEMORY: Final = 1 << 1
FLAG_VIDEO: Final = 1 << 2
FLAG_ADDRESSES: Final = 1 << 16
FLAGS_REQUIRED_KNOWN: Final = FLAG_MODULES_ALIGNED | FLAG_MEMORY | FLAG_VIDEO

INFO_MEMORY: Final = 1 << 0
INFO_CMDLINE: Final = 1 << 2
INFO_MODULES: Final = 1 << 3
INFO_MEMORY_MAP: Final = 1 << 6
INFO_LOADER: Final = 1 << 9
INFO_SIZE: Final = 116
BDA_EBDA: Final = 0x40E
BDA_MEMORY: Final = 0x413

# All below the kernel, beside what other protocols put there.
INFO: Final = places.PVH_START_INFO
MODULES: Final = INFO + 0x80
LOADER_NAME: Final = INFO + 0xC0
MEMORY_MAP: Final = places.PVH_MEMORY_MAP
NAME: Final = b"nonroot\0"
IMAGE_NAME: Final = b"kernel "
GDT: Final = places.GDT
CODE_SELECTOR: Final = 0x08
DATA_SELECTOR: Final = 0x10
FLAT_GDT: Final = struct.pack("<3Q", 0, 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)


@dataclass(frozen=True, slots=True)
class Header:
    """A Multiboot header and where it lies in the file."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int] | None
    """header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr, if the image gives them."""


def find_header(image: Buffer) -> Header | None:
    """The image's Multiboot header; None if it has none in its first 8 KiB."""
    data = bytes(image[: SEARCH + 32])
    for offset in range(0, min(len(data) - 11, SEARCH), 4):
        magic, flags, checksum = struct.unpack_from("<III", data, offset)
        if magic == HEADER_MAGIC and magic + flags + checksum & 0xFFFF_FFFF == 0:
            addresses = None
            if flags & FLAG_ADDRESSES:
                if offset + 32 > len(data):
                    raise BootError("the kernel's Multiboot header is truncated")
                addresses = struct.unpack_from("<5I", data, offset + 12)
            return Header(offset, flags, addresses)
    return None


def plan_multiboot(layout: Layout, image: bytes, cmdline: bytes, initrd: Buffer | None, highest: int) -> EntryState:
    """
    Put the kernel, its modules (``initrd`` is the first) and the information structure into ``layout``.

    BootError if the image has no header, asks for what we do not know, or does not fit.
    """
    header = find_header(image)
    if header is None:
        raise BootError("the kernel has no Multiboot header")
    if header.flags & 0xFFFF & ~FLAGS_REQUIRED_KNOWN:
        raise BootError(f"the kernel's Multiboot header asks for features that are not known ({header.flags:#x})")
    entry = _load(layout, image, header)
    flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER
    modules = 0
    if initrd:
        address = layout.place_initrd(initrd, highest)
        layout.put(MODULES, struct.pack("<4I", address, address + len(initrd), 0, 0))
        flags |= INFO_MODULES
        modules = 1
    # By custom the line begins with the image's name, which Xen and others strip.
    layout.put(places.CMDLINE, IMAGE_NAME + cmdline)
    layout.put(LOADER_NAME, NAME)
    memory_map = b"".join(struct.pack("<IQQI", 20, e.base, e.length, e.type) for e in layout.memory.e820())
    layout.put(MEMORY_MAP, memory_map)
    info = bytearray(INFO_SIZE)
    struct.pack_into("<III", info, 0, flags, EBDA_START >> 10, (layout.memory.low_end - FIRMWARE_END) >> 10)
    struct.pack_into("<III", info, 16, places.CMDLINE, modules, MODULES if modules else 0)
    struct.pack_into("<II", info, 44, len(memory_map), MEMORY_MAP)
    struct.pack_into("<I", info, 64, LOADER_NAME)
    layout.put(INFO, bytes(info))
    # Xen looks into the BIOS data area for the end of low memory.
    layout.put(BDA_EBDA, struct.pack("<H", EBDA_START >> 4))
    layout.put(BDA_MEMORY, struct.pack("<H", EBDA_START >> 10))
    layout.put(GDT, FLAT_GDT)
    return EntryState(
        rip=entry,
        registers={"rax": ENTRY_MAGIC, "rbx": INFO},
        gdt=(GDT, len(FLAT_GDT) - 1),
        code_selector=CODE_SELECTOR,
        data_selector=DATA_SELECTOR,
    )


def _load(layout: Layout, image: bytes, header: Header) -> int:
    """The kernel's parts; returns its entry point."""
    if header.addresses is not None:
        return _load_flat(layout, image, header.offset, header.addresses)
    if not is_elf(image):
        raise BootError("the kernel has a Multiboot header, but is no ELF file and does not say where it belongs")
    kernel = parse_elf(image)
    if kernel.bits != 32:
        raise BootError("the kernel is a 64-bit ELF file, which Multiboot cannot enter")
    entry = int.from_bytes(image[24:28], "little")
    if not kernel.start <= entry < kernel.end:
        raise BootError(f"the kernel's entry {entry:#x} lies outside the kernel")
    for segment in kernel.segments:
        layout.reserve(segment.address, segment.size, "the kernel")
        layout.pieces.append((segment.address, segment.data))
    return entry


def _load_flat(layout: Layout, image: bytes, offset: int, addresses: tuple[int, int, int, int, int]) -> int:
    header_at, load, load_end, bss_end, entry = addresses
    start = offset - (header_at - load)
    if load > header_at or start < 0:
        raise BootError("the kernel's Multiboot header contradicts itself: its load address")
    length = load_end - load if load_end else len(image) - start
    if length <= 0 or start + length > len(image):
        raise BootError("the kernel's Multiboot header contradicts itself: the end of its data")
    size = max(length, bss_end - load)
    if not load <= entry < load + size:
        raise BootError(f"the kernel's entry {entry:#x} lies outside the kernel")
    layout.reserve(load, size, "the kernel")
    layout.pieces.append((load, image[start : start + length]))
    return entry
