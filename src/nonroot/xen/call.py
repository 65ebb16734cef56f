"""One hypercall: its registers, and the guest memory that its arguments lie in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nonroot._engine import Memory
from nonroot.xen.abi import PAGE_SIZE, Errno, HypercallError
from nonroot.xen.layout import ABI32, ABI64, Abi

__all__ = ["Call", "GuestPointers"]

# Register numbers: RAX 0, RCX 1, RDX 2, RBX 3, RSP 4, RBP 5, RSI 6, RDI 7, R8 8, R9 9, R10 10.
ARGUMENTS_64: Final = (7, 6, 2, 10, 8, 9)
ARGUMENTS_32: Final = (3, 1, 2, 6, 7, 5)
LONGEST_COPY: Final = 1 << 20


class GuestPointers:
    """Guest memory by linear address, as the caller's kernel sees it."""

    def __init__(self, memory: Memory, translate: Callable[[int], int | None]) -> None:
        """``translate``: linear to guest-physical address; None if nothing is mapped."""
        self._memory = memory
        self._translate = translate

    def read(self, address: int, length: int) -> bytes:
        """A copy. HypercallError EFAULT if not all of it is there."""
        return b"".join(self._memory_read(gpa, size) for gpa, size in self.pieces(address, length))

    def write(self, address: int, data: bytes) -> None:
        """HypercallError EFAULT, with nothing written, if not all of it is there."""
        done = 0
        for gpa, size in self.pieces(address, len(data), write=True):
            self._memory.write(gpa, data[done : done + size])
            done += size

    def pieces(self, address: int, length: int, write: bool = False) -> list[tuple[int, int]]:
        """(guest-physical address, bytes) of each page's part. HypercallError EFAULT."""
        if not 0 <= length <= LONGEST_COPY:
            raise HypercallError(Errno.EFAULT)
        found = []
        end = address + length
        while address < end:
            size = min(end - address, PAGE_SIZE - address % PAGE_SIZE)
            gpa = self._translate(address) if address < 1 << 64 else None
            frame = None if gpa is None else self._memory.lookup(gpa // PAGE_SIZE)
            if gpa is None or frame is None or (write and not frame[2]):
                raise HypercallError(Errno.EFAULT)
            found.append((gpa, size))
            address += size
        return found

    def _memory_read(self, gpa: int, size: int) -> bytes:
        return self._memory.read(gpa, size)


@dataclass(slots=True)
class Call:
    """Number and arguments."""

    abi: Abi
    """Of the code that made the call."""
    vcpu: int
    number: int
    args: tuple[int, ...]
    """Six; 32 bits wide in 32-bit code."""
    memory: GuestPointers

    @classmethod
    def from_registers(cls, long: bool, registers: list[int], vcpu: int, memory: GuestPointers) -> "Call":
        """The call that code of that kind has made."""
        abi = ABI64 if long else ABI32
        mask = (1 << 64) - 1 if long else (1 << 32) - 1
        numbers = ARGUMENTS_64 if long else ARGUMENTS_32
        return cls(abi, vcpu, registers[0] & 0xFFFF_FFFF, tuple(registers[n] & mask for n in numbers), memory)

    def read(self, address: int, length: int) -> bytes:
        """Copy in. HypercallError EFAULT."""
        return self.memory.read(address, length)

    def write(self, address: int, data: bytes) -> None:
        """Copy out. HypercallError EFAULT."""
        self.memory.write(address, data)
