"""
What every engine must do. Subclass :class:`EngineContract` in a test module, give it an engine, and pytest runs it all::

    class TestMyEngine(EngineContract):
        def make_engine(self) -> Engine:
            return MyEngine()

Guest programs are assembled on the spot; the memory is scrambled. Tests of what an engine says it cannot do
(:attr:`nonroot.engines.protocol.Engine.capabilities`) check that it refuses instead.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from nonroot.engines.exits import Cpuid, ExceptionRaised, Halt, Hypercall, Interrupted, Mmio, MsrRead, MsrWrite, PortIo
from nonroot.engines.exits import CrWrite, TripleFault
from nonroot.engines.policy import FEATURES, CpuPolicy
from nonroot.engines.protocol import Capability, CapabilityError, Engine, EngineOptions, Vcpu
from nonroot.errors import BadOptionError
from nonroot.testing.engine_machine import BOOT, CODE, DATA, MMIO, RAM_BYTES, BareMachine

__all__ = ["EngineBase", "EngineContract"]


class EngineBase:
    """How the contract's tests make machines."""

    #: Options that all machines of this class run with.
    options: EngineOptions = EngineOptions()

    def make_engine(self) -> Engine:
        """The engine under test."""
        raise NotImplementedError

    def policy(self, engine: Engine, **changes: object) -> CpuPolicy:
        """A CPU that the engine can show."""
        policy = CpuPolicy.build(engine.cpu_features)
        return replace(policy, **changes)  # type: ignore[arg-type]

    def machine(self, source: str = "", bits: int = 64, /, scrambled: bool = True, **options: object) -> BareMachine:
        """A machine with a program; ``options`` are fields of :class:`EngineOptions`."""
        engine = self.make_engine()
        asked = replace(self.options, **options)  # type: ignore[arg-type]
        for capability in sorted(asked.needed() - engine.capabilities):
            with pytest.raises(CapabilityError, match=engine.name):
                BareMachine(engine, self.policy(engine), asked)
            pytest.skip(f"the {engine.name} engine refuses {capability.value}, as it says")
        machine = BareMachine(engine, self.policy(engine), asked, scrambled=scrambled)
        return machine.load(source, bits) if source else machine

    def need(self, capability: Capability) -> None:
        """Skip the test if the engine does not claim this."""
        engine = self.make_engine()
        if capability not in engine.capabilities:
            pytest.skip(f"the {engine.name} engine has no {capability.value}")


