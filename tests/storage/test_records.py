"""A record taken in the middle of any command: another controller with the same media finishes it."""

from collections.abc import Callable

import pytest

from nonroot.devices.block import SECTOR, BlockOp
from nonroot.devices.ide_record import Action, IdeState, Phase
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.device import StateError
from tests.storage.parts import DRDY, DSC, ERR, Driver, RamPort, pattern


def machine() -> tuple[Driver, RamPort, RamPort]:
    clock = ManualClock()
    disk, cd = RamPort(clock, pattern(4000 * SECTOR)), RamPort(clock, pattern(400 * 2048, 3), read_only=True)
    return Driver((Disk(disk), None, CdRom(cd), None), clock), disk, cd


def moved(driver: Driver) -> tuple[Driver, RamPort, RamPort]:
    """The same machine elsewhere: media with the same contents, the record restored, memory copied."""
    other, disk, cd = machine()
    disk.data[:] = driver.ide.units[0].drive.port.data  # type: ignore[union-attr]
    other.clock.time_ns = driver.clock.time_ns
    other.memory.data[:] = driver.memory.data
    other.base, other.number = driver.base, driver.number
    record = driver.ide.state().pack()
    other.ide.from_state(IdeState.unpack(record))
    assert other.ide.state().pack() == record
    assert other.levels == driver.levels
    return other, disk, cd


def reading(driver: Driver) -> None:
    driver.select(0)
    driver.command(0x24, lba=9, count=20, wide=True)


