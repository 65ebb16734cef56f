"""I/O requests between the hypervisor and a device model: Xen's numbers and layouts.

The two share a file. Its first page has an ``ioreq`` for each vCPU, its second the ring of posted writes, both as Xen
lays them out; :class:`nonroot._engine.IoreqPages` is what both sides see of it. Behind them are pages of our own (who
sleeps, machine time, operations that the device model asks for) and an area for data:

======== ==================================================================================================
0x0000   ``shared_iopage``: 32 bytes a vCPU
0x1000   ``buffered_iopage``: read and write index, 511 slots of 8 bytes
0x2000   who sleeps; indices of the operations; deadline of the devices; machine time; generation of the p2m
0x3000   128 operations of 64 bytes
0x5000   a bitmap of pages, then data: of REP INS and OUTS, and of control requests
======== ==================================================================================================

A request goes NONE → READY → INPROCESS → RESPONSE READY → NONE. A REP INS or OUTS is one request, with ``data_is_ptr``;
``data`` is a place in the data area here, not in guest memory, as the engine has looked at that already.

Source: Xen's public/hvm/ioreq.h and public/hvm/dm_op.h.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final, Self

__all__ = [
    "ALL_ONES",
    "BUFFER_SLOTS",
    "DATA",
    "DATA_IS_POINTER",
    "DATA_LENGTH",
    "LENGTH",
    "NEVER",
    "READ",
    "Ioreq",
    "IoreqState",
    "IoreqType",
    "pci_address",
    "pci_function",
]

BITMAP: Final = 0x5000
BITMAP_LENGTH: Final = 0x1000
DATA: Final = BITMAP + BITMAP_LENGTH
DATA_LENGTH: Final = 1 << 20
LENGTH: Final = DATA + DATA_LENGTH
"""Bytes of the file."""
BUFFER_SLOTS: Final = 511
"""IOREQ_BUFFER_SLOT_NUM."""
NEVER: Final = (1 << 64) - 1
"""As a deadline."""
ALL_ONES: Final = (1 << 64) - 1
"""What a read has where nobody answers."""

DATA_IS_POINTER: Final = 1 << 4
READ: Final = 1 << 5
"""``dir``: IOREQ_READ."""
BACKWARDS: Final = 1 << 6
"""``df``."""


class IoreqType(IntEnum):
    """IOREQ_TYPE_…; those from 0x80 on are ours."""

    PIO = 0
    COPY = 1
    """An access to memory."""
    PCI_CONFIG = 2
    TIMEOFFSET = 7
    INVALIDATE = 8
    """Everything before it is done when it is answered."""
    CONTROL = 0x80
    """A message for the device model itself, in the data area."""
    ADVANCE = 0x81
    """Time has passed: what is due happens."""


class IoreqState(IntEnum):
    """STATE_…"""

    NONE = 0
    READY = 1
    INPROCESS = 2
    RESPONSE_READY = 3


@dataclass(frozen=True, slots=True)
class Ioreq:
    """``struct ioreq``, for those who look at the page; the engine reads and writes it in place."""

    addr: int
    data: int
    count: int
    size: int
    state: IoreqState
    type: int
    flags: int = 0
    """Bits of ``data_is_ptr``, ``dir`` and ``df``."""

    LAYOUT: ClassVar[struct.Struct] = struct.Struct("<QQIIIHBB")

    def pack(self) -> bytes:
        """32 bytes."""
        flags = self.flags | self.state
        return self.LAYOUT.pack(self.addr, self.data, self.count, self.size, 0, 0, flags, self.type)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """ValueError if the state is none."""
        addr, value, count, size, _, _, flags, kind = cls.LAYOUT.unpack(data)
        return cls(addr, value, count, size, IoreqState(flags & 0xF), kind, flags & 0xF0)


def pci_address(function: int, register: int) -> int:
    """The address of a :attr:`IoreqType.PCI_CONFIG` request: ``function`` is slot << 3 | function on bus 0."""
    return function << 32 | register


def pci_function(address: int) -> tuple[int, int]:
    """The reverse: (slot << 3 | function, register)."""
    return address >> 32, address & 0xFFFF_FFFF
