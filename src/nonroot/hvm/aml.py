"""A small builder of ACPI machine language: typed functions, each returning the encoding of one term.

Source: ACPI specification 6.5, chapters 20 (AML) and 6.4 (resource descriptors).
"""

import struct
from typing import Final

__all__ = [
    "argument",
    "buffer",
    "device",
    "dword_memory",
    "eisa_id",
    "if_then",
    "integer",
    "io_port",
    "irq",
    "method",
    "name",
    "name_string",
    "notify",
    "package",
    "resources",
    "return_value",
    "scope",
    "store",
    "string",
    "word_bus_number",
    "word_io",
]

ZERO_OP: Final = b"\x00"
ONE_OP: Final = b"\x01"
NAME_OP: Final = b"\x08"
SCOPE_OP: Final = b"\x10"
BUFFER_OP: Final = b"\x11"
PACKAGE_OP: Final = b"\x12"
METHOD_OP: Final = b"\x14"
ARGUMENT_OP: Final = 0x68
STORE_OP: Final = b"\x70"
NOTIFY_OP: Final = b"\x86"
IF_OP: Final = b"\xa0"
RETURN_OP: Final = b"\xa4"
DEVICE_OP: Final = b"\x5b\x82"
ROOT: Final = b"\\"
DUAL_NAME: Final = b"\x2e"
MULTI_NAME: Final = b"\x2f"


class AmlError(ValueError):
    """A term that AML cannot express."""


def _segment(text: str) -> bytes:
    good = 1 <= len(text) <= 4 and all(
        c == "_" or "A" <= c <= "Z" or ("0" <= c <= "9" and i) for i, c in enumerate(text)
    )
    if not good:
        raise AmlError(f"{text!r} is not a name segment")
    return text.ljust(4, "_").encode("ascii")


def name_string(path: str) -> bytes:
    """A name: segments of up to four characters separated by dots, with a leading backslash for the root."""
    prefix = b""
    if path.startswith("\\"):
        prefix, path = ROOT, path[1:]
    segments = [_segment(part) for part in path.split(".")]
    if len(segments) == 1:
        return prefix + segments[0]
    if len(segments) == 2:
        return prefix + DUAL_NAME + b"".join(segments)
    return prefix + MULTI_NAME + bytes([len(segments)]) + b"".join(segments)


def _with_length(body: bytes) -> bytes:
    """``body`` after its PkgLength, which counts itself."""
    if len(body) + 1 < 0x40:
        return bytes([len(body) + 1]) + body
    for extra in (1, 2, 3):
        total = len(body) + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes([extra << 6 | total & 15]) + (total >> 4).to_bytes(extra, "little") + body
    raise AmlError(f"a term of {len(body)} bytes is too long")


def integer(value: int) -> bytes:
    """An integer constant, 0..2**64-1, in its shortest form."""
    if value in (0, 1):
        return (ZERO_OP, ONE_OP)[value]
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise AmlError(f"{value} is not a 64-bit unsigned number")


def string(text: str) -> bytes:
    """An ASCII string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A compressed EISA ID such as "PNP0501", as an integer constant."""
    if len(text) != 7 or not text[:3].isupper():
        raise AmlError(f"{text!r} is not an EISA ID")
    letters = [ord(c) - 0x40 for c in text[:3]]
    value = (letters[0] << 10 | letters[1] << 5 | letters[2]) << 16 | int(text[3:], 16)
    return b"\x0c" + value.to_bytes(4, "big")


def buffer(data: bytes) -> bytes:
    """A buffer with an initial value."""
    return BUFFER_OP + _with_length(integer(len(data)) + data)


def package(*elements: bytes) -> bytes:
    """A package of at most 255 elements."""
    if len(elements) > 255:
        raise AmlError(f"a package of {len(elements)} elements is too long")
    return PACKAGE_OP + _with_length(bytes([len(elements)]) + b"".join(elements))


def name(path: str, value: bytes) -> bytes:
    """A named object."""
    return NAME_OP + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Terms inside an existing scope."""
    return SCOPE_OP + _with_length(name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """A device."""
    return DEVICE_OP + _with_length(name_string(path) + b"".join(terms))


def method(path: str, arguments: int, *terms: bytes) -> bytes:
    """A control method of 0..7 arguments, not serialized."""
    if not 0 <= arguments <= 7:
        raise AmlError(f"a method of {arguments} arguments cannot be")
    return METHOD_OP + _with_length(name_string(path) + bytes([arguments]) + b"".join(terms))


def argument(number: int) -> bytes:
    """Argument 0..6 of the method."""
    if not 0 <= number <= 6:
        raise AmlError(f"there is no argument {number}")
    return bytes([ARGUMENT_OP + number])


def store(source: bytes, target: bytes) -> bytes:
    """Copy a value into a named object (``target`` by :func:`name_string`)."""
    return STORE_OP + source + target


def if_then(condition: bytes, *terms: bytes) -> bytes:
    """Terms that are executed if the condition is not zero."""
    return IF_OP + _with_length(condition + b"".join(terms))


def notify(target: bytes, value: int) -> bytes:
    """Tell the driver of a device (``target`` by :func:`name_string`) that something has changed."""
    return NOTIFY_OP + target + integer(value)


def return_value(value: bytes) -> bytes:
    """End the method with a value."""
    return RETURN_OP + value


# ── resource descriptors ──


def resources(*descriptors: bytes) -> bytes:
    """A resource template: descriptors and the end tag, as a buffer."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io_port(base: int, length: int) -> bytes:
    """Fixed I/O ports, decoded in 16 bits."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq(number: int) -> bytes:
    """An ISA interrupt: edge-triggered, active high, exclusive."""
    return struct.pack("<BH", 0x22, 1 << number)


# Bit 2 and 3 of the general flags: minimum and maximum are fixed; bit 1 clear: positive decode
_FIXED: Final = 0b0000_1100
_CONSUMED_BY_CHILDREN: Final = 0


def word_bus_number(first: int, last: int) -> bytes:
    """PCI bus numbers behind a host bridge."""
    body = struct.pack("<BBBHHHHH", 2, _FIXED | _CONSUMED_BY_CHILDREN, 0, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", 0x88, len(body)) + body


def word_io(first: int, last: int) -> bytes:
    """I/O ports that a bridge passes on (the entire range, ISA and non-ISA)."""
    body = struct.pack("<BBBHHHHH", 1, _FIXED | _CONSUMED_BY_CHILDREN, 3, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", 0x88, len(body)) + body


def dword_memory(first: int, last: int) -> bytes:
    """32-bit memory addresses that a bridge passes on: non-cacheable, read-write."""
    body = struct.pack("<BBBIIIII", 0, _FIXED | _CONSUMED_BY_CHILDREN, 1, 0, first, last, 0, last - first + 1)
    return struct.pack("<BH", 0x87, len(body)) + body
