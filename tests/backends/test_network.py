"""The network backend: its data path by two rings, and as a device of XenStore between a frontend and libslirp."""

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends import netif
from nonroot.backends.frame import (
    CHECKSUM_BLANK,
    DATA_VALIDATED,
    GSO_TCP4,
    GSO_TCP6,
    Frame,
    FrameError,
    Merger,
    complete,
    ones_sum,
    segment,
)
from nonroot.backends.link import Link, link_pair
from nonroot.backends.netback import NetConnection, Offloads
from nonroot.backends.netif import Extra, TxRequest
from nonroot.backends.ring import BackRing, RingError
from nonroot.backends.slirp import UserNetwork, start_user_network
from nonroot.backends.vif import NetDevice, check_mac, create_vif
from nonroot.errors import BadOptionError
from nonroot.xenstore.client import XenStore
from tests.backends.ethernet import Host, ipv4, is_right, with_checksum
from tests.backends.frontend import Guest, NetFront, xenstore
from tests.waiting import wait_until

ALL = Offloads(True, True, True, True, True)
MAC = b"\x00\x16\x3e\x00\x00\x01"


def tcp_frame(payload: bytes, flags: int = 0x18, sequence: int = 100, right: bool = True) -> bytes:
    head = struct.pack(">HHIIBBHHH", 1, 2, sequence, 7, 0x50, flags, 1000, 0, 0) + payload
    if right:
        head = with_checksum("10.0.0.1", "10.0.0.2", 6, head, 16)
    return MAC + MAC[:5] + b"\x02" + b"\x08\x00" + ipv4("10.0.0.1", "10.0.0.2", 6, head)


def tcp6_frame(payload: bytes) -> bytes:
    head = struct.pack(">HHIIBBHHH", 1, 2, 100, 7, 0x50, 0x18, 1000, 0, 0) + payload
    packet = struct.pack(">IHBB", 6 << 28, len(head), 6, 64) + bytes(15) + b"\1" + bytes(15) + b"\2" + head
    return MAC + MAC + b"\x86\xdd" + packet


# ── frames ──


@given(st.integers(1, 60_000), st.integers(100, 9000))
@settings(max_examples=40, deadline=None)
def test_superframes_are_cut_and_joined_again(length: int, size: int) -> None:
    payload = os.urandom(length)
    whole = Frame(tcp_frame(payload, flags=0x19, right=False), CHECKSUM_BLANK, GSO_TCP4, size)
    parts = list(segment(whole))
    assert all(is_right(part.data) and len(part.data) <= 54 + size for part in parts)
    assert b"".join(part.data[54:] for part in parts) == payload
    assert [part.data[47] for part in parts] == [0x10] * (len(parts) - 1) + [0x19]
    merger = Merger()
    plain = [part.data for part in segment(replace(whole, data=tcp_frame(payload, flags=0x18, right=False)))]
    joined = [frame for part in plain for frame in merger.add(part)] + merger.flush()
    assert len(joined) == 1

    def comparable(data: bytes) -> bytes:
        """Identities of IP may differ, and the checksums of IP with them."""
        return data[:18] + data[20:24] + data[26:]

    assert [comparable(frame.data) for frame in segment(joined[0])] == [comparable(data) for data in plain]


def test_version_6_is_cut_with_right_checksums() -> None:
    payload = os.urandom(5000)
    parts = list(segment(Frame(tcp6_frame(payload), CHECKSUM_BLANK, GSO_TCP6, 1400)))
    assert b"".join(part.data[74:] for part in parts) == payload
    for part in parts:
        length = len(part.data) - 54
        assert int.from_bytes(part.data[18:20], "big") == length
        assert ones_sum(part.data[22:54] + length.to_bytes(4, "big") + b"\0\0\0\6" + part.data[54:]) == 65535


def test_the_merger_keeps_order_and_other_streams_apart() -> None:
    merger = Merger()
    a, b = tcp_frame(b"x" * 1000, 0x10, 100), tcp_frame(b"y" * 1000, 0x10, 5000)
    other = MAC + MAC + b"\x08\x06" + bytes(46)
    assert merger.add(a) == []
    assert [frame.data for frame in merger.add(b)] == [a]
    assert [frame.data for frame in merger.add(other)] == [b, other]
    assert merger.flush() == []


