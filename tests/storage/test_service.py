"""The worker behind a drive: order, threads, virtual time, its end."""

import threading
import time
from collections import deque
from collections.abc import Callable

from nonroot.backends.service import BlockService
from nonroot.devices.block import BlockOp, BlockRequest, BlockResult, BlockStatus
from nonroot.hvm.clock import ManualClock
from tests.storage.parts import FailingImage, pattern


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
            assert self.there.acquire(timeout=10)
            self.posted.popleft()()


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

    before = threading.active_count()
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
    assert threading.active_count() == before + 1
    service.close()
    assert threading.active_count() == before
    assert image.closed


def test_there_is_no_thread_before_the_first_request() -> None:
    before = threading.active_count()
    service = BlockService(FailingImage(bytes(512)), Loop().post)
    assert threading.active_count() == before
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
