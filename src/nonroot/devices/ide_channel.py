"""One IDE channel: the task file of two units on a cable, their transfers, and the interrupt.

A channel does one command at a time. What moves is described by numbers (action, address, sectors left, buffer), so
that a request which is on its way can be asked for again from a record.
Source: T13/1410D (ATA/ATAPI-6); Intel 82371SB (290550).
"""

from typing import Final

from nonroot.devices import ata, atapi
from nonroot.devices.block import BlockOp, BlockRequest, BlockResult, BlockStatus
from nonroot.devices.ide_bus_master import BusMaster, BusMemory
from nonroot.devices.ide_record import (
    CHANNEL_FIELDS,
    CHUNK,
    DMA_ACTIONS,
    FROM_CD,
    PACKET_LENGTH,
    WRITES,
    Action,
    Phase,
)
from nonroot.devices.ide_unit import BSY, DEVICE_1, DEVICE_OBSOLETE, DRDY, DRQ, DSC, ERR, READY, UNC, Unit
from nonroot.hvm.device import Clock, Events, IrqLine

__all__ = ["Channel"]

# Registers of the command block
DATA: Final = 0
ERROR: Final = 1
COUNT: Final = 2
LBA_LOW: Final = 3
LBA_MID: Final = 4
LBA_HIGH: Final = 5
DEVICE: Final = 6
COMMAND: Final = 7

# Device control register
NIEN: Final = 0x02
SRST: Final = 0x04
HOB: Final = 0x80

EMPTY: Final = 0x7F
"""What a cable without drives shows: DD7 is pulled down, so that nobody takes it for busy."""

# Interrupt reason of packet commands, in the count register
REASON_COMMAND: Final = 0x01
REASON_IN: Final = 0x02

DMA_REQUEST: Final = 1 << 20
"""Bytes of the largest request whose data goes to memory by DMA."""
NO_MEDIUM: Final = BlockResult(BlockStatus.IO_ERROR)


