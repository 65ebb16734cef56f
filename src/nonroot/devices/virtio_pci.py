"""A virtio device on the PCI bus, in the modern form: registers, queues, an interrupt. What it does is a backend's.

One BAR of memory holds the common registers, the interrupt status, the device's own configuration and the queues'
notification registers. There is no MSI-X and no legacy interface.

Source: Virtual I/O Device (VIRTIO) version 1.2, chapters 2.1, 2.2, 4.1.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Protocol

from nonroot.devices.pci_device import UNCONNECTED, Bar, BarKind, PciConnection, PciDevice, PciIdentity
from nonroot.devices.virtqueue import QueuePlace, SplitQueue
from nonroot.hvm.device import (
    NO_EVENTS,
    Events,
    StateError,
    StateRecord,
    array,
    blob,
    expect,
    u8,
    u16,
    u32,
    u64,
)
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = ["BAR_LENGTH", "COMMON_LENGTH", "VirtioBackend", "VirtioPci", "VirtioState"]

VENDOR: Final = 0x1AF4
FIRST_DEVICE: Final = 0x1040

# Offsets in BAR 0
COMMON: Final = 0x0000
COMMON_LENGTH: Final = 56
ISR: Final = 0x1000
CONFIG: Final = 0x2000
NOTIFY: Final = 0x3000
NOTIFY_STEP: Final = 4
BAR_LENGTH: Final = 0x4000

# Configuration space
CAPABILITIES: Final = 0x34
STATUS_CAPABILITIES: Final = 1 << 4
VENDOR_SPECIFIC: Final = 0x09
COMMON_CAP, ISR_CAP, CONFIG_CAP, NOTIFY_CAP, ACCESS_CAP = 0x40, 0x50, 0x60, 0x70, 0x84
ACCESS_DATA: Final = ACCESS_CAP + 16

# Device status
ACKNOWLEDGE: Final = 1
DRIVER: Final = 2
DRIVER_OK: Final = 4
FEATURES_OK: Final = 8
NEEDS_RESET: Final = 64

ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

INDIRECT_DESCRIPTORS: Final = 1 << 28
VERSION_1: Final = 1 << 32
FEATURES: Final = VERSION_1 | INDIRECT_DESCRIPTORS

NO_VECTOR: Final = 0xFFFF
MOST_QUEUES: Final = 8

_FIELDS: Final = (
    (0, 4, "feature_select"),
    (4, 4, "feature"),
    (8, 4, "driver_select"),
    (12, 4, "driver_feature"),
    (16, 2, "config_vector"),
    (18, 2, "queues"),
    (20, 1, "status"),
    (21, 1, "generation"),
    (22, 2, "queue_select"),
    (24, 2, "queue_size"),
    (26, 2, "queue_vector"),
    (28, 2, "queue_enable"),
    (30, 2, "notify_offset"),
    (32, 8, "descriptors"),
    (40, 8, "driver"),
    (48, 8, "device"),
)
_READ_ONLY: Final = frozenset(("feature", "queues", "generation", "notify_offset", "config_vector", "queue_vector"))


class VirtioBackend(Protocol):
    """What stands behind the registers. Called in the vCPU's thread."""

    def started(self, queues: Sequence[SplitQueue | None]) -> None:
        """The driver is ready; None stands for a queue that it does not use."""

    def stopped(self) -> None:
        """The queues must not be touched any more, from now on. Also when they never were."""

    def notified(self, queue: int) -> None:
        """There may be something new in a queue. Quick."""


