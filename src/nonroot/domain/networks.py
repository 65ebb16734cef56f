"""What a user says of a network card: the network that it is on, and its address."""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from nonroot.errors import BadOptionError, UnsupportedError

if TYPE_CHECKING:  # most domains have no cards
    from nonroot.backends.slirp import Forward, UserNetwork

__all__ = ["USER", "Network", "parse_networks"]

USER: Final = "user"
"""The network that is the user's own view of the world."""
RESERVED: Final = ("none", "bridge", "host", "tap", "nat", "vif")
"""No names of networks: other tools mean something by them that is not to be had without root."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")


@dataclass(frozen=True, slots=True)
class Network:
    """``NAME[,mac=MAC][,ip=ADDRESS/BITS][,isolated][,loopback]``; NAME is ``user`` or a private network's."""

    name: str
    mac: str | None = None
    """Of the card; None takes one from Xen's range."""
    publish: "tuple[Forward, ...]" = ()
    """Ports of this machine that lead into the guest."""
    ip: str | None = None
    """The guest's address on a private network, with the network's bits; for guest software of ours."""
    isolated: bool = False
    """The guest reaches nothing; only published ports lead into it."""
    loopback: bool = False
    """The gateway's address leads to this machine's 127.0.0.1."""

    def __str__(self) -> str:
        """What :meth:`parse` makes the same of, with the same published ports."""
        words = [f"mac={self.mac}"] if self.mac else []
        words += [f"ip={self.ip}"] if self.ip else []
        words += ["isolated"] if self.isolated else []
        return ",".join([self.name, *words, *(["loopback"] if self.loopback else [])])

    @property
    def is_user(self) -> bool:
        """Whether it is the user's view of the world, and no private network."""
        return self.name == USER

    @classmethod
    def parse(cls, text: str, publish: Iterable[str] = ()) -> "Network":
        """BadOptionError in one sentence for what means nothing.

        >>> Network.parse("lab,ip=10.9.0.1/24").ip
        '10.9.0.1/24'
        """
        name, *words = text.split(",")
        if not _NAME.fullmatch(name):
            raise BadOptionError(
                f"{name[:60]!r} is no network: use 'user', or a private network's name of up to 31 letters and digits, "
                "and '.', '_', '-' inside"
            )
        if name in RESERVED:
            raise UnsupportedError(
                f"there is no network {name!r}: it would need root; use 'user', or any name for a network that only "
                "domains are on"
            )
        network = cls(name, publish=_forwards(publish))
        for word in words:
            network = network._with(word)
        if network.is_user and network.ip:
            raise BadOptionError("the user's network gives addresses itself, by DHCP: leave ip out")
        if not network.is_user and (network.publish or network.isolated or network.loopback):
            raise BadOptionError(
                f"the private network {name} is of domains only: published ports, isolated and loopback need 'user'"
            )
        return network

    def _with(self, word: str) -> "Network":
        key, equals, value = word.partition("=")
        if key == "mac" and equals:
            from nonroot.backends.vif import check_mac

            return replace(self, mac=check_mac(value))
        if key == "ip" and equals:
            try:
                address = ipaddress.IPv4Interface(value)
            except ValueError:
                address = None
            if address is None or "/" not in value:
                raise BadOptionError(f"{value[:60]!r} is no address with its network's bits: use ip=10.9.0.1/24")
            return replace(self, ip=str(address))
        if word == "isolated":
            return replace(self, isolated=True)
        if word == "loopback":
            return replace(self, loopback=True)
        raise BadOptionError(
            f"{word[:60]!r} is no option of a network: use mac=MAC, ip=ADDRESS/BITS, isolated or loopback"
        )

    def user_network(self, hostname: str = "") -> "UserNetwork":
        """What the card's other end serves."""
        from nonroot.backends.slirp import UserNetwork

        return UserNetwork(
            publish=self.publish, host_loopback=self.loopback, outside=not self.isolated, hostname=hostname
        )

    def to_wire(self) -> dict[str, object]:
        """For ``network-list``."""
        return {"network": self.name, "mac": self.mac, "publish": [str(one) for one in self.publish]}


def parse_networks(texts: Iterable[str], publish: Iterable[str] = ()) -> list[Network]:
    """The cards of a domain in order. Published ports are the first user network's, which is added if there is none.

    >>> [network.name for network in parse_networks(["lab"], ["8080:80"])]
    ['lab', 'user']
    """
    networks = [Network.parse(text) for text in texts]
    ports = _forwards(publish)
    outer = [(port.host, port.host_port, port.udp) for port in ports]
    twice = next((port for port in ports if outer.count((port.host, port.host_port, port.udp)) > 1), None)
    if twice is not None:
        raise BadOptionError(f"port {twice.host_port} of {twice.host} is published twice")
    if ports:
        at = next((index for index, network in enumerate(networks) if network.is_user), None)
        if at is None:
            networks.append(Network(USER, publish=ports))
        else:
            networks[at] = replace(networks[at], publish=ports)
    return networks


def _forwards(texts: Iterable[str]) -> "tuple[Forward, ...]":
    if not texts:
        return ()
    from nonroot.backends.slirp import Forward

    return tuple(Forward.parse(text) for text in texts)
