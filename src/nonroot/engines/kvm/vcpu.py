"""
A vCPU of KVM: it runs until there is an exit of :mod:`nonroot.engines.exits`.

Kicks and deadlines are signals, see :mod:`nonroot.engines.kvm.alarm`. What of a vCPU is not KVM's business is in
:mod:`nonroot.engines.kvm.engine`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from nonroot.engines.exits import (
    Debug,
    Exit,
    Failure,
    Halt,
    Interrupted,
    InterruptWindow,
    IoapicEoi,
    Mmio,
    MsrRead,
    MsrWrite,
    PortIo,
    TripleFault,
)
from nonroot.engines.kvm.abi import (
    CPUID_SIGNIFICANT_INDEX,
    INTERNAL_ERROR_EMULATION,
    VCPU_TSC_CTRL,
    VCPU_TSC_OFFSET,
    CpuidEntry,
    DeviceAttribute,
    ExitReason,
    GuestDebug,
    Ioctl,
    MsrEntry,
    Registers,
    RunPage,
    SignalMask,
    SystemRegisters,
    Translation,
)
from nonroot.engines.kvm.alarm import ALARM, Alarm, drain, own_token
from nonroot.engines.kvm.system import call, libc_ioctl
from nonroot.engines.policy import ANY_SUBLEAF, CpuidLeaf

__all__ = ["RawVcpu"]

#: So many exits one instruction may make after it was abandoned.
_MOST_FRAGMENTS: Final = 64
MSR_TSC: Final = 0x10

S = TypeVar("S", bound=ctypes.Structure)
_ioctl: Final = libc_ioctl
_RUN: Final = int(Ioctl.RUN)
_ONES: Final = [0xFF] * 8


class _OneMsr(ctypes.Structure):
    _fields_ = [("count", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("entry", MsrEntry)]


_XSAVE: Final = 4096


class RawVcpu:
    """Made by :meth:`nonroot.engines.kvm.vm.VirtualMachine.create_vcpu`."""

    def __init__(self, descriptor: int, run_page_size: int, clock: Callable[[], int] | None = None) -> None:
        self.descriptor: Final = descriptor
        try:
            self._pages = mmap.mmap(descriptor, run_page_size)
        except BaseException:
            os.close(descriptor)
            raise
        self.page = RunPage.from_buffer(self._pages)
        self._clock = clock or time.monotonic_ns
        self._lock = threading.Lock()
        self._runner: int | None = None
        self._kicked = False
        #: Bytes that the last exit waits for; None if for none.
        self._expected: int | None = None
        self._msr_exit = False
        #: KVM has to be entered once before registers are what the last exit left.
        self._unsettled = False
        self._stashed: Exit | None = None
        #: The thread whose signal mask and alarm these are.
        self._token: object | None = None
        self._alarm: Alarm | None = None

    def now_ns(self) -> int:
        """Machine time in ns."""
        return self._clock()

    def claim(self) -> None:
        """Have the calling thread run the vCPU until :meth:`release`. RuntimeError if another one does."""
        with self._lock:
            if self._runner is not None:
                raise RuntimeError("another thread is running this vCPU")
            self._runner = threading.get_ident()
        token = own_token()
        if token is not self._token:
            self._adopt(token)
        self._forget_answer()

    def _adopt(self, token: object) -> None:
        """KVM_RUN runs with this thread's signal mask without the alarm."""
        mask = sum(1 << number - 1 for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()) if number != ALARM)
        call(self.descriptor, Ioctl.SET_SIGNAL_MASK, SignalMask(8, mask))
        if self._alarm is not None:
            self._alarm.close()
        self._alarm = Alarm()
        self._token = token

    def _forget_answer(self) -> None:
        """Nobody answered: ones were read, an unknown MSR raises #GP."""
        self._expected = None
        self._msr_exit = False

    def release(self) -> None:
        """The opposite of :meth:`claim`."""
        with self._lock:
            self._runner = None

    def run(self, deadline_ns: int | None = None) -> Exit:
        """
        Run guest code until there is an exit; other threads run meanwhile.

        :param deadline_ns: machine time at which to return ``Interrupted``.
        :raises RuntimeError: if another thread is running this vCPU.
        """
        self.claim()
        try:
            while True:
                if self._take_kick():
                    return Interrupted()
                left = None if deadline_ns is None else deadline_ns - self._clock()
                if left is not None and left <= 0:
                    return Interrupted()
                event: Exit | None = self.enter(left)
                if isinstance(event, InterruptWindow):
                    self.page.request_interrupt_window = 0
                if event is not None:
                    return event
        finally:
            self.release()

    def enter(self, left_ns: int | None = None) -> Exit | None:
        """
        Run guest code until an exit; None if a signal ended it. For whoever has claimed the vCPU.

        :param left_ns: after how many ns at most a signal is to end it.
        """
        if self._stashed is not None:
            stashed, self._stashed = self._stashed, None
            return stashed
        if left_ns is not None and self._alarm is not None:
            self._alarm.within(left_ns)
        event = self._enter()
        if event is None:
            drain()
        return event

    def _enter(self) -> Exit | None:
        """KVM_RUN once; None if a signal ended it."""
        result = _ioctl(self.descriptor, _RUN, 0)
        if result < 0:
            code = ctypes.get_errno()
            self._unsettled = False
            if code in (errno.EINTR, errno.EAGAIN):
                return None
            return Failure(f"KVM cannot run the guest: {os.strerror(code)}")
        return self._exit()

    def _exit(self) -> Exit | None:
        page = self.page
        reason = page.exit_reason
        self._unsettled = reason in (ExitReason.IO, ExitReason.MMIO, ExitReason.X86_RDMSR, ExitReason.X86_WRMSR)
        if reason == ExitReason.IO:
            io = page.io
            length = io.size * io.count
            data = self._pages[io.data_offset : io.data_offset + length] if io.direction else b""
            self._expected = None if io.direction else length
            return PortIo(io.port, io.size, bool(io.direction), io.count, data)
        if reason == ExitReason.MMIO:
            mmio = page.mmio
            data = bytes(mmio.data[: mmio.length]) if mmio.is_write else b""
            self._expected = None if mmio.is_write else mmio.length
            if not mmio.is_write:
                mmio.data[:] = _ONES
            return Mmio(mmio.address, mmio.length, bool(mmio.is_write), data)
        if reason == ExitReason.X86_RDMSR:
            self._expected, self._msr_exit = 8, True
            page.msr.error = 1
            return MsrRead(page.msr.index)
        if reason == ExitReason.X86_WRMSR:
            self._msr_exit = True
            page.msr.error = 0
            return MsrWrite(page.msr.index, page.msr.data)
        if reason == ExitReason.HLT:
            return Halt()
        if reason == ExitReason.INTR:
            return None
        return self._rare_exit(reason)

    def _rare_exit(self, reason: int) -> Exit | None:
        page = self.page
        if reason == ExitReason.SHUTDOWN:
            return TripleFault()
        if reason == ExitReason.SET_TPR:
            return None
        if reason == ExitReason.IRQ_WINDOW_OPEN:
            return InterruptWindow()
        if reason == ExitReason.IOAPIC_EOI:
            return IoapicEoi(page.eoi_vector)
        if reason == ExitReason.DEBUG:
            return Debug(page.debug.dr6 & 0x400F)
        if reason == ExitReason.FAIL_ENTRY:
            return Failure(f"the CPU refuses to enter the guest (hardware reason {page.hardware_reason:#x})")
        if reason == ExitReason.INTERNAL_ERROR:
            internal = page.internal
            if internal.suberror == INTERNAL_ERROR_EMULATION and internal.ndata >= 3 and internal.flags & 1:
                code = bytes(internal.instruction[: min(internal.instruction_size, 15)]).hex(" ")
                return Failure(f"KVM does not know the instruction {code}")
            return Failure(f"KVM has an internal error (number {internal.suberror})")
        return Failure(f"KVM ended the run for a reason that nonroot does not know ({reason})")

    def complete(self, data: bytes) -> None:
        """Answer the last input, load or MSR read. ValueError if the length is wrong or nothing is waited for."""
        if self._expected is None:
            raise ValueError("the last exit does not wait for an answer")
        if len(data) != self._expected:
            raise ValueError(f"the last exit waits for {self._expected} bytes, not {len(data)}")
        page = self.page
        if self._msr_exit:
            page.msr.data, page.msr.error = int.from_bytes(data, "little"), 0
        elif page.exit_reason == ExitReason.IO:
            offset = page.io.data_offset
            self._pages[offset : offset + len(data)] = data
        else:
            page.mmio.data[: len(data)] = list(data)
        self._expected, self._msr_exit = None, False

    def fail(self) -> None:
        """Answer the last MSR exit with #GP in the guest. ValueError if there is none."""
        if not self._msr_exit:
            raise ValueError("the last exit is no MSR's")
        self.page.msr.error = 1
        self._expected, self._msr_exit = None, False

    def kick(self) -> None:
        """Make ``run`` return ``Interrupted`` soon, from any thread; if it is not running, the next one does."""
        with self._lock:
            self._kicked = True
        self.prod()

    def prod(self) -> None:
        """End the KVM_RUN under way or about to be, if there is one; from any thread."""
        with self._lock:
            if self._runner is not None:
                signal.pthread_kill(self._runner, ALARM)

    def _take_kick(self) -> bool:
        with self._lock:
            kicked, self._kicked = self._kicked, False
        return kicked

    def check_thread(self) -> None:
        """RuntimeError if another thread is running this vCPU."""
        if self._runner not in (None, threading.get_ident()):
            raise RuntimeError("another thread is running this vCPU")

    def settle(self) -> None:
        """Have KVM finish the instruction of the last exit, if it waits for nothing."""
        self.check_thread()
        if self._unsettled and self._expected is None and not self._msr_exit:
            self.page.immediate_exit = 1
            try:
                event = self._enter()
            finally:
                self.page.immediate_exit = 0
            if event is None:
                drain()
            else:
                self._stashed = event

    def forget_exit(self) -> None:
        """Have KVM end the instruction of the last exit, answered or not: the registers are about to be replaced."""
        self.check_thread()
        for _ in range(_MOST_FRAGMENTS):
            self._forget_answer()
            if not self._unsettled:
                break
            self.settle()
        self._unsettled = False
        self._stashed = None

    @property
    def stashed(self) -> bool:
        """An exit came when an instruction was finished; the next :meth:`enter` gives it."""
        return self._stashed is not None

    def accept(self) -> None:
        """The last MSR write has been made."""
        self._expected, self._msr_exit = None, False

    def registers_now(self) -> Registers:
        """The general registers as they are in the middle of the last exit."""
        values = Registers()
        call(self.descriptor, Ioctl.GET_REGS, values)
        return values

    def set_registers_now(self, values: Registers) -> None:
        """Set them in the middle of an exit: the instruction goes on with them."""
        call(self.descriptor, Ioctl.SET_REGS, values)

    def system_registers_now(self) -> SystemRegisters:
        """Segments and control registers in the middle of the last exit."""
        values = SystemRegisters()
        call(self.descriptor, Ioctl.GET_SREGS, values)
        return values

    def registers(self) -> Registers:
        """The general registers, RIP and RFLAGS, after the instruction of the last exit."""
        self.settle()
        values = Registers()
        call(self.descriptor, Ioctl.GET_REGS, values)
        return values

    def set_registers(self, values: Registers) -> None:
        """Set them all."""
        self.settle()
        call(self.descriptor, Ioctl.SET_REGS, values)

    def system_registers(self) -> SystemRegisters:
        """Segments, tables, control registers."""
        self.settle()
        values = SystemRegisters()
        call(self.descriptor, Ioctl.GET_SREGS, values)
        return values

    def set_system_registers(self, values: SystemRegisters) -> None:
        """Set them all. ValueError if no vCPU can be in that state."""
        self.settle()
        try:
            call(self.descriptor, Ioctl.SET_SREGS, values)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError("KVM refuses these system registers") from None

    def set_cpuid(self, leaves: Iterable[CpuidLeaf]) -> None:
        """Show these leaves to the guest, before it first runs."""
        entries = [
            CpuidEntry(leaf, 0, 0, *values)
            if subleaf == ANY_SUBLEAF
            else CpuidEntry(leaf, subleaf, CPUID_SIGNIFICANT_INDEX, *values)
            for leaf, subleaf, *values in leaves
        ]

        class Table(ctypes.Structure):
            _fields_ = [("count", ctypes.c_uint32), ("padding", ctypes.c_uint32), ("e", CpuidEntry * len(entries))]

        call(self.descriptor, Ioctl.SET_CPUID2, Table(len(entries), 0, (CpuidEntry * len(entries))(*entries)))

    def structure(self, number: Ioctl, kind: type[S]) -> S:
        """One of KVM's structures of this vCPU, by the call that gives it."""
        self.check_thread()
        values = kind()
        call(self.descriptor, number, values)
        return values

    def set_structure(self, number: Ioctl, values: ctypes.Structure) -> None:
        """ValueError if no vCPU can be in that state."""
        self.check_thread()
        try:
            call(self.descriptor, number, values)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            raise ValueError(f"KVM refuses these values ({number.name})") from None

    def xsave(self) -> bytes:
        """The XSAVE area in its standard form."""
        area = (ctypes.c_uint8 * _XSAVE)()
        call(self.descriptor, Ioctl.GET_XSAVE, area)
        return bytes(area)

    def set_xsave(self, area: bytes) -> None:
        """ValueError if it is none."""
        data = (ctypes.c_uint8 * _XSAVE).from_buffer_copy(area.ljust(_XSAVE, b"\0"))
        try:
            call(self.descriptor, Ioctl.SET_XSAVE, data)
        except OSError:
            raise ValueError("KVM refuses the vector registers") from None

    def msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Values of MSRs, as far as this KVM has them."""
        found = {}
        for index in indices:
            table = _OneMsr(1, 0, MsrEntry(index))
            if call(self.descriptor, Ioctl.GET_MSRS, table):
                found[index] = int(table.entry.data)
        return found

    def set_msr(self, index: int, value: int) -> bool:
        """Set an MSR; whether it can be."""
        return call(self.descriptor, Ioctl.SET_MSRS, _OneMsr(1, 0, MsrEntry(index, 0, value))) == 1

    def interrupt(self, vector: int) -> None:
        """Inject an interrupt, which the guest can take now."""
        call(self.descriptor, Ioctl.INTERRUPT, ctypes.c_uint32(vector))

    def nmi(self) -> None:
        """Inject an NMI."""
        call(self.descriptor, Ioctl.NMI)

    def translate(self, linear: int) -> int | None:
        """Guest-physical address of a linear one."""
        self.check_thread()
        values = Translation(linear=linear)
        call(self.descriptor, Ioctl.TRANSLATE, values)
        return int(values.physical) if values.valid else None

    def tsc_khz(self) -> int:
        """Frequency of the guest's TSC."""
        return call(self.descriptor, Ioctl.GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> bool:
        """Whether KVM can."""
        try:
            call(self.descriptor, Ioctl.SET_TSC_KHZ, khz)
        except OSError:
            return False
        return True

    def _tsc_attribute(self, value: ctypes.c_uint64) -> DeviceAttribute:
        return DeviceAttribute(0, VCPU_TSC_CTRL, VCPU_TSC_OFFSET, ctypes.addressof(value))

    def move_tsc(self, delta: int) -> None:
        """Move the guest's TSC by so many ticks."""
        value = ctypes.c_uint64()
        try:
            call(self.descriptor, Ioctl.GET_DEVICE_ATTR, self._tsc_attribute(value))
            value.value += delta
            call(self.descriptor, Ioctl.SET_DEVICE_ATTR, self._tsc_attribute(value))
        except OSError:
            # Before Linux 5.16. KVM may take small changes for attempts to set several vCPUs to the same.
            now = self.msrs([MSR_TSC])[MSR_TSC]
            self.set_msr(MSR_TSC, now + delta & (1 << 64) - 1)

    def set_guest_debug(self, control: int, registers: Sequence[int] = ()) -> None:
        """``KVM_SET_GUEST_DEBUG``; ``registers``: DR0 to DR3 and DR7."""
        values = GuestDebug(control)
        for number, value in zip((0, 1, 2, 3, 7), registers, strict=False):
            values.debugreg[number] = value
        call(self.descriptor, Ioctl.SET_GUEST_DEBUG, values)

    def close(self) -> None:
        """End it; it must not be running."""
        if self._alarm is not None:
            self._alarm.close()
        del self.page
        self._pages.close()
        os.close(self.descriptor)
