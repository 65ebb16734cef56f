"""xl's network interfaces: ``[mac=…,][bridge=…,]…``, and the networks that they mean."""

import random
from typing import Final

from nonroot.backends.vif import random_mac
from nonroot.domain.networks import USER, Network
from nonroot.errors import BadOptionError, UnsupportedError

__all__ = ["parse_vif", "with_mac"]

_WITHOUT_EFFECT: Final = ("vifname", "script", "model", "accel")
"""What a Xen of hardware does on the host's side, or would emulate."""


def parse_vif(text: str) -> str:
    """
    One entry of ``vif = [...]``, as text that :class:`nonroot.domain.networks.Network` parses.

    A bridge is a private network of that name; without one the guest gets the user's view of the network.
    BadOptionError, UnsupportedError.

    >>> parse_vif("mac=00:16:3e:00:00:01,bridge=lan")
    'lan,mac=00:16:3e:00:00:01'
    >>> parse_vif("")
    'user'
    """
    what = f"the network interface {text[:80]!r}"
    network, options = USER, []
    for word in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = word.partition("=")
        if not equals:
            raise BadOptionError(f"{what}: {word[:40]!r} is no key=value")
        if key == "bridge":
            if value == USER:
                raise BadOptionError(
                    f"{what}: a private network cannot be named {USER}; without bridge it is the user's"
                )
            network = value
        elif key == "mac":
            options.append(f"mac={value}")
        elif key == "type":
            if value != "vif":
                raise UnsupportedError(f"{what}: nonroot emulates no network cards; leave type out, or say type=vif")
        elif key == "backend":
            if value not in ("0", "Domain-0"):
                raise UnsupportedError(f"{what}: nonroot has no driver domains")
        elif key not in _WITHOUT_EFFECT:
            others = ", ".join(_WITHOUT_EFFECT)
            raise UnsupportedError(
                f"{what}: {key[:40]!r} is not supported; there are: mac, bridge; without effect: {others}"
            )
    found = ",".join([network, *options])
    Network.parse(found)
    return found


def with_mac(text: str) -> str:
    """The same network, with an address for its card if it says none: the card has it for good then.

    >>> with_mac("user,mac=00:16:3e:00:00:01")
    'user,mac=00:16:3e:00:00:01'
    """
    if Network.parse(text).mac is not None:
        return text
    return f"{text},mac={random_mac(random.SystemRandom())}"
