"""A virtual machine of KVM: memory slots that follow a p2m, interrupt messages, vCPUs."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Self

from nonroot.engines.kvm.abi import (
    MEM_READONLY,
    MSR_EXIT_FILTER,
    MSR_EXIT_INVALID,
    MSR_EXIT_UNKNOWN,
    MSR_FILTER_DEFAULT_DENY,
    MSR_FILTER_READ,
    MSR_FILTER_WRITE,
    QUIRKS,
    Capability,
    EnableCap,
    Ioctl,
    MemoryRegion,
    Msi,
    MsrFilter,
    MsrRange,
)
from nonroot.engines.kvm.system import System, call
from nonroot.engines.kvm.vcpu import RawVcpu
from nonroot.errors import UnsupportedError

__all__ = ["Run", "VirtualMachine", "slots_of"]

Run = tuple[int, int, int, int, bool]
"""As :meth:`nonroot._engine.Memory.runs` gives them: (gfn, count, backing, offset, writable)."""

_Slot = tuple[int, int, int, bool]
_PAGE: Final = 4096
#: Three pages for real mode on VT-x, in the hole below 4 GiB where no domain has RAM.
_TSS: Final = 0xFFFB_D000


def slots_of(runs: Iterable[Run], addresses: Mapping[int, int] | Sequence[int]) -> list[_Slot]:
    """
    Memory slots for the runs of a p2m: (guest-physical address, bytes, host address, writable).

    :param addresses: by backing, where it is mapped in this process.
    """
    slots: list[_Slot] = []
    for gfn, count, backing, offset, writable in runs:
        start, size, host = gfn * _PAGE, count * _PAGE, addresses[backing] + offset
        if slots:
            before = slots[-1]
            if before[0] + before[1] == start and before[2] + before[1] == host and before[3] == writable:
                slots[-1] = (before[0], before[1] + size, before[2], writable)
                continue
        slots.append((start, size, host, writable))
    return slots


class VirtualMachine:
    """One VM; a context manager. Everything but :meth:`signal_msi` is for one thread."""

    def __init__(self, system: System, *, split_irqchip: bool = False, msr_exits: bool = False) -> None:
        """
        Make it.

        :param split_irqchip: KVM has the local APICs, and waits itself in HLT; PIC and IOAPIC are the caller's.
        :param msr_exits: accesses to unknown MSRs exit.
        :raises UnsupportedError: if this KVM cannot.
        """
        self._system = system
        self.descriptor: Final = system.create_vm()
        self._slots: dict[_Slot, int] = {}
        self._free: list[int] = []
        self._used = 0
        self._limit = system.check(Capability.NR_MEMSLOTS) or 32
        self._vcpus: list[RawVcpu] = []
        try:
            call(self.descriptor, Ioctl.SET_TSS_ADDR, _TSS)
            if split_irqchip:
                self._enable(Capability.SPLIT_IRQCHIP, 24)
            if msr_exits:
                self._enable(Capability.X86_USER_SPACE_MSR, MSR_EXIT_INVALID | MSR_EXIT_UNKNOWN | MSR_EXIT_FILTER)
        except BaseException:
            self.close()
            raise

    def _enable(self, capability: Capability, argument: int) -> None:
        try:
            call(self.descriptor, Ioctl.ENABLE_CAP, EnableCap(cap=capability, args=(argument,)))
        except OSError as error:
            raise UnsupportedError(
                f"this kernel's KVM has no {capability.name} ({os.strerror(error.errno or 0)}); use another engine"
            ) from None

    def disable_quirks(self) -> None:
        """Have KVM be like a CPU where it can."""
        known = self._system.check(Capability.DISABLE_QUIRKS2) & QUIRKS
        if known:
            self._enable(Capability.DISABLE_QUIRKS2, known)

    def filter_msrs(self, allowed: Sequence[tuple[int, bool]]) -> None:
        """
        Leave these MSRs to KVM, as (index, whether writes too); accesses to others exit. Those of x2APIC are never
        filtered. UnsupportedError if this KVM has no filter.
        """
        ranges = []
        for index, writable in allowed:
            flags = MSR_FILTER_READ | (MSR_FILTER_WRITE if writable else 0)
            ranges.append(MsrRange(flags, 1, index))
        # KVM takes sixteen ranges: neighbours share one.
        merged: list[MsrRange] = []
        for one in ranges:
            last = merged[-1] if merged else None
            if last is not None and last.flags == one.flags and last.base + last.count == one.base and last.count < 64:
                last.count += 1
            else:
                merged.append(one)
        maps = [ctypes.create_string_buffer(b"\xff" * 8, 8) for _ in merged]
        table = MsrFilter(MSR_FILTER_DEFAULT_DENY)
        for number, (one, bitmap) in enumerate(zip(merged, maps, strict=True)):
            one.bitmap = ctypes.addressof(bitmap)
            table.ranges[number] = one
        try:
            call(self.descriptor, Ioctl.X86_SET_MSR_FILTER, table)
        except OSError as error:
            raise UnsupportedError(
                f"this kernel's KVM has no MSR filter ({os.strerror(error.errno or 0)}); use another engine"
            ) from None

    def map(self, runs: Iterable[Run], addresses: Mapping[int, int] | Sequence[int]) -> int:
        """
        Make the memory slots those of a p2m; only what changed is told to KVM, while no vCPU runs.

        :returns: how many slots there are.
        :raises UnsupportedError: if the p2m is in more pieces than KVM has slots; nothing is changed then.
        """
        wanted = slots_of(runs, addresses)
        if len(wanted) > self._limit:
            raise UnsupportedError(
                f"this memory is in {len(wanted)} pieces and KVM has {self._limit} slots; use another engine"
            )
        keep = set(wanted)
        for slot in [slot for slot in self._slots if slot not in keep]:
            number = self._slots.pop(slot)
            self._set(number, (slot[0], 0, slot[2], True))
            self._free.append(number)
        for slot in wanted:
            if slot in self._slots:
                continue
            if not self._free:
                self._free.append(self._used)
                self._used += 1
            self._set(self._free[-1], slot)
            self._slots[slot] = self._free.pop()
        return len(self._slots)

    def _set(self, number: int, slot: _Slot) -> None:
        start, size, host, writable = slot
        region = MemoryRegion(number, 0 if writable else MEM_READONLY, start, size, host)
        call(self.descriptor, Ioctl.SET_USER_MEMORY_REGION, region)

    def signal_msi(self, address: int, data: int) -> bool:
        """An interrupt message as a device sends it, from any thread. Whether a local APIC took it."""
        return call(self.descriptor, Ioctl.SIGNAL_MSI, Msi(address & 0xFFFF_FFFF, address >> 32, data)) > 0

    def create_vcpu(self, number: int = 0, clock: Callable[[], int] | None = None) -> RawVcpu:
        """
        A vCPU, ``number`` being its APIC ID.

        :param clock: machine time in ns for deadlines; the host's monotonic clock by default.
        :raises UnsupportedError: if there are too many.
        """
        try:
            descriptor = call(self.descriptor, Ioctl.CREATE_VCPU, number)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise ValueError(f"there is a vCPU {number} already") from None
            most = self._system.check(Capability.MAX_VCPUS)
            raise UnsupportedError(
                f"KVM makes no vCPU {number} ({os.strerror(error.errno or 0)}): it has at most {most} for a domain"
            ) from None
        vcpu = RawVcpu(descriptor, self._system.run_page_size(), clock)
        self._vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        """End the vCPUs, none of which may be running, and the VM."""
        for vcpu in self._vcpus:
            vcpu.close()
        self._vcpus.clear()
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