class PortAndMemoryContract(EngineBase):
    """Port I/O, MMIO, string forms: exact data, exact sizes."""

    @pytest.mark.parametrize("bits", [16, 32, 64])
    def test_output_in_all_sizes(self, bits: int) -> None:
        machine = self.machine(
            """
                mov eax, 0x44332211
                out 0x80, al
                out 0x81, ax
                out 0x82, eax
                mov dx, 0x1234
                out dx, al
                out dx, ax
                out dx, eax
                hlt
            """,
            bits,
        )
        data = bytes.fromhex("11223344")
        for port, size in [(0x80, 1), (0x81, 2), (0x82, 4), (0x1234, 1), (0x1234, 2), (0x1234, 4)]:
            assert machine.run() == PortIo(port, size, True, 1, data[:size])
        assert machine.run() == Halt()

    @pytest.mark.parametrize("bits", [16, 32, 64])
    def test_input_in_all_sizes(self, bits: int) -> None:
        machine = self.machine("mov eax, -1\n in al, 0x60\n mov dx, 0x3f8\n in ax, dx\n in eax, dx\n hlt", bits)
        for (port, size), data in zip([(0x60, 1), (0x3F8, 2), (0x3F8, 4)], (b"\x01", b"\x02\x03", b"\4\5\6\7"), strict=True):
            assert machine.run() == PortIo(port, size, False, 1, b"")
            machine.vcpu.complete(data)
            seen = machine.register("rax")
            width = 4 if bits == 64 and size == 4 else size
            assert seen & ((1 << 8 * width) - 1) == int.from_bytes(data, "little")
            if size < 4:
                assert seen >> 8 * size & 0xFFFF == 0xFFFF, "the rest of EAX stays"
        assert machine.run() == Halt()

    def test_answers_must_fit(self) -> None:
        machine = self.machine("in ax, 0x40\n hlt")
        with pytest.raises(ValueError, match=r"^the last exit "):
            machine.vcpu.complete(b"\0")
        machine.expect(PortIo)
        with pytest.raises(ValueError, match=r"2 bytes.*3"):
            machine.vcpu.complete(b"\0\0\0")
        with pytest.raises(ValueError, match="MSR"):
            machine.vcpu.fail()
        machine.vcpu.complete(b"\x34\x12")
        with pytest.raises(ValueError, match="does not wait"):
            machine.vcpu.complete(b"\x34\x12")
        machine.expect(Halt)
        assert machine.register("rax") & 0xFFFF == 0x1234

    @pytest.mark.parametrize("size", [1, 2, 4])
    @pytest.mark.parametrize("backwards", [False, True])
    def test_string_output(self, size: int, backwards: bool) -> None:
        count = 3000
        machine = self.machine(
            f"""
                mov rsi, DATA + 100 + {(count - 1) * size if backwards else 0}
                mov ecx, {count}
                mov dx, 0x6e0
                {"std" if backwards else "cld"}
                rep outs{"bwd"[size // 2]}
                hlt
            """
        )
        data = bytes(i * 7 & 0xFF for i in range(count * size))
        machine.memory.write(DATA + 100, data)
        items = [data[i : i + size] for i in range(0, len(data), size)]
        if backwards:
            items.reverse()
        seen = b""
        while len(seen) < len(data):
            event = machine.expect(PortIo)
            assert (event.port, event.size, event.write) == (0x6E0, size, True)
            assert len(event.data) == size * event.count
            seen += event.data
        assert seen == b"".join(items)
        assert machine.run() == Halt()
        end = DATA + 100 + (-size if backwards else count * size)
        assert (machine.register("rcx"), machine.register("rsi")) == (0, end)

    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_string_input(self, size: int) -> None:
        count = 2500
        machine = self.machine(
            f"mov rdi, DATA + 4000\n mov ecx, {count}\n mov dx, 0x6e0\n rep ins{'bwd'[size // 2]}\n hlt"
        )
        data = bytes(i * 11 & 0xFF for i in range(count * size))
        given = 0
        while given < len(data):
            event = machine.expect(PortIo)
            assert (event.port, event.size, event.write, event.data) == (0x6E0, size, False, b"")
            assert 0 < event.count <= count - given // size
            machine.vcpu.complete(data[given : given + size * event.count])
            given += size * event.count
        assert machine.run() == Halt()
        assert machine.memory.read(DATA + 4000, len(data)) == data
        assert machine.register("rcx") == 0

    def test_string_input_of_nothing(self) -> None:
        machine = self.machine("xor ecx, ecx\n mov rdi, DATA\n mov dx, 5\n rep insb\n rep outsb\n hlt")
        assert machine.run() == Halt()

    def test_string_output_faults_where_it_stops(self) -> None:
        machine = self.machine(
            f"""
                mov rsi, {(1 << 32) - 3}
                mov ecx, 8
                mov dx, 0x80
                rep outsb
                ud2
            fault:
                hlt
            """
        ).vectors({14: "fault"})
        machine.memory.map((1 << 20) - 1, 1, 0, 0)
        seen = b""
        while isinstance(event := machine.run(), PortIo):
            seen += event.data
        assert event == Halt()
        assert seen == machine.memory.read((1 << 32) - 3, 3)
        assert (machine.register("rcx"), machine.register("rsi")) == (5, 1 << 32)

    def test_mmio_in_all_sizes(self) -> None:
        machine = self.machine(
            """
                mov ebx, MMIO
                mov rax, 0x8877665544332211
                mov [rbx + 1], al
                mov [rbx + 2], ax
                mov [rbx + 4], eax
                mov [rbx + 8], rax
                mov cl, [rbx + 1]
                mov dx, [rbx + 2]
                mov esi, [rbx + 4]
                mov rdi, [rbx + 8]
                hlt
            """
        )
        data = bytes.fromhex("1122334455667788")
        for size, offset in [(1, 1), (2, 2), (4, 4), (8, 8)]:
            assert machine.run() == Mmio(MMIO + offset, size, True, data[:size])
        for size, offset in [(1, 1), (2, 2), (4, 4), (8, 8)]:
            assert machine.run() == Mmio(MMIO + offset, size, False, b"")
            machine.vcpu.complete(data[8 - size :])
        assert machine.run() == Halt()
        registers = [machine.register(name) for name in ("rcx", "rdx", "rsi", "rdi")]
        assert registers == [0x88, 0x8877, 0x88776655, 0x8877665544332211]

    def test_mmio_read_modify_write(self) -> None:
        machine = self.machine(
            "mov ebx, MMIO\n add dword [rbx], 5\n xchg [rbx], cl\n lock or word [rbx], 0x100\n hlt"
        )
        assert machine.run() == Mmio(MMIO, 4, False, b"")
        machine.vcpu.complete((0xFFFFFFFE).to_bytes(4, "little"))
        assert machine.run() == Mmio(MMIO, 4, True, b"\3\0\0\0")
        assert machine.register("rflags") & 1 == 1, "the carry of the addition"
        assert machine.run() == Mmio(MMIO, 1, False, b"")
        machine.vcpu.complete(b"\x77")
        assert machine.run() == Mmio(MMIO, 1, True, b"\0")
        assert machine.run() == Mmio(MMIO, 2, False, b"")
        machine.vcpu.complete(b"\1\0")
        assert machine.run() == Mmio(MMIO, 2, True, b"\1\1")
        assert machine.run() == Halt()
        assert machine.register("rcx") == 0x77

    def test_mmio_by_strings(self) -> None:
        machine = self.machine(
            """
                mov edi, MMIO
                mov esi, DATA
                mov ecx, 3
                rep movsd
                mov esi, MMIO
                mov edi, DATA + 64
                mov ecx, 2
                rep movsw
                hlt
            """
        )
        machine.memory.write(DATA, bytes(range(12)))
        stores = b""
        while len(stores) < 12:
            event = machine.expect(Mmio)
            assert event.write
            assert event.gpa == MMIO + len(stores)
            stores += event.data
        assert stores == bytes(range(12))
        loaded = 0
        while loaded < 4:
            event = machine.expect(Mmio)
            assert not event.write
            assert event.gpa == MMIO + loaded
            machine.vcpu.complete(bytes(range(0x40 + loaded, 0x40 + loaded + event.size)))
            loaded += event.size
        assert machine.run() == Halt()
        assert machine.memory.read(DATA + 64, 4) == b"\x40\x41\x42\x43"

    def test_access_across_the_end_of_ram(self) -> None:
        machine = self.machine(
            "mov ebx, RAM_BYTES - 2\n mov eax, [rbx]\n mov dword [rbx], 0x44332211\n hlt"
        )
        machine.memory.write(RAM_BYTES - 2, b"\xaa\xbb")
        assert machine.run() == Mmio(RAM_BYTES, 2, False, b"")
        machine.vcpu.complete(b"\xcc\xdd")
        assert machine.run() == Mmio(RAM_BYTES, 2, True, b"\x33\x44")
        assert machine.run() == Halt()
        assert machine.register("rax") == 0xDDCCBBAA
        assert machine.memory.read(RAM_BYTES - 2, 2) == b"\x11\x22"

    def test_rom_reads_as_memory_and_writes_as_mmio(self) -> None:
        machine = self.machine("mov eax, [DATA]\n mov dword [DATA], 7\n mov ecx, [DATA]\n hlt")
        machine.memory.write(DATA, b"ROM!")
        backing, offset, _ = machine.memory.lookup(DATA >> 12) or pytest.fail("DATA is RAM")
        machine.memory.map(DATA >> 12, 1, backing, offset, False)
        assert machine.run() == Mmio(DATA, 4, True, b"\7\0\0\0")
        assert machine.run() == Halt()
        assert machine.register("rax") == machine.register("rcx") == int.from_bytes(b"ROM!", "little")

    @pytest.mark.parametrize("scrambled", [False, True])
    def test_memory_looks_contiguous(self, scrambled: bool) -> None:
        machine = self.machine(
            """
                mov edi, 0x100000 - 5
                mov eax, 1
                mov ecx, 0x40000
            fill:
                mov [rdi], eax
                add edi, 4
                inc eax
                loop fill
                mov esi, 0x100000 - 5
                mov edi, 0x280003
                mov ecx, 0x100000 / 8
                rep movsq
                hlt
            """,
            scrambled=scrambled,
        )
        assert machine.run() == Halt()
        expected = b"".join(i.to_bytes(4, "little") for i in range(1, 0x40001))
        assert machine.memory.read(0x100000 - 5, 0x100000) == expected
        assert machine.memory.read(0x280003, 0x100000) == expected

    def test_dirty_log(self) -> None:
        self.need(Capability.DIRTY_LOG)
        machine = self.machine("mov byte [DATA + 0x3000], 1\n mov qword [DATA + 0x4ffc], 2\n mov eax, [DATA]\n hlt")
        machine.memory.take_dirty()
        assert machine.run() == Halt()
        dirty = set(machine.memory.take_dirty())
        # The accessed and dirty bits of the page tables count too.
        assert {gfn for gfn in dirty if gfn >= DATA >> 12} == {(DATA >> 12) + n for n in (3, 4, 5)}
        machine.load("mov byte [DATA + 0x3000], 1\n hlt")
        machine.memory.take_dirty()
        assert machine.run() == Halt()
        assert (DATA >> 12) + 3 in machine.memory.take_dirty(), "a second write is logged again"

    def test_writes_from_outside_reach_decoded_code(self) -> None:
        machine = self.machine("again:\n call piece\n out 0x10, al\n jmp again\n align 4096\n piece: mov al, 1\n ret")
        assert machine.output(3) == [1, 1, 1]
        machine.memory.write(machine.program["piece"] + 1, b"\x02")
        assert machine.output(3) == [2, 2, 2]
        machine.memory.write(machine.program["piece"] + 1, b"\x03")
        assert machine.output(1) == [3]

    def test_self_modifying_code(self) -> None:
        machine = self.machine(
            """
                mov ecx, 200
            again:
                mov [rel target + 1], cl
            target:
                mov al, 0
                out 0x10, al
                loop again
                hlt
            """
        )
        assert machine.output(200) == list(range(200, 0, -1))
        assert machine.run() == Halt()

    def test_remapped_frames_are_seen(self) -> None:
        machine = self.machine("again:\n mov al, [DATA]\n out 0x10, al\n jmp again")
        machine.memory.write(DATA, b"\x11")
        machine.memory.write(DATA + 0x1000, b"\x22")
        assert machine.output() == [0x11]
        backing, offset, writable = machine.memory.lookup((DATA >> 12) + 1) or pytest.fail("DATA is RAM")
        machine.memory.map(DATA >> 12, 1, backing, offset, writable)
        assert machine.output() == [0x22]
        machine.memory.unmap(DATA >> 12, 1)
        assert machine.run() == Mmio(DATA, 1, False, b"")

    def test_translate(self) -> None:
        machine = self.machine("hlt")
        assert machine.vcpu.translate(DATA + 5) == DATA + 5
        assert machine.vcpu.translate(1 << 33) is None
        machine.memory.write(0x6000 + 8 * 5, (0x20_0000 | 0x83).to_bytes(8, "little"))
        machine.vcpu.flush()
        assert machine.vcpu.translate(0xA0_1234) == 0x20_1234


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
        machine = self.machine(
            "mov eax, 1\n cpuid\n out 0x10, eax\n mov eax, ecx\n out 0x10, eax\n mov rax, cr4\n or eax, 1 << 18\n"
            "mov cr4, rax\n mov eax, 1\n cpuid\n mov eax, ecx\n out 0x10, eax\n mov eax, ebx\n out 0x10, eax\n hlt"
        )
        _, before, after, ebx = machine.output(4)
        assert (before >> 27 & 1, after >> 27 & 1) == (0, 1), "OSXSAVE"
        assert ebx >> 24 == 0

    def test_features_can_be_switched_off(self) -> None:
        engine = self.make_engine()
        policy = CpuPolicy.build(engine.cpu_features, disable=["avx", "smap", "rdtscp"])
        machine = BareMachine(engine, policy, self.options)
        machine.load(
            "mov eax, 7\n xor ecx, ecx\n cpuid\n mov eax, ebx\n out 0x10, eax\n mov eax, 1\n cpuid\n mov eax, ecx\n"
            "out 0x10, eax\n mov rax, cr4\n or eax, 1 << 21\n mov cr4, rax\n hlt\n fault: pop rax\n out 0x11, eax\n hlt"
        ).vectors({13: "fault"})
        ebx, ecx, error = machine.output(3)
        assert ebx >> FEATURES["smap"].bit & 1 == 0
        assert ebx >> FEATURES["avx2"].bit & 1 == 0
        assert ecx >> FEATURES["avx"].bit & 1 == 0
        assert ecx >> FEATURES["xsave"].bit & 1 == 1
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
        assert machine.output(4) == [machine.policy.msrs()[0x8B][0] >> 32, 0x5000006, 1, 0x133]

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
        assert first[1] == 1002

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
                mov eax, [dword 0x20010]
                out 0x10, al
                int 0x21
                out 0x10, al
                hlt
            service:
                mov al, 0x21
                iret
            """.replace("[dword 0x20010]", "[ebx + 0x20010]"),
            16,
        ).vectors({0x21: "service"})
        assert machine.output(2) == [0x5A, 0x21]
        assert machine.run() == Halt()
        assert machine.register("rip") == BOOT + machine.program["service"] - BOOT
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

    def test_cpuid_exits_are_known(self) -> None:
        assert Cpuid(1, 2).leaf == 1
        assert MMIO % 4096 == 0


from nonroot.testing.engine_contract_events import DebugContract, InterruptContract, StateContract, ThreadContract  # noqa: E402


class EngineContract(
    PortAndMemoryContract, CpuContract, InterruptContract, ThreadContract, StateContract, DebugContract
):
    """All of it."""
