"""Files that cannot be booted: one sentence each, whatever is wrong with them."""

import bz2
import gzip
import lzma
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.boot.errors import BootError
from nonroot.boot.payload import decompress
from nonroot.boot.plan import BootPlan, plan_boot
from nonroot.hvm.memory_map import MemoryMap, MemorySizeError
from tests.boot import images

MIB = 1 << 20
MEMORY = MemoryMap(64 * MIB)
GOOD_ELF = images.elf()
GOOD_BZIMAGE = images.bzimage(images.payload_of(images.elf([(0x10_0000, bytes(9000), 20_000)]), "gzip"))


def refuse(kernel: bytes, **arguments: object) -> str:
    with pytest.raises(BootError) as caught:
        plan_boot(kernel, **({"memory": MEMORY} | arguments))  # type: ignore[arg-type]
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert not message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (b"", "empty"),
        (b"\x00" * 100, "neither a bzImage nor an ELF"),
        (b"#!/bin/sh\necho hello\n" * 100, "neither"),
        (gzip.compress(b"something", mtime=0), "neither a bzImage"),
        (GOOD_ELF[:40], "truncated"),
        (GOOD_ELF[:70], "truncated"),
        (GOOD_ELF[:180], "truncated"),
        (GOOD_BZIMAGE[:0x240], "truncated"),
        (GOOD_BZIMAGE[:2048], "truncated"),
        (GOOD_BZIMAGE[:-500], "truncated"),
        (images.bzimage(b"", loadflags=0), "zImage"),
        (images.elf(entry=None), "without a PVH entry"),
        (images.elf(machine=0xB7), "not an x86 kernel"),
        (images.elf(kind=1), "not an x86 kernel"),
        (images.elf(segments=[]), "nothing to load"),
        (GOOD_ELF[:5] + b"\x02" + GOOD_ELF[6:], "little-endian"),
        (images.elf([(0x10_0000, b"\xf4" * 100, 50)]), "larger in the file"),
        (images.elf([(0x10_0000, b"\xf4", 8192), (0x10_1000, b"\xf4", 1)]), "overlap"),
        (images.elf([(0x8000, b"\xf4", 1)], entry=0x8000), "loader needs"),
        (images.elf([(0xE_0000, b"\xf4", 1)], entry=0xE_0000), "does not fit"),
        (images.elf([(1 << 50, b"\xf4", 1)]), "beyond any memory"),
        (images.elf([(0x10_0000, b"\xf4", 65 * MIB)]), "does not fit"),
        (images.elf(entry=0x20_0000), "outside the kernel"),
        (images.elf(notes=images.note(18, bytes(100_000))), "ELF notes"),
        (images.bzimage(b"x", init_size=100 * MIB), "more than 64 MiB"),
        (images.bzimage(b"x", relocatable=False, init_size=100 * MIB), "does not fit"),
    ],
)
def test_bad_kernels(kernel: bytes, words: str) -> None:
    assert words in refuse(kernel)


def test_bad_arguments() -> None:
    assert "no boot protocol" in refuse(GOOD_ELF, protocol="multiboot2")
    assert "cannot be booted by linux64" in refuse(GOOD_ELF, protocol="linux64")
    assert "no 64-bit entry" in refuse(images.bzimage(b"x", entry_64=False), protocol="linux64")
    assert "at most 2047" in refuse(GOOD_ELF, cmdline="x" * 2048)
    assert "NUL" in refuse(GOOD_ELF, cmdline="a\0b")
    assert "not text" in refuse(GOOD_ELF, cmdline="\ud800")
    assert "initrd" in refuse(GOOD_ELF, initrd=bytes(64 * MIB))
    assert "initrd" in refuse(GOOD_BZIMAGE, initrd=bytes(63 * MIB))
    assert "initrd" in refuse(images.bzimage(b"x", initrd_max=0x1000), initrd=bytes(10))
    assert "no PVH entry" in refuse(images.bzimage(images.payload_of(images.elf(entry=None), "xz")), protocol="pvh")
    assert "not an ELF" in refuse(images.bzimage(images.payload_of(b"text", "xz")), protocol="pvh")


@pytest.mark.parametrize("size", [0, -4096, 4096, 1 << 50, (64 << 20) + 1])
def test_absurd_memory(size: int) -> None:
    with pytest.raises(MemorySizeError):
        MemoryMap(size)


