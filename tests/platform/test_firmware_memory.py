"""ROM and RAM below 1 MiB as the PAM registers say, on the p2m; DMA there and around holes."""

from pathlib import Path

import pytest

from nonroot._engine import Memory
from nonroot.hvm.dma import GuestDma
from nonroot.hvm.memory_map import MemoryMap
from nonroot.hvm.ram import BoardRam, DirtyLog, create_ram, create_rom
from nonroot.hvm.shadow import ShadowRam

MIB = 1 << 20
ROM_SIZE = 256 << 10
ROM = bytes(page for page in range(64) for _ in range(4096))
"""Each page holds its number."""
OFF, ROM_READ, RAM_READ_ONLY, RAM = bytes(7), bytes(7), b"\x10" + b"\x11" * 6, b"\x30" + b"\x33" * 6


@pytest.fixture(params=[None, 7], ids=["plain", "scrambled"])
def memory(request: pytest.FixtureRequest) -> Memory:
    memory = create_ram(MemoryMap(16 * MIB), request.param)
    for page in range(0xC0, 0x100):
        memory.write(page << 12, bytes([page]) * 4096)
    return memory


@pytest.fixture
def shadow(memory: Memory) -> ShadowRam:
    shadow = ShadowRam(memory, create_rom(memory, ROM), ROM_SIZE)
    shadow.apply(OFF)
    return shadow


def test_after_reset_the_rom_is_seen_twice(memory: Memory, shadow: ShadowRam) -> None:
    assert memory.read(0xFFFF_FFFF, 1) == memory.read(0xF_FFFF, 1) == bytes([63])
    assert memory.read(0xFFFC_0000, 1) == bytes([0])
    assert memory.read(0xE_0000, 1) == bytes([32])
    assert memory.lookup(0xD0) is None  # nobody answers where option ROMs go
    for gfn in (0xE0, 0xFF, 0xF_FFFF):
        entry = memory.lookup(gfn)
        assert entry is not None
        assert not entry[2]


def test_ram_can_be_written_and_protected(memory: Memory, shadow: ShadowRam) -> None:
    shadow.apply(RAM)
    assert [memory.read(page << 12, 1)[0] for page in range(0xC0, 0x100)] == list(range(0xC0, 0x100))
    memory.write(0xF_0000, b"new")
    shadow.apply(RAM_READ_ONLY)
    entry = memory.lookup(0xF0)
    assert entry is not None
    assert not entry[2]
    assert memory.read(0xF_0000, 3) == b"new"
    shadow.apply(OFF)
    assert memory.read(0xF_0000, 1) == bytes([48])
    shadow.apply(RAM)
    assert memory.read(0xF_0000, 3) == b"new"


@pytest.mark.parametrize(
    ("register", "shift", "address", "length"),
    [(0, 4, 0xF_0000, 0x1_0000), (1, 0, 0xC_0000, 0x4000), (1, 4, 0xC_4000, 0x4000), (6, 4, 0xE_C000, 0x4000)],
)
def test_each_part_has_its_bits(
    memory: Memory, shadow: ShadowRam, register: int, shift: int, address: int, length: int
) -> None:
    pam = bytearray(7)
    pam[register] = 3 << shift
    shadow.apply(bytes(pam))
    seen = {page for page in range(0xC0, 0x100) if (entry := memory.lookup(page)) and entry[2]}
    assert seen == set(range(address >> 12, address + length >> 12))


def test_small_roms_lie_at_the_end(memory: Memory) -> None:
    shadow = ShadowRam(memory, create_rom(memory, ROM[: 128 << 10]), 128 << 10)
    shadow.apply(OFF)
    assert memory.read(0xE_0000, 1) == bytes([0])
    assert memory.read(0xFFFE_0000, 1) == bytes([0])
    assert memory.lookup(0xFFFD_F) is None


def test_dma(memory: Memory, shadow: ShadowRam) -> None:
    events = []
    dma = GuestDma(memory, 16 * MIB, lambda *event: events.append(event))
    dma.write(0x1000, b"data")
    assert dma.read(0x1000, 4) == b"data"
    dma.write(0xF_0000, b"ROM")
    assert memory.read(0xF_0000, 1) == bytes([48])
    shadow.apply(RAM)
    dma.write(0xE_FFFE, b"four")
    assert memory.read(0xE_FFFE, 4) == b"four"
    dma.write(16 * MIB - 2, b"half")
    assert dma.read(16 * MIB - 2, 4) == b"ha\xff\xff"
    assert dma.read(0x9_FFFE, 4)[2:] == b"\xff\xff"
    for address in (-1, 1 << 40, 1 << 63, (1 << 64) - 2):
        dma.write(address, b"lost")
        assert len(dma.read(address, 8)) == 8
    assert events
    assert dma.read(0, 1 << 30) == b""


def test_dma_is_in_the_dirty_log(memory: Memory) -> None:
    memory.take_dirty()
    GuestDma(memory, 16 * MIB).write(0x2FFF, b"ab")
    assert memory.take_dirty() == [2, 3]


def test_dma_from_a_file_leaves_rom_alone(memory: Memory, shadow: ShadowRam, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"file" * 4096)
    with path.open("rb") as file:
        file.read()
        dma, descriptor = GuestDma(memory, 16 * MIB), file.fileno()
        if dma.read_file(descriptor, 0, [(0x1000, 4)]) < 0:
            pytest.skip("this file system does not say what is at hand")
        for address in (0xF_0000, 16 * MIB, 1 << 40, 1 << 63, -1):
            assert dma.read_file(descriptor, 0, [(0x1000, 4), (address, 4)]) == 0
        assert memory.read(0xF_0000, 1) == bytes([48])
        memory.take_dirty()
        assert dma.read_file(descriptor, 0, [(0x1FFE, 4)]) == 4
        assert dma.read(0x1FFE, 4) == b"file"
        assert memory.take_dirty() == [1, 2]
        assert dma.read_file(10**6, 0, [(0x1000, 4)]) == -1


def test_board_memory(memory: Memory) -> None:
    log = DirtyLog(memory)
    ram = BoardRam(memory, log, "test", 8 * 4096)
    log.take_rest()
    ram.view[:4] = b"abcd"
    ram.show(0xE000_0000, 0, 8 * 4096)
    ram.show(0xA_0000, 4096, 4096)
    assert memory.read(0xE000_0000, 4) == b"abcd"
    memory.write(0xE000_3000, b"three")
    memory.write(0xA_0000, b"one")
    memory.write(0x5000, b"elsewhere")
    assert ram.take_dirty() == {1, 3}
    assert ram.take_dirty() == set()
    assert log.take_rest() == {5}
    assert bytes(ram.view[0x3000:0x3005]) == b"three"
    memory.write(0xE000_4000, b"four")
    ram.hide(0xE000_0000, 8 * 4096)
    assert memory.lookup(0xE0000) is None
    assert ram.take_dirty() == {4}
    for bad in ((0xE000_0001, 0, 4096), (0xE000_0000, 4096 * 8, 4096), (0xE000_0000, -4096, 4096)):
        with pytest.raises(ValueError, match="no part"):
            ram.show(*bad)
    with pytest.raises(ValueError, match="pages"):
        BoardRam(memory, log, "test", 100)
