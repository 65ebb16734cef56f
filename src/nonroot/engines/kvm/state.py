"""
Registers between :class:`nonroot.engines.state.VcpuState` and KVM's structures: the part of a record that says where a
vCPU executes and how it addresses memory. FPU, MSRs, events, debug registers and the local APIC are not among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from nonroot.engines.kvm import abi
from nonroot.engines.state import SEGMENT_NAMES, Segment, TableRegister, VcpuState

__all__ = ["GPR", "apply", "registers_of", "values_of"]

#: KVM's names in the order of :attr:`VcpuState.gpr`, and of its segments.
GPR: Final = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS: Final = tuple("ldt" if name == "ldtr" else name for name in SEGMENT_NAMES)
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "efer")
#: KVM's one-bit fields and their place in VMX's access rights.
_BITS: Final = {"s": 4, "present": 7, "avl": 12, "l": 13, "db": 14, "g": 15, "unusable": 16}


def _to_segment(segment: Segment) -> abi.Segment:
    bits = {name: segment.access >> bit & 1 for name, bit in _BITS.items()}
    return abi.Segment(
        segment.base, segment.limit, segment.selector, type=segment.access & 15, dpl=segment.dpl, padding=0, **bits
    )


def _from_segment(segment: abi.Segment) -> Segment:
    access = segment.type | segment.dpl << 5
    for name, bit in _BITS.items():
        access |= getattr(segment, name) << bit
    return Segment(segment.selector, segment.base, segment.limit, access)


def registers_of(state: VcpuState) -> abi.Registers:
    """The general registers, RIP and RFLAGS of a record."""
    return abi.Registers(rip=state.rip, rflags=state.rflags, **dict(zip(GPR, state.gpr, strict=True)))


def apply(state: VcpuState, system: abi.SystemRegisters) -> None:
    """Put a record's segments, tables and control registers into KVM's; CR8 and the APIC's base stay."""
    for name, segment in zip(_SEGMENTS, state.segments, strict=True):
        setattr(system, name, _to_segment(segment))
    system.gdt = abi.Table(state.gdtr.base, state.gdtr.limit)
    system.idt = abi.Table(state.idtr.base, state.idtr.limit)
    for name in _CONTROL:
        setattr(system, name, getattr(state, name))


def values_of(registers: abi.Registers, system: abi.SystemRegisters) -> Mapping[str, Any]:
    """The same fields back, by their names in :class:`VcpuState`, for :func:`dataclasses.replace`."""
    return {
        "gpr": tuple(getattr(registers, name) for name in GPR),
        "rip": registers.rip,
        "rflags": registers.rflags,
        "segments": tuple(_from_segment(getattr(system, name)) for name in _SEGMENTS),
        "gdtr": TableRegister(system.gdt.base, system.gdt.limit),
        "idtr": TableRegister(system.idt.base, system.idt.limit),
        **{name: getattr(system, name) for name in _CONTROL},
    }
