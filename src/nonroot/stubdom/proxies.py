"""What stands on the hypervisor's board for devices that are in another process."""

import base64
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from nonroot.devices.pci_device import DeviceRam
from nonroot.devices.vga_state import VgaState
from nonroot.hvm.device import StateError, StateRecord
from nonroot.hvm.ioreq import DATA_IS_POINTER, DATA_LENGTH, READ, IoreqType, pci_address
from nonroot.stubdom.media import Media

__all__ = [
    "MemoryAccess",
    "PortAccess",
    "RemoteConsole",
    "RemoteDevice",
    "RemoteFunction",
    "RemotePs2",
    "RemoteStorage",
    "RemoteVga",
]

BLOCK: Final = DATA_LENGTH // 2
"""Bytes of a REP INS or OUTS in one request; more are several."""
POSTED_FIRST: Final = 0xA_0000
POSTED_END: Final = 0xC_0000
"""Stores to the VGA's window are posted, as Xen posts them."""


class Channel(Protocol):
    """The way to the device model; see :class:`nonroot.stubdom.model.DeviceModel`."""

    data: memoryview
    posts: bool

    def request(self, kind: int, flags: int, addr: int, data: int, size: int, count: int) -> int:
        """One I/O request and its answer."""

    def post(self, addr: int, size: int, value: int) -> bool:
        """Post a write to memory. False if it cannot be."""

    def control(self, op: str, **arguments: Any) -> dict[str, Any]:
        """A control request and its answer."""


