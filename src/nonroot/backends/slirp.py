"""User-mode networking: a process that holds libslirp, confined to sockets, at one end of a link.

The guest finds a DHCP server, a gateway and a name server at its network's addresses .2 and .3; what it connects to is
reached by ordinary sockets of this process, so the guest has the user's view of the network and no more. This machine's
own 127.0.0.1 is out of its reach unless ``host_loopback`` says otherwise.
"""

import contextlib
import errno
import ipaddress
import os
import re
import select
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from nonroot.backends.frame import Merger, complete
from nonroot.backends.helper import Helper, run_helper, start_helper
from nonroot.backends.link import Link, LinkClosedError, link_pair
from nonroot.backends.slirp_library import SlirpStack, load
from nonroot.confine import NETWORK, confine
from nonroot.errors import BadOptionError

__all__ = ["Forward", "UserNetwork", "serve", "start_user_network"]

BURST: Final = 64
"""Frames of the guest taken in one round."""

_FORWARD: Final = re.compile(r"(?:(?P<host>[0-9.]+):)?(?P<outer>\d{1,5}):(?P<inner>\d{1,5})(?:/(?P<kind>tcp|udp))?")


@dataclass(frozen=True, slots=True)
class Forward:
    """A port of this machine that leads to a port of the guest."""

    host: str
    """The address of this machine that listens."""
    host_port: int
    guest_port: int
    udp: bool = False

    @classmethod
    def parse(cls, text: str) -> "Forward":
        """``[ADDRESS:]PORT:GUEST-PORT[/udp]``; without an address, 127.0.0.1. BadOptionError.

        >>> Forward.parse("127.0.0.1:2222:22")
        Forward(host='127.0.0.1', host_port=2222, guest_port=22, udp=False)
        """
        found = _FORWARD.fullmatch(text)
        try:
            if found is None:
                raise ValueError
            host = str(ipaddress.IPv4Address(found["host"] or "127.0.0.1"))
            outer, inner = int(found["outer"]), int(found["inner"])
            if not 1 <= outer <= 65535 or not 1 <= inner <= 65535:
                raise ValueError
        except ValueError:
            raise BadOptionError(
                f"{text!r} publishes no port: use [ADDRESS:]PORT:GUEST-PORT[/udp], for example 127.0.0.1:2222:22"
            ) from None
        return cls(host, outer, inner, found["kind"] == "udp")

    def __str__(self) -> str:
        return f"{self.host}:{self.host_port}:{self.guest_port}" + ("/udp" if self.udp else "")


@dataclass(frozen=True, slots=True)
class UserNetwork:
    """What a guest's network is like."""

    network: str = "10.0.2.0/24"
    publish: Sequence[Forward] = ()
    host_loopback: bool = False
    """Whether the gateway's address reaches this machine's 127.0.0.1: for tests."""
    outside: bool = True
    """Whether the guest can reach anything but the published ports' users."""
    mtu: int = 1500
    hostname: str = ""
    """The name that DHCP gives to the guest."""

    def work(self) -> dict[str, Any]:
        """For the process."""
        return {
            "network": self.network,
            "publish": [str(forward) for forward in self.publish],
            "host_loopback": self.host_loopback,
            "outside": self.outside,
            "mtu": self.mtu,
            "hostname": self.hostname,
        }


def start_user_network(network: UserNetwork) -> tuple[socket.socket, Helper]:
    """A process that serves ``network``, and the link's other end: closing that ends it.

    SoftwareMissingError without libslirp; BadOptionError for ports that cannot be had.
    """
    ours, theirs = link_pair()
    try:
        with theirs:
            helper = start_helper(
                "nonroot.backends.slirp", {**network.work(), "link": theirs.fileno()}, [theirs.fileno()]
            )
    except BaseException:
        ours.close()
        raise
    return ours, helper


def serve(
    make_stack: Callable[[Callable[[bytes], object]], SlirpStack], link: Link, publish: Sequence[Forward]
) -> Callable[[], None]:
    """A stack at the end of ``link``, its ports published; what comes back serves until the link is closed."""
    merger = Merger()

    def send(data: bytes) -> None:
        for frame in merger.add(data):
            link.send(frame)

    stack = make_stack(send)
    for forward in publish:
        error = stack.publish(forward.udp, ipaddress.IPv4Address(forward.host), forward.host_port, forward.guest_port)
        if error is not None:
            stack.close()
            if error.errno == errno.EACCES:
                reason = "ports below 1024 are for root"
            else:
                reason = os.strerror(error.errno or errno.EADDRINUSE).lower()
            raise BadOptionError(f"port {forward.host_port} of {forward.host} cannot be published: {reason}")

    def loop() -> None:
        waiting = _Waiting()
        try:
            while True:
                _round(stack, link, merger, waiting)
        except LinkClosedError:
            stack.close()
            link.close()

    return loop


class _Waiting:
    """poll(2) for descriptors that are mostly the same ones from round to round."""

    def __init__(self) -> None:
        self._known: list[tuple[int, int]] = []
        self._poller = select.poll()

    def wait(self, interest: list[tuple[int, int]], seconds: float | None) -> dict[int, int]:
        """What happened to the descriptors, of (descriptor, events)."""
        if interest != self._known:
            self._known = interest
            self._poller = select.poll()
            for fd, events in interest:
                self._poller.register(fd, events)
        return dict(self._poller.poll(None if seconds is None else seconds * 1000 + 1))


def _round(stack: SlirpStack, link: Link, merger: Merger, waiting: _Waiting) -> None:
    interest, wait = stack.interest()
    # While the guest does not take what it has, its peers have to wait: their data stays in the kernel.
    if link.busy:
        watched = [(link.fileno(), select.POLLIN | select.POLLOUT)]
    else:
        watched = [*interest, (link.fileno(), int(select.POLLIN))]
    happened = waiting.wait(watched, wait)
    link_events = happened.pop(link.fileno(), 0)
    if link_events & select.POLLOUT:
        link.drain()
    if link_events & ~select.POLLOUT:
        for _ in range(BURST):
            frame = link.receive_frame()
            if frame is None:
                break
            # libslirp takes superframes as they are.
            stack.input(complete(frame).data)
    stack.poll(happened)
    for frame in merger.flush():
        link.send(frame)


def _main(work: dict[str, Any], ready: Callable[[dict[str, Any]], None]) -> None:
    library = load()
    link = Link(socket.socket(fileno=work["link"]))

    def make(send: Callable[[bytes], object]) -> SlirpStack:
        return SlirpStack(
            library,
            send,
            network=ipaddress.IPv4Network(work["network"]),
            host_loopback=work["host_loopback"],
            outside=work["outside"],
            mtu=work["mtu"],
            hostname=work["hostname"],
        )

    loop = serve(make, link, [Forward.parse(text) for text in work["publish"]])
    with contextlib.suppress(OSError):
        os.chdir("/")
    ready(confine(NETWORK, ["/etc/resolv.conf"]).facts())
    loop()


if __name__ == "__main__":
    run_helper(_main)
