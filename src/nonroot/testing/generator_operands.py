"""Operands of generated instructions: registers, immediates, and memory operands that reach a chosen address."""

from random import Random
from typing import Any, NamedTuple

import iced_x86

from nonroot.testing.differential_case import CODE_BASE, DATA_BASE, HIGH_BASE, PAGE, READ_ONLY_BASE, STACK_BASE
from nonroot.testing.generator_state import INDEX_REGISTERS, interesting

# iced's enumerations are modules, which its stubs give types of their own.
K: Any = iced_x86.OpCodeOperandKind
Register: Any = iced_x86.Register
MASK32 = (1 << 32) - 1
MASK64 = (1 << 64) - 1

GPR64 = [Register.RAX + n for n in range(16)]
GPR32 = [Register.EAX + n for n in range(16)]
GPR16 = [Register.AX + n for n in range(16)]
#: AL CL DL BL AH CH DH BH SPL BPL SIL DIL R8L..R15L
GPR8 = [Register.AL + n for n in range(20)]

#: Register operands by kind: (first register, count in 64-bit mode, count in 32-bit mode).
REGISTER_POOLS: dict[int, tuple[int, int, int]] = {
    K.R8_OR_MEM: (Register.AL, 20, 8), K.R8_REG: (Register.AL, 20, 8), K.R8_OPCODE: (Register.AL, 20, 8),
    K.R16_OR_MEM: (Register.AX, 16, 8), K.R16_REG: (Register.AX, 16, 8), K.R16_OPCODE: (Register.AX, 16, 8),
    K.R16_RM: (Register.AX, 16, 8),
    K.R32_OR_MEM: (Register.EAX, 16, 8), K.R32_REG: (Register.EAX, 16, 8), K.R32_OPCODE: (Register.EAX, 16, 8),
    K.R32_RM: (Register.EAX, 16, 8), K.R32_VVVV: (Register.EAX, 16, 8),
    K.R64_OR_MEM: (Register.RAX, 16, 0), K.R64_REG: (Register.RAX, 16, 0), K.R64_OPCODE: (Register.RAX, 16, 0),
    K.R64_RM: (Register.RAX, 16, 0), K.R64_VVVV: (Register.RAX, 16, 0),
    K.MM_OR_MEM: (Register.MM0, 8, 8), K.MM_REG: (Register.MM0, 8, 8), K.MM_RM: (Register.MM0, 8, 8),
    K.XMM_OR_MEM: (Register.XMM0, 16, 8), K.XMM_REG: (Register.XMM0, 16, 8), K.XMM_RM: (Register.XMM0, 16, 8),
    K.XMM_VVVV: (Register.XMM0, 16, 8), K.XMM_IS4: (Register.XMM0, 16, 8),
    K.YMM_OR_MEM: (Register.YMM0, 16, 8), K.YMM_REG: (Register.YMM0, 16, 8), K.YMM_RM: (Register.YMM0, 16, 8),
    K.YMM_VVVV: (Register.YMM0, 16, 8), K.YMM_IS4: (Register.YMM0, 16, 8),
    K.STI_OPCODE: (Register.ST0, 8, 8), K.SEG_REG: (Register.ES, 6, 6),
    K.CR_REG: (Register.CR0, 9, 8), K.DR_REG: (Register.DR0, 8, 8),
}  # fmt: skip

FIXED_REGISTERS: dict[int, Any] = {
    K.AL: Register.AL, K.CL: Register.CL, K.AX: Register.AX, K.DX: Register.DX, K.EAX: Register.EAX,
    K.RAX: Register.RAX, K.ST0: Register.ST0, K.ES: Register.ES, K.CS: Register.CS, K.SS: Register.SS,
    K.DS: Register.DS, K.FS: Register.FS, K.GS: Register.GS,
}  # fmt: skip

#: Operands that may be a register or memory.
OR_MEMORY: frozenset[int] = frozenset({
    K.R8_OR_MEM, K.R16_OR_MEM, K.R32_OR_MEM, K.R64_OR_MEM, K.MM_OR_MEM, K.XMM_OR_MEM, K.YMM_OR_MEM,
})  # fmt: skip
VSIB: dict[int, int] = {
    K.MEM_VSIB32X: Register.XMM0, K.MEM_VSIB64X: Register.XMM0, K.MEM_VSIB32Y: Register.YMM0,
    K.MEM_VSIB64Y: Register.YMM0,
}  # fmt: skip
MEMORY: frozenset[int] = frozenset({K.MEM, *VSIB})
IMMEDIATE_BITS: dict[int, int] = {
    K.IMM8: 8, K.IMM8SEX16: 8, K.IMM8SEX32: 8, K.IMM8SEX64: 8, K.IMM16: 16, K.IMM32: 32, K.IMM32SEX64: 32,
    K.IMM64: 64,
}  # fmt: skip

_SEGMENTS = (Register.ES, Register.CS, Register.SS, Register.DS)


