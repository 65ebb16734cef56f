"""
The complete architectural state of one vCPU, independent of the engine that runs it.

:class:`VcpuState` is what :meth:`nonroot.engines.protocol.Vcpu.state` returns and ``set_state`` takes: a domain saved
under one engine resumes under another. As bytes it is a named, versioned record; loading checks everything, then
applies.

Take it between an instruction's exits, not in the middle of one: answer the last exit first, then run once after
``kick``. An access that the caller has not answered is simply made again after ``set_state``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Final, Self

__all__ = ["SEGMENT_NAMES", "Event", "Message", "Segment", "StateError", "TableRegister", "VcpuState"]

_U64: Final = (1 << 64) - 1
SEGMENT_NAMES: Final = ("es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr")

_PHYSICAL: Final = (1 << 40) - 1
_CR0: Final = 0xE005003F
_CR4: Final = 0x0077_1FFF
_EFER: Final = 0xD01
_RFLAGS: Final = 0x3F7FD7
_ACCESS: Final = 0x1F0FF


class StateError(ValueError):
    """A record that no vCPU can be in; the message names the field in one sentence."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part."""

    selector: int
    #: Linear base address.
    base: int
    #: Limit in bytes, granularity applied.
    limit: int
    #: Access rights in VMX's layout: type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15, unusable 16.
    access: int

    @property
    def dpl(self) -> int:
        """Descriptor privilege level."""
        return self.access >> 5 & 3


@dataclass(frozen=True, slots=True)
class TableRegister:
    """GDTR or IDTR."""

    base: int
    limit: int


@dataclass(frozen=True, slots=True)
class Event:
    """An event on its way to the guest when the record was taken."""

    #: 0 external interrupt, 1 NMI, 2 exception, 3 INT n, 4 INT1, 5 INT3 or INTO.
    kind: int
    vector: int
    error: int | None


@dataclass(frozen=True, slots=True)
class Message:
    """An interrupt message that the local APIC has not seen yet."""

    vector: int
    #: See :class:`nonroot.engines.exits.DeliveryMode`.
    mode: int
    level: bool


