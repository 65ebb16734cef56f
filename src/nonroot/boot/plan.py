"""From a kernel image to everything that starting it needs: the choice of the boot protocol."""

from dataclasses import dataclass
from typing import Final

from nonroot.boot.bzimage import BzImage, is_bzimage, parse_bzimage
from nonroot.boot.elf import ElfImage, is_elf, parse_elf
from nonroot.boot.entry import EntryState
from nonroot.boot.errors import BootError
from nonroot.boot.layout import Buffer, Layout, encode_cmdline
from nonroot.boot.linux import plan_linux32, plan_linux64
from nonroot.boot.multiboot import find_header, plan_multiboot
from nonroot.boot.payload import MAX_KERNEL, UnsupportedPayload, compression_of, decompress
from nonroot.boot.pvh import plan_pvh
from nonroot.hvm.memory_map import MemoryMap

__all__ = ["PROTOCOLS", "BootPlan", "plan_boot"]

PROTOCOLS: Final = ("auto", "pvh", "linux64", "linux32", "multiboot")

ELF_CMDLINE_MAX: Final = 2047
"""Linux' COMMAND_LINE_SIZE on x86; a bzImage says it itself."""
INITRD_MAX: Final = {32: 0x37FF_FFFF, 64: 0xBFFF_FFFF}
"""Where the initrd of an ELF kernel may end: in 32-bit kernels' directly mapped memory."""


@dataclass(frozen=True, slots=True)
class BootPlan:
    """What to write where, and how to enter."""

    protocol: str
    """``pvh``, ``linux64``, ``linux32`` or ``multiboot``."""
    reason: str
    """Why this protocol, in one sentence."""
    pieces: tuple[tuple[int, Buffer], ...]
    """(guest-physical address, bytes); the rest of memory is zero."""
    entry: EntryState


def plan_boot(
    kernel: bytes,
    memory: MemoryMap,
    cmdline: str = "",
    initrd: Buffer | None = None,
    rsdp: int = 0,
    protocol: str = "auto",
    max_kernel: int = MAX_KERNEL,
) -> BootPlan:
    """
    Plan the start of ``kernel`` (a bzImage or an ELF image with a PVH note).

    ``rsdp``: guest-physical address of the ACPI RSDP. ``protocol``: one of :data:`PROTOCOLS`. ``max_kernel``: bytes
    that a compressed kernel may grow to. BootError in one sentence for everything that cannot work.
    """
    if protocol not in PROTOCOLS:
        raise BootError(f"there is no boot protocol {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    if not kernel:
        raise BootError("the kernel is empty")
    if protocol in ("auto", "multiboot") and compression_of(kernel) is not None:
        kernel = _decompress(kernel, max_kernel)
    if protocol == "multiboot":
        return _multiboot(kernel, memory, cmdline, initrd, "it was asked for")
    if is_elf(kernel):
        return _plan_elf(kernel, memory, cmdline, initrd, rsdp, protocol)
    if is_bzimage(kernel):
        image = parse_bzimage(kernel)
        return _plan_bzimage(image, memory, cmdline, initrd, rsdp, protocol, max_kernel)
    if protocol == "auto" and find_header(kernel) is not None:
        return _multiboot(kernel, memory, cmdline, initrd, "the kernel has a Multiboot header")
    if compression_of(kernel) is not None:
        raise BootError("the kernel is a compressed file; decompress it first")
    raise BootError("the kernel is neither a bzImage nor an ELF file, and has no Multiboot header")


def _decompress(kernel: bytes, limit: int) -> bytes:
    """A whole file that was compressed; as it is where that fails, for a message about what it is."""
    try:
        return decompress(memoryview(kernel), limit)
    except BootError:
        return kernel


def _multiboot(kernel: bytes, memory: MemoryMap, cmdline: str, initrd: Buffer | None, reason: str) -> BootPlan:
    layout = Layout(memory)
    encoded = encode_cmdline(cmdline, ELF_CMDLINE_MAX)
    entry = plan_multiboot(layout, kernel, encoded, initrd, INITRD_MAX[64])
    return BootPlan("multiboot", reason, tuple(layout.pieces), entry)


def _plan_elf(
    kernel: bytes, memory: MemoryMap, cmdline: str, initrd: Buffer | None, rsdp: int, protocol: str
) -> BootPlan:
    if protocol not in ("auto", "pvh"):
        raise BootError(f"the kernel is an ELF file, which cannot be booted by {protocol}; give its bzImage")
    elf = parse_elf(kernel)
    if elf.pvh_entry is None:
        if protocol == "auto" and find_header(kernel) is not None:
            return _multiboot(kernel, memory, cmdline, initrd, "the ELF image has a Multiboot header")
        raise BootError("the kernel is an ELF file without a PVH entry; give its bzImage")
    return _pvh(
        elf, memory, encode_cmdline(cmdline, ELF_CMDLINE_MAX), initrd, rsdp, None, "the ELF image has a PVH entry"
    )


def _pvh(
    elf: ElfImage,
    memory: MemoryMap,
    cmdline: bytes,
    initrd: Buffer | None,
    rsdp: int,
    initrd_max: int | None,
    reason: str,
) -> BootPlan:
    layout = Layout(memory)
    highest = INITRD_MAX[elf.bits] if initrd_max is None else initrd_max
    entry = plan_pvh(layout, elf, cmdline, initrd, highest, rsdp)
    return BootPlan("pvh", reason, tuple(layout.pieces), entry)


def _plan_bzimage(
    image: BzImage,
    memory: MemoryMap,
    cmdline: str,
    initrd: Buffer | None,
    rsdp: int,
    protocol: str,
    max_kernel: int,
) -> BootPlan:
    encoded = encode_cmdline(cmdline, image.cmdline_max)
    reason = "it was asked for"
    if protocol in ("auto", "pvh"):
        elf, reason = _payload_elf(image, protocol == "auto", max_kernel)
        if elf is not None:
            return _pvh(elf, memory, encoded, initrd, rsdp, image.initrd_max, reason)
        protocol = "linux64" if image.entry_64 else "linux32"
    layout = Layout(memory)
    plan = plan_linux64 if protocol == "linux64" else plan_linux32
    entry = plan(layout, image, encoded, initrd, rsdp)
    return BootPlan(protocol, reason, tuple(layout.pieces), entry)


def _payload_elf(image: BzImage, fall_back: bool, max_kernel: int) -> tuple[ElfImage | None, str]:
    """The kernel inside a bzImage if it can be entered by PVH, and the reason for the choice."""
    try:
        if image.payload is None:
            raise UnsupportedPayload("the kernel is too old to say where its payload is")
        unpacked = decompress(image.payload, max_kernel)
    except UnsupportedPayload as error:
        if not fall_back:
            raise
        return None, str(error)
    if not is_elf(unpacked):
        if not fall_back:
            raise BootError("the kernel's payload is not an ELF file")
        return None, "the kernel's payload is not an ELF file"
    elf = parse_elf(unpacked, "the kernel's payload")
    if elf.pvh_entry is None:
        if not fall_back:
            raise BootError("the kernel's payload has no PVH entry")
        return None, "the kernel has no PVH entry"
    return elf, "the kernel has a PVH entry and was decompressed on the host"
