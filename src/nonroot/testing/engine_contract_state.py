"""The contract of engines: complete state records, and refusal of those that no CPU can be in."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from nonroot.engines.exits import Halt, Interrupted, PortIo
from nonroot.engines.protocol import Capability
from nonroot.engines.state import Event, Message, Segment, StateError, TableRegister, VcpuState
from nonroot.testing.engine_contract_base import EngineBase
from nonroot.testing.engine_machine import CODE, DATA, BareMachine

__all__ = ["StateContract"]

_WORK = """
        mov rax, cr0
        and al, 0xfb
        mov cr0, rax
        mov rax, cr4
        or eax, 1 << 18
        mov cr4, rax
        mov eax, 7
        xor edx, edx
        xor ecx, ecx
        xsetbv
        fninit
        fldpi
        fld1
        mov eax, 0x3ff00000
        vmovd xmm3, eax
        vinsertf128 ymm3, ymm3, xmm3, 1
        mov ebx, 0xfee00000
        mov dword [rbx + 0xf0], 0x1ff
        mov dword [rbx + 0x350], 0x700
        mov dword [rbx + 0x320], 0x10040
        mov ecx, 0xc0000102
        mov eax, 0x1234
        mov edx, 0xffff8000
        wrmsr
        mov eax, 0x1111
        mov dr0, rax
        mov ecx, 300
    again:
        imul r8, r8, 13
        add r8, rcx
        vaddps ymm3, ymm3, ymm3
        fadd st0, st1
        push r8
        mov [DATA + rcx * 8], r8
        pop r9
        adc r10, r9
        loop again
        mov [DATA], r10
        fstp qword [DATA + 8]
        vmovups [DATA + 4096], ymm3
        out 0x10, al
        hlt