@given(st.binary(max_size=200), st.integers(0, 3), st.integers(0, 2), st.integers(0, 65535))
@settings(max_examples=100)
def test_any_frame_can_be_cut_completed_and_merged(data: bytes, flags: int, kind: int, size: int) -> None:
    for head in (b"", MAC + MAC + b"\x08\x00\x45", MAC + MAC + b"\x86\xdd\x60", tcp_frame(b"")[:50]):
        frame = Frame(head + data, flags, kind, size if kind else 0)
        assert len(list(segment(frame))) <= 65536 // 64 + 1
        complete(frame)
        merger = Merger()
        list(merger.add(frame.data) + merger.flush())
        try:
            assert Frame.unpack(frame.pack()) == frame
        except FrameError:
            assert len(frame.data) < 14 or (kind and not size)


# ── the data path ──


@contextmanager
def connected(offloads: Offloads = ALL) -> Iterator[tuple[NetFront, NetConnection, Link]]:
    """Without XenStore and threads."""
    guest = Guest()
    front = NetFront(guest)
    ours, theirs = link_pair()
    link, far = Link(ours), Link(theirs)
    rings = [BackRing([guest.map(ref)], *sizes) for ref, sizes in zip(front.refs, ((12, 4), (8, 8)), strict=True)]
    connection = NetConnection(rings[0], rings[1], guest, link, lambda: None, lambda: None, offloads)
    try:
        yield front, connection, far
    finally:
        link.close()
        far.close()


@pytest.mark.parametrize("length", [60, 1514, 4096, 4097, 30_000, 65_535])
def test_frames_of_every_size_go_both_ways(length: int) -> None:
    data = MAC + MAC + b"\x88\xb5" + os.urandom(length - 14)
    for frame in (Frame(data), Frame(data, 3), Frame(data, 3, GSO_TCP4, 1448), Frame(data, 3, GSO_TCP6, 9000)):
        with connected() as (front, connection, far):
            front.send(frame)
            connection.step()
            assert far.receive_frame() == frame
            front.collect()
            assert set(front.statuses) == {0}
            assert front.tx.free() == front.tx.size
            for _ in range(30):
                far.send(frame)
                connection.step()
                assert front.receive() == frame


def test_a_frontend_without_offloads_gets_what_a_wire_carries() -> None:
    payload = os.urandom(20_000)
    whole = Frame(tcp_frame(payload, right=False), CHECKSUM_BLANK | DATA_VALIDATED, GSO_TCP4, 1400)
    with connected(Offloads(checksum=False)) as (front, connection, far):
        far.send(whole)
        far.send(Frame(tcp_frame(b"hello", right=False), CHECKSUM_BLANK))
        far.send(Frame(bytes(9000)))  # cannot be cut
        far.send(Frame(MAC + MAC + b"\x88\xb5" + bytes(46)))
        connection.step()
        got = bytearray()
        while (frame := front.receive()) is not None and frame.data[12:14] == b"\x08\x00":
            assert is_right(frame.data)
            assert len(frame.data) <= 1514
            got += frame.data[54:]
        assert bytes(got) == payload + b"hello"
        assert frame is not None
        assert frame.data[12:14] == b"\x88\xb5"


def test_frames_wait_for_pages_and_then_for_the_link() -> None:
    frame = Frame(MAC + MAC + b"\x88\xb5" + bytes(40_000))
    with connected() as (front, connection, far):
        for _ in range(60):
            far.send(frame)
        for _ in range(30):
            connection.step()
        assert connection.interest()[0][1] & select.POLLIN or connection.interest() == []
        got = 0
        for _ in range(300):
            got += front.receive() == frame
            connection.step()
            far.drain()
        assert got == 60
        # The other way: when nobody takes the frames, the guest's stay in its ring.
        sent = 0
        while front.tx.free() > 20 and front.guest._free:
            front.send(frame)
            sent += 1
            connection.step()
            front.collect()
            if sent > 300:
                break
        assert connection.interest()[0][1] & select.POLLOUT
        received = 0
        while received < sent:
            taken = far.receive_frame()
            connection.step()
            front.collect()
            if taken is None:
                continue
            received += 1
        assert front.tx.free() == front.tx.size


