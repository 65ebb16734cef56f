"""A network backend's data path: packets of two netif rings, and frames of a link.

A pure object over (rings, grants, link). Packets of the guest are copied before they are looked at. What is wrong
with one packet is answered with an error; what no frontend does by mistake (packets that cross pages, that never end,
offloads of size zero) ends the connection with a reason, as Linux's backend has it.
"""

import contextlib
import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nonroot.backends import netif
from nonroot.backends.frame import (
    CHECKSUM_BLANK,
    DATA_VALIDATED,
    GSO_NONE,
    GSO_TCP4,
    GSO_TCP6,
    Frame,
    complete,
    segment,
)
from nonroot.backends.link import Link
from nonroot.backends.netif import Extra, RxResponse, TxRequest
from nonroot.backends.ring import BackRing, RingError
from nonroot.xen.backend import GrantAccess, GrantError

__all__ = ["NetConnection", "Offloads"]

PAGE: Final = 4096
BUDGET: Final = 64
"""Packets each way in one step."""
QUEUE_FRAMES: Final = 256
"""Frames for the guest that wait for its pages; when there are more, the link has to wait."""
SHORTEST: Final = 14


@dataclass(frozen=True, slots=True)
class Offloads:
    """What the frontend takes."""

    scatter_gather: bool = False
    gso_tcp4: bool = False
    gso_tcp6: bool = False
    checksum: bool = True
    """Frames with a blank checksum, over IPv4."""
    checksum6: bool = False


