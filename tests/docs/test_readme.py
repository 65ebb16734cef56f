"""The README's code is executed, block by block, as a reader would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [line for language, code in BLOCKS if language == "sh" for line in code.splitlines()]
# What sets up or runs this very test is not started from inside it; that the targets exist is checked.
MAKE = re.compile(r"make ([a-z-]+)$")


def command_of(line: str) -> str:
    return line.partition("  #")[0].strip()


COMMANDS = [command for line in SHELL if (command := command_of(line))]


def test_every_block_has_a_language_that_is_executed() -> None:
    assert {language for language, _ in BLOCKS} <= {"sh", "python", "text"}
    assert PYTHON
    assert COMMANDS


def test_the_first_two_commands() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if MAKE.match(c)])
def test_make_targets_exist(command: str) -> None:
    result = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.guest
@pytest.mark.parametrize("command", [c for c in COMMANDS if not MAKE.match(c)])
def test_shell_commands(command: str, tmp_path: Path) -> None:
    assert command.startswith((".venv/bin/nonroot ", "nonroot ")), command
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}:{os.environ['PATH']}"}
    line = command.removeprefix(".venv/bin/")
    wanted = int(match[1]) if (match := re.search(r"exit (\d+)'$", line)) else 0
    result = subprocess.run(
        ["/bin/sh", "-c", line],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == wanted, result.stdout + result.stderr


@pytest.mark.guest
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks(number: int, tmp_path: Path) -> None:
    code = PYTHON[number]
    if "def test_" in code:
        (tmp_path / "test_block.py").write_text(code)
        (tmp_path / "pytest.ini").write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-q", "test_block.py"]
    else:
        command = [sys.executable, "-c", code]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_table_is_the_measured_one() -> None:
    """Numbers in the README's table are those of the committed measurement that it links to."""
    match = re.search(r"\]\((docs/measurements/[\w.-]+\.json)\)", README)
    if match is None:
        assert "| first line of `/init` |" not in README
        return
    import json

    summary = json.loads((ROOT / match[1]).read_text())["summary"]
    for title, key in (("first line of `/init`", "init"), ("power-off", "end")):
        row = re.search(rf"^\| {re.escape(title)} \|(.+)\|$", README, re.MULTILINE)
        assert row is not None, title
        numbers = [float(number) for number in re.findall(r"\d+\.\d+", row[1])]
        expected = [summary[system][key]["median"] for system in ("nonroot", "QEMU")] + [
            summary["ratio"][key]["of_medians"]
        ]
        assert numbers == pytest.approx(expected, abs=0.051), title
