"""Two of Debian's kernels that ``nonroot create`` made, on a network of their own, and what is done to them at work.

The tests share the domains, and each leaves them as it found them.
"""

import hashlib
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nonroot.toolstack import place as toolstack_place
from nonroot.xenstore import place
from nonroot.xenstore.client import XenStore
from tests.acceptance.guests import (
    MIB,
    PATIENCE,
    Console,
    allocated,
    children,
    dom0_pid,
    domains,
    store_tree,
    until,
    xl,
)
from tests.needed import need

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """\
# {name}
name = "{name}"
memory = {memory}
extra = "quiet cryptomgr.notests"
vif = [ 'mac=00:16:3e:0a:08:0{number}, bridge=accept' ]
on_crash = "preserve"
"""
MEMORY = 192
SMALL = 112
"""MiB."""
SOURCE = Path(__file__).with_name("flood.c")
FLAGS = "-m32 -std=gnu11 -Os -ffreestanding -fno-builtin -fno-pic -fno-pie -no-pie -nostdlib -static"
FLAGS += " -fno-stack-protector -fno-asynchronous-unwind-tables -Wall -Wextra -Werror"
FLAGS += " -Wl,--build-id=none -Wl,-Ttext-segment=0x100000 -Wl,-e,entry"
BOUND = 10.0
"""Seconds that an answer may take, on a busy machine; without the floods it takes milliseconds."""


@pytest.fixture(scope="module")
def flood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    path = tmp_path_factory.mktemp("flood") / "flood"
    subprocess.run([compiler, *FLAGS.split(), "-o", path, SOURCE], check=True)
    return path


@dataclass
class Two:
    """Their shells."""

    one: Console
    other: Console

    def pids(self) -> dict[str, int]:
        return {name: found["pid"] for name, found in domains().items()}


