"""The VGA's registers, planes and windows; expectations from the IBM VGA technical reference."""

import itertools
import random
from dataclasses import replace

import pytest

from nonroot.devices.vga import DISPI, FRAME_NS, MMIO, WINDOW, Vga
from nonroot.devices.vga_state import MEMORY_SIZE, SHADOW, VRAM_SIZE, VgaState
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.device import StateError
from tests.devices.modes import CGA4, MODE_13H, MONO_WINDOW_TEXT, PLANAR, TEXT, Adapter
from tests.hvm.makers import FakeRam


@pytest.fixture
def adapter() -> Adapter:
    return Adapter()


# ── registers ──


def test_registers_keep_what_they_have(adapter: Adapter) -> None:
    adapter.out(0x3C4, 2)
    adapter.out(0x3C5, 0xFF)
    assert adapter.inp(0x3C4) == 2
    assert adapter.inp(0x3C5) == 0x0F
    adapter.out(0x3CE, 5)
    adapter.out(0x3CF, 0xFF)
    assert adapter.inp(0x3CF) == 0x7B
    adapter.out(0x3C2, 0x67)
    assert adapter.inp(0x3CC) == 0x67


def test_the_crtc_answers_where_misc_says(adapter: Adapter) -> None:
    adapter.out(0x3C2, 0x67)
    adapter.out(0x3D4, 0x0E)
    adapter.out(0x3D5, 0x12)
    assert adapter.inp(0x3D5) == 0x12
    assert adapter.inp(0x3B5) == 0xFF
    adapter.out(0x3C2, 0x66)
    assert adapter.inp(0x3D5) == 0xFF
    assert adapter.inp(0x3B5) == 0x12


