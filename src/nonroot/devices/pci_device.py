"""What a PCI device is: configuration space, base address registers, an interrupt line, and bus-master DMA.

A device derives from :class:`PciDevice`, says what it is and which regions its BARs decode, and is given a
:class:`PciConnection` to its board. It stays pure: the board gives it memory, lines and windows, tests give it fakes.

    class Beeper(PciDevice):
        def __init__(self, connection, events=NO_EVENTS):
            super().__init__("beeper", PciIdentity(0x1234, 0x0001, 0x04_80_00), [Bar(0, BarKind.IO, 16)], connection)

Accesses to a BAR arrive at the device's own ``read`` and ``write``, at ``Bar.offset`` plus the place in the BAR; so do
fixed ports (legacy ranges), at the offsets that the board was told. A BAR of kind RAM is memory that the guest reads
and writes without exits (a framebuffer).

Source: PCI local bus specification 2.1, chapter 6.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from nonroot.hvm.device import IrqLine, StateError, ignore
from nonroot.hvm.pci import COMMAND, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, CONFIG_SIZE, ConfigSpace

__all__ = [
    "UNCONNECTED",
    "Bar",
    "BarKind",
    "DeviceRam",
    "Dma",
    "PciConnection",
    "PciDevice",
    "PciIdentity",
    "Region",
]

BAR_FIRST: Final = 0x10
BAR_END: Final = 0x28
CACHE_LINE: Final = 0x0C
LATENCY: Final = 0x0D
HEADER_TYPE: Final = 0x0E
SUBSYSTEM: Final = 0x2C
INTERRUPT_LINE: Final = 0x3C
INTERRUPT_PIN: Final = 0x3D

PORTS_END: Final = 0x1_0000
BAR_IO_BIT: Final = 1
BAR_PREFETCHABLE: Final = 1 << 3
SUBSYSTEM_VENDOR: Final = 0x1AF4
SUBSYSTEM_DEVICE: Final = 0x1100
"""The subsystem that SeaBIOS looks for on the host bridge; all our devices carry it, as QEMU's do."""


class BarKind(Enum):
    """What a BAR decodes."""

    IO = "io"
    MEMORY = "memory"
    """Every access is an exit."""
    RAM = "ram"
    """Memory that the guest maps directly."""


class Dma(Protocol):
    """Guest memory as a bus master sees it. Nothing raises."""

    def read(self, address: int, length: int) -> bytes:
        """Guest-physical bytes; all ones where there is no RAM."""

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest-physical bytes: decoded code is dropped, frames count as dirty. Lost where there is no RAM."""

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        """
        Like :meth:`write` from a host file, to ``parts`` (address, bytes) one after the other, without a copy between.

        Takes what the host has at hand and waits for nothing. Returns how many bytes from the start arrived: none where
        not all is RAM; -1 if this file cannot be read so.
        """


class DeviceRam(Protocol):
    """Memory of a device (a framebuffer) that the guest can map; bytes, whole pages of 4096."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def view(self) -> memoryview:
        """All of it, readable and writable, shared with the guest."""

    def show(self, address: int, offset: int, length: int, writable: bool = True) -> None:
        """Map a part at a guest-physical address outside RAM (all whole pages), instead of what was shown there."""

    def hide(self, address: int, length: int) -> None:
        """Take away what :meth:`show` mapped there."""

    def take_dirty(self) -> set[int]:
        """Numbers of the pages written by the guest since the last call, wherever they were mapped."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One 32-bit base address register."""

    index: int
    """0..5."""
    kind: BarKind
    size: int
    """Bytes, a power of two: at least 4 for ports, 16 for memory, 4096 for RAM."""
    offset: int = 0
    """The device's offset of the BAR's first byte."""
    sizes: tuple[int, ...] = (1, 2, 4)
    """Access sizes that the device takes whole; others are split into bytes."""
    ram: DeviceRam | None = None
    """For :attr:`BarKind.RAM`."""
    prefetchable: bool = False

    @property
    def register(self) -> int:
        """Its place in configuration space."""
        return BAR_FIRST + 4 * self.index

    def check(self) -> None:
        """ValueError if it cannot be."""
        least = {BarKind.IO: 4, BarKind.MEMORY: 16, BarKind.RAM: 4096}[self.kind]
        if not 0 <= self.index < 6 or self.size < least or self.size & self.size - 1:
            raise ValueError(f"BAR {self.index} of {self.size} bytes cannot be")
        if (self.kind is BarKind.RAM) != (self.ram is not None) or (self.ram and self.ram.size < self.size):
            raise ValueError(f"BAR {self.index} does not fit its memory")


@dataclass(frozen=True, slots=True)
class Region:
    """What a device decodes now because of one BAR."""

    bar: Bar
    base: int


@dataclass(frozen=True, slots=True)
class PciIdentity:
    """The read-only part of a header."""

    vendor: int
    device: int
    class_code: int
    """24 bits: class, subclass, programming interface."""
    revision: int = 0
    interrupt_pin: int = 0
    """0 none, 1 INTA# … 4 INTD#."""
    subsystem_vendor: int = SUBSYSTEM_VENDOR
    subsystem_device: int = SUBSYSTEM_DEVICE
    multifunction: bool = False
    status: int = 0x0280
    """Fast back-to-back, medium DEVSEL."""


