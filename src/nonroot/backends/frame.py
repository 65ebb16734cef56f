"""Ethernet frames between network backends, with the work that their sender left undone.

A message on a link (a SOCK_SEQPACKET Unix socket) is one frame behind a header of four bytes: what is missing. A TCP
frame may be larger than any wire carries (a "superframe"): whoever needs wire-sized frames cuts it by :func:`segment`.

Sources: RFC 791, 8200, 9293, 768, 1071; the flags mean what netif's mean (xen/include/public/io/netif.h).
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

__all__ = [
    "CHECKSUM_BLANK", "DATA_VALIDATED", "GSO_NONE", "GSO_TCP4", "GSO_TCP6", "HEADER_BYTES", "LONGEST_FRAME", "Frame",
    "FrameError", "Merger", "complete", "ones_sum", "segment",
]  # fmt: skip

CHECKSUM_BLANK: Final = 1
"""The TCP or UDP checksum is only the pseudo header's sum; it has to be completed before the frame meets a wire."""
DATA_VALIDATED: Final = 2
"""Nobody need check the TCP or UDP checksum: the data never left the machine's memory."""

GSO_NONE: Final = 0
GSO_TCP4: Final = 1
GSO_TCP6: Final = 2

_HEADER: Final = struct.Struct("<BBH")
HEADER_BYTES: Final = _HEADER.size
LONGEST_FRAME: Final = 14 + 65535
"""Bytes: an Ethernet header and the longest IP packet."""
SHORTEST_FRAME: Final = 14

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_IPV6: Final = 0x86DD
TCP: Final = 6
UDP: Final = 17
TCP_FIN_PSH: Final = 0x09
TCP_ACK: Final = 0x10
TCP_PSH: Final = 0x08
TCP_CWR: Final = 0x80


class FrameError(ValueError):
    """Bytes that are no frame, or a frame that cannot be what its header says."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One Ethernet frame, without its check sequence."""

    data: bytes
    flags: int = 0
    """:data:`CHECKSUM_BLANK`, :data:`DATA_VALIDATED`."""
    gso_type: int = GSO_NONE
    gso_size: int = 0
    """Bytes of TCP payload that one segment may carry, if ``gso_type`` is not :data:`GSO_NONE`."""

    def pack(self) -> bytes:
        """The message for a link."""
        return _HEADER.pack(self.flags, self.gso_type, self.gso_size) + self.data

    @classmethod
    def unpack(cls, message: bytes) -> "Frame":
        """A message from a link. FrameError if it is none."""
        if not HEADER_BYTES + SHORTEST_FRAME <= len(message) <= HEADER_BYTES + LONGEST_FRAME:
            raise FrameError(f"a message of {len(message)} bytes is no frame")
        flags, gso_type, gso_size = _HEADER.unpack_from(message)
        if flags & ~3 or gso_type > GSO_TCP6 or bool(gso_type) != bool(gso_size):
            raise FrameError("a frame's header has flags that do not exist")
        return cls(message[HEADER_BYTES:], flags, gso_type, gso_size)


def ones_sum(data: bytes | bytearray | memoryview) -> int:
    """The ones' complement sum of 16-bit words, 0 to 65535 (0 only for zeros). An odd byte is a high one."""
    number = int.from_bytes(data, "big")
    if len(data) & 1:
        number <<= 8
    return (number % 65535 or 65535) if number else 0


def _checksum(total: int) -> int:
    """The checksum field for a sum of sums."""
    return 65535 - ((total % 65535 or 65535) if total else 0)


@dataclass(frozen=True, slots=True)
class _Transport:
    """Where things are in an IP packet that is whole and no fragment."""

    version: int
    protocol: int
    start: int
    """Offset of the TCP or UDP header."""
    end: int
    """Offset behind the IP packet: Ethernet padding may follow."""
    pseudo: int
    """The sum of the pseudo header's addresses and protocol, without the length."""


def _transport(data: bytes | bytearray | memoryview) -> _Transport | None:
    """The transport header's place. None but for whole TCP or UDP over IPv4, or IPv6 without extensions."""
    if len(data) < 34:
        return None
    ethertype = data[12] << 8 | data[13]
    if ethertype == ETHERTYPE_IPV4:
        header = (data[14] & 15) * 4
        end = 14 + (data[16] << 8 | data[17])
        fragment = (data[20] << 8 | data[21]) & 0x3FFF
        start, protocol = 14 + header, data[23]
        if data[14] >> 4 != 4 or header < 20 or fragment or not start < end <= len(data):
            return None
        addresses = data[26:34]
    elif ethertype == ETHERTYPE_IPV6 and len(data) >= 54 and data[14] >> 4 == 6:
        start, protocol, end = 54, data[20], 54 + (data[18] << 8 | data[19])
        if not start < end <= len(data):
            return None
        addresses = data[22:54]
    else:
        return None
    if protocol not in (TCP, UDP) or end - start < (20 if protocol == TCP else 8):
        return None
    version = 4 if ethertype == ETHERTYPE_IPV4 else 6
    return _Transport(version, protocol, start, end, ones_sum(addresses) + protocol)


def _field(place: _Transport) -> int:
    """Offset of the checksum."""
    return place.start + (16 if place.protocol == TCP else 6)


def complete(frame: Frame) -> Frame:
    """The frame with its TCP or UDP checksum filled in, if it was blank. Others stay as they are."""
    if not frame.flags & CHECKSUM_BLANK:
        return frame
    data = bytearray(frame.data)
    place = _transport(data)
    if place is not None:
        _fill(data, place)
    return Frame(bytes(data), frame.flags & ~CHECKSUM_BLANK, frame.gso_type, frame.gso_size)


