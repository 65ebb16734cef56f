"""
Numbers and structures of KVM's interface, API version 12, for x86-64.

Source: Linux, Documentation/virt/kvm/api.rst, and the exported headers linux/kvm.h and asm/kvm.h.
"""

from __future__ import annotations

import ctypes
import enum
from typing import Final

__all__ = [
    "API_VERSION",
    "Capability",
    "CpuidEntry",
    "DebugRegisters",
    "DeviceAttribute",
    "EnableCap",
    "Events",
    "ExitReason",
    "ExtendedControl",
    "GuestDebug",
    "Ioctl",
    "MemoryRegion",
    "Msi",
    "MsrEntry",
    "MsrFilter",
    "MsrRange",
    "Registers",
    "RunPage",
    "Segment",
    "SignalMask",
    "SystemRegisters",
    "Table",
    "Translation",
]

API_VERSION: Final = 12
#: Flags of a memory slot.
MEM_LOG_DIRTY_PAGES: Final = 1
MEM_READONLY: Final = 2
#: Reasons of ``Capability.X86_USER_SPACE_MSR``: an access that the guest may not make, and an unknown MSR.
MSR_EXIT_INVALID: Final = 1
MSR_EXIT_UNKNOWN: Final = 2
MSR_EXIT_FILTER: Final = 4
#: ``MsrFilter.flags``, and of a range.
MSR_FILTER_DEFAULT_DENY: Final = 1
MSR_FILTER_READ: Final = 1
MSR_FILTER_WRITE: Final = 2
#: ``GuestDebug.control``.
GUESTDBG_ENABLE: Final = 1
GUESTDBG_SINGLESTEP: Final = 2
GUESTDBG_USE_HW_BP: Final = 0x20000
#: ``Events.flags``: what of the structure counts.
EVENTS_NMI_PENDING: Final = 1
EVENTS_SHADOW: Final = 4
#: ``DeviceAttribute`` of a vCPU: what is added to the host's TSC.
VCPU_TSC_CTRL: Final = 0
VCPU_TSC_OFFSET: Final = 0
#: Where KVM is unlike a CPU, for the sake of old users: the local APIC's LINT0 and hole, the port 0x7E, MWAIT without
#: a bit in CPUID, VMCALL for VMMCALL and the other way round.
QUIRKS: Final = 1 | 4 | 8 | 16 | 32 | 64
#: ``CpuidEntry.flags``: the entry is of one subleaf.
CPUID_SIGNIFICANT_INDEX: Final = 1
#: ``RunPage.internal_suberror``: KVM does not know the instruction.
INTERNAL_ERROR_EMULATION: Final = 1

_u8, _u16, _u32, _u64 = ctypes.c_uint8, ctypes.c_uint16, ctypes.c_uint32, ctypes.c_uint64


class Segment(ctypes.Structure):
    """``struct kvm_segment``."""

    _fields_ = [
        ("base", _u64),
        ("limit", _u32),
        ("selector", _u16),
        *((name, _u8) for name in ("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable", "padding")),
    ]


class Table(ctypes.Structure):
    """``struct kvm_dtable``."""

    _fields_ = [("base", _u64), ("limit", _u16), ("padding", _u16 * 3)]


class Registers(ctypes.Structure):
    """``struct kvm_regs``."""

    _fields_ = [
        (name, _u64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *(f"r{number}" for number in range(8, 16)),
            "rip",
            "rflags",
        )
    ]


