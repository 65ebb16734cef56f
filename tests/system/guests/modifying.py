"""
Code that changes: the next instruction, another page, through another name of the frame, by string instructions, across
a page boundary.

Every change is followed by a jump before the changed code runs, or by nothing where the processor must notice by itself
(SDM volume 3, 8.1.3 and 11.6: since the P6 family a store to the prefetched instructions flushes the pipeline, if it
uses the linear address that the code was fetched by; through another address a serializing instruction is needed).
"""

# ruff: noqa: E501 (a case is easiest to read as one line)

from collections.abc import Iterator

from nonroot.testing.system_guest import SystemGuest

# How an emulator differs from the manuals:
STALE = "Bochs 2.7 keeps an instruction whose second page is mapped anew (SDM volume 3, 4.10.4.1: INVLPG)"
PT = 0x110000
PAGE = 0x4000_0000


def guests() -> Iterator[SystemGuest]:
    for bits in (32, 64):
        g = SystemGuest(f"modifying_{bits}", bits)
        _plain(g)
        _far_pages(g)
        _aliases(g)
        yield g


def _plain(g: SystemGuest) -> None:
    g.case("immediate of the next instruction", "mov dword [next@ + 1], 0x22\n next@: mov eax, 0x11", show=["ax"])
    g.case("opcode of the next instruction", "mov byte [next@], 0x40\n jmp next@\n next@: db 0x90" if g.bits == 32 else
           "mov word [next@], 0xc0ff\n jmp next@\n next@: nop\n nop", show=["ax"])  # fmt: skip
    g.case("loop that changes its own body",
           "mov ecx, 5\n again@: mov ebx, 1\n add eax, ebx\n inc dword [again@ + 1]\n dec ecx\n jne again@", show=["ax"])  # fmt: skip
    g.case("instruction behind in the loop",
           "mov ecx, 4\n again@: add eax, 1\n add byte [again@ + 2], 1\n dec ecx\n jne again@", show=["ax"])  # fmt: skip
    g.case("REP MOVSB over the next instruction", "mov esi, patch@\n mov edi, next@\n mov ecx, 5\n rep movsb\n"
           "next@: mov eax, 0x11\n jmp end@\n patch@: mov eax, 0x33\n end@: nop", show=["ax"])  # fmt: skip
    g.case("REP STOSB writes NOPs ahead", "mov eax, 0x90\n mov edi, next@\n mov ecx, 2\n rep stosb\n jmp next@\n next@: inc eax\n inc eax",
           show=["ax"])  # fmt: skip
    g.case("XCHG and LOCK change code", "mov bl, 0x55\n xchg [next@ + 1], bl\n lock inc byte [next@ + 1]\n next@: mov al, 0x11",
           show=["ax", "bx"])  # fmt: skip
    if g.bits == 32:
        g.case("PUSH changes code", "mov %bx, %sp\n mov %sp, next@ + CELL\n push -0x6f6f6f70\n mov %sp, %bx\n jmp next@\n"
           "next@: inc eax\n inc eax\n times 8 nop", show=["ax"])  # fmt: skip
    g.case("conditional branch becomes its opposite", "again@: xor ebx, ebx\n next@: jne taken@\n inc eax\n jmp more@\n taken@: add eax, 0x10\n"
           "more@: xor byte [next@], 1\n inc ecx\n cmp ecx, 4\n jne again@", show=["ax"])  # fmt: skip
    g.case("target of a call", "mov ecx, 3\n again@: call work@\n inc byte [work@ + 2]\n dec ecx\n jne again@\n jmp end@\n"
           "work@: add eax, 1\n ret\n end@: nop", show=["ax"])  # fmt: skip


