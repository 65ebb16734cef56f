"""What a domain boots where its user left that open: a kernel and its userland, or firmware, fetched if need be."""

import contextlib
import os
from collections.abc import Callable

from nonroot.domain.options import DomainOptions, check_readable
from nonroot.errors import SoftwareMissingError

__all__ = ["OVMF", "SEABIOS", "find_firmware", "find_guest"]

SEABIOS = "seabios"
"""The name of the BIOS that is fetched."""
OVMF = "ovmf"
"""The name of the UEFI firmware that is fetched."""

Progress = Callable[[str, float], None] | None
"""Called with (what, share done from 0 to 1)."""


def find_guest(options: DomainOptions, flavour: str | None, progress: Progress, allow_fetch: bool) -> str | None:
    """Fill in the kernel and the initramfs. Returns why it is not what was asked for, if it is not."""
    if options.kernel is not None and (options.initrd is not None or not options.agent):
        return None
    from nonroot import guests

    if options.kernel is not None:
        from nonroot.domain.initramfs import kernel_bits

        usual = "cloud-amd64" if kernel_bits(options.kernel) == 64 else "686-pae"
        guest = guests.linux(flavour or usual, progress=progress, allow_fetch=allow_fetch)
        if guest.is_linux and guest.initrd is not None:
            options.initrd = os.fspath(guest.initrd)
            options.setup = True
        return None
    guest = guests.linux(flavour or guests.DEFAULT_FLAVOUR, progress=progress, allow_fetch=allow_fetch)
    options.kernel = os.fspath(guest.kernel)
    options.initrd = None if guest.initrd is None else os.fspath(guest.initrd)
    if not guest.is_linux:
        options.agent = False
    options.setup = guest.is_linux
    options.modules = None if guest.modules is None else os.fspath(guest.modules)
    check_readable(options.kernel, "kernel")
    return guest.note


def find_firmware(options: DomainOptions, firmware: str, progress: Progress, allow_fetch: bool) -> None:
    """Fill in the firmware: a name stands for what is fetched, anything else is a file (an absolute path)."""
    from nonroot.guests.packages import ovmf, seabios

    options.agent = False
    if firmware == SEABIOS:
        found = seabios(progress=progress, allow_fetch=allow_fetch)
        options.firmware, options.vga_bios = os.fspath(found.image), os.fspath(found.vga)
    elif firmware == OVMF:
        options.firmware = os.fspath(ovmf(progress=progress, allow_fetch=allow_fetch))
    else:
        options.firmware = os.path.abspath(firmware)  # noqa: PTH100 - resolve() would follow links
        with contextlib.suppress(SoftwareMissingError):
            options.vga_bios = os.fspath(seabios(progress=progress, allow_fetch=allow_fetch).vga)
