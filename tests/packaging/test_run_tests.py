"""What runs the tests: one that fails among the others is run again, alone, and a real failure stays one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "run_tests.py"

UNSTEADY = """
from pathlib import Path

def test_unsteady():
    mark = Path(__file__).with_name("mark")
    seen = mark.exists()
    mark.touch()
    assert seen

def test_steady():
    pass
"""


def run(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, str(SCRIPT), "-q", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_what_passes_alone_is_named(tmp_path: Path, workers: str) -> None:
    (tmp_path / "test_it.py").write_text(UNSTEADY)
    result = run(tmp_path, "-n", workers)
    assert result.returncode == 0, result.stdout
    assert "1 failed, 1 passed" in result.stdout
    assert result.stdout.splitlines()[-1] == "  test_it.py::test_unsteady"


def test_what_fails_twice_fails(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(UNSTEADY + "\ndef test_wrong():\n    assert False\n")
    result = run(tmp_path)
    assert result.returncode == 1
    assert "1 failed, 1 passed" in result.stdout


def test_many_failures_and_broken_files_are_not_run_again(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("".join(f"def test_{i}():\n    assert False\n" for i in range(11)))
    result = run(tmp_path)
    assert (result.returncode, "once more" in result.stdout) == (1, False)
    (tmp_path / "test_it.py").write_text("this is no Python")
    result = run(tmp_path)
    assert (result.returncode, "once more" in result.stdout) == (2, False)


def test_all_pass(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it():\n    pass\n")
    result = run(tmp_path)
    assert (result.returncode, "once more" in result.stdout) == (0, False)
