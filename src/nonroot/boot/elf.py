"""Kernels as ELF images: loadable segments and the notes that say how to enter them.

Source: System V ABI; Xen's public/elfnote.h for the notes.
"""

import io
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from nonroot.boot.errors import BootError

__all__ = ["ElfImage", "ElfSegment", "Relocation", "is_elf", "parse_elf"]

MAGIC: Final = b"\x7fELF"
MACHINES: Final = {"EM_386": 32, "EM_X86_64": 64}
TYPES: Final = ("ET_EXEC", "ET_DYN")
MAX_SEGMENTS: Final = 128
MAX_NOTE_BYTES: Final = 64 * 1024
MAX_ADDRESS: Final = 1 << 40

XEN: Final = "Xen"
XEN_ELFNOTE_PHYS32_ENTRY: Final = 18
XEN_ELFNOTE_PHYS32_RELOC: Final = 19


@dataclass(frozen=True, slots=True)
class ElfSegment:
    """A part to load: ``data`` at ``address``, zeros up to ``size`` bytes."""

    address: int
    data: memoryview
    size: int


@dataclass(frozen=True, slots=True)
class Relocation:
    """Where a PVH kernel may be moved to: multiples of ``alignment`` within ``lowest`` … ``highest`` (last byte)."""

    alignment: int
    lowest: int
    highest: int


@dataclass(frozen=True, slots=True)
class ElfImage:
    """An x86 kernel in ELF form."""

    bits: int
    """32 or 64."""
    segments: tuple[ElfSegment, ...]
    """Sorted by physical address, without overlap."""
    pvh_entry: int | None
    """Physical address of the 32-bit PVH entry, if there is one."""
    relocation: Relocation | None

    @property
    def start(self) -> int:
        """Lowest physical address."""
        return self.segments[0].address

    @property
    def end(self) -> int:
        """Address after the last byte, zero-filled parts included."""
        return self.segments[-1].address + self.segments[-1].size


def is_elf(image: bytes | memoryview) -> bool:
    """Whether ``image`` starts like an ELF file."""
    return bytes(image[:4]) == MAGIC


def parse_elf(image: bytes, what: str = "the kernel") -> ElfImage:
    """Read an ELF kernel. BootError in one sentence if it is none, is truncated or contradicts itself."""
    if not is_elf(image):
        raise BootError(f"{what} is not an ELF file")
    _check_header(image, what)
    try:
        from elftools.elf.elffile import ELFFile

        elf = ELFFile(io.BytesIO(image))
        kind, machine = elf["e_type"], elf["e_machine"]
        headers = [(segment, segment.header) for segment in elf.iter_segments()]
        notes = [s for s, h in headers if h["p_type"] == "PT_NOTE" and _note_fits(h, image, what)]
        entry, relocation = _read_notes(notes)
    except BootError:
        raise
    except Exception as error:
        # The parser was written for well-formed files: whatever it stumbles over, the file is at fault.
        raise BootError(f"{what} is a damaged ELF file ({type(error).__name__})") from None
    if machine not in MACHINES or kind not in TYPES:
        raise BootError(f"{what} is an ELF file, but not an x86 kernel ({kind}, {machine})")
    segments = _segments(image, [h for _, h in headers if h["p_type"] == "PT_LOAD"], what)
    return ElfImage(MACHINES[machine], segments, entry, relocation)


def _check_header(image: bytes, what: str) -> None:
    """Bounds that keep the parser's work small."""
    if len(image) < 64:
        raise BootError(f"{what} is a truncated ELF file")
    if image[5] != 1 or image[4] not in (1, 2):
        raise BootError(f"{what} is an ELF file, but not a little-endian one")
    if image[4] == 2:
        (offset,), (entry_size, count) = struct.unpack_from("<Q", image, 32), struct.unpack_from("<HH", image, 54)
    else:
        (offset,), (entry_size, count) = struct.unpack_from("<I", image, 28), struct.unpack_from("<HH", image, 42)
    if entry_size != (56 if image[4] == 2 else 32) or not 1 <= count <= MAX_SEGMENTS:
        raise BootError(f"{what} is an ELF file without usable program headers")
    if offset + entry_size * count > len(image):
        raise BootError(f"{what} is a truncated ELF file")


def _note_fits(header: Any, image: bytes, what: str) -> bool:
    if header["p_filesz"] > MAX_NOTE_BYTES:
        raise BootError(f"{what} has {header['p_filesz']} bytes of ELF notes, more than {MAX_NOTE_BYTES}")
    if header["p_offset"] + header["p_filesz"] > len(image):
        raise BootError(f"{what} is truncated: its ELF notes lie beyond the end of the file")
    return bool(header["p_filesz"])


def _read_notes(segments: Iterable[Any]) -> tuple[int | None, Relocation | None]:
    entry: int | None = None
    relocation: Relocation | None = None
    for segment in segments:
        for note in segment.iter_notes():
            if note["n_name"] != XEN:
                continue
            data = bytes(note["n_descdata"])
            if note["n_type"] == XEN_ELFNOTE_PHYS32_ENTRY and len(data) in (4, 8):
                entry = int.from_bytes(data, "little")
            elif note["n_type"] == XEN_ELFNOTE_PHYS32_RELOC and len(data) <= 12:
                values = struct.unpack(f"<{len(data) // 4}I", data[: len(data) // 4 * 4])
                defaults = (0, 0, 0xFFFF_FFFF)
                relocation = Relocation(*values, *defaults[len(values) :])
    return entry, relocation


def _segments(image: bytes, headers: list[Any], what: str) -> tuple[ElfSegment, ...]:
    view = memoryview(image)
    segments = []
    for header in headers:
        offset, stored, size = header["p_offset"], header["p_filesz"], header["p_memsz"]
        if size == 0:
            continue
        if stored > size:
            raise BootError(f"{what} has an ELF segment that is larger in the file than in memory")
        if offset + stored > len(image):
            raise BootError(f"{what} is truncated: an ELF segment lies beyond the end of the file")
        if header["p_paddr"] + size > MAX_ADDRESS:
            raise BootError(f"{what} wants to be loaded at {header['p_paddr']:#x}, beyond any memory")
        segments.append(ElfSegment(header["p_paddr"], view[offset : offset + stored], size))
    if not segments:
        raise BootError(f"{what} is an ELF file with nothing to load")
    segments.sort(key=lambda segment: segment.address)
    for before, after in pairwise(segments):
        if before.address + before.size > after.address:
            raise BootError(f"{what} has ELF segments that overlap at {after.address:#x}")
    return tuple(segments)
