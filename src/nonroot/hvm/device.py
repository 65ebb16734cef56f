"""What a hypervisor device is: the seam between the machine and every device model.

A device is a pure object over (state, irq, clock, sink, events). It has no threads, files or wall clock; everything it
may touch is handed to it. Its modules import only ``dataclasses``, ``enum``, ``struct``, ``typing``, ``collections``
and nonroot's own modules (``make check`` enforces it).

Guest input never raises out of a device: an unknown register reads as a documented value and is reported as an event.
"""

import struct
from collections.abc import Callable
from dataclasses import Field, field, fields
from typing import Any, ClassVar, Final, Protocol, Self, TypeVar, runtime_checkable

__all__ = [
    "NO_EVENTS",
    "BlockDevice",
    "Clock",
    "Device",
    "Events",
    "IrqLine",
    "Sink",
    "StateError",
    "StateRecord",
    "TimedDevice",
    "array",
    "assign",
    "blob",
    "capture",
    "expect",
    "fifo",
    "flag",
    "i64",
    "ignore",
    "u8",
    "u16",
    "u32",
    "u64",
]

S = TypeVar("S", bound="StateRecord")

IrqLine = Callable[[bool], None]
"""Drives one interrupt line: true asserts it, false releases it. Repeating a level does nothing."""

Sink = Callable[[int], object]
"""Takes one byte (0..255) that the guest sent out of the machine."""

Events = Callable[[str, str, int], object]
"""Takes (device, event, detail): noteworthy moments for statistics and tests. It must not raise."""


def _drop_event(device: str, event: str, detail: int) -> None:
    pass


NO_EVENTS: Final[Events] = _drop_event
"""Events of a device nobody watches."""


def ignore(value: object) -> None:
    """A line or sink that is not connected."""


class StateError(ValueError):
    """A state record that no device could have written: the message names the record and the field."""


class Clock(Protocol):
    """Machine time, as devices see it."""

    def now_ns(self) -> int:
        """Nanoseconds since the domain's power-on; never goes back."""

    def rearm(self) -> None:
        """Tells the machine that the calling device's deadline has changed."""


