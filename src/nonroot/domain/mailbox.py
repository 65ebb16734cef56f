"""From the vCPU's thread to the loop of the domain's process: a queue of limited size with a descriptor to wait on."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

__all__ = ["Mailbox"]


class Mailbox:
    """Items are (kind, content). ``post`` waits while more than ``limit`` bytes are in it."""

    def __init__(self, limit: int = 1 << 20) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable while there is mail."""
        self._limit = limit
        self._items: deque[tuple[str, Any, int]] = deque()
        self._size = 0
        self._changed = threading.Condition()
        self._closed = False

    def post(self, kind: str, content: Any = None, size: int = 0) -> None:
        """Add an item that counts as ``size`` bytes."""
        with self._changed:
            if size:
                self._changed.wait_for(lambda: self._size < self._limit or self._closed)
            empty = not self._items
            self._items.append((kind, content, size))
            self._size += size
            if empty:
                os.eventfd_write(self.fd, 1)

    def take(self) -> Iterator[tuple[str, Any]]:
        """All items that are there now."""
        with self._changed:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
            items, self._items = self._items, deque()
        for kind, content, size in items:
            yield kind, content
            if size:
                with self._changed:
                    self._size -= size
                    self._changed.notify_all()

    def close(self) -> None:
        """Nobody will wait for room any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
