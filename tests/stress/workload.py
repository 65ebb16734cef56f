"""A guest's work under a load of timers, each result compared with the host's."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nonroot.guests import linux
from tests.stress.userland import CannotBuildError, Guest, build, runs_here

SCRIPT = Path(__file__).parent / "load" / "workload.sh"


@dataclass(frozen=True, slots=True)
class Report:
    """What a guest has done."""

    rounds: int
    wrong: list[str]
    """Lines that the host did not print the same, and what else went wrong."""


def chewers(bits: int, folder: Path) -> list[Path]:
    """The programs for a kernel of that size: its own, and on 64 bits the 32-bit one too if it can be built."""
    programs = [build("chew", bits, folder)]
    if bits == 64:
        try:
            other = build("chew", 32, folder)
        except CannotBuildError:
            return programs
        if runs_here(32):
            programs.append(other)
    return programs


def work(guest: Guest, folder: Path, *, first: int, rounds: int, seconds: int) -> Report:
    """Let the guest work for so many rounds or seconds, then do the same rounds here, with the same programs."""
    bits = int(guest.domain.wait_ready()["bits"])
    programs, load = chewers(bits, folder), build("timer_load", bits, folder)
    busybox = linux("cloud-amd64" if bits == 64 else "686-pae").kernel.parents[1] / "bin" / "busybox"
    guest.domain.run(["mkdir", "-p", "/stress"], check=True)
    for path in (*programs, load, SCRIPT):
        guest.domain.copy_in(path, f"/stress/{path.name}")
    inside = ",".join(f"/stress/{path.name}" for path in programs)
    command = ["sh", "/stress/workload.sh", "/bin/busybox", inside, "/tmp", str(first), str(rounds), str(seconds)]
    result = guest.domain.run([*command, f"/stress/{load.name}"], timeout=seconds + 280)
    lines = [line for line in result.stdout.splitlines() if line[:1].isdigit()]
    done = len({line.split()[0] for line in lines})
    wrong = []
    if result.returncode or result.stderr:
        wrong.append(f"the guest's script ended with {result.returncode}: {result.stderr[-500:]}")
    if result.stdout.splitlines()[-1:] != ["load 0"]:
        wrong.append(f"the load of timers ended with {result.stdout.splitlines()[-1:]}")
    expected = _here(busybox, programs, first, done)
    wrong += [
        f"guest {mine!r}, host {theirs!r}" for mine, theirs in zip(lines, expected, strict=False) if mine != theirs
    ]
    if len(lines) != len(expected):
        wrong.append(f"the guest printed {len(lines)} lines, the host {len(expected)}")
    return Report(done, wrong)


def _here(busybox: Path, programs: list[Path], first: int, rounds: int) -> list[str]:
    with tempfile.TemporaryDirectory() as folder:
        names = ",".join(map(str, programs))
        command = [str(busybox), "sh", str(SCRIPT), str(busybox), names, folder, str(first), str(rounds)]
        result = subprocess.run([*command, "1000000"], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()
