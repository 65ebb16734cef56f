"""What an image is: bytes that can be read, written and flushed by a worker thread."""

from typing import Final, Protocol

from nonroot.devices.block import SECTOR

__all__ = ["Image", "whole_sectors"]


class Image(Protocol):
    """A medium of fixed size. One thread at a time uses it; everything may block, and raises OSError."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512; the last sector of a file that ends in the middle of one counts whole."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the medium. Fewer than asked for: what follows cannot be read. OSError if that is so at once."""

    def descriptor(self, offset: int, length: int) -> int | None:
        """A file that has these bytes at the same offset, to read while nothing else is done; None: there is none."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of ``data``. OSError: some of it may have been written."""

    def flush(self) -> None:
        """Return when everything written is on stable storage."""

    def close(self) -> None:
        """Give the file, its lock and helpers back. Safe to call again."""


def whole_sectors(size: int) -> int:
    """``size`` bytes, rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


MAXIMUM: Final = 1 << 57
"""Bytes of the largest medium: 48-bit sector numbers."""
