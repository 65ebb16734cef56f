"""The board of a PC: where devices are put together, each with its ports, lines, slot and memory.

A device of the PC comes onto the board by a function that takes the :class:`Board`, makes the device and registers it:

    def attach_beeper(board: Board) -> Beeper:
        beeper = Beeper(board.connect(slot=5), board.events)
        board.add_pci(5, 0, beeper)                    # its BARs, its records, its reset
        board.ports.add(0x2E0, 4, beeper, sizes=(1,))  # a fixed, legacy range
        return beeper

:class:`nonroot.hvm.config.MachineConfig` carries such functions in ``attach``: they are called in order while the
machine is made. Slots in use: 0 host bridge, 1 PIIX3 (function 0 ISA, 1 IDE, 3 power management), 2 VGA, 3 watchdog,
5 Xen's platform device, 8 to 15 shared folders; functions of one slot are registered one by one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from nonroot._engine import Memory
from nonroot.devices.pci_device import DeviceRam, Dma, PciConnection, Region
from nonroot.hvm.acpi import IsaDevice
from nonroot.hvm.bus import Bus
from nonroot.hvm.device import Clock, Device, Events, IrqLine
from nonroot.hvm.pci import PciFunction

__all__ = ["Attach", "Board", "MachineParts", "PciSlotDevice", "TimedPart"]

IDE_SLOT = (1, 1)
"""PCI slot and function of the PIIX3 IDE controller."""
POWER_SLOT = (1, 3)
VGA_SLOT = (2, 0)
WATCHDOG_SLOT = (3, 0)
SHARE_SLOTS = tuple(range(8, 16))
"""PCI slots of shared folders."""


class PciSlotDevice(Device, Protocol):
    """A :class:`PciDevice` that is complete: with registers and records."""

    def config_read(self, register: int, size: int) -> int:
        """A load from configuration space."""

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store to configuration space."""


class TimedPart(Protocol):
    """Something beside the devices in which things happen as time passes: a backend with a latency."""

    def deadline(self) -> int | None:
        """Machine time (ns) of its next event; None if there is none."""

    def advance(self, now_ns: int) -> None:
        """Events that are due happen. In the vCPU's thread."""


class IsaLines(Protocol):
    """Who gives out drivers of ISA interrupts."""

    def isa(self, irq: int) -> IrqLine:
        """A driver of ISA interrupt ``irq``. ValueError for one that does not exist."""


class IntxLines(Protocol):
    """Who gives out drivers of PCI interrupts."""

    def source(self, slot: int, pin: int) -> IrqLine:
        """A driver of that device's interrupt line."""


class PciBus(Protocol):
    """Where PCI functions are found."""

    def add(self, slot: int, function: int, device: PciFunction) -> None:
        """Put a function on bus 0. ValueError if the place is taken."""


class Windows(Protocol):
    """Who decodes the windows of PCI functions (slot << 3 | function)."""

    def own(self, key: int, device: Device, mmio: Device | None = None) -> None:
        """The device whose windows ``key`` are; ``mmio``: another one for those in memory."""

    def decode(self, key: int, regions: Sequence[Region]) -> None:
        """From now on the function wants these windows, and no other."""


@dataclass(frozen=True, slots=True)
class MachineParts:
    """What a device model in a process of its own needs of its machine, beside the board."""

    memory: Memory
    files: list[int]
    """A read-only descriptor of each backing of the memory."""
    memory_bytes: int
    low_end: int
    """Address after the RAM below 4 GiB."""
    share_ram: Callable[[], object]
    """Have the RAM in a file that others can map."""
    inject_msi: Callable[[int, int], object]
    """Takes a message's address and data."""
    power_off: Callable[[], object]
    fail: Callable[[str], object]
    """The machine cannot go on, with a sentence."""


