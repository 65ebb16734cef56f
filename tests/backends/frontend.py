"""The guest's side of paravirtual devices, for tests: memory, grants, event channels, two frontends."""

from __future__ import annotations

import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nonroot.backends import netif
from nonroot.backends.blkif import (
    MOST_SEGMENTS,
    SECTOR,
    Abi,
    BlkifOp,
    BlkifRequest,
    Segment,
    segments_to,
)
from nonroot.backends.frame import CHECKSUM_BLANK, DATA_VALIDATED, Frame
from nonroot.backends.netif import Extra, RxResponse, TxRequest
from nonroot.backends.ring import FrontRing
from nonroot.xen.backend import EventChannelError, GrantError
from nonroot.xenstore.client import XenStore
from tests.waiting import wait_until

PAGE = 4096
PERMIT, READONLY, READING, WRITING = 1, 4, 8, 16


class Port:
    """The backend's end of an event channel, and the guest's view of it."""

    def __init__(self, guest: Guest, number: int, on_event: Callable[[], object]) -> None:
        self._guest, self._number, self._on_event = guest, number, on_event
        self.closed = False

    @property
    def guest_port(self) -> int:
        return self._number

    def notify(self) -> None:
        with self._guest.changed:
            self._guest.events[self._number] += 1
            self._guest.changed.notify_all()

    def close(self) -> None:
        self.closed = True
        self._guest.ports[self._number] = None

    def kick(self) -> None:
        if not self.closed:
            self._on_event()


