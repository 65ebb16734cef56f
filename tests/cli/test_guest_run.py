"""``nonroot run`` and ``nonroot demo`` with Linux in a real domain."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nonroot.engines.select import choose
from nonroot.guests import cached
from tests.cli.conftest import Run
from tests.cli.test_native_run import Terminal
from tests.waiting import wait_until_quiet

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


@pytest.fixture(autouse=True)
def _linux() -> None:
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched")


def test_status_streams_and_json(nonroot: Run) -> None:
    data = bytes(range(256)) * 300
    result = nonroot("run", "--", "sh", "-c", "cat; echo err >&2; exit 7", input=data, stdin=None, timeout=200)
    assert (result.returncode, result.stdout, result.stderr) == (7, data, b"err\n")


def test_json(nonroot: Run) -> None:
    result = nonroot("run", "--json", "--memory", "128M", "--", "uname", "-s", timeout=200)
    record = json.loads(result.stdout)
    assert record["stdout"] == "Linux\n"
    assert (record["status"], record["outcome"], record["engine"]) == (0, "exited", choose().engine)
    assert record["instructions"] > 100_000_000
    assert record["protocol"] == "pvh"


def test_time_out_during_the_boot(nonroot: Run) -> None:
    result = nonroot("run", "--fresh", "--timeout", "0.2", "--", "true")
    assert result.returncode == 124
    assert result.stderr.startswith(b"nonroot: the guest was not ready")


def test_interrupt(native_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nonroot", "run", "--", "sh", "-c", "echo ready; exec sleep 1000"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=native_environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.stdout.close()


def test_console(native_environment: dict[str, str]) -> None:
    terminal = Terminal([sys.executable, "-m", "nonroot", "run"], native_environment | {"TERM": "xterm"})
    terminal.expect(rb"Linux version \d", 120)
    terminal.expect(rb"~ # ", 120)
    terminal.write(b"stty size\r")
    terminal.expect(rb"31 97\r\n", 30)
    terminal.resize(50, 132)
    terminal.write(b"until [ \"$(stty size)\" = '50 132' ]; do sleep 0.1; done; stty size\r")
    terminal.expect(rb"50 132\r\n", 30)
    wait_until_quiet(lambda: _cpu_seconds(terminal.pid), 0.03 * 5, 5)  # 3 % of a core
    terminal.write(b"\x1d")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_demo(nonroot: Run) -> None:
    result = nonroot("demo", timeout=200)
    assert result.returncode == 0, result.stderr
    assert b"Linux version" in result.stdout
    assert re.search(rb"\nLinux nonroot \S+ .* x86_64 GNU/Linux\n", result.stdout)
    last = result.stdout.decode().splitlines()[-1]
    assert re.match(rf"engine {choose().engine} \(.*\); [\d,]+ guest instructions; [\d.]+ s; exits: \w+ \d+", last)


def _domain_of(client: int) -> int:
    children = "".join(path.read_text() for path in Path(f"/proc/{client}/task").glob("*/children"))
    return int(children.split()[0])


def _cpu_seconds(client: int) -> float:
    total = 0.0
    for pid in (client, _domain_of(client)):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total
