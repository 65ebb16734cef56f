"""Packet commands of the CD-ROM drive, and changes of its medium."""

import pytest

from nonroot.devices.block import BlockStatus
from nonroot.devices.ide_unit import CdRom
from nonroot.hvm.clock import ManualClock
from tests.storage.parts import DRDY, DRQ, DSC, ERR, Driver, RamPort, pattern

BLOCK = 2048
TEST_UNIT_READY = bytes(12)


def drive(blocks: int = 100, empty: bool = False) -> tuple[Driver, RamPort]:
    clock = ManualClock()
    port = RamPort(clock, pattern(blocks * BLOCK), read_only=True)
    driver = Driver((None, None, CdRom(None if empty else port), None), clock)
    driver.select(2)
    return driver, port


def read_10(lba: int, count: int) -> bytes:
    return b"\x28\0" + lba.to_bytes(4, "big") + b"\0" + count.to_bytes(2, "big")


def event(driver: Driver) -> tuple[int, int]:
    """(event code, status) of the media class."""
    data = driver.packet_in(bytes((0x4A, 1, 0, 0, 0x10, 0, 0, 0, 8)))
    assert data[2] == 4
    return data[4], data[5]


def test_signature_identify_and_refusals() -> None:
    driver, _ = drive()
    assert [driver.read(register) for register in (2, 3, 4, 5, 7)] == [1, 1, 0x14, 0xEB, 0]
    driver.command(0xEC)
    assert driver.acknowledge() & ERR
    assert (driver.read(4), driver.read(5)) == (0x14, 0xEB)
    driver.command(0xA1)
    data = driver.pio_in(512)
    assert int.from_bytes(data[:2], "little") == 0x85C0
    assert sum(data) & 0xFF == 0
    driver.command(0x25, wide=True)
    assert driver.acknowledge() & ERR
    driver.write(7, 0x08)  # DEVICE RESET
    assert (driver.read(4), driver.read(5), driver.status) == (0x14, 0xEB, 0)


def test_inquiry_and_capacity() -> None:
    driver, _ = drive()
    data = driver.packet_in(bytes((0x12, 0, 0, 0, 36)))
    assert (data[0], data[1], len(data)) == (5, 0x80, 36)
    assert data[8:16] == b"NONROOT "
    assert driver.packet_in(bytes((0x12, 0, 0, 0, 5))) == data[:5]
    assert driver.packet_in(b"\x25") == (99).to_bytes(4, "big") + (2048).to_bytes(4, "big")
    assert driver.packet_in(TEST_UNIT_READY) == b""


