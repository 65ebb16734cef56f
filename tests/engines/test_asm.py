"""The test kit's assembler, checked by iced's decoder and formatter."""

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from nonroot.testing.asm import AsmError, asm, assemble


def listing(code: bytes, bits: int, ip: int = 0) -> list[str]:
    formatter = Formatter(FormatterSyntax.NASM)
    return [formatter.format(instruction) for instruction in Decoder(bits, code, ip=ip)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mov rax, 0x123456789abcdef0", "mov rax,123456789ABCDEF0h"),
        ("mov eax, -1", "mov eax,0FFFFFFFFh"),
        ("mov [rbx+rcx*8+0x10], eax", "mov [rbx+rcx*8+10h],eax"),
        ("mov byte fs:[0x10], 1", "mov byte [fs:10h],1"),
        ("mov eax, [gs:rax]", "mov eax,[gs:rax]"),
        ("a32 rep movsq", "a32 rep movsq"),
        ("rep outsb", "rep outsb"),
        ("lock cmpxchg16b [rsi]", "lock cmpxchg16b [rsi]"),
        ("push 0x1234", "push 1234h"),
        ("o64 retf", "retfq"),
        ("jmp far [rax]", "jmp far [rax]"),
        ("vpgatherdd xmm0, [rax+xmm1*4], xmm2", "vpgatherdd xmm0,[rax+xmm1*4],xmm2"),
        ("fld tword [rax]", "fld tword [rax]"),
        ("mov rax, [0x123456789a]", "mov rax,[qword 123456789Ah]"),
        ("lea rax, [rax*5]", "lea rax,[rax+rax*4]"),
        ("lea rax, [rsp+rax]", "lea rax,[rsp+rax]"),
        ("add rax, -1", "add rax,0FFFFFFFFFFFFFFFFh"),
        ("enter 16, 1", "enter 10h,1"),
        ("xchg ah, cl", "xchg cl,ah"),
        ("nop", "nop"),
    ],
)
def test_one_instruction(text: str, expected: str) -> None:
    assert listing(asm(text), 64) == [expected]


def test_real_and_protected_mode() -> None:
    program = assemble(
        "mov ax, [bx+si+2]\n jmp dword 8:pm\n iret\n o32 iret\n loop $\n bits 32\n pm: iret\n pusha\n inc eax",
        bits=16,
        origin=0x7C00,
    )
    split = program["pm"] - 0x7C00
    real = listing(program.code[:split], 16, 0x7C00)
    assert real == ["mov ax,[bx+si+2]", f"jmp dword 8:0000{program['pm']:04X}h", "iret", "iretd", "loop 7C0Eh"]
    assert len(listing(program.code[split:], 32)) == 3


def test_labels_and_data() -> None:
    program = assemble(
        'start: jmp end\n times 200 nop\n end: lea rsi, [rel text]\n text: db "hi", 10\n align 8\n'
        "dq start, end - start\n size equ end - start\n dd size",
        origin=0x1000,
    )
    assert program["end"] == 0x1000 + 5 + 200, "a near jump, since a short one does not reach"
    assert program.code[-4:] == (205).to_bytes(4, "little")
    assert program.code[-20:-4] == (0x1000).to_bytes(8, "little") + (205).to_bytes(8, "little")
    assert asm("again: jmp again") == b"\xeb\xfe"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mov eax", "no encoding"),
        ("foo rax", "no such instruction"),
        ("inc [rax]", "not clear"),
        ("movzx eax, [rax]", "not clear"),
        ("mov eax, nope", "unknown name"),
        ("mov eax, [rax", "not closed"),
        ("push ds", "no encoding"),
        ("add rax, 0x123456789", "no encoding"),
        ("mov eax, [rax*3*rbx]", "cannot read"),
    ],
)
def test_mistakes_name_the_line(text: str, reason: str) -> None:
    with pytest.raises(AsmError, match=f"line 2: .*{reason}"):
        assemble("nop\n" + text)
