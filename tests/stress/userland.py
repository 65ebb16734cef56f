"""The user programs that shake out an engine's faults: built from C, run on the host and in a guest, outputs compared.

python -m tests.stress.userland --engine translate                    all of them
python -m tests.stress.userland --engine translate --only random_code --bits 64
python -m tests.stress.userland --engine interpret --only random_code --bits 64 -- 50 50 -v
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nonroot.api import Domain
from nonroot.errors import NonrootError
from nonroot.guests import cached

SOURCES = Path(__file__).parent / "programs"
LOAD = Path(__file__).parent / "load"
FLAGS = ["-O1", "-std=gnu11", "-static", "-msse2", "-fno-strict-aliasing", "-fno-pie", "-no-pie", "-pthread"]
FLAGS += ["-Wall", "-Wno-infinite-recursion", "-Wno-unknown-warning-option"]
BITS_FLAGS = {64: ["-m64", "-mno-red-zone"], 32: ["-m32"]}
"""Inline assembly pushes and calls, which must not spoil a red zone."""
FEATURES = ("avx", "avx2", "fma", "bmi1", "bmi2", "popcnt", "sse4_1", "sse4_2", "aes", "pclmulqdq")
"""What programs use if both the host and the guest have it; they are told by their environment."""
TIMEOUT = 280.0  # seconds for one program in the guest


class CannotBuildError(Exception):
    """A program cannot be built here; one sentence."""


def names() -> list[str]:
    """The programs."""
    return sorted(path.stem for path in SOURCES.glob("*.c"))


def build(name: str, bits: int, folder: Path) -> Path:
    """A static program. CannotBuildError where there is no compiler or no C library of that size."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise CannotBuildError("there is no C compiler here")
    output = folder / f"{name}{bits}"
    if output.exists():
        return output
    source = next(folder / f"{name}.c" for folder in (SOURCES, LOAD) if (folder / f"{name}.c").exists())
    command = [compiler, *BITS_FLAGS[bits], *FLAGS, "-o", str(output), str(source), "-lm"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        if bits == 32 and not _has_library(compiler, bits):
            raise CannotBuildError("there is no static 32-bit C library here (Debian: gcc-multilib, libc6-dev-i386)")
        raise AssertionError(f"{source.name} does not compile:\n{result.stderr}")
    return output


def _has_library(compiler: str, bits: int) -> bool:
    return _smallest(compiler, bits, run=False)


@functools.cache
def runs_here(bits: int) -> bool:
    """Whether this machine's kernel runs programs of that size."""
    return _smallest(os.environ.get("CC") or "gcc", bits, run=True)


def _smallest(compiler: str, bits: int, run: bool) -> bool:
    """Whether the smallest program that uses the C library can be built, and run."""
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/smallest"
        command = [compiler, f"-m{bits}", "-static", "-x", "c", "-", "-o", program]
        source = '#include <stdio.h>\nint main(void) { return puts("") < 0; }\n'
        if subprocess.run(command, input=source.encode(), capture_output=True, check=False).returncode:
            return False
        try:
            return not run or subprocess.run([program], capture_output=True, check=False).returncode == 0
        except OSError:
            return False


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    line = next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "")
    return frozenset(line.partition(":")[2].split())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program did."""

    status: int
    output: str


class Guest:
    """A booted domain that runs programs beside the host."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self._copied: set[str] = set()
        guest = cpu_flags(domain.run(["cat", "/proc/cpuinfo"], check=True).stdout)
        common = guest & cpu_flags(Path("/proc/cpuinfo").read_text())
        names = [name for name in FEATURES if name in common]
        if "cloud" not in domain.run(["uname", "-r"], check=True).stdout:  # those kernels have no 16-bit segments
            names.append("code16")
        self.environment = {"STRESS_FEATURES": "".join(f" {name} " for name in names)}

    def here(self, program: Path, *arguments: str) -> Outcome:
        environment = {"PATH": "/bin:/usr/bin", **self.environment}
        result = subprocess.run(
            [program, *arguments], capture_output=True, env=environment, timeout=120, cwd="/", check=False
        )
        return Outcome(result.returncode, result.stdout.decode() + result.stderr.decode())

    def there(self, program: Path, *arguments: str, timeout: float = TIMEOUT) -> Outcome:
        place = f"/stress/{program.name}"
        if place not in self._copied:
            self.domain.run(["mkdir", "-p", "/stress"], check=True)
            self.domain.copy_in(program, place)
            self._copied.add(place)
        result = self.domain.run([place, *arguments], env=self.environment, timeout=timeout)
        return Outcome(result.returncode, result.stdout + result.stderr)


def difference(expected: Outcome, seen: Outcome, where: str) -> str | None:
    """The first line that differs, with those before it; None if all is the same."""
    if seen == expected:
        return None
    ours, theirs = seen.output.splitlines(), expected.output.splitlines()
    for number, (mine, wanted) in enumerate(zip(ours, theirs, strict=False)):
        if mine != wanted:
            before = "\n".join(f"    {line}" for line in theirs[max(0, number - 4) : number])
            return f"line {number + 1} differs:\n{before}\nhost  {wanted}\n{where} {mine}"
    if len(ours) != len(theirs):
        last = "\n".join((ours if len(ours) > len(theirs) else theirs)[min(len(ours), len(theirs)) :][:5])
        return f"the host printed {len(theirs)} lines, {where} {len(ours)}; the first that only one has:\n{last}"
    return f"the host ended with {expected.status}, {where} with {seen.status}"


def boot(engine: str, flavour: str = "cloud-amd64", memory: str = "256M") -> Domain:
    return Domain(memory=memory, engine=engine, flavour=flavour, timeout=280)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--flavour", default="cloud-amd64")
    parser.add_argument("--only", help="names of programs, with commas")
    parser.add_argument("--bits", type=int, choices=(64, 32), action="append")
    parser.add_argument("arguments", nargs="*", help="for the programs")
    options = parser.parse_args()
    if cached(options.flavour) is None:
        print(f"Debian's {options.flavour} kernel has not been fetched", file=sys.stderr)
        return 1
    wrong = 0
    try:
        with tempfile.TemporaryDirectory() as folder, boot(options.engine, options.flavour) as domain:
            guest = Guest(domain)
            for name in options.only.split(",") if options.only else names():
                for bits in options.bits or ([32] if "686" in options.flavour else [64, 32]):
                    program = build(name, bits, Path(folder))
                    expected = guest.here(program, *options.arguments)
                    found = difference(expected, guest.there(program, *options.arguments), domain.engine)
                    print(f"{name} {bits}: {found or 'the same'}", flush=True)
                    wrong += found is not None
    except (NonrootError, CannotBuildError) as error:
        print(f"stress: {error}", file=sys.stderr)
        return 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
