"""Boot plans of well-formed images: protocols, placement, structures."""

import struct

import pytest

from nonroot.boot.errors import BootError
from nonroot.boot.plan import BootPlan, plan_boot
from nonroot.hvm.memory_map import MemoryMap
from tests.boot import images

MIB = 1 << 20
SMALL = MemoryMap(128 * MIB)
RSDP = 0xE_0000


def memory_of(plan: BootPlan, size: int = 128 * MIB) -> bytearray:
    """Guest memory as the plan leaves it."""
    memory = bytearray(size)
    for address, data in plan.pieces:
        memory[address : address + len(data)] = data
    return memory


def words(memory: bytearray, code: str, address: int) -> tuple[int, ...]:
    return struct.unpack_from("<" + code, memory, address)


@pytest.mark.parametrize("bits", [32, 64])
def test_pvh(bits: int) -> None:
    initrd = b"initrd!" * 1000
    plan = plan_boot(images.elf(bits=bits), SMALL, "console=ttyS0", initrd, RSDP)
    memory = memory_of(plan)
    assert plan.protocol == "pvh"
    assert plan.entry.rip == 0x10_0000
    assert not plan.entry.long_mode
    assert memory[0x10_0000:0x10_0003] == b"\xf4\xeb\xfd"
    info = plan.entry.registers["rbx"]
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries, zero = words(memory, "IIIIQQQQII", info)
    assert (magic, version, flags, modules, rsdp, zero) == (0x336EC578, 1, 0, 1, RSDP, 0)
    assert memory[cmdline : cmdline + 14] == b"console=ttyS0\0"
    address, size, module_cmdline, reserved = words(memory, "QQQQ", modlist)
    assert (size, module_cmdline, reserved) == (7000, 0, 0)
    assert memory[address : address + size] == initrd
    assert address % 4096 == 0
    assert address + size <= 128 * MIB
    found = [words(memory, "QQII", memmap + 24 * n)[:3] for n in range(entries)]
    assert found == [(e.base, e.length, int(e.type)) for e in SMALL.e820()]


def test_pvh_without_initrd_has_no_modules() -> None:
    plan = plan_boot(images.elf(), SMALL)
    memory = memory_of(plan)
    assert words(memory, "IIIIQ", plan.entry.registers["rbx"])[3:] == (0, 0)


def test_zero_filled_part_is_kept_free_for_the_kernel() -> None:
    plan = plan_boot(images.elf([(0x10_0000, b"\xf4", 126 * MIB)]), SMALL, initrd=bytes(100))
    address = max(address for address, _ in plan.pieces)
    assert address >= 127 * MIB
    with pytest.raises(BootError, match="initrd"):
        plan_boot(images.elf([(0x10_0000, b"\xf4", 127 * MIB)]), SMALL, initrd=bytes(100))


def test_initrd_of_a_32_bit_kernel_stays_in_low_memory() -> None:
    memory = MemoryMap(3 << 30)
    plan = plan_boot(images.elf(bits=32), memory, initrd=bytes(5000))
    assert max(address for address, _ in plan.pieces) == 0x3800_0000 - 8192
    plan = plan_boot(images.elf(bits=64), memory, initrd=bytes(5000))
    assert max(address for address, _ in plan.pieces) == 0xC000_0000 - 8192


@pytest.mark.parametrize("form", sorted(images.COMPRESSORS))
def test_bzimage_with_a_pvh_kernel_is_decompressed(form: str) -> None:
    kernel = images.elf([(0x100_0000, bytes(range(256)) * 5000, 2 * MIB)], entry=0x100_0010)
    plan = plan_boot(images.bzimage(images.payload_of(kernel, form)), SMALL, initrd=b"x" * 10, rsdp=RSDP)
    assert plan.protocol == "pvh"
    assert plan.entry.rip == 0x100_0010
    assert memory_of(plan)[0x100_0000:0x100_0100] == bytes(range(256))


@pytest.mark.parametrize(("entry_64", "protocol"), [(True, "linux64"), (False, "linux32")])
def test_bzimage_without_pvh_decompresses_itself(entry_64: bool, protocol: str) -> None:
    payload = images.payload_of(images.elf(entry=None), "gzip")
    plan = plan_boot(images.bzimage(payload, entry_64=entry_64), SMALL, "quiet", b"initrd", RSDP)
    assert plan.protocol == protocol
    assert plan.reason == "the kernel has no PVH entry"


def test_unknown_compression_falls_back_but_not_if_pvh_is_asked_for() -> None:
    image = images.bzimage(b"\x89LZO" + bytes(100))
    plan = plan_boot(image, SMALL)
    assert plan.protocol == "linux64"
    assert "lzo" in plan.reason
    with pytest.raises(BootError, match="lzo"):
        plan_boot(image, SMALL, protocol="pvh")


