"""Measures what leaving the guest costs: microseconds for each port access, MMIO access, HLT, hypercall and the like.

A bare 64-bit guest does one thing in a loop, 1000 times, then twice as often, and so on, with a byte on the serial
line after each round; the host's clock times the rounds. Under nonroot a port or MMIO access is an exit to a device in
Python and back; QEMU's devices are C in the same process. What an empty loop takes is subtracted.

    python -m bench.exits --engine interpret
    python -m bench.exits --only port-in,mmio-read --publish
"""

from __future__ import annotations

import argparse
import json
import queue
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import nonroot
from bench.boot import QEMU, QEMU_CPU, ROOT, machine, names_only, qemu_version
from nonroot.errors import NonrootError
from nonroot.testing.asm import assemble

BASE = 0x100000
MARK = b"\x01"
ENOUGH = 0.4  # seconds: a round this long is believed
TIMEOUT = 60.0  # seconds without a round

_START = """
bits 32
    cli
    cld
    mov esp, STACK
    lgdt [gdtr]
    mov edi, TABLES
    mov ecx, 0x6000 // 4
    xor eax, eax
    rep stosd
    mov dword [TABLES], TABLES + 0x1003
    mov edi, TABLES + 0x1000
    mov eax, TABLES + 0x2003
    mov ecx, 4
directories:
    mov [edi], eax
    add edi, 8
    add eax, 0x1000
    loop directories
    mov edi, TABLES + 0x2000
    mov eax, 0x83
    mov ecx, 2048
pages:
    mov [edi], eax
    add edi, 8
    add eax, 0x200000
    loop pages
    mov eax, TABLES
    mov cr3, eax
    mov eax, 0x20
    mov cr4, eax
    mov ecx, 0xc0000080
    mov eax, 0x100
    xor edx, edx
    wrmsr
    mov eax, 0x80000011
    mov cr0, eax
    jmp 8:long_mode
bits 64
long_mode:
    mov eax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov edi, IDT + 16 * VECTOR
    mov eax, interrupt
    mov [rdi], ax
    mov word [rdi + 2], 8
    mov word [rdi + 4], 0x8e00
    shr eax, 16
    mov [rdi + 6], ax
    mov qword [rdi + 8], 0
    lidt [idtr]
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    mov esi, 0xfee00000
    mov dword [rsi + 0xf0], 0x1ff
    mov dword [rsi + 0x3e0], 11
    mov dword [rsi + 0x320], VECTOR
    mov edi, 0xfec00000
    mov dword [rdi], 1
    mov r8d, 1000
    mov edx, 0x3f8
    mov al, 1
    out dx, al
round:
    mov r9d, r8d
again:
"""

_END = """
    dec r9d
    jne again
    mov edx, 0x3f8
    mov al, 1
    out dx, al
    add r8d, r8d
    jmp round
interrupt:
    mov dword [rsi + 0xb0], 0
    iretq
    align 8
gdt:
    dq 0, 0x00af9b000000ffff, 0x00cf93000000ffff
gdtr:
    dw 23
    dd gdt
    dd 0
idtr:
    dw 16 * (VECTOR + 1) - 1
    dq IDT
buffer:
    resb 256
"""


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: the loop's body, and how many accesses it makes. RSI is the LAPIC, RDI the IOAPIC."""

    name: str
    what: str
    body: str
    accesses: int = 1
    in_qemu: bool = True


CASES = (
    Case("loop", "an empty loop", ""),
    Case("port-in", "IN from the interrupt controller's mask", "in al, 0x21"),
    Case("port-out", "OUT to the interrupt controller's mask", "mov al, 0xff\nout 0x21, al"),
    Case("port-rep", "a byte of REP INSB of 256", "cld\nmov r10, rdi\nmov edi, buffer\nmov ecx, 256\nmov edx, 0x21\n"
         "rep insb\nmov rdi, r10", 256),
    Case("mmio-read", "a load from the IOAPIC", "mov eax, [rdi + 16]"),
    Case("mmio-write", "a store to the IOAPIC", "mov dword [rdi], 1"),
    Case("lapic-read", "a load from the LAPIC (our engine's own)", "mov eax, [rsi + 0x80]"),
    Case("cpuid", "CPUID", "xor eax, eax\ncpuid"),
    Case("rdtsc", "RDTSC", "rdtsc"),
    Case("self-ipi", "an interrupt to oneself, EOI and IRET", "sti\nmov dword [rsi + 0x300], 0x40000 + VECTOR\ncli"),
    Case("hlt-timer", "arming the LAPIC's timer, HLT, the interrupt, EOI and IRET",
         "cli\nmov dword [rsi + 0x380], 100\nsti\nhlt"),
    Case("hypercall", "VMCALL, answered in Python", "vmcall", in_qemu=False),
)  # fmt: skip


def image(case: Case) -> bytes:
    """An ELF with a PVH note that both start."""
    constants = {"STACK": 0x90000, "TABLES": 0x200000, "IDT": 0x1000, "VECTOR": 0x40}
    code = assemble(_START + case.body + _END, bits=32, origin=BASE, constants=constants).code
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", BASE)
    header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, BASE, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    load = struct.pack("<IIIIIIII", 1, 0x1000, BASE, BASE, len(code), len(code), 7, 0x1000)
    notes = struct.pack("<IIIIIIII", 4, 116, 0, 0, len(note), len(note), 4, 4)
    return (header + load + notes + note).ljust(0x1000, b"\0") + code


