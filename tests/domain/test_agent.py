"""The guest agent's own code, run on the host: exec, exit codes, signals, streams, files."""

import errno
import hashlib
import os
import signal
import struct
import time
from pathlib import Path

import pytest

from nonroot.domain.frames import Entry, ExitKind, ExitReport, FromGuest, Hello, StartFlag, ToGuest
from tests.domain.native_agent import NativeAgent, build
from tests.waiting import PATIENCE, wait_until


@pytest.mark.parametrize("bits", [64, 32])
def test_builds_without_warnings_for_the_guest(bits: int, tmp_path: Path) -> None:
    image = build(bits, tmp_path).read_bytes()
    assert image[:4] == b"\x7fELF"
    assert image[4] == bits // 32
    assert b"/dev/ttyS1" in image


def test_greets_with_its_kernel(agent_path: Path) -> None:
    running = NativeAgent(agent_path)
    try:
        kind, payload = running.next()
        hello = Hello.parse(payload)
        assert kind == FromGuest.HELLO
        assert (hello.transport, hello.system, hello.release) == ("stdio", "Linux", os.uname().release)
        assert hello.bits == int(agent_path.name[-2:])
    finally:
        running.__exit__(None, None, None)


@pytest.mark.parametrize("status", [0, 1, 7, 255])
def test_exit_status(agent: NativeAgent, status: int) -> None:
    assert agent.run("sh", "-c", f"exit {status}") == (ExitKind.EXITED, status, b"", b"")


def test_separate_streams_unchanged(agent: NativeAgent) -> None:
    kind, value, out, err = agent.run("sh", "-c", r"printf 'a\r\n\000\377'; printf 'b\n' >&2")
    assert (kind, value, out, err) == (ExitKind.EXITED, 0, b"a\r\n\0\xff", b"b\n")


def test_death_by_signal_is_not_an_exit_status(agent: NativeAgent) -> None:
    assert agent.run("sh", "-c", "kill -9 $$")[:2] == (ExitKind.SIGNALLED, 9)
    assert agent.run("sh", "-c", "exit 137")[:2] == (ExitKind.EXITED, 137)


