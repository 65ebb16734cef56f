"""The contract of engines: interrupts, the local APIC and its timer, halting, threads, deadlines."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from nonroot.engines.exits import (
    DeliveryMode,
    Exit,
    Halt,
    Interrupted,
    InterruptWindow,
    IoapicEoi,
    Ipi,
    PicAcknowledge,
    PortIo,
)
from nonroot.engines.protocol import Capability
from nonroot.testing.engine_contract_base import EngineBase
from nonroot.testing.engine_machine import BareMachine, elapsed

__all__ = ["InterruptContract", "ThreadContract"]

#: Switches the local APIC on (spurious vector 0xFF) and leaves its base in RBX.
_APIC_ON = "mov ebx, 0xfee00000\n mov dword [rbx + 0xf0], 0x1ff\n"
#: Reports the vector in AL, ends the interrupt, returns.
_HANDLER = "tick:\n push rax\n mov al, 0x40\n out 0x20, al\n mov dword [rbx + 0xb0], 0\n pop rax\n iretq\n"
#: Sleeps for interrupts for ever.
_SLEEP = "sleep:\n sti\n hlt\n jmp sleep\n"


class InterruptContract(EngineBase):
    """Injection, PIC, NMI, local APIC."""

    def sleep_until_output(self, machine: BareMachine, limit_s: float = 5.0) -> PortIo:
        """Run and wait as a domain's loop does, until the guest writes to a port."""
        end = machine.vcpu.now_ns() + int(limit_s * 1e9)
        while machine.vcpu.now_ns() < end:
            event = machine.run(end)
            if isinstance(event, PortIo):
                return event
            assert isinstance(event, Halt | Interrupted), event
            if isinstance(event, Halt):
                machine.vcpu.wait(end)
        pytest.fail("the guest wrote nothing")

    def test_injected_interrupts_wait_for_the_guest(self) -> None:
        machine = self.machine(
            """
                mov al, 1
                out 0x10, al
                sti
                mov al, 2
                mov al, 3
                hlt
            handler:
                out 0x10, al
                hlt
            """
        ).vectors({0x33: "handler"})
        machine.vcpu.interrupt(0x33)
        assert machine.output() == [1], "interrupts are off"
        assert machine.output() == [2], "after STI exactly one instruction comes first"
        assert machine.run() == Halt()
        assert machine.register("rflags") & 0x200 == 0, "the handler's gate switches interrupts off"

    def test_mov_ss_holds_interrupts_back(self) -> None:
        self.need(Capability.INSTRUCTION_LIMIT)
        machine = self.machine(
            "sti\n nop\n mov eax, ss\n mov ss, eax\n mov al, 7\n mov al, 8\n hlt\n handler: out 0x10, al\n hlt"
        ).vectors({0x33: "handler"})
        machine.vcpu.run(None, 3)
        machine.vcpu.run(None, machine.vcpu.retired() + 1)
        machine.vcpu.interrupt(0x33)
        assert machine.output() == [7]

    def test_interrupt_window(self) -> None:
        machine = self.machine("mov al, 1\n out 0x10, al\n sti\n nop\n mov al, 2\n out 0x10, al\n hlt")
        machine.vcpu.request_interrupt_window(True)
        assert machine.output() == [1]
        assert machine.run() == InterruptWindow()
        state = machine.vcpu.state()
        assert state.rflags & 0x200
        assert state.shadow == 0
        assert machine.output() == [2]
        machine.load("sti\n nop\n nop\n hlt")
        machine.vcpu.request_interrupt_window(True)
        machine.vcpu.request_interrupt_window(False)
        assert machine.run() == Halt()

    def test_pic_acknowledge(self) -> None:
        machine = self.machine(
            _APIC_ON + "mov dword [rbx + 0x350], 0x700\n sti\n nop\n back: hlt\n"
            "handler:\n mov al, 0x77\n out 0x10, al\n iretq\n"
        ).vectors({0x31: "handler"})
        machine.vcpu.set_pic_line(True)
        assert machine.run() == PicAcknowledge()
        machine.vcpu.set_pic_line(False)
        machine.vcpu.set_pic_vector(0x31)
        assert machine.output() == [0x77]
        assert machine.run() == Halt()

    def test_masked_pic(self) -> None:
        machine = self.machine(_APIC_ON + "sti\n nop\n hlt")
        machine.vcpu.set_pic_line(True)
        assert machine.run() == Halt(), "LINT0 is masked"

    def test_nmi(self) -> None:
        machine = self.machine(
            """
                mov al, 1
                out 0x10, al
                mov al, 2
                out 0x10, al
                hlt
            nmi:
                push rax
                mov al, 0x22
                out 0x11, al
                mov al, 0x23
                out 0x11, al
                pop rax
                iretq
            """
        ).vectors({2: "nmi"})
        assert machine.output() == [1]
        machine.vcpu.nmi()
        assert machine.output() == [0x22], "an NMI needs no IF"
        machine.vcpu.nmi()
        assert machine.output() == [0x23], "NMIs do not nest"
        assert machine.output(3) == [0x22, 0x23, 2], "the second one comes after IRET"
        assert machine.run() == Halt()

    def test_interrupt_messages(self) -> None:
        machine = self.machine(_APIC_ON + _SLEEP + _HANDLER).vectors({0x41: "tick", 2: "tick"})
        assert machine.run() == Halt()
        machine.vcpu.signal(0x41)
        assert machine.vcpu.wait(machine.vcpu.now_ns() + 10**9)
        assert machine.output() == [0x40]
        assert machine.run() == Halt()
        machine.vcpu.signal(0, DeliveryMode.NMI)
        assert machine.output() == [0x40]
        assert machine.run() == Halt()
        with pytest.raises(ValueError, match="delivery mode 3"):
            machine.vcpu.signal(0x41, 3)

    def test_level_triggered_interrupts_tell_their_end(self) -> None:
        machine = self.machine(_APIC_ON + _SLEEP + _HANDLER).vectors({0x51: "tick"})
        assert machine.run() == Halt()
        machine.vcpu.signal(0x51, 0, True)
        assert machine.output() == [0x40]
        assert machine.run() == IoapicEoi(0x51)
        assert machine.run() == Halt()
        machine.vcpu.signal(0x51, 0, False)
        assert machine.output() == [0x40]
        assert machine.run() == Halt(), "an edge has no end to tell"

    def test_destinations(self) -> None:
        machine = self.machine(_APIC_ON + "mov dword [rbx + 0xd0], 0x02000000\n hlt")
        assert machine.vcpu.lapic_matches(0, False)
        assert not machine.vcpu.lapic_matches(2, True)
        assert machine.run() == Halt()
        assert machine.vcpu.lapic_matches(2, True)
        assert not machine.vcpu.lapic_matches(1, True)
        assert machine.vcpu.lapic_matches(0xFF, False)
        assert not machine.vcpu.lapic_matches(1, False)

    def test_interrupt_commands(self) -> None:
        machine = self.machine(
            _APIC_ON + "mov dword [rbx + 0x310], 3 << 24\n mov dword [rbx + 0x300], 0x4608\n"
            "mov dword [rbx + 0x300], 0xc4061\n mov dword [rbx + 0x300], 0x44051\n sti\n nop\n hlt\n" + _HANDLER
        ).vectors({0x51: "tick"})
        assert machine.run() == Ipi(8, DeliveryMode.STARTUP, 0, False, False, True, 3)
        assert machine.run() == Ipi(0x61, DeliveryMode.FIXED, 3, False, False, True, 3)
        assert machine.output() == [0x40], "a command to itself stays inside"
        assert machine.run() == Halt()

    def test_task_priority(self) -> None:
        machine = self.machine(
            _APIC_ON
            + "mov eax, 5\n mov cr8, rax\n sti\n out 0x10, al\n nop\n out 0x10, al\n mov eax, 4\n mov cr8, rax\n"
            + "nop\n hlt\n"
            + _HANDLER
        ).vectors({0x55: "tick"})
        assert machine.output() == [5]
        machine.vcpu.signal(0x55)
        assert machine.output(2) == [5, 0x40], "only when the priority sinks"

    @pytest.mark.parametrize("x2apic", [False, True])
    def test_apic_timer(self, x2apic: bool) -> None:
        if x2apic and "x2apic" not in self.make_engine().cpu_features:
            pytest.skip("guests have no x2APIC")
        registers = {"svr": 0xF, "timer": 0x32, "initial": 0x38, "divide": 0x3E, "eoi": 0xB}

        def write(name: str, value: int) -> str:
            if x2apic:
                return f"mov ecx, {0x800 + registers[name]}\n mov eax, {value}\n xor edx, edx\n wrmsr\n"
            return f"mov dword [rbx + {registers[name] << 4}], {value}\n"

        on = "mov ebx, 0xfee00000\n" + ("mov ecx, 0x1b\n rdmsr\n or eax, 0xc00\n wrmsr\n" if x2apic else "")
        handler = f"tick:\n push rax\n push rcx\n push rdx\n mov al, 0x40\n out 0x20, al\n {write('eoi', 0)}"
        handler += "pop rdx\n pop rcx\n pop rax\n iretq\n"
        common = on + write("svr", 0x1FF) + write("divide", 0xB)
        # 25,000 ticks of 25 MHz are 1 ms.
        machine = self.machine(common + write("timer", 0x20040) + write("initial", 50_000) + _SLEEP + handler)
        machine.vectors({0x40: "tick"})
        start = machine.vcpu.now_ns()
        assert machine.run() == Halt()
        for _ in range(5):
            assert self.sleep_until_output(machine).port == 0x20
        assert machine.vcpu.now_ns() - start >= 10_000_000, "five periods of 2 ms"
        machine = self.machine(common + write("timer", 0x40) + write("initial", 50_000) + _SLEEP + handler)
        machine.vectors({0x40: "tick"})
        self.sleep_until_output(machine)
        assert machine.run() == Halt()
        assert not machine.vcpu.wait(machine.vcpu.now_ns() + 10_000_000), "one shot"

    def test_tsc_deadline(self) -> None:
        machine = self.machine(
            _APIC_ON + "mov dword [rbx + 0x320], 0x40040\n mov ecx, 0x6e0\n rdtsc\n add eax, 3000000\n adc edx, 0\n"
            "wrmsr\n" + _SLEEP + _HANDLER
        ).vectors({0x40: "tick"})
        start = machine.vcpu.now_ns()
        self.sleep_until_output(machine)
        assert machine.vcpu.now_ns() - start >= 3_000_000 * 1_000_000 // machine.policy.tsc_khz
        assert machine.run() == Halt()
        assert not machine.vcpu.wait(machine.vcpu.now_ns() + 5_000_000)

    def test_timer_under_virtual_time(self) -> None:
        source = (
            _APIC_ON
            + "mov dword [rbx + 0x3e0], 0xb\n mov dword [rbx + 0x320], 0x20040\n mov dword [rbx + 0x380], 250\n"
            "sti\n again: inc ecx\n jmp again\n"
            "tick:\n mov eax, ecx\n out 0x20, eax\n mov dword [rbx + 0xb0], 0\n iretq"
        )

        def moments() -> list[tuple[int, int]]:
            machine = self.machine(source, virtual_time=(1, 1)).vectors({0x40: "tick"})
            return [(machine.output()[0], machine.vcpu.retired()) for _ in range(6)]

        first = moments()
        assert first == moments(), "interrupts come at the same instruction every time"
        periods = {b[1] - a[1] for a, b in itertools.pairwise(first)}
        assert max(periods) - min(periods) <= 2, "a period of 10,000 ns is one of 10,000 instructions"
        assert abs(sum(periods) / len(periods) - 10_000) <= 2


