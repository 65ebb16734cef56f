"""
A bare machine for guest programs in tests: memory, one vCPU, no devices.

Its RAM is scrambled by default: no guest frame lies where its number says, and neighbours are no neighbours.
"""

from __future__ import annotations

import functools
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Self, TypeVar

from nonroot._engine import Memory
from nonroot.engines.exits import Exit, PortIo
from nonroot.engines.policy import CpuPolicy
from nonroot.engines.protocol import Engine, EngineOptions
from nonroot.engines.state import Segment, TableRegister, VcpuState
from nonroot.testing.asm import Program, assemble

__all__ = ["CODE", "DATA", "MMIO", "RAM_BYTES", "STACK", "BareMachine"]

#: RAM is guest-physical 0 up to here; the page after it is not RAM.
RAM_BYTES: Final = 4 << 20
#: Where programs are assembled to and start; in real mode at :data:`BOOT`.
CODE: Final = 0x10000
BOOT: Final = 0x7C00
#: Free RAM for programs' data.
DATA: Final = 0x80000
#: Initial stack pointer.
STACK: Final = 0x70000
#: A page of guest-physical memory that is never RAM.
MMIO: Final = 0xD0000000

T = TypeVar("T")
_GDT, _IDT, _TSS, _PML4 = 0x800, 0x1000, 0x2000, 0x4000
_SELECTORS: Final = {"code": 0x08, "data": 0x10, "tss": 0x28}


@functools.lru_cache(maxsize=512)
def _assemble(source: str, bits: int, origin: int, constants: tuple[tuple[str, int], ...]) -> Program:
    return assemble(source, bits=bits, origin=origin, constants=dict(constants))


