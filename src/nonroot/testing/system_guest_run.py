"""
Runs system test guests: on our engines, on QEMU's software CPU and on Bochs.

The emulators boot a floppy whose boot sector loads the program through INT 13h; on our engine the machine is powered
on with the program in place. All run the same bytes and are stopped when the guest has printed its last line.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from nonroot.engines.protocol import Engine
from nonroot.engines.state import Segment
from nonroot.hvm.machine import Machine, MachineConfig, Outputs
from nonroot.testing.asm import Program, assemble
from nonroot.testing.system_guest import END, ORIGIN

__all__ = ["bochs", "floppy", "missing", "qemu", "run_bochs", "run_engine", "run_qemu"]

_MIB: Final = 1 << 20
_SECTOR: Final = 512
_FLOPPY_BYTES: Final = 1440 << 10
_ISOLATED: Final = ("unshare", "--user", "--map-root-user", "--net")
"""Bochs's rfb display listens on every address: it gets a network of its own, where nobody is."""
_BIOS: Final = Path("/usr/share/bochs/BIOS-bochs-latest")
_VGA_BIOS: Final = Path("/usr/share/vgabios/vgabios.bin")

_BOOT_SECTOR = """
    jmp 0:entry
entry:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    sti
    mov [drive], dl
    mov bx, PROGRAM >> 4
    mov es, bx
    mov si, 1
next:
    mov ax, si
    xor dx, dx
    mov cx, 18
    div cx
    mov cl, dl
    inc cl
    mov ch, al
    shr ch, 1
    mov dh, al
    and dh, 1
    mov dl, [drive]
    mov di, 5
again:
    mov ax, 0x0201
    xor bx, bx
    int 0x13
    jnc loaded
    xor ax, ax
    int 0x13
    dec di
    jne again
    hlt
loaded:
    mov bx, es
    add bx, 32
    mov es, bx
    inc si
    cmp si, SECTORS
    jbe next
    jmp 0:PROGRAM
drive: db 0
    org 0x7dfe
    dw 0xaa55
"""


def floppy(program: Program) -> bytes:
    """A 1.44 MB floppy image that loads a program to its origin and enters it in real mode."""
    sectors = -(-len(program.code) // _SECTOR)
    boot = assemble(_BOOT_SECTOR, bits=16, origin=0x7C00, constants={"PROGRAM": program.origin, "SECTORS": sectors})
    return (boot.code + program.code).ljust(_FLOPPY_BYTES, b"\0")


def _power_on_image() -> bytes:
    """An ELF with a PVH note and nothing but a HLT: the machine wants a kernel, the guest replaces it."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", 0x100000)
    header = struct.pack("<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, 2, 0, 0, 0)
    load = struct.pack("<IIIIIIII", 1, 0x1000, 0x100000, 0x100000, 1, 1, 5, 0x1000)
    notes = struct.pack("<IIIIIIII", 4, 116, 0, 0, len(note), len(note), 4, 4)
    return (header + load + notes + note).ljust(0x1000, b"\0") + b"\xf4"


def run_engine(engine: Engine, program: Program, *, off: Iterable[str] = (), timeout_s: float = 30.0) -> str:
    """
    What a guest prints on one of our engines, in a machine with its real devices and a scrambled memory.

    :param off: optimisations to switch off.
    :param timeout_s: after which the run is given up; what was printed until then is returned.
    """
    printed = bytearray()
    machine: Machine

    def console(number: int, data: bytes) -> None:
        if number == 0:
            printed.extend(data)
            if printed.endswith(f"{END}\n".encode()):
                machine.stop()

    config = MachineConfig(
        32 * _MIB, _power_on_image(), uarts=1, agent=False, scramble_seed=1, engine_off=frozenset(off)
    )
    machine = Machine(config, engine, Outputs(console=console))
    machine.memory.write(0, bytes(0xA0000))
    machine.memory.write(ORIGIN, program.code)
    state = machine.vcpu.state()
    code, data = Segment(0, 0, 0xFFFF, 0x9B), Segment(0, 0, 0xFFFF, 0x93)
    segments = (data, code, data, data, data, data, *state.segments[6:])
    machine.vcpu.set_state(
        replace(state, rip=ORIGIN, gpr=(0,) * 16, rflags=2, cr0=0x10, cr3=0, cr4=0, efer=0, segments=segments)
    )
    timer = threading.Timer(timeout_s, machine.stop)
    timer.daemon = True
    timer.start()
    try:
        outcome = machine.run()
    finally:
        timer.cancel()
    text = printed.decode("latin-1")
    if text.endswith(f"{END}\n"):
        return text
    state = machine.vcpu.state()
    return f"{text}<no end: {outcome.reason} {outcome.detail} at {state.segments[1].selector:#x}:{state.rip:#x}>\n"


def missing(tool: str) -> str:
    """Why an emulator cannot be used; empty if it can."""
    if tool == "qemu":
        return "" if shutil.which("qemu-system-x86_64") else "qemu-system-x86_64 is not installed"
    if not (shutil.which("bochs-bin") or shutil.which("bochs")):
        return "bochs is not installed"
    if subprocess.run([*_ISOLATED, "true"], capture_output=True, check=False).returncode:
        return "this machine allows no network namespace, which Bochs needs here"
    if not _bochs_display():
        return "bochs has neither of the display libraries that need no screen (nogui, rfb)"
    for file, package in ((_BIOS, "bochsbios"), (_VGA_BIOS, "vgabios")):
        if not file.exists():
            return f"{file} is not there: {package} is not installed"
    return ""


def _bochs_display() -> str:
    folders = Path("/usr/lib").glob("*/bochs/plugins")
    found = {p.name for folder in folders for p in folder.glob("libbx_*_gui.so")}
    for name in ("nogui", "rfb"):
        if f"libbx_{name}_gui.so" in found:
            return name
    return ""


def qemu(image: Path, output: Path) -> list[str]:
    """The command line that boots a floppy image on QEMU's software CPU."""
    command = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "32", "-nodefaults", "-no-user-config"]
    command += ["-display", "none", "-monitor", "none", "-serial", f"file:{output}", "-no-reboot", "-no-shutdown"]
    return [*command, "-drive", f"file={image},format=raw,if=floppy,readonly=on", "-boot", "a"]


