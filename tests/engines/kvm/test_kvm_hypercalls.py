"""Hypercalls of toy guests under the kvm engine, which KVM itself would swallow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nonroot.engines.exits import Halt, Hypercall, MsrWrite, PortIo
from nonroot.engines.kvm import probe
from nonroot.engines.kvm.engine import KvmEngine
from nonroot.engines.policy import CpuidLeaf, CpuPolicy
from nonroot.engines.protocol import EngineOptions
from nonroot.testing.engine_machine import DATA, BareMachine

PROBLEM = probe.problem()
pytestmark = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)

#: The two functions of Linux, as compilers leave them.
PAIR = """
        mov eax, 17
        mov edi, 5
        call intel
        out 0x10, eax
        hlt
        align 16
    amd:
        db 0x0f, 0x01, 0xd9, 0xe9, 0, 0, 0, 0
        ret
        align 16
    intel:
        db 0x0f, 0x01, 0xc1
        ret
"""


def machine(source: str) -> BareMachine:
    engine = KvmEngine()
    policy = replace(CpuPolicy.of_engine(engine), hypervisor=(CpuidLeaf(0x40000000, 0, 0x40000002, 0, 0, 0),))
    return BareMachine(engine, policy, EngineOptions(msr_exits=True), scrambled=False).load(source)


def test_hypercalls_of_linux() -> None:
    guest = machine(PAIR)
    assert guest.run() == Hypercall(False)
    long, level, registers = guest.vcpu.hypercall_arguments()
    assert (long, level, registers[0], registers[7]) == (True, 0, 17, 5)
    guest.vcpu.set_register(0, 0x1234)
    assert guest.run() == PortIo(0x10, 4, True, 1, b"\x34\x12\0\0")
    assert guest.run() == Halt()
    guest.vcpu.state()
    assert guest.memory.read(guest.program["intel"], 3) == b"\x0f\x01\xc1", "records never show the change"


def test_the_hypercall_page() -> None:
    guest = machine(
        "mov ecx, 0x40000000\n mov eax, DATA\n xor edx, edx\n wrmsr\n mov esi, DATA + 32 * 7\n call rsi\n"
        "out 0x10, eax\n hlt"
    )
    assert guest.run() == MsrWrite(0x40000000, DATA)
    slots = b"".join((b"\xb8" + n.to_bytes(4, "little") + b"\x0f\x01\xc1\xc3").ljust(32, b"\xcc") for n in range(64))
    guest.memory.write(DATA, slots)
    assert guest.run() == Hypercall(False)
    assert guest.vcpu.hypercall_arguments()[2][0] == 7
    guest.vcpu.set_register(0, 0)
    assert guest.run() == PortIo(0x10, 4, True, 1, bytes(4))
