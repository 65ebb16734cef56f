"""How to make each hypervisor device, with everything it is connected to recorded."""

from collections.abc import Callable
from dataclasses import dataclass, field

from nonroot.hvm.acpi_pm import AcpiPm
from nonroot.hvm.agent_port import AgentPort
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.debug_port import DebugPort
from nonroot.hvm.device import Device
from nonroot.hvm.ioapic import IoApic
from nonroot.hvm.pci import PciHost
from nonroot.hvm.pic import PicPair
from nonroot.hvm.pit import Pit
from nonroot.hvm.reset import I8042, ResetControl
from nonroot.hvm.rtc import Rtc
from nonroot.hvm.uart import Uart

WALL = 1_700_000_000 * 10**9


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
    AgentPort: Kind(lambda o: AgentPort(o.sent.extend, o.call, o.event), 12, (1, 2, 4)),
}
