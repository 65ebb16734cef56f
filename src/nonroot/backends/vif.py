"""The network backend as a device of XenStore: negotiation, and the thread that serves a connected card."""

import random
import re
from collections.abc import Callable

from nonroot.backends.device_thread import DeviceThread
from nonroot.backends.link import Link
from nonroot.backends.netback import NetConnection, Offloads
from nonroot.backends.netif import (
    RX_REQUEST_BYTES,
    RX_RESPONSE_BYTES,
    TX_REQUEST_BYTES,
    TX_RESPONSE_BYTES,
)
from nonroot.backends.ring import BackRing
from nonroot.backends.xenbus import BackendDevice, BadFrontendError, Store, create_device, number
from nonroot.errors import BadOptionError
from nonroot.xen.backend import FrontendAccess

__all__ = ["NetDevice", "check_mac", "create_vif", "random_mac"]

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def check_mac(text: str) -> str:
    """A card's address, in lower case. BadOptionError."""
    mac = text.lower()
    if not _MAC.fullmatch(mac) or int(mac[:2], 16) & 1:
        raise BadOptionError(f"{text[:40]!r} is no address of a network card: use 00:16:3e:12:34:56, for example")
    return mac


def random_mac(chance: random.Random) -> str:
    """An address out of Xen's range, 00:16:3e."""
    return "00:16:3e:" + ":".join(f"{byte:02x}" for byte in chance.randbytes(3))


def create_vif(store: Store, domid: int, index: int, mac: str) -> str:
    """The folders of network card number ``index``; the backend's path."""
    common = {"handle": str(index), "mac": check_mac(mac)}
    return create_device(store, "vif", domid, index, common, {**common, "hotplug-status": "connected"})


class NetDevice(BackendDevice):
    """A network card. The link is its own from now on."""

    def __init__(
        self,
        store: Store,
        path: str,
        access: FrontendAccess,
        link: Link,
        *,
        post: Callable[[Callable[[], object]], object] = lambda call: call(),
    ) -> None:
        """``post``: has a callable called in the store's thread."""
        super().__init__(store, path, access)
        self.link = link
        self.connection: NetConnection | None = None
        self._post = post
        self._thread: DeviceThread | None = None
        self._rings: list[BackRing] = []

    def features(self) -> dict[str, str]:
        """What Linux's backend says, too, but for several queues and the control ring."""
        return {
            "feature-rx-copy": "1",
            "feature-rx-flip": "0",
            "feature-sg": "1",
            "feature-gso-tcpv4": "1",
            "feature-gso-tcpv6": "1",
            "feature-ipv6-csum-offload": "1",
            "feature-split-event-channels": "1",
            "feature-multicast-control": "1",
        }

    def connect(self) -> dict[str, str]:
        """Rings, event channels, offloads."""
        if not self.front_flag("request-rx-copy"):
            raise BadFrontendError("the frontend wants pages to be given away, and only copies are made")
        if self.front("multi-queue-num-queues") not in (None, "1"):
            raise BadFrontendError("the frontend wants several queues, and one was offered")
        tx_ref = number(self.front("tx-ring-ref"), "tx-ring-ref")
        rx_ref = number(self.front("rx-ring-ref"), "rx-ring-ref")
        single = self.front("event-channel")
        ports = [number(single, "event-channel")] if single is not None else [
            number(self.front("event-channel-tx"), "event-channel-tx"),
            number(self.front("event-channel-rx"), "event-channel-rx"),
        ]  # fmt: skip
        tx = BackRing(self.map_ring([tx_ref]), TX_REQUEST_BYTES, TX_RESPONSE_BYTES)
        self._rings.append(tx)
        rx = BackRing(self.map_ring([rx_ref]), RX_REQUEST_BYTES, RX_RESPONSE_BYTES)
        self._rings.append(rx)
        offloads = Offloads(
            scatter_gather=self.front_flag("feature-sg"),
            gso_tcp4=self.front_flag("feature-gso-tcpv4"),
            gso_tcp6=self.front_flag("feature-gso-tcpv6"),
            checksum=not self.front_flag("feature-no-csum-offload"),
            checksum6=self.front_flag("feature-ipv6-csum-offload"),
        )
        name = self.path.rsplit("/", 1)[1]
        thread = self._thread = DeviceThread(f"vif{name}", self._step, self._interest, self._failed)
        bound = [self.bind(port, thread.wake) for port in ports]
        self.connection = NetConnection(
            tx, rx, self.access.grants, self.link, bound[0].notify, bound[-1].notify, offloads
        )
        thread.start()
        return {}

    def _step(self) -> bool:
        assert self.connection is not None
        return self.connection.step()

    def _interest(self) -> list[tuple[int, int]]:
        assert self.connection is not None
        return self.connection.interest()

    def _failed(self, reason: str) -> None:
        self._post(lambda: self.fail(reason))

    def disconnect(self) -> None:
        """Stop the thread; the link stays, for the next frontend."""
        if self._thread is not None:
            self._thread.stop()
            self._thread = None
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        for ring in self._rings:
            ring.release()
        self._rings.clear()

    def release(self) -> None:
        """Close the link: what is at its other end ends, too."""
        self.link.close()
