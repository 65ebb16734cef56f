"""Pictures of every kind of mode, compared with what a plain drawing of the same thing gives."""

import random

import pytest
from PIL import Image

from nonroot.devices.vga import Vga
from nonroot.display.render import Renderer
from nonroot.display.text import screen_rows
from tests.devices.modes import CGA2, CGA4, MODE_13H, MODE_X, PLANAR, TEXT, Adapter

COLOURS = {index: (index & 0x3F, index * 7 & 0x3F, index * 13 & 0x3F) for index in range(256)}


def rgb(index: int) -> tuple[int, int, int]:
    """A colour of the DAC as 8 bits a channel."""
    red, green, blue = (value << 2 | value >> 4 for value in COLOURS[index])
    return red, green, blue


@pytest.fixture
def adapter() -> Adapter:
    made = Adapter()
    made.set_palette(COLOURS)
    return made


def shot(adapter: Adapter) -> Image.Image:
    return Renderer(adapter.ram.view).render(adapter.vga.state())


def attribute_colour(mode_attributes: bytes, index: int) -> tuple[int, int, int]:
    return rgb(mode_attributes[index])


def same(got: Image.Image, wanted: Image.Image) -> None:
    assert got.size == wanted.size
    assert got.tobytes() == wanted.tobytes()


GLYPHS = {65: bytes(range(0x40, 0x50)), 66: b"\x81" * 16, 0xC4: b"\x01" * 16, 32: bytes(16)}


def draw_text(cells: list[tuple[int, int, int, int]], size: tuple[int, int], wide: bool) -> Image.Image:
    """(column, row, character, attribute), pixel by pixel."""
    picture = Image.new("RGB", size, attribute_colour(TEXT.attribute, 0))
    for column, row, character, attribute in cells:
        for y in range(16):
            bits = GLYPHS[character][y]
            for x in range(9 if wide else 8):
                lit = bits >> 7 - x & 1 if x < 8 else (bits & 1 if 0xC0 <= character <= 0xDF else 0)
                colour = attribute & 15 if lit else attribute >> 4 & 7
                place = (column * (9 if wide else 8) + x, row * 16 + y)
                picture.putpixel(place, attribute_colour(TEXT.attribute, colour))
    return picture


@pytest.mark.parametrize("wide", [True, False])
def test_text(adapter: Adapter, wide: bool) -> None:
    adapter.set_mode(TEXT)
    if not wide:
        adapter.sequencer(1, 1)
    adapter.load_font(GLYPHS)
    adapter.out(0x3D4, 0x0A)
    adapter.out(0x3D5, 0x20)  # no cursor
    adapter.store(0xB8000, b"\x20\x00" * 2000)
    placed = [(0, 0, 65, 0x1E), (1, 0, 66, 0x47), (79, 24, 65, 0x02), (5, 3, 0xC4, 0x9F)]
    for column, row, character, attribute in placed:
        adapter.store(0xB8000 + 160 * row + 2 * column, bytes((character, attribute)))
    same(shot(adapter), draw_text(placed, (720, 400) if wide else (640, 400), wide))