def _far_pages(g: SystemGuest) -> None:
    code = "DATA + 0x10000"
    function = f"mov dword [{code}], 0x{'{}'}b8\n mov dword [{code} + 4], 0xc300\n"
    g.case("code in another page", function.format("1111") + f"mov edx, {code}\n call %dx\n mov ebx, eax\n"
           f"mov byte [{code} + 1], 0x99\n call %dx", show=["ax", "bx"])  # fmt: skip
    g.case("by REP MOVSD from another page", f"mov edx, {code}\n call %dx\n mov ebx, eax\n mov esi, new@\n mov edi, {code}\n"
           "mov ecx, 2\n rep movsd\n call %dx\n jmp end@\n new@: mov eax, 0x77\n ret\n nop\n nop\n end@: nop", show=["ax", "bx"])  # fmt: skip
    edge = "DATA + 0x12000"
    g.case("instruction across two pages, second changes", f"mov byte [{edge} - 2], 0xb8\n mov dword [{edge} - 1], 0x01020304\n"
           f"mov byte [{edge} + 3], 0xc3\n mov edx, {edge} - 2\n call %dx\n mov ebx, eax\n mov byte [{edge} + 1], 0x55\n call %dx",
           show=["ax", "bx"])  # fmt: skip
    g.case("instruction across two pages, first changes", f"mov edx, {edge} - 2\n call %dx\n mov ebx, eax\n mov byte [{edge} - 1], 0x66\n"
           "call %dx", show=["ax", "bx"])  # fmt: skip
    g.case(
        "store across both pages of code",
        f"mov edx, {edge} - 2\n mov dword [{edge} - 1], 0x0a0b0c0d\n call %dx",
        show=["ax"],
    )
    g.case("block that runs into the next page", f"mov edi, {edge} - 0x20\n mov ecx, 0x20\n mov al, 0x90\n rep stosb\n"
           f"mov dword [{edge}], 0xc3c301b0\n mov edx, {edge} - 0x10\n call %dx\n mov ebx, eax\n mov byte [{edge} + 1], 2\n call %dx",
           show=["ax & 0xff", "bx & 0xff"])  # fmt: skip


def _aliases(g: SystemGuest) -> None:
    if g.bits == 32:
        directory = 0x120000
        g.code(f"""
            mov edi, {directory}
            mov ecx, 0x400
            xor eax, eax
            rep stosd
            mov dword [{directory}], 0x87
            mov dword [{directory + 4}], 0x400087
            mov dword [{directory + 4 * (PAGE >> 22)}], {PT} + 7
            mov eax, 0x10
            mov cr4, eax
            mov eax, {directory}
            mov cr3, eax
            mov eax, 0x80010033
            mov cr0, eax
        """)
    else:
        g.code(f"""
            mov dword [{PT + 0x1000}], {PT} + 7
            mov dword [{PT + 0x1004}], 0
            mov dword [TABLES + 0x1008], {PT + 0x1000} + 7
        """)
    g.code(f"""
        mov edi, {PT}
        mov ecx, 0x400
        xor eax, eax
        rep stosd
        mov dword [{PT}], DATA + 0x14007
        mov dword [{PT} + {g.bits // 8}], DATA + 0x15007
        mov %ax, cr3
        mov cr3, %ax
    """)
    code, name = "DATA + 0x14000", f"{PAGE}"
    serialize = "push %bx\n push %ax\n xor eax, eax\n cpuid\n pop %ax\n pop %bx\n"
    g.case("written by one name, run by another", f"mov dword [{code}], 0x1111b8\n mov word [{code} + 4], 0xc300\n mov eax, {name}\n"
           f"call %ax\n mov esi, eax\n mov byte [{code} + 1], 0x99\n {serialize} mov edx, {name}\n call %dx", show=["ax", "si"])  # fmt: skip
    g.case("written by the other, run by the first", f"mov edx, {code}\n call %dx\n mov esi, eax\n mov byte [{name} + 2], 0x42\n"
           f"{serialize} mov edx, {code}\n call %dx", show=["ax", "si"])  # fmt: skip
    g.case("another frame under the same name", f"mov dword [DATA + 0x16000], 0x5555b8\n mov dword [DATA + 0x16004], 0xc300\n mov edx, {name}\n"
           f"call %dx\n mov esi, eax\n mov dword [{PT}], DATA + 0x16007\n invlpg [%dx]\n call %dx", show=["ax", "si"])  # fmt: skip
    g.case("second page of an instruction gets another frame",
           f"mov byte [DATA + 0x16ffd], 0xb8\n mov word [DATA + 0x16ffe], 0x3344\n mov dword [DATA + 0x15000], 0xc31122\n"
           f"mov dword [DATA + 0x17000], 0xc37788\n mov edx, {PAGE + 0xFFD}\n call %dx\n mov esi, eax\n"
           f"mov dword [{PT} + {g.bits // 8}], DATA + 0x17007\n mov ecx, {PAGE + 0x1000}\n invlpg [%cx]\n call %dx", show=["ax", "si"], bochs=STALE)  # fmt: skip
    g.case("second page goes away", f"mov dword [{PT} + {g.bits // 8}], 0\n invlpg [{PAGE + 0x1000}]\n mov edx, {PAGE + 0xFFD}\n jmp %dx", bochs=STALE)  # fmt: skip
