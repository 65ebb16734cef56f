"""Writers of small kernel images: ELF files with Xen notes, bzImages with any payload."""

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence

import lz4.block
import zstandard

ENTRY = 18
RELOC = 19


def note(kind: int, data: bytes, name: bytes = b"Xen\0") -> bytes:
    padded = name + bytes(-len(name) % 4)
    return struct.pack("<III", len(name), len(data), kind) + padded + data + bytes(-len(data) % 4)


def elf(
    segments: Sequence[tuple[int, bytes, int]] = ((0x10_0000, b"\xf4\xeb\xfd", 3),),
    entry: int | None = 0x10_0000,
    bits: int = 64,
    notes: bytes | None = None,
    machine: int | None = None,
    kind: int = 2,
) -> bytes:
    """An ELF file. ``segments``: (physical address, bytes, size in memory). ``entry``: the PVH note; None for none."""
    if notes is None:
        notes = b"" if entry is None else note(ENTRY, struct.pack("<I", entry))
    count = len(segments) + (1 if notes else 0)
    header_size, entry_size = (64, 56) if bits == 64 else (52, 32)
    place = header_size + entry_size * count
    headers, body = b"", b""
    parts = [(1, address, data, size) for address, data, size in segments]
    if notes:
        parts.append((4, 0, notes, len(notes)))
    for type_, address, data, size in parts:
        offset = place + len(body)
        if bits == 64:
            headers += struct.pack("<IIQQQQQQ", type_, 7, offset, address, address, len(data), size, 4)
        else:
            headers += struct.pack("<IIIIIIII", type_, offset, address, address, len(data), size, 7, 4)
        body += data + bytes(-len(data) % 4)
    machine = {64: 62, 32: 3}[bits] if machine is None else machine
    identity = b"\x7fELF" + bytes([2 if bits == 64 else 1, 1, 1]) + bytes(9)
    code = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    header = struct.pack(code, kind, machine, 1, 0, header_size, 0, 0, header_size, entry_size, count, 0, 0, 0)
    return identity + header + headers + body


def lz4_legacy(data: bytes) -> bytes:
    blocks = b"\x02\x21\x4c\x18"
    for start in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[start : start + (8 << 20)], store_size=False)
        blocks += struct.pack("<I", len(block)) + block
    return blocks


def _xz(data: bytes) -> bytes:
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(data, lzma.FORMAT_XZ, check=lzma.CHECK_CRC32, filters=filters)


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": _xz,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "zstd": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
}


def payload_of(data: bytes, form: str) -> bytes:
    """A payload as the kernel's build makes it: all formats but gzip carry the size behind."""
    packed = COMPRESSORS[form](data)
    return packed if form == "gzip" else packed + struct.pack("<I", len(data))


def bzimage(
    payload: bytes,
    version: int = 0x020F,
    relocatable: bool = True,
    entry_64: bool = True,
    preferred: int = 0x100_0000,
    init_size: int = 0x20_0000,
    initrd_max: int = 0x7FFF_FFFF,
    cmdline_size: int = 2047,
    setup_sects: int = 3,
    loadflags: int = 1,
) -> bytes:
    stub = b"\xf4\xeb\xfd".ljust(0x200, b"\x90") + b"\xf4\xeb\xfd".ljust(0x40, b"\x90")
    kernel = stub + payload
    kernel += bytes(-len(kernel) % 16)
    setup = bytearray((setup_sects + 1) * 512)

    def put(code: str, offset: int, value: int) -> None:
        struct.pack_into("<" + code, setup, offset, value)

    put("B", 0x1F1, setup_sects)
    put("I", 0x1F4, len(kernel) // 16)
    setup[0x1FE:0x200] = b"\x55\xaa"
    put("B", 0x200, 0xEB)
    put("B", 0x201, 0x66)
    setup[0x202:0x206] = b"HdrS"
    put("H", 0x206, version)
    put("B", 0x211, loadflags)
    put("I", 0x22C, initrd_max)
    put("I", 0x230, 0x20_0000)
    put("B", 0x234, relocatable)
    put("B", 0x235, 12)
    put("H", 0x236, 1 if entry_64 else 0)
    put("I", 0x238, cmdline_size)
    put("I", 0x248, len(stub))
    put("I", 0x24C, len(payload))
    put("Q", 0x258, preferred)
    put("I", 0x260, init_size)
    return bytes(setup) + kernel