class SystemRegisters(ctypes.Structure):
    """``struct kvm_sregs``."""

    _fields_ = [
        *((name, Segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", Table),
        ("idt", Table),
        *((name, _u64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")),
        ("interrupt_bitmap", _u64 * 4),
    ]


class MemoryRegion(ctypes.Structure):
    """``struct kvm_userspace_memory_region``; a size of 0 takes the slot away."""

    _fields_ = [
        ("slot", _u32),
        ("flags", _u32),
        ("guest_phys_addr", _u64),
        ("memory_size", _u64),
        ("userspace_addr", _u64),
    ]


class EnableCap(ctypes.Structure):
    """``struct kvm_enable_cap``."""

    _fields_ = [("cap", _u32), ("flags", _u32), ("args", _u64 * 4), ("padding", _u8 * 64)]


class Msi(ctypes.Structure):
    """``struct kvm_msi``."""

    _fields_ = [
        ("address_lo", _u32),
        ("address_hi", _u32),
        ("data", _u32),
        ("flags", _u32),
        ("devid", _u32),
        ("padding", _u8 * 12),
    ]


class SignalMask(ctypes.Structure):
    """``struct kvm_signal_mask`` with the kernel's set of 64 signals."""

    _pack_ = 4
    _fields_ = [("length", _u32), ("signals", _u64)]


class CpuidEntry(ctypes.Structure):
    """``struct kvm_cpuid_entry2``."""

    _fields_ = [
        (name, _u32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx", "pad0", "pad1", "pad2")
    ]


class MsrEntry(ctypes.Structure):
    """``struct kvm_msr_entry``."""

    _fields_ = [("index", _u32), ("reserved", _u32), ("data", _u64)]


class MsrRange(ctypes.Structure):
    """``struct kvm_msr_filter_range``; a set bit of the bitmap allows the access."""

    _fields_ = [("flags", _u32), ("count", _u32), ("base", _u32), ("bitmap", ctypes.c_void_p)]


class MsrFilter(ctypes.Structure):
    """``struct kvm_msr_filter``."""

    _fields_ = [("flags", _u32), ("ranges", MsrRange * 16)]


class DeviceAttribute(ctypes.Structure):
    """``struct kvm_device_attr``."""

    _fields_ = [("flags", _u32), ("group", _u32), ("attribute", _u64), ("address", _u64)]


class DebugRegisters(ctypes.Structure):
    """``struct kvm_debugregs``."""

    _fields_ = [("db", _u64 * 4), ("dr6", _u64), ("dr7", _u64), ("flags", _u64), ("reserved", _u64 * 9)]


class GuestDebug(ctypes.Structure):
    """``struct kvm_guest_debug``."""

    _fields_ = [("control", _u32), ("padding", _u32), ("debugreg", _u64 * 8)]


class _ExtendedControlRegister(ctypes.Structure):
    _fields_ = [("number", _u32), ("reserved", _u32), ("value", _u64)]


class ExtendedControl(ctypes.Structure):
    """``struct kvm_xcrs``."""

    _fields_ = [
        ("count", _u32),
        ("flags", _u32),
        ("registers", _ExtendedControlRegister * 16),
        ("padding", _u64 * 16),
    ]


class Translation(ctypes.Structure):
    """``struct kvm_translation``."""

    _fields_ = [
        ("linear", _u64),
        ("physical", _u64),
        ("valid", _u8),
        ("writable", _u8),
        ("user", _u8),
        ("padding", _u8 * 5),
    ]


class _Exception(ctypes.Structure):
    _fields_ = [("injected", _u8), ("vector", _u8), ("has_error", _u8), ("pending", _u8), ("error", _u32)]


class _Interrupt(ctypes.Structure):
    _fields_ = [("injected", _u8), ("vector", _u8), ("soft", _u8), ("shadow", _u8)]


class _Nmi(ctypes.Structure):
    _fields_ = [("injected", _u8), ("pending", _u8), ("masked", _u8), ("padding", _u8)]


class Events(ctypes.Structure):
    """``struct kvm_vcpu_events``."""

    _fields_ = [
        ("exception", _Exception),
        ("interrupt", _Interrupt),
        ("nmi", _Nmi),
        ("sipi_vector", _u32),
        ("flags", _u32),
        ("smi", _u8 * 4),
        ("reserved", _u8 * 27),
        ("exception_has_payload", _u8),
        ("exception_payload", _u64),
    ]


class _Io(ctypes.Structure):
    _fields_ = [("direction", _u8), ("size", _u8), ("port", _u16), ("count", _u32), ("data_offset", _u64)]


class _Mmio(ctypes.Structure):
    _fields_ = [("address", _u64), ("data", _u8 * 8), ("length", _u32), ("is_write", _u8)]


class _Msr(ctypes.Structure):
    _fields_ = [("error", _u8), ("padding", _u8 * 7), ("reason", _u32), ("index", _u32), ("data", _u64)]


class _Debug(ctypes.Structure):
    _fields_ = [("exception", _u32), ("padding", _u32), ("pc", _u64), ("dr6", _u64), ("dr7", _u64)]


class _Internal(ctypes.Structure):
    _fields_ = [
        ("suberror", _u32),
        ("ndata", _u32),
        ("flags", _u64),
        ("instruction_size", _u8),
        ("instruction", _u8 * 15),
    ]


class _Details(ctypes.Union):
    _fields_ = [
        ("io", _Io),
        ("mmio", _Mmio),
        ("msr", _Msr),
        ("debug", _Debug),
        ("internal", _Internal),
        ("hardware_reason", _u64),
        ("eoi_vector", _u8),
        ("padding", _u8 * 256),
    ]


class RunPage(ctypes.Structure):
    """The head of ``struct kvm_run``, which a vCPU shares with its user."""

    _anonymous_ = ("details",)
    _fields_ = [
        ("request_interrupt_window", _u8),
        ("immediate_exit", _u8),
        ("padding", _u8 * 6),
        ("exit_reason", _u32),
        ("ready_for_interrupt_injection", _u8),
        ("if_flag", _u8),
        ("flags", _u16),
        ("cr8", _u64),
        ("apic_base", _u64),
        ("details", _Details),
    ]


class ExitReason(enum.IntEnum):
    """Values of ``RunPage.exit_reason``."""

    IO = 2
    DEBUG = 4
    HLT = 5
    MMIO = 6
    IRQ_WINDOW_OPEN = 7
    SHUTDOWN = 8
    FAIL_ENTRY = 9
    INTR = 10
    SET_TPR = 11
    INTERNAL_ERROR = 17
    IOAPIC_EOI = 26
    X86_RDMSR = 29
    X86_WRMSR = 30


class Capability(enum.IntEnum):
    """Arguments of ``Ioctl.CHECK_EXTENSION`` and of ``Ioctl.ENABLE_CAP``."""

    USER_MEMORY = 3
    NR_MEMSLOTS = 10
    TSC_CONTROL = 60
    MAX_VCPUS = 66
    SIGNAL_MSI = 77
    READONLY_MEM = 81
    SPLIT_IRQCHIP = 121
    IMMEDIATE_EXIT = 136
    X86_USER_SPACE_MSR = 188
    X86_MSR_FILTER = 189
    DISABLE_QUIRKS2 = 213


def _encode(direction: int, number: int, size: int) -> int:
    """``_IO``, ``_IOW`` and ``_IOR`` of asm-generic/ioctl.h with KVM's type 0xAE."""
    return direction << 30 | size << 16 | 0xAE << 8 | number


class Ioctl(enum.IntEnum):
    """KVM's calls, as far as they are used."""

    GET_API_VERSION = _encode(0, 0x00, 0)
    CREATE_VM = _encode(0, 0x01, 0)
    CHECK_EXTENSION = _encode(0, 0x03, 0)
    GET_VCPU_MMAP_SIZE = _encode(0, 0x04, 0)
    GET_SUPPORTED_CPUID = _encode(3, 0x05, 8)
    CREATE_VCPU = _encode(0, 0x41, 0)
    SET_USER_MEMORY_REGION = _encode(1, 0x46, ctypes.sizeof(MemoryRegion))
    SET_TSS_ADDR = _encode(0, 0x47, 0)
    RUN = _encode(0, 0x80, 0)
    GET_REGS = _encode(2, 0x81, ctypes.sizeof(Registers))
    SET_REGS = _encode(1, 0x82, ctypes.sizeof(Registers))
    GET_SREGS = _encode(2, 0x83, ctypes.sizeof(SystemRegisters))
    SET_SREGS = _encode(1, 0x84, ctypes.sizeof(SystemRegisters))
    TRANSLATE = _encode(3, 0x85, ctypes.sizeof(Translation))
    INTERRUPT = _encode(1, 0x86, 4)
    GET_MSRS = _encode(3, 0x88, 8)
    SET_MSRS = _encode(1, 0x89, 8)
    SET_SIGNAL_MASK = _encode(1, 0x8B, 4)
    SET_CPUID2 = _encode(1, 0x90, 8)
    NMI = _encode(0, 0x9A, 0)
    SET_GUEST_DEBUG = _encode(1, 0x9B, ctypes.sizeof(GuestDebug))
    GET_VCPU_EVENTS = _encode(2, 0x9F, ctypes.sizeof(Events))
    SET_VCPU_EVENTS = _encode(1, 0xA0, ctypes.sizeof(Events))
    GET_DEBUGREGS = _encode(2, 0xA1, ctypes.sizeof(DebugRegisters))
    SET_DEBUGREGS = _encode(1, 0xA2, ctypes.sizeof(DebugRegisters))
    SET_TSC_KHZ = _encode(0, 0xA2, 0)
    GET_TSC_KHZ = _encode(0, 0xA3, 0)
    GET_XSAVE = _encode(2, 0xA4, 4096)
    SET_XSAVE = _encode(1, 0xA5, 4096)
    GET_XCRS = _encode(2, 0xA6, ctypes.sizeof(ExtendedControl))
    SET_XCRS = _encode(1, 0xA7, ctypes.sizeof(ExtendedControl))
    X86_SET_MSR_FILTER = _encode(1, 0xC6, ctypes.sizeof(MsrFilter))
    SET_DEVICE_ATTR = _encode(1, 0xE1, ctypes.sizeof(DeviceAttribute))
    GET_DEVICE_ATTR = _encode(1, 0xE2, ctypes.sizeof(DeviceAttribute))
    HAS_DEVICE_ATTR = _encode(1, 0xE3, ctypes.sizeof(DeviceAttribute))
    ENABLE_CAP = _encode(1, 0xA3, ctypes.sizeof(EnableCap))
    SIGNAL_MSI = _encode(1, 0xA5, ctypes.sizeof(Msi))
