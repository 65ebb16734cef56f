"""What IDENTIFY DEVICE and IDENTIFY PACKET DEVICE answer. Source: T13/1410D (ATA/ATAPI-6), 8.15 and 8.16."""

from typing import Final

from nonroot.devices.ide_unit import CdRom, Disk, Unit

__all__ = ["identify_cd", "identify_disk"]

FIRMWARE: Final = "1.0"
HEADS: Final = 16
SECTORS: Final = 63
CYLINDERS_MAXIMUM: Final = 16383
LBA28_MAXIMUM: Final = 0xFFF_FFFF
MULTIWORD_MODES: Final = 0x0007
CYCLE_NS: Final = 120


def _text(value: str, words: int) -> list[int]:
    """ASCII in words, the first character in the high byte, padded with spaces."""
    data = value.encode("ascii", "replace")[: 2 * words].ljust(2 * words)
    return [data[i] << 8 | data[i + 1] for i in range(0, 2 * words, 2)]


def _put(words: list[int], first: int, values: list[int]) -> None:
    words[first : first + len(values)] = values


def _pack(words: list[int]) -> bytes:
    """512 bytes; the last word is a signature and a checksum over everything."""
    words[255] = 0
    data = bytearray(b"".join(word.to_bytes(2, "little") for word in words))
    data[510] = 0xA5
    data[511] = -sum(data) & 0xFF
    return bytes(data)


def _common(unit: Unit, drive: Disk | CdRom) -> list[int]:
    words = [0] * 256
    _put(words, 10, _text(drive.serial, 10))
    _put(words, 23, _text(FIRMWARE, 4))
    _put(words, 27, _text(drive.model, 20))
    words[49] = 0x0F00  # IORDY, may be disabled; LBA; DMA
    words[51] = 0x0200
    words[53] = 0x0003  # words 54..58 and 64..70 are valid
    selected = 1 << (unit.mode & 7) if unit.mode >> 3 == 4 else 0
    words[63] = selected << 8 | MULTIWORD_MODES
    words[64] = 0x0003  # PIO modes 3 and 4
    _put(words, 65, [CYCLE_NS] * 4)
    words[80] = 0x007E  # ATA-1 to ATA/ATAPI-6
    words[81] = 0x0019
    return words


def identify_disk(unit: Unit) -> bytes:
    """512 bytes about a disk."""
    drive = unit.drive
    assert isinstance(drive, Disk)
    total = unit.total
    words = _common(unit, drive)
    cylinders = min(CYLINDERS_MAXIMUM, max(1, total // (HEADS * SECTORS)))
    words[0] = 0x0040  # a fixed disk
    words[1], words[3], words[6] = cylinders, HEADS, SECTORS
    words[47] = 0x8010  # READ and WRITE MULTIPLE of 16 sectors at most
    words[48] = 1
    current = min(0xFFFF, max(1, total // (unit.heads * unit.sectors)))
    words[54], words[55], words[56] = current, unit.heads, unit.sectors
    capacity = current * unit.heads * unit.sectors
    words[57], words[58] = capacity & 0xFFFF, capacity >> 16
    words[59] = 0x0100 | unit.multiple if unit.multiple else 0
    short = min(total, LBA28_MAXIMUM)
    words[60], words[61] = short & 0xFFFF, short >> 16
    words[82] = 0x0028  # power management, write cache
    words[83] = 0x7400  # 48-bit addresses, FLUSH CACHE, FLUSH CACHE EXT
    words[84] = 0x4040  # WRITE DMA FUA EXT
    words[85] = 0x0008 | (0x0020 if unit.write_cache else 0)
    words[86] = 0x3400
    words[87] = 0x4040
    words[93] = 0x6001 if not unit.device & 0x10 else 0x6100
    _put(words, 100, [total >> 16 * n & 0xFFFF for n in range(4)])
    return _pack(words)


def identify_cd(unit: Unit) -> bytes:
    """512 bytes about a CD-ROM drive."""
    drive = unit.drive
    assert isinstance(drive, CdRom)
    words = _common(unit, drive)
    words[0] = 0x85C0  # ATAPI, CD-ROM, removable, DRQ within 50 µs, packets of 12 bytes
    words[82] = 0x0210  # DEVICE RESET, PACKET
    words[83] = 0x4000
    words[84] = 0x4000
    words[85] = 0x0210
    words[87] = 0x4000
    words[126] = 0
    return _pack(words)
