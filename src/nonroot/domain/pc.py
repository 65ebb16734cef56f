"""The PC that a domain's options describe: its firmware, and what is plugged into its board."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nonroot.domain.options import DomainOptions
from nonroot.errors import BadFileError

if TYPE_CHECKING:
    from nonroot.hvm.firmware import Firmware
    from nonroot.hvm.pc import Attach

__all__ = ["attachments", "firmware"]

VGA_ROM = "pci1234,1111.rom"
"""The name under which SeaBIOS looks for the BIOS of our display adapter."""


def firmware(options: DomainOptions) -> Firmware | None:
    """What the machine starts in; None for a kernel. BadFileError if a file cannot be read."""
    if options.firmware is None:
        return None
    from nonroot.hvm.firmware import Firmware

    roms = {} if options.vga_bios is None else {VGA_ROM: _read(options.vga_bios, "VGA BIOS")}
    return Firmware(
        _read(options.firmware, "firmware"),
        options.boot,
        options.boot_menu,
        serial_console=options.serial_firmware,
        option_roms=roms,
    )


def attachments(options: DomainOptions) -> list[Attach]:
    """What puts this domain's devices onto the board, in order."""
    attach: list[Attach] = []
    if options.has_display:
        from nonroot.devices.display import attach_display

        attach.append(attach_display)
    if options.firmware is not None:
        from nonroot.devices.i6300esb import attach_watchdog

        attach.append(attach_watchdog)
    return attach


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise BadFileError(f"the {what} {path} cannot be read: {(error.strerror or str(error)).lower()}") from None
