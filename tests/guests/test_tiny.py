"""The built-in guest: what it finds, its self-check, its end; under nonroot and, where it is installed, under QEMU."""

import shutil
import subprocess
from pathlib import Path

import pytest

import nonroot
from nonroot import _engine
from nonroot.boot.elf import parse_elf
from nonroot.guests import tiny

QEMU = shutil.which("qemu-system-x86_64")
CHECKS = {
    "start information",
    "ACPI tables",
    "integer arithmetic",
    "x87 and SSE2",
    "paging",
    "page faults",
    "exceptions",
    "self-modifying code",
    "user mode",
    "timer interrupts (PIT through the PIC)",
    "local APIC timer",
}


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.write_bytes(_engine.tiny_guest())
    return path


def checks(console: str) -> dict[str, str]:
    lines = [line.removeprefix("check").strip() for line in console.splitlines() if line.startswith("check ")]
    return dict(line.split(": ") for line in lines)


def test_the_image_has_a_pvh_entry_and_loads_at_one_mebibyte() -> None:
    image = parse_elf(_engine.tiny_guest())
    assert image.pvh_entry is not None
    assert image.start == 1 << 20
    assert image.start <= image.pvh_entry < image.end


def test_it_is_a_guest_like_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    guest = tiny()
    assert (guest.flavour, guest.source, guest.initrd, guest.is_linux) == ("tiny", "built-in", None, False)
    assert guest.kernel.read_bytes() == _engine.tiny_guest()
    guest.kernel.write_bytes(b"damaged")
    assert tiny().kernel.read_bytes() == _engine.tiny_guest()


def test_it_passes_its_self_check_under_nonroot(kernel: Path) -> None:
    with nonroot.Domain(kernel, append="hello from the test", memory="64M", agent=False, quiet=False) as domain:
        stopped = domain.wait(60)
        console = domain.console.text
    assert stopped.reason == "poweroff", console
    assert checks(console) == dict.fromkeys(CHECKS, "ok")
    assert "hello from the test" in console
    assert "self-check passed" in console
    assert "memory   63 MiB of RAM" in console or "memory   64 MiB of RAM" in console


def test_a_crash_is_a_triple_fault(kernel: Path) -> None:
    with nonroot.Domain(kernel, append="crash quiet", memory="64M", agent=False) as domain:
        assert domain.wait(60).reason == "triple_fault"


def test_it_echoes_what_is_typed(kernel: Path) -> None:
    with nonroot.Domain(kernel, append="echo quiet", memory="64M", agent=False) as domain:
        domain.console.expect("say something")
        domain.console.write("one two\r")
        domain.console.expect("one two\r\n")
        domain.console.write(b"\x04")
        assert domain.wait(60).reason == "poweroff"


ENDS_OF_GARBAGE = {"poweroff", "reset", "triple_fault", "halted"}


@pytest.mark.parametrize(
    "seed", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)]
)
def test_garbage_for_every_port_ends_only_the_guest(kernel: Path, seed: int) -> None:
    with nonroot.Domain(kernel, append=f"quiet garbage={seed}", memory="64M", agent=False) as domain:
        stopped = domain.wait(120)
        console = domain.console.text
    assert "the devices have seen garbage" in console
    assert stopped.reason in ENDS_OF_GARBAGE, stopped


@pytest.mark.parametrize("name", [name for name, _ in _engine.optimisations()])
def test_it_passes_without_each_optimisation(kernel: Path, name: str) -> None:
    with nonroot.Domain(kernel, append="quiet", memory="64M", agent=False, off=[name]) as domain:
        assert domain.wait(60).reason == "poweroff"
        assert "self-check passed" in domain.console.text


def test_virtual_time_repeats_exactly(kernel: Path) -> None:
    runs = set()
    for _ in range(3):
        with nonroot.Domain(kernel, memory="64M", agent=False, quiet=False, virtual_time=True) as domain:
            assert domain.wait(60).reason == "poweroff"
            runs.add((domain.stats.instructions, domain.stats.machine_seconds, domain.console.text))
    assert len(runs) == 1


def qemu(kernel: Path, append: str) -> tuple[str, int]:
    command = [QEMU or "", "-accel", "tcg", "-M", "pc", "-m", "64", "-nodefaults", "-nographic", "-no-reboot"]
    command += [
        "-serial",
        "stdio",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=4",
        "-kernel",
        str(kernel),
        "-append",
        append,
    ]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=False)
    return result.stdout.decode(errors="replace").replace("\r", ""), result.returncode


@pytest.mark.skipif(QEMU is None, reason="QEMU is not installed")
@pytest.mark.parametrize(("append", "status"), [("hello", 0), ("quiet status=3", 3)])
def test_qemu_agrees(kernel: Path, append: str, status: int) -> None:
    console, code = qemu(kernel, append)
    assert code == status << 1 | 1, console  # isa-debug-exit's way to say a status
    assert "self-check passed" in console
    if "quiet" not in append:
        assert checks(console) == dict.fromkeys(CHECKS, "ok")
