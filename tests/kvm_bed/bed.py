"""
A machine with hardware virtualization where there is none: QEMU's software CPU emulates SVM, and Debian's kernel runs
KVM on it. Its initramfs has Python, pytest, this package and tests; what pytest says comes out of a serial port.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import nonroot
from nonroot.boot.cpio import Cpio, append
from nonroot.guests.linux import linux
from nonroot.guests.packages import package

__all__ = ["QEMU", "Report", "run"]

QEMU: Final = "qemu-system-x86_64"
_PYTHON: Final = (
    *("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libgcc-s1", "libffi8"),
    *("zlib1g", "libexpat1", "libbz2-1.0", "liblzma5"),
)
_LIBRARIES: Final = (
    "pytest",
    "_pytest",
    "pluggy",
    "iniconfig",
    "packaging",
    "pygments",
    "py",
    "iced_x86",
    "lz4",
    "zstandard",
)
_MODULES: Final = ("irqbypass", "kvm", "kvm-amd")
_END: Final = "the tests ended with "

_INIT: Final = f"""#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
exec >/dev/ttyS1 2>&1
for module in {" ".join(_MODULES)}; do insmod /bed/$module.ko; done
export PYTHONHOME=/usr PYTHONPATH=/bed/site PYTHONDONTWRITEBYTECODE=1 HOME=/root
cd /bed/tests
python3.11 -m pytest -c /dev/null --rootdir=/bed/tests -p no:cacheprovider -q -rA --color=no --import-mode=importlib .
echo "{_END}$?"
sync
poweroff -f
"""


@dataclass(frozen=True)
class Report:
    """What came of the tests in the bed."""

    #: pytest's exit status; None if the machine ended before.
    status: int | None
    #: What pytest printed.
    text: str
    #: What the kernel printed.
    console: str

    def outcomes(self) -> Mapping[str, str]:
        """Of each test its outcome, as pytest's summary names it: PASSED, FAILED, SKIPPED."""
        found = {}
        for line in self.text.splitlines():
            word, _, test = line.partition(" ")
            if word in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
                found[test.partition(" - ")[0].partition("::")[2] or test] = word
        return found


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts and (path.is_file() or path.is_symlink()):
            yield path.relative_to(folder).as_posix(), path


class _Tree:
    """An archive in which files are added with the folders over them."""

    def __init__(self) -> None:
        self.archive = Cpio()
        # What the busybox initramfs has; its usr/bin is a link to bin.
        self._folders = {"bin", "lib", "usr", "usr/bin"}

    def add(self, name: str, data: bytes, mode: int = 0o644) -> None:
        self._over(name)
        self.archive.file(name, data, mode)

    def add_folder(self, folder: Path, under: str = "") -> None:
        for name, path in _files(folder):
            name = under + (name.removeprefix("usr/") if name.startswith("usr/bin/") else name)
            if name.startswith("usr/share/"):
                continue
            if path.is_symlink():
                self._over(name)
                self.archive.symlink(name, path.readlink().as_posix())
            else:
                self.add(name, path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)

    def _over(self, name: str) -> None:
        for folder in reversed(Path(name).parents[:-1] if len(Path(name).parents) > 1 else []):
            if folder.as_posix() not in self._folders:
                self._folders.add(folder.as_posix())
                self.archive.directory(folder.as_posix())


def _initrd(busybox: bytes, modules: Path, tests: list[Path]) -> bytes:
    tree = _Tree()
    for name in _PYTHON:
        tree.add_folder(package(name))
    for library in _LIBRARIES:
        spec = importlib.util.find_spec(library)
        assert spec is not None, library
        assert spec.origin is not None, library
        origin = Path(spec.origin)
        if origin.name == "__init__.py":
            tree.add_folder(origin.parent, f"bed/site/{library}/")
        else:
            tree.add(f"bed/site/{origin.name}", origin.read_bytes())
    assert nonroot.__file__ is not None
    tree.add_folder(Path(nonroot.__file__).parent, "bed/site/nonroot/")
    for module in _MODULES:
        tree.add(f"bed/{module}.ko", next(modules.rglob(f"{module}.ko")).read_bytes())
    for test in tests:
        tree.add(f"bed/tests/{test.name}", test.read_bytes())
    tree.add("bed/init", _INIT.encode(), 0o755)
    return append(busybox, tree.archive.finish())


def run(tests: list[Path], folder: Path, limit_s: float = 280.0) -> Report:
    """
    Run test modules in the bed.

    :param folder: where the initramfs and the reports go.
    :param limit_s: seconds after which the machine is ended.
    :raises nonroot.errors.SoftwareMissingError: if Debian's packages cannot be had.
    """
    guest = linux("cloud-amd64")
    assert guest.initrd is not None
    assert guest.modules is not None
    initrd, console, report = folder / "initrd", folder / "console", folder / "report"
    initrd.write_bytes(_initrd(guest.initrd.read_bytes(), guest.modules, tests))
    qemu = shutil.which(QEMU)
    assert qemu is not None
    command: list[str | Path] = [qemu, "-accel", "tcg", "-M", "q35", "-cpu", "EPYC-v1,+svm", "-smp", "1", "-m", "2048"]
    command += ["-nodefaults", "-display", "none", "-no-reboot", "-kernel", guest.kernel, "-initrd", initrd]
    command += ["-append", "console=ttyS0 quiet cryptomgr.notests rdinit=/bed/init panic=-1"]
    command += ["-serial", f"file:{console}", "-serial", f"file:{report}"]
    # If it hangs, what came until then says where. QEMU warns of the features that its CPU lacks.
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(command, check=True, timeout=limit_s, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    text = report.read_text(errors="replace") if report.exists() else ""
    _, found, status = text.rpartition(_END)
    said = console.read_text(errors="replace") if console.exists() else ""
    return Report(int(status) if found else None, text, said)
