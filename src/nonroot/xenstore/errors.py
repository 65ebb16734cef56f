"""What XenStore refuses, by the names that travel in its ERROR messages."""

from typing import Final

from nonroot.errors import NonrootError, TransientError

__all__ = ["CODES", "StoreError", "XenStoreError", "XenStoreLostError"]

CODES: Final = {
    "EINVAL": "the request makes no sense",
    "EACCES": "permission denied",
    "EEXIST": "it exists already",
    "EISDIR": "it is a directory",
    "ENOENT": "there is no such node",
    "ENOMEM": "the store has no memory for it",
    "ENOSPC": "the domain's quota is used up",
    "EIO": "the store could not keep it",
    "ENOTEMPTY": "it is not empty",
    "ENOSYS": "the store does not know this request",
    "EROFS": "it cannot be changed",
    "EBUSY": "a transaction is under way",
    "EAGAIN": "somebody else changed what the transaction used",
    "EISCONN": "it is connected already",
    "E2BIG": "it is too long, or there are too many",
    "EPERM": "the owner of a node can be changed by domain 0 only",
}
"""Every name that an ERROR message may carry (io/xs_wire.h), and what it means here."""


class StoreError(Exception):
    """A request that the store refuses. Nothing was done. ``code``: one of :data:`CODES`."""

    def __init__(self, code: str) -> None:
        assert code in CODES, code
        super().__init__(f"{code}: {CODES[code]}")
        self.code = code


class XenStoreError(NonrootError):
    """What a client's caller sees of a refusal. ``name``: ``ENOENT``, ``EACCES``, …"""

    code = "xenstore"

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"XenStore: {what}: {CODES.get(name, name)}", errno=name)
        self.name = name


class XenStoreLostError(TransientError):
    """XenStore's process cannot be reached, or went away before it answered: the request may have been done."""

    code = "xenstore_lost"
