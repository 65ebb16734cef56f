"""The contract of engines: single step and breakpoints, of the guest and of the caller."""

from __future__ import annotations

import pytest

from nonroot.engines.exits import Debug, Halt
from nonroot.engines.protocol import Capability
from nonroot.testing.engine_contract_base import EngineBase
from nonroot.testing.engine_machine import CODE, DATA

__all__ = ["DebugContract"]

_STEP = 1 << 14


class DebugContract(EngineBase):
    """``set_guest_debug`` and the guest's own debugging."""

    def test_single_step_for_the_caller(self) -> None:
        self.need(Capability.SINGLE_STEP)
        machine = self.machine("mov eax, 1\n pushfq\n pop rbx\n mov ecx, 3\n again: loop again\n hlt")
        machine.vcpu.set_guest_debug(True)
        places = []
        for _ in range(7):
            event = machine.expect(Debug)
            assert event.dr6 & _STEP
            places.append(machine.register("rip") - CODE)
        assert places == [5, 6, 7, 12, 12, 12, 14]
        assert machine.register("rbx") & 0x100 == 0, "the guest does not see it"
        machine.vcpu.set_guest_debug(False)
        assert machine.run() == Halt()

    def test_code_breakpoints_for_the_caller(self) -> None:
        self.need(Capability.BREAKPOINTS)
        machine = self.machine("mov ecx, 3\n again: nop\n here: inc eax\n loop again\n hlt")
        machine.vcpu.set_guest_debug(False, [(machine.program["here"], 1, 0)])
        for count in range(3):
            event = machine.expect(Debug)
            assert event.dr6 & 15 == 1
            assert machine.register("rip") == machine.program["here"]
            assert machine.register("rax") == count
        assert machine.run() == Halt()
        assert machine.vcpu.state().dr7 == 0x400, "the guest does not see it"

    def test_data_breakpoints_for_the_caller(self) -> None:
        self.need(Capability.BREAKPOINTS)
        machine = self.machine(
            """
                mov eax, [DATA]
                mov byte [DATA + 3], 1
            one:
                mov eax, [DATA + 8]
                mov byte [DATA + 4], 1
                mov eax, [DATA + 100]
            two:
                mov byte [DATA + 100], 1
            three:
                hlt
            """
        )
        machine.vcpu.set_guest_debug(False, [(DATA, 4, 1), (DATA + 100, 1, 3)])
        for label, bit in [("one", 1), ("two", 2), ("three", 2)]:
            event = machine.expect(Debug)
            assert event.dr6 & 15 == bit
            assert machine.register("rip") == machine.program[label], "data breakpoints are traps"
        assert machine.run() == Halt()
        machine.vcpu.set_guest_debug()
        machine.load("mov byte [DATA], 1\n hlt")
        assert machine.run() == Halt()

    @pytest.mark.parametrize(
        "wanted", [(0, 3, 1), (1, 2, 1), (0, 1, 2), (0, 4, 0), (0, 0, 0)], ids=lambda b: "-".join(map(str, b))
    )
    def test_impossible_breakpoints_are_refused(self, wanted: tuple[int, int, int]) -> None:
        self.need(Capability.BREAKPOINTS)
        machine = self.machine("hlt")
        with pytest.raises(ValueError, match="is no breakpoint"):
            machine.vcpu.set_guest_debug(False, [wanted])
        with pytest.raises(ValueError, match="four"):
            machine.vcpu.set_guest_debug(False, [(0, 1, 0)] * 5)
        assert machine.run() == Halt()

    def test_the_guest_steps_itself(self) -> None:
        machine = self.machine(
            """
                pushfq
                or qword [rsp], 0x100
                popfq
                nop
            first:
                mov ecx, 2
            second:
                pushfq
            third:
                and qword [rsp], ~0x100
            fourth:
                popfq
            fifth:
                nop
                hlt
            trap:
                push rax
                mov rax, dr6
                and eax, 0x4000
                shr eax, 8
                out 0x10, al
                xor eax, eax
                mov dr6, rax
                mov eax, [rsp + 8]
                sub eax, CODE
                out 0x11, al
                pop rax
                iretq
            """
        ).vectors({1: "trap"})
        seen = machine.output(10)
        assert seen[::2] == [0x40] * 5
        # After the instruction that follows POPF, and so on, up to the POPF that clears TF.
        places = [machine.program[label] - CODE for label in ("first", "second", "third", "fourth", "fifth")]
        assert seen[1::2] == places
        assert machine.run() == Halt()

    def test_the_guest_s_breakpoints(self) -> None:
        machine = self.machine(
            """
                mov eax, DATA
                mov dr1, rax
                lea rax, [rel here]
                mov dr2, rax
                mov eax, 0x00d00400 | 4 | 16
                mov dr7, rax
                mov dword [DATA], 5
                nop
            here:
                mov al, 1
                out 0x10, al
                hlt
            trap:
                push rax
                mov rax, dr6
                out 0x11, al
                xor eax, eax
                mov dr6, rax
                or dword [rsp + 24], 0x10000
                pop rax
                iretq
            """
        ).vectors({1: "trap"})
        first, second, third = machine.output(3)
        assert (first & 15, second & 15) == (2, 4)
        assert third == 1
        assert machine.run() == Halt()
