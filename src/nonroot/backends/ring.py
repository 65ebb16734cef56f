"""Xen's shared rings: requests one way, responses the other, in pages that both ends write.

The other end may write anything at any time. Every entry is copied out of the ring before it is looked at; indices
are read once each and checked; an end whose indices cannot be right raises :class:`RingError`, which ends the
connection. The work done for one look at the ring is bounded by its size.

Layout: a header of 64 bytes, req_prod, req_event, rsp_prod, rsp_event; then as many slots as fit, rounded down to a
power of two. Source: xen/include/public/io/ring.h.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

from nonroot._engine import Memory

__all__ = ["HEADER_BYTES", "BackRing", "FrontRing", "RingError", "Turn", "journal_bytes", "ring_slots"]

HEADER_BYTES: Final = 64
PAGE: Final = 4096
JOURNAL_HEAD: Final = 8
"""Bytes: how many responses, from which index on; the first word is written last, and is 0 when all is published."""
_MASK: Final = 0xFFFFFFFF
REQ_PROD, REQ_EVENT, RSP_PROD, RSP_EVENT = range(4)

_fence_lock = threading.Lock()


def _fence() -> None:
    """A full memory barrier, between a store and a load of the other's: taking a lock is an atomic operation."""
    with _fence_lock:
        pass


class RingError(Exception):
    """The other end has broken the ring's rules. One sentence."""


class Turn:
    """
    Whose turn a ring is that the engine serves, too, where that waits for nothing: two words of shared memory.

    The first says who serves it: nobody, the engine, or us; the second is the index of the first request without a
    response. The ring of a process that died in its turn stays the processes': the next one takes it up.
    """

    FREE: Final = 0
    ENGINE: Final = 1
    BACKEND: Final = 2

    def __init__(self, memory: Memory, backing: int, at: int = 0) -> None:
        """``at``: where the words are in that backing."""
        self._memory, self._backing, self._at = memory, backing, at

    def take(self) -> None:
        """Wait until it is ours; the engine takes as long as it copies."""
        exchange, backing, at = self._memory.compare_exchange, self._backing, self._at
        while exchange(backing, at, self.FREE, self.BACKEND) not in (self.FREE, self.BACKEND):
            time.sleep(20e-6)

    def give(self) -> None:
        """It is nobody's."""
        self._memory.compare_exchange(self._backing, self._at, self.BACKEND, self.FREE)

    @property
    def is_lent(self) -> bool:
        """Whether the engine has it."""
        return self._memory.compare_exchange(self._backing, self._at, 0, 0) == self.ENGINE

    @property
    def index(self) -> int:
        """Of the first request without a response."""
        return self._memory.compare_exchange(self._backing, self._at + 4, 0, 0)

    @index.setter
    def index(self, value: int) -> None:
        self._memory.compare_exchange(self._backing, self._at + 4, self.index, value)


def journal_bytes(pages: int) -> int:
    """Memory for the journal of a ring in ``pages`` pages."""
    return JOURNAL_HEAD + pages * PAGE


