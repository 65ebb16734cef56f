"""Measures saving a running guest and going on from the file, under nonroot and under QEMU with its software CPU.

Both boot the same Debian kernel with the same initramfs; /init fills 32 MiB of a file system in memory with what cannot
be compressed, then answers lines. Times: a save from the request until the guest may go on; a restore from the start of
the process until the restored guest has answered a line. QEMU saves by `savevm` (into a qcow2 image that nothing else
uses) and by migration to a file. nonroot also forks, remembers a snapshot, and goes back to it. The two take turns.

    python -m bench.saved                      five pairs
    python -m bench.saved --pairs 9 --publish  also into docs/measurements
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import nonroot
from bench.boot import QEMU, QEMU_CPU, comparison_parser, machine, parse_comparison, qemu_version, write_report
from bench.guests import BenchError, Lines
from nonroot.guests import Guest, fetch, initramfs, progress_bar

APPEND = "console=ttyS0 quiet cryptomgr.notests mitigations=off panic=-1"
INIT = """\
#!/bin/sh
mount -t devtmpfs dev /dev
mount -t tmpfs none /tmp
dd if=/dev/urandom of=/tmp/filling bs=1M count=32 2>/dev/null
echo "SAVED: ready"
while read word; do echo "SAVED: $word"; done
"""
TIMEOUT = 120.0  # seconds
FORKS = 25

Times = dict[str, float]


class Watch:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began


def wait_line(lines: Lines, text: str) -> None:
    """BenchError unless that line comes."""
    deadline = time.perf_counter() + TIMEOUT
    try:
        while not lines.next(deadline - time.perf_counter()).text.endswith(text):  # firmware ends no line
            pass
    except (TimeoutError, EOFError):
        raise BenchError(f"{text!r} did not come; the console ends:\n" + "\n".join(lines.tail)) from None


class Nonroot:
    """Ours, through the Python API, in this process."""

    name = "nonroot"

    def __init__(self, guest: Guest, initrd: Path, memory: int, folder: Path, engine: str) -> None:
        self._make: Callable[[], nonroot.Domain] = lambda: nonroot.Domain(
            guest.kernel, initrd, APPEND, f"{memory}M", engine, agent=False, xen=False
        )
        self._folder = folder
        self._memory, self._engine = memory, engine

    def _answered(self, domain: nonroot.Domain, word: str, lines: Lines) -> None:
        domain.console.write(word + "\n")
        wait_line(lines, f"SAVED: {word}")

    def _started(self, domain: nonroot.Domain) -> tuple[nonroot.Domain, Lines]:
        lines = Lines()
        domain.console.listener = lines.feed
        return domain.start(), lines

    def measure(self) -> Times:
        """One boot, saved and restored in each way."""
        times: Times = {}
        domain, lines = self._started(self._make())
        with contextlib.closing(_Ending(domain)):
            wait_line(lines, "SAVED: ready")
            for name, packed in (("packed", True), ("plain", False)):
                path = self._folder / f"nonroot-{name}.saved"
                watch = Watch()
                domain.save(path, packed=packed)
                times[f"save, {name}"] = watch()
                times[f"MiB, {name}"] = path.stat().st_blocks * 512 / (1 << 20)
                watch = Watch()
                other, others = self._started(nonroot.Domain.restore(path))
                with contextlib.closing(_Ending(other)):
                    self._answered(other, name, others)
                    times[f"restore, {name}"] = watch()
            domain.fork().destroy()  # the template is there from the second on
            watch = Watch()
            child = domain.fork()
            with contextlib.closing(_Ending(child)):
                times["fork"] = watch()
                others = Lines()
                child.console.listener = others.feed
                self._answered(child, "child", others)
                times["fork, to the answer"] = watch()
            watch = Watch()
            domain.snapshot()
            times["snapshot"] = watch()
            self._answered(domain, "before", lines)
            watch = Watch()
            domain.revert()
            times["revert"] = watch()
            self._answered(domain, "after", lines)
        for xen in (False, True):
            times |= self._forks(xen)
        return times

    def _forks(self, xen: bool) -> Times:
        """Of a domain that was forked before: until the vCPU is let go, and until the caller has it; medians."""
        first: list[float] = []
        given: list[float] = []
        with nonroot.Domain.boot(memory=f"{self._memory}M", engine=self._engine, xen=xen) as base:
            base.fork().destroy()
            for _ in range(FORKS):
                time.sleep(0.3)  # meanwhile, the next one's machine is built
                began = time.monotonic()
                with base.fork() as child:
                    given.append(time.monotonic() - began)
                    runs_for = child.stats.wall_seconds
                    first.append(time.monotonic() - runs_for - began)
        what = "fork with Xen" if xen else "fork without Xen"
        return {f"{what}, runs": statistics.median(first), f"{what}, is given": statistics.median(given)}


class _Ending:
    def __init__(self, domain: nonroot.Domain) -> None:
        self.close = domain.destroy


class Qemu:
    """QEMU's software CPU."""

    name = "QEMU"

    def __init__(self, guest: Guest, initrd: Path, memory: int, folder: Path) -> None:
        self._folder = folder
        self._disk = folder / "qemu-snapshots.qcow2"
        self._command = [QEMU, "-accel", "tcg,thread=single", "-M", "pc", "-cpu", QEMU_CPU, "-m", str(memory)]
        self._command += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
        self._command += ["-drive", f"if=none,format=qcow2,file={self._disk}"]
        self._command += ["-kernel", str(guest.kernel), "-initrd", str(initrd), "-append", APPEND]

    def measure(self) -> Times:
        """One boot, saved and restored in each way."""
        times: Times = {}
        self._disk.unlink(missing_ok=True)
        self._make_disk()
        state = self._folder / "qemu-migrated"
        with contextlib.closing(_Process(self._command, self._folder)) as process:
            wait_line(process.lines, "SAVED: ready")
            watch = Watch()
            process.ask("human-monitor-command", **{"command-line": "savevm one"})
            times["savevm"] = watch()
            times["MiB, savevm"] = self._disk.stat().st_blocks * 512 / (1 << 20)
            watch = Watch()
            process.ask("stop")
            process.ask("migrate", uri=f"exec:cat > {state}")
            while process.ask("query-migrate")["status"] not in ("completed", "failed"):
                time.sleep(0.002)
            times["migrate to a file"] = watch()
            times["MiB, migrated"] = state.stat().st_blocks * 512 / (1 << 20)
        for name, more in (("loadvm", ["-loadvm", "one"]), ("incoming", ["-incoming", f"exec:cat {state}"])):
            watch = Watch()
            with contextlib.closing(_Process([*self._command, *more], self._folder)) as process:
                while process.ask("query-status")["status"] == "inmigrate":
                    time.sleep(0.002)
                process.ask("cont")
                process.type(name)
                wait_line(process.lines, f"SAVED: {name}")
                times[name] = watch()
        self._disk.unlink()
        state.unlink()
        return times

    def _make_disk(self) -> None:
        """An empty qcow2 image, made by QEMU itself: qemu-img need not be installed."""
        file = {"driver": "file", "filename": str(self._disk)}
        with contextlib.closing(_Process([QEMU, "-M", "none", "-nodefaults", "-nographic"], self._folder)) as process:
            process.work("blockdev-create", options=file | {"size": 0})
            process.ask("blockdev-add", **file, **{"node-name": "file"})
            process.work("blockdev-create", options={"driver": "qcow2", "file": "file", "size": 1 << 30})


