"""Compares results of two CPUs, and says what differs in words."""

import struct

from iced_x86 import Decoder, Instruction, MemorySizeExt, Mnemonic, OpKind

from nonroot.testing.differential_case import (
    DATA_BYTES,
    DATA_REGIONS,
    LANDING,
    PAGE,
    REGISTERS_64,
    SELECTORS,
    STATUS_FLAGS,
    VISIBLE_FLAGS,
    Case,
    Result,
    flag_names,
)  # fmt: skip

_EXCEPTIONS = {
    0: "#DE", 1: "#DB", 3: "#BP (end)", 4: "#OF", 5: "#BR", 6: "#UD", 7: "#NM", 8: "#DF", 10: "#TS", 11: "#NP",
    12: "#SS", 13: "#GP", 14: "#PF", 16: "#MF", 17: "#AC", 19: "#XM",
}  # fmt: skip

#: Bytes of an XSAVE area that are compared: control, status, tags; MXCSR; ST0..7; XMM; YMM high halves. Not compared:
#: the x87 instruction and operand pointers, which vendors fill differently.
_COMPARED = [(0, 5), (24, 28), *((32 + 16 * n, 42 + 16 * n) for n in range(8)), (160, 416), (576, 832)]
_MASK = bytearray(832)
for _start, _end in _COMPARED:
    _MASK[_start:_end] = b"\xff" * (_end - _start)
_MASK_NUMBER = int.from_bytes(_MASK, "little")


def same_vector(left: bytes, right: bytes) -> bool:
    """Whether two XSAVE areas agree where they must."""
    if left == right:
        return True
    return not (int.from_bytes(left, "little") ^ int.from_bytes(right, "little")) & _MASK_NUMBER


#: Instructions that access memory more than once, in an order that CPUs choose.
_SEVERAL_ACCESSES = frozenset({
    Mnemonic.CALL, Mnemonic.JMP, Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ, Mnemonic.LDS,
    Mnemonic.LES, Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS, Mnemonic.ENTER, Mnemonic.BOUND, Mnemonic.PUSHA,
    Mnemonic.PUSHAD,
    Mnemonic.POPA, Mnemonic.POPAD, Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ,
})  # fmt: skip
_SHA = frozenset({
    Mnemonic.SHA1MSG1, Mnemonic.SHA1MSG2, Mnemonic.SHA1NEXTE, Mnemonic.SHA1RNDS4, Mnemonic.SHA256MSG1,
    Mnemonic.SHA256MSG2, Mnemonic.SHA256RNDS2,
})  # fmt: skip
_FAR = frozenset({
    Mnemonic.CALL, Mnemonic.JMP, Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ, Mnemonic.LDS,
    Mnemonic.LES, Mnemonic.LSS,
})  # fmt: skip
_TO_MMX = frozenset({
    Mnemonic.CVTPD2PI, Mnemonic.CVTTPD2PI, Mnemonic.CVTPS2PI, Mnemonic.CVTTPS2PI, Mnemonic.CVTPI2PS, Mnemonic.CVTPI2PD,
})  # fmt: skip
_MASKED = frozenset({Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.VMASKMOVDQU})
_PAGE_OR_ALIGNMENT = frozenset({12, 13, 14, 17})
#: Linux's user address space ends a page before the canonical hole; it reports faults above as if pages were present.
_USER_END = (1 << 47) - PAGE


def _instruction(case: Case, rip: int) -> Instruction | None:
    """The case's instruction at an address; None if none starts there."""
    if rip not in case.starts[:-1]:
        return None
    return Decoder(32 if case.compat else 64, case.code[rip - case.rip :], ip=rip).decode()


