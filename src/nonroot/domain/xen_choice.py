"""Whether a domain's hypervisor is a Xen for its guest, where the user left that open.

It is where a kernel is started that is known to be one for Xen: then clock, console, disks and network are Xen's. The
configuration that lies beside a kernel, as Debian installs it, says so at once; otherwise we look into the kernel, if
something depends on the answer.
"""

from pathlib import Path
from typing import Final

from nonroot.boot.bzimage import is_bzimage, parse_bzimage
from nonroot.boot.errors import BootError
from nonroot.boot.payload import decompress
from nonroot.domain.drives import has_named_places
from nonroot.domain.options import DomainOptions
from nonroot.errors import UnsupportedError

__all__ = ["choose_xen", "knows_xen"]

SETTINGS: Final = ("CONFIG_XEN_PVHVM=y", "CONFIG_HVC_XEN=y")
"""A kernel with these finds Xen, and has a console there."""
LINUX: Final = b"Linux version "
MARKS: Final = (b"Xen HVM\0", b"xenboot\0")
"""What is in such a kernel of Linux: the hypervisor's name, and that of its early console."""
SIGNATURE: Final = b"XenVMMXenVMM"
"""What another kernel, such as GRUB's for PVH, compares CPUID's answer with."""
MAX_KERNEL: Final = 512 << 20


def choose_xen(options: DomainOptions, switch: str = "add --xen (xen=True)") -> None:
    """Decide ``options.xen`` if it is None: False, True where something needs it, or None for "if XenStore can be had".

    After kernel and initramfs have been found. ``switch``: how the user says that it is to be, for the refusal.
    UnsupportedError where network cards would need it and cannot have it.
    """
    if options.xen is not None:
        return
    needed = "network cards" if options.networks or options.publish else ""
    if has_named_places(options):
        needed = "disks with a place of their own"
    reason = _against(options, bool(needed), switch)
    if reason is None:
        options.xen = True if needed else None
    elif needed:
        raise UnsupportedError(f"{needed} are Xen's, and {reason}")
    else:
        options.xen = False


def _against(options: DomainOptions, needed: bool, switch: str) -> str | None:
    """Why not; the rest of a sentence."""
    if options.firmware is not None:
        return "a guest that starts in firmware is Xen's only if you say so: " + switch
    if options.virtual_time:
        return "in virtual time they would make runs differ: " + f"{switch} if you want that"
    if options.kernel is None or options.protocol == "multiboot":
        return "only a Linux kernel that nonroot starts itself finds them"
    path = Path(options.kernel)
    known = _configured(path)
    if known is None:
        known = (needed or bool(options.disks)) and knows_xen(path)
    return None if known else f"the kernel {path.name} has no drivers for them: {switch} if it has"


def _configured(kernel: Path) -> bool | None:
    """What the configuration beside the kernel says; None if there is none."""
    if not kernel.name.startswith("vmlinuz-"):
        return None
    try:
        lines = kernel.with_name("config-" + kernel.name.removeprefix("vmlinuz-")).read_text(errors="replace")
    except OSError:
        return None
    return all(f"\n{setting}\n" in lines for setting in SETTINGS)


def knows_xen(kernel: Path) -> bool:
    """Look into a bzImage or an ELF image. False also for what cannot be read or unpacked here."""
    try:
        with kernel.open("rb") as file:
            data = file.read(MAX_KERNEL)
        if is_bzimage(data):
            payload = parse_bzimage(data).payload
            data = b"" if payload is None else decompress(payload)
    except (OSError, BootError):
        return False
    return all(mark in data for mark in MARKS) or (LINUX not in data and SIGNATURE in data)
