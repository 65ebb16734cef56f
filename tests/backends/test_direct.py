"""Disks and cards that the engine serves: what the backends do, or it is left to them."""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends.blkback import BlockConnection
from nonroot.backends.blkif import ABIS, SECTOR, Abi, BlkifOp, BlkifRequest, Segment
from nonroot.backends.data_path import TURN_OFFSET
from nonroot.backends.direct import serve_card, serve_disk
from nonroot.backends.frame import CHECKSUM_BLANK, DATA_VALIDATED, GSO_TCP4, Frame
from nonroot.backends.link import Link, link_pair
from nonroot.backends.raw import RawImage
from nonroot.backends.ring import BackRing, Turn
from nonroot.backends.supervisor import Served
from nonroot.xen.grants import ENTRIES
from nonroot.xen.memory import FIRST_GRANT, RAM, Place
from tests.backends.frontend import BlockFront, NetFront
from tests.waiting import wait_until
from tests.xen.domain import Domain
from tests.xen.test_path import VECTOR, make_path

PAGE = 4096
FIRST_PAGE = 0x400
SECTORS = 4096
IN_USE = 0x18


class Soon:
    """In place of a condition: the engine tells nobody but the vCPU."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_for(self, predicate: Callable[[], bool], timeout: float) -> bool:
        return wait_until(predicate)


class PathGuest:
    """A domain with the engine's part, as the frontends want it."""

    def __init__(self) -> None:
        self.domain = Domain(True, None, make_path)
        self.host = self.domain.host
        assert self.host.path is not None
        self.path = self.host.path
        self.host.upcalls.set_vector(0, VECTOR)
        self.host.table.frame(0)
        self._free = list(range(FIRST_PAGE, FIRST_PAGE + 900))
        self._refs = list(range(8, ENTRIES))
        self.changed = Soon()
        self.bells: dict[int, int] = {}
        self.left = 0
        """Notifications that were left to the backend."""

    def page(self) -> int:
        return self._free.pop(0)

    def free(self, page: int) -> None:
        self._free.append(page)

    def frame(self, page: int) -> memoryview:
        return self.host.physmap.view(Place(RAM, page * PAGE))

    def grant(self, page: int, readonly: bool = False, domid: int = 0) -> int:
        ref = self._refs.pop(0)
        self.host.table.grant(ref, domid, page, readonly)
        return ref

    def end(self, ref: int) -> None:
        table = self.host.physmap.view(self.host.physmap.own(FIRST_GRANT))
        assert not table[ref * 8] & IN_USE, f"grant {ref} is in use"
        table[ref * 8 : ref * 8 + 8] = bytes(8)
        self._refs.append(ref)

    def allocate_port(self) -> int:
        return self.host.channels.alloc_unbound(0)

    def bind(self, port: int, bell: int) -> None:
        self.host.bind_interdomain(port, lambda: None, bell)
        self.bells[port] = bell

    def kick(self, number: int) -> None:
        assert self.path.send(number)
        try:
            os.eventfd_read(self.bells[number])
            self.left += 1
        except BlockingIOError:
            pass

    def map_ring(self, refs: list[int]) -> None:
        for ref in refs:
            self.host.grants.map(ref)


def served(ports: int) -> Served:
    return Served("device", {}, [], lambda reason: None, ports)


@contextmanager
def disk(
    folder: Path, abi: Abi, options: str = "", indirect: int = 0
) -> Iterator[tuple[BlockFront, PathGuest, RawImage, Served]]:
    path = folder / "disk.img"
    path.write_bytes(os.urandom(SECTORS * SECTOR))
    image = RawImage(str(path), read_only=options == "ro")
    try:
        os.preadv(image.descriptor(0, SECTOR) or 0, [bytearray(SECTOR)], 0, os.RWF_NOWAIT)
    except OSError as error:
        image.close()
        pytest.skip(f"the file system does not say what is in the page cache: {error}")
    guest = PathGuest()
    front = BlockFront(guest, abi, 1, indirect)  # type: ignore[arg-type]
    device = served(1)
    os.pwrite(device.journal, Turn.FREE.to_bytes(4, "little"), TURN_OFFSET)  # as the process does when it is there
    guest.bind(front.port, device.wake_fd)
    direct = serve_disk(guest.host, guest.map_ring, front.port, front.refs, abi.name, image, device.journal)
    assert direct is not None
    try:
        yield front, guest, image, device
    finally:
        direct.stop()
        device.close()
        image.close()
        guest.host.close()


