"""MOVS and STOS inside translated code: memory, registers and counts are the interpreter's."""

from collections.abc import Mapping
from dataclasses import replace
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

AREA, PAGES = 0x200000, 8
PATTERN = bytes((7 * n + n // 256) & 0xFF for n in range(PAGES * 4096))
SIZES = {1: "b", 2: "w", 4: "d", 8: "q"}


class EagerEngine(TranslateEngine):
    _more: Mapping[str, Any] = {"translate_after": 1}


def program(lines: list[str], bits: int) -> str:
    pop = "pushfq\npop rdx" if bits == 64 else "pushfd\npop edx"
    return "mov ebp, 2\nagain:\n" + "\n".join([*lines, pop, "dec ebp", "jnz again", "hlt"])


def run(engine: Engine, source: str, bits: int, off: frozenset[str] = frozenset()) -> tuple[Any, ...]:
    machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features), EngineOptions(off=off)).load(source, bits)
    machine.memory.write(AREA, PATTERN)
    assert isinstance(machine.run(limit=400_000), Halt)
    state = machine.vcpu.state()
    memory = machine.memory.read(AREA, PAGES * 4096)
    return state.gpr, state.rflags, state.rip, machine.vcpu.retired(), memory


OPERATION = st.tuples(
    st.sampled_from(["movs", "stos"]),
    st.sampled_from(sorted(SIZES)),
    st.booleans(),
    st.integers(0, 2 * 4096),
    st.integers(0, 2 * 4096),
    st.one_of(st.integers(0, 40), st.integers(0, 1000)),
    st.booleans(),
)


@settings(max_examples=60)
@given(st.lists(OPERATION, min_size=1, max_size=4), st.sampled_from([64, 32]))
def test_any_operation(operations: list[tuple[str, int, bool, int, int, int, bool]], bits: int) -> None:
    lines = []
    for name, size, repeated, source, target, count, down in operations:
        if size == 8 and bits == 32:
            size = 4
        base = AREA + 2 * 4096 + (count * size if down else 0)
        lines += [f"mov esi, {base + source}", f"mov edi, {base + target}", f"mov ecx, {count}", "cmp ecx, 100"]
        lines += ["mov eax, 0x81828384", "std" if down else "cld", f"{'rep ' if repeated else ''}{name}{SIZES[size]}"]
    guest = program([*lines, "cld"], bits)
    assert run(EagerEngine(), guest, bits) == run(InterpretEngine(), guest, bits)


@pytest.mark.parametrize("off", ["", "strings", "jump-lookup"])
@pytest.mark.parametrize("size", sorted(SIZES))
def test_copies_and_fills_across_pages(size: int, off: str) -> None:
    lines = []
    for source, target, count in (0, 3 * 4096, 4096), (5, 0x3123, 2500), (4095, 2, 3), (4094, 4093, 5), (0, 1, 3000):
        lines += [f"mov esi, {AREA + source}", f"mov edi, {AREA + target}", f"mov ecx, {count // size}"]
        lines += [f"rep movs{SIZES[size]}", "mov rax, rsi", f"mov ecx, {count // size}", f"rep stos{SIZES[size]}"]
    guest = program(lines, 64)
    done = run(EagerEngine(), guest, 64, frozenset({off} if off else ()))
    assert done == run(InterpretEngine(), guest, 64)


def test_a_fault_in_the_middle_leaves_exact_registers() -> None:
    """Page 3 of the area is not present: the copy stops there and goes on when the handler has made it so."""
    source = f"""
        mov ebp, 3
    again:
        mov esi, {AREA + 100}
        mov edi, {AREA + 0x2800}
        mov ecx, 3000
        stc
        rep movsb
        adc ebx, 0
        dec ebp
        jnz again
        hlt
    fault:
        add r12, 1
        mov r13, rcx
        mov r14, rdi
        mov r15, rsi
        mov r9, cr2
        mov r11, [rsp + 24]
        or qword [0x6c018], 3
        invlpg [r9]
        add rsp, 8
        iretq
    """
    seen = []
    for engine in (InterpretEngine(), EagerEngine()):
        machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features)).load(source)
        machine.vectors({14: "fault"})
        machine.memory.write(AREA, PATTERN)
        for n in range(512):
            entry = AREA + 4096 * n | (0 if n == 3 else 3)
            machine.memory.write(0x6C000 + 8 * n, entry.to_bytes(8, "little"))
        machine.memory.write(0x6008, (0x6C000 | 3).to_bytes(8, "little"))
        state = machine.vcpu.state()
        machine.vcpu.set_state(replace(state))
        assert isinstance(machine.run(limit=100_000), Halt)
        seen.append((machine.vcpu.state().gpr, machine.vcpu.retired(), machine.memory.read(AREA, PAGES * 4096)))
    assert seen[0] == seen[1]
    assert machine.register("r12") == 1
    assert machine.register("r9") == AREA + 0x3000
    assert machine.register("r13") == 3000 - 0x800


def test_code_that_is_copied_over_is_run_anew() -> None:
    source = f"""
        mov ebp, 20
    again:
        mov esi, new
        mov edi, {AREA + 0x1000}
        mov ecx, 6
        rep movsb
        mov eax, {AREA + 0x1000}
        inc dword [new + 1]
        call rax
        add ebx, edx
        dec ebp
        jnz again
        hlt
    new:
        mov edx, 5
        ret
    """
    seen = []
    for engine in (InterpretEngine(), EagerEngine()):
        machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features)).load(source)
        assert isinstance(machine.run(limit=100_000), Halt)
        seen.append((machine.register("rbx"), machine.vcpu.retired()))
    assert seen[0] == seen[1] == (sum(range(5, 25)), seen[0][1])


def test_a_long_copy_lets_interrupts_in() -> None:
    engine = EagerEngine()
    lines = "mov ecx, 0x1000000\nmov edi, 0x200000\nsti\n"
    machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features))
    machine.load(
        f"mov ebp, 100\nagain: {lines} mov edi, {AREA}\nmov ecx, 0x180000\nrep stosb\ndec ebp\njnz again\nhlt\nhit: hlt"
    )
    machine.vectors({0x41: "hit"})
    machine.run(limit=10_000_000)
    machine.vcpu.interrupt(0x41)
    before = machine.vcpu.retired()
    assert isinstance(machine.run(), Halt)
    assert machine.vcpu.retired() - before < 100_000
    assert machine.register("rip") == machine.program["hit"] + 1
