"""Instruction matching for :mod:`nonroot.testing.asm`: operands against iced-x86's opcode tables, and encoding."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import iced_x86
from iced_x86 import Encoder, EncodingKind, MemorySizeInfo, OpCodeInfo

# The stubs of iced describe its enumerations as empty, which type checkers take for impossible values.
iced: Any = iced_x86
Code, Instruction, Mnemonic, OpKind, Register = iced.Code, iced.Instruction, iced.Mnemonic, iced.OpKind, iced.Register
Kind = iced.OpCodeOperandKind


_M64 = (1 << 64) - 1


@dataclass(frozen=True)
class Reg:
    register: int


@dataclass(frozen=True)
class Imm:
    value: int


@dataclass(frozen=True)
class FarPointer:
    selector: int
    offset: int


@dataclass(frozen=True)
class Mem:
    size: int
    base: int
    index: int
    scale: int
    displacement: int
    segment: int
    far: bool = False


Operand = Reg | Imm | FarPointer | Mem


@dataclass
class Prefixes:
    lock: bool = False
    rep: bool = False
    repne: bool = False
    operand_size: int = 0
    address_size: int = 0


def _enum_names(holder: object) -> dict[str, Any]:
    return {n.lower(): v for n, v in vars(holder).items() if n.isupper() and isinstance(v, int)}


REGISTERS = {
    n: v for n, v in _enum_names(Register).items() if not n.startswith(("zmm", "dontuse", "none", "tmm", "bnd"))
}
for _n in range(8, 16):
    REGISTERS[f"r{_n}b"] = REGISTERS[f"r{_n}l"]
REGISTERS["st"] = REGISTERS["st0"]
_VSIB = {Kind.MEM_VSIB32X: "XMM", Kind.MEM_VSIB64X: "XMM", Kind.MEM_VSIB32Y: "YMM", Kind.MEM_VSIB64Y: "YMM"}
_IMPLICIT = {Kind.ES_RDI, Kind.SEG_RSI, Kind.SEG_RDI, Kind.SEG_RBX_AL}
_FIXED = {
    Kind.AL: Register.AL,
    Kind.CL: Register.CL,
    Kind.AX: Register.AX,
    Kind.DX: Register.DX,
    Kind.EAX: Register.EAX,
    Kind.RAX: Register.RAX,
    Kind.ST0: Register.ST0,
    Kind.CS: Register.CS,
    Kind.DS: Register.DS,
    Kind.ES: Register.ES,
    Kind.SS: Register.SS,
    Kind.FS: Register.FS,
    Kind.GS: Register.GS,
}
_NEAR = {
    Kind.BR16_1: OpKind.NEAR_BRANCH16,
    Kind.BR16_2: OpKind.NEAR_BRANCH16,
    Kind.BR32_1: OpKind.NEAR_BRANCH32,
    Kind.BR32_4: OpKind.NEAR_BRANCH32,
    Kind.BR64_1: OpKind.NEAR_BRANCH64,
    Kind.BR64_4: OpKind.NEAR_BRANCH64,
}
_FAR = {iced.MemorySize.SEG_PTR16, iced.MemorySize.SEG_PTR32, iced.MemorySize.SEG_PTR64}
#: Immediate kinds: (operand kind, stored bits, bits it is extended to).
_IMMEDIATES = {
    Kind.IMM8: (OpKind.IMMEDIATE8, 8, 8),
    Kind.IMM8_CONST_1: (OpKind.IMMEDIATE8, 8, 8),
    Kind.IMM8SEX16: (OpKind.IMMEDIATE8TO16, 8, 16),
    Kind.IMM8SEX32: (OpKind.IMMEDIATE8TO32, 8, 32),
    Kind.IMM8SEX64: (OpKind.IMMEDIATE8TO64, 8, 64),
    Kind.IMM16: (OpKind.IMMEDIATE16, 16, 16),
    Kind.IMM32: (OpKind.IMMEDIATE32, 32, 32),
    Kind.IMM32SEX64: (OpKind.IMMEDIATE32TO64, 32, 64),
    Kind.IMM64: (OpKind.IMMEDIATE64, 64, 64),
}


def register_class(register: int) -> str:
    ext = iced.RegisterExt
    for name, test in (
        ("R8", ext.is_gpr8),
        ("R16", ext.is_gpr16),
        ("R32", ext.is_gpr32),
        ("R64", ext.is_gpr64),
        ("SEG", ext.is_segment_register),
        ("MM", ext.is_mm),
        ("XMM", ext.is_xmm),
        ("YMM", ext.is_ymm),
        ("CR", ext.is_cr),
        ("DR", ext.is_dr),
        ("TR", ext.is_tr),
        ("STI", ext.is_st),
    ):
        if test(register):
            return name
    return "?"


@functools.cache
def _kind_classes() -> dict[int, tuple[str, bool, bool]]:
    """For each operand kind that takes a register or memory: (register class, takes a register, takes memory)."""
    table: dict[int, tuple[str, bool, bool]] = {}
    for lower, value in _enum_names(Kind).items():
        name = lower.upper()
        match = re.fullmatch(r"(R8|R16|R32|R64|MM|XMM|YMM|SEG|CR|DR|TR|STI)_(\w+)", name)
        if match and not match[2].startswith(("RSI", "RDI", "RBX")):
            # "R32_REG_MEM" is a register that addresses memory: still a register.
            table[value] = (match[1], True, "OR_MEM" in match[2])
        elif name.startswith("XMMP3"):
            table[value] = ("XMM", True, False)
        elif name in ("MEM", "MEM_OFFS", "MEM_MIB") or name.startswith("MEM_VSIB"):
            table[value] = ("", False, True)
    return table


class _Candidate(NamedTuple):
    code: int
    info: OpCodeInfo
    kinds: tuple[int, ...]
    #: Bytes of the memory operand.
    size: int


@functools.cache
def candidates() -> dict[str, list[_Candidate]]:
    """All legacy and VEX instructions by mnemonic."""
    names = {v: n for n, v in _enum_names(Mnemonic).items()}
    table: dict[str, list[_Candidate]] = {}
    for name, code in _enum_names(Code).items():
        # The first 80486's encodings of CMPXCHG are #UD ever since.
        if name.upper().startswith("CMPXCHG486"):
            continue
        info = OpCodeInfo(code)
        if not info.is_instruction or info.encoding not in (EncodingKind.LEGACY, EncodingKind.VEX):
            continue
        table.setdefault(names[info.mnemonic], []).append(
            _Candidate(code, info, tuple(info.op_kinds()), MemorySizeInfo(info.memory_size).size)
        )
    return table


def _fits(value: int, stored: int, extended: int) -> bool:
    """Whether an immediate of ``stored`` bits, sign-extended to ``extended``, can be ``value``."""
    if stored == extended:
        return -(1 << (stored - 1)) <= value < 1 << stored
    if value >= 1 << (extended - 1):
        value -= 1 << extended
    return -(1 << (stored - 1)) <= value < 1 << (stored - 1)


def _accepts(kind: int, operand: Operand, memory_bytes: int) -> bool:
    if isinstance(operand, Reg):
        if kind in _FIXED:
            return bool(_FIXED[kind] == operand.register)
        entry = _kind_classes().get(kind)
        return entry is not None and entry[1] and entry[0] == register_class(operand.register)
    if isinstance(operand, Mem):
        entry = _kind_classes().get(kind)
        if entry is None or not entry[2]:
            return False
        vsib = register_class(operand.index) in ("XMM", "YMM")
        if vsib != (kind in _VSIB) or (vsib and _VSIB[kind] != register_class(operand.index)):
            return False
        if kind == Kind.MEM_OFFS and (operand.base != Register.NONE or operand.index != Register.NONE):
            return False
        return operand.size in (0, memory_bytes) or memory_bytes == 0
    if isinstance(operand, FarPointer):
        return kind in (Kind.FARBR2_2, Kind.FARBR4_2)
    if kind in _NEAR:
        return True
    if kind == Kind.IMM8_CONST_1:
        return operand.value == 1
    if kind not in _IMMEDIATES:
        return False
    _, stored, extended = _IMMEDIATES[kind]
    return _fits(operand.value, stored, extended)


def _set_operand(instruction: Any, i: int, kind: int, operand: Operand, second_imm: bool, displ_size: int) -> None:
    if isinstance(operand, Reg):
        instruction.set_op_kind(i, OpKind.REGISTER)
        instruction.set_op_register(i, operand.register)
    elif isinstance(operand, Mem):
        instruction.set_op_kind(i, OpKind.MEMORY)
        instruction.memory_base = operand.base
        instruction.memory_index = operand.index
        instruction.memory_index_scale = operand.scale
        instruction.memory_displacement = operand.displacement & _M64
        instruction.memory_displ_size = displ_size
        if operand.segment != Register.NONE:
            instruction.segment_prefix = operand.segment
    elif isinstance(operand, FarPointer):
        wide = kind == Kind.FARBR4_2
        instruction.set_op_kind(i, OpKind.FAR_BRANCH32 if wide else OpKind.FAR_BRANCH16)
        instruction.far_branch_selector = operand.selector
        if wide:
            instruction.far_branch32 = operand.offset & 0xFFFFFFFF
        else:
            instruction.far_branch16 = operand.offset & 0xFFFF
    elif kind in _NEAR:
        instruction.set_op_kind(i, _NEAR[kind])
        instruction.near_branch64 = (
            operand.value
            & {16: 0xFFFF, 32: 0xFFFFFFFF, 64: _M64}[
                {OpKind.NEAR_BRANCH16: 16, OpKind.NEAR_BRANCH32: 32, OpKind.NEAR_BRANCH64: 64}[_NEAR[kind]]
            ]
        )
    else:
        op_kind, stored, _ = _IMMEDIATES[kind]
        instruction.set_op_kind(i, OpKind.IMMEDIATE8_2ND if second_imm else op_kind)
        value = operand.value & ((1 << stored) - 1)
        if op_kind in (OpKind.IMMEDIATE8TO16, OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64):
            signed = value - (1 << stored) if value >> (stored - 1) else value
            instruction.set_immediate_i64(i, signed)
        else:
            instruction.set_immediate_u64(i, value)


def _displacement_sizes(operand: Mem, kind: int, bits: int) -> list[int]:
    """Values of memory_displ_size to try, shortest encoding first."""
    if operand.base == Register.RIP:
        return [8]
    if operand.base == Register.NONE and (operand.index == Register.NONE or kind == Kind.MEM_OFFS):
        natural = {16: 2, 32: 4, 64: 8}[bits]
        return [natural] if natural != 2 or 0 <= operand.displacement <= 0xFFFF else [4]
    register = operand.base if operand.base != Register.NONE else operand.index
    full = {"R16": 2, "R32": 4, "R64": 8}.get(register_class(register), {16: 2, 32: 4, 64: 8}[bits])
    return ([0] if operand.displacement == 0 else []) + [1, full]


def _string_operands(instruction: Any, info: OpCodeInfo, address_size: int) -> None:
    suffix = {16: ("DI", "SI"), 32: ("EDI", "ESI"), 64: ("RDI", "RSI")}[address_size]
    for i, kind in enumerate(info.op_kinds()):
        if kind == Kind.ES_RDI:
            instruction.set_op_kind(i, getattr(OpKind, "MEMORY_ES" + suffix[0]))
        elif kind == Kind.SEG_RSI:
            instruction.set_op_kind(i, getattr(OpKind, "MEMORY_SEG_" + suffix[1]))
        elif kind == Kind.SEG_RDI:
            instruction.set_op_kind(i, getattr(OpKind, "MEMORY_SEG_" + suffix[0]))
        elif kind == Kind.SEG_RBX_AL:
            instruction.set_op_kind(i, OpKind.MEMORY)
            instruction.memory_base = {16: Register.BX, 32: Register.EBX, 64: Register.RBX}[address_size]
            instruction.memory_index = Register.AL
        else:
            instruction.set_op_kind(i, OpKind.REGISTER)
            instruction.set_op_register(i, _FIXED[kind])


def _encode(instruction: Any, bits: int, ip: int) -> bytes | None:
    encoder = Encoder(bits)
    try:
        encoder.encode(instruction, ip)
    except ValueError:
        return None
    return encoder.take_buffer()


def encodings(
    mnemonic: str, operands: list[Operand], prefixes: Prefixes, bits: int, ip: int
) -> Iterator[tuple[tuple[int, int], int, bytes]]:
    """All encodings of an instruction: ((preference, length), memory size, bytes)."""
    stack_default = {16: 16, 32: 32, 64: 64}[bits]
    for code, info, kinds, size in candidates().get(mnemonic, []):
        if not {16: info.mode16, 32: info.mode32, 64: info.mode64}[bits]:
            continue
        string = any(k in _IMPLICIT for k in kinds)
        if not (string and not operands) and len(kinds) != len(operands):
            continue
        if operands and not all(_accepts(k, o, size) for k, o in zip(kinds, operands, strict=True)):
            continue
        if prefixes.operand_size and info.operand_size not in (0, prefixes.operand_size):
            continue
        if string and prefixes.address_size == 0:
            prefixes = Prefixes(prefixes.lock, prefixes.rep, prefixes.repne, prefixes.operand_size, bits)
        far = any(isinstance(o, Mem) and o.far for o in operands)
        if mnemonic in ("jmp", "call") and len(operands) == 1 and (info.memory_size in _FAR) != far and size:
            continue
        mismatch = int(info.operand_size not in (0, stack_default) and info.operand_size != prefixes.operand_size)
        memory = next(((k, o) for k, o in zip(kinds, operands, strict=False) if isinstance(o, Mem)), None)
        for displ_size in _displacement_sizes(memory[1], memory[0], bits) if memory else [0]:
            instruction = Instruction()
            instruction.code = code
            try:
                if string and not operands:
                    _string_operands(instruction, info, prefixes.address_size)
                immediates = 0
                for i, (kind, operand) in enumerate(zip(kinds, operands, strict=False)):
                    second = kind == Kind.IMM8 and immediates > 0
                    immediates += isinstance(operand, Imm) and kind in _IMMEDIATES
                    _set_operand(instruction, i, kind, operand, second, displ_size)
            except (ValueError, OverflowError):
                continue
            instruction.has_lock_prefix = prefixes.lock
            instruction.has_rep_prefix = prefixes.rep
            instruction.has_repne_prefix = prefixes.repne
            encoded = _encode(instruction, bits, ip)
            if encoded is not None:
                yield (mismatch, len(encoded)), size if memory else 0, encoded
