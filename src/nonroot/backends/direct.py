"""Devices whose requests are done at once, in the engine, where that waits for nothing.

A backend process costs each request the time in which two threads are woken. Where nothing has to be waited for (the
host has what is read in its page cache, and takes what is written there), the vCPU's own thread does a request sooner
than it would tell somebody else of it. The engine does that for requests that are plainly right; all others are the
process's, which alone refuses anything. The two take turns (:class:`nonroot.backends.ring.Turn`).
"""

import os
from collections.abc import Callable, Sequence

from nonroot.backends.blkif import SECTOR
from nonroot.backends.data_path import TURN_OFFSET
from nonroot.backends.raw import RawImage
from nonroot.xen.backend import FrontendAccess
from nonroot.xen.grants import ENTRIES
from nonroot.xen.host import XenHost
from nonroot.xen.memory import FIRST_GRANT, GRANT_FRAMES

__all__ = ["DirectCard", "DirectDisk", "can_be_direct", "serve_card", "serve_disk"]


def can_be_direct(access: FrontendAccess) -> bool:
    """Whether the domain's engine can serve devices."""
    return isinstance(access, XenHost) and access.path is not None


class DirectDisk:
    """A disk that is served so; see :func:`serve_disk`."""

    def __init__(self, host: XenHost, port: int) -> None:
        self._host, self._port = host, port

    def resized(self, image: RawImage) -> None:
        """The image has another size."""
        if self._host.path is not None:
            self._host.path.resize_disk(self._port, _end(image))

    def stop(self) -> None:
        """The process does everything; when this returns, nothing of the disk is in use here."""
        if self._host.path is not None:
            self._host.path.remove(self._port)


class DirectCard:
    """A card that is served so; see :func:`serve_card`."""

    def __init__(self, host: XenHost, ports: Sequence[int]) -> None:
        self._host, self._ports = host, ports

    def stop(self) -> None:
        """When this returns, nothing of the card is in use here."""
        for port in self._ports:
            if self._host.path is not None:
                self._host.path.remove(port)


def _grant_table(host: XenHost) -> tuple[int, int, int]:
    table = host.physmap.own(FIRST_GRANT)
    return table.backing, table.offset, GRANT_FRAMES * ENTRIES


def serve_card(
    host: XenHost,
    map_ring: Callable[[list[int]], object],
    ports: Sequence[int],
    tx: int,
    rx: int,
    link: int,
    shared: int,
) -> DirectCard | None:
    """
    Have a connected card's packets moved by the engine. None if it does not do that.

    ``ports``: one, or those of ``tx`` and ``rx``, which are the rings' grants: ``map_ring`` maps them here for as long
    as the card is connected. ``shared``: the file with the turns, which say that the engine has it.
    """
    path = host.path
    if path is None:
        return None
    map_ring([tx, rx])
    tx_place, rx_place = host.grants.place(tx), host.grants.place(rx)
    alarm = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        numbers = (ports[0], ports[-1])
        added = path.add_card(numbers, tx_place, rx_place, (shared, TURN_OFFSET), _grant_table(host), link, alarm)
    finally:
        os.close(alarm)
    return DirectCard(host, ports) if added else None


def _end(image: RawImage) -> int:
    """Bytes that are in the file: its last sector may not be there as a whole."""
    return image.size if image.descriptor(0, image.size) is not None else image.size - SECTOR


def serve_disk(
    host: XenHost,
    map_ring: Callable[[list[int]], object],
    port: int,
    references: Sequence[int],
    abi: str,
    image: RawImage,
    shared: int,
) -> DirectDisk | None:
    """
    Have a connected disk's requests done at once where that can be. None if the engine does not do that.

    ``map_ring`` maps the ring's pages here for as long as the disk is connected; ``shared``: the file with the turns.
    """
    path, descriptor = host.path, image.descriptor(0, 0)
    if path is None or descriptor is None:
        return None
    map_ring(list(references))
    pages = [(place.backing, place.offset) for place in map(host.grants.place, references)]
    grants = _grant_table(host)
    long = abi == "x86_64-abi"
    added = path.add_disk(
        port, pages, long, (shared, TURN_OFFSET), grants, descriptor, _end(image), not image.read_only
    )
    return DirectDisk(host, port) if added else None
