"""Random gates, task-state segments and targets: the same frame, handler and flags, or the same fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nonroot.spec import events
from nonroot.spec.events import Kind
from nonroot.spec.state import IF, Segment, State
from nonroot.testing.differential_machine import RAM_BYTES, Machine, Outcome, same_segment
from tests.spec.descriptors import (
    CODE,
    GDT,
    HANDLERS,
    IDT,
    STACKS,
    TSS,
    Table,
    attempt,
    good_selectors,
    initial_state,
    page_tables,
)  # fmt: skip

TABLES = {True: Table(True), False: Table(False)}


@dataclass(frozen=True)
class Trigger:
    """How the event comes about."""

    name: str
    code: bytes
    vector: int
    kind: Kind
    #: The return address is this far behind the instruction.
    length: int = 0
    error: int | None = None
    fault: bool = False


TRIGGERS = [
    Trigger("int 0x40", b"\xcd\x40", 0x40, Kind.SOFTWARE, 2),
    Trigger("#UD", b"\x0f\x0b", 6, Kind.EXCEPTION, fault=True),
    Trigger("#GP", b"\x8e\xd8", 13, Kind.EXCEPTION, error=0xFFF8, fault=True),  # mov ds, ax
    Trigger("external", b"\x90", 0x80, Kind.EXTERNAL),
]


@pytest.fixture(scope="module")
def machines() -> Iterator[dict[str, Machine]]:
    """One for each trigger: the exception that it raises is delivered, all others end the run."""
    made = {t.name: Machine(0xFFFF_FFFF & ~(1 << t.vector if t.kind is Kind.EXCEPTION else 0)) for t in TRIGGERS}
    yield made
    for machine in made.values():
        machine.close()


def gate(selector: int, offset: int, kind: int, dpl: int, present: int, ist: int, *, wide: bool) -> bytes:
    low = (
        offset & 0xFFFF
        | selector << 16
        | ist << 32
        | kind << 40
        | dpl << 45
        | present << 47
        | (offset >> 16 & 0xFFFF) << 48
    )
    return low.to_bytes(8, "little") + ((offset >> 32).to_bytes(8, "little") if wide else b"")


def run(machine: Machine, state: State, trigger: Trigger) -> Outcome:
    return machine.run(state, interrupt=trigger.vector if trigger.kind is Kind.EXTERNAL else None)


def compare(machine: Machine, state: State, trigger: Trigger, outcome: Outcome) -> None:
    """Delivers in the model too, and compares."""
    after = machine.state()
    state.rip += trigger.length
    fault = attempt(lambda: events.deliver(state, trigger.vector, trigger.kind, trigger.error, is_fault=trigger.fault))
    if fault is not None:
        vector, error = fault.vector, fault.error
        if trigger.kind is Kind.EXCEPTION:
            combined = events.combine(trigger.vector, fault.vector)
            assert combined is not None
            if combined != fault.vector:
                vector, error = combined, 0
        event(f"{trigger.name}: fault {vector}")
        assert (outcome.vector, outcome.error) == (vector, error), outcome
        assert after.segments["cs"] == state.segments["cs"]
        assert after.gpr[4] == state.gpr[4]
        return
    if any(address >= RAM_BYTES for address in state.memory.writes):
        event(f"{trigger.name}: a stack outside RAM")
        assert outcome.exit[0] == 1
        return
    event(f"{trigger.name}: delivered")
    assert (outcome.vector, outcome.exit[0]) == (3, 10), outcome
    assert after.rip == state.rip
    assert after.gpr == state.gpr
    assert after.rflags == state.rflags
    for name in ("cs", "ss", "ds", "es"):
        assert same_segment(state.segments[name], after.segments[name]), (
            name,
            state.segments[name],
            after.segments[name],
        )
    assert after.cpl == state.cpl
    assert machine.changed(state.memory) == {}


FLAGS = st.builds(
    lambda status, more: status & 0x8D5 | more,
    st.integers(0, 0xFFF),
    st.sampled_from([0, 0x400, 0x4000, 0x20_0000, 0x4_0000]),
)


@settings(max_examples=400)
@given(
    data=st.data(),
    trigger=st.sampled_from(TRIGGERS),
    cpl=st.sampled_from([0, 1, 2, 3, 3]),
    kind=st.sampled_from([0xE] * 4 + [0xF] * 4 + [0x6, 0x7, 0x6, 0x7, 0xC, 0x4, 0x1E]),
    gate_dpl=st.sampled_from([3, 3, 3, 3, 3, 0, 1, 2]),
    present=st.sampled_from([1] * 20 + [0]),
    offset=st.sampled_from([HANDLERS, HANDLERS + 0x10, 0x100, 0x2_7010]),
    flags=FLAGS,
    tss_limit=st.sampled_from([0x67] * 8 + [0x10, 3]),
    tss_type=st.sampled_from([0xB, 0xB, 0xB, 0x3]),
    sp_edge=st.sampled_from([0, 0, 0, 0, 1, 2, 3]),
    sane=st.sampled_from([True, True, True, False]),
)
def test_protected_mode(
    machines: dict[str, Machine], data: st.DataObject, trigger: Trigger, cpl: int, kind: int, gate_dpl: int,
    present: int, offset: int, flags: int, tss_limit: int, tss_type: int, sp_edge: int, sane: bool,
) -> None:  # fmt: skip
    table = TABLES[False]
    machine = machines[trigger.name]
    target = data.draw(good_selectors(table, cpl))
    names = (
        [f"data{n}" for n in range(3)]
        if sane
        else [data.draw(st.sampled_from(list(table.selectors))) for _ in range(3)]
    )
    rpls = [n if sane else data.draw(st.sampled_from([n, n, n, 3 - n])) for n in range(3)]
    stacks = [
        (table.selectors[name] | rpl, STACKS[n] - 4 * sp_edge)
        for n, (name, rpl) in enumerate(zip(names, rpls, strict=True))
    ]
    tss = bytearray(0x68)
    for n, (selector, pointer) in enumerate(stacks):
        if tss_type & 8:
            tss[4 + 8 * n : 10 + 8 * n] = pointer.to_bytes(4, "little") + selector.to_bytes(2, "little")
        else:
            tss[2 + 4 * n : 6 + 4 * n] = (pointer & 0xFFFF).to_bytes(2, "little") + selector.to_bytes(2, "little")
    machine.fill(
        {
            GDT: bytes(table.image),
            IDT + 8 * trigger.vector: gate(target, offset, kind, gate_dpl, present, 0, wide=False),
            TSS: bytes(tss),
            CODE: trigger.code,
        }
    )
    state = initial_state(machine, table, cpl, long_mode=False)
    state.segments["tr"] = Segment(table.selectors["system"], TSS, tss_limit, 0x80 | tss_type)
    state.rflags = flags & ~0x4000 | 2 | IF
    state.gpr[0] = 0xFFF8
    if sp_edge:
        state.gpr[4] = 4 * sp_edge  # pushes run out at the bottom, or wrap
    compare(machine, state, trigger, run(machine, state, trigger))


CANONICAL_ENDS = [HANDLERS, HANDLERS + 8, 0xFFFF_FFFF_8002_7000, 0x8000_0000_0000, 1 << 63]


@settings(max_examples=400)
@given(
    data=st.data(),
    trigger=st.sampled_from(TRIGGERS),
    cpl=st.sampled_from([0, 1, 2, 3, 3]),
    compat=st.booleans(),
    kind=st.sampled_from([0xE] * 6 + [0xF] * 6 + [0x6, 0x7, 0xC, 0x4]),
    gate_dpl=st.sampled_from([3, 3, 3, 3, 3, 0, 1, 2]),
    present=st.sampled_from([1] * 20 + [0]),
    offset=st.sampled_from(CANONICAL_ENDS[:3] * 3 + CANONICAL_ENDS),
    ist=st.sampled_from([0, 0, 0, 1, 7]),
    flags=FLAGS,
    tss_limit=st.sampled_from([0x67] * 8 + [0x23, 3]),
    bad_stack=st.sampled_from([None] * 8 + [1 << 62, 0x7FFF_FFFF_FFF0, 0x8000_0000_0010]),
    misalign=st.integers(0, 15),
)
def test_long_mode(
    machines: dict[str, Machine], data: st.DataObject, trigger: Trigger, cpl: int, compat: bool, kind: int,
    gate_dpl: int, present: int, offset: int, ist: int, flags: int, tss_limit: int, bad_stack: int | None,
    misalign: int,
) -> None:  # fmt: skip
    table = TABLES[True]
    machine = machines[trigger.name]
    target = data.draw(good_selectors(table, cpl))
    tss = bytearray(0x68)
    for n in range(10):  # RSP0 to RSP2, reserved, IST1 to IST7
        pointer = bad_stack if bad_stack is not None else STACKS[n & 3] - misalign
        at = 4 + 8 * n if n < 3 else 36 + 8 * (n - 3)
        tss[at : at + 8] = pointer.to_bytes(8, "little")
    machine.fill(
        {
            GDT: bytes(table.image),
            IDT + 16 * trigger.vector: gate(target, offset, kind, gate_dpl, present, ist, wide=True),
            TSS: bytes(tss),
            CODE: trigger.code,
        }
        | page_tables()
    )
    state = initial_state(machine, table, cpl, long_mode=True, compat=compat)
    state.idtr = (IDT, 0xFFF)
    state.segments["tr"] = Segment(table.selectors["system"], TSS, tss_limit, 0x8B)
    state.rflags = flags & ~0x4000 | 2 | IF
    state.gpr[0] = 0xFFF8
    state.gpr[4] -= misalign
    compare(machine, state, trigger, run(machine, state, trigger))


@settings(max_examples=200)
@given(
    handler=st.sampled_from([HANDLERS & 0xFFFF, 0x1234]),
    selector=st.sampled_from([0x2000, 0x1FFF]),
    limit=st.sampled_from([0x3FF, 0x103, 0x102, 0xFF]),
    flags=FLAGS,
    sp=st.sampled_from([0x8000, 0x8001, 2, 4, 6, 0]),
    trigger=st.sampled_from([t for t in TRIGGERS if t.kind is not Kind.EXCEPTION]),
)
def test_real_mode(
    machines: dict[str, Machine], handler: int, selector: int, limit: int, flags: int, sp: int, trigger: Trigger
) -> None:
    machine = machines[trigger.name]
    machine.fill(
        {
            IDT + 4 * trigger.vector: handler.to_bytes(2, "little") + selector.to_bytes(2, "little"),
            0x1_0000: trigger.code,
        }
    )
    real = Segment(0x1000, 0x1_0000, 0xFFFF, 0x93)
    state = State(
        gpr=[0, 0, 0, 0, sp, 0, 0, 0, *[0] * 8], rip=0, rflags=flags & ~0x24_0000 | 2 | IF,
        segments={
            "cs": Segment(0x1000, 0x1_0000, 0xFFFF, 0x9B), "ss": Segment(0x3000, 0x3_0000, 0xFFFF, 0x93),
            **dict.fromkeys(("ds", "es", "fs", "gs"), real), "ldtr": Segment(), "tr": Segment(0, 0, 0xFFFF, 0x8B),
        },
        gdtr=(0, 0xFFFF), idtr=(IDT, limit), cr0=0x10, cr3=0, cr4=0, efer=0, memory=machine.memory(),
    )  # fmt: skip
    outcome = run(machine, state, trigger)
    after = machine.state()
    state.rip += trigger.length
    fault = attempt(lambda: events.deliver(state, trigger.vector, trigger.kind))
    if fault is not None:
        assert outcome.vector == fault.vector
        return
    assert outcome.vector == 3
    assert (after.rip, after.rflags, after.gpr) == (state.rip, state.rflags, state.gpr)
    assert after.segments["cs"].base == state.segments["cs"].base
    assert after.segments["cs"].selector == state.segments["cs"].selector
    assert machine.changed(state.memory) == {}


@pytest.mark.parametrize(
    ("first", "second", "result"),
    [
        (6, 13, 13),
        (13, 13, 8),
        (13, 14, 14),
        (14, 13, 8),
        (14, 14, 8),
        (0, 11, 8),
        (8, 13, None),
        (8, 14, None),
        (6, 14, 14),
    ],
)
def test_what_two_exceptions_make(first: int, second: int, result: int | None) -> None:
    assert events.combine(first, second) == result
