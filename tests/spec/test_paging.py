"""Random page-table entries: the same translation or fault with the same error code, and the same A and D bits."""

from __future__ import annotations

import struct

from hypothesis import event, given, settings
from hypothesis import strategies as st

from nonroot.spec.paging import Access, translate
from nonroot.spec.state import (
    AC,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    Fault,
    Segment,
    State,
)  # fmt: skip
from nonroot.testing.differential_machine import RAM_BYTES, Machine
from tests.spec.descriptors import attempt

CODE = 0x0040_0000  # linear
CODE_FRAME = 0x1_F000  # this and all below: physical
TABLES, CODE_TABLES = 0x1_0000, 0x1_8000
DATA = 0x2_0000  # frames that data pages map
# Each data frame says which it is: mov eax, frame; nop; nop; int3.
BACKGROUND = bytes(DATA) + b"".join(struct.pack("<BI3s", 0xB8, n, b"\x90\x90\xcc") * 512 for n in range(32))

FLAGS_32 = st.builds(
    lambda present, flags, large: flags & ~0x81 | present | large,
    st.sampled_from([1] * 12 + [0]),
    st.integers(0, 0xFFF),
    st.sampled_from([0, 0, 0, 0x80]),
)
HIGH = st.sampled_from([0, 0, 0, 0, 0, 1 << 63, 1 << 63, 1 << 45, 1 << 52, 1 << 58])
LOW_ADDRESS = st.sampled_from([0, 0, 0, 0, 0, 1 << 12, 1 << 13, 1 << 20, 1 << 21])
ENTRY = st.tuples(FLAGS_32, HIGH, LOW_ADDRESS)
SYSTEM = st.fixed_dictionaries({name: st.booleans() for name in ("wp", "smep", "smap", "nxe", "ac", "user", "pse")})
ACCESS = st.sampled_from(list(Access))


def build(
    mode: str, entries: list[tuple[int, int, int]], slot: int, offset: int
) -> tuple[dict[int, bytes], int, dict[str, object]]:
    """Tables for one linear address under test, and for the code; returns RAM contents, the address, state fields."""
    page = 0x20 + slot  # index in the last table, and of the 4 KiB page in a 2 MiB page at 0
    image: dict[int, bytes] = {}

    def put(address: int, value: int, size: int) -> None:
        image[address] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")

    def target(level: int) -> int:
        return DATA + slot * 0x1000 if level == 0 else TABLES + level * 0x1000

    def entry(number: int, level: int, size: int) -> int:
        flags, high, low = entries[number]
        large = flags & 0x80 and level > 0
        address = 0 if large else target(level)
        if large or low <= 1 << 12:
            address |= low if large else 0
        return address | flags | (high if size == 8 else 0)

    fields: dict[str, object] = {}
    if mode == "4-level":
        linear = 0x0000_6A00_0000_0000 | page << 12 | offset
        top = TABLES + 0x5000
        for level in range(3, -1, -1):
            table = top if level == 3 else TABLES + (level + 1) * 0x1000
            put(table + (linear >> (12 + 9 * level) & 0x1FF) * 8, entry(3 - level, level, 8), 8)
        put(top, CODE_TABLES | 0x67, 8)
        put(CODE_TABLES, CODE_TABLES + 0x1000 | 0x67, 8)
        put(CODE_TABLES + 0x1000 + 8 * (CODE >> 21), CODE_TABLES + 0x2000 | 0x67, 8)
        fields |= {"cr3": top}
    elif mode == "pae":
        linear = 0x8000_0000 | page << 12 | offset
        put(TABLES + 0x2000, entry(0, 1, 8), 8)
        put(TABLES + 0x1000 + page * 8, entry(1, 0, 8), 8)
        put(CODE_TABLES + 0x1000 + 8 * (CODE >> 21), CODE_TABLES + 0x2000 | 0x67, 8)
        fields |= {"pdpte": (CODE_TABLES + 0x1000 | 1, 0, TABLES + 0x2000 | entries[2][0] & 1, 0), "cr3": TABLES}
    else:
        linear = 0x8000_0000 | page << 12 | offset
        top = TABLES + 0x5000
        put(top + (linear >> 22) * 4, entry(0, 1, 4), 4)
        put(TABLES + 0x1000 + page * 4, entry(1, 0, 4), 4)
        put(top + (CODE >> 22) * 4, CODE_TABLES + 0x2000 | 0x67, 4)
        fields |= {"cr3": top}
    size = 4 if mode == "32-bit" else 8
    image[CODE_TABLES + 0x2000] = struct.pack("<Q", CODE_FRAME | 0x60 | 3)[:size]
    return image, linear, fields


