"""Loads of segment registers and accesses through them: the same hidden state and memory, or the same fault."""

from __future__ import annotations

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from nonroot.spec import segments
from nonroot.spec.state import Fault, Segment
from nonroot.testing.differential_machine import RAM_BYTES, Machine, same_segment
from tests.spec.descriptors import (
    CODE,
    GDT,
    LDT,
    Table,
    attempt,
    descriptor,
    initial_state,
    page_tables,
    selectors,
)

LOADS = {"es": 0xC0, "ss": 0xD0, "ds": 0xD8, "fs": 0xE0, "gs": 0xE8}  # mov Sreg, ax
TABLES = {True: Table(True), False: Table(False)}
MODES = st.sampled_from(["32-bit", "64-bit", "compatibility"])
ANY_DESCRIPTOR = st.builds(
    lambda base, limit, access, present: descriptor(base, limit, access | present),
    st.integers(0, 0xFFFF_FFFF),
    st.integers(0, 0xF_FFFF),
    st.builds(lambda low, high: low & 0x7F | high << 12, st.integers(0, 0x7F), st.integers(0, 15)),
    st.sampled_from([0x80, 0x80, 0x80, 0]),
)


@settings(max_examples=400)
@given(data=st.data(), mode=MODES, cpl=st.integers(0, 3), name=st.sampled_from(list(LOADS)), entry=ANY_DESCRIPTOR)
def test_loads(machine: Machine, data: st.DataObject, mode: str, cpl: int, name: str, entry: int) -> None:
    long_mode = mode != "32-bit"
    table = TABLES[long_mode]
    good = st.sampled_from(["data", "expand_down", "code", "conforming"]).map(
        lambda kind: table.selectors[f"{kind}{cpl}"] | cpl
    )
    selector = data.draw(st.one_of(good, good, selectors(table), st.integers(0, 3).map(lambda rpl: 0xC | rpl)))
    image = {GDT: bytes(table.image), LDT + 8: entry.to_bytes(8, "little"), CODE: bytes([0x8E, LOADS[name], 0xCC])}
    machine.fill(image | page_tables())
    state = initial_state(machine, table, cpl, long_mode=long_mode, compat=mode == "compatibility")
    state.segments["ldtr"] = Segment(0x50, LDT, 0x0F, 0x82)
    state.gpr[0] = selector
    outcome = machine.run(state)
    after = machine.state()
    fault = attempt(lambda: segments.load(state, name, selector))
    if fault is not None:
        event(f"fault {fault.vector}")
        assert (outcome.vector, outcome.error) == (fault.vector, fault.error)
        assert after.rip == CODE
        assert machine.changed(initial_state(machine, table, cpl, long_mode=long_mode).memory) == {}
    else:
        event("loaded" if selector & ~3 else "null")
        assert (outcome.vector, after.rip) == (3, CODE + 2)
        assert same_segment(state.segments[name], after.segments[name])
        if selector & 0xFFFC == 0 and mode == "64-bit" and name in ("fs", "gs"):
            assert after.segments[name].base == 0
        assert machine.changed(state.memory) == {}
    for other in LOADS:
        if other != name:
            assert same_segment(state.segments[other], after.segments[other])


ACCESSES = {  # (write, size): mov with ModRM [rbx]
    (False, 1): b"\x8a\x03", (False, 2): b"\x66\x8b\x03", (False, 4): b"\x8b\x03",
    (True, 1): b"\x88\x03", (True, 2): b"\x66\x89\x03", (True, 4): b"\x89\x03",
}  # fmt: skip
PREFIXES = {"es": 0x26, "ss": 0x36, "ds": 0x3E, "fs": 0x64, "gs": 0x65}


