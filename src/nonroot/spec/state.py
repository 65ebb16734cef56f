"""The state that the model works on: registers, segments, physical memory with recorded writes, faults."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Self

#: Guest-physical address bits (CPUID 0x80000008).
PHYSICAL_BITS: Final = 40

# CR0, CR4, EFER, RFLAGS bits (SDM 3A 2.3, 2.5; 3A 2.2.1).
CR0_PE, CR0_WP, CR0_AM, CR0_PG = 1 << 0, 1 << 16, 1 << 18, 1 << 31
CR4_PSE, CR4_PAE, CR4_SMEP, CR4_SMAP = 1 << 4, 1 << 5, 1 << 20, 1 << 21
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11
TF, IF, NT, RF, VM, AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18

# Exception vectors (SDM 3A 6.3.1).
UD, DF, TS, NP, SS, GP, PF = 6, 8, 10, 11, 12, 13, 14

MASK64: Final = (1 << 64) - 1


class Fault(Exception):  # noqa: N818 - the manuals' word
    """An exception that an operation raises; the state is as before the operation."""

    def __init__(self, vector: int, error: int | None = None, address: int = 0) -> None:
        super().__init__(f"vector {vector}, error {error}, address {address:#x}")
        self.vector = vector
        self.error = error
        #: CR2 to be, for #PF.
        self.address = address


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part (SDM 3A 3.4.3). ``access`` has VMX's layout (SDM 3C 25.4.1)."""

    selector: int = 0
    base: int = 0
    limit: int = 0
    access: int = 0x10000

    @property
    def usable(self) -> bool:
        return not self.access >> 16 & 1

    @property
    def type(self) -> int:
        return self.access & 15

    @property
    def code_or_data(self) -> bool:
        return bool(self.access >> 4 & 1)

    @property
    def is_code(self) -> bool:
        return self.access & 0x18 == 0x18

    @property
    def is_data(self) -> bool:
        return self.access & 0x18 == 0x10

    @property
    def conforming(self) -> bool:
        """Of code."""
        return bool(self.access & 4)

    @property
    def expand_down(self) -> bool:
        """Of data."""
        return bool(self.access & 4)

    @property
    def readable(self) -> bool:
        return not self.is_code or bool(self.access & 2)

    @property
    def writable(self) -> bool:
        return self.is_data and bool(self.access & 2)

    @property
    def dpl(self) -> int:
        return self.access >> 5 & 3

    @property
    def present(self) -> bool:
        return bool(self.access >> 7 & 1)

    @property
    def long(self) -> bool:
        return bool(self.access >> 13 & 1)

    @property
    def big(self) -> bool:
        """D/B."""
        return bool(self.access >> 14 & 1)


class Memory:
    """Physical memory: reads through to ``backing``, writes are kept here."""

    def __init__(self, backing: Callable[[int, int], bytes]) -> None:
        self._backing = backing
        #: Bytes written, by physical address.
        self.writes: dict[int, int] = {}

    def read(self, physical: int, size: int) -> int:
        data = bytearray(self._backing(physical, size))
        for n in range(size):
            data[n] = self.writes.get(physical + n, data[n])
        return int.from_bytes(data, "little")

    def write(self, physical: int, size: int, value: int) -> None:
        for n, byte in enumerate((value & ((1 << 8 * size) - 1)).to_bytes(size, "little")):
            self.writes[physical + n] = byte


@dataclass
class State:
    """What the model's operations depend on and change."""

    gpr: list[int]
    rip: int
    rflags: int
    #: es, cs, ss, ds, fs, gs, ldtr, tr.
    segments: dict[str, Segment]
    gdtr: tuple[int, int]
    idtr: tuple[int, int]
    cr0: int
    cr3: int
    cr4: int
    efer: int
    #: Page-directory pointers of PAE paging, as loaded with CR3.
    pdpte: tuple[int, int, int, int] = (0, 0, 0, 0)
    star: int = 0
    lstar: int = 0
    fmask: int = 0
    memory: Memory = field(default_factory=lambda: Memory(lambda _, size: bytes(size)))

    @property
    def protected(self) -> bool:
        """Protected mode without virtual-8086 mode."""
        return bool(self.cr0 & CR0_PE) and not self.rflags & VM

    @property
    def long_mode(self) -> bool:
        """IA-32e mode: 64-bit or compatibility mode."""
        return bool(self.efer & EFER_LMA)

    @property
    def mode64(self) -> bool:
        """64-bit mode."""
        return self.long_mode and self.segments["cs"].long

    @property
    def cpl(self) -> int:
        """Current privilege level (SDM 3A 5.5)."""
        if not self.cr0 & CR0_PE:
            return 0
        return 3 if self.rflags & VM else self.segments["ss"].dpl

    @property
    def stack_bytes(self) -> int:
        """Width of the stack pointer: 8, 4 or 2 bytes (SDM 3A 6.2.3 in volume 1)."""
        return 8 if self.mode64 else 4 if self.segments["ss"].big else 2

    def copy(self) -> Self:
        """A copy whose writes go elsewhere."""
        memory = Memory(self.memory._backing)
        memory.writes = dict(self.memory.writes)
        return replace(self, gpr=list(self.gpr), segments=dict(self.segments), memory=memory)


def canonical(address: int) -> bool:
    """Whether bits 63:47 are equal (SDM 1 3.3.7.1)."""
    return address >> 47 in (0, (1 << 17) - 1)
