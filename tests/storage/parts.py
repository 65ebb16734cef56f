"""Media, memory and a small driver for the tests of storage devices."""

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from nonroot.devices.block import SECTOR, BlockDone, BlockOp, BlockRequest, BlockResult, BlockStatus
from nonroot.devices.dma8237 import Dma8237
from nonroot.devices.floppy import FloppyController
from nonroot.devices.ide import BUS_MASTER, PRIMARY, PiixIde
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.devices.pci_device import PciConnection
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.device import Events, IrqLine
from nonroot.hvm.irq import WiredOr

BSY, DRDY, DF, DSC, DRQ, ERR = 0x80, 0x40, 0x20, 0x10, 0x08, 0x01
LATENCY = 1000


class RamPort:
    """A medium in memory that answers after :data:`LATENCY` ns of a manual clock."""

    def __init__(self, clock: ManualClock, content: bytes | bytearray, read_only: bool = False) -> None:
        self.data = bytearray(content)
        self.size = len(self.data)
        self.read_only = read_only
        self.requests: list[BlockRequest] = []
        self.flushed: list[bytes] = []
        """The whole medium at each flush."""
        self.bad: set[int] = set()
        """Sectors that cannot be read or written."""
        self.bad_status = BlockStatus.IO_ERROR
        self.keeps_writes = True
        self._clock = clock
        self._due: list[tuple[int, BlockRequest, BlockDone]] = []

    def submit(self, request: BlockRequest, done: BlockDone) -> None:
        self.requests.append(request)
        self._due.append((request.issued_ns + LATENCY, request, done))
        self._clock.rearm()

    def deadline(self) -> int | None:
        return min((due for due, _, _ in self._due), default=None)

    def advance(self, now_ns: int) -> None:
        while self._due and self._due[0][0] <= now_ns:
            _, request, done = self._due.pop(0)
            done(self._perform(request))

    def _perform(self, request: BlockRequest) -> BlockResult:
        if request.op is BlockOp.FLUSH:
            self.flushed.append(bytes(self.data))
            return BlockResult()
        if request.offset + request.length > self.size:
            return BlockResult(BlockStatus.OUT_OF_RANGE)
        first, last = request.offset // SECTOR, (request.offset + request.length) // SECTOR
        bad = next((sector for sector in range(first, last) if sector in self.bad), None)
        end = request.offset + request.length if bad is None else bad * SECTOR
        if request.op is BlockOp.READ:
            data = bytes(self.data[request.offset : end])
            return BlockResult(BlockStatus.OK if bad is None else self.bad_status, data)
        if bad is not None:
            return BlockResult(self.bad_status)
        assert len(request.data) == request.length
        if self.keeps_writes:
            self.data[request.offset : end] = request.data
        return BlockResult()


@dataclass
class FakeMemory:
    """Guest memory for DMA, from address 0."""

    data: bytearray = field(default_factory=lambda: bytearray(4 << 20))

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.data[address : address + length]).ljust(length, b"\xff")

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        end = min(address + len(data), len(self.data))
        if address < end:
            self.data[address:end] = data[: end - address]

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        if any(address + length > len(self.data) for address, length in parts):
            return 0
        with memoryview(self.data) as view:
            buffers = [view[address : address + length] for address, length in parts]
            return os.preadv(descriptor, buffers, offset)


