"""One direction of a byte ring in a page that the guest shares: data, and two free-running 32-bit indices."""

from nonroot.xen.memory import Place, Words

__all__ = ["ByteRing"]


class ByteRing:
    """Either end of it. The other end is hostile: indices that cannot be make the ring look empty, or full."""

    def __init__(self, words: Words, data: memoryview, producer: Place, consumer: Place) -> None:
        """``data``: a power of two of bytes. ``producer``, ``consumer``: the places of the indices."""
        self._words = words
        self._data = data
        self._producer = producer
        self._consumer = consumer

    def take(self) -> bytes:
        """As the consumer: all that is there."""
        size = len(self._data)
        producer, consumer = self._words.load(self._producer), self._words.load(self._consumer)
        available = producer - consumer & 0xFFFF_FFFF
        if not 0 < available <= size:
            return b""
        at = consumer % size
        first = bytes(self._data[at : min(at + available, size)])
        taken = first + bytes(self._data[: available - len(first)])
        self._words.store(self._consumer, producer)
        return taken

    def put(self, data: bytes | bytearray) -> int:
        """As the producer: how many bytes fitted."""
        size = len(self._data)
        producer, consumer = self._words.load(self._producer), self._words.load(self._consumer)
        used = producer - consumer & 0xFFFF_FFFF
        if not data or used >= size:
            return 0
        count = min(len(data), size - used)
        at = producer % size
        first = min(count, size - at)
        self._data[at : at + first] = data[:first]
        self._data[: count - first] = data[first:count]
        self._words.store(self._producer, producer + count & 0xFFFF_FFFF)
        return count
