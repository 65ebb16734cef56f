"""The board of a device model's process.

Devices are the same objects as on any board; what they ask of it is an operation. Interrupt controllers, the p2m and
time are the hypervisor's: lines, windows and memory that is shown are asked for by dm_op, time is what was stamped on
the last request.
"""

import mmap
import os
import struct
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

from nonroot._engine import IoreqPages, Memory
from nonroot.devices.pci_device import BarKind, Dma, Region
from nonroot.hvm.bus import Bus
from nonroot.hvm.decode import WindowDecoder
from nonroot.hvm.device import Device, IrqLine, TimedDevice
from nonroot.hvm.dm_op import WANTS_STATUS, DmOp, Shutdown
from nonroot.hvm.dma import GuestDma
from nonroot.hvm.ioreq import BITMAP, NEVER
from nonroot.hvm.irq import WiredOr
from nonroot.hvm.memory_map import PAGE_SIZE
from nonroot.hvm.pc import Board
from nonroot.hvm.pci import PciFunction

__all__ = ["RUN", "Hypercalls", "ModelBoard", "ModelMemory"]

RUN: Final = struct.Struct("<QQIQ")
"""A run of the p2m in its file: gfn, count, backing, offset; the backing's bit 31: the guest may not write."""
READ_ONLY: Final = 1 << 31
SHORT: Final = 16
"""Bytes of a store by DMA that can wait for the end of its request."""


class GoneError(ConnectionError):
    """The hypervisor is gone."""


class Hypercalls:
    """The way to the hypervisor. In the process's main thread."""

    def __init__(self, pages: IoreqPages, domid: int, request: int, reply: int, operations: int, life: int) -> None:
        """``request``, ``reply``, ``operations``: eventfds that wake us, a vCPU that waits, and whoever else looks."""
        self.pages = pages
        self.answering = False
        """Whether a vCPU waits for us: it sees our operations before the reply."""
        self._domid = domid
        self._request, self._reply, self._operations, self._life = request, reply, operations, life

    def ask(self, op: DmOp, *args: int) -> None:
        """Ask for something that has no status."""
        self._push(op, 0, args)
        if not self.answering:
            os.eventfd_write(self._operations, 1)

    def call(self, op: DmOp, *args: int) -> int:
        """Ask, and wait for the status. GoneError."""
        index = self._push(op, WANTS_STATUS, args)
        self.pages.wake_caller(self._reply)
        if not self.answering:
            os.eventfd_write(self._operations, 1)
        return self._wait(index)

    def _push(self, op: DmOp, flags: int, args: Sequence[int]) -> int:
        values = [*args, *[0] * (5 - len(args))]
        while (index := self.pages.push(self._domid, op, flags, values)) is None:
            self.pages.wake_caller(self._reply)
            if not self.answering:
                os.eventfd_write(self._operations, 1)
            self._wait(self.pages.pushed() - 128 & 0xFFFF_FFFF)
        return index

    def _wait(self, index: int) -> int:
        status = self.pages.status(index, self._request, self._life)
        if status is None:
            raise GoneError
        return status


