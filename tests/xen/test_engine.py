"""What the engine does for Xen: registers of a hypercall, words that two sides change, frames written elsewhere."""

import os

import pytest

from nonroot import _engine
from nonroot.engines.exits import Halt, Hypercall
from nonroot.engines.native import InterpretEngine
from nonroot.engines.policy import CpuidLeaf, CpuPolicy
from nonroot.xen.abi import cpuid_leaves

PAGE = 4096
RESET_GFN = 0xFFFFF
RESET_OFFSET = 0xFF0
# mov eax, 17; vmcall; mov ebx, eax; hlt, in 16-bit code
PROGRAM = bytes.fromhex("66b811000000 0f01c1 6689c3 f4")


def memory() -> _engine.Memory:
    made = _engine.Memory()
    fd = os.memfd_create("test")
    os.ftruncate(fd, 2 * PAGE)
    made.add_backing(fd, 2 * PAGE)
    os.close(fd)
    return made


def test_a_hypercalls_registers_are_read_and_set() -> None:
    ram = memory()
    ram.map(RESET_GFN, 1, 0, 0)
    ram.write(RESET_GFN * PAGE + RESET_OFFSET, PROGRAM)
    engine = InterpretEngine()
    vcpu = engine.create_vcpu(ram, CpuPolicy.build(engine.cpu_features))
    assert vcpu.run() == Hypercall(False)
    long, level, registers = vcpu.hypercall_arguments()
    assert (long, level, registers[0], len(registers)) == (False, 0, 17, 16)
    vcpu.set_register(0, 0x1234)
    assert vcpu.run() == Halt()
    assert vcpu.state().gpr[3] == 0x1234
    with pytest.raises(ValueError, match="16"):
        vcpu.set_register(16, 0)


def test_words_change_only_if_they_are_what_was_expected() -> None:
    ram = memory()
    ram.map(5, 1, 0, PAGE)
    assert ram.compare_exchange(0, PAGE + 8, 0, 0xDEADBEEF) == 0
    assert ram.compare_exchange(0, PAGE + 8, 1, 2) == 0xDEADBEEF
    assert ram.read(5 * PAGE + 8, 4) == bytes.fromhex("efbeadde")
    for backing, offset in ((0, 2), (0, 2 * PAGE), (1, 0)):
        with pytest.raises(ValueError, match="backing"):
            ram.compare_exchange(backing, offset, 0, 0)


def test_a_touched_frame_is_dirty() -> None:
    ram = memory()
    ram.map(5, 1, 0, 0)
    ram.take_dirty()
    ram.touch(5)
    ram.touch(6)  # is no RAM
    assert ram.take_dirty() == [5]


def test_nonroots_own_leaf_makes_room_for_xen() -> None:
    engine = InterpretEngine()
    plain = CpuPolicy.build(engine.cpu_features)
    own = [leaf for leaf in plain.cpuid() if 0x4000_0000 <= leaf.leaf < 0x5000_0000]
    assert [leaf.leaf for leaf in own] == [0x4000_0000]
    leaves = tuple(CpuidLeaf(*leaf) for leaf in cpuid_leaves(1, plain.tsc_khz))
    with_xen = CpuPolicy(plain.features, hypervisor=leaves).cpuid()
    moved = {leaf.leaf: leaf for leaf in with_xen if 0x4000_0000 <= leaf.leaf < 0x5000_0000}
    assert moved[0x4000_0100].ebx == own[0].ebx
    assert moved[0x4000_0100].eax == 0x4000_0100
    assert moved[0x4000_0001].eax == 4 << 16 | 17
