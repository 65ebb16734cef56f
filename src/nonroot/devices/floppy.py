"""The floppy controller: an 82078 in AT mode with two drives, at DMA channel 2.

Heads move and sectors pass at once; what takes time is the medium behind the drive. There are no transfers without DMA.
Source: Intel 82078 datasheet (290475); CMOS drive types: PC AT technical reference.
"""

from collections.abc import Sequence
from typing import Final, Protocol

from nonroot.devices.block import SECTOR, BlockOp, BlockPort, BlockRequest, BlockResult, BlockStatus
from nonroot.devices.floppy_state import FIELDS, GEOMETRIES, FloppyState, Geometry, Phase, geometry_of
from nonroot.hvm.device import NO_EVENTS, Clock, Events, IrqLine, StateError, StateRecord, expect

__all__ = ["CHANNEL", "DRIVE_TYPE_1440", "DRIVE_TYPE_2880", "FloppyController"]

CHANNEL: Final = 2
"""The DMA channel."""
DRIVE_TYPE_1440: Final = 4
DRIVE_TYPE_2880: Final = 5

# Registers, from port 0x3F0; 0x3F6 is the IDE controller's
DOR: Final = 2
TAPE: Final = 3
STATUS: Final = 4
DATA: Final = 5
DIRECTION: Final = 7

DOR_RUN: Final = 0x04
DOR_GATE: Final = 0x08

MSR_READY: Final = 0x80
MSR_TO_HOST: Final = 0x40
MSR_BUSY: Final = 0x10

ST0_ABNORMAL: Final = 0x40
ST0_INVALID: Final = 0x80
ST0_READY_CHANGED: Final = 0xC0
ST0_SEEK_END: Final = 0x20
ST1_END: Final = 0x80
ST1_OVERRUN: Final = 0x10
ST1_NO_DATA: Final = 0x04
ST1_WRITE_PROTECTED: Final = 0x02
ST1_NO_ADDRESS_MARK: Final = 0x01
ST1_DATA_ERROR: Final = 0x20
ST2_DATA_ERROR: Final = 0x20
ST2_WRONG_CYLINDER: Final = 0x10

LENGTHS: Final = {
    0x02: 9, 0x03: 3, 0x04: 2, 0x05: 9, 0x06: 9, 0x07: 2, 0x08: 1, 0x09: 9, 0x0A: 2, 0x0C: 9, 0x0D: 6, 0x0E: 1,
    0x0F: 3, 0x10: 1, 0x12: 2, 0x13: 4, 0x14: 1, 0x16: 9, 0x17: 2, 0x18: 1,
}  # fmt: skip
"""Bytes of each command by its low five bits; the others are invalid."""
VERSION_82078: Final = 0x90
PART_82078: Final = 0x41
SECTOR_CODE: Final = 2
"""N of 512-byte sectors."""
IMPLIED_SEEK: Final = 0x40


class DmaChannel(Protocol):
    """The 8237 as the floppy sees it."""

    def ready(self, channel: int, to_memory: bool) -> int:
        """Bytes that would be moved now."""

    def to_memory(self, channel: int, data: bytes) -> tuple[int, bool]:
        """Move; (bytes taken, terminal count)."""

    def from_memory(self, channel: int, length: int) -> tuple[bytes, bool]:
        """Move; (bytes, terminal count)."""


