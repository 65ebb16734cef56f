"""A device model at work: takes what the hypervisor asks for, one after the other, and gives it to the devices.

The same object serves a process of its own (:meth:`Model.serve`) and a test's thread (:meth:`Model.step`).
"""

import base64
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, Final

from nonroot._engine import IoreqPages
from nonroot.backends.handover import describe_image, image_from
from nonroot.backends.service import LATENCY_NS, BlockService
from nonroot.devices.display import Console
from nonroot.devices.fw_cfg import FW_CFG_PORTS, FwCfg
from nonroot.devices.fw_cfg import LENGTH as FW_CFG_LENGTH
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.devices.storage import Storage, attach_storage
from nonroot.hvm.device import Device, StateError
from nonroot.hvm.ioreq import (
    ALL_ONES,
    DATA,
    DATA_IS_POINTER,
    DATA_LENGTH,
    READ,
    IoreqType,
    pci_function,
)
from nonroot.stubdom.board import GoneError, Hypercalls, ModelBoard
from nonroot.stubdom.records import Records

__all__ = ["LOST", "Model"]

LATE: Final = 3
LOST: Final = 2
POKED: Final = 4
WRITES: Final = 5
REQUEST: Final = 6

QUIET_READS: Final = {
    "vga": frozenset({0x04, 0x05, *range(0x10, 0x19), 0x1A, 0x1C, 0x1E, 0x1F, 0x24, 0x25}),
    "ps2": frozenset({1}),
}
"""Offsets of ports whose loads change nothing: indices and data of the VGA but its palette, the keyboard's status."""

Received = Callable[[], list[int]]
"""Gets the descriptors that come with a control request."""


