"""The block backend: its data path by a ring, and as a device of XenStore."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends.blkback import MOST_INDIRECT, BlockConnection
from nonroot.backends.blkif import ABIS, MOST_SEGMENTS, SECTOR, Abi, BlkifOp, BlkifRequest, BlkifStatus, Segment
from nonroot.backends.drive import Drive, open_image
from nonroot.backends.image import Image
from nonroot.backends.ring import BackRing, RingError
from nonroot.backends.vbd import BlockDevice, create_vbd
from nonroot.backends.vdev import vdev_number
from nonroot.errors import BadOptionError
from nonroot.xenstore.client import XenStore
from tests.backends.frontend import BlockFront, Guest, xenstore
from tests.waiting import PATIENCE, wait_until

SECTORS = 4096
ABI64, ABI32 = ABIS["x86_64-abi"], ABIS["x86_32-abi"]


def disk(folder: Path, options: str = "") -> Image:
    path = folder / "disk.img"
    if not path.exists():
        path.write_bytes(os.urandom(SECTORS * SECTOR))
    return open_image(Drive.parse(f"{path}{options}"))


def connect(image: Image, front: BlockFront) -> BlockConnection:
    """Without XenStore and threads: each response that is waited for steps the backend."""
    guest = front.guest
    pages = [guest.frame(page) for page in front.pages]
    ring = BackRing(pages, front.abi.request_bytes, front.abi.response_bytes)
    connection = BlockConnection(ring, front.abi, guest, image, lambda: None, front.persistent)

    def service() -> None:
        while connection.step():
            pass

    front.service = service
    return connection


def test_the_layouts_are_xens() -> None:
    assert (ABI64.request_bytes, ABI64.response_bytes) == (112, 16)
    assert (ABI32.request_bytes, ABI32.response_bytes) == (108, 12)
    request = BlkifRequest(BlkifOp.WRITE, 0x1122334455667788, 0x99, 1, (Segment(0xAABBCCDD, 1, 6),))
    head, number, sector, segment = "0101efbe", "8877665544332211", "9900000000000000", "ddccbbaa01060000"
    assert ABI64.pack(request, handle=0xBEEF)[:32].hex() == f"{head}00000000{number}{sector}{segment}"
    assert ABI32.pack(request, handle=0xBEEF)[:28].hex() == f"{head}{number}{sector}{segment}"
    indirect = BlkifRequest(BlkifOp.READ, 1, 2, 300, indirect=(3, 4, 0, 0, 0, 0, 0, 0))
    expected = "06002c010000000001000000000000000200000000000000000000000300000004000000"
    assert ABI64.pack(indirect)[:36].hex() == expected
    assert ABI64.response(5, 1, -2).hex() == "05000000000000000100feff00000000"
    assert ABI32.response(5, 1, -2).hex() == "05000000000000000100feff"
    for abi in ABIS.values():
        for asked in (request, indirect, BlkifRequest(BlkifOp.DISCARD, 7, 8, 9)):
            assert abi.parse(abi.pack(asked)) == asked


STEP = st.tuples(st.booleans(), st.integers(0, SECTORS - 1), st.integers(1, 200), st.integers(0, 7))


@pytest.mark.parametrize("abi", ABIS.values(), ids=ABIS)
@pytest.mark.parametrize(
    ("pages", "indirect", "persistent"), [(1, 0, False), (4, 0, True), (2, 256, False), (1, 64, True)]
)
def test_what_is_written_is_read_back(tmp_path: Path, abi: Abi, pages: int, indirect: int, persistent: bool) -> None:
    image = disk(tmp_path)
    front = BlockFront(Guest(), abi, pages, indirect, persistent)
    connection = connect(image, front)
    model = bytearray((tmp_path / "disk.img").read_bytes())

    @given(st.lists(STEP, max_size=12))
    @settings(max_examples=12, deadline=None)
    def run(steps: list[tuple[bool, int, int, int]]) -> None:
        for write, sector, count, first in steps:
            end = min(SECTORS, sector + count)
            place = slice(sector * SECTOR, end * SECTOR)
            if write:
                data = os.urandom((end - sector) * SECTOR)
                assert front.transfer(True, sector, data, first)[0] == 0
                model[place] = data
            else:
                assert front.transfer(False, sector, bytes((end - sector) * SECTOR), first) == (0, bytes(model[place]))

    run()
    assert front.flush() == 0
    connection.close()
    assert set(front.guest.mapped) == set()
    image.close()
    assert (tmp_path / "disk.img").read_bytes() == model


def test_wrong_requests_are_answered_with_errors(tmp_path: Path) -> None:
    image = disk(tmp_path)
    guest = Guest()
    front = BlockFront(guest, ABI64)
    connection = connect(image, front)
    page = guest.page()
    good, readonly, foreign = guest.grant(page), guest.grant(page, True), guest.grant(page, domid=3)
    nowhere = guest.grant(1 << 20)
    whole = Segment(good, 0, 7)
    before = (tmp_path / "disk.img").read_bytes()

    def ask(operation: int, sector: int, *segments: Segment, count: int | None = None) -> int:
        return front.ask(BlkifRequest(operation, 5, sector, len(segments) if count is None else count, segments))

    error, unsupported = BlkifStatus.ERROR, BlkifStatus.EOPNOTSUPP
    assert ask(BlkifOp.READ, 0) == error
    assert ask(BlkifOp.READ, 0, whole, count=12) == error
    assert ask(BlkifOp.READ, 0, whole, count=255) == error
    assert ask(BlkifOp.READ, 0, Segment(good, 3, 2)) == error
    assert ask(BlkifOp.READ, 0, Segment(good, 0, 8)) == error
    assert ask(BlkifOp.READ, SECTORS - 7, whole) == error
    assert ask(BlkifOp.READ, (1 << 64) - 1, whole) == error
    assert ask(BlkifOp.WRITE, 1 << 63, whole) == error
    for ref in (readonly, foreign, nowhere, 400, 0xFFFFFFFF):
        assert ask(BlkifOp.READ, 0, Segment(ref, 0, 7)) == error
    for ref in (foreign, nowhere, 400):
        assert ask(BlkifOp.WRITE, 0, whole, Segment(ref, 0, 7)) == error
    for operation in (4, 7, 255):
        assert ask(operation, 0, whole) == unsupported
    for count, refs in ((0, (good,)), (MOST_INDIRECT + 1, (good,)), (65535, (good,)), (300, (400,)), (12, (nowhere,))):
        wrong = BlkifRequest(BlkifOp.READ, 6, 0, count, indirect=refs)
        assert front.ask(wrong) == error
    assert front.ask(BlkifRequest(BlkifOp.FLUSH_DISKCACHE, 6, 0, 1, indirect=(good,))) == unsupported
    assert front.ask(BlkifRequest(BlkifOp.DISCARD, 6, SECTORS, 1)) == error
    assert ask(BlkifOp.READ, 0, whole) == 0
    assert connection.refused > 15
    image.close()
    assert (tmp_path / "disk.img").read_bytes() == before


@given(st.binary(min_size=112, max_size=112), st.sampled_from(list(ABIS)))
@settings(max_examples=60, deadline=None)
def test_any_bytes_are_answered(tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str) -> None:
    folder = tmp_path_factory.mktemp("garbage")
    (folder / "disk.img").write_bytes(bytes(1 << 16))
    image = disk(folder)
    abi = ABIS[name]
    front = BlockFront(Guest(20), abi)
    connect(image, front)
    front.ring.request(data[: abi.request_bytes])
    front.ring.push()
    number, operation, _ = front.response()
    request = abi.parse(data)
    assert (number, operation) == (request.id, request.operation)
    image.close()


def test_barriers_and_flushes_with_data_write(tmp_path: Path) -> None:
    image = disk(tmp_path)
    guest = Guest()
    front = BlockFront(guest, ABI64)
    connect(image, front)
    page = guest.page()
    ref = guest.grant(page, True)
    for number, operation in enumerate((BlkifOp.WRITE_BARRIER, BlkifOp.FLUSH_DISKCACHE)):
        guest.frame(page)[:] = bytes([number + 1]) * 4096
        assert front.ask(BlkifRequest(operation, 9, 8 * number, 1, (Segment(ref, 0, 7),))) == 0
        assert front.ask(BlkifRequest(operation, 9, 0)) == 0
    image.close()
    assert (tmp_path / "disk.img").read_bytes()[:8192] == b"\1" * 4096 + b"\2" * 4096


def test_discarded_sectors_are_a_hole_of_the_file(tmp_path: Path) -> None:
    image = disk(tmp_path)
    front = BlockFront(Guest(), ABI64)
    connect(image, front)
    before = (tmp_path / "disk.img").stat().st_blocks
    assert front.ask(BlkifRequest(BlkifOp.DISCARD, 6, 64, 1024)) == 0
    assert front.read(64, 1024 * SECTOR) == bytes(1024 * SECTOR)
    assert front.read(63, SECTOR) != bytes(SECTOR)
    assert (tmp_path / "disk.img").stat().st_blocks <= before - 1024 + 16
    assert image.size == SECTORS * SECTOR
    image.close()


def test_a_read_only_disk_refuses_writes(tmp_path: Path) -> None:
    image = disk(tmp_path, ",ro")
    front = BlockFront(Guest(), ABI64)
    connect(image, front)
    assert front.transfer(True, 0, bytes(512))[0] == BlkifStatus.ERROR
    assert front.ask(BlkifRequest(BlkifOp.DISCARD, 6, 0, 8)) == BlkifStatus.ERROR
    assert front.read(0, 512) == (tmp_path / "disk.img").read_bytes()[:512]
    image.close()


def test_a_full_host_disk_is_an_error_of_the_request(tmp_path: Path) -> None:
    class Full:
        size, read_only = 1 << 20, False

        def write(self, offset: int, data: bytes) -> None:
            raise OSError(28, "no space")

        def read(self, offset: int, length: int) -> bytes:
            return bytes(length // 2)  # a bad place in the middle

        def flush(self) -> None:
            raise OSError(5, "I/O error")

    front = BlockFront(Guest(), ABI64)
    connect(Full(), front)  # type: ignore[arg-type]
    assert front.transfer(True, 0, bytes(512))[0] == BlkifStatus.ERROR
    assert front.transfer(False, 0, bytes(512))[0] == BlkifStatus.ERROR
    assert front.flush() == BlkifStatus.ERROR


def test_an_overflowing_ring_ends_the_connection(tmp_path: Path) -> None:
    image = disk(tmp_path)
    front = BlockFront(Guest(), ABI64)
    connection = connect(image, front)
    front.ring.words[0] = 1000
    with pytest.raises(RingError, match="1000 requests"):
        connection.step()
    image.close()


def test_persistent_grants_stay_within_their_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nonroot.backends.blkback.MOST_PERSISTENT", 16)
    image = disk(tmp_path)
    guest = Guest()
    front = BlockFront(guest, ABI64, persistent=True)
    connection = connect(image, front)
    rings = 0
    page = guest.page()
    for number in range(60):
        ref = guest.grant(page)
        assert front.ask(BlkifRequest(BlkifOp.WRITE, number, 0, 1, (Segment(ref, 0, 0),))) == 0
        assert len(guest.mapped) - rings <= 16
    connection.close()
    assert not guest.mapped
    image.close()


# ── as a device ──


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[XenStore]:
    with xenstore(tmp_path_factory.mktemp("xenstore")) as client:
        yield client


def negotiate(store: XenStore, device: BlockDevice, front: BlockFront, **keys: str) -> None:
    for attempt in store.transaction():
        with attempt as t:
            for key, value in {**front.keys(), **keys, "state": "3"}.items():
                t.write(f"{device.frontend}/{key}", value)
    settle(store)


def settle(store: XenStore) -> None:
    while store.dispatch(0.02):
        pass


def back(store: XenStore, device: BlockDevice, key: str) -> str | None:
    return store.read(f"{device.path}/{key}")


@pytest.mark.parametrize(("abi", "pages", "persistent"), [(ABI64, 1, True), (ABI32, 4, False)])
def test_a_disk_is_negotiated_used_closed_and_used_again(
    store: XenStore, tmp_path: Path, abi: Abi, pages: int, persistent: bool
) -> None:
    image = disk(tmp_path)
    guest = Guest()
    path = create_vbd(store, guest.domid, "xvda", image)
    assert path == "/local/domain/0/backend/vbd/7/51712"
    device = BlockDevice(store, path, guest, image)
    device.start()
    settle(store)
    assert back(store, device, "state") == "2"
    assert back(store, device, "feature-flush-cache") == "1"
    assert store.read("/local/domain/7/device/vbd/51712/virtual-device") == "51712"
    for _ in range(2):  # a guest that boots twice
        front = BlockFront(guest, abi, pages, persistent=persistent)
        negotiate(store, device, front)
        assert device.failure == ""
        assert back(store, device, "state") == "4"
        assert (back(store, device, "sectors"), back(store, device, "sector-size")) == (str(SECTORS), "512")
        assert back(store, device, "info") == "0"
        store.write(f"{device.frontend}/state", "4")
        settle(store)
        data = os.urandom(1 << 20)
        front.write(16, data)
        assert front.read(16, len(data)) == data
        assert front.flush() == 0
        for state, answer in (("5", "5"), ("6", "6")):
            store.write(f"{device.frontend}/state", state)
            settle(store)
            assert back(store, device, "state") == answer
        assert not guest.mapped
        store.write(f"{device.frontend}/state", "1")
        settle(store)
        assert back(store, device, "state") == "2"
    device.close()
    assert (tmp_path / "disk.img").read_bytes()[16 * SECTOR : 16 * SECTOR + len(data)] == data


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"ring-ref": "400"}, "ring cannot be mapped"),
        ({"ring-ref": "-1"}, "ring-ref is '-1', and has to be 0 to 4294967295"),
        ({"ring-ref": "٣"}, "ring-ref is"),
        ({"ring-ref": "9" * 400}, "ring-ref is"),
        ({"ring-page-order": "9"}, "ring-page-order is '9', and has to be 0 to 2"),
        ({"ring-page-order": "1"}, "no ring-ref0"),
        ({"event-channel": "77"}, "event channel cannot be bound"),
        ({"protocol": "vax-abi"}, "protocol 'vax-abi'"),
    ],
)
def test_what_a_frontend_cannot_want(store: XenStore, tmp_path: Path, keys: dict[str, str], reason: str) -> None:
    image = disk(tmp_path)
    guest = Guest()
    device = BlockDevice(store, create_vbd(store, guest.domid, "xvdb", image), guest, image)
    device.start()
    settle(store)
    front = BlockFront(guest, ABI64)
    negotiate(store, device, front, **keys)
    assert reason in device.failure
    assert back(store, device, "state") == "5"
    assert reason in (back(store, device, "error") or "")
    assert not guest.mapped
    device.close()


def test_a_ring_that_overflows_closes_the_device_with_a_reason(store: XenStore, tmp_path: Path) -> None:
    image = disk(tmp_path)
    guest = Guest()
    calls: list[object] = []
    device = BlockDevice(store, create_vbd(store, guest.domid, "xvdc", image), guest, image, post=calls.append)
    device.start()
    front = BlockFront(guest, ABI64)
    settle(store)
    negotiate(store, device, front)
    front.ring.words[0] = 99
    guest.kick(front.port)
    wait_until(lambda: bool(calls))
    calls[0]()  # type: ignore[operator]
    assert "overflows" in device.failure
    assert back(store, device, "state") == "5"
    device.close()


def test_a_disk_that_grows_tells_its_guest(store: XenStore, tmp_path: Path) -> None:
    guest = Guest()
    image = disk(tmp_path)
    device = BlockDevice(store, create_vbd(store, guest.domid, "xvdd", image), guest, image)
    device.start()
    settle(store)
    front = BlockFront(guest, ABI64)
    negotiate(store, device, front)
    assert back(store, device, "feature-discard") == "1"
    with store.watch(f"{device.path}/state") as watch:
        next(watch.events(PATIENCE))
        os.truncate(tmp_path / "disk.img", 4 << 20)
        device.resized()
        assert next(watch.events(PATIENCE)) == f"{device.path}/state"
    assert back(store, device, "sectors") == "8192"
    assert back(store, device, "state") == "4"
    front.write(8184, b"new".ljust(4096))
    assert front.read(8184, 4096).startswith(b"new")
    device.close()


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("xvda", 51712), ("xvdb", 51728), ("xvdb3", 51731), ("xvdq", 268439552), ("hda", 768), ("hdd", 5696),
        ("sdb", 2064),
    ],
)  # fmt: skip
def test_device_numbers(name: str, number: int) -> None:
    assert vdev_number(name) == number


@pytest.mark.parametrize("name", ["", "xvd", "xvdA", "hde", "sdz", "vda", "xvdaaa", "xvda300", "xvd1a", "é"])
def test_names_of_no_disk(name: str) -> None:
    with pytest.raises(BadOptionError, match="is no name of a disk"):
        vdev_number(name)


assert MOST_SEGMENTS == 11
