"""A split virtqueue as the device sees it: descriptors to take, and used elements to give back.

Everything here lies in guest memory and is hostile: it is copied once, then checked; what cannot be right raises
:class:`VirtqueueError`, after which the device asks for a reset. The work for one request is bounded.

Source: Virtual I/O Device (VIRTIO) version 1.2, chapter 2.7.
"""

import struct
from dataclasses import dataclass
from typing import Final, Protocol

__all__ = ["Chain", "QueueMemory", "QueuePlace", "SplitQueue", "VirtqueueError"]

DESCRIPTOR_BYTES: Final = 16
HAS_NEXT: Final = 1 << 0
WRITABLE: Final = 1 << 1
INDIRECT: Final = 1 << 2

NO_INTERRUPT: Final = 1 << 0
"""In the driver's area: it looks by itself."""
NO_NOTIFY: Final = 1 << 0
"""In the device's area: we look by ourselves."""

MOST_SEGMENTS: Final = 2048
"""Of one chain: Linux 5.10 makes chains longer than the queue by an indirect table."""

_DESCRIPTOR: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_U16: Final = struct.Struct("<H")


class VirtqueueError(Exception):
    """The driver has broken the queue's rules. One sentence."""


class QueueMemory(Protocol):
    """Guest memory as the device reaches it. Nothing raises."""

    def dma_read(self, address: int, length: int) -> bytes:
        """Guest-physical bytes; all ones where there is no RAM."""

    def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest-physical bytes; lost where there is no RAM."""


@dataclass(frozen=True, slots=True)
class QueuePlace:
    """Where the driver has put a queue: guest-physical addresses of its three parts."""

    size: int
    """Entries, a power of two."""
    descriptors: int
    driver: int
    """The available ring."""
    device: int
    """The used ring."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One request: what the device may read, then what it may write, as (address, bytes)."""

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]

    @property
    def length(self) -> int:
        """Bytes to read."""
        return sum(size for _, size in self.readable)

    @property
    def room(self) -> int:
        """Bytes that may be written."""
        return sum(size for _, size in self.writable)


class SplitQueue:
    """The device's end. For one thread at a time."""

    def __init__(self, memory: QueueMemory, place: QueuePlace, taken: int = 0, used: int = 0) -> None:
        """``taken``, ``used``: where an earlier end of the same queue had got to, modulo 2**16."""
        self._memory = memory
        self.place = place
        self.taken = taken
        """Chains taken so far, modulo 2**16."""
        self.used = used
        """Chains given back so far, modulo 2**16."""
        self._published = used

    def pending(self) -> int:
        """Chains that can be taken. VirtqueueError if there are more than the queue can hold."""
        (index,) = _U16.unpack(self._memory.dma_read(self.place.driver + 2, 2))
        count: int = index - self.taken & 0xFFFF
        if count > self.place.size:
            raise VirtqueueError(f"the driver offers {count} requests in a queue of {self.place.size}")
        return count

    def take(self) -> Chain:
        """The next chain, which there must be. VirtqueueError."""
        place = self.place
        slot = place.driver + 4 + 2 * (self.taken & place.size - 1)
        (head,) = _U16.unpack(self._memory.dma_read(slot, 2))
        self.taken = self.taken + 1 & 0xFFFF
        return self._chain(head)

    def _chain(self, head: int) -> Chain:
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        table = b""
        index, indirect, left = head, False, self.place.size
        while True:
            address, length, flags, following = self._descriptor(table, index, indirect)
            if flags & INDIRECT:
                if indirect or flags & (HAS_NEXT | WRITABLE):
                    raise VirtqueueError("an indirect descriptor lies where none may be")
                left, remainder = divmod(length, DESCRIPTOR_BYTES)
                if remainder or not 0 < left <= MOST_SEGMENTS:
                    raise VirtqueueError(f"a table of descriptors has {length} bytes")
                table = self._memory.dma_read(address, length)
                index, indirect = 0, True
                continue
            if flags & WRITABLE:
                writable.append((address, length))
            elif writable:
                raise VirtqueueError("a descriptor to read comes after one to write")
            else:
                readable.append((address, length))
            if not flags & HAS_NEXT:
                return Chain(head, readable, writable)
            index = following
            left -= 1
            if left <= 0:
                raise VirtqueueError("a chain of descriptors is longer than its table")

    def _descriptor(self, table: bytes, index: int, indirect: bool) -> tuple[int, int, int, int]:
        if indirect:
            if (index + 1) * DESCRIPTOR_BYTES > len(table):
                raise VirtqueueError(f"a table of descriptors has no entry {index}")
            return _DESCRIPTOR.unpack_from(table, index * DESCRIPTOR_BYTES)
        if index >= self.place.size:
            raise VirtqueueError(f"a queue of {self.place.size} has no descriptor {index}")
        at = self.place.descriptors + index * DESCRIPTOR_BYTES
        return _DESCRIPTOR.unpack(self._memory.dma_read(at, DESCRIPTOR_BYTES))

    def read(self, chain: Chain) -> bytes:
        """All that the device may read of a chain; mind :attr:`Chain.length` before."""
        read = self._memory.dma_read
        return b"".join([read(address, size) for address, size in chain.readable])

    def write(self, chain: Chain, data: memoryview) -> int:
        """Put ``data`` into a chain as far as there is room; the bytes written."""
        done = 0
        for address, size in chain.writable:
            piece = data[done : done + size]
            if not piece:
                break
            self._memory.dma_write(address, piece)
            done += len(piece)
        return done

    def give_back(self, chain: Chain, written: int) -> None:
        """Return a chain; the driver sees it after :meth:`publish`."""
        slot = self.place.device + 4 + 8 * (self.used & self.place.size - 1)
        self._memory.dma_write(slot, _USED.pack(chain.head, written))
        self.used = self.used + 1 & 0xFFFF

    def publish(self) -> bool:
        """Show what was given back; whether the driver wants an interrupt for it."""
        if self._published == self.used:
            return False
        self._published = self.used
        self._memory.dma_write(self.place.device + 2, _U16.pack(self.used))
        (flags,) = _U16.unpack(self._memory.dma_read(self.place.driver, 2))
        return not flags & NO_INTERRUPT

    def set_notifications(self, wanted: bool) -> None:
        """Whether the driver is to notify us of new chains; look at :meth:`pending` once more after switching on."""
        self._memory.dma_write(self.place.device, _U16.pack(0 if wanted else NO_NOTIFY))
