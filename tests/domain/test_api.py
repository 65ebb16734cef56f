"""The API, the client and the domain's process, with the agent on this machine as the guest."""

import hashlib
import io
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import nonroot
from nonroot.api import Domain
from nonroot.domain.wire import Kind
from nonroot.errors import (
    BadFileError,
    BadOptionError,
    CommandFailedError,
    CommandTimeoutError,
    DomainLostError,
    DomainStoppedError,
    GuestFileError,
    GuestPanicError,
    NotRunningError,
    OutputLimitError,
    UnsupportedError,
    WaitTimeoutError,
)

Make = Callable[..., Domain]


def test_run(native: Make) -> None:
    result = native().run(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (result.returncode, result.stdout, result.stderr, result.how) == (3, "out\n", "err\n", "exited")


def test_several_commands_on_one_domain(native: Make) -> None:
    domain = native()
    for number in range(20):
        assert domain.run(["echo", str(number)]).stdout == f"{number}\n"


def test_text_is_for_the_shell(native: Make) -> None:
    assert native().run("echo a b | wc -w").stdout.strip() == "2"


def test_statuses(native: Make) -> None:
    domain = native()
    assert domain.run(["no-such-command"]).returncode == 127
    assert domain.run(["no-such-command"]).how == "not_found"
    assert domain.run(["/etc/passwd"]).returncode == 126
    killed = domain.run("kill -TERM $$")
    assert (killed.returncode, killed.how) == (-15, "signalled")
    with pytest.raises(CommandFailedError, match="status 4: oh no") as caught:
        domain.run("echo oh no >&2; exit 4", check=True)
    assert caught.value.completed.returncode == 4


def test_environment_and_directory(native: Make) -> None:
    domain = native()
    result = domain.run('echo "$HOME $A $PWD"', env={"A": "ü\udcff"}, cwd="/usr")
    assert result.stdout_bytes == b"/root \xc3\xbc\xff /usr\n"
    assert result.stdout == "/root ü\udcff /usr\n"
    with pytest.raises(BadOptionError, match="cannot enter the directory /nowhere: no such file"):
        domain.run(["true"], cwd="/nowhere")


@pytest.mark.parametrize("argv", [[], [""], ["a\0b"]])
def test_impossible_commands(native: Make, argv: list[str]) -> None:
    domain = native()
    with pytest.raises(BadOptionError):
        domain.run(argv)
    assert domain.run(["echo", "still fine"]).stdout == "still fine\n"


def test_commands_that_are_too_long(native: Make) -> None:
    domain = native()
    with pytest.raises(BadOptionError, match="262144 are the most"):
        domain.run(["echo", "x" * 300_000])
    with pytest.raises(BadOptionError, match="8191 are the most"):
        domain.run(["echo"] * 9000)
    assert len(domain.run(["echo", "x" * 100_000]).stdout) == 100_001


def test_stdin_of_every_kind(native: Make, tmp_path: Path) -> None:
    domain = native()
    data = os.urandom(3_000_000)
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "file").write_bytes(data)
    assert domain.run("sha256sum", stdin=data).stdout.startswith(digest)
    assert domain.run("sha256sum", stdin=io.BytesIO(data)).stdout.startswith(digest)
    with (tmp_path / "file").open("rb") as file:
        assert domain.run("sha256sum", stdin=file.fileno()).stdout.startswith(digest)
    assert domain.run("cat", stdin="häh").stdout == "häh"
    assert domain.run("cat", stdin=b"").stdout == ""
    assert domain.run("cat").stdout == ""


def test_stdin_that_nobody_reads_does_not_hold_the_command(native: Make) -> None:
    domain = native()
    read_end, write_end = os.pipe()
    try:
        assert domain.run("echo hello", stdin=read_end).stdout == "hello\n"
        assert domain.run("true", stdin=bytes(5_000_000)).returncode == 0
    finally:
        os.close(read_end)
        os.close(write_end)


def test_long_output(native: Make) -> None:
    result = native().run("head -c 20000000 /dev/zero | tr '\\0' x; head -c 1000000 /dev/zero >&2")
    assert result.stdout_bytes == b"x" * 20_000_000
    assert result.stderr_bytes == bytes(1_000_000)


