"""DMA by the bus master: tables, directions, ends."""

import pytest

from nonroot.devices.block import SECTOR
from nonroot.devices.ide_unit import Disk
from nonroot.hvm.clock import ManualClock
from tests.storage.parts import DRDY, DRQ, DSC, ERR, Driver, RamPort, pattern

ACTIVE, INTERRUPT = 1, 4


def disk(sectors: int = 4000) -> tuple[Driver, RamPort]:
    clock = ManualClock()
    port = RamPort(clock, pattern(sectors * SECTOR))
    driver = Driver((Disk(port), None, None, None), clock)
    driver.select(0)
    return driver, port


@pytest.mark.parametrize(("opcode", "wide"), [(0xC8, False), (0x25, True)])
def test_read_scattered(opcode: int, wide: bool) -> None:
    driver, port = disk()
    driver.table([(0x10000, 512), (0x30002, 1024), (0x20000, 2560)])
    driver.command(opcode, lba=70, count=8, wide=wide)
    assert driver.status & DRQ
    driver.start(to_memory=True)
    assert driver.bus_master(2) & 7 == ACTIVE
    assert driver.wait() == DRDY | DSC
    assert driver.bus_master(2) & 7 == INTERRUPT
    assert driver.acknowledge() == DRDY | DSC
    whole = port.data[70 * SECTOR : 78 * SECTOR]
    memory = driver.memory.data
    assert memory[0x10000:0x10200] + memory[0x30002:0x30402] + memory[0x20000:0x20A00] == whole
    assert memory[0x30402] == memory[0x20A00] == 0
    assert driver.interrupts == [1, 0]
    assert driver.stop() & 7 == INTERRUPT
    driver.ide.write(0x22, 1, INTERRUPT)
    assert driver.bus_master(2) & 7 == 0


@pytest.mark.parametrize(("opcode", "wide"), [(0xCA, False), (0x35, True), (0x3D, True)])
def test_write_gathered(opcode: int, wide: bool) -> None:
    driver, port = disk()
    new = pattern(8 * SECTOR, 77)
    driver.memory.write(0x10000, new[:1000])
    driver.memory.write(0x20000, new[1000:])
    driver.table([(0x10000, 1000), (0x20000, 3096)])
    driver.command(opcode, lba=70, count=8, wide=wide)
    driver.start(to_memory=False)
    assert driver.wait() == DRDY | DSC
    assert driver.stop() & 7 == INTERRUPT
    driver.acknowledge()
    assert port.data == pattern(4000 * SECTOR)[: 70 * SECTOR] + new + pattern(4000 * SECTOR)[78 * SECTOR :]
    assert len(port.flushed) == (opcode == 0x3D)


def test_the_bus_master_may_start_before_the_command() -> None:
    driver, port = disk()
    driver.table([(0x10000, 512)])
    driver.start(to_memory=True)
    driver.command(0xC8, lba=1, count=1)
    driver.wait()
    driver.acknowledge()
    assert driver.memory.data[0x10000:0x10200] == port.data[SECTOR : 2 * SECTOR]


def test_a_transfer_of_several_requests() -> None:
    driver, port = disk()
    for opcode, to_memory in ((0x25, True), (0x35, False)):
        driver.table([(0x10000 + n * 0x10000, 0) for n in range(25)])  # 0 stands for 64 KiB
        driver.command(opcode, lba=3, count=3200, wide=True)
        driver.start(to_memory)
        driver.wait()
        assert driver.stop() & 7 == INTERRUPT
        driver.acknowledge()
        if to_memory:
            assert driver.memory.data[0x10000 : 0x10000 + 3200 * SECTOR] == port.data[3 * SECTOR : 3203 * SECTOR]
            driver.memory.data[0x10000:0x10004] = b"here"
    assert port.data[3 * SECTOR : 3 * SECTOR + 4] == b"here"
    assert len(port.requests) > 8, "reads of 1 MiB and writes of 256 KiB"


def test_a_table_that_is_longer_leaves_the_bus_master_active() -> None:
    driver, _ = disk()
    driver.table([(0x10000, 4096)])
    driver.command(0xC8, lba=0, count=1)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.stop() & 7 == ACTIVE | INTERRUPT
    assert driver.bus_master(2) & ACTIVE == 0
    assert driver.memory.data[0x10200] == 0


