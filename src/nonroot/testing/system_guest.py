"""
System test guests: small programs that exercise what operating systems use of a CPU, and print what they saw.

A :class:`SystemGuest` is assembled from cases. Each case runs some code under a net that catches whatever exception
it raises, then prints one line on the first serial port: what happened (the vector, the error code, where the saved
instruction pointer lies relative to the case's ``f@`` label, the saved CS, CR2 of a page fault) and the values that
the case asks for. The same bytes run on any PC: real mode at :data:`ORIGIN`, interrupts off. They use nothing of a
firmware; only the serial port, and the interrupt controllers and timers where these are what is tested.

Cases are written once for 32 and 64 bits: ``%ax`` stands for EAX or RAX (so do ``%cx`` … ``%di``), ``%p`` for
``dword`` or ``qword``; ``name@`` is a label that belongs to the case alone.

The guest prints ``END`` last. Descriptors of the kit, in every guest: see :data:`SELECTORS`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Final

from nonroot.testing.asm import Program, assemble

__all__ = ["END", "ORIGIN", "SELECTORS", "SystemGuest", "descriptor"]

#: Where the program is loaded and entered, in real mode with CS 0.
ORIGIN: Final = 0x8000
#: The last line of a guest's output.
END: Final = "END"

#: The kit's selectors, known to the cases as constants; guests' own descriptors follow from 0x58 on.
SELECTORS: Final[Mapping[str, int]] = {
    "CODE64": 0x08,
    "CODE32": 0x10,
    "FLAT": 0x18,
    "USER32": 0x23,
    "USERDATA": 0x2B,
    "USER64": 0x33,
    "TSS": 0x38,
    "CODE16": 0x48,
    "DATA16": 0x50,
}
#: Further constants: stacks, tables, where a guest's page tables and data may lie.
CONSTANTS: Final[Mapping[str, int]] = {
    **SELECTORS,
    "STACK": 0x7000,
    "STACK0": 0x6000,
    "STACKIST": 0x5000,
    "USERSTACK": 0x4000,
    "IDT": 0x2000,
    "TABLES": 0x100000,
    "DATA": 0x400000,
    "RETURN": 0x30,
}
_FIRST_OWN: Final = 0x58
_VECTORS: Final = 64
_WITH_ERROR: Final = (8, 10, 11, 12, 13, 14, 17, 21)
_REGISTERS: Final = ("ax", "cx", "dx", "bx", "sp", "bp", "si", "di")


def descriptor(base: int, limit: int, access: int, flags: int = 0) -> int:
    """
    A segment descriptor.

    :param limit: the 20-bit limit field, in the granularity that ``flags`` says.
    :param access: the byte with type, S, DPL and P.
    :param flags: G, D/B, L, AVL as in bits 55:52.
    """
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16 | access << 40
    return low | (limit >> 16 & 15) << 48 | (flags & 15) << 52 | (base >> 24 & 0xFF) << 56


_START = """
bits 16
start:
    cli
    cld
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov sp, STACK
    in al, 0x92
    or al, 2
    and al, 0xfe
    out 0x92, al
    mov al, 0xff
    out 0x21, al
    out 0xa1, al
    mov dx, 0x3f9
    xor al, al
    out dx, al
    mov dx, 0x3fb
    mov al, 0x83
    out dx, al
    mov dx, 0x3f8
    mov al, 1
    out dx, al
    inc dx
    xor al, al
    out dx, al
    mov dx, 0x3fb
    mov al, 3
    out dx, al
    xor eax, eax
    mov cr4, eax
    lgdt [gdtr]
    mov eax, 0x11
    mov cr0, eax
    jmp dword CODE32:start32
bits 32
start32:
    mov eax, FLAT
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    mov esp, STACK
"""

# Page tables of 64-bit guests: the first four GiB to themselves by 2 MiB pages, for ring 3 too.
_LONG = """
    mov edi, TABLES
    mov ecx, 0x6000 // 4
    xor eax, eax
    rep stosd
    mov dword [TABLES], TABLES + 0x1007
    mov edi, TABLES + 0x1000
    mov eax, TABLES + 0x2007
    mov ecx, 4
pdpt_fill:
    mov [edi], eax
    add edi, 8
    add eax, 0x1000
    loop pdpt_fill
    mov edi, TABLES + 0x2000
    mov eax, 0x87
    mov ecx, 2048
pd_fill:
    mov [edi], eax
    add edi, 8
    add eax, 0x200000
    loop pd_fill
    mov eax, TABLES
    mov cr3, eax
    mov eax, 0x620
    mov cr4, eax
    mov ecx, 0xc0000080
    mov eax, 0x900
    xor edx, edx
    wrmsr
    mov eax, 0x80010033
    mov cr0, eax
    jmp CODE64:start64
