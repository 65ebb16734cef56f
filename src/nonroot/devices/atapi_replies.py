"""What a CD-ROM drive tells about itself and its medium: one data track of 2048-byte sectors, read-only.

Source: MMC-3 (T10/1363-D), chapters 5 and 6; SPC-2 (T10/1236-D), 7.3 for INQUIRY.
"""

from typing import Final

from nonroot.devices.ide_unit import CD_SECTOR, CdRom, Unit

__all__ = [
    "configuration",
    "disc_information",
    "event_status",
    "inquiry",
    "mechanism_status",
    "mode_pages",
    "physical_format",
    "toc",
    "track_information",
]

LEAD_OUT: Final = 0xAA
FRAMES_OF_PREGAP: Final = 150
DVD_FROM: Final = 512_000
"""Sectors (1000 MB) from which a medium counts as a DVD."""
PROFILE_CD: Final = 0x0008
PROFILE_DVD: Final = 0x0010
SPEED: Final = 706
"""kB/s: four times a CD's."""
DVD_FIRST_SECTOR: Final = 0x3_0000


def inquiry(unit: Unit) -> bytes:
    """Standard INQUIRY data, 36 bytes."""
    drive = unit.drive
    assert isinstance(drive, CdRom)
    vendor, _, product = drive.model.partition(" ")
    data = bytearray(36)
    data[0] = 0x05
    data[1] = 0x80
    data[3] = 0x21
    data[4] = 31
    data[8:16] = vendor.encode("ascii", "replace")[:8].ljust(8)
    data[16:32] = product.encode("ascii", "replace")[:16].ljust(16)
    data[32:36] = b"1.0 "
    return bytes(data)


def _address(lba: int, as_time: bool) -> bytes:
    if not as_time:
        return (lba & 0xFFFF_FFFF).to_bytes(4, "big")
    seconds, frames = divmod(lba + FRAMES_OF_PREGAP, 75)
    minutes, seconds = divmod(seconds, 60)
    return bytes((0, min(minutes, 255), seconds, frames))


def toc(unit: Unit, kind: int, as_time: bool, first: int) -> bytes | None:
    """READ TOC: formats 0 (table), 1 (sessions), 2 (raw, its four entries). None for what is not there."""
    end = unit.total
    if kind == 0:
        if first > 1 and first != LEAD_OUT:
            return None
        entries = b""
        if first <= 1:
            entries += bytes((0, 0x14, 1, 0)) + _address(0, as_time)
        entries += bytes((0, 0x14, LEAD_OUT, 0)) + _address(end, as_time)
    elif kind == 1:
        entries = bytes((0, 0x14, 1, 0)) + _address(0, as_time)
    elif kind == 2:
        entries = b""
        for point, address in (
            (0xA0, bytes((0, 1, 0, 0))),
            (0xA1, bytes((0, 1, 0, 0))),
            (0xA2, _address(end, True)),
            (1, _address(0, True)),
        ):
            entries += bytes((1, 0x14, 0, point, 0, 0, 0)) + address
    else:
        return None
    return (len(entries) + 2).to_bytes(2, "big") + b"\x01\x01" + entries


def _profile(unit: Unit) -> int:
    if unit.port is None:
        return 0
    return PROFILE_DVD if unit.total > DVD_FROM else PROFILE_CD


def _feature(code: int, flags: int, data: bytes) -> bytes:
    return code.to_bytes(2, "big") + bytes((flags, len(data))) + data


def configuration(unit: Unit, kind: int, first: int) -> bytes:
    """GET CONFIGURATION: ``kind`` 0 all features, 1 current ones, 2 the one named."""
    profile = _profile(unit)
    profiles = b"".join(
        number.to_bytes(2, "big") + bytes((int(number == profile), 0)) for number in (PROFILE_DVD, PROFILE_CD)
    )
    medium = int(profile != 0)
    block = CD_SECTOR.to_bytes(4, "big") + b"\x00\x01\x00\x00"
    features = [
        (0x0000, True, _feature(0x0000, 0x03, profiles)),
        (0x0001, True, _feature(0x0001, 0x0B, b"\x00\x00\x00\x02\x01\x00\x00\x00")),  # core: ATAPI
        (0x0002, True, _feature(0x0002, 0x07, b"\x02\x00\x00\x00")),  # morphing: events are polled
        (0x0003, True, _feature(0x0003, 0x03, b"\x29\x00\x00\x00")),  # removable: tray, eject, lock
        (0x0010, bool(medium), _feature(0x0010, medium, block)),  # random readable
        (0x001E, profile == PROFILE_CD, _feature(0x001E, 0x08 | int(profile == PROFILE_CD), bytes(4))),
        (0x001F, profile == PROFILE_DVD, _feature(0x001F, int(profile == PROFILE_DVD), bytes(4))),
    ]
    chosen = b""
    for code, current, data in features:
        wanted = code == first if kind == 2 else code >= first and (kind == 0 or current)
        if wanted:
            chosen += data
    return (len(chosen) + 4).to_bytes(4, "big") + b"\0\0" + profile.to_bytes(2, "big") + chosen