class FloppyController:
    """Attributes are the fields of :class:`FloppyState`."""

    name = "floppy"

    dor: int
    tape: int
    rate: int
    phase: Phase
    interrupt: int
    pending: tuple[int, ...]
    changed: tuple[int, ...]
    cylinders: tuple[int, ...]
    specify: tuple[int, ...]
    configure: tuple[int, ...]
    perpendicular: int
    lock: int
    command: bytes
    result: bytes
    transfer: bytes
    drive: int
    cylinder: int
    head: int
    sector: int
    count: int
    terminal: int
    issued: int
    buffer: bytes

    def __init__(
        self,
        media: Sequence[BlockPort | None],
        irq: IrqLine,
        dma: DmaChannel,
        clock: Clock,
        events: Events = NO_EVENTS,
    ) -> None:
        """``media``: one for each of at most two drives, None for an empty one. Drives take up to 2.88 MB."""
        if not 1 <= len(media) <= 2:
            raise ValueError("a floppy controller has one or two drives")
        self.media: list[BlockPort | None] = list(media)
        self._irq = irq
        self._dma = dma
        self._clock = clock
        self._events = events
        self._request_number = 0
        self._level = False
        self._load(FloppyState())

    def _load(self, state: FloppyState) -> None:
        for name in FIELDS:
            setattr(self, name, getattr(state, name))
        self.phase = Phase(self.phase)
        self._request_number += 1

    def reset(self) -> None:
        """Power-on: held in reset until DOR says otherwise."""
        self._load(FloppyState())
        self._drive_line()

    # ── media, from outside ──

    def insert(self, drive: int, port: BlockPort | None) -> None:
        """Put a floppy into a drive, or take it out (None). ValueError if there is no such drive."""
        if not 0 <= drive < len(self.media):
            raise ValueError(f"there is no floppy drive {drive}")
        self.media[drive] = port
        self._set("changed", drive, 1)

    def deadline(self) -> int | None:
        """When an answer of a medium is due, in virtual time (ns)."""
        dues = [due for port in self.media if port is not None and (due := port.deadline()) is not None]
        return min(dues, default=None)

    def advance(self, now_ns: int) -> None:
        """Answers that are due arrive."""
        for port in self.media:
            if port is not None:
                port.advance(now_ns)

    # ── registers ──

    def read(self, offset: int, size: int) -> int:
        """DOR, tape drive register, main status, data, digital input; the others float."""
        if offset == DOR:
            return self.dor
        if offset == TAPE:
            return self.tape
        if offset == STATUS:
            return self._main_status()
        if offset == DATA:
            return self._read_result()
        if offset == DIRECTION:
            selected = self.dor & 3
            motor = self.dor >> (4 + selected) & 1
            return 0x80 if motor and selected < len(self.media) and self.changed[selected] else 0
        self._events(self.name, "unknown-register", offset)
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """DOR, tape drive register, data rate (0x3F4 and 0x3F7), data."""
        if offset == DOR:
            self._write_dor(value)
        elif offset == TAPE:
            self.tape = value & 3
        elif offset == STATUS:
            self.rate = value & 3
            if value & 0x80:
                self._soft_reset()
                self._reset_done()
        elif offset == DATA:
            self._write_command(value)
        elif offset == DIRECTION:
            self.rate = value & 3
        else:
            self._events(self.name, "unknown-register", offset)

    def _main_status(self) -> int:
        if not self.dor & DOR_RUN or self.phase is Phase.WORK:
            return MSR_BUSY if self.phase is Phase.WORK else 0
        if self.phase is Phase.RESULT:
            return MSR_READY | MSR_TO_HOST | MSR_BUSY
        return MSR_READY | (MSR_BUSY if self.command else 0)

    def _write_dor(self, value: int) -> None:
        before, self.dor = self.dor, value
        if before & DOR_RUN and not value & DOR_RUN:
            self._soft_reset()
        elif value & DOR_RUN and not before & DOR_RUN:
            self._reset_done()
        self._drive_line()

    def _soft_reset(self) -> None:
        self._request_number += 1
        self.phase, self.command, self.result, self.buffer = Phase.COMMAND, b"", b"", b""
        self.interrupt = 0
        self.pending = (0, 0, 0, 0)
        self.cylinders = (0, 0, 0, 0)
        if not self.lock:
            self.configure = FloppyState().configure
        self._drive_line()

    def _reset_done(self) -> None:
        """Polling finds that all four drives have changed their state: four interrupts to sense."""
        self.pending = tuple(ST0_READY_CHANGED | drive for drive in range(4))
        self._raise()

    def _raise(self) -> None:
        self.interrupt = 1
        self._drive_line()

    def _drive_line(self) -> None:
        level = bool(self.interrupt) and bool(self.dor & DOR_GATE)
        if level != self._level:
            self._level = level
            self._irq(level)

    def _set(self, name: str, index: int, value: int) -> None:
        values = list(getattr(self, name))
        values[index] = value
        setattr(self, name, tuple(values))

    # ── commands ──

    def _read_result(self) -> int:
        if self.phase is not Phase.RESULT:
            self._events(self.name, "no-result", 0)
            return 0xFF
        value, self.result = self.result[0], self.result[1:]
        self.interrupt = 0
        self._drive_line()
        if not self.result:
            self.phase = Phase.COMMAND
        return value

    def _write_command(self, value: int) -> None:
        if self.phase is not Phase.COMMAND or not self.dor & DOR_RUN:
            self._events(self.name, "command-not-wanted", value)
            return
        self.command += bytes((value,))
        code = self.command[0] & 0x1F
        if len(self.command) >= LENGTHS.get(code, 1):
            self._execute(code)

    def _execute(self, code: int) -> None:
        command, self.command = self.command, b""
        if len(command) > 1:
            self.drive, self.head = command[1] & 3, command[1] >> 2 & 1
        if code in (0x02, 0x05, 0x06, 0x09, 0x0C, 0x16):
            self._begin_transfer(command)
        elif code == 0x0D:
            self._begin_format(command)
        elif code == 0x03:
            self.specify = (command[1], command[2])
        elif code == 0x04:
            self._reply(self._drive_status())
        elif code == 0x07:
            self._seek(0)
        elif code == 0x08:
            self._sense_interrupt()
        elif code == 0x0A:
            self._read_id()
        elif code == 0x0E:
            track = (*self.cylinders, *self.specify, self._geometry().sectors)
            self._reply(*track, self.lock << 7 | self.perpendicular, self.configure[0], self.configure[1])
        elif code == 0x0F:
            target = command[2]
            if command[0] & 0x80:  # relative
                step = target if command[0] & 0x40 else -target
                target = max(0, min(255, self.cylinders[self.drive] + step))
            self._seek(target)
        elif code == 0x10:
            self._reply(VERSION_82078)
        elif code == 0x12:
            self.perpendicular = command[1] & 0x7F
        elif code == 0x13:
            self.configure = (command[2], command[3])
        elif code == 0x14:
            self.lock = command[0] >> 7
            self._reply(self.lock << 4)
        elif code == 0x17:
            self._reply(command[1] & 0x07)
        elif code == 0x18:
            self._reply(PART_82078)
        else:
            self._events(self.name, "unknown-command", command[0])
            self._reply(ST0_INVALID)

    def _reply(self, *values: int) -> None:
        self.result = bytes(value & 0xFF for value in values)
        self.phase = Phase.RESULT

    def _medium(self) -> BlockPort | None:
        return self.media[self.drive] if self.drive < len(self.media) else None

    def _geometry(self) -> Geometry:
        medium = self._medium()
        return GEOMETRIES[0] if medium is None else geometry_of(medium.size)

    def _drive_status(self) -> int:
        medium = self._medium()
        protected = 0x40 if medium is not None and medium.read_only else 0
        track_0 = 0x10 if self.cylinders[self.drive] == 0 and self.drive < len(self.media) else 0
        return protected | 0x28 | track_0 | self.head << 2 | self.drive

    def _seek(self, target: int) -> None:
        status = ST0_SEEK_END | self.head << 2 | self.drive
        if self.drive < len(self.media):
            self._set("cylinders", self.drive, target)
            if self.media[self.drive] is not None:
                self._set("changed", self.drive, 0)
        else:
            status |= ST0_ABNORMAL | 0x10  # no drive: track 0 was never seen
        self._set("pending", self.drive, status)
        self._raise()

    def _sense_interrupt(self) -> None:
        for drive, status in enumerate(self.pending):
            if status:
                self._set("pending", drive, 0)
                self.interrupt = 0
                self._drive_line()
                self._reply(status, self.cylinders[drive])
                return
        self._reply(ST0_INVALID)

    # ── transfers ──

    def _read_id(self) -> None:
        self.cylinder, self.sector = self.cylinders[self.drive], 1
        problem = self._unreadable()
        self._end(*problem) if problem else self._end(0, 0, 0)

    def _unreadable(self) -> tuple[int, int, int] | None:
        """ST0, ST1 and ST2 if no sector can be found on the medium, or not at this data rate."""
        medium, geometry = self._medium(), self._geometry()
        if medium is None or self.rate != geometry.rate or self.head >= geometry.heads:
            return ST0_ABNORMAL, ST1_NO_ADDRESS_MARK, 0
        if self.cylinders[self.drive] >= geometry.cylinders:
            return ST0_ABNORMAL, ST1_NO_ADDRESS_MARK | ST1_NO_DATA, 0
        return None

    def _begin_transfer(self, command: bytes) -> None:
        code = command[0] & 0x1F
        self.transfer = command
        self.cylinder, self.head, self.sector = command[2], command[3] & 1, command[4]
        self.terminal = 0
        if code == 0x02:
            self.sector = 1
        if self.configure[0] & IMPLIED_SEEK and self.drive < len(self.media):
            self._set("cylinders", self.drive, self.cylinder)
        medium = self._medium()
        problem = self._unreadable()
        if problem:
            self._end(*problem)
        elif command[3] != command[1] >> 2 & 1 or command[5] != SECTOR_CODE or self.specify[1] & 1:
            self._end(ST0_ABNORMAL, ST1_NO_DATA, 0)
        elif self.cylinder != self.cylinders[self.drive]:
            self._end(ST0_ABNORMAL, ST1_NO_DATA, ST2_WRONG_CYLINDER)
        elif code in (0x05, 0x09) and (medium is None or medium.read_only):
            self._end(ST0_ABNORMAL, ST1_WRITE_PROTECTED, 0)
        else:
            self._next_run()

    def _next_run(self) -> None:
        """The sectors from here to the end of the track, as far as the DMA channel goes."""
        geometry, code = self._geometry(), self.transfer[0] & 0x1F
        last = min(self.transfer[6], geometry.sectors)
        if not 1 <= self.sector <= last:
            self._end(ST0_ABNORMAL, ST1_NO_DATA, 0)
            return
        writing = code in (0x05, 0x09)
        wanted = self._dma.ready(CHANNEL, not writing) if code != 0x16 else SECTOR * 255
        if not wanted:
            self._end(ST0_ABNORMAL, ST1_OVERRUN, 0)
            return
        self.count = min(last - self.sector + 1, -(-wanted // SECTOR))
        if writing:
            data, over = self._dma.from_memory(CHANNEL, self.count * SECTOR)
            self.terminal = int(over)
            self.buffer = data.ljust(self.count * SECTOR, b"\0")
        self._submit()

    def _submit(self) -> None:
        self.phase = Phase.WORK
        self.issued = self._clock.now_ns()
        self._request()

    def _request(self) -> None:
        geometry, medium = self._geometry(), self._medium()
        first = (self.cylinder * geometry.heads + self.head) * geometry.sectors + self.sector - 1
        offset, length = first * SECTOR, self.count * SECTOR
        self._request_number += 1
        number = self._request_number
        if medium is None:
            self._done(number, BlockResult(BlockStatus.IO_ERROR))
        elif self.buffer:
            # An image may be shorter than its format: what lies behind it is not there.
            data = self.buffer[: max(0, medium.size - offset)]
            request = BlockRequest(BlockOp.WRITE, offset, len(data), data, self.issued)
            medium.submit(request, lambda result: self._done(number, result))
        else:
            length = max(0, min(length, medium.size - offset))
            request = BlockRequest(BlockOp.READ, offset, length, issued_ns=self.issued)
            medium.submit(request, lambda result: self._done(number, result))

    def _done(self, number: int, result: BlockResult) -> None:
        if number != self._request_number or self.phase is not Phase.WORK:
            return
        if result.status is not BlockStatus.OK:
            self._events(self.name, "host-error", result.status)
            self.buffer = b""
            if result.status is BlockStatus.READ_ONLY:
                self._end(ST0_ABNORMAL, ST1_WRITE_PROTECTED, 0)
            else:
                self._end(ST0_ABNORMAL, ST1_DATA_ERROR, ST2_DATA_ERROR)
            return
        code = self.transfer[0] & 0x1F
        if self.buffer:
            self.buffer = b""
        elif code == 0x16:
            self.terminal = 0
        else:
            taken, over = self._dma.to_memory(CHANNEL, result.data.ljust(self.count * SECTOR, b"\0"))
            self.terminal = int(over)
            if not over and taken < self.count * SECTOR:
                self._end(ST0_ABNORMAL, ST1_OVERRUN, 0)
                return
        if code == 0x0D:
            self._end(0, 0, 0)
            return
        self.sector += self.count
        at_end = self.sector > self.transfer[6]
        if at_end:
            self.sector = 1
            both_sides = bool(self.transfer[0] & 0x80)
            if both_sides and self.head == 0:
                self.head = 1
                if not self.terminal:
                    self._next_run()
                    return
            else:
                self.cylinder = (self.cylinder + 1) & 0xFF
                self.head = 0 if both_sides else self.head
        if self.terminal or code == 0x16:
            self._end(0, 0, 0)
        elif at_end:
            self._end(ST0_ABNORMAL, ST1_END, 0)
        else:
            self._next_run()

    def _begin_format(self, command: bytes) -> None:
        """FORMAT TRACK: the sectors' identities come by DMA; those that fit the geometry are filled."""
        self.transfer = command
        self.cylinder, self.sector, self.terminal = self.cylinders[self.drive], 1, 0
        geometry, medium = self._geometry(), self._medium()
        problem = self._unreadable()
        if problem:
            self._end(*problem)
        elif medium is None or medium.read_only:
            self._end(ST0_ABNORMAL, ST1_WRITE_PROTECTED, 0)
        elif command[2] != SECTOR_CODE or command[3] != geometry.sectors:
            self._end(ST0_ABNORMAL, ST1_NO_DATA, 0)
        else:
            self._dma.from_memory(CHANNEL, 4 * command[3])
            self.count = geometry.sectors
            self.buffer = bytes((command[5],)) * (self.count * SECTOR)
            self._submit()

    def _end(self, st0: int, st1: int, st2: int) -> None:
        """The result phase of a transfer, with its interrupt."""
        self.buffer = b""
        head = self.head << 2
        self._reply(st0 | head | self.drive, st1, st2, self.cylinder, self.head, self.sector, SECTOR_CODE)
        self._raise()

    # ── records ──

    def state(self) -> FloppyState:
        """Everything but the media."""
        values = {name: getattr(self, name) for name in FIELDS}
        return FloppyState(**{**values, "phase": int(self.phase)})

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply. A request that was on its way is made again."""
        record = expect(FloppyState, state)
        if record.phase == Phase.WORK and record.drive >= len(self.media):
            raise StateError("floppy state: drive is one that is not here")
        self._load(record)
        self._drive_line()
        if self.phase is Phase.WORK:
            self._request()
