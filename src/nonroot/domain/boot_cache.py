"""Boots that are kept: domains saved when they were ready for their first command, in the user's cache.

A boot's key covers everything that the state of the guest then depends on: kernel and initramfs (by path, size and time
of change), command line, memory, the CPU, the engine, and nonroot itself. What depends on the time or on devices of
the host is not kept at all. Files are replaced as a whole, so any number of processes may use the same.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from nonroot.domain.options import DomainOptions

__all__ = ["KeptBoot", "boots", "drop", "folder", "kept_boot", "prune", "used"]

ENDING: Final = ".saved"
MOST_BYTES: Final = 1 << 30
MOST_BOOTS: Final = 32
DRAFT_SECONDS: Final = 3600
"""A file that is not complete after so long is nobody's."""
IRRELEVANT: Final = ("name", "domid", "saved", "kept", "layers")
"""Options that the guest does not notice."""


@dataclass(frozen=True, slots=True)
class KeptBoot:
    """One file of the cache."""

    path: Path
    bytes: int
    """On the disk."""
    used: float
    """Seconds since 1970."""


def folder() -> Path:
    """Where they lie; made if needed. SoftwareMissingError if there is no place for a cache."""
    from nonroot.guests.cache import cache_dir

    path = cache_dir() / "boots"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def kept_boot(options: DomainOptions) -> Path | None:
    """Where the boot of a domain of these (complete) options is kept, there or not; None for what cannot be kept."""
    outside = (options.disks, options.cdroms, options.floppies, options.shares)
    if not options.agent or options.kernel is None or options.virtual_time or options.firmware or any(outside):
        return None
    facts: dict[str, Any] = {name: value for name, value in asdict(options).items() if name not in IRRELEVANT}
    facts["files"] = [_identity(path) for path in (options.kernel, options.initrd) if path is not None]
    facts["nonroot"] = _own_identity()
    facts["cpu"] = _cpu()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    return folder() / (key + ENDING)


def used(path: Path) -> None:
    """It has been used: it is the last to go."""
    with contextlib.suppress(OSError):
        os.utime(path)


def boots() -> list[KeptBoot]:
    """All that are kept, the last used first."""
    found = []
    for path in folder().iterdir():
        if path.name.endswith(ENDING):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append(KeptBoot(path, facts.st_blocks * 512, facts.st_mtime))
    return sorted(found, key=lambda boot: boot.used, reverse=True)


def prune(most_bytes: int = MOST_BYTES, most_boots: int = MOST_BOOTS) -> list[KeptBoot]:
    """Remove those that were not used for longest until so much is left, and what was never completed."""
    size, gone = 0, []
    for index, boot in enumerate(boots()):
        size += boot.bytes
        if index >= most_boots or size > most_bytes:
            drop(boot.path)
            gone.append(boot)
    for path in folder().iterdir():
        with contextlib.suppress(OSError):
            if path.name.startswith(".") and time.time() - path.stat().st_mtime > DRAFT_SECONDS:
                path.unlink()
    return gone


def drop(path: Path) -> None:
    """Keep it no longer."""
    with contextlib.suppress(OSError):
        path.unlink()


def _identity(path: str) -> Iterable[int | str]:
    facts = Path(path).stat()
    return [path, facts.st_size, facts.st_mtime_ns, facts.st_ino]


def _own_identity() -> list[int | str]:
    """Of this installation: a change of any of its files makes other boots."""
    from nonroot._engine import VERSION

    package = Path(__file__).parents[1]
    newest = files = 0
    for parent, _, names in os.walk(package):
        for name in names:
            if name.endswith((".py", ".so")):
                newest = max(newest, os.stat(os.path.join(parent, name)).st_mtime_ns)  # noqa: PTH116, PTH118 - quick
                files += 1
    return [VERSION, newest, files]


def _cpu() -> str:
    """What /proc/cpuinfo says of the first CPU's features."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="ascii", errors="replace") as file:
        return next((line for line in file if line.startswith("flags")), "")
    return ""
