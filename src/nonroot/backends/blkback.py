"""A block backend's data path: requests of a blkif ring, done on an image.

A pure object over (ring, grants, image): :meth:`BlockConnection.step` does what there is, in the thread of its
device, so that slow storage holds up nobody else. The request is checked as a whole before anything happens; what is
wrong is answered with an error, and only a ring that cannot be right ends the connection.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from nonroot.backends.blkif import (
    INDIRECT_PAGES,
    MOST_SEGMENTS,
    SECTOR,
    SEGMENT_BYTES,
    SEGMENTS_PER_PAGE,
    Abi,
    BlkifOp,
    BlkifRequest,
    BlkifStatus,
    Segment,
    segments_from,
)
from nonroot.backends.image import Image
from nonroot.backends.ring import BackRing
from nonroot.xen.backend import GrantAccess, GrantError

__all__ = ["MOST_INDIRECT", "MOST_PERSISTENT", "BlockConnection", "discard"]

MOST_INDIRECT: Final = 256
"""Segments of an indirect request: 1 MiB."""
MOST_PERSISTENT: Final = 1056
"""Grants that stay mapped, as Linux's backend has it."""
BUDGET: Final = 64
"""Requests in one step."""
PUSH_BYTES: Final = 256 << 10
"""Responses are published at the latest after so much data."""
FIRST_LAST_SECTOR: Final = 7


class _BadRequestError(Exception):
    """A request that is refused."""

    def __init__(self, status: BlkifStatus = BlkifStatus.ERROR) -> None:
        self.status = status


def discard(image: Image, offset: int, length: int) -> bool:
    """Tell the image that bytes are not needed any more; False if it cannot be told, which loses nothing."""
    method = getattr(image, "discard", None)
    if method is None:
        return False
    try:
        method(offset, length)
    except OSError:
        return False
    return True


