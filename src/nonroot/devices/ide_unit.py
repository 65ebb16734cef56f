"""One unit on an IDE cable: its task file, and what stays in the drive between commands."""

from typing import Final

from nonroot.devices.block import SECTOR, BlockPort
from nonroot.devices.ide_record import UNIT_FIELDS

__all__ = ["CD_SECTOR", "CdRom", "Disk", "Unit"]

CD_SECTOR: Final = 2048

# Status register
BSY: Final = 0x80
DRDY: Final = 0x40
DF: Final = 0x20
DSC: Final = 0x10
DRQ: Final = 0x08
ERR: Final = 0x01
READY: Final = DRDY | DSC

# Error register
UNC: Final = 0x40
IDNF: Final = 0x10
ABRT: Final = 0x04
DIAGNOSTIC_PASSED: Final = 0x01

# Device register
LBA_MODE: Final = 0x40
DEVICE_1: Final = 0x10
DEVICE_OBSOLETE: Final = 0xA0

MODE_MULTIWORD_2: Final = 0x22


class Disk:
    """A hard disk for a unit: its medium, and the names that IDENTIFY tells (20, 8 and 40 characters at most)."""

    def __init__(self, port: BlockPort, serial: str = "NR00000001", model: str = "NONROOT HARDDISK") -> None:
        self.port: BlockPort | None = port
        self.serial = serial
        self.model = model


class CdRom:
    """A CD-ROM drive for a unit, with or without a medium."""

    def __init__(
        self, port: BlockPort | None = None, serial: str = "NR00000003", model: str = "NONROOT CD-ROM"
    ) -> None:
        self.port = port
        self.serial = serial
        self.model = model


class Unit:
    """Attributes are the fields of :class:`nonroot.devices.ide_record.IdeState` for one unit, and its drive."""

    __slots__ = (*UNIT_FIELDS, "drive")
    status: int
    error: int
    features: int
    count: int
    lba_low: int
    lba_mid: int
    lba_high: int
    device: int
    multiple: int
    mode: int
    write_cache: int
    heads: int
    sectors: int
    sense: int
    attention: int
    locked: int
    tray_open: int
    media_event: int

    def __init__(self, drive: Disk | CdRom | None) -> None:
        self.drive = drive
        self.power_on()

    def power_on(self) -> None:
        """Everything as after power-on."""
        for name in UNIT_FIELDS:
            setattr(self, name, 0)
        self.mode = MODE_MULTIWORD_2
        self.signature()
        self.reset()

    def reset(self) -> None:
        """After a software or hardware reset."""
        self.heads, self.sectors = 16, 63
        self.write_cache = 1
        self.multiple = 0
        self.signature()

    def signature(self) -> None:
        """The registers that tell disk and packet device apart, and the result of the self-test."""
        self.features = 0
        self.error = DIAGNOSTIC_PASSED
        self.count = self.lba_low = 1
        self.lba_mid, self.lba_high = (0x14, 0xEB) if self.is_cd else (0, 0)
        self.device &= DEVICE_1
        self.status = 0 if self.is_cd or self.drive is None else READY

    @property
    def present(self) -> bool:
        """Whether there is a drive."""
        return self.drive is not None

    @property
    def is_cd(self) -> bool:
        """Whether it is a packet device."""
        return isinstance(self.drive, CdRom)

    @property
    def port(self) -> BlockPort | None:
        """The medium, if there is one and the tray is closed."""
        return None if self.drive is None or self.tray_open else self.drive.port

    @property
    def sector(self) -> int:
        """Bytes of one unit of transfer."""
        return CD_SECTOR if self.is_cd else SECTOR

    @property
    def total(self) -> int:
        """Sectors of the medium, a last part of one included."""
        port = self.port
        return 0 if port is None else -(-port.size // self.sector)

    # ── addresses ──

    def address28(self) -> int | None:
        """The first sector of a 28-bit command, by LBA or by cylinder, head and sector; None if there is none."""
        low, mid, high = self.lba_low & 0xFF, self.lba_mid & 0xFF, self.lba_high & 0xFF
        head = self.device & 0x0F
        if self.device & LBA_MODE:
            return head << 24 | high << 16 | mid << 8 | low
        if not 1 <= low <= self.sectors or head >= self.heads:
            return None
        return ((high << 8 | mid) * self.heads + head) * self.sectors + low - 1

    def address48(self) -> int:
        """The first sector of a 48-bit command."""
        current = (self.lba_high & 0xFF) << 16 | (self.lba_mid & 0xFF) << 8 | self.lba_low & 0xFF
        return (self.lba_high >> 8) << 40 | (self.lba_mid >> 8) << 32 | (self.lba_low >> 8) << 24 | current

    def show_address(self, lba: int, wide: bool) -> None:
        """Put a sector's address into the registers, as the command gave it."""
        if wide:
            self.lba_low = lba >> 24 << 8 & 0xFF00 | lba & 0xFF
            self.lba_mid = lba >> 32 << 8 & 0xFF00 | lba >> 8 & 0xFF
            self.lba_high = lba >> 40 << 8 & 0xFF00 | lba >> 16 & 0xFF
            return
        if self.device & LBA_MODE:
            low, middle, head = lba & 0xFF, lba >> 8 & 0xFFFF, lba >> 24 & 0x0F
        else:
            track, sector = divmod(lba, self.sectors)
            middle, head = divmod(track, self.heads)
            low, middle = sector + 1, middle & 0xFFFF
        self.lba_low, self.lba_mid, self.lba_high = low & 0xFF, middle & 0xFF, middle >> 8
        self.device = self.device & 0xF0 | head
