"""
VM exits: why :meth:`nonroot.engines.protocol.Vcpu.run` returned.

Every engine ends a run with one of these immutable records. Their numbers (:class:`ExitCode`) are the contract with the
Rust engines, which return plain tuples; :func:`from_raw` turns those into records.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

__all__ = [
    "Cpuid",
    "CrWrite",
    "Debug",
    "DeliveryMode",
    "ExceptionRaised",
    "Exit",
    "ExitCode",
    "Failure",
    "Halt",
    "Hypercall",
    "InterruptWindow",
    "Interrupted",
    "IoapicEoi",
    "Ipi",
    "Mmio",
    "MsrRead",
    "MsrWrite",
    "PicAcknowledge",
    "PortIo",
    "TripleFault",
    "from_raw",
]


class ExitCode(enum.IntEnum):
    """Numbers of the exits, stable across engines."""

    PORT_IO = 0
    MMIO = 1
    HALT = 2
    HYPERCALL = 3
    MSR_READ = 4
    MSR_WRITE = 5
    CPUID = 6
    IOAPIC_EOI = 7
    PIC_ACKNOWLEDGE = 8
    INTERRUPT_WINDOW = 9
    EXCEPTION = 10
    CR_WRITE = 11
    DEBUG = 12
    TRIPLE_FAULT = 13
    IPI = 14
    INTERRUPTED = 15
    FAILURE = 16


class DeliveryMode(enum.IntEnum):
    """Delivery modes of interrupt messages (bits 10:8 of the ICR and of redirection entries)."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


# Not frozen only because making a frozen record takes a microsecond more, for each of these frequent exits.
@dataclass(slots=True, unsafe_hash=True)
class PortIo:
    """IN, OUT, INS or OUTS. Input is answered by ``complete`` with ``size * count`` bytes."""

    code: ClassVar[ExitCode] = ExitCode.PORT_IO
    #: Port number.
    port: int
    #: Bytes of one access: 1, 2 or 4.
    size: int
    #: OUT or OUTS.
    write: bool
    #: Accesses, all to the same port; more than one for REP.
    count: int
    #: The ``size * count`` bytes written; empty for input.
    data: bytes


# Not frozen only because making a frozen record takes a microsecond more, for each of these frequent exits.
@dataclass(slots=True, unsafe_hash=True)
class Mmio:
    """An access to guest-physical memory that is not RAM. A load is answered by ``complete`` with ``size`` bytes."""

    code: ClassVar[ExitCode] = ExitCode.MMIO
    #: Guest-physical address.
    gpa: int
    #: Bytes.
    size: int
    #: Store.
    write: bool
    #: The bytes stored; empty for a load.
    data: bytes


@dataclass(frozen=True, slots=True)
class Halt:
    """HLT with nothing to deliver: wait with :meth:`nonroot.engines.protocol.Vcpu.wait`, then run again."""

    code: ClassVar[ExitCode] = ExitCode.HALT


@dataclass(frozen=True, slots=True)
class Hypercall:
    """VMCALL or VMMCALL; the instruction is complete, arguments and results are in the state."""

    code: ClassVar[ExitCode] = ExitCode.HYPERCALL
    #: VMMCALL (AMD's) rather than VMCALL.
    vmmcall: bool


@dataclass(frozen=True, slots=True)
class MsrRead:
    """RDMSR that the policy leaves to the caller: ``complete`` with 8 bytes, or ``fail`` for #GP."""

    code: ClassVar[ExitCode] = ExitCode.MSR_READ
    #: ECX.
    index: int


@dataclass(frozen=True, slots=True)
class MsrWrite:
    """WRMSR that the policy leaves to the caller: run on to accept it, or ``fail`` for #GP."""

    code: ClassVar[ExitCode] = ExitCode.MSR_WRITE
    #: ECX.
    index: int
    #: EDX:EAX.
    value: int


@dataclass(frozen=True, slots=True)
class Cpuid:
    """CPUID that the policy leaves to the caller: ``complete`` with EAX, EBX, ECX, EDX, 16 bytes."""

    code: ClassVar[ExitCode] = ExitCode.CPUID
    #: EAX.
    leaf: int
    #: ECX.
    subleaf: int


