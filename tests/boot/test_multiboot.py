"""Multiboot kernels: headers, placement, the information structure, and what is refused."""

import contextlib
import gzip
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonroot.boot.errors import BootError
from nonroot.boot.multiboot import find_header
from nonroot.boot.plan import BootPlan, plan_boot
from nonroot.hvm.memory_map import MemoryMap
from tests.boot import images

MIB = 1 << 20
SMALL = MemoryMap(64 * MIB)
MAGIC = 0x1BAD_B002
BASE = 0x10_0000


def header(flags: int = 3, *addresses: int) -> bytes:
    return struct.pack(f"<III{len(addresses)}I", MAGIC, flags, -(MAGIC + flags) & 0xFFFF_FFFF, *addresses)


def flat(flags: int = 0x1_0003, length: int = 0x1000, bss: int = 0, entry: int = BASE + 0x40) -> bytes:
    """An image that says itself where it belongs."""
    end = BASE + length if length else 0
    return header(flags, BASE, BASE, end, bss, entry).ljust(0x1000, b"\x90")


def elf32(entry: int = BASE + 0x20) -> bytes:
    image = bytearray(images.elf([(BASE, header().ljust(64, b"\xf4"), 4096)], entry=None, bits=32))
    struct.pack_into("<I", image, 24, entry)
    return bytes(image)


def words(plan: BootPlan, code: str, address: int) -> tuple[int, ...]:
    memory = bytearray(16 * MIB)
    for place, data in plan.pieces:
        if place < len(memory):
            memory[place : place + len(data)] = data
    return struct.unpack_from("<" + code, memory, address)


def test_a_flat_image() -> None:
    plan = plan_boot(flat(bss=BASE + 0x3000), SMALL, "one two", None)
    assert plan.protocol == "multiboot"
    assert plan.entry.rip == BASE + 0x40
    assert plan.entry.registers["rax"] == 0x2BAD_B002
    info = plan.entry.registers["rbx"]
    flags, lower, upper = words(plan, "III", info)
    assert flags == 0b10_0100_0101
    assert (lower, upper) == (639, 63 * 1024)
    (cmdline,) = words(plan, "I", info + 16)
    assert bytes(words(plan, "15B", cmdline)) == b"kernel one two\0"
    length, address = words(plan, "II", info + 44)
    entries = []
    while length:
        size, base, count, kind = words(plan, "IQQI", address)
        entries.append((base, count, kind))
        address, length = address + size + 4, length - size - 4
    assert entries == [(e.base, e.length, int(e.type)) for e in SMALL.e820()]
    assert words(plan, "HH", 0x40E)[0] << 4 == 0x9_FC00


def test_an_elf_image_with_a_module() -> None:
    plan = plan_boot(elf32(), SMALL, "", b"module" * 100)
    assert plan.protocol == "multiboot"
    info = plan.entry.registers["rbx"]
    assert words(plan, "I", info)[0] & 8
    count, modules = words(plan, "II", info + 20)
    start, end = words(plan, "II", modules)
    assert count == 1
    assert end - start == 600
    assert next(bytes(data) for address, data in plan.pieces if address == start) == b"module" * 100


def test_a_compressed_image_is_unpacked() -> None:
    assert plan_boot(gzip.compress(elf32()), SMALL).protocol == "multiboot"


def test_a_pvh_entry_comes_first_unless_multiboot_is_asked_for() -> None:
    image = bytearray(images.elf([(BASE, header().ljust(64, b"\xf4"), 4096)], entry=BASE, bits=32))
    struct.pack_into("<I", image, 24, BASE)
    assert plan_boot(bytes(image), SMALL).protocol == "pvh"
    assert plan_boot(bytes(image), SMALL, protocol="multiboot").protocol == "multiboot"


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        (b"\x90" * 4096, "no Multiboot header"),
        (header(0x8003).ljust(4096, b"\0"), "features"),
        (header(3).ljust(4096, b"\0"), "does not say where"),
        (flat(entry=0x5000), "entry"),
        (flat(length=0x9000), "end of its data"),
        (header(0x1_0003, BASE, BASE + 64, 0, 0, BASE).ljust(4096, b"\0"), "load address"),
        (elf32(entry=0x5000), "entry"),
        (images.elf([(BASE, header().ljust(64, b"\xf4"), 4096)], entry=None, bits=64), "64-bit"),
        (header(0x1_0003, 0x5000, 0x5000, 0x6000, 0, 0x5010).ljust(4096, b"\0"), "needs itself|does not fit"),
    ],
)
def test_bad_images_are_refused(image: bytes, problem: str) -> None:
    with pytest.raises(BootError, match=problem):
        plan_boot(image, SMALL, protocol="multiboot")


def test_the_header_is_looked_for_in_the_first_8_kib() -> None:
    assert find_header(bytes(8180) + header()) is not None
    assert find_header(bytes(8192) + header()) is None
    assert find_header(header()[:11]) is None
    assert find_header(b"\0" + header()) is None


@given(st.binary(max_size=64), st.integers(0, 63))
def test_damaged_headers_never_raise_anything_else(noise: bytes, place: int) -> None:
    image = bytearray(flat())
    image[place : place + len(noise)] = noise
    with contextlib.suppress(BootError):
        assert plan_boot(bytes(image), SMALL, protocol="multiboot").protocol == "multiboot"
