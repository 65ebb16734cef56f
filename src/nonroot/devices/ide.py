"""The IDE function of the PIIX3: two channels at the legacy ports, a bus master at BAR 4.

Source: Intel 82371SB (290550), chapter 4.2. Disks and packet commands: :mod:`nonroot.devices.ata` and ``atapi``.
"""

from collections.abc import Sequence
from typing import Final

from nonroot.devices.atapi import EVENT_MEDIA_REMOVAL, EVENT_NEW_MEDIA, MEDIUM_CHANGED
from nonroot.devices.block import BlockPort
from nonroot.devices.ide_channel import Channel
from nonroot.devices.ide_record import BUS_MASTER_FIELDS, CHANNEL_FIELDS, UNIT_FIELDS, IdeState, Phase
from nonroot.devices.ide_unit import CdRom, Disk, Unit
from nonroot.devices.pci_device import UNCONNECTED, Bar, BarKind, PciConnection, PciDevice, PciIdentity
from nonroot.hvm.device import NO_EVENTS, Clock, Events, IrqLine, StateError, StateRecord, expect
from nonroot.hvm.pci import COMMAND, COMMAND_IO, COMMAND_MASTER

__all__ = ["BUS_MASTER", "CONTROL_BLOCK", "PRIMARY", "SECONDARY", "PiixIde"]

# Device offsets of the fixed ranges
PRIMARY: Final = 0x00
"""Ports 0x1F0..0x1F7."""
SECONDARY: Final = 0x10
"""Ports 0x170..0x177."""
CONTROL_BLOCK: Final = 0x08
"""Added to the channel's offset: port 0x3F6 or 0x376."""
BUS_MASTER: Final = 0x20
"""Sixteen ports of BAR 4."""

TIMING: Final = 0x40
TIMING_DECODE: Final = 0x8000
"""Bit of IDETIM: the channel's ports are decoded."""


