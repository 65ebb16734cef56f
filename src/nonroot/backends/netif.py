"""The network interface's records, version 1. Source: xen/include/public/io/netif.h."""

import struct
from typing import Final, NamedTuple

__all__ = [
    "RX_REQUEST_BYTES", "RX_RESPONSE_BYTES", "TX_REQUEST_BYTES", "TX_RESPONSE_BYTES", "Extra", "RxResponse",
    "TxRequest",
]  # fmt: skip

TX_CSUM_BLANK: Final = 1
TX_DATA_VALIDATED: Final = 2
TX_MORE_DATA: Final = 4
TX_EXTRA_INFO: Final = 8

RX_DATA_VALIDATED: Final = 1
RX_CSUM_BLANK: Final = 2
RX_MORE_DATA: Final = 4
RX_EXTRA_INFO: Final = 8

EXTRA_GSO: Final = 1
EXTRA_MCAST_ADD: Final = 2
EXTRA_MCAST_DEL: Final = 3
EXTRA_HASH: Final = 4
EXTRA_XDP: Final = 5
EXTRA_MORE: Final = 1

STATUS_OKAY: Final = 0
STATUS_ERROR: Final = -1
STATUS_DROPPED: Final = -2
STATUS_NULL: Final = 1

TX_SLOTS_LEGACY: Final = 18
"""Slots of a packet that every backend takes."""
TX_SLOTS_FATAL: Final = 20
"""More than that is no mistake any more."""

_TX_REQUEST: Final = struct.Struct("<IHHHH")
_TX_RESPONSE: Final = struct.Struct("<Hh")
_EXTRA: Final = struct.Struct("<BBHBBH")
_RX_REQUEST: Final = struct.Struct("<HHI")
_RX_RESPONSE: Final = struct.Struct("<HHHh")

TX_REQUEST_BYTES: Final = _TX_REQUEST.size
TX_RESPONSE_BYTES: Final = _TX_RESPONSE.size
RX_REQUEST_BYTES: Final = _RX_REQUEST.size
RX_RESPONSE_BYTES: Final = _RX_RESPONSE.size


class TxRequest(NamedTuple):
    """A piece of a packet from the guest. The first piece's ``size`` is the whole packet's, bytes."""

    gref: int
    offset: int
    flags: int
    id: int
    size: int

    @classmethod
    def parse(cls, data: bytes) -> "TxRequest":
        """From a slot."""
        return cls(*_TX_REQUEST.unpack_from(data))

    def pack(self) -> bytes:
        """To a slot."""
        return _TX_REQUEST.pack(*self)


class Extra(NamedTuple):
    """What a slot between a packet's pieces says of it."""

    type: int
    flags: int
    size: int = 0
    gso_type: int = 0

    @classmethod
    def parse(cls, data: bytes) -> "Extra":
        """From a slot."""
        kind, flags, size, gso_type, _, _ = _EXTRA.unpack_from(data)
        return cls(kind, flags, size, gso_type)

    def pack(self) -> bytes:
        """To a slot."""
        return _EXTRA.pack(self.type, self.flags, self.size, self.gso_type, 0, 0)


class RxResponse(NamedTuple):
    """A piece of a packet to the guest; ``status`` is its bytes, or an error."""

    id: int
    offset: int
    flags: int
    status: int

    @classmethod
    def parse(cls, data: bytes) -> "RxResponse":
        """From a slot."""
        return cls(*_RX_RESPONSE.unpack_from(data))

    def pack(self) -> bytes:
        """To a slot."""
        return _RX_RESPONSE.pack(*self)


def tx_response(number: int, status: int) -> bytes:
    """The answer to a piece."""
    return _TX_RESPONSE.pack(number, status)


def parse_tx_response(data: bytes) -> tuple[int, int]:
    """(id, status)."""
    number, status = _TX_RESPONSE.unpack_from(data)
    return number, status


def rx_request(number: int, gref: int) -> bytes:
    """A page for packets to come."""
    return _RX_REQUEST.pack(number, 0, gref)


def parse_rx_request(data: bytes) -> tuple[int, int]:
    """(id, gref)."""
    number, _, gref = _RX_REQUEST.unpack_from(data)
    return number, gref
