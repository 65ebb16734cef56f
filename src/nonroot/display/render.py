"""Pictures of a screen, from the display adapter's registers and memory.

Each pixel of the guest is one pixel of the picture. The cursor is drawn, and does not blink; blinking text is shown.
"""

from collections.abc import Iterator
from typing import Final

from PIL import Image, ImageChops

from nonroot.devices.vga_state import SHADOW, SHADOW_SIZE, VRAM_SIZE, Picture, PictureKind, VgaState, picture
from nonroot.display.text import Memory, cells

__all__ = ["Renderer"]

DAC_8BIT: Final = 0x20
ENABLE: Final = 4
LEGACY_SIZE: Final = 256 << 10
GLYPHS_KEPT: Final = 8192
_FONT_PLACES: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_PACKED: Final = {15: "BGR;15", 16: "BGR;16", 24: "BGR", 32: "BGRX"}
_PAIRS: Final = [bytes(byte >> 6 - 2 * place & 3 for byte in range(256)) for place in range(4)]
_PLANE_TABLES: Final = [[0] * 255 + [1 << plane] for plane in range(4)]


def dac_palette(state: VgaState) -> bytes:
    """256 colours, red, green and blue, 8 bits each."""
    if state.dispi[ENABLE] & DAC_8BIT:
        full = state.dac
    else:
        full = bytes((value & 0x3F) << 2 | (value & 0x3F) >> 4 for value in state.dac)
    if state.dac_mask == 0xFF:
        return full
    return b"".join(full[3 * (index & state.dac_mask) :][:3] for index in range(256))


def attribute_palette(state: VgaState) -> bytes:
    """The 16 colours of text and planar modes."""
    full, attribute = dac_palette(state), state.attribute
    colours = bytearray()
    for index in range(16):
        value = attribute[index & (attribute[0x12] & 0x0F)]
        if attribute[0x10] & 0x80:
            value = (attribute[0x14] & 0x0F) << 4 | value & 0x0F
        else:
            value = (attribute[0x14] & 0x0C) << 4 | value & 0x3F
        colours += full[3 * value : 3 * value + 3]
    return bytes(colours)


