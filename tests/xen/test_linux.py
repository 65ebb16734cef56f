"""Debian's kernels find Xen and use it: as PVH, as HVM with the platform device, in 32 bits, under both engines."""

import os
import re
import time

import pytest

import nonroot
from nonroot.guests import cached
from nonroot.xenstore.client import XenStore
from tests.runtime import own_runtime_folder
from tests.waiting import wait_until

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

TROUBLE = re.compile(r"Oops|BUG:|WARNING:|Call Trace|Unable to handle|soft lockup|clocksource.*unstable|Kernel panic")
CLOCKSOURCE = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource"
CASES = [
    ("cloud-amd64", "pvh", "auto", "Xen PVH"),
    ("cloud-amd64", "linux64", "auto", "Xen HVM"),
    ("686-pae", "linux32", "auto", "Xen HVM"),
    ("cloud-amd64", "pvh", "interpret", "Xen PVH"),
]


def domain(flavour: str, **options: object) -> nonroot.Domain:
    if cached(flavour) is None:
        message = f"Debian's {flavour} kernel has not been fetched (make guests)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return nonroot.Domain(flavour=flavour, quiet=False, xen=True, fetch=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("flavour", "protocol", "engine", "kind"), CASES, ids=lambda value: str(value))
def test_the_kernel_uses_xen(flavour: str, protocol: str, engine: str, kind: str) -> None:
    with domain(flavour, protocol=protocol, engine=engine) as guest:

        def sh(command: str) -> str:
            return guest.run(["sh", "-c", command], check=True).stdout

        messages = sh("dmesg")
        assert re.search(f"Booting (paravirtualized )?kernel on {kind}\\n", messages)
        assert "Xen version 4.17" in messages
        assert "Xen: using vcpuop timer interface" in messages
        assert "Using 2-level ABI" in messages
        assert "Grant table initialized" in messages
        assert not TROUBLE.search(messages)
        assert sh(CLOCKSOURCE) == "xen\n"
        interrupts = sh("cat /proc/interrupts")
        timer = re.search(r"(\d+) +xen-percpu +-virq +timer0", interrupts)
        assert timer is not None
        assert int(timer[1]) > 20
        assert sh("cat /sys/hypervisor/version/major /sys/hypervisor/version/minor") == "4\n17\n"
        # The console is the paravirtual one, and carries both directions.
        assert "hvc0" in sh("cat /proc/consoles")
        sh("echo from-the-guest > /dev/hvc0")
        guest.console.expect("from-the-guest", 20)
        assert abs(int(sh("date +%s")) - time.time()) < 30


def test_events_by_the_platform_devices_interrupt() -> None:
    """Without a vector: level-triggered, through the I/O APIC."""
    with domain("cloud-amd64", protocol="linux64", append="xen_no_vector_callback") as guest:
        guest.run(["sh", "-c", "echo through-the-line > /dev/hvc0"], check=True)
        guest.console.expect("through-the-line", 20)
        interrupts = guest.run(["cat", "/proc/interrupts"], check=True).stdout
        line = re.search(r"(\d+) +IO-APIC.*xen-platform-pci", interrupts)
        assert line is not None
        assert 0 < int(line[1]) < 1000


def test_memory_and_shutdown_through_xenstore() -> None:
    """The balloon gives memory back and takes it again; the guest powers off when its store says so."""
    with own_runtime_folder(), domain("cloud-amd64") as guest, XenStore() as store:

        def total() -> int:
            return int(guest.run(["sh", "-c", "free -k | awk '/^Mem/ {print $2}'"], check=True).stdout)

        everything = total()
        (number,) = (name for name in store.ls("/local/domain") if name != "0")
        home = f"/local/domain/{number}"
        assert store.read(f"{home}/control/feature-poweroff") == "1"
        store.write(f"{home}/memory/target", str(160 << 10))
        wait_until(lambda: abs(everything - total() - (96 << 10)) < 4096, pause=0.5)
        store.write(f"{home}/memory/target", str(256 << 10))
        wait_until(lambda: total() == everything, pause=0.5)
        # The kernel leaves it to this program, whose usual one asks an init that our agent is not.
        script = "rm -f /sbin/poweroff; printf '#!/bin/sh\\nexec /bin/busybox poweroff -f\\n' > /sbin/poweroff"
        guest.run(["sh", "-c", f"{script}; chmod +x /sbin/poweroff"], check=True)
        store.write(f"{home}/control/shutdown", "poweroff")
        assert guest.wait(60).reason == "poweroff"
        guest.destroy()
        wait_until(lambda: number not in store.ls("/local/domain"), pause=0.5)