class _Process:
    """A QEMU with its console and its monitor."""

    def __init__(self, command: list[str], folder: Path) -> None:
        import threading

        self.lines = Lines()
        path = folder / "qmp"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path))
        listener.listen(1)
        listener.settimeout(TIMEOUT)
        self._process = subprocess.Popen(
            [*command, "-qmp", f"unix:{path}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        threading.Thread(target=self._read, daemon=True).start()
        with listener:
            self._monitor = listener.accept()[0]
        path.unlink()
        self._file = self._monitor.makefile("r")
        self._file.readline()
        self.ask("qmp_capabilities")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self._process.stdout.fileno(), 65536):
                self.lines.feed(data)
        self.lines.end()

    def ask(self, command: str, **arguments: Any) -> Any:
        """What QMP answers. BenchError."""
        self._monitor.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while line := self._file.readline():
            record = json.loads(line)
            if "error" in record or (command == "human-monitor-command" and record.get("return")):
                raise BenchError(f"QEMU: {command}: {record}")
            if "return" in record:
                return record["return"]
        raise BenchError("QEMU has ended:\n" + "\n".join(self.lines.tail))

    def work(self, command: str, **arguments: Any) -> None:
        """Have a job done. BenchError."""
        self.ask(command, **arguments, **{"job-id": "job"})
        while (job := self.ask("query-jobs")[0])["status"] != "concluded":
            time.sleep(0.002)
        if "error" in job:
            raise BenchError(f"QEMU: {command}: {job['error']}")
        self.ask("job-dismiss", id="job")

    def type(self, word: str) -> None:
        """A line for the guest."""
        assert self._process.stdin is not None
        self._process.stdin.write(word.encode() + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._monitor.close()


def main() -> int:
    parser = comparison_parser(__doc__, "saved")
    parser.add_argument("--memory", type=int, default=256, help="the guest's memory in MiB (default 256)")
    options = parse_comparison(parser)
    folder: Path = options.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    with progress_bar() as progress:
        guest = fetch("cloud-amd64", progress=progress)
    initrd = folder / "saved-initrd.gz"
    initrd.write_bytes(initramfs.build((guest.kernel.parents[1] / "bin" / "busybox").read_bytes(), INIT))
    systems: dict[str, Nonroot | Qemu] = {
        "nonroot": Nonroot(guest, initrd, options.memory, folder, options.engine),
        "qemu": Qemu(guest, initrd, options.memory, folder),
    }
    runs: dict[str, list[Times]] = {}
    for number in range(options.pairs):
        for name in [options.only] if options.only else list(systems)[:: -1 if number % 2 else 1]:
            system = systems[name]
            times = system.measure()
            runs.setdefault(system.name, []).append(times)
            shown = ", ".join(f"{what} {value:.3f}" for what, value in times.items())
            print(f"{number + 1}/{options.pairs} {system.name}: {shown}", file=sys.stderr)
    table = Table(
        "system", "what", "median", "least", "most", title=f"a guest of {options.memory} MiB, in seconds and MiB"
    )
    medians: dict[str, Times] = {}
    for name, all_times in runs.items():
        medians[name] = {what: statistics.median(times[what] for times in all_times) for what in all_times[0]}
        for what, median in medians[name].items():
            values = [times[what] for times in all_times]
            table.add_row(name, what, *(f"{value:.3f}" for value in (median, min(values), max(values))))
    Console().print(table)
    write_report(
        options,
        "saved",
        {
            "machine": machine(),
            "memory_mib": options.memory,
            "engine": options.engine,
            "qemu": {"version": qemu_version(), "cpu": QEMU_CPU} if options.only != "nonroot" else None,
            "kernel": guest.version,
            "append": APPEND,
            "medians": medians,
            "runs": runs,
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
