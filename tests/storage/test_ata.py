"""Commands of the ATA disk, as a driver gives them."""

import pytest

from nonroot.devices.block import SECTOR, BlockOp, BlockStatus
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.hvm.clock import ManualClock
from tests.storage.parts import BSY, DF, DRDY, DRQ, DSC, ERR, Driver, RamPort, pattern

ABRT, IDNF, UNC = 0x04, 0x10, 0x40


def disk(sectors: int = 2000, read_only: bool = False) -> tuple[Driver, RamPort]:
    clock = ManualClock()
    port = RamPort(clock, pattern(sectors * SECTOR), read_only)
    driver = Driver((Disk(port, "SERIAL", "MODEL"), None, None, None), clock)
    driver.select(0)
    return driver, port


def test_signature_and_identify() -> None:
    driver, _ = disk()
    assert driver.status == DRDY | DSC
    assert [driver.read(register) for register in (1, 2, 3, 4, 5)] == [1, 1, 1, 0, 0]
    driver.command(0xEC)
    data = driver.pio_in(512)
    words = [int.from_bytes(data[i : i + 2], "little") for i in range(0, 512, 2)]
    assert sum(data) & 0xFF == 0
    assert b"".join(word.to_bytes(2, "big") for word in words[27:47]).strip() == b"MODEL"
    assert b"".join(word.to_bytes(2, "big") for word in words[10:20]).strip() == b"SERIAL"
    assert words[60] | words[61] << 16 == 2000
    assert words[100] | words[101] << 16 == 2000
    assert words[83] & 1 << 10
    assert words[83] & 1 << 13
    assert words[82] & 1 == 0, "there is no SMART"
    assert words[49] & 0x300 == 0x300
    assert words[1] * words[3] * words[6] <= 2000


@pytest.mark.parametrize(("opcode", "wide"), [(0x20, False), (0x21, False), (0x24, True)])
@pytest.mark.parametrize("count", [1, 3, 255])
def test_read_sectors(opcode: int, wide: bool, count: int) -> None:
    driver, port = disk()
    driver.command(opcode, lba=17, count=count, wide=wide)
    assert driver.status & BSY
    assert driver.pio_in(count * SECTOR) == port.data[17 * SECTOR : (17 + count) * SECTOR]
    assert driver.status == DRDY | DSC
    assert driver.interrupts == [count, 0]


def test_a_count_of_zero_is_the_most() -> None:
    driver, port = disk(70_000)
    driver.command(0x20, lba=5, count=0)
    assert driver.pio_in(256 * SECTOR) == port.data[5 * SECTOR : 261 * SECTOR]
    driver.no_data(0xC6, count=16)
    driver.command(0x29, lba=1, count=0, wide=True)
    assert driver.pio_in(65536 * SECTOR, 16 * SECTOR) == port.data[SECTOR : 65537 * SECTOR]
    assert driver.status == DRDY | DSC


def test_cylinder_head_sector() -> None:
    driver, port = disk()
    driver.write(6, 0x02)  # head 2
    for register, value in ((2, 1), (3, 5), (4, 1), (5, 0)):  # sector 5, cylinder 1
        driver.write(register, value)
    driver.write(7, 0x20)
    place = (1 * 16 + 2) * 63 + 4
    assert driver.pio_in(SECTOR) == port.data[place * SECTOR : (place + 1) * SECTOR]
    for sector, head in ((0, 0), (64, 0)):
        driver.write(6, head)
        driver.write(3, sector)
        driver.write(2, 1)
        driver.write(7, 0x20)
        assert driver.acknowledge() & ERR
        assert driver.error == IDNF
    # Another translation: 4 heads, 10 sectors.
    driver.write(6, 3)
    driver.write(2, 10)
    driver.write(7, 0x91)
    assert driver.acknowledge() == DRDY | DSC
    driver.write(6, 3)
    for register, value in ((2, 1), (3, 10), (4, 2), (5, 0)):
        driver.write(register, value)
    driver.write(7, 0x20)
    place = (2 * 4 + 3) * 10 + 9
    assert driver.pio_in(SECTOR) == port.data[place * SECTOR : (place + 1) * SECTOR]


@pytest.mark.parametrize(("opcode", "wide"), [(0x30, False), (0x34, True)])
@pytest.mark.parametrize("count", [1, 2, 600])
def test_write_sectors(opcode: int, wide: bool, count: int) -> None:
    if count > 255 and not wide:
        count = 200
    driver, port = disk()
    before = bytes(port.data)
    new = pattern(count * SECTOR, 99)
    driver.command(opcode, lba=33, count=count, wide=wide)
    assert driver.status & DRQ
    assert not driver.levels[0]
    assert driver.pio_out(new) == DRDY | DSC
    assert port.data == before[: 33 * SECTOR] + new + before[(33 + count) * SECTOR :]
    assert driver.interrupts[0] == count


