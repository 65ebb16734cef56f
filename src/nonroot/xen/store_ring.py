"""The ring between the guest and XenStore, as a stream of bytes for whatever serves the store.

Ring: req[1024] at 0, rsp[1024] at 1024, then req_cons, req_prod, rsp_cons, rsp_prod, server_features, connection,
error (32 bits each). Source: Xen's public/io/xs_wire.h, docs/misc/xenstore-ring.txt.
"""

from collections.abc import Callable
from typing import Any, Final

from nonroot.saved.fields import Fields
from nonroot.xen.memory import Page, Words
from nonroot.xen.ring import ByteRing

__all__ = ["StoreRing"]

REQ: Final = 0
RSP: Final = 1024
SIZE: Final = 1024
REQ_CONS: Final = 2048
REQ_PROD: Final = 2052
RSP_CONS: Final = 2056
RSP_PROD: Final = 2060
CONNECTION: Final = 2068
CONNECTED: Final = 0
NOT_CONNECTED: Final = 1
MAXIMUM_WAITING: Final = 1 << 18
"""With more replies than this waiting for room, no further requests are taken."""


class StoreRing:
    """The store's end. In the vCPU's thread, but ``deliver`` through the host."""

    def __init__(self, words: Words, page: Page, view: memoryview) -> None:
        self.notify: Callable[[], object] = _nobody
        """Tells the guest; set when the event channel is bound."""
        self._feed: Callable[[bytes], object] | None = None
        self._room: Callable[[], bool] = lambda: True
        self._words = words
        self._page = page
        self._requests = ByteRing(words, view[REQ : REQ + SIZE], page.plus(REQ_PROD), page.plus(REQ_CONS))
        self._replies = ByteRing(words, view[RSP : RSP + SIZE], page.plus(RSP_PROD), page.plus(RSP_CONS))
        self._waiting = bytearray()

    def attach(self, feed: Callable[[bytes], object], room: Callable[[], bool]) -> None:
        """``feed`` takes the guest's bytes from now on, while there is ``room``."""
        self._feed, self._room = feed, room
        self._words.store(self._page.plus(CONNECTION), CONNECTED)
        self.event()

    def reset(self) -> None:
        """The guest starts again."""
        self._waiting.clear()

    def saved(self) -> dict[str, Any]:
        """What is not in the ring."""
        return {"waiting": self._waiting.hex()}

    def restore(self, record: Fields) -> None:
        """As :meth:`saved` found it. StateError."""
        self._waiting[:] = record.data("waiting", 2 * MAXIMUM_WAITING)

    def event(self) -> None:
        """The guest has made a request, or read a reply."""
        self._push()
        if self._feed is None:
            return
        while self._room() and len(self._waiting) < MAXIMUM_WAITING and (data := self._requests.take()):
            self.notify()
            self._feed(data)

    def deliver(self, data: bytes) -> None:
        """Bytes of the store for the guest."""
        self._waiting += data
        self.event()

    def _push(self) -> None:
        done = self._replies.put(self._waiting)
        if done:
            del self._waiting[:done]
            self.notify()


def _nobody() -> None:
    pass