@settings(max_examples=500)
@given(
    mode=st.sampled_from(["32-bit", "pae", "4-level"]),
    entries=st.lists(ENTRY, min_size=4, max_size=4),
    slot=st.integers(0, 31),
    offset=st.integers(0, 0xFF0).map(lambda n: n & ~7),
    system=SYSTEM,
    access=ACCESS,
)
def test_walks(
    machine: Machine,
    mode: str,
    entries: list[tuple[int, int, int]],
    slot: int,
    offset: int,
    system: dict[str, bool],
    access: Access,
) -> None:
    image, linear, fields = build(mode, entries, slot, offset)
    user = system["user"]
    leaf = bytearray(image[CODE_TABLES + 0x2000])
    leaf[0] |= 4 if user else 0
    image[CODE_TABLES + 0x2000] = bytes(leaf)
    image[CODE_FRAME] = {Access.READ: b"\x8b\x03", Access.WRITE: b"\x89\x03", Access.EXECUTE: b"\xff\xe3"}[
        access
    ] + b"\xcc"
    machine.fill(image, BACKGROUND)
    long_mode = mode == "4-level"
    dpl = 3 if user else 0
    code = Segment(8 | dpl, 0, 0xFFFF_FFFF, (0xA09B if long_mode else 0xC09B) | dpl << 5)
    data = Segment(16 | dpl, 0, 0xFFFF_FFFF, 0xC093 | dpl << 5)
    state = State(
        gpr=[0x1122_3344, 0, 0, linear, 0, 0, 0, 0, *[0] * 8],
        rip=CODE,
        rflags=2 | (AC if system["ac"] else 0),
        segments={
            "cs": code, **dict.fromkeys(("es", "ss", "ds", "fs", "gs"), data), "ldtr": Segment(),
            "tr": Segment(0x40, 0, 0x67, 0x8B),
        },
        gdtr=(0, 0),
        idtr=(0, 0),
        cr0=0x11 | CR0_PG | (CR0_WP if system["wp"] else 0),
        cr4=(CR4_PAE if mode != "32-bit" else 0) | (CR4_PSE if system["pse"] else 0)
        | (CR4_SMEP if system["smep"] else 0) | (CR4_SMAP if system["smap"] else 0),
        efer=(EFER_NXE if system["nxe"] else 0) | (EFER_LMA | 0x100 if long_mode else 0),
        memory=machine.memory(),
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    outcome = machine.run(state)
    after = machine.state()
    physical = attempt(lambda: translate(state, linear, access))
    if isinstance(physical, Fault):
        fault = physical
        event(f"{mode}: #PF({fault.error:#x})")
        assert (outcome.vector, outcome.error, outcome.address) == (14, fault.error, fault.address)
        assert after.rip == (linear if access is Access.EXECUTE else CODE)
    else:
        if physical >= RAM_BYTES:
            event(f"{mode}: translated to no memory")
            # Fetching code there is a failure, everything else MMIO.
            assert outcome.exit[0] == (16 if access is Access.EXECUTE else 1)
            assert access is Access.EXECUTE or outcome.exit[1] == physical
            return
        event(f"{mode}: translated")
        assert outcome.vector == 3, outcome
        if access is Access.WRITE:
            state.memory.write(physical, 4, 0x1122_3344)
        elif access is Access.READ:
            assert after.gpr[0] == state.memory.read(physical, 4)
        else:
            assert after.gpr[0] == state.memory.read(physical + 1, 4)
            assert after.rip == linear + 7
    assert machine.changed(state.memory) == {}
