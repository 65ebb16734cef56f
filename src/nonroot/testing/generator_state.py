"""Starting states of generated cases: values worth trying, vector registers, data pages."""

import struct
from random import Random

from nonroot.testing.differential_case import DATA_BYTES, LANDING, XSAVE_BYTES

MASK64 = (1 << 64) - 1

_EDGES = [0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 63, 64]
for _bits in (7, 8, 15, 16, 31, 32, 63):
    _EDGES += [(1 << _bits) - 1, 1 << _bits, (1 << _bits) + 1]
_EDGES += [MASK64, MASK64 - 1]
_EDGES += [-(1 << bits) & MASK64 for bits in (7, 8, 15, 16, 31, 32)]
_EDGES += [0x5555555555555555, 0xAAAAAAAAAAAAAAAA, 0x0123456789ABCDEF, 0x8080808080808080, 0x00FF00FF00FF00FF]


def interesting(random: Random) -> int:
    """A 64-bit value: an edge, a power of two, or random in one of several widths."""
    kind = random.randrange(10)
    if kind < 4:
        return random.choice(_EDGES)
    if kind == 4:
        return (1 << random.randrange(64)) - random.randrange(2)
    if kind == 5:
        return random.getrandbits(32)
    if kind == 6:
        return -random.getrandbits(random.choice((7, 15, 31))) & MASK64
    if kind == 7:
        return random.getrandbits(random.choice((4, 7, 8, 16)))
    return random.getrandbits(64)


def template(random: Random) -> bytes:
    """Contents of the data pages: random bytes, edges, zeros, repeated bytes and code addresses."""
    words: list[int] = []
    while len(words) < DATA_BYTES // 8:
        kind = random.randrange(8)
        length = random.randrange(1, 9)
        if kind == 0:
            words += [0] * length
        elif kind == 1:
            words += [LANDING + random.randrange(8)] * length
        elif kind == 2:
            words += [random.randrange(256) * 0x0101010101010101] * length
        elif kind < 5:
            words += [interesting(random) for _ in range(length)]
        else:
            words += [random.getrandbits(64) for _ in range(length)]
    return struct.pack(f"<{DATA_BYTES // 8}Q", *words[: DATA_BYTES // 8])


_FLOATS = (0.0, -0.0, 1.0, -1.0, 1.5, 0.1, 3.1e9, -2.2e9, 1e300, -1e-300, 5e-324, float("inf"), float("-inf"))


def _lane(random: Random) -> bytes:
    """16 bytes of a vector register."""
    kind = random.randrange(8)
    if kind == 0:
        return bytes(16)
    if kind == 1:
        return b"\xff" * 16
    if kind == 2:
        return struct.pack("<2d", random.choice(_FLOATS), random.choice(_FLOATS))
    if kind == 3:
        return struct.pack("<4f", *(random.choice((0.0, -0.0, 1.0, 1.5, -7.25, 1e30, 1e-40)) for _ in range(4)))
    if kind == 4:
        return struct.pack("<2Q", interesting(random), interesting(random))
    if kind == 5:
        return struct.pack("<2d", random.uniform(-1e6, 1e6), random.uniform(-1e3, 1e3))
    return random.randbytes(16)


#: Vector registers that hold small lane values: indices for gathers.
INDEX_REGISTERS = (12, 13)
#: Vector registers whose lanes have their sign bits set or clear: masks for gathers.
MASK_REGISTERS = (14, 15)


def vector_state(random: Random) -> bytes:
    """An XSAVE area: x87 with some registers filled, MXCSR, XMM and YMM registers."""
    area = bytearray(XSAVE_BYTES)
    control = 0x37F
    if random.random() < 0.3:
        control = 0x7F | random.choice((0, 0x200, 0x300)) | random.randrange(4) << 10
    status = 0
    if random.random() < 0.08:  # an unmasked exception, sometimes already pending
        control &= ~random.getrandbits(6)
        if random.random() < 0.5:
            status = random.getrandbits(6)
            if status & ~control & 0x3F:
                status |= 0x8080
    top = random.randrange(8)
    tags = random.choice((0, 0, 0xFF, 0x0F, random.getrandbits(8)))
    struct.pack_into("<HHB", area, 0, control, status | top << 11 | random.getrandbits(3) << 8, tags)
    for n in range(8):
        kind = random.randrange(6)
        if kind == 0:
            value = struct.pack("<QH", random.getrandbits(63) | 1 << 63, 0xFFFF)  # an MMX register's image
        elif kind == 1:
            value = struct.pack("<QH", 0, random.choice((0, 0x8000)))
        elif kind == 2:
            value = struct.pack("<QH", 1 << 63, random.choice((0x7FFF, 0xFFFF, 0x3FFF, 0xBFFF)))
        else:
            value = struct.pack("<QH", random.getrandbits(63) | 1 << 63, random.choice((0, 0x8000)) | 0x3FFF
                                + random.randrange(-70, 70))  # fmt: skip
        area[32 + 16 * n : 42 + 16 * n] = value
    mxcsr = 0x1F80 | random.choice((0, 0, 0x8040, 0x8000)) | random.randrange(4) << 13
    if random.random() < 0.1:
        mxcsr &= ~(random.getrandbits(6) << 7)
    if random.random() < 0.2:
        mxcsr |= random.getrandbits(6)
    struct.pack_into("<I", area, 24, mxcsr)
    for n in range(16):
        for base in (160, 576):
            lane = _lane(random)
            if n in INDEX_REGISTERS:
                lane = struct.pack("<4i", *(random.randrange(-64, 64) for _ in range(4)))
                if random.random() < 0.5:
                    lane = struct.pack("<2q", *(random.randrange(-64, 64) for _ in range(2)))
            elif n in MASK_REGISTERS:
                lane = struct.pack("<4I", *(random.choice((0, 0xFFFFFFFF, 1 << 31)) for _ in range(4)))
            area[base + 16 * n : base + 16 * n + 16] = lane
    area[512] = 7
    return bytes(area)