@pytest.mark.parametrize("name", list(ABIS))
def test_reads_and_writes_are_done_at_once(tmp_path: Path, name: str) -> None:
    with disk(tmp_path, ABIS[name], indirect=256) as (front, guest, image, _):
        before = image.read(0, SECTORS * SECTOR)
        assert front.read(0, 11 * PAGE) == before[: 11 * PAGE]
        assert front.read(9, 3 * SECTOR) == before[9 * SECTOR : 12 * SECTOR]
        assert front.read(64, 1 << 20) == before[64 * SECTOR : (64 * SECTOR) + (1 << 20)]
        data = os.urandom(70 * PAGE)
        front.write(128, data)
        assert image.read(128 * SECTOR, len(data)) == data
        assert front.transfer(True, 1, data[: 5 * SECTOR], first=3)[0] == 0
        assert image.read(SECTOR, 5 * SECTOR) == data[: 5 * SECTOR]
        assert guest.left == 0
        assert guest.path.statistics()["disk_requests"] == 5


def test_what_is_not_plainly_right_is_left_to_the_backend(tmp_path: Path) -> None:
    with disk(tmp_path, ABIS["x86_64-abi"], "ro") as (front, guest, _, device):
        page = guest.page()
        ref, readonly = guest.grant(page), guest.grant(page, readonly=True)
        foreign = guest.grant(page, domid=5)
        good = (Segment(ref, 0, 7),)
        wrong = [
            BlkifRequest(BlkifOp.FLUSH_DISKCACHE, 1, 0),
            BlkifRequest(BlkifOp.WRITE, 1, 0, 1, good),
            BlkifRequest(BlkifOp.READ, 1, SECTORS - 7, 1, good),
            BlkifRequest(BlkifOp.READ, 1, 1 << 60, 1, good),
            BlkifRequest(BlkifOp.READ, 1, 0, 1, (Segment(ref, 7, 0),)),
            BlkifRequest(BlkifOp.READ, 1, 0, 1, (Segment(ref, 0, 8),)),
            BlkifRequest(BlkifOp.READ, 1, 0, 1, (Segment(readonly, 0, 7),)),
            BlkifRequest(BlkifOp.READ, 1, 0, 1, (Segment(foreign, 0, 7),)),
            BlkifRequest(BlkifOp.READ, 1, 0, 1, (Segment(0xFFFF_FFFF, 0, 7),)),
            BlkifRequest(BlkifOp.READ, 1, 0, 0),
            BlkifRequest(BlkifOp.READ, 1, 0, 300, indirect=(ref,)),
            BlkifRequest(BlkifOp.DISCARD, 1, 0, 8),
            BlkifRequest(77, 1, 0, 1, good),
        ]
        view = guest.frame(front.pages[0])
        for number, request in enumerate(wrong, 1):
            # Each is new at the same index: nothing was taken.
            struct.pack_into("<I", view, 0, 0)
            struct.pack_into("<I", view, 4, 1)
            front.ring._produced = front.ring._published = 0
            front.submit(request)
            assert guest.left == number, request
            assert struct.unpack_from("<I", view, 8)[0] == 0, request
        # A good one is left, too, while the process has the ring.
        struct.pack_into("<II", view, 0, 0, 1)
        front.ring._produced = front.ring._published = 0
        os.pwrite(device.journal, Turn.BACKEND.to_bytes(4, "little"), TURN_OFFSET)
        front.submit(BlkifRequest(BlkifOp.READ, 1, 0, 1, good))
        assert guest.left == len(wrong) + 1