def _left_to_the_cpu(case: Case, judge: Result, tested: Result) -> bool:
    """Whether CPUs may differ in how the last instruction faults (AMD's and Intel's do)."""
    # Code goes forward, so the earlier of two faults is where they part.
    faults = [r.rip for r in (judge, tested) if r.vector_number != 3 and r.rip in case.starts]
    instruction = _instruction(case, min(faults, default=0))
    if instruction is None:
        return False
    mnemonic = instruction.mnemonic
    vectors = {judge.vector_number, tested.vector_number}
    if mnemonic in _SHA:
        return 13 in vectors  # AMD does not check the alignment of SHA's operands
    if mnemonic in _MASKED:
        return bool(vectors & _PAGE_OR_ALIGNMENT)  # with an empty mask too; AMD enters MMX mode before the fault
    if instruction.is_vsib and 1 in vectors:
        return True  # a single-step trap between two elements
    if 17 in vectors and (mnemonic in _FAR or instruction.is_vsib or mnemonic == Mnemonic.BOUND):
        return True
    if mnemonic in _SEVERAL_ACCESSES and judge.rip == tested.rip and vectors & {14, 17}:
        return vectors <= _PAGE_OR_ALIGNMENT  # which of the operands faults
    if 17 in vectors:
        # Alignment checks of operands of 16 bytes and more are left to the CPU (SDM 3A 6.15, #AC).
        return MemorySizeExt.size(instruction.memory_size) >= 10
    if mnemonic == Mnemonic.CVTPI2PS and 16 in vectors:
        return instruction.op1_kind == OpKind.MEMORY  # AMD takes no pending #MF for an operand in memory
    if judge.rip != tested.rip:
        return False
    if vectors == {13, 16}:
        return True  # a misaligned operand, and a pending x87 exception
    if 14 in vectors and MemorySizeExt.size(instruction.memory_size) == 10:
        return vectors <= _PAGE_OR_ALIGNMENT  # ten bytes are two accesses to some
    if vectors == {12, 13} and case.compat:
        # Misaligned, and across the end of a flat segment.
        return MemorySizeExt.size(instruction.memory_size) == 16
    if instruction.is_invalid:
        return vectors <= {6, 13, 14}  # too long, across a page and invalid: which is found first
    if mnemonic == Mnemonic.ENTER:
        return vectors <= _PAGE_OR_ALIGNMENT  # frames pushed before the fault stay in memory, or do not
    if mnemonic == Mnemonic.VCVTPS2PH:
        return 19 in vectors and vectors <= _PAGE_OR_ALIGNMENT | {19}
    # AMD enters MMX mode before the exception.
    return mnemonic in _TO_MMX and vectors == {19}


def _is_dot_product(case: Case, judge: Result) -> bool:
    """Whether the case ended at DPPS or DPPD, whose several roundings may each stop at their first exception."""
    instruction = _instruction(case, judge.rip)
    dot_products = (Mnemonic.DPPS, Mnemonic.DPPD, Mnemonic.VDPPS, Mnemonic.VDPPD)
    return instruction is not None and instruction.mnemonic in dot_products


def undefined_flags(case: Case, rip: int) -> int:
    """Flags that are undefined where the case ended."""
    if rip in case.starts:
        return case.undefined[case.starts.index(rip)]
    mask = 0
    for value in case.undefined:
        mask |= value
    return mask


def executed(case: Case, result: Result) -> int:
    """Instructions of the sequence that ended or faulted; branches over others count as if they had not been taken."""
    if result.rip in case.starts:
        return case.starts.index(result.rip) + (result.vector_number != 3)
    return len(case.starts) - 1


def _quick(left: Result, right: Result) -> bool:
    return (
        left.status == right.status
        and left.vector_number == right.vector_number
        and left.error == right.error
        and left.cr2 == right.cr2
        and left.rip == right.rip
        and left.gpr == right.gpr
        and not (left.rflags ^ right.rflags) & VISIBLE_FLAGS
        and left.fs_base == right.fs_base
        and left.gs_base == right.gs_base
        and left.selectors == right.selectors
        and left.data == right.data
        and same_vector(left.vector, right.vector)
    )


