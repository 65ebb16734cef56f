"""Generates instruction sequences with starting states, for comparing CPUs with each other.

A case is a function of (seed, index, bits) and nothing else, so that a number reproduces it. A sequence has 1 to 8
instructions; branches go forward, so that every sequence ends: at INT3, which fills what it does not use of the code
pages, or at a fault. Which flags are undefined is tracked, and nothing reads an undefined flag.
"""

from random import Random
from typing import Any

import iced_x86
from iced_x86 import Decoder, Encoder, Instruction, InstructionInfoFactory, MemorySizeExt, RegisterExt

from nonroot.testing import generator_state
from nonroot.testing.differential_case import (
    CODE_BASE,
    CODE_BYTES,
    DATA_BASE,
    HIGH_BASE,
    LANDING,
    PAGE,
    READ_ONLY_BASE,
    STACK_BASE,
    STATUS_FLAGS,
    Case,
)  # fmt: skip
from nonroot.testing.generator_codes import (
    FORBIDDEN,
    UNCOMPARABLE,
    VENDOR_DEPENDENT,
    CodeInfo,
    allowed_features,
    code_name,
    features_of,
    usable_codes,
)  # fmt: skip
from nonroot.testing.generator_operands import (
    FIXED_REGISTERS,
    IMMEDIATE_BITS,
    MASK64,
    MEMORY,
    OR_MEMORY,
    REGISTER_POOLS,
    VSIB,
    Addressing,
    MemoryForm,
    immediate,
    target,
)  # fmt: skip
from nonroot.testing.generator_raw import raw_bytes
from nonroot.testing.generator_state import interesting

# iced's enumerations are modules, which its stubs give types of their own.
Code: Any = iced_x86.Code
DecoderOptions: Any = iced_x86.DecoderOptions
FlowControl: Any = iced_x86.FlowControl
K: Any = iced_x86.OpCodeOperandKind
Mnemonic: Any = iced_x86.Mnemonic
OpAccess: Any = iced_x86.OpAccess
OpKind: Any = iced_x86.OpKind
Register: Any = iced_x86.Register

#: iced's RflagsBits -> RFLAGS bits.
_FLAG_BITS = ((1, 0x800), (2, 0x80), (4, 0x40), (8, 0x10), (16, 1), (32, 4), (64, 0x400), (256, 0x4_0000))

_SHIFTS = frozenset({
    Mnemonic.ROL, Mnemonic.ROR, Mnemonic.RCL, Mnemonic.RCR, Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SAL, Mnemonic.SAR,
    Mnemonic.SHLD, Mnemonic.SHRD,
})  # fmt: skip
_BIT_STRINGS = frozenset({Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC})
_DIVISIONS = frozenset({Mnemonic.DIV, Mnemonic.IDIV, Mnemonic.AAM})
_POINTER_JUMPS = frozenset({Mnemonic.JMP, Mnemonic.CALL})
_RETURNS = frozenset({Mnemonic.RET, Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ})
_EXCHANGES = frozenset({Mnemonic.CMPXCHG, Mnemonic.CMPXCHG8B, Mnemonic.CMPXCHG16B})
_MASKED_MOVES = frozenset({Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.VMASKMOVDQU})
_SEGMENT_LOADS = frozenset({Mnemonic.LDS, Mnemonic.LES, Mnemonic.LSS})
#: Selectors worth loading: null, Linux's user segments, privileged, absent, in the absent LDT, out of the table.
_SELECTORS = (0, 3, 0x2B, 0x2B, 0x2B, 0x2A, 0x28, 0x23, 0x33, 0x33, 0x10, 0x18, 0x3B, 0x2F, 0x83, 0xFFF8)
_CODE_SELECTORS = (0x33, 0x33, 0x33, 0x23, 0x23, 0x30, 0x2B, 0, 0x10, 0x3B, 0x37)

