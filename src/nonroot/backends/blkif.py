"""The block interface's records, in the layouts of 64-bit and 32-bit x86. Source: xen/include/public/io/blkif.h."""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

__all__ = [
    "ABIS", "INDIRECT_PAGES", "MOST_SEGMENTS", "SECTOR", "SEGMENTS_PER_PAGE", "Abi", "BlkifOp", "BlkifRequest",
    "BlkifStatus", "Segment",
]  # fmt: skip

SECTOR: Final = 512
MOST_SEGMENTS: Final = 11
"""In a request itself."""
INDIRECT_PAGES: Final = 8
SEGMENTS_PER_PAGE: Final = 512


class BlkifOp(IntEnum):
    """Operations."""

    READ = 0
    WRITE = 1
    WRITE_BARRIER = 2
    FLUSH_DISKCACHE = 3
    DISCARD = 5
    INDIRECT = 6


class BlkifStatus(IntEnum):
    """Ends of requests."""

    OKAY = 0
    ERROR = -1
    EOPNOTSUPP = -2


class Segment(NamedTuple):
    """A part of a granted page: sectors ``first`` to ``last``, 0 to 7."""

    gref: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class BlkifRequest:
    """A request as it was in the ring, unchecked."""

    operation: int
    """For an indirect request, the operation that it wraps."""
    id: int
    sector: int
    count: int = 0
    """Segments; sectors, if it is a discard."""
    segments: tuple[Segment, ...] = ()
    indirect: tuple[int, ...] | None = None
    """Granted pages of segments, if it is an indirect request."""


_SEGMENT: Final = struct.Struct("<IBBxx")
SEGMENT_BYTES: Final = _SEGMENT.size


def segments_from(data: bytes, count: int) -> tuple[Segment, ...]:
    """The first ``count`` segments of an array."""
    return tuple(Segment(*fields) for fields in _SEGMENT.iter_unpack(data[: count * SEGMENT_BYTES]))


def segments_to(segments: tuple[Segment, ...]) -> bytes:
    """The reverse."""
    return b"".join(_SEGMENT.pack(*segment) for segment in segments)


class Abi:
    """One layout."""

    def __init__(self, name: str, pad: str) -> None:
        """``pad``: what aligns a 64-bit number behind a 32-bit one."""
        self.name = name
        """As in XenStore."""
        self._head = struct.Struct(f"<BBH{pad}QQ")  # operation, nr_segments, handle, id, sector_number
        self._discard = struct.Struct(f"<BBH{pad}QQQ")
        self._indirect = struct.Struct(f"<BBH{pad}QQHxx{INDIRECT_PAGES}I")
        tail = 4 if pad else 0
        self._response = struct.Struct(f"<QBxh{tail}x")
        self.request_bytes = self._head.size + MOST_SEGMENTS * SEGMENT_BYTES
        self.response_bytes = self._response.size

    def parse(self, data: bytes) -> BlkifRequest:
        """A slot's request. Nothing raises: what is no operation comes out as it is."""
        operation, count, wide, number, sector = self._head.unpack_from(data)
        if operation == BlkifOp.DISCARD:
            return BlkifRequest(operation, number, sector, self._discard.unpack_from(data)[5])
        if operation == BlkifOp.INDIRECT:
            grefs = self._indirect.unpack_from(data)[6:]
            return BlkifRequest(count, number, sector, wide, indirect=tuple(grefs))
        inside = min(count, MOST_SEGMENTS)
        return BlkifRequest(operation, number, sector, count, segments_from(data[self._head.size :], inside))

    def pack(self, request: BlkifRequest, handle: int = 0) -> bytes:
        """The reverse, for frontends."""
        if request.indirect is not None:
            grefs = (*request.indirect, *(0,) * INDIRECT_PAGES)[:INDIRECT_PAGES]
            data = self._indirect.pack(
                BlkifOp.INDIRECT, request.operation, request.count, request.id, request.sector, handle, *grefs
            )
        elif request.operation == BlkifOp.DISCARD:
            data = self._discard.pack(request.operation, 0, handle, request.id, request.sector, request.count)
        else:
            data = self._head.pack(request.operation, request.count, handle, request.id, request.sector)
            data += segments_to(request.segments)
        return data.ljust(self.request_bytes, b"\0")

    def response(self, number: int, operation: int, status: int) -> bytes:
        """A response's bytes."""
        return self._response.pack(number, operation, status)

    def parse_response(self, data: bytes) -> tuple[int, int, int]:
        """(id, operation, status), for frontends."""
        number, operation, status = self._response.unpack_from(data)
        return number, operation, status


ABIS: Final = {abi.name: abi for abi in (Abi("x86_64-abi", "4x"), Abi("x86_32-abi", ""))}
"""By the name that a frontend writes as ``protocol``."""
