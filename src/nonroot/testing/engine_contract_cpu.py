"""The contract of engines: limits, CPUID, MSRs, exceptions, modes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nonroot.engines.exits import (
    CrWrite,
    ExceptionRaised,
    Halt,
    Hypercall,
    Interrupted,
    MsrRead,
    MsrWrite,
    PortIo,
    TripleFault,
)
from nonroot.engines.policy import FEATURES, CpuPolicy
from nonroot.engines.protocol import Capability, EngineOptions, Vcpu
from nonroot.errors import BadOptionError
from nonroot.testing.engine_contract_base import EngineBase
from nonroot.testing.engine_machine import BOOT, CODE, DATA, BareMachine

__all__ = ["CpuContract"]

#: Undefined in every CPU that runs guests, because it is so in all of them or because hypervisors see to it.
_NOWHERE = {"vmread rax, rbx", "vmlaunch", "vmrun", "monitor", "rsm", "ud0 eax, ebx", "ud2", "db 0xff, 0xff", "db 0x06"}


class CpuContract(EngineBase):
    """Limits, CPUID, MSRs, faults, modes."""

    _MIXED = """
            mov ecx, 50
        again:
            imul eax, eax, 77
            add eax, ecx
            push rax
            mov esi, DATA
            mov edi, DATA + 512
            mov r8, rcx
            mov ecx, 9
            rep movsb
            mov rcx, r8
            call piece
            pop rbx
            xor [DATA + rcx], bl
            loop again
            hlt
        piece:
            test al, 4
            jz even
            crc32 r9d, eax
            ret
        even:
            ror r9, 3
            ret
    """

    def test_instruction_limits_are_exact(self) -> None:
        self.need(Capability.INSTRUCTION_LIMIT)
        for count in (1, 2, 7, 10, 16, 100, 333):
            whole = self.machine(self._MIXED)
            assert whole.run(limit=count) == Interrupted()
            assert whole.vcpu.retired() == count
            single = self.machine(self._MIXED)
            for n in range(1, count + 1):
                assert single.run(limit=n) == Interrupted()
                assert single.vcpu.retired() == n
            assert self.comparable(single.vcpu) == self.comparable(whole.vcpu)
            assert single.memory.read(DATA, 1024) == whole.memory.read(DATA, 1024)

    def test_limit_already_reached(self) -> None:
        self.need(Capability.INSTRUCTION_LIMIT)
        machine = self.machine("mov al, 1\n mov al, 2\n hlt")
        assert machine.run(limit=0) == Interrupted()
        assert machine.register("rip") == CODE
        assert machine.run(limit=1) == Interrupted()
        assert machine.register("rax") == 1

    def test_every_repetition_counts(self) -> None:
        self.need(Capability.INSTRUCTION_LIMIT)
        machine = self.machine("mov ecx, 1000\n mov edi, DATA\n mov al, 7\n rep stosb\n hlt")
        assert machine.run(limit=3 + 600) == Interrupted()
        assert machine.register("rcx") == 400
        assert machine.memory.read(DATA, 1000) == b"\7" * 600 + bytes(400)
        assert machine.run() == Halt()
        assert machine.vcpu.retired() == 1004

    def comparable(self, vcpu: Vcpu) -> object:
        """The state without what differs between two runs: time."""
        return replace(vcpu.state(), now_ns=0, lapic=b"")

    def test_cpuid_shows_the_policy(self) -> None:
        machine = self.machine("mov eax, r8d\n mov ecx, r9d\n cpuid\n hlt")
        for leaf in machine.policy.cpuid():
            if leaf.leaf in (1, 0xB, 0xD) or leaf.subleaf == 1 << 32:
                continue
            subleaf = 0 if leaf.subleaf == 0xFFFFFFFF else leaf.subleaf
            state = machine.vcpu.state()
            gpr = list(state.gpr)
            gpr[8], gpr[9] = leaf.leaf, subleaf
            machine.vcpu.set_state(replace(state, gpr=tuple(gpr), rip=CODE, activity=0))
            assert machine.run() == Halt()
            seen = tuple(machine.register(name) for name in ("rax", "rbx", "rcx", "rdx"))
            assert seen == (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx), f"leaf {leaf.leaf:#x} {subleaf}"

    def test_cpuid_bits_that_change(self) -> None:
        if "xsave" not in self.make_engine().cpu_features:
            pytest.skip("guests have no XSAVE")
        machine = self.machine(
            "mov eax, 1\n cpuid\n out 0x10, eax\n mov eax, ecx\n out 0x10, eax\n mov rax, cr4\n or eax, 1 << 18\n"
            "mov cr4, rax\n mov eax, 1\n cpuid\n mov eax, ecx\n out 0x10, eax\n mov eax, ebx\n out 0x10, eax\n hlt"
        )
        _, before, after, ebx = machine.output(4)
        assert (before >> 27 & 1, after >> 27 & 1) == (0, 1), "OSXSAVE"
        assert ebx >> 24 == 0

    def test_features_can_be_switched_off(self) -> None:
        engine = self.make_engine()
        policy = CpuPolicy.of_engine(engine, disable=["avx", "smap", "rdtscp"])
        machine = BareMachine(engine, policy, self.options)
        machine.load(
            "mov eax, 7\n xor ecx, ecx\n cpuid\n mov eax, ebx\n out 0x10, eax\n mov eax, 1\n cpuid\n mov eax, ecx\n"
            "out 0x10, eax\n mov rax, cr4\n or eax, 1 << 21\n mov cr4, rax\n hlt\n fault: pop rax\n out 0x11, eax\n hlt"
        ).vectors({13: "fault"})
        ebx, ecx, error = machine.output(3)
        assert ebx >> FEATURES["smap"].bit & 1 == 0
        assert ebx >> FEATURES["avx2"].bit & 1 == 0
        assert ecx >> FEATURES["avx"].bit & 1 == 0
        assert ecx >> FEATURES["xsave"].bit & 1 == ("xsave" in engine.cpu_features)
        assert error == 0, "CR4.SMAP raises #GP without the feature"

    _MSR = """
            mov ecx, 0x12345
            rdmsr
            out 0x10, eax
            mov eax, edx
            out 0x10, eax
            mov eax, 0x55
            mov edx, 0x66
            wrmsr
            out 0x12, al
            hlt
        fault:
            pop rax
            out 0x11, eax
            add qword [rsp], 2
            iretq
    """

    def test_unknown_msrs_fault(self) -> None:
        machine = self.machine(self._MSR).vectors({13: "fault"})
        ports = [machine.expect(PortIo) for _ in range(5)]
        assert [(p.port, p.data[:1]) for p in ports[:1]] == [(0x11, b"\0")]
        assert [p.port for p in ports] == [0x11, 0x10, 0x10, 0x11, 0x12]
        assert machine.run() == Halt()

    def test_unknown_msrs_exit_if_asked(self) -> None:
        machine = self.machine(self._MSR, msr_exits=True).vectors({13: "fault"})
        assert machine.run() == MsrRead(0x12345)
        machine.vcpu.complete((0x1122334455667788).to_bytes(8, "little"))
        assert machine.output(2) == [0x55667788, 0x11223344]
        assert machine.run() == MsrWrite(0x12345, 0x66_0000_0055)
        assert machine.expect(PortIo).port == 0x12
        assert machine.run() == Halt()
        machine.load(self._MSR).vectors({13: "fault"})
        assert machine.run() == MsrRead(0x12345)
        machine.vcpu.fail()
        assert machine.expect(PortIo).port == 0x11
        machine.output(2)
        assert machine.run() == MsrWrite(0x12345, 0x66_0000_0055)
        machine.vcpu.fail()
        assert machine.expect(PortIo).port == 0x11

    def test_plain_msrs_keep_values(self) -> None:
        machine = self.machine(
            "mov ecx, 0x8b\n rdmsr\n mov eax, edx\n out 0x10, eax\n mov ecx, 0x200\n mov eax, 0x5000006\n mov edx, 1\n"
            "wrmsr\n rdmsr\n out 0x10, eax\n mov eax, edx\n out 0x10, eax\n mov ecx, 0x10a\n rdmsr\n and eax, 0x133\n"
            "out 0x10, eax\n hlt"
        )
        capabilities = machine.vcpu.state().msrs[0x10A]
        assert capabilities & ~machine.policy.msrs()[0x10A][0] == 0, "no engine's guest is safer than that"
        assert machine.output(4) == [machine.policy.msrs()[0x8B][0] >> 32, 0x5000006, 1, capabilities & 0x133]

    def test_time_stamp_counter(self) -> None:
        machine = self.machine(
            "rdtsc\n mov [DATA], eax\n mov [DATA + 4], edx\n rdtsc\n mov [DATA + 8], eax\n mov [DATA + 12], edx\n hlt"
        )
        before = machine.vcpu.now_ns()
        assert machine.run() == Halt()
        after = machine.vcpu.now_ns()
        khz = machine.policy.tsc_khz
        first, second = machine.u64(DATA), machine.u64(DATA + 8)
        assert before * khz // 10**6 <= first <= second <= after * khz // 10**6

    def test_virtual_time(self) -> None:
        def times() -> list[object]:
            machine = self.machine(
                "mov ecx, 1000\n again: loop again\n rdtsc\n out 0x10, eax\n hlt", virtual_time=(3, 2)
            )
            event = machine.expect(PortIo)
            retired = machine.vcpu.retired()
            assert machine.vcpu.now_ns() == retired * 3 // 2
            assert machine.run() == Halt()
            machine.vcpu.set_now_ns(5_000_000)
            assert machine.vcpu.now_ns() == 5_000_000
            return [event.data, retired, machine.vcpu.retired()]

        first = times()
        assert first == times()
        assert first[1] == 1003, "an exit for output comes after the instruction"

    def test_hypercall(self) -> None:
        machine = self.machine("mov eax, 5\n vmcall\n mov al, 6\n vmmcall\n hlt")
        first = machine.run()
        if not isinstance(first, Hypercall):
            pytest.skip("hypercalls are not this engine's")
        assert first == Hypercall(False)
        assert machine.register("rax") == 5
        assert machine.run() == Hypercall(True)
        assert machine.run() == Halt()

    def test_triple_fault(self) -> None:
        machine = self.machine("lidt [rel none]\n int3\n none: dw 0\n dq 0")
        assert machine.run() == TripleFault()
        assert machine.vcpu.state().activity == 3

    def test_exceptions_reach_the_guest(self) -> None:
        machine = self.machine(
            """
                ud2
                mov eax, [0x200000000]
                hlt
            undefined:
                mov al, 6
                out 0x10, al
                add qword [rsp], 2
                iretq
            page:
                pop rax
                out 0x10, eax
                mov rax, cr2
                shr rax, 8
                out 0x10, eax
                hlt
            """
        ).vectors({6: "undefined", 14: "page"})
        assert machine.output(3) == [6, 0, 0x200000000 >> 8]

    def test_intercepted_exceptions(self) -> None:
        machine = self.machine("ud2", exception_exits=frozenset({6, 14})).vectors({})
        assert machine.run() == ExceptionRaised(6, None, 0)
        assert machine.register("rip") == CODE, "not delivered"
        machine.load("mov [0x200000000], eax")
        assert machine.run() == ExceptionRaised(14, 2, 0x200000000)

    def test_intercepted_control_registers(self) -> None:
        machine = self.machine("mov rax, cr3\n mov cr3, rax\n mov al, 1\n out 0x10, al\n hlt", cr_exits=True)
        event = machine.expect(CrWrite)
        assert event == CrWrite(3, machine.vcpu.state().cr3)
        assert machine.output() == [1]

    def test_real_mode(self) -> None:
        machine = self.machine(
            """
                mov ax, 0x2000
                mov es, ax
                mov byte es:[0x10], 0x5a
                mov eax, [ebx + 0x20010]
                out 0x10, al
                int 0x21
                out 0x10, al
                hlt
            service:
                mov al, 0x21
                iret
            """,
            16,
        ).vectors({0x21: "service"})
        assert machine.output(2) == [0x5A, 0x21]
        assert machine.run() == Halt()
        assert machine.register("rip") == machine.program["service"]
        assert machine.register("rsp") == BOOT

    def test_from_real_to_long_mode(self) -> None:
        source = """
                lgdt [descriptor]
                mov eax, cr0
                or al, 1
                mov cr0, eax
                jmp dword 0x8:protected
            bits 32
            protected:
                mov ax, 0x10
                mov ds, ax
                mov ss, ax
                mov dword [0x90000], 0x91003
                mov dword [0x91000], 0x83
                mov eax, 0x90000
                mov cr3, eax
                mov eax, 0x20
                mov cr4, eax
                mov ecx, 0xc0000080
                rdmsr
                or eax, 0x100
                wrmsr
                mov eax, cr0
                or eax, 0x80000000
                mov cr0, eax
                jmp 0x18:long
            bits 64
            long:
                mov rax, 0x1122334455667788
                mov rbx, rax
                out 0x10, al
                hlt
                align 8
            table:
                dq 0, 0xcf9b000000ffff, 0xcf93000000ffff, 0xaf9b000000ffff
            descriptor:
                dw 31
                dd table
        """
        machine = self.machine(source, 16)
        assert machine.output() == [0x88]
        assert machine.run() == Halt()
        state = machine.vcpu.state()
        assert state.efer & 0x500 == 0x500
        assert state.gpr[3] == 0x1122334455667788

    def test_bad_options_are_refused(self) -> None:
        engine = self.make_engine()
        machine = self.machine()
        with pytest.raises(BadOptionError, match="no-such-thing"):
            engine.create_vcpu(machine.memory, machine.policy, 0, EngineOptions(off=frozenset({"no-such-thing"})))
        with pytest.raises(BadOptionError, match="APIC ID 7"):
            engine.create_vcpu(machine.memory, machine.policy, 7)
        if Capability.VIRTUAL_TIME in engine.capabilities:
            with pytest.raises(BadOptionError, match="virtual_time"):
                engine.create_vcpu(machine.memory, machine.policy, 0, EngineOptions(virtual_time=(1, 0)))

    def test_vector_registers(self) -> None:
        machine = self.machine(
            """
                mov rax, cr0
                and al, 0xfb
                mov cr0, rax
                fninit
                fldpi
                mov eax, 0x01020304
                movd xmm1, eax
                pshufd xmm2, xmm1, 0
                paddd xmm2, xmm2
                movdqu [DATA], xmm2
                fstp qword [DATA + 16]
                hlt
            """
        )
        assert machine.run() == Halt()
        assert machine.memory.read(DATA, 16) == (0x02040608).to_bytes(4, "little") * 4
        assert machine.u64(DATA + 16) == 0x400921FB54442D18

    @pytest.mark.parametrize(
        "instruction",
        [
            "xend",
            "vmread rax, rbx",
            "vmlaunch",
            "vmrun",
            "wrpkru",
            "monitor",
            "rsm",
            "xsaves [rsp]",
            "serialize",
            "gf2p8mulb xmm1, xmm2",
            "extrq xmm1, xmm2",
            "femms",
            "vpmadd52luq xmm1, xmm2, xmm3",
            "movdiri [rsp], eax",
            "ud0 eax, ebx",
            "ud2",
            "db 0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1",  # AVX-512
            "db 0x8f, 0xe8, 0x78, 0xc0, 0xc1, 1",  # XOP
            "db 0x0f, 0x0f, 0xc1, 0x9e",  # 3DNow!
            "db 0xff, 0xff",
            "db 0x06",
        ],
    )
    def test_what_the_cpu_lacks_is_undefined(self, instruction: str) -> None:
        if instruction not in _NOWHERE:
            self.need(Capability.EXACT_CPU)
        machine = self.machine(f"{instruction}\n hlt\n undefined:\n mov al, 6\n out 0x10, al\n hlt")
        machine.vectors({6: "undefined"})
        assert machine.output() == [6]
        assert machine.u64(machine.register("rsp")) == CODE, "the fault's return address"
