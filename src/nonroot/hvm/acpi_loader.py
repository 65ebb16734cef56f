"""The ACPI tables for firmware that places them itself: two files and a script of allocations, pointers and checksums.

Source: the table loader's interface as SeaBIOS (romfile_loader.h) and OVMF implement it; each command has 128 bytes.
"""

import struct
from typing import Final

from nonroot.hvm.acpi import AcpiTables

__all__ = ["loader_files"]

TABLES: Final = "etc/acpi/tables"
RSDP: Final = "etc/acpi/rsdp"
SCRIPT: Final = "etc/table-loader"

COMMAND_SIZE: Final = 128
ALLOCATE: Final = 1
ADD_POINTER: Final = 2
ADD_CHECKSUM: Final = 3
ZONE_HIGH: Final = 1
ZONE_FSEG: Final = 2

FADT_POINTERS: Final = ((36, 4, "FACS"), (40, 4, "DSDT"), (140, 8, "DSDT"))
"""(offset, bytes, table) of the FADT's pointers."""
HEADER: Final = 36
CHECKSUM: Final = 9


def _command(code: int, body: bytes) -> bytes:
    return (struct.pack("<I", code) + body).ljust(COMMAND_SIZE, b"\0")


def _allocate(file: str, alignment: int, zone: int) -> bytes:
    return _command(ALLOCATE, struct.pack("<56sIB", file.encode(), alignment, zone))


def _pointer(target: str, source: str, offset: int, size: int) -> bytes:
    return _command(ADD_POINTER, struct.pack("<56s56sIB", target.encode(), source.encode(), offset, size))


def _checksum(file: str, offset: int, start: int, length: int) -> bytes:
    return _command(ADD_CHECKSUM, struct.pack("<56sIII", file.encode(), offset, start, length))


def loader_files(acpi: AcpiTables) -> dict[str, bytes]:
    """The three files for ``acpi``, whose addresses become places in the tables' file."""
    parts = {name: part for name, part in acpi.tables.items() if name != "RSDP"}
    start = min(address for address, _ in parts.values())
    end = max(address + len(data) for address, data in parts.values())
    blob = bytearray(end - start)
    place = {}
    for name, (address, data) in parts.items():
        place[name] = address - start
        blob[place[name] : place[name] + len(data)] = data
    rsdp = bytearray(acpi.tables["RSDP"][1])
    script = [_allocate(TABLES, 64, ZONE_HIGH), _allocate(RSDP, 16, ZONE_FSEG)]

    def relocate(file: str, data: bytearray, offset: int, size: int) -> None:
        value = int.from_bytes(data[offset : offset + size], "little") - start
        data[offset : offset + size] = value.to_bytes(size, "little")
        script.append(_pointer(file, TABLES, offset, size))

    for offset, size, _ in FADT_POINTERS:
        relocate(TABLES, blob, place["FACP"] + offset, size)
    for offset in range(HEADER, len(parts["XSDT"][1]), 8):
        relocate(TABLES, blob, place["XSDT"] + offset, 8)
    relocate(RSDP, rsdp, 24, 8)
    script += [_checksum(TABLES, place[name] + CHECKSUM, place[name], len(parts[name][1])) for name in ("FACP", "XSDT")]
    script.append(_checksum(RSDP, 32, 0, 36))
    return {TABLES: bytes(blob), RSDP: bytes(rsdp), SCRIPT: b"".join(script)}
