"""
A vCPU of KVM: it runs until there is an exit of :mod:`nonroot.engines.exits`.

A kick is a signal that this thread blocks and only KVM_RUN lets in, so that no kick is lost between two instructions
of ours and no handler is needed. Deadlines are a timer that sends the same signal.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

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
    CpuidEntry,
    ExitReason,
    Ioctl,
    Registers,
    RunPage,
    SignalMask,
    SystemRegisters,
)
from nonroot.engines.kvm.system import call
from nonroot.engines.policy import ANY_SUBLEAF, CpuidLeaf

__all__ = ["KvmVcpu"]

_KICK: Final = signal.SIGRTMIN + 5


class _Timer:
    """
    Kicks a vCPU's thread at a moment, from a thread of its own that starts when it is first needed.

    A moment put off does not wake that thread: it sees so when it wakes for the earlier one.
    """

    def __init__(self, kick: Callable[[], None]) -> None:
        self._kick = kick
        self._changed = threading.Condition()
        #: The moment that is asked for, and the one that the thread sleeps for, in ns of the monotonic clock.
        self._at: int | None = None
        self._sleeps_for: int | None = None
        self._ended = False
        self._thread: threading.Thread | None = None

    def set(self, delay_ns: int | None) -> None:
        """Kick after a while; None: not at all."""
        with self._changed:
            self._at = None if delay_ns is None else time.monotonic_ns() + delay_ns
            if self._at is None:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="kvm-deadline", daemon=True)
                self._thread.start()
            elif self._sleeps_for is None or self._at < self._sleeps_for:
                self._changed.notify()

    def _work(self) -> None:
        with self._changed:
            while not self._ended:
                left = None if self._at is None else self._at - time.monotonic_ns()
                if left is not None and left <= 0:
                    self._at = None
                    self._kick()
                    continue
                self._sleeps_for = self._at
                self._changed.wait(None if left is None else min(left / 1e9, threading.TIMEOUT_MAX))

    def close(self) -> None:
        """End the thread."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()


class KvmVcpu:
    """Made by :meth:`nonroot.engines.kvm.vm.VirtualMachine.create_vcpu`."""

    def __init__(self, descriptor: int, run_page_size: int, clock: Callable[[], int] | None = None) -> None:
        self.descriptor: Final = descriptor
        try:
            self._pages = mmap.mmap(descriptor, run_page_size)
        except BaseException:
            os.close(descriptor)
            raise
        self._page = RunPage.from_buffer(self._pages)
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
        self._mask: int | None = None
        self._timer = _Timer(self._prod)

    def now_ns(self) -> int:
        """Machine time in ns."""
        return self._clock()

    def run(self, deadline_ns: int | None = None) -> Exit:
        """
        Run guest code until there is an exit; other threads run meanwhile.

        :param deadline_ns: machine time at which to return ``Interrupted``.
        :raises RuntimeError: if another thread is running this vCPU.
        """
        with self._lock:
            if self._runner is not None:
                raise RuntimeError("another thread is running this vCPU")
            self._runner = threading.get_ident()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {_KICK})
        try:
            return self._run(deadline_ns)
        finally:
            with self._lock:
                self._runner = None
            # What arrived late must not reach the thread when the signal is let in again.
            while signal.sigtimedwait({_KICK}, 0) is not None:
                pass
            if _KICK not in before:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {_KICK})

    def _run(self, deadline_ns: int | None) -> Exit:
        self._let_kicks_in()
        self._expected = None
        self._msr_exit = False
        timed = False
        try:
            while True:
                if self._stashed is not None:
                    event, self._stashed = self._stashed, None
                    return event
                if self._take_kick():
                    return Interrupted()
                if deadline_ns is not None:
                    left = deadline_ns - self._clock()
                    if left <= 0:
                        return Interrupted()
                    self._timer.set(left)
                    timed = True
                self._page.immediate_exit = self._kicked
                if (entered := self._enter()) is not None:
                    return entered
                while signal.sigtimedwait({_KICK}, 0) is not None:
                    pass
        finally:
            self._page.immediate_exit = 0
            if timed:
                self._timer.set(None)

    def _enter(self) -> Exit | None:
        """KVM_RUN once; None if a signal ended it."""
        try:
            call(self.descriptor, Ioctl.RUN)
        except OSError as error:
            self._unsettled = False
            if error.errno in (errno.EINTR, errno.EAGAIN):
                return None
            return Failure(f"KVM cannot run the guest: {os.strerror(error.errno or 0)}")
        return self._exit()

    def _exit(self) -> Exit | None:
        page = self._page
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
            return Mmio(mmio.address, mmio.length, bool(mmio.is_write), data)
        if reason == ExitReason.X86_RDMSR:
            self._expected, self._msr_exit = 8, True
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

    def _rare_exit(self, reason: int) -> Exit:
        page = self._page
        if reason == ExitReason.SHUTDOWN:
            return TripleFault()
        if reason == ExitReason.IRQ_WINDOW_OPEN:
            page.request_interrupt_window = 0
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
        page = self._page
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
        self._page.msr.error = 1
        self._expected, self._msr_exit = None, False

    def kick(self) -> None:
        """Make ``run`` return ``Interrupted`` soon, from any thread; if it is not running, the next one does."""
        with self._lock:
            self._kicked = True
            self._signal()

    def _prod(self) -> None:
        """Have ``run`` look at the time."""
        with self._lock:
            self._signal()

    def _signal(self) -> None:
        if self._runner is not None:
            self._page.immediate_exit = 1
            signal.pthread_kill(self._runner, _KICK)

    def _take_kick(self) -> bool:
        with self._lock:
            kicked, self._kicked = self._kicked, False
        return kicked

    def _let_kicks_in(self) -> None:
        """KVM_RUN runs with this thread's signal mask without the kick."""
        mask = sum(1 << number - 1 for number in signal.pthread_sigmask(signal.SIG_BLOCK, ()) if number != _KICK)
        if mask != self._mask:
            call(self.descriptor, Ioctl.SET_SIGNAL_MASK, SignalMask(8, mask))
            self._mask = mask

    def _settle(self) -> None:
        """Have KVM finish the instruction of the last exit. RuntimeError if another thread is running this vCPU."""
        with self._lock:
            if self._runner not in (None, threading.get_ident()):
                raise RuntimeError("another thread is running this vCPU")
        if self._unsettled and self._expected is None and not self._msr_exit:
            self._page.immediate_exit = 1
            try:
                self._stashed = self._enter()
            finally:
                self._page.immediate_exit = 0

    def registers(self) -> Registers:
        """The general registers, RIP and RFLAGS, after the instruction of the last exit."""
        self._settle()
        values = Registers()
        call(self.descriptor, Ioctl.GET_REGS, values)
        return values

    def set_registers(self, values: Registers) -> None:
        """Set them all."""
        self._settle()
        call(self.descriptor, Ioctl.SET_REGS, values)

    def system_registers(self) -> SystemRegisters:
        """Segments, tables, control registers."""
        self._settle()
        values = SystemRegisters()
        call(self.descriptor, Ioctl.GET_SREGS, values)
        return values

    def set_system_registers(self, values: SystemRegisters) -> None:
        """Set them all. ValueError if no vCPU can be in that state."""
        self._settle()
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

    def close(self) -> None:
        """End it; it must not be running."""
        self._timer.close()
        del self._page
        self._pages.close()
        os.close(self.descriptor)
