"""The network backend as a device of XenStore: negotiation; who serves a connected card is another matter."""

import random
import re
from collections.abc import Callable
from dataclasses import asdict

from nonroot.backends.data_path import CardPath
from nonroot.backends.direct import DirectCard, can_be_direct, serve_card
from nonroot.backends.link import Link
from nonroot.backends.netback import NetConnection, Offloads
from nonroot.backends.supervisor import BackendProcess, Served
from nonroot.backends.xenbus import BackendDevice, BadFrontendError, Store, create_device, number
from nonroot.errors import BadOptionError
from nonroot.xen.backend import FrontendAccess
from nonroot.xen.host import XenHost

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
        process: BackendProcess | None = None,
    ) -> None:
        """``post``: has a callable called in the store's thread. ``process``: moves the packets, else a thread here."""
        super().__init__(store, path, access)
        self.link = link
        self._post = post
        self._process = process
        self._path: CardPath | None = None
        self._served: Served | None = None
        self._direct: DirectCard | None = None

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
        offloads = Offloads(
            scatter_gather=self.front_flag("feature-sg"),
            gso_tcp4=self.front_flag("feature-gso-tcpv4"),
            gso_tcp6=self.front_flag("feature-gso-tcpv6"),
            checksum=not self.front_flag("feature-no-csum-offload"),
            checksum6=self.front_flag("feature-ipv6-csum-offload"),
        )
        name = f"vif{self.path.rsplit('/', 1)[1]}"
        if self._process is not None:
            direct = can_be_direct(self.access) and all(asdict(offloads).values())
            facts = {"tx": tx_ref, "rx": rx_ref, "offloads": asdict(offloads), "standby": direct}
            # With one channel both rings' events are that one's.
            served = self._served = Served(name, {"op": "card", **facts}, [self.link.fileno()], self._failed, 2)
            served.lend(direct)
            self.serve(self._process, served, ports)
            if direct and isinstance(self.access, XenHost):
                link = self.link.fileno()
                self._direct = serve_card(self.access, self.map_ring, ports, tx_ref, rx_ref, link, served.journal)
                if self._direct is None:
                    served.lend(to_engine=False)
                    served.wake()
            return {}
        tx_page, rx_page = self.map_ring([tx_ref, rx_ref])
        self._path = CardPath(
            name,
            tx_page,
            rx_page,
            self.access.grants,
            self.link,
            lambda: self.ports[0].notify(),
            lambda: self.ports[-1].notify(),
            offloads,
            failed=self._failed,
        )
        for port in ports:
            self.bind(port, self._path.thread.wake)
        self._path.thread.start()
        return {}

    @property
    def connection(self) -> NetConnection | None:
        """The data path, if it is in this process."""
        return None if self._path is None else self._path.connection

    def _failed(self, reason: str) -> None:
        self._post(lambda: self.fail(reason))

    def disconnect(self) -> None:
        """Stop; the link stays, for the next frontend."""
        if self._direct is not None:
            self._direct.stop()
            self._direct = None
        if self._path is not None:
            self._path.stop()
            self._path = None
        if self._served is not None and self._process is not None:
            self._process.stop(self._served)
            self._served = None

    def release(self) -> None:
        """Close the link: what is at its other end ends, too."""
        self.link.close()