def test_wrong_packets_are_answered_with_errors() -> None:
    with connected() as (front, connection, far):
        guest = front.guest
        page = guest.page()
        good, foreign = guest.grant(page, True), guest.grant(page, True, domid=4)
        more = netif.TX_MORE_DATA
        wrong = [
            [TxRequest(good, 0, 0, 1, 13)],
            [TxRequest(foreign, 0, 0, 1, 60)],
            [TxRequest(400, 0, 0, 1, 60)],
            [TxRequest(good, 0, more, 1, 100), TxRequest(good, 0, 0, 2, 101)],
            [TxRequest(good, 0, more, 1, 100), TxRequest(foreign, 0, 0, 2, 50)],
            [TxRequest(good, 0, more, n, 1900) if n < 18 else TxRequest(good, 0, 0, n, 100) for n in range(19)],
        ]
        for pieces in wrong:
            for piece in pieces:
                front.request(piece.pack())
            front.push()
            connection.step()
            front.collect()
            assert front.statuses == [-1] * len(pieces)
            front.statuses.clear()
        assert connection.refused == len(wrong)
        assert far.receive_frame() is None
        # A wish for a multicast group is no packet, and no error.
        front.request(TxRequest(good, 0, netif.TX_EXTRA_INFO, 3, 60).pack())
        front.request(Extra(netif.EXTRA_MCAST_ADD, 0).pack())
        front.push()
        connection.step()
        front.collect()
        assert front.statuses == [0]
        assert far.receive_frame() is None


@pytest.mark.parametrize(
    ("slots", "reason"),
    [
        ([TxRequest(8, 4000, 0, 1, 100).pack()], "100 bytes at offset 4000"),
        ([TxRequest(8, 0, netif.TX_MORE_DATA, 1, 100).pack()], "without its end"),
        ([TxRequest(8, 0, netif.TX_MORE_DATA, 1, 60).pack()] * 22, "more than 20 pieces"),
        ([TxRequest(8, 0, 8, 1, 60).pack(), Extra(9, 0).pack()], "type 9"),
        ([TxRequest(8, 0, 8, 1, 60).pack(), Extra(0, 0).pack()], "type 0"),
        ([TxRequest(8, 0, 8, 1, 60).pack(), Extra(1, 0, 0, 1).pack()], "size zero"),
        ([TxRequest(8, 0, 8, 1, 60).pack(), Extra(1, 0, 1448, 3).pack()], "unknown protocol 3"),
        ([TxRequest(8, 0, 8, 1, 60).pack(), *[Extra(1, 1, 1448, 1).pack()] * 9], "more records"),
    ],
)
def test_what_no_frontend_does_by_mistake_ends_the_connection(slots: list[bytes], reason: str) -> None:
    with connected() as (front, connection, _):
        for slot in slots:
            front.request(slot)
        front.push()
        with pytest.raises(RingError, match=reason):
            connection.step()


@given(
    st.lists(st.binary(min_size=12, max_size=12), min_size=1, max_size=40),
    st.binary(min_size=16, max_size=16) | st.none(),
)
@settings(max_examples=60, deadline=None)
def test_any_slots_and_indices_are_contained(slots: list[bytes], indices: bytes | None) -> None:
    with connected() as (front, connection, far):
        far.send(Frame(MAC + MAC + b"\x88\xb5" + bytes(5000)))
        for slot in slots:
            front.request(slot)
        front.push()
        if indices is not None:
            front.rx.words.cast("B")[:16] = indices
        with contextlib.suppress(RingError):  # one of two good ends
            for _ in range(5):
                connection.step()


# ── as a device ──


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenStore]:
    with xenstore(tmp_path_factory.mktemp("xenstore")) as client:
        yield client


