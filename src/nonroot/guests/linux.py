"""Linux guests: a kernel, its modules and a small busybox userland, fetched once and kept in the user's cache.

The order is: the cache, Debian's packages through apt, a readable kernel of this machine with its static busybox, and
at last the built-in guest. Whatever is taken instead of what was asked for says so in :attr:`Guest.note`.
"""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nonroot.errors import BadOptionError, SoftwareMissingError
from nonroot.guests import busybox, cache, initramfs
from nonroot.guests.apt import Apt, Package, Progress

__all__ = ["DEFAULT_FLAVOUR", "FLAVOURS", "Guest", "cached", "fetch", "linux", "tiny"]

DEFAULT_FLAVOUR = "cloud-amd64"
FLAVOURS = {"cloud-amd64": "amd64", "amd64": "amd64", "686-pae": "i386", "686": "i386"}
"""Debian's kernel flavours that we know, and their architectures."""

_HOST_KERNELS = Path("/boot")
_HOST_MODULES = Path("/lib/modules")
_HOST_BUSYBOX = (Path("/bin/busybox"), Path("/usr/bin/busybox"), Path("/usr/lib/busybox/bin/busybox"))
_KEPT_FACTS = ("flavour", "version", "kernel", "initrd", "modules", "package")


@dataclass(frozen=True, slots=True)
class Guest:
    """Software to boot in a domain."""

    flavour: str
    """One of :data:`FLAVOURS`, ``"host"`` for a kernel of this machine, or ``"tiny"``."""
    version: str
    """The kernel's release, as ``uname -r`` shows it."""
    kernel: Path
    """A bzImage; an ELF with a PVH note for ``"tiny"``."""
    initrd: Path | None
    """A newc archive with busybox, ``/init`` (a shell on the console) and the usual folders."""
    modules: Path | None
    """The kernel's modules, a folder ``lib/modules/VERSION``."""
    bits: int
    """32 or 64: what user programs, the agent among them, must be."""
    source: str
    """Where it came from: ``"cache"``, ``"apt"``, ``"host"`` or ``"built-in"``."""
    note: str | None = None
    """Where this is not what was asked for: why, and what helps. One or two sentences."""

    @property
    def is_linux(self) -> bool:
        """False for the built-in guest, which cannot run commands."""
        return self.flavour != "tiny"


def linux(flavour: str = DEFAULT_FLAVOUR, *, progress: Progress | None = None, allow_fetch: bool = True) -> Guest:
    """The guest of that flavour, fetched if need be; else the nearest that this machine has, with a ``note``.

    BadOptionError if the flavour is not known. ``allow_fetch=False`` uses what is on the disk already.
    """
    architecture = FLAVOURS.get(flavour)
    if architecture is None:
        raise BadOptionError(f"there is no kernel flavour {flavour!r}; there are: {', '.join(FLAVOURS)}")
    if kept := cached(flavour):
        return kept
    try:
        if not allow_fetch:
            raise SoftwareMissingError(f"Debian's {flavour} kernel has not been fetched yet")
        return fetch(flavour, progress=progress)
    except SoftwareMissingError as error:
        why = str(error)
    advice = (
        "To get Linux, run this where apt can reach Debian's packages, or give a kernel with --kernel "
        "(and an initramfs with --initrd)"
    )
    if architecture == "amd64" and (found := _host_kernel()):
        return replace(found, note=f"{why}; this machine's own kernel {found.version} is used instead")
    return replace(tiny(), note=f"{why}; the built-in guest is used instead, which cannot run commands. {advice}")


def cached(flavour: str) -> Guest | None:
    """The guest of that flavour if the cache has it whole; damage counts as absence."""
    try:
        folder = cache.cache_dir() / "linux" / flavour
    except SoftwareMissingError:
        return None
    if not folder.exists() or cache.damaged(folder):
        return None
    facts = json.loads((folder / "manifest.json").read_bytes())
    if not all(isinstance(facts.get(fact), str) for fact in _KEPT_FACTS) or facts.get("recipe") != initramfs.RECIPE:
        return None
    modules = folder / facts["modules"]
    return Guest(
        flavour=flavour,
        version=facts["version"],
        kernel=folder / facts["kernel"],
        initrd=folder / facts["initrd"],
        modules=modules if modules.is_dir() else None,
        bits=_bits(FLAVOURS[flavour]),
        source="cache",
    )


def fetch(flavour: str, *, progress: Progress | None = None, refresh: bool = False) -> Guest:
    """Fetch the newest kernel of that flavour and busybox from Debian; SoftwareMissingError says why it cannot.

    Several processes may ask at once: one fetches, the others wait. ``refresh`` looks for a newer kernel even if the
    cache has one.
    """

    def waiting() -> None:
        if progress:
            progress(f"Waiting for another nonroot that fetches {flavour}", 0.0)

    architecture = FLAVOURS[flavour]
    try:
        with cache.locked(f"linux-{architecture}", waiting):
            kept = cached(flavour)
            if kept and not refresh:
                return kept
            return _fetch(flavour, architecture, progress, refresh, kept)
    except OSError as error:
        raise SoftwareMissingError(f"the {flavour} kernel could not be stored: {error.strerror or error}") from error


