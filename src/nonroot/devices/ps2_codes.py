"""Scan codes: a key is named by its set-1 code, plus 0x80 for keys that send an E0 prefix.

Source: IBM PS/2 technical reference, keyboards; the 8042's translation table.
"""

from typing import Final

__all__ = ["PAUSE", "PRINT", "SET2_TO_SET1", "scan_codes"]

EXTENDED: Final = 0x80
PRINT: Final = 0xB7
PAUSE: Final = 0xC6

SET2_TO_SET1: Final = bytes.fromhex(
    "ff43413f3d3b3c58644442403e0f2959"
    + "65382a701d10025a66712c1f1e11035b"
    + "672e2d201205045c68392f211413065d"
    + "693130232215075e6a7232241608095f"
    + "6b332517180b0a606c34352627190c61"
    + "6d7328741a0d626e3a361c1b752b6376"
    + "55567778797a0e7b7c4f7d4b477e7f6f"
    + "5253504c4d480145574e514a37494654"
    + "8081824154858687"
) + bytes(range(0x88, 0x100))
"""What the 8042 makes of a byte from the keyboard; 0xF0 is held back and sets bit 7 of the next."""


def _inverse() -> dict[int, int]:
    table = {code: index for index, code in enumerate(SET2_TO_SET1[:0x80]) if code < 0x80}
    # F7 and SysRq have codes above 0x7F; the table's other ways to them are keys that do not exist.
    return table | {0x41: 0x83, 0x54: 0x84}


_SET1_TO_SET2: Final = _inverse()


def scan_codes(key: int, pressed: bool, scan_set: int) -> bytes:
    """The bytes that the keyboard sends for a key in scan-code set 1 or 2; nothing for a key that does not exist."""
    if key == PAUSE:
        if not pressed:
            return b""
        return b"\xe1\x1d\x45\xe1\x9d\xc5" if scan_set == 1 else b"\xe1\x14\x77\xe1\xf0\x14\xf0\x77"
    if key == PRINT:
        if scan_set == 1:
            return b"\xe0\x2a\xe0\x37" if pressed else b"\xe0\xb7\xe0\xaa"
        return b"\xe0\x12\xe0\x7c" if pressed else b"\xe0\xf0\x7c\xe0\xf0\x12"
    code = key & 0x7F
    prefix = b"\xe0" if key & EXTENDED else b""
    if scan_set == 1:
        return prefix + bytes((code if pressed else code | 0x80,)) if code else b""
    other = _SET1_TO_SET2.get(code)
    if other is None:
        return b""
    return prefix + (b"" if pressed else b"\xf0") + bytes((other,))