def bochs(image: Path, output: Path, folder: Path) -> list[str]:
    """The command line that boots a floppy image on Bochs; writes its configuration into ``folder``."""
    config = folder / "bochsrc"
    display = _bochs_display()
    options = ', options="timeout=0"' if display == "rfb" else ""
    config.write_text(
        f"config_interface: textconfig\n"
        f"display_library: {display}{options}\n"
        f"romimage: file={_BIOS}\n"
        f"vgaromimage: file={_VGA_BIOS}\n"
        f"megs: 32\n"
        f"cpu: model=corei7_icelake_u, count=1, ips=50000000, reset_on_triple_fault=0, ignore_bad_msrs=0\n"
        f"floppya: 1_44={image}, status=inserted\n"
        f"boot: floppy\n"
        f"floppy_bootsig_check: disabled=0\n"
        f"com1: enabled=1, mode=file, dev={output}\n"
        f"clock: sync=none\n"
        f"log: {folder / 'log'}\n"
        f"panic: action=fatal\n"
        f"error: action=report\n"
        f"info: action=ignore\n"
        f"debug: action=ignore\n"
        f"speaker: enabled=0\n"
        f"sound: waveoutdrv=dummy\n"
    )
    # Debian's Bochs has its debugger built in, which waits for a command first.
    commands = folder / "commands"
    commands.write_text("continue\n")
    binary = shutil.which("bochs-bin") or "bochs"
    return [*_ISOLATED, binary, "-q", "-f", str(config), "-rc", str(commands)]


def run_qemu(program: Program, timeout_s: float = 60.0) -> str:
    """What a guest prints on QEMU's software CPU."""
    with tempfile.TemporaryDirectory(prefix="nonroot-qemu-") as name:
        folder = Path(name)
        image, output = folder / "floppy", folder / "serial"
        image.write_bytes(floppy(program))
        return _run(qemu(image, output), output, timeout_s)


def run_bochs(program: Program, timeout_s: float = 60.0) -> str:
    """What a guest prints on Bochs."""
    with tempfile.TemporaryDirectory(prefix="nonroot-bochs-") as name:
        folder = Path(name)
        image, output = folder / "floppy", folder / "serial"
        image.write_bytes(floppy(program))
        return _run(bochs(image, output, folder), output, timeout_s)


def _run(command: Sequence[str], output: Path, timeout_s: float) -> str:
    """Run an emulator until the guest has printed its last line; returns what it printed."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=output.parent
    )
    deadline = time.monotonic() + timeout_s
    text = ""
    try:
        while time.monotonic() < deadline:
            ended = process.poll() is not None
            text = output.read_bytes().decode("latin-1") if output.exists() else ""
            if text.endswith(f"{END}\n"):
                return text
            if ended:
                break
            time.sleep(0.05)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        said = process.communicate()[0].decode("latin-1")
    return f"{text}<no end within {timeout_s:g} s; the emulator said: {said[-500:]}>\n"