def test_crtc_write_protection(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    assert TEXT.crtc[0x11] & 0x80
    for index, value, kept in ((0x01, 0x11, TEXT.crtc[1]), (0x07, 0xFF, TEXT.crtc[7] | 0x10), (0x0E, 0x33, 0x33)):
        adapter.out(0x3D4, index)
        adapter.out(0x3D5, value)
        assert adapter.inp(0x3D5) == kept


def test_attribute_flip_flop(adapter: Adapter) -> None:
    adapter.out(0x3C2, 0x67)
    adapter.out(0x3C0, 0x03)
    adapter.out(0x3C0, 0x2A)
    adapter.out(0x3C0, 0x04)  # an index
    adapter.inp(0x3DA)  # an index is expected again
    adapter.out(0x3C0, 0x03)
    assert adapter.inp(0x3C1) == 0x2A
    adapter.out(0x3C0, 0x15)
    assert adapter.inp(0x3C1) == 0x15


def test_dac(adapter: Adapter) -> None:
    adapter.set_palette({7: (1, 2, 0xFF), 8: (4, 5, 6)})
    assert adapter.inp(0x3C8) == 9
    assert adapter.inp(0x3C7) == 0
    adapter.out(0x3C7, 7)
    assert adapter.inp(0x3C7) == 3
    assert [adapter.inp(0x3C9) for _ in range(6)] == [1, 2, 0x3F, 4, 5, 6]


def test_sixteen_bit_ports(adapter: Adapter) -> None:
    adapter.vga.write(0x3C4 - 0x3B0, 2, 0x0A02)
    assert adapter.inp(0x3C4) == 2
    assert adapter.inp(0x3C5) == 0x0A
    assert adapter.vga.read(0x3C4 - 0x3B0, 2) == 0x0A02


def test_retrace_comes_and_goes_with_time(adapter: Adapter) -> None:
    adapter.out(0x3C2, 0x67)
    seen = []
    for step in range(1000):
        adapter.clock.time_ns = step * FRAME_NS // 250
        seen.append(adapter.inp(0x3DA))
    assert {status & 9 for status in seen} == {0, 1, 9}
    rises = sum(1 for before, after in itertools.pairwise(seen) if after & 8 and not before & 8)
    assert rises == 4
    assert adapter.inp(0x3DA) == adapter.inp(0x3DA), "nothing but time moves it"


def test_unknown_registers_are_events(adapter: Adapter) -> None:
    adapter.out(0x3CB, 1)
    assert adapter.events == [("vga", "unknown-register", 0x3CB)]
    assert adapter.inp(0x3CB) == 0xFF
    adapter.out(0x3C4, 0x77)
    adapter.out(0x3C5, 1)
    assert adapter.inp(0x3C5) == 0


# ── planes ──


def plane_bytes(adapter: Adapter, address: int) -> bytes:
    return bytes(adapter.ram.view[4 * address : 4 * address + 4])


@pytest.fixture
def planar(adapter: Adapter) -> Adapter:
    adapter.set_mode(PLANAR)
    adapter.graphics(8, 0xFF)
    for plane in range(4):
        adapter.sequencer(2, 1 << plane)
        adapter.store(0xA0000, bytes((0x11 * (plane + 1),)))
    adapter.sequencer(2, 0x0F)
    return adapter


def test_map_mask_and_read_plane(planar: Adapter) -> None:
    assert plane_bytes(planar, 0) == b"\x11\x22\x33\x44"
    for plane in range(4):
        planar.graphics(4, plane)
        assert planar.load(0xA0000) == bytes((0x11 * (plane + 1),))
    assert planar.ram.shown == [], "planar accesses are exits"


def test_write_mode_0_rotates_sets_and_masks(planar: Adapter) -> None:
    planar.load(0xA0000)
    planar.graphics(3, 3)
    planar.store(0xA0000, b"\x81")
    assert plane_bytes(planar, 0) == b"\x30" * 4
    planar.graphics(3, 0)
    planar.graphics(0, 0b0101)
    planar.graphics(1, 0b0011)  # planes 0 and 1 take the set/reset value
    planar.store(0xA0000, b"\x5a")
    assert plane_bytes(planar, 0) == b"\xff\x00\x5a\x5a"
    planar.graphics(1, 0)
    planar.load(0xA0000)
    planar.graphics(8, 0x0F)  # the high half comes from the latches
    planar.store(0xA0000, b"\x33")
    assert plane_bytes(planar, 0) == b"\xf3\x03\x53\x53"


@pytest.mark.parametrize(
    ("function", "expected"),
    [(0, b"\x0f" * 4), (1, b"\x01\x02\x03\x04"), (2, b"\x1f\x2f\x3f\x4f"), (3, b"\x1e\x2d\x3c\x4b")],
)
def test_logical_functions(planar: Adapter, function: int, expected: bytes) -> None:
    planar.load(0xA0000)
    planar.graphics(3, function << 3)
    planar.store(0xA0000, b"\x0f")
    assert plane_bytes(planar, 0) == expected


def test_write_mode_1_copies_the_latches(planar: Adapter) -> None:
    planar.graphics(5, 1)
    planar.load(0xA0000)
    planar.store(0xA0010, b"\x00")
    assert plane_bytes(planar, 0x10) == b"\x11\x22\x33\x44"


def test_write_mode_2_writes_a_colour(planar: Adapter) -> None:
    planar.graphics(5, 2)
    planar.load(0xA0000)
    planar.graphics(8, 0x80)
    planar.store(0xA0000, b"\x0a")
    assert plane_bytes(planar, 0) == b"\x11\xa2\x33\xc4"


def test_write_mode_3_masks_with_the_data(planar: Adapter) -> None:
    planar.graphics(0, 0b1001)
    planar.graphics(5, 3)
    planar.load(0xA0000)
    planar.graphics(8, 0xF0)
    planar.store(0xA0000, b"\x3c")  # and F0: 30
    assert plane_bytes(planar, 0) == b"\x31\x02\x03\x74"


def test_read_mode_1_compares_colours(planar: Adapter) -> None:
    planar.graphics(5, 8)
    planar.graphics(2, 0b0001)
    planar.graphics(7, 0b0001)
    assert planar.load(0xA0000) == b"\x11"  # where plane 0 is set
    planar.graphics(7, 0b0011)
    assert planar.load(0xA0000) == bytes((0x11 & ~0x22 & 0xFF,))
    planar.graphics(7, 0)
    assert planar.load(0xA0000) == b"\xff"


def test_wide_accesses_are_bytes_in_order(planar: Adapter) -> None:
    planar.vga.write(WINDOW + 0x20, 4, 0x44332211)
    planar.graphics(4, 3)
    assert planar.load(0xA0020, 4) == b"\x11\x22\x33\x44"
    assert planar.vga.read(WINDOW + 0x20, 4) == 0x44332211


def test_random_accesses_agree_with_a_plain_model(planar: Adapter) -> None:
    """The logic again, bit by bit and plane by plane, as the technical reference tells it."""
    rng = random.Random(1)
    planes = [[planar.ram.view[4 * a + p] for a in range(64)] for p in range(4)]
    latch = [0, 0, 0, 0]
    registers = dict.fromkeys(range(9), 0) | {5: 0, 6: 5, 7: 0xF, 8: 0xFF}
    mask = 0xF
    for _ in range(3000):
        choice = rng.randrange(4)
        if choice == 0:
            index = rng.choice((0, 1, 2, 3, 4, 5, 7, 8))
            value = rng.randrange(256)
            if index == 5:
                value &= 0x0B
            planar.graphics(index, value)
            registers[index] = value & {0: 15, 1: 15, 2: 15, 3: 31, 4: 3, 5: 0x0B, 7: 15, 8: 255}[index]
        elif choice == 1:
            mask = rng.randrange(16)
            planar.sequencer(2, mask)
        elif choice == 2:
            address = rng.randrange(64)
            latch = [plane[address] for plane in planes]
            got = planar.load(0xA0000 + address)[0]
            if registers[5] & 8:
                wanted = 0
                for bit in range(8):
                    matches = all(
                        (latch[p] >> bit & 1) == (registers[2] >> p & 1) for p in range(4) if registers[7] >> p & 1
                    )
                    wanted |= matches << bit
                assert got == wanted
            else:
                assert got == latch[registers[4]]
        else:
            address, value = rng.randrange(64), rng.randrange(256)
            planar.store(0xA0000 + address, bytes((value,)))
            for p in range(4):
                if not mask >> p & 1:
                    continue
                mode, rotate = registers[5] & 3, registers[3] & 7
                rotated = (value >> rotate | value << 8 - rotate) & 0xFF
                bits = registers[8]
                if mode == 1:
                    planes[p][address] = latch[p]
                    continue
                if mode == 0:
                    given = rotated
                    if registers[1] >> p & 1:
                        given = 0xFF if registers[0] >> p & 1 else 0
                elif mode == 2:
                    given = 0xFF if value >> p & 1 else 0
                else:
                    given, bits = 0xFF if registers[0] >> p & 1 else 0, bits & rotated
                function = registers[3] >> 3 & 3
                given = (given, given & latch[p], given | latch[p], given ^ latch[p])[function]
                planes[p][address] = given & bits | latch[p] & ~bits & 0xFF
    assert [[planar.ram.view[4 * a + p] for a in range(64)] for p in range(4)] == planes


# ── windows ──


def test_a_text_window_is_mapped_after_some_use(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.store(0xB8000, b"H\x07i\x17")
    assert adapter.ram.shown == [(0xB8000, SHADOW, 0x8000)]
    assert adapter.load(0xB8000, 4) == b"H\x07i\x17"
    adapter.store(0xB8004, b"!\x70")
    assert adapter.load(0xA0000) == b"\xff", "nothing is decoded elsewhere in the window"
    adapter.store(0xB0000, b"lost")
    # Planes 0 and 1 get it back when the planes are looked at.
    adapter.set_mode(PLANAR)
    assert adapter.ram.shown == []
    assert plane_bytes(adapter, 0)[:2] == b"H\x07"
    assert plane_bytes(adapter, 2)[:2] == b"!\x70"
    adapter.set_mode(TEXT)
    assert adapter.load(0xB8000, 6) == b"H\x07i\x17!\x70"


def test_loading_a_font_leaves_the_text_alone(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.store(0xB8000, b"A\x1fB\x2fC\x3f")
    adapter.load_font({65: bytes(range(16)), 255: bytes(range(16, 32))})
    assert adapter.load(0xB8000, 6) == b"A\x1fB\x2fC\x3f"
    plane2 = bytes(adapter.ram.view[2 : 4 * 0x2000 : 4])
    assert plane2[65 * 32 : 65 * 32 + 16] == bytes(range(16))
    assert plane2[255 * 32 : 255 * 32 + 16] == bytes(range(16, 32))


def test_text_at_the_monochrome_window(adapter: Adapter) -> None:
    adapter.set_mode(MONO_WINDOW_TEXT)
    adapter.store(0xB0000, b"text" * 4)
    assert adapter.ram.shown == [(0xB0000, SHADOW, 0x8000)]
    assert adapter.load(0xB8000) == b"\xff"


def test_mode_13h_is_memory(adapter: Adapter) -> None:
    adapter.set_mode(MODE_13H)
    adapter.store(0xA0000, bytes(range(200)))
    assert adapter.ram.shown == [(0xA0000, 0, 0x10000)]
    assert bytes(adapter.ram.view[:200]) == bytes(range(200))
    adapter.sequencer(2, 3)  # planes 0 and 1 only: that is not memory as it is
    assert adapter.ram.shown == []
    adapter.store(0xA0000, b"\xee" * 8)
    assert bytes(adapter.ram.view[:8]) == b"\xee\xee\x02\x03" + b"\xee\xee\x06\x07"


def test_cga_windows_are_mapped_like_text(adapter: Adapter) -> None:
    adapter.set_mode(CGA4)
    adapter.store(0xB8000, bytes(16))
    assert adapter.ram.shown == [(0xB8000, SHADOW, 0x8000)]


def test_modes_that_pass_by_map_nothing(adapter: Adapter) -> None:
    for mode in (TEXT, MODE_13H, TEXT, PLANAR, TEXT, MODE_13H):
        adapter.set_mode(mode)
        assert adapter.ram.shown == []


def test_a_hidden_window_is_not_mapped(adapter: Adapter) -> None:
    adapter.set_mode(MODE_13H)
    adapter.store(0xA0000, bytes(8))
    adapter.vga.hide_window(True)
    assert adapter.ram.shown == []
    adapter.vga.hide_window(False)
    adapter.store(0xA0000, bytes(8))
    assert adapter.ram.shown


def test_damage_is_what_has_changed(adapter: Adapter) -> None:
    adapter.set_mode(MODE_13H)
    adapter.vga.memory.take_damage()
    adapter.store(0xA0000, b"\1\2")
    assert adapter.vga.memory.take_damage() == [(0, 2)]
    adapter.store(0xA0100, bytes(8))
    adapter.vga.memory.take_damage()
    adapter.store(0xA3456, b"\1")
    assert adapter.vga.memory.take_damage() == [(0x3000, 0x1000)]
    assert adapter.vga.memory.take_damage() == []


def test_changes_are_counted(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    before = adapter.vga.changes
    adapter.out(0x3D4, 0x0F)
    adapter.out(0x3D5, 0x50)  # the cursor moves
    assert adapter.vga.changes == before + 1
    adapter.out(0x3D5, 0x50)
    adapter.inp(0x3DA)
    assert adapter.vga.changes == before + 1


# ── the Bochs extension ──


def test_dispi_identity_and_capabilities(adapter: Adapter) -> None:
    assert adapter.dispi(0) == 0xB0C5
    assert adapter.dispi(0, 0xB0C0) == 0xB0C0
    assert adapter.dispi(0, 0x1234) == 0xB0C0
    assert adapter.dispi(10) == VRAM_SIZE >> 16
    adapter.dispi(4, 2)
    assert (adapter.dispi(1), adapter.dispi(2), adapter.dispi(3)) == (4096, 2160, 32)


def test_dispi_sets_a_mode_and_clears_it(adapter: Adapter) -> None:
    adapter.ram.view[0:4] = b"old!"
    for index, value in ((1, 1024), (2, 768), (3, 32), (4, 0x41)):
        adapter.dispi(index, value)
    assert bytes(adapter.ram.view[0:4]) == bytes(4)
    assert (adapter.dispi(6), adapter.dispi(7)) == (1024, VRAM_SIZE // 4096)
    adapter.ram.view[0:4] = b"kept"
    adapter.dispi(4, 0)
    adapter.dispi(4, 0xC1)
    assert bytes(adapter.ram.view[0:4]) == b"kept"


@pytest.mark.parametrize("bits", [4, 8, 15, 16, 24, 32])
def test_dispi_geometry_always_fits(adapter: Adapter, bits: int) -> None:
    for index, value in ((1, 0xFFFF), (2, 0xFFFF), (3, bits), (4, 1), (6, 0xFFFF), (8, 0xFFFF), (9, 0xFFFF)):
        adapter.dispi(index, value)
    width, height, virtual = adapter.dispi(1), adapter.dispi(2), adapter.dispi(6)
    stride = virtual // 2 if bits == 4 else virtual * ((bits + 7) // 8)
    assert width + adapter.dispi(8) <= virtual
    assert (height + adapter.dispi(9)) * stride <= VRAM_SIZE


def test_dispi_banks(adapter: Adapter) -> None:
    for index, value in ((1, 800), (2, 600), (3, 8), (4, 1), (5, 2)):
        adapter.dispi(index, value)
    adapter.store(0xA0000, b"bank two")
    assert adapter.ram.shown == [(0xA0000, 0x20000, 0x10000)]
    assert bytes(adapter.ram.view[0x20000:0x20008]) == b"bank two"
    adapter.dispi(5, 3)
    assert adapter.ram.shown == [(0xA0000, 0x30000, 0x10000)], "the next bank is mapped at once"
    adapter.dispi(5, 0xFFFF)
    assert adapter.load(0xA0000) == b"\xff"
    adapter.store(0xA0000, b"lost" * 4)


def test_dispi_by_bar_2(adapter: Adapter) -> None:
    vga = adapter.vga
    assert vga.read(MMIO + 0x500, 2) == 0xB0C5
    vga.write(MMIO + 0x502, 2, 640)
    assert adapter.dispi(1) == 640
    vga.write(MMIO + 0x400 + 0x14, 1, 0x0C)  # port 0x3D4? no: 0x3C0 + 0x14
    assert vga.read(MMIO + 0x400 + 0x0C, 1) == adapter.inp(0x3CC)
    assert vga.read(MMIO + 0x700, 4) == 0xFFFFFFFF


def test_the_dac_can_have_8_bits(adapter: Adapter) -> None:
    adapter.set_palette({1: (0x3F, 0x20, 0)})
    adapter.dispi(4, 0x20)
    adapter.out(0x3C7, 1)
    assert [adapter.inp(0x3C9) for _ in range(3)] == [0xFF, 0x82, 0]
    adapter.set_palette({1: (0xAB, 0xCD, 0xEF)})
    adapter.out(0x3C7, 1)
    assert [adapter.inp(0x3C9) for _ in range(3)] == [0xAB, 0xCD, 0xEF]


# ── records ──


def test_a_record_of_a_text_mode_with_its_memory(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.store(0xB8000, b"saved\x07")
    record = VgaState.unpack(adapter.vga.state().pack())
    assert record.shadow
    other = Adapter()
    other.set_mode(MODE_13H)
    other.store(0xA0000, bytes(8))
    other.ram.view[:] = adapter.ram.view
    other.vga.from_state(record)
    assert other.ram.shown == []
    assert other.load(0xB8000, 6) == b"saved\x07"
    assert other.ram.shown == [(0xB8000, SHADOW, 0x8000)]


def test_a_record_of_an_absurd_picture_is_refused(adapter: Adapter) -> None:
    for index, value in ((1, 640), (2, 480), (3, 32), (4, 1)):
        adapter.dispi(index, value)
    good = adapter.vga.state()
    assert VgaState.unpack(good.pack()) == good
    for index, value in ((1, 0xFFFF), (2, 0xFFFF), (3, 77), (6, 8), (6, 0xFFFF), (8, 4096), (9, 0xFFFF)):
        bad = replace(good, dispi=(*good.dispi[:index], value, *good.dispi[index + 1 :]))
        with pytest.raises(StateError, match="does not fit"):
            adapter.vga.from_state(bad)
    assert adapter.vga.state() == good


def test_reset_keeps_the_memory_and_takes_the_window_away(adapter: Adapter) -> None:
    adapter.set_mode(TEXT)
    adapter.store(0xB8000, b"A\x07" * 4)
    adapter.vga.reset()
    assert adapter.ram.shown == []
    assert plane_bytes(adapter, 1)[:2] == b"A\x07"


# ── anything ──


def hammer(rounds: int, seed: int) -> None:
    """Random accesses; mostly to registers that change what the others mean."""
    rng = random.Random(seed)
    ram = FakeRam()
    vga = Vga(ram, ManualClock())
    ports = [0x3C0, 0x3C2, 0x3C4, 0x3C5, 0x3CE, 0x3CF, 0x3D4, 0x3D5, 0x3DA, 0x3C8, 0x3C9, 0x3B4, 0x3B5, 0x3C6, 0x3C7]
    getrandbits, randrange, choice = rng.getrandbits, rng.randrange, rng.choice
    for number in range(rounds):
        kind = getrandbits(3)
        if kind < 3:
            port = choice(ports) - 0x3B0 if kind else randrange(0x30)
            size = 1 if port == 0x2F or getrandbits(1) else 2
            if getrandbits(2):
                vga.write(port, size, getrandbits(8 * size))
            else:
                assert 0 <= vga.read(port, size) < 1 << 8 * size
        elif kind == 3 and not number % 16:
            vga.write(DISPI, 2, randrange(12))
            value = choice((0, 1, 4, 8, 16, 32, 640, 0x41, 0x81, getrandbits(16)))
            vga.write(DISPI + 1, 2, value | 0x80 if getrandbits(4) else value)
            assert 0 <= vga.read(DISPI + 1, 2) < 1 << 16
        elif kind == 4 and not number % 4:
            offset, size = MMIO + randrange(0xFF8), choice((1, 2, 4))
            vga.write(offset, size, getrandbits(8 * size)) if getrandbits(1) else vga.read(offset, size)
        else:
            size = choice((1, 2, 4, 8))
            address = 0xA0000 + randrange(0x20000 - size)
            if ram.find(address) is not None:
                continue
            if getrandbits(1):
                vga.write(WINDOW + address - 0xA0000, size, getrandbits(8 * size))
            else:
                assert 0 <= vga.read(WINDOW + address - 0xA0000, size) < 1 << 8 * size
    assert len(ram.shown) <= 1
    assert len(ram.view) == MEMORY_SIZE
    vga.state().pack()


def test_random_accesses_never_raise() -> None:
    hammer(100_000, 7)


@pytest.mark.soak
def test_ten_million_random_accesses_never_raise() -> None:
    import os

    hammer(10_000_000, int(os.environ.get("NONROOT_SOAK_ROUND", "0")))