class Model:
    """The devices of one domain, and the loop around them."""

    def __init__(
        self,
        pages: IoreqPages,
        area: memoryview,
        board: ModelBoard,
        hypercalls: Hypercalls,
        events: tuple[int, int, int],
        receive: Received,
        virtual_time: bool = False,
    ) -> None:
        """``area``: the file of the requests; ``events``: eventfds that wake us and the hypervisor, and its socket."""
        self._pages, self._data = pages, area[DATA : DATA + DATA_LENGTH]
        self._board, self._hypercalls = board, hypercalls
        self._request, self._reply, self._life = events
        self._receive = receive
        self._virtual = virtual_time
        self._services: list[BlockService] = []
        self._devices: dict[str, Device] = {}
        self._all: list[Device] = []
        self._groups: dict[str, list[Device]] = {}
        self.storage: Storage | None = None
        self.console: Console | None = None
        self.records: Records | None = None
        """Where the devices' records are kept, if they are."""
        self.stores: list[tuple[int, bytes]] = []
        """Short stores by DMA that wait for the end of a request."""
        self.store: Callable[[int, bytes], object] = lambda address, data: None
        self.fault: tuple[str, int] | None = None
        """For tests: at which step this process dies, and at the how manieth time."""
        self.confinement: dict[str, list[str]] = {"confined": [], "unconfined": []}
        """What confines the process."""

    # ── what it is made of ──

    def build(self, parts: dict[str, Any], files: Sequence[int]) -> dict[str, Any]:
        """Make the devices. ``parts``: see :class:`nonroot.stubdom.model.Parts`; ``files``: of the drives."""
        board = self._board.board
        for name in parts["devices"]:
            if name == "display":
                from nonroot.devices.display import attach_display

                self.console = attach_display(board)
            elif name == "watchdog":
                from nonroot.devices.i6300esb import attach_watchdog

                attach_watchdog(board)
            elif name == "storage":
                self._build_storage(parts["storage"], list(files))
        return self._describe()

    def _build_storage(self, storage: dict[str, Any], files: list[int]) -> None:
        drives: list[Disk | CdRom | None] = []
        for place in storage["drives"]:
            if place is None:
                drives.append(None)
                continue
            port = self._medium(place["medium"], files)
            if place["cd"]:
                drives.append(CdRom(port, place["serial"]))
            else:
                assert port is not None
                drives.append(Disk(port, place["serial"]))
        floppies = [self._medium(medium, files) for medium in storage["floppies"]]
        self.storage = attach_storage(self._board.board, drives, floppies, enabled=storage["enabled"])

    def _medium(self, medium: dict[str, Any] | None, files: list[int]) -> BlockService | None:
        if medium is None:
            return None
        own, files[: medium["files"]] = files[: medium["files"]], []
        image = image_from(medium["image"], own)
        latency = LATENCY_NS if self._virtual else None
        service = BlockService(image, self._board.board.post, self._board.clock, latency)
        self._services.append(service)
        return service

    def _describe(self) -> dict[str, Any]:
        """What the hypervisor has to know of them."""
        board = self._board.board
        functions = {id(device): key for key, device in self._board.pci.functions.items()}
        devices = []
        for device in board.devices:
            key = functions.get(id(device))
            kind = type(device.state())
            bars = [
                {
                    "index": bar.index,
                    "kind": bar.kind.value,
                    "size": bar.size,
                    "sizes": bar.sizes,
                    "memory": next((n for n, ram in board.memories.items() if ram is bar.ram), None),
                }
                for bar in getattr(device, "bars", ())
            ]
            record = f"{kind.__module__}:{kind.__qualname__}"
            devices.append({"name": device.name, "function": key, "bars": bars, "record": record, "size": kind.size()})
        fixed = [
            {"bus": bus.name, "base": r.base, "length": r.length, "sizes": r.sizes}
            for bus in (self._board.ports, self._board.mmio)
            for r in bus.ranges
        ]
        return {
            "devices": devices,
            "ranges": fixed,
            "isa": sorted(self._board.lines.isa_lines),
            "intx": sorted(self._board.lines.intx_lines),
            "cmos": sorted(board.cmos.items()),
            "isa_devices": [[d.path, d.hid, d.ports, d.irq] for d in board.isa_devices],
            "has_vga": board.has_vga,
            "has_8042": board.has_8042,
            "hides_window": bool(board.window_hiders),
            "files": {name: base64.b64encode(data).decode() for name, data in board.files.items()},
        }

    def start(self, firmware: dict[str, Any] | None) -> None:
        """Everything is there: the firmware configuration device too, if this process has that."""
        if firmware is not None:
            board = self._board.board
            items = {int(key): base64.b64decode(data) for key, data in firmware["items"].items()}
            files = {name: base64.b64decode(data) for name, data in firmware["files"].items()}
            fw_cfg = FwCfg(items, files, board.dma, board.events)
            board.ports.add(FW_CFG_PORTS, FW_CFG_LENGTH, fw_cfg, sizes=(1, 2, 4))
            board.add(fw_cfg)
        self._all = list(self._board.board.devices)
        self._devices = {device.name: device for device in self._all}
        self._groups = {device.name: [device] for device in self._all}
        # One of them moves the other's data.
        if "floppy" in self._groups:
            both = [*self._groups["floppy"], *self._groups["dma8237"]]
            self._groups["floppy"] = self._groups["dma8237"] = both
        self._board.seal()
        self._board.settle()

    def descriptors(self) -> list[int]:
        """Of the media."""
        found = [describe_image(service.image) for service in self._services]
        return [fd for one in found if one is not None for fd in one[1]]

    # ── the loop ──

    def serve(self) -> None:
        """Until the hypervisor is gone."""
        try:
            while self.step(None):
                pass
        except GoneError:
            pass

    def step(self, seconds: float | None) -> bool:
        """Wait for something to do, and do it. False if the hypervisor is gone."""
        item = self._pages.next(self._request, self._life, seconds)
        what = item[0]
        records = self.records
        if what == REQUEST:
            _, vcpu, kind, flags, addr, data, size, count = item
            if self.fault:
                self._die("taken")
            self._hypercalls.answering = True
            reached = None if records is None else self._reached(kind, flags, addr, size)
            value = self._answer(kind, flags, addr, data, size, count)
            # What came of it at once is seen with the reply.
            if self._board.posted:
                self._board.run_posted()
                reached = None
            self._board.settle()
            if self.fault:
                self._die("done")
            # What changes nothing may be done twice, and needs no record.
            if records is not None and (reached is None or reached or self.stores):
                records.commit(self._all if reached is None else reached, value, self.stores)
                if self.fault:
                    self._die("committed")
                self.finish_stores()
            self._hypercalls.answering = False
            self._pages.respond(vcpu, value, self._reply)
            if self.fault:
                self._die("answered")
        elif what == POKED:
            if self.fault:
                self._die("poked")
            self._board.run_posted()
            self._board.settle()
            if self.fault:
                self._die("poked-done")
            if records is not None:
                records.commit(self._all)
        elif what == WRITES:
            if self.fault:
                self._die("writes")
            self._write(item[1])
            self._board.settle()
            if self.fault:
                self._die("writes-done")
            if records is not None:
                records.commit(self._groups.get("vga", self._all))
                if self.fault:
                    self._die("writes-committed")
            self._pages.finish_writes(len(item[1]))
        return bool(what != LOST)

    def finish_stores(self) -> None:
        """Do the stores that were waiting."""
        for address, data in self.stores:
            self.store(address, data)
        self.stores.clear()

    def _die(self, step: str) -> None:
        assert self.fault is not None
        name, times = self.fault
        if name == step:
            if times <= 1:
                os._exit(9)
            self.fault = name, times - 1

    def _reached(self, kind: int, flags: int, addr: int, size: int) -> list[Device] | None:
        """The devices that a request can change; None: all of them."""
        entry = None
        if kind == IoreqType.PIO:
            entry = self._board.ports.reads.get(addr << 4 | size)
            owner = None if entry is None else getattr(entry[0], "__self__", None)
        elif kind == IoreqType.PCI_CONFIG:
            owner = self._board.pci.functions.get(pci_function(addr)[0])
        elif kind == IoreqType.INVALIDATE:
            return []
        else:
            return self._groups.get("vga") if kind == IoreqType.COPY else None
        if entry is not None and flags & READ and entry[1] in QUIET_READS.get(getattr(owner, "name", ""), ()):
            return []
        return None if owner is None else self._groups.get(getattr(owner, "name", ""))

    def keep(self, records: Records, resume: bool) -> None:
        """Keep the devices' records there; with ``resume``, go on from what is kept."""
        if resume:
            records.load()
            self._board.run_posted()
        records.commit(self._all)
        self.records = records

    def _answer(self, kind: int, flags: int, addr: int, data: int, size: int, count: int) -> int:
        if kind == IoreqType.PIO or kind == IoreqType.COPY:
            bus = self._board.ports if kind == IoreqType.PIO else self._board.mmio
            if flags & DATA_IS_POINTER:
                if flags & READ:
                    found = bus.read_block(addr, size, count)
                    self._data[data : data + len(found)] = found
                else:
                    bus.write_block(addr, size, bytes(self._data[data : data + size * count]))
            elif flags & READ:
                return bus.read(addr, size)
            else:
                bus.write(addr, size, data)
        elif kind == IoreqType.PCI_CONFIG:
            key, register = pci_function(addr)
            function = self._board.pci.functions.get(key)
            if function is not None:
                if flags & READ:
                    return function.config_read(register, size)
                function.config_write(register, size, data)
        elif kind == IoreqType.ADVANCE:
            self._board.advance()
        elif kind == IoreqType.CONTROL:
            message = json.loads(bytes(self._data[:count]))
            answer = json.dumps(self._control(message)).encode()
            self._data[: len(answer)] = answer
            return len(answer)
        return ALL_ONES

    def _write(self, writes: list[tuple[int, int, int, int]]) -> None:
        mmio, ports = self._board.mmio, self._board.ports
        half: int | None = None
        for kind, addr, size, data in writes:
            if size < 3:
                (mmio if kind == IoreqType.COPY else ports).write(addr, 1 << size, data)
            elif half is None:
                half = data
            else:
                mmio.write(addr, 8, half | data << 32)
                half = None

    # ── control ──

    def _control(self, message: dict[str, Any]) -> dict[str, Any]:
        handler = _CONTROLS[message.pop("op")]
        result = handler(self, **message)
        return {} if result is None else result

    def _reset(self, device: str) -> None:
        self._devices[device].reset()

    def _state(self, device: str) -> dict[str, Any]:
        return {"record": base64.b64encode(self._devices[device].state().pack()).decode()}

    def _restore(self, device: str, record: str) -> dict[str, Any] | None:
        target = self._devices[device]
        try:
            target.from_state(type(target.state()).unpack(base64.b64decode(record)))
        except StateError as error:
            return {"error": str(error)}
        return None

    def _hide_window(self, hidden: bool) -> None:
        self._board.board.hide_window(hidden)

    def _screen(self) -> dict[str, Any]:
        assert self.console is not None
        vga = self.console.vga
        return {"damage": vga.memory.take_damage(), "changes": vga.changes}

    def _key(self, key: int, pressed: bool) -> dict[str, Any]:
        assert self.console is not None
        return {"taken": self.console.ps2.key(key, pressed)}

    def _move(self, dx: int, dy: int, dz: int, buttons: int | None) -> None:
        assert self.console is not None
        self.console.ps2.move(dx, dy, dz, buttons)

    def _eject(self, floppy: bool, place: int, force: bool) -> dict[str, Any]:
        assert self.storage is not None
        if floppy:
            assert self.storage.floppy is not None
            self.storage.floppy.insert(place, None)
            ejected = True
        else:
            ejected = self.storage.ide.eject(place, force)
        self._release()
        return {"ejected": ejected}

    def _insert(self, floppy: bool, place: int, medium: dict[str, Any]) -> None:
        assert self.storage is not None
        service = self._medium(medium, self._receive())
        assert service is not None
        if floppy:
            assert self.storage.floppy is not None
            self.storage.floppy.insert(place, service)
        else:
            self.storage.ide.insert(place, service)
        self._release()

    def _release(self) -> None:
        """Close media that are in no drive any more."""
        assert self.storage is not None
        ports: list[object] = [unit.drive.port for unit in self.storage.ide.units if unit.drive is not None]
        ports += [disk.port for disk in self.storage.ide.unplugged.values()]
        ports += self.storage.floppy.media if self.storage.floppy is not None else []
        for service in [service for service in self._services if all(service is not port for port in ports)]:
            self._services.remove(service)
            service.close()

    def _unplug(self, place: int) -> dict[str, Any]:
        assert self.storage is not None
        unit = self.storage.ide.units[place]
        port = None if unit.drive is None else unit.drive.port
        self.storage.ide.unplug(place)
        if isinstance(port, BlockService):
            try:
                port.settle()
            except OSError as error:
                return {"error": str(error)}
        return {}

    def _plug(self, place: int) -> None:
        from nonroot.backends.raw import RawImage

        assert self.storage is not None
        disk = self.storage.ide.unplugged.get(place)
        if disk is not None and isinstance(disk.port, BlockService) and isinstance(disk.port.image, RawImage):
            disk.port.image.look_again()
        self.storage.ide.plug(place)

    def _confinement(self) -> dict[str, Any]:
        return dict(self.confinement)

    def _statistics(self) -> dict[str, Any]:
        counts = [[device, event, count] for (device, event), count in self._board.events.items()]
        return {"events": counts, "requests": sum(s.requests for s in self._services)}

    def close(self) -> None:
        """Close the media."""
        for service in self._services:
            service.close()


_CONTROLS: Final[dict[str, Callable[..., dict[str, Any] | None]]] = {
    "reset": Model._reset,
    "state": Model._state,
    "restore": Model._restore,
    "hide-window": Model._hide_window,
    "screen": Model._screen,
    "key": Model._key,
    "move": Model._move,
    "eject": Model._eject,
    "insert": Model._insert,
    "unplug": Model._unplug,
    "plug": Model._plug,
    "confinement": Model._confinement,
    "statistics": Model._statistics,
}
