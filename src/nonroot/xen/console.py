"""The primary paravirtual console, hvc0: a ring in a shared page, and its backend.

Ring: in[1024] at 0, out[2048] at 1024, then in_cons, in_prod, out_cons, out_prod (32 bits each, free-running).
Source: Xen's public/io/console.h.
"""

from collections.abc import Callable
from typing import Any, Final

from nonroot.saved.fields import Fields
from nonroot.xen.memory import Page, Place, Words
from nonroot.xen.ring import ByteRing

__all__ = ["ConsoleRing"]

IN: Final = 0
IN_SIZE: Final = 1024
OUT: Final = 1024
OUT_SIZE: Final = 2048
IN_CONS: Final = 3072
IN_PROD: Final = 3076
OUT_CONS: Final = 3080
OUT_PROD: Final = 3084
MAXIMUM_INPUT: Final = 1 << 20
"""Input beyond this that the guest has not read is dropped."""


class ConsoleRing:
    """The backend of hvc0. In the vCPU's thread."""

    def __init__(self, words: Words, page: Page, view: memoryview, output: Callable[[bytes], object]) -> None:
        """``output`` takes what the guest writes."""
        self.connected = False
        """Whether the guest has used it."""
        self.notify: Callable[[], object] = _nobody
        """Tells the guest; set when the event channel is bound."""
        self._output = output
        self._out = ByteRing(words, view[OUT : OUT + OUT_SIZE], Place(*page).plus(OUT_PROD), page.plus(OUT_CONS))
        self._in = ByteRing(words, view[IN : IN + IN_SIZE], page.plus(IN_PROD), page.plus(IN_CONS))
        self._waiting = bytearray()

    def reset(self) -> None:
        """The guest starts again."""
        self.connected = False
        self._waiting.clear()

    def saved(self) -> dict[str, Any]:
        """What is not in the ring."""
        return {"connected": self.connected, "waiting": self._waiting.hex()}

    def restore(self, record: Fields) -> None:
        """As :meth:`saved` found it. StateError."""
        self.connected = record.flag("connected")
        self._waiting[:] = record.data("waiting", MAXIMUM_INPUT)

    def event(self) -> None:
        """The guest has written something, or read something."""
        while data := self._out.take():
            self.connected = True
            self.notify()
            self._output(data)
        self._feed()

    def input(self, data: bytes) -> None:
        """Keys for the guest."""
        if len(self._waiting) + len(data) <= MAXIMUM_INPUT:
            self._waiting += data
        self._feed()

    def __len__(self) -> int:
        """Bytes of input that the guest has no room for yet."""
        return len(self._waiting)

    def _feed(self) -> None:
        done = self._in.put(self._waiting)
        if done:
            del self._waiting[:done]
            self.notify()


def _nobody() -> None:
    pass