class PiixIde(PciDevice):
    """Four units: 0 and 1 on the primary cable, 2 and 3 on the secondary one."""

    def __init__(
        self,
        connection: PciConnection = UNCONNECTED,
        drives: Sequence[Disk | CdRom | None] = (None, None, None, None),
        lines: tuple[IrqLine, IrqLine] | None = None,
        clock: Clock | None = None,
        events: Events = NO_EVENTS,
    ) -> None:
        """``lines``: ISA interrupts 14 and 15. ValueError unless there are four drives or places for them."""
        if len(drives) != 4 or lines is None or clock is None:
            raise ValueError("an IDE controller has four places for drives, two interrupt lines and a clock")
        self._events = events
        self.unplugged: dict[int, Disk] = {}
        """Disks that have been taken off their cables, by unit."""
        self.units = tuple(Unit(drive) for drive in drives)
        self._lines = lines
        self.channels = (
            Channel("ide", (self.units[0], self.units[1]), lines[0], self, clock, events),
            Channel("ide", (self.units[2], self.units[3]), lines[1], self, clock, events),
        )
        super().__init__(
            "ide",
            PciIdentity(0x8086, 0x7010, 0x01_01_80),
            [Bar(4, BarKind.IO, 16, BUS_MASTER)],
            connection,
            # EDK2 never sets the decode bits (its usual machine decodes always): they are set from the beginning.
            header={TIMING: (4, TIMING_DECODE << 16 | TIMING_DECODE)},
            writable=[(TIMING, 4, 0xF3FF_F3FF), (TIMING + 4, 1, 0xFF)],
        )

    def enable(self) -> None:
        """Decode the legacy ports and the bus master, as firmware leaves it; for boots without firmware."""
        self.data[TIMING : TIMING + 4] = (TIMING_DECODE << 16 | TIMING_DECODE).to_bytes(4, "little")
        self.config_write(COMMAND, 2, self.command | COMMAND_IO | COMMAND_MASTER)

    def reset(self) -> None:
        """Power-on: nothing is decoded, trays are closed, requests under way are forgotten."""
        for channel in self.channels:
            channel.power_on()
        super().reset()

    def _decoded(self, number: int) -> bool:
        return bool(self.data[COMMAND] & COMMAND_IO and self.data[TIMING + 2 * number + 1] & TIMING_DECODE >> 8)

    def deadline(self) -> int | None:
        """When an answer of a medium is due, in virtual time (ns)."""
        dues = [due for port in self._ports() if (due := port.deadline()) is not None]
        return min(dues, default=None)

    def advance(self, now_ns: int) -> None:
        """Answers that are due arrive."""
        for port in self._ports():
            port.advance(now_ns)

    def _ports(self) -> list[BlockPort]:
        return [unit.drive.port for unit in self.units if unit.drive is not None and unit.drive.port is not None]

    # ── accesses ──

    def read(self, offset: int, size: int) -> int:
        """A load from a command block, a control port or the bus master."""
        if size == 1 and offset & 0x0F:
            return self._read_byte(offset)
        if offset in (PRIMARY, SECONDARY):
            number = offset >> 4
            if self._decoded(number):
                return int.from_bytes(self.channels[number].read_data(size), "little")
        elif size == 1:
            return self._read_byte(offset)
        else:
            return sum(self._read_byte(offset + index) << 8 * index for index in range(size))
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store."""
        if size == 1 and offset & 0x0F:
            self._write_byte(offset, value)
            return
        if offset in (PRIMARY, SECONDARY):
            number = offset >> 4
            if self._decoded(number):
                self.channels[number].write_data(value.to_bytes(size, "little"))
            return
        for index in range(size):
            self._write_byte(offset + index, value >> 8 * index & 0xFF)

    def _read_byte(self, offset: int) -> int:
        if BUS_MASTER <= offset < BUS_MASTER + 16:
            return self.channels[offset >> 3 & 1].bus_master.read(offset & 7)
        number, register = offset >> 4, offset & 0x0F
        if number > 1 or not self._decoded(number):
            return 0xFF
        if register < 8:
            return self.channels[number].read_register(register)
        return self.channels[number].alternate_status() if register == CONTROL_BLOCK else 0xFF

    def _write_byte(self, offset: int, value: int) -> None:
        if BUS_MASTER <= offset < BUS_MASTER + 16:
            self.channels[offset >> 3 & 1].write_bus_master(offset & 7, value)
            return
        number, register = offset >> 4, offset & 0x0F
        if number > 1 or not self._decoded(number):
            return
        if register < 8:
            self.channels[number].write_register(register, value)
        elif register == CONTROL_BLOCK:
            self.channels[number].write_control(value)

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """REP INS: a whole sector or more in one call."""
        if offset in (PRIMARY, SECONDARY) and self._decoded(offset >> 4):
            return self.channels[offset >> 4].read_data(size * count)
        return b"".join(self.read(offset, size).to_bytes(size, "little") for _ in range(count))

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """REP OUTS."""
        if offset in (PRIMARY, SECONDARY) and self._decoded(offset >> 4):
            self.channels[offset >> 4].write_data(data)
            return
        for start in range(0, len(data), size):
            self.write(offset, size, int.from_bytes(data[start : start + size], "little"))

    # ── media, from outside ──

    def eject(self, index: int, force: bool = False) -> bool:
        """Open the tray of CD-ROM drive ``index`` and take the medium out.

        False, and nothing done, if the guest has locked it and ``force`` is not set. ValueError if it is no CD-ROM.
        """
        unit, drive = self._cd(index)
        if unit.locked and not force:
            return False
        unit.locked = 0
        unit.tray_open = 1
        unit.attention = 0
        unit.media_event = EVENT_MEDIA_REMOVAL
        drive.port = None
        return True

    def insert(self, index: int, port: BlockPort) -> None:
        """Put a medium into CD-ROM drive ``index`` and close the tray; one that is in there goes first."""
        unit, drive = self._cd(index)
        drive.port = port
        unit.tray_open = 0
        unit.attention = MEDIUM_CHANGED
        unit.media_event = EVENT_NEW_MEDIA

    def unplug(self, index: int) -> None:
        """Take the disk of unit ``index`` off its cable; nothing happens if there is none. Its medium is not asked for
        anything any more, but what it has been asked for may still be on its way.
        """
        unit = self.units[index]
        if isinstance(unit.drive, Disk):
            self.unplugged[index] = unit.drive
            unit.drive = None
            self.channels[index >> 1].unplug(index & 1)

    def plug(self, index: int) -> None:
        """Put the disk of unit ``index`` back, as after power-on."""
        drive = self.unplugged.pop(index, None)
        if drive is not None:
            self.units[index].drive = drive
            self.units[index].power_on()

    def _cd(self, index: int) -> tuple[Unit, CdRom]:
        unit = self.units[index] if 0 <= index < 4 else None
        if unit is None or not isinstance(unit.drive, CdRom):
            raise ValueError(f"IDE unit {index} is no CD-ROM drive")
        return unit, unit.drive

    # ── records ──

    def state(self) -> IdeState:
        """All registers, buffers and what is under way; media are not in it."""
        values: dict[str, tuple[int, ...]] = {}
        for name in UNIT_FIELDS:
            values[name] = tuple(getattr(unit, name) for unit in self.units)
        for name in CHANNEL_FIELDS:
            values[name] = tuple(int(getattr(channel, name)) for channel in self.channels)
        for name in BUS_MASTER_FIELDS:
            values[name] = tuple(getattr(channel.bus_master, name) for channel in self.channels)
        buffers = [bytes(channel.buffer) for channel in self.channels]
        return IdeState(config=bytes(self.data), buffer0=buffers[0], buffer1=buffers[1], **values)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply. A request that was on its way is made again."""
        record = expect(IdeState, state)
        self.check_config(record.config)
        for number, channel in enumerate(self.channels):
            self._check_drives(record, number, channel)
        self.load_config(record.config)
        for index, unit in enumerate(self.units):
            for name in UNIT_FIELDS:
                setattr(unit, name, getattr(record, name)[index])
        for number, channel in enumerate(self.channels):
            for name in CHANNEL_FIELDS:
                setattr(channel, name, getattr(record, name)[number])
            for name in BUS_MASTER_FIELDS:
                setattr(channel.bus_master, name, getattr(record, name)[number])
            channel.buffer[:] = (record.buffer0, record.buffer1)[number]
            channel.restored()

    def _check_drives(self, record: IdeState, number: int, channel: Channel) -> None:
        """StateError if the record's command under way is not one for the drive that is here."""
        if record.phase[number] == Phase.IDLE:
            return
        unit = channel.units[record.actor[number]]
        if not unit.present or not channel.acceptable(record.action[number], unit):
            raise StateError(f"ide state: action is no command of drive {number * 2 + record.actor[number]}")
