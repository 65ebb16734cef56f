"""Between a file system device's queues and the process that serves the folder: a thread that carries requests.

The domain's process does not look into a request beyond its header: its length, its number, and whether it wants an
answer. Numbers are replaced by our own, so that answers find their requests whatever the guest writes. When the server
is gone, every request fails with ENOTCONN, and the guest goes on.
"""

import contextlib
import errno
import os
import select
import signal
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from nonroot.backends.fuse_abi import IN_HEADER, NO_REPLY, OUT_HEADER, error_reply
from nonroot.backends.share_server import LONGEST_REQUEST
from nonroot.devices.virtqueue import Chain, SplitQueue, VirtqueueError

__all__ = ["ShareService"]

LONGEST_REPLY: Final = LONGEST_REQUEST
MOST_WAITING: Final = 256
"""Requests that the server has at one time."""
MOST_UNSENT: Final = 4 << 20
"""Bytes that wait for the server's socket before no more are taken."""
MOST_PARTS: Final = 64
"""Of one sendmsg."""
BURST: Final = 64
"""Requests taken between two looks at the answers."""

MAIN_THREADS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGWINCH, signal.SIGCHLD)
"""Signals that wake nobody if the kernel gives them to this thread."""

_UNIQUE: Final = struct.Struct("<Q")
UNIQUE_AT: Final = 8

Post = Callable[[Callable[[], object]], object]


@dataclass(frozen=True, slots=True)
class _Request:
    queue: SplitQueue
    chain: Chain
    unique: int
    room: int


