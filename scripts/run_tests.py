"""Runs pytest; tests that failed are run once more, alone, and what passes then is named.

Thousands of tests with processes and guests of their own share two cores, at the side of whatever else the machine
does. A test that fails there and passes alone has a fault that shows under load, in the test or in what it tests. It is
named at the end so that somebody looks for it, and does not hide the result of all the others. A test that fails twice
fails the run, and so do more than ten at once: those have a cause.

Usage: run_tests.py PYTEST-ARGUMENT…
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MOST = 10


def last_failed(cache: Path) -> list[str]:
    record = cache / "v" / "cache" / "lastfailed"
    if not record.exists():
        return []
    return sorted(json.loads(record.read_text()))


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="nonroot-tests-") as folder:
        command = [sys.executable, "-m", "pytest", "-o", f"cache_dir={folder}"]
        status = subprocess.run([*command, *arguments], check=False).returncode
        failed = last_failed(Path(folder))
        if status != pytest.ExitCode.TESTS_FAILED or not 0 < len(failed) <= MOST:
            return status
        print(f"\nrunning once more, alone: {', '.join(failed)}", flush=True)
        status = subprocess.run([*command, "-q", "-n", "0", *failed], check=False).returncode
        if status != pytest.ExitCode.OK:
            return status
        print("These failed among the others and passed alone; each has a fault that shows under load:")
        for name in failed:
            print(f"  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