@settings(max_examples=500)
@given(
    name=st.sampled_from(list(PREFIXES)),
    access=st.sampled_from(list(ACCESSES)),
    base=st.sampled_from([0, 0x3_0000, 0x3_0123, 0xFFFF_FFF0]),
    limit=st.sampled_from([0, 1, 3, 7, 0x7FF, 0xFFF, 0xFFFF, 0xFFFF_FFFF]),
    kind=st.sampled_from([0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x1B, 0x1E]),
    big=st.sampled_from([0, 0x4000]),
    usable=st.sampled_from([True, True, True, True, False]),
    delta=st.integers(-5, 5),
)
def test_accesses(
    machine: Machine,
    name: str,
    access: tuple[bool, int],
    base: int,
    limit: int,
    kind: int,
    big: int,
    usable: bool,
    delta: int,
) -> None:
    write, size = access
    table = TABLES[False]
    machine.fill({GDT: bytes(table.image), CODE: bytes([PREFIXES[name]]) + ACCESSES[access] + b"\xcc"})
    state = initial_state(machine, table, 0, long_mode=False)
    if name == "ss":
        kind = 0x12 | kind & 5  # the stack is always writable
    state.segments[name] = Segment(0x10, base, limit, kind | 0x80 | big if usable else 0x10000)
    offset = (limit + delta) & 0xFFFF_FFFF
    state.gpr[0], state.gpr[3] = 0x5A5A_5A5A, offset
    outcome = machine.run(state)
    linear = attempt(lambda: segments.linear_address(state, name, offset, size, write=write))
    if isinstance(linear, Fault):
        fault = linear
        event(f"fault {fault.vector}")
        assert (outcome.vector, outcome.error) == (fault.vector, fault.error)
        assert machine.changed(state.memory) == {}
        return
    crosses = linear + size > 1 << 32 or (linear < RAM_BYTES < linear + size)
    if linear + size > RAM_BYTES or crosses:
        event("not RAM")
        assert outcome.exit[0] in (1, 10)
        assert outcome.exit[0] == 1 or outcome.vector == 3
        return
    event("accessed")
    assert outcome.vector == 3
    if write:
        state.memory.write(linear, size, 0x5A5A_5A5A)
    else:
        assert machine.state().gpr[0] & ((1 << 8 * size) - 1) == state.memory.read(linear, size)
    assert machine.changed(state.memory) == {}


@settings(max_examples=200)
@given(
    name=st.sampled_from(list(PREFIXES)),
    access=st.sampled_from(list(ACCESSES)),
    base=st.sampled_from([0, 0x3_0000, 0xFFFF_FFFF_8003_0000, 0x7FFF_FFFF_F000]),
    offset=st.sampled_from(
        [0, 0x100, 0x7FFF_FFFF_FFFE, 0x7FFF_FFFF_FFFF, 0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF, 1 << 63, 0xFFF]
    ),
)
def test_addresses_in_64_bit_mode(
    machine: Machine, name: str, access: tuple[bool, int], base: int, offset: int
) -> None:
    write, size = access
    table = TABLES[True]
    code = bytes([PREFIXES[name]]) + ACCESSES[access] + b"\xcc"
    machine.fill({GDT: bytes(table.image), CODE: code} | page_tables())
    state = initial_state(machine, table, 0, long_mode=True)
    state.segments[name] = Segment(0x10, base if name in ("fs", "gs") else 0, 0, 0x93)
    state.gpr[3] = offset
    outcome = machine.run(state)
    # Overrides other than FS and GS do not count; the base register decides.
    effective = name if name in ("fs", "gs") else "ds"
    linear = attempt(lambda: segments.linear_address(state, effective, offset, size, write=write))
    if isinstance(linear, Fault):
        assert (outcome.vector, outcome.error) == (linear.vector, linear.error)
    else:
        assert outcome.vector in (3, 14)


@pytest.mark.parametrize(("limit", "fits"), [(0xF, True), (0xE, False), (7, False)])
def test_the_whole_descriptor_must_be_in_its_table(machine: Machine, limit: int, fits: bool) -> None:
    table = TABLES[False]
    machine.fill(
        {GDT: bytes(table.image), LDT + 8: descriptor(0, 0xFFFF, 0x93).to_bytes(8, "little"), CODE: b"\x8e\xd8\xcc"}
    )
    state = initial_state(machine, table, 0, long_mode=False)
    state.segments["ldtr"] = Segment(0x50, LDT, limit, 0x82)
    state.gpr[0] = 0xC
    assert machine.run(state).vector == (3 if fits else 13)
