"""``nonroot run`` with the agent on this machine as its guest: streams, statuses, signals, terminals."""

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.waiting import PATIENCE, wait_until

MARK = f"NONROOT_TESTED_BY={os.getpid()}".encode()


def domain_processes() -> set[int]:
    """Those that come from this test process; others may be running tests beside us."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                line = (folder / "cmdline").read_bytes()
                ours = b"native_runner.py" in line and MARK in (folder / "environ").read_bytes().split(b"\0")
                if ours and (folder / "stat").read_text().split(")")[1].split()[0] != "Z":
                    found.add(int(folder.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left() -> object:
    before = domain_processes()
    yield
    wait_until(lambda: domain_processes() <= before, pause=0.05)  # no domain's process is left behind
    return None


@pytest.mark.parametrize("status", [0, 1, 7, 125, 255])
def test_the_commands_own_status(native_run: Run, status: int) -> None:
    result = native_run("--", "sh", "-c", f"exit {status}")
    assert (result.returncode, result.stdout, result.stderr) == (status, b"", b"")


def test_streams_stay_separate_and_unchanged(native_run: Run) -> None:
    everything = bytes(range(256)) * 5000
    result = native_run("--", "sh", "-c", "cat; printf 'e\\377\\r\\n' >&2", input=everything)
    assert (result.returncode, result.stdout, result.stderr) == (0, everything, b"e\xff\r\n")


def test_two_dashes_are_not_needed_and_options_after_the_command_are_its_own(native_run: Run) -> None:
    assert native_run("echo", "-v", "--json").stdout == b"-v --json\n"
    assert native_run("--", "echo", "--", b"\xff").stdout == b"-- \xff\n"


def test_not_found_and_not_executable(native_run: Run) -> None:
    result = native_run("--", "no-such-command")
    assert (result.returncode, result.stdout, result.stderr) == (
        127,
        b"",
        b"nonroot: the guest has no command 'no-such-command'\n",
    )
    result = native_run("--", "/etc/passwd")
    assert (result.returncode, result.stderr) == (126, b"nonroot: the guest cannot execute '/etc/passwd'\n")


def test_killed_by_a_signal(native_run: Run) -> None:
    assert native_run("--", "sh", "-c", "kill -9 $$").returncode == 137
    assert native_run("--", "sh", "-c", "kill -TERM $$").returncode == 143


def test_timeout(native_run: Run) -> None:
    for seconds in ("1", "5", "25"):  # the boot is a part of it: a busy machine needs more
        result = native_run("--timeout", seconds, "--", "sh", "-c", "echo before; sleep 1000")
        assert result.returncode == 124
        if result.stdout:
            break
    assert result.stdout == b"before\n"
    assert result.stderr.startswith(b"nonroot: sh did not end within")


def test_environment_and_directory(native_run: Run) -> None:
    result = native_run(
        "-e",
        "A=1 2",
        "--env",
        "PASSED_ON",
        "-e",
        "NOT_SET_HERE",
        "-w",
        "/usr",
        "--",
        "sh",
        "-c",
        'echo "$A|$PASSED_ON|${NOT_SET_HERE-unset}|$PWD"',
    )
    assert result.stdout == b"1 2|as it is here|unset|/usr\n"
    result = native_run("-w", "/nowhere", "--", "true")
    assert (result.returncode, result.stderr) == (
        125,
        b"nonroot: the guest cannot enter the directory /nowhere: no such file or directory\n",
    )


def test_copies(native_run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("content")
    guest = tmp_path / "guest"
    result = native_run(
        "--copy-in",
        f"{tmp_path}/in:{guest}/a",
        "--copy-out",
        f"{guest}:{tmp_path}/out",
        "--",
        "sh",
        "-c",
        f"cp {guest}/a {guest}/b; exit 3",
    )
    assert result.returncode == 3
    assert (tmp_path / "out" / "b").read_text() == "content"
    result = native_run("--copy-out", f"{tmp_path}/missing:{tmp_path}/x", "--", "true")
    assert result.returncode == 125
    assert b"missing: no such file or directory" in result.stderr


def test_json(native_run: Run) -> None:
    result = native_run("--json", "--", "sh", "-c", "printf '\\377'; echo err >&2; exit 7")
    record = json.loads(result.stdout)
    assert result.returncode == 7
    assert record["outcome"] == "exited"
    assert record["returncode"] == record["status"] == 7
    assert record["stdout_base64"] == "/w=="
    assert record["stderr"] == "err\n"
    assert record["engine"] == "native"
    assert record["reason"] == "this is a test"
    assert record["instructions"] == 12345
    assert record["exits"] == {"port_io": 7, "halt": 9}
    record = json.loads(native_run("--json", "--", "sh", "-c", "kill -9 $$").stdout)
    assert (record["outcome"], record["returncode"], record["status"]) == ("signalled", -9, 137)
    record = json.loads(native_run("--json", "--", "sh", "-c", "exit 137").stdout)
    assert (record["outcome"], record["returncode"], record["status"]) == ("exited", 137, 137)
    record = json.loads(native_run("--json", "--timeout", "0.5", "--", "sleep", "9").stdout)
    assert (record["outcome"], record["status"], record["error"]["code"]) == ("timeout", 124, "timeout")


def test_panic_is_one_sentence(native_run: Run) -> None:
    result = native_run("--append", "test.panic test.program=/bin/cat", "--", "true")
    assert result.returncode == 125
    lines = result.stderr.decode().splitlines()
    assert lines[0] == "nonroot: the guest's kernel panicked: test of the panic"
    assert all(line.startswith("  | ") for line in lines[1:])
    result = native_run("-q", "--append", "test.panic test.program=/bin/cat", "--", "true")
    assert result.stderr.decode().splitlines() == lines[:1]


def test_verbose_tells_and_quiet_does_not(native_run: Run) -> None:
    result = native_run("-v", "--", "echo", "out")
    assert result.stdout == b"out\n"
    assert b"Linux version 0.0 (test)" in result.stderr
    assert re.search(
        rb"engine native \(this is a test\); 12,345 guest instructions; .* exits: halt 9, port_io 7", result.stderr
    )
    assert native_run("-q", "--", "echo", "out").stderr == b""


def start(native_command: list[str], environment: dict[str, str], *arguments: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [*native_command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_goes_to_the_command(
    native_command: list[str], native_environment: dict[str, str], number: signal.Signals
) -> None:
    script = f"trap 'echo caught; exit 9' {number.name.removeprefix('SIG')}; echo ready; while :; do sleep 0.05; done"
    process = start(native_command, native_environment, "--", "sh", "-c", script)
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE)  # some shells report the death of their sleep on stderr
    assert (process.returncode, out) == (9, b"caught\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_signal_ends_the_domain(
    native_command: list[str], native_environment: dict[str, str], number: signal.Signals
) -> None:
    script = "trap 'echo caught' INT TERM; echo ready; while :; do sleep 0.05; done"
    process = start(native_command, native_environment, "--", "sh", "-c", script)
    assert process.stdout is not None
    process.send_signal(number)
    assert process.stdout.readline() == b"caught\n"
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number


def test_a_command_that_dies_of_the_signal(native_command: list[str], native_environment: dict[str, str]) -> None:
    process = start(native_command, native_environment, "--", "sh", "-c", "echo ready; exec sleep 100")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return int(caught.split()[1], 16) >> (number - 1) & 1 != 0


def test_a_signal_during_the_boot(native_command: list[str], native_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*native_command, "--append", "test.program=/bin/cat", "--", "true"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=native_environment,
    )
    wait_until(lambda: catches(process.pid, signal.SIGTERM), pause=0.02)
    time.sleep(0.5)  # somewhere in the boot
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (143, b"")


def test_killed_outright_leaves_no_domain(native_command: list[str], native_environment: dict[str, str]) -> None:
    process = start(native_command, native_environment, "--", "sh", "-c", "echo ready; exec sleep 100")
    process.kill()
    process.communicate(timeout=PATIENCE)


def test_the_reader_of_our_output_goes(native_command: list[str], native_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*native_command, "--", "yes"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=native_environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(PATIENCE) == 128 + signal.SIGPIPE


def test_stdin_that_stays_open(native_command: list[str], native_environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*native_command, "--", "head", "-n", "1"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=native_environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    assert process.stdout.read() == b"one\n"
    assert process.wait(PATIENCE) == 0
    process.stdin.close()
    process.stdout.close()


def test_closed_standard_streams(native_command: list[str], native_environment: dict[str, str]) -> None:
    line = " ".join(f"'{word}'" for word in native_command)
    result = subprocess.run(
        f"{line} -- sh -c 'cat; exit 5' <&- 2>&-", shell=True, env=native_environment, timeout=PATIENCE
    )
    assert result.returncode == 5


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], rows: int = 31, columns: int = 97) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execvpe(command[0], command, environment)
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, pattern: bytes, timeout: float = PATIENCE) -> None:
        deadline = time.monotonic() + timeout
        while not re.search(pattern, self.seen):
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            data = b""
            if ready:
                with contextlib.suppress(OSError):
                    data = os.read(self.fd, 4096)
            assert data, f"{pattern!r} did not come; seen: {self.seen!r}"
            self.seen += data

    def write(self, data: bytes) -> None:
        os.write(self.fd, data)

    def wait(self) -> int:
        with contextlib.suppress(OSError):
            while data := os.read(self.fd, 4096):
                self.seen += data
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_a_command_on_a_terminal(native_command: list[str], native_environment: dict[str, str]) -> None:
    script = "stty size; read x; until [ \"$(stty size)\" = '40 120' ]; do sleep 0.05; done; stty size; read y"
    terminal = Terminal([*native_command, "-t", "--", "sh", "-c", script], native_environment)
    terminal.expect(rb"\n?31 97\r\n")
    terminal.resize(40, 120)
    terminal.write(b"\r")
    terminal.expect(rb"40 120\r\n")
    terminal.write(b"\x03")
    assert terminal.wait() == 130


def test_the_console(native_command: list[str], native_environment: dict[str, str]) -> None:
    terminal = Terminal(native_command, native_environment)
    terminal.expect(rb"Ctrl-\] leaves")
    terminal.write(b"typed\r")
    terminal.expect(rb"typed\r\n")
    terminal.write(b"\x1d")
    assert terminal.wait() == 0
    assert b"left the console" in terminal.seen


def test_the_console_until_power_off(native_command: list[str], native_environment: dict[str, str]) -> None:
    terminal = Terminal([*native_command, "-q"], native_environment)
    terminal.expect(rb"version 0.0")
    terminal.write(b"\x04")
    assert terminal.wait() == 0


def test_the_console_without_a_terminal(native_run: Run) -> None:
    result = native_run(input=b"hello\n\x04")
    assert result.returncode == 0
    assert b"hello" in result.stdout
    record = json.loads(native_run("--json", input=b"hello\n\x04").stdout)
    assert record["outcome"] == "poweroff"
    assert "hello" in record["console"]


def test_progress_is_shown_on_a_terminal_and_taken_away(
    native_command: list[str], native_environment: dict[str, str]
) -> None:
    terminal = Terminal([*native_command, "--", "echo", "done"], native_environment | {"TERM": "xterm"})
    assert terminal.wait() == 0
    assert b"booting with the native engine: this is a test" in terminal.seen
    assert b"\x1b[2m" in terminal.seen
    assert terminal.seen.endswith(b"\r\x1b[Kdone\r\n")
    terminal = Terminal(
        [*native_command, "--", "echo", "done"], native_environment | {"TERM": "xterm", "NO_COLOR": "1"}
    )
    assert terminal.wait() == 0
    assert b"\x1b[2m" not in terminal.seen
    terminal = Terminal([*native_command, "-q", "--", "echo", "done"], native_environment | {"TERM": "xterm"})
    assert terminal.wait() == 0
    assert terminal.seen == b"done\r\n"
