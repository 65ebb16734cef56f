"""Interrupt routing: global system interrupts to the PIC pair and the I/O APIC, and messages to local APICs.

GSI n is I/O APIC input n. ISA interrupt n is GSI n, except the timer: ISA 0 is GSI 2 (the MADT says so).
"""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

from nonroot.hvm.device import NO_EVENTS, Clock, Events, IrqLine
from nonroot.hvm.ioapic import PINS, IoApic
from nonroot.hvm.pic import PicPair
from nonroot.hvm.pit import Pit

__all__ = [
    "ISA_TIMER_GSI",
    "SCI",
    "InterruptDelivery",
    "InterruptRouter",
    "LocalApic",
    "WiredOr",
    "create_pit",
    "pci_gsi",
]

ISA_TIMER_GSI: Final = 2
"""The I/O APIC input of ISA interrupt 0."""
SCI: Final = 9
"""The ACPI system control interrupt: ISA and GSI number, level-triggered."""
PCI_FIRST_GSI: Final = 16

LOWEST_PRIORITY: Final = 1
MESSAGE_ADDRESS: Final = 0xFEE
"""Bits 31:20 of the address of a message-signalled interrupt."""
MESSAGE_ASSERT: Final = 1 << 14
MESSAGE_LEVEL: Final = 1 << 15


def pci_gsi(slot: int, pin: int) -> int:
    """The GSI of interrupt ``pin`` (0 is INTA#) of the PCI device in ``slot``; the DSDT's _PRT says the same."""
    return PCI_FIRST_GSI + (slot + pin) % 4


class LocalApic(Protocol):
    """What delivery needs of a vCPU; see the engine's Vcpu."""

    def lapic_matches(self, destination: int, logical: bool) -> bool:
        """Whether a message to ``destination`` is for this local APIC."""

    def signal(self, vector: int, mode: int, level: bool) -> None:
        """Take an interrupt message; ``mode`` as in the interrupt command register."""


class InterruptDelivery:
    """Carries interrupt messages to the local APICs that match."""

    def __init__(self, vcpus: Sequence[LocalApic]) -> None:
        self._vcpus = vcpus

    def __call__(self, destination: int, logical: bool, vector: int, mode: int, level: bool) -> None:
        """Deliver one message. Lowest priority goes to the first match; no match: the message is lost."""
        for vcpu in self._vcpus:
            if vcpu.lapic_matches(destination, logical):
                vcpu.signal(vector, mode, level)
                if mode == LOWEST_PRIORITY:
                    return

    def message(self, address: int, data: int) -> None:
        """Deliver a message-signalled interrupt: what a PCI device writes, and where. Others than FEExxxxx are lost.

        Source: Intel SDM volume 3, "Message Signalled Interrupts".
        """
        level = bool(data & MESSAGE_LEVEL)
        if address >> 20 == MESSAGE_ADDRESS and not (level and not data & MESSAGE_ASSERT):
            self(address >> 12 & 0xFF, bool(address & 4), data & 0xFF, data >> 8 & 7, level)


class WiredOr:
    """One interrupt line with any number of drivers: it is asserted while any of them asserts it."""

    __slots__ = ("_asserted", "_sources", "_targets")

    def __init__(self, targets: Sequence[IrqLine]) -> None:
        self._targets = tuple(targets)
        self._sources = 0
        self._asserted = 0

    def source(self) -> IrqLine:
        """A new driver of the line."""
        bit = 1 << self._sources
        self._sources += 1

        def drive(level: bool) -> None:
            before = self._asserted
            after = before | bit if level else before & ~bit
            self._asserted = after
            if (before == 0) != (after == 0):
                for target in self._targets:
                    target(level)

        return drive

    @property
    def level(self) -> bool:
        """Whether the line is asserted."""
        return self._asserted != 0


class InterruptRouter:
    """The board's wiring from interrupt lines to the two kinds of controller."""

    def __init__(self, pic_line: Callable[[int, bool], None], ioapic_line: Callable[[int, bool], None]) -> None:
        """``pic_line`` and ``ioapic_line`` are the controllers' ``set_line``."""
        self._gsis: list[WiredOr] = []
        for gsi in range(PINS):
            isa = 0 if gsi == ISA_TIMER_GSI else gsi
            targets = [_input(ioapic_line, gsi)]
            if gsi != 0 and isa < 16:
                targets.append(_input(pic_line, isa))
            self._gsis.append(WiredOr(targets))

    def isa(self, irq: int) -> IrqLine:
        """A driver of ISA interrupt ``irq`` (0..15 except 2, the cascade). ValueError for another."""
        if not 0 <= irq < 16 or irq == ISA_TIMER_GSI:
            raise ValueError(f"ISA interrupt {irq} does not exist")
        return self._gsis[irq or ISA_TIMER_GSI].source()

    def gsi(self, gsi: int) -> IrqLine:
        """A driver of global system interrupt ``gsi`` (0..23). ValueError for another."""
        if not 0 <= gsi < PINS:
            raise ValueError(f"global system interrupt {gsi} does not exist")
        return self._gsis[gsi].source()


def create_pit(clock: Clock, lines: InterruptRouter, pic: PicPair, ioapic: IoApic, events: Events = NO_EVENTS) -> Pit:
    """
    The timer with its interrupt. It costs nothing while both controllers ignore its edges: a request of it waits in the
    PIC already, as it does for good where that input is masked, and the I/O APIC's input is masked, too.
    """
    pit = Pit(clock, lines.isa(0), events, lambda: not pic.timer_waits or ioapic.heeds(ISA_TIMER_GSI))
    pic.watch_timer(pit.wake)
    ioapic.watch(ISA_TIMER_GSI, pit.wake)
    return pit


def _input(set_line: Callable[[int, bool], None], number: int) -> IrqLine:
    def drive(level: bool) -> None:
        set_line(number, level)

    return drive
