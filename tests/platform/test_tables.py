"""What firmware is told: the ACPI tables by the loader's script, SMBIOS, memory, boot order."""

import struct

import pytest

from nonroot.errors import BadOptionError
from nonroot.hvm.acpi import IsaDevice, build_tables
from nonroot.hvm.acpi_loader import loader_files
from nonroot.hvm.firmware import Firmware, boot_files, boot_registers, firmware_items
from nonroot.hvm.memory_map import MemoryMap
from nonroot.hvm.smbios import smbios_files

GIB = 1 << 30
TABLES, RSDP = 0x7FF_0000, 0xF_5A00


def place(files: dict[str, bytes]) -> dict[int, bytearray]:
    """Do what firmware does with the script; address to bytes."""
    memory = {name: bytearray(data) for name, data in files.items() if name != "etc/table-loader"}
    address: dict[str, int] = {}
    script = files["etc/table-loader"]
    assert len(script) % 128 == 0
    for at in range(0, len(script), 128):
        code, body = struct.unpack_from("<I", script, at)[0], script[at + 4 : at + 128]
        name = body[:56].rstrip(b"\0").decode()
        if code == 1:
            alignment, zone = struct.unpack_from("<IB", body, 56)
            address[name] = {1: TABLES, 2: RSDP}[zone]
            assert address[name] % alignment == 0
        elif code == 2:
            source = body[56:112].rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", body, 112)
            value = int.from_bytes(memory[name][offset : offset + size], "little") + address[source]
            memory[name][offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert code == 3
            offset, start, length = struct.unpack_from("<III", body, 56)
            memory[name][offset] = memory[name][offset] - sum(memory[name][start : start + length]) & 0xFF
    return {address[name]: data for name, data in memory.items()}


def test_the_script_builds_the_tables() -> None:
    acpi = build_tables([0], 2, 1, [IsaDevice("KBD", "PNP0303", ((0x60, 1),), 1)], has_vga=True, has_8042=True)
    memory = place(loader_files(acpi))
    rsdp, tables = memory[RSDP], memory[TABLES]
    assert sum(rsdp) & 0xFF == 0
    assert rsdp[:8] == b"RSD PTR "

    def table(address: int) -> bytearray:
        offset = address - TABLES
        (length,) = struct.unpack_from("<I", tables, offset + 4)
        data = tables[offset : offset + length]
        if data[:4] != b"FACS":
            assert sum(data) & 0xFF == 0, data[:4]
        return data

    xsdt = table(struct.unpack_from("<Q", rsdp, 24)[0])
    assert xsdt[:4] == b"XSDT"
    fadt, madt = (table(address) for address in struct.unpack_from("<2Q", xsdt, 36))
    assert bytes(fadt[:4] + madt[:4]) == b"FACPAPIC"
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert table(facs)[:4] == b"FACS"
    assert b"KBD_" in table(dsdt)
    assert struct.unpack_from("<Q", fadt, 140) == (dsdt,)
    assert struct.unpack_from("<H", fadt, 109)[0] & 0b110 == 0b010  # 8042, and VGA is not denied


def test_smbios_structures() -> None:
    memory = MemoryMap(5 * GIB)
    files = smbios_files(memory, processors=2)
    anchor, table = files["etc/smbios/smbios-anchor"], files["etc/smbios/smbios-tables"]
    assert anchor[:4] == b"_SM_"
    assert len(anchor) == 31
    assert sum(anchor) & 0xFF == sum(anchor[16:]) & 0xFF == 0
    assert struct.unpack_from("<H", anchor, 22) == (len(table),)
    kinds, at, longest = [], 0, 0
    while at < len(table):
        kind, length = table[at], table[at + 1]
        end = table.index(b"\0\0", at + length) + 2
        kinds.append(kind)
        longest = max(longest, end - at)
        at = end
    assert kinds == [1, 3, 4, 4, 16, 17, 19, 19, 32, 127]
    assert struct.unpack_from("<H", anchor, 28) == (len(kinds),)
    assert struct.unpack_from("<H", anchor, 8) == (longest,)


def test_memory_and_boot_order() -> None:
    memory = MemoryMap(4 * GIB)
    files = boot_files(Firmware(bytes(256 << 10), "dac", serial_console=True), memory)
    assert struct.unpack("<QQIQQI", files["etc/e820"]) == (0, 3 * GIB, 1, 4 * GIB, GIB, 1)
    order = files["bootorder"].decode().split("\n")
    assert ["drive@1" in order[0], "fdc" in order[2], "drive@0" in order[3]] == [True] * 3
    assert boot_registers(Firmware(bytes(256 << 10), "dac")) == {0x3D: 0x13, 0x38: 0x21}
    assert firmware_items(Firmware(bytes(256 << 10)), memory, 3)[5] == b"\3\0"
    assert "etc/sercon-port" in files


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"image": bytes(1000)}, "1000 bytes"),
        ({"boot": ""}, "boot order"),
        ({"boot": "cx"}, "boot order"),
        ({"boot": "cc"}, "twice"),
    ],
)
def test_bad_firmware_is_refused(options: dict[str, object], problem: str) -> None:
    with pytest.raises(BadOptionError, match=problem):
        Firmware(**({"image": bytes(256 << 10)} | options)).check()  # type: ignore[arg-type]
