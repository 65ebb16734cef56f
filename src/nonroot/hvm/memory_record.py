"""Records of memory that belongs to devices: what lies in it, sparse and compressed.

A record names the memory and its size; only pages that are not all zeros are in it. It is checked completely before
anything is changed, and what it can make the reader allocate is bounded by the memory's size.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final, Self

from nonroot.hvm.device import StateError
from nonroot.hvm.memory_map import PAGE_SIZE

__all__ = ["MemoryRecord"]

VERSION: Final = 1
HEADER: Final = struct.Struct("<16sHHII")
"""Name, version, reserved, pages in all, runs."""
RUN: Final = struct.Struct("<III")
"""First page, pages, bytes of zlib data that follow."""
RUN_PAGES: Final = 256
"""A run has no more, so that it is decompressed in one piece."""
LEVEL: Final = 1
ZERO: Final = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class MemoryRecord:
    """The contents of one memory at one moment."""

    name: str
    """At most 16 characters of ASCII."""
    pages: int
    runs: tuple[tuple[int, bytes], ...]
    """(first page, contents: whole pages), ascending; pages between them are zeros."""

    @classmethod
    def of(cls, name: str, memory: memoryview) -> Self:
        """The record of ``memory`` as it is; whole pages."""
        runs: list[tuple[int, bytes]] = []
        count = len(memory) // PAGE_SIZE
        start = -1
        for page in range(count + 1):
            used = page < count and bytes(memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]) != ZERO
            if start >= 0 and (not used or page - start == RUN_PAGES):
                runs.append((start, bytes(memory[start * PAGE_SIZE : page * PAGE_SIZE])))
                start = -1
            if used and start < 0:
                start = page
        return cls(name, count, tuple(runs))

    def pack(self) -> bytes:
        """The record as bytes."""
        parts = [HEADER.pack(self.name.encode("ascii"), VERSION, 0, self.pages, len(self.runs))]
        for first, contents in self.runs:
            data = zlib.compress(contents, LEVEL)
            parts += [RUN.pack(first, len(contents) // PAGE_SIZE, len(data)), data]
        return b"".join(parts)

    @classmethod
    def unpack(cls, name: str, size: int, data: bytes) -> Self:
        """
        The record of the memory ``name`` of ``size`` bytes.

        StateError if it is another's, truncated, damaged, or does not fit.
        """
        if len(data) < HEADER.size:
            raise StateError(f"memory {name}: {len(data)} bytes are too few for a header")
        stored, version, reserved, pages, count = HEADER.unpack_from(data)
        if stored.rstrip(b"\0") != name.encode("ascii"):
            raise StateError(f"memory {name}: the record is of another memory")
        if version != VERSION or reserved:
            raise StateError(f"memory {name}: version {version} is not known")
        if pages != size // PAGE_SIZE:
            raise StateError(f"memory {name}: a record of {pages} pages where {size // PAGE_SIZE} were expected")
        runs: list[tuple[int, bytes]] = []
        place, free = HEADER.size, 0
        for _ in range(count):
            if place + RUN.size > len(data):
                raise StateError(f"memory {name}: the record is truncated")
            first, length, packed = RUN.unpack_from(data, place)
            place += RUN.size
            if first < free or not 1 <= length <= RUN_PAGES or first + length > pages:
                raise StateError(f"memory {name}: {length} pages from page {first} on do not fit")
            if packed > len(data) - place:
                raise StateError(f"memory {name}: the record is truncated")
            runs.append((first, _decompress(name, data[place : place + packed], length * PAGE_SIZE)))
            place += packed
            free = first + length
        if place != len(data):
            raise StateError(f"memory {name}: {len(data) - place} bytes too many")
        return cls(name, pages, tuple(runs))

    def apply(self, memory: memoryview) -> None:
        """Make ``memory`` what it was; ValueError if it has another size. Pages of zeros that are zeros stay so."""
        if len(memory) != self.pages * PAGE_SIZE:
            raise ValueError(f"memory {self.name} has {len(memory)} bytes, its record {self.pages * PAGE_SIZE}")
        free = 0
        for first, contents in (*self.runs, (self.pages, b"")):
            for page in range(free, first):
                place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
                if bytes(memory[place]) != ZERO:
                    memory[place] = ZERO
            free = first + len(contents) // PAGE_SIZE
            memory[first * PAGE_SIZE : free * PAGE_SIZE] = contents


def _decompress(name: str, data: bytes, size: int) -> bytes:
    """Exactly ``size`` bytes out of all of ``data``. StateError."""
    stream = zlib.decompressobj()
    try:
        contents = stream.decompress(data, size)
        # A stream that is complete may still have its checksum ahead.
        contents += b"" if stream.eof else stream.decompress(stream.unconsumed_tail, 1)
    except zlib.error as error:
        raise StateError(f"memory {name}: its contents are damaged: {error}") from None
    if len(contents) != size or not stream.eof or stream.unused_data:
        raise StateError(f"memory {name}: its contents are damaged")
    return contents
