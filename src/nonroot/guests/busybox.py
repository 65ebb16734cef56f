"""What we need to know of a busybox binary: whether it is static, for how many bits, and its applets."""

import re
from pathlib import Path

__all__ = ["applets", "static_bits"]

_APPLET = re.compile(rb"[a-z0-9_.\[-][a-z0-9_.\[\]-]*")


def static_bits(path: Path) -> int | None:
    """32 or 64 if the file is a static x86 program for so many bits; None for anything else."""
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            if elf.get_machine_arch() not in ("x86", "x64"):
                return None
            if any(segment["p_type"] == "PT_INTERP" for segment in elf.iter_segments()):
                return None
            return int(elf.elfclass)
    except (OSError, ELFError):
        return None


def applets(binary: bytes) -> list[str]:
    """The applet names, from the sorted, NUL-separated table that every busybox carries (it begins ``[``, ``[[``).

    The program need not run here: it may be for another CPU. Empty if there is no such table.
    """
    start = binary.find(b"\0[\0[[\0") + 1
    names: list[str] = []
    while start:
        end = binary.find(b"\0", start)
        name = binary[start:end]
        if end < 0 or not _APPLET.fullmatch(name):
            break
        names.append(name.decode())
        start = end + 1
    return names
