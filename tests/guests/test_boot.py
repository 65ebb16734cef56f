"""Unmodified Debian kernels boot to userspace: every protocol, both sizes of memory, 64 and 32 bits."""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import nonroot
from nonroot import _engine
from nonroot.guests import Guest, initramfs
from tests.needed import need
from tests.waiting import wait_until_quiet

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

TROUBLE = re.compile(
    r"Oops|BUG:|WARNING:|Call Trace|unchecked MSR|invalid opcode|general protection|Unable to handle|segfault|"
    r"soft lockup|rcu: INFO|TSC unstable|clocksource.*unstable|Kernel panic"
)
"""What a healthy kernel never says."""


@dataclass(frozen=True)
class Boot:
    flavour: str
    protocol: str
    memory: int  # MiB

    def __str__(self) -> str:
        return f"{self.flavour}-{self.protocol}-{self.memory}M"


# At least one of each kind in every run; all of them in test-all.
QUICK = [Boot("cloud-amd64", "pvh", 128), Boot("686-pae", "pvh", 128)]
ALL = [
    *(Boot("cloud-amd64", protocol, memory) for protocol in ("pvh", "linux64", "linux32") for memory in (128, 1024)),
    Boot("cloud-amd64", "auto", 5120),  # memory above 4 GiB
    Boot("686-pae", "pvh", 128),
    Boot("686-pae", "linux32", 1024),
    Boot("686", "auto", 128),
    Boot("amd64", "auto", 256),
]
CASES = [pytest.param(boot, id=str(boot), marks=() if boot in QUICK else pytest.mark.slow) for boot in ALL]


@pytest.fixture(scope="module", params=CASES)
def booted(request: pytest.FixtureRequest) -> Iterator[tuple[Boot, Guest, nonroot.Domain]]:
    boot: Boot = request.param
    guest = need(boot.flavour)
    with nonroot.Domain(
        flavour=boot.flavour, memory=f"{boot.memory}M", protocol=boot.protocol, quiet=False, timeout=300, fetch=False
    ) as domain:
        domain.wait_ready()
        yield boot, guest, domain


def test_it_is_that_kernel(booted: tuple[Boot, Guest, nonroot.Domain]) -> None:
    boot, guest, domain = booted
    assert domain.run(["uname", "-sr"], check=True).stdout == f"Linux {guest.version}\n"
    machine = domain.run(["uname", "-m"], check=True).stdout.strip()
    assert machine == ("x86_64" if guest.bits == 64 else "i686")
    if boot.protocol != "auto":
        assert domain.description["protocol"] == boot.protocol


def test_it_sees_its_memory(booted: tuple[Boot, Guest, nonroot.Domain]) -> None:
    boot, _, domain = booted
    text = domain.run(["cat", "/proc/meminfo"], check=True).stdout
    match = re.search(r"MemTotal:\s+(\d+) kB", text)
    assert match is not None
    total = int(match[1]) / 1024
    assert boot.memory * 0.95 - 60 < total <= boot.memory


def test_its_kernel_has_nothing_to_complain_of(booted: tuple[Boot, Guest, nonroot.Domain]) -> None:
    _, _, domain = booted
    messages = domain.run(["dmesg"], check=True).stdout
    assert len(messages.splitlines()) > 100
    assert [line for line in messages.splitlines() if TROUBLE.search(line)] == []


def test_its_clock_keeps_time(booted: tuple[Boot, Guest, nonroot.Domain]) -> None:
    _, _, domain = booted
    command = "a=$(cut -d' ' -f1 /proc/uptime); sleep 2; b=$(cut -d' ' -f1 /proc/uptime); echo $a $b; date +%s"
    before = time.time()
    first, second, now = domain.run(command, check=True).stdout.split()
    assert 2.0 <= float(second) - float(first) < 3.5
    assert before - 2 <= int(now) <= time.time() + 2


def test_processes_work_hard_without_harm(booted: tuple[Boot, Guest, nonroot.Domain]) -> None:
    _, _, domain = booted
    command = "for i in 1 2 3 4 5 6 7 8; do seq 1 2000 | sort -r | sha256sum; done | sort -u | wc -l"
    assert domain.run(command, check=True).stdout == "1\n"
    # echo and sha256sum agree with the host on a known digest
    digest = domain.run("printf abc | sha256sum", check=True).stdout.split()[0]
    assert digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_status_comes_back(booted: tuple[Boot, Guest, nonroot.Domain]) -> None:
    _, _, domain = booted
    assert domain.run(["sh", "-c", "exit 7"]).returncode == 7
    assert domain.run(["sh", "-c", "kill -9 $$"]).returncode in (-9, 137)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, _ in _engine.optimisations()])
def test_linux_boots_without_each_optimisation(name: str) -> None:
    need("cloud-amd64")
    with nonroot.Domain(off=[name], memory="128M", timeout=500, fetch=False) as domain:
        assert domain.run(["uname", "-s"], check=True).stdout == "Linux\n"


@pytest.fixture
def short_initrd(tmp_path: Path) -> Path:
    """An initramfs whose /init prints a line and powers off."""
    guest = need("cloud-amd64")
    busybox = guest.kernel.parents[1] / "bin" / "busybox"
    path = tmp_path / "short.cpio"
    path.write_bytes(initramfs.build(busybox.read_bytes(), "#!/bin/sh\necho init runs\npoweroff -f\n"))
    return path


@pytest.mark.slow
def test_virtual_time_boots_alike(short_initrd: Path) -> None:
    kernel = need("cloud-amd64").kernel
    runs = []
    for _ in range(2):
        with nonroot.Domain(
            kernel, short_initrd, memory="128M", agent=False, quiet=False, virtual_time=True, append="panic=-1"
        ) as domain:
            stopped = domain.wait(500)
            runs.append((stopped.reason, domain.stats.instructions, domain.console.text))
    assert runs[0][0] == "poweroff"
    assert "init runs" in runs[0][2]
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_an_idle_guest_costs_next_to_nothing() -> None:
    need("cloud-amd64")
    with nonroot.Domain(memory="128M", fetch=False) as domain:
        domain.wait_ready()
        domain.start_shell()
        domain.console.expect("# ")
        wait_until_quiet(lambda: domain.stats.cpu_seconds, 0.03 * 15, 15)  # 3 % of a core


@pytest.mark.soak
@pytest.mark.parametrize("number", range(50))
def test_fifty_boots(number: int) -> None:
    """PVH and bzImage, small and large, in turns."""
    guest = need("cloud-amd64")
    protocol = ("pvh", "linux64")[number % 2]
    memory = ("128M", "1G")[number // 2 % 2]
    with nonroot.Domain(memory=memory, protocol=protocol, timeout=500, fetch=False) as domain:
        assert domain.run(["uname", "-r"], check=True).stdout == f"{guest.version}\n"
        assert domain.shutdown(60).reason == "poweroff"
