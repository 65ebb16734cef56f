"""The floppy controller with the DMA controller, as BIOS and Linux use them."""

import pytest

from nonroot.devices.block import SECTOR, BlockStatus
from nonroot.devices.dma8237 import PAGES, Dma8237
from nonroot.devices.floppy import FloppyController
from nonroot.devices.floppy_state import GEOMETRIES, geometry_of
from nonroot.hvm.clock import ManualClock
from tests.storage.parts import FakeMemory, RamPort, pattern

SIZE_1440 = 2880 * SECTOR


class Pc:
    """A controller with its surroundings, and a driver's routines."""

    def __init__(self, size: int = SIZE_1440, read_only: bool = False) -> None:
        self.clock = ManualClock()
        self.memory = FakeMemory()
        self.dma = Dma8237(self.memory)
        self.port = RamPort(self.clock, pattern(size), read_only)
        self.level = False
        self.fdc = FloppyController([self.port, None], self._irq, self.dma, self.clock)
        self.fdc.write(7, 1, geometry_of(size).rate)
        self.fdc.write(2, 1, 0x1C)
        assert self.level
        for drive in range(4):
            assert self.command(0x08) == [0xC0 | drive, 0]
        self.command(0x03, 0xDF, 0x02)

    def _irq(self, level: bool) -> None:
        self.level = level

    def command(self, *values: int) -> list[int]:
        for value in values:
            assert self.fdc.read(4, 1) & 0xC0 == 0x80
            self.fdc.write(5, 1, value)
        for _ in range(200):
            deadline = self.fdc.deadline()
            if self.fdc.read(4, 1) & 0x80 or deadline is None:
                break
            self.clock.time_ns = deadline
            self.fdc.advance(deadline)
        result = []
        while self.fdc.read(4, 1) & 0xD0 == 0xD0:
            result.append(self.fdc.read(5, 1))
        return result

    def seek(self, cylinder: int, head: int = 0) -> None:
        assert self.command(0x0F, head << 2, cylinder) == []
        assert self.level
        assert self.command(0x08) == [0x20 | head << 2, cylinder]
        assert not self.level

    def program(self, mode: int, address: int, size: int) -> None:
        """DMA channel 2."""
        self.dma.write(0x0A, 1, 6)
        self.dma.write(0x0C, 1, 0)
        for register, value in ((4, address), (4, address >> 8), (5, size - 1), (5, size - 1 >> 8)):
            self.dma.write(register, 1, value & 0xFF)
        self.dma.write(PAGES + 1, 1, address >> 16)
        self.dma.write(0x0B, 1, mode | 2)
        self.dma.write(0x0A, 1, 2)

    def read_sectors(
        self, cylinder: int, head: int, sector: int, size: int, eot: int = 18, mt: int = 0x80
    ) -> list[int]:
        self.program(0x44, 0x20000, size)
        return self.command(0x46 | mt, head << 2, cylinder, head, sector, 2, eot, 0x1B, 0xFF)


def place(cylinder: int, head: int, sector: int, sectors: int = 18) -> int:
    return ((cylinder * 2 + head) * sectors + sector - 1) * SECTOR


@pytest.mark.parametrize(
    ("cylinder", "head", "sector", "count"), [(0, 0, 1, 1), (5, 1, 3, 16), (79, 0, 18, 19), (2, 0, 1, 36)]
)
def test_read(cylinder: int, head: int, sector: int, count: int) -> None:
    pc = Pc()
    pc.seek(cylinder, head)
    result = pc.read_sectors(cylinder, head, sector, count * SECTOR)
    assert (result[0] & 0xC0, *result[1:3]) == (0, 0, 0)
    start = place(cylinder, head, sector)
    assert pc.memory.data[0x20000 : 0x20000 + count * SECTOR] == pc.port.data[start : start + count * SECTOR]
    assert not pc.level, "reading the result acknowledges"


def test_result_names_the_next_sector() -> None:
    pc = Pc()
    pc.seek(3)
    assert pc.read_sectors(3, 0, 17, 1024)[3:] == [3, 1, 1, 2]
    assert pc.read_sectors(3, 0, 1, 512)[3:] == [3, 0, 2, 2]
    assert pc.read_sectors(3, 1, 18, 512)[3:] == [4, 0, 1, 2]