@dataclass(frozen=True, slots=True)
class IoapicEoi:
    """A level-triggered interrupt of this vector ended."""

    code: ClassVar[ExitCode] = ExitCode.IOAPIC_EOI
    vector: int


@dataclass(frozen=True, slots=True)
class PicAcknowledge:
    """The vCPU takes an interrupt from the PIC: answer with ``set_pic_vector``."""

    code: ClassVar[ExitCode] = ExitCode.PIC_ACKNOWLEDGE


@dataclass(frozen=True, slots=True)
class InterruptWindow:
    """The guest can take an external interrupt now, as ``request_interrupt_window`` asked."""

    code: ClassVar[ExitCode] = ExitCode.INTERRUPT_WINDOW


@dataclass(frozen=True, slots=True)
class ExceptionRaised:
    """An exception of a vector in ``exception_exits``; it has not been delivered."""

    code: ClassVar[ExitCode] = ExitCode.EXCEPTION
    vector: int
    #: Error code, for the vectors that have one.
    error: int | None
    #: Faulting linear address of #PF.
    address: int


@dataclass(frozen=True, slots=True)
class CrWrite:
    """A write of a control register, with ``cr_exits``; it has been made."""

    code: ClassVar[ExitCode] = ExitCode.CR_WRITE
    #: 0, 3, 4 or 8.
    register: int
    value: int


@dataclass(frozen=True, slots=True)
class Debug:
    """A single step or breakpoint of ``set_guest_debug``."""

    code: ClassVar[ExitCode] = ExitCode.DEBUG
    #: DR6 bits: 0–3 the breakpoint, 14 single step.
    dr6: int


@dataclass(frozen=True, slots=True)
class TripleFault:
    """The vCPU is in shutdown."""

    code: ClassVar[ExitCode] = ExitCode.TRIPLE_FAULT


@dataclass(frozen=True, slots=True)
class Ipi:
    """An interrupt command of this vCPU: deliver it to every matching vCPU (itself too, unless ``shorthand`` is 3)."""

    code: ClassVar[ExitCode] = ExitCode.IPI
    vector: int
    #: See :class:`DeliveryMode`.
    mode: int
    #: 0 none, 2 all, 3 all others (1, self, never leaves the engine).
    shorthand: int
    #: Logical destination mode.
    logical: bool
    level: bool
    #: Assert rather than de-assert.
    asserted: bool
    #: Destination APIC ID (8 bits in xAPIC mode).
    destination: int


@dataclass(frozen=True, slots=True)
class Interrupted:
    """``kick`` was called, or the deadline or the instruction limit was reached."""

    code: ClassVar[ExitCode] = ExitCode.INTERRUPTED


@dataclass(frozen=True, slots=True)
class Failure:
    """The engine cannot go on; the domain is lost."""

    code: ClassVar[ExitCode] = ExitCode.FAILURE
    #: One sentence.
    reason: str


Exit = (
    PortIo
    | Mmio
    | Halt
    | Hypercall
    | MsrRead
    | MsrWrite
    | Cpuid
    | IoapicEoi
    | PicAcknowledge
    | InterruptWindow
    | ExceptionRaised
    | CrWrite
    | Debug
    | TripleFault
    | Ipi
    | Interrupted
    | Failure
)

_KINDS: Final[Mapping[int, Callable[..., Exit]]] = {
    kind.code.value: kind
    for kind in (
        PortIo,
        Mmio,
        Halt,
        Hypercall,
        MsrRead,
        MsrWrite,
        Cpuid,
        IoapicEoi,
        PicAcknowledge,
        InterruptWindow,
        ExceptionRaised,
        CrWrite,
        Debug,
        TripleFault,
        Ipi,
        Interrupted,
        Failure,
    )
}


def from_raw(raw: tuple[Any, ...]) -> Exit:
    """
    The record of an engine's tuple: an :class:`ExitCode`, then the record's fields in order.

    :raises ValueError: if the number is no exit's, or the number of fields is wrong.
    """
    try:
        return _KINDS[raw[0]](*raw[1:])
    except (LookupError, TypeError):
        raise ValueError(f"{raw!r} is no exit of an engine") from None
