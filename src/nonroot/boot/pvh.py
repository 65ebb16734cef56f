"""The PVH boot protocol: an ELF kernel entered in 32-bit protected mode with a start-info structure.

Source: Xen's docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h.
"""

import struct
from typing import Final

from nonroot.boot import layout as places
from nonroot.boot.elf import ElfImage
from nonroot.boot.entry import EntryState
from nonroot.boot.errors import BootError
from nonroot.boot.layout import Layout
from nonroot.hvm.memory_map import FIRMWARE_END

__all__ = ["plan_pvh"]

START_INFO_MAGIC: Final = 0x336E_C578
START_INFO_VERSION: Final = 1
ENTRY_LIMIT: Final = 1 << 32


def plan_pvh(
    layout: Layout, kernel: ElfImage, cmdline: bytes, initrd: bytes | memoryview | None, initrd_max: int, rsdp: int
) -> EntryState:
    """Put kernel, initrd, command line and start info into ``layout``. BootError if something does not fit."""
    if kernel.pvh_entry is None:
        raise BootError("the kernel has no PVH entry")
    shift = _shift(layout, kernel)
    entry = kernel.pvh_entry + shift
    if not kernel.start + shift <= entry < min(kernel.end + shift, ENTRY_LIMIT):
        raise BootError(f"the kernel's PVH entry {entry:#x} lies outside the kernel")
    for segment in kernel.segments:
        layout.reserve(segment.address + shift, segment.size, "the kernel")
        layout.pieces.append((segment.address + shift, segment.data))
    modules = b""
    if initrd:
        address = layout.place_initrd(initrd, initrd_max)
        modules = struct.pack("<QQQQ", address, len(initrd), 0, 0)
        layout.put(places.PVH_MODULES, modules)
    layout.put(places.CMDLINE, cmdline)
    entries = layout.memory.e820()
    layout.put(places.PVH_MEMORY_MAP, b"".join(struct.pack("<QQII", e.base, e.length, e.type, 0) for e in entries))
    start_info = struct.pack(
        "<IIIIQQQQII",
        START_INFO_MAGIC,
        START_INFO_VERSION,
        0,
        1 if modules else 0,
        places.PVH_MODULES if modules else 0,
        places.CMDLINE,
        rsdp,
        places.PVH_MEMORY_MAP,
        len(entries),
        0,
    )
    layout.put(places.PVH_START_INFO, start_info)
    return EntryState(rip=entry, registers={"rbx": places.PVH_START_INFO})


def _shift(layout: Layout, kernel: ElfImage) -> int:
    """How far the kernel is moved from its own addresses: not at all if it fits there."""
    size = kernel.end - kernel.start
    relocation = kernel.relocation
    if relocation is None or layout.memory.usable(kernel.start, size):
        return 0
    alignment = max(relocation.alignment, 1)
    lowest = max(relocation.lowest, FIRMWARE_END)
    address = -(-lowest // alignment) * alignment
    if address + size - 1 > relocation.highest or not layout.memory.usable(address, size):
        return 0
    return address - kernel.start
