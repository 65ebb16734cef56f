"""The data paths of connected devices, each with its thread: in the domain's process, or in a backend process."""

from collections.abc import Callable, Sequence
from typing import Final

from nonroot.backends.blkback import BlockConnection
from nonroot.backends.blkif import ABIS
from nonroot.backends.device_thread import DeviceThread
from nonroot.backends.image import Image
from nonroot.backends.link import Link
from nonroot.backends.netback import NetConnection, Offloads
from nonroot.backends.netif import RX_REQUEST_BYTES, RX_RESPONSE_BYTES, TX_REQUEST_BYTES, TX_RESPONSE_BYTES
from nonroot.backends.ring import BackRing, Turn, journal_bytes
from nonroot.xen.backend import GrantAccess

__all__ = ["JOURNAL_BYTES", "SHARED_BYTES", "TURN_OFFSET", "CardPath", "DiskPath"]

MOST_RING_PAGES: Final = 4
JOURNAL_BYTES: Final = 2 * journal_bytes(MOST_RING_PAGES)
"""Bytes of a device's journal: room for two rings."""
TURN_OFFSET: Final = -(-JOURNAL_BYTES // 4096) * 4096
"""Where the page with the rings' turns is, behind the journal."""
SHARED_BYTES: Final = TURN_OFFSET + 4096
"""Bytes of the file that holds both."""

Notify = Callable[[], object]


class DiskPath:
    """A disk's ring, served."""

    def __init__(
        self,
        name: str,
        pages: Sequence[memoryview],
        abi: str,
        grants: GrantAccess,
        image: Image,
        notify: Notify,
        *,
        persistent: bool,
        failed: Callable[[str], object],
        journal: memoryview | None = None,
        wake: int | None = None,
        turn: Turn | None = None,
    ) -> None:
        """
        RingError. ``abi``: the name of one of the layouts; ``wake``: an eventfd, the path's from now on; ``turn``: says
        when the ring is ours, if we share it; it is until the thread starts.
        """
        layout = ABIS[abi]
        part = None if journal is None else journal[: JOURNAL_BYTES // 2]
        self.ring = BackRing(pages, layout.request_bytes, layout.response_bytes, part, turn)
        self.connection = BlockConnection(self.ring, layout, grants, image, notify, persistent)
        step = self.connection.step if turn is None else lambda: self.ring.in_turn(self.connection.step)
        self.thread = DeviceThread(name, step, failed=failed, wake=wake)

    def stop(self) -> None:
        """End after the requests that are being done; what was mapped for them is given back."""
        self.thread.stop()
        self.connection.close()
        self.ring.release()


class CardPath:
    """A card's rings, served."""

    def __init__(
        self,
        name: str,
        tx_page: memoryview,
        rx_page: memoryview,
        grants: GrantAccess,
        link: Link,
        notify_tx: Notify,
        notify_rx: Notify,
        offloads: Offloads,
        *,
        failed: Callable[[str], object],
        journal: memoryview | None = None,
        wake: int | None = None,
        turn: Turn | None = None,
    ) -> None:
        """RingError. ``turn``: says when the rings are ours, for good, if the engine serves them first."""
        half = JOURNAL_BYTES // 2
        tx_part, rx_part = (None, None) if journal is None else (journal[:half], journal[half : 2 * half])
        self._turn = turn
        standby = turn is not None
        self.tx = BackRing([tx_page], TX_REQUEST_BYTES, TX_RESPONSE_BYTES, tx_part, standby=standby)
        self.rx = BackRing([rx_page], RX_REQUEST_BYTES, RX_RESPONSE_BYTES, rx_part, standby=standby)
        self.connection = NetConnection(self.tx, self.rx, grants, link, notify_tx, notify_rx, offloads)
        self.thread = DeviceThread(name, self._step, self._interest, failed, wake)

    def _interest(self) -> list[tuple[int, int]]:
        return [] if self._turn is not None else self.connection.interest()

    def _step(self) -> bool:
        if self._turn is not None:
            if self._turn.is_lent:
                return False
            self._turn = None
            self.tx.resume()
            self.rx.resume()
        return self.connection.step()

    def stop(self) -> None:
        """End; the link stays open."""
        self.thread.stop()
        self.connection.close()
        self.tx.release()
        self.rx.release()
