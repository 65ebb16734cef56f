"""How to make each hypervisor device, with everything it is connected to recorded."""

from collections.abc import Callable
from dataclasses import dataclass, field

from nonroot.devices.dma8237 import Dma8237
from nonroot.devices.floppy import FloppyController
from nonroot.devices.fw_cfg import LENGTH as FW_CFG_LENGTH
from nonroot.devices.fw_cfg import FwCfg
from nonroot.devices.i6300esb import LENGTH as I6300ESB_LENGTH
from nonroot.devices.i6300esb import I6300Esb
from nonroot.devices.ide import PiixIde
from nonroot.devices.pci_device import UNCONNECTED, PciConnection
from nonroot.devices.piix4_pm import Piix4Pm
from nonroot.devices.ps2 import LENGTH as PS2_LENGTH
from nonroot.devices.ps2 import Ps2Controller
from nonroot.devices.vga import LENGTH as VGA_LENGTH
from nonroot.devices.vga import Vga
from nonroot.devices.vga_state import MEMORY_SIZE
from nonroot.devices.virtio_fs import VirtioFs
from nonroot.devices.virtio_pci import COMMON_LENGTH, CONFIG, ISR, NOTIFY
from nonroot.hvm.acpi_pm import AcpiPm
from nonroot.hvm.agent_port import AgentPort
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.debug_port import DebugPort
from nonroot.hvm.device import Device
from nonroot.hvm.i8042 import I8042
from nonroot.hvm.ioapic import IoApic
from nonroot.hvm.pci import PciHost
from nonroot.hvm.pic import PicPair
from nonroot.hvm.pit import Pit
from nonroot.hvm.reset import ResetControl
from nonroot.hvm.rtc import Rtc
from nonroot.hvm.uart import Uart
from nonroot.xen.platform_pci import PORTS_LENGTH, XenPlatform
from tests.storage.parts import FakeMemory, make_floppy, make_ide

VIDEO_MEMORY = bytearray(MEMORY_SIZE)
"""Shared by all adapters whose tests look at registers only."""
WALL = 1_700_000_000 * 10**9


class FakeRam:
    """A device's memory on no board: what it shows where is remembered."""

    def __init__(self, data: bytearray | None = None) -> None:
        self.view = memoryview(bytearray(MEMORY_SIZE) if data is None else data)
        self.size = len(self.view)
        self.shown: list[tuple[int, int, int]] = []
        self.dirty: set[int] = set()

    def show(self, address: int, offset: int, length: int, writable: bool = True) -> None:
        assert (address | offset | length) % 4096 == 0
        assert 0 <= offset <= offset + length <= self.size
        assert length > 0
        self.shown.append((address, offset, length))

    def hide(self, address: int, length: int) -> None:
        self.shown.remove(next(entry for entry in self.shown if (entry[0], entry[2]) == (address, length)))

    def take_dirty(self) -> set[int]:
        dirty, self.dirty = self.dirty, set()
        return dirty

    def find(self, address: int) -> int | None:
        """Where in the memory a guest-physical address leads; None if nothing is shown there."""
        for base, offset, length in self.shown:
            if base <= address < base + length:
                return offset + address - base
        return None


@dataclass
class Outside:
    """What a device is connected to."""

    clock: ManualClock = field(default_factory=ManualClock)
    level: bool = False
    edges: int = 0
    sent: bytearray = field(default_factory=bytearray)
    calls: list[object] = field(default_factory=list)
    events: list[tuple[str, str, int]] = field(default_factory=list)

    def irq(self, level: bool) -> None:
        if level and not self.level:
            self.edges += 1
        self.level = level

    def high(self) -> bool:
        """The line's level."""
        return self.level

    def event(self, device: str, name: str, detail: int) -> None:
        self.events.append((device, name, detail))

    def call(self, *arguments: object) -> None:
        self.calls.append(arguments)


@dataclass(frozen=True)
class Kind:
    """One registered device."""

    make: Callable[[Outside], Device]
    length: int
    sizes: tuple[int, ...] = (1,)
    further: tuple[int, ...] = ()
    """Registers beyond ``length``, which random accesses reach too."""


KINDS: dict[type, Kind] = {
    PicPair: Kind(lambda o: PicPair(o.irq, o.event), 6),
    Pit: Kind(lambda o: Pit(o.clock, o.irq, o.event), 5),
    Rtc: Kind(lambda o: Rtc(o.clock, o.irq, WALL, {0x15: 0x80}, o.event), 2),
    IoApic: Kind(lambda o: IoApic(o.call, o.event), 0x100, (4,)),
    AcpiPm: Kind(lambda o: AcpiPm(o.clock, o.irq, o.call, o.event), 12, (1, 2, 4)),
    Uart: Kind(lambda o: Uart("uart0", o.clock, o.irq, o.sent.append, o.event, o.call), 8),
    PciHost: Kind(lambda o: PciHost(o.event), 8, (1, 2, 4)),
    ResetControl: Kind(lambda o: ResetControl(o.call, o.event), 2),
    I8042: Kind(lambda o: I8042(o.call, o.event), 2),
    DebugPort: Kind(lambda o: DebugPort(o.sent.append, o.event), 2),
    Vga: Kind(lambda o: Vga(FakeRam(VIDEO_MEMORY), o.clock, events=o.event), VGA_LENGTH, (1, 2)),
    Ps2Controller: Kind(lambda o: Ps2Controller(o.clock, o.irq, o.call, o.call, o.event), PS2_LENGTH),
    FwCfg: Kind(
        lambda o: FwCfg({5: b"\1\0"}, {"etc/one": bytes(range(200)), "two": b""}, UNCONNECTED.dma, o.event),
        FW_CFG_LENGTH,
        (1, 2, 4),
    ),
    Piix4Pm: Kind(lambda o: Piix4Pm(events=o.event), 2),
    I6300Esb: Kind(lambda o: I6300Esb(o.clock, o.call, events=o.event), I6300ESB_LENGTH, (1, 2, 4)),
    PiixIde: Kind(lambda o: make_ide(o.clock, o.irq, o.event), 0x30, (1, 2, 4)),
    Dma8237: Kind(lambda o: Dma8237(FakeMemory(), o.event), 0x40),
    FloppyController: Kind(lambda o: make_floppy(o.clock, o.irq, o.event), 8),
    XenPlatform: Kind(lambda o: XenPlatform(events=o.event, unplug=o.call, log=o.sent.append), PORTS_LENGTH, (1, 2, 4)),
    VirtioFs: Kind(
        lambda o: VirtioFs("tag", 0, PciConnection(irq=o.irq, dma=FakeMemory()), o.event),
        COMMON_LENGTH,
        (1, 2, 4, 8),
        (ISR, CONFIG, CONFIG + 36, NOTIFY, NOTIFY + 4, NOTIFY + 8),
    ),
    AgentPort: Kind(lambda o: AgentPort(o.sent.extend, o.call, o.event), 12, (1, 2, 4)),
}