def test_the_end_of_the_track_without_terminal_count() -> None:
    pc = Pc()
    assert pc.read_sectors(0, 0, 17, 2048, mt=0)[:3] == [0x40, 0x80, 0]
    assert pc.memory.data[0x20000:0x20400] == pc.port.data[16 * SECTOR : 18 * SECTOR]


def test_write_and_protection() -> None:
    pc = Pc()
    new = pattern(1024, 5)
    pc.memory.write(0x30000, new)
    pc.seek(1)
    pc.program(0x48, 0x30000, 1024)
    assert pc.command(0xC5, 0, 1, 0, 2, 2, 18, 0x1B, 0xFF)[:3] == [0, 0, 0]
    start = place(1, 0, 2)
    assert pc.port.data[start : start + 1024] == new
    assert pc.port.data[start + 1024 : start + 1536] == pattern(SIZE_1440)[start + 1024 : start + 1536]
    protected = Pc(read_only=True)
    protected.program(0x48, 0x30000, 512)
    assert protected.command(0xC5, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF)[:3] == [0x40, 0x02, 0]
    assert protected.command(0x04, 0)[0] & 0x40


def test_format_fills() -> None:
    pc = Pc()
    pc.seek(7, 1)
    pc.program(0x48, 0x30000, 72)
    assert pc.command(0x4D, 4, 2, 18, 0x54, 0xF6)[:3] == [4, 0, 0]
    assert pc.port.data[place(7, 1, 1) : place(8, 0, 1)] == b"\xf6" * 18 * SECTOR
    assert pc.port.data[place(8, 0, 1)] == pattern(SIZE_1440)[place(8, 0, 1)]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda geometry: f"{geometry.size >> 10}K")
def test_formats_answer_at_their_own_data_rate(geometry: object) -> None:
    for known in GEOMETRIES:
        if known is geometry:
            pc = Pc(known.size)
            for rate in range(4):
                pc.fdc.write(7, 1, rate)
                assert (pc.command(0x4A, 0)[0] & 0xC0 == 0) is (rate == known.rate)


def test_images_of_other_sizes() -> None:
    assert geometry_of(100_352) == GEOMETRIES[0]
    assert geometry_of(SIZE_1440 + 512) == GEOMETRIES[1]
    pc = Pc(5 * SECTOR)
    assert pc.read_sectors(0, 0, 4, 1536)[:3] == [0, 0, 0]
    assert pc.memory.data[0x20000:0x20600] == pc.port.data[3 * SECTOR :].ljust(1536, b"\0")


def test_what_cannot_be_read() -> None:
    pc = Pc()
    assert pc.read_sectors(1, 0, 1, 512)[:3] == [0x40, 0x04, 0x10], "the head is elsewhere"
    assert pc.read_sectors(0, 0, 19, 512)[:3] == [0x40, 0x04, 0]
    pc.port.bad = {4}
    assert pc.read_sectors(0, 0, 5, 512)[:3] == [0x40, 0x20, 0x20]
    pc.port.bad_status = BlockStatus.READ_ONLY
    pc.program(0x48, 0x30000, 512)
    assert pc.command(0xC5, 0, 0, 0, 5, 2, 18, 0x1B, 0xFF)[:3] == [0x40, 0x02, 0]
    pc.dma.write(0x0F, 1, 0x0F)
    assert pc.command(0xE6, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF)[:3] == [0x40, 0x10, 0]
    assert pc.command(0x4A, 1)[:2] == [0x41, 0x01], "the other drive is empty"


def test_disk_change_line() -> None:
    pc = Pc()
    pc.fdc.write(2, 1, 0x1C)
    assert pc.fdc.read(7, 1) & 0x80
    pc.seek(1)
    assert not pc.fdc.read(7, 1) & 0x80
    pc.fdc.insert(0, None)
    pc.seek(0)
    assert pc.fdc.read(7, 1) & 0x80, "no step clears it while there is no medium"
    pc.fdc.insert(0, pc.port)
    pc.seek(1)
    assert not pc.fdc.read(7, 1) & 0x80
    with pytest.raises(ValueError, match="no floppy drive"):
        pc.fdc.insert(2, None)