def _fill(data: bytearray, place: _Transport) -> None:
    field = _field(place)
    data[field : field + 2] = b"\0\0"
    total = place.pseudo + (place.end - place.start) + ones_sum(memoryview(data)[place.start : place.end])
    value = _checksum(total)
    if value == 0 and place.protocol == UDP:
        value = 65535  # 0 means none
    data[field : field + 2] = value.to_bytes(2, "big")


def _fill_ip(data: bytearray, header_end: int) -> None:
    """An IPv4 header's checksum."""
    data[24:26] = b"\0\0"
    data[24:26] = _checksum(ones_sum(memoryview(data)[14:header_end])).to_bytes(2, "big")


def segment(frame: Frame) -> Iterator[Frame]:
    """A TCP superframe as frames that a wire would carry, checksums filled in; any other frame as it is, completed."""
    if frame.gso_type == GSO_NONE:
        yield complete(frame)
        return
    data = frame.data
    place = _transport(data)
    if place is None or place.protocol != TCP:
        return  # it says that it is TCP, and is not: nobody could cut it
    header_end = place.start + (data[place.start + 12] >> 4) * 4
    if header_end < place.start + 20 or header_end > place.end:
        return
    size = max(frame.gso_size, 64)
    head = data[:header_end]
    sequence = int.from_bytes(data[place.start + 4 : place.start + 8], "big")
    identity = data[18] << 8 | data[19]
    flags = data[place.start + 13]
    for number, at in enumerate(range(header_end, max(place.end, header_end + 1), size)):
        payload = data[at : min(at + size, place.end)]
        last = at + size >= place.end
        part = bytearray(head)
        part += payload
        if place.version == 4:
            part[16:18] = (len(part) - 14).to_bytes(2, "big")
            part[18:20] = (identity + number & 0xFFFF).to_bytes(2, "big")
            _fill_ip(part, place.start)
        else:
            part[18:20] = (len(part) - 54).to_bytes(2, "big")
        part[place.start + 4 : place.start + 8] = (sequence + at - header_end & 0xFFFFFFFF).to_bytes(4, "big")
        part[place.start + 13] = flags & ~((0 if last else TCP_FIN_PSH) | (TCP_CWR if number else 0))
        _fill(part, replace(place, end=len(part)))
        yield Frame(bytes(part), DATA_VALIDATED)


class Merger:
    """Joins a TCP stream's consecutive segments to superframes, as a network card's receive offload does.

    Frames come out in the order in which they went in; :meth:`flush` gives what is still held. The frames must come
    from a sender whose checksums are right: nobody will check them any more.
    """

    def __init__(self) -> None:
        self._head = b""
        self._parts: list[bytes] = []
        self._size = 0  # payload of the first segment
        self._total = 0
        self._next = 0  # the sequence number that continues the stream

    def add(self, data: bytes) -> list[Frame]:
        """Take a frame; what can go out now comes back."""
        key = self._mergeable(data)
        if key is None:
            return [*self.flush(), Frame(data, DATA_VALIDATED)]
        end = 14 + (data[16] << 8 | data[17])
        sequence = int.from_bytes(data[38:42], "big")
        length = end - 54
        out: list[Frame] = []
        if self._parts and not (
            sequence == self._next
            and length <= self._size
            and self._total + length <= 65535 - 40
            and key == self._key(self._head)
        ):
            out = self.flush()
        if not self._parts:
            self._head, self._size, self._total = data[:54], length, 0
        self._parts.append(data[54:end])
        self._total += length
        self._next = sequence + length & 0xFFFFFFFF
        if length < self._size or data[47] & TCP_PSH:
            if data[47] & TCP_PSH:
                head = bytearray(self._head)
                head[47] |= TCP_PSH
                self._head = bytes(head)
            out += self.flush()
        return out

    @staticmethod
    def _key(head: bytes) -> tuple[bytes, ...]:
        """What a stream's segments share: Ethernet, IP without length, identity, checksum; ports, ACK, window."""
        return head[:16], head[22:24], head[26:38], head[42:47], head[48:50]

    def _mergeable(self, data: bytes) -> tuple[bytes, ...] | None:
        if len(data) < 55 or data[12:15] != b"\x08\x00\x45" or data[23] != TCP:
            return None
        if data[46] != 0x50 or data[47] & ~TCP_PSH != TCP_ACK or (data[20] << 8 | data[21]) & 0x3FFF:
            return None
        if not 54 < 14 + (data[16] << 8 | data[17]) <= len(data):
            return None
        return self._key(data)

    def flush(self) -> list[Frame]:
        """What is held, as one frame."""
        parts, self._parts = self._parts, []
        if not parts:
            return []
        if len(parts) == 1:
            return [Frame(self._head + parts[0], DATA_VALIDATED)]  # its own checksum is right still
        data = bytearray(self._head)
        data[16:18] = (40 + self._total).to_bytes(2, "big")
        _fill_ip(data, 34)
        partial = ones_sum(memoryview(data)[26:34]) + TCP + 20 + self._total
        data[50:52] = (partial % 65535 or 65535).to_bytes(2, "big")
        data += b"".join(parts)
        return [Frame(bytes(data), CHECKSUM_BLANK | DATA_VALIDATED, GSO_TCP4, self._size)]
