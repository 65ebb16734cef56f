from pathlib import Path

import pytest

from nonroot.engines import select
from nonroot.errors import BadOptionError, UnsupportedError


def test_auto_never_takes_a_kvm_that_is_not_hardware(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    choice = select.choose(flags=frozenset({"sse2"}), kvm_device=device)
    assert choice.engine == "interpret"
    assert "neither vmx nor svm" in choice.reason
    assert "not hardware" in choice.reason


def test_reasons(tmp_path: Path) -> None:
    absent = tmp_path / "kvm"
    for flags, words in [({"vmx"}, "VT-x"), ({"svm"}, "AMD-V"), ({"sse2"}, "portable interpreter")]:
        choice = select.choose(flags=frozenset(flags), kvm_device=absent)
        assert choice.engine == "interpret"
        assert words in choice.reason
        assert "\n" not in choice.reason
    assert "asked for" in select.choose("interpret").reason


def test_names() -> None:
    for name in ("kvm", "translate"):
        with pytest.raises(UnsupportedError, match="does not exist yet"):
            select.choose(name)
    with pytest.raises(BadOptionError, match="did you mean interpret"):
        select.choose("interpreter")
    with pytest.raises(BadOptionError, match="there are auto, interpret"):
        select.choose("qqq")
    assert select.create("interpret").name == "interpret"
    with pytest.raises(BadOptionError):
        select.create("nothing")


def test_host_flags(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu vme avx2\nbugs : x\n\nprocessor : 1\nflags : other\n")
    assert select.host_flags(info) == {"fpu", "vme", "avx2"}
    info.write_text("Features : asimd\n")
    assert select.host_flags(info) == frozenset()
    assert select.host_flags(tmp_path / "absent") == frozenset()
