"""Measures how much work a guest does a second under nonroot, under QEMU's software CPU, and on the host itself.

Both guests boot the same Debian kernel through PVH with the same initramfs, and then take commands on their serial
lines. For each kind of work they take turns, each idle while the other works, so that a machine that gets slower or
faster meanwhile hurts all alike. The time is the guest's own CLOCK_MONOTONIC; it is compared with the host's clock by
when the lines before and after come out, and a guest whose clock is wrong is an error. So is a checksum that differs.

    make bench                                        the boot, the exits, this
    python -m bench.work --engine interpret --pairs 1 --scale 0.1      a quick look
    python -m bench.work --only cpu,gzip --pairs 5
    python -m bench.work --bits 32                    our programs as 32-bit ones
    python -m bench.work --publish                    also into docs/measurements
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bench.boot import QEMU, QEMU_CPU, ROOT, machine, names_only, qemu_version
from bench.guests import APPEND, BenchError, Host, Line, Machine, NonrootGuest, QemuGuest
from bench.userland import MissingToolError, build_initramfs, build_work, python_command, python_tree
from nonroot.boot.bzimage import parse_bzimage
from nonroot.boot.payload import decompress
from nonroot.errors import NonrootError, SoftwareMissingError
from nonroot.guests import fetch, progress_bar

DATA = 64  # MiB of text
BOOT_TIMEOUT = 300.0  # seconds
CLOCK_SHARE, CLOCK_SECONDS = 0.02, 0.05
"""How far a guest's clock may be from the host's: this share of the time, and this much for the lines to come."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The ratio of work rates, nonroot to QEMU, to reach."""

    least: float
    aim: float


@dataclass(frozen=True, slots=True)
class Item:
    """One kind of work. ``command`` has {names} of :class:`Places`."""

    name: str
    group: str
    goal: Goal | None
    command: str
    unit: str = ""
    """For commands that do not say it themselves."""


CPU, EACH = Goal(2.2, 3.0), Goal(1.2, 2.0)
"""The six kernels' geometric mean, and each of them."""
PROGRAMS, PROCESSES = Goal(3.0, 6.0), Goal(3.0, 5.0)


def items(scale: float, seconds: float) -> list[Item]:
    """All kinds of work, with sizes and times multiplied by ``scale``."""

    def size(full: int) -> int:
        return max(1, round(full * scale))

    duration = f"{seconds * scale:g}"

    def repeated(name: str, group: str, goal: Goal | None) -> Item:
        return Item(name, group, goal, f"{{work}} {name} {duration}")

    loop = size(200_000)
    shell = f"i=0; while [ $i -lt {loop} ]; do i=$((i+1)); done; echo $i"
    starts = size(5)
    start = f"for i in $(seq {starts}); do {{python}} -c pass || exit 1; done"
    turns = size(200_000)
    return [
        *(repeated(n, "cpu", EACH) for n in ("sha256", "quicksort", "hash", "copy", "bytecode", "recursion")),
        *(repeated(n, "float", None) for n in ("mandelbrot", "x87")),
        Item(
            "shell-loop", "program", PROGRAMS, f"{{work}} time shell-loop {loop} {{busybox}} sh -c '{shell}'", "turns"
        ),
        Item(
            "sha256sum",
            "program",
            PROGRAMS,
            f"{{work}} time sha256sum {size(64)} {{busybox}} sh -c '{{busybox}} sha256sum < {{tmp}}/data64'",
            "MiB",
        ),
        Item(
            "gzip",
            "program",
            PROGRAMS,
            f"{{work}} time gzip {size(32)} {{busybox}} sh -c '{{busybox}} gzip -c < {{tmp}}/data32'",
            "MiB",
        ),
        Item(
            "python-start",
            "program",
            PROGRAMS,
            f"{{work}} time python-start {starts} {{busybox}} env {{env}} sh -c '{start}'",
            "starts",
        ),
        Item(
            "python-loop",
            "program",
            PROGRAMS,
            f"{{work}} time python-loop {turns} {{busybox}} env {{env}} {{python}} {{share}}/loop.py {turns}",
            "turns",
        ),
        *(repeated(n, "process", PROCESSES) for n in ("fork-exec-exit", "fork-exit", "page-fault")),
        *(repeated(n, "kernel", PROCESSES) for n in ("syscall", "pipe")),
    ]


