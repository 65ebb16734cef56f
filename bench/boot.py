"""Measures a boot under nonroot and under QEMU's software CPU, side by side.

Both boot the same uncompressed Debian kernel through PVH with the same initramfs, memory and command line; /init prints
one line and powers off. The two take turns, so that a machine that gets slower or faster meanwhile hurts both alike.
Prints a table and writes JSON with every run, the ratios and the machine's description.

    python -m bench.boot                          five pairs
    python -m bench.boot --engine interpret --pairs 9 --memory 1024
    python -m bench.boot --pairs 9 --publish      also into docs/measurements and the README's table

`make bench` runs this, bench.exits and bench.work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nonroot import _engine
from nonroot.boot.bzimage import parse_bzimage
from nonroot.boot.payload import decompress
from nonroot.guests import Guest, fetch, initramfs, progress_bar

ROOT = Path(__file__).parent.parent
MARK = b"BENCH: init runs"
INIT = f"#!/bin/sh\necho {MARK.decode()!r}\npoweroff -f\n"
APPEND = "console=ttyS0 quiet cryptomgr.notests mitigations=off panic=-1"
TIMEOUT = 300.0  # seconds
QEMU = "qemu-system-x86_64"
# What our CPU does not show is off there as well: five-level paging, protection keys, virtualization, SHA, 3DNow.
QEMU_CPU = "max,-la57,-pku,-pks,-svm,-sha-ni,-3dnow,-3dnowext,-sse4a,-xsaves,+tsc-deadline,+x2apic"


@dataclass(slots=True)
class Run:
    """One boot; times in seconds since the process was started."""

    system: str
    init: float
    end: float
    cpu: float
    """Processor time of the process and its children."""
    details: dict[str, Any] = field(default_factory=dict)


def timed(system: str, command: list[str], report: Path | None = None) -> Run:
    """Run a command that boots the guest with its console on stdout."""
    before = os.times()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    output = b""
    init = None
    try:
        while chunk := os.read(process.stdout.fileno(), 65536):
            output += chunk
            if init is None and MARK in output:
                init = time.perf_counter() - started
            if time.perf_counter() - started > TIMEOUT:
                sys.exit(f"bench: {system} did not end within {TIMEOUT:.0f} s; its console ends: {output[-300:]!r}")
        _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    end = time.perf_counter() - started
    after = os.times()
    if init is None or process.returncode:
        text = (output[-500:] + errors[-500:]).decode(errors="replace")
        sys.exit(f"bench: {system} ended with {process.returncode} and did not reach /init:\n{text}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    details = json.loads(report.read_bytes()) if report and report.exists() else {}
    return Run(system, init, end, cpu, details)


class Bench:
    """The files and commands of one benchmark."""

    def __init__(self, guest: Guest, memory: int, folder: Path, engine: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        image = parse_bzimage(guest.kernel.read_bytes())
        assert image.payload is not None, "Debian's kernels have a payload"
        self.kernel = folder / "vmlinux"
        self.kernel.write_bytes(decompress(image.payload))
        self.initrd = folder / "initramfs.cpio"
        busybox = guest.kernel.parents[1] / "bin" / "busybox"
        self.initrd.write_bytes(initramfs.build(busybox.read_bytes(), INIT))
        self.memory = memory
        self.engine = engine
        self.report = folder / "nonroot.json"

    def nonroot(self) -> Run:
        self.report.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("boot_nonroot.py"))]
        command += ["--kernel", str(self.kernel), "--initrd", str(self.initrd), "--append", APPEND]
        command += ["--memory", f"{self.memory}M", "--report", str(self.report), "--engine", self.engine]
        return timed("nonroot", command, self.report)

    def qemu(self) -> Run:
        command = [QEMU, "-accel", "tcg,thread=single", "-M", "pc", "-cpu", QEMU_CPU, "-m", str(self.memory)]
        command += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
        command += ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", APPEND]
        return timed("QEMU", command)


def machine() -> dict[str, Any]:
    """What was measured on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    memory = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory[1]) // 1024 if memory else None,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nonroot": _engine.VERSION,
        "commit": commit.stdout.strip() or None,
    }


def qemu_version() -> str:
    text = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    return text.splitlines()[0].removeprefix("QEMU emulator version ")


def summary(runs: list[Run]) -> dict[str, Any]:
    """Minimum and median per system, and the ratios nonroot / QEMU: of the medians, and of each pair."""
    result: dict[str, Any] = {}
    for system in dict.fromkeys(run.system for run in runs):
        mine = [run for run in runs if run.system == system]
        result[system] = {
            what: {"min": min(values), "median": statistics.median(values)}
            for what in ("init", "end", "cpu")
            for values in [[getattr(run, what) for run in mine]]
        }
        for run in mine:
            if instructions := run.details.get("instructions"):
                result[system]["instructions"] = instructions
                result[system].setdefault("mips", []).append(instructions / run.end / 1e6)
    ours = [run for run in runs if run.system == "nonroot"]
    theirs = [run for run in runs if run.system == "QEMU"]
    if ours and theirs:
        result["ratio"] = {
            what: {
                "of_medians": result["nonroot"][what]["median"] / result["QEMU"][what]["median"],
                "of_minima": result["nonroot"][what]["min"] / result["QEMU"][what]["min"],
                "per_pair": [getattr(a, what) / getattr(b, what) for a, b in zip(ours, theirs, strict=True)],
            }
            for what in ("init", "end", "cpu")
        }
    return result


