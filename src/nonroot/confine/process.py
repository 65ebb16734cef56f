"""Confines this process."""

import contextlib
import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from nonroot import _engine
from nonroot.confine.profiles import Profile

__all__ = ["Confinement", "confine", "give_up_files"]

FIRST_DESCRIPTOR: Final = 3
"""Standard input, output and error stay."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """What came of it."""

    names: tuple[str, ...]
    """The layers in force, such as ``landlock``."""
    missing: tuple[str, ...]
    """The layers that could not be had, each as half a sentence with the reason."""

    def facts(self) -> dict[str, list[str]]:
        """For a message that says that a process is ready."""
        return {"confined": list(self.names), "unconfined": list(self.missing)}


def confine(
    profile: Profile,
    readable: Iterable[str] = (),
    *,
    folder: int | None = None,
    keep: Iterable[int] | None = None,
    files: int | None = None,
    memory: int | None = None,
    all_threads: bool = False,
) -> Confinement:
    """
    Confine this process and all its threads to come, for good. To be called before other threads start.

    ``readable``: files and folders that may be read later; ``folder``: the descriptor of one below which everything may
    be reached, also for changes if the profile writes files; ``keep``: close all descriptors from 3 on but these;
    ``files`` and ``memory``: other limits than the profile's. With ``all_threads`` threads may run already: limits and
    the filter hold for them too; Landlock, capabilities and namespaces are the calling thread's and its children's.
    """
    names, missing = ["limits"], []
    if keep is not None:
        _engine.close_others(FIRST_DESCRIPTOR, list(keep))
    _limit(profile, files, memory)
    try:
        _engine.refuse_privileges()
    except OSError as error:  # without this, the kernel takes no filter either
        return Confinement(tuple(names), (f"privileges stay: {error.strerror}",))
    names.append("no-new-privileges")
    if profile.namespaces:
        try:
            _engine.enter_namespaces()
            names.append("namespaces")
        except OSError as error:
            missing.append(f"it shares the network of its user: {error.strerror}")
    try:
        _engine.drop_capabilities(sum(1 << number for number in profile.capabilities))
        names.append("capabilities")
    except OSError as error:
        missing.append(f"capabilities stay: {error.strerror}")
    try:
        _restrict_files(profile, readable, folder)
        names.append("landlock")
    except OSError as error:
        missing.append(f"files stay reachable: {error}")
    try:
        _engine.restrict_calls(
            sorted(profile.calls),
            refuse=profile.refuses,
            threads=profile.threads,
            executable=profile.executable,
            families=list(profile.families),
            all_threads=all_threads,
        )
        names.append("seccomp")
    except OSError as error:
        missing.append(f"system calls are not filtered: {error}")
    return Confinement(tuple(names), tuple(missing))


def give_up_files() -> None:
    """For a thread that runs already when :func:`confine` is called: no files by name, and no capabilities, for it."""
    with contextlib.suppress(OSError):
        _engine.refuse_privileges()
        _engine.drop_capabilities(0)
    with contextlib.suppress(OSError):
        _engine.restrict_files([], False)


def _limit(profile: Profile, files: int | None, memory: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not profile.writes_files:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    lower(resource.RLIMIT_NOFILE, profile.files if files is None else files)
    lower(resource.RLIMIT_AS, used + (profile.memory if memory is None else memory))


def lower(which: int, most: int) -> None:
    """Set a limit, unless the present one is lower."""
    hard = resource.getrlimit(which)[1]
    limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (limit, limit))


def _restrict_files(profile: Profile, readable: Iterable[str], folder: int | None) -> None:
    rules: list[tuple[int, str]] = []
    opened: list[int] = []
    try:
        for path in readable:
            with contextlib.suppress(OSError):
                opened.append(os.open(path, os.O_PATH | os.O_CLOEXEC))
                rules.append((opened[-1], "list" if os.path.isdir(path) else "read"))  # noqa: PTH112
        if folder is not None:
            writing = "own" if profile.refuses else "change"
            rules.append((folder, writing if profile.writes_files else "list"))
        _engine.restrict_files(rules, profile.tcp)
    finally:
        for fd in opened:
            os.close(fd)
