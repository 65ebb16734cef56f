"""What disks are called in a guest (``xvda``, ``hdc``, ``sdb3``), and Xen's numbers of these names.

The numbers are those of Xen's vbd interface (its document "Device number for virtual block devices").
"""

import re
from typing import Final

from nonroot.errors import BadOptionError, UnsupportedError

__all__ = ["disk_index", "disk_name", "vdev_number"]

_NAME: Final = re.compile(r"(xvd|hd|sd)([a-z]{1,2})([0-9]{0,4})")


def _split(name: str) -> tuple[str, int, int | None] | None:
    """The kind (``xvd``, ``hd``, ``sd``), the disk (a is 0, aa is 26) and the partition; None if it is no name."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    disk = 0
    for letter in match[2]:
        disk = disk * 26 + ord(letter) - ord("a") + 1
    return match[1], disk - 1, int(match[3]) if match[3] else None


def vdev_number(name: str) -> int:
    """The number of a device by its name in the guest (``xvda``, ``xvdb3``, ``hda``, ``sda``). BadOptionError.

    >>> vdev_number("xvda")
    51712
    """
    kind, disk, partition = _split(name) or ("", 0, 0)
    part = partition or 0
    if kind == "xvd" and part < 256 and (disk >= 16 or part >= 16):
        return 1 << 28 | disk << 8 | part
    if kind == "xvd" and disk < 16 and part < 16:
        return 202 << 8 | disk << 4 | part
    if kind == "hd" and disk < 4 and part < 64:
        return (3, 3, 22, 22)[disk] << 8 | disk % 2 << 6 | part
    if kind == "sd" and disk < 16 and part < 16:
        return 8 << 8 | disk << 4 | part
    raise BadOptionError(f"{name[:40]!r} is no name of a disk: use xvda, xvdb, …, or hda to hdd, or sda to sdp")


def disk_index(name: str) -> int:
    """A whole disk's place among those of its kind: xvda and hda are 0. BadOptionError; UnsupportedError for a part.

    >>> disk_index("hdc")
    2
    """
    found = _split(name)
    if found is None:
        raise BadOptionError(f"{name[:40]!r} is no disk's name: use xvda, hda, hdc and the like")
    _, disk, partition = found
    if partition is not None:
        whole = name.rstrip("0123456789")
        raise UnsupportedError(f"{name} names a partition; give the guest a whole disk, such as {whole}")
    return disk


def disk_name(index: int) -> str:
    """The name of Xen's disk number ``index``, below 26, in the guest.

    >>> disk_name(1)
    'xvdb'
    """
    return f"xvd{chr(ord('a') + index)}"
