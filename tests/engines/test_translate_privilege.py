"""SYSCALL, SYSRET and time stamps inside translated code: state, faults and interrupts are the interpreter's."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from nonroot import _engine
from nonroot.engines.exits import Halt
from nonroot.engines.native import InterpretEngine, TranslateEngine
from nonroot.engines.policy import CpuPolicy
from nonroot.engines.protocol import Engine, EngineOptions
from nonroot.testing.asm import assemble
from nonroot.testing.engine_machine import CODE, BareMachine

UNAVAILABLE = _engine.translate_unavailable()
pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=f"{UNAVAILABLE}")

USER, USER_STACK, LOG = 0x200000, 0x3FF000, 0x90000
GDT, TSS, TABLES = 0x800, 0x2000, 0x4000
QUICK = 0x40700  # AC, DF, IF and TF are cleared
SMAP = 1 << 21

KERNEL = """
    mov ecx, 0xc0000080
    rdmsr
    or eax, 1
    wrmsr
    mov ecx, 0xc0000081
    mov edx, 0x100008           ; SYSCALL: CS 8, SS 0x10; SYSRET: SS 0x1b, CS 0x23
    xor eax, eax
    wrmsr
    mov ecx, 0xc0000082
    mov eax, entered
    xor edx, edx
    wrmsr
    mov ecx, 0xc0000084
    mov eax, MASK
    wrmsr
    mov r12d, LOG
    mov ecx, USER
    mov r11d, FLAGS
    mov esp, USERSTACK
    sysretq
entered:
    mov r15, rsp
    mov esp, STACK
    push r11
    push rcx
    mov r8d, cs
    mov r9d, ss
    pushf
    pop r10
    mov edx, r10d
    rol rdi, 5
    add rdi, r8
    add rdi, r9
    xor rdi, r10
    cmp eax, 1
    je again_user
    cmp eax, 2
    je bad_return
    cmp eax, 3
    je peek
    cmp eax, 4
    je finish
    cmp eax, 5
    je step_on
    jmp back
again_user:
    mov r13d, [USER + 8]        ; a fault under SMAP
    add rdi, r13
    jmp back
peek:
    stac
    mov r13d, [USER + 8]
    clac
    add rdi, r13
back:
    pop rcx
    pop r11
    mov rsp, r15
    sysretq
step_on:
    or dword [rsp + 8], 0x100
    jmp back
bad_return:
    mov rcx, 0x800000000000
    sysretq
finish:
    cli
    hlt
page_fault:
    mov r14, cr2
    mov [r12], r14
    add r12, 8
fault:
    pop r14                     ; the error code
    mov [r12], r14
    mov r14, [rsp]              ; RIP
    mov [r12 + 8], r14
    mov r14, [rsp + 8]
    mov [r12 + 16], r14
    mov r14, [rsp + 16]
    mov [r12 + 24], r14
    add r12, 32
    mov r14, [rsp + 8]
    test r14b, 3
    jz from_kernel
    mov [rsp], rbp
    mov r14, [rsp + 16]
    and r14, -257               ; TF
    mov [rsp + 16], r14
    iretq
from_kernel:
    mov esp, STACK
    sub esp, 16
    jmp back
trap:
    push 0
    jmp fault
"""
USER_CODE = """
    jmp start
    db 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16
start:
    mov edi, 0x9abcdef1
    mov ebx, 60
loop:
    mov ebp, next
    mov eax, 0
    cmp ebx, 30
    stc
    syscall
    pushf
    pop rdx
    xor rdi, rdx
    lea rdi, [rdi + rcx]
    add rdi, r11
    mov eax, CALL
    test ebx, ebx
    syscall
next:
    mov ebp, after
    mov edx, cs
    add rdi, rdx
    TOUCH
after:
    dec ebx
    jnz loop
    mov eax, 4
    syscall