class Channel:
    """Attributes are the fields of :class:`nonroot.devices.ide_record.IdeState` for one channel, and its units."""

    control: int
    selected: int
    interrupt: int
    phase: Phase
    action: Action
    actor: int
    flushing: int
    flush_after: int
    lba: int
    left: int
    block: int
    position: int
    issued: int

    def __init__(
        self, name: str, units: tuple[Unit, Unit], irq: IrqLine, memory: BusMemory, clock: Clock, events: Events
    ) -> None:
        self.name = name
        self.units = units
        self.buffer = bytearray()
        self._irq = irq
        self.bus_master = BusMaster(name, memory, events)
        self._clock = clock
        self._events = events
        self._level = False
        self._request_number = 0
        self._clear()

    def _clear(self) -> None:
        for name in CHANNEL_FIELDS:
            setattr(self, name, 0)
        self.bus_master.clear()
        self.phase, self.action = Phase.IDLE, Action.NONE
        self.block = 512
        self.buffer.clear()
        self._request_number += 1

    def power_on(self) -> None:
        """Everything as after power-on."""
        self._clear()
        for unit in self.units:
            unit.power_on()
        self.drive_line()

    @property
    def unit(self) -> Unit:
        """The selected unit."""
        return self.units[self.selected]

    @property
    def present(self) -> bool:
        """Whether there is any drive."""
        return self.units[0].present or self.units[1].present

    @property
    def acting(self) -> Unit:
        """The unit whose command is under way."""
        return self.units[self.actor]

    # ── the interrupt ──

    def raise_interrupt(self) -> None:
        """The unit asks for attention."""
        self.interrupt = 1
        if not self.control & NIEN:
            self.bus_master.interrupted()
        self.drive_line()

    def clear_interrupt(self) -> None:
        """The guest has seen it."""
        self.interrupt = 0
        self.drive_line()

    def drive_line(self) -> None:
        """Put the line's level where the registers say."""
        level = bool(self.interrupt) and not self.control & NIEN
        if level != self._level:
            self._level = level
            self._irq(level)

    # ── the command block ──

    def read_register(self, register: int) -> int:
        """A byte; reading status (7) acknowledges the interrupt."""
        unit = self.unit
        if not unit.present:
            return 0 if self.present else EMPTY
        if register == COMMAND:
            if self.interrupt:
                self.clear_interrupt()
            return unit.status
        if register == DEVICE:
            return unit.device | DEVICE_OBSOLETE
        if register == ERROR:
            return unit.error
        if register == DATA:
            return self.read_data(1)[0]
        value = (unit.count, unit.lba_low, unit.lba_mid, unit.lba_high)[register - COUNT]
        return value >> 8 if self.control & HOB else value & 0xFF

    def alternate_status(self) -> int:
        """Status without acknowledging."""
        if not self.unit.present:
            return 0 if self.present else EMPTY
        return self.unit.status

    def write_register(self, register: int, value: int) -> None:
        """A byte. While a request is on its way only DEVICE RESET is heard."""
        if register == DATA:
            self.write_data(bytes((value,)))
            return
        if register == COMMAND:
            self._command(value)
            return
        if self.phase is Phase.WORK:
            self._events(self.name, "write-while-busy", register)
            return
        self.control &= ~HOB
        for unit in self.units:
            if register == ERROR:
                unit.features = (unit.features << 8 | value) & 0xFFFF
            elif register == COUNT:
                unit.count = (unit.count << 8 | value) & 0xFFFF
            elif register == LBA_LOW:
                unit.lba_low = (unit.lba_low << 8 | value) & 0xFFFF
            elif register == LBA_MID:
                unit.lba_mid = (unit.lba_mid << 8 | value) & 0xFFFF
            elif register == LBA_HIGH:
                unit.lba_high = (unit.lba_high << 8 | value) & 0xFFFF
            else:
                unit.device = value & 0x5F
        if register == DEVICE:
            self.selected = 1 if value & DEVICE_1 else 0

    def write_control(self, value: int) -> None:
        """The device control register: interrupt enable, software reset, high-order bytes."""
        value &= NIEN | SRST | HOB
        before, self.control = self.control, value
        if value & SRST and not before & SRST:
            self._stop()
            self.interrupt = 0
            for unit in self.units:
                if unit.present:
                    unit.status = BSY
        elif before & SRST and not value & SRST:
            self.selected = 0
            for unit in self.units:
                unit.reset()
                unit.device = 0
        self.drive_line()

    def _command(self, value: int) -> None:
        if value == ata.EXECUTE_DIAGNOSTIC and self.present and self.phase is not Phase.WORK:
            self._stop()
            self.selected = 0
            for unit in self.units:
                unit.signature()
                unit.device = 0
            self.raise_interrupt()
            return
        unit = self.unit
        if not unit.present or self.control & SRST:
            self._events(self.name, "command-to-nobody", value)
            return
        if value == atapi.DEVICE_RESET and unit.is_cd:
            self._stop()
            unit.signature()
            return
        if self.phase is Phase.WORK:
            self._events(self.name, "command-while-busy", value)
            return
        self._stop()
        self.clear_interrupt()
        self.actor = self.selected
        unit.error = 0
        unit.status = READY
        (atapi.command if unit.is_cd else ata.command)(self, unit, value)

    def _stop(self) -> None:
        """Forget the command under way; a request that is on its way ends unseen."""
        self._request_number += 1
        self.phase, self.action = Phase.IDLE, Action.NONE
        self.flushing = self.flush_after = self.left = self.position = 0
        self.buffer.clear()

    def unplug(self, number: int) -> None:
        """Unit ``number`` leaves the cable; its command under way is forgotten."""
        if self.actor == number and self.phase is not Phase.IDLE:
            self._stop()
        if self.selected == number and self.interrupt:
            self.clear_interrupt()
        self.units[number].power_on()

    # ── ends of commands ──

    def complete(self, status: int = READY) -> None:
        """The command has ended well."""
        unit = self.acting
        self._stop()
        unit.status = status
        self.raise_interrupt()

    def fail(self, error: int, status: int = READY) -> None:
        """The command has ended with an error."""
        unit = self.acting
        self._stop()
        unit.error = error
        unit.status = status | ERR
        self.raise_interrupt()

    # ── beginnings ──

    def begin_read(self, action: Action, lba: int, count: int, block: int) -> None:
        """Read ``count`` sectors; by PIO ``block`` bytes to a DRQ."""
        self._begin(action, lba, count, block)
        if action in DMA_ACTIONS:
            self._await_dma()
        else:
            self._submit()

    def begin_write(self, action: Action, lba: int, count: int, block: int, flush_after: bool) -> None:
        """Take ``count`` sectors from the guest."""
        self._begin(action, lba, count, block)
        self.flush_after = int(flush_after)
        if action in DMA_ACTIONS:
            self._await_dma()
        else:
            self._ask_for_data()

    def begin_flush(self) -> None:
        """Have all writes on stable storage."""
        self._begin(Action.FLUSH, 0, 0, 512)
        self.flushing = 1
        self._submit()

    def begin_reply(self, action: Action, data: bytes, block: int) -> None:
        """Give the guest data of the device's own."""
        self._begin(action, 0, 0, block)
        self.buffer[:] = data
        if action in DMA_ACTIONS:
            self._await_dma()
        else:
            self._present()

    def begin_packet(self) -> None:
        """Take the twelve bytes of a packet command; their DRQ is no interrupt."""
        self._begin(Action.PACKET, 0, 0, PACKET_LENGTH)
        self.phase = Phase.DATA_OUT
        self.acting.count = REASON_COMMAND
        self.acting.status = READY | DRQ

    def _begin(self, action: Action, lba: int, count: int, block: int) -> None:
        self.action, self.lba, self.left, self.block = action, lba, count, max(1, min(block, 1 << 16))
        self.position = self.flushing = self.flush_after = 0
        self.buffer.clear()

    # ── requests ──

    def _submit(self) -> None:
        """Ask the medium for the next part."""
        self.phase = Phase.WORK
        self.acting.status = BSY | DRDY | DSC
        self.issued = self._clock.now_ns()
        self.request()

    def request(self) -> None:
        """Make the request that the numbers describe."""
        unit = self.acting
        self._request_number += 1
        number = self._request_number
        size = unit.sector
        if self.flushing:
            request = BlockRequest(BlockOp.FLUSH, issued_ns=self.issued)
        elif self.action in WRITES:
            request = BlockRequest(BlockOp.WRITE, self.lba * size, len(self.buffer), bytes(self.buffer), self.issued)
        else:
            # What goes to memory by DMA does not stay in the buffer.
            most = DMA_REQUEST if self.action in DMA_ACTIONS else CHUNK
            length = min(self.left, most // size) * size
            place = self.bus_master.look_ahead(length) if self._places() else None
            request = BlockRequest(BlockOp.READ, self.lba * size, length, issued_ns=self.issued, place=place)
        port = unit.port
        if port is None:
            self._done(number, NO_MEDIUM)
        else:
            port.submit(request, lambda result: self._done(number, result))

    def _places(self) -> bool:
        """Whether what is read may go to memory without passing through here."""
        return self.action in DMA_ACTIONS and self._may_move()

    def _done(self, number: int, result: BlockResult) -> None:
        """A request has ended; one that was given up is none of ours."""
        if number != self._request_number or self.phase is not Phase.WORK:
            return
        size = self.acting.sector
        if result.placed:
            self._placed(result.placed // size)
            return
        self.bus_master.forget_walk()
        good = len(result.data) // size
        if result.status is not BlockStatus.OK and (good == 0 or self.flushing or self.action in WRITES):
            self._events(self.name, "host-error", result.status)
            self._fail_request(result.status)
        elif self.flushing:
            self._finish()
        elif self.action in WRITES:
            self._written()
        else:
            self._have_read(result, min(max(good, 1), self.left))

    def _written(self) -> None:
        moved = len(self.buffer) // self.acting.sector
        self.lba += moved
        self.left -= moved
        self.buffer.clear()
        if self.left == 0 and self.flush_after:
            self.flushing = 1
            self._submit()
        elif self.left == 0:
            self._finish()
        elif self.action is Action.WRITE_DMA:
            self._await_dma()
        else:
            self._ask_for_data()
            self.raise_interrupt()

    def _placed(self, sectors: int) -> None:
        """What has been read is where the table said when it was asked for."""
        if not self.bus_master.use_walk():
            # The guest has stopped or restarted the bus master meanwhile: it is read again, for its new table.
            self._submit()
            return
        self.lba += sectors
        self.left -= sectors
        self._delivered()

    def _have_read(self, result: BlockResult, sectors: int) -> None:
        self.lba += sectors
        self.left -= sectors
        if self.action is Action.VERIFY:
            if self.left:
                self._submit()
            else:
                self._finish()
            return
        size = sectors * self.acting.sector
        # The last sector of a medium may be cut short: the rest of it reads as zeros.
        data = result.data if len(result.data) == size else result.data[:size].ljust(size, b"\0")
        self.position = 0
        if self.action in DMA_ACTIONS:
            self._deliver(data)
        else:
            self.buffer[:] = data
            self._present()

    def _fail_request(self, status: BlockStatus) -> None:
        if self.action in FROM_CD:
            atapi.fail_read(self, self.acting, status)
            return
        if not self.flushing:
            self.acting.show_address(self.lba, ata.is_wide(self.acting))
        if self.action in WRITES or self.flushing:
            ata.fail_write(self, status)
        else:
            self.fail(UNC)

    def _finish(self) -> None:
        """The command is done."""
        unit = self.acting
        if self.action in DMA_ACTIONS:
            self.bus_master.settle()
        if self.action in FROM_CD:
            atapi.packet_done(self, unit)
            return
        if self.action is not Action.FLUSH and self.lba:
            unit.count = 0
            unit.show_address(self.lba - 1, ata.is_wide(unit))
        self.complete()

    # ── PIO ──

    def _present(self) -> None:
        """A block of the buffer is ready for the guest."""
        unit = self.acting
        self.phase = Phase.DATA_IN
        unit.status = READY | DRQ
        if self.action in FROM_CD:
            size = min(self.block - self.position % self.block, len(self.buffer) - self.position)
            unit.count = REASON_IN
            unit.lba_mid, unit.lba_high = size & 0xFF, size >> 8 & 0xFF
        self.raise_interrupt()

    def _ask_for_data(self) -> None:
        self.phase = Phase.DATA_OUT
        self.acting.status = READY | DRQ

    def read_data(self, length: int) -> bytes:
        """``length`` bytes from the data register; what is not there reads as ones."""
        data = b""
        while len(data) < length:
            if self.phase is not Phase.DATA_IN or self.unit is not self.acting:
                if length - len(data) > 1:  # more than the other half of a word
                    self._events(self.name, "no-data", length - len(data))
                return data.ljust(length, b"\xff")
            end = min(self.position - self.position % self.block + self.block, len(self.buffer))
            taken = min(end, self.position + length - len(data))
            data += self.buffer[self.position : taken]
            self.position = taken
            if taken == end:
                self._block_read()
        return data

    def _block_read(self) -> None:
        unit = self.acting
        if self.position < len(self.buffer):
            self._present()
        elif self.left:
            self._submit()
        elif self.action in FROM_CD:
            self._finish()
        else:
            # The last block of a PIO read makes no interrupt of its own.
            if self.action is Action.READ:
                unit.count = 0
                unit.show_address(self.lba - 1, ata.is_wide(unit))
            self._stop()
            unit.status = READY

    def write_data(self, data: bytes) -> None:
        """Bytes into the data register."""
        view = memoryview(data)
        while view:
            if self.phase is not Phase.DATA_OUT or self.unit is not self.acting:
                self._events(self.name, "data-not-wanted", len(view))
                return
            wanted = self._wanted()
            end = min(len(self.buffer) - len(self.buffer) % self.block + self.block, wanted)
            taken = view[: end - len(self.buffer)]
            self.buffer += taken
            view = view[len(taken) :]
            if len(self.buffer) >= wanted:
                self._filled()
            elif len(self.buffer) == end:
                self.raise_interrupt()

    def _wanted(self) -> int:
        """Bytes that the buffer must hold before something is done with them."""
        if self.action is Action.PACKET:
            return PACKET_LENGTH
        return min(self.left * 512, CHUNK)

    def _filled(self) -> None:
        if self.action is Action.PACKET:
            packet = bytes(self.buffer)
            self._stop()
            atapi.execute(self, self.acting, packet)
        else:
            self._submit()

    # ── the bus master ──

    def write_bus_master(self, register: int, value: int) -> None:
        """A byte of the bus master's registers; what waits for it moves."""
        if self.bus_master.write(register, value) and self.phase is Phase.DMA:
            self._move()

    def _await_dma(self) -> None:
        self.phase = Phase.DMA
        self.acting.status = READY | DRQ
        if self.bus_master.active:
            self._move()

    def _move(self) -> None:
        """The bus master runs and the unit has something to move."""
        if not self._may_move():
            self._events(self.name, "bus-master-off", self.bus_master.bm_command)
        elif self.action is Action.WRITE_DMA:
            data = self.bus_master.gather(min(self.left * 512, CHUNK))
            if data is not None:
                self.buffer[:] = data
                self._submit()
        elif not self.buffer:
            self._submit()
        elif self._scatter(bytes(self.buffer)):
            self._delivered()

    def _deliver(self, data: bytes) -> None:
        """What has been read goes to memory; what the bus master does not take waits in the buffer."""
        self.phase = Phase.DMA
        self.acting.status = READY | DRQ
        if self._may_move() and self._scatter(data):
            self._delivered()
            return
        # The buffer holds a part; whole sectors beyond it will be read again.
        size = self.acting.sector
        again = max(0, -(-(len(data) - self.position - CHUNK) // size))
        self.buffer[:] = data[self.position : len(data) - again * size]
        self.position = 0
        self.lba -= again
        self.left += again

    def _delivered(self) -> None:
        self.buffer.clear()
        self.position = 0
        if self.left:
            self._submit()
        else:
            self._finish()

    def _may_move(self) -> bool:
        """Whether the bus master runs in the direction that the command needs."""
        return self.bus_master.runs(to_memory=self.action is not Action.WRITE_DMA)

    def _scatter(self, data: bytes) -> bool:
        """``data``, from ``position`` on, to where the table says; false if the table ends before."""
        self.position = self.bus_master.scatter(data, self.position)
        return self.position == len(data)

    # ── records ──

    @staticmethod
    def acceptable(action: int, unit: Unit) -> bool:
        """Whether a record's action is one that this kind of drive has."""
        return action == Action.REPLY or (action in FROM_CD) == unit.is_cd

    def restored(self) -> None:
        """After a record was applied: the line follows, and a request that was on its way is made again."""
        self._request_number += 1
        self.phase, self.action = Phase(self.phase), Action(self.action)
        self.bus_master.forget_walk()
        self.drive_line()
        if self.phase is Phase.WORK:
            self.request()