@pytest.mark.parametrize("split", [False, True])
def test_a_guest_behind_the_rings_reaches_the_network(store: XenStore, split: bool) -> None:
    data = os.urandom(200_000)
    got = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as peer:
            while part := peer.recv(65536):
                got.extend(part)
            peer.sendall(data)

    server = threading.Thread(target=serve)
    server.start()
    sock, helper = start_user_network(UserNetwork(host_loopback=True))
    guest = Guest(3000)
    guest._refs = list(range(8, 512))
    device = NetDevice(store, create_vif(store, guest.domid, 0, "00:16:3E:00:00:01"), guest, Link(sock))
    device.start()
    store.dispatch(0.02)
    assert store.read(f"{device.path}/feature-rx-copy") == "1"
    front = NetFront(guest, split=split)
    for key, value in {**front.keys(), "state": "4"}.items():
        store.write(f"{device.frontend}/{key}", value)
    while store.dispatch(0.02):
        pass
    assert device.failure == ""
    assert store.read(f"{device.path}/state") == "4"
    host = Host(FrontLink(front), MAC)  # type: ignore[arg-type]
    assert host.dhcp()[1] == b"\xff\xff\xff\x00"
    assert host.exchange("10.0.2.2", listener.getsockname()[1], data[::-1], size=16_000) == data
    server.join()
    assert bytes(got) == data[::-1]
    assert host.superframes > 5
    store.write(f"{device.frontend}/state", "6")
    while store.dispatch(0.02):
        pass
    assert store.read(f"{device.path}/state") == "6"
    assert not guest.mapped
    device.close()
    assert helper.close() == 0


class FrontLink:
    """A frontend as what :class:`Host` takes: it can be polled."""

    busy = False

    def __init__(self, front: NetFront) -> None:
        self.front = front
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        changed = front.guest.changed

        def watch() -> None:
            seen = -1
            with changed:
                while not self._closed:
                    now = sum(front.guest.events.values())
                    if now == seen:
                        changed.wait(1)
                    else:
                        seen = now
                        os.eventfd_write(self._wake, 1)

        self._closed = False
        threading.Thread(target=watch, daemon=True).start()

    def fileno(self) -> int:
        return self._wake

    def send(self, frame: Frame) -> None:
        def room() -> bool:
            self.front.collect()
            return self.front.tx.free() > 20

        wait_until(room)
        self.front.send(frame)

    def receive_frame(self) -> Frame | None:
        frame = self.front.receive()
        if frame is None:
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                return None
            return self.front.receive()
        return frame


@pytest.mark.parametrize(("keys", "reason"), [
    ({"request-rx-copy": "0"}, "only copies are made"),
    ({"multi-queue-num-queues": "2"}, "several queues"),
    ({"tx-ring-ref": ""}, "tx-ring-ref is ''"),
    ({"rx-ring-ref": "511"}, "ring cannot be mapped"),
    ({"event-channel": "99"}, "event channel cannot be bound"),
])  # fmt: skip
def test_what_a_frontend_cannot_want(store: XenStore, keys: dict[str, str], reason: str) -> None:
    guest = Guest()
    ours, theirs = link_pair()
    device = NetDevice(store, create_vif(store, guest.domid, 0, "00:16:3e:00:00:01"), guest, Link(ours))
    device.start()
    store.dispatch(0.02)
    front = NetFront(guest, 10)
    for key, value in {**front.keys(), **keys, "state": "4"}.items():
        store.write(f"{device.frontend}/{key}", value)
    while store.dispatch(0.02):
        pass
    assert reason in device.failure
    assert store.read(f"{device.path}/state") == "5"
    assert not guest.mapped
    device.close()
    theirs.close()


@pytest.mark.parametrize("text", ["", "00:16:3e:00:00", "01:16:3e:00:00:01", "00:16:3e:00:00:0g", "00-16-3e-00-00-01"])
def test_addresses_that_no_card_has(text: str) -> None:
    with pytest.raises(BadOptionError, match="is no address of a network card"):
        check_mac(text)