class NetConnection:
    """Two rings that are connected to a link."""

    def __init__(
        self,
        tx: BackRing,
        rx: BackRing,
        grants: GrantAccess,
        link: Link,
        notify_tx: Callable[[], object],
        notify_rx: Callable[[], object],
        offloads: Offloads,
    ) -> None:
        self._tx, self._rx, self._grants, self._link = tx, rx, grants, link
        self._notify_tx, self._notify_rx = notify_tx, notify_rx
        self._offloads = offloads
        self._queue: deque[Frame] = deque()
        self.sent = 0
        """Packets of the guest."""
        self.received = 0
        """Packets for the guest."""
        self.refused = 0
        """Packets of the guest that were answered with an error."""

    def interest(self) -> list[tuple[int, int]]:
        """(descriptor, events) that :meth:`step` waits for."""
        events = select.POLLOUT if self._link.busy else 0
        if len(self._queue) < QUEUE_FRAMES:
            events |= select.POLLIN
        return [(self._link.fileno(), events)] if events else []

    def step(self) -> bool:
        """Move packets both ways; whether there is more to do at once. RingError, LinkClosedError."""
        if self._link.busy:
            self._link.drain()
        more = self._transmit()
        for _ in range(BUDGET):
            if len(self._queue) >= QUEUE_FRAMES:
                break
            frame = self._link.receive_frame()
            if frame is None:
                break
            self._queue.extend(self._fitting(frame))
        self._deliver()
        return more

    # ── from the guest ──

    def _transmit(self) -> bool:
        """Packets of the guest to the link, while it takes them. Whether there are more that could go."""
        ring = self._tx
        for _ in range(BUDGET):
            if self._link.busy or not ring.pending():
                break
            frame = self._packet()
            if frame is None:
                self.refused += 1
            elif frame.data:
                self.sent += 1
                self._link.send(frame)
        if ring.unpublished and ring.push():
            self._notify_tx()
        # While the link is busy the requests stay where they are: its becoming free is what wakes us.
        return ring.final_check() and not self._link.busy

    def _packet(self) -> Frame | None:
        """Take one packet and answer it. None: it was refused. RingError for what no frontend does by mistake."""
        ring = self._tx
        available = ring.pending()

        def take() -> bytes:
            nonlocal available
            if not available:
                raise RingError("the frontend published a packet without its end")
            available -= 1
            return ring.take()

        first = TxRequest.parse(take())
        extras: list[Extra] = []
        more_extras = first.flags & netif.TX_EXTRA_INFO
        while more_extras:
            extra = Extra.parse(take())
            if not netif.EXTRA_GSO <= extra.type <= netif.EXTRA_XDP:
                raise RingError(f"the frontend describes a packet by an unknown record of type {extra.type}")
            extras.append(extra)
            more_extras = extra.flags & netif.EXTRA_MORE
            if len(extras) > netif.EXTRA_XDP:
                raise RingError("the frontend describes a packet by more records than there are")
        pieces = [first]
        more = first.flags & netif.TX_MORE_DATA
        while more:
            if len(pieces) >= netif.TX_SLOTS_FATAL:
                raise RingError(f"the frontend sends a packet of more than {netif.TX_SLOTS_FATAL} pieces")
            piece = TxRequest.parse(take())
            pieces.append(piece)
            more = piece.flags & netif.TX_MORE_DATA
        frame = self._assemble(pieces, extras)
        status = netif.STATUS_ERROR if frame is None else netif.STATUS_OKAY
        ring.respond(netif.tx_response(first.id, status))
        for _ in extras:
            ring.respond(netif.tx_response(0, netif.STATUS_NULL))
        for piece in pieces[1:]:
            ring.respond(netif.tx_response(piece.id, status))
        return frame

    def _assemble(self, pieces: list[TxRequest], extras: list[Extra]) -> Frame | None:
        """The packet; empty data for one that only carries a request to the backend."""
        gso_type, gso_size, blank = GSO_NONE, 0, bool(pieces[0].flags & netif.TX_CSUM_BLANK)
        for extra in extras:
            if extra.type == netif.EXTRA_GSO:
                if not extra.size:
                    raise RingError("the frontend asks for segments of size zero")
                if extra.gso_type not in (GSO_TCP4, GSO_TCP6):
                    raise RingError(f"the frontend asks for segments of an unknown protocol {extra.gso_type}")
                gso_type, gso_size, blank = extra.gso_type, extra.size, True
            elif extra.type in (netif.EXTRA_MCAST_ADD, netif.EXTRA_MCAST_DEL):
                return Frame(b"")  # we filter nothing: every group is heard
        if len(pieces) > netif.TX_SLOTS_LEGACY or pieces[0].size < SHORTEST:
            return None
        rest = pieces[0].size - sum(piece.size for piece in pieces[1:])
        if rest < 0:
            return None
        parts = []
        try:
            for piece, size in zip(pieces, (rest, *(piece.size for piece in pieces[1:])), strict=True):
                if piece.offset + size > PAGE:
                    raise RingError(f"the frontend sends {size} bytes at offset {piece.offset} of a page")
                parts.append(self._grants.copy_from(piece.gref, piece.offset, size))
        except GrantError:
            return None
        flags = CHECKSUM_BLANK | DATA_VALIDATED if blank else 0
        if pieces[0].flags & netif.TX_DATA_VALIDATED:
            flags |= DATA_VALIDATED
        return Frame(parts[0] if len(parts) == 1 else b"".join(parts), flags, gso_type, gso_size)

    # ── to the guest ──

    def _fitting(self, frame: Frame) -> list[Frame]:
        """The frame as this frontend can take it."""
        offloads = self._offloads
        can = {GSO_NONE: True, GSO_TCP4: offloads.gso_tcp4, GSO_TCP6: offloads.gso_tcp6}[frame.gso_type]
        if not can or (len(frame.data) > PAGE and not offloads.scatter_gather):
            return list(segment(frame)) if frame.gso_type else []
        version6 = frame.data[12:14] == b"\x86\xdd"
        if not (offloads.checksum6 if version6 else offloads.checksum):
            frame = complete(frame)
        return [frame]

    def _deliver(self) -> None:
        ring = self._rx
        while self._queue:
            frame = self._queue[0]
            needed = -(-len(frame.data) // PAGE) + bool(frame.gso_type)
            if not ring.final_check(needed):
                break
            self._queue.popleft()
            self._copy_out(frame)
            self.received += 1
        if ring.unpublished:
            self._grants.settle()
            if ring.push():
                self._notify_rx()

    def _copy_out(self, frame: Frame) -> None:
        data = memoryview(frame.data)
        flags = 0
        if frame.flags & CHECKSUM_BLANK:
            flags |= netif.RX_CSUM_BLANK | netif.RX_DATA_VALIDATED
        if frame.flags & DATA_VALIDATED:
            flags |= netif.RX_DATA_VALIDATED
        if frame.gso_type:
            flags |= netif.RX_EXTRA_INFO
        for at in range(0, len(data), PAGE):
            piece = data[at : at + PAGE]
            number, gref = netif.parse_rx_request(self._rx.take())
            status = len(piece)
            try:
                self._grants.copy_to(gref, 0, piece)
            except GrantError:
                status = netif.STATUS_ERROR
            more = netif.RX_MORE_DATA if at + PAGE < len(data) else 0
            self._rx.respond(RxResponse(number, 0, flags | more, status).pack())
            if flags & netif.RX_EXTRA_INFO:
                self._rx.take()  # its slot carries the record instead
                self._rx.respond(Extra(netif.EXTRA_GSO, 0, frame.gso_size, frame.gso_type).pack())
            flags = 0

    def close(self) -> None:
        """The link stays open: a frontend that connects again finds it."""
        self._queue.clear()
        with contextlib.suppress(GrantError):
            self._grants.settle()