class BlockConnection:
    """A ring that is connected to an image."""

    def __init__(
        self,
        ring: BackRing,
        abi: Abi,
        grants: GrantAccess,
        image: Image,
        notify: Callable[[], object],
        persistent: bool = False,
    ) -> None:
        """``persistent``: both ends have agreed that grants stay."""
        self._ring, self._abi, self._grants, self._image = ring, abi, grants, image
        self._notify = notify
        self._kept: OrderedDict[int, memoryview] | None = OrderedDict() if persistent else None
        self._read_into: Callable[[int, list[memoryview]], None] | None = getattr(image, "read_into", None)
        self._write_from: Callable[[int, list[memoryview]], None] | None = getattr(image, "write_from", None)
        self.requests = 0
        """Requests so far."""
        self.refused = 0
        """Those that were answered with an error."""
        self.read_bytes = 0
        self.written_bytes = 0

    def step(self) -> bool:
        """Do requests; whether there are more. RingError."""
        ring = self._ring
        unpublished = 0
        for _ in range(BUDGET):
            if not ring.pending():
                break
            request = self._abi.parse(ring.take())
            self.requests += 1
            try:
                unpublished += self._perform(request)
                status = BlkifStatus.OKAY
            except _BadRequestError as error:
                status = error.status
            except (GrantError, OSError):
                status = BlkifStatus.ERROR
            self.refused += status is not BlkifStatus.OKAY
            # An indirect request is answered as what it wraps: Linux's frontend insists.
            ring.respond(self._abi.response(request.id, request.operation, status))
            if unpublished >= PUSH_BYTES:
                unpublished = 0
                self._publish()
        self._publish()
        self._trim()
        return ring.final_check()

    def _publish(self) -> None:
        if self._ring.unpublished:
            self._grants.settle()
            if self._ring.push():
                self._notify()

    def close(self) -> None:
        """Unmap what stayed mapped."""
        with contextlib.suppress(GrantError):
            self._grants.settle()
        if self._kept is not None:
            while self._kept:
                self._unmap(self._kept.popitem()[0])

    # ── requests ──

    def _perform(self, request: BlkifRequest) -> int:
        """Bytes moved."""
        match request.operation:
            case BlkifOp.READ:
                return self._read(request, self._segments(request))
            case BlkifOp.WRITE:
                return self._write(request, self._segments(request))
            case BlkifOp.WRITE_BARRIER | BlkifOp.FLUSH_DISKCACHE if request.indirect is None:
                self._image.flush()
                if not request.count:
                    return 0
                done = self._write(request, self._segments(request))
                if request.operation == BlkifOp.WRITE_BARRIER:
                    self._image.flush()
                return done
            case BlkifOp.DISCARD if request.indirect is None:
                self._discard(request)
                return 0
        raise _BadRequestError(BlkifStatus.EOPNOTSUPP)

    def _segments(self, request: BlkifRequest) -> tuple[Segment, ...]:
        """The segments, checked. _BadRequestError, GrantError."""
        count = request.count
        if request.indirect is None:
            if not 1 <= count <= MOST_SEGMENTS:
                raise _BadRequestError
            segments = request.segments
        else:
            if not 1 <= count <= min(MOST_INDIRECT, INDIRECT_PAGES * SEGMENTS_PER_PAGE):
                raise _BadRequestError
            found: list[Segment] = []
            for gref in request.indirect[: -(-count // SEGMENTS_PER_PAGE)]:
                here = min(SEGMENTS_PER_PAGE, count - len(found))
                found += segments_from(self._grants.copy_from(gref, 0, here * SEGMENT_BYTES), here)
            segments = tuple(found)
        for _, first, last in segments:
            if not first <= last <= FIRST_LAST_SECTOR:
                raise _BadRequestError
        return segments

    def _place(self, sector: int, sectors: int) -> int:
        """Where it is in the image, in bytes."""
        if sector + sectors > self._image.size // SECTOR:
            raise _BadRequestError
        return sector * SECTOR

    def _read(self, request: BlkifRequest, segments: tuple[Segment, ...]) -> int:
        sectors = sum(last - first + 1 for _, first, last in segments)
        offset = self._place(request.sector, sectors)
        if self._kept is not None and self._read_into is not None:
            self._read_into(offset, self._views(segments))
            self.read_bytes += sectors * SECTOR
            return sectors * SECTOR
        data = memoryview(self._image.read(offset, sectors * SECTOR))
        if len(data) < sectors * SECTOR:
            raise _BadRequestError
        done = 0
        for gref, first, last in segments:
            length = (last - first + 1) * SECTOR
            # As DMA does it, also where the page is kept: the guest may have had code there.
            self._grants.copy_to(gref, first * SECTOR, data[done : done + length])
            done += length
        self.read_bytes += done
        return done

    def _write(self, request: BlkifRequest, segments: tuple[Segment, ...]) -> int:
        sectors = sum(last - first + 1 for _, first, last in segments)
        offset = self._place(request.sector, sectors)
        if self._image.read_only:
            raise _BadRequestError
        if self._kept is not None and self._write_from is not None:
            self._write_from(offset, self._views(segments))
            self.written_bytes += sectors * SECTOR
            return sectors * SECTOR
        parts = [self._from_guest(gref, first * SECTOR, (last - first + 1) * SECTOR) for gref, first, last in segments]
        self._image.write(offset, parts[0] if len(parts) == 1 else b"".join(parts))
        self.written_bytes += sectors * SECTOR
        return sectors * SECTOR

    def _discard(self, request: BlkifRequest) -> None:
        offset = self._place(request.sector, request.count)
        if self._image.read_only:
            raise _BadRequestError
        if request.count and not discard(self._image, offset, request.count * SECTOR):
            raise _BadRequestError(BlkifStatus.EOPNOTSUPP)

    # ── grants that stay ──

    def _from_guest(self, gref: int, offset: int, length: int) -> bytes:
        if self._kept is None:
            return self._grants.copy_from(gref, offset, length)
        return bytes(self._kept_page(gref)[offset : offset + length])

    def _kept_page(self, gref: int) -> memoryview:
        assert self._kept is not None
        view = self._kept.get(gref)
        if view is None:
            view = self._kept[gref] = self._grants.map(gref)
        else:
            self._kept.move_to_end(gref)
        return view

    def _views(self, segments: tuple[Segment, ...]) -> list[memoryview]:
        """The places of the segments in the guest's memory. GrantError."""
        views = []
        for gref, first, last in segments:
            page = self._kept_page(gref)
            whole = first == 0 and last == FIRST_LAST_SECTOR
            views.append(page if whole else page[first * SECTOR : (last + 1) * SECTOR])
        return views

    def _trim(self) -> None:
        """Let go of the grants that have not been used for the longest time."""
        if self._kept is not None:
            while len(self._kept) > MOST_PERSISTENT:
                self._unmap(self._kept.popitem(last=False)[0])

    def _unmap(self, gref: int) -> None:
        with contextlib.suppress(GrantError):  # the domain is gone
            self._grants.unmap(gref)
