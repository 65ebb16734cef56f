"""PCI devices on a board: configuration space, windows that follow the BARs, interrupt lines."""

from typing import Any

import pytest

from nonroot.devices.pci_device import Bar, BarKind, PciConnection, PciDevice, PciIdentity
from nonroot.hvm.bus import Bus
from nonroot.hvm.decode import WindowDecoder
from nonroot.hvm.device import StateError, StateRecord
from nonroot.hvm.irq import InterruptRouter, pci_gsi
from nonroot.hvm.pirq import PciInterrupts, pirq_link
from tests.hvm.makers import FakeRam

HOLE = 0x1000_0000
PORT_BAR, MEMORY_BAR, RAM_BAR = 0x10, 0x14, 0x18
COMMAND = 0x04


class Card(PciDevice):
    """Three kinds of BAR; remembers the accesses."""

    def __init__(self, name: str, connection: PciConnection, ram: Any = None) -> None:
        self.seen: list[tuple[str, int, int]] = []
        bars = [Bar(0, BarKind.IO, 32, offset=0x100), Bar(1, BarKind.MEMORY, 0x2000, offset=0x1000)]
        if ram is not None:
            bars.append(Bar(2, BarKind.RAM, 0x10_0000, ram=ram, prefetchable=True))
        super().__init__(name, PciIdentity(0x1234, 0x5678, 0x03_00_00, 7, 1), bars, connection)

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("r", offset, size))
        return 0x55

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("w", offset, size))

    def state(self) -> StateRecord:
        raise AssertionError("not asked for here")

    def from_state(self, state: StateRecord) -> None:
        raise AssertionError("not asked for here")