def target(random: Random, size: int, aligned: float) -> int:
    """An address for an access of ``size`` bytes: mostly good, sometimes at the edge of or off the mapped pages."""
    size = max(size, 1)
    kind = random.randrange(100)
    if kind < 62:
        address = DATA_BASE + random.randrange(2 * PAGE - size)
    elif kind < 72:
        address = STACK_BASE + random.randrange(2 * PAGE - size)
    elif kind < 76:
        address = HIGH_BASE + random.randrange(PAGE - size)
    elif kind < 82:
        address = READ_ONLY_BASE + random.randrange(PAGE - size)
    else:
        reach = random.randrange(size) if size > 1 else 0
        crossing = {
            0: DATA_BASE + PAGE, 1: DATA_BASE + PAGE, 2: DATA_BASE + PAGE, 3: READ_ONLY_BASE, 4: READ_ONLY_BASE + PAGE,
            5: DATA_BASE, 6: STACK_BASE + 2 * PAGE, 7: HIGH_BASE + PAGE,
        }  # fmt: skip
        if kind - 82 in crossing:
            return crossing[kind - 82] - reach
        if kind == 90:
            return random.getrandbits(32)
        if kind == 91:
            return (1 << 63 | random.getrandbits(40)) & MASK64
        if kind == 92:
            return (1 << 47) - reach
        if kind == 93:
            return CODE_BASE + random.randrange(2 * PAGE)
        if kind == 94:
            return -random.randrange(1, 1 << 12) & MASK64
        address = DATA_BASE + random.randrange(2 * PAGE - size)
    if random.random() < aligned:
        unit = 1 << (size - 1).bit_length() if size > 1 else 1
        address = (address & -unit) if address & -unit >= 0x1000 else address
    return address


class MemoryForm(NamedTuple):
    """A memory operand. ``size`` is iced's displacement size: 0 none, 1 eight bits if they do, 4, 8."""

    base: int
    index_register: int
    scale: int
    displacement: int
    size: int
    segment: int


class Addressing:
    """Builds memory operands out of registers whose values are known.

    ``known`` maps general register numbers to values, None where an earlier instruction may have changed it.
    """

    def __init__(self, random: Random, bits: int, known: list[int | None], fs_base: int, gs_base: int) -> None:
        self.random = random
        self.bits = bits
        self.known = known
        self.fs_base = fs_base
        self.gs_base = gs_base
        self.registers = 16 if bits == 64 else 8

    def _register(self, width: int, number: int) -> int:
        return int((GPR64 if width == 64 else GPR32)[number])

    def memory(self, address: int, *, vsib: int | None = None) -> tuple[MemoryForm, int]:
        """An operand that reaches ``address``, and the address that it really reaches (None known: a guess)."""
        random = self.random
        segment = Register.NONE
        offset = address
        if random.random() < 0.1 and self.bits == 64:
            segment = random.choice((Register.FS, Register.GS))
            offset = (address - (self.fs_base if segment == Register.FS else self.gs_base)) & MASK64
        elif random.random() < 0.06:
            segment = random.choice((*_SEGMENTS, Register.FS) if self.bits == 32 else _SEGMENTS)
        width = self.bits
        if self.bits == 64 and offset <= MASK32 and random.random() < 0.2:
            width = 32
        for _ in range(12):
            operand = self._form(offset, width, segment, vsib)
            if operand is not None:
                return operand, address
        if vsib is not None:
            base = self._register(width, random.randrange(self.registers))
            return MemoryForm(base, self._vsib_index(vsib), 1, 0, 1, segment), address
        if self.bits == 64 and (offset > MASK32 >> 1):
            # No register leads there: RIP-relative to some place, or an absolute address instead.
            offset = DATA_BASE + random.randrange(PAGE)
        return MemoryForm(Register.NONE, Register.NONE, 1, self._signed(offset, width), 4, segment), offset

    def _signed(self, value: int, width: int) -> int:
        sign = 1 << (width - 1)
        return (value & ((1 << width) - 1) ^ sign) - sign

    def _vsib_index(self, vsib: int) -> int:
        count = 8 if self.bits == 32 else 16
        number = self.random.choice(INDEX_REGISTERS) if self.random.random() < 0.8 and count == 16 else None
        return vsib + (self.random.randrange(count) if number is None else number)

    def _form(self, offset: int, width: int, segment: int, vsib: int | None) -> MemoryForm | None:
        random = self.random
        form = random.randrange(10)
        if vsib is None and form == 0:
            if self.bits == 64 and random.random() < 0.5:
                base = Register.RIP if width == 64 else Register.EIP
                if not CODE_BASE - (1 << 31) + PAGE < offset < CODE_BASE + (1 << 31) - PAGE:
                    return None
                return MemoryForm(base, Register.NONE, 1, offset, 4, segment)
            displacement = self._signed(offset, width)
            if not -(1 << 31) <= displacement < 1 << 31:
                return None
            return MemoryForm(Register.NONE, Register.NONE, 1, displacement, 4, segment)
        total = 0
        base = index = int(Register.NONE)
        scale = 1
        if vsib is not None or form != 1:
            number = random.randrange(self.registers)
            value = self.known[number]
            if value is None:
                return None
            total += value
            base = self._register(width, number)
        if vsib is not None:
            index = self._vsib_index(vsib)
            scale = random.choice((1, 2, 4, 8))
        elif form == 1 or form >= 6:
            number = random.choice([n for n in range(self.registers) if n != 4])
            value = self.known[number]
            if value is None:
                return None
            scale = random.choice((1, 2, 4, 8))
            total += value * scale
            index = self._register(width, number)
        displacement = self._signed(offset - total, width)
        if not -(1 << 31) <= displacement < 1 << 31:
            return None
        # Size 1 lets the encoder take 8 bits where they do; without a base there are always 32.
        size = 1 if base != Register.NONE and random.random() < 0.9 else 4
        if displacement == 0 and size == 1:
            size = random.choice((0, 1))
        return MemoryForm(base, index, scale, displacement, size, segment)


def immediate(random: Random, bits: int) -> int:
    """A signed immediate of ``bits``."""
    value = interesting(random) & ((1 << bits) - 1)
    return value - (1 << bits) if value >> (bits - 1) else value
