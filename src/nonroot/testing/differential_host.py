"""The host CPU as judge: a connection to the ``nonroot-hostcpu`` runner."""

import os
import platform
import shutil
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Self

from nonroot.testing.differential_case import CODE_BASE, DATA_BYTES, XSAVE_BYTES, Case, Result, unpack_results

FSGSBASE = 1
AVX = 2


class HostUnavailableError(Exception):
    """The cases cannot run on this machine; the message says why."""


def find_runner() -> Path:
    """The runner's executable: ``$NONROOT_HOSTCPU``, or built from this checkout's sources with cargo.

    Raises HostUnavailableError if the host is not an x86-64 or there is neither.
    """
    if platform.machine() != "x86_64":
        raise HostUnavailableError("comparing with the host CPU needs an x86-64 host")
    given = os.environ.get("NONROOT_HOSTCPU")
    if given:
        return Path(given)
    manifest = Path(__file__).parents[3] / "rust" / "Cargo.toml"
    if not manifest.exists():
        raise HostUnavailableError("the host runner is built from a checkout of the sources, and this is none")
    cargo = shutil.which("cargo")
    if cargo is None:
        raise HostUnavailableError("cargo, which builds the host runner, is not on the path")
    target = Path(os.environ.get("CARGO_TARGET_DIR", manifest.parent / "target"))
    command = [cargo, "build", "--quiet", "--release", "--locked", "-p", "nonroot-hostcpu"]
    subprocess.run([*command, "--manifest-path", str(manifest)], check=True)
    return target / "release" / "nonroot-hostcpu"


class HostCpu:
    """Runs batches of cases on the host; a context manager."""

    def __init__(self, runner: Path | None = None) -> None:
        self._process = subprocess.Popen(
            [str(runner or find_runner())], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
        )
        magic, version, self.features, _ = struct.unpack("<4sIII", self._read(16))
        if magic != b"NRHC" or version != 1:
            raise HostUnavailableError("the host runner speaks another version of the protocol")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the runner."""
        if self._process.stdin:
            self._process.stdin.close()
        if self._process.stdout:
            self._process.stdout.close()
        self._process.wait()

    def _read(self, length: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(length)
        if len(data) != length:
            raise RuntimeError("the host runner ended early; its message is above")
        return data

    def run(self, cases: list[Case], template: bytes) -> list[Result]:
        """Runs ``cases``, each on data pages that start as ``template``."""
        payload = b"".join(case.pack() for case in cases)
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<4sIII", b"BTCH", len(cases), len(payload), 0))
        self._process.stdin.write(template)
        self._process.stdin.write(payload)
        self._process.stdin.flush()
        magic, count, length, _ = struct.unpack("<4sIII", self._read(16))
        if magic != b"RSLT" or count != len(cases):
            raise RuntimeError("the host runner answered something else than results")
        return unpack_results(self._read(length), cases, template)


def host_gdt(host: HostCpu) -> dict[int, int]:
    """Descriptors of the host's GDT that user code can see with LAR and LSL, by entry; their bases count as zero."""
    vector = bytearray(XSAVE_BYTES)
    vector[0:2], vector[24:28], vector[512] = b"\x7f\x03", b"\x80\x1f\0\0", 7
    code = bytes.fromhex("0f02c8 0f03d0")  # lar ecx, eax; lsl edx, eax
    cases = []
    for entry in range(16):
        gpr = [8 * entry + 3, 0, 0, *[0] * 13]
        cases.append(Case(code, CODE_BASE, 0x202, gpr, 0, 0, bytes(vector), starts=[CODE_BASE]))
    found = {}
    for entry, result in enumerate(host.run(cases, bytes(DATA_BYTES))):
        rights, limit = result.gpr[1], result.gpr[2]
        if rights:
            limit >>= 12 if rights & 1 << 23 else 0
            found[entry] = limit & 0xFFFF | (rights & 0xF0FF00) << 32 | (limit >> 16 & 15) << 48
    return found