def show(results: dict[str, Any], pairs: int) -> Table:
    table = Table(title=f"Boot of Debian's kernel, {pairs} runs each, in turns: median (best)")
    table.add_column("")
    systems = [name for name in ("nonroot", "QEMU") if name in results]
    for system in systems:
        table.add_column(system, justify="right")
    if "ratio" in results:
        table.add_column("ratio", justify="right")
    rows = (("first line of /init", "init"), ("power-off", "end"), ("processor time", "cpu"))
    for title, what in rows:
        cells = [f"{results[s][what]['median']:.2f} s ({results[s][what]['min']:.2f})" for s in systems]
        if "ratio" in results:
            cells.append(f"{results['ratio'][what]['of_medians']:.2f}")
        table.add_row(title, *cells)
    if "mips" in results.get("nonroot", {}):
        mips = statistics.median(results["nonroot"]["mips"])
        table.add_row("guest instructions", f"{results['nonroot']['instructions'] / 1e6:.0f} million")
        table.add_row("per second", f"{mips:.0f} million")
    return table


def names_only(value: Any) -> Any:
    """The value with absolute paths cut down to file names: a published report tells no folders of this machine."""
    if isinstance(value, dict):
        return {key: names_only(item) for key, item in value.items()}
    if isinstance(value, list):
        return [names_only(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def publish(report: dict[str, Any]) -> None:
    """Keep the report in the tree and put its table between the README's marks."""
    report = names_only(report)
    place = ROOT / "docs" / "measurements" / "boot.json"
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(report, indent=1) + "\n")
    results, machine = report["summary"], report["machine"]
    lines = [
        "| the same boot, side by side | nonroot | QEMU's software CPU | ratio |",
        "|---|---:|---:|---:|",
    ]
    for title, what in (("first line of `/init`", "init"), ("power-off", "end")):
        ours, theirs = results["nonroot"][what]["median"], results["QEMU"][what]["median"]
        lines.append(f"| {title} | {ours:.1f} s | {theirs:.1f} s | {results['ratio'][what]['of_medians']:.2f} |")
    mips = statistics.median(results["nonroot"]["mips"])
    pairs = len(report["runs"]) // 2
    where = f"{machine['date'][:10]}, {machine['cpu']}, {machine['cores']} cores"
    text = (
        f"Medians of {pairs} pairs, in turns, by `make bench` ({where}); a ratio below 1 is faster than QEMU: "
        f"Debian's {report['guest']['kernel']} through PVH, {report['guest']['memory_mib']} MB, "
        f"{results['nonroot']['instructions'] / 1e6:.0f} million guest instructions, {mips:.0f} million a second; "
        f"QEMU {report['qemu']['version'].split()[0]}. [All runs](docs/measurements/boot.json)."
    )
    lines += ["", *textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False)]
    readme = ROOT / "README.md"
    start, end = "<!-- boot: written by bench/boot.py -->\n", "<!-- /boot -->"
    before, _, rest = readme.read_text().partition(start)
    _, _, after = rest.partition(end)
    readme.write_text(before + start + "\n".join(lines) + "\n" + end + after)


def comparison_parser(document: str | None, name: str, engine: str = "auto") -> argparse.ArgumentParser:
    """The options of every benchmark that compares nonroot with QEMU and reports to ``NAME.json``."""
    parser = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="how many boots of each (default 5)")
    parser.add_argument("--engine", default=engine, help=f"nonroot's engine (default {engine})")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / f"{name}.json")
    parser.add_argument("--publish", action="store_true", help=f"also write docs/measurements/{name}.json")
    parser.add_argument("--only", choices=["nonroot", "qemu"], help="measure one of them alone")
    return parser


def parse_comparison(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line's options. SystemExit if what they ask for is not installed."""
    options = parser.parse_args()
    if options.only != "nonroot" and not shutil.which(QEMU):
        sys.exit(f"bench: {QEMU} is not installed (Debian's package qemu-system-x86); or use --only nonroot")
    return options


def write_report(options: argparse.Namespace, name: str, report: dict[str, Any]) -> None:
    """Write the JSON where it was asked for."""
    text = json.dumps(report, indent=1) + "\n"
    options.output.write_text(text)
    if options.publish:
        (ROOT / "docs" / "measurements" / f"{name}.json").write_text(text)
    print(f"written to {options.output}")


def main() -> int:
    parser = comparison_parser(__doc__, "boot")
    parser.add_argument("--memory", type=int, default=128, help="the guest's memory in MiB (default 128)")
    parser.add_argument("--flavour", default="cloud-amd64", help="Debian's kernel flavour")
    options = parse_comparison(parser)
    with progress_bar() as progress:
        guest = fetch(options.flavour, progress=progress)
    bench = Bench(guest, options.memory, options.output.parent, options.engine)
    systems = {"nonroot": bench.nonroot, "qemu": bench.qemu}
    chosen = [options.only] if options.only else list(systems)
    runs: list[Run] = []
    for number in range(options.pairs):
        for name in chosen:
            run = systems[name]()
            runs.append(run)
            print(
                f"{number + 1}/{options.pairs} {run.system}: /init {run.init:.2f} s, end {run.end:.2f} s",
                file=sys.stderr,
            )
    results = summary(runs)
    report = {
        "machine": machine(),
        "qemu": {"version": qemu_version(), "cpu": QEMU_CPU} if "qemu" in chosen else None,
        "guest": {"kernel": guest.version, "memory_mib": options.memory, "append": APPEND},
        "summary": results,
        "runs": [asdict(run) for run in runs],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1))
    if options.publish and not options.only:
        publish(report)
    Console().print(show(results, options.pairs))
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
