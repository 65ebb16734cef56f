"""Measures paravirtual disks and networks, under nonroot (Xen's) and under QEMU's software CPU (virtio), side by side.

Both boot the same uncompressed Debian kernel through PVH with the same initramfs and load their drivers. The disk is
read and written past the guest's page cache, one request after the other, its image in the host's page cache; the
network is libslirp for both, with a published port to which this machine's end of each transfer connects. Disk times
are the guest's own CLOCK_MONOTONIC; network times are this machine's. The two take turns. Prints a table, writes
JSON.

    python -m bench.pv                       five pairs
    python -m bench.pv --pairs 1 --size 64
    python -m bench.pv --pairs 5 --publish   also into docs/measurements
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.boot import QEMU, QEMU_CPU, comparison_parser, machine, parse_comparison, qemu_version, write_report
from bench.userland import C_FLAGS, MissingToolError
from nonroot.boot.bzimage import parse_bzimage
from nonroot.boot.cpio import Cpio
from nonroot.boot.payload import decompress
from nonroot.guests import Guest, fetch, initramfs, progress_bar
from nonroot.testing.modules import load_order

MIB = 1 << 20
GUEST_PORT = 7000
ROUNDS = 1000
"""Of request and response."""
TIMEOUT = 240.0  # seconds
DRIVERS = {
    "xen": ("xen-blkfront", "xen-netfront"),
    "virtio": ("virtio_pci", "virtio_blk", "virtio_net"),
}
LINE = re.compile(rb"PV: (\S+) (\d+) (\d+)\r?\n")
INIT = """\
#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
case "$(cat /proc/cmdline)" in *pv=xen*) kind=xen disk=/dev/xvda;; *) kind=virtio disk=/dev/vda;; esac
for module in $(cat /modules/$kind); do insmod /modules/$module.ko; done
until test -b $disk; do sleep 0.1; done
ifconfig eth0 10.0.2.15 up
route add default gw 10.0.2.2
sleep 1
for pass in 1 2; do
    pv disk read-1M-$pass read $disk SIZE 1048576
    pv disk read-64K-$pass read $disk SIZE 65536
    pv disk random-4K-$pass random $disk SIZE 4096
    pv disk write-1M-$pass write $disk SIZE 1048576
    pv disk write-64K-$pass write $disk SIZE 65536
