"""Test cases for the CPU and their results, as records that the host runner and the engine adapter share.

The layout of both records and of the memory that a case sees is documented in ``rust/hostcpu/src/layout.rs``;
the constants here repeat it. Sizes are bytes, addresses are linear.
"""

import struct
from dataclasses import dataclass, field

PAGE = 4096
CODE_BASE = 0x1000_0000
CODE_BYTES = 2 * PAGE
DATA_BASE = 0x2000_0000
READ_ONLY_BASE = 0x2000_2000
STACK_BASE = 0x3000_0000
HIGH_BASE = 0xF000_0000
#: (address, pages) of the data regions, in the order of a data template.
DATA_REGIONS = ((DATA_BASE, 2), (READ_ONLY_BASE, 1), (STACK_BASE, 2), (HIGH_BASE, 1))
DATA_BYTES = 6 * PAGE
XSAVE_BYTES = 832
#: End of every case: INT3 fills what the case does not use of the code pages.
END = 0xCC
#: Where a case may jump to in order to end: code that no case uses.
LANDING = CODE_BASE + CODE_BYTES - 0x40

COMPAT = 1

REGISTERS_64 = (
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
)  # fmt: skip
SELECTORS = ("cs", "ss", "ds", "es", "fs", "gs")

#: Status, control and system flags that user code can see or change.
STATUS_FLAGS = 0x8D5
VISIBLE_FLAGS = STATUS_FLAGS | 0x24_4500  # ID, AC, NT, DF, TF
FLAG_NAMES = {0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 10: "DF", 11: "OF", 14: "NT", 18: "AC", 21: "ID"}

_CASE = struct.Struct("<IIQQ16QQQII")
_RESULT = struct.Struct("<IIIIQQQQ16QQQ6H4xII")
_PATCH = struct.Struct("<QI")


def data_offset(address: int) -> int | None:
    """Offset of a linear address in a data template; None if no data page holds it."""
    start = 0
    for base, pages in DATA_REGIONS:
        if base <= address < base + pages * PAGE:
            return start + address - base
        start += pages * PAGE
    return None


def flag_names(value: int) -> str:
    """Names of the set flags, such as ``CF ZF``."""
    return " ".join(name for bit, name in FLAG_NAMES.items() if value >> bit & 1) or "none"


@dataclass(slots=True)
class Case:
    """One sequence of instructions and the state that it starts from."""

    code: bytes
    rip: int
    rflags: int
    gpr: list[int]
    fs_base: int
    gs_base: int
    vector: bytes
    patches: list[tuple[int, bytes]] = field(default_factory=list)
    compat: bool = False
    #: Start of each instruction in ``code``, and one past the last.
    starts: list[int] = field(default_factory=list)
    #: For each instruction boundary, the flags that are undefined there.
    undefined: list[int] = field(default_factory=list)
    #: Seed that this case was made from.
    seed: int = 0

    def pack(self) -> bytes:
        """The record for the host runner."""
        body = [_CASE.pack(
            0, COMPAT if self.compat else 0, self.rip, self.rflags, *self.gpr, self.fs_base, self.gs_base,
            len(self.patches) + 1, 0,
        ), self.vector]  # fmt: skip
        for address, data in [(self.rip, self.code), *self.patches]:
            body.append(_PATCH.pack(address, len(data)))
            body.append(data)
            body.append(bytes(-(12 + len(data)) % 8))
        record = b"".join(body)
        return struct.pack("<I", len(record)) + record[4:]

    def data(self, template: bytes) -> bytearray:
        """The data pages at the start of the case."""
        data = bytearray(template)
        for address, patch in self.patches:
            offset = data_offset(address)
            if offset is not None:
                data[offset : offset + len(patch)] = patch
        return data


@dataclass(slots=True)
class Result:
    """What a case did."""

    #: "fault", "timeout", "killed" (host) or "failure" (engine).
    status: str
    #: Exception vector, error code (0 if the vector has none) and CR2 (0 unless #PF).
    vector_number: int
    error: int
    cr2: int
    rip: int
    rflags: int
    gpr: list[int]
    fs_base: int
    gs_base: int
    #: CS, SS, DS, ES, FS, GS.
    selectors: list[int]
    vector: bytes
    data: bytes
    #: Engine only: why it failed.
    reason: str = ""


def unpack_results(payload: bytes, cases: list[Case], template: bytes) -> list[Result]:
    """Reads the host runner's answer to ``cases``. Breakpoint traps are reported with RIP at the INT3."""
    results = []
    at = 0
    for case in cases:
        fields = _RESULT.unpack_from(payload, at)
        length, status, _signal, trap, error, cr2, rip, rflags = fields[:8]
        data = case.data(template)
        position = at + _RESULT.size + XSAVE_BYTES
        for _ in range(fields[-2]):
            address, size = _PATCH.unpack_from(payload, position)
            offset = data_offset(address)
            assert offset is not None
            data[offset : offset + size] = payload[position + 12 : position + 12 + size]
            position += (12 + size + 7) & ~7
        if trap == 3:
            rip -= 1
        elif trap == 4:  # INTO is reported behind it; engines that intercept #OF report it at the instruction
            rip = max((start for start in case.starts if start < rip), default=rip)
        has_error = trap in (8, 10, 11, 12, 13, 14, 17)
        results.append(
            Result(
                status=("fault", "timeout", "killed")[status],
                vector_number=trap,
                error=error if has_error else 0,
                cr2=cr2 if trap == 14 else 0,
                rip=rip,
                rflags=rflags,
                gpr=list(fields[8:24]),
                fs_base=fields[24],
                gs_base=fields[25],
                selectors=list(fields[26:32]),
                vector=payload[at + _RESULT.size : at + _RESULT.size + XSAVE_BYTES],
                data=bytes(data),
            )
        )
        at += length
    return results
