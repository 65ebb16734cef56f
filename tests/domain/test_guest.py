"""Linux in a real domain, on the real engine: what the API and the agent promise, from end to end."""

import contextlib
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nonroot.api import Domain
from nonroot.errors import (
    BootTimeoutError,
    CommandTimeoutError,
    DomainStoppedError,
    GuestCrashError,
    GuestFileError,
    GuestPanicError,
    NotRunningError,
    SoftwareMissingError,
)

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

Make = Callable[..., Domain]


@pytest.fixture(scope="module")
def domain_options() -> dict[str, Any]:
    return {"memory": "128M"}


@pytest.fixture(
    scope="module",
    params=["booted", pytest.param("restored", marks=pytest.mark.slow), pytest.param("forked", marks=pytest.mark.slow)],
)
def domain(
    request: pytest.FixtureRequest, domain_options: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Domain]:
    """However it came to be, it does the same."""
    try:
        first = Domain(**domain_options, kept=request.param == "forked").start()
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    with contextlib.ExitStack() as stack:
        stack.callback(first.destroy)
        if request.param == "restored":
            path = tmp_path_factory.mktemp("saved") / "saved"
            first.wait_ready()
            first.save(path)
            first.destroy()
            yield stack.enter_context(Domain.restore(path))
        elif request.param == "forked":
            first.wait_ready()
            yield stack.enter_context(first.fork())
        else:
            yield first


def test_uname(domain: Domain) -> None:
    result = domain.run(["uname", "-sm"], check=True)
    assert result.stdout == "Linux x86_64\n"
    ready = domain.wait_ready()
    assert (ready["bits"], ready["transport"]) == (64, "ports")
    assert ready["release"] == domain.run(["uname", "-r"]).stdout.strip()


def test_streams_and_statuses(domain: Domain) -> None:
    everything = bytes(range(256)) * 700
    result = domain.run("cat; echo err >&2; exit 7", stdin=everything)
    assert (result.returncode, result.stdout_bytes, result.stderr) == (7, everything, "err\n")
    assert domain.run(["nope"]).returncode == 127
    assert domain.run(["/etc/passwd"]).returncode == 126
    assert domain.run("kill -9 $$").returncode == -9
    assert domain.run("cat").stdout_bytes == b""


def test_large_streams(domain: Domain) -> None:
    data = os.urandom(2_000_000)
    assert domain.run("md5sum", stdin=data).stdout.split()[0] == hashlib.md5(data).hexdigest()
    assert domain.run("head -c 3000000 /dev/zero").stdout_bytes == bytes(3_000_000)


def test_what_commands_find(domain: Domain) -> None:
    mounts = domain.run("cat /proc/mounts").stdout
    for place in ("/proc", "/sys", "/dev", "/dev/pts", "/tmp", "/run"):
        assert f" {place} " in mounts
    assert domain.run("hostname; echo $HOME; pwd").stdout == "nonroot\n/root\n/\n"
    assert domain.run("ping -c 1 -W 5 127.0.0.1").returncode == 0
    assert domain.run("test -c /dev/ttyS0 && test -c /dev/null && ls /dev/fd/0 /dev/stdin").returncode == 0


def test_signals_and_timeouts(domain: Domain) -> None:
    ready = threading.Event()
    command = domain.popen(
        "trap 'exit 9' TERM; echo ready; while :; do sleep 1; done", on_output=lambda k, d: ready.set()
    )
    assert ready.wait(30)
    command.send_signal(signal.SIGTERM)
    assert command.wait(30).returncode == 9
    with pytest.raises(CommandTimeoutError):
        domain.run("echo before; sleep 100", timeout=1)
    assert domain.run("echo after").stdout == "after\n"


def test_terminal_in_the_guest(domain: Domain) -> None:
    seen = bytearray()
    command = domain.popen("stty size; test -t 0", tty=(41, 133), on_output=lambda kind, data: seen.extend(data))
    assert command.wait(30).returncode == 0
    assert seen == b"41 133\r\n"


