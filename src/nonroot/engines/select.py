"""
Which engine ``auto`` takes, and why. It is never silent: ``run`` prints the reason, ``nonroot doctor`` explains it.

A /dev/kvm that opens says nothing: on some machines it is a software module without hardware under it, far slower and
not faithful. KVM counts only if the CPU itself shows ``vmx`` or ``svm``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from nonroot.engines.protocol import Engine
from nonroot.errors import BadOptionError, UnsupportedError

__all__ = ["AUTO", "ENGINES", "KVM", "Choice", "choose", "create", "host_flags", "kvm_problem"]

AUTO: Final = "auto"
_CPUINFO: Final = Path("/proc/cpuinfo")


def _interpret() -> Engine:
    from nonroot.engines.native import InterpretEngine

    return InterpretEngine()


def _translate() -> Engine:
    from nonroot.engines.native import TranslateEngine

    return TranslateEngine()


def _lockstep() -> Engine:
    from nonroot.engines.native import LockstepEngine

    return LockstepEngine()


def _kvm() -> Engine:
    from nonroot.engines.kvm.engine import KvmEngine

    return KvmEngine()


ENGINES: Final[Mapping[str, Callable[[], Engine]]] = {
    "translate": _translate,
    "interpret": _interpret,
    "lockstep": _lockstep,
}
"""The engines that every machine of their architecture has, by name."""

UNPROVEN: Final = "operating systems for sure: none has been booted under it yet"
"""Why ``auto`` leaves guest mode alone for now."""

KVM: Final = "kvm"
"""The engine that a machine has whose kernel runs guests."""


@dataclass(frozen=True)
class Choice:
    """An engine's name and one sentence that says why it was taken."""

    engine: str
    reason: str


def host_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """The host CPU's feature flags; empty where the system does not tell (or is no x86)."""
    try:
        text = cpuinfo.read_text(errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "flags":
            return frozenset(value.split())
    return frozenset()


@lru_cache(maxsize=1)
def _own_flags() -> frozenset[str]:
    """Those of this machine, read once: that takes a while beside a fork."""
    return host_flags()


def choose(
    name: str = AUTO,
    *,
    flags: frozenset[str] | None = None,
    kvm_device: Path = Path("/dev/kvm"),
    unavailable: str | None = None,
    guest_mode: Callable[[Path], str] | None = None,
    interpreted: str = UNPROVEN,
) -> Choice:
    """
    Resolve an engine name.

    :param name: ``auto`` or a name in :data:`ENGINES`.
    :param flags: the host's CPU flags; those of this machine by default.
    :param guest_mode: why KVM cannot run guests, empty if it can; found out by default, if the CPU has hardware for it.
    :param interpreted: what is asked for that no guest mode can do; empty if nothing is.
    :param unavailable: why translated code cannot run here, empty if it can; found out by default.
    :raises BadOptionError: for a name that is no engine's.
    :raises UnsupportedError: for ``kvm`` where KVM cannot run guests.
    """
    if name in ENGINES:
        return Choice(name, f"the {name} engine was asked for")
    guest_mode = kvm_problem if guest_mode is None else guest_mode
    if name == KVM:
        if problem := guest_mode(kvm_device):
            raise UnsupportedError(problem)
        return Choice(name, f"the {name} engine was asked for")
    if name != AUTO:
        import difflib

        near = difflib.get_close_matches(name, [*ENGINES, KVM, AUTO], 1)
        hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join([AUTO, *ENGINES, KVM])}"
        raise BadOptionError(f"there is no engine named {name}{hint}")
    flags = _own_flags() if flags is None else flags
    hardware = {"vmx": "VT-x", "svm": "AMD-V"}
    has = next((text for flag, text in hardware.items() if flag in flags), None)
    if has is not None and interpreted:
        why = f"this CPU has {has}, but guest mode cannot do {interpreted}"
    elif has is not None:
        problem = guest_mode(kvm_device)
        if not problem:
            return Choice(KVM, f"this CPU has {has} and KVM runs guests")
        why = f"this CPU has {has}, but {problem}"
    elif kvm_device.exists():
        why = "/dev/kvm is here, but this CPU shows neither vmx nor svm, so that KVM is not hardware virtualization"
    else:
        why = "this CPU shows neither vmx nor svm"
    missing = translator_missing() if unavailable is None else unavailable
    if other := _other_machine():
        return Choice("interpret", f"this is a {other} machine, so the portable interpreter runs the guest")
    if missing:
        return Choice("interpret", f"{why}, and {missing}, so the portable interpreter runs the guest")
    return Choice("translate", f"{why}, so translated code runs the guest")


def kvm_problem(device: Path = Path("/dev/kvm")) -> str:
    """Why this machine's KVM cannot run guests, one sentence; empty if it can."""
    if other := _other_machine():
        return f"this is a {other} machine, whose KVM runs no x86 guests; use another engine"
    from nonroot.engines.kvm import probe

    return probe.problem(device)


def _other_machine() -> str:
    """What this machine is, if it is no x86-64."""
    machine = os.uname().machine
    return "" if machine in ("x86_64", "AMD64") else machine


def translator_missing() -> str:
    """Why this machine cannot run translated code; empty if it can."""
    try:
        from nonroot import _engine
    except ImportError as error:
        return f"the extension module cannot be loaded ({error})"
    return _engine.translate_unavailable() or ""


def create(name: str) -> Engine:
    """The engine of a :class:`Choice`. UnsupportedError if the extension module is missing or unusable."""
    try:
        return {**ENGINES, KVM: _kvm}[name]()
    except KeyError:
        raise BadOptionError(f"there is no engine named {name}") from None
    except ImportError as error:
        raise UnsupportedError(f"the extension module of the {name} engine cannot be loaded: {error}") from None
