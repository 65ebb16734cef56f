"""`make soak` remembers what is done and goes on from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[2] / "scripts" / "soak.py"

TESTS = """
import os, pathlib, pytest

@pytest.mark.soak
@pytest.mark.parametrize("name", ["a", "b"])
def test_long(name):
    with pathlib.Path("trace").open("a") as file:
        file.write(name + os.environ["NONROOT_SOAK_ROUND"] + " ")
    assert not pathlib.Path(f"break-{name}").exists()

def test_short():
    raise AssertionError("not a soak test")
"""


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(folder / "scripts" / "soak.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # starts faster
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_it_resumes(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "soak.py").write_text(SOAK.read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = soak\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "break-b").touch()
    trace = tmp_path / "trace"

    first = soak(tmp_path)
    assert first.returncode == 1
    assert first.stdout.splitlines()[-1] == "soak: 1 passed, 1 failed, 0 done earlier"
    assert trace.read_text() == "a0 b0 "

    (tmp_path / "break-b").unlink()
    second = soak(tmp_path)
    assert second.returncode == 0
    assert second.stdout.splitlines()[-1] == "soak: 1 passed, 0 failed, 1 done earlier"
    assert trace.read_text() == "a0 b0 b0 "

    third = soak(tmp_path, "--rounds", "2")
    assert third.returncode == 0
    assert trace.read_text() == "a0 b0 b0 a1 b1 "
    record = json.loads((tmp_path / "build" / "soak.json").read_text())
    assert sorted(record.values()) == [[0, 1], [0, 1]]
