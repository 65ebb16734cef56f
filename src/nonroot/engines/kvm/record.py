"""State records from and to a vCPU of KVM: all that KVM keeps of one. The rest is the companion's."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from nonroot.engines.kvm import abi
from nonroot.engines.kvm.abi import DebugRegisters, Events, ExtendedControl, Ioctl
from nonroot.engines.kvm.state import GPR, apply, registers_of, values_of
from nonroot.engines.kvm.vcpu import RawVcpu
from nonroot.engines.state import Event, StateError, VcpuState

__all__ = ["GPR", "apic_base", "load", "take"]

_FX: Final = 512
_XSTATE_BV: Final = 512
_YMM: Final = 576
_YMM_BYTES: Final = 256
_MXCSR: Final = 24
_XMM: Final = 160
_XMM_END: Final = 416
_X87, _SSE, _AVX = 1, 2, 4
#: x87 as FNINIT leaves it: all exceptions masked, everything empty.
_X87_INITIAL: Final = struct.pack("<H", 0x37F) + bytes(_MXCSR - 2)

_EXTERNAL, _NMI, _EXCEPTION, _SOFTWARE, _PRIVILEGED, _SOFT_EXCEPTION = range(6)
#: IA32_APIC_BASE: the bits that KVM needs for CPUID.
_APIC_ENABLED: Final = 1 << 11
_RFLAGS: Final = 0x3F7FD7
_DEBUG_EXCEPTION: Final = 1


def _vectors(area: bytes) -> tuple[bytes, bytes]:
    """FXSAVE's and the upper halves of YMM out of an XSAVE area."""
    present = int.from_bytes(area[_XSTATE_BV : _XSTATE_BV + 8], "little")
    x87 = area[:_MXCSR] if present & _X87 else _X87_INITIAL
    stack = area[32:_XMM] if present & _X87 else bytes(_XMM - 32)
    xmm = area[_XMM:_XMM_END] if present & _SSE else bytes(_XMM_END - _XMM)
    high = area[_YMM : _YMM + _YMM_BYTES] if present & _AVX else bytes(_YMM_BYTES)
    return x87 + area[_MXCSR : _MXCSR + 4] + bytes(4) + stack + xmm + bytes(_FX - _XMM_END), high


def _swap_shadow(shadow: int) -> int:
    """A record's bits are 1 after STI and 2 after MOV SS, KVM's the other way round."""
    return (shadow & 1) << 1 | shadow >> 1 & 1


def _event(events: Events) -> Event | None:
    if events.exception.injected or events.exception.pending:
        error = events.exception.error if events.exception.has_error else None
        return Event(_EXCEPTION, events.exception.vector, error)
    if events.nmi.injected:
        return Event(_NMI, 2, None)
    if events.interrupt.injected:
        return Event(_SOFTWARE if events.interrupt.soft else _EXTERNAL, events.interrupt.vector, None)
    return None


def apic_base(base: int) -> int:
    """What KVM needs of IA32_APIC_BASE: whether there is a local APIC, for CPUID."""
    return base & ~0x7FF | base & 1 << 8 if base & _APIC_ENABLED else 0


def take(vcpu: RawVcpu, rest: VcpuState, msrs: Iterable[int]) -> VcpuState:
    """
    The state of a vCPU whose last exit has been settled.

    :param rest: what KVM does not have, other fields being anything.
    :param msrs: those that are KVM's.
    """
    registers, system = vcpu.registers(), vcpu.system_registers()
    values: dict[str, Any] = dict(values_of(registers, system))
    values["rflags"] &= _RFLAGS
    debug = vcpu.structure(Ioctl.GET_DEBUGREGS, DebugRegisters)
    events = vcpu.structure(Ioctl.GET_VCPU_EVENTS, Events)
    controls = vcpu.structure(Ioctl.GET_XCRS, ExtendedControl)
    values["fx"], values["ymm_high"] = _vectors(vcpu.xsave())
    found = [r.value for r in controls.registers[: controls.count] if r.number == 0]
    return replace(
        rest,
        **values,
        xcr0=found[0] if found else rest.xcr0,
        dr=tuple(debug.db),
        dr6=debug.dr6,
        dr7=debug.dr7,
        msrs={**rest.msrs, **vcpu.msrs([index for index in msrs if index in rest.msrs])},
        shadow=_swap_shadow(events.interrupt.shadow),
        nmi_blocked=bool(events.nmi.masked),
        nmi_pending=rest.nmi_pending or bool(events.nmi.pending),
        event=_event(events),
        pending_db=0,
    )


def _events_of(state: VcpuState) -> Events:
    events = Events(flags=abi.EVENTS_NMI_PENDING | abi.EVENTS_SHADOW)
    events.interrupt.shadow = _swap_shadow(state.shadow)
    events.nmi.masked = state.nmi_blocked
    event = state.event
    if event is None and state.pending_db:
        event = Event(_EXCEPTION, _DEBUG_EXCEPTION, None)
    if event is None:
        return events
    if event.kind == _NMI:
        events.nmi.injected = 1
    elif event.kind in (_EXTERNAL, _SOFTWARE):
        events.interrupt.injected = 1
        events.interrupt.vector = event.vector
        events.interrupt.soft = event.kind == _SOFTWARE
    else:
        events.exception.injected = 1
        events.exception.vector = event.vector
        events.exception.has_error = event.error is not None
        events.exception.error = event.error or 0
    return events


def load(vcpu: RawVcpu, state: VcpuState, base: int, msrs: Iterable[int]) -> None:
    """
    Load a checked record.

    StateError if KVM cannot have it; some of it has been loaded then.

    :param base: IA32_APIC_BASE, as the companion has it.
    :param msrs: those that are KVM's.
    """
    area = bytearray(vcpu.xsave())
    area[:_FX] = state.fx
    area[_YMM : _YMM + _YMM_BYTES] = state.ymm_high
    present = _X87 | _SSE | (_AVX if state.xcr0 & _AVX else 0)
    area[_XSTATE_BV : _XSTATE_BV + 8] = present.to_bytes(8, "little")
    system = vcpu.system_registers()
    apply(state, system)
    system.apic_base = apic_base(base)
    system.cr8 = vcpu.page.cr8
    system.interrupt_bitmap[:] = [0] * 4
    controls = ExtendedControl(1)
    controls.registers[0].value = state.xcr0
    try:
        vcpu.set_system_registers(system)
        vcpu.set_registers(registers_of(state))
        if state.xcr0 != 1 or vcpu.structure(Ioctl.GET_XCRS, ExtendedControl).count:
            vcpu.set_structure(Ioctl.SET_XCRS, controls)
        vcpu.set_xsave(bytes(area))
        # DR6's upper bits are ones in every CPU.
        debug = DebugRegisters(dr6=state.dr6 | state.pending_db & 0xE00F | 0xFFFF0FF0, dr7=state.dr7 | 0x400)
        debug.db[:] = state.dr
        vcpu.set_structure(Ioctl.SET_DEBUGREGS, debug)
        _load_msrs(vcpu, state.msrs, msrs)
        vcpu.set_structure(Ioctl.SET_VCPU_EVENTS, _events_of(state))
    except ValueError as error:
        raise StateError(f"the vCPU state is none that the kvm engine can run: {error}") from None


def _load_msrs(vcpu: RawVcpu, values: Mapping[int, int], msrs: Iterable[int]) -> None:
    for index in msrs:
        value = values.get(index, 0)
        if not vcpu.set_msr(index, value) and value:
            raise ValueError(f"it has no MSR {index:#x}")
