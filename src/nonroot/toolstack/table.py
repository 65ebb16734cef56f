"""The table of domains: what domain zero knows of each, and the records that outlive it."""

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from nonroot.domain import registry
from nonroot.toolstack import place
from nonroot.toolstack.link import Link

__all__ = ["Known", "forget_record", "load_record", "save_record", "stray_records"]

CRASHES: Final = frozenset(("panic", "triple_fault", "halted", "failure", "internal", "lost"))
"""Reasons of a stop that on_crash is for."""
_UUID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_TICKS: Final = os.sysconf("SC_CLK_TCK")


@dataclass(eq=False, slots=True)
class Known:
    """One domain."""

    name: str
    domid: int
    uuid: str
    link: Link
    record: dict[str, Any] | None = None
    """How it was made: ``options``, ``policy``, ``settings``, ``disks``, ``vnc``. None if somebody else made it."""
    state: str = "created"
    """``created``, ``running``, ``paused``, ``stopped``, or ``unknown`` if its process does not answer."""
    reason: str = ""
    """Why it stopped."""
    started: float = 0.0
    """Seconds since 1970."""
    facts: dict[str, Any] = field(default_factory=dict)
    reboot_wanted: bool = False
    """Whether its power-off is to count as a reboot."""
    ending: bool = False
    """Whether somebody has asked for its end."""
    acting: bool = False
    """Whether what follows its stop is being done."""
    settled: "asyncio.Future[int | None] | None" = None
    """Done when what follows its stop has been done: the domid of the domain that took its place, or None."""

    def letters(self) -> str:
        """xl's six letters: running, blocked, paused, shut down, crashed, dying."""
        works = busy(self.link.pid)
        shown = [
            self.state == "running" and works,
            self.state == "running" and not works,
            self.state in ("paused", "created"),
            self.state == "stopped" and self.reason not in CRASHES,
            self.state == "stopped" and self.reason in CRASHES,
            self.ending,
        ]
        return "".join(letter if on else "-" for letter, on in zip("rbpscd", shown, strict=True))

    def describe(self) -> dict[str, Any]:
        """For clients."""
        found: dict[str, Any] = {
            **self.facts,
            "name": self.name,
            "domid": self.domid,
            "uuid": self.uuid,
            "pid": self.link.pid,
            "started": self.started,
            "uptime": round(max(time.time() - self.started, 0.0), 3),
            "socket": os.fspath(registry.runtime_dir() / f"{self.name}.sock"),
            "state": self.state,
            "state_letters": self.letters(),
            "reason": self.reason,
            "vcpus": 1,
            "cpu_seconds": cpu_seconds(self.link.pid),
            "managed": self.record is not None,
        }
        if self.record is not None:
            found |= {"disks": self.record["disks"], "policy": self.record["policy"], "config": self.record["settings"]}
        return found


def cpu_seconds(pid: int) -> float:
    """CPU time of a process; 0 if it has gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return round((int(fields[11]) + int(fields[12])) / _TICKS, 2)
    except (OSError, ValueError, IndexError):
        return 0.0


def busy(pid: int) -> bool:
    """Whether any thread of a process runs now."""
    with contextlib.suppress(OSError):
        for path in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                if (path / "stat").read_text().rpartition(")")[2].split()[0] == "R":
                    return True
    return False


def _path(uuid: str) -> Path:
    if not _UUID.fullmatch(uuid):
        raise ValueError(f"{uuid[:60]!r} is no UUID")
    return place.domains_folder() / f"{uuid}.json"


def save_record(uuid: str, record: dict[str, Any]) -> None:
    """Write a domain's record, wholly or not at all. OSError."""
    path = _path(uuid)
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(record))
    beside.replace(path)


def load_record(uuid: str) -> dict[str, Any] | None:
    """A domain's record; None if there is none that can be used."""
    try:
        record = json.loads(_path(uuid).read_text())
    except (OSError, ValueError):
        return None
    kinds = {"options": dict, "policy": dict, "settings": dict, "disks": list}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return None
    return record


def forget_record(uuid: str) -> None:
    """Remove a domain's record."""
    with contextlib.suppress(OSError, ValueError):
        _path(uuid).unlink(missing_ok=True)


def stray_records(known: set[str]) -> Iterator[str]:
    """UUIDs of records that no domain of ``known`` has."""
    for path in place.domains_folder().glob("*.json"):
        if path.stem not in known:
            yield path.stem