@pytest.mark.parametrize("form", sorted(images.COMPRESSORS))
def test_damaged_payloads(form: str) -> None:
    good = images.payload_of(bytes(range(256)) * 400, form)
    for bad in (good[: len(good) // 2], good[:10], good[: len(good) // 2] + b"\xff" * (len(good) - len(good) // 2)):
        with pytest.raises(BootError):
            decompress(bad)


@pytest.mark.parametrize("form", sorted(set(images.COMPRESSORS) - {"gzip"}))
def test_wrong_size_after_the_payload(form: str) -> None:
    packed = images.COMPRESSORS[form](bytes(10_000))
    for claimed in (9_999, 10_001, 0):
        with pytest.raises(BootError, match="corrupt"):
            decompress(packed + struct.pack("<I", claimed))
    with pytest.raises(BootError, match="more than"):
        decompress(packed + struct.pack("<I", 0xFFFF_FFFF))


@pytest.mark.parametrize(
    "bomb",
    [
        zlib.compressobj(9, wbits=31),
        bz2.BZ2Compressor(),
        lzma.LZMACompressor(preset=1),
    ],
    ids=["gzip", "bzip2", "xz"],
)
def test_decompression_bombs_are_bounded(bomb: object) -> None:
    chunk = bytes(MIB)
    data = b"".join(bomb.compress(chunk) for _ in range(64)) + bomb.flush()  # type: ignore[attr-defined]
    with pytest.raises(BootError):
        decompress(data + struct.pack("<I", MIB), limit=4 * MIB)


def check(kernel: bytes) -> None:
    """A mutated image gives a BootError or a plan that lies in memory."""
    try:
        plan = plan_boot(kernel, MEMORY, "quiet", b"initrd", 0xE_0000, max_kernel=MIB)
    except BootError as error:
        message = str(error)
    else:
        message = "planned"
        check_plan(plan)
    assert message


def check_plan(plan: BootPlan) -> None:
    for address, data in plan.pieces:
        assert address >= 0
        assert address + len(data) <= 64 * MIB
        assert address >= MIB or address + len(data) <= 0x9_FC00
    assert 0 <= plan.entry.rip < 64 * MIB


SEEDS = {
    "elf64": GOOD_ELF,
    "elf32": images.elf(bits=32),
    "gzip": GOOD_BZIMAGE,
    **{f: images.bzimage(images.payload_of(GOOD_ELF, f)) for f in ("xz", "lz4", "zstd", "lzma", "bzip2")},
}


@pytest.mark.parametrize("seed", sorted(SEEDS))
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_images(seed: str, data: st.DataObject) -> None:
    image = bytearray(SEEDS[seed])
    # Headers are where it hurts: most mutations go there.
    interesting = st.integers(0, min(len(image), 0x70) - 1) | st.integers(0x1F0, 0x270) | st.integers(0, len(image) - 1)
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(interesting)
        if position < len(image):
            width = data.draw(st.sampled_from((1, 1, 2, 4, 8)))
            value = data.draw(st.integers(0, (1 << 8 * width) - 1) | st.sampled_from((0, (1 << 8 * width) - 1)))
            image[position : position + width] = value.to_bytes(width, "little")
    if data.draw(st.booleans()):
        del image[data.draw(st.integers(0, len(image))) :]
    check(bytes(image))


@settings(max_examples=150, deadline=None)
@given(header=st.sampled_from((b"", b"\x7fELF\x02\x01\x01", b"\x7fELF\x01\x01\x01")), rest=st.binary(max_size=600))
def test_random_bytes(header: bytes, rest: bytes) -> None:
    check(header + rest)


@settings(max_examples=100, deadline=None)
@given(
    magic=st.sampled_from(
        (b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x5d\0\0", b"BZh9", b"\x02\x21\x4c\x18", b"\x28\xb5\x2f\xfd")
    ),
    rest=st.binary(max_size=200),
)
def test_random_payloads(magic: bytes, rest: bytes) -> None:
    try:
        assert len(decompress(magic + rest, limit=MIB)) <= MIB
    except BootError as error:
        message = str(error)
        assert message.startswith("the kernel's")