class StateRecord:
    """Base of state dataclasses: a named, versioned record of fixed layout.

    Subclasses are dataclasses whose fields are made by :func:`u8` and its siblings; the layout follows the order of the
    fields, little-endian, without padding, after a header of (name, version, length of the body).
    """

    NAME: ClassVar[str]
    VERSION: ClassVar[int] = 1
    _HEADER: ClassVar[struct.Struct] = struct.Struct("<8sHHI")
    _body: ClassVar[struct.Struct | None] = None
    _fields: "ClassVar[tuple[Field[Any], ...] | None]" = None
    _ranges: "ClassVar[tuple[tuple[str, int, int], ...] | None]" = None

    @classmethod
    def parts(cls) -> "tuple[Field[Any], ...]":
        """The record's fields; found once."""
        parts = cls.__dict__.get("_fields")
        if parts is None:
            parts = cls._fields = fields(cls)  # type: ignore[arg-type]
        assert isinstance(parts, tuple)
        return parts

    @classmethod
    def layout(cls) -> struct.Struct:
        """The layout of the record's body."""
        body = cls.__dict__.get("_body")
        if body is None:
            body = struct.Struct("<" + "".join(f.metadata["code"] for f in cls.parts()))
            cls._body = body
        assert isinstance(body, struct.Struct)
        return body

    @classmethod
    def size(cls) -> int:
        """Bytes of a packed record, header included; the same for every record of this version."""
        return cls._HEADER.size + cls.layout().size

    @classmethod
    def ranges(cls) -> "tuple[tuple[str, int, int], ...]":
        """Name, minimum and maximum of each field; found once. Of one that is no number, what no number is between."""
        ranges = cls.__dict__.get("_ranges")
        if ranges is None:
            ranges = cls._ranges = tuple(
                (f.name, f.metadata["minimum"], f.metadata["maximum"])
                if f.metadata["kind"] == "number"
                else (f.name, 1, 0)
                for f in cls.parts()
            )
        assert isinstance(ranges, tuple)
        return ranges

    def check(self) -> None:
        """Raise StateError naming the first field that is out of range, or inconsistent with the others."""
        for number, (name, low, high) in enumerate(self.ranges()):
            value = getattr(self, name)
            if type(value) is int and low <= value <= high:
                continue  # most are: the rest is slower
            problem = _problem(value, self.parts()[number].metadata)
            if problem:
                raise StateError(f"{self.NAME} state: {name} {problem}")
        self.check_consistency()

    def check_consistency(self) -> None:
        """Checks across fields; subclasses override. Called after each field alone was found in range."""

    def pack(self) -> bytes:
        """The record as bytes. StateError if a field is out of range."""
        self.check()
        values: list[int | bytes] = []
        for f in self.parts():
            value = getattr(self, f.name)
            kind = f.metadata["kind"]
            if kind == "array":
                values.extend(value)
            elif kind == "fifo":
                values.append(len(value))
                values.append(bytes(value))
            else:
                values.append(value)
        body = self.layout().pack(*values)
        return self._HEADER.pack(self.NAME.encode(), self.VERSION, 0, len(body)) + body

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """A record from bytes, checked. StateError if it is truncated, of another device or version, or hostile."""
        header, layout = cls._HEADER, cls.layout()
        if len(data) < header.size:
            raise StateError(f"{cls.NAME} state: {len(data)} bytes are too few for a header")
        name, version, reserved, length = header.unpack_from(data)
        if name.rstrip(b"\0") != cls.NAME.encode():
            raise StateError(f"{cls.NAME} state: the record is of another device")
        if version != cls.VERSION or reserved != 0:
            raise StateError(f"{cls.NAME} state: version {version} is not known")
        if length != layout.size or len(data) != header.size + length:
            raise StateError(f"{cls.NAME} state: {len(data)} bytes where {cls.size()} were expected")
        values = iter(layout.unpack_from(data, header.size))
        arguments: dict[str, Any] = {}
        for f in cls.parts():
            kind = f.metadata["kind"]
            if kind == "array":
                arguments[f.name] = tuple(next(values) for _ in range(f.metadata["length"]))
            elif kind == "fifo":
                used = next(values)
                content = next(values)
                if used > len(content) or content[used:].strip(b"\0"):
                    raise StateError(f"{cls.NAME} state: {f.name} claims {used} bytes of {len(content)}")
                arguments[f.name] = content[:used]
            else:
                arguments[f.name] = next(values)
        record = cls(**arguments)
        record.check()
        return record


def _problem(value: object, meta: Any) -> str:
    kind = meta["kind"]
    if kind in ("blob", "fifo"):
        if not isinstance(value, bytes):
            return "is not bytes"
        good = len(value) == meta["length"] if kind == "blob" else len(value) <= meta["length"]
        return "" if good else f"has {len(value)} bytes, {meta['length']} were expected"
    if kind == "array":
        if not isinstance(value, tuple) or len(value) != meta["length"]:
            return f"is not {meta['length']} numbers"
        return next((p for p in (_out_of_range(item, meta) for item in value) if p), "")
    if kind == "flag":
        return "" if isinstance(value, bool) else "is not a truth value"
    return _out_of_range(value, meta)


def _out_of_range(value: object, meta: Any) -> str:
    if type(value) is not int:
        return "is not a number"
    assert isinstance(value, int)
    if not meta["minimum"] <= value <= meta["maximum"]:
        return f"is {value}, outside {meta['minimum']}..{meta['maximum']}"
    return ""


_RANGES: Final = {
    "B": (0, 2**8 - 1),
    "H": (0, 2**16 - 1),
    "I": (0, 2**32 - 1),
    "Q": (0, 2**64 - 1),
    "q": (-(2**63), 2**63 - 1),
}


def _number(code: str, default: int, maximum: int | None, minimum: int | None = None) -> Any:
    low, high = _RANGES[code]
    meta = {
        "kind": "number",
        "code": code,
        "minimum": low if minimum is None else minimum,
        "maximum": high if maximum is None else maximum,
    }
    return field(default=default, metadata=meta)


def u8(default: int = 0, maximum: int | None = None) -> Any:
    """An unsigned 8-bit field."""
    return _number("B", default, maximum)


def u16(default: int = 0, maximum: int | None = None) -> Any:
    """An unsigned 16-bit field."""
    return _number("H", default, maximum)