@functools.cache
def _frames(seed: int | None) -> tuple[int, ...]:
    frames = list(range(RAM_BYTES // 4096))
    if seed is not None:
        random.Random(seed).shuffle(frames)
    return tuple(frames)


@functools.cache
def _identity(gib: int) -> bytes:
    """A page directory that maps one GiB to itself by 2 MiB pages."""
    return b"".join((gib << 30 | i << 21 | 0x83).to_bytes(8, "little") for i in range(512))


class BareMachine:
    """Memory and a vCPU; :meth:`load` puts a program in and the vCPU into its mode."""

    def __init__(
        self,
        engine: Engine,
        policy: CpuPolicy,
        options: EngineOptions | None = None,
        *,
        scrambled: bool = True,
        seed: int = 1,
    ) -> None:
        self.memory = Memory()
        descriptor = os.memfd_create("nonroot-test")
        try:
            os.ftruncate(descriptor, RAM_BYTES)
            backing = self.memory.add_backing(descriptor, RAM_BYTES)
        finally:
            os.close(descriptor)
        for gfn, frame in enumerate(_frames(seed if scrambled else None)):
            self.memory.map(gfn, 1, backing, frame * 4096)
        self.engine = engine
        self.policy = policy
        self.options = options
        self.vcpu = engine.create_vcpu(self.memory, policy, 0, options)
        self._power_up = self.vcpu.state()
        self.program = Program(b"", CODE, {})

    def load(self, source: str, bits: int = 64, /, **constants: int) -> Self:
        """
        Assemble a program and point the vCPU at it.

        16 bits is real mode with all segments 0 (data segments with 4 GiB limits); 32 is flat protected mode without
        paging; 64 is long mode with an identity map of 4 GiB. Interrupts are off. ``CODE``,
        ``DATA``, ``MMIO``, ``STACK`` and ``RAM_BYTES`` are known as constants.
        """
        known = {"CODE": CODE, "DATA": DATA, "MMIO": MMIO, "STACK": STACK, "RAM_BYTES": RAM_BYTES}
        origin, stack = (BOOT, BOOT) if bits == 16 else (CODE, STACK)
        self.program = _assemble(source, bits, origin, tuple(sorted((known | constants).items())))
        self.memory.write(origin, self.program.code)
        state = self._mode(bits)
        self.vcpu.set_state(replace(state, rip=origin, gpr=(0, 0, 0, 0, stack, *[0] * 11), now_ns=self.vcpu.now_ns()))
        return self

    def vectors(self, handlers: Mapping[int, str]) -> Self:
        """Point interrupt vectors at labels of the program, in the IDT or the real-mode vector table."""
        state = self.vcpu.state()
        for vector, label in handlers.items():
            target = self.program[label]
            if not state.cr0 & 1:
                self.memory.write(4 * vector, target.to_bytes(4, "little"))
            elif state.efer >> 10 & 1:
                low = target & 0xFFFF | _SELECTORS["code"] << 16 | 0x8E00 << 32 | (target >> 16 & 0xFFFF) << 48
                self.memory.write(_IDT + 16 * vector, (low | target >> 32 << 64).to_bytes(16, "little"))
            else:
                low = target & 0xFFFF | _SELECTORS["code"] << 16 | 0x8E00 << 32 | (target >> 16 & 0xFFFF) << 48
                self.memory.write(_IDT + 8 * vector, low.to_bytes(8, "little"))
        return self

    def _mode(self, bits: int) -> VcpuState:
        state = self._power_up
        if bits == 16:
            code = Segment(0, 0, 0xFFFF, 0x9B)
            data = Segment(0, 0, 0xFFFFFFFF, 0x93)
            return replace(state, segments=(data, code, data, data, data, data, *state.segments[6:]))
        long = bits == 64
        descriptors = (0, 0xAF9B000000FFFF if long else 0xCF9B000000FFFF, 0xCF93000000FFFF, 0, 0)
        for i, descriptor in enumerate(descriptors):
            self.memory.write(_GDT + 8 * i, descriptor.to_bytes(8, "little"))
        code = Segment(_SELECTORS["code"], 0, 0xFFFFFFFF, 0xA09B if long else 0xC09B)
        data = Segment(_SELECTORS["data"], 0, 0xFFFFFFFF, 0xC093)
        tss = Segment(_SELECTORS["tss"], _TSS, 0x67, 0x8B)
        state = replace(
            state,
            segments=(data, code, data, data, data, data, Segment(0, 0, 0, 0x10082), tss),
            gdtr=TableRegister(_GDT, 0x37),
            idtr=TableRegister(_IDT, 0xFFF if long else 0x7FF),
            cr0=0x80000033 if long else 0x33,
        )
        if not long:
            return state
        self.memory.write(_PML4, (_PML4 + 0x1003).to_bytes(8, "little"))
        for gib in range(4):
            self.memory.write(_PML4 + 0x1000 + 8 * gib, (_PML4 + 0x2000 + 0x1000 * gib | 3).to_bytes(8, "little"))
            self.memory.write(_PML4 + 0x2000 + 0x1000 * gib, _identity(gib))
        return replace(state, cr3=_PML4, cr4=0x6A0, efer=0xD00)

    def run(self, deadline_ns: int | None = None, limit: int | None = None) -> Exit:
        """Run the vCPU; without a deadline, 10 s of machine time are the limit (a test that hangs must end)."""
        deadline = self.vcpu.now_ns() + 10_000_000_000 if deadline_ns is None else deadline_ns
        return self.vcpu.run(deadline, limit)

    def expect(self, kind: type[T]) -> T:
        """Run until the next exit, which must be of this kind."""
        event = self.run()
        assert isinstance(event, kind), f"{event} instead of {kind.__name__}"
        return event

    def output(self, count: int = 1) -> list[int]:
        """Run until the guest has written ``count`` values to ports; returns them."""
        values: list[int] = []
        while len(values) < count:
            event = self.run()
            assert isinstance(event, PortIo), event
            assert event.write, event
            pieces = (event.data[i : i + event.size] for i in range(0, len(event.data), event.size))
            values += [int.from_bytes(piece, "little") for piece in pieces]
        return values

    def later(self, delay_s: float, action: Callable[[], object]) -> threading.Timer:
        """Do something from another thread after a while."""
        timer = threading.Timer(delay_s, action)
        timer.daemon = True
        timer.start()
        return timer

    def register(self, name: str) -> int:
        """A general register, RIP or RFLAGS by name."""
        state = self.vcpu.state()
        names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16))]
        return state.gpr[names.index(name)] if name in names else int(getattr(state, name))

    def u64(self, address: int) -> int:
        """Eight bytes of guest-physical memory."""
        return int.from_bytes(self.memory.read(address, 8), "little")


def elapsed(action: Callable[[], object]) -> float:
    """Seconds of wall time that a call takes."""
    start = time.monotonic()
    action()
    return time.monotonic() - start
