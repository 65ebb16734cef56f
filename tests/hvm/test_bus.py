"""Routing of accesses to devices."""

import pytest

from nonroot.hvm.bus import Bus, BusError
from nonroot.hvm.debug_port import DebugPort, DebugPortState
from nonroot.hvm.device import StateRecord


class Recorder:
    """A device that remembers how it was accessed."""

    def __init__(self, name: str = "recorder") -> None:
        self.name = name
        self.seen: list[tuple[object, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("r", offset, size))
        return int.from_bytes(bytes(0x10 + offset + n for n in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("w", offset, size, value))

    def reset(self) -> None:
        self.seen.clear()

    def state(self) -> StateRecord:
        return DebugPortState()

    def from_state(self, state: StateRecord) -> None:
        self.seen.clear()


class BlockRecorder(Recorder):
    def read_block(self, offset: int, size: int, count: int) -> bytes:
        self.seen.append(("R", offset, size, count))
        return bytes(size * count)

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        self.seen.append(("W", offset, size, data))


@pytest.fixture
def bus() -> Bus:
    return Bus("port", 16)


def test_device_sees_its_own_offset(bus: Bus) -> None:
    device = Recorder()
    bus.add(0x3F8, 8, device)
    bus.add(0x100, 2, device, offset=8)
    bus.write(0x3FB, 1, 0x83)
    bus.write(0x101, 1, 0x55)
    assert bus.read(0x3F8, 1) == 0x10
    assert device.seen == [("w", 3, 1, 0x83), ("w", 9, 1, 0x55), ("r", 0, 1)]


def test_floating_bus(bus: Bus) -> None:
    assert bus.read(0x1234, 1) == 0xFF
    assert bus.read(0x1234, 2) == 0xFFFF
    assert bus.read(0x1234, 4) == 0xFFFF_FFFF
    bus.write(0x1234, 4, 0)


def test_floating_accesses_are_counted() -> None:
    events: list[tuple[str, str, int]] = []
    bus = Bus("port", 16, lambda *event: events.append(event))
    bus.read(0xFFFF, 2)
    bus.write(0x80, 1, 0)
    assert events == [("port", "floating-read", 0xFFFF), ("port", "floating-read", 0), ("port", "floating-write", 0x80)]


def test_wide_access_to_a_byte_device_is_split(bus: Bus) -> None:
    device = Recorder()
    bus.add(0x60, 2, device)
    bus.write(0x60, 2, 0xBBAA)
    assert bus.read(0x60, 2) == 0x1110
    assert device.seen == [("w", 0, 1, 0xAA), ("w", 1, 1, 0xBB), ("r", 0, 1), ("r", 1, 1)]


def test_access_across_two_devices_and_a_hole(bus: Bus) -> None:
    one, two = Recorder("one"), Recorder("two")
    bus.add(0x10, 1, one)
    bus.add(0x12, 1, two)
    assert bus.read(0x10, 4) == 0xFF10_FF10
    bus.write(0x10, 4, 0x4433_2211)
    assert one.seen == [("r", 0, 1), ("w", 0, 1, 0x11)]
    assert two.seen == [("r", 0, 1), ("w", 0, 1, 0x33)]


def test_whole_access_where_the_device_takes_it(bus: Bus) -> None:
    device = Recorder()
    bus.add(0x600, 4, device, sizes=(1, 2, 4))
    bus.write(0x600, 4, 0x1234_5678)
    bus.write(0x602, 2, 0x9ABC)
    bus.write(0x603, 2, 0xDDEE)  # leaves the range: split
    assert device.seen == [("w", 0, 4, 0x1234_5678), ("w", 2, 2, 0x9ABC), ("w", 3, 1, 0xEE)]


def test_ranges_that_differ_in_size_may_share_addresses(bus: Bus) -> None:
    """The PCI address register takes doublewords; the reset register is a byte in its middle."""
    pci, reset = Recorder("pci"), Recorder("reset")
    bus.add(0xCF8, 4, pci, sizes=(4,))
    bus.add(0xCF9, 1, reset)
    bus.write(0xCF8, 4, 0x8000_0000)
    bus.write(0xCF9, 1, 6)
    assert pci.seen == [("w", 0, 4, 0x8000_0000)]
    assert reset.seen == [("w", 0, 1, 6)]


@pytest.mark.parametrize(("base", "length"), [(0x3F8, 8), (0x3FF, 1), (0x3F0, 9), (0x3F0, 0x100)])
def test_overlap_is_refused(bus: Bus, base: int, length: int) -> None:
    bus.add(0x3F8, 8, Recorder("uart"))
    with pytest.raises(BusError, match="overlaps uart"):
        bus.add(base, length, Recorder())
    assert len(bus.ranges) == 1


@pytest.mark.parametrize(("base", "length"), [(0, 0), (-1, 4), (0xFFFF, 2), (0x1_0000, 1)])
def test_empty_and_outlying_ranges_are_refused(bus: Bus, base: int, length: int) -> None:
    with pytest.raises(BusError, match="out of bounds"):
        bus.add(base, length, Recorder())


def test_long_ranges_behave_as_short_ones() -> None:
    bus = Bus("mmio", 40)
    device = Recorder()
    bus.add(0xA_0000, 0x2_0000, device, 0x100, sizes=(1, 2))
    bus.write(0xA_0010, 2, 0x1234)
    assert device.seen == [("w", 0x110, 2, 0x1234)]
    assert bus.read(0x9_FFFF, 1) == bus.read(0xC_0000, 1) == 0xFF
    bus.write(0xB_FFFE, 4, 0x1234_5678)
    assert device.seen[1:] == [("w", 0x200FE, 1, 0x78), ("w", 0x200FF, 1, 0x56)]
    assert not bus.is_free(0xB_FFFF, 1)
    assert bus.is_free(0xC_0000, 0x1000)
    with pytest.raises(BusError, match="overlaps"):
        bus.add(0xB_8000, 16, Recorder())
    bus.remove(0xA_0000, 0x2_0000, device)
    assert bus.read(0xA_0010, 1) == 0xFF
    assert bus.ranges == ()


def test_a_removed_range_floats(bus: Bus) -> None:
    device = Recorder()
    bus.add(0xC000, 16, device, sizes=(1, 2, 4))
    bus.remove(0xC000, 16, device)
    assert bus.read(0xC004, 4) == 0xFFFF_FFFF
    assert not bus.reads
    assert not bus.writes
    with pytest.raises(BusError, match="does not exist"):
        bus.remove(0xC000, 16, device)
    bus.add(0xC000, 32, Recorder())


def test_addresses_wrap_at_the_end_of_the_space(bus: Bus) -> None:
    device = Recorder()
    bus.add(0, 1, device)
    assert bus.read(0xFFFF, 2) == 0x10FF


def test_blocks_go_whole_to_devices_that_take_them(bus: Bus) -> None:
    device = BlockRecorder()
    bus.add(0x6E0, 4, device, sizes=(1, 2))
    bus.write_block(0x6E0, 1, b"abc")
    assert bus.read_block(0x6E1, 2, 5) == bytes(10)
    assert device.seen == [("W", 0, 1, b"abc"), ("R", 1, 2, 5)]


def test_blocks_are_single_accesses_elsewhere(bus: Bus) -> None:
    device = Recorder()
    bus.add(0x70, 2, device)
    bus.write_block(0x70, 1, b"\x01\x02")
    assert bus.read_block(0x70, 2, 2) == b"\x10\x11\x10\x11"
    bus.write_block(0x70, 2, b"\x03\x04")
    assert device.seen[:2] == [("w", 0, 1, 1), ("w", 0, 1, 2)]
    assert device.seen[-2:] == [("w", 0, 1, 3), ("w", 1, 1, 4)]
    assert bus.read_block(0x9999, 4, 2) == b"\xff" * 8


def test_real_device_on_the_bus(bus: Bus) -> None:
    sent = bytearray()
    bus.add(0xE9, 1, DebugPort(sent.append), offset=1)
    bus.write_block(0xE9, 1, b"hello")
    assert sent == b"hello"