@dataclass(frozen=True)
class VcpuState:
    """One vCPU. All numbers are unsigned."""

    NAME: ClassVar[str] = "vcpu"
    VERSION: ClassVar[int] = 1

    #: RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 … R15.
    gpr: tuple[int, ...]
    rip: int
    rflags: int
    #: ES, CS, SS, DS, FS, GS, LDTR, TR; SS.DPL is the current privilege level.
    segments: tuple[Segment, ...]
    gdtr: TableRegister
    idtr: TableRegister
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    xcr0: int
    #: DR0 … DR3.
    dr: tuple[int, ...]
    dr6: int
    dr7: int
    #: The four page-directory pointers of 32-bit PAE paging, as loaded with CR3.
    pdpte: tuple[int, ...]
    #: x87, MMX, XMM and MXCSR as FXSAVE64 stores them, 512 bytes.
    fx: bytes
    #: Upper halves of YMM0 … YMM15, 256 bytes.
    ymm_high: bytes
    #: Model-specific registers by index, but those that are fields here.
    msrs: Mapping[int, int]
    #: Guest TSC minus machine TSC, modulo 2**64.
    tsc_offset: int
    #: The local APIC's own record.
    lapic: bytes
    #: 0 running, 1 halted, 2 waiting for a start-up IPI, 3 shut down.
    activity: int
    #: Interrupt shadow: 1 after STI, 2 after a load of SS.
    shadow: int
    nmi_blocked: bool
    nmi_pending: bool
    #: The PIC's INTR output.
    pic_line: bool
    #: A vector that the PIC has given, not yet delivered.
    pic_vector: int | None
    #: A vector of ``interrupt``, not yet delivered.
    injected: int | None
    event: Event | None
    #: DR6 bits of debug traps to report before the next instruction.
    pending_db: int
    messages: tuple[Message, ...]
    #: Machine time in ns.
    now_ns: int
    #: Instructions retired.
    retired: int

    def segment(self, name: str) -> Segment:
        """A segment register by its name in :data:`SEGMENT_NAMES`."""
        return self.segments[SEGMENT_NAMES.index(name)]

    @property
    def cpl(self) -> int:
        """Current privilege level."""
        if not self.cr0 & 1:
            return 0
        return 3 if self.rflags >> 17 & 1 else self.segment("ss").dpl

    def check(self) -> Self:
        """The state itself. StateError if no vCPU can be in it."""
        if "_checked" not in self.__dict__:
            _check(self)
            object.__setattr__(self, "_checked", True)  # it does not change
        return self

    def to_raw(self) -> dict[str, Any]:
        """The dictionary that the Rust engines take."""
        raw = {f.name: getattr(self, f.name) for f in fields(self)}
        raw["segments"] = tuple((s.selector, s.base, s.limit, s.access) for s in self.segments)
        raw["gdtr"] = (self.gdtr.base, self.gdtr.limit)
        raw["idtr"] = (self.idtr.base, self.idtr.limit)
        raw["msrs"] = dict(self.msrs)
        raw["event"] = None if self.event is None else (self.event.kind, self.event.vector, self.event.error)
        raw["messages"] = tuple((m.vector, m.mode, m.level) for m in self.messages)
        return raw

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> Self:
        """The record of an engine's dictionary."""
        values = dict(raw)
        values["segments"] = tuple(Segment(*s) for s in raw["segments"])
        values["gdtr"] = TableRegister(*raw["gdtr"])
        values["idtr"] = TableRegister(*raw["idtr"])
        values["event"] = None if raw["event"] is None else Event(*raw["event"])
        values["messages"] = tuple(Message(*m) for m in raw["messages"])
        return cls(**values)

    def to_bytes(self) -> bytes:
        """The versioned record: fixed part, then MSRs, messages and the local APIC's record."""
        self.check()
        flat: list[int] = [*self.gpr, self.rip, self.rflags]
        for s in self.segments:
            flat += [s.selector, s.base, s.limit, s.access]
        flat += [self.gdtr.base, self.gdtr.limit, self.idtr.base, self.idtr.limit]
        flat += [self.cr0, self.cr2, self.cr3, self.cr4, self.efer, self.xcr0, *self.dr, self.dr6, self.dr7]
        flat += [*self.pdpte, self.tsc_offset, self.activity, self.shadow]
        flat += [self.nmi_blocked, self.nmi_pending, self.pic_line]
        flat += [_option(self.pic_vector), _option(self.injected)]
        event = self.event
        flat += [0, 0, 0] if event is None else [event.kind + 1, event.vector, _option(event.error)]
        flat += [self.pending_db, self.now_ns, self.retired]
        flat += [len(self.msrs), len(self.messages), len(self.lapic)]
        body = struct.pack(f"<{_NUMBERS}Q", *flat) + self.fx + self.ymm_high
        for index in sorted(self.msrs):
            body += struct.pack("<IQ", index, self.msrs[index])
        for m in self.messages:
            body += struct.pack("<BBB", m.vector, m.mode, m.level)
        body += self.lapic
        return _HEADER.pack(_MAGIC, self.VERSION, len(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """The state in a record of :meth:`to_bytes`. StateError if it is damaged or no vCPU can be in that state."""
        return cls(**_parse(data)).check()


_MAGIC: Final = b"NRvcpu\0\0"
_HEADER: Final = struct.Struct("<8sII")
_NUMBERS: Final = 18 + 32 + 4 + 6 + 4 + 2 + 4 + 3 + 3 + 2 + 3 + 3 + 3
_FIXED: Final = 8 * _NUMBERS + 512 + 256


def _option(value: int | None) -> int:
    return 0 if value is None else value + 1


def _require(condition: bool, field: str, reason: str = "is not possible") -> None:
    if not condition:
        raise StateError(f"the vCPU state's {field} {reason}")


def _number(value: object, bits: int, field: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise StateError(f"the vCPU state's {field} is no unsigned number of {bits} bits")
    return value


def _canonical(address: int) -> bool:
    return address < 1 << 47 or address >= (1 << 64) - (1 << 47)


def _check_shape(s: VcpuState) -> None:
    for name, length in (("gpr", 16), ("dr", 4), ("pdpte", 4)):
        values = getattr(s, name)
        _require(isinstance(values, tuple) and len(values) == length, name, f"has not {length} items")
        for value in values:
            _number(value, 64, name)
    for name in ("rip", "rflags", "cr0", "cr2", "cr3", "cr4", "efer", "xcr0", "dr6", "dr7", "pending_db"):
        _number(getattr(s, name), 64, name)
    for name in ("tsc_offset", "now_ns", "retired"):
        _number(getattr(s, name), 64, name)
    _number(s.activity, 8, "activity")
    _number(s.shadow, 8, "shadow")
    for name in ("nmi_blocked", "nmi_pending", "pic_line"):
        _require(isinstance(getattr(s, name), bool), name, "is no truth value")
    for name in ("pic_vector", "injected"):
        if getattr(s, name) is not None:
            _number(getattr(s, name), 8, name)
    _require(len(s.segments) == 8, "segments", "are not 8")
    for name, segment in zip(SEGMENT_NAMES, s.segments, strict=True):
        _number(segment.selector, 16, f"{name} selector")
        _number(segment.base, 64, f"{name} base")
        _number(segment.limit, 32, f"{name} limit")
        _number(segment.access, 32, f"{name} access rights")
    for name, table in (("gdtr", s.gdtr), ("idtr", s.idtr)):
        _number(table.base, 64, f"{name} base")
        _number(table.limit, 16, f"{name} limit")
    for name, length in (("fx", 512), ("ymm_high", 256)):
        value = getattr(s, name)
        _require(isinstance(value, bytes) and len(value) == length, name, f"has not {length} bytes")
    _require(len(s.lapic) < 1 << 16, "lapic", "is no record")
    for index, value in s.msrs.items():
        _number(value, 64, f"MSR {_number(index, 32, 'MSR index'):#x}")
    if s.event is not None:
        _number(s.event.vector, 8, "event vector")
        _require(_number(s.event.kind, 8, "event kind") <= 5, "event kind")
        if s.event.error is not None:
            _number(s.event.error, 32, "event error code")
    for message in s.messages:
        _number(message.vector, 8, "message vector")
        _require(_number(message.mode, 8, "message mode") in (0, 1, 2, 4, 5, 6, 7), "message mode")
        _require(isinstance(message.level, bool), "message level", "is no truth value")


def _check(s: VcpuState) -> None:
    """The rules that VM entry checks in hardware too (SDM 3C, "Checks on the guest state area")."""
    _check_shape(s)
    _require(s.rflags & ~_RFLAGS == 0 and s.rflags & 2 != 0, "rflags")
    _require(s.cr0 & ~_CR0 == 0, "cr0")
    protected, paging = bool(s.cr0 & 1), bool(s.cr0 >> 31 & 1)
    _require(protected or not paging, "cr0", "has paging without protection")
    _require(not s.cr0 >> 29 & 1 or bool(s.cr0 >> 30 & 1), "cr0", "has NW without CD")
    _require(s.cr4 & ~_CR4 == 0, "cr4")
    _require(s.efer & ~_EFER == 0, "efer")
    long_mode = bool(s.efer >> 10 & 1)
    _require(long_mode == (paging and bool(s.efer >> 8 & 1)), "efer", "has LMA at odds with LME and paging")
    _require(not long_mode or bool(s.cr4 >> 5 & 1), "cr4", "has no PAE in long mode")
    _require(not s.cr4 >> 17 & 1 or long_mode, "cr4", "has PCIDE outside long mode")
    _require(s.cr3 & ~_PHYSICAL == 0, "cr3")
    _require(s.xcr0 in (1, 3, 7), "xcr0")
    _require(s.dr6 >> 32 == 0 and s.dr7 >> 32 == 0, "dr6 or dr7")
    _require(s.pending_db & ~0xE00F == 0, "pending_db")
    _require(s.activity <= 3, "activity")
    _require(s.shadow <= 3, "shadow")
    virtual_8086 = bool(s.rflags >> 17 & 1)
    _require(not virtual_8086 or (protected and not long_mode), "rflags", "has VM where it cannot be set")
    for name, segment in zip(SEGMENT_NAMES, s.segments, strict=True):
        _require(segment.access & ~_ACCESS == 0, f"{name} access rights")
        if long_mode:
            _require(_canonical(segment.base), f"{name} base", "is not canonical")
        else:
            _require(segment.base >> 32 == 0 or name in ("fs", "gs", "ldtr", "tr"), f"{name} base")
    cs = s.segment("cs")
    _require(not (long_mode and cs.access >> 13 & 1 and cs.access >> 14 & 1), "cs access rights", "have both L and D")
    for name, table in (("gdtr", s.gdtr), ("idtr", s.idtr)):
        _require(_canonical(table.base), f"{name} base", "is not canonical")
    mxcsr = int.from_bytes(s.fx[24:28], "little")
    _require(mxcsr & ~0xFFFF == 0, "mxcsr")


def _parse(data: bytes) -> dict[str, Any]:
    if len(data) < _HEADER.size + _FIXED:
        raise StateError("the vCPU record is too short")
    magic, version, length = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise StateError("this is no vCPU record")
    if version != VcpuState.VERSION:
        raise StateError(f"the vCPU record has version {version}, this nonroot reads version {VcpuState.VERSION}")
    if length != len(data) - _HEADER.size:
        raise StateError("the vCPU record's length is wrong")
    numbers = iter(struct.unpack_from(f"<{_NUMBERS}Q", data, _HEADER.size))

    def take(count: int) -> tuple[int, ...]:
        return tuple(next(numbers) for _ in range(count))

    def flag(name: str) -> bool:
        value = next(numbers)
        _require(value <= 1, name, "is no truth value")
        return bool(value)

    def optional(name: str, bits: int) -> int | None:
        value = next(numbers)
        _require(value <= 1 << bits, name)
        return None if value == 0 else value - 1

    v: dict[str, Any] = {"gpr": take(16), "rip": next(numbers), "rflags": next(numbers)}
    v["segments"] = tuple(Segment(*take(4)) for _ in range(8))
    v["gdtr"], v["idtr"] = TableRegister(*take(2)), TableRegister(*take(2))
    for name in ("cr0", "cr2", "cr3", "cr4", "efer", "xcr0"):
        v[name] = next(numbers)
    v["dr"], v["dr6"], v["dr7"], v["pdpte"] = take(4), next(numbers), next(numbers), take(4)
    v["tsc_offset"], v["activity"], v["shadow"] = take(3)
    for name in ("nmi_blocked", "nmi_pending", "pic_line"):
        v[name] = flag(name)
    v["pic_vector"], v["injected"] = optional("pic_vector", 8), optional("injected", 8)
    kind, vector, error = next(numbers), next(numbers), optional("event error code", 32)
    _require(kind <= 6 and (kind != 0 or (vector == 0 and error is None)), "event")
    v["event"] = None if kind == 0 else Event(kind - 1, vector, error)
    v["pending_db"], v["now_ns"], v["retired"] = take(3)
    msrs, messages, lapic = take(3)
    at = _HEADER.size + 8 * _NUMBERS
    v["fx"], v["ymm_high"] = data[at : at + 512], data[at + 512 : at + 768]
    if _HEADER.size + _FIXED + 12 * msrs + 3 * messages + lapic != len(data):
        raise StateError("the vCPU record's counts do not fit its length")
    at += 768
    pairs = [struct.unpack_from("<IQ", data, at + 12 * i) for i in range(msrs)]
    _require(pairs == sorted(dict(pairs).items()), "msrs", "are not in order")
    v["msrs"] = dict(pairs)
    at += 12 * msrs
    raw_messages = [struct.unpack_from("<BBB", data, at + 3 * i) for i in range(messages)]
    _require(all(level <= 1 for _, _, level in raw_messages), "message level", "is no truth value")
    v["messages"] = tuple(Message(vector, mode, bool(level)) for vector, mode, level in raw_messages)
    v["lapic"] = data[at + 3 * messages :]
    return v