def chosen(all_items: list[Item], only: str | None) -> list[Item]:
    """Those whose name or group is in the list. BenchError for a name that is neither."""
    if only is None:
        return all_items
    words = only.split(",")
    known = {item.name for item in all_items} | {item.group for item in all_items}
    if unknown := [word for word in words if word not in known]:
        raise BenchError(f"there is no work named {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return [item for item in all_items if item.name in words or item.group in words]


@dataclass(frozen=True, slots=True)
class Result:
    """One measurement."""

    work: str
    system: str
    round: int
    units: int
    seconds: float
    """By the clock of whoever did the work."""
    host_seconds: float
    """By the host's clock, from the line before to the line after."""
    check: str
    unit: str

    @property
    def rate(self) -> float:
        """Units a second."""
        return self.units / self.seconds

    @property
    def clock_is_right(self) -> bool:
        return abs(self.seconds - self.host_seconds) <= CLOCK_SHARE * self.host_seconds + CLOCK_SECONDS


_RESULT = re.compile(r"WORK: name=(\S+) units=(\d+) ns=(\d+) check=([0-9a-f]{16}) unit=(.*)")


def parse(lines: list[Line], item: Item, system: str, number: int) -> Result:
    """The measurement that a command's output holds. BenchError if it holds none."""
    started = None
    for line in lines:
        if line.text == "WORK: start":
            started = line.at
        elif (match := _RESULT.fullmatch(line.text)) and started is not None:
            name, units, ns, check, unit = match.groups()
            if name == item.name and int(ns) > 0:
                elapsed = line.at - started
                return Result(name, system, number, int(units), int(ns) / 1e9, elapsed, check, item.unit or unit)
    output = "\n".join(line.text for line in lines)
    raise BenchError(f"{system}: {item.name} printed no result:\n{output}")


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def summarise(results: list[Result], all_items: list[Item]) -> dict[str, Any]:
    """Per work: each system's median rate, nonroot's ratio to QEMU in each pair, what native is faster by."""
    summary: dict[str, Any] = {"work": {}}
    for item in all_items:
        mine = [result for result in results if result.work == item.name]
        if not mine:
            continue
        rates = {
            system: [result.rate for result in mine if result.system == system]
            for system in dict.fromkeys(result.system for result in mine)
        }
        entry: dict[str, Any] = {
            "group": item.group,
            "unit": mine[0].unit,
            "rate": {system: statistics.median(values) for system, values in rates.items()},
            "clock_off": max(abs(r.seconds / r.host_seconds - 1) for r in mine),
        }
        if "nonroot" in rates and "QEMU" in rates:
            pairs = [ours / theirs for ours, theirs in zip(rates["nonroot"], rates["QEMU"], strict=True)]
            entry["ratio"] = {"median": statistics.median(pairs), "min": min(pairs), "max": max(pairs)}
            if item.goal:
                entry["goal"] = asdict(item.goal)
        for system in ("nonroot", "QEMU"):
            if system in rates and "native" in rates:
                entry.setdefault("native_over", {})[system] = entry["rate"]["native"] / entry["rate"][system]
        summary["work"][item.name] = entry
    cpu = [entry for entry in summary["work"].values() if entry["group"] == "cpu"]
    if len(cpu) == 6:
        mean: dict[str, Any] = {}
        if all("ratio" in entry for entry in cpu):
            mean["ratio"] = geometric_mean(entry["ratio"]["median"] for entry in cpu)
            mean["goal"] = asdict(CPU)
        if all("native_over" in entry for entry in cpu):
            mean["native_over"] = {
                system: geometric_mean(entry["native_over"][system] for entry in cpu)
                for system in cpu[0]["native_over"]
            }
        summary["cpu_geometric_mean"] = mean
    return summary


def verdict(ratio: float, goal: dict[str, float] | None) -> str:
    if goal is None:
        return ""
    text = f"{goal['least']:g}–{goal['aim']:g}"
    return f"{text}: " + ("aim" if ratio >= goal["aim"] else "yes" if ratio >= goal["least"] else "short")


def rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells: work, unit, nonroot, QEMU, native (a second); ratio; native's; goal."""

    def number(value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    made = []
    for name, entry in summary["work"].items():
        rate, ratio, over = entry["rate"], entry.get("ratio"), entry.get("native_over", {})
        made.append(
            (
                name,
                entry["unit"],
                *(number(rate.get(system)) for system in ("nonroot", "QEMU", "native")),
                f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})" if ratio else "",
                f"{over['nonroot']:.1f}" if "nonroot" in over else "",
                verdict(ratio["median"], entry.get("goal")) if ratio else "",
            )
        )
    if mean := summary.get("cpu_geometric_mean"):
        made.append(
            (
                "geometric mean of the six",
                *[""] * 4,
                f"{mean['ratio']:.2f}" if "ratio" in mean else "",
                f"{mean['native_over']['nonroot']:.1f}" if "nonroot" in mean.get("native_over", {}) else "",
                verdict(mean["ratio"], mean["goal"]) if "ratio" in mean else "",
            )
        )
    return made