def test_slow_reader_holds_the_guest_back(native: Make) -> None:
    domain = native()
    gate = threading.Event()
    seen: list[int] = []

    def slow(kind: Kind, data: bytes) -> None:
        gate.wait()
        seen.append(len(data))

    command = domain.popen("yes | head -c 50000000", on_output=slow)
    time.sleep(1)
    rss = int(Path(f"/proc/{domain.pid}/statm").read_text().split()[1]) * 4096
    assert rss < 100 << 20, "the domain's process must not hoard output"
    assert not command.done()
    gate.set()
    assert command.wait(30).returncode == 0
    assert sum(seen) == 50_000_000


def test_timeout_kills_the_command_only(native: Make) -> None:
    domain = native()
    for seconds in (0.3, 3, 30):  # on a busy machine even the first word takes its time
        with pytest.raises(CommandTimeoutError, match=f"did not end within {seconds} seconds") as caught:
            domain.run("echo before; sleep 100", timeout=seconds)
        if caught.value.stdout:
            break
    assert caught.value.stdout == b"before\n"
    assert domain.run("echo next").stdout == "next\n"


def test_output_limit(native: Make) -> None:
    domain = native()
    with pytest.raises(OutputLimitError):
        domain.run("yes", max_output=100_000)
    assert domain.run("echo next").stdout == "next\n"


def test_popen_signals(native: Make) -> None:
    domain = native()
    started = threading.Event()
    command = domain.popen(
        "trap 'exit 9' TERM; echo ready; while :; do sleep 0.01; done", on_output=lambda kind, data: started.set()
    )
    with pytest.raises(NotRunningError, match="still under way"):
        domain.run("true")
    assert started.wait(10)
    command.send_signal(signal.SIGTERM)
    assert command.wait(10).returncode == 9
    command.send_signal(signal.SIGTERM)
    assert domain.run("true").returncode == 0


def test_terminal(native: Make) -> None:
    seen = bytearray()
    command = native().popen("stty size; test -t 1", tty=(30, 90), on_output=lambda kind, data: seen.extend(data))
    assert command.wait(10).returncode == 0
    assert seen == b"30 90\r\n"


def test_copies(native: Make, tmp_path: Path) -> None:
    domain = native()
    source, guest, back = tmp_path / "source", tmp_path / "guest", tmp_path / "back"
    (source / "sub").mkdir(parents=True)
    (source / "big").write_bytes(os.urandom(2_000_000))
    (source / "big").chmod(0o751)
    (source / "empty").touch()
    (source / "sub" / "link").symlink_to("../big")
    result = domain.run(
        ["ls", str(guest)], copy_in=[(source, str(guest))], copy_out=[(str(guest), back), (str(guest / "big"), back)]
    )
    assert result.stdout.split() == ["big", "empty", "sub"]
    assert (back / "big").read_bytes() == (source / "big").read_bytes()
    assert (back / "big").stat().st_mode & 0o777 == 0o751
    assert int((back / "big").stat().st_mtime) == int((source / "big").stat().st_mtime)
    assert (back / "sub" / "link").readlink() == Path("../big")
    assert (back / "empty").read_bytes() == b""


def test_copy_failures(native: Make, tmp_path: Path) -> None:
    domain = native()
    with pytest.raises(BadFileError, match="no such file"):
        domain.copy_in(tmp_path / "missing", "/tmp")
    with pytest.raises(BadFileError, match="neither a file nor a directory"):
        domain.copy_in("/dev/null", "/tmp")
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(GuestFileError, match="file/below: not a directory"):
        domain.copy_in(tmp_path / "file", f"{tmp_path}/file/below")
    with pytest.raises(GuestFileError, match="missing: no such file"):
        domain.copy_out(f"{tmp_path}/missing", tmp_path / "x")
    with pytest.raises(GuestFileError, match="neither a file nor a directory"):
        domain.copy_out("/dev/zero", tmp_path / "x")
    with pytest.raises(BadFileError, match="cannot be written"):
        domain.copy_out(f"{tmp_path}/file", tmp_path / "no" / "such" / "place")
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    with pytest.raises(OutputLimitError):
        domain.copy_out(f"{tmp_path}/large", tmp_path / "y", limit=1_000_000)
    assert domain.run(["echo", "fine"]).stdout == "fine\n"


