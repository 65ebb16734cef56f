import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.domain.native_agent import build

Run = Callable[..., "subprocess.CompletedProcess[bytes]"]


@pytest.fixture(scope="session")
def native_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "kernel").write_bytes(b"\x7fELF\x02")
    environment = dict(
        os.environ, NONROOT_TEST_AGENT=str(build(64, folder, "-DTEST_STDIO")), KERNEL=str(folder / "kernel")
    )
    root = Path(__file__).parents[2]
    environment["NONROOT_TESTED_BY"] = str(os.getpid())  # tells our domains' processes from those of other tests
    environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [environment.get("PYTHONPATH", "")])])
    environment["PASSED_ON"] = "as it is here"
    environment.pop("NO_COLOR", None)
    return environment


@pytest.fixture
def native_command(native_environment: dict[str, str]) -> list[str]:
    """``nonroot run`` whose guest is the agent on this machine."""
    kernel = native_environment["KERNEL"]
    return [
        sys.executable,
        str(Path(__file__).with_name("native_nonroot.py")),
        "run",
        "--kernel",
        kernel,
        "--initrd",
        kernel,
    ]


@pytest.fixture
def native_run(native_environment: dict[str, str], native_command: list[str]) -> Run:
    def run(*arguments: str | bytes, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        options = {"text": False, "stdin": subprocess.DEVNULL, "timeout": 60} | options
        if "input" in options:
            del options["stdin"]
        result: Any = subprocess.run(
            [*native_command, *arguments], capture_output=True, env=native_environment, **options
        )
        assert isinstance(result, subprocess.CompletedProcess)
        return result

    return run


@pytest.fixture
def nonroot(native_environment: dict[str, str]) -> Run:
    """The real ``nonroot`` command."""

    def run(*arguments: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
        options = {"text": False, "stdin": subprocess.DEVNULL, "timeout": 60} | options
        environment = native_environment | options.pop("environment", {})
        result: Any = subprocess.run(
            [sys.executable, "-m", "nonroot", *arguments], capture_output=True, env=environment, **options
        )
        assert isinstance(result, subprocess.CompletedProcess)
        return result

    return run