HEADS = ("work", "unit", "nonroot", "QEMU", "native", "nonroot / QEMU", "native / nonroot", "goal (least–aim)")


def show(summary: dict[str, Any], pairs: int) -> Table:
    table = Table(title=f"Units of work a second, median of {pairs}; the ratio of each pair: median (least–most)")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("work", "unit") else "right")
    for row in rows(summary):
        table.add_row(*row)
    return table


def publish(report: dict[str, Any]) -> None:
    """The report and its table, kept in the tree."""
    folder = ROOT / "docs" / "measurements"
    folder.mkdir(parents=True, exist_ok=True)
    report = names_only(report)
    (folder / "work.json").write_text(json.dumps(report, indent=1) + "\n")
    about = report["machine"]
    lines = [
        "# Work rates in a guest: nonroot, QEMU's software CPU, the host",
        "",
        "Written by `python -m bench.work --publish`. Units of work a second, the median of "
        f"{report['pairs']} rounds in turns; of the ratio the median over the pairs, the least and the most.",
        "",
        f"Engine `{report['engine']}`; {about['date'][:10]}, {about['cpu']}, {about['cores']} cores; "
        f"QEMU {report['qemu']['version'].split()[0]}; Debian's {report['guest']['kernel']}, "
        f"{report['guest']['memory_mib']} MB, {report['guest']['bits']}-bit programs.",
        "[All measurements](work.json).",
        "",
        "| " + " | ".join(HEADS) + " |",
        "|---|---|" + "---:|" * (len(HEADS) - 2),
        *("| " + " | ".join(row) + " |" for row in rows(report["summary"])),
    ]
    (folder / "work.md").write_text("\n".join(lines) + "\n")


class Reporter:
    """A bar on a terminal, lines elsewhere."""

    def __init__(self, total: int, stack: ExitStack) -> None:
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
            self._task = self._bar.add_task("booting", total=total)

    def step(self, what: str) -> None:
        if self._bar:
            self._bar.update(self._task, description=what)
        else:
            print(what, file=sys.stderr, flush=True)

    def done(self, result: Result) -> None:
        if self._bar:
            self._bar.advance(self._task)
        else:
            print(f"  {result.rate:,.6g} {result.unit} a second", file=sys.stderr, flush=True)


def prepare(machine_: Machine, places: dict[str, str], wanted: list[Item], scale: float) -> None:
    """Whatever the commands read, and one run of Python so that its files are compiled."""
    for size, name in ((64, "sha256sum"), (32, "gzip")):
        if any(item.name == name for item in wanted):
            amount = max(1, round(size * scale)) << 20
            machine_.run("{work} data {amount} > {tmp}/data{size}".format(**places, amount=amount, size=size), 600)
    if any("{python}" in item.command for item in wanted):
        machine_.run("{busybox} env {env} {python} {share}/loop.py 1".format(**places), 600)


