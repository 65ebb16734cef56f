"""A small Debian repository on disk, so that fetching is tested with the real apt and without a network."""

import hashlib
import subprocess
from pathlib import Path

STATIC_PROGRAM = r"""
__asm__(".globl _start\n_start: hlt\n");
const char applet_names[] = "\0[\0[[\0ash\0cat\0sh\0";
"""


def static_program(folder: Path) -> bytes:
    """A static ELF that looks like a busybox: it carries an applet table."""
    source = folder / "busybox.c"
    source.write_text(STATIC_PROGRAM)
    program = folder / "busybox"
    command = ["cc", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie", "-o", str(program), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return program.read_bytes()


class Repository:
    """Packages and an index, for `deb [trusted=yes] copy:…`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.packages = folder / "packages"
        self.packages.mkdir(parents=True)
        self._index: list[str] = []

    def add(
        self, name: str, version: str, files: dict[str, bytes], depends: str = "", architecture: str = "amd64"
    ) -> Path:
        """Build a package and list it; returns its file."""
        tree = self.folder / f"tree-{name}-{version}"
        for path, data in files.items():
            target = tree / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: {architecture}\n"
        control += "Maintainer: Tests <tests@example.org>\n"
        control += f"Depends: {depends}\n" if depends else ""
        (tree / "DEBIAN").mkdir(parents=True)
        (tree / "DEBIAN" / "control").write_text(control + "Description: for a test\n")
        package = self.packages / f"{name}_{version}_{architecture}.deb"
        subprocess.run(["dpkg-deb", "-Zgzip", "--build", str(tree), str(package)], check=True, capture_output=True)
        data = package.read_bytes()
        self._index.append(
            f"{control}Filename: ./{package.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
            "Description: for a test\n"
        )
        (self.packages / "Packages").write_text("\n".join(self._index))
        return package

    def configuration(self) -> Path:
        """A file for APT_CONFIG that makes this repository the machine's only source."""
        etc = self.folder / "etc"
        (etc / "empty").mkdir(parents=True, exist_ok=True)
        (etc / "sources.list").write_text(f"deb [trusted=yes] copy:{self.packages} ./\n")
        path = etc / "apt.conf"
        lines = [f'Dir::Etc::sourcelist "{etc}/sources.list";']
        lines += [f'Dir::Etc::{kind} "{etc}/empty";' for kind in ("sourceparts", "parts")]
        path.write_text("\n".join(lines) + "\n")
        return path