@pytest.mark.parametrize("to_memory", [True, False])
def test_a_table_that_is_shorter_stops_it(to_memory: bool) -> None:
    driver, port = disk()
    before = bytes(port.data)
    driver.table([(0x10000, 1024)])
    driver.command(0xC8 if to_memory else 0xCA, lba=0, count=8)
    driver.start(to_memory)
    driver.wait()
    assert driver.bus_master(2) & 7 == 0
    assert not driver.levels[0]
    assert driver.status & DRQ
    assert port.data == before
    # The guest's way out is a reset.
    driver.ide.write(8, 1, 4)
    driver.ide.write(8, 1, 0)
    assert driver.status == DRDY | DSC


def test_the_wrong_direction_moves_nothing() -> None:
    driver, port = disk()
    before = bytes(port.data)
    driver.table([(0x10000, 512)])
    for opcode, to_memory in ((0xCA, True), (0xC8, False)):
        driver.command(opcode, lba=0, count=1)
        driver.start(to_memory)
        assert driver.ide.deadline() is None
        assert driver.status & DRQ
        driver.stop()
    assert port.data == before


def test_without_the_command_registers_bit_nothing_moves() -> None:
    driver, port = disk()
    driver.ide.config_write(4, 2, 1)
    driver.table([(0x10000, 512)])
    driver.command(0xC8, lba=0, count=1)
    driver.start(to_memory=True)
    assert port.requests == []


def test_an_error_interrupts() -> None:
    driver, port = disk()
    port.bad = {5}
    driver.table([(0x10000, 4096)])
    driver.command(0xC8, lba=2, count=8)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.stop() & INTERRUPT
    assert driver.acknowledge() & ERR
    assert driver.error == 0x40
    assert driver.read(3) == 5
    assert driver.memory.data[0x10000:0x10600] == port.data[2 * SECTOR : 5 * SECTOR], "what could be read is there"


def test_memory_that_is_not_there() -> None:
    driver, port = disk()
    driver.table([(0xFFFF_FF00, 512)])
    driver.command(0xC8, lba=0, count=1)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.acknowledge() == DRDY | DSC
    driver.command(0xCA, lba=0, count=1)
    driver.start(to_memory=False)
    driver.wait()
    assert port.data[:SECTOR] == b"\xff" * SECTOR


def test_a_table_in_nowhere_ends() -> None:
    driver, _ = disk()
    driver.ide.write(0x24, 4, 0xFFFF_F000)
    driver.command(0xC8, lba=0, count=256)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.bus_master(2) & 7 == 0, "one entry of all ones, which is the last and too short"


def test_a_table_without_end_wraps_in_its_64_kib() -> None:
    driver, port = disk()
    entry = (0x200000).to_bytes(4, "little") + (2).to_bytes(4, "little")
    driver.memory.write(0x10000, entry * 8192)
    driver.ide.write(0x24, 4, 0x1FFF8)
    driver.command(0x25, lba=0, count=512, wide=True)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.acknowledge() == DRDY | DSC
    assert driver.memory.data[0x200000:0x200002] == port.data[512 * SECTOR - 2 : 512 * SECTOR]


def test_an_entry_that_lies_across_the_wrap() -> None:
    driver, port = disk()
    driver.memory.write(0x1FFFC, (0x200000).to_bytes(4, "little"))
    driver.memory.write(0x10000, (0x8000_0200).to_bytes(4, "little"))
    driver.ide.write(0x24, 4, 0x1FFFC)
    driver.command(0xC8, lba=7, count=1)
    driver.start(to_memory=True)
    driver.wait()
    assert driver.acknowledge() == DRDY | DSC
    assert driver.memory.data[0x200000:0x200200] == port.data[7 * SECTOR : 8 * SECTOR]


def test_registers() -> None:
    driver, _ = disk()
    driver.ide.write(0x24, 4, 0x1234_5677)
    assert driver.ide.read(0x24, 4) == 0x1234_5674
    assert driver.ide.read(0x26, 1) == 0x34
    driver.ide.write(0x22, 1, 0x60)
    assert driver.bus_master(2) == 0x60
    assert driver.ide.read(0x21, 1) == driver.ide.read(0x23, 1) == 0
    driver.ide.write(0x28, 1, 0x08)
    assert (driver.ide.read(0x20, 1), driver.ide.read(0x28, 1)) == (0, 8)
