"""Interrupts of PCI devices: four shared lines, each to an I/O APIC input and, as the PIIX3 routes it, to the PIC.

As in Xen's HVM board a line drives both at once: GSI 16..19, which a system with APICs unmasks, and the ISA interrupt
that the firmware has put into the PIRQ route register, for everybody else.

Source: Intel 82371SB datasheet (290550), PIRQRC[A:D].
"""

from typing import Final

from nonroot.hvm.device import IrqLine
from nonroot.hvm.irq import InterruptRouter, WiredOr, pci_gsi

__all__ = ["FIRMWARE_ROUTES", "LINKS", "PciInterrupts", "pirq_link"]

LINKS: Final = 4
FIRMWARE_ROUTES: Final = (10, 10, 11, 11)
"""The ISA interrupts that SeaBIOS gives PIRQA#..PIRQD#; without firmware the machine does the same."""
ROUTE_OFF: Final = 0x80
ROUTABLE: Final = frozenset({3, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15})
"""ISA interrupts that a PIRQ can have; the other values are reserved."""


def pirq_link(slot: int, pin: int) -> int:
    """The PIRQ (0 is PIRQA#) of interrupt ``pin`` (0 is INTA#) of the device in ``slot``, as i440FX boards wire it."""
    return (slot + pin - 1) % LINKS


class PciInterrupts:
    """The four PIRQ lines."""

    def __init__(self, lines: InterruptRouter) -> None:
        self._isa = [{irq: lines.isa(irq) for irq in sorted(ROUTABLE)} for _ in range(LINKS)]
        self._routes: list[int | None] = [None] * LINKS
        self._levels = [False] * LINKS
        self._links = [WiredOr([lines.gsi(pci_gsi(link + 1, 0)), self._input(link)]) for link in range(LINKS)]

    def source(self, slot: int, pin: int) -> IrqLine:
        """A driver of that device's interrupt line."""
        return self._links[pirq_link(slot, pin)].source()

    def route(self, link: int, register: int) -> None:
        """A PIRQ route register was written: bit 7 off, else the ISA interrupt in bits 3:0."""
        irq = register & 0x0F
        new = irq if not register & ROUTE_OFF and irq in ROUTABLE else None
        old = self._routes[link]
        if new == old:
            return
        if old is not None:
            self._isa[link][old](False)
        self._routes[link] = new
        if new is not None:
            self._isa[link][new](self._levels[link])

    def _input(self, link: int) -> IrqLine:
        def drive(level: bool) -> None:
            self._levels[link] = level
            route = self._routes[link]
            if route is not None:
                self._isa[link][route](level)

        return drive
