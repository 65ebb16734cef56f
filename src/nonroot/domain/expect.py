"""The console of a domain, as a client sees it: bytes to read, patterns to wait for, keys to send."""

import re
import threading
import time
from collections.abc import Callable

from nonroot.domain.console import printable
from nonroot.errors import NonrootError, WaitTimeoutError

__all__ = ["Console"]


class Console:
    """The guest's first serial port. All methods can be called from any thread."""

    LIMIT = 4 << 20
    """Bytes kept; of more, the oldest go and :attr:`dropped` counts them."""

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self.dropped = 0
        self.listener: Callable[[bytes], None] | None = None
        """Called with all output as it comes, in the client's reader thread."""
        self._send = send
        self._buffer = bytearray()
        self._read = 0  # the part of the buffer before it has been read
        self._changed = threading.Condition()
        self._ended: NonrootError | None = None

    def write(self, data: str | bytes) -> None:
        """Type ``data`` (text is sent as UTF-8) on the guest's console."""
        self._send(data.encode() if isinstance(data, str) else bytes(data))

    def read(self, timeout: float | None = 0.0) -> bytes:
        """What has come since the last read or match.

        If that is nothing, waits up to ``timeout`` seconds (None: until something comes or the domain ends).
        """
        with self._changed:
            self._changed.wait_for(lambda: self._read < len(self._buffer) or self._ended is not None, timeout)
            data = bytes(self._buffer[self._read :])
            self._read = len(self._buffer)
            return data

    def expect(self, pattern: str | bytes | re.Pattern[bytes], timeout: float = 60.0) -> re.Match[bytes]:
        """Wait until unread output matches ``pattern`` (a regular expression; text is encoded as UTF-8).

        What is before the end of the match counts as read. WaitTimeoutError after ``timeout`` seconds; if the domain
        ends first, the error that says how.
        """
        expression = pattern if isinstance(pattern, re.Pattern) else re.compile(_encode(pattern))
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                match = expression.search(bytes(self._buffer[self._read :]))
                if match is not None:
                    self._read += match.end()
                    return match
                if self._ended is not None:
                    raise self._ended
                left = deadline - time.monotonic()
                if left <= 0:
                    shown = expression.pattern.decode("utf-8", "replace")
                    raise WaitTimeoutError(
                        f"the console did not show {shown!r} in {timeout:g} seconds", console=self._tail()
                    )
                self._changed.wait(left)

    @property
    def text(self) -> str:
        """All output that is kept, as text without control characters."""
        with self._changed:
            return printable(bytes(self._buffer))

    def _tail(self) -> str:
        return "\n".join(printable(bytes(self._buffer[-4000:])).splitlines()[-12:])

    def feed(self, data: bytes) -> None:
        """Output has come (called by the client)."""
        if self.listener is not None:
            self.listener(data)
        with self._changed:
            self._buffer += data
            excess = len(self._buffer) - self.LIMIT
            if excess > self.LIMIT // 4:
                del self._buffer[:excess]
                self._read = max(0, self._read - excess)
                self.dropped += excess
            self._changed.notify_all()

    def end(self, error: NonrootError) -> None:
        """No more will come (called by the client)."""
        with self._changed:
            self._ended = error
            self._changed.notify_all()


def _encode(pattern: str | bytes) -> bytes:
    return pattern.encode() if isinstance(pattern, str) else pattern
