"""Delivery of exceptions and interrupts through the IDT (SDM 3A chapter 6; SDM 2A, INT n, "Operation")."""

import enum

from nonroot.spec import paging, segments
from nonroot.spec.state import (
    AC,
    DF,
    GP,
    IF,
    MASK64,
    NP,
    NT,
    PF,
    RF,
    SS,
    TF,
    TS,
    VM,
    Fault,
    Segment,
    State,
    canonical,
)  # fmt: skip


class Kind(enum.Enum):
    """Where an event comes from."""

    #: INT n, INT3, INTO: the gate's DPL is checked.
    SOFTWARE = "software"
    EXCEPTION = "exception"
    EXTERNAL = "external"


#: Exceptions that push an error code (SDM 3A table 6-1).
WITH_ERROR = frozenset({8, 10, 11, 12, 13, 14, 17})
_CONTRIBUTORY = frozenset({0, TS, NP, SS, GP})


def combine(first: int, second: int) -> int | None:
    """The vector to deliver when delivering ``first`` raises ``second``; None for a shutdown (SDM 3A 6.15, #DF)."""
    if first == DF:
        return None if second in _CONTRIBUTORY or second == PF else second
    if first in _CONTRIBUTORY and second in _CONTRIBUTORY:
        return DF
    if first == PF and (second in _CONTRIBUTORY or second == PF):
        return DF
    return second


def deliver(state: State, vector: int, kind: Kind, error: int | None = None, *, is_fault: bool = False) -> None:
    """Goes to the handler of an event. ``state.rip`` is the return address.

    ``is_fault``: a fault-class exception, whose saved RFLAGS has RF set (SDM 3A 17.3.1.1). Raises the exception that
    delivery itself meets; ``state`` is then unchanged but for accessed flags.
    """
    trial = state.copy()
    if not state.cr0 & 1:
        _real(trial, vector)
    elif state.long_mode:
        _long(trial, vector, kind, error, is_fault)
    else:
        _protected(trial, vector, kind, error, is_fault)
    state.__dict__.update(trial.__dict__)


def _real(state: State, vector: int) -> None:
    """SDM 3A 20.1.4: the vector table holds IP and CS."""
    base, limit = state.idtr
    if 4 * vector + 3 > limit:
        raise Fault(GP, None)
    target = paging.read(state, (base + 4 * vector) & 0xFFFF_FFFF, 4)
    sp = state.gpr[4]
    for value in (state.rflags, state.segments["cs"].selector, state.rip):
        offset = (sp - 2) & 0xFFFF
        if not segments.within(state.segments["ss"], offset, 2):
            raise Fault(SS, None)
        paging.write(state, (state.segments["ss"].base + offset) & 0xFFFF_FFFF, 2, value)
        sp = sp & ~0xFFFF | offset
    state.gpr[4] = sp
    selector = target >> 16
    old = state.segments["cs"]
    state.segments["cs"] = Segment(selector, selector << 4, old.limit, old.access)
    state.rip = target & 0xFFFF
    state.rflags &= ~(IF | TF | AC)


def _gate(state: State, vector: int, kind: Kind, size: int, types: tuple[int, ...]) -> tuple[int, int]:
    """Reads and checks an IDT gate; returns (gate, EXT)."""
    external = 0 if kind is Kind.SOFTWARE else 1
    error = 8 * vector + 2 + external
    base, limit = state.idtr
    if size * vector + size - 1 > limit:
        raise Fault(GP, error)
    mask = MASK64 if state.long_mode else 0xFFFF_FFFF
    gate = paging.read(state, (base + size * vector) & mask, size, implicit=True)
    if gate >> 40 & 0x1F not in types:
        raise Fault(GP, error)
    if kind is Kind.SOFTWARE and gate >> 45 & 3 < state.cpl:
        raise Fault(GP, error)
    if not gate >> 47 & 1:
        raise Fault(NP, error)
    return gate, external


def _target(state: State, selector: int, external: int) -> tuple[Segment, int]:
    """The code segment that a gate leads to, and its descriptor."""
    if selector & 0xFFFC == 0:
        raise Fault(GP, external)
    descriptor = segments.fetch(state, selector, GP, external)
    segment = segments.parse(selector, descriptor)
    if not segment.is_code or segment.dpl > state.cpl:
        raise Fault(GP, selector & 0xFFFC | external)
    if state.long_mode and (not segment.long or segment.big):
        raise Fault(GP, selector & 0xFFFC | external)
    if not segment.present:
        raise Fault(NP, selector & 0xFFFC | external)
    return segment, descriptor


def _flags_to_push(state: State, is_fault: bool) -> int:
    return state.rflags | RF if is_fault else state.rflags


def _enter(state: State, gate: int, offset: int, segment: Segment, descriptor: int, cpl: int) -> None:
    """The last steps: CS, RIP, RFLAGS (SDM 3A 6.12.1.3)."""
    selector = segment.selector & ~3 | cpl
    segments.mark_accessed(state, segment.selector, descriptor)
    state.segments["cs"] = segments.parse(selector, descriptor | 1 << 40)
    state.rip = offset
    state.rflags &= ~(TF | NT | RF | VM)
    if not gate >> 40 & 1:  # interrupt gate
        state.rflags &= ~IF


def stack_from_tss(state: State, dpl: int, external: int) -> tuple[int, int]:
    """SS and ESP for a privilege level from the task-state segment (SDM 3A 6.12.1, 7.2.1)."""
    tr = state.segments["tr"]
    wide = bool(tr.type & 8)  # 32-bit TSS
    at = dpl * 8 + 4 if wide else dpl * 4 + 2
    if at + (5 if wide else 3) > tr.limit:
        raise Fault(TS, tr.selector & 0xFFFC | external)
    size = 4 if wide else 2
    pointer = paging.read(state, (tr.base + at) & 0xFFFF_FFFF, size, implicit=True)
    selector = paging.read(state, (tr.base + at + size) & 0xFFFF_FFFF, 2, implicit=True)
    return selector, pointer


