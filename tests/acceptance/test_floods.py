"""Guests that flood their hypervisor, XenStore and their backends with noise: other domains do not suffer by it."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.xenstore.client import XenStore
from tests.acceptance.guests import MIB, Console, children, domains, until, xl
from tests.needed import need

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

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


@pytest.fixture(scope="module")
def pair(runtime: Path) -> Iterator[tuple[Console, Console]]:
    """Two domains that work."""
    need("cloud-amd64")
    for name in ("one", "other"):
        xl("create", f"name={name}", "memory=128", "extra=quiet cryptomgr.notests", "vif=['bridge=calm']")
    with Console("one") as one, Console("other") as other:
        for number, console in enumerate((one, other), 1):
            console.shell().sh(f"ifconfig eth0 10.8.1.{number} netmask 255.255.255.0 up")
        yield one, other


def rounds(name: str, word: str = "round") -> int:
    found = re.findall(rf"^{word} (\d+)$", xl("console", "--log", name).out.replace("\r", ""), re.MULTILINE)
    return int(found[-1]) if found else 0


def test_floods_harm_nobody_else(pair: tuple[Console, Console], flood: Path, tmp_path: Path) -> None:
    one, other = pair
    image = tmp_path / "noise.img"
    image.write_bytes(bytes(MIB))
    before = {name: found["pid"] for name, found in domains().items()}
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
    pings = other.sh("ping -c 20 -i 0.1 -w 120 10.8.1.1")
    assert ", 0% packet loss" in pings
    (slowest,) = re.findall(r"= [\d.]+/[\d.]+/([\d.]+) ms", pings)
    assert float(slowest) < 1000 * BOUND
    one.sh("mkdir /www; dd if=/dev/urandom of=/www/data bs=1M count=4 2> /dev/null; httpd -p 80 -h /www")
    assert other.sh("wget -q -O - http://10.8.1.1/data | sha256sum") == one.sh("sha256sum < /www/data; rm -r /www")
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
    assert {name: found["pid"] for name, found in domains().items()} == before
    print(f"the slowest answer took {max(waits):.2f} s, the slowest ping {float(slowest):.0f} ms")