class EnabledIde(PiixIde):
    """One whose ports are decoded after power-on, so that random accesses reach the drives."""

    def reset(self) -> None:
        super().reset()
        self.enable()


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes of which every sector is different."""
    sectors = (
        (number * 0x9E37_79B1 + seed & 0xFFFF_FFFF).to_bytes(4, "little") * 128 for number in range(-(-size // SECTOR))
    )
    return b"".join(sectors)[:size]


def make_ide(
    clock: ManualClock, irq: IrqLine, events: Events, memory: FakeMemory | None = None, keeps_writes: bool = False
) -> EnabledIde:
    """Two disks (2000 sectors, and 40 that are read-only), a CD (50 blocks), and an empty CD drive."""
    disk, small = RamPort(clock, pattern(2000 * SECTOR)), RamPort(clock, pattern(40 * SECTOR, 7), read_only=True)
    cd = RamPort(clock, pattern(50 * 2048, 3), read_only=True)
    disk.keeps_writes = keeps_writes
    line = WiredOr([irq])
    drives = (Disk(disk), Disk(small), CdRom(cd), CdRom(None))
    connection = PciConnection(dma=memory or FakeMemory())
    ide = EnabledIde(connection, drives, (line.source(), line.source()), clock, events)
    ide.enable()
    return ide


def make_floppy(clock: ManualClock, irq: IrqLine, events: Events) -> FloppyController:
    """A 1.44 MB floppy and an empty drive."""
    port = RamPort(clock, pattern(2880 * SECTOR))
    port.keeps_writes = False
    return FloppyController([port, None], irq, Dma8237(FakeMemory(), events), clock, events)


class Driver:
    """A guest's IDE driver, reduced: it checks what the protocol promises on the way."""

    def __init__(self, drives: tuple[Disk | CdRom | None, ...], clock: ManualClock | None = None) -> None:
        self.clock = clock or ManualClock()
        self.memory = FakeMemory()
        self.interrupts = [0, 0]
        self.levels = [False, False]
        self.events: list[tuple[str, str, int]] = []
        self.ide = PiixIde(
            PciConnection(dma=self.memory),
            drives,
            (self._line(0), self._line(1)),
            self.clock,
            lambda *event: self.events.append(event),
        )
        self.ide.enable()
        self.base = PRIMARY
        self.number = 0

    def _line(self, number: int) -> Callable[[bool], None]:
        def drive(level: bool) -> None:
            if level and not self.levels[number]:
                self.interrupts[number] += 1
            self.levels[number] = level

        return drive

    # ── registers ──

    def select(self, unit: int, bits: int = 0x40) -> None:
        self.number = unit >> 1
        self.base = 0x10 * self.number
        self.write(6, bits | (0x10 if unit & 1 else 0))

    def read(self, register: int) -> int:
        return self.ide.read(self.base + register, 1)

    def write(self, register: int, value: int) -> None:
        self.ide.write(self.base + register, 1, value)

    @property
    def status(self) -> int:
        return self.ide.read(self.base + 8, 1)

    @property
    def error(self) -> int:
        return self.read(1)

    def wait(self) -> int:
        """Let time pass until the drive is not busy; its status."""
        for _ in range(1000):
            if not self.status & BSY:
                return self.status
            self.pass_time()
        raise AssertionError("the drive stays busy")

    def pass_time(self) -> None:
        """Until the next thing happens."""
        deadline = self.ide.deadline()
        assert deadline is not None, "nothing will ever happen"
        self.clock.time_ns = max(self.clock.time_ns, deadline)
        self.ide.advance(self.clock.time_ns)

    def acknowledge(self) -> int:
        """Read status as an interrupt handler does; it must have been asserted, and is released."""
        assert self.levels[self.number]
        status = self.read(7)
        assert not self.levels[self.number]
        return status

    # ── commands ──

    def command(self, opcode: int, lba: int = 0, count: int = 0, features: int = 0, wide: bool = False) -> None:
        """Write the task file and the command."""
        if wide:
            for register, value in (
                (1, features >> 8),
                (2, count >> 8),
                (3, lba >> 24),
                (4, lba >> 32),
                (5, lba >> 40),
            ):
                self.write(register, value & 0xFF)
        else:
            unit = 0x10 if self.read(6) & 0x10 else 0
            self.write(6, 0x40 | unit | lba >> 24 & 0x0F)
        for register, value in ((1, features), (2, count), (3, lba), (4, lba >> 8), (5, lba >> 16)):
            self.write(register, value & 0xFF)
        self.write(7, opcode)

    def no_data(self, opcode: int, lba: int = 0, count: int = 0, features: int = 0) -> int:
        """A command without data; its status."""
        self.command(opcode, lba, count, features)
        self.wait()
        return self.acknowledge()

    def pio_in(self, size: int, block: int = SECTOR) -> bytes:
        """Data of a command, a DRQ block at a time, each with its interrupt."""
        data = bytearray()
        while len(data) < size:
            status = self.wait()
            assert status & DRQ, f"status {status:#x}, error {self.error:#x}"
            self.acknowledge()
            want = min(block, size - len(data))
            data += self.ide.read_block(self.base, 2, want // 2)
        assert not self.levels[self.number]
        return bytes(data)

    def pio_out(self, data: bytes, block: int = SECTOR) -> int:
        """Data for a command; the first block without an interrupt, one after each; the last status."""
        for start in range(0, len(data), block):
            status = self.wait()
            if start:
                self.acknowledge()
            assert status & DRQ, f"status {status:#x}, error {self.error:#x}"
            self.ide.write_block(self.base, 2, data[start : start + block])
        self.wait()
        return self.acknowledge()

    # ── bus master ──

    def bus_master(self, register: int) -> int:
        return self.ide.read(BUS_MASTER + 8 * self.number + register, 1)

    def table(self, entries: list[tuple[int, int]], at: int = 0x1000) -> None:
        """A PRD table of (address, bytes); the last has its end mark."""
        raw = b""
        for index, (address, size) in enumerate(entries):
            last = 0x8000_0000 if index == len(entries) - 1 else 0
            raw += address.to_bytes(4, "little") + (size & 0xFFFF | last).to_bytes(4, "little")
        self.memory.write(at, raw)
        self.ide.write(BUS_MASTER + 8 * self.number + 4, 4, at)

    def start(self, to_memory: bool) -> None:
        """Clear the bus master's status and start it."""
        base = BUS_MASTER + 8 * self.number
        self.ide.write(base, 1, 8 if to_memory else 0)
        self.ide.write(base + 2, 1, 6)
        self.ide.write(base, 1, 9 if to_memory else 1)

    def stop(self) -> int:
        """Stop the bus master; its status before."""
        status = self.bus_master(2)
        self.ide.write(BUS_MASTER + 8 * self.number, 1, 0)
        return status

    # ── packets ──

    def packet(self, packet: bytes, limit: int = 0xFFFE, dma: bool = False) -> None:
        """Send a packet command."""
        self.write(1, int(dma))
        self.write(4, limit & 0xFF)
        self.write(5, limit >> 8)
        self.write(7, 0xA0)
        assert self.wait() & DRQ
        assert self.read(2) & 3 == 1
        assert not self.levels[self.number]
        self.ide.write_block(self.base, 2, packet.ljust(12, b"\0"))

    def packet_in(self, packet: bytes, limit: int = 0xFFFE) -> bytes:
        """A packet command whose data comes by PIO."""
        self.packet(packet, limit)
        data = b""
        while True:
            status = self.wait()
            reason = self.read(2) & 3
            self.acknowledge()
            if not status & DRQ:
                assert reason == 3
                assert not status & ERR, f"sense {self.error >> 4}"
                return data
            assert reason == 2
            size = self.read(4) | self.read(5) << 8
            assert 0 < size <= limit
            data += self.ide.read_block(self.base, 2, (size + 1) // 2)[:size]

    def sense(self) -> tuple[int, int, int]:
        """(key, code, qualifier)."""
        data = self.packet_in(bytes((3, 0, 0, 0, 18)))
        return data[2] & 0x0F, data[12], data[13]

    def packet_fails(self, packet: bytes) -> tuple[int, int, int]:
        """A packet command that ends with CHECK CONDITION; the sense."""
        self.packet(packet)
        status = self.wait()
        assert status & ERR
        assert not status & DRQ
        key = self.error >> 4
        self.acknowledge()
        sense = self.sense()
        assert sense[0] == key
        return sense


class FailingImage:
    """An image whose I/O fails as told; otherwise memory."""

    def __init__(self, content: bytes, read_only: bool = False) -> None:
        self.data = bytearray(content)
        self.size = len(content)
        self.read_only = read_only
        self.errno = 0
        self.readable = self.size
        """Bytes from the start that can be read."""
        self.closed = False

    def read(self, offset: int, length: int) -> bytes:
        if self.errno:
            raise OSError(self.errno, "told to")
        if offset >= self.readable:
            raise OSError(errno.EIO, "told to")
        return bytes(self.data[offset : min(offset + length, self.readable)])

    def descriptor(self, offset: int, length: int) -> int | None:
        return None

    def write(self, offset: int, data: bytes) -> None:
        if self.errno:
            raise OSError(self.errno, "told to")
        self.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        if self.errno:
            raise OSError(self.errno, "told to")

    def close(self) -> None:
        self.closed = True
