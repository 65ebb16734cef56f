"""Page walks: linear to physical addresses with permissions, accessed and dirty flags (SDM 3A chapter 4)."""

import enum

from nonroot.spec.state import (
    AC,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_NXE,
    PF,
    PHYSICAL_BITS,
    Fault,
    State,
)  # fmt: skip

PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
EXECUTE_DISABLE = 1 << 63
_ADDRESS = ((1 << 52) - 1) & ~0xFFF


class Access(enum.Enum):
    """What an access does."""

    READ = "read"
    WRITE = "write"
    EXECUTE = "execute"


def translate(state: State, linear: int, access: Access, *, implicit: bool = False) -> int:
    """The physical address of a linear one; sets accessed and dirty flags. Raises #PF.

    ``implicit``: an access to a system table, which is a supervisor access at any CPL (SDM 3A 4.6.1).
    """
    if not state.cr0 & CR0_PG:
        return linear & 0xFFFF_FFFF
    user = state.cpl == 3 and not implicit
    error = _error_code(state, access, user)
    used: list[tuple[int, int, int]] = []
    entries = _walk(state, linear, error, used)
    writable, as_user, no_execute, physical = entries
    _check(state, linear, access, user, implicit, error, writable, as_user, no_execute)
    _set_flags(state, used, access)
    return physical


def _error_code(state: State, access: Access, user: bool) -> int:
    """The page-fault error code without P and RSVD (SDM 3A 4.7)."""
    error = 4 if user else 0
    if access is Access.WRITE:
        error |= 2
    fetches_show = (state.cr4 & CR4_PAE and state.efer & EFER_NXE) or state.cr4 & CR4_SMEP
    if access is Access.EXECUTE and fetches_show:
        error |= 16
    return error


def _walk(state: State, linear: int, error: int, used: list[tuple[int, int, int]]) -> tuple[bool, bool, bool, int]:
    """Goes down the tables; returns (writable, user, execute-disable, physical) combined over all levels."""
    if state.long_mode:  # 4-level paging, SDM 3A 4.5
        return _walk_wide(state, linear, error, used, state.cr3 & _ADDRESS, levels=4)
    linear &= 0xFFFF_FFFF
    if state.cr4 & CR4_PAE:  # SDM 3A 4.4
        pointer = state.pdpte[linear >> 30]
        if not pointer & PRESENT:
            raise Fault(PF, error, linear)
        return _walk_wide(state, linear, error, used, pointer & _ADDRESS, levels=2)
    return _walk_narrow(state, linear, error, used)  # SDM 3A 4.3


def _walk_wide(
    state: State, linear: int, error: int, used: list[tuple[int, int, int]], table: int, levels: int
) -> tuple[bool, bool, bool, int]:
    writable = as_user = True
    no_execute = False
    for level in range(levels, 0, -1):
        shift = 12 + 9 * (level - 1)
        at = table + (linear >> shift & 0x1FF) * 8
        entry = state.memory.read(at, 8)
        if not entry & PRESENT:
            raise Fault(PF, error, linear)
        reserved = ((1 << 52) - 1) & ~((1 << PHYSICAL_BITS) - 1)
        if levels == 2:
            reserved |= 0x7FF << 52  # PAE entries reserve what 4-level entries ignore
        if not state.efer & EFER_NXE:
            reserved |= EXECUTE_DISABLE
        large = level > 1 and bool(entry & LARGE)
        if level == 4:
            reserved |= LARGE
        elif large:
            reserved |= (1 << shift) - (1 << 13)  # address bits below the page size, but PAT (bit 12)
        if entry & reserved:
            raise Fault(PF, error | 9, linear)
        used.append((at, 8, entry))
        writable &= bool(entry & WRITABLE)
        as_user &= bool(entry & USER)
        no_execute |= bool(entry & EXECUTE_DISABLE)
        if level == 1 or large:
            offset = (1 << shift) - 1
            return writable, as_user, no_execute, entry & _ADDRESS & ~offset | linear & offset
        table = entry & _ADDRESS
    raise AssertionError("the last level maps a page")


