"""The shared folders of a domain: what its options say of them, their devices, and how the guest mounts them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nonroot.errors import BadOptionError

if TYPE_CHECKING:  # most domains have none
    import socket

    from nonroot.backends.helper import Helper
    from nonroot.backends.share import Share
    from nonroot.backends.share_service import ShareService
    from nonroot.hvm.pc import Board

__all__ = ["SHARE_MODULES", "Shares", "parse_shares", "setup_lines", "share_tag"]

SHARE_MODULES = ("virtio_pci", "virtiofs")
"""Modules that Debian's kernels have for it."""

_FUNCTION = """\
share() { # TAG FOLDER OPTIONS
    if ! grep -qw virtiofs /proc/filesystems; then
        echo "the guest's kernel has no virtio-fs, so it has no shared folder $2"
        return
    fi
    mkdir -p "$2"
    complaint=$(mount -t virtiofs -o "$3" "$1" "$2" 2>&1) ||
        echo "the guest cannot mount the shared folder $2: ${complaint##*: }"
}"""


def parse_shares(texts: Sequence[str]) -> list[Share]:
    """The shares of a domain. BadOptionError, BadFileError, one sentence."""
    if not texts:
        return []
    from nonroot.backends.share import Share
    from nonroot.devices.virtio_fs import MOST_SHARES

    shares = [Share.parse(text) for text in texts]
    if len(shares) > MOST_SHARES:
        raise BadOptionError(f"a domain has at most {MOST_SHARES} shared folders, not {len(shares)}")
    places = [share.guest for share in shares]
    for place in places:
        if places.count(place) > 1:
            raise BadOptionError(f"two shared folders have the same place in the guest: {place}")
    for share in shares:
        share.check()
    return shares


def share_tag(number: int) -> str:
    """The name by which a guest mounts share ``number``: ``mount -t virtiofs share0 /mnt``.

    >>> share_tag(0)
    'share0'
    """
    return f"share{number}"


def setup_lines(shares: Sequence[Share]) -> list[str]:
    """Lines of a guest's script that mount the shares, those above others first."""
    numbered = sorted(enumerate(shares), key=lambda pair: pair[1].guest.count("/"))
    calls = [
        f"share {share_tag(number)} {shlex.quote(share.guest)} nodev,{'ro' if share.read_only else 'rw'}"
        for number, share in numbered
    ]
    return [_FUNCTION, *calls] if calls else []


class Shares:
    """Starts a process for each share when it is made."""

    def __init__(self, shares: Sequence[Share]) -> None:
        """BadFileError for the first folder that cannot be opened; TransientError."""
        self._links: list[socket.socket] = []
        self._helpers: list[Helper] = []
        self.services: list[ShareService] = []
        """Of the devices, once attached."""
        if not shares:
            return
        from nonroot.backends.share import start_share

        try:
            for share in shares:
                link, helper = start_share(share)
                self._links.append(link)
                self._helpers.append(helper)
        except BaseException:
            self.close()
            raise

    @property
    def wanted(self) -> bool:
        """Whether there are any."""
        return bool(self._helpers)

    def processes(self) -> list[int]:
        """The servers' process ids."""
        return [helper.pid for helper in self._helpers]

    def attach(self, board: Board) -> None:
        """Put the devices onto the board. In the thread that makes the machine."""
        from nonroot.backends.share_service import ShareService
        from nonroot.devices.virtio_fs import attach_share

        while self._links:
            number = len(self.services)
            device = attach_share(board, number, share_tag(number))
            service = ShareService(self._links.pop(0), board.post, device.interrupt, device.fail)
            self.services.append(service)
            device.backend = service

    def close(self) -> None:
        """The domain is over; no server is left. Safe to call again."""
        for service in self.services:
            service.close()
        for link in self._links:
            link.close()
        self._links.clear()
        helpers, self._helpers = self._helpers, []
        for helper in helpers:
            helper.close()