def test_what_cannot_be_executed(agent: NativeAgent, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("just text")
    assert agent.run("no-such-command-here")[:2] == (ExitKind.EXEC_FAILED, errno.ENOENT)
    assert agent.run(str(tmp_path / "missing"))[:2] == (ExitKind.EXEC_FAILED, errno.ENOENT)
    assert agent.run(str(plain))[:2] == (ExitKind.EXEC_FAILED, errno.EACCES)
    plain.chmod(0o755)
    assert agent.run(str(plain))[:2] == (ExitKind.EXEC_FAILED, errno.ENOEXEC)
    assert agent.run("plain", env={b"PATH": os.fsencode(tmp_path) + b":/bin"})[:2] == (
        ExitKind.EXEC_FAILED,
        errno.ENOEXEC,
    )
    assert agent.run(str(tmp_path))[:2] == (ExitKind.EXEC_FAILED, errno.EACCES)
    assert agent.run("true", cwd=b"/no/such/directory")[:2] == (ExitKind.CHDIR_FAILED, errno.ENOENT)
    assert agent.run("true") == (ExitKind.EXITED, 0, b"", b"")


def test_path_search_passes_over_files_that_are_not_executable(agent: NativeAgent, tmp_path: Path) -> None:
    (tmp_path / "true").write_text("")
    found = agent.run("true", env={b"PATH": os.fsencode(tmp_path) + b":/usr/bin:/bin"})
    assert found[:2] == (ExitKind.EXITED, 0)


def test_arguments_environment_directory(agent: NativeAgent) -> None:
    script = r'printf "%s|" "$PWD" "$A" "$B" "$@"'
    odd = b"\xff\xfe \n'\""
    _, value, out, _ = agent.run("sh", "-c", script, "sh", "", odd, cwd=b"/usr", env={b"A": b"", b"B": b"x=y z"})
    assert value == 0
    assert out == b"/usr||x=y z||" + odd + b"|"


def test_environment_is_exactly_what_was_sent(agent: NativeAgent) -> None:
    assert agent.run("env")[2] == b"PATH=/usr/bin:/bin\n"


def test_no_stdin_is_an_empty_one(agent: NativeAgent) -> None:
    assert agent.run("cat") == (ExitKind.EXITED, 0, b"", b"")


def test_stdin_is_eight_bit_clean_and_ends(agent: NativeAgent) -> None:
    everything = bytes(range(256)) * 200
    assert agent.run("cat", stdin=everything) == (ExitKind.EXITED, 0, everything, b"")


def test_long_stdin_flows_with_credit(agent: NativeAgent) -> None:
    block = os.urandom(1 << 20)
    total = 4 * len(block)
    agent.start("sha256sum")
    sent = granted = 0
    while True:
        kind, payload = agent.next()
        if kind == FromGuest.STDIN_CREDIT:
            granted += struct.unpack("<I", payload)[0]
            assert granted - sent <= 65536, "more credit than the agent has room for"
            while sent < min(granted, total):
                n = min(granted - sent, 30_000, len(block) - sent % len(block))
                agent.send(ToGuest.STDIN, block[sent % len(block) : sent % len(block) + n])
                sent += n
            if sent == total:
                agent.send(ToGuest.STDIN_EOF)
        elif kind == FromGuest.STDOUT:
            assert payload.split()[0].decode() == hashlib.sha256(block * 4).hexdigest()
        elif kind == FromGuest.EXIT:
            assert payload == bytes(8)
            break
    assert sent == total


def test_a_command_that_does_not_read_its_stdin(agent: NativeAgent) -> None:
    agent.start("sh", "-c", "exec <&-; echo closed; sleep 0.2")
    agent.send(ToGuest.STDIN, bytes(65536))
    payload, before = agent.until(FromGuest.EXIT)
    assert ExitReport.parse(payload).value == 0
    credit = sum(struct.unpack("<I", p)[0] for k, p in before if k == FromGuest.STDIN_CREDIT)
    assert credit >= 65536 + 65536 - 16384, "what nobody reads must not stop the flow"
    assert agent.run("echo", "next")[2] == b"next\n"


def test_output_waits_for_credit(agent: NativeAgent) -> None:
    agent.start("sh", "-c", "head -c 300000 /dev/zero; echo end >&2", flags=StartFlag.NO_STDIN, window=1000)

    def came() -> int:
        return sum(len(p) for k, p in agent.frames if k == FromGuest.STDOUT)

    end = time.monotonic() + PATIENCE
    while came() < 1000:
        agent.pump(end)
    agent.pump_for(0.3)
    assert came() == 1000
    agent.send(ToGuest.CREDIT, struct.pack("<I", 1000))
    kind, value, out, err = agent.result()
    assert (kind, value, len(out), err) == (ExitKind.EXITED, 0, 300_000, b"end\n")


def test_exit_comes_after_the_last_output_even_without_credit(agent: NativeAgent) -> None:
    agent.start("echo", "0123456789", flags=StartFlag.NO_STDIN, window=4)
    assert agent.until(FromGuest.STDOUT)[0] == b"0123"
    time.sleep(0.1)
    agent.send(ToGuest.CREDIT, struct.pack("<I", 4))
    assert agent.until(FromGuest.STDOUT)[0] == b"4567"
    agent.send(ToGuest.CREDIT, struct.pack("<I", 400))
    assert agent.result()[2] == b"89\n"


def test_signals_reach_the_whole_group(agent: NativeAgent) -> None:
    script = "trap 'echo caught; exit 3' TERM; echo ready; sleep 100 & wait"
    agent.start("sh", "-c", script, flags=StartFlag.NO_STDIN)
    agent.until(FromGuest.STDOUT)
    agent.signal(signal.SIGTERM)
    assert agent.result()[:3] == (ExitKind.EXITED, 3, b"caught\n")
    wait_until(lambda: not agent.children())


def test_interrupt_kills_by_default(agent: NativeAgent) -> None:
    agent.start("sleep", "100")
    agent.until(FromGuest.STARTED)
    agent.signal(signal.SIGINT)
    assert agent.result()[:2] == (ExitKind.SIGNALLED, signal.SIGINT)


def test_signals_without_a_command_are_harmless(agent: NativeAgent) -> None:
    agent.signal(signal.SIGKILL)
    agent.send(ToGuest.STDIN, b"late")
    agent.send(ToGuest.STDIN_EOF)
    assert agent.run("cat", stdin=b"mine")[2] == b"mine"


def test_orphans_do_not_delay(agent: NativeAgent) -> None:
    orphan = int(agent.run("sh", "-c", "sleep 1000 & echo $!")[2])
    os.kill(orphan, signal.SIGKILL)  # it was still there
    wait_until(lambda: not agent.children())


def test_many_commands_on_one_agent(agent: NativeAgent) -> None:
    def descriptors() -> int:
        return len(list(Path(f"/proc/{agent.process.pid}/fd").iterdir()))

    before = descriptors()
    for number in range(50):
        assert agent.run("echo", str(number), stdin=b"x" if number % 2 else None)[2] == b"%d\n" % number
    wait_until(lambda: descriptors() == before and not agent.children())


def test_one_command_at_a_time(agent: NativeAgent) -> None:
    agent.start("cat")
    agent.start("true")
    assert agent.result()[:2] == (ExitKind.SETUP_FAILED, errno.EBUSY)
    agent.send(ToGuest.STDIN_EOF)
    assert agent.result()[:2] == (ExitKind.EXITED, 0)


def test_terminal_with_window_size(agent: NativeAgent) -> None:
    agent.start("sh", "-c", "test -t 0 && stty size && read x && stty size", flags=StartFlag.PTY, rows=33, cols=99)
    payload, _ = agent.until(FromGuest.STDOUT)
    assert payload == b"33 99\r\n"
    agent.send(ToGuest.WINDOW_SIZE, struct.pack("<HH", 44, 111))
    agent.send(ToGuest.STDIN, b"go\n")
    kind, value, out, _ = agent.result()
    assert (kind, value) == (ExitKind.EXITED, 0)
    assert out.endswith(b"44 111\r\n")


def test_terminal_keys_and_end_of_input(agent: NativeAgent) -> None:
    agent.start("sleep", "100", flags=StartFlag.PTY)
    agent.until(FromGuest.STARTED)
    agent.send(ToGuest.STDIN, b"\x03")
    assert agent.result()[:2] == (ExitKind.SIGNALLED, signal.SIGINT)
    agent.start("cat", flags=StartFlag.PTY)
    agent.send(ToGuest.STDIN, b"line\n")
    agent.send(ToGuest.STDIN_EOF)
    kind, value, out, _ = agent.result()
    assert (kind, value) == (ExitKind.EXITED, 0)
    assert out.count(b"line\r\n") == 2, "echoed once, printed once"


def test_ping(agent: NativeAgent) -> None:
    agent.send(ToGuest.PING, b"abc")
    assert agent.next() == (FromGuest.PONG, b"abc")


def test_power_off_says_goodbye(agent: NativeAgent) -> None:
    agent.send(ToGuest.POWER_OFF)
    assert agent.next() == (FromGuest.BYE, b"")
    assert agent.process.wait(30) == 0


def test_ends_when_the_host_goes(agent: NativeAgent) -> None:
    assert agent.process.stdin is not None
    agent.process.stdin.close()
    assert agent.process.wait(30) == 0


@pytest.mark.parametrize(
    "payload", [b"", b"\0" * 19, b"\0" * 20, b"\xff" * 40, struct.pack("<IHHIII", 0, 0, 0, 9, 3, 0) + b"\0x\0"]
)
def test_malformed_start(agent: NativeAgent, payload: bytes) -> None:
    agent.send(ToGuest.START, payload)
    kind, _, _, _ = agent.result()
    assert kind == ExitKind.SETUP_FAILED
    assert agent.run("true")[:2] == (ExitKind.EXITED, 0)


def file(path: bytes, mode: int = 0o644, mtime: int = 1_000_000_000) -> Entry:
    return Entry("f", mode, mtime, 0, path)


def test_copy_in_one_file(agent: NativeAgent, tmp_path: Path) -> None:
    content = os.urandom(200_000)
    target = tmp_path / "new" / "deep" / "name"
    assert agent.copy_in(os.fsencode(target), b"source", (file(b"", 0o755), content)) == (0, b"")
    assert target.read_bytes() == content
    assert target.stat().st_mode & 0o7777 == 0o755
    assert target.stat().st_mtime == 1_000_000_000


def test_copy_in_to_a_directory(agent: NativeAgent, tmp_path: Path) -> None:
    assert agent.copy_in(os.fsencode(tmp_path), b"source", (file(b""), b"1"))[0] == 0
    assert (tmp_path / "source").read_bytes() == b"1"
    assert agent.copy_in(os.fsencode(tmp_path / "sub") + b"/", b"source", (file(b""), b"2"))[0] == 0
    assert (tmp_path / "sub" / "source").read_bytes() == b"2"


def test_copy_in_a_tree(agent: NativeAgent, tmp_path: Path) -> None:
    tree = (
        (Entry("d", 0o755, 0, 0, b""), b""),
        (file(b"a"), b"A"),
        (Entry("d", 0o500, 0, 0, b"sub"), b""),
        (file(b"sub/\xff"), b""),
        (Entry("l", 0o777, 0, 0, b"link", b"sub/nowhere"), b""),
    )
    target = tmp_path / "tree"
    assert agent.copy_in(os.fsencode(target), b"src", *tree) == (0, b"")
    assert (target / "a").read_bytes() == b"A"
    assert [os.fsencode(path.name) for path in (target / "sub").iterdir()] == [b"\xff"]
    assert (target / "link").readlink() == Path("sub/nowhere")


def test_copy_in_failure_names_the_path(agent: NativeAgent, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    error, path = agent.copy_in(os.fsencode(blocker / "below"), b"source", (file(b""), b"1"))
    assert (error, path) == (errno.ENOTDIR, os.fsencode(blocker / "below"))
    error, _ = agent.copy_in(b"/dev/full", b"source", (file(b""), b"1"))
    assert error == errno.ENOSPC
    assert agent.copy_in(os.fsencode(tmp_path / "ok"), b"source", (file(b""), b"1"))[0] == 0


def test_copy_out(agent: NativeAgent, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(300):
        (tree / f"d{number % 7}").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number % 7}" / f"{number}").write_bytes(bytes([number % 256]) * number * 37)
    (tree / "link").symlink_to("../elsewhere")
    os.mkfifo(tree / "fifo")
    error, path, found = agent.copy_out(os.fsencode(tree))
    assert (error, path) == (0, b"")
    contents = {e.path.decode(): c for e, c in found if e.kind == "f"}
    assert contents == {f"d{n % 7}/{n}": bytes([n % 256]) * n * 37 for n in range(300)}
    assert [e.target for e, _ in found if e.kind == "l"] == [b"../elsewhere"]
    assert [e.path for e, _ in found if e.kind == "x"] == [b"fifo"]
    assert found[0][0].path == b""
    directories = [e.path for e, _ in found if e.kind == "d"]
    assert sorted(directories) == sorted([b"", *(b"d%d" % n for n in range(7))])


def test_copy_out_one_file_with_little_credit(agent: NativeAgent, tmp_path: Path) -> None:
    source = tmp_path / "file"
    source.write_bytes(os.urandom(100_000))
    source.chmod(0o640)
    (tmp_path / "link").symlink_to("file")
    error, _, found = agent.copy_out(os.fsencode(tmp_path / "link"), window=700)
    assert error == 0
    assert len(found) == 1
    assert found[0][0].mode == 0o640
    assert found[0][1] == source.read_bytes()


def test_copy_out_failures(agent: NativeAgent, tmp_path: Path) -> None:
    assert agent.copy_out(os.fsencode(tmp_path / "missing"))[:2] == (errno.ENOENT, os.fsencode(tmp_path / "missing"))
    agent.start("cat")
    assert agent.copy_out(b"/etc")[0] == errno.EBUSY
    agent.send(ToGuest.STDIN_EOF)
    assert agent.result()[0] == ExitKind.EXITED


def test_copy_out_can_be_cancelled(agent: NativeAgent) -> None:
    agent.send(ToGuest.COPY_OUT, struct.pack("<I", 100_000) + b"/dev/zero\0")
    agent.until(FromGuest.ENTRY)
    agent.send(ToGuest.CANCEL)
    payload, _ = agent.until(FromGuest.RESULT)
    assert struct.unpack_from("<I", payload)[0] in (0, errno.ECANCELED)
    assert agent.run("true")[:2] == (ExitKind.EXITED, 0)


def test_closing_the_terminal_before_the_end_is_not_a_hangup(agent: NativeAgent) -> None:
    agent.start("sh", "-c", "echo one; exec <&- >&- 2>&-; sleep 0.3; echo two > /dev/tty; exit 5", flags=StartFlag.PTY)
    kind, value, out, _ = agent.result()
    assert (kind, value, out) == (ExitKind.EXITED, 5, b"one\r\ntwo\r\n")
