"""The record of the VGA, and what picture its registers describe: shared by the device and by whoever draws it.

Video memory is kept as doublewords of four planes (byte p of doubleword n is plane p at address n), so that chain-4
modes and the linear framebuffer are the memory as it is. While a text mode's window is mapped into the guest, its
characters and attributes are in :data:`SHADOW` instead, as the guest sees them.

Source: IBM VGA technical reference; Bochs "VBE DISPI" interface, version 5.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Final

from nonroot.hvm.device import StateError, StateRecord, array, blob, flag, u8, u16, u32
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = ["MEMORY_SIZE", "SHADOW", "SHADOW_SIZE", "VRAM_SIZE", "Picture", "PictureKind", "VgaState", "picture"]

VRAM_SIZE: Final = 16 << 20
"""Bytes of the linear framebuffer; the legacy planes are its first 256 KiB."""
SHADOW: Final = VRAM_SIZE
"""Offset of the text window's own memory, behind the framebuffer."""
SHADOW_SIZE: Final = 32 << 10
MEMORY_SIZE: Final = VRAM_SIZE + SHADOW_SIZE
"""Bytes of the memory that the device is given."""

CRTC_COUNT: Final = 0x19
ATTRIBUTE_COUNT: Final = 0x15
SEQUENCER_COUNT: Final = 5
GRAPHICS_COUNT: Final = 9
DISPI_COUNT: Final = 11

# DISPI registers
ID: Final = 0
XRES: Final = 1
YRES: Final = 2
BPP: Final = 3
ENABLE: Final = 4
BANK: Final = 5
VIRT_WIDTH: Final = 6
VIRT_HEIGHT: Final = 7
X_OFFSET: Final = 8
Y_OFFSET: Final = 9
MEMORY_64K: Final = 10

ENABLED: Final = 0x01
GET_CAPABILITIES: Final = 0x02
DAC_8BIT: Final = 0x20
LINEAR: Final = 0x40
NO_CLEAR: Final = 0x80

MAX_XRES: Final = 4096
MAX_YRES: Final = 2160
MAX_BPP: Final = 32
DEPTHS: Final = (4, 8, 15, 16, 24, 32)


@dataclass(slots=True)
class VgaState(StateRecord):
    """All registers. Video memory is memory, and kept with the guest's."""

    NAME: ClassVar[str] = "vga"

    config: bytes = blob(CONFIG_SIZE)
    misc: int = u8()
    feature: int = u8()
    subsystem: int = u8(default=1)
    sequencer_index: int = u8()
    sequencer: bytes = blob(SEQUENCER_COUNT)
    graphics_index: int = u8()
    graphics: bytes = blob(GRAPHICS_COUNT)
    crtc_index: int = u8()
    crtc: bytes = blob(CRTC_COUNT)
    attribute_index: int = u8()
    attribute_data: bool = flag()
    """The next write to 0x3C0 is data."""
    attribute: bytes = blob(ATTRIBUTE_COUNT)
    dac_mask: int = u8(default=0xFF)
    dac_reading: bool = flag()
    dac_read_index: int = u8()
    dac_write_index: int = u8()
    dac_component: int = u8(maximum=2)
    dac_held: bytes = blob(2)
    """Components written of a colour that is not complete."""
    dac: bytes = blob(768)
    latch: int = u32()
    dispi_index: int = u16()
    dispi: tuple[int, ...] = array("H", DISPI_COUNT)
    shadow: bool = flag()
    """Characters and attributes of the text window are in SHADOW."""

    def check_consistency(self) -> None:
        """A picture of the Bochs extension fits the memory: whoever draws it relies on that."""
        r = self.dispi
        if not r[ENABLE] & ENABLED:
            return
        stride = line_bytes(r[VIRT_WIDTH], r[BPP])
        fits = (
            r[BPP] in DEPTHS
            and 8 <= r[XRES] <= MAX_XRES
            and 1 <= r[YRES] <= MAX_YRES
            and r[X_OFFSET] + r[XRES] <= r[VIRT_WIDTH] <= 2 * MAX_XRES
            and (r[Y_OFFSET] + r[YRES]) * stride <= VRAM_SIZE
        )
        if not fits:
            raise StateError("vga state: dispi describes a picture that does not fit")