def checked_stack(state: State, selector: int, dpl: int, external: int) -> tuple[Segment, int]:
    """The new stack segment of a privilege change, and its descriptor."""
    if selector & 0xFFFC == 0:
        raise Fault(TS, external)
    descriptor = segments.fetch(state, selector, TS, external)
    segment = segments.parse(selector, descriptor)
    if selector & 3 != dpl or segment.dpl != dpl or not segment.writable:
        raise Fault(TS, selector & 0xFFFC | external)
    if not segment.present:
        raise Fault(SS, selector & 0xFFFC | external)
    return segment, descriptor


def _protected(state: State, vector: int, kind: Kind, error: int | None, is_fault: bool) -> None:
    """Protected mode (SDM 3A 6.12.1)."""
    gate, external = _gate(state, vector, kind, 8, (0x6, 0x7, 0xE, 0xF))
    selector, size = gate >> 16 & 0xFFFF, 4 if gate >> 43 & 1 else 2
    offset = gate & 0xFFFF | (gate >> 32 & 0xFFFF_0000 if size == 4 else 0)
    segment, descriptor = _target(state, selector, external)
    frame = [_flags_to_push(state, is_fault), state.segments["cs"].selector, state.rip]
    if error is not None:
        frame.append(error)
    inner = not segment.conforming and segment.dpl < state.cpl
    if not inner and not segment.conforming and segment.dpl != state.cpl:
        raise Fault(GP, selector & 0xFFFC | external)
    if inner:
        cpl = segment.dpl
        stack_selector, pointer = stack_from_tss(state, cpl, external)
        stack, stack_descriptor = checked_stack(state, stack_selector, cpl, external)
        frame = [state.segments["ss"].selector, state.gpr[4] & 0xFFFF_FFFF, *frame]
        segments.mark_accessed(state, stack_selector, stack_descriptor)
        stack = segments.parse(stack_selector, stack_descriptor | 1 << 40)
        error_selector = stack_selector & 0xFFFC
    else:
        cpl = state.cpl
        stack, pointer = state.segments["ss"], state.gpr[4]
        error_selector = 0
    check_room(stack, pointer, len(frame), size, Fault(SS, error_selector | external))
    if offset > segment.limit:
        raise Fault(GP, external)
    push_all(state, stack, pointer, frame, size, cpl)
    _enter(state, gate, offset, segment, descriptor, cpl)


def check_room(stack: Segment, pointer: int, count: int, size: int, fault: Fault) -> None:
    """Raises ``fault`` if ``count`` values of ``size`` bytes do not fit below ``pointer``."""
    mask = 0xFFFF_FFFF if stack.big else 0xFFFF
    for number in range(count):
        if not segments.within(stack, (pointer - size * (number + 1)) & mask, size):
            raise fault


def push_all(state: State, stack: Segment, pointer: int, values: list[int], size: int, cpl: int) -> None:
    """Pushes onto a stack that may be a new one, with the rights of ``cpl``, and makes it the current stack."""
    mask = 0xFFFF_FFFF if stack.big else 0xFFFF
    sp = pointer & mask
    state.segments["ss"] = stack if stack.dpl == cpl else state.segments["ss"]
    for value in values:
        sp = (sp - size) & mask
        paging.write(state, (stack.base + sp) & 0xFFFF_FFFF, size, value)
    state.segments["ss"] = stack
    state.gpr[4] = sp if stack.big else pointer & ~0xFFFF & 0xFFFF_FFFF | sp


def _long(state: State, vector: int, kind: Kind, error: int | None, is_fault: bool) -> None:
    """IA-32e mode: 16-byte gates, IST, an aligned frame with SS:RSP (SDM 3A 6.14)."""
    gate, external = _gate(state, vector, kind, 16, (0xE, 0xF))
    selector, ist = gate >> 16 & 0xFFFF, gate >> 32 & 7
    offset = gate & 0xFFFF | gate >> 32 & 0xFFFF_0000 | (gate >> 64 & 0xFFFF_FFFF) << 32
    segment, descriptor = _target(state, selector, external)
    inner = not segment.conforming and segment.dpl < state.cpl
    if not inner and not segment.conforming and segment.dpl != state.cpl:
        raise Fault(GP, selector & 0xFFFC | external)
    cpl = segment.dpl if inner else state.cpl
    rsp = state.gpr[4]
    old_ss = state.segments["ss"].selector
    if inner or ist:
        tr = state.segments["tr"]
        at = 28 + 8 * ist if ist else 4 + 8 * cpl
        if at + 7 > tr.limit:
            raise Fault(TS, tr.selector & 0xFFFC | external)
        rsp = paging.read(state, (tr.base + at) & MASK64, 8, implicit=True)
    frame = [old_ss, state.gpr[4], _flags_to_push(state, is_fault), state.segments["cs"].selector, state.rip]
    if error is not None:
        frame.append(error)
    if not canonical(rsp):
        raise Fault(SS, external)
    if not canonical(offset):
        raise Fault(GP, external)
    sp = rsp & ~15
    if inner:
        state.segments["ss"] = Segment(cpl, access=segments.UNUSABLE | cpl << 5)
    for value in frame:
        sp = (sp - 8) & MASK64
        if not canonical(sp):
            raise Fault(SS, external)
        paging.write(state, sp, 8, value)
    state.gpr[4] = sp
    _enter(state, gate, offset, segment, descriptor, cpl)