def _walk_narrow(
    state: State, linear: int, error: int, used: list[tuple[int, int, int]]
) -> tuple[bool, bool, bool, int]:
    at = (state.cr3 & 0xFFFF_F000) + (linear >> 22) * 4
    directory = state.memory.read(at, 4)
    if not directory & PRESENT:
        raise Fault(PF, error, linear)
    if directory & LARGE and state.cr4 & CR4_PSE:
        if directory & 1 << 21:  # with 40 physical bits, bits 20:13 are address bits 39:32 and only bit 21 is reserved
            raise Fault(PF, error | 9, linear)
        used.append((at, 4, directory))
        physical = directory & 0xFFC0_0000 | (directory >> 13 & 0xFF) << 32 | linear & 0x3F_FFFF
        return bool(directory & WRITABLE), bool(directory & USER), False, physical
    used.append((at, 4, directory))
    at = (directory & 0xFFFF_F000) + (linear >> 12 & 0x3FF) * 4
    entry = state.memory.read(at, 4)
    if not entry & PRESENT:
        raise Fault(PF, error, linear)
    used.append((at, 4, entry))
    both = directory & entry
    return bool(both & WRITABLE), bool(both & USER), False, entry & 0xFFFF_F000 | linear & 0xFFF


def _check(
    state: State,
    linear: int,
    access: Access,
    user: bool,
    implicit: bool,
    error: int,
    writable: bool,
    as_user: bool,
    no_execute: bool,
) -> None:
    """Access rights (SDM 3A 4.6.1)."""
    if user:
        allowed = as_user
        if access is Access.WRITE:
            allowed = allowed and writable
        elif access is Access.EXECUTE:
            allowed = allowed and not no_execute
    elif access is Access.EXECUTE:
        allowed = not no_execute and not (as_user and state.cr4 & CR4_SMEP)
    else:
        prevented = as_user and state.cr4 & CR4_SMAP and (implicit or not state.rflags & AC)
        allowed = not prevented
        if access is Access.WRITE:
            allowed = allowed and (writable or not state.cr0 & CR0_WP)
    if not allowed:
        if not (state.long_mode):
            linear &= 0xFFFF_FFFF
        raise Fault(PF, error | 1, linear)


def _set_flags(state: State, used: list[tuple[int, int, int]], access: Access) -> None:
    """Accessed flags in every entry used, the dirty flag in the last (SDM 3A 4.8).

    The manual lets a CPU set accessed flags on the way to a fault; this model does not.
    """
    for number, (at, size, entry) in enumerate(used):
        flags = ACCESSED
        if number == len(used) - 1 and access is Access.WRITE:
            flags |= DIRTY
        if entry & flags != flags:
            state.memory.write(at, size, entry | flags)


def read(state: State, linear: int, size: int, *, implicit: bool = False) -> int:
    """Reads linear memory, across pages if need be."""
    return int.from_bytes(
        bytes(
            state.memory.read(physical, 1) for physical in _pieces(state, linear, size, Access.READ, implicit=implicit)
        ),
        "little",
    )


def write(state: State, linear: int, size: int, value: int, *, implicit: bool = False) -> None:
    """Writes linear memory, across pages if need be; nothing is written if a page faults."""
    places = _pieces(state, linear, size, Access.WRITE, implicit=implicit)
    for n, physical in enumerate(places):
        state.memory.write(physical, 1, value >> 8 * n)


def _pieces(state: State, linear: int, size: int, access: Access, *, implicit: bool) -> list[int]:
    mask = (1 << 64) - 1 if state.long_mode else 0xFFFF_FFFF
    first = min(size, 0x1000 - (linear & 0xFFF))
    physical = translate(state, linear & mask, access, implicit=implicit)
    places = [physical + n for n in range(first)]
    if first < size:
        physical = translate(state, (linear + first) & mask, access, implicit=implicit)
        places += [physical + n for n in range(size - first)]
    return places