bits 64
start64:
"""

_IDT_FILL = """
    mov edi, IDT
    mov edx, stubs
    mov ecx, 64
idt_fill:
    mov [{entry}], dx
    mov word [{entry} + 2], {code}
    mov word [{entry} + 4], 0x8e00
    mov eax, edx
    shr eax, 16
    mov [{entry} + 6], ax
    {upper}
    add edi, {size}
    add edx, 16
    loop idt_fill
    mov byte [IDT + {size} * RETURN + 5], 0xee
"""
_IDT32 = _IDT_FILL.format(entry="edi", size=8, code="CODE32", upper="")
_IDT64 = _IDT_FILL.format(entry="rdi", size=16, code="CODE64", upper="mov qword [rdi + 8], 0")
_TABLES_LOAD = """
    mov edi, tss + 0x68
    mov ecx, 129
    mov al, 0xff
    rep stosb
    lidt [idtr]
    mov eax, TSS
    ltr ax
"""

_LIBRARY = """
; Print the character in AL, the text at RSI, the number in RAX.
putc:
    push %dx
    push %ax
    mov edx, 0x3fd
putc_wait:
    in al, dx
    test al, 0x20
    je putc_wait
    mov edx, 0x3f8
    pop %ax
    out dx, al
    pop %dx
    ret
puts:
    lodsb
    test al, al
    je puts_end
    call putc
    jmp puts
puts_end:
    ret
putn:
    push %cx
    push %dx
    mov %dx, %ax
    mov ecx, NIBBLES
putn_skip:
    rol %dx, 4
    dec ecx
    je putn_digit
    test dl, 15
    je putn_skip
putn_digit:
    mov al, dl
    and al, 15
    add al, 0x30
    cmp al, 0x39
    jbe putn_print
    add al, 39
putn_print:
    call putc
    rol %dx, 4
    dec ecx
    jns putn_digit
    pop %dx
    pop %cx
    ret
; The text at RSI, then the number in RAX.
putv:
    push %ax
    call puts
    pop %ax
    jmp putn

save:
    mov [s_ax], %ax
    mov [s_cx], %cx
    mov [s_dx], %dx
    mov [s_bx], %bx
    mov [s_bp], %bp
    mov [s_si], %si
    mov [s_di], %di
    lea %ax, [%sp + CELL]
    mov [s_sp], %ax
    pushf
    pop %ax
    mov [s_fl], %ax
    mov %ax, [s_ax]
    ret

; Every vector: what was pushed, then back to where the case goes on.
stub_common:
    push %ax
    push %ax
    mov eax, FLAT
    mov ds, ax
    mov es, ax
    mov %ax, [%sp]
    cmp dword [hook], 0
    je no_hook
    pop %ax
    add %sp, CELL
    jmp %p [hook]
no_hook:
    call save
    mov %ax, [%sp + 2 * CELL]
    mov [f_vector], eax
    cmp al, RETURN
    jne is_fault
    mov dword [f_vector], -1
is_fault:
    mov %ax, [%sp + 3 * CELL]
    mov [f_error], %ax
    mov %ax, [%sp + 4 * CELL]
    mov [f_ip], %ax
    mov %ax, [%sp + 5 * CELL]
    mov [f_cs], %ax
    mov %ax, [%sp + 6 * CELL]
    mov [f_flags], %ax
    mov %ax, [%sp + 7 * CELL]
    mov [f_sp], %ax
    mov %ax, [%sp + 8 * CELL]
    mov [f_ss], %ax
    lea %ax, [%sp + 4 * CELL]
    mov [f_at], %ax
    mov %ax, cr2
    mov [f_cr2], %ax
    mov eax, FLAT
    mov ss, ax
    mov fs, ax
    mov gs, ax
    mov %sp, STACK
    push 2
    popf
    jmp %p [resume]

; A case starts: its name is at RSI, where it resumes is in RAX, what IPs are relative to in RDX.
begin:
    mov [resume], %ax
    mov [relative], %dx
    mov dword [f_vector], -1
    call puts
    mov dword [hook], 0
    mov ecx, 17
    mov edi, s_ax
    xor eax, eax
clear_values:
    mov [%di], %ax
    add %di, CELL
    dec ecx
    jne clear_values
    xor ecx, ecx
    xor edx, edx
    xor ebx, ebx
    xor esi, esi
    xor edi, edi
    xor ebp, ebp
    ret