def test_small_commands() -> None:
    pc = Pc()
    assert pc.command(0x10) == [0x90]
    assert pc.command(0x18) == [0x41]
    assert pc.command(0x13, 0, 0x57, 0) == []
    assert pc.command(0x94) == [0x10]
    dump = pc.command(0x0E)
    assert (len(dump), dump[4:6], dump[6], dump[7] >> 7, dump[8]) == (10, [0xDF, 0x02], 18, 1, 0x57)
    pc.fdc.write(2, 1, 0x18)
    pc.fdc.write(2, 1, 0x1C)
    assert pc.command(0x0E)[8] == 0x57, "locked settings outlive a reset"
    for _ in range(4):
        pc.command(0x08)
    assert pc.command(0x08) == [0x80], "nothing to sense"
    assert pc.command(0x01) == [0x80]
    assert pc.command(0x07, 0) == []
    assert pc.command(0x08) == [0x20, 0]
    assert pc.command(0x07, 3) == []
    assert pc.command(0x08)[0] & 0x50 == 0x50, "no such drive"


def test_implied_seek_and_verify() -> None:
    pc = Pc()
    pc.command(0x13, 0, 0x40, 0)
    assert pc.read_sectors(9, 0, 1, 512)[:3] == [0, 0, 0]
    assert pc.memory.data[0x20000:0x20200] == pc.port.data[place(9, 0, 1) : place(9, 0, 2)]
    assert pc.command(0x56, 0, 10, 0, 1, 2, 18, 0x1B, 0xFF)[:3] == [0, 0, 0]


def test_a_reset_in_the_middle() -> None:
    pc = Pc()
    pc.program(0x44, 0x20000, 512)
    for value in (0xE6, 0, 0, 0, 1, 2, 18, 0x1B, 0xFF):
        pc.fdc.write(5, 1, value)
    assert pc.fdc.read(4, 1) == 0x10
    pc.fdc.write(2, 1, 0x18)
    pc.fdc.write(2, 1, 0x1C)
    pc.clock.time_ns = 10**9
    pc.fdc.advance(10**9)
    assert pc.fdc.read(4, 1) == 0x80
    assert pc.memory.data[0x20000] == 0


# ── the 8237 by itself ──


def test_dma_registers_and_wrap() -> None:
    pc = Pc()
    dma = pc.dma
    pc.program(0x54, 0x1FFF0, 0x20)  # automatic
    assert dma.ready(2, True) == 0x20
    assert dma.ready(2, False) == 0
    assert dma.to_memory(2, b"a" * 0x18) == (0x18, False)
    assert pc.memory.data[0x1FFF0:0x20000] == b"a" * 16
    assert pc.memory.data[0x10000:0x10008] == b"a" * 8, "the address wraps in its 64 KiB"
    dma.write(0x0C, 1, 0)
    assert dma.read(4, 1) | dma.read(4, 1) << 8 == 0x0008
    assert dma.read(5, 1) | dma.read(5, 1) << 8 == 7
    assert dma.to_memory(2, b"b" * 0x18) == (8, True)
    assert dma.read(8, 1) == 0x04
    assert dma.read(8, 1) == 0
    assert dma.ready(2, True) == 0x20, "it starts again by itself"


def test_dma_downwards_masks_and_reset() -> None:
    pc = Pc()
    dma = pc.dma
    pc.program(0x64, 0x20010, 4)
    assert dma.to_memory(2, b"abcd") == (4, True)
    assert pc.memory.data[0x2000D:0x20011] == b"dcba"
    assert dma.ready(2, True) == 0, "masked after its end"
    pc.program(0x68, 0x20010, 4)
    assert dma.from_memory(2, 10) == (b"abcd", True)
    pc.program(0x44, 0x20000, 4)
    dma.write(0x0D, 1, 0)
    assert dma.ready(2, True) == 0
    dma.write(0x0E, 1, 0)
    assert dma.ready(2, True) == 4
    dma.write(0x08, 1, 4)
    assert dma.ready(2, True) == 0
    dma.write(0x30, 1, 0x12)
    dma.write(PAGES + 15, 1, 0x55)
    assert dma.read(PAGES + 15, 1) == 0x55