@pytest.mark.parametrize("limit", [2048, 65534, 0, 510, 2, 4097])
@pytest.mark.parametrize(("lba", "count"), [(0, 1), (7, 3), (99, 1)])
def test_read_by_pio(limit: int, lba: int, count: int) -> None:
    driver, port = drive()
    whole = port.data[lba * BLOCK : (lba + count) * BLOCK]
    before = driver.interrupts[1]
    driver.packet(read_10(lba, count), limit)
    step = (min(limit, 0xFFFE) & ~1) or 0xFFFE
    data = b""
    while driver.wait() & DRQ:
        driver.acknowledge()
        size = driver.read(4) | driver.read(5) << 8
        assert size == min(step, len(whole) - len(data))
        data += driver.ide.read_block(driver.base, 2, size // 2)
    assert data == whole
    assert driver.acknowledge() == DRDY | DSC
    assert driver.interrupts[1] - before == -(-len(whole) // step) + 1


def test_read_more_than_the_buffer() -> None:
    driver, port = drive(400)
    assert driver.packet_in(b"\xa8\0" + bytes(4) + (400).to_bytes(4, "big")) == port.data


def test_read_by_dma() -> None:
    driver, port = drive()
    driver.table([(0x10000, 0x1000), (0x20000, 0x800)])
    driver.packet(read_10(5, 3), dma=True)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.stop() & 7 == 4
    assert driver.acknowledge() == DRDY | DSC
    assert driver.memory.data[0x10000:0x11000] == port.data[5 * BLOCK : 7 * BLOCK]
    assert driver.memory.data[0x20000:0x20800] == port.data[7 * BLOCK : 8 * BLOCK]


def test_a_reply_by_dma() -> None:
    driver, _ = drive()
    driver.table([(0x3000, 36)])
    driver.packet(bytes((0x12, 0, 0, 0, 36)), dma=True)
    driver.start(to_memory=True)
    driver.acknowledge()
    assert driver.stop() & 7 == 4
    assert driver.memory.data[0x3008:0x3010] == b"NONROOT "


def test_read_cd_gives_user_data() -> None:
    driver, port = drive()
    packet = b"\xbe\0" + (3).to_bytes(4, "big") + (2).to_bytes(3, "big") + b"\x10"
    assert driver.packet_in(packet) == port.data[3 * BLOCK : 5 * BLOCK]
    assert driver.packet_fails(packet[:9] + b"\xf8") == (5, 0x24, 0)


@pytest.mark.parametrize(
    ("packet", "sense"),
    [
        (read_10(100, 1), (5, 0x21, 0)),
        (read_10(99, 2), (5, 0x21, 0)),
        (b"\x2b\0" + (100).to_bytes(4, "big"), (5, 0x21, 0)),
        (b"\x2a", (5, 0x20, 0)),
        (b"\xff", (5, 0x20, 0)),
        (b"\x12\x01", (5, 0x24, 0)),
        (b"\x43\0\x05", (5, 0x24, 0)),
        (b"\x43\0\0\0\0\0\x02", (5, 0x24, 0)),
        (b"\x5a\0\xc1", (5, 0x24, 0)),
        (b"\x5a\0\x05", (5, 0x24, 0)),
        (b"\x4a\0\0\0\x10", (5, 0x24, 0)),
        (b"\xad", (5, 0x24, 0)),
    ],
)
def test_errors(packet: bytes, sense: tuple[int, int, int]) -> None:
    driver, _ = drive()
    assert driver.packet_fails(packet) == sense
    assert driver.sense() == (0, 0, 0), "sense is told once"


def test_table_of_contents() -> None:
    driver, _ = drive()
    data = driver.packet_in(bytes((0x43, 0, 0, 0, 0, 0, 0, 0x01, 0)))
    assert data == bytes((0, 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0, 0, 0x14, 0xAA, 0, 0, 0, 0, 100))
    assert driver.packet_in(bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 4))) == data[:4]
    as_time = driver.packet_in(bytes((0x43, 2, 0, 0, 0, 0, 0xAA, 0x01, 0)))
    assert as_time[4:] == bytes((0, 0x14, 0xAA, 0, 0, 0, 3, 25))
    sessions = driver.packet_in(bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 20, 0x40)))
    assert sessions == bytes((0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0))
    assert len(driver.packet_in(bytes((0x43, 0, 2, 0, 0, 0, 0, 1, 0)))) == 4 + 44


def test_configuration() -> None:
    driver, _ = drive()
    data = driver.packet_in(bytes((0x46, 0, 0, 0, 0, 0, 0, 1, 0)))
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert data[6:8] == b"\0\x08"
    one = driver.packet_in(bytes((0x46, 2, 0, 3, 0, 0, 0, 1, 0)))
    assert one[8:12] == bytes((0, 3, 3, 4))
    assert len(driver.packet_in(bytes((0x46, 0, 0, 0, 0, 0, 0, 0, 8)))) == 8
    empty, _ = drive(empty=True)
    assert empty.packet_in(bytes((0x46, 1, 0, 0, 0, 0, 0, 1, 0)))[6:8] == b"\0\0"


def test_a_large_medium_is_a_dvd() -> None:
    clock = ManualClock()
    port = RamPort(clock, b"", read_only=True)
    port.size = 4 << 30
    driver = Driver((None, None, CdRom(port), None), clock)
    driver.select(2)
    assert driver.packet_in(bytes((0x46, 1, 0, 0, 0, 0, 0, 0, 8)))[6:8] == b"\0\x10"
    assert len(driver.packet_in(bytes((0xAD, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF)))) == 2052


@pytest.mark.parametrize("page", [0x01, 0x0D, 0x0E, 0x1A, 0x2A, 0x3F])
def test_mode_sense(page: int) -> None:
    driver, _ = drive()
    data = driver.packet_in(bytes((0x5A, 0, page, 0, 0, 0, 0, 1, 0)))
    assert int.from_bytes(data[:2], "big") == len(data) - 2
    assert data[8] & 0x3F == (page if page != 0x3F else 1)
    changeable = driver.packet_in(bytes((0x5A, 0, 0x40 | page, 0, 0, 0, 0, 1, 0)))
    assert len(changeable) == len(data)
    if page != 0x3F:
        assert not any(changeable[10:])


