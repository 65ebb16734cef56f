"""Decompression of a bzImage's payload on the host, in all formats of Linux but LZO.

Every format but gzip is followed by four bytes, the size of the uncompressed kernel. Output and working memory are
bounded, whatever the payload claims.
"""

import bz2
import io
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Final

import lz4.block
import zstandard

from nonroot.boot.errors import BootError

__all__ = ["MAX_KERNEL", "UnsupportedPayload", "compression_of", "decompress"]

MAX_KERNEL: Final = 256 << 20
"""Bytes that an uncompressed kernel may have."""
MAX_WORKING_MEMORY: Final = 192 << 20
"""For the dictionaries and windows of xz, lzma and zstd; Linux uses up to 128 MiB."""
SIZE_BYTES: Final = 4

LZ4_BLOCK: Final = 8 << 20
LZ4_LEGACY_MAGIC: Final = b"\x02\x21\x4c\x18"


class UnsupportedPayload(BootError):  # noqa: N818
    """The payload is in a format that this host cannot decompress; the guest's own decompressor can."""

    code = "boot_payload"


def _gzip(data: memoryview, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    kernel = stream.decompress(data, limit + 1)
    if not stream.eof and len(kernel) <= limit:
        raise EOFError
    return kernel


def _bzip2(data: memoryview, limit: int) -> bytes:
    stream = bz2.BZ2Decompressor()
    kernel = stream.decompress(data, limit + 1)
    if not stream.eof and len(kernel) <= limit:
        raise EOFError
    return kernel


def _lzma(form: int) -> Callable[[memoryview, int], bytes]:
    def run(data: memoryview, limit: int) -> bytes:
        stream = lzma.LZMADecompressor(format=form, memlimit=MAX_WORKING_MEMORY)
        kernel = stream.decompress(data, limit + 1)
        if not stream.eof and len(kernel) <= limit and form == lzma.FORMAT_XZ:
            raise EOFError
        return kernel

    return run


def _zstd(data: memoryview, limit: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=128 << 20)
    with decompressor.stream_reader(io.BytesIO(data), read_across_frames=False) as reader:
        parts = []
        size = 0
        while size <= limit and (part := reader.read(min(4 << 20, limit + 1 - size))):
            parts.append(part)
            size += len(part)
        return b"".join(parts)


def _lz4(data: memoryview, limit: int) -> bytes:
    """The legacy frame: blocks of 8 MiB, each after its compressed size, until the data ends."""
    position, end = len(LZ4_LEGACY_MAGIC), len(data)
    blocks: list[bytes] = []
    size = 0
    while position < end and size <= limit:
        if end - position < 4:
            raise EOFError
        (length,) = struct.unpack_from("<I", data, position)
        position += 4
        if bytes(data[position - 4 : position]) == LZ4_LEGACY_MAGIC:
            continue
        if length > end - position:
            raise EOFError
        block = lz4.block.decompress(data[position : position + length], uncompressed_size=LZ4_BLOCK)
        position += length
        blocks.append(block)
        size += len(block)
    return b"".join(blocks)


# (name, magic, decompressor, whether the uncompressed size follows)
_FORMATS: Final[tuple[tuple[str, bytes, Callable[[memoryview, int], bytes] | None, bool], ...]] = (
    ("gzip", b"\x1f\x8b", _gzip, False),
    ("xz", b"\xfd7zXZ\0", _lzma(lzma.FORMAT_XZ), True),
    ("lzma", b"\x5d\x00\x00", _lzma(lzma.FORMAT_ALONE), True),
    ("bzip2", b"BZh", _bzip2, True),
    ("lz4", LZ4_LEGACY_MAGIC, _lz4, True),
    ("zstd", b"\x28\xb5\x2f\xfd", _zstd, True),
    ("lzo", b"\x89LZO", None, True),
)


def compression_of(payload: bytes | memoryview) -> str | None:
    """The name of the payload's format; None if it is none that Linux knows."""
    return next((name for name, magic, _, _ in _FORMATS if bytes(payload[: len(magic)]) == magic), None)


def decompress(payload: bytes | memoryview, limit: int = MAX_KERNEL) -> bytes:
    """The kernel in ``payload``. BootError if it is corrupt or larger than ``limit`` bytes; UnsupportedPayload."""
    data = memoryview(payload)
    found = compression_of(data)
    if found is None:
        raise UnsupportedPayload("the kernel's payload is in no known compression format")
    _, _, run, sized = next(f for f in _FORMATS if f[0] == found)
    if run is None:
        raise UnsupportedPayload(f"the kernel's payload is compressed by {found}, which cannot be read on the host")
    expected: int | None = None
    if sized:
        if len(data) < SIZE_BYTES:
            raise BootError(f"the kernel's {found} payload is truncated")
        expected = int.from_bytes(data[-SIZE_BYTES:], "little")
        if expected > limit:
            raise BootError(f"the kernel's payload claims {expected} bytes, more than {limit}")
        limit = expected
        data = data[:-SIZE_BYTES]
    try:
        kernel = run(data, limit)
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError, OSError, ValueError):
        raise BootError(f"the kernel's {found} payload is corrupt or truncated") from None
    except MemoryError:
        raise BootError(f"the kernel's {found} payload needs more memory than there is") from None
    if len(kernel) > limit or (expected is not None and len(kernel) != expected):
        if expected is None:
            raise BootError(f"the kernel's {found} payload is larger than {limit} bytes")
        raise BootError(f"the kernel's {found} payload is corrupt: its size is not the {expected} bytes it claims")
    return kernel