def test_multiple() -> None:
    driver, port = disk()
    driver.command(0xC4, lba=0, count=4)
    assert driver.acknowledge() & ERR, "READ MULTIPLE before SET MULTIPLE"
    assert driver.error == ABRT
    for count, good in ((3, False), (32, False), (8, True)):
        assert bool(driver.no_data(0xC6, count=count) & ERR) is not good
    driver.command(0xC4, lba=10, count=20)
    assert driver.pio_in(20 * SECTOR, 8 * SECTOR) == port.data[10 * SECTOR : 30 * SECTOR]
    before = driver.interrupts[0]
    new = pattern(20 * SECTOR, 5)
    driver.command(0x39, lba=100, count=20, wide=True)
    assert driver.pio_out(new, 8 * SECTOR) == DRDY | DSC
    assert driver.interrupts[0] == before + 3
    assert port.data[100 * SECTOR : 120 * SECTOR] == new


@pytest.mark.parametrize("opcode", [0x20, 0x24, 0x25, 0x30, 0x34, 0x35, 0x40, 0x42, 0xC8, 0xCA])
@pytest.mark.parametrize(("lba", "count"), [(2000, 1), (1999, 2), (0xFFF_FFFF, 1)])
def test_beyond_the_end(opcode: int, lba: int, count: int) -> None:
    driver, port = disk()
    driver.command(opcode, lba=lba, count=count, wide=opcode in (0x24, 0x25, 0x34, 0x35, 0x42))
    assert driver.acknowledge() == DRDY | DSC | ERR
    assert driver.error == IDNF
    assert port.requests == []


@pytest.mark.parametrize("opcode", [0x00, 0x0A, 0x22, 0x50, 0xA0, 0xA1, 0xB0, 0xB1, 0xF1, 0xF9, 0xFF])
def test_what_is_not_there_is_refused(opcode: int) -> None:
    driver, _ = disk()
    driver.command(opcode, lba=0xC24F00, count=1, features=0xD8)  # SMART ENABLE, where it is B0
    assert driver.acknowledge() == DRDY | DSC | ERR
    assert driver.error == ABRT
    driver.command(0xEC)
    assert len(driver.pio_in(512)) == 512


def test_flush_reaches_the_medium_after_the_writes() -> None:
    driver, port = disk()
    for opcode in (0xE7, 0xEA):
        driver.command(0x30, lba=1, count=1)
        driver.pio_out(bytes((opcode,)) * SECTOR)
        assert driver.no_data(opcode) == DRDY | DSC
        assert port.flushed.pop()[SECTOR : 2 * SECTOR] == bytes((opcode,)) * SECTOR


def test_without_a_write_cache_every_write_is_flushed() -> None:
    driver, port = disk()
    assert driver.no_data(0xEF, features=0x82) == DRDY | DSC
    assert len(port.flushed) == 1
    driver.command(0x30, lba=1, count=2)
    driver.pio_out(b"w" * 1024)
    assert len(port.flushed) == 2
    driver.no_data(0xEF, features=0x02)
    driver.command(0x30, lba=1, count=1)
    driver.pio_out(b"x" * 512)
    assert len(port.flushed) == 2
    driver.command(0xCE, lba=1, count=1, wide=True)
    assert driver.wait() & ERR, "WRITE MULTIPLE FUA EXT needs SET MULTIPLE"


def test_transfer_modes() -> None:
    driver, _ = disk()
    for mode, good in ((0x00, True), (0x0C, True), (0x22, True), (0x21, True), (0x45, False), (0x0F, False)):
        assert bool(driver.no_data(0xEF, features=3, count=mode) & ERR) is not good
    driver.command(0xEC)
    assert driver.pio_in(512)[126:128] == b"\x07\x02"


def test_a_read_error_names_its_sector_after_the_good_ones() -> None:
    driver, port = disk()
    port.bad = {25}
    driver.command(0x20, lba=20, count=10)
    assert driver.pio_in(5 * SECTOR) == port.data[20 * SECTOR : 25 * SECTOR]
    status = driver.wait()
    assert status & ERR
    assert not status & DRQ
    assert driver.error == UNC
    assert driver.read(3) == 25
    assert driver.acknowledge() & ERR


@pytest.mark.parametrize("status", list(BlockStatus)[1:])
def test_a_write_error_is_a_device_fault(status: BlockStatus) -> None:
    driver, port = disk()
    port.bad, port.bad_status = {50}, status
    driver.command(0x34, lba=50, count=1, wide=True)
    driver.ide.write_block(0, 2, bytes(SECTOR))
    assert driver.wait() & (ERR | DF) == (ERR if status is BlockStatus.READ_ONLY else ERR | DF)
    assert driver.error == ABRT
    port.bad = set()
    driver.command(0x20, lba=50, count=1)
    assert driver.pio_in(SECTOR) == pattern(51 * SECTOR)[50 * SECTOR :]