_IMMEDIATE_KINDS: dict[int, Any] = {
    K.IMM8: OpKind.IMMEDIATE8, K.IMM8SEX16: OpKind.IMMEDIATE8TO16, K.IMM8SEX32: OpKind.IMMEDIATE8TO32,
    K.IMM8SEX64: OpKind.IMMEDIATE8TO64, K.IMM16: OpKind.IMMEDIATE16, K.IMM32: OpKind.IMMEDIATE32,
    K.IMM32SEX64: OpKind.IMMEDIATE32TO64, K.IMM64: OpKind.IMMEDIATE64,
}  # fmt: skip
_BRANCH_KINDS: dict[int, Any] = {
    K.BR16_1: OpKind.NEAR_BRANCH16, K.BR16_2: OpKind.NEAR_BRANCH16, K.BR32_1: OpKind.NEAR_BRANCH32,
    K.BR32_4: OpKind.NEAR_BRANCH32, K.BR64_1: OpKind.NEAR_BRANCH64, K.BR64_4: OpKind.NEAR_BRANCH64,
}  # fmt: skip
_STRING_OPERANDS: dict[tuple[int, int], Any] = {
    (K.SEG_RSI, 16): OpKind.MEMORY_SEG_SI, (K.SEG_RSI, 32): OpKind.MEMORY_SEG_ESI,
    (K.SEG_RSI, 64): OpKind.MEMORY_SEG_RSI,
    (K.ES_RDI, 16): OpKind.MEMORY_ESDI, (K.ES_RDI, 32): OpKind.MEMORY_ESEDI, (K.ES_RDI, 64): OpKind.MEMORY_ESRDI,
    (K.SEG_RDI, 16): OpKind.MEMORY_SEG_DI, (K.SEG_RDI, 32): OpKind.MEMORY_SEG_EDI,
    (K.SEG_RDI, 64): OpKind.MEMORY_SEG_RDI,
}  # fmt: skip


def rflags_of(bits: int) -> int:
    """RFLAGS bits of iced's flag set."""
    return sum(flag for bit, flag in _FLAG_BITS if bits & bit)


def has_forbidden_bytes(code: bytes) -> bool:
    """Whether code has the bytes of a system call anywhere, even across instructions."""
    return b"\x0f\x05" in code or b"\x0f\x34" in code or b"\xcd\x80" in code