class PictureKind(Enum):
    """How video memory becomes pixels."""

    BLANK = "blank"
    TEXT = "text"
    PLANAR = "planar"
    """One bit of each plane a pixel."""
    CGA = "cga"
    """Two bits a pixel, bytes from plane 0 and 1 in turns."""
    CHAINED = "chained"
    """A byte a pixel, planes in turns: mode 13h and its unchained relatives."""
    LINEAR = "linear"
    """The Bochs extension's packed pixels."""


@dataclass(frozen=True, slots=True)
class Picture:
    """What is shown: everything but the contents. Addresses and strides are in bytes of video memory."""

    kind: PictureKind
    width: int
    """Pixels; each of the guest's is one, also where a monitor would show it several times."""
    height: int
    start: int = 0
    stride: int = 0
    bits: int = 0
    """Per pixel, of LINEAR."""
    split: int = 1 << 16
    """The row from which on memory is shown from address 0."""
    columns: int = 0
    rows: int = 0
    cell_width: int = 8
    cell_height: int = 16
    repeat: int = 1
    """Rows that share an address; ``row_bits`` tell them apart."""
    row_bits: int = 0
    """CRTC mode control bits 1:0, inverted: address bits that the scan line's number replaces, as CGA's have it."""
    row_shift: int = 14
    """The lowest of these address bits."""

    @property
    def is_text(self) -> bool:
        """Whether there are characters on the screen."""
        return self.kind is PictureKind.TEXT

    def extent(self) -> int:
        """Bytes from ``start`` to the end of what is shown, where it is shown row after row."""
        return self.stride * (self.rows if self.is_text else self.height)


def line_bytes(virtual_width: int, bits: int) -> int:
    """Bytes of a row of the Bochs extension."""
    return virtual_width // 2 if bits == 4 else virtual_width * ((bits + 7) // 8)


def picture(state: VgaState) -> Picture:
    """What the registers say is to be shown."""
    dispi, crtc = state.dispi, state.crtc
    if dispi[ENABLE] & ENABLED:
        bits = dispi[BPP]
        stride = line_bytes(dispi[VIRT_WIDTH], bits)
        width, height = max(dispi[XRES], 1), max(dispi[YRES], 1)
        across = dispi[X_OFFSET] // 2 if bits == 4 else dispi[X_OFFSET] * ((bits + 7) // 8)
        start = dispi[Y_OFFSET] * stride + across
        kind = PictureKind.PLANAR if bits == 4 else PictureKind.LINEAR
        return Picture(kind, width, height, start, stride, bits)
    overflow = crtc[0x07]
    lines = (crtc[0x12] | (overflow & 0x02) << 7 | (overflow & 0x40) << 3) + 1
    compare = (crtc[0x18] | (overflow & 0x10) << 4 | (crtc[0x09] & 0x40) << 3) + 1
    repeat = (crtc[0x09] & 0x1F) + 1
    columns = crtc[0x01] + 1
    start = (crtc[0x0C] << 8 | crtc[0x0D]) * 4
    stride = crtc[0x13] * 8
    blank = not state.attribute_index & 0x20 or state.sequencer[1] & 0x20 or state.sequencer[0] & 3 != 3
    doubled = 2 if crtc[0x09] & 0x80 else 1
    if not state.graphics[6] & 1:
        cell_height = min(repeat, 32)
        cell_width = 8 if state.sequencer[1] & 1 else 9
        rows = max(lines // doubled // cell_height, 1)
        kind = PictureKind.BLANK if blank else PictureKind.TEXT
        return Picture(
            kind,
            columns * cell_width,
            rows * cell_height,
            start,
            stride,
            split=-(-compare // doubled // cell_height),
            columns=columns,
            rows=rows,
            cell_width=cell_width,
            cell_height=cell_height,
        )
    # Where the scan line's number is part of the address, as in CGA's modes, lines are not repeated but apart.
    row_bits = ~crtc[0x17] & 3 if 1 < repeat <= 4 else 0
    each = doubled if row_bits else repeat * doubled
    height = max(lines // each, 1)
    split = -(-compare // each)
    width = columns * 8
    shared = repeat if row_bits else 1
    row_shift = 15 if crtc[0x17] & 0x40 else 14
    if blank:
        return Picture(PictureKind.BLANK, width, height)
    if state.graphics[5] & 0x40:
        kind, width = PictureKind.CHAINED, width // 2
    elif state.graphics[5] & 0x20:
        kind = PictureKind.CGA
    else:
        kind = PictureKind.PLANAR
    return Picture(
        kind, max(width, 4), height, start, stride, split=split, repeat=shared, row_bits=row_bits, row_shift=row_shift
    )
