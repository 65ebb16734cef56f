"""Measures a sequential read of an IDE disk by DMA, under nonroot and under QEMU's software CPU and its IDE.

Both boot the same uncompressed Debian kernel through PVH with the same initramfs; its /init loads ata_piix and reads
the disk from the first byte to the last with dd, past its own page cache. The image is in the host's page cache, so
that no real disk is measured. It is read five times in each boot; each figure is the time between the two lines that
/init prints around a read. The two take turns. Prints a table and writes JSON with every run.

    python -m bench.disk                    five pairs of 256 MiB
    python -m bench.disk --pairs 1 --size 64
    python -m bench.disk --pairs 9 --publish                also into docs/measurements
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.boot import QEMU, QEMU_CPU, comparison_parser, machine, parse_comparison, qemu_version, write_report
from nonroot.boot.bzimage import parse_bzimage
from nonroot.boot.payload import decompress
from nonroot.guests import Guest, fetch, initramfs, progress_bar
from nonroot.testing.modules import modules_archive

MIB = 1 << 20
MARK = re.compile(rb"BENCH: (begin|end) (\d+)\r?\n")
INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
sh /etc/load-modules
until test -b /dev/sda; do sleep 0.2; done
sleep 1
for number in $(seq READS); do
    echo "BENCH: begin $number"
    dd if=/dev/sda of=/dev/null bs=1M iflag=direct 2>/dev/null
    echo "BENCH: end $number"
done
poweroff -f
"""
APPEND = "console=ttyS0 quiet cryptomgr.notests mitigations=off panic=-1"
TIMEOUT = 300.0  # seconds


@dataclass(slots=True)
class Run:
    """One boot; seconds."""

    system: str
    reads: list[float]
    cpu: list[float]
    """Processor time of the system's processes in each read: what other load on the machine does not disturb."""


def processor_time(pid: int) -> float:
    """Seconds that a process, its threads and its children have run so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += int((task / "schedstat").read_text().split()[0])
            children = (task / "children").read_text().split()
            total += int(1e9 * sum(processor_time(int(child)) for child in children))
    return total / 1e9


def timed(system: str, command: list[str], reads: int) -> Run:
    """Run a command that boots the guest with its console on stdout."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    output = b""
    seen: dict[tuple[bytes, int], tuple[float, float]] = {}
    try:
        while chunk := os.read(process.stdout.fileno(), 65536):
            output += chunk
            now = time.perf_counter() - started
            for mark in MARK.finditer(output):
                if (mark[1], int(mark[2])) not in seen:
                    seen[mark[1], int(mark[2])] = now, processor_time(process.pid)
            if now > TIMEOUT:
                sys.exit(f"bench: {system} did not end within {TIMEOUT:.0f} s; its console ends: {output[-300:]!r}")
        _, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    if len(seen) < 2 * reads:
        text = (output[-800:] + errors[-500:]).decode(errors="replace")
        sys.exit(f"bench: {system} ended with {process.returncode} and did not read the disk:\n{text}")
    spans = [(seen[b"begin", number], seen[b"end", number]) for number in range(1, reads + 1)]
    return Run(system, [end[0] - begin[0] for begin, end in spans], [end[1] - begin[1] for begin, end in spans])


class Bench:
    """The files and commands of one benchmark."""

    def __init__(self, guest: Guest, size: int, folder: Path, engine: str, reads: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        image = parse_bzimage(guest.kernel.read_bytes())
        assert image.payload is not None, "Debian's kernels have a payload"
        assert guest.modules is not None, "Debian's kernels have modules"
        self.kernel = folder / "vmlinux"
        self.kernel.write_bytes(decompress(image.payload))
        self.initrd = folder / "initramfs-disk.cpio"
        busybox = guest.kernel.parents[1] / "bin" / "busybox"
        modules = modules_archive(guest.modules, ("ata_piix", "sd_mod"))
        self.initrd.write_bytes(initramfs.build(busybox.read_bytes(), INIT.replace("READS", str(reads))) + modules)
        self.disk = folder / "disk.img"
        with self.disk.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())  # writing back would go on during the first runs
        self.engine = engine
        self.reads = reads

    def warm(self) -> None:
        """Have the image in the host's page cache."""
        with self.disk.open("rb") as file:
            while file.read(MIB):
                pass

    def nonroot(self) -> Run:
        command = [sys.executable, "-m", "nonroot", "run", "-q", "--engine", self.engine, "--memory", "128M"]
        command += ["--kernel", str(self.kernel), "--initrd", str(self.initrd), "--append", APPEND]
        # A disk of Xen's is another matter.
        return timed("nonroot", [*command, "--no-xen", "--disk", str(self.disk)], self.reads)

    def qemu(self) -> Run:
        command = [QEMU, "-accel", "tcg,thread=single", "-M", "pc", "-cpu", QEMU_CPU, "-m", "128"]
        command += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
        command += ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", APPEND]
        return timed("QEMU", [*command, "-drive", f"file={self.disk},format=raw,if=ide"], self.reads)


def main() -> int:
    parser = comparison_parser(__doc__, "disk")
    parser.add_argument("--reads", type=int, default=5, help="how many reads in a boot (default 5)")
    parser.add_argument("--size", type=int, default=256, help="MiB to read (default 256)")
    options = parse_comparison(parser)
    with progress_bar() as progress:
        guest = fetch("cloud-amd64", progress=progress)
    bench = Bench(guest, options.size * MIB, options.output.parent, options.engine, options.reads)
    systems = {"nonroot": bench.nonroot, "qemu": bench.qemu}
    runs: list[Run] = []
    for number in range(options.pairs):
        # Every second pair in the other order.
        for name in [options.only] if options.only else list(systems)[:: -1 if number % 2 else 1]:
            bench.warm()
            run = systems[name]()
            runs.append(run)
            line, used = (" ".join(f"{value:.2f}" for value in values) for values in (run.reads, run.cpu))
            print(f"{number + 1}/{options.pairs} {run.system}: {line} s; processor {used} s", file=sys.stderr)
    bench.disk.unlink()
    times = {
        system: [read for run in runs if run.system == system for read in run.reads]
        for system in dict.fromkeys(run.system for run in runs)
    }
    cpu = {
        system: statistics.median(used for run in runs if run.system == system for used in run.cpu) for system in times
    }
    table = Table(
        *("system", "seconds (median)", "least", "most", "MB/s", "processor seconds"),
        title=f"{options.size} MiB from an IDE disk by DMA",
    )
    for system, seconds in times.items():
        median = statistics.median(seconds)
        figures = [f"{value:.2f}" for value in (median, min(seconds), max(seconds))]
        table.add_row(system, *figures, f"{options.size * MIB / median / 1e6:.0f}", f"{cpu[system]:.2f}")
    Console().print(table)
    report = {
        "machine": machine(),
        "size_mib": options.size,
        "reads_in_a_boot": options.reads,
        "engine": options.engine,
        "qemu": {"version": qemu_version(), "cpu": QEMU_CPU} if options.only != "nonroot" else None,
        "kernel": guest.version,
        "append": APPEND,
        "medians": {system: statistics.median(seconds) for system, seconds in times.items()},
        "processor_medians": cpu,
        "runs": [asdict(run) for run in runs],
    }
    if len(times) == 2:
        middles = {system: [statistics.median(run.reads) for run in runs if run.system == system] for system in times}
        ratios = [mine / theirs for mine, theirs in zip(middles["nonroot"], middles["QEMU"], strict=True)]
        report["ratios"] = {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        print(f"nonroot takes {statistics.median(ratios):.2f} of QEMU's time (median over the pairs)")
    write_report(options, "disk", report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
