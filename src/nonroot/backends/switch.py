"""Networks between domains: a learning switch, one process a network, whose ports are links.

Domains that name the same network meet in one process; the first one starts it, and it ends when the last has gone. A
frame goes where its destination was last seen, or to everybody. Superframes and checksums that are still blank pass as
they are: both ends are on this machine. A port whose domain does not take its frames loses them; the others do not
notice.
"""

import contextlib
import fcntl
import os
import re
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from nonroot.backends.frame import Frame, FrameError
from nonroot.backends.helper import run_helper, start_helper
from nonroot.backends.link import Link, LinkClosedError
from nonroot.confine import SWITCH, confine
from nonroot.errors import BadOptionError, TransientError

__all__ = ["Switch", "join_network"]

LINGER_SECONDS: Final = 2.0
"""How long a network without ports stays."""
ADDRESSES_PER_PORT: Final = 64
MOST_PORTS: Final = 256
BURST: Final = 32
"""Frames taken from one port before the others have their turn."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,30}")


class Switch:
    """Where frames go. Pure but for the links that it is given."""

    def __init__(self) -> None:
        self.ports: dict[int, Link] = {}
        self._where: dict[bytes, int] = {}
        self._learned: dict[int, dict[bytes, None]] = {}
        self._next = 1

    def add(self, link: Link) -> int:
        """A new port; its number."""
        number = self._next
        self._next += 1
        self.ports[number] = link
        self._learned[number] = {}
        return number

    def remove(self, number: int) -> None:
        """A port that is gone."""
        for address in self._learned.pop(number, {}):
            if self._where.get(address) == number:
                del self._where[address]
        link = self.ports.pop(number, None)
        if link is not None:
            link.close()

    def forward(self, number: int, message: bytes) -> None:
        """A message that came from port ``number``. What is no frame is dropped."""
        try:
            frame = Frame.unpack(message)
        except FrameError:
            self.ports[number].malformed += 1
            return
        destination, source = frame.data[:6], frame.data[6:12]
        if not source[0] & 1 and source != bytes(6):
            self._learn(number, source)
        to = None if destination[0] & 1 else self._where.get(destination)
        targets = [to] if to is not None else [port for port in self.ports if port != number]
        if to == number:
            return
        for port in targets:
            try:
                self.ports[port].send_message(message)
            except LinkClosedError:
                continue  # its own turn will notice

    def _learn(self, number: int, source: bytes) -> None:
        mine = self._learned[number]
        if self._where.get(source) == number:
            return
        self._where[source] = number
        mine[source] = None
        if len(mine) > ADDRESSES_PER_PORT:
            oldest = next(iter(mine))
            del mine[oldest]
            if self._where.get(oldest) == number:
                del self._where[oldest]

    def serve_port(self, number: int) -> None:
        """Take a burst of frames of a port; a closed one is removed."""
        link = self.ports[number]
        try:
            for _ in range(BURST):
                message = link.receive()
                if message is None:
                    return
                self.forward(number, message)
        except LinkClosedError:
            self.remove(number)


def join_network(folder: Path, name: str, linger: float = LINGER_SECONDS) -> socket.socket:
    """
    The link of a new port of network ``name``; the switch is started if there is none.

    ``folder``: the user's private one for running domains; ``linger``: seconds that a new switch stays without ports.
    BadOptionError for a name that cannot be; TransientError.
    """
    if not _NAME.fullmatch(name):
        raise BadOptionError(
            f"{name[:60]!r} is no name for a network: use up to 31 letters and digits, and '.', '_', '-' inside"
        )
    path = folder / f"{name}.switch"
    with _locked(folder / f"{name}.switch-lock"):
        for attempt in (1, 2):
            port = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                port.connect(os.fspath(path))
            except (FileNotFoundError, ConnectionRefusedError):
                port.close()
                if attempt == 1:
                    _start(path, linger)
            except OSError as error:
                port.close()
                raise TransientError(f"the network {name} cannot be joined: {error.strerror or error}") from None
            else:
                return port
    raise TransientError(f"the network {name}'s switch has ended as soon as it was started")


def _start(path: Path, linger: float) -> None:
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        mask = os.umask(0o177)
        try:
            listener.bind(os.fspath(path))
        finally:
            os.umask(mask)
        listener.listen(64)
        lock = os.open(path.with_suffix(".switch-lock"), os.O_RDWR | os.O_CLOEXEC)  # an open file of its own
        try:
            work = {"listener": listener.fileno(), "lock": lock, "linger": linger}
            start_helper("nonroot.backends.switch", work, [listener.fileno(), lock]).close()
        finally:
            os.close(lock)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def run(listener: socket.socket, empty: Callable[[], bool], linger: float = LINGER_SECONDS) -> None:
    """Serve until there has been no port for ``linger`` seconds and ``empty()`` agrees."""
    switch = Switch()
    listener.setblocking(False)
    since = time.monotonic()
    while True:
        poller = select.poll()
        if len(switch.ports) < MOST_PORTS:
            poller.register(listener, select.POLLIN)
        by_fd = {}
        for number, link in switch.ports.items():
            by_fd[link.fileno()] = number
            poller.register(link, select.POLLIN | (select.POLLOUT if link.busy else 0))
        for fd, events in poller.poll(None if switch.ports else linger * 1000):
            if fd == listener.fileno():
                with contextlib.suppress(OSError):
                    switch.add(Link(listener.accept()[0]))
                continue
            number = by_fd[fd]
            if number not in switch.ports:
                continue
            if events & select.POLLOUT:
                try:
                    switch.ports[number].drain()
                except LinkClosedError:
                    switch.remove(number)
                    continue
            if events & ~select.POLLOUT:
                switch.serve_port(number)
        if switch.ports:
            since = time.monotonic()
        elif time.monotonic() - since >= linger and empty():
            return


def _main(work: dict[str, Any], ready: Callable[[dict[str, Any]], None]) -> None:
    listener = socket.socket(fileno=work["listener"])
    lock = int(work["lock"])

    def empty() -> bool:
        """Whether nobody is joining; from then on, nobody can before this process has ended."""
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        poller = select.poll()
        poller.register(listener, select.POLLIN)
        if poller.poll(0):
            fcntl.flock(lock, fcntl.LOCK_UN)
            return False
        return True

    if os.fork():
        os._exit(0)  # the switch outlives whoever was first: it is nobody's child
    os.chdir("/")
    ready(confine(SWITCH).facts())
    run(listener, empty, work["linger"])


if __name__ == "__main__":
    run_helper(_main)