def test_power_off(native: Make) -> None:
    domain = native()
    domain.run("true")
    stopped = domain.shutdown(10)
    assert stopped.reason == "poweroff"
    assert "Power down" in stopped.console
    with pytest.raises(DomainStoppedError):
        domain.run("true")
    assert domain.stats.instructions == 12345
    assert domain.wait(1) == stopped


def test_power_off_during_a_command(native: Make) -> None:
    domain = native()
    with pytest.raises(DomainStoppedError, match="powered off"):
        domain.run("kill -9 $PPID; sleep 10")


def test_panic(native: Make) -> None:
    domain = native(append="test.panic test.program=/bin/cat")
    with pytest.raises(GuestPanicError, match="panicked: test of the panic") as caught:
        domain.run("true")
    assert "Kernel panic" in caught.value.details["console"]
    assert domain.wait(30).reason == "panic"


def test_a_guest_that_speaks_nonsense(native: Make) -> None:
    domain = native(append="test.program=/usr/bin/yes")
    with pytest.raises(DomainStoppedError, match="broke its protocol"):
        domain.run("true")
    assert domain.stats.state == "running"


def test_console(native: Make) -> None:
    domain = native()
    assert domain.console.expect(r"version (\d+)", 10).group(1) == b"0"
    domain.console.write("hello\r")
    domain.console.expect("hello\r\n", 10)
    with pytest.raises(WaitTimeoutError, match="'never'"):
        domain.console.expect("never", 0.2)
    assert domain.console.text.startswith("Linux version 0.0 (test)\nhello\n")
    domain.run("true")
    domain.shutdown(10)
    domain.console.expect("Power down", 10)
    with pytest.raises(NotRunningError, match="powered off"):
        domain.console.expect("more", 10)


def test_the_domain_dies_with_us_and_we_notice_its_death(native: Make) -> None:
    domain = native()
    pid = domain.pid
    domain.destroy()
    assert not Path(f"/proc/{pid}").exists()
    domain.destroy()
    with pytest.raises(DomainLostError):
        domain.run("true")
    domain = native()
    command = domain.popen("sleep 100")
    os.kill(domain.pid, signal.SIGKILL)
    with pytest.raises(DomainLostError, match="was killed"):
        command.wait(10)


def test_life_cycle_mistakes(tmp_path: Path) -> None:
    domain = Domain(kernel=tmp_path / "missing")
    with pytest.raises(NotRunningError, match="not been started"):
        domain.run("true")
    with pytest.raises(BadFileError, match="missing cannot be read: no such file"):
        domain.start()
    for options, message in (
        ({"memory": "1K"}, "too little"),
        ({"memory": "9999999G"}, "too much"),
        ({"memory": "500G"}, "more than this machine has"),
        ({"memory": "viel"}, "'viel' is no memory size"),
        ({"memory": "5000001"}, "4 KiB pages"),
        ({"engine": "warp"}, "no engine named warp"),
        ({"initrd": "/etc/passwd"}, "needs its kernel"),
        ({"append": "a\nb"}, "line breaks"),
        ({"append": "x" * 3000}, "2000 are the most"),
        ({"seed": -1}, "seed"),
        ({"protocol": "smoke"}, "no boot protocol"),
    ):
        with pytest.raises(BadOptionError, match=message):
            Domain(**options).start()
    (tmp_path / "empty").touch()
    with pytest.raises(BadFileError, match="is empty"):
        Domain(kernel=tmp_path / "empty").start()
    with pytest.raises(BadFileError, match="is a directory"):
        Domain(kernel=tmp_path).start()


def test_without_agent(native: Make) -> None:
    domain = native(agent=False)
    with pytest.raises(UnsupportedError, match="without an agent"):
        domain.run("true")
    with pytest.raises(UnsupportedError):
        domain.shutdown()


def test_public_names() -> None:
    for name in nonroot.__all__:
        assert getattr(nonroot, name) is not None
    with pytest.raises(AttributeError):
        _ = nonroot.no_such_name
    assert issubclass(nonroot.BadFileError, nonroot.UsageError)
