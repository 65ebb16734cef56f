"""Devices whose requests are done at once, in the engine, where that waits for nothing.

A backend process costs each request the time in which two threads are woken. Where nothing has to be waited for (the
host has what is read in its page cache, and takes what is written there), the vCPU's own thread does a request sooner
than it would tell somebody else of it. The engine does that for requests that are plainly right; all others are the
process's, which alone refuses anything. The two take turns (:class:`nonroot.backends.ring.Turn`).
"""

from collections.abc import Callable, Sequence

from nonroot.backends.blkif import SECTOR
from nonroot.backends.data_path import TURN_OFFSET
from nonroot.backends.raw import RawImage
from nonroot.xen.grants import ENTRIES
from nonroot.xen.host import XenHost
from nonroot.xen.memory import FIRST_GRANT, GRANT_FRAMES

__all__ = ["DirectDisk", "serve_disk"]


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
    table = host.physmap.own(FIRST_GRANT)
    grants = (table.backing, table.offset, GRANT_FRAMES * ENTRIES)
    long = abi == "x86_64-abi"
    added = path.add_disk(
        port, pages, long, (shared, TURN_OFFSET), grants, descriptor, _end(image), not image.read_only
    )
    return DirectDisk(host, port) if added else None
