"""VGA with the Bochs extension, PCI 1234:1111: ports, modes, and the window at 0xA0000.

The linear framebuffer is memory that the guest maps: its stores are no exits. The legacy window is such memory too
wherever a mode is linear enough: text modes, chain-4 (mode 13h), banks of the Bochs extension. Where it is not,
accesses are exits, and :class:`nonroot.devices.vga_memory.PlaneAccess` does what the planes' logic does. The window
is taken away at once when a register changes what it means, and mapped anew only after some accesses: programs that
change modes step by step pay nothing.

Source: IBM VGA technical reference; Bochs "VBE DISPI" interface, version 5.
"""

from collections.abc import Callable
from typing import Final

from nonroot.devices.pci_device import (
    UNCONNECTED,
    Bar,
    BarKind,
    DeviceRam,
    PciConnection,
    PciDevice,
    PciIdentity,
)
from nonroot.devices.vga_memory import PlaneAccess, Target
from nonroot.devices.vga_state import (
    ATTRIBUTE_COUNT,
    BANK,
    BPP,
    CRTC_COUNT,
    DAC_8BIT,
    DEPTHS,
    DISPI_COUNT,
    ENABLE,
    ENABLED,
    GET_CAPABILITIES,
    GRAPHICS_COUNT,
    ID,
    MAX_BPP,
    MAX_XRES,
    MAX_YRES,
    MEMORY_64K,
    NO_CLEAR,
    SEQUENCER_COUNT,
    VIRT_HEIGHT,
    VIRT_WIDTH,
    VRAM_SIZE,
    X_OFFSET,
    XRES,
    Y_OFFSET,
    YRES,
    VgaState,
    line_bytes,
)
from nonroot.hvm.device import NO_EVENTS, Clock, Events, StateRecord, assign, capture, expect

__all__ = ["DISPI", "LENGTH", "MMIO", "PORTS", "PORT_BASE", "WINDOW", "WINDOW_BASE", "WINDOW_SIZE", "Vga"]

PORT_BASE: Final = 0x3B0
PORTS: Final = 0
"""Device offset of port 0x3B0; 0x3DF is the last."""
DISPI: Final = 0x30
"""Device offset of port 0x1CE (index) and 0x1CF (data)."""
LENGTH: Final = 0x34
"""Offsets of ports, in all."""
MMIO: Final = 0x1000
"""Device offset of BAR 2: ports from 0x3C0 on at 0x400, DISPI registers at 0x500."""
MMIO_SIZE: Final = 0x1000
MMIO_PORTS: Final = MMIO + 0x400
MMIO_DISPI: Final = MMIO + 0x500
WINDOW: Final = 0x2_0000
"""Device offset of guest-physical 0xA0000."""
WINDOW_BASE: Final = 0xA_0000
WINDOW_SIZE: Final = 0x2_0000

SEQUENCER_MASKS: Final = (0x03, 0x3D, 0x0F, 0x3F, 0x0E)
GRAPHICS_MASKS: Final = (0x0F, 0x0F, 0x0F, 0x1F, 0x03, 0x7B, 0x0F, 0x0F, 0xFF)
DISPI_FIRST_ID: Final = 0xB0C0
DISPI_LAST_ID: Final = 0xB0C5
UNKNOWN: Final = 0xFF

# A monitor's time: 70 frames a second of 449 lines, 400 of them visible.
FRAME_NS: Final = 14_285_714
LINES: Final = 449
VISIBLE: Final = 400
RETRACE: Final = 412
LINE_NS: Final = FRAME_NS // LINES
LINE_VISIBLE_NS: Final = LINE_NS * 4 // 5
STATUS_DISABLED: Final = 0x01
STATUS_RETRACE: Final = 0x08


