"""Translated blocks that go on after branches: registers, flags, memory and counts are the interpreter's."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot import _engine
from nonroot.engines.exits import Halt
from nonroot.engines.native import InterpretEngine, TranslateEngine
from nonroot.engines.policy import CpuPolicy
from nonroot.engines.protocol import Engine, EngineOptions
from nonroot.testing.engine_machine import BareMachine

UNAVAILABLE = _engine.translate_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"{UNAVAILABLE}")

AREA = 0x200FC0  # operands lie on both sides of a page's end
REGISTERS = ["eax", "ecx", "edx", "ebx", "edi", "r8", "r11", "r14", "r15"]
CONDITIONS = ["z", "nz", "c", "nc", "s", "ns", "o", "no", "be", "nbe", "l", "nl", "le", "nle", "p", "np"]


class EagerEngine(TranslateEngine):
    """Translates what it sees for the first time, and what follows its branches."""

    _more: Mapping[str, Any] = {"translate_after": 1}


def run(engine: Engine, source: str, bits: int = 64, off: frozenset[str] = frozenset()) -> tuple[Any, ...]:
    machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features), EngineOptions(off=off)).load(source, bits)
    machine.memory.write(AREA, bytes(range(1, 129)))
    assert isinstance(machine.run(limit=400_000), Halt)
    assert type(engine) is InterpretEngine or machine.vcpu.statistics()["native_instructions"] > 0
    state = machine.vcpu.state()
    return state.gpr, state.rflags, state.rip, machine.vcpu.retired(), machine.memory.read(AREA, 128)


def register(number: int, bits: int) -> str:
    if bits == 32:
        return REGISTERS[number % 5]
    name = REGISTERS[number % len(REGISTERS)]
    return name if name[0] == "r" else "r" + name[1:]


NUMBER = st.integers(0, 255)
STEP = st.tuples(st.integers(0, 13), NUMBER, NUMBER, NUMBER)
PART = st.tuples(st.lists(STEP, max_size=4), st.sampled_from(["", "jmp", *CONDITIONS]), st.integers(1, 4))


def step(kind: int, a: int, b: int, c: int, bits: int) -> str:
    left, right, at = register(a, bits), register(b, bits), f"[{'rsi' if bits == 64 else 'esi'}+{c % 100}]"
    return [
        f"add {left}, {right}",
        f"sub {left}, {c}",
        f"cmp {left}, {right}",
        f"test {left}, {right}",
        f"xor {left}, {at}",
        f"mov {left}, {at}",
        f"mov {at}, {left}",
        f"add {at}, {left}",
        f"shr {left}, {1 + c % 31}",
        f"lea {left}, [{right}+{c}]",
        f"adc {left}, {right}",
        f"inc {left}",
        f"add {left}, {at}",
        f"sub {left}, {at}",
    ][kind]


@settings(max_examples=60, deadline=None)
@given(st.lists(PART, min_size=2, max_size=9), st.sampled_from([64, 64, 32]))
def test_any_branches(parts: list[tuple[list[tuple[int, int, int, int]], str, int]], bits: int) -> None:
    lines = [f"mov esi, {AREA:#x}", "mov ebp, 5", "again:"]
    for n, (steps, ending, ahead) in enumerate(parts):
        lines += [f"part{n}:", *(step(*s, bits) for s in steps)]
        target = f"part{min(n + ahead, len(parts))}"
        if ending:
            lines.append(f"jmp {target}" if ending == "jmp" else f"j{ending} {target}")
    pop = "pushfq\npop rax" if bits == 64 else "pushfd\npop eax"
    lines += [f"part{len(parts)}:", pop, "dec ebp", "jnz again", "hlt"]
    source = "\n".join(lines)
    expected = run(InterpretEngine(), source, bits)
    assert run(EagerEngine(), source, bits) == expected
    assert run(EagerEngine(), source, bits, frozenset({"flag-recipes"})) == expected


CHANGED = """
    mov ebp, 40
    lea rbx, [rip+change+1]
again:
    cmp ebp, 0
    jz done
    add eax, 1
    test ebp, 1024
    jnz done
change:
    add al, 1
    cmp ebp, 20
    jnz next
    mov byte ptr [rbx], 3
next:
    dec ebp
    jmp again
done:
    hlt
"""


@pytest.mark.parametrize("off", [frozenset[str](), frozenset({"long-blocks"})], ids=["long", "short"])
def test_code_after_a_branch_changes(off: frozenset[str]) -> None:
    result = run(EagerEngine(), CHANGED, 64, off)
    assert result == run(InterpretEngine(), CHANGED)
    assert result[0][0] & 0xFF == 40 + 21 + 19 * 3


def test_blocks_go_on() -> None:
    source = "mov ecx, 50\nagain: cmp ecx, 60\njz out\nadd eax, 1\ncmp ecx, 70\njz out\ndec ecx\njnz again\nout: hlt"
    counts = []
    for off in (frozenset[str](), frozenset({"long-blocks"})):
        engine = EagerEngine()
        machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features), EngineOptions(off=off)).load(source, 64)
        assert isinstance(machine.run(limit=400_000), Halt)
        statistics = machine.vcpu.statistics()
        counts.append(statistics["translated_instructions"] / statistics["translated_blocks"])
    assert counts[0] > counts[1]
