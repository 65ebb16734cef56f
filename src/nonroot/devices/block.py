"""What a storage device asks of the thing behind it: reads, writes and flushes that complete later.

A device submits one request at a time and is told of its end in its own thread, never from within ``submit``. The thing
behind it may be a file, a process, or another domain; the device sees bytes and a status, and no files.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Protocol

__all__ = ["SECTOR", "BlockDone", "BlockOp", "BlockPort", "BlockRequest", "BlockResult", "BlockStatus", "Place"]

SECTOR: Final = 512
"""Bytes; offsets and lengths of requests are multiples of it."""


class BlockOp(IntEnum):
    """What is asked for."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    """All writes that have completed are on stable storage when it completes."""


class BlockStatus(IntEnum):
    """How a request ended."""

    OK = 0
    IO_ERROR = 1
    NO_SPACE = 2
    READ_ONLY = 3
    OUT_OF_RANGE = 4


Place = Callable[[int, int], int]
"""Takes a host file's descriptor and an offset, and puts what the host has at hand there where it belongs.

Returns how many bytes from the start arrived, -1 if this file cannot be read so.
"""


@dataclass(frozen=True, slots=True)
class BlockRequest:
    """One request. ``offset`` and ``length`` are bytes."""

    op: BlockOp
    offset: int = 0
    length: int = 0
    data: bytes = b""
    """What to write; ``length`` bytes."""
    issued_ns: int = 0
    """Machine time at which the guest asked: completions at a fixed latency count from here."""
    place: Place | None = None
    """A read's way to where the data belongs, without passing through the device. It may be used or not, before
    ``submit`` returns; ``length`` bytes."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The end of a request."""

    status: BlockStatus = BlockStatus.OK
    data: bytes = b""
    """What was read. With an error: the bytes before the place that cannot be read, maybe none."""
    placed: int = 0
    """Bytes, if all of a read went to the request's ``place``; ``data`` is empty then."""


BlockDone = Callable[[BlockResult], object]


class BlockPort(Protocol):
    """A medium: a disk, a CD, a floppy."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of :data:`SECTOR`."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    def submit(self, request: BlockRequest, done: BlockDone) -> None:
        """Start a request; ``done`` is called later, in the device's thread. Nothing raises."""

    def deadline(self) -> int | None:
        """When the next answer arrives (machine time, ns), in virtual time; None in real time."""

    def advance(self, now_ns: int) -> None:
        """Let the answers arrive that are due, in virtual time."""
