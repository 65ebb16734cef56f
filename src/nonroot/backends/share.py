"""What a user says of a folder that a guest is to have, and the process that serves it."""

import os
import posixpath
import socket
from dataclasses import dataclass
from pathlib import Path

from nonroot.backends.helper import Helper, start_helper
from nonroot.errors import BadFileError, BadOptionError

__all__ = ["Share", "start_share"]

BUFFER_BYTES = 4 << 20
"""What the kernel may hold of messages on their way, if its own limit allows."""


@dataclass(frozen=True, slots=True)
class Share:
    """``HOST:GUEST[:ro]``."""

    host: str
    """The folder on this machine, an absolute path."""
    guest: str
    """Where the guest has it, an absolute path without ``.`` and ``..``."""
    read_only: bool = False

    @classmethod
    def parse(cls, text: str) -> "Share":
        """BadOptionError, one sentence, for what is no share. HOST may contain colons, GUEST may not.

        >>> Share.parse("/data:/mnt/data:ro")
        Share(host='/data', guest='/mnt/data', read_only=True)
        """
        rest, colon, last = text.rpartition(":")
        options = "rw"
        if colon and last in ("ro", "rw") and ":" in rest:
            options = last
            rest, colon, last = rest.rpartition(":")
        if not colon or not rest or not last or "\0" in text or "\n" in text:
            raise BadOptionError(f"{text!r} is no shared folder: use HOST:GUEST or HOST:GUEST:ro")
        guest = posixpath.normpath(last)
        if not last.startswith("/") or ".." in last.split("/"):
            raise BadOptionError(f"{last!r} is no place for a shared folder: write it from the guest's root, like /mnt")
        guest = "/" + guest.lstrip("/")
        if guest == "/":
            raise BadOptionError("a shared folder cannot be the guest's root: choose a folder like /mnt")
        return cls(os.path.abspath(rest), guest, options == "ro")  # noqa: PTH100 - resolve() would follow links

    def __str__(self) -> str:
        return f"{self.host}:{self.guest}:{'ro' if self.read_only else 'rw'}"

    def check(self) -> None:
        """BadFileError, one sentence, if there is no such folder, or we may not read (and change) it."""
        path = Path(self.host)
        try:
            if not path.exists():
                raise BadFileError(f"the folder {self.host} does not exist")
            if not path.is_dir():
                raise BadFileError(f"{self.host} is not a folder, so it cannot be shared")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadFileError(f"the folder {self.host} cannot be shared: {reason}") from None
        if not os.access(path, os.R_OK | os.X_OK):
            raise BadFileError(f"the folder {self.host} cannot be shared: permission denied")


def start_share(share: Share) -> tuple[socket.socket, Helper]:
    """A process that serves the folder, and the stream of FUSE messages to it: closing that ends it.

    BadFileError if the folder cannot be opened; TransientError if there can be no process.
    """
    share.check()
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            for end in (ours, theirs):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
            work = {"folder": share.host, "read_only": share.read_only, "link": theirs.fileno()}
            helper = start_helper("nonroot.backends.share_server", work, [theirs.fileno()])
    except BaseException:
        ours.close()
        raise
    return ours, helper
