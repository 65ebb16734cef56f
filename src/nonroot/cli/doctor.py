"""``nonroot doctor``: what this machine has, what of it nonroot uses, and why."""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nonroot.engines import select
from nonroot.errors import NonrootError
from nonroot.guests import FLAVOURS, apt, cache, cached

__all__ = ["doctor", "examine"]

FLAGS_OF_INTEREST = (
    "vmx svm sse2 ssse3 sse4_1 sse4_2 popcnt movbe aes pclmulqdq sha_ni xsave avx avx2 fma f16c avx512f "
    "bmi1 bmi2 adx rdrand rdseed fsgsbase pcid invpcid constant_tsc nonstop_tsc hypervisor"
).split()
HARDWARE_FLAGS = ("vmx", "svm")
KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12


def _first_line(path: Path, key: str) -> str | None:
    """The value of the first ``key: value`` line of a /proc file."""
    try:
        for line in path.read_text(errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == key:
                return value.strip()
    except OSError:
        pass
    return None


def _cpu() -> dict[str, Any]:
    flags = select.host_flags()
    return {
        "architecture": platform.machine(),
        "model": _first_line(Path("/proc/cpuinfo"), "model name") or platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in FLAGS_OF_INTEREST if flag in flags],
    }


def _memory() -> dict[str, Any]:
    def mebibytes(key: str) -> int | None:
        value = _first_line(Path("/proc/meminfo"), key)
        return int(value.split()[0]) // 1024 if value else None

    return {"total_mib": mebibytes("MemTotal"), "available_mib": mebibytes("MemAvailable")}


def kvm(device: Path = Path("/dev/kvm"), flags: frozenset[str] | None = None) -> dict[str, Any]:
    """Whether KVM is there, may be opened, and stands on hardware; ``usable`` needs all three.

    A /dev/kvm can also be a software module (kvm_pvm): slow, and not faithful to a CPU's rings.
    """
    flags = select.host_flags() if flags is None else flags
    hardware = [flag for flag in HARDWARE_FLAGS if flag in flags]
    modules = _kvm_modules()
    facts: dict[str, Any] = {"device": device.exists(), "hardware": hardware, "modules": modules, "usable": False}
    if not facts["device"]:
        facts["why"] = f"there is no {device}"
        return facts
    try:
        handle = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:
        facts["why"] = f"{device} may not be opened by this user; its group, usually kvm, may"
        return facts
    except OSError as error:
        facts["why"] = f"{device} cannot be opened: {(error.strerror or str(error)).lower()}"
        return facts
    try:
        version = fcntl.ioctl(handle, KVM_GET_API_VERSION)
    except OSError as error:
        facts["why"] = f"{device} is not KVM: {(error.strerror or str(error)).lower()}"
        return facts
    finally:
        os.close(handle)
    if version != KVM_API_VERSION:
        facts["why"] = f"{device} speaks version {version} of KVM's interface, not {KVM_API_VERSION}"
    elif not hardware:
        software = " (kvm_pvm)" if "kvm_pvm" in modules else ""
        facts["why"] = (
            f"{device} answers, but this CPU shows neither vmx nor svm: KVM is done in software here{software}"
        )
    else:
        facts["usable"] = True
        facts["why"] = f"{device} can be opened and the CPU has {hardware[0]}"
    return facts


def _kvm_modules() -> list[str]:
    try:
        lines = Path("/proc/modules").read_text().splitlines()
    except OSError:
        return []
    return sorted(line.split()[0] for line in lines if line.startswith("kvm"))


def _engine() -> dict[str, Any]:
    choice = select.choose()
    facts: dict[str, Any] = {"auto": choice.engine, "reason": choice.reason, "available": list(select.ENGINES)}
    if not select.kvm_problem():
        facts["available"].append(select.KVM)
    try:
        from nonroot import _engine
    except ImportError as error:
        return {**facts, "extension": None, "problem": f"the extension module cannot be loaded: {error}"}
    facts["extension"] = _engine.VERSION
    facts["optimisations"] = dict(_engine.optimisations(True))
    pieces: dict[str, Callable[[], bytes]] = {
        "agent for 64-bit guests": partial(_engine.agent, 64),
        "agent for 32-bit guests": partial(_engine.agent, 32),
        "built-in guest": _engine.tiny_guest,
    }
    facts["built_in"] = [name for name, get in pieces.items() if _present(get)]
    return facts