def _fetch(flavour: str, architecture: str, progress: Progress | None, refresh: bool, kept: Guest | None) -> Guest:
    root = cache.cache_dir()
    apt = Apt(root / "apt", architecture, progress)
    updated = apt.update(force=refresh)
    try:
        package, tools, files = _packages(apt, flavour)
    except SoftwareMissingError:
        if updated:
            raise
        apt.update(force=True)  # lists a day old may name files that are gone
        package, tools, files = _packages(apt, flavour)
    made_from = f"{package.name} {package.version}, {tools.name} {tools.version}"
    if kept and _fact(kept.kernel.parents[1], "package") == made_from:
        return kept
    (root / "linux").mkdir(exist_ok=True)
    if progress:
        progress(f"Unpacking {package.name}", 0.0)
    draft = Path(tempfile.mkdtemp(dir=root / "linux", prefix=f".{flavour}."))
    try:
        for file in files:
            _unpack(file, draft)
        _tidy(draft)
        kernels = sorted((draft / "boot").glob("vmlinuz-*"))
        program = next((path for path in (draft / "bin/busybox", draft / "usr/bin/busybox") if path.is_file()), None)
        if len(kernels) != 1 or program is None or busybox.static_bits(program) != _bits(architecture):
            raise SoftwareMissingError(f"the packages {made_from} do not hold one kernel and one static busybox")
        version = kernels[0].name.removeprefix("vmlinuz-")
        initrd = draft / "boot" / "initramfs.cpio"
        cache.write_atomically(initrd, initramfs.build(program.read_bytes()))
        cache.seal(
            draft,
            [kernels[0], initrd, program],
            flavour=flavour,
            version=version,
            kernel=str(kernels[0].relative_to(draft)),
            initrd=str(initrd.relative_to(draft)),
            modules=f"lib/modules/{version}",
            package=made_from,
            recipe=initramfs.RECIPE,
        )
        cache.publish(draft, root / "linux" / flavour)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if progress:
        progress(f"Unpacking {package.name}", 1.0)
    guest = cached(flavour)
    if guest is None:
        raise SoftwareMissingError(f"the {flavour} kernel was stored, and is damaged already: check the disk")
    return replace(guest, source="apt")


def _packages(apt: Apt, flavour: str) -> tuple[Package, Package, list[Path]]:
    package = apt.find(f"linux-image-{flavour}")
    tools = apt.find("busybox-static")
    return package, tools, [apt.download(package), apt.download(tools)]


def _unpack(package: Path, folder: Path) -> None:
    result = subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], capture_output=True, text=True, check=False)
    if result.returncode:
        package.unlink(missing_ok=True)
        raise SoftwareMissingError(f"the package {package.name} cannot be unpacked: {result.stderr.strip()}")


def _tidy(folder: Path) -> None:
    """Only the kernel, its modules and busybox stay; newer Debian has modules and programs under /usr."""
    if (folder / "usr/lib/modules").is_dir() and not (folder / "lib").exists():
        (folder / "lib").mkdir()
        (folder / "usr/lib/modules").rename(folder / "lib/modules")
    shutil.rmtree(folder / "usr/share", ignore_errors=True)


def _fact(folder: Path, name: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads((folder / "manifest.json").read_bytes()).get(name)
        return value if isinstance(value, str) else None
    return None


def _bits(architecture: str) -> int:
    return 32 if architecture == "i386" else 64


def _host_kernel() -> Guest | None:
    """The newest readable kernel in /boot with a static busybox, if this machine has both."""
    program = next((path for path in _HOST_BUSYBOX if busybox.static_bits(path) == 64), None)
    if program is None:
        return None
    for kernel in _readable_kernels(_HOST_KERNELS):
        version = kernel.name.removeprefix("vmlinuz-")
        try:
            folder = cache.cache_dir() / "host"
            initrd = folder / "initramfs.cpio"
            cache.write_atomically(initrd, initramfs.build(program.read_bytes()))
        except (OSError, SoftwareMissingError):
            return None
        modules = _HOST_MODULES / version
        return Guest("host", version, kernel, initrd, modules if modules.is_dir() else None, 64, "host")
    return None


def _readable_kernels(folder: Path) -> Iterator[Path]:
    """bzImages that we may read, newest version first."""

    def version_key(path: Path) -> list[tuple[int, str]]:
        return [(int(n or 0), word) for n, word in re.findall(r"(\d+)|(\D+)", path.name)]

    with contextlib.suppress(OSError):
        for path in sorted(folder.glob("vmlinuz-*"), key=version_key, reverse=True):
            with contextlib.suppress(OSError), path.open("rb") as file:
                header = file.read(0x206)
                if header[0x202:] == b"HdrS":
                    yield path


def tiny() -> Guest:
    """The built-in guest, which every build by an x86 C compiler carries; else SoftwareMissingError."""
    from nonroot import _engine  # the extension is wanted only here: fetching works without it

    try:
        image = _engine.tiny_guest()
    except ValueError as error:
        raise SoftwareMissingError(
            f"there is no guest software, and this build has no built-in guest: {error}"
        ) from None
    path = cache.cache_dir() / "tiny" / f"tiny-{_engine.VERSION}"
    if not path.is_file() or path.read_bytes() != image:
        cache.write_atomically(path, image)
    return Guest("tiny", _engine.VERSION, path, None, None, 64, "built-in")
