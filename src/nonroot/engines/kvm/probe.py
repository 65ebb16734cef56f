"""What this machine's KVM can do, found out once by a virtual machine of one page."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nonroot.engines.exits import PortIo
from nonroot.engines.kvm.abi import Capability, ExtendedControl, Ioctl, Registers
from nonroot.engines.kvm.system import DEVICE, System
from nonroot.engines.kvm.vcpu import RawVcpu
from nonroot.engines.kvm.vm import VirtualMachine
from nonroot.engines.policy import FEATURES, CpuidLeaf
from nonroot.errors import UnsupportedError

__all__ = ["Facts", "facts", "problem", "software"]

_PAGE: Final = 4096
#: OUT 0x10, AL; HLT.
_CODE: Final = b"\xe6\x10\xf4"
#: MOV EAX, CR4; OR EAX, OSXSAVE; MOV CR4, EAX; MOV EAX, 3; XOR EDX, EDX; XOR ECX, ECX; XSETBV; OUT 0x10, AL.
_XSETBV: Final = bytes.fromhex("0f20e0 660d00000400 0f22e0 66b803000000 6631d2 6631c9 0f01d1 e610")
_LIMIT_NS: Final = 5_000_000_000
#: Features that are the companion's, or only say how fast something is.
_OURS: Final = frozenset(
    "apic tsc_deadline_timer tsc_adjust arat mtrr mca mce hypervisor zero_fcs_fds nonstop_tsc arch_capabilities "
    "erms fsrm".split()
)
_ARCH_CAPABILITIES: Final = 0x10A
_DEFAULT_KHZ: Final = 1_000_000
#: CPUID 0x15 can say multiples of this.
_STEP_KHZ: Final = 50


@dataclass(frozen=True)
class Facts:
    """What guests can have."""

    #: Names of :data:`nonroot.engines.policy.FEATURES`.
    features: frozenset[str]
    #: The TSC that guests have unless another is asked for: 1 GHz if KVM can scale it, or the host's.
    tsc_khz: int
    #: IA32_ARCH_CAPABILITIES of the host; 0 if KVM does not tell.
    arch_capabilities: int


@functools.cache
def facts(device: Path = DEVICE) -> Facts:
    """UnsupportedError, one sentence, if guests cannot run."""
    with System(device) as system:
        host_khz = _probe(system)
        supported = system.cpuid()
        names = set(_OURS)
        for name, feature in FEATURES.items():
            values = supported.get((feature.leaf, feature.subleaf))
            if values is not None:
                value = values[("eax", "ebx", "ecx", "edx").index(feature.register)]
                if value >> feature.bit & 1:
                    names.add(name)
        if "xsave" in names and not _sets_xcr0(system, supported):
            # QEMU's software CPU does not tell KVM of XSETBV: what a guest sets there is lost.
            names -= {"xsave", *(name for name, feature in FEATURES.items() if "xsave" in feature.needs)}
        # Switching to it faults on some kernels (6.1), for a reason that is not known.
        names.discard("x2apic")
        scales = system.check(Capability.TSC_CONTROL)
        khz = _DEFAULT_KHZ if scales or not host_khz else round(host_khz / _STEP_KHZ) * _STEP_KHZ
        return Facts(frozenset(names), khz, system.feature_msr(_ARCH_CAPABILITIES))


@contextlib.contextmanager
def _toy(system: System, code: bytes, cpuid: Sequence[CpuidLeaf] = ()) -> Iterator[RawVcpu]:
    """A vCPU in real mode before some code."""
    page = mmap.mmap(-1, _PAGE)
    page[: len(code)] = code
    anchor = ctypes.c_char.from_buffer(page)
    try:
        with VirtualMachine(system, msr_exits=True) as vm:
            vm.filter_msrs([(0x10, False)])
            vm.map([(0, 1, 0, 0, True)], [ctypes.addressof(anchor)])
            vcpu = vm.create_vcpu()
            if cpuid:
                vcpu.set_cpuid(cpuid)
            registers = vcpu.system_registers()
            registers.cs.base = registers.cs.selector = 0
            vcpu.set_system_registers(registers)
            vcpu.set_registers(Registers(rip=0, rflags=2))
            yield vcpu
    finally:
        del anchor
        page.close()


def _sets_xcr0(system: System, supported: Mapping[tuple[int, int], tuple[int, int, int, int]]) -> bool:
    with _toy(system, _XSETBV, [CpuidLeaf(*place, *values) for place, values in sorted(supported.items())]) as vcpu:
        vcpu.run(vcpu.now_ns() + _LIMIT_NS)
        controls = vcpu.structure(Ioctl.GET_XCRS, ExtendedControl)
        return any((r.number, r.value) == (0, 3) for r in controls.registers[: controls.count])


def _probe(system: System) -> int:
    """Run two instructions; the frequency of guests' TSC, as it is by itself. UnsupportedError if they do not run."""
    try:
        with _toy(system, _CODE) as vcpu:
            event = vcpu.run(vcpu.now_ns() + _LIMIT_NS)
            if not isinstance(event, PortIo):
                raise UnsupportedError(f"KVM does not run a guest of two instructions: {event}")
            return vcpu.tsc_khz()
    except OSError as error:
        raise UnsupportedError(f"KVM does not run a guest of two instructions ({error.strerror})") from None


def problem(device: Path = DEVICE) -> str:
    """Why guests cannot run, one sentence; empty if they can."""
    try:
        facts(device)
    except UnsupportedError as error:
        return str(error)
    return ""


def software(modules: Path = Path("/proc/modules"), sysfs: Path = Path("/sys/module")) -> str:
    """The name of the kernel's module that is KVM without hardware; empty if there is none."""
    return "kvm_pvm" if (sysfs / "kvm_pvm").exists() or _loaded(modules, "kvm_pvm") else ""


def _loaded(modules: Path, name: str) -> bool:
    try:
        return any(line.split()[0] == name for line in modules.read_text().splitlines() if line)
    except OSError:
        return False
