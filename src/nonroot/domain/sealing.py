"""A domain's process that gives up everything but its domain, before the guest's first instruction.

What it has then are the descriptors it was given, memory, and threads: no files but Python's own to read, no sockets,
no programs. Two things that a domain needs of its host afterwards come from its client: a file to be saved into comes
with the request, and connections to XenStore's process come from the client's
:class:`~nonroot.domain.concierge.Concierge`, which gives away these and nothing else, whoever asks.
"""

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nonroot import _engine
from nonroot.confine import DOMAIN, Confinement, confine

if TYPE_CHECKING:
    from nonroot.domain.options import DomainOptions

__all__ = ["SEALED", "can_be_sealed", "connector", "seal"]

SEALED: Final = "its process was sealed when it started"
"""Begins the sentence that refuses what would take the host's files or other processes."""
ANSWER_SECONDS: Final = 30.0
MARGIN: Final = 4 << 30
"""Bytes of address space beyond three times the guest's memory: translated code, threads, saving."""


def can_be_sealed(options: "DomainOptions") -> bool:
    """Whether the domain's process needs nothing of the host while it runs.

    Disks, cards, shared folders and a screen's VNC server are served by processes that the domain's starts.
    """
    others = (
        options.disks or options.cdroms or options.floppies or options.networks or options.publish or options.shares
    )
    return options.agent and options.firmware is None and not others and not options.has_display


def seal(memory: int) -> Confinement:
    """Confine this process, whose guest has so many bytes of memory. Threads that run already are the caller's to look
    after: they get the limits and the filter, but keep what files they can reach.
    """
    with contextlib.suppress(OSError):  # then saving and forking will fail, with a sentence
        _engine.open_page_map()
    folders = {os.path.dirname(os.__file__), os.fspath(Path(__file__).resolve().parents[1])}  # noqa: PTH120
    folders |= {path for path in sys.path if path.endswith(("-packages", "lib-dynload"))}
    return confine(DOMAIN, sorted(folders), memory=3 * memory + MARGIN, all_threads=True)


def connector(concierge: socket.socket) -> Callable[[], socket.socket | None]:
    """How XenStore is reached from now on. Any thread."""
    lock = threading.Lock()
    concierge.settimeout(ANSWER_SECONDS)

    def connect() -> socket.socket | None:
        with lock:
            concierge.send(b"xenstore")
            _, fds, _, _ = socket.recv_fds(concierge, 16, 1)
        return socket.socket(fileno=fds[0]) if fds else None

    return connect