@given(
    operation=st.sampled_from([*BlkifOp, 9]),
    sector=st.integers(0, SECTORS + 8),
    count=st.integers(0, 13),
    fields=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8), st.integers(0, 9)), min_size=11, max_size=11),
    name=st.sampled_from(list(ABIS)),
)
@settings(max_examples=15, deadline=None)
def test_what_is_done_at_once_is_what_the_backend_does(
    tmp_path_factory: pytest.TempPathFactory,
    operation: int,
    sector: int,
    count: int,
    fields: list[tuple[int, int, int]],
    name: str,
) -> None:
    abi = ABIS[name]
    with disk(tmp_path_factory.mktemp("disk"), abi) as (front, guest, image, _):
        pages = [guest.page() for _ in range(4)]
        for number, page in enumerate(pages):
            guest.frame(page)[:] = bytes([number + 1]) * PAGE
        refs = [*(guest.grant(page) for page in pages), guest.grant(pages[0], readonly=True), 4000]
        segments = tuple(Segment(refs[which], first, last) for which, first, last in fields)
        indirect = (refs[0],) if operation == BlkifOp.INDIRECT else None
        request = BlkifRequest(operation, 99, sector, count, segments[:count], indirect)
        before = [bytes(guest.frame(page)) for page in pages], image.read(0, SECTORS * SECTOR)
        ring_page = bytes(guest.frame(front.pages[0]))
        front.submit(request)
        ours = [bytes(guest.frame(page)) for page in pages], image.read(0, SECTORS * SECTOR)
        if guest.left:
            # A read that failed half-way may have left something in the guest's pages, never in the image.
            assert ours[1] == before[1]
            return
        answer = abi.parse_response(front.ring.take())
        for page, data in zip(pages, before[0], strict=True):
            guest.frame(page)[:] = data
        image.write(0, before[1])
        guest.frame(front.pages[0])[:] = ring_page
        front.ring._produced = front.ring._published = front.ring._consumed = 0
        ring = BackRing([guest.frame(front.pages[0])], abi.request_bytes, abi.response_bytes)
        front.ring.request(abi.pack(request))
        front.ring.push()
        while BlockConnection(ring, abi, guest.host.grants, image, lambda: None).step():
            pass
        assert answer == abi.parse_response(front.ring.take())
        assert ours == ([bytes(guest.frame(page)) for page in pages], image.read(0, SECTORS * SECTOR))


@contextmanager
def card(split: bool = True) -> Iterator[tuple[NetFront, PathGuest, Link, Served]]:
    guest = PathGuest()
    front = NetFront(guest, 100, split)  # type: ignore[arg-type]
    near, far = link_pair()
    device = served(2)
    device.lend(to_engine=True)
    ports = [front.port, front.rx_port] if split else [front.port]
    for port in ports:
        guest.bind(port, device.wake_fd)
    link = Link(far)
    with near:
        direct = serve_card(
            guest.host, guest.map_ring, ports, front.refs[0], front.refs[1], near.fileno(), device.journal
        )
        assert direct is not None
        try:
            yield front, guest, link, device
        finally:
            direct.stop()
            device.close()
            link.close()
            guest.host.close()


FRAMES = [
    Frame(os.urandom(60)),
    Frame(os.urandom(1514), DATA_VALIDATED | CHECKSUM_BLANK),
    Frame(os.urandom(30_000), DATA_VALIDATED | CHECKSUM_BLANK, GSO_TCP4, 1448),
    Frame(os.urandom(65_000), DATA_VALIDATED | CHECKSUM_BLANK, GSO_TCP4, 1448),
]


@pytest.mark.parametrize("split", [False, True])
def test_packets_go_both_ways(split: bool) -> None:
    with card(split) as (front, guest, link, _):
        for frame in FRAMES:
            front.send(frame)
            assert wait_until(link.receive_frame) == frame
            assert link.send(frame)
            assert wait_until(front.receive) == frame
        front.collect()
        assert front.statuses == [0] * len(front.statuses)
        assert not front._sent
        assert guest.left == 0


def test_more_frames_than_the_guest_has_pages_wait() -> None:
    with card() as (front, _, link, _):
        frames = [Frame(bytes([number]) * 9000) for number in range(60)]
        for frame in frames:
            assert link.send(frame)
        for frame in frames:
            assert wait_until(front.receive) == frame


def test_the_backend_has_the_rings_for_good_at_the_first_thing_that_is_wrong() -> None:
    with card() as (front, guest, link, device):
        front.send(FRAMES[0])
        assert wait_until(link.receive_frame) == FRAMES[0]
        front.collect()
        front.request(struct.pack("<IHHHH", 4000, 0, 0, 7, 60))  # no such grant
        front.push()
        assert guest.left == 1
        assert int.from_bytes(os.pread(device.journal, 4, TURN_OFFSET), "little") == Turn.BACKEND
        front.send(FRAMES[1])
        assert link.send(FRAMES[2])
        guest.path.remove(front.port)  # when that returns, nothing is being done
        assert link.receive_frame() is None
        assert front.receive() is None