class Board:
    """What the parts of a machine are plugged into while it is made."""

    def __init__(
        self,
        *,
        clock: Clock,
        events: Events,
        ports: Bus,
        mmio: Bus,
        lines: IsaLines,
        pci: PciBus,
        interrupts: IntxLines,
        windows: Windows,
        dma: Dma,
        make_ram: Callable[[str, int], DeviceRam],
        post: Callable[[Callable[[], object]], object],
        request_reset: Callable[[], object],
        machine: MachineParts | None = None,
    ) -> None:
        self.clock = clock
        self.events = events
        self.ports = ports
        """Fixed ports: ``ports.add(base, length, device, offset, sizes)``."""
        self.mmio = mmio
        """Fixed memory-mapped ranges outside RAM, the VGA window for example; the same ``add``."""
        self.dma = dma
        self.machine = machine
        """For device models in processes of their own; None on a board where there are none."""
        self.make_fw_cfg: Callable[[Mapping[int, bytes], Mapping[str, bytes]], Device] | None = None
        """Who makes the firmware configuration device out of its items and files; None: the machine does."""
        self.memories: dict[str, DeviceRam] = {}
        """Memory of devices, by name: it has records of its own."""
        self.window_hiders: list[Callable[[bool], object]] = []
        """Called with True when RAM covers the VGA's window, with False when it no longer does."""
        self._make_ram = make_ram
        self.post = post
        """Have a callable called in the vCPU's thread soon. Any thread; for backends that finish later."""
        self.request_reset = request_reset
        """Reset the machine, as soon as the present access is over."""
        self.devices: list[Device] = []
        """In the order of registration."""
        self.timed: list[TimedPart] = []
        """Parts with deadlines that are no devices; they rearm the clock when those change."""
        self.cmos: dict[int, int] = {}
        """Registers of the CMOS memory that firmware reads: index -> byte."""
        self.isa_devices: list[IsaDevice] = []
        """
        What the DSDT names beside the devices that are always there. SeaBIOS looks there too: without ``PNP0303`` it
        skips the PS/2 keyboard, without ``PNP0700`` the floppy controller (``PNP0F13`` is the PS/2 mouse).
        """
        self.has_vga = False
        """Set by whoever attaches a display adapter: systems look for one then."""
        self.has_8042 = False
        """Set by whoever attaches a keyboard controller with a keyboard; without one there is a bare controller."""
        self.files: dict[str, bytes] = {}
        """Files of the firmware configuration device: name (at most 55 characters) -> contents."""
        self._lines = lines
        self._pci = pci
        self._interrupts = interrupts
        self._windows = windows

    def make_ram(self, name: str, size: int) -> DeviceRam:
        """Memory of a device, ``size`` bytes (whole pages), zeroed. ValueError if the name is taken."""
        if name in self.memories:
            raise ValueError(f"there are two memories {name}")
        ram = self.memories[name] = self._make_ram(name, size)
        return ram

    def hide_window(self, hidden: bool) -> None:
        """RAM covers the VGA's window, or no more."""
        for hide in self.window_hiders:
            hide(hidden)

    def isa(self, irq: int) -> IrqLine:
        """A driver of ISA interrupt ``irq``. ValueError for 2 and numbers that do not exist."""
        return self._lines.isa(irq)

    def intx(self, slot: int, pin: int) -> IrqLine:
        """A driver of interrupt ``pin`` (0 is INTA#) of the device in ``slot``."""
        return self._interrupts.source(slot, pin)

    def add(self, device: Device) -> None:
        """Register a device for reset, records and time (deadlines). Its ranges are added to the buses apart."""
        if any(device.name == other.name for other in self.devices):
            raise ValueError(f"there are two devices {device.name}")
        self.devices.append(device)

    def connect(self, slot: int, function: int = 0, pin: int = 0) -> PciConnection:
        """What a PCI device in that place is connected to; ``pin``: its INTx, 0 for INTA#."""
        key = slot << 3 | function

        def decode(regions: Sequence[Region]) -> None:
            self._windows.decode(key, regions)

        return PciConnection(self._interrupts.source(slot, pin), self.dma, decode)

    def add_pci(self, slot: int, function: int, device: PciFunction) -> None:
        """Register a device for everything, and put it on bus 0. ValueError if the place is taken."""
        if not isinstance(device, Device):
            raise ValueError(f"the function {slot}.{function} has no records")
        self._pci.add(slot, function, device)
        self._windows.own(slot << 3 | function, device)
        self.add(device)

    def add_remote_pci(self, slot: int, function: int, device: PciSlotDevice, ports: Device, mmio: Device) -> None:
        """The same for a device elsewhere: its windows are reached through ``ports`` and ``mmio``, by address."""
        self._pci.add(slot, function, device)
        self._windows.own(slot << 3 | function, ports, mmio)
        self.add(device)

    def decode(self, key: int, regions: Sequence[Region]) -> None:
        """What a device elsewhere wants to be decoded; see :meth:`connect`."""
        self._windows.decode(key, regions)


Attach = Callable[[Board], object]
"""Puts devices onto a board."""
