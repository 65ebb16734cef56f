"""The contract of engines: port I/O, MMIO, guest memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from nonroot.engines.exits import Halt, Mmio, PortIo
from nonroot.engines.protocol import Capability
from nonroot.testing.engine_contract_base import EngineBase
from nonroot.testing.engine_machine import DATA, MMIO, RAM_BYTES

__all__ = ["PortAndMemoryContract"]


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
        for (port, size), data in zip(
            [(0x60, 1), (0x3F8, 2), (0x3F8, 4)], (b"\x01", b"\x02\x03", b"\4\5\6\7"), strict=True
        ):
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
        machine = self.machine("mov ebx, MMIO\n add dword [rbx], 5\n xchg [rbx], cl\n lock or word [rbx], 0x100\n hlt")
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
        machine = self.machine("mov ebx, RAM_BYTES - 2\n mov eax, [rbx]\n mov dword [rbx], 0x44332211\n hlt")
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

    def test_files_read_into_memory_reach_decoded_code(self, tmp_path: Path) -> None:
        machine = self.machine("again:\n call piece\n out 0x10, al\n jmp again\n align 4096\n piece: mov al, 1\n ret")
        assert machine.output(3) == [1, 1, 1]
        path = tmp_path / "code"
        path.write_bytes(b"\x02")
        with path.open("rb") as file:
            try:
                assert machine.memory.read_file(file.fileno(), 0, [(machine.program["piece"] + 1, 1)]) == 1
            except OSError:
                pytest.skip("this file system does not say what is at hand")
        assert machine.output(3) == [2, 2, 2]

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
