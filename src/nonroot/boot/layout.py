"""Where the parts of a boot lie in guest memory, and a check that they do not collide."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from nonroot.boot.errors import BootError
from nonroot.hvm.memory_map import FIRMWARE_END, PAGE_SIZE, MemoryMap

__all__ = ["Buffer", "Layout", "encode_cmdline"]

Buffer = bytes | memoryview

# Low memory that the loaders use; kernels are loaded elsewhere.
GDT: Final = 0x0500
PVH_START_INFO: Final = 0x6000
PVH_MODULES: Final = 0x6100
PVH_MEMORY_MAP: Final = 0x6200
ZERO_PAGE: Final = 0x7000
PAGE_TABLES: Final = 0x9000
CMDLINE: Final = 0x2_0000
LOADER_END: Final = 0x3_0000
CMDLINE_ROOM: Final = LOADER_END - CMDLINE - 1


@dataclass(slots=True)
class Layout:
    """Guest memory while a boot is being planned. Memory is zero where nothing is put."""

    memory: MemoryMap
    pieces: list[tuple[int, Buffer]] = field(default_factory=list)
    """(guest-physical address, bytes)."""
    _taken: list[tuple[int, int, str]] = field(default_factory=list)

    def put(self, address: int, data: Buffer) -> None:
        """Loader structures in low memory, which are the loader's own."""
        self.pieces.append((address, data))

    def reserve(self, address: int, size: int, what: str) -> None:
        """Claim RAM for ``what``. BootError if it is not RAM, or taken."""
        if not self.memory.usable(address, size):
            room = f"{self.memory.memory_bytes >> 20} MiB of memory"
            raise BootError(f"{what} ({size} bytes at {address:#x}) does not fit into {room}")
        if address < LOADER_END:
            raise BootError(f"{what} wants to be loaded at {address:#x}, which the loader needs itself")
        for start, end, other in self._taken:
            if address < end and start < address + size:
                raise BootError(f"{what} ({size} bytes at {address:#x}) would overlap {other}")
        self._taken.append((address, address + size, what))

    def place_initrd(self, initrd: Buffer, highest: int) -> int:
        """Put the initrd as high as possible with its last byte at most at ``highest``; returns its address."""
        end = min(highest + 1, self.memory.low_end)
        address = (end - len(initrd)) & -PAGE_SIZE
        lowest = max([FIRMWARE_END, *(taken_end for _, taken_end, _ in self._taken if taken_end <= end)])
        if address < lowest:
            raise BootError(
                f"the initrd ({len(initrd)} bytes) does not fit beside the kernel"
                f" into {self.memory.memory_bytes >> 20} MiB of memory"
            )
        self.reserve(address, len(initrd), "the initrd")
        self.pieces.append((address, initrd))
        return address

    def place_anywhere(self, size: int, alignments: Sequence[int], preferred: int, what: str) -> int:
        """Claim RAM from 1 MiB on: at ``preferred`` if it fits, else at the lowest aligned place that does."""
        if preferred >= FIRMWARE_END and self.memory.usable(preferred, size):
            self.reserve(preferred, size, what)
            return preferred
        for alignment in alignments:
            address = -(-FIRMWARE_END // alignment) * alignment
            if self.memory.usable(address, size):
                self.reserve(address, size, what)
                return address
        raise BootError(f"{what} needs {size} bytes, more than {self.memory.memory_bytes >> 20} MiB of memory has")


def encode_cmdline(cmdline: str, longest: int) -> bytes:
    """The command line with its terminator. BootError if it is too long or has a NUL."""
    try:
        encoded = cmdline.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BootError("the kernel's command line is not text") from None
    if b"\0" in encoded:
        raise BootError("the kernel's command line contains a NUL character")
    longest = min(longest, CMDLINE_ROOM)
    if len(encoded) > longest:
        raise BootError(f"the kernel's command line has {len(encoded)} bytes; this kernel takes at most {longest}")
    return encoded + b"\0"
