"""Small guests in machine code, started through PVH in flat 32-bit mode."""

import struct

from tests.boot.images import elf

BASE = 0x10_0000


def pvh(code: bytes, data: bytes = b"") -> bytes:
    """An ELF that runs ``code`` at 1 MiB; ``data`` lies one page further."""
    body = code.ljust(0x1000, b"\xf4") + data
    return elf([(BASE, body, max(len(body), 0x3000))], entry=BASE)


DATA = BASE + 0x1000


def mov_edx(value: int) -> bytes:
    return b"\xba" + struct.pack("<I", value)


def mov_eax(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value)


def out8(port: int, value: int) -> bytes:
    return mov_edx(port) + b"\xb0" + bytes([value]) + b"\xee"


def out16(port: int, value: int) -> bytes:
    return mov_edx(port) + mov_eax(value) + b"\x66\xef"


def out32(port: int, value: int) -> bytes:
    return mov_edx(port) + mov_eax(value) + b"\xef"


def load32(address: int) -> bytes:
    return b"\xa1" + struct.pack("<I", address)


def store32(address: int, value: int) -> bytes:
    return b"\xc7\x05" + struct.pack("<II", address, value)


def say(text: bytes) -> bytes:
    return b"".join(out8(0x3F8, byte) for byte in text)


POWER_OFF = out16(0x604, 5 << 10 | 1 << 13)
SPIN = b"\xeb\xfe"
HALT = b"\xf4\xeb\xfd"
TRIPLE_FAULT = b"\x0f\x01\x1d" + struct.pack("<I", DATA) + b"\xcc"
"""LIDT of an empty table (the data page is zero), then INT3."""
