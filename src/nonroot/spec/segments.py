"""Descriptors, loads of segment registers, and checks of accesses through them (SDM 3A chapters 3 and 5)."""

from nonroot.spec import paging
from nonroot.spec.state import GP, MASK64, NP, SS, Fault, Segment, State, canonical

UNUSABLE = 0x10000


def parse(selector: int, descriptor: int) -> Segment:
    """The hidden part that an 8-byte descriptor describes (SDM 3A 3.4.5)."""
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    if descriptor >> 55 & 1:
        limit = limit << 12 | 0xFFF
    base = descriptor >> 16 & 0xFF_FFFF | descriptor >> 32 & 0xFF00_0000
    access = descriptor >> 40 & 0xF0FF
    return Segment(selector, base, limit, access)


def table_of(state: State, selector: int) -> tuple[int, int] | None:
    """Base and limit of the table that a selector refers to; None for an LDT that is not there (SDM 3A 3.5.1)."""
    if selector & 4:
        ldtr = state.segments["ldtr"]
        return (ldtr.base, ldtr.limit) if ldtr.usable else None
    return state.gdtr


def fetch(state: State, selector: int, vector: int = GP, external: int = 0, size: int = 8) -> int:
    """The descriptor of a selector; the given exception with the selector if it lies outside its table."""
    table = table_of(state, selector)
    if table is None or (selector & ~7) + size - 1 > table[1]:
        raise Fault(vector, selector & 0xFFFC | external)
    return paging.read(state, table[0] + (selector & ~7), size, implicit=True)


def mark_accessed(state: State, selector: int, descriptor: int) -> None:
    """Sets a code or data descriptor's accessed bit in its table (SDM 3A 3.4.5.1)."""
    if descriptor >> 40 & 1:
        return
    table = table_of(state, selector)
    assert table is not None
    paging.write(state, table[0] + (selector & ~7) + 5, 1, descriptor >> 40 & 0xFF | 1, implicit=True)


def load(state: State, name: str, selector: int) -> None:
    """MOV to DS, ES, FS, GS or SS in protected or long mode (SDM 2B, MOV, "Protected Mode Exceptions")."""
    if name == "ss":
        _load_stack(state, selector)
        return
    if selector & 0xFFFC == 0:
        state.segments[name] = Segment(selector)
        return
    descriptor = fetch(state, selector)
    segment = parse(selector, descriptor)
    if not segment.code_or_data or not segment.readable:
        raise Fault(GP, selector & 0xFFFC)
    conforming_code = segment.is_code and segment.conforming
    if not conforming_code and (selector & 3 > segment.dpl or state.cpl > segment.dpl):
        raise Fault(GP, selector & 0xFFFC)
    if not segment.present:
        raise Fault(NP, selector & 0xFFFC)
    mark_accessed(state, selector, descriptor)
    state.segments[name] = parse(selector, descriptor | 1 << 40)


def _load_stack(state: State, selector: int) -> None:
    if selector & 0xFFFC == 0:
        if not state.mode64 or state.cpl == 3 or selector & 3 != state.cpl:
            raise Fault(GP, 0)
        state.segments["ss"] = Segment(selector, access=UNUSABLE | state.cpl << 5)
        return
    descriptor = fetch(state, selector)
    segment = parse(selector, descriptor)
    if selector & 3 != state.cpl or not segment.writable or segment.dpl != state.cpl:
        raise Fault(GP, selector & 0xFFFC)
    if not segment.present:
        raise Fault(SS, selector & 0xFFFC)
    mark_accessed(state, selector, descriptor)
    state.segments["ss"] = parse(selector, descriptor | 1 << 40)


def linear_address(state: State, name: str, offset: int, size: int, *, write: bool) -> int:
    """The linear address of a data access, with all checks of segmentation (SDM 3A 5.3, 5.4.1; 1 3.4.2.1)."""
    segment = state.segments[name]
    fault = Fault(SS if name == "ss" else GP, 0)
    if state.mode64:
        base = segment.base if name in ("fs", "gs") else 0
        linear = (base + offset) & MASK64
        if not canonical(linear) or not canonical((linear + size - 1) & MASK64):
            raise fault
        return linear
    if not segment.usable:
        raise fault
    if state.protected and ((write and not segment.writable) or (not write and not segment.readable)):
        raise fault
    if not within(segment, offset, size):
        raise fault
    return (segment.base + offset) & 0xFFFF_FFFF


def within(segment: Segment, offset: int, size: int) -> bool:
    """Whether an access lies inside a segment's limit (SDM 3A 5.3)."""
    last = offset + size - 1
    if segment.is_data and segment.expand_down:
        return offset > segment.limit and last <= (0xFFFF_FFFF if segment.big else 0xFFFF)
    return last <= segment.limit
