"""The thread that does a drive's I/O, and the way its answers come back to the vCPU's thread.

In real time an answer is handed over as soon as it is there. A read of what the host has in its page cache is done
without the thread, and straight to where the data belongs if the request says where. In virtual time an answer arrives
exactly ``latency_ns`` after the guest asked: the vCPU's thread waits for the worker if it is late, so two runs are the
same.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Final

from nonroot.backends.image import Image
from nonroot.devices.block import SECTOR, BlockDone, BlockOp, BlockRequest, BlockResult, BlockStatus
from nonroot.hvm.device import Clock

__all__ = ["LATENCY_NS", "BlockService", "perform"]

LATENCY_NS: Final = 10_000
"""A request's time in virtual time."""

SMALL: Final = 256 << 10
"""Bytes that are read in the vCPU's thread at most, where they are copied."""

Post = Callable[[Callable[[], object]], object]

_STATUS: Final = {
    errno.ENOSPC: BlockStatus.NO_SPACE,
    errno.EDQUOT: BlockStatus.NO_SPACE,
    errno.EFBIG: BlockStatus.NO_SPACE,
    errno.EROFS: BlockStatus.READ_ONLY,
}


def perform(image: Image, request: BlockRequest) -> BlockResult:
    """Do a request now. Every failure is a status."""
    offset, length = request.offset, request.length
    try:
        if request.op is BlockOp.FLUSH:
            image.flush()
            return BlockResult()
        if offset < 0 or length < 0 or offset + length > image.size + (-image.size % 2048):
            return BlockResult(BlockStatus.OUT_OF_RANGE)
        if request.op is BlockOp.WRITE:
            if image.read_only:
                return BlockResult(BlockStatus.READ_ONLY)
            if offset + len(request.data) > image.size:
                return BlockResult(BlockStatus.OUT_OF_RANGE)
            image.write(offset, request.data)
            return BlockResult()
        inside = min(length, max(0, image.size - offset))  # a CD's last sector may be cut short
        data = image.read(offset, inside)
        if len(data) < inside:
            return BlockResult(BlockStatus.IO_ERROR, data[: len(data) - len(data) % SECTOR])
        return BlockResult(BlockStatus.OK, data if inside == length else data.ljust(length, b"\0"))
    except OSError as error:
        return BlockResult(_STATUS.get(error.errno or 0, BlockStatus.IO_ERROR))


class BlockService:
    """A medium for a device: requests go to one worker thread, in order. Idle, it costs nothing."""

    def __init__(self, image: Image, post: Post, clock: Clock | None = None, latency_ns: int | None = None) -> None:
        """``post`` has a callable called in the vCPU's thread. ``latency_ns`` (with ``clock``): virtual time."""
        self.image = image
        self._post = post
        self._clock = clock
        self._latency = latency_ns
        self._queue: SimpleQueue[tuple[BlockRequest, Callable[[BlockResult], object]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._due: deque[tuple[int, _Answer, BlockDone]] = deque()
        self.requests = 0
        """Requests so far."""
        self.at_once = 0
        """Those of them that were answered without the worker."""
        self._given = 0
        self._worked = 0  # the worker's: equal to the one above if it has nothing to do
        self._tries = latency_ns is None and hasattr(os, "preadv") and hasattr(os, "RWF_NOWAIT")

    @property
    def size(self) -> int:
        """Bytes."""
        return self.image.size

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""
        return self.image.read_only

    def submit(self, request: BlockRequest, done: BlockDone) -> None:
        """Start a request. In the vCPU's thread."""
        self.requests += 1
        if self._tries and request.op is BlockOp.READ and self._given == self._worked:
            result = self._read_at_once(request)
            if result is not None:
                self.at_once += 1
                self._post(lambda: done(result))
                return
        self._given += 1
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="nonroot-block", daemon=True)
            self._thread.start()
        if self._latency is None:
            post = self._post
            self._queue.put((request, lambda result: post(lambda: done(result))))
            return
        answer = _Answer()
        self._due.append((request.issued_ns + self._latency, answer, done))
        self._queue.put((request, answer.set))
        if self._clock is not None:
            self._clock.rearm()

    def _read_at_once(self, request: BlockRequest) -> BlockResult | None:
        """The result of a read whose data the host has at hand; None otherwise, also after an error."""
        offset, length, place = request.offset, request.length, request.place
        if length <= 0 or (place is None and length > SMALL):
            return None
        descriptor = self.image.descriptor(offset, length)
        if descriptor is None:
            return None
        if place is not None:
            count = place(descriptor, offset)
            self._tries = count >= 0
            return BlockResult(placed=length) if count == length else None
        buffer = bytearray(length)
        try:
            count = os.preadv(descriptor, (buffer,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            return None
        except OSError:
            self._tries = False
            return None
        return BlockResult(BlockStatus.OK, bytes(buffer)) if count == length else None

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            request, finished = item
            result = perform(self.image, request)
            self._worked += 1
            finished(result)

    def settle(self) -> None:
        """Return when all that was asked for has been done, and what was written is on stable storage.

        In the vCPU's thread. OSError if it cannot be put there.
        """
        if self._thread is not None:
            done = threading.Event()
            self._given += 1
            self._queue.put((BlockRequest(BlockOp.FLUSH), lambda result: done.set()))
            done.wait()
        self.image.flush()

    def close(self) -> None:
        """End the worker after what it has been given, and close the image."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        self.image.close()

    # ── virtual time ──

    def deadline(self) -> int | None:
        """When the next answer arrives (machine time, ns)."""
        return self._due[0][0] if self._due else None

    def advance(self, now_ns: int) -> None:
        """Answers that are due arrive; one that is not there yet is waited for."""
        while self._due and self._due[0][0] <= now_ns:
            _, answer, done = self._due.popleft()
            done(answer.wait())


class _Answer:
    """A result to come."""

    __slots__ = ("_there", "_value")

    def __init__(self) -> None:
        self._there = threading.Event()
        self._value = BlockResult()

    def set(self, value: BlockResult) -> None:
        self._value = value
        self._there.set()

    def wait(self) -> BlockResult:
        self._there.wait()
        return self._value
