"""What the benchmark's guests run: our programs, a Python from Debian's packages, an initramfs of it all."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nonroot.boot.cpio import Cpio, append
from nonroot.errors import SoftwareMissingError
from nonroot.guests import cache, initramfs
from nonroot.guests.apt import Apt, Progress

SOURCES = Path(__file__).parent / "guest"
C_FLAGS = ["-O2", "-std=gnu11", "-static", "-msse2", "-mfpmath=sse", "-Wall", "-Wextra"]
PYTHON_PACKAGES = ("libc6", "libexpat1", "zlib1g", "libpython3.11-minimal", "python3.11-minimal")
PYTHON = "usr/bin/python3.11"
LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
LOADER = "lib64/ld-linux-x86-64.so.2"
_PYTHON_WANTS = (PYTHON, "usr/lib/python3.11/")
_LIBRARIES_WANTED = ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1", "ld-linux-x86-64.so.2")

# A shell on the serial line: one command a line, its output, "WORK: end STATUS".
INIT = """\
#!/bin/sh
export PATH=/bin:/usr/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% tmp /tmp
ifconfig lo 127.0.0.1
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty -echo
echo
echo "WORK: ready $(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)"
while read -r line; do
    eval "$line"
    echo "WORK: end $?"
done
poweroff -f
"""


class MissingToolError(Exception):
    """Something that the benchmark needs is not on this machine; one sentence."""


def build_work(folder: Path, bits: int = 64) -> Path:
    """The program ``work``, static; MissingToolError if it cannot be built here."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise MissingToolError("there is no C compiler here (Debian's package gcc)")
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"work{bits}"
    command = [compiler, f"-m{bits}", *C_FLAGS, "-o", str(output), *map(str, sorted(SOURCES.glob("*.c")))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        needed = "libc6-dev" if bits == 64 else "libc6-dev-i386 with gcc-multilib"
        first = next((line for line in result.stderr.splitlines() if "error" in line), result.stderr.strip())
        raise MissingToolError(f"work{bits} cannot be built ({first}); it needs Debian's {needed}")
    return output


def python_tree(progress: Progress | None = None) -> Path:
    """A folder with Debian's python3.11-minimal and its libraries, from the cache or fetched; 64 bits.

    SoftwareMissingError if it cannot be had.
    """
    root = cache.cache_dir()
    with cache.locked("bench-python", lambda: None):
        apt = Apt(root / "apt", "amd64", progress)
        apt.update()
        packages = [apt.find(name) for name in PYTHON_PACKAGES]
        made_from = "\n".join(f"{package.name} {package.version}" for package in packages)
        tree = root / "bench" / "python"
        stamp = tree / "made-from"
        if stamp.is_file() and stamp.read_text() == made_from:
            return tree
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        for package in packages:
            file = apt.download(package)
            result = subprocess.run(["dpkg-deb", "-x", str(file), str(tree)], capture_output=True, check=False)
            if result.returncode:
                raise SoftwareMissingError(f"the package {file.name} cannot be unpacked")
        stamp.write_text(made_from)
        return tree


def python_command(root: Path | str) -> str:
    """The shell words that run that Python where ``root`` is its tree: the same in the guest and on the host."""
    libraries = ":".join(f"{root}/{folder}" for folder in LIBRARIES)
    return f"{root}/{LOADER} --library-path {libraries} {root}/{PYTHON}"


def build_initramfs(busybox: bytes, programs: dict[str, Path], python: Path | None) -> bytes:
    """busybox, our programs in /bin, the Python, and an /init that takes commands from the serial line."""
    archive = Cpio()
    for name, path in programs.items():
        archive.file(f"bin/{name}", path.read_bytes(), mode=0o755)
    archive.directory("share")
    archive.file("share/loop.py", (SOURCES / "loop.py").read_bytes())
    if python is not None:
        made: set[Path] = set()
        for path in _python_files(python):
            relative = path.relative_to(python)
            for parent in reversed(relative.parents[:-1]):
                if parent not in made and str(parent) not in ("lib", "usr", "bin"):
                    archive.directory(str(parent))
                    made.add(parent)
            archive.file(str(relative), path.read_bytes(), mode=path.stat().st_mode & 0o777)
    return append(initramfs.build(busybox, INIT), archive.finish())


def _python_files(tree: Path) -> Iterator[Path]:
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if not path.is_file() or "__pycache__" in name:
            continue
        library = name.startswith(LIBRARIES) and path.name in _LIBRARIES_WANTED
        if library or name == LOADER or name.startswith(_PYTHON_WANTS):
            yield path
