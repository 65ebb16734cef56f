"""``nonroot run`` with the built-in guest in a real domain: what can be seen without Linux."""

import json
import os
import subprocess
import sys

import pytest

from nonroot import guests
from nonroot.errors import SoftwareMissingError
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def tiny() -> str:
    try:
        return os.fspath(guests.tiny().kernel)
    except SoftwareMissingError as error:
        pytest.skip(str(error))


def test_console_until_power_off(nonroot: Run, tiny: str) -> None:
    result = nonroot("run", "--kernel", tiny)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"self-check passed" in result.stdout


def test_console_input(native_environment: dict[str, str], tiny: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "nonroot", "run", "--kernel", tiny, "--append", "echo"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=native_environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    seen = b""
    while b"say something" not in seen:  # what is typed before the guest has set its UART up is lost, as on a PC
        seen += os.read(process.stdout.fileno(), 4096)
    process.stdin.write(b"hello guest\n\x04")
    process.stdin.flush()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert b"hello guest" in out


def test_json(nonroot: Run, tiny: str) -> None:
    record = json.loads(nonroot("run", "--json", "--kernel", tiny).stdout)
    assert (record["outcome"], record["status"]) == ("poweroff", 0)
    assert "self-check passed" in record["console"]
    assert record["instructions"] > 10_000
    assert record["exits"]["PortIo"] > 100


def test_triple_fault_is_one_sentence(nonroot: Run, tiny: str) -> None:
    result = nonroot("run", "--kernel", tiny, "--append", "crash")
    assert result.returncode == 125
    assert result.stderr == b"nonroot: the guest crashed with a triple fault\n"


def test_time_out_of_an_idle_guest(nonroot: Run, tiny: str) -> None:
    result = nonroot("run", "--timeout", "1", "--kernel", tiny, "--append", "idle")
    assert (result.returncode, result.stderr) == (124, b"nonroot: the guest was still running after 1 seconds\n")
    assert b"self-check passed" in result.stdout


def test_garbage_to_every_port(nonroot: Run, tiny: str) -> None:
    for seed in range(1, 4):
        result = nonroot("run", "--kernel", tiny, "--append", f"garbage={seed}", "--timeout", "50")
        assert result.returncode in (0, 125)
        assert b"Traceback" not in result.stderr
        assert b"defect" not in result.stderr


def test_a_guest_without_agent(nonroot: Run, tiny: str) -> None:
    result = nonroot("run", "--kernel", tiny, "--initrd", tiny, "--", "true")
    assert result.returncode == 125
    assert result.stderr.startswith(b"nonroot: the guest powered off before the work was done\n")


def test_without_linux_a_command_says_how_to_get_it(
    nonroot: Run, tiny: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    result = nonroot("run", "--no-fetch", "--", "true", environment=environment)
    if result.returncode == 0:
        pytest.skip("this machine has a kernel of its own to boot")
    assert result.returncode == 125
    assert b"To get Linux" in result.stderr
    assert result.stderr.count(b"\n") == 1
