"""The commands of an ATA disk.

Source: T13/1410D (ATA/ATAPI-6), chapters 8.1 to 8.60; CHS and MULTIPLE as in ATA-3.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nonroot.devices.ata_identify import identify_disk
from nonroot.devices.block import SECTOR, BlockStatus
from nonroot.devices.ide_record import Action
from nonroot.devices.ide_unit import ABRT, DF, IDNF, LBA_MODE, READY, Unit

if TYPE_CHECKING:
    from nonroot.devices.ide_channel import Channel

__all__ = ["EXECUTE_DIAGNOSTIC", "command", "fail_write", "is_wide"]

EXECUTE_DIAGNOSTIC: Final = 0x90
MULTIPLE_MAXIMUM: Final = 16
POWER_ACTIVE: Final = 0xFF
WIDE_MARK: Final = 0x80
"""Kept in the device register (bit 7, obsolete) while the command is a 48-bit one."""

FEATURE_8BIT_ON: Final = 0x01
FEATURE_CACHE_ON: Final = 0x02
FEATURE_MODE: Final = 0x03
FEATURE_REVERT_OFF: Final = 0x66
FEATURE_CACHE_OFF: Final = 0x82
FEATURE_REVERT_ON: Final = 0xCC
FEATURES_WITHOUT_EFFECT: Final = (0x05, 0x55, 0x85, 0xAA, FEATURE_REVERT_OFF, FEATURE_REVERT_ON)

Handler = Callable[["Channel", Unit], None]


def command(channel: "Channel", unit: Unit, opcode: int) -> None:
    """Start a command on a disk. One that is unknown or not supported ends with ABRT."""
    unit.device &= ~WIDE_MARK
    handler = COMMANDS.get(opcode)
    if handler is None:
        channel.fail(ABRT)
    else:
        handler(channel, unit)


def is_wide(unit: Unit) -> bool:
    """Whether the command under way is one of the 48-bit ones."""
    return bool(unit.device & WIDE_MARK)


def fail_write(channel: "Channel", status: BlockStatus) -> None:
    """The host could not write: a device fault, unless the medium is write-protected."""
    channel.fail(ABRT, READY if status is BlockStatus.READ_ONLY else READY | DF)


def _span(channel: "Channel", unit: Unit, wide: bool) -> tuple[int, int] | None:
    """(first sector, sectors) of a command; None after an error was reported."""
    if wide:
        unit.device |= WIDE_MARK
        lba: int | None = unit.address48()
        count = unit.count or 0x1_0000
    else:
        lba = unit.address28()
        count = unit.count & 0xFF or 0x100
    if lba is None or lba + count > unit.total:
        channel.fail(IDNF)
        return None
    return lba, count


def _block(unit: Unit, multiple: bool) -> int:
    return (unit.multiple if multiple else 1) * SECTOR


def _read(wide: bool, multiple: bool = False) -> Handler:
    def handler(channel: "Channel", unit: Unit) -> None:
        if multiple and not unit.multiple:
            channel.fail(ABRT)
        elif span := _span(channel, unit, wide):
            channel.begin_read(Action.READ, *span, _block(unit, multiple))

    return handler


def _write(wide: bool, multiple: bool = False, through: bool = False) -> Handler:
    def handler(channel: "Channel", unit: Unit) -> None:
        if (multiple and not unit.multiple) or _write_protected(unit):
            channel.fail(ABRT)
        elif span := _span(channel, unit, wide):
            flush = through or not unit.write_cache
            channel.begin_write(Action.WRITE, *span, _block(unit, multiple), flush)

    return handler


def _write_protected(unit: Unit) -> bool:
    return unit.port is None or unit.port.read_only


def _read_dma(wide: bool) -> Handler:
    def handler(channel: "Channel", unit: Unit) -> None:
        if span := _span(channel, unit, wide):
            channel.begin_read(Action.READ_DMA, *span, SECTOR)

    return handler


def _write_dma(wide: bool, through: bool = False) -> Handler:
    def handler(channel: "Channel", unit: Unit) -> None:
        if _write_protected(unit):
            channel.fail(ABRT)
        elif span := _span(channel, unit, wide):
            channel.begin_write(Action.WRITE_DMA, *span, SECTOR, through or not unit.write_cache)

    return handler


def _verify(wide: bool) -> Handler:
    def handler(channel: "Channel", unit: Unit) -> None:
        if span := _span(channel, unit, wide):
            channel.begin_read(Action.VERIFY, *span, SECTOR)

    return handler


def _seek(channel: "Channel", unit: Unit) -> None:
    lba = unit.address28()
    if lba is None or lba >= unit.total:
        channel.fail(IDNF)
    else:
        channel.complete()


def _succeed(channel: "Channel", unit: Unit) -> None:
    channel.complete()


def _flush(channel: "Channel", unit: Unit) -> None:
    channel.begin_flush()


def _identify(channel: "Channel", unit: Unit) -> None:
    channel.begin_reply(Action.REPLY, identify_disk(unit), SECTOR)


def _set_multiple(channel: "Channel", unit: Unit) -> None:
    count = unit.count & 0xFF
    if count > MULTIPLE_MAXIMUM or count & (count - 1):
        channel.fail(ABRT)
    else:
        unit.multiple = count
        channel.complete()


def _set_geometry(channel: "Channel", unit: Unit) -> None:
    """INITIALIZE DEVICE PARAMETERS: the translation that CHS addresses use from now on."""
    sectors, heads = unit.count & 0xFF, (unit.device & 0x0F) + 1
    if not 1 <= sectors <= 63:
        channel.fail(ABRT)
    else:
        unit.sectors, unit.heads = sectors, heads
        channel.complete()


def _check_power(channel: "Channel", unit: Unit) -> None:
    unit.count = POWER_ACTIVE
    channel.complete()


def _native_maximum(wide: bool) -> Handler:
    def handler(channel: "Channel", unit: Unit) -> None:
        last = unit.total - 1
        if wide:
            unit.show_address(last, True)
        else:
            unit.device |= LBA_MODE
            unit.show_address(min(last, 0xFFF_FFFF), False)
        channel.complete()

    return handler


def set_features(channel: "Channel", unit: Unit) -> None:
    """SET FEATURES: the write cache, and transfer modes, which are remembered and change nothing else."""
    feature, value = unit.features & 0xFF, unit.count & 0xFF
    if feature == FEATURE_MODE and acceptable_mode(value):
        if value >= 0x20:
            unit.mode = value
        channel.complete()
    elif feature in (FEATURE_CACHE_ON, FEATURE_CACHE_OFF) and not unit.is_cd:
        unit.write_cache = int(feature == FEATURE_CACHE_ON)
        if unit.write_cache:
            channel.complete()
        else:
            channel.begin_flush()
    elif feature in FEATURES_WITHOUT_EFFECT:
        channel.complete()
    else:
        channel.fail(ABRT)


def acceptable_mode(value: int) -> bool:
    """PIO default, PIO 0..4, multiword DMA 0..2; the controller has no Ultra DMA."""
    kind, number = value >> 3, value & 7
    return (kind == 0 and number <= 1) or (kind == 1 and number <= 4) or (kind == 4 and number <= 2)


COMMANDS: Final[dict[int, Handler]] = {
    **dict.fromkeys(range(0x10, 0x20), _succeed),  # RECALIBRATE
    0x20: _read(wide=False),
    0x21: _read(wide=False),
    0x24: _read(wide=True),
    0x25: _read_dma(wide=True),
    0x27: _native_maximum(wide=True),
    0x29: _read(wide=True, multiple=True),
    0x30: _write(wide=False),
    0x31: _write(wide=False),
    0x34: _write(wide=True),
    0x35: _write_dma(wide=True),
    0x39: _write(wide=True, multiple=True),
    0x3D: _write_dma(wide=True, through=True),
    0x40: _verify(wide=False),
    0x41: _verify(wide=False),
    0x42: _verify(wide=True),
    0x70: _seek,
    0x91: _set_geometry,
    **dict.fromkeys((0x94, 0x95, 0x96, 0x97, 0x99, 0xE0, 0xE1, 0xE2, 0xE3, 0xE6), _succeed),  # power management
    **dict.fromkeys((0x98, 0xE5), _check_power),
    0xC4: _read(wide=False, multiple=True),
    0xC5: _write(wide=False, multiple=True),
    0xC6: _set_multiple,
    0xC8: _read_dma(wide=False),
    0xC9: _read_dma(wide=False),
    0xCA: _write_dma(wide=False),
    0xCB: _write_dma(wide=False),
    0xCE: _write(wide=True, multiple=True, through=True),
    0xE7: _flush,
    0xEA: _flush,
    0xEC: _identify,
    0xEF: set_features,
    0xF8: _native_maximum(wide=False),
}
"""By opcode. SMART (B0), security, the host protected area's SET MAX and everything else is refused with ABRT."""