def measure(
    machines: list[tuple[Machine, dict[str, str]]],
    wanted: list[Item],
    pairs: int,
    timeout: float,
    reporter: Reporter,
) -> list[Result]:
    results: list[Result] = []
    checks: dict[str, tuple[str, str]] = {}
    for number in range(pairs):
        for item in wanted:
            order = machines if number % 2 == 0 else machines[::-1]
            for system, places in order:
                reporter.step(f"{number + 1}/{pairs} {item.name}: {system.name}")
                result = parse(system.run(item.command.format(**places), timeout), item, system.name, number)
                first, who = checks.setdefault(item.name, (result.check, system.name))
                if result.check != first:
                    raise BenchError(f"{item.name}: {system.name} gave {result.check}, but {who} {first}")
                if not result.clock_is_right:
                    raise BenchError(
                        f"{item.name}: {system.name}'s clock ({system.clocksource}) counted {result.seconds:.3f} s, "
                        f"the host's {result.host_seconds:.3f} s"
                    )
                reporter.done(result)
                results.append(result)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto", help="nonroot's engine (default auto)")
    parser.add_argument("--off", default="", help="names of the engine's optimisations to switch off, with commas")
    parser.add_argument("--pairs", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--only", help="names or groups (cpu, float, program, process, kernel), with commas")
    parser.add_argument("--systems", default="nonroot,qemu,native", help="who takes part")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies all sizes and times")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each repeated work runs (default 2)")
    parser.add_argument("--memory", type=int, default=512, help="the guests' memory in MiB (default 512)")
    parser.add_argument("--bits", type=int, choices=(64, 32), default=64, help="of our programs")
    parser.add_argument("--flavour", default="cloud-amd64", help="Debian's kernel flavour")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one piece of work")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "work.json")
    parser.add_argument("--publish", action="store_true", help="write docs/measurements/work.json and .md")
    options = parser.parse_args()
    try:
        return run(options)
    except (BenchError, MissingToolError, NonrootError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def run(options: argparse.Namespace) -> int:
    if options.pairs < 1 or not 0 < options.scale <= 100 or not options.seconds > 0:
        raise BenchError("--pairs, --scale and --seconds must be positive")
    wanted = chosen(items(options.scale, options.seconds), options.only)
    systems = options.systems.split(",")
    if unknown := set(systems) - {"nonroot", "qemu", "native"}:
        raise BenchError(f"there is no system {', '.join(sorted(unknown))}; there are nonroot, qemu, native")
    if "qemu" in systems and not shutil.which(QEMU):
        raise BenchError(f"{QEMU} is not installed (Debian's package qemu-system-x86); or --systems nonroot,native")
    folder = options.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar() as progress:
        guest = fetch(options.flavour, progress=progress)
        python: Path | None = None
        if any("{python}" in item.command for item in wanted):
            try:
                python = python_tree(progress)
            except SoftwareMissingError as error:
                print(f"bench: without Python, because {error}", file=sys.stderr)
                wanted = [item for item in wanted if "{python}" not in item.command]
    work = build_work(folder, options.bits)
    busybox = guest.kernel.parents[1] / "bin" / "busybox"
    kernel, initrd = folder / "vmlinux", folder / "work.cpio"
    payload = parse_bzimage(guest.kernel.read_bytes()).payload
    assert payload is not None, "Debian's kernels have a payload"
    kernel.write_bytes(decompress(payload))
    initrd.write_bytes(build_initramfs(busybox.read_bytes(), {"work": work}, python))
    inside = {"work": "/bin/work", "busybox": "/bin/busybox", "tmp": "/tmp", "share": "/share"}
    inside |= {"env": "PYTHONHOME=/usr", "python": python_command("")}
    off = tuple(filter(None, options.off.split(",")))
    with ExitStack() as stack:
        reporter = Reporter(options.pairs * len(wanted) * len(systems), stack)
        machines: list[tuple[Machine, dict[str, str]]] = []

        def add(make: Callable[[], NonrootGuest | QemuGuest]) -> None:
            made = make()
            stack.callback(made.close)
            reporter.step(f"{made.name} boots")
            made.wait_ready(BOOT_TIMEOUT)
            machines.append((made, inside))

        if "nonroot" in systems:
            add(lambda: NonrootGuest(kernel, initrd, options.memory, options.engine, off))
        if "qemu" in systems:
            add(lambda: QemuGuest(kernel, initrd, options.memory))
        if "native" in systems:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="nonroot-bench-"))
            host = {"work": str(work), "busybox": str(busybox), "tmp": scratch}
            host["share"] = str(Path(__file__).parent / "guest")
            host |= {"env": f"PYTHONHOME={python}/usr PYTHONPYCACHEPREFIX={scratch}/pyc"}
            machines.append((Host(), host | {"python": python_command(python or "")}))
        for system, places in machines:
            reporter.step(f"{system.name} prepares")
            prepare(system, places, wanted, options.scale)
        engine = next((m.engine for m, _ in machines if isinstance(m, NonrootGuest)), None)
        results = measure(machines, wanted, options.pairs, options.timeout, reporter)
        counters = next((asdict(m.domain.stats) for m, _ in machines if isinstance(m, NonrootGuest)), None)
    summary = summarise(results, wanted)
    report = {
        "machine": machine(),
        "engine": engine,
        "off": off,
        "pairs": options.pairs,
        "scale": options.scale,
        "qemu": {"version": qemu_version(), "cpu": QEMU_CPU} if "qemu" in systems else None,
        "guest": {
            "kernel": guest.version,
            "memory_mib": options.memory,
            "append": APPEND,
            "bits": options.bits,
            "compiler_flags": "gcc -O2",
            "clocksources": {system.name: system.clocksource for system, _ in machines},
        },
        "nonroot_counters": counters,
        "summary": summary,
        "measurements": [asdict(result) | {"rate": result.rate} for result in results],
    }
    options.output.write_text(json.dumps(report, indent=1))
    if options.publish:
        if len(systems) < 3 or options.only or options.scale != 1:
            raise BenchError("only a whole measurement is published: all systems, all work, --scale 1")
        publish(report)
    Console(width=None if os.isatty(1) else 150).print(show(summary, options.pairs))
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