def test_small_replies() -> None:
    driver, _ = drive()
    assert driver.packet_in(bytes((0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8)))[1] == 0
    assert driver.packet_in(bytes((0x51, 0, 0, 0, 0, 0, 0, 0, 34)))[2] == 0x0E
    assert driver.packet_in(bytes((0x52, 1, 0, 0, 0, 1, 0, 0, 36)))[24:28] == (100).to_bytes(4, "big")
    assert driver.packet_in(bytes((0x23, 0, 0, 0, 0, 0, 0, 0, 12)))[4:8] == (100).to_bytes(4, "big")
    assert driver.packet_in(bytes((0x42, 2, 0, 0, 0, 0, 0, 0, 4))) == bytes((0, 0x15, 0, 0))
    assert driver.packet_in(bytes((0xBB, 0, 0xFF, 0xFF))) == b""


def test_an_empty_drive() -> None:
    driver, _ = drive(empty=True)
    for packet in (TEST_UNIT_READY, b"\x25", read_10(0, 1), bytes((0x43, 0, 0, 0, 0, 0, 0, 1, 0))):
        assert driver.packet_fails(packet) == (2, 0x3A, 1)
    assert len(driver.packet_in(bytes((0x12, 0, 0, 0, 36)))) == 36
    assert event(driver) == (0, 0)


def test_a_medium_comes_and_goes() -> None:
    driver, port = drive(empty=True)
    driver.ide.insert(2, port)
    assert event(driver) == (2, 2)
    assert event(driver) == (0, 2), "an event is told once"
    assert driver.packet_fails(TEST_UNIT_READY) == (6, 0x28, 0)
    assert driver.packet_in(TEST_UNIT_READY) == b""
    assert driver.ide.eject(2)
    assert event(driver) == (3, 1)
    assert driver.packet_fails(TEST_UNIT_READY) == (2, 0x3A, 2)
    driver.ide.insert(2, port)
    assert driver.packet_fails(read_10(0, 1)) == (6, 0x28, 0)
    assert driver.packet_in(read_10(0, 1)) == port.data[:BLOCK]


def test_the_guest_opens_and_closes_its_tray() -> None:
    driver, port = drive()
    driver.packet_in(bytes((0x1E, 0, 0, 0, 1)))
    assert driver.packet_fails(bytes((0x1B, 0, 0, 0, 2))) == (5, 0x53, 2)
    assert not driver.ide.eject(2)
    driver.packet_in(bytes((0x1E, 0, 0, 0, 0)))
    assert driver.packet_in(bytes((0x1B, 0, 0, 0, 2))) == b""
    assert driver.packet_in(bytes((0xBD, 0, 0, 0, 0, 0, 0, 0, 0, 8)))[1] == 0x10
    assert driver.packet_fails(TEST_UNIT_READY) == (2, 0x3A, 2)
    assert driver.packet_in(bytes((0x1B, 0, 0, 0, 3))) == b""
    assert driver.packet_fails(TEST_UNIT_READY) == (6, 0x28, 0)
    assert driver.packet_in(read_10(1, 1)) == port.data[BLOCK : 2 * BLOCK]
    driver.packet_in(bytes((0x1E, 0, 0, 0, 1)))
    assert driver.ide.eject(2, force=True)


def test_a_medium_that_goes_in_the_middle() -> None:
    driver, _ = drive(400)
    driver.packet(read_10(0, 400))
    driver.wait()
    driver.ide.eject(2, force=True)
    while driver.wait() & DRQ:
        driver.ide.read_block(driver.base, 2, 1024)
    assert driver.acknowledge() & ERR
    assert driver.sense() == (2, 0x3A, 2)


@pytest.mark.parametrize(
    ("status", "sense"), [(BlockStatus.IO_ERROR, (3, 0x11, 0)), (BlockStatus.OUT_OF_RANGE, (5, 0x21, 0))]
)
def test_a_block_that_cannot_be_read(status: BlockStatus, sense: tuple[int, int, int]) -> None:
    driver, port = drive()
    port.bad, port.bad_status = {8}, status
    assert driver.packet_fails(read_10(2, 1)) == sense
    assert driver.packet_in(read_10(0, 2)) == port.data[: 2 * BLOCK]
    driver.packet(read_10(0, 4))
    driver.wait()
    assert driver.ide.read_block(driver.base, 2, 2 * BLOCK // 2) == port.data[: 2 * BLOCK]
    assert driver.wait() & ERR


def test_no_drive_but_a_cd_takes_media() -> None:
    driver, port = drive()
    for index in (0, 3, 4, -1):
        with pytest.raises(ValueError, match="no CD-ROM drive"):
            driver.ide.insert(index, port)
