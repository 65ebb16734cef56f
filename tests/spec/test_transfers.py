"""Far jumps, calls and returns through random gates and stacks: the same state and frame, or the same fault."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nonroot.spec import transfers
from nonroot.spec.state import Fault, Segment, State
from nonroot.testing.differential_machine import RAM_BYTES, Machine, Outcome, same_segment
from tests.spec.descriptors import (
    CODE,
    DATA,
    GDT,
    HANDLERS,
    STACKS,
    TSS,
    Entry,
    Table,
    attempt,
    good_selectors,
    initial_state,
    page_tables,
)  # fmt: skip

TABLES = {True: Table(True), False: Table(False)}
FLAGS = 0x202 | 0x8D5


def compare(machine: Machine, state: State, outcome: Outcome, step: Callable[[State], None], name: str) -> None:
    """Takes the step in the model too, and compares. ``state.rip`` is already what the step needs."""
    after = machine.state()
    if outcome.exit[0] == 16 and "task" in outcome.exit[1]:
        event(f"{name}: a task")
        with pytest.raises(NotImplementedError, match="task"):
            step(state)
        return
    fault = attempt(lambda: step(state))
    if fault is not None:
        event(f"{name}: fault {fault.vector}")
        assert (outcome.vector, outcome.error) == (fault.vector, fault.error), outcome
        assert after.segments["cs"] == state.segments["cs"]
        assert same_segment(state.segments["ss"], after.segments["ss"])
        assert after.gpr == state.gpr
        assert machine.changed(state.memory) == {}
        return
    if any(address >= RAM_BYTES for address in state.memory.writes):
        event(f"{name}: a stack outside RAM")
        assert outcome.exit[0] in (1, 10)
        return
    event(f"{name}: done")
    linear = state.rip if state.mode64 else (state.segments["cs"].base + state.rip) & 0xFFFF_FFFF
    if linear < RAM_BYTES or linear - 0xFFFF_FFFF_8000_0000 in range(RAM_BYTES):
        assert (outcome.exit[0], outcome.vector) == (10, 3), outcome
    else:
        assert outcome.exit[0] == 16 or outcome.vector == 14, outcome  # the target is no code
    assert after.rip == state.rip
    assert after.gpr == state.gpr
    assert after.rflags == state.rflags
    for register in ("cs", "ss", "ds", "es", "fs", "gs"):
        model, engine = state.segments[register], after.segments[register]
        assert same_segment(model, engine), (register, model, engine)
    assert after.cpl == state.cpl
    assert machine.changed(state.memory) == {}


def call_gate(selector: int, offset: int, kind: int, dpl: int, present: int, count: int) -> Entry:
    low = (
        offset & 0xFFFF
        | selector << 16
        | count << 32
        | kind << 40
        | dpl << 45
        | present << 47
        | (offset >> 16 & 0xFFFF) << 48
    )
    return Entry("gate", low, offset >> 32)


def tss(long_mode: bool, table: Table, sane: bool, edge: int) -> bytes:
    image = bytearray(0x68)
    for n in range(3):
        pointer = STACKS[n] - edge
        if long_mode:
            image[4 + 8 * n : 12 + 8 * n] = (pointer if sane else 1 << 62).to_bytes(8, "little")
        else:
            selector = table.selectors[f"data{n}" if sane else "read_only1"] | n
            image[4 + 8 * n : 10 + 8 * n] = pointer.to_bytes(4, "little") + selector.to_bytes(2, "little")
    return bytes(image)


@settings(max_examples=500)
@given(
    data=st.data(),
    long_mode=st.booleans(),
    compat=st.booleans(),
    cpl=st.integers(0, 3),
    call=st.booleans(),
    through_gate=st.sampled_from([True, True, False]),
    rpl=st.sampled_from([0, 0, 1, 2, 3]),
    kind=st.sampled_from([0xC] * 8 + [4, 5, 0xE]),
    gate_dpl=st.sampled_from([3, 3, 3, 2, 1, 0]),
    present=st.sampled_from([1] * 15 + [0]),
    count=st.sampled_from([0, 0, 1, 3, 31]),
    offset=st.sampled_from([HANDLERS] * 6 + [0x7000, 0x8000_0000]),
    high=st.sampled_from([0] * 9 + [0xFFFF_FFFF, 0x1F << 8]),
    sane=st.sampled_from([True] * 9 + [False]),
    edge=st.sampled_from([0, 0, 4, 5]),
)
def test_far_jumps_and_calls(
    machine: Machine, data: st.DataObject, long_mode: bool, compat: bool, cpl: int, call: bool, through_gate: bool,
    rpl: int, kind: int, gate_dpl: int, present: int, count: int, offset: int, high: int, sane: bool, edge: int,
) -> None:  # fmt: skip
    compat &= long_mode
    standard = TABLES[long_mode]
    kinds = ("code", "conforming") if data.draw(st.booleans()) else ("code", "conforming", "compat", "small_code")
    target = data.draw(good_selectors(standard, cpl, kinds))
    gate_offset = offset | high << 32 if high == 0xFFFF_FFFF else offset
    entry = call_gate(target, gate_offset, kind, gate_dpl, present, 0 if long_mode else count)
    if long_mode and high == 0x1F << 8:
        entry = Entry("gate", entry.value, high << 32)  # a type in the upper half
    table = Table(long_mode, (entry,))
    selector = table.selectors["gate"] | rpl if through_gate else target
    machine.fill(
        {
            GDT: bytes(table.image),
            TSS: tss(long_mode, table, sane, edge),
            CODE: b"\xff" + (b"\x1b" if call else b"\x2b"),
            DATA: offset.to_bytes(4, "little") + selector.to_bytes(2, "little"),
        }
        | page_tables()
    )  # fmt: skip
    state = initial_state(machine, table, cpl, long_mode=long_mode, compat=compat)
    state.gpr[3] = DATA
    outcome = machine.run(state)

    def step(model: State) -> None:
        if call:
            before = model.rip
            model.rip += 2
            try:
                transfers.far_call(model, selector, offset, 4)
            except Fault:
                model.rip = before
                raise
        else:
            transfers.far_jump(model, selector, offset)

    compare(machine, state, outcome, step, f"{'call' if call else 'jump'} {'gate' if through_gate else 'code'}")


def outward(data: st.DataObject, table: Table, cpl: int, kinds: tuple[str, ...]) -> tuple[int, int]:
    """Selectors for CS and SS of a return: mostly of the same or an outer ring."""
    ring = data.draw(st.sampled_from([n for n in range(4) if n >= cpl] * 3 + [0, 3]))
    code = table.selectors[f"{data.draw(st.sampled_from(kinds))}{ring}"] | ring
    stack = table.selectors[f"data{ring}"] | ring
    code = data.draw(st.one_of(st.just(code), st.just(code), st.just(code), good_selectors(table, 3)))
    stack = data.draw(
        st.one_of(st.just(stack), st.just(stack), st.just(stack), good_selectors(table, 3, ("data", "expand_down")))
    )
    return code, data.draw(st.sampled_from([stack] * 8 + [ring]))


@settings(max_examples=500)
@given(
    data=st.data(),
    long_mode=st.booleans(),
    compat=st.booleans(),
    cpl=st.integers(0, 3),
    interrupt=st.booleans(),
    wide=st.booleans(),
    release=st.sampled_from([0, 0, 4, 8]),
    flags=st.integers(0, 0x3F_FFFF),
    start=st.sampled_from([0x2, 0x202, 0x3202, 0x1202, 0x8D7]),
    offset=st.sampled_from([HANDLERS] * 8 + [0x7000, 0x8000_0000, 1 << 47]),
    pointer=st.sampled_from([STACKS[3] - 64, STACKS[3] - 63, 0x1_FFFF_1000]),
    room=st.sampled_from([0x40] * 9 + [4]),
)
def test_far_and_interrupt_returns(
    machine: Machine, data: st.DataObject, long_mode: bool, compat: bool, cpl: int, interrupt: bool, wide: bool,
    release: int, flags: int, start: int, offset: int, pointer: int, room: int,
) -> None:  # fmt: skip
    compat &= long_mode
    wide &= long_mode and not compat
    table = TABLES[long_mode]
    size = 8 if wide else 4
    code, stack = outward(data, table, cpl, ("code", "code", "conforming", "compat", "small_code"))
    flags &= ~0x2_4100  # VM and NT are for tasks and virtual-8086 mode, TF would trap
    words = [offset, code, flags] if interrupt else [offset, code]
    words += [0] * ((0 if interrupt else release) // size) + [pointer, stack]
    mask = (1 << 8 * size) - 1
    frame = b"".join((word & mask).to_bytes(size, "little") for word in words)
    top = STACKS[cpl] - 0x200
    prefix = b"\x48" if wide else b""
    operation = b"\xcf" if interrupt else b"\xca" + release.to_bytes(2, "little") if release else b"\xcb"
    machine.fill({GDT: bytes(table.image), CODE: prefix + operation, top: frame} | page_tables())
    state = initial_state(machine, table, cpl, long_mode=long_mode, compat=compat)
    state.rflags = start
    state.gpr[4] = top
    inner = table.segment("data0")
    if cpl == 0:
        state.segments["ds"] = inner
        state.segments["fs"] = table.segment("conforming0")
    if room == 4:
        # The stack segment ends in the middle of the frame.
        ss = state.segments["ss"]
        state.segments["ss"] = Segment(ss.selector, ss.base, top + 5, ss.access)
    outcome = machine.run(state)

    def step(model: State) -> None:
        if interrupt:
            transfers.interrupt_return(model, size)
        else:
            transfers.far_return(model, size, release)

    compare(machine, state, outcome, step, "iret" if interrupt else "retf")


@settings(max_examples=300)
@given(
    cpl=st.sampled_from([0, 3, 3]),
    out=st.booleans(),
    wide=st.booleans(),
    star=st.builds(
        lambda low, high: low << 32 | high << 48, st.sampled_from([8, 0xB, 0x30]), st.sampled_from([0x10, 0x13, 0x28])
    ),
    fmask=st.sampled_from([0, 0x4_7700, 0x8D5, 0x3F_FFFF]),
    flags=st.integers(0, 0x3F_FFFF),
    target=st.sampled_from([HANDLERS, 0xFFFF_FFFF_8000_0000 | HANDLERS]),
    back=st.sampled_from([HANDLERS, HANDLERS + 1, 1 << 47, 1 << 63]),
)
def test_system_calls(
    machine: Machine, cpl: int, out: bool, wide: bool, star: int, fmask: int, flags: int, target: int, back: int
) -> None:
    table = TABLES[True]
    code = (b"\x48" if wide else b"") + (b"\x0f\x07" if out else b"\x0f\x05")
    machine.fill({GDT: bytes(table.image), CODE: code} | page_tables())
    state = initial_state(machine, table, cpl, long_mode=True)
    state.star, state.lstar, state.fmask = star, target, fmask
    flags &= ~0x2_4100
    state.rflags = flags & 0xFD5 | 0x202
    state.gpr[1], state.gpr[11] = back, flags
    outcome = machine.run(state)

    def step(model: State) -> None:
        if out:
            transfers.sysret(model, 8 if wide else 4)
        else:
            model.rip += len(code)
            transfers.syscall(model)

    compare(machine, state, outcome, step, "sysret" if out else "syscall")
