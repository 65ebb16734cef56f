"""What this host offers for confinement, and what is in force for a process, as the kernel tells it."""

import contextlib
import os
from pathlib import Path
from typing import Any

from nonroot import _engine

__all__ = ["descendants", "namespaces_can_be_had", "observe", "offers", "shortcoming"]


def namespaces_can_be_had() -> bool:
    """Whether a process of this user may enter namespaces of its own; tried by a child."""
    child = os.fork()
    if child == 0:
        try:
            _engine.enter_namespaces()
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def offers() -> dict[str, Any]:
    """``landlock`` (its version, 0: none), ``seccomp``, ``namespaces``, and ``why`` if something is missing."""
    landlock, seccomp = _engine.confinement_of_host()
    facts: dict[str, Any] = {"landlock": landlock, "seccomp": seccomp, "namespaces": namespaces_can_be_had()}
    return {**facts, "why": shortcoming(landlock, seccomp, facts["namespaces"])}


def shortcoming(landlock: int, seccomp: bool, namespaces: bool = True) -> str:
    """One sentence on what this host does not offer; empty if nothing is missing.

    >>> shortcoming(0, True)
    'this kernel has no Landlock, so confined processes could still open the files of their user that seccomp lets them'
    """
    lacking = []
    if not landlock:
        lacking.append(
            "this kernel has no Landlock, so confined processes could still open the files of their user that seccomp "
            "lets them"
        )
    if not seccomp:
        lacking.append("this kernel has no seccomp filters, so confined processes have all system calls")
    if not namespaces:
        lacking.append("namespaces cannot be made here, so disks' and cards' processes share the network of their user")
    return "; ".join(lacking)


def observe(pid: int) -> list[str]:
    """What the kernel says is in force for a process: ``no-new-privileges``, ``capabilities`` (none), ``seccomp``.

    Landlock and limits do not show there. Empty for a process that is not there.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except OSError:
        return []
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    found = []
    if fields.get("NoNewPrivs", "0").strip() == "1":
        found.append("no-new-privileges")
    if not int(fields.get("CapEff", "1"), 16):
        found.append("capabilities")
    if fields.get("Seccomp", "0").strip() == "2":
        found.append("seccomp")
    return found


def descendants(pid: int) -> list[tuple[int, str]]:
    """(process id, name) of a process and of all that it has started, and they."""
    found: list[tuple[int, str]] = []
    waiting = [pid]
    while waiting:
        one = waiting.pop()
        with contextlib.suppress(OSError):
            found.append((one, Path(f"/proc/{one}/comm").read_text(errors="replace").strip()))
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
    return found