def test_a_protected_disk_takes_no_writes() -> None:
    driver, port = disk(read_only=True)
    for opcode in (0x30, 0x34, 0xCA, 0x35):
        driver.command(opcode, count=1, wide=opcode in (0x34, 0x35))
        assert driver.acknowledge() & ERR
        assert driver.error == ABRT
    assert port.requests == []


def test_verify_reads() -> None:
    driver, port = disk(3000)
    assert driver.no_data(0x40, lba=3, count=200) == DRDY | DSC
    assert [request.op for request in port.requests] == [BlockOp.READ]
    port.bad = {2500}
    driver.command(0x42, lba=0, count=2999, wide=True)
    driver.wait()
    assert driver.acknowledge() & ERR
    assert driver.error == UNC
    driver.ide.write(8, 1, 0x80)
    high = driver.read(3), driver.read(4)
    driver.ide.write(8, 1, 0)
    assert (driver.read(3) | driver.read(4) << 8, high) == (2500, (0, 0))


def test_power_and_seek() -> None:
    driver, _ = disk()
    for opcode in (0xE0, 0xE1, 0xE2, 0xE3, 0xE6, 0x10, 0x1F, 0x70):
        assert driver.no_data(opcode) == DRDY | DSC
    driver.no_data(0xE5)
    assert driver.read(2) == 0xFF
    driver.no_data(0xF8)
    assert driver.read(3) | driver.read(4) << 8 == 1999


def test_high_order_bytes() -> None:
    driver, _ = disk()
    driver.write(3, 0x12)
    driver.write(3, 0x34)
    assert driver.read(3) == 0x34
    driver.ide.write(8, 1, 0x80)
    assert driver.read(3) == 0x12
    driver.write(2, 1)  # any write to the block ends it
    assert driver.read(3) == 0x34


def test_software_reset() -> None:
    driver, _ = disk()
    driver.no_data(0xC6, count=8)
    driver.command(0x20, lba=0, count=100)
    driver.ide.write(8, 1, 4)
    assert driver.status == BSY
    driver.ide.write(8, 1, 0)
    assert driver.status == DRDY | DSC
    assert [driver.read(register) for register in (1, 2, 3, 4, 5)] == [1, 1, 1, 0, 0]
    driver.pass_time()  # the read that was on its way ends unseen
    assert driver.status == DRDY | DSC
    assert not driver.levels[0]
    driver.command(0xC4, count=8)
    assert driver.acknowledge() & ERR


def test_interrupts_can_be_switched_off() -> None:
    driver, _ = disk()
    driver.ide.write(8, 1, 2)
    driver.command(0x20, lba=0, count=1)
    driver.wait()
    assert driver.interrupts == [0, 0]
    driver.ide.write(8, 1, 0)
    assert driver.levels[0], "the pending interrupt shows when it is allowed"
    assert driver.read(7) & DRQ
    assert not driver.levels[0]


def test_two_disks_and_an_absent_one() -> None:
    clock = ManualClock()
    ports = [RamPort(clock, pattern(100 * SECTOR, seed)) for seed in (1, 2)]
    driver = Driver((Disk(ports[0]), Disk(ports[1]), CdRom(), None), clock)
    for unit in (1, 0, 1):
        driver.select(unit)
        driver.command(0x20, lba=9, count=1)
        assert driver.pio_in(SECTOR) == ports[unit].data[9 * SECTOR : 10 * SECTOR]
    driver.select(3)
    assert [driver.read(register) for register in range(1, 8)] == [0] * 7
    driver.write(7, 0xEC)
    assert driver.status == 0
    assert driver.interrupts[1] == 0
    empty = Driver((Disk(ports[0]), None, None, None), clock)
    empty.select(2)
    assert empty.read(7) == 0x7F


def test_diagnostic_is_for_both() -> None:
    driver, _ = disk()
    driver.write(7, 0x90)
    assert driver.acknowledge() == DRDY | DSC
    assert driver.error == 1


def test_nothing_is_decoded_before_firmware_says_so() -> None:
    driver, _ = disk()
    driver.ide.reset()
    assert driver.read(7) == 0xFF
    driver.ide.write(0, 2, 0x1234)
    driver.ide.config_write(4, 2, 5)
    assert driver.read(7) == DRDY | DSC
    driver.ide.config_write(0x42, 2, 0)
    assert driver.ide.read(0x17, 1) == 0xFF, "a channel can be switched off by itself"
    driver.ide.config_write(0x40, 2, 0)
    assert driver.read(7) == 0xFF


def test_data_beyond_the_block_floats() -> None:
    driver, port = disk()
    driver.command(0x20, lba=0, count=1)
    driver.wait()
    assert driver.ide.read_block(0, 4, 200) == port.data[:512] + b"\xff" * 288
    assert driver.ide.read(0, 2) == 0xFFFF
    driver.ide.write(0, 2, 0)
    assert ("ide", "data-not-wanted", 2) in driver.events
