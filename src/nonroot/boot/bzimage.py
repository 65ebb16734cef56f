"""The bzImage format: the setup header and where kernel and payload lie.

Source: the kernel's Documentation/arch/x86/boot.rst.
"""

import struct
from dataclasses import dataclass
from typing import Final

from nonroot.boot.errors import BootError

__all__ = ["BzImage", "is_bzimage", "parse_bzimage"]

SECTOR: Final = 512
HEADER_START: Final = 0x1F1
BOOT_FLAG: Final = (0x1FE, b"\x55\xaa")
HEADER_MAGIC: Final = (0x202, b"HdrS")
HEADER_LIMIT: Final = 0x290
"""The setup header never reaches beyond this offset of the zero page."""
SMALLEST: Final = 0x250

VERSION_CMDLINE_SIZE: Final = 0x0206
VERSION_PAYLOAD: Final = 0x0208
VERSION_RELOCATABLE: Final = 0x0205
VERSION_INITRD_MAX: Final = 0x0203
VERSION_INIT_SIZE: Final = 0x020A
VERSION_XLOADFLAGS: Final = 0x020C

LOADED_HIGH: Final = 1 << 0
XLF_KERNEL_64: Final = 1 << 0

DEFAULT_LOAD: Final = 0x10_0000
OLD_INITRD_MAX: Final = 0x37FF_FFFF
OLD_CMDLINE_SIZE: Final = 255


@dataclass(frozen=True, slots=True)
class BzImage:
    """A parsed bzImage. Addresses are guest-physical, sizes bytes."""

    header: bytes
    """The setup header as it goes to offset 0x1F1 of the zero page."""
    version: int
    """Boot protocol, for example 0x020F."""
    kernel: memoryview
    """The protected-mode part."""
    payload: memoryview | None
    """The compressed kernel inside it; None before protocol 2.08."""
    relocatable: bool
    alignment: int
    minimum_alignment: int
    preferred_address: int
    init_size: int
    """Memory that the kernel needs from its load address on until it has set itself up."""
    initrd_max: int
    """Highest address of the initrd's last byte."""
    cmdline_max: int
    """Longest command line, without its terminator."""
    entry_64: bool
    """Whether it has the 64-bit entry at load address + 0x200."""


def is_bzimage(image: bytes) -> bool:
    """Whether ``image`` has the marks of a Linux boot image."""
    return all(image[offset : offset + len(mark)] == mark for offset, mark in (BOOT_FLAG, HEADER_MAGIC))


def parse_bzimage(image: bytes) -> BzImage:
    """Read a bzImage. BootError in one sentence if it is none, is truncated or contradicts itself."""
    if not is_bzimage(image):
        raise BootError("the kernel is not a Linux boot image")
    if len(image) < SMALLEST:
        raise BootError("the kernel is a truncated Linux boot image")

    def number(code: str, offset: int) -> int:
        (value,) = struct.unpack_from("<" + code, image, offset)
        assert isinstance(value, int)
        return value

    version = number("H", 0x206)
    if version < 0x0200 or not number("B", 0x211) & LOADED_HIGH:
        raise BootError("the kernel is an old zImage, which is loaded below 1 MiB; only bzImages can be booted")
    start = (number("B", HEADER_START) or 4) * SECTOR + SECTOR
    if len(image) <= start:
        raise BootError("the kernel is a truncated Linux boot image: its protected-mode part is missing")
    kernel = memoryview(image)[start:]
    claimed = number("I", 0x1F4) * 16
    if claimed > len(kernel) + 15:
        raise BootError(
            f"the kernel is truncated: {len(kernel)} of {claimed} bytes of its protected-mode part are there"
        )
    payload = None
    if version >= VERSION_PAYLOAD:
        offset, length = number("I", 0x248), number("I", 0x24C)
        if offset + length > len(kernel):
            raise BootError("the kernel is truncated: its payload lies beyond the end of the file")
        payload = kernel[offset : offset + length] if length else None
    relocatable = version >= VERSION_RELOCATABLE and number("B", 0x234) != 0
    has_size = version >= VERSION_INIT_SIZE and len(image) >= 0x264
    header_end = min(0x202 + number("B", 0x201), HEADER_LIMIT)
    return BzImage(
        header=image[HEADER_START:header_end],
        version=version,
        kernel=kernel,
        payload=payload,
        relocatable=relocatable,
        alignment=number("I", 0x230) if relocatable else 0,
        minimum_alignment=1 << min(number("B", 0x235), 32) if has_size else 0,
        preferred_address=number("Q", 0x258) if has_size else DEFAULT_LOAD,
        init_size=max(number("I", 0x260), len(kernel)) if has_size else 3 * len(kernel),
        initrd_max=number("I", 0x22C) if version >= VERSION_INITRD_MAX else OLD_INITRD_MAX,
        cmdline_max=number("I", 0x238) if version >= VERSION_CMDLINE_SIZE else OLD_CMDLINE_SIZE,
        entry_64=version >= VERSION_XLOADFLAGS and bool(number("H", 0x236) & XLF_KERNEL_64),
    )
