"""Instructions as bytes that no assembler would write: odd prefixes, reserved encodings, changed bits."""

from random import Random

_PREFIXES_64 = (0x66, 0x67, 0xF2, 0xF3, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0xF0)
#: One-byte opcodes that leave user code or the sequence.
_AVOID = frozenset({0xCC, 0xCD, 0xF1, 0xCE, 0x9A, 0xEA, 0xE8, 0xE9, 0xEB, 0xC2, 0xC3, 0xCA, 0xCB, 0xCF})


def _opcode(random: Random, bits: int) -> bytes:
    """An opcode of any map, with operands of random bytes behind it."""
    kind = random.randrange(8)
    tail = bytes([random.choice((random.getrandbits(8), 0xC0 | random.getrandbits(6)))]) + random.randbytes(10)
    if kind < 3:
        opcode = random.randrange(256)
        if opcode in _AVOID or opcode == 0x0F:
            opcode = 0x90
        return bytes([opcode]) + tail
    if kind < 5:
        return bytes([0x0F, random.randrange(256)]) + tail
    if kind == 5:
        return bytes([0x0F, random.choice((0x38, 0x3A)), random.randrange(256)]) + tail
    if kind == 6 and bits == 64:
        return bytes([0xC5, random.getrandbits(8), random.randrange(256)]) + tail
    if bits == 64:
        return bytes([0xC4, random.getrandbits(3) << 5 | random.choice((1, 1, 2, 2, 3, random.getrandbits(5))),
                      random.getrandbits(8), random.randrange(256)]) + tail  # fmt: skip
    return bytes([0x0F, random.randrange(256)]) + tail


def raw_bytes(random: Random, bits: int, like: bytes) -> bytes:
    """Bytes for one instruction. ``like``: an instruction to vary, may be empty."""
    if like and random.random() < 0.5:
        body = like
        change = random.random()
        if change < 0.3:
            at = random.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1 << random.randrange(8)]) + body[at + 1 :]
        body += random.randbytes(4)
    else:
        body = _opcode(random, bits)
    prefixes = bytearray()
    for _ in range(random.choice((0, 0, 1, 1, 2, 3, random.randrange(15)))):
        prefixes.append(random.choice(_PREFIXES_64))
    if bits == 64 and random.random() < 0.3:
        prefixes.insert(random.randrange(len(prefixes) + 1), 0x40 | random.getrandbits(4))
    return bytes(prefixes) + body
