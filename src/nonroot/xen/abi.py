"""Numbers of Xen's interface for guests.

Source: Xen's public headers: xen.h, memory.h, version.h, sched.h, vcpu.h, event_channel.h, grant_table.h,
hvm/hvm_op.h, hvm/params.h, arch-x86/cpuid.h.
"""

import struct
from enum import IntEnum
from typing import Final

__all__ = [
    "DOMID_SELF",
    "FEATURES",
    "CallbackType",
    "Errno",
    "Event",
    "Grant",
    "GrantStatus",
    "Hvm",
    "HypercallError",
    "Mem",
    "Nr",
    "Param",
    "Sched",
    "Shutdown",
    "VcpuOp",
    "Version",
    "Virq",
    "cpuid_leaves",
]

PAGE_SIZE: Final = 4096

VERSION_MAJOR: Final = 4
VERSION_MINOR: Final = 17
"""The version of the interface that guests are told: Debian 12's Xen."""
EXTRA_VERSION: Final = ".0-nonroot"

MSR_HYPERCALL: Final = 0x4000_0000
CPUID_BASE: Final = 0x4000_0000

DOMID_SELF: Final = 0x7FF0
DOMID_FIRST_RESERVED: Final = 0x7FF0


class Errno(IntEnum):
    """Linux's numbers for x86; hypercalls return them negative."""

    EPERM = 1
    ENOENT = 2
    ESRCH = 3
    E2BIG = 7
    ENOMEM = 12
    EACCES = 13
    EFAULT = 14
    EBUSY = 16
    EEXIST = 17
    EINVAL = 22
    ENOSPC = 28
    ENOSYS = 38
    ENODATA = 61
    ETIME = 62
    EOPNOTSUPP = 95


class HypercallError(Exception):
    """The hypercall returns this error."""

    def __init__(self, errno: Errno) -> None:
        super().__init__(errno.name)
        self.errno = errno


class Nr(IntEnum):
    """Hypercalls."""

    MEMORY_OP = 12
    MULTICALL = 13
    SET_TIMER_OP = 15
    XEN_VERSION = 17
    CONSOLE_IO = 18
    GRANT_TABLE_OP = 20
    VM_ASSIST = 21
    VCPU_OP = 24
    SCHED_OP = 29
    EVENT_CHANNEL_OP = 32
    HVM_OP = 34


HYPERCALLS: Final = 128
"""Slots of the hypercall page."""
SLOT_SIZE: Final = 32
SLOT_IRET: Final = 23


class Version(IntEnum):
    """Commands of xen_version."""

    VERSION = 0
    EXTRAVERSION = 1
    COMPILE_INFO = 2
    CAPABILITIES = 3
    CHANGESET = 4
    PLATFORM_PARAMETERS = 5
    GET_FEATURES = 6
    PAGESIZE = 7
    GUEST_HANDLE = 8
    COMMANDLINE = 9
    BUILD_ID = 10


# Feature bits of submap 0: writable page tables 0, auto-translated physmap 2, vector callback 8, safe pvclock 9,
# memory_op's vnode 13, not direct-mapped 16. Bit 10, PIRQs, stays off: interrupts go the ordinary way.
FEATURES: Final = 1 << 0 | 1 << 2 | 1 << 8 | 1 << 9 | 1 << 16


class Mem(IntEnum):
    """Commands of memory_op."""

    INCREASE_RESERVATION = 0
    DECREASE_RESERVATION = 1
    MAXIMUM_RAM_PAGE = 2
    CURRENT_RESERVATION = 3
    MAXIMUM_RESERVATION = 4
    POPULATE_PHYSMAP = 6
    ADD_TO_PHYSMAP = 7
    MEMORY_MAP = 9
    MAXIMUM_GPFN = 14
    REMOVE_FROM_PHYSMAP = 15
    ADD_TO_PHYSMAP_BATCH = 23


MEMOP_CMD_BITS: Final = 6

SPACE_SHARED_INFO: Final = 0
SPACE_GRANT_TABLE: Final = 1
SPACE_GMFN: Final = 2
SPACE_GMFN_RANGE: Final = 3


class Sched(IntEnum):
    """Commands of sched_op."""

    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2
    POLL = 3
    REMOTE_SHUTDOWN = 4
    SHUTDOWN_CODE = 5