done
pv serve PORT
poweroff -f
"""
APPEND = "console=ttyS0 quiet cryptomgr.notests mitigations=off panic=-1"


@dataclass(frozen=True, slots=True)
class Item:
    """One figure; ``unit`` is of a rate, more is better."""

    name: str
    what: str
    unit: str


ITEMS = (
    Item("read-1M", "disk: sequential read, 1 MiB requests", "MB/s"),
    Item("read-64K", "disk: sequential read, 64 KiB requests", "MB/s"),
    Item("write-1M", "disk: sequential write, 1 MiB requests", "MB/s"),
    Item("write-64K", "disk: sequential write, 64 KiB requests", "MB/s"),
    Item("random-4K", "disk: random read, 4 KiB", "requests/s"),
    Item("to-guest", "network: host to guest", "MB/s"),
    Item("from-guest", "network: guest to host", "MB/s"),
    Item("response", "network: one byte and its answer", "rounds/s"),
)


def _wish(port: int, kind: bytes, count: int) -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.sendall(struct.pack("<cQ", kind, count))
    return peer


def measure_network(port: int, size: int) -> dict[str, list[float]]:
    """Rates of two transfers each way, and of requests and responses, with the server in the guest."""
    rates: dict[str, list[float]] = {"to-guest": [], "from-guest": [], "response": []}
    data = bytes(MIB)
    for _ in range(2):
        with _wish(port, b"R", size) as peer:
            began = time.perf_counter()
            for _ in range(size // MIB):
                peer.sendall(data)
            if peer.recv(1) == b"":
                raise SystemExit("bench: the guest closed the connection")
            rates["to-guest"].append(size / (time.perf_counter() - began) / 1e6)
        with _wish(port, b"S", size) as peer:
            began = time.perf_counter()
            left = size
            while left and (part := peer.recv(MIB)):
                left -= len(part)
            if left:
                raise SystemExit(f"bench: {left} bytes of the guest are missing")
            rates["from-guest"].append(size / (time.perf_counter() - began) / 1e6)
        with _wish(port, b"E", ROUNDS) as peer:
            began = time.perf_counter()
            for _ in range(ROUNDS):
                peer.sendall(b"x")
                peer.recv(1)
            rates["response"].append(ROUNDS / (time.perf_counter() - began))
    _wish(port, b"Q", 0).close()
    return rates


class Bench:
    """The files and commands of one benchmark."""

    def __init__(self, guest: Guest, size: int, folder: Path, engine: str) -> None:
        """MissingToolError without a C compiler."""
        folder.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            raise MissingToolError("there is no C compiler here (Debian's package gcc)")
        program = folder / "pv"
        subprocess.run(
            [compiler, *C_FLAGS, "-o", str(program), str(Path(__file__).parent / "pv_guest/pv.c")], check=True
        )
        image = parse_bzimage(guest.kernel.read_bytes())
        assert image.payload is not None, "Debian's kernels have a payload"
        assert guest.modules is not None, "Debian's kernels have modules"
        self.kernel = folder / "vmlinux"
        self.kernel.write_bytes(decompress(image.payload))
        more = Cpio()
        more.file("bin/pv", program.read_bytes(), mode=0o755)
        more.directory("modules")
        for kind, names in DRIVERS.items():
            there = {path.name.partition(".")[0].replace("-", "_") for path in guest.modules.rglob("*.ko*")}
            order = load_order(guest.modules, [name for name in names if name.replace("-", "_") in there])
            for name, contents in order:
                more.file(f"modules/{name}.ko", contents)
            more.file(f"modules/{kind}", "\n".join(name for name, _ in order).encode())
        busybox = guest.kernel.parents[1] / "bin" / "busybox"
        self.initrd = folder / "initramfs-pv.cpio"
        init = INIT.replace("SIZE", str(size)).replace("PORT", str(GUEST_PORT))
        self.initrd.write_bytes(initramfs.build(busybox.read_bytes(), init) + more.finish())
        self.disk = folder / "pv.img"
        with self.disk.open("wb") as file:
            for _ in range(size // MIB):
                file.write(os.urandom(MIB))
            os.fsync(file.fileno())  # writing back would go on during the first runs
        self.engine, self.size = engine, size

    def nonroot(self, port: int) -> list[str]:
        command = [sys.executable, "-m", "nonroot", "run", "-q", "--engine", self.engine, "--memory", "256M", "--xen"]
        command += ["--kernel", str(self.kernel), "--initrd", str(self.initrd), "--append", f"{APPEND} pv=xen"]
        return [*command, "--disk", str(self.disk), "--net", "user", "--publish", f"127.0.0.1:{port}:{GUEST_PORT}"]

    def qemu(self, port: int) -> list[str]:
        command = [QEMU, "-accel", "tcg,thread=single", "-M", "pc", "-cpu", QEMU_CPU, "-m", "256"]
        command += ["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]
        command += ["-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", f"{APPEND} pv=virtio"]
        command += ["-drive", f"file={self.disk},format=raw,if=none,id=disk", "-device", "virtio-blk-pci,drive=disk"]
        user = f"user,id=net,hostfwd=tcp:127.0.0.1:{port}-:{GUEST_PORT}"
        return [*command, "-netdev", user, "-device", "virtio-net-pci,netdev=net"]

    def run(self, system: str, command: Callable[[int], list[str]]) -> dict[str, list[float]]:
        """Boot, and have everything measured."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        process = subprocess.Popen(
            command(port), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        rates: dict[str, list[float]] = {}
        output, began = b"", time.monotonic()
        try:
            while chunk := os.read(process.stdout.fileno(), 65536):
                output += chunk
                if b"PV: listening" in output and "response" not in rates:
                    rates |= measure_network(port, self.size // 2)
                if time.monotonic() - began > TIMEOUT or b"PV: failed" in output:
                    sys.exit(f"bench: {system} failed; its console ends: {output[-300:]!r}")
            _, errors = process.communicate()
        finally:
            process.kill()
            process.wait()
        for name, count, nanoseconds in LINE.findall(output):
            if name != b"listening":
                scale = 1e9 if name.startswith(b"random") else 1e3
                key = name.decode().rpartition("-")[0]
                rates.setdefault(key, []).append(int(count) * scale / max(1, int(nanoseconds)))
        if len(rates) < len(ITEMS):
            text = (output[-800:] + errors[-500:]).decode(errors="replace")
            sys.exit(f"bench: {system} ended with {process.returncode} before everything was measured:\n{text}")
        return rates


def main() -> int:
    parser = comparison_parser(__doc__, "pv", "translate")
    parser.add_argument(
        "--size", type=int, default=256, help="MiB of the disk; half of it for a transfer (default 256)"
    )
    options = parse_comparison(parser)
    with progress_bar() as progress:
        guest = fetch("cloud-amd64", progress=progress)
    try:
        bench = Bench(guest, options.size * MIB, options.output.parent, options.engine)
    except MissingToolError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    systems = {"nonroot": bench.nonroot, "qemu": bench.qemu}
    runs: list[dict[str, Any]] = []
    for number in range(options.pairs):
        # Every second pair in the other order.
        for name in [options.only] if options.only else list(systems)[:: -1 if number % 2 else 1]:
            bench.disk.read_bytes()  # into the host's page cache
            rates = bench.run(name, systems[name])
            runs.append({"system": name, "pair": number, "rates": rates})
            figures = ", ".join(f"{item.name} {max(rates[item.name]):.0f}" for item in ITEMS)
            print(f"{number + 1}/{options.pairs} {name}: {figures}", file=sys.stderr)
    bench.disk.unlink()
    report = summary(runs)
    report |= {
        "machine": machine(),
        "size_mib": options.size,
        "engine": options.engine,
        "qemu": {"version": qemu_version(), "cpu": QEMU_CPU} if options.only != "nonroot" else None,
        "kernel": guest.version,
        "runs": runs,
    }
    show(report)
    write_report(options, "pv", report)
    return 0


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, and ratios of the pairs' medians: nonroot's rate to QEMU's."""
    medians: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {}
    for item in ITEMS:
        by_pair: dict[int, dict[str, float]] = {}
        for run in runs:
            by_pair.setdefault(run["pair"], {})[run["system"]] = statistics.median(run["rates"][item.name])
        medians[item.name] = {
            system: statistics.median(pair[system] for pair in by_pair.values() if system in pair)
            for system in dict.fromkeys(run["system"] for run in runs)
        }
        found = [pair["nonroot"] / pair["qemu"] for pair in by_pair.values() if len(pair) == 2]
        if found:
            ratios[item.name] = {"median": statistics.median(found), "least": min(found), "most": max(found)}
    return {"medians": medians, "ratios": ratios}


def show(report: dict[str, Any]) -> None:
    """The table."""
    table = Table("what", "unit", "nonroot", "QEMU", "ratio", title="Paravirtual disks and networks (more is better)")
    for item in ITEMS:
        medians, ratio = report["medians"][item.name], report["ratios"].get(item.name)
        figures = [f"{medians[system]:.0f}" if system in medians else "" for system in ("nonroot", "qemu")]
        table.add_row(item.what, item.unit, *figures, f"{ratio['median']:.2f}" if ratio else "")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
