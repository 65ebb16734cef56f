"""Display modes as a BIOS sets them: register tables of the IBM VGA, written through the ports."""

from collections.abc import Callable
from dataclasses import dataclass

from nonroot.devices.vga import DISPI, PORT_BASE, WINDOW, Vga
from nonroot.hvm.clock import ManualClock
from tests.hvm.makers import FakeRam

Out = Callable[[int, int], None]


@dataclass(frozen=True)
class Mode:
    misc: int
    sequencer: bytes
    crtc: bytes
    graphics: bytes
    attribute: bytes

    def writes(self) -> list[tuple[int, int]]:
        """(port, byte) in order."""
        result = [(0x3C2, self.misc)]
        for index, value in enumerate(self.sequencer):
            result += [(0x3C4, index), (0x3C5, value)]
        result += [(0x3D4, 0x11), (0x3D5, self.crtc[0x11] & 0x7F)]
        for index, value in enumerate(self.crtc):
            result += [(0x3D4, index), (0x3D5, value)]
        for index, value in enumerate(self.graphics):
            result += [(0x3CE, index), (0x3CF, value)]
        for index, value in enumerate(self.attribute):
            result += [(0x3C0, index), (0x3C0, value)]
        return [*result, (0x3C0, 0x20)]


CRTC_TEXT = "5f4f50825581bf1f004f0d0e000000009c8e8f281f96b9a3ff"
ATTRIBUTES = "000102030405140738393a3b3c3d3e3f"

TEXT = Mode(
    0x67,
    bytes.fromhex("0300030002"),
    bytes.fromhex(CRTC_TEXT),
    bytes.fromhex("00000000 00100e00ff"),
    bytes.fromhex(ATTRIBUTES + "0c000f0800"),
)
MONO_WINDOW_TEXT = Mode(
    0x67, TEXT.sequencer, TEXT.crtc, bytes.fromhex("00000000 00100a00ff"), TEXT.attribute
)  # text at 0xB0000
CGA4 = Mode(
    0x63,
    bytes.fromhex("0309030002"),
    bytes.fromhex("2d2728902b80bf1f00c10000000000009c8e8f140096b9a2ff"),
    bytes.fromhex("00000000 00300f00ff"),
    bytes.fromhex("00131517020406071011121314151617" + "0100030000"),
)
CGA2 = Mode(
    0x63,
    bytes.fromhex("0301010006"),
    bytes.fromhex("5f4f50825480bf1f00c10000000000009c8e8f280096b9c2ff"),
    bytes.fromhex("00000000 00000d00ff"),
    bytes.fromhex("00171717171717171717171717171717" + "0100010000"),
)
PLANAR = Mode(
    0xE3,
    bytes.fromhex("03010f0006"),
    bytes.fromhex("5f4f508254800b3e0040000000000000ea8cdf2800e704e3ff"),
    bytes.fromhex("00000000 0000050fff"),
    bytes.fromhex(ATTRIBUTES + "01000f0000"),
)
MODE_13H = Mode(
    0x63,
    bytes.fromhex("03010f000e"),
    bytes.fromhex("5f4f50825480bf1f00410000000000009c8e8f284096b9a3ff"),
    bytes.fromhex("00000000 0040050fff"),
    bytes.fromhex("000102030405060708090a0b0c0d0e0f" + "41000f0000"),
)
MODE_X = Mode(
    0x63,
    bytes.fromhex("03010f0006"),
    MODE_13H.crtc[:0x14] + b"\x00" + MODE_13H.crtc[0x15:0x17] + b"\xe3" + MODE_13H.crtc[0x18:],
    MODE_13H.graphics,
    MODE_13H.attribute,
)


class Adapter:
    """A VGA with its memory, as a guest sees it: ports, window and framebuffer."""

    def __init__(self) -> None:
        self.ram = FakeRam()
        self.clock = ManualClock()
        self.events: list[tuple[str, str, int]] = []
        self.vga = Vga(self.ram, self.clock, events=lambda *event: self.events.append(event))

    def out(self, port: int, value: int) -> None:
        self.vga.write(port - PORT_BASE, 1, value)

    def inp(self, port: int) -> int:
        return self.vga.read(port - PORT_BASE, 1)

    def dispi(self, index: int, value: int | None = None) -> int:
        self.vga.write(DISPI, 2, index)
        if value is not None:
            self.vga.write(DISPI + 1, 2, value)
        return self.vga.read(DISPI + 1, 2)

    def store(self, address: int, data: bytes) -> None:
        """Bytes at a guest-physical address of the window: memory where it is mapped, exits where it is not."""
        for offset, byte in enumerate(data):
            place = self.ram.find(address + offset)
            if place is None:
                self.vga.write(WINDOW + address + offset - 0xA0000, 1, byte)
            else:
                self.ram.view[place] = byte
                self.ram.dirty.add(place >> 12)

    def load(self, address: int, length: int = 1) -> bytes:
        result = bytearray()
        for offset in range(length):
            place = self.ram.find(address + offset)
            if place is None:
                result.append(self.vga.read(WINDOW + address + offset - 0xA0000, 1))
            else:
                result.append(self.ram.view[place])
        return bytes(result)

    def set_mode(self, mode: Mode) -> None:
        self.inp(0x3DA)
        self.inp(0x3BA)
        for port, value in mode.writes():
            self.out(port, value)

    def set_palette(self, colours: dict[int, tuple[int, int, int]]) -> None:
        """6-bit colours of the DAC."""
        for index, colour in colours.items():
            self.out(0x3C8, index)
            for component in colour:
                self.out(0x3C9, component)

    def graphics(self, index: int, value: int) -> None:
        self.out(0x3CE, index)
        self.out(0x3CF, value)

    def sequencer(self, index: int, value: int) -> None:
        self.out(0x3C4, index)
        self.out(0x3C5, value)

    def load_font(self, glyphs: dict[int, bytes]) -> None:
        """Characters of 16 lines into plane 2, as a BIOS does."""
        self.sequencer(2, 4)
        self.sequencer(4, 7)
        self.graphics(4, 2)
        self.graphics(5, 0)
        self.graphics(6, 4)
        for character, rows in glyphs.items():
            self.store(0xA0000 + 32 * character, rows)
        self.sequencer(2, 3)
        self.sequencer(4, 2)
        self.graphics(4, 0)
        self.graphics(5, 0x10)
        self.graphics(6, 0x0E)