def finish_reading(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.pio_in(20 * SECTOR) == disk.data[9 * SECTOR : 29 * SECTOR]


def half_read(driver: Driver) -> None:
    reading(driver)
    driver.wait()
    driver.acknowledge()
    driver.ide.read_block(0, 2, 256 + 100)


def finish_half_read(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    driver.acknowledge()
    data = driver.ide.read_block(0, 2, 156)
    data += driver.pio_in(18 * SECTOR)
    assert data == disk.data[10 * SECTOR + 200 : 29 * SECTOR]


def writing(driver: Driver) -> None:
    driver.select(0)
    driver.command(0x30, lba=9, count=3)
    driver.ide.write_block(0, 2, pattern(700, 9))


def finish_writing(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    driver.ide.write_block(0, 2, pattern(1536, 9)[700:])
    assert driver.wait() == DRDY | DSC
    assert disk.data[9 * SECTOR : 12 * SECTOR] == pattern(1536, 9)


def written(driver: Driver) -> None:
    writing(driver)
    driver.ide.write_block(0, 2, pattern(1536, 9)[700:])


def finish_written(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.wait() == DRDY | DSC
    assert disk.data[9 * SECTOR : 12 * SECTOR] == pattern(1536, 9)


def flushing_after(driver: Driver) -> None:
    driver.select(0)
    driver.no_data(0xEF, features=0x82)
    written(driver)
    driver.pass_time()


def finish_flushing_after(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.wait() == DRDY | DSC
    assert disk.requests[-1].op is BlockOp.FLUSH
    assert disk.flushed[-1][9 * SECTOR : 12 * SECTOR] == pattern(1536, 9)


def flushing(driver: Driver) -> None:
    driver.select(0)
    driver.command(0xEA)


def finish_flushing(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.wait() == DRDY | DSC
    assert len(disk.flushed) == 1


def awaiting_dma(driver: Driver) -> None:
    driver.select(0)
    driver.table([(0x10000, 0x8000), (0x30000, 0x8000)])
    driver.command(0x25, lba=5, count=128, wide=True)


def finish_dma(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    driver.start(to_memory=True)
    finish_dma_under_way(driver, disk, cd)


def dma_under_way(driver: Driver) -> None:
    awaiting_dma(driver)
    driver.start(to_memory=True)


def finish_dma_under_way(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.wait() == DRDY | DSC
    assert driver.bus_master(2) & 7 == 4
    memory = driver.memory.data
    assert memory[0x10000:0x18000] + memory[0x30000:0x38000] == disk.data[5 * SECTOR : 133 * SECTOR]


def dma_stopped_in_the_middle(driver: Driver) -> None:
    """The guest stops the bus master while the data is on its way: what has been read waits."""
    dma_under_way(driver)
    driver.stop()
    driver.pass_time()


def long_dma(driver: Driver) -> None:
    """More is on its way than the buffer holds when the guest stops the bus master."""
    driver.select(0)
    driver.table([(0x10000, 1000), *((0x10000 + 1000 + n * 0x10000, 0) for n in range(26))])
    driver.command(0x25, lba=5, count=3000, wide=True)
    driver.start(to_memory=True)
    driver.stop()
    driver.pass_time()


def finish_long_dma(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    driver.start(to_memory=True)
    assert driver.wait() == DRDY | DSC
    assert driver.memory.data[0x10000 : 0x10000 + 3000 * SECTOR] == disk.data[5 * SECTOR : 3005 * SECTOR]


def dma_write_under_way(driver: Driver) -> None:
    driver.select(0)
    driver.memory.write(0x10000, pattern(0x8000, 8))
    driver.table([(0x10000, 0x8000)])
    driver.command(0xCA, lba=5, count=64)
    driver.start(to_memory=False)


def finish_dma_write(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    driver.memory.data[0x10000:0x18000] = bytes(0x8000)  # the data has been taken already
    assert driver.wait() == DRDY | DSC
    assert disk.data[5 * SECTOR : 69 * SECTOR] == pattern(0x8000, 8)


def verifying(driver: Driver) -> None:
    driver.select(0)
    driver.command(0x42, lba=0, count=3000, wide=True)
    driver.pass_time()


def finish_verifying(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.wait() == DRDY | DSC


def half_a_packet(driver: Driver) -> None:
    driver.select(2)
    for register, value in ((1, 0), (4, 0), (5, 8), (7, 0xA0)):
        driver.write(register, value)
    driver.ide.write_block(driver.base, 2, b"\x28\0\0\0\0\x07")


def finish_packet(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    driver.ide.write_block(driver.base, 2, b"\0\0\x02\0\0\0")
    finish_cd_reading(driver, disk, cd)


def cd_reading(driver: Driver) -> None:
    half_a_packet(driver)
    driver.ide.write_block(driver.base, 2, b"\0\0\x02\0\0\0")


def finish_cd_reading(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    data = b""
    while driver.wait() & 8:
        data += driver.ide.read_block(driver.base, 2, 1024)
    assert data == cd.data[7 * 2048 : 9 * 2048]
    assert not driver.status & ERR


def cd_reply(driver: Driver) -> None:
    driver.select(2)
    driver.packet(bytes((0x12, 0, 0, 0, 36)), limit=16)
    driver.ide.read_block(driver.base, 2, 9)


def finish_cd_reply(driver: Driver, disk: RamPort, cd: RamPort) -> None:
    assert driver.ide.read_block(driver.base, 2, 9)[:5] == b"-ROM "


Step = Callable[[Driver], None]
End = Callable[[Driver, RamPort, RamPort], None]
CASES: list[tuple[Step, End, Phase, Action]] = [
    (reading, finish_reading, Phase.WORK, Action.READ),
    (half_read, finish_half_read, Phase.DATA_IN, Action.READ),
    (writing, finish_writing, Phase.DATA_OUT, Action.WRITE),
    (written, finish_written, Phase.WORK, Action.WRITE),
    (flushing_after, finish_flushing_after, Phase.WORK, Action.WRITE),
    (flushing, finish_flushing, Phase.WORK, Action.FLUSH),
    (awaiting_dma, finish_dma, Phase.DMA, Action.READ_DMA),
    (dma_under_way, finish_dma_under_way, Phase.WORK, Action.READ_DMA),
    (dma_stopped_in_the_middle, finish_dma, Phase.DMA, Action.READ_DMA),
    (long_dma, finish_long_dma, Phase.DMA, Action.READ_DMA),
    (dma_write_under_way, finish_dma_write, Phase.WORK, Action.WRITE_DMA),
    (verifying, finish_verifying, Phase.WORK, Action.VERIFY),
    (half_a_packet, finish_packet, Phase.DATA_OUT, Action.PACKET),
    (cd_reading, finish_cd_reading, Phase.WORK, Action.CD_READ),
    (cd_reply, finish_cd_reply, Phase.DATA_IN, Action.CD_REPLY),
]


@pytest.mark.parametrize("move", [False, True], ids=["here", "elsewhere"])
@pytest.mark.parametrize(("begin", "finish", "phase", "action"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_middle_of_a_command(begin: Step, finish: End, phase: Phase, action: Action, move: bool) -> None:
    driver, disk, cd = machine()
    begin(driver)
    record = driver.ide.state()
    assert (record.phase[driver.number], record.action[driver.number]) == (phase, action)
    if move:
        driver, disk, cd = moved(driver)
    finish(driver, disk, cd)


def test_a_command_of_a_drive_that_is_not_here() -> None:
    driver, _, _ = machine()
    reading(driver)
    record = driver.ide.state()
    clock = ManualClock()
    port = RamPort(clock, bytes(SECTOR))
    for drives in ((None, Disk(port), None, None), (CdRom(port), None, None, None)):
        other = Driver(drives, clock)
        before = other.ide.state()
        with pytest.raises(StateError, match="no command of drive 0"):
            other.ide.from_state(record)
        assert other.ide.state() == before