class Shutdown(IntEnum):
    """Reasons of a shutdown."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class VcpuOp(IntEnum):
    """Commands of vcpu_op."""

    INITIALISE = 0
    UP = 1
    DOWN = 2
    IS_UP = 3
    GET_RUNSTATE_INFO = 4
    REGISTER_RUNSTATE_MEMORY_AREA = 5
    SET_PERIODIC_TIMER = 6
    STOP_PERIODIC_TIMER = 7
    SET_SINGLESHOT_TIMER = 8
    STOP_SINGLESHOT_TIMER = 9
    REGISTER_VCPU_INFO = 10
    SEND_NMI = 11
    REGISTER_VCPU_TIME_MEMORY_AREA = 13


VMASST_RUNSTATE_UPDATE: Final = 5


class Event(IntEnum):
    """Commands of event_channel_op."""

    BIND_INTERDOMAIN = 0
    BIND_VIRQ = 1
    BIND_PIRQ = 2
    CLOSE = 3
    SEND = 4
    STATUS = 5
    ALLOC_UNBOUND = 6
    BIND_IPI = 7
    BIND_VCPU = 8
    UNMASK = 9
    RESET = 10


class Virq(IntEnum):
    """Virtual interrupts that matter here."""

    TIMER = 0
    DEBUG = 1


VIRQS: Final = 24
PER_VCPU_VIRQS: Final = frozenset({0, 1, 7, 13})
GLOBAL_VIRQS: Final = frozenset({2, 3, 4, 6, 8, 9, 10, 12})
"""They belong to domain 0."""


class Grant(IntEnum):
    """Commands of grant_table_op."""

    MAP_GRANT_REF = 0
    UNMAP_GRANT_REF = 1
    SETUP_TABLE = 2
    COPY = 5
    QUERY_SIZE = 6
    SET_VERSION = 8
    GET_VERSION = 10


class GrantStatus(IntEnum):
    """GNTST numbers."""

    OKAY = 0
    GENERAL_ERROR = -1
    BAD_DOMAIN = -2
    BAD_GNTREF = -3
    BAD_HANDLE = -4
    BAD_VIRT_ADDR = -5
    NO_DEVICE_SPACE = -7
    PERMISSION_DENIED = -8
    BAD_PAGE = -9
    BAD_COPY_ARG = -10


MAP_HOST: Final = 1 << 1
MAP_READONLY: Final = 1 << 2

ENTRY_TYPE: Final = 3
ENTRY_PERMIT: Final = 1
ENTRY_READONLY: Final = 1 << 2
ENTRY_READING: Final = 1 << 3
ENTRY_WRITING: Final = 1 << 4


class Hvm(IntEnum):
    """Commands of hvm_op."""

    SET_PARAM = 0
    GET_PARAM = 1
    FLUSH_TLBS = 5
    GET_TIME = 10
    SET_EVTCHN_UPCALL_VECTOR = 23


class Param(IntEnum):
    """HVM parameters that mean something here."""

    CALLBACK_IRQ = 0
    STORE_PFN = 1
    STORE_EVTCHN = 2
    PAE_ENABLED = 4
    IDENT_PT = 12
    VM86_TSS = 15
    CONSOLE_PFN = 17
    CONSOLE_EVTCHN = 18
    ACPI_IOPORTS_LOCATION = 19
    VM_GENERATION_ID_ADDR = 34
    X87_FIP_WIDTH = 36
    VM86_TSS_SIZED = 37


PARAMS: Final = 39
GUEST_SETTABLE: Final = frozenset({0, 15, 37, 19, 34, 2, 18, 36})
GUEST_READABLE: Final = GUEST_SETTABLE | {1, 17}


class CallbackType(IntEnum):
    """Bits 63:56 of CALLBACK_IRQ."""

    GSI = 0
    PCI_INTX = 1
    VECTOR = 2


LEAF4_DOMID_PRESENT: Final = 1 << 4
LEAF4_UPCALL_VECTOR: Final = 1 << 6


def cpuid_leaves(domid: int, tsc_khz: int) -> list[tuple[int, int, int, int, int, int]]:
    """Xen's leaves as (leaf, subleaf, EAX, EBX, ECX, EDX); subleaf 0xFFFFFFFF answers all."""
    words = struct.unpack("<3I", b"XenVMMXenVMM")
    every = 0xFFFF_FFFF
    mul, shift = tsc_scale(tsc_khz)
    return [
        (CPUID_BASE, every, CPUID_BASE + 4, *words),
        (CPUID_BASE + 1, every, VERSION_MAJOR << 16 | VERSION_MINOR, 0, 0, 0),
        (CPUID_BASE + 2, every, 1, MSR_HYPERCALL, 0, 0),
        (CPUID_BASE + 3, 0, 2, 0, tsc_khz, 0),
        (CPUID_BASE + 3, 1, 0, 0, mul, shift & 0xFFFF_FFFF),
        (CPUID_BASE + 3, 2, tsc_khz, 0, 0, 0),
        (CPUID_BASE + 3, every, 0, 0, 0, 0),
        (CPUID_BASE + 4, every, LEAF4_DOMID_PRESENT | LEAF4_UPCALL_VECTOR, 0, domid, 0),
    ]


def tsc_scale(tsc_khz: int) -> tuple[int, int]:
    """
    (mul, shift) of the guest's clock: ns = (tsc << shift) * mul >> 32.

    ``mul`` has its highest bit set, so that it is as exact as 32 bits can be.
    """
    shift = 0
    mul = (1_000_000 << 32) // tsc_khz
    while mul >= 1 << 32:
        shift += 1
        mul = (1_000_000 << 32 - shift) // tsc_khz
    while mul < 1 << 31:
        shift -= 1
        mul = (1_000_000 << 32 - shift) // tsc_khz
    return mul, shift
