"""The preflight names what is missing, one sentence each, before any work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PREFLIGHT = ROOT / "scripts" / "preflight"


class Machine:
    """A folder of programs that is the whole PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for tool in ("uname", "sort", "tail"):
            (folder / tool).symlink_to(next(p for p in (Path("/usr/bin") / tool, Path("/bin") / tool) if p.exists()))
        self.program("python3", f'exec {sys.executable} "$@"')
        self.program("cc", "echo cc 12.2")
        self.program("cargo", "echo cargo 1.95.0")

    def program(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def preflight(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["/bin/sh", str(PREFLIGHT), *arguments]
        return subprocess.run(
            command, env={"PATH": str(self.folder), **environment}, capture_output=True, text=True, check=False
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_complete_machine(machine: Machine) -> None:
    result = machine.preflight()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_this_machine() -> None:
    result = subprocess.run([str(PREFLIGHT)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_it_prints_a_python_that_exists(machine: Machine) -> None:
    result = machine.preflight("--python")
    assert result.returncode == 0
    assert os.access(result.stdout.strip(), os.X_OK)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("python3", "Python 3.11 or later is missing"),
        ("cc", "A C compiler (cc) is missing"),
        ("cargo", "Rust's cargo is missing"),
    ],
)
def test_one_missing_program_is_one_sentence(machine: Machine, program: str, sentence: str) -> None:
    (machine.folder / program).unlink()
    result = machine.preflight()
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"preflight: {sentence}")
    assert result.stderr.endswith(".\n")


def test_all_that_is_missing_is_named_at_once(machine: Machine) -> None:
    for program in ("python3", "cc", "cargo"):
        (machine.folder / program).unlink()
    assert len(machine.preflight().stderr.splitlines()) == 3


def test_an_old_rust(machine: Machine) -> None:
    machine.program("cargo", "echo cargo 1.63.0")
    result = machine.preflight()
    assert result.returncode == 1
    assert "Rust 1.63.0 is too old; install Rust 1.85 or later" in result.stderr


def test_the_minimum_is_the_workspaces() -> None:
    assert 'rust-version = "1.85"' in (ROOT / "rust" / "Cargo.toml").read_text()
    assert "minimum_rust=1.85" in PREFLIGHT.read_text()


def test_a_python_without_venv(machine: Machine) -> None:
    # As Debian ships it without python3-venv: ensurepip cannot be imported.
    machine.program("python3", f'case "$2" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"')
    result = machine.preflight()
    assert result.returncode == 1
    assert "Python's venv module is missing for python3" in result.stderr
    assert "python3-venv" in result.stderr


def test_an_old_python_does_not_count_but_a_newer_beside_it_does(machine: Machine) -> None:
    machine.program("python3", "exit 1")
    assert "Python 3.11 or later is missing" in machine.preflight().stderr
    machine.program("python3.12", f'exec {sys.executable} "$@"')
    assert machine.preflight().returncode == 0


def test_the_users_choice_of_python_comes_first(machine: Machine, tmp_path: Path) -> None:
    machine.program("mine", f'case "$2" in *executable*) echo mine;; *) exec {sys.executable} "$@";; esac')
    assert machine.preflight("--python", PYTHON="mine").stdout == "mine\n"
