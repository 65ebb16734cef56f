"""xl's disk configuration: ``[TARGET, [FORMAT, [VDEV, [ACCESS]]]][, KEY=VALUE]...`` and the drives that it means."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nonroot.backends.vdev import disk_index
from nonroot.errors import BadOptionError, UnsupportedError

__all__ = ["DiskSpec", "parse_disk"]

FORMATS: Final = {"": "raw", "raw": "raw", "qcow2": "qcow2", "vhd": "vpc", "qed": "qed"}
"""xl's names of formats, and ours."""
ACCESS: Final = {"": False, "r": True, "ro": True, "w": False, "rw": False}
_POSITIONS: Final = ("target", "format", "vdev", "access")
_KEYS: Final = (*_POSITIONS, "devtype", "backendtype", "backend", "script")
_FLAGS: Final = frozenset(("cdrom", "discard", "no-discard", "direct-io-safe"))
_PREFIX: Final = re.compile(r"(?:(?:phy|file|aio|tap2?(?::tapdisk)?|ioemu|raw|qcow2|vhd|qed):)+")
"""What old configurations write before the target; it stands for the format."""


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """One disk or CD-ROM drive."""

    vdev: str
    """What the guest is to call it: ``xvda``, ``hdc`` …"""
    target: str
    """The image's absolute path; empty for an empty CD-ROM drive."""
    format: str = "raw"
    """Our name of the image's format."""
    read_only: bool = False
    is_cd: bool = False

    def drive(self) -> str:
        """The text that :class:`nonroot.backends.drive.Drive` parses; ``none`` for an empty drive."""
        if not self.target:
            return "none"
        words = [self.target.replace(",", ",,"), f"format={self.format}"]
        if self.read_only and not self.is_cd:
            words.append("ro")
        return ",".join(words)

    def to_wire(self) -> dict[str, Any]:
        """For domain zero's table."""
        return {
            "vdev": self.vdev,
            "target": self.target,
            "format": self.format,
            "access": "r" if self.read_only else "w",
            "cdrom": self.is_cd,
        }


def parse_disk(text: str, folder: Path) -> DiskSpec:
    """One entry of ``disk = [...]``; relative paths begin at ``folder``. BadOptionError, UnsupportedError.

    >>> parse_disk("/a.img,raw,xvda,r", Path("/")).read_only
    True
    """
    values = _split(text)
    what = f"the disk {text[:80]!r}"
    if values.get("script") or values.get("backend", "") not in ("", "0", "Domain-0"):
        raise UnsupportedError(f"{what}: nonroot has no block scripts and no driver domains")
    if values.get("backendtype", "") not in ("", "phy", "qdisk", "tap"):
        raise BadOptionError(f"{what}: there is no backendtype {values['backendtype']!r}")
    devtype = values.get("devtype", "")
    if devtype not in ("", "disk", "cdrom"):
        raise BadOptionError(f"{what}: there is no devtype {devtype!r}; there are: disk, cdrom")
    is_cd = devtype == "cdrom" or "cdrom" in values
    vdev = values.get("vdev", "")
    if vdev.endswith(":cdrom"):
        vdev, is_cd = vdev.removesuffix(":cdrom"), True
    if not vdev:
        raise BadOptionError(f"{what} has no vdev; add for example vdev=xvda")
    disk_index(vdev)
    target = values.get("target", "")
    prefix = _PREFIX.match(target)
    kind = values.get("format", "")
    if prefix is not None:
        target = target[prefix.end() :]
        kind = kind or next((word for word in prefix[0].split(":") if word in FORMATS and word), "")
    if kind not in FORMATS:
        raise BadOptionError(
            f"{what}: there is no format {kind!r}; there are: {', '.join(name for name in FORMATS if name)}"
        )
    access = values.get("access", "")
    if access not in ACCESS:
        raise BadOptionError(f"{what}: there is no access {access!r}; there are: r, w")
    if not target and not is_cd:
        raise BadOptionError(f"{what} names no image; only a CD-ROM drive can be empty")
    path = str(folder / target) if target else ""
    return DiskSpec(vdev, path, FORMATS[kind], ACCESS[access] or is_cd, is_cd)


def _split(text: str) -> dict[str, str]:
    """Keys and values, positional ones named; ``target=`` takes the whole rest."""
    values: dict[str, str] = {}
    rest: str | None = text
    while rest is not None:
        rest = rest.lstrip()
        if rest.startswith("target="):
            part, following = rest, None
        else:
            part, comma, after = rest.partition(",")
            following = after if comma else None
        part = part.strip()
        key, equals, value = part.partition("=")
        if part in _FLAGS:
            key, value = part, ""
        elif not equals or key not in _KEYS:
            if equals and re.fullmatch(r"[a-z-]+", key):
                raise BadOptionError(f"the disk {text[:80]!r}: there is no {key!r}; there are: {', '.join(_KEYS)}")
            free = [name for name in _POSITIONS if name not in values]
            if free[:1] == ["format"] and part not in FORMATS and _PREFIX.match(values["target"]):
                free = free[1:]
            if not free:
                raise BadOptionError(f"the disk {text[:80]!r}: {part[:40]!r} is one value too many")
            key, value = free[0], part
        if key in values:
            raise BadOptionError(f"the disk {text[:80]!r} says {key} twice")
        values[key] = value
        rest = following
    return values