class Renderer:
    """Draws one screen again and again; what has not changed of a text is not drawn again."""

    def __init__(self, memory: Memory) -> None:
        """``memory``: the adapter's, :data:`nonroot.devices.vga_state.MEMORY_SIZE` bytes; it may change meanwhile."""
        self._memory = memory
        self._glyphs: dict[tuple[bytes, int, int, int], Image.Image] = {}
        self._canvas: Image.Image | None = None
        self._drawn: list[bytes] = []
        self._fonts: tuple[object, ...] = ()

    def render(self, state: VgaState) -> Image.Image:
        """The screen now, mode RGB."""
        shown = picture(state)
        size = (shown.width, shown.height)
        if shown.kind is PictureKind.BLANK:
            return Image.new("RGB", size)
        if shown.kind is PictureKind.LINEAR:
            return self._linear(state, shown)
        if shown.kind is PictureKind.TEXT:
            indices = self._text(state, shown)
            return _coloured(indices, attribute_palette(state))
        memory = _planes(self._memory) if state.shadow else self._memory
        if shown.kind is PictureKind.CHAINED:
            data = _lines(memory, shown, shown.width)
            return _coloured(Image.frombytes("L", size, data), dac_palette(state))
        if shown.kind is PictureKind.CGA:
            return _coloured(_cga(memory, shown), attribute_palette(state))
        data = _lines(memory, shown, shown.width // 8 * 4)
        return _coloured(_planar(size, data), attribute_palette(state))

    # ── graphics ──

    def _linear(self, state: VgaState, shown: Picture) -> Image.Image:
        length = shown.stride * shown.height
        data = bytes(self._memory[shown.start : min(shown.start + length, VRAM_SIZE)]).ljust(length, b"\0")
        size = (shown.width, shown.height)
        if shown.bits == 8:
            indices = Image.frombytes("L", size, data, "raw", "L", shown.stride, 1)
            return _coloured(indices, dac_palette(state))
        return Image.frombytes("RGB", size, data, "raw", _PACKED[shown.bits], shown.stride, 1)

    # ── text ──

    def _text(self, state: VgaState, shown: Picture) -> Image.Image:
        rows = cells(state, shown, self._memory)
        sequencer, mode = state.sequencer, state.attribute[0x10]
        first = (sequencer[3] >> 2 & 3) | (sequencer[3] >> 3 & 4)
        second = (sequencer[3] & 3) | (sequencer[3] >> 2 & 4)
        fonts = (self._font(second), self._font(first))
        look = (shown.columns, shown.rows, shown.cell_width, shown.cell_height, mode, *fonts)
        if self._canvas is None or look != self._fonts:
            self._canvas = Image.new("L", (shown.width, shown.height))
            self._drawn, self._fonts = [b""] * shown.rows, look
        canvas, width, height = self._canvas, shown.cell_width, shown.cell_height
        for number, (row, before) in enumerate(zip(rows, self._drawn, strict=True)):
            if row == before:
                continue
            for column in range(shown.columns):
                cell = row[2 * column : 2 * column + 2]
                if cell != before[2 * column : 2 * column + 2]:
                    glyph = self._glyph(cell[0], cell[1], fonts, mode, width, height)
                    canvas.paste(glyph, (column * width, number * height))
        self._drawn = rows
        return self._with_cursor(state, shown, rows, canvas)

    def _font(self, number: int) -> bytes:
        place = _FONT_PLACES[number] * 0x2000 * 4 + 2
        return bytes(self._memory[place : place + 0x2000 * 4 : 4])

    def _glyph(
        self, character: int, attribute: int, fonts: tuple[bytes, bytes], mode: int, width: int, height: int
    ) -> Image.Image:
        font = fonts[attribute >> 3 & 1]
        wide = width == 9 and bool(mode & 4) and 0xC0 <= character <= 0xDF
        bits = font[32 * character : 32 * character + height]
        look = attribute & 0x7F if mode & 8 else attribute
        key = (bits, look, width, wide)
        glyph = self._glyphs.get(key)
        if glyph is None:
            if width == 9:
                bits = b"".join(bytes((line, (line & 1) << 7 if wide else 0)) for line in bits)
            table = [look >> 4] * 255 + [look & 0x0F]
            glyph = Image.frombytes("1", (width, height), bits).convert("L").point(table)
            if len(self._glyphs) >= GLYPHS_KEPT:
                self._glyphs.clear()
            self._glyphs[key] = glyph
        return glyph

    def _with_cursor(self, state: VgaState, shown: Picture, rows: list[bytes], canvas: Image.Image) -> Image.Image:
        crtc = state.crtc
        top, bottom = crtc[0x0A] & 0x1F, min(crtc[0x0B] & 0x1F, shown.cell_height - 1)
        place = (crtc[0x0E] << 8 | crtc[0x0F]) - shown.start // 4
        across = shown.stride // 4
        if crtc[0x0A] & 0x20 or top > bottom or place < 0 or not across:
            return canvas
        row, column = divmod(place, across)
        if row >= min(shown.rows, shown.split) or column >= shown.columns:
            return canvas
        colour = rows[row][2 * column + 1] & 0x0F
        x, y = column * shown.cell_width, row * shown.cell_height
        result = canvas.copy()
        result.paste(colour, (x, y + top, x + shown.cell_width, y + bottom + 1))
        return result


def _planes(memory: Memory) -> bytes:
    """The legacy planes, with the text window's memory where it belongs."""
    planes = bytearray(memory[:LEGACY_SIZE])
    planes[0 : 2 * SHADOW_SIZE : 4] = memory[SHADOW : SHADOW + SHADOW_SIZE : 2]
    planes[1 : 2 * SHADOW_SIZE : 4] = memory[SHADOW + 1 : SHADOW + SHADOW_SIZE : 2]
    return bytes(planes)


def _lines(memory: Memory, shown: Picture, length: int) -> bytes:
    """``length`` bytes of each row of a legacy mode."""
    addresses = list(_row_addresses(shown))
    step = shown.stride
    if step == length and addresses == list(range(addresses[0], addresses[0] + len(addresses) * step, step)):
        data = bytes(memory[addresses[0] : addresses[0] + length * shown.height])
    else:
        data = b"".join(bytes(memory[at : at + length]).ljust(length, b"\0") for at in addresses)
    return data.ljust(length * shown.height, b"\0")


def _cga(memory: Memory, shown: Picture) -> Image.Image:
    data = _lines(memory, shown, shown.width // 2)
    pairs = bytearray(len(data) // 2)
    pairs[0::2], pairs[1::2] = data[0::4], data[1::4]
    pixels = bytearray(len(pairs) * 4)
    for place, table in enumerate(_PAIRS):
        pixels[place::4] = pairs.translate(table)
    return Image.frombytes("L", (shown.width, shown.height), bytes(pixels))


def _row_addresses(shown: Picture) -> Iterator[int]:
    for row in range(shown.height):
        base, line = (shown.start, row) if row < shown.split else (0, row - shown.split)
        address = base + line // shown.repeat * shown.stride
        scan = line % shown.repeat
        for bit in range(2):
            if shown.row_bits >> bit & 1:
                place = 1 << shown.row_shift + bit
                address = address & ~place | (place if scan >> bit & 1 else 0)
        yield address % (VRAM_SIZE - shown.width)


def _planar(size: tuple[int, int], data: bytes) -> Image.Image:
    result: Image.Image | None = None
    for plane, table in enumerate(_PLANE_TABLES):
        bits = Image.frombytes("1", size, data[plane::4]).convert("L").point(table)
        result = bits if result is None else ImageChops.add(result, bits)
    assert result is not None
    return result


def _coloured(indices: Image.Image, palette: bytes) -> Image.Image:
    """Indices (mode L) as RGB."""
    padded = palette.ljust(768, b"\0")
    return Image.merge("RGB", [indices.point(list(padded[channel::3])) for channel in range(3)])