class Vga(PciDevice):
    """The display adapter. Offsets: ports, BAR 2 and the legacy window; see the module's constants."""

    _misc: int
    _feature: int
    _subsystem: int
    _sequencer_index: int
    _sequencer: bytearray
    _graphics_index: int
    _graphics: bytearray
    _crtc_index: int
    _crtc: bytearray
    _attribute_index: int
    _attribute_data: bool
    _attribute: bytearray
    _dac_mask: int
    _dac_reading: bool
    _dac_read_index: int
    _dac_write_index: int
    _dac_component: int
    _dac_held: bytearray
    _dac: bytearray
    _dispi_index: int
    _dispi: list[int]

    def __init__(
        self, ram: DeviceRam, clock: Clock, connection: PciConnection = UNCONNECTED, events: Events = NO_EVENTS
    ) -> None:
        """``ram``: :data:`nonroot.devices.vga_state.MEMORY_SIZE` bytes."""
        bars = (
            Bar(0, BarKind.RAM, VRAM_SIZE, ram=ram, prefetchable=True),
            Bar(2, BarKind.MEMORY, MMIO_SIZE, MMIO),
        )
        super().__init__("vga", PciIdentity(0x1234, 0x1111, 0x03_00_00, revision=2), bars, connection)
        self.ram = ram
        self._clock = clock
        self._events = events
        self.changes = 0
        """Counts register writes that may change the picture."""
        self.memory = PlaneAccess(ram)
        self._load(VgaState())

    # ── accesses ──

    def read(self, offset: int, size: int) -> int:
        """A load from a port, BAR 2 or the window."""
        if offset >= WINDOW:
            return self.memory.read(offset - WINDOW, size)
        if offset >= MMIO:
            return self._mmio_read(offset, size)
        if offset >= DISPI:
            value = self._dispi_index if offset == DISPI else self._dispi_read() if offset == DISPI + 1 else UNKNOWN
            return value & (1 << 8 * size) - 1
        value = 0
        for index in range(size):
            value |= self._port_read(PORT_BASE + offset + index) << 8 * index
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        """A store to a port, BAR 2 or the window."""
        if offset >= WINDOW:
            self.memory.write(offset - WINDOW, size, value)
        elif offset >= MMIO:
            self._mmio_write(offset, size, value)
        elif offset >= DISPI:
            if offset == DISPI:
                self._dispi_index = value & 0xFFFF
            elif offset == DISPI + 1:
                self._dispi_write(self._dispi_index, value & 0xFFFF)
        else:
            for index in range(size):
                self._port_write(PORT_BASE + offset + index, value >> 8 * index & 0xFF)

    def _mmio_read(self, offset: int, size: int) -> int:
        if offset >= MMIO_PORTS and offset + size <= MMIO_PORTS + 0x20:
            return self.read(offset - MMIO_PORTS + 0x10, size)
        register, odd = divmod(offset - MMIO_DISPI, 2)
        if 0 <= register < DISPI_COUNT and size == 2 and not odd:
            kept, self._dispi_index = self._dispi_index, register
            value = self._dispi_read()
            self._dispi_index = kept
            return value
        self._events(self.name, "unknown-register", offset)
        return (1 << 8 * size) - 1

    def _mmio_write(self, offset: int, size: int, value: int) -> None:
        if offset >= MMIO_PORTS and offset + size <= MMIO_PORTS + 0x20:
            self.write(offset - MMIO_PORTS + 0x10, size, value)
            return
        register, odd = divmod(offset - MMIO_DISPI, 2)
        if 0 <= register < DISPI_COUNT and size == 2 and not odd:
            self._dispi_write(register, value & 0xFFFF)
        else:
            self._events(self.name, "unknown-register", offset)

    # ── ports ──

    def _port_read(self, port: int) -> int:
        colour = bool(self._misc & 1)
        if port >= 0x3D0 or port < 0x3C0:
            if (port >= 0x3D0) != colour:
                return UNKNOWN
            place = port & 0xF
            if place == 4:
                return self._crtc_index
            if place == 5:
                index = self._crtc_index
                return self._crtc[index] if index < CRTC_COUNT else 0
            if place == 0xA:
                self._attribute_data = False
                return self._status()
            return UNKNOWN
        reader = _READERS.get(port)
        return UNKNOWN if reader is None else reader(self)

    def _status(self) -> int:
        line, within = divmod(self._clock.now_ns() % FRAME_NS, LINE_NS)
        status = STATUS_DISABLED if line >= VISIBLE or within >= LINE_VISIBLE_NS else 0
        return status | STATUS_RETRACE if line >= RETRACE else status

    def _read_attribute(self) -> int:
        index = self._attribute_index & 0x1F
        return self._attribute[index] if index < ATTRIBUTE_COUNT else 0

    def _read_sequencer(self) -> int:
        index = self._sequencer_index
        return self._sequencer[index] if index < SEQUENCER_COUNT else 0

    def _read_graphics(self) -> int:
        index = self._graphics_index
        return self._graphics[index] if index < GRAPHICS_COUNT else 0

    def _read_dac(self) -> int:
        value = self._dac[3 * self._dac_read_index + self._dac_component]
        self._dac_component += 1
        if self._dac_component == 3:
            self._dac_component = 0
            self._dac_read_index = self._dac_read_index + 1 & 0xFF
        return value

    def _port_write(self, port: int, value: int) -> None:
        if port >= 0x3D0 or port < 0x3C0:
            if (port >= 0x3D0) != bool(self._misc & 1):
                return
            place = port & 0xF
            if place == 4:
                self._crtc_index = value
            elif place == 5:
                self._write_crtc(self._crtc_index, value)
            elif place == 0xA:
                self._feature = value
            return
        writer = _WRITERS.get(port)
        if writer is None:
            self._events(self.name, "unknown-register", port)
        else:
            writer(self, value)

    def _write_crtc(self, index: int, value: int) -> None:
        if index >= CRTC_COUNT:
            return
        if index <= 7 and self._crtc[0x11] & 0x80:
            if index != 7:
                return
            value = self._crtc[7] & ~0x10 | value & 0x10
        if self._crtc[index] != value:
            self._crtc[index] = value
            self.changes += 1

    def _write_attribute(self, value: int) -> None:
        if not self._attribute_data:
            if (self._attribute_index ^ value) & 0x20:
                self.changes += 1
            self._attribute_index = value & 0x3F
        else:
            index = self._attribute_index & 0x1F
            if index < 0x10:
                value &= 0x3F
            if index < ATTRIBUTE_COUNT and self._attribute[index] != value:
                self._attribute[index] = value
                self.changes += 1
        self._attribute_data = not self._attribute_data

    def _write_misc(self, value: int) -> None:
        if self._misc != value:
            self._misc = value
            self.changes += 1

    def _write_subsystem(self, value: int) -> None:
        self._subsystem = value & 1

    def _write_sequencer_index(self, value: int) -> None:
        self._sequencer_index = value

    def _write_sequencer(self, value: int) -> None:
        index = self._sequencer_index
        if index < SEQUENCER_COUNT:
            value &= SEQUENCER_MASKS[index]
            if self._sequencer[index] != value:
                self._sequencer[index] = value
                if index != 2:
                    self.changes += 1
                self._retarget()

    def _write_graphics_index(self, value: int) -> None:
        self._graphics_index = value

    def _write_graphics(self, value: int) -> None:
        index = self._graphics_index
        if index < GRAPHICS_COUNT:
            value &= GRAPHICS_MASKS[index]
            if self._graphics[index] != value:
                self._graphics[index] = value
                if index in (5, 6):
                    self.changes += 1
                self._retarget()

    def _write_dac_mask(self, value: int) -> None:
        if self._dac_mask != value:
            self._dac_mask = value
            self.changes += 1

    def _write_dac_read_index(self, value: int) -> None:
        self._dac_read_index, self._dac_component, self._dac_reading = value, 0, True

    def _write_dac_write_index(self, value: int) -> None:
        self._dac_write_index, self._dac_component, self._dac_reading = value, 0, False

    def _write_dac(self, value: int) -> None:
        if not self._dispi[ENABLE] & DAC_8BIT:
            value &= 0x3F
        if self._dac_component < 2:
            self._dac_held[self._dac_component] = value
            self._dac_component += 1
            return
        at = 3 * self._dac_write_index
        self._dac[at : at + 3] = bytes((*self._dac_held, value))
        self._dac_component = 0
        self._dac_write_index = self._dac_write_index + 1 & 0xFF
        self.changes += 1

    # ── the Bochs extension ──

    def _dispi_read(self) -> int:
        index = self._dispi_index
        if index >= DISPI_COUNT:
            return 0
        if self._dispi[ENABLE] & GET_CAPABILITIES and XRES <= index <= BPP:
            return (MAX_XRES, MAX_YRES, MAX_BPP)[index - XRES]
        return self._dispi[index]

    def _dispi_write(self, index: int, value: int) -> None:
        registers = self._dispi
        if index == ID:
            if DISPI_FIRST_ID <= value <= DISPI_LAST_ID:
                registers[ID] = value
            return
        if index not in (XRES, YRES, BPP, ENABLE, BANK, VIRT_WIDTH, X_OFFSET, Y_OFFSET):
            return
        self.changes += 1
        if index == ENABLE:
            self._enable(value)
        elif index == BANK:
            registers[BANK] = value
        elif index == BPP:
            if value in DEPTHS:
                registers[BPP] = value
        else:
            registers[index] = value
        self._fix_dispi()
        self._retarget()

    def _enable(self, value: int) -> None:
        registers = self._dispi
        was = registers[ENABLE]
        registers[ENABLE] = value & (ENABLED | GET_CAPABILITIES | DAC_8BIT | 0x40 | NO_CLEAR)
        if (was ^ value) & DAC_8BIT:
            self._dac[:] = (
                _dac_8bit(self._dac) if value & DAC_8BIT else bytes(component >> 2 for component in self._dac)
            )
        if value & ENABLED and not was & ENABLED:
            registers[BANK] = registers[X_OFFSET] = registers[Y_OFFSET] = registers[VIRT_WIDTH] = 0
            self._fix_dispi()
            self._retarget()
            if not value & NO_CLEAR:
                stride = line_bytes(registers[VIRT_WIDTH], registers[BPP])
                self.memory.clear(min(registers[YRES] * stride, VRAM_SIZE))
        elif was & ENABLED and not value & ENABLED:
            registers[BANK] = 0

    def _fix_dispi(self) -> None:
        """Make the geometry one that the memory holds."""
        r = self._dispi
        if not r[ENABLE] & ENABLED:
            return
        r[XRES] = min(max(r[XRES] & ~7, 8), MAX_XRES)
        r[VIRT_WIDTH] = min(max(r[VIRT_WIDTH] & ~7, r[XRES]), MAX_XRES * 2)
        stride = line_bytes(r[VIRT_WIDTH], r[BPP])
        rows = VRAM_SIZE // stride
        r[YRES] = min(max(r[YRES], 1), MAX_YRES, rows)
        r[VIRT_HEIGHT] = min(rows, 0xFFFF)
        r[X_OFFSET] = min(r[X_OFFSET], r[VIRT_WIDTH] - r[XRES])
        r[Y_OFFSET] = min(r[Y_OFFSET], rows - r[YRES])

    # ── the window ──

    def _retarget(self) -> None:
        """A register has changed that says what the window means."""
        self.memory.configure(bytes(self._sequencer), bytes(self._graphics), self._target(), self._bank())

    def _bank(self) -> int:
        """Bytes that the Bochs extension's bank adds to window addresses."""
        return self._dispi[BANK] << 16 if self._dispi[ENABLE] & ENABLED else 0

    def _target(self) -> Target | None:
        """Where the window is memory as it is; None where it is not."""
        registers = self._dispi
        if registers[ENABLE] & ENABLED and registers[BPP] > 4:
            offset = self._bank()
            return Target.linear(offset, 0x1_0000) if offset + 0x1_0000 <= VRAM_SIZE else Target.nothing()
        sequencer, graphics = self._sequencer, self._graphics
        plain = graphics[1] == 0 and graphics[3] == 0 and not graphics[5] & 0x0B and graphics[8] == 0xFF
        if not plain:
            return None
        place = graphics[6] >> 2 & 3
        if sequencer[4] & 8:
            if sequencer[2] == 0x0F and place < 2:
                return Target.linear(0, 0x1_0000 if place == 1 else 0x2_0000)
        elif not sequencer[4] & 4 and graphics[5] & 0x10 and sequencer[2] == 3 and not graphics[4] & 2 and place >= 2:
            return Target.text(0x1_0000 if place == 2 else 0x1_8000)
        return None

    def hide_window(self, hidden: bool) -> None:
        """Something else is decoded at the window's addresses (system management memory), or no more."""
        self.memory.hide(hidden)

    # ── what every device is ──

    def reset(self) -> None:
        """Power-on state. Video memory keeps its contents."""
        super().reset()
        self.memory.settle()
        self._load(VgaState(config=bytes(self.data)))

    def state(self) -> VgaState:
        """All registers."""
        return capture(VgaState, self, config=bytes(self.data), latch=self.memory.latch, shadow=self.memory.shadow)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; video memory is restored by whoever restores memory, before this."""
        record = expect(VgaState, state)
        self.check_config(record.config)
        self._load(record)
        self.load_config(record.config)

    def _load(self, state: VgaState) -> None:
        assign(self, state, "config", "latch", "shadow")
        if not DISPI_FIRST_ID <= self._dispi[ID] <= DISPI_LAST_ID:
            self._dispi[ID] = DISPI_LAST_ID
        self._dispi[MEMORY_64K] = VRAM_SIZE >> 16
        if self._dispi[BPP] not in DEPTHS:
            self._dispi[BPP] = 8
        self._fix_dispi()
        self.changes += 1
        self.memory.restore(state.latch, state.shadow)
        self._retarget()


def _dac_8bit(components: bytearray) -> bytes:
    """6-bit components as 8-bit ones."""
    return bytes(component << 2 & 0xFF | component >> 4 & 3 for component in components)


_READERS: Final[dict[int, Callable[[Vga], int]]] = {
    0x3C0: lambda vga: vga._attribute_index,
    0x3C1: Vga._read_attribute,
    0x3C2: lambda vga: 0,
    0x3C3: lambda vga: vga._subsystem,
    0x3C4: lambda vga: vga._sequencer_index,
    0x3C5: Vga._read_sequencer,
    0x3C6: lambda vga: vga._dac_mask,
    0x3C7: lambda vga: 3 if vga._dac_reading else 0,
    0x3C8: lambda vga: vga._dac_write_index,
    0x3C9: Vga._read_dac,
    0x3CA: lambda vga: vga._feature,
    0x3CC: lambda vga: vga._misc,
    0x3CE: lambda vga: vga._graphics_index,
    0x3CF: Vga._read_graphics,
}
_WRITERS: Final[dict[int, Callable[[Vga, int], None]]] = {
    0x3C0: Vga._write_attribute,
    0x3C2: Vga._write_misc,
    0x3C3: Vga._write_subsystem,
    0x3C4: Vga._write_sequencer_index,
    0x3C5: Vga._write_sequencer,
    0x3C6: Vga._write_dac_mask,
    0x3C7: Vga._write_dac_read_index,
    0x3C8: Vga._write_dac_write_index,
    0x3C9: Vga._write_dac,
    0x3CE: Vga._write_graphics_index,
    0x3CF: Vga._write_graphics,
}
