"""The worker behind a drive: order, threads, virtual time, its end; what a guest's FLUSH means."""

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nonroot.backends.overlay import OverlayImage
from nonroot.backends.raw import RawImage
from nonroot.backends.service import BlockService
from nonroot.devices.block import SECTOR, BlockOp, BlockRequest, BlockResult, BlockStatus
from nonroot.devices.ide_unit import Disk
from nonroot.hvm.clock import ManualClock
from tests.storage.parts import BSY, DF, DRDY, DSC, ERR, Driver, FailingImage, pattern
from tests.waiting import PATIENCE


class Loop:
    """What a vCPU's thread is to the service."""

    def __init__(self) -> None:
        self.posted: deque[Callable[[], object]] = deque()
        self.there = threading.Semaphore(0)

    def post(self, action: Callable[[], object]) -> None:
        self.posted.append(action)
        self.there.release()

    def serve(self, count: int) -> None:
        for _ in range(count):
            assert self.there.acquire(timeout=PATIENCE)
            self.posted.popleft()()


def workers(service: BlockService) -> int:
    """How many threads serve it; those of others do not matter."""
    return sum(
        getattr(thread, "_target", None) == service._work for thread in threading.enumerate() if thread.is_alive()
    )


class SlowImage(FailingImage):
    """Takes its time."""

    def read(self, offset: int, length: int) -> bytes:
        time.sleep(0.05)
        return super().read(offset, length)


def test_requests_are_done_in_order_by_another_thread() -> None:
    loop, image = Loop(), FailingImage(pattern(4096))
    service = BlockService(image, loop.post)
    seen: list[tuple[int, BlockResult, str]] = []

    def done(number: int) -> Callable[[BlockResult], object]:
        return lambda result: seen.append((number, result, threading.current_thread().name))

    service.submit(BlockRequest(BlockOp.WRITE, 512, 512, b"w" * 512), done(1))
    service.submit(BlockRequest(BlockOp.READ, 512, 512), done(2))
    service.submit(BlockRequest(BlockOp.READ, 8192, 512), done(3))
    assert not seen
    loop.serve(3)
    assert [(number, result.status) for number, result, _ in seen] == [
        (1, BlockStatus.OK),
        (2, BlockStatus.OK),
        (3, BlockStatus.OUT_OF_RANGE),
    ]
    assert seen[1][1].data == b"w" * 512
    assert {name for _, _, name in seen} == {threading.current_thread().name}
    assert workers(service) == 1
    service.close()
    assert workers(service) == 0
    assert image.closed


def test_there_is_no_thread_before_the_first_request() -> None:
    service = BlockService(FailingImage(bytes(512)), Loop().post)
    assert workers(service) == 0
    service.close()


def test_in_virtual_time_answers_come_after_the_latency_and_not_before() -> None:
    clock = ManualClock(1000)
    service = BlockService(SlowImage(pattern(4096)), Loop().post, clock, 500)
    results: list[BlockResult] = []
    service.submit(BlockRequest(BlockOp.READ, 0, 512, issued_ns=1000), results.append)
    assert clock.dirty
    assert service.deadline() == 1500
    time.sleep(0.1)
    service.advance(1499)
    assert results == []
    service.submit(BlockRequest(BlockOp.READ, 512, 512, issued_ns=1400), results.append)
    service.advance(1900)  # the second is not there yet: it is waited for
    assert [result.data for result in results] == [pattern(4096)[:512], pattern(4096)[512:1024]]
    assert service.deadline() is None
    service.close()


CONTENT = pattern(2 << 20)


# ── FLUSH ──


def disk(path: Path) -> tuple[Driver, Loop, BlockService]:
    """A guest's driver, and a disk that is a file of the host."""
    path.write_bytes(bytes(8 * SECTOR))
    loop = Loop()
    service = BlockService(RawImage(str(path)), loop.post)
    return Driver((Disk(service), None, None, None)), loop, service


