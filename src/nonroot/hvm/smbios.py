"""The SMBIOS tables of a domain: what it is, how much memory and which processors it has.

Source: DMTF DSP0134, System Management BIOS reference specification 2.8.
"""

import struct
from collections.abc import Sequence
from typing import Final

from nonroot.hvm.memory_map import GIB, MIB, MemoryMap

__all__ = ["smbios_files"]

ANCHOR: Final = "etc/smbios/smbios-anchor"
TABLES: Final = "etc/smbios/smbios-tables"
MANUFACTURER: Final = "nonroot"
PRODUCT: Final = "HVM domU"
NONE: Final = 0xFFFF


def _structure(kind: int, handle: int, body: bytes, strings: Sequence[str] = ()) -> bytes:
    texts = b"".join(text.encode("ascii") + b"\0" for text in strings) or b"\0"
    return struct.pack("<BBH", kind, 4 + len(body), handle) + body + texts + b"\0"


def _processor(index: int, megahertz: int) -> bytes:
    # Central processor, family "other", no upgrade socket, enabled; caches unknown; one core.
    body = struct.pack("<BBBBQBBHHHBB", 1, 3, 1, 2, 0, 3, 0, 0, megahertz, megahertz, 0x41, 1)
    body += struct.pack("<HHHBBBBBBHH", NONE, NONE, NONE, 0, 0, 0, 1, 1, 1, 4, 1)
    return _structure(4, 0x400 + index, body, [f"CPU {index}", MANUFACTURER, "nonroot"])


def _memory_device(index: int, size: int) -> bytes:
    mebibytes = min(size // MIB, 0x7FFF)
    body = struct.pack("<HHHHHBBBBBHHBBBBBI", 0x1000, 0xFFFE, 64, 64, mebibytes, 9, 0, 1, 0, 7, 2, 0, 2, 0, 0, 0, 0, 0)
    return _structure(17, 0x1100 + index, body, [f"DIMM {index}", MANUFACTURER])


def _mapped(index: int, first: int, length: int) -> bytes:
    end = (first + length >> 10) - 1
    body = struct.pack("<IIHB", first >> 10, end & 0xFFFF_FFFF, 0x1000, 1)
    return _structure(19, 0x1300 + index, body)


def smbios_files(memory: MemoryMap, processors: int = 1, megahertz: int = 1000) -> dict[str, bytes]:
    """The two files for firmware: the entry point, whose table address it fills in, and the structures."""
    structures = [
        # System: wake-up by power switch; no serial number, a zero UUID means that there is none.
        _structure(1, 0x100, struct.pack("<BBBB16sBBB", 1, 2, 3, 0, bytes(16), 6, 0, 0), [MANUFACTURER, PRODUCT, "1"]),
        # Enclosure: other; states unknown.
        _structure(3, 0x300, struct.pack("<BBBBBBBBBIBBBB", 1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0), [MANUFACTURER]),
        *[_processor(index, megahertz) for index in range(processors)],
    ]
    kibibytes = memory.memory_bytes >> 10
    extended = kibibytes if kibibytes < 1 << 31 else 0
    structures.append(
        _structure(
            16, 0x1000, struct.pack("<BBBIHHQ", 1, 3, 3, extended or 1 << 31, 0xFFFE, 1, 0 if extended else kibibytes)
        )
    )
    structures.append(_memory_device(0, memory.memory_bytes))
    structures.append(_mapped(0, 0, memory.low_end))
    if memory.high_bytes:
        structures.append(_mapped(1, 4 * GIB, memory.high_bytes))
    # No boot errors; then the end.
    structures.append(_structure(32, 0x2000, bytes(7)))
    structures.append(_structure(127, 0x7F00, b""))
    table = b"".join(structures)
    longest = max(map(len, structures))
    return {ANCHOR: _anchor(len(table), longest, len(structures)), TABLES: table}


def _anchor(length: int, longest: int, count: int) -> bytes:
    inner = bytearray(struct.pack("<5sBHIHB", b"_DMI_", 0, length, 0, count, 0x28))
    inner[5] = -sum(inner) & 0xFF
    outer = bytearray(struct.pack("<4sBBBBHB5x", b"_SM_", 0, 31, 2, 8, longest, 0))
    outer[4] = -sum(outer) - sum(inner) & 0xFF
    return bytes(outer + inner)