class _Sequence:
    """One case in the making."""

    def __init__(self, random: Random, bits: int) -> None:
        self.random = random
        self.bits = bits
        self.count = 16 if bits == 64 else 8
        self.gpr = [0] * 16
        self.known: list[int | None] = []
        self.patches: list[tuple[int, bytes]] = []
        self.fs_base = random.choice((0, DATA_BASE, DATA_BASE + 0x100, STACK_BASE, interesting(random) >> 18))
        self.gs_base = random.choice((0, DATA_BASE, DATA_BASE + 0x800, interesting(random) >> 18))
        self.encoder = Encoder(bits)
        self.info = InstructionInfoFactory()
        #: (instruction or raw bytes, index of the instruction that a branch goes to)
        self.items: list[tuple[Instruction, bytes, int | None]] = []
        self.undefined = [0]
        self.codes: list[int] = []

    # ---- the starting state ----------------------------------------------------------------

    def registers(self, plan: list[CodeInfo]) -> None:
        """Chooses the registers so that the planned instructions find something to work on."""
        random = self.random
        for n in range(16):
            kind = random.randrange(12)
            if kind < 3:
                self.gpr[n] = random.choice((DATA_BASE, DATA_BASE + PAGE, STACK_BASE + PAGE)) + random.randrange(
                    -64, 1024
                )
            elif kind == 3:
                self.gpr[n] = random.choice((HIGH_BASE, READ_ONLY_BASE)) + random.randrange(1024)
            elif kind < 6:
                self.gpr[n] = random.randrange(-64, 256) & MASK64
            elif kind == 6:
                self.gpr[n] = random.choice(_SELECTORS)
            elif kind == 7:
                self.gpr[n] = LANDING + random.randrange(16)
            else:
                self.gpr[n] = interesting(random)
        edge = random.random()
        self.gpr[4] = STACK_BASE + PAGE - 8 * random.randrange(-32, 32)
        if edge < 0.03:
            self.gpr[4] = STACK_BASE + random.randrange(0, 33)
        elif edge < 0.06:
            self.gpr[4] = STACK_BASE + 2 * PAGE - random.randrange(0, 33)
        elif edge < 0.10:
            self.gpr[4] += random.randrange(-7, 8)
        elif edge < 0.12:
            self.gpr[4] = interesting(random)
        if any(code.string for code in plan):
            for n in (6, 7):
                if random.random() < 0.93:
                    self.gpr[n] = target(random, random.choice((1, 8, 64)), 0.5)
            self.gpr[1] = random.choice((0, 1, 2, 3, random.randrange(40), random.randrange(40), random.randrange(600)))
            if random.random() < 0.03:
                self.gpr[1] = interesting(random)
        mnemonics = {code.mnemonic for code in plan}
        if mnemonics & _DIVISIONS and random.random() < 0.8:
            self.gpr[2] = random.choice((0, 0, random.getrandbits(8), MASK64))
            if random.random() < 0.5:
                self.gpr[0] &= 0xFF
        if mnemonics & _SHIFTS and random.random() < 0.7:
            self.gpr[1] = random.choice(
                (0, 1, 2, random.randrange(32), random.randrange(72), 0x80 | random.randrange(96))
            )
        if mnemonics & {Mnemonic.LEAVE, Mnemonic.ENTER} and random.random() < 0.8:
            self.gpr[5] = STACK_BASE + PAGE + 8 * random.randrange(-32, 32)
        if Mnemonic.XLATB in mnemonics:
            self.gpr[3] = DATA_BASE + random.randrange(PAGE)
        if mnemonics & _MASKED_MOVES:
            self.gpr[7] = target(random, 16, 0.3)
        if self.bits == 32:
            self.gpr = [value & 0xFFFF_FFFF for value in self.gpr]
            self.gpr[8:] = [0] * 8
        self.known = list(self.gpr)

    def rflags(self, plan: list[CodeInfo]) -> int:
        """RFLAGS at the start; IF is always set, as user code sees it."""
        random = self.random
        value = 0x202 | (random.getrandbits(12) & STATUS_FLAGS)
        if random.random() < (0.25 if any(code.string for code in plan) else 0.05):
            value |= 0x400
        for probability, bit in ((0.02, 0x4_0000), (0.01, 0x100), (0.1, 0x20_0000), (0.01, 0x4000)):
            if random.random() < probability:
                value |= bit
        return value

    # ---- instructions ------------------------------------------------------------------------

    def add(self, code: CodeInfo, remaining: int) -> bool:
        """Adds an instruction of this code; False if it does not suit here."""
        for _ in range(4):
            instruction = self._build(code)
            if instruction is not None and self._accept(instruction, b"", remaining):
                return True
        return False

    def add_raw(self, data: bytes) -> bool:
        """Adds one instruction as bytes, which may be no instruction at all."""
        # LOCK on what cannot be locked is valid to a decoder that does not check, and #UD to a CPU.
        decoder = Decoder(self.bits, data, ip=CODE_BASE)
        instruction = decoder.decode()
        amd = Decoder(self.bits, data, DecoderOptions.AMD, ip=CODE_BASE).decode()
        if instruction.is_invalid != amd.is_invalid or (not amd.is_invalid and instruction.code != amd.code):
            return False
        if not instruction.is_invalid:
            if not self._comparable(instruction):
                return False
            if instruction.flow_control != FlowControl.NEXT or instruction.op_code().is_input_output:
                return False
            if self._reads_undefined(instruction) or self._hazard(instruction):
                return False
            data = data[: instruction.len]
        elif b"\x0f\x00" in data or b"\x0f\x01" in data:
            return False  # hypervisors below the host emulate these, and not all to the letter
        if has_forbidden_bytes(data):
            return False
        self._append(instruction, data, None)
        return True

    def _comparable(self, instruction: Instruction) -> bool:
        mnemonic = instruction.mnemonic
        if mnemonic in FORBIDDEN or mnemonic in UNCOMPARABLE or code_name(int(instruction.code)) in VENDOR_DEPENDENT:
            return False
        if not features_of(int(instruction.code)) <= allowed_features():
            return False
        if mnemonic == Mnemonic.MOV and instruction.op0_kind == OpKind.REGISTER:
            return instruction.op0_register not in (Register.FS, Register.GS)
        return True

    def _set_memory(self, instruction: Instruction, operand: int, form: MemoryForm) -> None:
        instruction.set_op_kind(operand, OpKind.MEMORY)
        instruction.memory_base = form.base  # type: ignore[assignment]
        instruction.memory_index = form.index_register  # type: ignore[assignment]
        instruction.memory_index_scale = form.scale
        instruction.memory_displacement = form.displacement & MASK64
        instruction.memory_displ_size = form.size
        instruction.segment_prefix = form.segment  # type: ignore[assignment]

    def _register(self, kind: int, code: CodeInfo, operand: int) -> int:
        random = self.random
        first, count64, count32 = REGISTER_POOLS[kind]
        count = count64 if self.bits == 64 else count32
        number = random.randrange(count)
        if code.mnemonic in _BIT_STRINGS and operand == 1 and random.random() < 0.7:
            small = [n for n in range(self.count) if self.known[n] is not None and self.known[n] < 1024]  # type: ignore[operator]
            number = random.choice(small) if small else number
        elif kind == K.SEG_REG:
            number = random.choice((0, 2, 3, 3, 4, 5, 1)) if operand == 1 else random.choice((0, 2, 3, 0, 2, 3, 1))
        elif code.mnemonic in _POINTER_JUMPS and random.random() < 0.8:
            good = [n for n in range(count) if (self.known[n] or 0) & -64 == LANDING]
            number = random.choice(good) if good else number
        elif (code.mnemonic == Mnemonic.MOV and K.SEG_REG in code.kinds and operand == 1) and random.random() < 0.8:
            good = [n for n in range(count) if self.known[n] in _SELECTORS]
            number = random.choice(good) if good else number
        elif (
            operand == 0 and kind != K.XMM_REG and random.random() < 0.85
            and self.known[number % self.count] is not None and (self.known[number % self.count] or 0) >= DATA_BASE
        ):  # fmt: skip
            number = random.randrange(count)  # pointers are worth keeping
        if number == 4 and int(first) != Register.AL and random.random() < 0.9 and int(first) <= Register.RAX:
            number = random.randrange(count)
        return int(first) + number

    def _build(self, code: CodeInfo) -> Instruction | None:
        random = self.random
        instruction = Instruction()
        instruction.code = code.code  # type: ignore[assignment]
        addressing = Addressing(random, self.bits, self.known, self.fs_base, self.gs_base)
        address_size = self.bits if random.random() < 0.85 else 32 if self.bits == 64 else 16
        memory_first = False
        for operand, kind in enumerate(code.kinds):
            if kind in FIXED_REGISTERS:
                instruction.set_op_kind(operand, OpKind.REGISTER)
                instruction.set_op_register(operand, FIXED_REGISTERS[kind])
            elif kind in MEMORY or (kind in OR_MEMORY and random.random() < 0.55):
                size = MemorySizeExt.size(instruction.memory_size) or 16
                vsib = VSIB.get(kind)
                aligned = 0.9 if code.vector and not code.vex else 0.6
                if code.lockable or code.mnemonic == Mnemonic.XCHG:
                    aligned = 0.98
                form, address = addressing.memory(target(random, size, aligned), vsib=vsib)
                self._set_memory(instruction, operand, form)
                memory_first |= operand == 0
                self._seed_memory(code, address, size)
            elif kind in REGISTER_POOLS:
                instruction.set_op_kind(operand, OpKind.REGISTER)
                instruction.set_op_register(operand, self._register(kind, code, operand))  # type: ignore[arg-type]
            elif kind in IMMEDIATE_BITS:
                second = kind == K.IMM8 and operand and code.kinds[operand - 1] == K.IMM16
                instruction.set_op_kind(operand, OpKind.IMMEDIATE8_2ND if second else _IMMEDIATE_KINDS[kind])
                value = immediate(random, IMMEDIATE_BITS[kind])
                if code.mnemonic == Mnemonic.ENTER:
                    value = (
                        random.choice((0, 0, 1, 2, 3, random.randrange(32))) if second else random.randrange(0, 256, 8)
                    )
                elif code.mnemonic in (Mnemonic.RET, Mnemonic.RETF):
                    value = random.randrange(0, 64, 2)
                instruction.set_immediate_i64(operand, value)
            elif kind == K.IMM8_CONST_1:
                instruction.set_op_kind(operand, OpKind.IMMEDIATE8)
                instruction.immediate8 = 1
            elif kind in _BRANCH_KINDS:
                instruction.set_op_kind(operand, _BRANCH_KINDS[kind])
            elif kind in (K.FARBR2_2, K.FARBR4_2):
                instruction.set_op_kind(operand, OpKind.FAR_BRANCH16 if kind == K.FARBR2_2 else OpKind.FAR_BRANCH32)
                instruction.far_branch_selector = random.choice(_CODE_SELECTORS)
                if kind == K.FARBR2_2:
                    instruction.far_branch16 = LANDING & 0xFFFF
                else:
                    instruction.far_branch32 = LANDING
            elif kind == K.MEM_OFFS:
                address = target(random, 8, 0.6)
                size = 8 if self.bits == 64 else 4
                if address < 1 << 32 and random.random() < 0.2:
                    size = 4
                elif self.bits == 32:
                    address &= 0xFFFF_FFFF
                self._set_memory(instruction, operand, MemoryForm(0, 0, 1, address, size, Register.NONE))
            elif kind == K.SEG_RBX_AL:
                base = Register.RBX if address_size == 64 else Register.EBX if address_size == 32 else Register.BX
                self._set_memory(instruction, operand, MemoryForm(base, Register.AL, 1, 0, 0, Register.NONE))
            elif (kind, address_size) in _STRING_OPERANDS:
                instruction.set_op_kind(operand, _STRING_OPERANDS[kind, address_size])
                if kind != K.ES_RDI and random.random() < 0.1:
                    instruction.segment_prefix = random.choice((Register.DS, Register.ES, Register.FS, Register.GS))
            else:
                raise AssertionError(f"{code.name}: operand kind {kind} is not handled")
        # Whether REP INS and REP OUTS of nothing check the port's permission is left to the CPU.
        if code.string and code.repeatable and not code.system and random.random() < 0.65:
            if random.random() < 0.5:
                instruction.has_rep_prefix = True
            else:
                instruction.has_repne_prefix = True
        if code.lockable and ((memory_first and random.random() < 0.3) or random.random() < 0.01):
            instruction.has_lock_prefix = True
        if code.mnemonic in _RETURNS:
            self._seed_return(code)
        return instruction

    def _seed_memory(self, code: CodeInfo, address: int, size: int) -> None:
        """Puts something fitting where a memory operand points."""
        random = self.random
        if not (DATA_BASE <= address < DATA_BASE + 2 * PAGE - 16 or STACK_BASE <= address < STACK_BASE + 2 * PAGE - 16):
            return
        data = b""
        landing = LANDING + random.randrange(16)
        width = self.bits // 8
        if code.mnemonic in _POINTER_JUMPS and random.random() < 0.9:
            data = landing.to_bytes(width, "little")
            if code.name.endswith(("M1616", "M1632", "M1664")):
                offset = 2 if code.name.endswith("M1616") else 4
                data = data[:offset] + random.choice(_CODE_SELECTORS).to_bytes(2, "little")
        elif code.mnemonic in _SEGMENT_LOADS:
            data = random.randbytes(2 if code.name.endswith("M1616") else 4) + random.choice(_SELECTORS).to_bytes(
                2, "little"
            )
        elif code.mnemonic in _EXCHANGES and random.random() < 0.5:
            if code.mnemonic == Mnemonic.CMPXCHG:
                data = (self.known[0] or 0).to_bytes(8, "little")[: min(size, 8)]
            else:
                half = size // 2
                data = b"".join((self.known[n] or 0).to_bytes(8, "little")[:half] for n in (0, 2))
        elif code.mnemonic in _DIVISIONS and random.random() < 0.5:
            data = (interesting(random) | 1 << random.randrange(4, 8 * size)).to_bytes(8, "little")[:size]
        elif code.mnemonic == Mnemonic.BOUND:
            low, high = sorted((interesting(random) & 0xFFFF, interesting(random) & 0xFFFF))
            data = low.to_bytes(size // 2, "little") + high.to_bytes(size // 2, "little")
        elif code.name.startswith("MOV_SREG") or code.mnemonic in (Mnemonic.LAR, Mnemonic.LSL, Mnemonic.VERR):
            data = random.choice(_SELECTORS).to_bytes(2, "little")
        if data:
            self.patches.append((address, data))

    def _seed_return(self, code: CodeInfo) -> None:
        """Puts a return frame at the stack pointer."""
        random = self.random
        rsp = self.known[4]
        if rsp is None or not STACK_BASE <= rsp < STACK_BASE + 2 * PAGE - 40 or random.random() < 0.1:
            return
        suffix = code.name.rstrip("_IM0123456789")[-1]
        size = {"W": 2, "D": 4, "Q": 8}.get(suffix, self.bits // 8)
        words = [LANDING + random.randrange(16)]
        if code.mnemonic != Mnemonic.RET:
            words.append(random.choice(_CODE_SELECTORS))
        if code.mnemonic in (Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ):
            words.append(0x202 | random.getrandbits(22) & 0x24_0DD5)
            words.append(STACK_BASE + random.randrange(2 * PAGE))
            words.append(random.choice((0x2B, 0x2B, 0x2B, 0x2B, 0, 0x23, 0x28)))
        mask = (1 << 8 * size) - 1
        self.patches.append((rsp, b"".join((word & mask).to_bytes(size, "little") for word in words)))

    def _reads_undefined(self, instruction: Instruction) -> bool:
        return bool(rflags_of(instruction.rflags_read) & self.undefined[-1])

    def _hazard(self, instruction: Instruction) -> bool:
        """Whether the result, beyond flags, is undefined."""
        if instruction.mnemonic in (Mnemonic.SHLD, Mnemonic.SHRD) and RegisterExt.size(instruction.op1_register) == 2:
            if instruction.op2_kind == OpKind.REGISTER:
                count = self.known[1]
                return count is None or count & 31 > 16
            return instruction.immediate8 & 31 > 16
        return False

    def _accept(self, instruction: Instruction, data: bytes, remaining: int) -> bool:
        if self._reads_undefined(instruction) or self._hazard(instruction) or not self._comparable(instruction):
            return False
        branch = None
        if instruction.op_count and instruction.op0_kind in _BRANCH_KINDS.values():
            branch = len(self.items) + 1 + self.random.randrange(remaining)
            self._set_branch(instruction, CODE_BASE)
        try:
            self.encoder.encode(instruction, CODE_BASE)
        except ValueError:
            self.encoder.take_buffer()
            return False
        data = self.encoder.take_buffer()
        if has_forbidden_bytes(data):
            return False
        self._append(instruction, data, branch)
        return True

    def _set_branch(self, instruction: Instruction, address: int) -> None:
        kind = instruction.op0_kind
        if kind == OpKind.NEAR_BRANCH64:
            instruction.near_branch64 = address
        elif kind == OpKind.NEAR_BRANCH32:
            instruction.near_branch32 = address & 0xFFFF_FFFF
        else:
            instruction.near_branch16 = address & 0xFFFF

    def _append(self, instruction: Instruction, data: bytes, branch: int | None) -> None:
        self.items.append((instruction, data, branch))
        self.codes.append(int(instruction.code))
        before = self.undefined[-1]
        if instruction.is_invalid:
            self.undefined.append(before)
            return
        undefined = rflags_of(instruction.rflags_undefined)
        conditional = instruction.mnemonic in _SHIFTS or instruction.has_rep_prefix or instruction.has_repne_prefix
        defined = (
            0
            if conditional
            else rflags_of(instruction.rflags_written | instruction.rflags_cleared | instruction.rflags_set)
        )
        # A branch may skip what follows, so definitions after one do not count for certain.
        if any(target_index is not None and target_index >= len(self.items) for _, _, target_index in self.items[:-1]):
            defined = 0
        self.undefined.append(before & ~defined | undefined)
        if instruction.mnemonic in (Mnemonic.WRFSBASE, Mnemonic.WRGSBASE):
            return
        increment = instruction.stack_pointer_increment
        for used in self.info.info(instruction).used_registers():
            if used.access in (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE):
                full = RegisterExt.full_register(used.register)
                number = int(full) - int(Register.RAX)
                if 0 <= number < 16:
                    old = self.known[number]
                    self.known[number] = old + increment if number == 4 and increment and old is not None else None

    # ---- the result --------------------------------------------------------------------------

    def finish(self, rflags: int, vector: bytes, seed: int) -> Case:
        """Encodes the sequence at its place."""
        random = self.random
        length = sum(len(data) for _, data, _ in self.items)
        place = random.random()
        rip = CODE_BASE + 0x100 + random.randrange(64)
        if place < 0.05:  # across the two pages of code
            rip = CODE_BASE + PAGE - random.randrange(1, length + 1)
        elif place < 0.07:  # into the missing page behind them
            rip = CODE_BASE + CODE_BYTES - random.randrange(1, length + 1)
        code, starts = self._encode(rip)
        room = CODE_BASE + CODE_BYTES - rip
        return Case(
            code=code[:room],
            rip=rip,
            rflags=rflags,
            gpr=self.gpr,
            fs_base=self.fs_base,
            gs_base=self.gs_base,
            vector=vector,
            patches=self.patches,
            compat=self.bits == 32,
            starts=starts,
            undefined=self.undefined,
            seed=seed,
        )

    def _encode(self, rip: int) -> tuple[bytes, list[int]]:
        starts = [rip]
        for _, data, _ in self.items:
            starts.append(starts[-1] + len(data))
        parts = []
        for (instruction, data, branch), start in zip(self.items, starts, strict=False):
            if branch is not None:
                self._set_branch(instruction, starts[min(branch, len(self.items))])
            relocate = branch is not None or (not instruction.is_invalid and instruction.is_ip_rel_memory_operand)
            if relocate and instruction.len == 0:
                try:
                    size = self.encoder.encode(instruction, start)
                except ValueError:
                    size = 0
                encoded = self.encoder.take_buffer()
                data = encoded if size == len(data) and not has_forbidden_bytes(encoded) else b"\x90" * len(data)
            parts.append(data)
        code = b"".join(parts)
        if has_forbidden_bytes(code):
            code = b"\x90" * len(code)
        return code, starts


class Generator:
    """Makes cases. ``focus`` restricts the instructions to codes whose name contains it."""

    #: Share of vector instructions.
    VECTOR = 0.22
    #: Probability that a sequence ends with raw bytes, and with a system instruction, which mostly fault.
    RAW, SYSTEM = 0.2, 0.06

    def __init__(self, seed: int, bits: int = 64, focus: str = "", codes: frozenset[int] | None = None) -> None:
        self.seed = seed
        self.bits = bits
        table = [code for code in usable_codes(bits) if focus in code.name and (codes is None or code.code in codes)]
        self._integer = [code for code in table if not code.vector and not code.system]
        self._vector = [code for code in table if code.vector]
        self._system = [code for code in table if code.system]
        self._states: list[bytes] = []
        random = Random(f"{seed}:{bits}:shared")
        self._states = [generator_state.vector_state(random) for _ in range(64)]
        #: Data pages at the start of every case of this seed.
        self.template = generator_state.template(random)
        self.raw = not focus

    def _plan(self, random: Random) -> list[CodeInfo | None]:
        """Codes for a sequence; None stands for raw bytes."""
        plan: list[CodeInfo | None] = []
        for _ in range(random.choice((1, 2, 3, 4, 4, 5, 6, 8))):
            vector = self._vector and (not self._integer or random.random() < self.VECTOR)
            plan.append(random.choice(self._vector) if vector else self._any(random))
        if self.raw and random.random() < self.RAW:
            plan[-1] = None
        elif self._system and random.random() < self.SYSTEM:
            plan[-1] = random.choice(self._system)
        return plan

    def _any(self, random: Random) -> CodeInfo:
        return random.choice(self._integer or self._vector or self._system)

    def case(self, index: int) -> tuple[Case, list[int]]:
        """Case number ``index`` of this seed, and iced's codes of its instructions (0 for no instruction)."""
        random = Random(f"{self.seed}:{self.bits}:{index}")
        plan = self._plan(random)
        length = len(plan)
        sequence = _Sequence(random, self.bits)
        real = [code for code in plan if code is not None]
        sequence.registers(real)
        rflags = sequence.rflags(real)
        for position, code in enumerate(plan):
            remaining = length - position
            if code is None:
                for _ in range(20):
                    if sequence.add_raw(raw_bytes(random, self.bits, sequence.items[-1][1] if sequence.items else b"")):
                        break
                continue
            for _ in range(8):
                if sequence.add(code, remaining):
                    break
                code = self._any(random)
        if not sequence.items:
            sequence.add_raw(b"\x90")
        case = sequence.finish(rflags, random.choice(self._states), index)
        return case, sequence.codes


INVALID = int(Code.INVALID)
