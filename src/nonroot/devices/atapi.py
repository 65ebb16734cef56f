"""The commands of a CD-ROM drive: ATA's own few, and packet commands.

Source: T13/1410D (ATA/ATAPI-6); SFF-8020i; MMC-3 (T10/1363-D).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nonroot.devices import ata
from nonroot.devices.ata_identify import identify_cd
from nonroot.devices.atapi_replies import (
    configuration,
    disc_information,
    event_status,
    inquiry,
    mechanism_status,
    mode_pages,
    physical_format,
    toc,
    track_information,
)
from nonroot.devices.block import SECTOR, BlockStatus
from nonroot.devices.ide_record import Action
from nonroot.devices.ide_unit import ABRT, CD_SECTOR, DRDY, READY, Unit

if TYPE_CHECKING:
    from nonroot.devices.ide_channel import Channel

__all__ = ["DEVICE_RESET", "command", "execute", "fail_read", "packet_done"]

DEVICE_RESET: Final = 0x08
PACKET: Final = 0xA0
FEATURE_DMA: Final = 0x01
REASON_DONE: Final = 0x03

# Sense: key << 16 | code << 8 | qualifier
NOTHING: Final = 0
NO_MEDIUM_CLOSED: Final = 0x2_3A_01
NO_MEDIUM_OPEN: Final = 0x2_3A_02
UNREADABLE: Final = 0x3_11_00
BAD_OPCODE: Final = 0x5_20_00
BAD_ADDRESS: Final = 0x5_21_00
BAD_FIELD: Final = 0x5_24_00
LOCKED: Final = 0x5_53_02
MEDIUM_CHANGED: Final = 0x6_28_00

EVENT_NEW_MEDIA: Final = 2
EVENT_MEDIA_REMOVAL: Final = 3


def command(channel: "Channel", unit: Unit, opcode: int) -> None:
    """Start an ATA command on a packet device."""
    if opcode == PACKET:
        channel.begin_packet()
    elif opcode == 0xA1:
        channel.begin_reply(Action.REPLY, identify_cd(unit), SECTOR)
    elif opcode in (0xEC, 0x20):  # IDENTIFY DEVICE, READ SECTORS: refused with the signature of a packet device
        unit.signature()
        channel.fail(ABRT)
    elif opcode == 0xEF:
        ata.set_features(channel, unit)
    elif opcode in (0xE0, 0xE1, 0xE2, 0xE3, 0xE6, 0xE7):
        channel.complete()
    elif opcode == 0xE5:
        unit.count = 0xFF
        channel.complete()
    else:
        channel.fail(ABRT)


# ── ends ──


def packet_done(channel: "Channel", unit: Unit) -> None:
    """The packet command has ended well."""
    unit.sense = NOTHING
    unit.count = REASON_DONE
    channel.complete(READY)


def packet_failed(channel: "Channel", unit: Unit, sense: int) -> None:
    """The packet command has ended with CHECK CONDITION."""
    unit.sense = sense
    unit.count = REASON_DONE
    channel.fail(sense >> 16 << 4 | ABRT, DRDY)


def fail_read(channel: "Channel", unit: Unit, status: BlockStatus) -> None:
    """The medium could not be read, or has been taken out."""
    if unit.port is None:
        packet_failed(channel, unit, _absence(unit))
    else:
        packet_failed(channel, unit, BAD_ADDRESS if status is BlockStatus.OUT_OF_RANGE else UNREADABLE)


def _absence(unit: Unit) -> int:
    return NO_MEDIUM_OPEN if unit.tray_open else NO_MEDIUM_CLOSED


# ── packets ──


def execute(channel: "Channel", unit: Unit, packet: bytes) -> None:
    """Do a packet command."""
    opcode = packet[0]
    entry = COMMANDS.get(opcode)
    if unit.attention and opcode not in HEARD_ALWAYS:
        sense, unit.attention = unit.attention, 0
        packet_failed(channel, unit, sense)
    elif entry is None:
        packet_failed(channel, unit, BAD_OPCODE)
    elif entry[1] and unit.port is None:
        packet_failed(channel, unit, _absence(unit))
    else:
        entry[0](channel, unit, packet)


def _u16(packet: bytes, at: int) -> int:
    return int.from_bytes(packet[at : at + 2], "big")


def _u32(packet: bytes, at: int) -> int:
    return int.from_bytes(packet[at : at + 4], "big")


def _limit(unit: Unit) -> int:
    """Bytes of one DRQ, as the guest allows them; even."""
    limit = unit.lba_mid & 0xFF | (unit.lba_high & 0xFF) << 8
    return min(limit, 0xFFFE) & ~1 or 0xFFFE


def _reply(channel: "Channel", unit: Unit, data: bytes, allocation: int) -> None:
    data = data[:allocation]
    if not data:
        packet_done(channel, unit)
    elif unit.features & FEATURE_DMA:
        channel.begin_reply(Action.CD_REPLY_DMA, data, SECTOR)
    else:
        channel.begin_reply(Action.CD_REPLY, data, _limit(unit))


def _test_unit_ready(channel: "Channel", unit: Unit, packet: bytes) -> None:
    packet_done(channel, unit)


def _request_sense(channel: "Channel", unit: Unit, packet: bytes) -> None:
    sense = unit.sense
    if not sense and unit.attention:
        sense, unit.attention = unit.attention, 0
    unit.sense = NOTHING
    data = bytearray(18)
    data[0] = 0x70
    data[2] = sense >> 16
    data[7] = 10
    data[12], data[13] = sense >> 8 & 0xFF, sense & 0xFF
    _reply(channel, unit, bytes(data), packet[4])


def _inquiry(channel: "Channel", unit: Unit, packet: bytes) -> None:
    if packet[1] & 3 or packet[2]:
        packet_failed(channel, unit, BAD_FIELD)
    else:
        _reply(channel, unit, inquiry(unit), packet[4])


def _start_stop(channel: "Channel", unit: Unit, packet: bytes) -> None:
    start, load_eject = packet[4] & 1, packet[4] & 2
    if load_eject and not start:
        if unit.locked:
            packet_failed(channel, unit, LOCKED)
            return
        if not unit.tray_open:
            unit.tray_open = 1
            unit.media_event = EVENT_MEDIA_REMOVAL
    elif load_eject and unit.tray_open:
        unit.tray_open = 0
        if unit.port is not None:
            unit.attention = MEDIUM_CHANGED
            unit.media_event = EVENT_NEW_MEDIA
    packet_done(channel, unit)


def _prevent(channel: "Channel", unit: Unit, packet: bytes) -> None:
    unit.locked = packet[4] & 1
    packet_done(channel, unit)


def _read_capacity(channel: "Channel", unit: Unit, packet: bytes) -> None:
    _reply(channel, unit, _last(unit).to_bytes(4, "big") + CD_SECTOR.to_bytes(4, "big"), 8)


def _last(unit: Unit) -> int:
    return max(0, min(unit.total, 1 << 32) - 1)


def _read_format_capacities(channel: "Channel", unit: Unit, packet: bytes) -> None:
    data = bytes((0, 0, 0, 8)) + (_last(unit) + 1 & 0xFFFF_FFFF).to_bytes(4, "big") + b"\x02" + b"\x00\x08\x00"
    _reply(channel, unit, data, _u16(packet, 7))


def _read(channel: "Channel", unit: Unit, packet: bytes) -> None:
    opcode, lba = packet[0], _u32(packet, 2)
    if opcode == 0xBE:  # READ CD: user data of mode 1 sectors only
        count, kind, fields = int.from_bytes(packet[6:9], "big"), packet[1] >> 2 & 7, packet[9] & 0xF8
        if kind not in (0, 2) or fields not in (0, 0x10) or packet[10] & 7:
            packet_failed(channel, unit, BAD_FIELD)
            return
        if not fields:
            count = 0
    else:
        count = _u16(packet, 7) if opcode == 0x28 else _u32(packet, 6)
    if lba + count > unit.total:
        packet_failed(channel, unit, BAD_ADDRESS)
    elif count == 0:
        packet_done(channel, unit)
    elif unit.features & FEATURE_DMA:
        channel.begin_read(Action.CD_READ_DMA, lba, count, CD_SECTOR)
    else:
        channel.begin_read(Action.CD_READ, lba, count, _limit(unit))


def _seek(channel: "Channel", unit: Unit, packet: bytes) -> None:
    if _u32(packet, 2) >= unit.total:
        packet_failed(channel, unit, BAD_ADDRESS)
    else:
        packet_done(channel, unit)


def _read_subchannel(channel: "Channel", unit: Unit, packet: bytes) -> None:
    if packet[2] & 0x40:
        packet_failed(channel, unit, BAD_FIELD)
    else:
        _reply(channel, unit, bytes((0, 0x15, 0, 0)), _u16(packet, 7))


def _read_toc(channel: "Channel", unit: Unit, packet: bytes) -> None:
    data = toc(unit, packet[9] >> 6 or packet[2] & 0x0F, bool(packet[1] & 2), packet[6])
    if data is None:
        packet_failed(channel, unit, BAD_FIELD)
    else:
        _reply(channel, unit, data, _u16(packet, 7))


def _get_configuration(channel: "Channel", unit: Unit, packet: bytes) -> None:
    kind = packet[1] & 3
    if kind == 3:
        packet_failed(channel, unit, BAD_FIELD)
    else:
        _reply(channel, unit, configuration(unit, kind, _u16(packet, 2)), _u16(packet, 7))


def _get_event_status(channel: "Channel", unit: Unit, packet: bytes) -> None:
    if not packet[1] & 1:  # asynchronous notification is not there
        packet_failed(channel, unit, BAD_FIELD)
        return
    allocation = _u16(packet, 7)
    data = event_status(unit, packet[4])
    if packet[4] & 0x10 and allocation > 4:
        unit.media_event = 0
    _reply(channel, unit, data, allocation)


def _read_disc_information(channel: "Channel", unit: Unit, packet: bytes) -> None:
    _reply(channel, unit, disc_information(), _u16(packet, 7))


def _read_track_information(channel: "Channel", unit: Unit, packet: bytes) -> None:
    _reply(channel, unit, track_information(unit), _u16(packet, 7))


def _mode_sense(channel: "Channel", unit: Unit, packet: bytes) -> None:
    control, page = packet[2] >> 6, packet[2] & 0x3F
    data = mode_pages(unit, page, control)
    if data is None:
        packet_failed(channel, unit, BAD_FIELD)
    else:
        _reply(channel, unit, data, _u16(packet, 7))


def _read_structure(channel: "Channel", unit: Unit, packet: bytes) -> None:
    data = physical_format(unit) if packet[7] == 0 and packet[6] == 0 else None
    if data is None:
        packet_failed(channel, unit, BAD_FIELD)
    else:
        _reply(channel, unit, data, _u16(packet, 8))


def _mechanism_status(channel: "Channel", unit: Unit, packet: bytes) -> None:
    _reply(channel, unit, mechanism_status(unit), _u16(packet, 8))


def _set_speed(channel: "Channel", unit: Unit, packet: bytes) -> None:
    packet_done(channel, unit)


Handler = Callable[["Channel", Unit, bytes], None]

COMMANDS: Final[dict[int, tuple[Handler, bool]]] = {
    0x00: (_test_unit_ready, True),
    0x03: (_request_sense, False),
    0x12: (_inquiry, False),
    0x1B: (_start_stop, False),
    0x1E: (_prevent, False),
    0x23: (_read_format_capacities, True),
    0x25: (_read_capacity, True),
    0x28: (_read, True),
    0x2B: (_seek, True),
    0x42: (_read_subchannel, True),
    0x43: (_read_toc, True),
    0x46: (_get_configuration, False),
    0x4A: (_get_event_status, False),
    0x51: (_read_disc_information, True),
    0x52: (_read_track_information, True),
    0x5A: (_mode_sense, False),
    0xA8: (_read, True),
    0xAD: (_read_structure, True),
    0xBB: (_set_speed, False),
    0xBD: (_mechanism_status, False),
    0xBE: (_read, True),
}
"""By opcode: what to do, and whether a medium must be there."""

HEARD_ALWAYS: Final = (0x03, 0x12, 0x46, 0x4A)
"""Commands that a pending unit attention does not fail."""
