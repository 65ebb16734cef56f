"""The Xen platform device (5853:0001): how an HVM guest finds paravirtual devices and switches emulated ones off.

BAR 0 is a range of ports, BAR 1 memory in which guests map their grant tables. Two fixed ports carry the unplug
protocol: a magic number to read, the driver's product and build, and a mask of what is to be unplugged.

Source: Xen's docs/misc/hvm-emulated-unplug.pandoc; hvm/hvm_vcpu and platform-pci of Linux for what guests use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.pci_device import UNCONNECTED, Bar, BarKind, PciConnection, PciDevice, PciIdentity
from nonroot.hvm.device import NO_EVENTS, Events, StateRecord, blob, expect, u8, u16, u32
from nonroot.hvm.pc import Board
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = [
    "PLATFORM_SLOT",
    "UNPLUG_AUXILIARY",
    "UNPLUG_DISKS",
    "UNPLUG_PORTS",
    "XenPlatform",
    "XenPlatformState",
    "attach_platform",
]

PLATFORM_SLOT: Final = (5, 0)
UNPLUG_PORTS: Final = 0x10
PORTS_LENGTH: Final = 4

# Offsets of the device: the fixed ports, BAR 0, BAR 1.
FIXED: Final = 0
BAR_PORTS: Final = 0x100
BAR_MEMORY: Final = 0x1000
PORTS_SIZE: Final = 0x100
MEMORY_SIZE: Final = 16 << 20

MAGIC: Final = 0x49D2
PROTOCOL: Final = 1

UNPLUG_DISKS: Final = 1 << 0
"""All emulated disks; CD-ROM drives stay."""
UNPLUG_NETWORK: Final = 1 << 1
UNPLUG_AUXILIARY: Final = 1 << 2
"""All emulated disks but the first."""
UNPLUG_NVME: Final = 1 << 3
UNPLUG_ALL: Final = 0xF


@dataclass(slots=True)
class XenPlatformState(StateRecord):
    """What the guest has told it."""

    NAME: ClassVar[str] = "platform"

    config: bytes = blob(CONFIG_SIZE)
    product: int = u16()
    build: int = u32()
    unplugged: int = u8(maximum=UNPLUG_ALL)
    flags: int = u8(maximum=1)


class XenPlatform(PciDevice):
    """The device. ``unplug(mask)`` is called when the guest gives emulated devices up, and with 0 at a reset."""

    def __init__(
        self,
        connection: PciConnection = UNCONNECTED,
        events: Events = NO_EVENTS,
        unplug: Callable[[int], object] = lambda mask: None,
        log: Callable[[int], object] = lambda byte: None,
    ) -> None:
        """``log`` takes the bytes that guests write to the log port."""
        super().__init__(
            "platform",
            PciIdentity(0x5853, 0x0001, 0xFF_80_00, 1, interrupt_pin=1, subsystem_vendor=0x5853, subsystem_device=1),
            [
                Bar(0, BarKind.IO, PORTS_SIZE, BAR_PORTS),
                Bar(1, BarKind.MEMORY, MEMORY_SIZE, BAR_MEMORY, prefetchable=True),
            ],
            connection,
        )
        self._events = events
        self.unplug = unplug
        """Whoever has the emulated devices may put its own here; in the vCPU's thread, it returns when they are off."""
        self._log = log
        self._product = self._build = self._unplugged = self._flags = 0

    def reset(self) -> None:
        """As after power-on: everything is plugged in again."""
        super().reset()
        self._product = self._build = self._unplugged = self._flags = 0
        self._load(XenPlatformState(bytes(self.data)))
        self.unplug(0)

    def read(self, offset: int, size: int) -> int:
        """The fixed ports; BARs read as zeros."""
        if offset == FIXED and size == 2:
            return MAGIC
        if offset == FIXED and size == 1:
            return self._flags
        if offset == FIXED + 2 and size == 1:
            return PROTOCOL
        if offset < PORTS_LENGTH:
            return (1 << 8 * size) - 1
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The fixed ports; stores into BARs are lost."""
        if offset == FIXED and size == 4:
            self._build = value
        elif offset == FIXED and size == 2:
            self._unplugged |= value & UNPLUG_ALL
            self._events(self.name, "unplug", value)
            self.unplug(self._unplugged)
        elif offset == FIXED and size == 1:
            self._flags = value & 1
        elif offset == FIXED + 2 and size == 2:
            self._product = value
        elif offset == FIXED + 2 and size == 1:
            self._log(value)
        else:
            self._events(self.name, "unknown-register", offset)

    def state(self) -> XenPlatformState:
        """The record."""
        return XenPlatformState(bytes(self.data), self._product, self._build, self._unplugged, self._flags)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        record = expect(XenPlatformState, state)
        self.load_config(record.config)
        self._load(record)
        self.unplug(record.unplugged)

    def _load(self, record: XenPlatformState) -> None:
        self._product, self._build = record.product, record.build
        self._unplugged, self._flags = record.unplugged, record.flags


def attach_platform(board: Board) -> XenPlatform:
    """The platform device in its slot, with its fixed ports."""
    slot, function = PLATFORM_SLOT
    device = XenPlatform(board.connect(slot, function), board.events)
    board.add_pci(slot, function, device)
    board.ports.add(UNPLUG_PORTS, PORTS_LENGTH, device, FIXED, sizes=(1, 2, 4))
    return device