@pytest.mark.parametrize("protocol", ["linux64", "linux32"])
def test_linux_protocol(protocol: str) -> None:
    image = images.bzimage(images.payload_of(images.elf(), "xz"))
    plan = plan_boot(image, SMALL, "a=b", b"I" * 5000, RSDP, protocol)
    assert plan.protocol == protocol
    memory = memory_of(plan)
    page = plan.entry.registers["rsi"]
    assert memory[page + 0x1FE : page + 0x206] == b"\x55\xaa\xeb\x66HdrS"
    assert words(memory, "B", page + 0x210) == (0xFF,)
    (ramdisk, size) = words(memory, "II", page + 0x218)
    assert memory[ramdisk : ramdisk + size] == b"I" * 5000
    (cmdline,) = words(memory, "I", page + 0x228)
    assert memory[cmdline : cmdline + 4] == b"a=b\0"
    assert words(memory, "Q", page + 0x70) == (RSDP,)
    (count,) = words(memory, "B", page + 0x1E8)
    found = [words(memory, "QQI", page + 0x2D0 + 20 * n) for n in range(count)]
    assert found == [(e.base, e.length, int(e.type)) for e in SMALL.e820()]
    assert memory[0x100_0000:0x100_0003] == b"\xf4\xeb\xfd"
    assert plan.entry.rip == 0x100_0000 + (0x200 if protocol == "linux64" else 0)
    base, limit = plan.entry.gdt
    code, data = words(memory, "QQ", base + 0x10)
    assert limit == 31
    assert (code >> 53 & 1, code >> 54 & 1) == ((1, 0) if protocol == "linux64" else (0, 1))
    assert data >> 40 & 0xFF == 0x93
    assert (plan.entry.code_selector, plan.entry.data_selector) == (0x10, 0x18)


def test_identity_map_covers_4_gib() -> None:
    plan = plan_boot(images.bzimage(b"none"), SMALL, protocol="linux64")
    memory = memory_of(plan)
    for address in (0, 0x10_0000, 0x1234_5678, 0xFFFF_FFFF):
        table = plan.entry.cr3
        for shift in (39, 30):
            (entry,) = words(memory, "Q", table + (address >> shift & 511) * 8)
            assert entry & 3 == 3
            table = entry & ~0xFFF
        (entry,) = words(memory, "Q", table + (address >> 21 & 511) * 8)
        assert entry & 0x83 == 0x83
        assert entry & ~0x1F_FFFF | address & 0x1F_FFFF == address


def test_relocatable_kernel_moves_into_small_memory() -> None:
    image = images.bzimage(b"none", preferred=0x100_0000, init_size=8 * MIB)
    plan = plan_boot(image, MemoryMap(16 * MIB), protocol="linux32")
    assert plan.entry.rip == 2 * MIB
    fixed = images.bzimage(b"none", relocatable=False, init_size=8 * MIB)
    assert plan_boot(fixed, MemoryMap(16 * MIB), protocol="linux32").entry.rip == MIB


def test_pvh_kernel_with_a_relocation_note_moves() -> None:
    notes = images.note(images.ENTRY, struct.pack("<I", 0x1000_0000)) + images.note(
        images.RELOC, struct.pack("<III", 0x20_0000, 0x20_0000, 0xFFFF_FFFF)
    )
    kernel = images.elf([(0x1000_0000, b"\xf4", 4096)], notes=notes)
    plan = plan_boot(kernel, SMALL)
    assert plan.entry.rip == 0x20_0000
    assert memory_of(plan)[0x20_0000] == 0xF4


def test_eight_byte_entry_note() -> None:
    notes = images.note(images.ENTRY, struct.pack("<Q", 0x10_0000))
    assert plan_boot(images.elf(notes=notes), SMALL).entry.rip == 0x10_0000


def test_foreign_notes_are_skipped() -> None:
    notes = images.note(1, b"abcd", b"GNU\0") + images.note(images.ENTRY, struct.pack("<I", 0x10_0002))
    assert plan_boot(images.elf(notes=notes), SMALL).entry.rip == 0x10_0002


def test_old_protocol_uses_its_fixed_limits() -> None:
    image = images.bzimage(b"none", version=0x0202, relocatable=False)
    plan = plan_boot(image, SMALL, "x" * 255)
    assert plan.protocol == "linux32"
    with pytest.raises(BootError, match="at most 255"):
        plan_boot(image, SMALL, "x" * 256)


def test_entry_state_is_a_state_a_vcpu_can_be_in() -> None:
    from nonroot.engines.native import InterpretEngine
    from nonroot.engines.policy import CpuPolicy
    from nonroot.hvm.ram import create_ram

    engine = InterpretEngine()
    vcpu = engine.create_vcpu(create_ram(MemoryMap(16 * MIB)), CpuPolicy.build(engine.cpu_features))
    for protocol in ("pvh", "linux64", "linux32"):
        image = images.bzimage(images.payload_of(images.elf(), "gzip"))
        plan = plan_boot(image, SMALL, protocol=protocol)
        vcpu.set_state(plan.entry.apply(vcpu.state()))
        state = vcpu.state()
        assert state.rip == plan.entry.rip
        assert bool(state.efer & 0x400) == (protocol == "linux64")
        assert [int.from_bytes(state.lapic[at : at + 4], "little") for at in (32, 72, 76)] == [0x1FF, 0x700, 0x400]