def test_copies(domain: Domain, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(1_000_000))
    (source / "sub" / "link").symlink_to("../big")
    domain.copy_in(source, "/data/tree")
    digest = hashlib.sha256((source / "big").read_bytes()).hexdigest()
    assert domain.run("sha256sum < /data/tree/sub/link").stdout.split()[0] == digest
    assert domain.copy_out("/data/tree", tmp_path / "back") == []
    assert (tmp_path / "back" / "big").read_bytes() == (source / "big").read_bytes()
    domain.copy_out("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text().startswith("Linux version")
    with pytest.raises(GuestFileError, match="no such file"):
        domain.copy_out("/nowhere", tmp_path)


def test_memory_and_registers(domain: Domain) -> None:
    # Xen's pages come to it: the rings of its console and of XenStore, and what the guest has had mapped since.
    pages, rest = divmod(domain.memory.size - (128 << 20) + (0xC0000 - 0xA0000), 4096)
    assert rest == 0
    assert 2 <= pages <= 40
    assert domain.memory.read(0xE0000, 8) == b"RSD PTR "
    assert domain.memory.read(0x9FFF0, 16) == bytes(16)
    with pytest.raises(ValueError, match="0xa0000"):
        domain.memory.read(0x9FFF8, 16)
    with pytest.raises(ValueError, match="no RAM"):
        domain.memory.read(0xC000_0000, 1)
    # Below 0xFC00 of the first megabyte is the kernel's; the last page under the hole is nobody's.
    before = domain.memory.read(0x9F000, 16)
    domain.memory.write(0x9F000, b"written by us ..")
    assert domain.memory.read(0x9F000, 16) == b"written by us .."
    domain.memory.write(0x9F000, before)
    registers = domain.registers
    assert registers.cr0 & 0x8000_0001 == 0x8000_0001
    assert registers.efer & 0x500 == 0x500


def test_pause_stops_the_guest_and_its_time(domain: Domain) -> None:
    domain.pause()
    first = domain.stats
    time.sleep(0.3)
    second = domain.stats
    assert first.state == second.state == "paused"
    assert first.instructions == second.instructions
    domain.unpause()
    assert domain.run("true").returncode == 0
    assert domain.stats.instructions > first.instructions


def test_statistics(domain: Domain) -> None:
    stats = domain.stats
    assert stats.state == "running"
    assert stats.instructions > 100_000_000
    assert stats.exits["PortIo"] > 100
    assert 0 < stats.machine_seconds < 1000


def test_power_off_and_what_is_left(make_domain: Make) -> None:
    domain = make_domain(quiet=False)
    domain.console.expect(rb"Linux version \d", 60)
    assert domain.run(["true"]).returncode == 0
    stopped = domain.shutdown(60)
    assert stopped.reason == "poweroff"
    assert "Power down" in stopped.console
    assert domain.stats.state == "stopped"
    assert domain.memory.read(0xE0000, 8) == b"RSD PTR "
    with pytest.raises(Exception, match="powered off"):
        domain.run(["true"])


def test_panic_is_named(make_domain: Make) -> None:
    domain = make_domain()
    with pytest.raises(GuestPanicError, match="sysrq triggered crash") as caught:
        domain.run("echo c > /proc/sysrq-trigger; sleep 100")
    assert "Kernel panic" in caught.value.details["console"]


@pytest.mark.slow
def test_panic_without_root_file_system(make_domain: Make) -> None:
    domain = make_domain(agent=False, append="rdinit=/nowhere root=/dev/nowhere")
    stopped = domain.wait(120)
    assert stopped.reason == "panic"
    assert "Unable to mount root fs" in stopped.message


@pytest.mark.slow
def test_panic_that_hangs(make_domain: Make) -> None:
    domain = make_domain(append="panic=0")
    with pytest.raises(GuestPanicError, match="sysrq triggered crash"):
        domain.run("echo c > /proc/sysrq-trigger; sleep 100")


@pytest.mark.slow
def test_reboot_and_triple_fault_are_named(make_domain: Make) -> None:
    with pytest.raises(DomainStoppedError, match="reset the machine"):
        make_domain().run("reboot -f")
    domain = make_domain(append="reboot=t", xen=False)  # else a hypercall does it
    with pytest.raises(GuestCrashError, match="triple fault") as caught:
        domain.run("reboot -f")
    assert caught.value.details["rip"] > 0


@pytest.mark.slow
def test_virtual_time_repeats_exactly(make_domain: Make) -> None:
    results = []
    for _ in range(2):
        domain = make_domain(virtual_time=True)
        out = domain.run("cat - /proc/uptime; head -c 16 /dev/urandom | md5sum", stdin=b"x" * 100_000).stdout_bytes
        time.sleep(0.2)  # the guest must not notice how long we wait
        again = domain.run("date +%s.%N").stdout_bytes
        results.append((out, again, domain.stats.instructions, domain.stats.machine_seconds))
        domain.destroy()
    assert results[0] == results[1]
    other = make_domain(virtual_time=True, seed=1).run("head -c 16 /dev/urandom | md5sum").stdout_bytes
    assert other.split()[0] not in results[0][0]


def test_boot_timeout(make_domain: Make) -> None:
    domain = make_domain(timeout=0.05)
    with pytest.raises(BootTimeoutError, match="was not ready"):
        domain.run("true")


def test_shell_on_the_console(make_domain: Make) -> None:
    domain = make_domain()
    domain.start_shell(rows=37, cols=101)
    domain.console.expect(r"# ", 120)
    domain.console.write("stty size\n")
    domain.console.expect(r"37 101\r\n", 30)
    domain.resize(40, 120)
    domain.console.write("stty size\n")
    domain.console.expect(r"40 120\r\n", 30)
    with pytest.raises(NotRunningError, match="shell"):
        domain.run("true")
    domain.console.write("exit\n")
    assert domain.wait(60).reason == "poweroff"


def test_scrambled_memory(make_domain: Make) -> None:
    domain = make_domain(scramble_seed=7)
    assert domain.run("echo hello").stdout == "hello\n"
    assert domain.memory.read(0xE0000, 8) == b"RSD PTR "


@pytest.mark.slow
def test_thirty_two_bits(make_domain: Make) -> None:
    domain = make_domain(flavour="686-pae")
    assert domain.run(["uname", "-m"]).stdout == "i686\n"
    assert domain.wait_ready()["bits"] == 32
    assert domain.run("cat", stdin=b"x" * 100_000).stdout_bytes == b"x" * 100_000


def test_without_ports_the_agent_uses_the_serial_line(make_domain: Make) -> None:
    domain = make_domain(agent_ports=False)
    assert domain.wait_ready()["transport"] == "serial"
    assert domain.run("echo hello").stdout == "hello\n"
    assert domain.run("cat", stdin=bytes(range(256)) * 100).stdout_bytes == bytes(range(256)) * 100