@pytest.mark.parametrize("opcode", [0xE7, 0xEA])
def test_a_flush_ends_when_stable_storage_has_the_data(
    opcode: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.img"
    driver, loop, service = disk(path)
    entered, may_return = threading.Event(), threading.Event()
    synced: list[tuple[bool, bytes]] = []
    fdatasync = os.fdatasync

    def slow(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino == path.stat().st_ino, path.read_bytes()[SECTOR : 2 * SECTOR]))
        entered.set()
        may_return.wait(10)
        fdatasync(descriptor)

    monkeypatch.setattr(os, "fdatasync", slow)
    driver.command(0x30, lba=1, count=1)
    driver.ide.write_block(0, 2, b"w" * SECTOR)
    loop.serve(1)
    assert driver.acknowledge() == DRDY | DSC
    assert synced == []
    driver.command(opcode)
    assert entered.wait(10)
    assert driver.status & BSY
    assert not driver.levels[0]
    assert not loop.posted
    may_return.set()
    loop.serve(1)
    assert driver.acknowledge() == DRDY | DSC
    assert synced == [(True, b"w" * SECTOR)]
    service.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_flush_that_fails_is_a_device_fault(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, loop, service = disk(tmp_path / "disk.img")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fdatasync", fail)
    driver.command(0xE7)
    loop.serve(1)
    assert driver.acknowledge() & (ERR | DF) == ERR | DF
    monkeypatch.undo()
    driver.command(0xE7)
    loop.serve(1)
    assert driver.acknowledge() == DRDY | DSC
    service.close()


# ── what the host has at hand ──


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An image in the page cache."""
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    with path.open("rb") as opened:
        opened.read()
        try:
            os.preadv(opened.fileno(), [bytearray(512)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system does not say what is at hand")
    return path


def test_what_is_at_hand_needs_no_thread_but_comes_later_all_the_same(file: Path) -> None:
    loop = Loop()
    service = BlockService(RawImage(str(file)), loop.post)
    results: list[BlockResult] = []
    service.submit(BlockRequest(BlockOp.READ, 4096, 1024), results.append)
    assert results == []
    loop.serve(1)
    assert results == [BlockResult(BlockStatus.OK, CONTENT[4096:5120])]
    places: list[tuple[int, int]] = []

    def place(descriptor: int, offset: int) -> int:
        places.append((os.fstat(descriptor).st_ino, offset))
        return 8192

    service.submit(BlockRequest(BlockOp.READ, 512, 8192, place=place), results.append)
    loop.serve(1)
    assert places == [(file.stat().st_ino, 512)]
    assert results[1:] == [BlockResult(placed=8192)]
    assert workers(service) == 0
    assert (service.requests, service.at_once) == (2, 2)
    service.close()


def test_in_virtual_time_nothing_is_read_before_its_time(file: Path) -> None:
    clock = ManualClock()
    service = BlockService(RawImage(str(file)), Loop().post, clock, 500)
    results: list[BlockResult] = []
    service.submit(BlockRequest(BlockOp.READ, 0, 512, place=lambda fd, at: 1 // 0), results.append)
    service.advance(499)
    assert results == []
    service.advance(500)
    assert results == [BlockResult(BlockStatus.OK, CONTENT[:512])]
    assert service.at_once == 0
    service.close()


@pytest.mark.parametrize("count", [0, 512, -1])
def test_what_is_not_at_hand_is_read_by_the_thread(file: Path, count: int) -> None:
    loop = Loop()
    service = BlockService(RawImage(str(file)), loop.post)
    results: list[BlockResult] = []
    for _ in range(2):
        service.submit(BlockRequest(BlockOp.READ, 512, 8192, place=lambda fd, at: count), results.append)
        loop.serve(1)
    assert results == 2 * [BlockResult(BlockStatus.OK, CONTENT[512:8704])]
    assert service.at_once == 0
    service.submit(BlockRequest(BlockOp.READ, len(CONTENT), 512, place=lambda fd, at: 512), results.append)
    loop.serve(1)
    assert results[2].status is BlockStatus.OUT_OF_RANGE
    service.close()


def test_a_read_does_not_overtake_the_writes_before_it(file: Path) -> None:
    asked = threading.Event()

    class SlowWrites(RawImage):
        def write(self, offset: int, data: bytes) -> None:
            assert asked.wait(PATIENCE)
            super().write(offset, data)

    loop = Loop()
    service = BlockService(SlowWrites(str(file)), loop.post)
    results: list[BlockResult] = []
    service.submit(BlockRequest(BlockOp.WRITE, 0, 512, b"w" * 512), lambda result: None)
    service.submit(BlockRequest(BlockOp.READ, 0, 512), results.append)
    assert service.at_once == 0
    asked.set()
    loop.serve(2)
    assert results[0].data == b"w" * 512
    service.submit(BlockRequest(BlockOp.READ, 0, 512), results.append)
    assert service.at_once == 1, "nothing is on its way any more"
    loop.serve(1)
    assert results[1].data == b"w" * 512
    service.close()


def test_an_image_that_has_become_shorter_is_an_error_and_not_zeros(file: Path) -> None:
    loop = Loop()
    service = BlockService(RawImage(str(file)), loop.post)
    os.truncate(file, 5000)
    results: list[BlockResult] = []
    service.submit(BlockRequest(BlockOp.READ, 4096, 2048), results.append)
    loop.serve(1)
    assert (results[0].status, len(results[0].data)) == (BlockStatus.IO_ERROR, 512)
    service.close()


def test_a_layer_names_the_file_that_has_it_all(file: Path, tmp_path: Path) -> None:
    below = RawImage(str(file), read_only=True)
    image = OverlayImage(below, str(tmp_path))
    assert image.descriptor(0, 1 << 20) == below.descriptor(0, 512) is not None
    image.write(8192, b"n" * 4096)
    assert image.descriptor(0, 8192) == below.descriptor(0, 512)
    layer = image.descriptor(8192, 4096)
    assert layer not in (None, below.descriptor(0, 512))
    assert os.pread(layer, 4096, 8192) == b"n" * 4096
    assert image.descriptor(4096, 8192) is None
    assert image.descriptor(8192, 8192) is None
    assert below.descriptor(len(CONTENT) - 512, 1024) is None
    assert below.descriptor(-512, 512) is None
    image.close()


class TestBusMaster:
    """DMA of a disk whose image is in the page cache: the data does not pass through the device."""

    @pytest.fixture
    def loop(self) -> Loop:
        return Loop()

    @pytest.fixture
    def service(self, file: Path, loop: Loop) -> Iterator[BlockService]:
        service = BlockService(RawImage(str(file)), loop.post)
        yield service
        service.close()

    @pytest.fixture
    def driver(self, service: BlockService) -> Driver:
        driver = Driver((Disk(service), None, None, None), ManualClock())
        driver.select(0)
        return driver

    def test_scattered(self, driver: Driver, loop: Loop, service: BlockService) -> None:
        driver.table([(0x10000, 512), (0x30002, 1024), (0x20000, 2560)])
        driver.command(0xC8, lba=70, count=8)
        driver.start(to_memory=True)
        assert driver.interrupts == [0, 0]
        assert driver.status & 0x80
        loop.serve(1)
        assert service.at_once == 1
        assert driver.status == DRDY | DSC
        assert driver.bus_master(2) & 7 == 4
        memory = driver.memory.data
        moved = memory[0x10000:0x10200] + memory[0x30002:0x30402] + memory[0x20000:0x20A00]
        assert moved == CONTENT[70 * SECTOR : 78 * SECTOR]

    def test_several_requests(self, driver: Driver, loop: Loop, service: BlockService) -> None:
        driver.table([(0x10000 + n * 0x10000, 0) for n in range(24)])
        driver.command(0x25, lba=1, count=3000, wide=True)
        driver.start(to_memory=True)
        loop.serve(2)
        assert service.requests == service.at_once == 2
        assert driver.memory.data[0x10000 : 0x10000 + 3000 * SECTOR] == CONTENT[SECTOR : 3001 * SECTOR]
        assert driver.bus_master(2) & 7 == 5, "the table is longer"

    def test_a_record_in_between_asks_again(self, driver: Driver, loop: Loop, service: BlockService) -> None:
        driver.table([(0x10000, 4096)])
        driver.command(0xC8, lba=3, count=8)
        driver.start(to_memory=True)
        record = driver.ide.state()
        driver.ide.from_state(record)
        loop.serve(2)
        assert service.requests == 2
        assert driver.interrupts == [1, 0]
        assert driver.status == DRDY | DSC
        assert driver.memory.data[0x10000:0x11000] == CONTENT[3 * SECTOR : 11 * SECTOR]

    def test_another_table_in_between(self, driver: Driver, loop: Loop) -> None:
        driver.table([(0x10000, 4096)])
        driver.command(0xC8, lba=3, count=8)
        driver.start(to_memory=True)
        driver.stop()
        driver.table([(0x20000, 4096)])
        driver.start(to_memory=True)
        loop.serve(2)
        assert driver.status == DRDY | DSC
        assert driver.memory.data[0x20000:0x21000] == CONTENT[3 * SECTOR : 11 * SECTOR]
        assert driver.bus_master(2) & 7 == 4

    def test_a_reset_in_between(self, driver: Driver, loop: Loop) -> None:
        driver.table([(0x10000, 4096)])
        driver.command(0xC8, lba=3, count=8)
        driver.start(to_memory=True)
        driver.ide.write(8, 1, 4)
        driver.ide.write(8, 1, 0)
        loop.serve(1)
        assert driver.interrupts == [0, 0]
        assert driver.status == DRDY | DSC

    def test_a_table_of_the_smallest_parts_is_copied(self, driver: Driver, loop: Loop) -> None:
        driver.table([(0x10000 + 4 * n, 2) for n in range(1280)])
        driver.command(0xC8, lba=0, count=5)
        driver.start(to_memory=True)
        loop.serve(1)
        assert driver.status == DRDY | DSC
        assert bytes(driver.memory.data[0x10000 + 4 * n + 1] for n in range(1280)) == CONTENT[1 : 5 * SECTOR : 2]
