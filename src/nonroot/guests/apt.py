"""Fetching Debian packages with apt, without root and without touching the system's apt.

apt gets its own folders for state, lists and cache. The system's sources, keys, proxies and credentials stay in force,
but not its hooks: those would act on the system. Packages are verified by apt against the signed lists, and once more
by us against the SHA-256 that the lists give.
"""

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nonroot.errors import SoftwareMissingError

__all__ = ["Apt", "Package", "Progress", "available"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the share done, 0 to 1."""

_CONFIGURATION = """\
// Written by nonroot; read after the system's own configuration.
Dir::State "{root}/state";
Dir::State::status "{root}/status";
Dir::Cache "{root}/cache";
Dir::Cache::pkgcache "pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Log "{root}/log";
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "2";
Acquire::http::Timeout "20";
Acquire::https::Timeout "20";
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large;
#clear Acquire::IndexTargets::deb::DEP-11-icons-hidpi;
#clear Acquire::IndexTargets::deb::DEP-11-icons-large-hidpi;
#clear Acquire::IndexTargets::deb::CNF;
#clear Acquire::IndexTargets::deb::Contents-deb;
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear APT::Periodic;
#clear DPkg::Pre-Install-Pkgs;
#clear DPkg::Pre-Invoke;
#clear DPkg::Post-Invoke;
"""
_LISTS_STAY_FRESH = 24 * 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Package:
    """A package as apt's lists know it."""

    name: str
    version: str
    architecture: str
    sha256: str
    size: int  # bytes


def available() -> str | None:
    """Why packages cannot be fetched on this machine, as half a sentence; None if the tools are there."""
    missing = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
    if missing:
        return f"this machine has no {' and no '.join(missing)}, so guest software cannot be fetched"
    return None


class Apt:
    """apt for one architecture (Debian's name: ``amd64``, ``i386``) with folders of its own under ``root``."""

    def __init__(self, root: Path, architecture: str, progress: Progress | None = None) -> None:
        if reason := available():
            raise SoftwareMissingError(reason)
        self.root = root / architecture
        self.architecture = architecture
        self._progress = progress
        for folder in ("state/lists/partial", "cache/archives/partial", "log", "packages"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        (self.root / "status").touch()
        self._configuration = self.root / "apt.conf"
        self._configuration.write_text(_CONFIGURATION.format(root=self.root, architecture=architecture))

    def update(self, *, force: bool = False) -> bool:
        """Bring the package lists up to date, at most once a day unless forced; False if they were fresh already.

        Some sources of a machine may be out of reach without harm: what counts is whether the package is found then.
        """
        stamp = self.root / "updated"
        with contextlib.suppress(OSError):
            if not force and 0 <= time.time() - stamp.stat().st_mtime < _LISTS_STAY_FRESH:
                return False
        code, messages = self._apt_get("Reading Debian's package lists", "update")
        lists = any(path.is_file() and path.name != "lock" for path in (self.root / "state" / "lists").iterdir())
        if not lists:
            raise SoftwareMissingError(f"Debian's package lists could not be fetched: {_reason(messages)}")
        if code == 0:
            stamp.touch()
        return True

    def find(self, name: str) -> Package:
        """The newest version of a package; a metapackage gives the first package that it depends on and that exists.

        SoftwareMissingError if the machine's sources have no such package.
        """
        record = self._show(name)
        if record is None:
            raise SoftwareMissingError(
                f"this machine's apt sources have no package {name} for {self.architecture} (it is Debian's)"
            )
        if name.startswith("linux-image-") and not re.match(r"linux-image-\d+\.\d", name):  # a metapackage
            for alternative in re.findall(r"[^\s,|()]+", record.get("Depends", "")):
                if alternative.startswith("linux-image-"):
                    real = self._show(alternative)
                    if real is not None:
                        return self._package(real)
            raise SoftwareMissingError(f"the package {name} names no kernel package that the apt sources have")
        return self._package(record)

    def download(self, package: Package) -> Path:
        """Fetch a package's file, or take it from the cache if it is whole. SoftwareMissingError if that fails."""
        folder = self.root / "packages"
        for kept in folder.glob("*.deb"):
            if kept.stat().st_size == package.size and _sha256(kept) == package.sha256:
                return kept
        free = shutil.disk_usage(folder).free
        needed = 10 * package.size  # the file, what is unpacked from it, and the copy that it replaces
        if free < needed:
            raise SoftwareMissingError(
                f"fetching {package.name} needs about {needed >> 20} MiB in {folder}, and {free >> 20} MiB are free"
            )
        with tempfile.TemporaryDirectory(dir=self.root, prefix="fetch-") as draft:
            what = f"Fetching {package.name} ({package.size / 1e6:.0f} MB)"
            code, messages = self._apt_get(what, "download", f"{package.name}={package.version}", folder=Path(draft))
            files = list(Path(draft).glob("*.deb"))
            if code or len(files) != 1:
                raise SoftwareMissingError(f"the package {package.name} could not be fetched: {_reason(messages)}")
            if _sha256(files[0]) != package.sha256:
                raise SoftwareMissingError(
                    f"the package {package.name} arrived damaged: its SHA-256 is not the listed one"
                )
            for old in folder.glob(f"{package.name}_*.deb"):
                old.unlink()
            return files[0].rename(folder / files[0].name)

    def _package(self, record: dict[str, str]) -> Package:
        try:
            return Package(
                record["Package"], record["Version"], record["Architecture"], record["SHA256"], int(record["Size"])
            )
        except (KeyError, ValueError) as error:
            raise SoftwareMissingError(f"apt describes {record.get('Package', 'a package')} without {error}") from None

    def _show(self, name: str) -> dict[str, str] | None:
        """The first stanza of ``apt-cache show``: the version that would be installed."""
        result = self._run("apt-cache", "show", "--no-all-versions", name)
        if result.returncode or not result.stdout.strip():
            return None
        fields: dict[str, str] = {}
        for line in result.stdout.strip().split("\n\n")[0].splitlines():
            key, colon, value = line.partition(": ")
            if colon and not line.startswith(" "):
                fields[key] = value.strip()
        return fields

    def _run(self, tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [tool, "-c", str(self._configuration), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env=_environment(),
            check=False,
        )

    def _apt_get(self, what: str, *arguments: str, folder: Path | None = None) -> tuple[int, str]:
        """Run apt-get in ``folder`` with its progress reported; returns its exit status and messages."""
        reading, writing = os.pipe()
        command = ["apt-get", "-c", str(self._configuration), "-q", "-o", f"APT::Status-Fd={writing}", *arguments]
        if self._progress:
            self._progress(what, 0.0)
        with tempfile.TemporaryFile("w+", errors="replace") as messages:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=messages,
                    stderr=subprocess.STDOUT,
                    pass_fds=[writing],
                    cwd=folder or self.root,
                    env=_environment(),
                )
            except OSError as error:
                os.close(reading)
                return 1, f"apt-get cannot be run: {error.strerror}"
            finally:
                os.close(writing)
            try:
                for share in _shares(reading):
                    if self._progress:
                        self._progress(what, share)
                process.wait()
            except BaseException:
                process.terminate()
                process.wait()
                raise
            messages.seek(0)
            return process.returncode, messages.read()


def _shares(status: int) -> Iterator[float]:
    """The shares done, 0 to 1, from apt's status descriptor (``dlstatus:1:37.5:…`` lines)."""
    with os.fdopen(status, errors="replace") as lines:
        for line in lines:
            kind, _, rest = line.partition(":")
            if kind == "dlstatus":
                with contextlib.suppress(ValueError, IndexError):
                    yield min(1.0, max(0.0, float(rest.split(":")[1]) / 100))


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(messages: str) -> str:
    """The first thing that apt itself calls an error or a warning, as the end of a sentence."""
    for mark in ("E: ", "W: ", "Err:"):
        for line in messages.splitlines():
            if line.startswith(mark):
                return line.removeprefix(mark).strip().rstrip(".")
    return (messages.strip().splitlines() or ["apt gave no reason"])[-1].rstrip(".")
