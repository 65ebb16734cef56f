"""The layer under the kvm engine, with toy guests on whatever KVM this machine has."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.engines.exits import Exit, Halt, Interrupted, Mmio, MsrRead, MsrWrite, PortIo, TripleFault
from nonroot.engines.kvm import abi
from nonroot.engines.kvm.system import System
from nonroot.engines.kvm.vcpu import RawVcpu
from nonroot.engines.kvm.vm import VirtualMachine, slots_of
from nonroot.engines.policy import CpuPolicy
from nonroot.errors import UnsupportedError
from nonroot.testing.asm import assemble

PAGES = 64
CODE = 0x7000
DATA = 0x9000


def _missing() -> str:
    try:
        with System() as system, VirtualMachine(system) as vm:
            vm.create_vcpu()
    except (UnsupportedError, OSError) as error:  # in the test bed, where nothing may be skipped, neither happens
        return str(error)
    return ""


_REASON = _missing()
needs_kvm = pytest.mark.skipif(bool(_REASON), reason=_REASON)


class Toy:
    """64 pages of RAM in reverse order, one vCPU in real mode with flat 64 KiB segments."""

    def __init__(self, *, msr_exits: bool = False) -> None:
        self.ram = mmap.mmap(-1, PAGES * 4096)
        self._anchor = ctypes.c_char.from_buffer(self.ram)
        self.address = ctypes.addressof(self._anchor)
        self.system = System()
        self.vm = VirtualMachine(self.system, msr_exits=msr_exits)
        self.runs = [(gfn, 1, 0, (PAGES - 1 - gfn) * 4096, True) for gfn in range(PAGES)]
        self.slots = self.vm.map(self.runs, [self.address])
        self.vcpu: RawVcpu = self.vm.create_vcpu()

    def write(self, address: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            at = address + i
            self.ram[(PAGES - 1 - at // 4096) * 4096 + at % 4096] = byte

    def load(self, source: str) -> Toy:
        self.write(CODE, assemble(source, bits=16, origin=CODE, constants={"DATA": DATA}).code)
        system = self.vcpu.system_registers()
        for name in ("cs", "ds", "es", "ss", "fs", "gs"):
            segment = getattr(system, name)
            segment.base = segment.selector = 0
        self.vcpu.set_system_registers(system)
        self.vcpu.set_registers(abi.Registers(rip=CODE, rsp=CODE, rflags=2))
        return self

    def run(self) -> Exit:
        return self.vcpu.run(self.vcpu.now_ns() + 20_000_000_000)

    def close(self) -> None:
        self.vm.close()
        self.system.close()
        del self._anchor
        self.ram.close()


@pytest.fixture
def toy() -> Iterator[Toy]:
    machine = Toy()
    yield machine
    machine.close()


def test_structures_have_the_kernels_sizes() -> None:
    sizes = [(abi.Registers, 144), (abi.SystemRegisters, 312), (abi.Segment, 24), (abi.CpuidEntry, 40)]
    sizes += [(abi.EnableCap, 104), (abi.Msi, 32), (abi.MemoryRegion, 32), (abi.SignalMask, 12)]
    assert [(kind, ctypes.sizeof(kind)) for kind, _ in sizes] == sizes
    assert abi.RunPage.details.offset == 32
    assert abi.Ioctl["SET_USER_MEMORY_REGION"] == 0x4020AE46
    assert abi.Ioctl["GET_SREGS"] == 0x8138AE83


def test_neighbours_share_a_slot() -> None:
    runs = [(0, 2, 0, 0, True), (2, 1, 0, 0x2000, True), (3, 1, 0, 0x3000, False), (9, 1, 1, 0, False)]
    assert slots_of(runs, {0: 0x10000, 1: 0x90000}) == [
        (0, 0x3000, 0x10000, True),
        (0x3000, 0x1000, 0x13000, False),
        (0x9000, 0x1000, 0x90000, False),
    ]


def test_devices_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"there is no .*load the module"):
        System(tmp_path / "kvm")
    (tmp_path / "kvm").touch()
    with pytest.raises(UnsupportedError, match="is not KVM's device"):
        System(tmp_path / "kvm")
    if os.geteuid():
        (tmp_path / "kvm").chmod(0)
        with pytest.raises(UnsupportedError, match="join its group"):
            System(tmp_path / "kvm")


@needs_kvm
def test_ports(toy: Toy) -> None:
    assert toy.slots == PAGES
    toy.load("mov al, 0x5a\n out 0x80, al\n mov dx, 0x1234\n mov ax, -1\n in ax, dx\n out dx, ax\n hlt")
    with pytest.raises(ValueError, match="does not wait"):
        toy.vcpu.complete(b"\0")
    assert toy.run() == PortIo(0x80, 1, True, 1, b"\x5a")
    assert toy.run() == PortIo(0x1234, 2, False, 1, b"")
    with pytest.raises(ValueError, match=r"2 bytes, not 3"):
        toy.vcpu.complete(b"123")
    with pytest.raises(ValueError, match="no MSR"):
        toy.vcpu.fail()
    toy.vcpu.complete(b"\x34\x12")
    assert toy.vcpu.registers().rax & 0xFFFF == 0x1234, "the answer is there before the next run"
    assert toy.run() == PortIo(0x1234, 2, True, 1, b"\x34\x12")
    assert toy.run() == Halt()


@needs_kvm
def test_string_output(toy: Toy) -> None:
    toy.load("mov si, DATA\n mov cx, 300\n mov dx, 0x6e0\n cld\n rep outsb\n hlt")
    data = bytes(i * 7 & 0xFF for i in range(300))
    toy.write(DATA, data)
    seen = b""
    while isinstance(event := toy.run(), PortIo):
        assert (event.port, event.size, event.write, event.count) == (0x6E0, 1, True, len(event.data))
        seen += event.data
    assert (event, seen) == (Halt(), data)


@needs_kvm
def test_memory_that_is_none(toy: Toy) -> None:
    toy.load("mov ax, 0x5000\n mov ds, ax\n mov word [4], 0x1122\n mov al, [7]\n out 0x10, al\n hlt")
    assert toy.run() == Mmio(0x50004, 2, True, b"\x22\x11")
    assert toy.run() == Mmio(0x50007, 1, False, b"")
    toy.vcpu.complete(b"\x77")
    assert toy.run() == PortIo(0x10, 1, True, 1, b"\x77")
    assert toy.run() == Halt()


@needs_kvm
def test_slots_follow_the_p2m(toy: Toy) -> None:
    toy.load("again: mov al, [DATA]\n out 0x10, al\n jmp again")
    toy.write(DATA, b"\x11")
    toy.write(DATA + 0x1000, b"\x22")
    frame = DATA >> 12
    assert toy.run() == PortIo(0x10, 1, True, 1, b"\x11")
    runs = list(toy.runs)
    runs[frame] = (frame, 1, 0, runs[frame + 1][3], True)
    assert toy.vm.map(runs, [toy.address]) == PAGES
    assert toy.run() == PortIo(0x10, 1, True, 1, b"\x22")
    del runs[frame]
    assert toy.vm.map(runs, [toy.address]) == PAGES - 1
    assert toy.run() == Mmio(DATA, 1, False, b"")


@needs_kvm
def test_rom(toy: Toy) -> None:
    toy.load("mov byte [DATA], 7\n mov al, [DATA]\n out 0x10, al\n hlt")
    toy.write(DATA, b"R")
    runs = [(gfn, count, b, offset, gfn != DATA >> 12) for gfn, count, b, offset, _ in toy.runs]
    toy.vm.map(runs, [toy.address])
    assert toy.run() == Mmio(DATA, 1, True, b"\7")
    assert toy.run() == PortIo(0x10, 1, True, 1, b"R")


@needs_kvm
def test_deadlines_and_kicks(toy: Toy) -> None:
    toy.load("again: jmp again")
    deadline = toy.vcpu.now_ns() + 20_000_000
    assert toy.vcpu.run(deadline) == Interrupted()
    assert toy.vcpu.now_ns() >= deadline
    assert toy.vcpu.run(deadline) == Interrupted(), "already past"
    toy.vcpu.kick()
    assert toy.vcpu.run() == Interrupted(), "kicked before"
    kicker = threading.Timer(0.02, toy.vcpu.kick)
    kicker.start()
    start = toy.vcpu.now_ns()
    assert toy.run() == Interrupted()
    assert toy.vcpu.now_ns() - start < 19_000_000_000, "the kick and not the deadline ended it"
    kicker.join()


def _ask_until_it_runs(toy: Toy, runner: threading.Thread) -> None:
    while runner.is_alive():
        toy.vcpu.registers()


@needs_kvm
def test_a_second_runner_is_refused(toy: Toy) -> None:
    toy.load("mov al, 1\n out 0x10, al\n again: jmp again")
    assert isinstance(toy.run(), PortIo)
    seen: list[Exit] = []
    runner = threading.Thread(target=lambda: seen.append(toy.run()))
    runner.start()
    try:
        with pytest.raises(RuntimeError, match="another thread"):
            _ask_until_it_runs(toy, runner)
    finally:
        toy.vcpu.kick()
        runner.join(30)
    assert seen == [Interrupted()]


@needs_kvm
def test_cpuid_is_the_policys(toy: Toy) -> None:
    toy.vcpu.set_cpuid(CpuPolicy.build([]).cpuid())
    toy.load("mov eax, 0x40000000\n cpuid\n mov eax, ebx\n out 0x10, eax\n hlt")
    assert toy.run() == PortIo(0x10, 4, True, 1, b"nonr")


@needs_kvm
def test_unknown_msrs() -> None:
    toy = Toy(msr_exits=True)
    try:
        toy.load("mov ecx, 0x12345\n rdmsr\n out 0x10, eax\n mov edx, 5\n wrmsr\n hlt")
        assert toy.run() == MsrRead(0x12345)
        toy.vcpu.complete((0x1122334455667788).to_bytes(8, "little"))
        assert toy.run() == PortIo(0x10, 4, True, 1, b"\x88\x77\x66\x55")
        assert toy.run() == MsrWrite(0x12345, 0x5_5566_7788)
        assert toy.run() == Halt()
    finally:
        toy.close()


@needs_kvm
def test_triple_fault(toy: Toy) -> None:
    toy.load("ud2")
    system = toy.vcpu.system_registers()
    system.cr0 |= 1
    system.idt.base = system.idt.limit = 0
    for name in ("cs", "ds", "es", "ss", "fs", "gs"):
        segment = getattr(system, name)
        segment.limit, segment.type, segment.selector = 0xFFFF, 11 if name == "cs" else 3, 8 if name == "cs" else 16
        segment.present = segment.s = 1
    toy.vcpu.set_system_registers(system)
    assert toy.run() == TripleFault()


@needs_kvm
def test_impossible_registers_are_refused(toy: Toy) -> None:
    toy.load("hlt")
    system = toy.vcpu.system_registers()
    system.cr4 = 1 << 63
    with pytest.raises(ValueError, match="refuses"):
        toy.vcpu.set_system_registers(system)
    assert toy.run() == Halt()


@needs_kvm
def test_vcpus_are_limited(toy: Toy) -> None:
    with pytest.raises(ValueError, match="already"):
        toy.vm.create_vcpu(0)
    with pytest.raises(UnsupportedError, match="at most"):
        toy.vm.create_vcpu(1 << 20)