def differences(case: Case, judge: Result, tested: Result, *, host: bool = True) -> tuple[list[str], int]:
    """What differs, in words, and the differing flags among the undefined ones.

    ``host``: the judge is a host under Linux, which does not tell whether kernel addresses are mapped.
    """
    if _quick(judge, tested):
        return [], 0
    found: list[str] = []
    undefined = 0
    if judge.status == "timeout" and (host or tested.status == "timeout"):
        return [], 0  # callers count them
    if host and _left_to_the_cpu(case, judge, tested):
        return [], 0
    gathers = False
    if judge.rip == tested.rip and judge.vector_number in _PAGE_OR_ALIGNMENT:
        instruction = _instruction(case, judge.rip)
        gathers = instruction is not None and instruction.is_vsib
    if judge.status != tested.status:
        found.append(f"ended as {judge.status}, not as {tested.status} {tested.reason}")
    error = judge.error ^ tested.error
    if host and judge.vector_number == 14 and judge.cr2 >= _USER_END and tested.cr2 >= _USER_END:
        error &= ~1
    if judge.vector_number != tested.vector_number or error:
        found.append(f"ended by {_exception(judge)}, not by {_exception(tested)}")
    if judge.cr2 != tested.cr2 and judge.vector_number == tested.vector_number:
        found.append(f"CR2 is {judge.cr2:#x}, not {tested.cr2:#x}")
    if judge.rip != tested.rip:
        found.append(f"RIP is {place(case, judge.rip)}, not {place(case, tested.rip)}")
    count = 8 if case.compat else 16
    for name, left, right in zip(REGISTERS_64[:count], judge.gpr, tested.gpr, strict=False):
        if host and name == "rsp" and judge.selectors[0] != 0x33:
            left, right = left & 0xFFFF_FFFF, right & 0xFFFF_FFFF  # the upper half is undefined outside 64-bit mode
        if left != right:
            found.append(f"{name} is {left:#x}, not {right:#x}")
    flags = (judge.rflags ^ tested.rflags) & VISIBLE_FLAGS
    if flags:
        undefined = flags & undefined_flags(case, judge.rip) & STATUS_FLAGS
        if flags & ~undefined:
            found.append(
                f"flags {flag_names(flags & ~undefined)} differ: {flag_names(judge.rflags)} is right, "
                f"not {flag_names(tested.rflags)}"
            )
    bases = {"fs_base": (judge.fs_base, tested.fs_base), "gs_base": (judge.gs_base, tested.gs_base)}
    found += [f"{name} is {left:#x}, not {right:#x}" for name, (left, right) in bases.items() if left != right]
    for name, left, right in zip(SELECTORS, judge.selectors, tested.selectors, strict=True):
        if host and left == 0 and right < 4:
            continue  # IRET, by which the host's kernel came back, clears a null selector's RPL
        if left != right:
            found.append(f"{name} is {left:#x}, not {right:#x}")
    if judge.data != tested.data:
        found += _data(judge.data, tested.data)
    # A gather that faults has loaded some elements, which ones is the CPU's choice (SDM 2C, VGATHERDPS).
    if not same_vector(judge.vector, tested.vector) and not gathers:
        left_vector, right_vector = judge.vector, tested.vector
        if host and judge.vector_number == 19:
            # With an unmasked exception, whether the result was inexact too is not known to the native unit.
            keep = ~0x3F if _is_dot_product(case, judge) else ~0x20
            left_vector, right_vector = (v[:24] + bytes([v[24] & keep]) + v[25:] for v in (left_vector, right_vector))
        if not same_vector(left_vector, right_vector):
            found += _vector(left_vector, right_vector)
    return found, undefined


def _exception(result: Result) -> str:
    name = _EXCEPTIONS.get(result.vector_number, f"vector {result.vector_number}")
    if result.vector_number in (8, 10, 11, 12, 13, 14, 17):
        name += f"({result.error:#x})"
    return name


def place(case: Case, rip: int) -> str:
    """An instruction pointer, relative to the case's instructions where it is at one."""
    if rip in case.starts:
        return f"{rip:#x} (instruction {case.starts.index(rip) + 1})"
    if rip & -64 == LANDING:
        return f"{rip:#x} (landing)"
    return f"{rip:#x}"


def _data(left: bytes, right: bytes) -> list[str]:
    found = []
    for base, pages in DATA_REGIONS:
        start = 0
        for other, count in DATA_REGIONS:
            if other == base:
                break
            start += count * PAGE
        for offset in range(start, start + pages * PAGE, 16):
            if left[offset : offset + 16] != right[offset : offset + 16]:
                address = base + offset - start
                found.append(
                    f"[{address:#x}] is {left[offset : offset + 16].hex()}, not {right[offset : offset + 16].hex()}"
                )
    if len(found) > 6:
        found[6:] = [f"{len(found) - 6} more differences in memory of {DATA_BYTES} bytes"]
    return found


def _vector(left: bytes, right: bytes) -> list[str]:
    found = []
    for name, at, form in (("FCW", 0, "<H"), ("FSW", 2, "<H"), ("FTW", 4, "<B"), ("MXCSR", 24, "<I")):
        (a,), (b,) = struct.unpack_from(form, left, at), struct.unpack_from(form, right, at)
        if a != b:
            found.append(f"{name} is {a:#x}, not {b:#x}")
    for name, count, start, length in (("ST", 8, 32, 10), ("XMM", 16, 160, 16), ("YMM high", 16, 576, 16)):
        for n in range(count):
            at = start + 16 * n
            a_bytes, b_bytes = left[at : at + length], right[at : at + length]
            if a_bytes != b_bytes:
                found.append(f"{name}{n} is {a_bytes[::-1].hex()}, not {b_bytes[::-1].hex()}")
    return found
