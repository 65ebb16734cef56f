"""What the doctor finds, and that it finds the truth."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from nonroot.cli.doctor import doctor, examine, kvm
from nonroot.engines import select
from nonroot.guests import FLAVOURS


def test_the_report_is_json_all_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(as_json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"nonroot", "system", "cpu", "memory", "kvm", "engine", "confinement", "guests"}
    assert facts["nonroot"]["python"] == platform.python_version()
    assert facts["cpu"]["cores"] == len(os.sched_getaffinity(0))
    assert facts["memory"]["total_mib"] >= facts["memory"]["available_mib"] > 0
    assert set(facts["guests"]["flavours"]) == set(FLAVOURS)


def test_the_engine_is_the_one_that_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    choice = select.choose()
    engine = examine()["engine"]
    assert (engine["auto"], engine["reason"]) == (choice.engine, choice.reason)
    assert engine["built_in"] == ["agent for 64-bit guests", "agent for 32-bit guests", "built-in guest"]
    assert doctor() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"auto takes {choice.engine}: {choice.reason}" in text
    for name in engine["optimisations"]:
        assert f"{name}: " in text


def test_no_kvm(tmp_path: Path) -> None:
    facts = kvm(tmp_path / "kvm", frozenset({"vmx"}))
    assert (facts["device"], facts["usable"]) == (False, False)
    assert facts["why"] == f"there is no {tmp_path}/kvm"


def test_a_file_that_is_no_kvm(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch()
    facts = kvm(tmp_path / "kvm", frozenset({"svm"}))
    assert not facts["usable"]
    assert "is not KVM" in facts["why"]


@pytest.mark.skipif(os.getuid() == 0, reason="root may open everything")
def test_a_kvm_of_others(tmp_path: Path) -> None:
    (tmp_path / "kvm").touch(mode=0)
    assert "may not be opened by this user" in kvm(tmp_path / "kvm", frozenset({"svm"}))["why"]


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="this machine has no /dev/kvm for us")
def test_kvm_without_hardware_is_not_usable() -> None:
    facts = kvm(flags=frozenset())
    assert not facts["usable"]
    assert "neither vmx nor svm" in facts["why"]
    assert kvm(flags=frozenset({"vmx"}))["usable"]


def test_damaged_guest_software_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "nonroot" / "linux" / "686").mkdir(parents=True)
    flavours = examine()["guests"]["flavours"]
    assert flavours["686"] == {"state": "to be fetched anew", "why": "manifest.json is missing"}
    assert flavours["amd64"] == {"state": "absent"}


def test_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "nonroot", "doctor", "--json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["engine"]["available"][:3] == list(select.ENGINES)
