"""x87, MMX and bit strings under the translator: every result and pointer is the interpreter's."""

from collections.abc import Mapping
from typing import Any

import pytest

from nonroot import _engine
from nonroot.engines.exits import Halt
from nonroot.engines.native import InterpretEngine, LockstepEngine, TranslateEngine
from nonroot.engines.policy import CpuPolicy
from nonroot.engines.protocol import Engine, EngineOptions
from nonroot.testing.engine_machine import BareMachine

UNAVAILABLE = _engine.translate_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"{UNAVAILABLE}")

DATA = 0x300000
SETUP = """
    mov rax, cr0
    and al, 0xf3
    mov cr0, rax
    mov rax, cr4
    or eax, 0x600
    mov cr4, rax
    fninit
    mov ebx, 0x300000
"""
ARITHMETIC = """
    mov r11d, 0x300000
    mov r14d, 8
    mov r15d, 0x300100
    fld1
    fldpi
    mov ecx, 30
again:
    fld st1
    fmul st0, st1
    fadd qword [rbx + 64]
    fst dword [rbx + 8]
    fstp qword [rbx + 16]
    fild dword [rbx + 8]
    fistp qword [r15 + r14 * 8 + 16]
    fild word [r11 + r14 * 2]
    fstp qword [rbx + 64]
    fnstcw word [rbx + 40]
    mov ax, [rbx + 40]
    or ah, 12
    mov [rbx + 42], ax
    fldcw word [rbx + 42]
    fld qword [rbx + 16]
    fistp dword [rbx + 48]
    fldcw word [rbx + 40]
    fcomi st0, st1
    setb dl
    db 0xda, 0xc1           ; fcmovb st0, st1
    fnstsw ax
    add esi, eax
    db 0xd9, 0xfe           ; fsin
    dec ecx
    jnz again
    fxsave [rbx + 512]
    fnclex
    fldz
    hlt
"""
MMX = """
    mov ecx, 20
again:
    movd mm0, ecx
    movq mm1, mm0
    paddw mm1, [rbx + 64]
    movq [rbx + 64], mm1
    db 0xf3, 0x0f, 0xd6, 0xc1   ; movq2dq xmm0, mm1
    db 0x0f, 0xd7, 0xc1         ; pmovmskb eax, mm1
    add edx, eax
    dec ecx
    jnz again
    fxsave [rbx + 512]
    emms
    fld1
    hlt
"""
BITS = """
    mov ecx, 3
    lea rdi, [rbx + 256]
again:
    mov rax, -70
    bts qword [rdi], rax
    setc dl
    lock btr qword [rdi], rcx
    mov r15d, 333
    cmp rax, rax
    btc dword [rdi], r15d
    setz dh
    lock bts word [rdi], r15w
    bt qword [rdi], rax
    adc rbp, 0
    dec ecx
    jnz again
    hlt
"""


class EagerEngine(TranslateEngine):
    """Translates what it sees for the first time."""

    _more: Mapping[str, Any] = {"translate_after": 1}


def run(engine: Engine, source: str, off: frozenset[str] = frozenset()) -> tuple[BareMachine, tuple[object, ...]]:
    """The machine after a program, and all that the program can have changed."""
    policy = CpuPolicy.build(engine.cpu_features)
    machine = BareMachine(engine, policy, EngineOptions(off=off)).load(SETUP + source, 64)
    assert machine.run() == Halt()
    state = machine.vcpu.state()
    return machine, (state.gpr, state.rip, state.fx, machine.memory.read(DATA - 64, 2048))


@pytest.mark.parametrize("source", [ARITHMETIC, MMX, BITS], ids=["arithmetic", "mmx", "bits"])
def test_results_are_the_interpreters(source: str) -> None:
    _, expected = run(InterpretEngine(), source)
    _, compared = run(LockstepEngine(), source)
    machine, translated = run(EagerEngine(), source)
    plain, interpreted = run(EagerEngine(), source, frozenset({"x87"}))
    assert compared == expected
    assert translated == expected
    assert interpreted == expected
    if source is not BITS:
        counters = [m.vcpu.statistics()["native_instructions"] for m in (machine, plain)]
        assert counters[0] > 1.2 * counters[1]


def test_unmasked_exceptions_are_the_interpreters() -> None:
    """FLDCW that unmasks division by zero is not carried over, and the fault comes at the next waiting instruction."""
    source = "mov word [rbx], 0x37b\nfld1\nfldz\nfldcw word [rbx]\nfdivp st1, st0\nfnstsw ax\nfxsave [rbx + 512]\nhlt"
    _, expected = run(InterpretEngine(), source)
    for engine in (EagerEngine(), LockstepEngine()):
        machine, result = run(engine, source)
        assert result == expected
        assert machine.vcpu.state().gpr[0] & 0x8084 == 0x8084  # ZE, and so ES and B
