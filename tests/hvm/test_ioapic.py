"""The I/O APIC, by register and behaviour."""

import pytest

from nonroot.hvm.ioapic import PINS, IoApic

SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
LEVEL, MASKED, REMOTE_IRR = 1 << 15, 1 << 16, 1 << 14

Message = tuple[int, bool, int, int, bool]


class Bench:
    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.apic = IoApic(lambda *message: self.sent.append(message), identity=1)

    def put(self, index: int, value: int) -> None:
        self.apic.write(SELECT, 4, index)
        self.apic.write(WINDOW, 4, value)

    def get(self, index: int) -> int:
        self.apic.write(SELECT, 4, index)
        return self.apic.read(WINDOW, 4)

    def route(self, pin: int, low: int, destination: int = 0) -> None:
        self.put(0x11 + 2 * pin, destination << 24)
        self.put(0x10 + 2 * pin, low)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_version_has_24_pins_and_an_eoi_register(bench: Bench) -> None:
    assert bench.get(0x01) == 0x0017_0020


def test_identity(bench: Bench) -> None:
    assert bench.get(0x00) == 1 << 24
    bench.put(0x00, 0xFFFF_FFFF)
    assert bench.get(0x00) == 0x0F00_0000
    assert bench.get(0x02) == 0x0F00_0000
    bench.apic.reset()
    assert bench.get(0x00) == 1 << 24


def test_all_pins_are_masked_at_reset(bench: Bench) -> None:
    assert [bench.get(0x10 + 2 * pin) for pin in range(PINS)] == [MASKED] * PINS
    for pin in range(PINS):
        bench.apic.set_line(pin, True)
    assert bench.sent == []


def test_entry_keeps_its_writable_bits(bench: Bench) -> None:
    bench.route(5, 0xFFFF_FFFF, 0xFF)
    assert bench.get(0x10 + 10) == 0x0001_AFFF
    assert bench.get(0x11 + 10) == 0xFF00_0000


@pytest.mark.parametrize("pin", range(PINS))
def test_edge(bench: Bench, pin: int) -> None:
    bench.route(pin, 0x40 + pin, 3)
    bench.apic.set_line(pin, True)
    bench.apic.set_line(pin, True)
    assert bench.sent == [(3, False, 0x40 + pin, 0, False)]
    bench.apic.set_line(pin, False)
    bench.apic.set_line(pin, True)
    assert len(bench.sent) == 2


@pytest.mark.parametrize("mode", range(8))
def test_message_carries_mode_and_destination_mode(bench: Bench, mode: int) -> None:
    bench.route(4, 0x30 | mode << 8 | 1 << 11, 0xF0)
    bench.apic.set_line(4, True)
    assert bench.sent == [(0xF0, True, 0x30, mode, False)]


def test_level_is_sent_once_until_eoi(bench: Bench) -> None:
    bench.route(9, 0x50 | LEVEL)
    bench.apic.set_line(9, True)
    assert len(bench.sent) == 1
    assert bench.get(0x10 + 18) & REMOTE_IRR
    bench.apic.eoi(0x51)
    assert len(bench.sent) == 1
    bench.apic.eoi(0x50)
    assert len(bench.sent) == 2
    bench.apic.set_line(9, False)
    bench.apic.eoi(0x50)
    assert len(bench.sent) == 2
    assert not bench.get(0x10 + 18) & REMOTE_IRR
    assert bench.sent[0] == (0, False, 0x50, 0, True)


def test_eoi_register(bench: Bench) -> None:
    bench.route(9, 0x50 | LEVEL)
    bench.apic.set_line(9, True)
    bench.apic.write(EOI, 4, 0x50)
    assert len(bench.sent) == 2


def test_level_waits_for_unmasking_edge_is_lost(bench: Bench) -> None:
    bench.route(9, 0x50 | LEVEL | MASKED)
    bench.route(4, 0x34 | MASKED)
    bench.apic.set_line(9, True)
    bench.apic.set_line(4, True)
    bench.route(9, 0x50 | LEVEL)
    bench.route(4, 0x34)
    assert [message[2] for message in bench.sent] == [0x50]


def test_switching_to_edge_clears_remote_irr(bench: Bench) -> None:
    bench.route(9, 0x50 | LEVEL)
    bench.apic.set_line(9, True)
    bench.route(9, 0x50 | MASKED)
    assert not bench.get(0x10 + 18) & REMOTE_IRR
    bench.route(9, 0x50 | LEVEL)
    assert len(bench.sent) == 2


def test_reading_remote_irr_is_all_the_guest_can_do(bench: Bench) -> None:
    bench.route(9, 0x50 | LEVEL | REMOTE_IRR | 1 << 12)
    assert bench.get(0x10 + 18) == 0x50 | LEVEL


@pytest.mark.parametrize(("offset", "size"), [(0x20, 4), (0x00, 1), (0x10, 2), (0x04, 4), (0x40, 4)])
def test_other_reads_are_zero(bench: Bench, offset: int, size: int) -> None:
    assert bench.apic.read(offset, size) == 0


@pytest.mark.parametrize("index", [0x03, 0x0F, 0x40, 0xFF])
def test_other_indices_read_as_zero_and_drop_writes(bench: Bench, index: int) -> None:
    before = bench.apic.state()
    bench.put(index, 0xFFFF_FFFF)
    assert bench.get(index) == 0
    assert bench.apic.state().redirection == before.redirection