class ShareService:
    """Stands behind one device; see :class:`nonroot.devices.virtio_pci.VirtioBackend`. Idle, it costs nothing."""

    def __init__(
        self, link: socket.socket, post: Post, interrupt: Callable[[], object], fail: Callable[[], object]
    ) -> None:
        """
        ``link``: the stream to the server, ours from now on. ``post`` has a callable called in the vCPU's thread, where
        ``interrupt`` tells the guest of answers, and ``fail`` that it has broken its queues.
        """
        link.setblocking(False)
        self._link = link
        self._post, self._interrupt, self._fail = post, interrupt, fail
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._lost = False
        self._queues: list[SplitQueue] = []
        self._requests: dict[int, _Request] = {}
        self._number = 0
        self._unsent: deque[bytes | memoryview] = deque()
        self._unsent_bytes = 0
        self._buffer = bytearray(LONGEST_REPLY)
        self._filled = 0
        self.carried = 0
        """Requests so far."""

    # ── the device's, in the vCPU's thread ──

    def started(self, queues: Sequence[SplitQueue | None]) -> None:
        """Begin to serve these queues."""
        with self._lock:
            self._queues = [queue for queue in queues if queue is not None]
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="nonroot-share", daemon=True)
                self._thread.start()
        self._rouse()

    def stopped(self) -> None:
        """Touch the queues no more; answers that come later are thrown away."""
        with self._lock:
            self._queues = []
            self._requests.clear()

    def notified(self, queue: int) -> None:
        """The guest has put something there."""
        self._rouse()

    # ── any thread ──

    def close(self) -> None:
        """The domain is over: the server's stream ends. Safe to call again."""
        self._closing = True
        self._rouse()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._lock:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1
            self._link.close()

    def _rouse(self) -> None:
        if self._wake >= 0:
            with contextlib.suppress(OSError):
                os.eventfd_write(self._wake, 1)

    # ── the thread ──

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, MAIN_THREADS)
        wake = self._wake
        more = False
        while not self._closing:
            poller = select.poll()
            poller.register(wake, select.POLLIN)
            if not self._lost:
                poller.register(self._link, select.POLLIN | (select.POLLOUT if self._unsent else 0))
            poller.poll(0 if more else None)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(wake)
            with self._lock:
                more = self._step()

    def _step(self) -> bool:
        """Carry what there is, both ways; whether there is more to do at once."""
        more = False
        try:
            self._receive()
            self._send()
            more = self._take()
            self._send()
        except (OSError, _BrokenError):
            self._lose()
        except VirtqueueError:
            self._queues = []
            self._requests.clear()
            self._post(self._fail)
            return False
        wanted = False
        for queue in self._queues:
            wanted |= queue.publish()
        if wanted:
            self._post(self._interrupt)
        return more

    def _take(self) -> bool:
        """Requests out of the queues. VirtqueueError."""
        for queue in self._queues:
            if not queue.pending():
                continue  # notifications are on whenever a queue was left empty
            queue.set_notifications(False)
            for _ in range(BURST):
                if not queue.pending():
                    queue.set_notifications(True)
                    _fence()
                    if not queue.pending():
                        break
                    queue.set_notifications(False)
                if len(self._requests) >= MOST_WAITING or self._unsent_bytes >= MOST_UNSENT:
                    return False  # an answer, or room in the socket, wakes us
                self._forward(queue, queue.take())
            else:
                return True
        return False

    def _forward(self, queue: SplitQueue, chain: Chain) -> None:
        self.carried += 1
        length, room = chain.length, chain.room
        if not IN_HEADER.size <= length <= LONGEST_REQUEST:
            self._refuse(queue, chain, 0, errno.EINVAL)
            return
        message = bytearray(queue.read(chain))
        claimed, opcode, unique, *_ = IN_HEADER.unpack_from(message)
        silent = opcode in NO_REPLY
        if claimed != length or len(message) != length:
            self._refuse(queue, chain, unique, errno.EINVAL)
        elif self._lost and not silent:
            self._refuse(queue, chain, unique, errno.ENOTCONN)
        elif silent or room < OUT_HEADER.size:
            if silent and not self._lost:
                self._queue_bytes(bytes(message))
            queue.give_back(chain, 0)
        else:
            self._number += 1
            _UNIQUE.pack_into(message, UNIQUE_AT, self._number)
            self._requests[self._number] = _Request(queue, chain, unique, room)
            self._queue_bytes(bytes(message))

    @staticmethod
    def _refuse(queue: SplitQueue, chain: Chain, unique: int, error: int) -> None:
        written = 0
        if chain.room >= OUT_HEADER.size:
            written = queue.write(chain, memoryview(error_reply(unique, error)))
        queue.give_back(chain, written)

    def _queue_bytes(self, message: bytes) -> None:
        self._unsent.append(message)
        self._unsent_bytes += len(message)

    def _send(self) -> None:
        while self._unsent and not self._lost:
            parts = [self._unsent[index] for index in range(min(len(self._unsent), MOST_PARTS))]
            try:
                sent = self._link.sendmsg(parts)
            except BlockingIOError:
                return
            self._unsent_bytes -= sent
            while self._unsent and sent >= len(self._unsent[0]):
                sent -= len(self._unsent.popleft())
            if sent:
                self._unsent[0] = memoryview(self._unsent[0])[sent:]

    def _receive(self) -> None:
        view = memoryview(self._buffer)
        while not self._lost:
            try:
                received = self._link.recv_into(view[self._filled :])
            except BlockingIOError:
                return
            if not received:
                raise _BrokenError
            self._filled += received
            done = 0
            while self._filled - done >= OUT_HEADER.size:
                length, error, number = OUT_HEADER.unpack_from(view, done)
                if not OUT_HEADER.size <= length <= LONGEST_REPLY:
                    raise _BrokenError
                if self._filled - done < length:
                    break
                self._answer(number, error, view[done : done + length])
                done += length
            if done:
                self._buffer[: self._filled - done] = self._buffer[done : self._filled]
                self._filled -= done

    def _answer(self, number: int, error: int, reply: memoryview) -> None:
        request = self._requests.pop(number, None)
        if request is None:
            return  # the guest has reset the device since
        queue, chain = request.queue, request.chain
        if len(reply) > request.room or (error and len(reply) != OUT_HEADER.size):
            self._refuse(queue, chain, request.unique, errno.EIO)
            return
        _UNIQUE.pack_into(reply, UNIQUE_AT, request.unique)
        queue.give_back(chain, queue.write(chain, reply))

    def _lose(self) -> None:
        """The server is gone."""
        self._lost = True
        self._unsent.clear()
        self._unsent_bytes = 0
        requests, self._requests = self._requests, {}
        for request in requests.values():
            self._refuse(request.queue, request.chain, request.unique, errno.ENOTCONN)
        self._rouse()


class _BrokenError(Exception):
    """The server has ended, or sent what is no answer."""


_fence_lock = threading.Lock()


def _fence() -> None:
    """A full memory barrier between a store and a load: taking a lock is an atomic operation."""
    with _fence_lock:
        pass
