"""The process that serves one domain's disks and network cards: ``python -m nonroot.backends.process``.

It holds the domain's memory, and nothing else but what it is given: open images, ends of links, eventfds. It makes no
files, sockets or processes. It ends when the domain's process does.

Requests (packets on the control socket; each is answered by ``{}`` or ``{"error": sentence}``):

``disk``        {"device", "abi", "refs", "persistent", "image"}, with eventfds to wake it and for the guest, a journal,
                and the image's descriptors: serve a disk whose frontend is connected
``card``        {"device", "tx", "rx", "offloads", "standby"}, with an eventfd to wake it, two for the guest, a journal,
                the link; ``standby``: the engine serves it, until the journal's page of turns says otherwise
``stop``        {"device"}: no more; answered when nothing is in use any longer
``resized``     {"device"}: the image has another size

What it says on its own (the access socket): ``keep``, ``release`` and ``touch`` with ``frames``, each of which is
answered; ``failed`` with ``device`` and ``reason``.
"""

import mmap
import os
import socket
import threading
import traceback  # noqa: F401 - what it imports could not be found later
from collections.abc import Callable, Sequence
from typing import Any

from nonroot.backends.data_path import JOURNAL_BYTES, SHARED_BYTES, TURN_OFFSET, CardPath, DiskPath
from nonroot.backends.handover import image_from
from nonroot.backends.helper import run_helper
from nonroot.backends.image import Image
from nonroot.backends.link import Link
from nonroot.backends.message import LostError, receive, send
from nonroot.backends.netback import Offloads
from nonroot.backends.pages import GuestPages, ProcessGrants
from nonroot.backends.raw import RawImage
from nonroot.backends.ring import RingError, Turn
from nonroot.confine import BACKEND, confine
from nonroot.xen.backend import GrantError
from nonroot.xen.grants import GrantTable

__all__: list[str] = []


class _Access:
    """The access socket: what the domain's process has to know."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._lock = threading.Lock()

    def tell(self, what: str, frames: Sequence[int]) -> None:
        """And wait until it is done. LostError."""
        with self._lock:
            send(self._socket, {"op": what, "frames": list(frames)})
            receive(self._socket)

    def failed(self, device: str, reason: str) -> None:
        with self._lock:
            send(self._socket, {"op": "failed", "device": device, "reason": reason})


class _Served:
    """A device: its path, and what has to be given back after it."""

    def __init__(
        self, path: DiskPath | CardPath, grants: ProcessGrants, medium: Image | Link, notify: Sequence[int]
    ) -> None:
        self.path, self.grants, self.medium = path, grants, medium
        self._notify = notify

    def start(self) -> None:
        self.path.thread.start()
        for fd in self._notify:  # whoever served before may have died before it could say so
            os.eventfd_write(fd, 1)

    def stop(self) -> None:
        self.path.stop()
        self.grants.close()
        self.medium.close()
        for fd in self._notify:
            os.close(fd)


class Service:
    """Everything that is served."""

    def __init__(self, pages: GuestPages, access: _Access) -> None:
        self._pages, self._access = pages, access
        self._table = GrantTable(pages)
        self._table.frames = self._table.maximum
        self._devices: dict[str, _Served] = {}

    def answer(self, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Do what is asked."""
        try:
            match request["op"]:
                case "disk":
                    self._disk(request, descriptors)
                case "card":
                    self._card(request, descriptors)
                case "stop":
                    if (served := self._devices.pop(request["device"], None)) is not None:
                        served.stop()
                case "resized":
                    served = self._devices.get(request["device"])
                    if served is not None and isinstance(served.medium, RawImage):
                        served.medium.look_again()
        except (RingError, GrantError, OSError) as error:
            return {"error": str(error)}
        return {}

    def _disk(self, request: dict[str, Any], descriptors: list[int]) -> None:
        device = request["device"]
        wake, notify, journal, *files = descriptors
        grants = ProcessGrants(self._pages, self._table, self._access.tell)
        turns = self._pages.memory.add_backing(journal, SHARED_BYTES)
        shared = _journal(journal)
        path = DiskPath(
            device,
            _ring(grants, request["refs"]),
            request["abi"],
            grants,
            image := image_from(request["image"], files),
            _notifier(notify),
            persistent=request["persistent"],
            failed=lambda reason: self._access.failed(device, reason),
            journal=shared,
            wake=wake,
            turn=Turn(self._pages.memory, turns, TURN_OFFSET),
        )
        served = self._devices[device] = _Served(path, grants, image, [notify])
        served.start()

    def _card(self, request: dict[str, Any], descriptors: list[int]) -> None:
        device = request["device"]
        wake, notify_tx, notify_rx, journal, link = descriptors
        turn = None
        if request["standby"]:
            turn = Turn(self._pages.memory, self._pages.memory.add_backing(journal, SHARED_BYTES), TURN_OFFSET)
        grants = ProcessGrants(self._pages, self._table, self._access.tell)
        tx_page, rx_page = _ring(grants, [request["tx"], request["rx"]])
        path = CardPath(
            device,
            tx_page,
            rx_page,
            grants,
            end := Link(socket.socket(fileno=link)),
            _notifier(notify_tx),
            _notifier(notify_rx),
            Offloads(**request["offloads"]),
            failed=lambda reason: self._access.failed(device, reason),
            journal=_journal(journal),
            wake=wake,
            turn=turn,
        )
        served = self._devices[device] = _Served(path, grants, end, [notify_tx, notify_rx])
        served.start()


def _ring(grants: ProcessGrants, references: Sequence[int]) -> list[memoryview]:
    pages: list[memoryview] = []
    try:
        pages.extend(map(grants.map, references))
    except GrantError as error:
        grants.close()
        raise GrantError(f"the frontend's ring cannot be mapped: {error}", error.status) from None
    return pages


def _notifier(fd: int) -> Callable[[], object]:
    return lambda: os.eventfd_write(fd, 1)


def _journal(fd: int) -> memoryview:
    try:
        return memoryview(mmap.mmap(fd, JOURNAL_BYTES))
    finally:
        os.close(fd)


def _main(work: dict[str, Any], ready: Callable[[dict[str, Any]], None]) -> None:
    pages = GuestPages(work["memory"])
    control = socket.socket(fileno=work["control"])
    service = Service(pages, _Access(socket.socket(fileno=work["access"])))
    os.chdir("/")
    ready(confine(BACKEND).facts())
    try:
        while True:
            request, descriptors = receive(control)
            send(control, service.answer(request, descriptors))
    except LostError:
        os._exit(0)


if __name__ == "__main__":
    run_helper(_main)