def ring_slots(pages: int, slot_bytes: int) -> int:
    """Slots of a ring in ``pages`` pages."""
    return 1 << ((pages * PAGE - HEADER_BYTES) // slot_bytes).bit_length() - 1


class _Slots:
    """The pages as one space, and the header's words as single loads and stores."""

    def __init__(self, pages: Sequence[memoryview], request_bytes: int, response_bytes: int) -> None:
        self._slot = max(request_bytes, response_bytes)
        self._request, self._response = request_bytes, response_bytes
        self._pages = list(pages)
        self.words = pages[0].cast("I")
        self.size = ring_slots(len(pages), self._slot)
        """Slots."""

    def read(self, index: int, length: int) -> bytes:
        """A copy of a slot's beginning."""
        at = HEADER_BYTES + (index & self.size - 1) * self._slot
        page, offset = at // PAGE, at % PAGE
        data = bytes(self._pages[page][offset : offset + length])
        if len(data) < length:  # it goes on in the next page
            data += bytes(self._pages[page + 1][: length - len(data)])
        return data

    def write(self, index: int, data: bytes) -> None:
        at = HEADER_BYTES + (index & self.size - 1) * self._slot
        page, offset = at // PAGE, at % PAGE
        room = min(len(data), PAGE - offset)
        self._pages[page][offset : offset + room] = data[:room]
        if room < len(data):
            self._pages[page + 1][: len(data) - room] = data[room:]

    def release(self) -> None:
        """Let the pages go."""
        self.words.release()
        self._pages.clear()


class BackRing(_Slots):
    """The backend's end. For one thread."""

    def __init__(
        self,
        pages: Sequence[memoryview],
        request_bytes: int,
        response_bytes: int,
        journal: memoryview | None = None,
        turn: Turn | None = None,
        standby: bool = False,
    ) -> None:
        """
        Attach to a ring in ``pages`` (4096 bytes each, writable).

        Requests without a response count as new: a backend that takes over from a dead one does them again. RingError
        if the indices cannot be right. ``journal``: :func:`journal_bytes` of memory, zeros at first, that outlives this
        process: a response takes the place of its request in the ring before it is published, and who takes over
        finds there what was being published. ``turn``: if the engine serves the ring, too. ``standby``: if
        it alone does so far: :meth:`resume` is called before anything else.
        """
        self._turn = turn
        if turn is not None:
            turn.take()
        super().__init__(pages, request_bytes, response_bytes)
        self._ready: list[bytes] = []
        self._journal = journal
        self._journal_words = None if journal is None else journal[:JOURNAL_HEAD].cast("I")
        self._published = self.words[RSP_PROD]
        self._recover()
        self._consumed = self._produced = self._published
        if turn is not None:
            turn.index = self._consumed
            turn.give()
        if not standby:
            self.pending()

    def _recover(self) -> None:
        """Publish what a dead backend was about to publish."""
        if self._journal is None or self._journal_words is None:
            return
        count, base = self._journal_words[0], self._journal_words[1]
        if count and count <= self.size and base == self._published:
            for number in range(count):
                at = JOURNAL_HEAD + number * self._response
                self.write(base + number & _MASK, bytes(self._journal[at : at + self._response]))
            self._published = self.words[RSP_PROD] = base + count & _MASK
        self._journal_words[0] = 0

    def resume(self) -> None:
        """Go on where somebody else has ended, who had no requests without a response. RingError."""
        self._consumed = self._produced = self._published = self.words[RSP_PROD]
        self.pending()

    def in_turn(self, step: Callable[[], bool]) -> bool:
        """Do a ``step`` that answers what it takes, when it is our turn. RingError; then the turn stays ours."""
        turn = self._turn
        assert turn is not None
        turn.take()
        self._consumed = self._produced = self._published = turn.index
        more = step()
        turn.index = self._consumed
        turn.give()
        return more

    def pending(self) -> int:
        """Requests that have not been taken. RingError if there are more than the ring can hold."""
        count = self.words[REQ_PROD] - self._consumed & _MASK
        unanswered = self._consumed - self._produced & _MASK
        if count > self.size - unanswered:
            raise RingError(
                f"the frontend's ring overflows: {count} requests and {unanswered} without a response, "
                f"in {self.size} slots"
            )
        return count

    def take(self) -> bytes:
        """A copy of the next request, which there must be."""
        data = self.read(self._consumed, self._request)
        self._consumed = self._consumed + 1 & _MASK
        return data

    def respond(self, data: bytes) -> None:
        """Add a response; nobody sees it before :meth:`push`."""
        self._ready.append(data)
        self._produced = self._produced + 1 & _MASK

    def push(self) -> bool:
        """Publish the responses; whether the other end wants to be notified."""
        old, new = self._published, self._produced
        if old == new:
            return False
        words = self._journal_words
        if words is not None and self._journal is not None:
            data = b"".join(self._ready)
            self._journal[JOURNAL_HEAD : JOURNAL_HEAD + len(data)] = data
            words[1] = old
            words[0] = len(self._ready)
        for number, response in enumerate(self._ready):
            self.write(old + number & _MASK, response)
        self._ready.clear()
        self._published = self.words[RSP_PROD] = new
        if words is not None:
            words[0] = 0
        _fence()
        return (new - self.words[RSP_EVENT] & _MASK) < (new - old & _MASK)

    @property
    def unpublished(self) -> bool:
        """Whether there are responses that have not been published."""
        return bool(self._ready)

    def final_check(self, wanted: int = 1) -> bool:
        """Ask to be notified when there are ``wanted`` requests; whether there are as many already. RingError."""
        if self.pending() >= wanted:
            return True
        self.words[REQ_EVENT] = self._consumed + wanted & _MASK
        _fence()
        return self.pending() >= wanted


class FrontRing(_Slots):
    """The frontend's end: the mirror image. For one thread."""

    def __init__(self, pages: Sequence[memoryview], request_bytes: int, response_bytes: int) -> None:
        """Make an empty ring in ``pages``."""
        super().__init__(pages, request_bytes, response_bytes)
        self.words[REQ_PROD] = self.words[RSP_PROD] = 0
        self.words[REQ_EVENT] = self.words[RSP_EVENT] = 1
        self._produced = self._published = self._consumed = 0

    def free(self) -> int:
        """Requests that fit."""
        return self.size - (self._produced - self._consumed & _MASK)

    def request(self, data: bytes) -> None:
        """Add a request; there must be a free slot."""
        self.write(self._produced, data)
        self._produced = self._produced + 1 & _MASK

    def push(self) -> bool:
        """Publish the requests; whether the other end wants to be notified."""
        old, new = self._published, self._produced
        if old == new:
            return False
        self._published = self.words[REQ_PROD] = new
        _fence()
        return (new - self.words[REQ_EVENT] & _MASK) < (new - old & _MASK)

    def pending(self) -> int:
        """Responses that have not been taken. RingError if there are more than requests."""
        count = self.words[RSP_PROD] - self._consumed & _MASK
        if count > (self._published - self._consumed & _MASK):
            raise RingError(f"the backend's ring overflows: {count} responses")
        return count

    def take(self) -> bytes:
        """A copy of the next response, which there must be."""
        data = self.read(self._consumed, self._response)
        self._consumed = self._consumed + 1 & _MASK
        return data

    def final_check(self) -> bool:
        """Ask to be notified of the next response; whether there is one already."""
        if self.pending():
            return True
        self.words[RSP_EVENT] = self._consumed + 1 & _MASK
        _fence()
        return self.pending() > 0