class Slots:
    """Two cards on a board's buses."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, int]] = []
        self.ports, self.mmio = Bus("port", 16), Bus("mmio", 52)
        self.windows = WindowDecoder(self.ports, self.mmio, HOLE, lambda *event: self.events.append(event))
        self.ram = FakeRam(bytearray(0x10_0000))
        self.lines: dict[str, bool] = {}
        self.cards = [self._add("one", 8, self.ram), self._add("two", 16, None)]

    def _add(self, name: str, key: int, ram: FakeRam | None) -> Card:
        connection = PciConnection(
            lambda level: self.lines.__setitem__(name, level),
            decode=lambda regions: self.windows.decode(key, regions),
        )
        card = Card(name, connection, ram)
        self.windows.own(key, card)
        return card


@pytest.fixture
def slots() -> Slots:
    return Slots()


def test_header(slots: Slots) -> None:
    card = slots.cards[0]
    assert card.config_read(0x00, 4) == 0x5678_1234
    assert card.config_read(0x08, 4) == 0x0300_0007
    assert card.config_read(0x3D, 1) == 1
    card.config_write(0x00, 4, 0)
    card.config_write(0x3D, 1, 9)
    assert card.config_read(0x00, 4) == 0x5678_1234
    assert card.config_read(0x3D, 1) == 1


@pytest.mark.parametrize(
    ("register", "sized"), [(PORT_BAR, 0xFFFF_FFE1), (MEMORY_BAR, 0xFFFF_E000), (RAM_BAR, 0xFFF0_0008), (0x1C, 0)]
)
def test_sizing(slots: Slots, register: int, sized: int) -> None:
    card = slots.cards[0]
    card.config_write(register, 4, 0xFFFF_FFFF)
    assert card.config_read(register, 4) == sized
    assert slots.windows.active == ()


def test_windows_follow_the_bars(slots: Slots) -> None:
    card = slots.cards[0]
    card.config_write(PORT_BAR, 4, 0xC000)
    card.config_write(MEMORY_BAR, 4, 0xF000_0000)
    card.config_write(RAM_BAR, 4, 0xE000_0000)
    assert slots.ports.read(0xC004, 1) == 0xFF
    card.config_write(COMMAND, 2, 0b111)
    assert slots.ports.read(0xC004, 1) == 0x55
    slots.mmio.write(0xF000_1FFC, 4, 1)
    assert card.seen == [("r", 0x104, 1), ("w", 0x2FFC, 4)]
    assert slots.ram.shown == [(0xE000_0000, 0, 0x10_0000)]
    card.config_write(PORT_BAR, 4, 0xD000)
    assert slots.ports.read(0xC004, 1) == 0xFF
    assert slots.ports.read(0xD004, 1) == 0x55
    card.config_write(COMMAND, 2, 0)
    assert slots.ports.read(0xD004, 1) == 0xFF
    assert slots.mmio.read(0xF000_0000, 4) == 0xFFFF_FFFF
    assert slots.ram.shown == []


@pytest.mark.parametrize("base", [0, 0x0800_0000, HOLE - 0x2000, 0xFEC0_0000, 0xFEE0_0000, 0xFFFF_E000])
def test_memory_outside_the_hole_is_not_decoded(slots: Slots, base: int) -> None:
    card = slots.cards[0]
    card.config_write(MEMORY_BAR, 4, base)
    card.config_write(COMMAND, 2, 0b10)
    assert slots.windows.active == ()


def test_colliding_windows_wait(slots: Slots) -> None:
    one, two = slots.cards
    for card in slots.cards:
        card.config_write(PORT_BAR, 4, 0xC000)
        card.config_write(COMMAND, 2, 1)
    slots.ports.read(0xC000, 1)
    assert (len(one.seen), len(two.seen)) == (1, 0)
    assert ("two", "window-collides", 0xC000) in slots.events
    one.config_write(PORT_BAR, 4, 0xC100)
    slots.ports.read(0xC000, 1)
    assert len(two.seen) == 1


def test_fixed_ports_are_not_taken(slots: Slots) -> None:
    one, two = slots.cards
    slots.ports.add(0x3F8, 8, two)
    one.config_write(PORT_BAR, 4, 0x3E0)
    one.config_write(COMMAND, 2, 1)
    assert slots.windows.active == ()


def test_reset_closes_everything(slots: Slots) -> None:
    card = slots.cards[0]
    card.config_write(RAM_BAR, 4, 0xE000_0000)
    card.config_write(COMMAND, 2, 0b110)
    card.connection.irq(True)
    mastering = card.bus_master
    card.reset()
    assert slots.windows.active == ()
    assert (mastering, card.bus_master) == (True, False)
    assert slots.lines["one"] is False


def test_a_loaded_configuration_is_decoded_and_checked(slots: Slots) -> None:
    one, two = slots.cards
    one.config_write(PORT_BAR, 4, 0xC000)
    one.config_write(COMMAND, 2, 1)
    record = bytes(one.data)
    one.reset()
    one.load_config(record)
    assert slots.ports.read(0xC000, 1) == 0x55
    for bad in (record[:-1], b"\0" + record[1:], record[:0x10] + b"\3" + record[0x11:]):
        with pytest.raises(StateError):
            one.load_config(bad)
    assert bytes(one.data) == record
    assert two.base(0) == 0


def test_dma_needs_bus_mastering() -> None:
    written = []

    class Memory:
        def read(self, address: int, length: int) -> bytes:
            return b"m" * length

        def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
            written.append((address, bytes(data)))

        def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
            return 0

    card = Card("card", PciConnection(dma=Memory()))
    card.dma_write(0x1000, b"lost")
    assert card.dma_read(0, 3) == b"\xff\xff\xff"
    card.config_write(COMMAND, 2, 0b100)
    card.dma_write(0x1000, b"kept")
    assert card.dma_read(0, 3) == b"mmm"
    assert written == [(0x1000, b"kept")]


@pytest.mark.parametrize(
    "bar",
    [
        Bar(6, BarKind.IO, 32),
        Bar(0, BarKind.IO, 2),
        Bar(0, BarKind.MEMORY, 24),
        Bar(0, BarKind.RAM, 4096),
        Bar(0, BarKind.RAM, 8192, ram=FakeRam(bytearray(4096))),
        Bar(0, BarKind.MEMORY, 4096, ram=FakeRam(bytearray(4096))),
    ],
)
def test_impossible_bars_are_refused(bar: Bar) -> None:
    with pytest.raises(ValueError, match="BAR"):
        PciDevice("bad", PciIdentity(1, 1, 0), [bar])


# ── interrupts ──


class Controllers:
    """Levels of the inputs of PIC and I/O APIC."""

    def __init__(self) -> None:
        self.pic: dict[int, bool] = {}
        self.ioapic: dict[int, bool] = {}
        router = InterruptRouter(self.pic.__setitem__, self.ioapic.__setitem__)
        self.interrupts = PciInterrupts(router)

    def high(self) -> tuple[list[int], list[int]]:
        return [n for n, level in self.pic.items() if level], [n for n, level in self.ioapic.items() if level]


def test_an_interrupt_reaches_both_controllers() -> None:
    board = Controllers()
    line = board.interrupts.source(3, 0)
    assert pirq_link(3, 0) == 2
    line(True)
    assert board.high() == ([], [pci_gsi(3, 0)])
    board.interrupts.route(2, 11)
    assert board.high() == ([11], [19, 11])
    line(False)
    assert board.high() == ([], [])


def test_routes_can_move_while_a_line_is_high() -> None:
    board = Controllers()
    board.interrupts.route(0, 10)
    line, other = board.interrupts.source(1, 0), board.interrupts.source(5, 0)
    line(True)
    other(True)
    board.interrupts.route(0, 5)
    assert board.high()[0] == [5]
    line(False)
    assert board.high()[0] == [5]
    board.interrupts.route(0, 0x80)
    assert board.high() == ([], [17])
    other(False)
    assert board.high() == ([], [])


@pytest.mark.parametrize("register", [0, 1, 2, 8, 13, 0x80, 0x8A])
def test_reserved_routes_are_off(register: int) -> None:
    board = Controllers()
    board.interrupts.route(0, register)
    board.interrupts.source(1, 0)(True)
    assert board.high()[0] == []
