"""Address decoding of PCI devices: base address registers become ranges of the buses and of the p2m.

A window is decoded only where nobody else answers: ports and MMIO in the hole that RAM, local APIC and I/O APIC leave.
One that collides waits until the other goes, as no hardware would promise; the collision is an event.
"""

from collections.abc import Sequence
from typing import Final

from nonroot.devices.pci_device import BarKind, Region
from nonroot.hvm.bus import Bus
from nonroot.hvm.device import NO_EVENTS, Device, Events
from nonroot.hvm.memory_map import IOAPIC_BASE

__all__ = ["WindowDecoder"]

HOLE_END: Final = IOAPIC_BASE
"""Memory windows end here: above are I/O APIC, local APIC and the firmware."""


class WindowDecoder:
    """Who decodes what, by function number (slot << 3 | function)."""

    def __init__(self, ports: Bus, mmio: Bus, hole_start: int, events: Events = NO_EVENTS) -> None:
        """``hole_start``: address after the RAM below 4 GiB."""
        self._ports = ports
        self._mmio = mmio
        self._hole_start = hole_start
        self._events = events
        self._devices: dict[int, tuple[Device, Device]] = {}  # for ports, and for memory
        self._wanted: dict[int, tuple[Region, ...]] = {}
        self._active: list[tuple[int, Region]] = []

    def own(self, key: int, device: Device, mmio: Device | None = None) -> None:
        """The device whose windows ``key`` are; ``mmio``: another one for those in memory."""
        self._devices[key] = device, mmio or device

    @property
    def active(self) -> tuple[tuple[int, Region], ...]:
        """(function number, window) of everything that is decoded now."""
        return tuple(self._active)

    def decode(self, key: int, regions: Sequence[Region]) -> None:
        """From now on the function wants these windows, and no other."""
        if key not in self._devices:
            return
        self._wanted[key] = tuple(regions)
        for entry in [e for e in self._active if e[0] == key and e[1] not in regions]:
            self._close(entry)
        for owner, wanted in sorted(self._wanted.items()):
            for region in wanted:
                if (owner, region) not in self._active:
                    self._open(owner, region)

    def _open(self, key: int, region: Region) -> None:
        bar, base = region.bar, region.base
        ports, mmio = self._devices[key]
        if not self._is_free(region):
            self._events(ports.name, "window-collides", base)
            return
        if bar.kind is BarKind.IO:
            self._ports.add(base, bar.size, ports, bar.offset, bar.sizes)
        elif bar.kind is BarKind.MEMORY:
            self._mmio.add(base, bar.size, mmio, bar.offset, bar.sizes)
        else:
            assert bar.ram is not None
            bar.ram.show(base, 0, bar.size)
        self._active.append((key, region))

    def _close(self, entry: tuple[int, Region]) -> None:
        key, region = entry
        bar = region.bar
        if bar.kind is BarKind.IO:
            self._ports.remove(region.base, bar.size, self._devices[key][0])
        elif bar.kind is BarKind.MEMORY:
            self._mmio.remove(region.base, bar.size, self._devices[key][1])
        else:
            assert bar.ram is not None
            bar.ram.hide(region.base, bar.size)
        self._active.remove(entry)

    def _is_free(self, region: Region) -> bool:
        base, end = region.base, region.base + region.bar.size
        if region.bar.kind is BarKind.IO:
            return self._ports.is_free(base, region.bar.size)
        if base < self._hole_start or end > HOLE_END or not self._mmio.is_free(base, region.bar.size):
            return False
        return all(
            other.bar.kind is BarKind.IO or end <= other.base or other.base + other.bar.size <= base
            for _, other in self._active
        )
