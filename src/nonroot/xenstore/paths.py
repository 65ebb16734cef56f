"""Names of nodes: what is allowed, and what relative names mean (docs/misc/xenstore.txt, "Data structure")."""

import re
from typing import Final

from nonroot.xenstore.errors import StoreError

__all__ = [
    "ABSOLUTE_MAX",
    "RELATIVE_MAX",
    "Names",
    "check_special",
    "domain_path",
    "is_special",
    "join",
    "parse_path",
]

ABSOLUTE_MAX: Final = 3072
"""Bytes of an absolute path."""
RELATIVE_MAX: Final = 2048
"""Bytes of a path relative to the client's own domain."""

Names = tuple[str, ...]
"""An absolute path as its components; the root is ``()``."""

_PATH = re.compile(r"(?:/?[A-Za-z0-9_@-]+(?:/[A-Za-z0-9_@-]+)*|/)")
_SPECIAL = re.compile(r"@[A-Za-z0-9_-]+(?:/[A-Za-z0-9_-]+)*")


def domain_path(domid: int) -> str:
    """Where a domain's own nodes are."""
    return f"/local/domain/{domid}"


def is_special(path: str) -> bool:
    """Is it the name of an event (``@introduceDomain``) rather than of a node?"""
    return path.startswith("@")


def check_special(path: str) -> str:
    """``path``, if an event can have that name. StoreError EINVAL."""
    if len(path) > RELATIVE_MAX or not _SPECIAL.fullmatch(path):
        raise StoreError("EINVAL")
    return path


def parse_path(path: str, domid: int) -> Names:
    """The components of a node's path; a relative one lies under ``/local/domain/<domid>``. StoreError EINVAL."""
    absolute = path.startswith("/")
    if len(path) > (ABSOLUTE_MAX if absolute else RELATIVE_MAX) or is_special(path) or not _PATH.fullmatch(path):
        raise StoreError("EINVAL")
    if absolute:
        return tuple(path[1:].split("/")) if path != "/" else ()
    return ("local", "domain", str(domid), *path.split("/"))


def join(names: Names) -> str:
    """The absolute path again."""
    return "/" + "/".join(names)
