"""Instructions that the comparison with the host once found wrong, each alone on both CPUs."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

import pytest

from nonroot.testing.differential_case import CODE_BASE, DATA_BASE, READ_ONLY_BASE, REGISTERS_64, STACK_BASE, Case
from nonroot.testing.differential_compare import differences
from nonroot.testing.differential_engine import EngineCpu
from nonroot.testing.differential_host import HostCpu
from nonroot.testing.generator import Generator

NOT_CANONICAL = 1 << 62


@dataclass(frozen=True)
class Found:
    what: str
    code: str
    registers: dict[str, int] = field(default_factory=dict)
    rflags: int = 0x202
    vector: int = 3
    bits: int = 64
    memory: bytes = b""


FOUND = [
    Found("byte registers SPL to DIL are RSP to RDI", "40b401 40b502 40b603 40b704"),
    Found("byte registers R8B to R15B", "41b001 41b102 41b704 4500cf"),
    Found("update across pages faults at the second page", "4883 4b fc 01", {"rbx": READ_ONLY_BASE}, vector=14),
    Found("LAR gives the limit's high bits", "0f02c8", {"rax": 0x2B}),
    Found("IRETQ pops five words before it looks", "48cf", {"rsp": STACK_BASE + 0x1FF0}, vector=14),
    Found("alignment of 8-byte vector operands", "f30f7e0b", {"rbx": DATA_BASE + 1}, 0x40202, 17),
    Found("non-canonical before misaligned", "8b03", {"rbx": NOT_CANONICAL + 1}, 0x40202, 13),
    Found("SS override does not turn #GP into #SS", "368b03", {"rbx": NOT_CANONICAL}, vector=13),
    Found("DS override does not turn #SS into #GP", "3e8b4500", {"rbp": NOT_CANONICAL}, vector=12),
    Found("F3 41 90 exchanges", "f34190", {"rax": 1, "r8": 2}),
    Found("F3 90 does not", "f390", {"rax": 1, "r8": 2}),
    Found("REP traps after each iteration", "f3ac", {"rsi": DATA_BASE, "rcx": 5}, 0x302, 1),
    Found("CVTPI2PD from memory ignores pending x87 exceptions", "660f2a03", {"rbx": DATA_BASE}),
    Found("masked store writes nothing if one element faults", "c4e2712e 03", {"rbx": READ_ONLY_BASE - 8}, vector=14),
    Found("flat segments end at 4 GiB", "8b03", {"rbx": 0xFFFFFFFE}, vector=13, bits=32),
    Found("flat stack segments end at 4 GiB", "8b4500", {"rbp": 0xFFFFFFFE}, vector=12, bits=32),
    Found("too long", "66" * 14 + "6690", vector=13),
]


@pytest.mark.parametrize("found", FOUND, ids=lambda found: found.what)
def test_agrees_now(host: HostCpu, found: Found) -> None:
    gpr = [0x1000 + n for n in range(16)]
    gpr[4] = STACK_BASE + 0x1000
    for name, value in found.registers.items():
        gpr[REGISTERS_64.index(name)] = value
    code = bytes.fromhex(found.code)
    vector = bytearray(832)
    struct.pack_into("<HH", vector, 0, 0x37E, 0x8081)  # an unmasked invalid operation is pending
    struct.pack_into("<I", vector, 24, 0x1F80)
    vector[160:416] = b"\xf0" * 256
    vector[512] = 7
    template = Generator(1).template
    case = Case(
        code, CODE_BASE, found.rflags, gpr, 0, 0, bytes(vector), compat=found.bits == 32,
        starts=[CODE_BASE, CODE_BASE + len(code)], undefined=[0, 0],
    )  # fmt: skip
    engine = EngineCpu()
    judge, tested = host.run([case], template)[0], engine.run([case], template)[0]
    assert differences(case, judge, tested) == ([], 0)
    assert tested.vector_number == found.vector
    engine.close()
