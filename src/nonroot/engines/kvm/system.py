"""/dev/kvm itself: opening it, what it can do, and calling it."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any, Final, Self

from nonroot.engines.kvm.abi import API_VERSION, Capability, CpuidEntry, Ioctl, MsrEntry
from nonroot.errors import UnsupportedError

__all__ = ["DEVICE", "System", "call", "libc_ioctl"]

DEVICE: Final = Path("/dev/kvm")
_NEEDED: Final = (Capability.USER_MEMORY, Capability.IMMEDIATE_EXIT)

# Unlike fcntl.ioctl it takes a pointer to more than 1024 bytes; it lets other threads run meanwhile, as that does.
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.ioctl.restype = ctypes.c_int
libc_ioctl: Final = _libc.ioctl
"""(descriptor, number, argument) as they are; the result is negative for errors, which ctypes.get_errno has."""


def call(descriptor: int, number: Ioctl, argument: Any = 0) -> int:
    """
    One ioctl; ``argument`` is a number or a ctypes structure.

    :raises OSError: with the call's name.
    """
    value = argument if isinstance(argument, int) else ctypes.addressof(argument)
    result: int = _libc.ioctl(descriptor, number, value)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"KVM_{number.name}: {os.strerror(code)}")
    return result


class System:
    """An open /dev/kvm; a context manager."""

    def __init__(self, device: Path = DEVICE) -> None:
        """UnsupportedError with one sentence if it cannot be used."""
        try:
            self.descriptor: Final = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnsupportedError(
                f"there is no {device}: load the module kvm_intel or kvm_amd, or use another engine"
            ) from None
        except PermissionError:
            raise UnsupportedError(
                f"{device} may not be opened by this user: join its group, usually kvm, or use another engine"
            ) from None
        except OSError as error:
            raise UnsupportedError(
                f"{device} cannot be opened ({os.strerror(error.errno or 0)}): "
                "switch virtualization on in the firmware, or use another engine"
            ) from None
        try:
            self._check(device)
        except BaseException:
            self.close()
            raise

    def _check(self, device: Path) -> None:
        try:
            version = call(self.descriptor, Ioctl.GET_API_VERSION)
        except OSError:
            raise UnsupportedError(f"{device} is not KVM's device") from None
        if version != API_VERSION:
            raise UnsupportedError(f"{device} speaks version {version} of KVM's interface, not {API_VERSION}")
        for capability in _NEEDED:
            if not self.check(capability):
                raise UnsupportedError(f"this kernel's KVM has no {capability.name}; use another engine")

    def check(self, capability: Capability) -> int:
        """What KVM says of a capability: 0 if it has none."""
        return call(self.descriptor, Ioctl.CHECK_EXTENSION, capability)

    def cpuid(self) -> dict[tuple[int, int], tuple[int, int, int, int]]:
        """What KVM can show to guests: EAX, EBX, ECX and EDX by leaf and subleaf."""
        most = 256

        class Table(ctypes.Structure):
            _fields_ = [("count", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("entries", CpuidEntry * most)]

        table = Table(most)
        call(self.descriptor, Ioctl.GET_SUPPORTED_CPUID, table)
        return {(e.function, e.index): (e.eax, e.ebx, e.ecx, e.edx) for e in table.entries[: table.count]}

    def feature_msr(self, index: int) -> int:
        """The host's value of an MSR that says what the CPU is like; 0 if KVM does not tell."""

        class Table(ctypes.Structure):
            _fields_ = [("count", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("entry", MsrEntry)]

        table = Table(1, 0, MsrEntry(index))
        try:
            found = call(self.descriptor, Ioctl.GET_MSRS, table)
        except OSError:
            return 0
        return int(table.entry.data) if found else 0

    def run_page_size(self) -> int:
        """Bytes of a vCPU's shared pages."""
        return call(self.descriptor, Ioctl.GET_VCPU_MMAP_SIZE)

    def create_vm(self) -> int:
        """The descriptor of a new virtual machine. UnsupportedError if the kernel makes none."""
        while True:
            try:
                return call(self.descriptor, Ioctl.CREATE_VM)
            except OSError as error:
                if error.errno == errno.EINTR:
                    continue
                raise UnsupportedError(
                    f"KVM makes no virtual machine ({os.strerror(error.errno or 0)}): "
                    "another hypervisor may hold the CPU; use another engine"
                ) from None

    def close(self) -> None:
        """Close the descriptor; virtual machines made from it stay."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