report:
    cld
    mov esi, text_ok
    cmp dword [f_vector], -1
    je puts
    mov esi, text_vector
    mov eax, [f_vector]
    call putv
    mov eax, [f_vector]
    cmp eax, 32
    jae report_ip
    mov ecx, WITH_ERROR
    bt ecx, eax
    jnc report_ip
    mov esi, text_error
    mov %ax, [f_error]
    call putv
report_ip:
    mov %ax, [f_ip]
    mov esi, text_fetch
    cmp dword [f_vector], 14
    jne report_relative
    cmp %ax, [f_cr2]
    jne report_relative
    call puts
    jmp report_cs
report_relative:
    mov %ax, [f_ip]
    mov esi, text_ip
    sub %ax, [relative]
    call putv
report_cs:
    mov esi, text_cs
    movzx eax, word [f_cs]
    call putv
    cmp dword [f_vector], 14
    jne report_end
    mov esi, text_cr2
    mov %ax, [f_cr2]
    call putv
report_end:
    ret
newline:
    mov al, 10
    jmp putc
text_ok: db ": ok", 0
text_vector: db ": vector ", 0
text_error: db " error ", 0
text_ip: db " ip+", 0
text_fetch: db " ip=cr2", 0
text_cs: db " cs ", 0
text_cr2: db " cr2 ", 0
text_end: db "END", 10, 0
"""


class SystemGuest:
    """A program under construction; :meth:`case` adds to it, :meth:`build` assembles it."""

    def __init__(self, name: str, bits: int, descriptors: Mapping[str, int] | None = None) -> None:
        """
        :param name: of the guest, and of the file with what it must print.
        :param bits: 32 (protected mode without paging) or 64 (long mode, 4 GiB mapped to themselves).
        :param descriptors: further descriptors of the GDT; each name becomes a constant, its selector.
        """
        if bits not in (32, 64):
            raise ValueError(f"a system guest has 32 or 64 bits, not {bits}")
        self.name = name
        self.bits = bits
        own = dict(descriptors or {})
        self.constants = dict(CONSTANTS)
        self.constants |= {label: _FIRST_OWN + 8 * i for i, label in enumerate(own)}
        self.constants |= {"CELL": bits // 8, "NIBBLES": bits // 4, "WITH_ERROR": sum(1 << v for v in _WITH_ERROR)}
        self._own = tuple(own.values())
        #: Why an emulator cannot run this guest, by its name.
        self.unlike: dict[str, str] = {}
        self._unlike: dict[str, dict[str, str]] = {}
        self._text: list[str] = []
        self._data: list[str] = []
        self._count = 0

    def code(self, source: str) -> None:
        """Code that runs between the cases, outside the net."""
        self._count += 1
        self._text.append(self._expand(source))

    def data(self, source: str) -> None:
        """Data, and code that only jumps and calls reach; 32- or 64-bit as the guest is."""
        self._data.append(self._expand(source))

    def case(
        self, name: str, source: str, *, show: Iterable[str] = (), after: str = "", relative: str = "", **unlike: str
    ) -> None:
        """
        Run ``source`` and print what came of it.

        :param source: falls through its end, or raises an exception, or does ``int RETURN`` (from any ring). It starts
            with all general registers but the stack pointer zero.
        :param show: values to print: a register when the case ended (``ax`` … ``di``, ``fl``), what was pushed
            (``f_sp``, ``f_ss``, ``f_flags``, ``f_at``: where), or ``label:operand`` with a 32-bit memory operand; each
            may be masked: ``flags:f_flags & 0x10000``.
        :param after: code to run before the values are printed.
        :param relative: what the saved instruction pointer is printed relative to, if not to ``f@`` or the start.
        :param unlike: an emulator's name (``qemu``, ``bochs``) and how it differs from the manuals here; its
            line is not compared.
        """
        self._count += 1
        if ": " in name or '"' in name:
            raise ValueError(f"a case's name holds neither a colon nor a quote: {name}")
        for emulator, why in unlike.items():
            self._unlike.setdefault(emulator, {})[name] = why
        has_label = re.search(r"\bf@\s*:", source)
        lines = [
            f"    mov esi, {self._string(name)}",
            "    mov eax, after@",
            f"    mov edx, {relative or ('f@' if has_label else 'begin@')}",
            "    call begin",
            "    xor eax, eax",
            "begin@:",
            source,
            "    call save",
            "after@:",
            "    call report",
            after,
        ]
        for item in show:
            label, _, operand = item.partition(":")
            operand, _, mask = (operand or label).partition("&")
            operand = operand.strip()
            if operand in (*_REGISTERS, "fl"):
                lines.append(f"    mov %ax, [s_{operand}]")
            elif re.fullmatch(r"f_\w+", operand):
                lines.append(f"    mov %ax, [{operand}]")
            else:
                lines.append(f"    mov eax, {operand}")
            if mask:
                lines.append(f"    and eax, {mask}")
            lines += [f"    mov esi, {self._string(' ' + label.partition('&')[0].strip() + ' ')}", "    call putv"]
        lines.append("    call newline")
        self._text.append(self._expand("\n".join(lines)))

    def user(self, source: str, flags: int = 2) -> str:
        """Code for a case that enters ring 3 (flat segments of the guest's width) and runs ``source`` there."""
        code = "USER32" if self.bits == 32 else "USER64"
        data = "" if self.bits == 64 else "push USERDATA\n pop ds\n push USERDATA\n pop es"
        return f"""
            {data}
            push USERDATA
            push USERSTACK
            push {flags}
            push {code}
            push user@
            iret
        user@:
            {source}
            int RETURN
        """

    def comparable(self, output: str, emulator: str) -> list[str]:
        """The lines of an output without those in which ``emulator`` is known to differ."""
        differing = self._unlike.get(emulator, {})
        return [line for line in output.splitlines() if line.partition(": ")[0] not in differing]

    def build(self) -> Program:
        """Assemble it; the program's label ``start`` is :data:`ORIGIN`."""
        return _assemble(self._source(), tuple(self.constants.items()))

    # ── parts ──

    def _expand(self, source: str) -> str:
        source = re.sub(r"([A-Za-z_]\w*)@", rf"\1_{self._count}", source)
        wide = self.bits == 64
        source = re.sub(r"%p\b", "qword" if wide else "dword", source)
        return re.sub(r"%(ax|cx|dx|bx|sp|bp|si|di)\b", r"r\1" if wide else r"e\1", source)

    def _string(self, text: str) -> str:
        label = f"text_{self._count}_{len(self._data)}"
        self._data.append(f'{label}: db "{text}", 0')
        return label

    def _source(self) -> str:
        wide = self.bits == 64
        stubs = ["align 16", "stubs:"]
        for vector in range(_VECTORS):
            first = "0x90, 0x90" if vector in _WITH_ERROR else "0x6a, 0"
            stubs += ["align 16", f"db {first}, 0x6a, {vector}, 0xe9", "dd stub_common - ($ + 4)"]
        slot = "dq" if wide else "dd"
        values = (*(f"s_{r}" for r in _REGISTERS), "s_fl", "f_error", "f_ip", "f_cs", "f_flags", "f_sp", "f_ss")
        variables = [f"{label}: {slot} 0" for label in (*values, "f_at", "f_cr2", "hook", "resume", "relative")]
        variables += ["f_vector: dd 0"]
        descriptors = (
            0,
            descriptor(0, 0xFFFFF, 0x9B, 0xA),
            descriptor(0, 0xFFFFF, 0x9B, 0xC),
            descriptor(0, 0xFFFFF, 0x93, 0xC),
            descriptor(0, 0xFFFFF, 0xFB, 0xC),
            descriptor(0, 0xFFFFF, 0xF3, 0xC),
            descriptor(0, 0xFFFFF, 0xFB, 0xA),
        )
        tss = "dw 0x68 + 128, tss\ndb 0, 0x89, 0, 0\ndq 0"
        gdt = ["align 8", "gdt:", *(f"dq {d}" for d in descriptors), tss]
        gdt += [
            f"dq {descriptor(0, 0xFFFF, 0x9B)}",
            f"dq {descriptor(0, 0xFFFF, 0x93)}",
            *(f"dq {d}" for d in self._own),
        ]
        gdt += ["gdt_end:", f"gdtr: dw gdt_end - gdt - 1\n{slot} gdt", f"idtr: dw {_VECTORS * (16 if wide else 8)} - 1"]
        gdt += [f"{slot} IDT", "align 8", "tss:"]
        if wide:
            gdt += ["dd 0", "dq STACK0, 0, 0, 0, STACKIST, STACKIST - 0x800", "resb 0x66 - 0x34", "dw 0x68"]
        else:
            gdt += ["dd 0, STACK0, FLAT", "resb 0x66 - 12", "dw 0x68"]
        gdt.append("resb 129")
        return "\n".join(
            [
                _START,
                _LONG if wide else "",
                _IDT64 if wide else _IDT32,
                _TABLES_LOAD,
                *self._text,
                "finish:\n    mov esi, text_end\n    call puts\nstop:\n    cli\n    hlt\n    jmp stop",
                self._expand(_LIBRARY),
                *gdt,
                *variables,
                *self._data,
                *stubs,
            ]
        )


@functools.lru_cache(maxsize=64)
def _assemble(source: str, constants: tuple[tuple[str, int], ...]) -> Program:
    return assemble(source, bits=16, origin=ORIGIN, constants=dict(constants))