def _present(get: Callable[[], bytes]) -> bool:
    try:
        return bool(get())
    except ValueError:
        return False


def _confinement() -> dict[str, Any]:
    try:
        from nonroot.confine import host
    except ImportError:  # it is a part of the extension
        return {"landlock": 0, "seccomp": False, "namespaces": False, "why": "the extension module cannot be loaded"}
    facts = host.offers()
    return facts | {"why": facts["why"] or "everything that confined processes want is there"}


def _guests() -> dict[str, Any]:
    facts: dict[str, Any] = {"apt": apt.available() or "apt can fetch guest software", "flavours": {}}
    try:
        folder = cache.cache_dir()
    except NonrootError as error:
        return {**facts, "cache": None, "problem": str(error)}
    facts["cache"] = str(folder)
    for flavour in FLAVOURS:
        place = folder / "linux" / flavour
        if not place.exists():
            facts["flavours"][flavour] = {"state": "absent"}
        elif guest := cached(flavour):
            facts["flavours"][flavour] = {"state": "ready", "version": guest.version, "kernel": str(guest.kernel)}
        else:
            why = cache.damaged(place) or "it was made by another version of nonroot"
            facts["flavours"][flavour] = {"state": "to be fetched anew", "why": why}
    return facts


def examine() -> dict[str, Any]:
    """Everything that ``nonroot doctor --json`` prints: strings, numbers, lists and dictionaries."""
    try:
        version = metadata.version("nonroot")
    except metadata.PackageNotFoundError:
        version = "not installed"
    return {
        "nonroot": {"version": version, "python": platform.python_version()},
        "system": {
            "kernel": f"{platform.system()} {platform.release()}",
            "libc": " ".join(platform.libc_ver()).strip(),
        },
        "cpu": _cpu(),
        "memory": _memory(),
        "kvm": kvm(),
        "engine": _engine(),
        "confinement": _confinement(),
        "guests": _guests(),
    }


def _table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    engine, cpu, guests = facts["engine"], facts["cpu"], facts["guests"]
    table.add_row("nonroot", f"{facts['nonroot']['version']}, Python {facts['nonroot']['python']}")
    table.add_row("system", f"{facts['system']['kernel']}, {facts['system']['libc']}")
    table.add_row("CPU", f"{cpu['model']} ({cpu['architecture']}), {cpu['cores']} cores")
    table.add_row("CPU flags", " ".join(cpu["flags"]) or "none that matter")
    table.add_row("memory", f"{facts['memory']['available_mib']} of {facts['memory']['total_mib']} MiB available")
    table.add_row("KVM", f"{'usable' if facts['kvm']['usable'] else 'not usable'}: {facts['kvm']['why']}")
    table.add_row("engine", f"auto takes {engine['auto']}: {engine['reason']}")
    if "problem" in engine:
        table.add_row("", engine["problem"], style="red")
    else:
        table.add_row("", f"built in: {', '.join(engine['built_in']) or 'nothing, this build had no x86 C compiler'}")
        for name, what in engine["optimisations"].items():
            table.add_row("optimisation", f"{name}: {what}")
    layers = facts["confinement"]
    landlock = f"Landlock {layers['landlock']}" if layers["landlock"] else "no Landlock"
    words = [landlock, *(("" if layers[key] else "no ") + key for key in ("seccomp", "namespaces"))]
    table.add_row("confinement", f"{', '.join(words)}: {layers['why']}")
    table.add_row("guest software", guests["apt"])
    for flavour, state in guests["flavours"].items():
        detail = state.get("version") or state.get("why") or ""
        table.add_row("", f"{flavour}: {state['state']}{', ' + detail if detail else ''}")
    table.add_row("cache", guests["cache"] or guests["problem"])
    return table


def doctor(*, as_json: bool = False) -> int:
    """Print the report on stdout; returns the exit status, 1 if no domain could run here."""
    facts = examine()
    if as_json:
        json.dump(facts, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(_table(facts))
    return 1 if facts["engine"]["extension"] is None else 0