def event_status(unit: Unit, classes: int) -> bytes:
    """GET EVENT STATUS NOTIFICATION: the media class (4) is the only one there is."""
    if not classes & 0x10:
        return b"\x00\x02\x80\x10"
    drive = unit.drive
    assert isinstance(drive, CdRom)
    present = 2 if drive.port is not None and not unit.tray_open else 0
    return bytes((0, 6, 4, 0x10, unit.media_event, unit.tray_open | present, 0, 0))


def disc_information() -> bytes:
    """READ DISC INFORMATION: one complete session with one track."""
    data = bytearray(34)
    data[1] = 32
    data[2] = 0x0E
    data[3:7] = b"\x01\x01\x01\x01"
    data[7] = 0x20
    return bytes(data)


def track_information(unit: Unit) -> bytes:
    """READ TRACK INFORMATION of the only track."""
    data = bytearray(36)
    data[1] = 34
    data[2] = data[3] = 1
    data[5] = 0x04
    data[6] = 0x01
    data[24:28] = (unit.total & 0xFFFF_FFFF).to_bytes(4, "big")
    return bytes(data)


def mode_pages(unit: Unit, page: int, control: int) -> bytes | None:
    """MODE SENSE(10). ``control`` 1 asks which values could be changed: none. None for unknown pages, saved values."""
    pages = {
        0x01: b"\x01\x06\x00\x05\x00\x00\x00\x00",
        0x0D: b"\x0d\x06\x00\x0d\x00\x3c\x00\x4b",
        0x0E: b"\x0e\x0e\x04\x00\x00\x00\x00\x4b\x01\xff\x02\xff\x00\x00\x00\x00",
        0x1A: b"\x1a\x0a" + bytes(10),
        0x2A: _capabilities(unit),
    }
    if control == 3 or (page != 0x3F and page not in pages):
        return None
    chosen = b"".join(pages.values()) if page == 0x3F else pages[page]
    if control == 1:
        whole = list(pages.values()) if page == 0x3F else [pages[page]]
        chosen = b"".join(one[:2] + bytes(len(one) - 2) for one in whole)
    medium = 0x71 if unit.tray_open else 0x01 if unit.port is not None else 0x70
    return (len(chosen) + 6).to_bytes(2, "big") + bytes((medium, 0, 0, 0, 0, 0)) + chosen


def _capabilities(unit: Unit) -> bytes:
    data = bytearray(22)
    data[0], data[1] = 0x2A, 20
    data[2] = 0x3B  # reads CD-R, CD-RW, method 2, DVD-ROM, DVD-R
    data[4] = 0x70  # multi-session, mode 2 forms 1 and 2
    data[6] = 0x29 | (0x02 if unit.locked else 0)  # a tray, ejects, locks
    data[8:10] = SPEED.to_bytes(2, "big")
    data[12:14] = (512).to_bytes(2, "big")
    data[14:16] = SPEED.to_bytes(2, "big")
    return bytes(data)


def physical_format(unit: Unit) -> bytes | None:
    """READ DVD STRUCTURE, format 0; None if the medium is no DVD."""
    if _profile(unit) != PROFILE_DVD:
        return None
    data = bytearray(2052)
    data[0:2] = (2050).to_bytes(2, "big")
    data[4] = 0x01
    data[5] = 0x0F
    data[6] = 0x01
    data[9:12] = DVD_FIRST_SECTOR.to_bytes(3, "big")
    data[13:16] = (DVD_FIRST_SECTOR + unit.total - 1 & 0xFF_FFFF).to_bytes(3, "big")
    return bytes(data)


def mechanism_status(unit: Unit) -> bytes:
    """MECHANISM STATUS: no changer; whether the tray is open."""
    return bytes((0, 0x10 if unit.tray_open else 0, 0, 0, 0, 1, 0, 0))