class _NoMemory:
    """DMA of a device on no board."""

    def read(self, address: int, length: int) -> bytes:
        return b"\xff" * length

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        pass

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class PciConnection:
    """A device's slot on the board."""

    irq: IrqLine = ignore
    """Its INTx line: level-triggered, shared."""
    dma: Dma = field(default_factory=_NoMemory)
    decode: Callable[[Sequence[Region]], object] = ignore
    """Takes all regions that the device decodes from now on, instead of those before."""


UNCONNECTED: Final = PciConnection()
"""A slot of no board."""


class PciDevice(ConfigSpace):
    """The PCI side of a device. Subclasses add ``read``, ``write``, ``state``, ``from_state``, more to ``reset``."""

    def __init__(
        self,
        name: str,
        identity: PciIdentity,
        bars: Sequence[Bar] = (),
        connection: PciConnection = UNCONNECTED,
        header: Mapping[int, tuple[int, int]] | None = None,
        writable: Sequence[tuple[int, int, int]] = (),
    ) -> None:
        """
        ``header`` and ``writable`` add device-specific registers, as in
        :class:`nonroot.hvm.pci.ConfigSpace`. ValueError for BARs that cannot be.
        """
        self.name = name
        self.connection = connection
        self.bars = tuple(bars)
        registers: dict[int, tuple[int, int]] = {
            0x00: (2, identity.vendor),
            0x02: (2, identity.device),
            0x06: (2, identity.status),
            0x08: (1, identity.revision),
            0x09: (3, identity.class_code),
            HEADER_TYPE: (1, 0x80 if identity.multifunction else 0),
            SUBSYSTEM: (2, identity.subsystem_vendor),
            SUBSYSTEM + 2: (2, identity.subsystem_device),
            INTERRUPT_PIN: (1, identity.interrupt_pin),
        }
        masks: list[tuple[int, int, int]] = [(CACHE_LINE, 1, 0xFF), (LATENCY, 1, 0xF8), (INTERRUPT_LINE, 1, 0xFF)]
        for bar in self.bars:
            bar.check()
            if bar.kind is BarKind.IO:
                registers[bar.register] = (4, BAR_IO_BIT)
                masks.append((bar.register, 4, -bar.size & 0xFFFF_FFFC))
            else:
                registers[bar.register] = (4, BAR_PREFETCHABLE if bar.prefetchable else 0)
                masks.append((bar.register, 4, -bar.size & 0xFFFF_FFF0))
        # Both spaces can be enabled without a BAR too: legacy ranges (VGA, IDE) are there; firmware checks the bits.
        masks.append((COMMAND, 2, COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER))
        super().__init__(registers | dict(header or {}), [*masks, *writable])
        self._regions: tuple[Region, ...] = ()

    # ── for the device ──

    @property
    def command(self) -> int:
        """The command register."""
        return int.from_bytes(self.data[COMMAND : COMMAND + 2], "little")

    @property
    def bus_master(self) -> bool:
        """Whether the guest lets the device use the memory."""
        return bool(self.data[COMMAND] & COMMAND_MASTER)

    def dma_read(self, address: int, length: int) -> bytes:
        """Guest memory; all ones where there is none, and while bus mastering is off."""
        return self.connection.dma.read(address, length) if self.bus_master else b"\xff" * length

    def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest memory; lost where there is none, and while bus mastering is off."""
        if self.bus_master:
            self.connection.dma.write(address, data)

    def base(self, index: int) -> int:
        """The address in BAR ``index``, whether it is decoded or not."""
        bar = next(bar for bar in self.bars if bar.index == index)
        raw = int.from_bytes(self.data[bar.register : bar.register + 4], "little")
        return raw & -bar.size

    def config_changed(self, register: int, size: int) -> None:
        """Called after each store into configuration space; for subclasses with registers of their own."""

    # ── configuration space ──

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store; windows follow the BARs and the command register."""
        super().config_write(register, size, value)
        if register < BAR_END and register + size > COMMAND:
            self._decode()
        self.config_changed(register, size)

    def reset(self) -> None:
        """Configuration space as after power-on: nothing is decoded, the interrupt line is released."""
        super().reset()
        self._decode()
        self.connection.irq(False)

    def check_config(self, data: bytes) -> None:
        """StateError if ``data`` is no configuration space of this device."""
        if len(data) != CONFIG_SIZE or not self.acceptable(data):
            raise StateError(f"{self.name} state: config differs in read-only bits")

    def load_config(self, data: bytes) -> None:
        """Check, then apply a configuration space from a record; windows follow."""
        self.check_config(data)
        self.data[:] = data
        self._decode()

    def _decode(self) -> None:
        regions = []
        command = self.command
        for bar in self.bars:
            base = self.base(bar.index)
            if bar.kind is BarKind.IO:
                good = command & COMMAND_IO and base > 0 and base + bar.size <= PORTS_END
            else:
                good = command & COMMAND_MEMORY and base > 0 and base + bar.size < 1 << 32
            if good:
                regions.append(Region(bar, base))
        now = tuple(regions)
        if now != self._regions:
            self._regions = now
            self.connection.decode(now)

    # ── what every device is; see nonroot.hvm.device ──

    def read(self, offset: int, size: int) -> int:
        """A load from a BAR or a fixed range; a device without registers floats."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store to a BAR or a fixed range."""