class ThreadContract(EngineBase):
    """Kicks, deadlines, waiting, and misuse by threads."""

    def test_kick_from_another_thread(self) -> None:
        delays = []
        for _ in range(3):
            machine = self.machine("again: jmp again")
            kicked: list[float] = []

            def kick(machine: BareMachine = machine, kicked: list[float] = kicked) -> None:
                kicked.append(time.monotonic())
                machine.vcpu.kick()

            machine.later(0.03, kick)
            assert machine.run() == Interrupted()
            delays.append(time.monotonic() - kicked[0])
            if Capability.INSTRUCTION_LIMIT in machine.engine.capabilities:
                assert machine.vcpu.retired() > 1000
        assert min(delays) < 0.1

    def test_kick_before_run(self) -> None:
        machine = self.machine("mov al, 5\n hlt")
        machine.vcpu.kick()
        assert machine.run() == Interrupted()
        assert machine.run() == Halt()

    def test_kick_ends_waiting(self) -> None:
        machine = self.machine("hlt")
        assert machine.run() == Halt()
        machine.later(0.03, machine.vcpu.kick)
        assert elapsed(lambda: machine.vcpu.wait(machine.vcpu.now_ns() + 5 * 10**9)) < 2
        assert machine.run() == Interrupted()

    def test_deadline(self) -> None:
        machine = self.machine("again: jmp again")
        deadline = machine.vcpu.now_ns() + 20_000_000
        assert machine.run(deadline) == Interrupted()
        assert deadline <= machine.vcpu.now_ns() < deadline + 200_000_000
        assert machine.run(deadline) == Interrupted(), "already past"

    def test_waiting_ends_at_the_deadline(self) -> None:
        machine = self.machine("hlt")
        assert machine.run() == Halt()
        deadline = machine.vcpu.now_ns() + 20_000_000
        cpu = time.thread_time()
        assert machine.vcpu.wait(deadline) is False
        assert machine.vcpu.now_ns() >= deadline
        assert time.thread_time() - cpu < 0.015, "waiting takes no CPU time"

    def test_messages_end_waiting(self) -> None:
        machine = self.machine(_APIC_ON + _SLEEP + _HANDLER).vectors({0x41: "tick"})
        assert machine.run() == Halt()
        machine.later(0.02, lambda: machine.vcpu.signal(0x41))
        assert machine.vcpu.wait(machine.vcpu.now_ns() + 5 * 10**9)
        assert machine.output() == [0x40]

    def test_masked_interrupts_do_not_wake(self) -> None:
        machine = self.machine(_APIC_ON + "cli\n hlt")
        assert machine.run() == Halt()
        machine.vcpu.signal(0x41)
        assert machine.vcpu.wait(machine.vcpu.now_ns() + 5_000_000) is False

    def test_second_runner_is_refused(self) -> None:
        machine = self.machine("again: jmp again")
        seen: list[Exit] = []
        started = threading.Event()

        def run() -> None:
            started.set()
            seen.append(machine.run())

        runner = threading.Thread(target=run)
        runner.start()
        try:
            assert started.wait(5)
            time.sleep(0.05)
            with pytest.raises(RuntimeError, match="another thread"):
                machine.vcpu.run(0)
            with pytest.raises(RuntimeError, match="another thread"):
                machine.vcpu.state()
            machine.vcpu.now_ns()
            machine.vcpu.lapic_matches(0, False)
            assert machine.vcpu.retired() >= 0
        finally:
            machine.vcpu.kick()
            runner.join(10)
        assert seen == [Interrupted()]

    def test_running_leaves_other_threads_alone(self) -> None:
        machine = self.machine("again: jmp again")
        counted = 0

        def count() -> None:
            nonlocal counted
            end = time.monotonic() + 0.1
            while time.monotonic() < end:
                counted += 1
            machine.vcpu.kick()

        machine.later(0, count)
        assert machine.run() == Interrupted()
        assert counted > 1000, "the GIL is released while the guest runs"