def u32(default: int = 0, maximum: int | None = None) -> Any:
    """An unsigned 32-bit field."""
    return _number("I", default, maximum)


def u64(default: int = 0, maximum: int | None = None) -> Any:
    """An unsigned 64-bit field."""
    return _number("Q", default, maximum)


def i64(default: int = 0, minimum: int | None = None, maximum: int | None = None) -> Any:
    """A signed 64-bit field."""
    return _number("q", default, maximum, minimum)


def flag(default: bool = False) -> Any:
    """A truth value, one byte."""
    return field(default=default, metadata={"kind": "flag", "code": "?"})


def blob(length: int, default: bytes | None = None) -> Any:
    """Exactly ``length`` bytes."""
    value = bytes(length) if default is None else default
    return field(default=value, metadata={"kind": "blob", "code": f"{length}s", "length": length})


def fifo(capacity: int) -> Any:
    """At most ``capacity`` bytes; the record always has room for all of them."""
    code = f"I{capacity}s"
    return field(default=b"", metadata={"kind": "fifo", "code": code, "length": capacity})


def array(code: str, length: int, default: int = 0, maximum: int | None = None, minimum: int | None = None) -> Any:
    """A tuple of ``length`` numbers of the struct code ``code`` (B, H, I, Q or q)."""
    low, high = _RANGES[code]
    meta = {
        "kind": "array",
        "code": code * length,
        "length": length,
        "minimum": low if minimum is None else minimum,
        "maximum": high if maximum is None else maximum,
    }
    return field(default=(default,) * length, metadata=meta)


@runtime_checkable
class Device(Protocol):
    """A device as the bus and the machine see it. All offsets are its own; it does not know where it lives."""

    @property
    def name(self) -> str:
        """Short name for statistics and messages, unique in a machine."""

    def read(self, offset: int, size: int) -> int:
        """A load of ``size`` bytes (1, 2, 4 or 8). Has the register's side effects."""

    def write(self, offset: int, size: int, value: int) -> None:
        """A store of ``size`` bytes; ``value`` fits them."""

    def reset(self) -> None:
        """Power-on state; interrupt lines are released."""

    def state(self) -> StateRecord:
        """A snapshot of everything the guest could notice."""

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives the interrupt lines accordingly. StateError leaves the device as it was."""


@runtime_checkable
class TimedDevice(Device, Protocol):
    """A device in which something happens by itself as time passes."""

    def deadline(self) -> int | None:
        """Machine time (ns) of its next event that nobody may miss; None if there is none."""

    def advance(self, now_ns: int) -> None:
        """Let time pass up to ``now_ns``: events that are due happen."""


@runtime_checkable
class BlockDevice(Device, Protocol):
    """A device that takes REP INS and REP OUTS in one call."""

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """``count`` loads of ``size`` bytes from the same register; exactly ``size * count`` bytes."""

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """Stores of ``size`` bytes each to the same register."""


def capture(kind: type[S], device: object, /, **others: object) -> S:
    """
    A record of ``device``: a field's value is the attribute of its name after an underscore, or one of ``others``.

    Bytes and tuples are copies of what the device changes in place (bytearrays, lists).
    """
    values: dict[str, Any] = {}
    for f in kind.parts():
        if f.name in others:
            values[f.name] = others[f.name]
            continue
        value = getattr(device, f"_{f.name}")
        what = f.metadata["kind"]
        values[f.name] = bytes(value) if what in ("blob", "fifo") else tuple(value) if what == "array" else value
    return kind(**values)


def assign(device: object, state: StateRecord, *others: str) -> None:
    """Give ``device`` the attributes that :func:`capture` reads, but for ``others``; with copies of its own."""
    for f in state.parts():
        if f.name not in others:
            value = getattr(state, f.name)
            what = f.metadata["kind"]
            value = bytearray(value) if what in ("blob", "fifo") else list(value) if what == "array" else value
            setattr(device, f"_{f.name}", value)


def expect(kind: type[S], state: StateRecord) -> S:
    """``state`` as a checked record of ``kind``. StateError if it is another device's or hostile."""
    if not isinstance(state, kind):
        raise StateError(f"{kind.NAME} state: got a record of {type(state).__name__}")
    state.check()
    return state
