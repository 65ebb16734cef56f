"""Who may read and write a node: its owner and domain 0 everything, others as the list says."""

import re
from collections.abc import Iterable
from enum import IntFlag
from typing import Final, NamedTuple

from nonroot.xenstore.errors import StoreError

__all__ = ["FIRST_RESERVED", "Access", "Caller", "Permission", "Permissions", "format_permissions", "parse_permissions"]

FIRST_RESERVED: Final = 0x7FF0
"""Domain ids from here on name no domain (DOMID_FIRST_RESERVED)."""

_ENTRY = re.compile(r"([nrwb])(\d{1,5})")


class Access(IntFlag):
    """What one domain may do."""

    NONE = 0
    READ = 1
    WRITE = 2
    BOTH = 3


_LETTERS: Final = {"n": Access.NONE, "r": Access.READ, "w": Access.WRITE, "b": Access.BOTH}
_LETTER: Final = {int(access): letter for letter, access in _LETTERS.items()}


class Permission(NamedTuple):
    """One entry of a node's list. In the first one, the domain is the owner and the access is everybody else's."""

    domid: int
    access: Access

    def __str__(self) -> str:
        """As the protocol writes it: ``r0``, ``b7``."""
        return f"{_LETTER[int(self.access)]}{self.domid}"


Permissions = tuple[Permission, ...]
"""At least one entry: the owner's."""


class Caller(NamedTuple):
    """On whose behalf something is done. ``target``: the domain that it may stand in for (SET_TARGET), or None."""

    domid: int
    target: int | None = None

    @property
    def privileged(self) -> bool:
        """Domain 0: no permissions, no quotas."""
        return self.domid == 0

    def owns(self, permissions: Permissions) -> bool:
        """May it change the permissions?"""
        owner = permissions[0].domid
        return self.domid in (0, owner) or self.target == owner

    def access(self, permissions: Permissions) -> Access:
        """What it may do with a node of these permissions."""
        if self.owns(permissions):
            return Access.BOTH
        for entry in permissions[1:]:
            if entry.domid in (self.domid, self.target):
                return entry.access
        return permissions[0].access


def parse_permissions(texts: Iterable[str]) -> Permissions:
    """The list of a SET_PERMS request. StoreError EINVAL if an entry is none, or there is none."""
    found = []
    for text in texts:
        match = _ENTRY.fullmatch(text)
        if match is None or int(match[2]) >= FIRST_RESERVED:
            raise StoreError("EINVAL")
        found.append(Permission(int(match[2]), _LETTERS[match[1]]))
    if not found:
        raise StoreError("EINVAL")
    return tuple(found)


def format_permissions(permissions: Permissions) -> list[str]:
    """The reverse of :func:`parse_permissions`."""
    return [str(entry) for entry in permissions]