@dataclass(slots=True)
class VirtioState(StateRecord):
    """Registers, and how far the queues have got. Requests that a backend has taken are not in it."""

    NAME: ClassVar[str] = "virtio"

    config: bytes = blob(CONFIG_SIZE)
    status: int = u8()
    isr: int = u8(maximum=3)
    feature_select: int = u32()
    driver_select: int = u32()
    driver_features: int = u64()
    queue_select: int = u16()
    sizes: tuple[int, ...] = array("H", MOST_QUEUES)
    enabled: tuple[int, ...] = array("B", MOST_QUEUES, maximum=1)
    descriptors: tuple[int, ...] = array("Q", MOST_QUEUES)
    driver: tuple[int, ...] = array("Q", MOST_QUEUES)
    device: tuple[int, ...] = array("Q", MOST_QUEUES)
    taken: tuple[int, ...] = array("H", MOST_QUEUES)
    used: tuple[int, ...] = array("H", MOST_QUEUES)

    def check_consistency(self) -> None:
        """A driver that is ready has agreed on features; sizes are powers of two."""
        if self.status & DRIVER_OK and not self.status & FEATURES_OK:
            raise StateError("virtio state: status has a driver without features")
        if self.driver_features & ~FEATURES:
            raise StateError("virtio state: driver_features has some that were not offered")
        if any(size & size - 1 for size in self.sizes):
            raise StateError("virtio state: sizes has one that is no power of two")


def _capability(kind: int, following: int, offset: int, length: int, more: bytes = b"") -> tuple[int, int]:
    data = struct.pack("<BBBBBB2xII", VENDOR_SPECIFIC, following, 16 + len(more), kind, 0, 0, offset, length) + more
    return len(data), int.from_bytes(data, "little")