class _Access:
    """Accesses by address: the bus's offsets are addresses."""

    kind: int

    def __init__(self, channel: Channel, name: str) -> None:
        self.name = name
        self._channel = channel
        self._request = channel.request

    def read(self, offset: int, size: int) -> int:
        """A load."""
        return self._request(self.kind, READ, offset, 0, size, 1) & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """A store."""
        self._request(self.kind, 0, offset, value, size, 1)

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """REP INS: one request."""
        found = b""
        data = self._channel.data
        while count:
            now = min(count, BLOCK // size)
            data[: now * size] = b"\xff" * (now * size)
            self._request(self.kind, READ | DATA_IS_POINTER, offset, 0, size, now)
            found += bytes(data[: now * size])
            count -= now
        return found

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """REP OUTS: one request."""
        for start in range(0, len(data), BLOCK):
            part = data[start : start + BLOCK]
            self._channel.data[: len(part)] = part
            self._request(self.kind, DATA_IS_POINTER, offset, 0, size, len(part) // size)

    # It is no device: those have records and resets of their own.

    def reset(self) -> None:
        """Nothing."""

    def state(self) -> StateRecord:
        """None: it is on no list of devices."""
        raise NotImplementedError

    def from_state(self, state: StateRecord) -> None:
        """None."""
        raise NotImplementedError


class PortAccess(_Access):
    """Ports."""

    kind = IoreqType.PIO


class MemoryAccess(_Access):
    """Memory-mapped registers, and the VGA's window."""

    kind = IoreqType.COPY

    def write(self, offset: int, size: int, value: int) -> None:
        """A store; into the window it is posted."""
        if POSTED_FIRST <= offset < POSTED_END and self._channel.posts and self._channel.post(offset, size, value):
            return
        self._request(self.kind, 0, offset, value, size, 1)


class RemoteDevice:
    """A device by its name: reset and records."""

    def __init__(self, channel: Channel, name: str, record: str) -> None:
        """``record``: where the class of its record is, ``module:class``."""
        self.name = name
        self._channel = channel
        module, kind = record.split(":")
        found = getattr(importlib.import_module(module), kind)
        if not issubclass(found, StateRecord):
            raise TypeError(f"{record} is no record")
        self._record: type[StateRecord] = found
        self._last: StateRecord = found()
        """The record of a device whose process is gone."""

    def read(self, offset: int, size: int) -> int:
        """Accesses come by address, not here."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """The same."""

    def reset(self) -> None:
        """Power-on state."""
        self._channel.control("reset", device=self.name)

    def state(self) -> StateRecord:
        """Its record."""
        answer = self._channel.control("state", device=self.name).get("record")
        if isinstance(answer, str):
            self._last = self._record.unpack(base64.b64decode(answer))
        return self._last

    def from_state(self, state: StateRecord) -> None:
        """Check there, then apply. StateError."""
        record = base64.b64encode(state.pack()).decode()
        answer = self._channel.control("restore", device=self.name, record=record)
        if "error" in answer:
            raise StateError(answer["error"])


class RemoteFunction(RemoteDevice):
    """A PCI function."""

    def __init__(self, channel: Channel, name: str, record: str, function: int) -> None:
        super().__init__(channel, name, record)
        self._function = function

    def config_read(self, register: int, size: int) -> int:
        """A load from configuration space."""
        address = pci_address(self._function, register)
        return self._channel.request(IoreqType.PCI_CONFIG, READ, address, 0, size, 1) & (1 << 8 * size) - 1

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store."""
        address = pci_address(self._function, register)
        self._channel.request(IoreqType.PCI_CONFIG, 0, address, value, size, 1)


class _Picture:
    """What of the adapter's memory a screen asks for; see :class:`nonroot.devices.vga_memory.PlaneAccess`."""

    def __init__(self, vga: "RemoteVga") -> None:
        self._vga = vga

    def take_damage(self) -> list[tuple[int, int]]:
        """Ranges (offset, length) of video memory that may have changed since the last call."""
        return self._vga.look()


class RemoteVga(RemoteFunction):
    """The display adapter, as a screen sees it."""

    def __init__(self, channel: Channel, name: str, record: str, function: int, ram: DeviceRam) -> None:
        super().__init__(channel, name, record, function)
        self.ram = ram
        self.changes = 0
        """Register writes that may change the picture, at the last look."""
        self.memory = _Picture(self)

    def look(self) -> list[tuple[int, int]]:
        """Damage since the last look; ``changes`` is up to date then."""
        answer = self._channel.control("screen")
        if not answer:
            return []
        self.changes = int(answer["changes"])
        size = self.ram.size
        return [(low, length) for low, length in answer["damage"] if 0 <= low < size and 0 < length <= size]

    def state(self) -> VgaState:
        """All registers."""
        state = super().state()
        assert isinstance(state, VgaState)
        return state


class RemotePs2(RemoteDevice):
    """Keyboard and mouse, as a person uses them."""

    def key(self, key: int, pressed: bool) -> bool:
        """A key goes down or up. False if too many wait already."""
        return bool(self._channel.control("key", key=key, pressed=pressed).get("taken"))

    def move(self, dx: int, dy: int, dz: int = 0, buttons: int | None = None) -> None:
        """The mouse."""
        self._channel.control("move", dx=dx, dy=dy, dz=dz, buttons=buttons)


@dataclass(frozen=True, slots=True)
class RemoteConsole:
    """The devices of one seat, as :class:`nonroot.devices.display.Console`."""

    vga: RemoteVga
    ps2: RemotePs2


class RemoteStorage:
    """The drives, for whoever changes media, or takes disks off their cable."""

    def __init__(self, channel: Channel, give: Callable[[list[int]], object], media: Media) -> None:
        """``give`` hands descriptors to the process; what they are for follows. ``media``: of the drives."""
        self._channel, self._give, self._media = channel, give, media

    def eject(self, floppy: bool, place: int, force: bool) -> bool:
        """False, and nothing done, if the guest has locked the medium."""
        self._media.change(floppy, place, None)
        done = bool(self._channel.control("eject", floppy=floppy, place=place, force=force).get("ejected"))
        if done:
            self._media.settle()
        else:
            self._media.forget()
        return done

    def insert(self, floppy: bool, place: int, image: dict[str, Any], files: list[int]) -> None:
        """Put a medium into a drive."""
        medium = {"image": image, "files": len(files)}
        self._media.change(floppy, place, medium, files)
        self._give(files)
        self._channel.control("insert", floppy=floppy, place=place, medium=medium)
        self._give([])
        self._media.settle()

    def unplug(self, place: int) -> None:
        """Take a disk off; what it was asked to write is on stable storage then. OSError."""
        self._media.plug(place, False)
        answer = self._channel.control("unplug", place=place)
        self._media.settle()
        if "error" in answer:
            raise OSError(answer["error"])

    def plug(self, place: int) -> None:
        """Put it back."""
        self._media.plug(place, True)
        self._channel.control("plug", place=place)
        self._media.settle()
