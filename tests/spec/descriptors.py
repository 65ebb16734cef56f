"""A descriptor table of everything that a selector may lead to, for comparing engine and model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hypothesis import strategies as st

from nonroot.spec.segments import parse
from nonroot.spec.state import EFER_LMA, Fault, Segment, State
from nonroot.testing.differential_machine import Machine

GDT, LDT, IDT, TSS = 0x1000, 0x2000, 0x3000, 0x4000
#: Stacks of rings 0 to 3, and where tests put code and handlers.
STACKS = (0x1_0000, 0x1_2000, 0x1_4000, 0x1_6000)
CODE, HANDLERS, DATA = 0x2_0000, 0x2_7000, 0x3_0000
PAGE_TABLES = 0x8000

CODE_TYPES = {"code": 0xB, "readless": 0x9, "conforming": 0xF}


def descriptor(base: int, limit: int, access: int) -> int:
    """Eight bytes of a descriptor; ``access`` in VMX's layout, ``limit`` as the descriptor holds it."""
    low = limit & 0xFFFF | (base & 0xFF_FFFF) << 16
    return low | (access & 0xF0FF) << 40 | (limit >> 16 & 15) << 48 | (base >> 24 & 0xFF) << 56


@dataclass(frozen=True)
class Entry:
    """A place in the table."""

    name: str
    value: int
    #: Upper half of a 16-byte descriptor.
    upper: int = 0


def flat(kind: int, dpl: int, *, size: int = 0xC000, present: int = 0x80, accessed: bool = True) -> int:
    """A flat segment of the given type (VMX's type and S bits)."""
    return descriptor(0, 0xFFFFF, kind & (0xF if accessed else 0xE) | 0x10 | dpl << 5 | present | size)


def standard_entries(long_mode: bool) -> list[Entry]:
    """Every kind of segment at every privilege level, good ones first; the first four levels' code and data."""
    entries = [Entry("null", 0)]
    code_size = 0xA000 if long_mode else 0xC000
    for dpl in range(4):
        entries.append(Entry(f"code{dpl}", flat(0xB, dpl, size=code_size)))
        entries.append(Entry(f"data{dpl}", flat(0x3, dpl)))
        entries.append(Entry(f"conforming{dpl}", flat(0xE, dpl, size=code_size, accessed=False)))
        entries.append(Entry(f"compat{dpl}", flat(0xA, dpl, size=0xC000, accessed=False)))
        entries.append(Entry(f"absent_code{dpl}", flat(0xB, dpl, size=code_size, present=0)))
        entries.append(Entry(f"absent_data{dpl}", flat(0x3, dpl, present=0)))
        entries.append(Entry(f"read_only{dpl}", flat(0x0, dpl, accessed=False)))
        entries.append(Entry(f"expand_down{dpl}", descriptor(0, 0xF, 0x16 | dpl << 5 | 0x80 | 0xC000)))
        entries.append(Entry(f"small_data{dpl}", descriptor(0, 0x1_0040 + 0x2000 * dpl, 0x92 | dpl << 5 | 0x4000)))
        entries.append(Entry(f"small_code{dpl}", descriptor(0, 0x2_0FFF, 0x9A | dpl << 5 | 0x4000)))
    entries.append(Entry("code16", descriptor(CODE, 0xFFFF, 0x9B)))
    entries.append(Entry("data16", descriptor(STACKS[0] - 0x1000, 0x1FFF, 0x93)))
    entries.append(Entry("wrong", flat(0xB, 0, size=0xE000)))
    entries.append(Entry("system", 0x0000_8900_0000_0067))
    entries.append(Entry("ldt", 0x0000_8200_0000_0067))
    return entries


Result = TypeVar("Result")


def attempt(step: Callable[[], Result]) -> Result | Fault:
    """What a step of the model returns, or the fault that it raises."""
    try:
        return step()
    except Fault as fault:
        return fault


class Table:
    """The entries in memory, and their selectors."""

    def __init__(self, long_mode: bool, extra: tuple[Entry, ...] = ()) -> None:
        self.entries = standard_entries(long_mode)
        self.selectors: dict[str, int] = {}
        self.image = bytearray()
        for entry in (*self.entries, *extra):
            self.selectors[entry.name] = len(self.image)
            self.image += entry.value.to_bytes(8, "little")
            if entry.upper or long_mode:
                self.image += entry.upper.to_bytes(8, "little")

    def segment(self, name: str, rpl: int = 0) -> Segment:
        """The segment register that a load of an entry makes."""
        selector = self.selectors[name]
        value = int.from_bytes(self.image[selector : selector + 8], "little")
        return parse(selector | rpl, value | 1 << 40)

    @property
    def limit(self) -> int:
        """Limit of the table."""
        return len(self.image) - 1


def selectors(table: Table) -> st.SearchStrategy[int]:
    """Selectors with any RPL, in the table, in the LDT, and beyond."""
    good = st.builds(
        lambda name, rpl: table.selectors[name] | rpl, st.sampled_from(list(table.selectors)), st.integers(0, 3)
    )
    return st.one_of(good, good, good, good, st.sampled_from([0, 1, 2, 3, 0xFFF8, 0x0F, 0x5F, table.limit + 1]))


def good_selectors(table: Table, cpl: int, kinds: tuple[str, ...] = ("code", "conforming")) -> st.SearchStrategy[int]:
    """Mostly selectors of segments of the given kinds that privilege level ``cpl`` may reach inwards."""
    reachable = st.builds(
        lambda kind, dpl, rpl: table.selectors[f"{kind}{min(dpl, cpl)}"] | rpl,
        st.sampled_from(kinds), st.integers(0, 3), st.integers(0, 3),
    )  # fmt: skip
    return st.one_of(reachable, reachable, reachable, reachable, selectors(table))


def initial_state(machine: Machine, table: Table, cpl: int, *, long_mode: bool, compat: bool = False) -> State:
    """A state at the given privilege level, with flat segments from the table."""
    code = table.segment(f"{'compat' if compat else 'code'}{cpl}", cpl)
    data = table.segment(f"data{cpl}", cpl)
    return State(
        gpr=[0, 0, 0, 0, STACKS[cpl], 0, 0, 0, *[0] * 8],
        rip=CODE,
        rflags=2,
        segments={
            "cs": code, "ss": data, "ds": data, "es": data, "fs": data, "gs": data, "ldtr": Segment(),
            "tr": Segment(table.selectors["system"], TSS, 0x67, 0x8B),
        },
        gdtr=(GDT, table.limit),
        idtr=(IDT, 0xFFF),
        cr0=0x8000_0011 if long_mode else 0x11,
        cr3=PAGE_TABLES if long_mode else 0,
        cr4=0x20 if long_mode else 0,
        efer=EFER_LMA | 0x901 if long_mode else 0,
        memory=machine.memory(),
    )  # fmt: skip


def page_tables() -> dict[int, bytes]:
    """4-level tables that map the first 2 MiB for everybody, here and in the last 2 GiB."""
    entries = {
        PAGE_TABLES: PAGE_TABLES + 0x1000, PAGE_TABLES + 8 * 511: PAGE_TABLES + 0x1000,
        PAGE_TABLES + 0x1000: PAGE_TABLES + 0x2000, PAGE_TABLES + 0x1000 + 8 * 510: PAGE_TABLES + 0x2000,
        PAGE_TABLES + 0x2000: 0x80,
    }  # fmt: skip
    return {at: (value | 0x67).to_bytes(8, "little") for at, value in entries.items()}
