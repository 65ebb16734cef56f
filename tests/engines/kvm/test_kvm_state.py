"""Registers of records in KVM's structures, and a guest that goes on under KVM where the interpreter left it."""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import pytest

from nonroot.engines.exits import Halt, PortIo
from nonroot.engines.kvm import abi, state
from nonroot.engines.kvm.system import System
from nonroot.engines.kvm.vm import VirtualMachine
from nonroot.engines.native import InterpretEngine
from nonroot.engines.policy import CpuPolicy
from nonroot.errors import UnsupportedError
from nonroot.testing.engine_machine import RAM_BYTES, BareMachine

SOURCE = """
        mov rbx, 0x1122334455667788
        mov ecx, 5
    again:
        add rbx, rcx
        push rbx
        mov al, cl
        out 0x10, al
        pop rdx
        loop again
        hlt
"""


def machine(bits: int) -> BareMachine:
    engine = InterpretEngine()
    source = SOURCE
    if bits != 64:
        source = source.replace("0x1122334455667788", "0x11223344")
        for name in ("bx", "cx", "dx"):
            source = source.replace(f"r{name}", f"e{name}")
    return BareMachine(engine, CpuPolicy.build(engine.cpu_features), scrambled=False).load(source, bits)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_records_survive_kvms_structures(bits: int) -> None:
    record = machine(bits).vcpu.state()
    record = replace(record, gpr=tuple(range(100, 116)), cr2=0x1234)
    system = abi.SystemRegisters(cr8=3, apic_base=0xFEE00900)
    state.apply(record, system)
    assert (system.cr8, system.apic_base) == (3, 0xFEE00900)
    assert replace(record, **state.values_of(state.registers_of(record), system)) == record


@pytest.mark.parametrize("bits", [32, 64])
def test_a_guest_goes_on_under_kvm(bits: int) -> None:
    here = machine(bits)
    assert here.output(2) == [5, 4]
    record = here.vcpu.state()
    rest = here.output(3)
    assert here.run() == Halt()
    expected = here.vcpu.state()
    ram = mmap.mmap(-1, RAM_BYTES)
    ram[:] = here.memory.read(0, RAM_BYTES)
    anchor = ctypes.c_char.from_buffer(ram)
    try:
        with System() as system, VirtualMachine(system) as vm:
            vm.map([(0, RAM_BYTES // 4096, 0, 0, True)], [ctypes.addressof(anchor)])
            vcpu = vm.create_vcpu()
            vcpu.set_cpuid(here.policy.cpuid())
            registers = vcpu.system_registers()
            state.apply(record, registers)
            vcpu.set_system_registers(registers)
            vcpu.set_registers(state.registers_of(record))
            seen = []
            while isinstance(event := vcpu.run(vcpu.now_ns() + 20_000_000_000), PortIo):
                seen.append(event.data[0])
            assert (seen, event) == (rest, Halt())
            values = state.values_of(vcpu.registers(), vcpu.system_registers())
            assert {name: values[name] for name in ("gpr", "rip", "cr0", "cr3", "cr4", "efer", "gdtr", "idtr")} == {
                name: getattr(expected, name) for name in ("gpr", "rip", "cr0", "cr3", "cr4", "efer", "gdtr", "idtr")
            }
    except UnsupportedError as error:
        pytest.skip(str(error))
    finally:
        del anchor
        ram.close()