class ModelMemory:
    """The target's memory as this process has it mapped; its p2m is looked at again when it has changed."""

    def __init__(
        self, hypercalls: Hypercalls, backings: Sequence[tuple[int, int]], p2m: mmap.mmap, low_end: int
    ) -> None:
        """``backings``: (descriptor, bytes) of each, in order."""
        self.memory = Memory()
        for fd, size in backings:
            self.memory.add_backing(fd, size)
        self._hypercalls = hypercalls
        self._p2m = p2m
        self._dma = GuestDma(self.memory, low_end)
        self._seen = -1
        self.later: list[tuple[int, bytes]] | None = None
        """Where short stores in the course of a request go, if they have to wait for its end."""
        self._runs: set[tuple[int, int, int, int]] = set()

    def _look(self) -> None:
        pages = self._hypercalls.pages
        if pages.generation() == self._seen:
            return
        seen = pages.generation()
        count = max(self._hypercalls.call(DmOp.UPDATE_P2M), 0)
        runs = set(RUN.iter_unpack(self._p2m[: count * RUN.size]))
        for gfn, length, _, _ in self._runs - runs:
            self.memory.unmap(gfn, length)
        for gfn, length, backing, offset in runs - self._runs:
            self.memory.map(gfn, length, backing & ~READ_ONLY, offset, not backing & READ_ONLY)
        self._seen, self._runs = seen, runs

    def read(self, address: int, length: int) -> bytes:
        """See :class:`nonroot.devices.pci_device.Dma`."""
        self._look()
        return self._dma.read(address, length)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """The same; the hypervisor hears which frames were written before the guest can hear of it."""
        if self.later is not None and self._hypercalls.answering and len(data) <= SHORT:
            self.later.append((address, bytes(data)))
            return
        self.write_now(address, data)

    def write_now(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """The same, without delay."""
        self._look()
        self._dma.write(address, data)
        self._modified(address, len(data))

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        """The same."""
        self._look()
        count = self._dma.read_file(descriptor, offset, parts)
        for address, length in parts if count > 0 else ():
            self._modified(address, length)
        return count

    def _modified(self, address: int, length: int) -> None:
        first = address // PAGE_SIZE
        if length > 0 and 0 <= address < 1 << 40:
            self._hypercalls.ask(DmOp.MODIFIED_MEMORY, first, (address + length - 1) // PAGE_SIZE - first + 1)


class ModelRam:
    """Memory of a device, whose file the hypervisor has made."""

    def __init__(self, hypercalls: Hypercalls, bitmap: memoryview, number: int, fd: int, size: int) -> None:
        self.size = size
        self.view = memoryview(mmap.mmap(fd, size))
        self._hypercalls, self._bitmap, self._number = hypercalls, bitmap, number

    def show(self, address: int, offset: int, length: int, writable: bool = True) -> None:
        """See :class:`nonroot.devices.pci_device.DeviceRam`."""
        self._hypercalls.ask(DmOp.SHOW_MEMORY, self._number, address, offset, length | (1 << 63 if writable else 0))

    def hide(self, address: int, length: int) -> None:
        """The same."""
        self._hypercalls.ask(DmOp.HIDE_MEMORY, self._number, address, length)

    def take_dirty(self) -> set[int]:
        """The same."""
        if self._hypercalls.call(DmOp.TRACK_DIRTY_VRAM, self._number) <= 0:
            return set()
        bits = int.from_bytes(self._bitmap[: (self.size // PAGE_SIZE + 7) // 8], "little")
        found = set()
        while bits:
            lowest = bits & -bits
            found.add(lowest.bit_length() - 1)
            bits ^= lowest
        return found


class ModelClock:
    """Machine time, as stamped on the last request."""

    def __init__(self, pages: IoreqPages) -> None:
        self.now_ns = pages.now
        self.dirty = True

    def rearm(self) -> None:
        """A device's deadline has changed."""
        self.dirty = True


class ModelWindows:
    """BARs: decoded here as the hypervisor is asked to decode them there."""

    def __init__(self, hypercalls: Hypercalls, local: WindowDecoder) -> None:
        self._hypercalls, self._local = hypercalls, local
        self._now: dict[int, tuple[Region, ...]] = {}

    def own(self, key: int, device: Device, mmio: Device | None = None) -> None:
        """The device whose windows ``key`` are."""
        self._local.own(key, device)
        self._now[key] = ()

    def decode(self, key: int, regions: Sequence[Region]) -> None:
        """From now on the function wants these windows, and no other."""
        before = self._now.get(key)
        if before is None:
            return
        self._now[key] = tuple(regions)
        for region in before:
            if region not in regions:
                self._hypercalls.ask(DmOp.UNMAP_IO_RANGE, key, region.bar.index, region.base)
        self._local.decode(key, [region for region in regions if region.bar.kind is not BarKind.RAM])
        for region in regions:
            if region not in before:
                self._hypercalls.ask(DmOp.MAP_IO_RANGE, key, region.bar.index, region.base)


class ModelLines:
    """Interrupt lines, ISA's and PCI's: several drivers of ours are one to the hypervisor."""

    def __init__(self, hypercalls: Hypercalls) -> None:
        self._hypercalls = hypercalls
        self.isa_lines: dict[int, WiredOr] = {}
        self.intx_lines: dict[tuple[int, int], WiredOr] = {}

    def isa(self, irq: int) -> IrqLine:
        """A driver of ISA interrupt ``irq``."""

        def drive(level: bool) -> None:
            self._hypercalls.ask(DmOp.SET_ISA_IRQ_LEVEL, irq, level)

        return self.isa_lines.setdefault(irq, WiredOr([drive])).source()

    def source(self, slot: int, pin: int) -> IrqLine:
        """A driver of that device's interrupt line."""

        def drive(level: bool) -> None:
            self._hypercalls.ask(DmOp.SET_PCI_INTX_LEVEL, slot, pin, level)

        return self.intx_lines.setdefault((slot, pin), WiredOr([drive])).source()


class ModelPci:
    """The functions that this process has."""

    def __init__(self) -> None:
        self.functions: dict[int, PciFunction] = {}

    def add(self, slot: int, function: int, device: PciFunction) -> None:
        """Put a function on bus 0."""
        key = slot << 3 | function
        if key in self.functions:
            raise ValueError(f"PCI 00:{slot:02x}.{function} is taken")
        self.functions[key] = device


class ModelBoard:
    """The board, and what happens on it between requests."""

    def __init__(
        self,
        hypercalls: Hypercalls,
        dma: Dma,
        area: memoryview,
        ram_file: Callable[[str, int], tuple[int, int]],
        wake: Callable[[], object],
        low_end: int,
    ) -> None:
        """``area``: the file of the requests. ``ram_file``: a memory's (number, descriptor). ``wake``: any thread."""
        self.events: Counter[tuple[str, str]] = Counter()
        self.posted: deque[Callable[[], object]] = deque()
        self.clock = ModelClock(hypercalls.pages)
        self.lines = ModelLines(hypercalls)
        self.pci = ModelPci()
        self.ports = Bus("port", 16, self._event)
        self.mmio = Bus("mmio", 52, self._event)
        self._hypercalls = hypercalls
        self._deadline = NEVER
        bitmap = area[BITMAP:]

        def make_ram(name: str, size: int) -> ModelRam:
            number, fd = ram_file(name, size)
            return ModelRam(hypercalls, bitmap, number, fd, size)

        def post(action: Callable[[], object]) -> None:
            self.posted.append(action)
            wake()

        self.board = Board(
            clock=self.clock,
            events=self._event,
            ports=self.ports,
            mmio=self.mmio,
            lines=self.lines,
            pci=self.pci,
            interrupts=self.lines,
            windows=ModelWindows(hypercalls, WindowDecoder(self.ports, self.mmio, low_end, self._event)),
            dma=dma,
            make_ram=make_ram,
            post=post,
            request_reset=lambda: hypercalls.ask(DmOp.REMOTE_SHUTDOWN, Shutdown.REBOOT),
        )
        self._timed: tuple[TimedDevice, ...] = ()

    def seal(self) -> None:
        """All devices are there."""
        self._timed = tuple(device for device in self.board.devices if isinstance(device, TimedDevice))

    def run_posted(self) -> None:
        """Do what other threads have asked for."""
        while self.posted:
            self.posted.popleft()()

    def advance(self) -> None:
        """What is due happens."""
        now = self.clock.now_ns()
        for device in self._timed:
            device.advance(now)
        self.clock.dirty = True

    def settle(self) -> None:
        """After anything has happened: the hypervisor learns of the next deadline."""
        if not self.clock.dirty:
            return
        self.clock.dirty = False
        deadlines = [due for device in self._timed if (due := device.deadline()) is not None]
        deadline = min(deadlines, default=NEVER)
        if deadline != self._deadline:
            self._deadline = deadline
            self._hypercalls.pages.set_deadline(deadline)
            if not self._hypercalls.answering:
                self._hypercalls.ask(DmOp.REARM)

    def _event(self, device: str, event: str, detail: int) -> None:
        key = (device, event)
        if key in self.events or len(self.events) < 1024:
            self.events[key] += 1
