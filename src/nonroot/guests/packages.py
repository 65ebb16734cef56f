"""Files out of Debian packages that are no kernels: firmware, boot loaders, test programs, kept in the user's cache."""

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nonroot.errors import SoftwareMissingError
from nonroot.guests import cache
from nonroot.guests.apt import Apt, Progress

__all__ = ["SeaBios", "ovmf", "package", "seabios"]

SEABIOS_IMAGE = "usr/share/seabios/bios-256k.bin"
SEABIOS_VGA = "usr/share/seabios/vgabios-stdvga.bin"
OVMF_IMAGE = "usr/share/ovmf/OVMF.fd"
_SYSTEM = Path("/")


def package(
    name: str, architecture: str = "amd64", *, progress: Progress | None = None, allow_fetch: bool = True
) -> Path:
    """
    The folder into which a package has been unpacked, fetched if need be.

    ``architecture``: Debian's name, of the machine whose apt lists are asked; packages for all machines are in each.
    SoftwareMissingError says why it cannot be had.
    """

    def waiting() -> None:
        if progress:
            progress(f"Waiting for another nonroot that fetches {name}", 0.0)

    try:
        root = cache.cache_dir()
        folder = root / "packages" / architecture / name
        if cache.damaged(folder) is None:
            return folder
        if not allow_fetch:
            raise SoftwareMissingError(f"Debian's package {name} has not been fetched yet")
        with cache.locked(f"packages-{architecture}", waiting):
            if cache.damaged(folder) is not None:
                _fetch(name, architecture, root, folder, progress)
        return folder
    except OSError as error:
        raise SoftwareMissingError(f"the package {name} could not be stored: {error.strerror or error}") from error


def _fetch(name: str, architecture: str, root: Path, folder: Path, progress: Progress | None) -> None:
    # The kernels' lock: both use the same lists.
    with cache.locked(f"linux-{architecture}"):
        apt = Apt(root / "apt", architecture, progress)
        updated = apt.update()
        try:
            found = apt.find(name)
            file = apt.download(found)
        except SoftwareMissingError:
            if updated:
                raise
            apt.update(force=True)  # lists a day old may name files that are gone
            found = apt.find(name)
            file = apt.download(found)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{name}."))
    try:
        result = subprocess.run(["dpkg-deb", "-x", file, draft], capture_output=True, text=True, check=False)
        if result.returncode:
            file.unlink(missing_ok=True)
            raise SoftwareMissingError(f"the package {name} cannot be unpacked: {result.stderr.strip()}")
        shutil.rmtree(draft / "usr/share/doc", ignore_errors=True)
        files = [path for path in draft.rglob("*") if path.is_file() and not path.is_symlink()]
        cache.seal(draft, files, package=f"{found.name} {found.version}")
        cache.publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class SeaBios:
    """The BIOS and the BIOS of the VGA adapter."""

    image: Path
    vga: Path
    version: str
    """The package and its version, or where the files came from."""


def seabios(*, progress: Progress | None = None, allow_fetch: bool = True) -> SeaBios:
    """SeaBIOS as Debian builds it: from the cache, from apt, or installed on this machine. SoftwareMissingError."""
    try:
        folder = package("seabios", progress=progress, allow_fetch=allow_fetch)
        version = json.loads((folder / "manifest.json").read_bytes())["package"]
    except SoftwareMissingError:
        folder, version = _SYSTEM, "installed on this machine"
        if not (folder / SEABIOS_IMAGE).is_file() or not (folder / SEABIOS_VGA).is_file():
            raise
    return SeaBios(folder / SEABIOS_IMAGE, folder / SEABIOS_VGA, version)


def ovmf(*, progress: Progress | None = None, allow_fetch: bool = True) -> Path:
    """OVMF (UEFI) as Debian builds it, code and variables in one image. SoftwareMissingError."""
    try:
        return package("ovmf", progress=progress, allow_fetch=allow_fetch) / OVMF_IMAGE
    except SoftwareMissingError:
        if (_SYSTEM / OVMF_IMAGE).is_file():
            return _SYSTEM / OVMF_IMAGE
        raise
