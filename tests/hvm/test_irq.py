"""Routing of interrupt lines, and delivery to local APICs."""

import pytest

from nonroot.hvm.irq import InterruptDelivery, InterruptRouter, WiredOr, pci_gsi


class Apic:
    def __init__(self, identity: int) -> None:
        self.identity = identity
        self.got: list[tuple[int, int, bool]] = []

    def lapic_matches(self, destination: int, logical: bool) -> bool:
        return bool(destination & self.identity) if logical else destination in (self.identity, 0xFF)

    def signal(self, vector: int, mode: int, level: bool) -> None:
        self.got.append((vector, mode, level))


class Lines:
    def __init__(self) -> None:
        self.pic: list[tuple[int, bool]] = []
        self.ioapic: list[tuple[int, bool]] = []
        self.router = InterruptRouter(lambda *a: self.pic.append(a), lambda *a: self.ioapic.append(a))


@pytest.mark.parametrize("irq", [n for n in range(16) if n != 2])
def test_isa_interrupts_reach_both_controllers(irq: int) -> None:
    lines = Lines()
    lines.router.isa(irq)(True)
    assert lines.pic == [(irq, True)]
    assert lines.ioapic == [(irq or 2, True)]


@pytest.mark.parametrize("gsi", range(16, 24))
def test_higher_gsis_reach_the_ioapic_only(gsi: int) -> None:
    lines = Lines()
    drive = lines.router.gsi(gsi)
    drive(True)
    drive(False)
    assert (lines.pic, lines.ioapic) == ([], [(gsi, True), (gsi, False)])


@pytest.mark.parametrize("irq", [-1, 2, 16])
def test_no_such_isa_interrupt(irq: int) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Lines().router.isa(irq)


@pytest.mark.parametrize("gsi", [-1, 24])
def test_no_such_gsi(gsi: int) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Lines().router.gsi(gsi)


def test_shared_line_is_asserted_while_anyone_asserts_it() -> None:
    seen: list[bool] = []
    line = WiredOr([seen.append])
    one, two = line.source(), line.source()
    one(True)
    two(True)
    one(True)
    one(False)
    assert (seen, line.level) == ([True], True)
    two(False)
    two(False)
    assert (seen, line.level) == ([True, False], False)


def test_two_uarts_share_an_isa_interrupt() -> None:
    lines = Lines()
    one, two = lines.router.isa(4), lines.router.isa(4)
    one(True)
    two(True)
    one(False)
    assert lines.pic == [(4, True)]


def test_delivery_reaches_every_match() -> None:
    apics = [Apic(1), Apic(2), Apic(4)]
    deliver = InterruptDelivery(apics)
    deliver(3, True, 0x40, 0, False)
    deliver(4, False, 0x41, 0, True)
    deliver(0x10, False, 0x42, 0, False)  # nobody
    assert [a.got for a in apics] == [[(0x40, 0, False)], [(0x40, 0, False)], [(0x41, 0, True)]]


def test_lowest_priority_reaches_one() -> None:
    apics = [Apic(1), Apic(2)]
    InterruptDelivery(apics)(3, True, 0x40, 1, False)
    assert [len(a.got) for a in apics] == [1, 0]


def test_pci_interrupts_spread_over_four_gsis() -> None:
    assert {pci_gsi(slot, pin) for slot in range(32) for pin in range(4)} == {16, 17, 18, 19}
    assert pci_gsi(3, 0) == pci_gsi(2, 1)