"""


#: The same for a CPU that has neither AVX nor XSAVE.
_PLAIN_WORK = "\n".join(
    line
    for line in _WORK.replace("mov rax, cr4\n        or eax, 1 << 18\n        mov cr4, rax\n", "").splitlines()
    if not line.strip().startswith(("v", "xsetbv"))
)


class StateContract(EngineBase):
    """``state`` and ``set_state``."""

    def work(self) -> str:
        """A program that uses much of the state and ends in a port access and HLT."""
        return _WORK if "avx" in self.make_engine().cpu_features else _PLAIN_WORK

    def finish(self, machine: BareMachine) -> tuple[object, bytes]:
        """Run to the end; what the program left behind."""
        while not isinstance(event := machine.run(), Halt):
            assert isinstance(event, PortIo | Interrupted), event
        state = machine.vcpu.state()
        return replace(state, now_ns=0), machine.memory.read(DATA, 8192)

    def copy_of(self, machine: BareMachine) -> BareMachine:
        """A second machine with the same memory contents."""
        other = self.machine()
        other.memory.write(0, machine.memory.read(0, 4 << 20))
        return other

    def test_records_round_trip(self) -> None:
        machine = self.machine(self.work())
        self.advance(machine, 400)
        state = machine.vcpu.state()
        data = state.to_bytes()
        assert VcpuState.from_bytes(data) == state
        machine.vcpu.set_state(state)
        again = machine.vcpu.state()
        assert replace(again, now_ns=0) == replace(state, now_ns=0)
        assert 0 <= again.now_ns - state.now_ns < 10**9

    def test_a_record_resumes_elsewhere(self) -> None:
        self.need(Capability.INSTRUCTION_LIMIT)
        if "avx" not in self.make_engine().cpu_features:
            pytest.skip("the program needs AVX")
        expected = self.finish(self.machine(_WORK))
        for count in (0, 13, 27, 500, 1501, 2222):
            machine = self.machine(_WORK)
            machine.run(limit=count)
            record = machine.vcpu.state().to_bytes()
            other = self.copy_of(machine)
            other.vcpu.set_state(VcpuState.from_bytes(record))
            assert self.finish(other) == expected, f"resumed after {count} instructions"

    def test_a_record_taken_after_an_answer(self) -> None:
        machine = self.machine("in eax, 0x60\n mov ebx, eax\n hlt")
        machine.expect(PortIo)
        machine.vcpu.complete(b"\x78\x56\x34\x12")
        state = machine.vcpu.state()
        assert (state.gpr[0], state.rip) == (0x12345678, CODE + 2)
        other = self.copy_of(machine)
        other.vcpu.set_state(state)
        assert other.run() == Halt()
        assert other.register("rbx") == 0x12345678

    def test_a_record_taken_before_an_answer(self) -> None:
        machine = self.machine("in eax, 0x60\n mov ebx, eax\n hlt")
        machine.expect(PortIo)
        state = machine.vcpu.state()
        assert state.rip == CODE
        machine.vcpu.set_state(state)
        assert machine.run() == PortIo(0x60, 4, False, 1, b""), "the access is made again"

    def test_halted_and_pending_interrupts_travel(self) -> None:
        machine = self.machine(
            "mov ebx, 0xfee00000\n mov dword [rbx + 0xf0], 0x1ff\n sti\n hlt\n tick: mov al, 0x40\n out 0x20, al\n hlt"
        ).vectors({0x41: "tick"})
        assert machine.run() == Halt()
        machine.vcpu.signal(0x41)
        state = machine.vcpu.state()
        assert state.activity == 1
        other = self.copy_of(machine)
        other.vcpu.set_state(VcpuState.from_bytes(state.to_bytes()))
        assert other.vcpu.wait(other.vcpu.now_ns() + 10**9)
        assert other.output() == [0x40]

    def test_machine_time_travels(self) -> None:
        machine = self.machine("hlt")
        machine.vcpu.set_state(replace(machine.vcpu.state(), now_ns=10**15))
        assert 10**15 <= machine.vcpu.now_ns() < 10**15 + 10**10

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("rflags", 0),
            ("rflags", 1 << 63 | 2),
            ("rflags", 1 << 17 | 2),
            ("rip", 1 << 64),
            ("gpr", (0,) * 15),
            ("cr0", 1 << 31),
            ("cr0", 1 << 40 | 0x80000033),
            ("cr0", 1 << 29 | 0x80000033),
            ("cr3", 1 << 45),
            ("cr4", 1 << 31 | 0x6A0),
            ("cr4", 0x600),
            ("efer", 0x900),
            ("efer", 1 << 20 | 0xD00),
            ("xcr0", 4),
            ("xcr0", 0),
            ("dr6", 1 << 40),
            ("dr7", 1 << 40),
            ("activity", 9),
            ("shadow", 4),
            ("pending_db", 1 << 30),
            ("fx", bytes(511)),
            ("fx", bytes(24) + b"\xff" * 4 + bytes(484)),
            ("ymm_high", bytes(3)),
            ("lapic", b""),
            ("lapic", b"LAPC" + bytes(220)),
            ("gdtr", TableRegister(1 << 60, 0)),
            ("idtr", TableRegister(0, 1 << 16)),
            ("event", Event(9, 3, None)),
            ("messages", (Message(0x40, 3, False),)),
            ("messages", (Message(0x140, 0, False),)),
            ("pic_vector", 256),
            ("injected", -1),
            ("msrs", {0x12345: 1}),
            ("now_ns", -1),
        ],
    )
    def test_impossible_states_are_refused(self, field: str, value: Any) -> None:
        machine = self.machine(self.work())
        self.advance(machine, 3)
        good = machine.vcpu.state()
        bad = replace(good, **{field: value})
        with pytest.raises(StateError, match=r"^the (vCPU state|local APIC record)\b"):
            machine.vcpu.set_state(bad)
        after = machine.vcpu.state()
        assert replace(after, now_ns=0) == replace(good, now_ns=0), "nothing was changed"

    def test_impossible_segments_are_refused(self) -> None:
        machine = self.machine("hlt")
        good = machine.vcpu.state()
        for segment in (Segment(8, 1 << 60, 0, 0xA09B), Segment(8, 0, 0, 1 << 20), Segment(8, 0, 0, 0xE09B)):
            with pytest.raises(StateError, match="cs"):
                machine.vcpu.set_state(replace(good, segments=(good.segments[0], segment, *good.segments[2:])))
        assert machine.run() == Halt()

    def test_damaged_records_are_refused_or_harmless(self) -> None:
        machine = self.machine(self.work())
        self.advance(machine, 60)
        record = machine.vcpu.state().to_bytes()
        chance = random.Random(7)
        refused = 0
        for _ in range(150):
            damaged = bytearray(record)
            for _ in range(chance.randint(1, 3)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            try:
                machine.vcpu.set_state(VcpuState.from_bytes(bytes(damaged)))
            except StateError:
                refused += 1
                continue
            # Whatever it does now, the engine survives it and comes back.
            counts = Capability.INSTRUCTION_LIMIT in machine.engine.capabilities
            machine.vcpu.run(machine.vcpu.now_ns() + 2_000_000, machine.vcpu.retired() + 50 if counts else None)
        assert refused > 20
        for length in (0, 10, 1000, len(record) - 1):
            with pytest.raises(StateError):
                VcpuState.from_bytes(record[:length])
        machine.load("mov al, 9\n hlt")
        assert machine.run() == Halt()
        assert machine.register("rax") == 9
