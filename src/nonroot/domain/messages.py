"""What the hypervisor says of a domain: its last messages, for ``nonroot dmesg``."""

import time
from collections import deque
from typing import Final

__all__ = ["KEPT", "MessageLog"]

KEPT: Final = 500
"""Messages."""
_LONGEST: Final = 500


class MessageLog:
    """The last messages, each with the seconds since the log began."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._kept: deque[tuple[float, str]] = deque(maxlen=KEPT)

    def say(self, text: str) -> None:
        """A new message: one line of our own words."""
        self._kept.append((time.monotonic() - self._began, text[:_LONGEST]))

    def to_wire(self) -> list[tuple[float, str]]:
        """(seconds, text) of each, oldest first."""
        return [(round(seconds, 6), text) for seconds, text in self._kept]
