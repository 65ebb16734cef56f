"""
Hypercalls without KVM's help: their instructions become OUT to a port of our own.

A VMCALL or VMMCALL never leaves KVM (it answers by itself), unless the kernel was built with Xen's emulation. Both have
three bytes, and so have OUT and a NOP. Where they stand is known in two ways: the hypercall page, whose place the guest
writes into an MSR, and the two functions of current Linux that consist of one each.

The original bytes are put back whenever a record is taken: memory and records never show the change to another engine.
"""

from __future__ import annotations

from typing import Final

from nonroot._engine import Memory

__all__ = ["PORT", "Patches"]

PORT: Final = 0xFB
"""No device of a PC is there."""

_VMCALL: Final = b"\x0f\x01\xc1"
_VMMCALL: Final = b"\x0f\x01\xd9"
#: OUT PORT, AL; NOP.
_OUT: Final = b"\xe6" + bytes([PORT]) + b"\x90"
_MSR_PAGE: Final = 0x40000000
_PAGE: Final = 4096
_SLOT: Final = 32
_IN_SLOT: Final = 5
#: Linux: __xen_hypercall_intel follows __xen_hypercall_amd by 16 bytes; each is the instruction and a jump.
_PAIR_BYTES: Final = 19
_PAIR_AT: Final = 16
_PIECE: Final = 4 << 20


class Patches:
    """The changed places of one domain's memory. For the vCPU's thread."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        #: Guest-physical address to the original bytes.
        self._places: dict[int, bytes] = {}
        self._applied = False
        self._page: int | None = None

    def page_wanted(self, msr: int, value: int) -> None:
        """The guest asks for its hypercall page, which is there when it next runs."""
        if msr == _MSR_PAGE:
            self._page = value & -_PAGE
            self._applied = False

    def apply(self) -> None:
        """Before the guest runs."""
        if self._applied:
            return
        self._applied = True
        self._search()
        for place, original in list(self._places.items()):
            if self._read(place) == original:
                self._memory.write(place, _OUT)
            else:
                del self._places[place]

    def undo(self) -> None:
        """Before somebody looks at the memory."""
        if self._applied:
            self._applied = False
            for place, original in self._places.items():
                if self._read(place) == _OUT:
                    self._memory.write(place, original)

    def _read(self, place: int) -> bytes:
        try:
            return self._memory.read(place, len(_OUT))
        except ValueError:
            return b""

    def _search(self) -> None:
        if self._page is not None:
            for slot in range(self._page, self._page + _PAGE, _SLOT):
                self._found(slot + _IN_SLOT, self._read(slot + _IN_SLOT))
        for gfn, count, *_ in self._memory.runs():
            start, end = gfn * _PAGE, (gfn + count) * _PAGE
            while start < end:
                data = self._memory.read(start, min(_PIECE + _PAIR_BYTES, end - start))
                at = data.find(_VMMCALL)
                while at >= 0:
                    if data[at + _PAIR_AT : at + _PAIR_BYTES] == _VMCALL:
                        self._found(start + at, _VMMCALL)
                        self._found(start + at + _PAIR_AT, _VMCALL)
                    at = data.find(_VMMCALL, at + 1)
                start += _PIECE

    def _found(self, place: int, code: bytes) -> None:
        if code in (_VMCALL, _VMMCALL):
            self._places[place] = code