class VirtioPci(PciDevice):
    """The registers. :attr:`backend` is to be set before the guest runs."""

    _status: int
    _isr: int
    _feature_select: int
    _driver_select: int
    _driver_features: int
    _queue_select: int

    def __init__(
        self,
        name: str,
        kind: int,
        class_code: int,
        queue_sizes: Sequence[int],
        config: bytes,
        connection: PciConnection = UNCONNECTED,
        events: Events = NO_EVENTS,
    ) -> None:
        """``kind``: virtio's device number. ``queue_sizes``: most entries of each queue. ``config``: read-only."""
        if not 1 <= len(queue_sizes) <= MOST_QUEUES:
            raise ValueError(f"{name} cannot have {len(queue_sizes)} queues")
        header = {
            CAPABILITIES: (1, COMMON_CAP),
            COMMON_CAP: _capability(1, ISR_CAP, COMMON, COMMON_LENGTH),
            ISR_CAP: _capability(3, CONFIG_CAP, ISR, 1),
            CONFIG_CAP: _capability(4, NOTIFY_CAP, CONFIG, len(config)),
            NOTIFY_CAP: _capability(
                2, ACCESS_CAP, NOTIFY, NOTIFY_STEP * len(queue_sizes), struct.pack("<I", NOTIFY_STEP)
            ),
            ACCESS_CAP: _capability(5, 0, 0, 0, bytes(4)),
        }
        writable = [(ACCESS_CAP + 4, 1, 0xFF), (ACCESS_CAP + 8, 8, (1 << 64) - 1), (ACCESS_DATA, 4, 0xFFFF_FFFF)]
        identity = PciIdentity(VENDOR, FIRST_DEVICE + kind, class_code, 1, interrupt_pin=1, status=STATUS_CAPABILITIES)
        super().__init__(name, identity, [Bar(0, BarKind.MEMORY, BAR_LENGTH)], connection, header, writable)
        self._events = events
        self._config = config
        self._most = tuple(queue_sizes)
        self.backend: VirtioBackend | None = None
        """None: nobody answers."""
        self._queues: list[SplitQueue | None] = [None] * len(self._most)
        self._load(VirtioState(bytes(self.data), sizes=self._initial_sizes()))

    def _initial_sizes(self) -> tuple[int, ...]:
        return self._most + (0,) * (MOST_QUEUES - len(self._most))

    # ── for the backend, in the vCPU's thread ──

    def interrupt(self) -> None:
        """Chains have been given back."""
        if self._status & DRIVER_OK:
            self._raise(ISR_QUEUE)

    def fail(self) -> None:
        """The driver has broken the rules: nothing goes on before it has reset the device."""
        if self._status & DRIVER_OK and not self._status & NEEDS_RESET:
            self._status |= NEEDS_RESET
            self._events(self.name, "needs-reset", self._status)
            self._raise(ISR_CONFIG)

    def _raise(self, bit: int) -> None:
        self._isr |= bit
        self.connection.irq(True)

    # ── registers ──

    def read(self, offset: int, size: int) -> int:
        """A load from the BAR; what is no register reads as zero."""
        if offset < COMMON_LENGTH:
            return self._common_read(offset, size)
        if offset == ISR:
            value, self._isr = self._isr, 0
            self.connection.irq(False)
            return value
        if CONFIG <= offset < CONFIG + len(self._config):
            at = offset - CONFIG
            return int.from_bytes(self._config[at : at + size], "little")
        if not NOTIFY <= offset < BAR_LENGTH:
            self._events(self.name, "unknown-register", offset)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """A store into the BAR."""
        if NOTIFY <= offset < NOTIFY + NOTIFY_STEP * len(self._most):
            queue = (offset - NOTIFY) // NOTIFY_STEP
            if self._status & DRIVER_OK and self.backend is not None:
                self.backend.notified(queue)
        elif offset < COMMON_LENGTH:
            self._common_write(offset, size, value)
        else:
            self._events(self.name, "unknown-register", offset)

    def _value(self, field: str) -> int:
        select = self._queue_select
        there = select < len(self._most)
        match field:
            case "feature":
                return FEATURES >> 32 * self._feature_select & 0xFFFF_FFFF if self._feature_select < 2 else 0
            case "driver_feature":
                return self._driver_features >> 32 * self._driver_select & 0xFFFF_FFFF if self._driver_select < 2 else 0
            case "config_vector" | "queue_vector":
                return NO_VECTOR
            case "queues":
                return len(self._most)
            case "generation":
                return 0
            case "queue_size":
                return self._sizes[select] if there else 0
            case "queue_enable":
                return self._enabled[select] if there else 0
            case "notify_offset":
                return select if there else 0
            case "descriptors" | "driver" | "device":
                places: list[int] = getattr(self, f"_{field}")
                return places[select] if there else 0
        value: int = getattr(self, f"_{field}")
        return value

    def _common_read(self, offset: int, size: int) -> int:
        result = 0
        for start, length, field in _FIELDS:
            if start < offset + size and offset < start + length:
                shift = 8 * (start - offset)
                value = self._value(field)
                result |= value << shift if shift >= 0 else value >> -shift
        return result & (1 << 8 * size) - 1

    def _common_write(self, offset: int, size: int, value: int) -> None:
        data = value.to_bytes(size, "little")
        for start, length, field in _FIELDS:
            if start >= offset + size or offset >= start + length:
                continue
            first, last = max(start, offset), min(start + length, offset + size)
            if field in _READ_ONLY:
                if field not in ("config_vector", "queue_vector"):
                    self._events(self.name, "read-only-register", start)
                continue
            now = bytearray(self._value(field).to_bytes(length, "little"))
            now[first - start : last - start] = data[first - offset : last - offset]
            self._set(field, int.from_bytes(now, "little"))

    def _set(self, field: str, value: int) -> None:
        if field == "status":
            self._set_status(value)
        elif field in ("feature_select", "driver_select", "queue_select"):
            setattr(self, f"_{field}", value)
        elif field == "driver_feature":
            if self._driver_select < 2 and not self._status & FEATURES_OK:
                shift = 32 * self._driver_select
                kept = self._driver_features & ~(0xFFFF_FFFF << shift)
                self._driver_features = (kept | value << shift) & FEATURES
                if value << shift & ~FEATURES:
                    self._events(self.name, "unknown-feature", value)
        else:
            self._set_queue(field, value)

    def _set_queue(self, field: str, value: int) -> None:
        select = self._queue_select
        if select >= len(self._most) or self._enabled[select] or self._status & DRIVER_OK:
            self._events(self.name, "queue-in-use", select)
        elif field == "queue_size":
            if 0 < value <= self._most[select] and value & value - 1 == 0:
                self._sizes[select] = value
            else:
                self._events(self.name, "bad-queue-size", value)
        elif field == "queue_enable":
            self._enabled[select] = int(value == 1)
        else:
            getattr(self, f"_{field}")[select] = value

    def _set_status(self, value: int) -> None:
        if value == 0:
            self._restart()
            return
        added = value & ~self._status
        if added & FEATURES_OK and not self._driver_features & VERSION_1:
            value &= ~FEATURES_OK
        if added & DRIVER_OK and not value & FEATURES_OK:
            value &= ~DRIVER_OK
            self._events(self.name, "driver-without-features", value)
        self._status |= value & 0xFF & ~NEEDS_RESET
        if added & value & DRIVER_OK:
            self._begin([0] * MOST_QUEUES, [0] * MOST_QUEUES)

    def _begin(self, taken: Sequence[int], used: Sequence[int]) -> None:
        self._queues = [
            SplitQueue(
                self,
                QueuePlace(self._sizes[index], self._descriptors[index], self._driver[index], self._device[index]),
                taken[index],
                used[index],
            )
            if self._enabled[index]
            else None
            for index in range(len(self._most))
        ]
        if self.backend is not None:
            self.backend.started(self._queues)

    def _restart(self) -> None:
        if self.backend is not None:
            self.backend.stopped()
        self._queues = [None] * len(self._most)
        self._load(VirtioState(bytes(self.data), sizes=self._initial_sizes()))
        self.connection.irq(False)

    def reset(self) -> None:
        """As after power-on."""
        super().reset()
        self._restart()

    # ── the registers through configuration space ──

    def _window(self, size: int) -> int | None:
        """The offset in the BAR that the access capability points at, if it is one for ``size`` bytes."""
        bar = self.data[ACCESS_CAP + 4]
        offset, length = struct.unpack_from("<II", self.data, ACCESS_CAP + 8)
        good = bar == 0 and length == size and offset % size == 0 and offset + size <= BAR_LENGTH
        return int(offset) if good else None

    def config_read(self, register: int, size: int) -> int:
        """A load from configuration space."""
        if register == ACCESS_DATA and (offset := self._window(size)) is not None:
            return self.read(offset, size)
        return super().config_read(register, size)

    def config_changed(self, register: int, size: int) -> None:
        """A store into the access capability's data reaches the BAR."""
        if register == ACCESS_DATA and (offset := self._window(size)) is not None:
            self.write(offset, size, super().config_read(register, size))

    # ── records ──

    def state(self) -> VirtioState:
        """Everything but what the backend has taken."""
        positions = [(0, 0) if queue is None else (queue.taken, queue.used) for queue in self._queues]
        positions += [(0, 0)] * (MOST_QUEUES - len(positions))
        return VirtioState(
            bytes(self.data),
            self._status,
            self._isr,
            self._feature_select,
            self._driver_select,
            self._driver_features,
            self._queue_select,
            tuple(self._sizes),
            tuple(self._enabled),
            tuple(self._descriptors),
            tuple(self._driver),
            tuple(self._device),
            tuple(taken for taken, _ in positions),
            tuple(used for _, used in positions),
        )

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; the backend begins anew where the queues were."""
        record = expect(VirtioState, state)
        if any(size > most for size, most in zip(record.sizes, self._initial_sizes(), strict=True)):
            raise StateError(f"{self.name} state: sizes has a queue that is too long")
        if any(on and not size for on, size in zip(record.enabled, record.sizes, strict=True)):
            raise StateError(f"{self.name} state: enabled has a queue that does not exist")
        self.load_config(record.config)
        if self.backend is not None:
            self.backend.stopped()
        self._load(record)
        self._queues = [None] * len(self._most)
        if record.status & DRIVER_OK:
            self._begin(record.taken, record.used)
        self.connection.irq(bool(record.isr))

    def _load(self, record: VirtioState) -> None:
        self._status = record.status
        self._isr = record.isr
        self._feature_select = record.feature_select
        self._driver_select = record.driver_select
        self._driver_features = record.driver_features
        self._queue_select = record.queue_select
        self._sizes = list(record.sizes)
        self._enabled = list(record.enabled)
        self._descriptors = list(record.descriptors)
        self._driver = list(record.driver)
        self._device = list(record.device)
