"""Kernel modules for a test guest's initramfs: what a module needs is read from the modules themselves."""

import io
import lzma
from collections.abc import Iterable
from pathlib import Path

from elftools.elf.elffile import ELFFile

from nonroot.boot.cpio import Cpio
from nonroot.errors import SoftwareMissingError

__all__ = ["LOADER", "STORAGE_MODULES", "load_order", "modules_archive"]

LOADER = "etc/load-modules"
"""The script in the archive that loads everything, in order."""
STORAGE_MODULES = ("ata_piix", "sd_mod", "sr_mod")
"""What Linux needs for the drives of a PC."""


def _read(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def _needs(module: bytes) -> list[str]:
    """Names in a module's ``depends=``."""
    section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
    entries = b"" if section is None else section.data()
    for entry in entries.split(b"\0"):
        if entry.startswith(b"depends="):
            return [name for name in entry.removeprefix(b"depends=").decode().split(",") if name]
    return []


def load_order(folder: Path, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, contents) of modules and what they depend on, dependencies first; ``folder`` is lib/modules/VERSION.

    SoftwareMissingError if one of ``names`` is not there; a dependency that is not is taken to be built in.
    """
    files = {path.name.partition(".")[0].replace("-", "_"): path for path in folder.rglob("*.ko*") if path.is_file()}
    order: dict[str, bytes] = {}

    def visit(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if name in order or path is None:
            return
        data = _read(path)
        for needed in _needs(data):
            visit(needed)
        order[name] = data

    for name in names:
        if name.replace("-", "_") not in files:
            raise SoftwareMissingError(f"the kernel in {folder} has no module {name}")
        visit(name)
    return list(order.items())


def modules_archive(folder: Path, names: Iterable[str] = STORAGE_MODULES) -> bytes:
    """An archive to append to an initramfs: the modules, and :data:`LOADER`, a script that loads them."""
    archive = Cpio()
    script = "#!/bin/sh\n"
    archive.directory("lib/modules-to-load")
    for name, data in load_order(folder, names):
        archive.file(f"lib/modules-to-load/{name}.ko", data)
        script += f"insmod /lib/modules-to-load/{name}.ko\n"
    archive.file(LOADER, script.encode(), mode=0o755)
    return archive.finish()
