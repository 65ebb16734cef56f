"""Measures device models: at home, in a stub domain, and unconfined in a process of their own (dom0).

The test is the vCPU: it reads a port, or writes to the VGA's window, and looks at the clock, as an exit of the guest's
would. Disk reads are of sectors that the host has in its page cache.

    python -m bench.stubdom
    python -m bench.stubdom --hogs 2        with so many processes that keep processors busy
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.handover import describe_image
from nonroot.backends.service import BlockService
from nonroot.devices.display import attach_display
from nonroot.devices.ide_unit import Disk
from nonroot.devices.storage import attach_storage
from nonroot.engines import select
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig
from nonroot.hvm.pc import Attach, Board
from nonroot.stubdom.model import DeviceModel, Parts

MIB = 1 << 20
READS = 20_000
SECTORS = 256
"""In one command of a disk: 128 KiB."""


@contextlib.contextmanager
def made(where: str, disk: Path) -> Iterator[tuple[Machine, DeviceModel | None, float]]:
    """A machine with a screen and a disk, and the seconds that its device model took to begin."""
    image = open_image(Drive.parse(f"{disk},ro"))
    services: list[BlockService] = []
    model: DeviceModel | None = None
    attach: list[Attach]
    if where == "internal":

        def storage(board: Board) -> None:
            services.append(BlockService(image, board.post, board.clock))
            attach_storage(board, [Disk(services[0]), None, None, None])

        attach = [attach_display, storage]
    else:
        described = describe_image(image)
        assert described is not None
        medium = {"image": described[0], "files": len(described[1])}
        place = {"cd": False, "serial": "NR00000001", "medium": medium}
        parts = Parts(["display", "storage"], [place, None, None, None], files=described[1])
        model = DeviceModel(parts, confined=where == "stub")
        attach = [model.attach]
    try:
        began = time.perf_counter()
        # A jump to itself at the reset vector: the test is the vCPU.
        firmware = Firmware(b"\xff" * (0x20000 - 16) + b"\xeb\xfe" + b"\xff" * 14)
        machine = Machine(
            MachineConfig(16 * MIB, firmware=firmware, agent=False, attach=attach), select.create("interpret")
        )
        machine.ports.read(0x64, 1)
        yield machine, model, time.perf_counter() - began
    finally:
        if model is not None:
            model.close()
        image.close()


def latency(machine: Machine) -> tuple[float, float]:
    """Median and 99th percentile of a port read (µs)."""
    times = []
    for _ in range(READS):
        began = time.perf_counter_ns()
        machine.ports.read(0x3C4, 1)
        times.append(time.perf_counter_ns() - began)
    times.sort()
    return times[READS // 2] / 1e3, times[READS * 99 // 100] / 1e3


def window(machine: Machine) -> float:
    """µs for a store into the VGA's window that is no memory (mode X)."""
    for port, value in ((0x3C4, 0x0604), (0x3CE, 0x0506), (0x3C4, 0x0F02)):
        machine.ports.write(port, 2, value)
    began = time.perf_counter()
    for index in range(READS):
        machine.mmio.write(0xA0000 + index % 0x8000, 1, index & 0xFF)
    machine.ports.read(0x3C4, 1)
    return (time.perf_counter() - began) / READS * 1e6


def pio(machine: Machine, seconds: float = 1.0) -> float:
    """MiB/s of a disk by PIO, a sector in each REP INS."""
    machine.ports.write(0xCF8, 4, 1 << 31 | 1 << 11 | 1 << 8 | 4)
    machine.ports.write(0xCFC, 2, 5)
    began, done, place = time.perf_counter(), 0, 0
    while (used := time.perf_counter() - began) < seconds:
        values = ((6, 0xE0), (2, 0), (3, place & 0xFF), (4, place >> 8), (5, 0), (7, 0x20))
        for register, value in values:
            machine.ports.write(0x1F0 + register, 1, value)
        for _ in range(SECTORS):
            while machine.ports.read(0x1F7, 1) & 0x88 != 0x08:
                machine._attend()
            machine.ports.read_block(0x1F0, 2, 256)
            done += 512
        place = (place + SECTORS) % 8192
    return done / used / MIB


def private_memory(pid: int | None) -> float:
    """MiB that a process shares with nobody."""
    if pid is None:
        return 0.0
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hogs", type=int, default=0, help="processes that keep processors busy meanwhile")
    arguments = parser.parse_args()
    table = Table("device model", "port read, µs", "p99", "window store, µs", "PIO, MiB/s", "start, ms", "private, MiB")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        disk = folder / "disk.img"
        disk.write_bytes(os.urandom(8 * MIB))
        for _ in range(arguments.hogs):
            hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(hog.kill)
        for where in ("internal", "stub", "dom0"):
            with made(where, disk) as (machine, model, start):
                median, worst = latency(machine)
                measures: list[Callable[[Machine], float]] = [window, pio]
                stores, rate = (measure(machine) for measure in measures)
                pid = None if model is None else model.pid
                table.add_row(
                    where,
                    f"{median:.1f}",
                    f"{worst:.1f}",
                    f"{stores:.1f}",
                    f"{rate:.1f}",
                    "-" if model is None else f"{start * 1e3:.0f}",
                    "-" if model is None else f"{private_memory(pid):.1f}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