class Rounds:
    """The times at which the guest's marks came."""

    def __init__(self) -> None:
        self._marks: queue.SimpleQueue[float] = queue.SimpleQueue()

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        for _ in range(data.count(MARK)):
            self._marks.put(now)

    def per_turn(self) -> float:
        """Seconds for one turn of the loop, from the first round that is long enough. TimeoutError if none comes."""
        try:
            last = self._marks.get(timeout=TIMEOUT)
            turns = 1000
            while True:
                mark = self._marks.get(timeout=TIMEOUT)
                if mark - last >= ENOUGH:
                    return (mark - last) / turns
                last, turns = mark, 2 * turns
        except queue.Empty:
            raise TimeoutError from None


def run_nonroot(kernel: Path, engine: str) -> tuple[str, float]:
    """The engine's name, and seconds for a turn."""
    rounds = Rounds()
    domain = nonroot.Domain(kernel, memory="32M", engine=engine, agent=False)
    domain.console.listener = rounds.feed
    with domain:
        return domain.engine, rounds.per_turn()


def run_qemu(kernel: Path) -> float:
    rounds = Rounds()
    command = [QEMU, "-accel", "tcg,thread=single", "-M", "pc", "-cpu", QEMU_CPU, "-m", "32", "-nodefaults"]
    command += ["-nographic", "-serial", "stdio", "-no-reboot", "-kernel", str(kernel)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        stdout = process.stdout
        assert stdout is not None

        def read() -> None:
            while data := stdout.read(4096):
                rounds.feed(data)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            return rounds.per_turn()
        finally:
            process.kill()
            reader.join(5)


def summarise(times: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Microseconds an access, by case and system; the loop's own time taken off."""
    result: dict[str, dict[str, float]] = {}
    for case in CASES:
        for system, seconds in times.get(case.name, {}).items():
            loop = times["loop"].get(system, [0.0]) if case.name != "loop" and "loop" in times else [0.0]
            value = (statistics.median(seconds) - statistics.median(loop)) / case.accesses * 1e6
            result.setdefault(case.name, {})[system] = max(0.0, value)
    return result


def show(summary: dict[str, dict[str, float]], engine: str | None) -> Table:
    table = Table(title=f"Microseconds for each; engine {engine}" if engine else "Microseconds for each")
    for head in ("", "what", "nonroot", "QEMU"):
        table.add_column(head, justify="left" if head in ("", "what") else "right")
    for case in CASES:
        if case.name in summary:
            cells = (summary[case.name].get(system) for system in ("nonroot", "QEMU"))
            table.add_row(case.name, case.what, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="auto", help="nonroot's engine (default auto)")
    parser.add_argument("--pairs", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--only", help="names of cases, with commas")
    parser.add_argument("--systems", default="nonroot,qemu", help="who takes part")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench" / "exits.json")
    parser.add_argument("--publish", action="store_true", help="also write docs/measurements/exits.json")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else [case.name for case in CASES]
    systems = options.systems.split(",")
    if unknown := [name for name in names if name not in {case.name for case in CASES}]:
        print(f"bench: there is no case {', '.join(unknown)}", file=sys.stderr)
        return 1
    if unknown := [name for name in systems if name not in ("nonroot", "qemu")]:
        print(f"bench: there is no system {', '.join(unknown)}; there are nonroot, qemu", file=sys.stderr)
        return 1
    if "qemu" in systems and not shutil.which(QEMU):
        print(f"bench: {QEMU} is not installed (Debian's package qemu-system-x86)", file=sys.stderr)
        return 1
    names = list(dict.fromkeys(["loop", *names]))
    cases = [case for case in CASES if case.name in names]
    engine: str | None = None
    times: dict[str, dict[str, list[float]]] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nonroot-exits-")))
        for number in range(options.pairs):
            for case in cases:
                kernel = folder / case.name
                kernel.write_bytes(image(case))
                runs: list[tuple[str, Callable[[], Any]]] = []
                if "nonroot" in systems:
                    runs.append(("nonroot", partial(run_nonroot, kernel, options.engine)))
                if "qemu" in systems and case.in_qemu:
                    runs.append(("QEMU", partial(run_qemu, kernel)))
                for system, run in runs:
                    print(f"{number + 1}/{options.pairs} {case.name}: {system}", file=sys.stderr, flush=True)
                    try:
                        measured = run()
                    except TimeoutError:
                        print(f"bench: {system} made no progress with {case.name} in {TIMEOUT:g} s", file=sys.stderr)
                        return 1
                    except NonrootError as error:
                        print(f"bench: {error}", file=sys.stderr)
                        return 1
                    if system == "nonroot":
                        engine, measured = measured
                    times.setdefault(case.name, {}).setdefault(system, []).append(measured)
    summary = summarise(times)
    report = {
        "machine": machine(),
        "engine": engine,
        "qemu": {"version": qemu_version(), "cpu": QEMU_CPU} if "qemu" in systems else None,
        "microseconds": summary,
        "seconds_per_turn": times,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1))
    if options.publish:
        place = ROOT / "docs" / "measurements" / "exits.json"
        place.write_text(json.dumps(names_only(report), indent=1) + "\n")
    Console().print(show(summary, engine))
    print(f"written to {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