@pytest.fixture(scope="module")
def two(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    need("cloud-amd64")
    folder = tmp_path_factory.mktemp("two")
    for number, name in enumerate(("one", "other"), 1):
        path = folder / f"{name}.cfg"
        path.write_text(CONFIG.format(name=name, number=number, memory=MEMORY))
        outcome = xl("create", path)
        assert outcome.err == ""
    with Console("one") as one, Console("other") as other:
        for number, console in enumerate((one, other), 1):
            console.shell().sh(f"ifconfig eth0 10.8.0.{number} netmask 255.255.255.0 up; mkdir /www; httpd -h /www")
        yield Two(one, other)


def test_they_reach_each_other_and_data_arrive_as_they_left(two: Two) -> None:
    for console, peer in ((two.one, 2), (two.other, 1)):
        assert ", 0% packet loss" in console.sh(f"ping -c 5 -i 0.2 -w 60 10.8.0.{peer}")
    for sender, receiver, address in ((two.one, two.other, 1), (two.other, two.one, 2)):
        sender.sh("dd if=/dev/urandom of=/www/data bs=1M count=24 2> /dev/null")
        there = sender.sh("sha256sum < /www/data")
        assert receiver.sh(f"wget -q -O - http://10.8.0.{address}/data | sha256sum") == there
        sender.sh("rm /www/data")


def test_the_balloon_returns_memory_and_gets_it_again_while_the_guest_works(two: Two) -> None:
    pid = two.pids()["one"]

    def total() -> int:
        return int(two.one.sh("awk '/^MemTotal/ {print $2}' /proc/meminfo")) >> 10

    def counted() -> int:
        return int(two.one.sh("cat /tmp/rounds"))

    def rounds_more(number: int) -> None:
        aim = counted() + number
        until(lambda: counted() >= aim, what="the guest's loop stands still")

    everything = total()
    # All its memory has been used once, so the host has given it.
    two.one.sh("dd if=/dev/urandom of=/tmp/fill bs=1M count=80 2> /dev/null; rm /tmp/fill")
    loop = """sum=$(sha256sum < /tmp/work); n=0; while [ -e /tmp/work ]; do \
[ "$(cat /tmp/work | sha256sum)" = "$sum" ] || echo "round $n" >> /tmp/wrong; n=$((n + 1)); echo $n > /tmp/r; \
mv /tmp/r /tmp/rounds; done"""
    two.one.sh("dd if=/dev/urandom of=/tmp/work bs=1M count=4 2> /dev/null; echo 0 > /tmp/rounds")
    two.one.sh(f"( {loop} ) > /dev/null 2>&1 &")
    rounds_more(2)
    before = allocated(pid)
    too_much = xl("mem-set", "one", f"{MEMORY + 1}m", status=125)
    assert too_much.err == f"nonroot: one was made with {MEMORY} MiB, and can have no more while it runs\n"
    xl("mem-set", "one", f"{SMALL}m")
    until(lambda: total() <= everything - (MEMORY - SMALL) + 2, what="the guest keeps its memory")
    after = allocated(pid)
    assert before - after > 40 * MIB, f"{before >> 20} MiB, then {after >> 20}"
    assert after <= (SMALL + 8) * MIB
    rounds_more(2)
    xl("mem-set", "one", f"{MEMORY}m")
    until(lambda: total() == everything, what="the guest has not all of its memory again")
    rounds_more(2)
    # What came back can be used: more than there was meanwhile.
    two.one.sh("for i in $(seq 14); do cat /tmp/work; done > /tmp/fill")
    assert len(set(two.one.sh("sha256sum < /tmp/fill; sha256sum < /tmp/fill").splitlines())) == 1
    assert allocated(pid) > after + 32 * MIB
    two.one.sh("rm /tmp/work /tmp/fill; sleep 1; [ ! -e /tmp/wrong ]")


def test_kill_9_of_domain_zero(two: Two, tmp_path: Path) -> None:
    """Domains go on, with disk and network in use; the next domain zero finds them; XenStore has what it had."""
    image = tmp_path / "data.img"
    image.write_bytes(bytes(16 * MIB))
    xl("block-attach", "one", f"{image},raw,xvdb,w")
    connected = until(lambda: [disk for disk in disks("one") if disk["state"] == "connected"])
    assert [disk["vdev"] for disk in connected] == ["xvdb"]
    before = domains()
    writes = "dd if=/tmp/data of=/dev/xvdb bs=64k conv=fsync 2> /dev/null; echo x >> /tmp/written"
    two.one.sh("dd if=/dev/urandom of=/tmp/data bs=1M count=16 2> /dev/null; : > /tmp/written")
    two.one.sh(f"(while [ -e /tmp/data ]; do {writes}; done) &")
    two.other.sh("ping -i 0.2 10.8.0.1 > /tmp/pings 2>&1 & echo $! > /tmp/pid")
    until(lambda: len(two.one.sh("cat /tmp/written", status=None).split()) > 1)
    tree = until(settled_tree)
    old = dom0_pid()
    os.kill(old, signal.SIGKILL)
    written = len(two.one.sh("cat /tmp/written").split())
    pings = len(two.other.sh("cat /tmp/pings").splitlines())
    until(lambda: len(two.one.sh("cat /tmp/written").split()) > written + 1, what="the disk stands still")
    until(lambda: len(two.other.sh("cat /tmp/pings").splitlines()) > pings + 5, what="the network stands still")
    assert store_tree() == tree
    after = domains()  # starts the next domain zero
    assert dom0_pid() != old
    facts = ("domid", "uuid", "pid", "state", "managed", "memory", "config", "policy")
    assert {name: [one[fact] for fact in facts] for name, one in after.items()} == {
        name: [one[fact] for fact in facts] for name, one in before.items()
    }
    assert store_tree() == tree
    # The verbs, on domains that this domain zero has not made.
    lines = [line.split() for line in xl("list").out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["Domain-0", "one", "other"]
    assert [disk["vdev"] for disk in disks("one")] == ["xvdb"]
    assert [card["network"] for card in xl("network-list", "--json", "other").json] == ["accept"]
    xl("pause", "other")
    assert domains()["other"]["state"] == "paused"
    xl("unpause", "other")
    xl("rename", "other", "another")
    assert xl("domid", "another").out == f"{before['other']['domid']}\n"
    xl("rename", "another", "other")
    two.other.sh("kill -INT $(cat /tmp/pid); while [ -d /proc/$(cat /tmp/pid) ]; do sleep 0.1; done")
    heard = [int(number) for number in re.findall(r"seq=(\d+)", two.other.sh("cat /tmp/pings"))]
    assert heard == list(range(len(heard)))
    two.one.sh("mv /tmp/data /tmp/done; sleep 0.1; while pidof dd; do sleep 0.1; done > /dev/null")
    there = two.one.sh("sha256sum < /tmp/done; rm /tmp/done /tmp/written")
    xl("block-detach", "one", "xvdb")
    until(lambda: not disks("one"), what="the disk stays")
    assert hashlib.sha256(image.read_bytes()).hexdigest() == there.split()[0]


def test_kill_9_of_xenstores_process(two: Two, tmp_path: Path) -> None:
    """The next process has every node, and guests and toolstack go on with it."""
    image = tmp_path / "late.img"
    image.write_bytes(os.urandom(MIB))
    tree = until(settled_tree)
    process = int(place.lock_path().read_text())
    os.kill(process, signal.SIGKILL)
    assert until(settled_tree) == tree
    assert int(place.lock_path().read_text()) != process
    # Both ends of a new device meet there, so rings and watches work as before.
    xl("block-attach", "one", f"{image},raw,xvdd,r")
    until(lambda: [disk for disk in disks("one") if disk["state"] == "connected"])
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    assert two.one.sh("until [ -b /dev/xvdd ]; do sleep 0.1; done; sha256sum < /dev/xvdd").split()[0] == digest
    xl("block-detach", "one", "xvdd")
    until(lambda: not disks("one"), what="the disk stays")
    assert ", 0% packet loss" in two.other.sh("ping -c 3 -i 0.2 -w 60 10.8.0.1")


def disks(domain: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = xl("block-list", "--json", domain).json
    return found


def settled_tree() -> dict[str, str] | None:
    """XenStore's contents, if they do not just change."""
    tree = store_tree()
    return tree if tree == store_tree() else None


def test_a_full_disk_of_the_host_is_an_error_in_that_guest_only(two: Two, tmp_path: Path) -> None:
    """The host gives its processes no room behind 4 MiB of a file: as with a full disk, writes there fail."""
    image = tmp_path / "grows.img"
    image.touch()
    os.truncate(image, 16 * MIB)
    xl("block-attach", "one", f"{image},raw,xvdc,w")
    until(lambda: [disk for disk in disks("one") if disk["state"] == "connected"])
    pids = two.pids()
    (backend,) = children(pids["one"], "nonroot.backends.process")
    writers = (pids["one"], backend)
    limits = resource.prlimit(backend, resource.RLIMIT_FSIZE)
    for pid in writers:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4 * MIB, limits[1]))
    try:
        two.one.sh("dd if=/dev/urandom of=/dev/xvdc bs=64k count=64 conv=fsync 2> /dev/null")
        there = two.one.sh("dd if=/dev/xvdc bs=64k count=64 2> /dev/null | sha256sum")
        two.one.sh("dd if=/dev/zero of=/dev/xvdc bs=64k seek=64 count=32 conv=fsync 2> /dev/null", status=1)
        assert "I/O error" in two.one.sh("dmesg | tail -n 20")
    finally:
        for pid in writers:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    two.one.sh("echo 3 > /proc/sys/vm/drop_caches")
    assert two.one.sh("dd if=/dev/xvdc bs=64k count=64 2> /dev/null | sha256sum") == there
    two.one.sh("dd if=/dev/urandom of=/dev/xvdc bs=64k count=128 conv=fsync 2> /dev/null")
    assert ", 0% packet loss" in two.other.sh("ping -c 2 -w 60 10.8.0.1")
    assert two.pids() == pids
    assert children(pids["one"], "nonroot.backends.process") == [backend]
    xl("block-detach", "one", "xvdc")
    until(lambda: not disks("one"), what="the disk stays")


def rounds(name: str, word: str = "round") -> int:
    found = re.findall(rf"^{word} (\d+)$", xl("console", "--log", name).out.replace("\r", ""), re.MULTILINE)
    return int(found[-1]) if found else 0


def test_floods_harm_nobody_else(two: Two, flood: Path, tmp_path: Path) -> None:
    """Guests that flood their hypervisor, XenStore and their backends with noise: other domains do not suffer by it."""
    one, other = two.one, two.other
    image = tmp_path / "noise.img"
    image.write_bytes(bytes(MIB))
    before = two.pids()
    common = ("create", f"kernel={flood}", "memory=32", "nonroot_xen=1", "on_crash=preserve")
    xl(*common, "name=flood", "cmdline=flood", f"disk=['{image},raw,xvda,w']", "vif=['bridge=noise']")
    xl(*common, "name=breaker", "cmdline=break")
    until(lambda: rounds("flood") >= 1 and rounds("breaker", "broke") >= 1, what="there is no flood")
    begun = rounds("flood"), rounds("breaker", "broke")
    # Each answer comes in time, and is right.
    waits = []
    for number in range(20):
        begin = time.monotonic()
        assert one.sh(f"echo $(({number} * {number}))") == str(number * number)
        waits.append(time.monotonic() - begin)
    for number in range(10):
        begin = time.monotonic()
        with XenStore() as store:
            store.write("/tool/mine", str(number))
            assert store.read("/tool/mine") == str(number)
        waits.append(time.monotonic() - begin)
        begin = time.monotonic()
        assert set(domains()) == {"one", "other", "flood", "breaker"}
        waits.append(time.monotonic() - begin)
    assert max(waits) < BOUND
    pings = other.sh("ping -c 20 -i 0.1 -w 120 10.8.0.1")
    assert ", 0% packet loss" in pings
    (slowest,) = re.findall(r"= [\d.]+/[\d.]+/([\d.]+) ms", pings)
    assert float(slowest) < 1000 * BOUND
    one.sh("dd if=/dev/urandom of=/www/data bs=1M count=4 2> /dev/null")
    assert other.sh("wget -q -O - http://10.8.0.1/data | sha256sum") == one.sh("sha256sum < /www/data; rm /www/data")
    # The floods went on all the time, in all ways.
    until(lambda: rounds("flood") > begun[0] and rounds("breaker", "broke") > begun[1], what="the floods stand still")
    assert rounds("flood", "disks") > 1
    assert rounds("flood", "cards") > 1
    log = Path(domains()["flood"]["console_log"])
    assert sum(path.stat().st_size for path in (log, log.with_name(f"{log.name}.1")) if path.exists()) <= 2 * MIB
    # Who makes them is under control.
    assert {found["state"] for found in domains().values()} == {"running"}
    for name in ("flood", "breaker"):
        begin = time.monotonic()
        xl("pause", name)
        assert domains()[name]["state"] == "paused"
        xl("unpause", name)
        number, pid = domains()[name]["domid"], domains()[name]["pid"]
        backends = children(pid, "nonroot")
        xl("destroy", name)
        assert time.monotonic() - begin < 4 * BOUND
        assert name not in domains()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (pid, *backends)), what="a process is left")  # noqa: B023
        with XenStore() as store:
            until(lambda: str(number) not in store.ls("/local/domain"), what="nodes are left")  # noqa: B023
    assert two.pids() == before
    print(f"the slowest answer took {max(waits):.2f} s, the slowest ping {float(slowest):.0f} ms")


@pytest.mark.soak
def test_floods_of_other_noise(runtime: Path, flood: Path, tmp_path: Path) -> None:
    """Another seed in each round: no noise ends a domain, or makes its processes complain."""
    round_ = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
    for number in range(2):
        image = tmp_path / f"noise{number}.img"
        image.write_bytes(bytes(MIB))
        xl(
            *("create", f"name=noise{number}", f"kernel={flood}", "memory=32", "nonroot_xen=1", "on_crash=preserve"),
            *("on_poweroff=preserve", "on_reboot=preserve", f"cmdline=flood seed={1000 + 2 * round_ + number}"),
            *(f"disk=['{image},raw,xvda,w']", "vif=['bridge=noise']"),
        )
    for number in range(2):
        name = f"noise{number}"
        until(lambda: rounds(name) >= 6 or domains()[name]["state"] != "running", 10 * PATIENCE)  # noqa: B023
        assert domains()[name]["state"] == "running", xl("dmesg", name).out
        assert (toolstack_place.logs_folder() / f"{name}.process").read_bytes() == b""
        xl("destroy", name)
