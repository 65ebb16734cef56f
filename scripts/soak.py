"""Runs the soak tests, round after round, and remembers what is done: interrupt it and run it again to go on.

Each test runs in a process of its own with NONROOT_SOAK_ROUND set to the round's number, from which generating tests
take their seed; so a round is reproducible. The record is build/soak.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "build" / "soak.json"


def soak_tests(paths: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "-m", "soak", "--collect-only", "-q", *paths]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode not in (0, 5):  # 5: no test matches
        sys.exit(f"soak: the tests cannot be collected:\n{result.stdout}{result.stderr}")
    return [line for line in result.stdout.splitlines() if "::" in line]


def load() -> dict[str, list[int]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def save(record: dict[str, list[int]]) -> None:
    RECORD.parent.mkdir(exist_ok=True)
    draft = RECORD.with_suffix(".new")
    draft.write_text(json.dumps(record, indent=1, sort_keys=True))
    draft.replace(RECORD)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", help="files or folders of tests, from the project's root; without any: all")
    parser.add_argument("--rounds", type=int, default=1, help="how many rounds in all, counting those already done")
    parser.add_argument("--only", default="", help="only tests with this in their names")
    parser.add_argument("--restart", action="store_true", help="forget what is done")
    parser.add_argument("--seconds", type=float, help="begin no test after so many seconds (run it again to go on)")
    options = parser.parse_args()
    if options.restart:
        RECORD.unlink(missing_ok=True)
    record = load()
    tests = [test for test in soak_tests(options.paths) if options.only in test]
    if not tests:
        print(f"soak: there are no soak tests{' named so' if options.only else ''}")
        return 0
    failed = 0
    passed = 0
    skipped = 0
    left = 0
    begun = time.monotonic()
    for number in range(options.rounds):
        for test in tests:
            if number in record.get(test, []):
                skipped += 1
                continue
            started = time.monotonic()
            if options.seconds is not None and started - begun >= options.seconds:
                left += 1
                continue
            environment = {**os.environ, "NONROOT_SOAK_ROUND": str(number)}
            command = [sys.executable, "-m", "pytest", "-q", "-m", "soak", "-o", "timeout=0", test]
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            seconds = time.monotonic() - started
            print(f"soak: round {number}, {test}: {'passed' if code == 0 else 'FAILED'} in {seconds:.0f} s", flush=True)
            if code:
                failed += 1
            else:
                passed += 1
                record.setdefault(test, []).append(number)
                save(record)
    print(f"soak: {passed} passed, {failed} failed, {skipped} done earlier" + (f", {left} left" if left else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nsoak: interrupted; run it again to go on")
        sys.exit(130)