class Guest:
    """Memory whose first page is a grant table, version 1; a FrontendAccess for backends in domain 0."""

    domid = 7

    def __init__(self, pages: int = 600) -> None:
        self.memory = bytearray(pages * PAGE)
        self.view = memoryview(self.memory)
        self._free = list(range(1, pages))
        self._refs = list(range(8, 512))
        self.mapped: dict[int, int] = {}
        self.ports: dict[int, Port | None] = {}
        self.events: dict[int, int] = {}
        self.changed = threading.Condition()

    @property
    def grants(self) -> Guest:
        return self

    # ── the guest's own ──

    def page(self) -> int:
        return self._free.pop(0)

    def free(self, page: int) -> None:
        self._free.append(page)

    def frame(self, page: int) -> memoryview:
        return self.view[page * PAGE : (page + 1) * PAGE]

    def grant(self, page: int, readonly: bool = False, domid: int = 0) -> int:
        ref = self._refs.pop(0)
        struct.pack_into("<HHI", self.memory, ref * 8, PERMIT | (READONLY if readonly else 0), domid, page)
        return ref

    def end(self, ref: int) -> None:
        flags = struct.unpack_from("<H", self.memory, ref * 8)[0]
        assert not flags & (READING | WRITING), f"grant {ref} is in use"
        struct.pack_into("<HHI", self.memory, ref * 8, 0, 0, 0)
        self._refs.append(ref)

    def allocate_port(self) -> int:
        number = len(self.ports) + 1
        self.ports[number] = None
        self.events[number] = 0
        return number

    def kick(self, number: int) -> None:
        port = self.ports[number]
        if port is not None:
            port.kick()

    # ── what a backend sees ──

    def bind_interdomain(self, remote_port: int, on_event: Callable[[], object], bell: int | None = None) -> Port:
        if remote_port not in self.ports or self.ports[remote_port] is not None:
            raise EventChannelError(f"there is no event channel {remote_port}")
        port = self.ports[remote_port] = Port(self, remote_port, on_event)
        on_event()
        return port

    def _entry(self, ref: int, write: bool) -> int:
        if not 0 <= ref < 512:
            raise GrantError(f"grant {ref} is outside the table", -3)
        flags, domid, page = struct.unpack_from("<HHI", self.memory, ref * 8)
        assert isinstance(page, int)
        if flags & 3 != PERMIT or domid != 0:
            raise GrantError(f"grant {ref} is no grant", -3)
        if write and flags & READONLY:
            raise GrantError(f"grant {ref} is for reading", -8)
        if not 0 < page < len(self.memory) // PAGE:
            raise GrantError(f"grant {ref} names no memory", -9)
        return page

    def map(self, ref: int, readonly: bool = False) -> memoryview:
        page = self._entry(ref, not readonly)
        self.mapped[ref] = self.mapped.get(ref, 0) + 1
        self.memory[ref * 8] |= READING | (0 if readonly else WRITING)
        return self.frame(page)

    def unmap(self, ref: int) -> None:
        if ref not in self.mapped:
            raise GrantError(f"grant {ref} is not mapped", -4)
        self.mapped[ref] -= 1
        if not self.mapped[ref]:
            del self.mapped[ref]
            self.memory[ref * 8] &= ~(READING | WRITING) & 0xFF

    def copy_from(self, ref: int, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= PAGE
        return bytes(self.frame(self._entry(ref, False))[offset : offset + length])

    def copy_to(self, ref: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert 0 <= offset <= offset + len(data) <= PAGE
        self.frame(self._entry(ref, True))[offset : offset + len(data)] = data

    def settle(self) -> None:
        pass


class BlockFront:
    """blkfront: reads and writes of any length, with or without indirect segments and persistent grants."""

    def __init__(self, guest: Guest, abi: Abi, pages: int = 1, indirect: int = 0, persistent: bool = False) -> None:
        self.guest, self.abi, self.indirect = guest, abi, indirect
        self.pages = [guest.page() for _ in range(pages)]
        self.refs = [guest.grant(page) for page in self.pages]
        self.ring = FrontRing([guest.frame(page) for page in self.pages], abi.request_bytes, abi.response_bytes)
        self.port = guest.allocate_port()
        self.persistent = persistent
        self.pool: list[tuple[int, int]] = []
        self._next = 1
        self.service: Callable[[], object] = lambda: None
        """Called after a notification would have been sent: a test that has no thread steps the backend here."""

    def _buffer(self, readonly: bool) -> tuple[int, int]:
        if self.persistent and self.pool:
            return self.pool.pop()
        page = self.guest.page()
        return page, self.guest.grant(page, readonly and not self.persistent)

    def _return(self, page: int, ref: int) -> None:
        if self.persistent:
            self.pool.append((page, ref))
        else:
            self.guest.end(ref)
            self.guest.free(page)

    def submit(self, request: BlkifRequest) -> None:
        assert self.ring.free()
        self.ring.request(self.abi.pack(request))
        if self.ring.push():
            self.guest.kick(self.port)

    def response(self) -> tuple[int, int, int]:
        self.service()
        with self.guest.changed:
            assert self.guest.changed.wait_for(lambda: self.ring.final_check(), 10), "no response came"
        return self.abi.parse_response(self.ring.take())

    def ask(self, request: BlkifRequest) -> int:
        """One request; its status."""
        self.submit(request)
        number, operation, status = self.response()
        assert number == request.id
        assert operation == request.operation
        return status

    def _number(self) -> int:
        self._next += 1
        return self._next << 33 | self._next

    def transfer(self, write: bool, sector: int, data: bytes, first: int = 0) -> tuple[int, bytes]:
        """Write ``data``, or read as much; ``first``: the sector of a page at which each buffer begins."""
        most = self.indirect or MOST_SEGMENTS
        room = (8 - first) * SECTOR
        result = bytearray()
        for start in range(0, len(data), most * room):
            part = data[start : start + most * room]
            buffers, segments = [], []
            for at in range(0, len(part), room):
                piece = part[at : at + room]
                page, ref = self._buffer(write)
                if write:
                    self.guest.frame(page)[first * SECTOR : first * SECTOR + len(piece)] = piece
                buffers.append((page, ref, len(piece)))
                segments.append(Segment(ref, first, first + len(piece) // SECTOR - 1))
            operation = BlkifOp.WRITE if write else BlkifOp.READ
            where = sector + start // SECTOR
            tables: list[tuple[int, int]] = []
            if len(segments) > MOST_SEGMENTS:
                for at in range(0, len(segments), 512):
                    table = self.guest.page()
                    block = segments_to(tuple(segments[at : at + 512]))
                    self.guest.frame(table)[: len(block)] = block
                    tables.append((table, self.guest.grant(table, True)))
                request = BlkifRequest(
                    operation, self._number(), where, len(segments), indirect=tuple(ref for _, ref in tables)
                )
            else:
                request = BlkifRequest(operation, self._number(), where, len(segments), tuple(segments))
            status = self.ask(request)
            for page, ref, length in buffers:
                result += self.guest.frame(page)[first * SECTOR : first * SECTOR + length]
                self._return(page, ref)
            for table, ref in tables:
                self.guest.end(ref)
                self.guest.free(table)
            if status:
                return status, b""
        return 0, bytes(result)

    def read(self, sector: int, length: int) -> bytes:
        status, data = self.transfer(False, sector, bytes(length))
        assert status == 0
        return data

    def write(self, sector: int, data: bytes) -> None:
        assert self.transfer(True, sector, data)[0] == 0

    def flush(self) -> int:
        return self.ask(BlkifRequest(BlkifOp.FLUSH_DISKCACHE, self._number(), 0))

    def keys(self) -> dict[str, str]:
        """What it writes into XenStore."""
        keys = {"event-channel": str(self.port), "protocol": self.abi.name}
        keys["feature-persistent"] = str(int(self.persistent))
        if len(self.refs) == 1:
            return {**keys, "ring-ref": str(self.refs[0])}
        order = len(self.refs).bit_length() - 1
        return {**keys, "ring-page-order": str(order), **{f"ring-ref{i}": str(ref) for i, ref in enumerate(self.refs)}}


class NetFront:
    """netfront: the same interface as a Link, so that a Host can sit behind it."""

    def __init__(self, guest: Guest, rx_pages: int = 200, split: bool = False) -> None:
        self.guest = guest
        pages = [guest.page(), guest.page()]
        self.refs = [guest.grant(page) for page in pages]
        self.tx = FrontRing([guest.frame(pages[0])], netif.TX_REQUEST_BYTES, netif.TX_RESPONSE_BYTES)
        self.rx = FrontRing([guest.frame(pages[1])], netif.RX_REQUEST_BYTES, netif.RX_RESPONSE_BYTES)
        self.port = guest.allocate_port()
        self.rx_port = guest.allocate_port() if split else self.port
        self._sent: dict[int, list[tuple[int, int]]] = {}
        self._slots: dict[int, tuple[int, int]] = {}
        self._next = 0
        self.statuses: list[int] = []
        for _ in range(rx_pages):
            page = guest.page()
            self._post(page, guest.grant(page))
        self.rx.push()

    def _post(self, page: int, ref: int) -> None:
        index = self.rx._produced & 255
        assert index not in self._slots
        self._slots[index] = (page, ref)
        self.rx.request(netif.rx_request(index, ref))

    # ── to the backend ──

    def send(self, frame: Frame, offset: int = 0) -> None:
        data, buffers, pieces = frame.data, [], []
        room = PAGE - offset
        for at in range(0, len(data), room):
            page = self.guest.page()
            part = data[at : at + room]
            self.guest.frame(page)[offset : offset + len(part)] = part
            ref = self.guest.grant(page, True)
            buffers.append((page, ref))
            pieces.append((ref, len(part)))
        flags = netif.TX_CSUM_BLANK | netif.TX_DATA_VALIDATED if frame.flags & CHECKSUM_BLANK else 0
        for index, (ref, length) in enumerate(pieces):
            number = self._next & 0xFF
            self._next += 1
            more = netif.TX_MORE_DATA if index + 1 < len(pieces) else 0
            extra = netif.TX_EXTRA_INFO if frame.gso_type and index == 0 else 0
            size = len(data) if index == 0 else length
            self.request(TxRequest(ref, offset, more | extra | (flags if index == 0 else 0), number, size).pack())
            self._sent[number] = [buffers[index]]
            if extra:
                self._next += 1
                self.request(Extra(netif.EXTRA_GSO, 0, frame.gso_size, frame.gso_type).pack())
        self.push()

    def request(self, data: bytes) -> None:
        assert self.tx.free(), "the transmit ring is full"
        self.tx.request(data)

    def push(self) -> None:
        if self.tx.push():
            self.guest.kick(self.port)

    def collect(self) -> None:
        """Take the answers of what was sent."""
        while self.tx.final_check():
            number, status = netif.parse_tx_response(self.tx.take())
            if status == netif.STATUS_NULL:
                continue
            self.statuses.append(status)
            for page, ref in self._sent.pop(number, []):
                self.guest.end(ref)
                self.guest.free(page)

    # ── from the backend ──

    def receive(self) -> Frame | None:
        """The next frame, if there is one."""
        self.collect()
        if not self.rx.final_check():
            return None
        parts: list[bytes] = []
        gso = (0, 0)
        flags = netif.RX_MORE_DATA
        first: RxResponse | None = None
        while flags & netif.RX_MORE_DATA:
            assert self.rx.pending(), "a packet without its end"
            index = self.rx._consumed
            answer = RxResponse.parse(self.rx.take())
            page, ref = self._slots.pop(index & 255)
            assert answer.id == index & 255
            assert answer.status > 0
            parts.append(bytes(self.guest.frame(page)[answer.offset : answer.offset + answer.status]))
            self._post(page, ref)
            first = first or answer
            flags = answer.flags
            if flags & netif.RX_EXTRA_INFO:
                index = self.rx._consumed
                extra = Extra.parse(self.rx.take())
                gso = (extra.gso_type, extra.size)
                self._post(*self._slots.pop(index & 255))
        if self.rx.push():
            self.guest.kick(self.rx_port)
        assert first is not None
        ours = CHECKSUM_BLANK if first.flags & netif.RX_CSUM_BLANK else 0
        ours |= DATA_VALIDATED if first.flags & netif.RX_DATA_VALIDATED else 0
        return Frame(b"".join(parts), ours, *gso)

    def keys(self, **features: str) -> dict[str, str]:
        """What it writes into XenStore."""
        keys = {
            "tx-ring-ref": str(self.refs[0]), "rx-ring-ref": str(self.refs[1]), "request-rx-copy": "1",
            "feature-rx-notify": "1", "feature-sg": "1", "feature-gso-tcpv4": "1", "feature-gso-tcpv6": "1",
            "feature-ipv6-csum-offload": "1",
        }  # fmt: skip
        if self.rx_port == self.port:
            keys["event-channel"] = str(self.port)
        else:
            keys |= {"event-channel-tx": str(self.port), "event-channel-rx": str(self.rx_port)}
        return keys | features


@contextmanager
def xenstore(folder: Path) -> Iterator[XenStore]:
    """The real process, and a client of it as domain 0."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "nonroot.xenstore", "--folder", str(folder)], stderr=subprocess.DEVNULL
    )
    try:
        wait_until((folder / "socket").exists)
        with XenStore(folder / "socket") as store:
            yield store
    finally:
        process.terminate()
        process.wait(10)
