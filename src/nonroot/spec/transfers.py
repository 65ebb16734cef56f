"""Far transfers of control: far jumps, calls through call gates, far returns, IRET, SYSCALL and SYSRET."""

from nonroot.spec import events, paging, segments
from nonroot.spec.state import (
    AC,
    GP,
    IF,
    MASK64,
    NP,
    NT,
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

_STATUS = 0x8D5
_DF, _IOPL, _ID = 1 << 10, 3 << 12, 1 << 21


def far_jump(state: State, selector: int, offset: int) -> None:
    """JMP FAR (SDM 2A, JMP)."""
    _transfer(state, selector, offset, call=False, size=4)


def far_call(state: State, selector: int, offset: int, size: int) -> None:
    """CALL FAR with an operand size of ``size`` bytes; ``state.rip`` is the return address (SDM 2A, CALL)."""
    _transfer(state, selector, offset, call=True, size=size)


def _transfer(state: State, selector: int, offset: int, *, call: bool, size: int) -> None:
    trial = state.copy()
    if selector & 0xFFFC == 0:
        raise Fault(GP, 0)
    descriptor = segments.fetch(trial, selector)
    segment = segments.parse(selector, descriptor)
    if segment.is_code:
        _to_code(trial, selector, segment, descriptor, offset, call=call, size=size)
    elif not segment.code_or_data and segment.type in ((12,) if trial.long_mode else (4, 12)):
        _through_gate(trial, selector, descriptor, call=call)
    elif not segment.code_or_data and not trial.long_mode and segment.type in (1, 3, 5, 9, 11):
        _check_task(trial, selector, segment)
        raise NotImplementedError("hardware task switches")
    else:
        raise Fault(GP, selector & 0xFFFC)
    state.__dict__.update(trial.__dict__)


def _check_task(state: State, selector: int, segment: Segment) -> None:
    """What comes before a task switch through a TSS descriptor or a task gate (SDM 3A 7.3)."""
    error = selector & 0xFFFC
    if segment.dpl < state.cpl or segment.dpl < selector & 3:
        raise Fault(GP, error)
    if segment.type != 5 and (segment.type & 2 or selector & 4):  # busy, or not in the GDT
        raise Fault(GP, error)
    if not segment.present:
        raise Fault(NP, error)


def _to_code(
    state: State, selector: int, segment: Segment, descriptor: int, offset: int, *, call: bool, size: int
) -> None:
    """Directly to a code segment, at the same privilege level."""
    error = selector & 0xFFFC
    if state.long_mode and segment.long and segment.big:
        raise Fault(GP, error)
    if segment.conforming:
        if segment.dpl > state.cpl:
            raise Fault(GP, error)
    elif selector & 3 > state.cpl or segment.dpl != state.cpl:
        raise Fault(GP, error)
    if not segment.present:
        raise Fault(NP, error)
    if call:
        _push_return(state, size)
    _check_target(state, segment, offset)
    _set_code(state, selector & ~3 | state.cpl, selector, descriptor, offset)


def _check_target(state: State, segment: Segment, offset: int) -> None:
    if state.long_mode and segment.long:
        if not canonical(offset):
            raise Fault(GP, 0)
    elif offset > segment.limit:
        raise Fault(GP, 0)


def _set_code(state: State, visible: int, selector: int, descriptor: int, offset: int) -> None:
    segments.mark_accessed(state, selector, descriptor)
    state.segments["cs"] = segments.parse(visible, descriptor | 1 << 40)
    state.rip = offset


def _push(state: State, value: int, size: int) -> None:
    """Pushes onto the current stack with its usual checks."""
    width = state.stack_bytes
    mask = (1 << 8 * width) - 1
    sp = (state.gpr[4] - size) & mask
    linear = segments.linear_address(state, "ss", sp, size, write=True)
    paging.write(state, linear, size, value)
    keep = state.gpr[4] & ~0xFFFF if width == 2 else 0
    state.gpr[4] = keep | sp


def _push_return(state: State, size: int) -> None:
    selector, rip = state.segments["cs"].selector, state.rip
    _push(state, selector, size)
    _push(state, rip, size)


def _through_gate(state: State, selector: int, descriptor: int, *, call: bool) -> None:
    """Through a call gate (SDM 3A 5.8.4 to 5.8.5)."""
    error = selector & 0xFFFC
    wide = 2 if state.long_mode else 1
    dpl, present = descriptor >> 45 & 3, descriptor >> 47 & 1
    if state.long_mode:
        descriptor = segments.fetch(state, selector, size=16)
        if descriptor >> 104 & 0x1F:  # the type field of the upper half must be zero
            raise Fault(GP, error)
    if dpl < state.cpl or dpl < selector & 3:
        raise Fault(GP, error)
    if not present:
        raise Fault(NP, error)
    size = 8 if wide == 2 else 4 if descriptor >> 43 & 1 else 2
    target_selector = descriptor >> 16 & 0xFFFF
    offset = descriptor & 0xFFFF
    if size > 2:
        offset |= descriptor >> 32 & 0xFFFF_0000
    if size == 8:
        offset |= (descriptor >> 64 & 0xFFFF_FFFF) << 32
    if target_selector & 0xFFFC == 0:
        raise Fault(GP, 0)
    target_descriptor = segments.fetch(state, target_selector)
    target = segments.parse(target_selector, target_descriptor)
    target_error = target_selector & 0xFFFC
    if not target.is_code or target.dpl > state.cpl:
        raise Fault(GP, target_error)
    if state.long_mode and (not target.long or target.big):
        raise Fault(GP, target_error)
    if not call and not target.conforming and target.dpl != state.cpl:
        raise Fault(GP, target_error)
    if not target.present:
        raise Fault(NP, target_error)
    if call and not target.conforming and target.dpl < state.cpl:
        if state.long_mode:
            _gate_inner_long(state, target.dpl)
        else:
            _gate_inner(state, target.dpl, size, descriptor >> 32 & 0x1F)
    elif call:
        _push_return(state, size)
    _check_target(state, target, offset)
    cpl = state.segments["ss"].dpl if call else state.cpl
    _set_code(state, target_selector & ~3 | cpl, target_selector, target_descriptor, offset)


def _gate_inner(state: State, dpl: int, size: int, count: int) -> None:
    """To an inner ring: a new stack with the old one's pointer, parameters and the return address."""
    selector, pointer = events.stack_from_tss(state, dpl, 0)
    stack, stack_descriptor = events.checked_stack(state, selector, dpl, 0)
    old_ss, old_sp = state.segments["ss"], state.gpr[4]
    mask = 0xFFFF_FFFF if old_ss.big else 0xFFFF
    parameters = []
    for n in range(count):
        linear = segments.linear_address(state, "ss", (old_sp + size * n) & mask, size, write=False)
        parameters.append(paging.read(state, linear, size))
    frame = [old_ss.selector, old_sp, *reversed(parameters), state.segments["cs"].selector, state.rip]
    segments.mark_accessed(state, selector, stack_descriptor)
    stack = segments.parse(selector, stack_descriptor | 1 << 40)
    events.check_room(stack, pointer, len(frame), size, Fault(SS, selector & 0xFFFC))
    events.push_all(state, stack, pointer, frame, size, dpl)


def _gate_inner_long(state: State, dpl: int) -> None:
    tr = state.segments["tr"]
    if 4 + 8 * dpl + 7 > tr.limit:
        raise Fault(TS, tr.selector & 0xFFFC)
    rsp = paging.read(state, (tr.base + 4 + 8 * dpl) & MASK64, 8, implicit=True)
    frame = [state.segments["ss"].selector, state.gpr[4], state.segments["cs"].selector, state.rip]
    state.segments["ss"] = Segment(dpl, access=segments.UNUSABLE | dpl << 5)
    for value in frame:
        rsp = (rsp - 8) & MASK64
        if not canonical(rsp):
            raise Fault(SS, 0)
        paging.write(state, rsp, 8, value)
    state.gpr[4] = rsp


class _Stack:
    """Reads the current stack upwards without changing the stack pointer."""

    def __init__(self, state: State, size: int) -> None:
        self.state = state
        self.size = size
        self.sp = state.gpr[4]
        self.mask = (1 << 8 * state.stack_bytes) - 1

    def pop(self) -> int:
        offset = self.sp & self.mask
        linear = segments.linear_address(self.state, "ss", offset, self.size, write=False)
        value = paging.read(self.state, linear, self.size)
        self.sp = self.sp & ~self.mask | (self.sp + self.size) & self.mask
        return value

    def skip(self, count: int) -> None:
        self.sp = self.sp & ~self.mask | (self.sp + count) & self.mask


def far_return(state: State, size: int, release: int = 0) -> None:
    """RETF, releasing ``release`` bytes of parameters (SDM 2B, RET)."""
    trial = state.copy()
    stack = _Stack(trial, size)
    offset, selector = stack.pop(), stack.pop() & 0xFFFF
    segment, descriptor = _return_code(trial, selector)
    stack.skip(release)
    if selector & 3 == trial.cpl:
        _check_target(trial, segment, offset)
        trial.gpr[4] = stack.sp
        _set_code(trial, selector, selector, descriptor, offset)
    else:
        pointer, ss = stack.pop(), stack.pop() & 0xFFFF
        _outer(trial, selector, segment, descriptor, offset, ss, pointer + release, size)
    state.__dict__.update(trial.__dict__)


def _return_code(state: State, selector: int) -> tuple[Segment, int]:
    """Checks the code segment of RETF and IRET."""
    if selector & 0xFFFC == 0:
        raise Fault(GP, 0)
    error = selector & 0xFFFC
    descriptor = segments.fetch(state, selector)
    segment = segments.parse(selector, descriptor)
    rpl = selector & 3
    if not segment.is_code or rpl < state.cpl:
        raise Fault(GP, error)
    if state.long_mode and segment.long and segment.big:
        raise Fault(GP, error)
    if segment.dpl > rpl if segment.conforming else segment.dpl != rpl:
        raise Fault(GP, error)
    if not segment.present:
        raise Fault(NP, error)
    return segment, descriptor


def _outer(
    state: State, selector: int, segment: Segment, descriptor: int, offset: int, ss: int, pointer: int, size: int
) -> None:
    """To an outer ring: a new stack, and data segments that the ring may not have become null (SDM 3A 5.8.6)."""
    rpl = selector & 3
    to_64 = state.long_mode and segment.long
    if ss & 0xFFFC == 0:
        if not to_64 or rpl == 3:  # unlike MOV to SS, its RPL does not matter
            raise Fault(GP, 0)
        stack = Segment(ss, access=segments.UNUSABLE | rpl << 5)
    else:
        stack_descriptor = segments.fetch(state, ss)
        stack = segments.parse(ss, stack_descriptor)
        if ss & 3 != rpl or not stack.writable or stack.dpl != rpl:
            raise Fault(GP, ss & 0xFFFC)
        if not stack.present:
            raise Fault(SS, ss & 0xFFFC)
        segments.mark_accessed(state, ss, stack_descriptor)
        stack = segments.parse(ss, stack_descriptor | 1 << 40)
    _check_target(state, segment, offset)
    _set_code(state, selector, selector, descriptor, offset)
    state.segments["ss"] = stack
    width = 8 if to_64 else 4 if stack.big else 2
    mask = (1 << 8 * min(width, size if width > 4 else width)) - 1
    state.gpr[4] = pointer & mask if width > 2 else state.gpr[4] & ~0xFFFF | pointer & 0xFFFF
    for name in ("es", "ds", "fs", "gs"):
        data = state.segments[name]
        if data.usable and data.dpl < rpl and not (data.is_code and data.conforming):
            state.segments[name] = Segment()


def interrupt_return(state: State, size: int) -> None:
    """IRET in protected and long mode, without tasks and virtual-8086 mode (SDM 2A, IRET)."""
    trial = state.copy()
    if trial.rflags & NT:
        if trial.long_mode:
            raise Fault(GP, 0)
        raise NotImplementedError("returns from nested tasks")
    stack = _Stack(trial, size)
    offset, selector, flags = stack.pop(), stack.pop() & 0xFFFF, stack.pop()
    if flags & VM and size >= 4 and trial.cpl == 0 and not trial.long_mode:
        raise NotImplementedError("returns to virtual-8086 mode")
    segment, descriptor = _return_code(trial, selector)
    cpl = trial.cpl
    if selector & 3 == cpl and not trial.mode64:
        _check_target(trial, segment, offset)
        trial.gpr[4] = stack.sp
        _set_code(trial, selector, selector, descriptor, offset)
    else:
        pointer, ss = stack.pop(), stack.pop() & 0xFFFF
        _outer(trial, selector, segment, descriptor, offset, ss, pointer, size)
    trial.rflags = returned_flags(state.rflags, flags, size, cpl)
    state.__dict__.update(trial.__dict__)


def returned_flags(old: int, popped: int, size: int, cpl: int) -> int:
    """RFLAGS after IRET with ``popped`` on the stack, executed at ``cpl``."""
    mask = _STATUS | TF | _DF | NT
    if size > 2:
        mask |= RF | AC | _ID
    if cpl <= old >> 12 & 3:
        mask |= IF
    if cpl == 0:
        mask |= _IOPL
        if size > 2:
            mask |= 3 << 19  # VIF, VIP
    return old & ~mask | popped & mask | 2


_FLAT_CODE64, _FLAT_CODE32, _FLAT_DATA = 0xA09B, 0xC09B, 0xC093


def syscall(state: State) -> None:
    """SYSCALL in 64-bit mode; ``state.rip`` is the next instruction's address (SDM 2B, SYSCALL)."""
    state.gpr[1] = state.rip
    state.gpr[11] = state.rflags & ~RF
    state.rip = state.lstar
    state.rflags = state.rflags & ~state.fmask & ~RF | 2
    selector = state.star >> 32 & 0xFFFC
    state.segments["cs"] = Segment(selector, 0, 0xFFFF_FFFF, _FLAT_CODE64)
    state.segments["ss"] = Segment((selector + 8) & 0xFFFF, 0, 0xFFFF_FFFF, _FLAT_DATA)


def sysret(state: State, size: int) -> None:
    """SYSRET with an operand size of 8 (to 64-bit code) or 4 bytes (SDM 2B, SYSRET)."""
    if state.cpl != 0:
        raise Fault(GP, 0)
    if size == 8 and not canonical(state.gpr[1]):
        raise Fault(GP, 0)
    base = state.star >> 48
    selector = (base + 16 if size == 8 else base) & 0xFFFF | 3
    state.rip = state.gpr[1] if size == 8 else state.gpr[1] & 0xFFFF_FFFF
    state.rflags = state.gpr[11] & 0x3C7FD7 | 2
    access = (_FLAT_CODE64 if size == 8 else _FLAT_CODE32) | 3 << 5
    state.segments["cs"] = Segment(selector, 0, 0xFFFF_FFFF, access)
    state.segments["ss"] = Segment((base + 8) & 0xFFFF | 3, 0, 0xFFFF_FFFF, _FLAT_DATA | 3 << 5)