"""


class EagerEngine(TranslateEngine):
    _more: Mapping[str, Any] = {"translate_after": 1}


def prepared(
    engine: Engine,
    call: int = 0,
    mask: int = QUICK,
    flags: int = 0x202,
    touch: str = "nop",
    off: frozenset[str] = frozenset(),
) -> BareMachine:
    machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features), EngineOptions(off=off))
    machine.load(KERNEL, MASK=mask, FLAGS=flags, USER=USER, USERSTACK=USER_STACK, LOG=LOG)
    for address, entry in (TABLES, 0x5007), (TABLES + 0x1000, 0x6007), (TABLES + 0x2008, USER | 0x87):
        machine.memory.write(address, entry.to_bytes(8, "little"))
    machine.memory.write(GDT + 0x18, (0xCFF3000000FFFF).to_bytes(8, "little"))
    machine.memory.write(GDT + 0x20, (0xAFFB000000FFFF).to_bytes(8, "little"))
    machine.memory.write(TSS + 4, (0x78000).to_bytes(8, "little"))
    program = assemble(USER_CODE.replace("TOUCH", touch), bits=64, origin=USER, constants={"CALL": call, "CODE": CODE})
    machine.memory.write(USER, program.code)
    machine.vectors({1: "trap", 13: "fault", 14: "page_fault"})
    state = machine.vcpu.state()
    machine.vcpu.set_state(replace(state, cr4=state.cr4 | SMAP))
    return machine


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mask leaves interrupts on": {"mask": 0x40500},
    "mask leaves AC": {"mask": 0x700, "flags": 0x40202},
    "mask clears all status flags": {"mask": 0x257FD5},
    "flags of the user": {"flags": 0x200A02},
    "supervisor access to a user page": {"call": 1},
    "the same after STAC": {"call": 3},
    "return to an address that is not canonical": {"call": 2},
    "user access to a supervisor page": {"touch": "mov edx, [CODE]"},
    "user write to a supervisor page": {"touch": "mov [CODE], edx"},
    "single steps": {"touch": "pushf\n or dword [rsp], 0x100\n popf\n nop", "mask": 0x40700},
    "single steps after the return": {"call": 5},
    "alignment flag": {"touch": "pushf\n xor dword [rsp], 0x40000\n popf"},
    "supervisor instruction": {"touch": "swapgs"},
    "return from user code": {"touch": "sysretq"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("off", ["", "jump-lookup", "flag-recipes", "syscalls"])
def test_state_and_faults_are_the_interpreters(case: str, off: str) -> None:
    seen = []
    for engine in (InterpretEngine(), EagerEngine()):
        switched = frozenset({off} if off and isinstance(engine, EagerEngine) else ())
        machine = prepared(engine, **CASES[case], off=switched)
        assert isinstance(machine.run(limit=200_000), Halt)
        state = machine.vcpu.state()
        seen.append((state.gpr, state.rflags, state.segments, machine.memory.read(LOG, 0x4000), state.cpl))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("touch", ["rdtsc", "rdtscp"])
def test_time_stamps_grow(touch: str) -> None:
    source = f"""
        mov ecx, 0xc0000103
        mov eax, 7
        xor edx, edx
        wrmsr
        mov esi, 200
        xor edi, edi
    again:
        cmp esi, 300
        {touch}
        adc ebp, 0                  ; the flags are left alone
        mov r15, rdx
        shl r15, 32
        or r15, rax
        cmp r15, rdi
        jb backwards
        mov rdi, r15
        dec esi
        jnz again
    backwards:
        hlt
    """
    engine = EagerEngine()
    machine = BareMachine(engine, CpuPolicy.build(engine.cpu_features)).load(source)
    before = machine.vcpu.now_ns()
    assert isinstance(machine.run(), Halt)
    khz = machine.policy.tsc_khz
    assert machine.register("rsi") == 0
    assert machine.register("rbp") == 200
    assert before * khz // 1_000_000 < machine.register("rdi") <= machine.vcpu.now_ns() * khz // 1_000_000
    assert machine.register("rcx") == (7 if touch == "rdtscp" else 0xC0000103)
    assert machine.vcpu.statistics()["called_blocks"] < 20


def test_time_stamps_are_refused_where_the_guest_says_so() -> None:
    seen = []
    for engine in (InterpretEngine(), EagerEngine()):
        machine = prepared(engine, touch="rdtsc")
        state = machine.vcpu.state()
        machine.vcpu.set_state(replace(state, cr4=state.cr4 | 4))
        assert isinstance(machine.run(limit=200_000), Halt)
        seen.append((machine.vcpu.state().gpr, machine.memory.read(LOG, 0x1000)))
    assert seen[0] == seen[1]
    assert any(seen[0][1])


def test_an_interrupt_that_waits_comes_right_after_the_return() -> None:
    """The kernel's part runs with interrupts off; the user's first instruction is not run before the interrupt."""
    returns = []
    for engine in (InterpretEngine(), EagerEngine()):
        machine = prepared(engine)
        for _ in range(40):
            assert not isinstance(machine.run(limit=machine.vcpu.retired() + 97), Halt)
            if machine.vcpu.state().cpl == 0 and not machine.vcpu.state().rflags & 0x200:
                break
        machine.vectors({0x40: "trap"})
        machine.vcpu.interrupt(0x40)
        assert isinstance(machine.run(limit=machine.vcpu.retired() + 100_000), Halt)
        returns.append(machine.u64(LOG + 8))
    assert returns[0] == returns[1] != 0


def test_calls_stay_in_translated_code() -> None:
    called = []
    for off in (frozenset[str](), frozenset({"syscalls"})):
        machine = prepared(EagerEngine(), off=off)
        assert isinstance(machine.run(limit=200_000), Halt)
        called.append(machine.vcpu.statistics()["called_blocks"])
    assert called[1] - called[0] > 200