def test_text_is_drawn_again_only_where_it_changed(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.load_font(GLYPHS)
    renderer = Renderer(adapter.ram.view)
    rng = random.Random(5)
    for _ in range(20):
        for _ in range(10):
            adapter.store(0xB8000 + 2 * rng.randrange(2000), bytes((rng.choice([65, 66, 32]), rng.randrange(256))))
        adapter.out(0x3D4, 0x0F)
        adapter.out(0x3D5, rng.randrange(256))
        same(renderer.render(adapter.vga.state()), shot(adapter))
    adapter.load_font({65: b"\x3c" * 16})
    same(renderer.render(adapter.vga.state()), shot(adapter))


def test_the_cursor(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.load_font(GLYPHS)
    adapter.store(0xB8000, b"\x20\x0c" * 2000)
    for index, value in ((0x0A, 13), (0x0B, 14), (0x0E, 0), (0x0F, 81)):
        adapter.out(0x3D4, index)
        adapter.out(0x3D5, value)
    picture = shot(adapter)
    wanted = Image.new("RGB", (720, 400), attribute_colour(TEXT.attribute, 0))
    wanted.paste(attribute_colour(TEXT.attribute, 12), (9, 16 + 13, 18, 16 + 15))
    same(picture, wanted)


def test_text_start_address_and_split(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    for row in range(60):
        adapter.store(0xB8000 + 160 * row, f"line {row:02}".encode().ljust(80).replace(b"", b"\x07")[1:161])
    assert (screen_rows(adapter.vga.state(), adapter.ram.view) or [])[0] == "line 00"
    adapter.out(0x3D4, 0x0D)
    adapter.out(0x3D5, 160)  # two rows of 80 further
    rows = screen_rows(adapter.vga.state(), adapter.ram.view)
    assert rows is not None
    assert (rows[0], rows[24]) == ("line 02", "line 26")
    # The last five rows show memory from its start.
    compare = 20 * 16 - 1
    for index, value in (
        (0x18, compare & 0xFF),
        (0x07, TEXT.crtc[7] & ~0x10 | (compare >> 8 & 1) << 4),
        (0x09, TEXT.crtc[9] & ~0x40),
    ):
        adapter.out(0x3D4, index)
        adapter.out(0x3D5, value)
    rows = screen_rows(adapter.vga.state(), adapter.ram.view)
    assert rows is not None
    assert (rows[19], rows[20], rows[24]) == ("line 21", "line 00", "line 04")


def test_text_is_the_same_mapped_and_in_the_planes(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.store(0xB8000, b"".join(bytes((n & 0xFF, n >> 3 & 0xFF)) for n in range(2000)))
    assert adapter.ram.shown
    mapped = screen_rows(adapter.vga.state(), adapter.ram.view)
    assert mapped is not None
    assert mapped[0].startswith(" ☺☻♥♦♣♠•◘○◙♂♀♪♫☼►◄↕‼¶§▬↨↑↓→←∟↔▲▼ !")
    picture = shot(adapter)
    adapter.vga.memory.settle()
    assert not adapter.vga.state().shadow
    assert screen_rows(adapter.vga.state(), adapter.ram.view) == mapped
    same(shot(adapter), picture)


def test_planar(adapter: Adapter) -> None:
    adapter.set_mode(PLANAR)
    wanted = Image.new("RGB", (640, 480), attribute_colour(PLANAR.attribute, 0))
    rng = random.Random(2)
    adapter.graphics(5, 2)
    for _ in range(300):
        x, y, colour = rng.randrange(640), rng.randrange(480), rng.randrange(16)
        adapter.graphics(8, 0x80 >> (x & 7))
        address = 0xA0000 + y * 80 + x // 8
        adapter.load(address)
        adapter.store(address, bytes((colour,)))
        wanted.putpixel((x, y), attribute_colour(PLANAR.attribute, colour))
    same(shot(adapter), wanted)
    assert screen_rows(adapter.vga.state(), adapter.ram.view) is None


def test_mode_13h(adapter: Adapter) -> None:
    adapter.set_mode(MODE_13H)
    data = random.Random(3).randbytes(64000)
    adapter.store(0xA0000, data)
    wanted = Image.new("RGB", (320, 200))
    wanted.putdata([rgb(byte) for byte in data])
    same(shot(adapter), wanted)
    adapter.out(0x3C6, 0x0F)
    wanted.putdata([rgb(byte & 0x0F) for byte in data])
    same(shot(adapter), wanted)


def test_mode_x(adapter: Adapter) -> None:
    adapter.set_mode(MODE_X)
    wanted = Image.new("RGB", (320, 200))
    for y in range(200):
        for plane in range(4):
            adapter.sequencer(2, 1 << plane)
            adapter.store(0xA0000 + 80 * y, bytes((x * 4 + plane ^ y) & 0xFF for x in range(80)))
    wanted.putdata([rgb((x ^ y) & 0xFF) for y in range(200) for x in range(320)])
    same(shot(adapter), wanted)


def test_cga_four_colours(adapter: Adapter) -> None:
    adapter.set_mode(CGA4)
    data = random.Random(4).randbytes(0x4000)
    adapter.store(0xB8000, data)
    wanted = Image.new("RGB", (320, 200))
    for y in range(200):
        for x in range(320):
            byte = data[(y & 1) * 0x2000 + (y >> 1) * 80 + x // 4]
            wanted.putpixel((x, y), attribute_colour(CGA4.attribute, byte >> 6 - 2 * (x & 3) & 3))
    same(shot(adapter), wanted)


def test_cga_two_colours(adapter: Adapter) -> None:
    adapter.set_mode(CGA2)
    data = random.Random(4).randbytes(0x4000)
    adapter.store(0xB8000, data)
    wanted = Image.new("RGB", (640, 200))
    for y in range(200):
        for x in range(640):
            byte = data[(y & 1) * 0x2000 + (y >> 1) * 80 + x // 8]
            wanted.putpixel((x, y), attribute_colour(CGA2.attribute, byte >> 7 - (x & 7) & 1))
    same(shot(adapter), wanted)


@pytest.mark.parametrize("bits", [8, 15, 16, 24, 32])
def test_linear(adapter: Adapter, bits: int) -> None:
    width, height, virtual = 64, 40, 80
    for index, value in ((1, width), (2, height), (3, bits), (4, 0x41), (6, virtual), (8, 8), (9, 3)):
        adapter.dispi(index, value)
    size = (bits + 7) // 8
    rng = random.Random(bits)
    wanted = Image.new("RGB", (width, height))
    for y in range(height):
        for x in range(width):
            value = rng.getrandbits(bits)
            at = ((y + 3) * virtual + x + 8) * size
            adapter.ram.view[at : at + size] = value.to_bytes(size, "little")
            if bits == 8:
                colour = rgb(value)
            elif bits == 15:
                colour = tuple((value >> shift & 31) * 255 // 31 for shift in (10, 5, 0))  # type: ignore[assignment]
            elif bits == 16:
                red, green, blue = value >> 11, value >> 5 & 63, value & 31
                colour = (red * 255 // 31, green * 255 // 63, blue * 255 // 31)
            else:
                colour = (value >> 16 & 255, value >> 8 & 255, value & 255)
            wanted.putpixel((x, y), colour)
    same(shot(adapter), wanted)


def test_blank(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.store(0xB8000, b"A\x1f" * 100)
    adapter.sequencer(1, 0x20)
    assert shot(adapter).getcolors() == [(720 * 400, (0, 0, 0))]
    adapter.sequencer(1, 0)
    assert shot(adapter).getcolors() != [(720 * 400, (0, 0, 0))]


def test_any_registers_can_be_drawn() -> None:
    """Whatever a guest writes, there is a picture of a bounded size."""
    rng = random.Random(9)
    for _ in range(30):
        adapter = Adapter()
        adapter.ram.view[:0x8000] = rng.randbytes(0x8000)
        for _ in range(rng.randrange(60)):
            kind = rng.randrange(5)
            if kind == 0:
                adapter.sequencer(rng.randrange(5), rng.randrange(256))
            elif kind == 1:
                adapter.graphics(rng.randrange(9), rng.randrange(256))
            elif kind == 2:
                adapter.out(0x3D4, rng.randrange(0x19))
                adapter.out(0x3D5, rng.choice([0, 1, 31, 63, 127, rng.randrange(256)]))
            elif kind == 3:
                adapter.out(0x3C0, rng.choice([0x20, rng.randrange(256)]))
            else:
                adapter.dispi(rng.choice([1, 2, 3, 4, 6, 8, 9]), rng.choice([1, 4, 8, 32, 640, rng.randrange(2048)]))
        adapter.out(0x3C2, 1)
        adapter.sequencer(0, 3)
        picture = shot(adapter)
        assert 0 < picture.width <= 4096
        assert 0 < picture.height <= 2160
        screen_rows(adapter.vga.state(), adapter.ram.view)
    assert isinstance(adapter.vga, Vga)
