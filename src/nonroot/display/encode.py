"""Pictures as a viewer wants them: its pixel format, and the raw, ZRLE and Tight encodings.

Source: RFC 6143, sections 7.6 and 7.7; the Tight encoding as the community's protocol document has it.
"""

import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Final

from PIL import Image, ImageChops

from nonroot.display.rfb import Encoding, PixelFormat

__all__ = ["Encoder", "Pixels", "Rect", "colour_map"]

Rect = tuple[int, int, int, int]
"""Left, top, right, bottom; pixels, the last two excluded."""

TILE: Final = 64
TIGHT_WIDTH: Final = 2048
TIGHT_PIXELS: Final = 1 << 16
TIGHT_FILL: Final = 0x80
TIGHT_FILTER: Final = 0x40
TIGHT_PALETTE: Final = 1
TIGHT_PLAIN_LIMIT: Final = 12
LEVEL: Final = 3
PREFERRED: Final = (Encoding.TIGHT, Encoding.ZRLE, Encoding.RAW)


class Pixels:
    """Turns RGB pictures into the bytes of one pixel format."""

    def __init__(self, wanted: PixelFormat) -> None:
        self.format = wanted
        self.size = wanted.bits // 8
        self._tables = [self._table(place) for place in range(self.size)]
        used = 0
        for maximum, shift in zip(wanted.maxima, wanted.shifts, strict=True):
            used |= maximum << shift
        self._compact: tuple[int, int] | None = None
        """Which bytes of four a compact pixel has."""
        if wanted.bits == 32 and wanted.depth <= 24:
            if used < 1 << 24:
                self._compact = (1, 4) if wanted.big_endian else (0, 3)
            elif not used & 0xFF:
                self._compact = (0, 3) if wanted.big_endian else (1, 4)
        self.is_plain = wanted.bits == 32 and wanted.depth == 24 and wanted.maxima == (255, 255, 255)
        """Tight sends such pixels as red, green, blue."""

    def _table(self, place: int) -> list[list[int]]:
        """For one byte of the pixel: what each value of each channel adds to it."""
        wanted = self.format
        shift = 8 * (self.size - 1 - place if wanted.big_endian else place)
        return [
            [((value * maximum + 127) // 255 << offset) >> shift & 0xFF for value in range(256)]
            for maximum, offset in zip(wanted.maxima, wanted.shifts, strict=True)
        ]

    def _bands(self, picture: Image.Image) -> list[Image.Image]:
        channels = picture.split()
        bands = []
        for tables in self._tables:
            band = channels[0].point(tables[0])
            for channel, table in zip(channels[1:], tables[1:], strict=True):
                band = ImageChops.add(band, channel.point(table))
            bands.append(band)
        return bands

    def full(self, picture: Image.Image) -> bytes:
        """Pixels of the whole format."""
        wanted = self.format
        if wanted.bits == 32 and wanted.maxima == (255, 255, 255) and not wanted.big_endian:
            if wanted.shifts == (16, 8, 0):
                return picture.tobytes("raw", "BGRX")
            if wanted.shifts == (0, 8, 16):
                return picture.tobytes("raw", "RGBX")
        bands = self._bands(picture)
        if self.size == 1:
            return bands[0].tobytes()
        return Image.merge("LA" if self.size == 2 else "RGBA", bands).tobytes()

    def compact(self, picture: Image.Image) -> bytes:
        """ZRLE's pixels: three bytes where the format leaves one of four unused."""
        if self._compact is None:
            return self.full(picture)
        first, end = self._compact
        return Image.merge("RGB", self._bands(picture)[first:end]).tobytes()

    def tight(self, picture: Image.Image) -> bytes:
        """Tight's pixels."""
        return picture.tobytes() if self.is_plain else self.full(picture)


def colour_map() -> bytes:
    """The message that tells a viewer without true colours what our 256 colours are."""
    entries = bytearray(struct.pack(">BxHH", 1, 0, 256))
    for index in range(256):
        red, green, blue = index & 7, index >> 3 & 7, index >> 6
        entries += struct.pack(">HHH", red * 65535 // 7, green * 65535 // 7, blue * 65535 // 3)
    return bytes(entries)


class Encoder:
    """One viewer's encoder; its compressed streams go on from update to update."""

    def __init__(self) -> None:
        self.pixels = Pixels(PixelFormat())
        self.encodings: tuple[Encoding, ...] = ()
        self._zrle = zlib.compressobj(LEVEL)
        self._tight = zlib.compressobj(LEVEL)

    def set_format(self, wanted: PixelFormat) -> None:
        """Use another pixel format."""
        self.pixels = Pixels(wanted)

    @property
    def encoding(self) -> Encoding:
        """The first that the viewer and we know."""
        return next((encoding for encoding in self.encodings if encoding in PREFERRED), Encoding.RAW)

    def update(self, picture: Image.Image, rects: Iterable[Rect], extra: Sequence[bytes] = ()) -> bytes:
        """A whole FramebufferUpdate; ``extra``: pseudo-rectangles before it."""
        pieces = list(extra)
        encoding = self.encoding
        for rect in rects:
            if encoding is Encoding.TIGHT:
                pieces += [self._tight_piece(picture, part) for part in _parts(rect)]
            elif encoding is Encoding.ZRLE:
                pieces.append(self._zrle_piece(picture, rect))
            else:
                pieces.append(_header(rect, Encoding.RAW) + self.pixels.full(picture.crop(rect)))
        return struct.pack(">BxH", 0, len(pieces)) + b"".join(pieces)

    def _zrle_piece(self, picture: Image.Image, rect: Rect) -> bytes:
        left, top, right, bottom = rect
        pixels = self.pixels
        plain = bytearray()
        for y in range(top, bottom, TILE):
            for x in range(left, right, TILE):
                tile = picture.crop((x, y, min(x + TILE, right), min(y + TILE, bottom)))
                colours = tile.getcolors(2)
                if colours is None:
                    plain += b"\0" + pixels.compact(tile)
                elif len(colours) == 1:
                    plain += b"\1" + pixels.compact(tile.crop((0, 0, 1, 1)))
                else:
                    palette, bits = _two_colours(tile, colours)
                    plain += b"\2" + pixels.compact(palette) + bits
        data = self._zrle.compress(bytes(plain)) + self._zrle.flush(zlib.Z_SYNC_FLUSH)
        return _header(rect, Encoding.ZRLE) + struct.pack(">I", len(data)) + data

    def _tight_piece(self, picture: Image.Image, rect: Rect) -> bytes:
        part = picture.crop(rect)
        header = _header(rect, Encoding.TIGHT)
        colours = part.getcolors(2)
        if colours is not None and len(colours) == 1:
            return header + bytes((TIGHT_FILL,)) + self.pixels.tight(part.crop((0, 0, 1, 1)))
        if colours is not None:
            palette, data = _two_colours(part, colours)
            header += bytes((TIGHT_FILTER, TIGHT_PALETTE, 1)) + self.pixels.tight(palette)
        else:
            data = self.pixels.tight(part)
            header += b"\0"
        if len(data) < TIGHT_PLAIN_LIMIT:
            return header + data
        packed = self._tight.compress(data) + self._tight.flush(zlib.Z_SYNC_FLUSH)
        return header + _length(len(packed)) + packed


def _two_colours(part: Image.Image, colours: Sequence[tuple[int, object]]) -> tuple[Image.Image, bytes]:
    """The palette as a picture of two pixels, and a bit for each pixel of ``part``, rows padded to bytes."""
    first, second = (colour for _, colour in colours)
    assert isinstance(first, tuple)
    assert isinstance(second, tuple)
    palette = Image.new("RGB", (2, 1), first)
    palette.putpixel((1, 0), second)
    channel = next(index for index in range(3) if first[index] != second[index])
    table = [255 if value == second[channel] else 0 for value in range(256)]
    return palette, part.getchannel(channel).point(table, "1").tobytes()


def _header(rect: Rect, encoding: Encoding) -> bytes:
    left, top, right, bottom = rect
    return struct.pack(">HHHHi", left, top, right - left, bottom - top, encoding)


def _length(value: int) -> bytes:
    """Tight's length of one to three bytes."""
    if value < 1 << 7:
        return bytes((value,))
    if value < 1 << 14:
        return bytes((value & 0x7F | 0x80, value >> 7))
    return bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))


def _parts(rect: Rect) -> Iterable[Rect]:
    """Tight's rectangles are at most 2048 wide; they are kept small enough for lengths of three bytes."""
    left, top, right, bottom = rect
    for x in range(left, right, TIGHT_WIDTH):
        end = min(x + TIGHT_WIDTH, right)
        rows = max(TIGHT_PIXELS // (end - x), 1)
        for y in range(top, bottom, rows):
            yield x, y, end, min(y + rows, bottom)
