"""The process of one domain's device model: ``python -m nonroot.stubdom.process``.

Before the guest's first instruction it makes its devices, maps the domain's memory, and is confined. Afterwards it has
the pages of I/O requests, eventfds, its disks, and a socket through which media come that somebody puts into a drive.

Messages on the socket: ``build`` {"parts"} with the descriptors of media; while it is being answered, the process asks
for ``ram`` {"name", "size"} and gets its number and descriptor. ``start`` {"firmware", "backings", "low_end"} with
descriptors of the p2m's file, of the firmware's files, of the devices' records and of each backing; requests follow at
once. It answers there, as it may not send any more. With ``resume``, it goes on where another process has died.
"""

import array  # noqa: F401 - what is imported later could not be found
import base64  # noqa: F401
import gc
import importlib
import json
import mmap
import os
import socket
import traceback  # noqa: F401
from collections.abc import Callable
from typing import Any

from nonroot._engine import IoreqPages
from nonroot.backends.helper import run_helper
from nonroot.backends.message import LostError, receive, send
from nonroot.confine import STUB, confine
from nonroot.hvm import ioreq
from nonroot.stubdom.board import Hypercalls, ModelBoard, ModelMemory
from nonroot.stubdom.records import Records
from nonroot.stubdom.serve import Model

__all__: list[str] = []

LATER = ("nonroot.devices.display", "nonroot.devices.i6300esb", "nonroot.backends.raw", "encodings.idna", "linecache")
"""Modules that are imported where they are needed: a confined process finds no more files."""


class _Target:
    """The domain, as it is built up."""

    def __init__(self, work: dict[str, Any]) -> None:
        self.control = socket.socket(fileno=work["control"])
        file, (request, reply, operations) = work["pages"], work["events"]
        self.events = (request, reply, operations)
        self.pages = IoreqPages(file, ioreq.LENGTH, work["vcpus"])
        self.area = memoryview(mmap.mmap(file, ioreq.LENGTH))
        os.close(file)
        life = self.control.fileno()
        self.hypercalls = Hypercalls(self.pages, work["domid"], request, reply, operations, life)
        self.memory = LateMemory()
        self.board = ModelBoard(
            self.hypercalls,
            self.memory,
            self.area,
            self._ram,
            lambda: self.pages.poke(request),
            work["low_end"],
        )
        self.model = Model(
            self.pages,
            self.area,
            self.board,
            self.hypercalls,
            (request, reply, life),
            lambda: receive(self.control)[1],
            work["virtual_time"],
        )
        if work["fault"] is not None:
            self.model.fault = (work["fault"][0], work["fault"][1])

    def _ram(self, name: str, size: int) -> tuple[int, int]:
        send(self.control, {"op": "ram", "name": name, "size": size})
        answer, (fd,) = receive(self.control)
        return answer["number"], fd

    def build(self) -> None:
        request, files = receive(self.control)
        answer = json.dumps(self.model.build(request["parts"], files)).encode()
        # Longer than a packet may be.
        self.area[ioreq.DATA : ioreq.DATA + len(answer)] = answer
        send(self.control, {"length": len(answer)})

    def start(self, confined: bool) -> None:
        request, (p2m, contents, kept, *files) = receive(self.control)
        length = request["firmware"]
        firmware = json.loads(os.pread(contents, length, 0)) if length else None
        runs = mmap.mmap(p2m, os.fstat(p2m).st_size, prot=mmap.PROT_READ)
        backings = list(zip(files, request["backings"], strict=True))
        memory = ModelMemory(self.hypercalls, backings, runs, request["low_end"])
        self.memory.map(memory)
        self.model.start(firmware)
        if request["keep"]:
            self._keep(memory, kept, request)
        for fd in (p2m, contents, kept, *files):
            os.close(fd)
        for name in LATER:
            importlib.import_module(name)
        gc.collect()
        gc.freeze()
        if confined:
            # Python's mappings keep a descriptor of what they map; they are not needed, and never closed after this.
            keep = [*self.events, self.control.fileno(), *self.model.descriptors()]
            self.model.confinement = confine(STUB, keep=keep).facts()

    def _keep(self, memory: ModelMemory, file: int, request: dict[str, Any]) -> None:
        model = self.model
        records = Records(memoryview(mmap.mmap(file, os.fstat(file).st_size)), self.board.board.devices)
        for place in request["unplugged"]:
            assert model.storage is not None
            model.storage.ide.unplug(place)
        model.store = memory.write_now
        if request["finish"]:  # a request whose reply is there: this is the rest of it
            model.stores.extend(records.stores())
            model.finish_stores()
        model.keep(records, request["resume"])
        memory.later = model.stores


class LateMemory:
    """The target's memory, which is mapped after the devices have been made."""

    def __init__(self) -> None:
        self._memory: ModelMemory | None = None

    def map(self, memory: ModelMemory) -> None:
        """It is there."""
        self._memory = memory

    def read(self, address: int, length: int) -> bytes:
        """See :class:`nonroot.devices.pci_device.Dma`."""
        return b"\xff" * length if self._memory is None else self._memory.read(address, length)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """The same."""
        if self._memory is not None:
            self._memory.write(address, data)

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        """The same."""
        return 0 if self._memory is None else self._memory.read_file(descriptor, offset, parts)


def _main(work: dict[str, Any], ready: Callable[[dict[str, Any]], None]) -> None:
    os.chdir("/")
    target = _Target(work)
    ready({})
    try:
        target.build()
        target.start(work["confined"])
        target.model.serve()
    except LostError:
        pass
    # Threads may be writing to a disk; what the guest was not told of was never promised.
    os._exit(0)


if __name__ == "__main__":
    run_helper(_main)
