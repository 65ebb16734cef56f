"""The command line itself: help, versions, completion, and everything that can be typed wrongly."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nonroot.cli import start
from nonroot.cli.main import main
from nonroot.cli.run import parse_env
from nonroot.domain import early
from nonroot.domain.client import DomainClient
from nonroot.domain.files import parse_copy
from nonroot.errors import BadOptionError
from tests.cli.conftest import Run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--memory", "1K", "--", "true"], "1K of memory is too little; 4M are the least"),
        (["run", "--memory", "99999G", "--", "true"], "99999G of memory is too much; 512G are the most"),
        (["run", "--memory", "lots", "--", "true"], "'lots' is no memory size: write it like 256M or 1G"),
        (["run", "--memory", "-1", "--", "true"], "'-1' is no memory size"),
        (["run", "--engine", "warp", "--", "true"], "there is no engine named warp"),
        (
            ["run", "--kernel", "/nowhere/kernel", "--", "true"],
            "the kernel /nowhere/kernel cannot be read: no such file",
        ),
        (["run", "--kernel", "/", "--", "true"], "the kernel / cannot be read: is a directory"),
        (["run", "--kernel", "/dev/null", "--", "true"], "the kernel /dev/null is empty"),
        (["run", "--initrd", "/etc/passwd", "--", "true"], "an initrd needs its kernel"),
        (["run", "--flavour", "beos", "--", "true"], "there is no kernel flavour 'beos'"),
        (["run", "--timeout", "0", "--", "true"], "--timeout needs a positive number of seconds"),
        (["run", "--timeout", "soon", "--", "true"], "'soon' is not a valid float"),
        (["run", "--timeout", "nan", "--", "true"], "--timeout needs a positive number"),
        (["run", "--env", "=x", "--", "true"], "--env needs NAME=VALUE"),
        (["run", "--copy-in", "/etc/passwd", "--", "true"], "--copy-in needs HOST:GUEST"),
        (["run", "--copy-out", "a:b:c", "--", "true"], "--copy-out needs GUEST:HOST"),
        (["run", "--workdir", "/x"], "need a command"),
        (["run", "--tty", "--json", "--", "true"], "exclude each other"),
        (["run", "-v", "-q", "--", "true"], "exclude each other"),
        (["run", "--append", "a\nb", "--", "true"], "line breaks"),
        (["run", "--protocol", "smoke", "--", "true"], "there is no boot protocol 'smoke'"),
        (["run", "--seed", "-1", "--", "true"], "a seed must be"),
        (["run", "--net", "bridge", "--", "true"], "there is no network 'bridge': it would need root"),
        (["run", "--net", "lab,isolated", "--", "true"], "is of domains only"),
        (["run", "--net", "user,mac=x", "--", "true"], "'x' is no address of a network card"),
        (["run", "--publish", "22", "--", "true"], "'22' publishes no port: use [ADDRESS:]PORT:GUEST-PORT[/udp]"),
        (["run", "--no-xen", "--net", "user", "--", "true"], "network cards are Xen's"),
        (["run", "--no-such-option"], "no such option"),
        (["run", "--kernel"], "requires an argument"),
        (["runn"], "there is no command 'runn'; did you mean 'run'?"),
        (["--nonsense"], "no such option"),
        (["completion", "csh"], "'csh' is not one of"),
    ],
)
def test_bad_input_is_one_sentence(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 125
    out, error = capfd.readouterr()
    assert out == ""
    assert error.startswith("nonroot: ")
    assert error.count("\n") == 1
    assert message in error


def test_no_command_shows_the_help(nonroot: Run) -> None:
    result = nonroot()
    assert b"Commands:" in result.stdout + result.stderr


def test_help_has_examples(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["run", "--help"], ["-h"]):
        assert main(arguments) == 0
        out = capfd.readouterr().out
        assert "Examples:" in out
        assert "nonroot run -- uname -a" in out
    for verb in ("demo", "doctor", "completion"):
        assert main([verb, "--help"]) == 0


def test_version(nonroot: Run) -> None:
    result = nonroot("--version")
    assert result.returncode == 0
    assert re.fullmatch(rb"nonroot \d\S*\n", result.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(capfd: pytest.CaptureFixture[str], shell: str) -> None:
    assert main(["completion", shell]) == 0
    assert "_NONROOT_COMPLETE" in capfd.readouterr().out


def test_completion_answers(native_environment: dict[str, str]) -> None:
    environment = native_environment | {
        "_NONROOT_COMPLETE": "bash_complete",
        "COMP_WORDS": "nonroot ru",
        "COMP_CWORD": "1",
    }
    result = subprocess.run([sys.executable, "-m", "nonroot"], env=environment, capture_output=True, timeout=30)
    assert b"run" in result.stdout
    environment |= {"COMP_WORDS": "nonroot run --cop", "COMP_CWORD": "2"}
    result = subprocess.run([sys.executable, "-m", "nonroot"], env=environment, capture_output=True, timeout=30)
    assert b"--copy-in" in result.stdout
    assert b"--copy-out" in result.stdout


def test_the_command_line_starts_without_the_engine(native_environment: dict[str, str]) -> None:
    late = "('nonroot._engine', 'nonroot.api', 'rich')"
    code = f"import sys, nonroot.cli.main; print([m for m in {late} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], env=native_environment, capture_output=True, timeout=30)
    assert result.stdout == b"[]\n"


def test_environment_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OURS", "1")
    monkeypatch.delenv("THEIRS", raising=False)
    assert parse_env(("A=b=c", "OURS", "THEIRS", "E=")) == {"A": "b=c", "OURS": "1", "E": ""}


def test_copy_options(tmp_path: Path) -> None:
    assert parse_copy("a:b", "--copy-in") == ("a", "b")
    assert parse_copy(r"a\:x:b", "--copy-in") == ("a:x", "b")
    for text in ("", ":", "a:", ":b", "a", "a:b:c"):
        with pytest.raises(BadOptionError):
            parse_copy(text, "--copy-in")


def test_a_process_that_was_started_early_ends_with_the_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[early.Early] = []

    class Noted(early.Early):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(early, "Early", Noted)
    monkeypatch.setattr(sys, "argv", ["nonroot", "run", "--no-such-option"])
    assert start.main() == 125
    assert DomainClient.started_early() is None
    assert "no such option" in capfd.readouterr().err.lower()
    [process] = made
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_process_that_was_started_early_has_nothing_else_of_its_caller() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    early.start()
    os.close(writer)
    client = DomainClient.started_early()
    assert client is not None
    assert os.read(reader, 1) == b""  # nobody has the other end
    os.close(reader)
    assert client.request("hello", 30)
    client.close()
