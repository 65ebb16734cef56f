from pathlib import Path

import pytest

from nonroot.engines import select
from nonroot.errors import BadOptionError, UnsupportedError


def test_auto_never_takes_a_kvm_that_is_not_hardware(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    choice = select.choose(flags=frozenset({"sse2"}), kvm_device=device, unavailable="")
    assert choice.engine == "translate"
    assert "neither vmx nor svm" in choice.reason
    assert "not hardware" in choice.reason


@pytest.mark.parametrize("unavailable", ["", "the host's CPU has no BMI1"])
def test_reasons(tmp_path: Path, unavailable: str) -> None:
    absent = tmp_path / "kvm"
    for flags, words in [({"vmx"}, "VT-x"), ({"svm"}, "AMD-V"), ({"sse2"}, "neither")]:
        choice = select.choose(flags=frozenset(flags), kvm_device=absent, unavailable=unavailable)
        assert choice.engine == ("interpret" if unavailable else "translate")
        assert words in choice.reason
        assert unavailable in choice.reason
        assert "\n" not in choice.reason
    assert "asked for" in select.choose("interpret").reason


def test_auto_takes_guest_mode_where_it_works() -> None:
    choice = select.choose(flags=frozenset({"svm"}), guest_mode=lambda device: "", unavailable="", interpreted="")
    assert (choice.engine, "AMD-V" in choice.reason) == ("kvm", True)
    choice = select.choose(
        flags=frozenset({"svm"}), guest_mode=lambda device: "it is held by another", unavailable="", interpreted=""
    )
    assert (choice.engine, "held by another" in choice.reason) == ("translate", True)
    choice = select.choose(
        flags=frozenset({"svm"}), guest_mode=lambda device: "", unavailable="", interpreted="virtual time"
    )
    assert (choice.engine, "cannot do virtual time" in choice.reason) == ("translate", True)
    choice = select.choose(flags=frozenset(), guest_mode=lambda device: "", unavailable="")
    assert choice.engine == "translate", "a KVM without hardware is not taken"


def test_kvm_says_why_it_is_not_here(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="there is no .*use another engine"):
        select.choose("kvm", kvm_device=tmp_path / "kvm")


def test_the_translator_says_why_it_is_not_here() -> None:
    missing = select.translator_missing()
    assert select.choose(flags=frozenset()).engine == ("interpret" if missing else "translate")


def test_names() -> None:
    with pytest.raises(UnsupportedError, match="no luck"):
        select.choose("kvm", guest_mode=lambda device: "no luck")
    assert select.choose("kvm", guest_mode=lambda device: "").engine == "kvm"
    assert select.create("kvm").name == "kvm"
    with pytest.raises(BadOptionError, match="did you mean interpret"):
        select.choose("interpreter")
    with pytest.raises(BadOptionError, match="there are auto, translate, interpret"):
        select.choose("qqq")
    for name in select.ENGINES:
        assert select.create(name).name == name
    with pytest.raises(BadOptionError):
        select.create("nothing")


def test_host_flags(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nflags\t\t: fpu vme avx2\nbugs : x\n\nprocessor : 1\nflags : other\n")
    assert select.host_flags(info) == {"fpu", "vme", "avx2"}
    info.write_text("Features : asimd\n")
    assert select.host_flags(info) == frozenset()
    assert select.host_flags(tmp_path / "absent") == frozenset()
