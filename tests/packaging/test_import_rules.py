"""The import rules hold, and their checker sees what breaks them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKER = ROOT / "scripts" / "check_imports.py"


def check(root: Path) -> subprocess.CompletedProcess[str]:
    scripts = root / "scripts"
    if root != ROOT:
        scripts.mkdir()
        (scripts / CHECKER.name).write_text(CHECKER.read_text())
    command = [sys.executable, str(scripts / CHECKER.name)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_project_keeps_them() -> None:
    result = check(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("module", "code", "complaint"),
    [
        ("hvm/pit.py", "import time\n", "nonroot.hvm.pit is pure and may not import time"),
        ("devices/ide.py", "from os import path\n", "is pure and may not import os.path"),
        (
            "hvm/deep/rtc.py",
            "def f():\n    import socket\n",
            "2: nonroot.hvm.deep.rtc is pure and may not import socket",
        ),
        ("hvm/uart.py", "print('x')\n", "may not call print()"),
        ("hvm/pic.py", "from nonroot.domain import host\n", "may not import nonroot.domain.host, which lies above it"),
        ("hvm/pic.py", "from ..api import Domain\n", "may not import nonroot.api.Domain, which lies above it"),
        ("engines/x.py", "import nonroot.hvm.pic\n", "nonroot.engines.x may not import nonroot.hvm.pic"),
        ("engines/__init__.py", "from . import native\nfrom .. import cli\n", "may not import nonroot.cli"),
    ],
)
def test_what_breaks_them(tmp_path: Path, module: str, code: str, complaint: str) -> None:
    path = tmp_path / "src" / "nonroot" / module
    path.parent.mkdir(parents=True)
    path.write_text(code)
    result = check(tmp_path)
    assert result.returncode == 1
    assert complaint in result.stdout
    assert len(result.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("hvm/pit.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket\n"),
        ("hvm/machine.py", "import threading\n"),
        ("hvm/pic.py", "from nonroot.engines import exits\nfrom nonroot.hvm import irq\n"),
        ("cli/main.py", "import os\nfrom nonroot import api\n"),
    ],
)
def test_what_keeps_them(tmp_path: Path, module: str, code: str) -> None:
    path = tmp_path / "src" / "nonroot" / module
    path.parent.mkdir(parents=True)
    path.write_text(code)
    result = check(tmp_path)
    assert result.returncode == 0, result.stdout
