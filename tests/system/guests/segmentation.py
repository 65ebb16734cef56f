"""
Segmentation: real mode, big real mode, 16-bit protected mode, expand-down segments, limits, null selectors, LAR and
LSL of what is special, virtual-8086 mode.

Sources: Intel SDM volume 3, chapters 3 (segments), 5 (protection), 9.9 (mode switches) and 20 (8086 emulation).
"""

# ruff: noqa: E501 (a case is easiest to read as one line)

from collections.abc import Iterator

from nonroot.testing.system_guest import SystemGuest, descriptor

OWN = {
    "SMALL": descriptor(0x10000, 0xFFF, 0x93, 4),
    "DOWN32": descriptor(0, 0xFFF, 0x97, 4),
    "DOWN16": descriptor(0x10000, 0xFFF, 0x97, 0),
    "READONLY": descriptor(0, 0xFFFFF, 0x91, 0xC),
    "EXECUTEONLY": descriptor(0, 0xFFFFF, 0x99, 0xC),
    "FRESH": descriptor(0x20000, 0xFFFFF, 0x92, 0xC),
    "PAGES": descriptor(0, 3, 0x93, 0xC),
    "LDT": descriptor(0x2F00, 0x1F, 0x82),
    "CODE16HIGH": descriptor(0, 0xFFFF, 0x9A, 0),
}
# How QEMU differs from the manuals:
LIMITS = "QEMU's software CPU checks no segment limits"
RIGHTS = "QEMU's software CPU checks no access rights of loaded segments"

_REAL = """
    lidt [real_idt@]
    jmp CODE16:leave@
    bits 16
    leave@:
    mov ax, DATA16
    mov ds, ax
    mov es, ax
    mov ss, ax
    {}
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    jmp 0:real@
    real@:
    xor ax, ax
    mov ds, ax
    mov es, ax
    mov ss, ax
    xor ecx, ecx
    xor edx, edx
    {}
    mov [r_ax], eax
    mov [r_cx], ecx
    mov [r_dx], edx
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword CODE32:back@
    real_idt@: dw 0x3ff, 0, 0
    bits 32
    back@:
    mov eax, FLAT
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov fs, ax
    mov gs, ax
    lidt [idtr]
    mov eax, [r_ax]
    mov ecx, [r_cx]
    mov edx, [r_dx]
"""


def guests() -> Iterator[SystemGuest]:
    g = SystemGuest("segmentation", 32, OWN)
    _limits(g)
    _sixteen(g)
    _real(g)
    yield g
    g = SystemGuest("virtual_8086", 32)
    _virtual(g)
    yield g


def _limits(g: SystemGuest) -> None:
    g.case("limit, last byte", "mov eax, SMALL\n mov fs, ax\n mov al, [fs:0xfff]\n mov eax, 1", show=["ax"])
    g.case("limit, byte behind", "mov eax, SMALL\n mov fs, ax\n f@: mov al, [fs:0x1000]", qemu=LIMITS)
    g.case("limit, dword across", "mov eax, SMALL\n mov fs, ax\n f@: mov eax, [fs:0xffd]", qemu=LIMITS)
    g.case("limit in pages", "mov eax, PAGES\n mov fs, ax\n mov al, [fs:0x3fff]\n f@: mov al, [fs:0x4000]", qemu=LIMITS)
    g.case("expand-down, inside", "mov eax, DOWN32\n mov fs, ax\n mov eax, [fs:0x1000]\n mov eax, 1", show=["ax"])
    g.case("expand-down, at the limit", "mov eax, DOWN32\n mov fs, ax\n f@: mov al, [fs:0xfff]", qemu=LIMITS)
    g.case("expand-down with 16 bits, above 64 KiB", "mov eax, DOWN16\n mov fs, ax\n mov al, [fs:0xffff]\n f@: mov al, [fs:0x10000]",
           qemu=LIMITS)  # fmt: skip
    g.case("base", "mov eax, FRESH\n mov fs, ax\n mov dword [0x20010], 0x5678\n mov eax, [fs:0x10]", show=["ax"])
    g.case(
        "loading sets the accessed bit", "mov eax, FRESH\n mov fs, ax", show=["type:dword [gdt + FRESH + 4] & 0xff00"]
    )
    g.case("write of a read-only segment", "mov eax, READONLY\n mov fs, ax\n f@: mov [fs:0x10000], eax", qemu=RIGHTS)
    g.case("read-only stack", "mov eax, READONLY\n f@: mov ss, ax")
    g.case("execute-only into DS", "mov eax, EXECUTEONLY\n f@: mov fs, ax")
    g.case("write through CS", "f@: mov [cs:0x10000], eax", qemu=RIGHTS)
    g.case("read through CS", "mov dword [0x10000], 0x99\n mov eax, [cs:0x10000]", show=["ax"])
    g.case("null selector, load", "xor eax, eax\n mov fs, ax\n mov gs, ax\n mov eax, fs", show=["ax"])
    g.case("null selector, use", "mov eax, 3\n mov fs, ax\n f@: mov eax, [fs:0]", qemu=LIMITS)
    g.case("MOV to a segment register beyond the GDT leaves it", "mov eax, FLAT\n mov fs, ax\n mov eax, 0x1230\n f@: mov fs, ax",
           show=["ax"])  # fmt: skip
    g.case("LDT", "mov dword [0x2f08], 0x0000ffff\n mov dword [0x2f0c], 0x00cf9303\n mov eax, LDT\n lldt ax\n mov eax, 12\n mov fs, ax\n"
           "mov dword [0x30000], 0x4444\n mov eax, [fs:0]\n sldt cx", show=["ax", "cx & 0xffff"])  # fmt: skip
    g.case("LDT, limit", "mov eax, 0x24\n f@: mov fs, ax")
    g.case("null LDT", "xor eax, eax\n lldt ax\n mov eax, 12\n f@: mov fs, ax")
    for name in ("FLAT", "READONLY", "EXECUTEONLY", "TSS", "LDT", "SMALL", "PAGES", "DOWN32"):
        g.case(f"LAR, LSL, VERR, VERW of {name}", f"mov eax, {name}\n lar ecx, eax\n sete bl\n lsl edx, eax\n sete bh\n verr ax\n sete al\n"
               "verw ax\n sete ah\n and ecx, 0xf0ff00\n and eax, 0xff", show=["ax", "bx", "cx", "dx"])  # fmt: skip
    g.case("LAR, LSL of null and beyond", "xor eax, eax\n lar ecx, eax\n sete bl\n mov eax, 0x1230\n lsl edx, eax\n sete bh",
           show=["bx", "cx", "dx"])  # fmt: skip
    g.case("LSS", "mov dword [DATA], 0x6f00\n mov word [DATA + 4], FLAT\n lss esp, [DATA]\n mov eax, esp", show=["ax"])
    g.case("LFS of a bad selector changes nothing", "mov ecx, 7\n mov dword [DATA], 0x55\n mov word [DATA + 4], 0x1230\n f@: lfs ecx, [DATA]",
           show=["cx"])  # fmt: skip
    g.case("ARPL", "mov eax, 0x10\n mov ecx, 3\n arpl ax, cx\n sete bl\n arpl ax, cx\n sete bh", show=["ax", "bx"])


def _sixteen(g: SystemGuest) -> None:
    g.case("16-bit code", "jmp CODE16:sixteen@\n bits 16\n sixteen@: mov eax, -1\n mov ax, 0x1234\n mov cx, cs\n jmp dword CODE32:out@\n"
           "bits 32\n out@: nop", show=["ax", "cx"])  # fmt: skip
    g.case("16-bit stack wraps at 64 KiB", "mov ebx, esp\n mov eax, DATA16\n mov ss, ax\n mov esp, 0x7fff0000\n push 0x1111\n mov ecx, esp\n"
           "mov eax, FLAT\n mov ss, ax\n mov esp, ebx\n movzx eax, word [0xfffc]", show=["cx", "ax"])  # fmt: skip
    g.case("16-bit call from 32-bit code", "call CODE16:sixteen@\n jmp end@\n bits 16\n sixteen@: mov bx, sp\n o32 retf\n bits 32\n end@: mov ecx, cs",
           show=["cx", "bx"])  # fmt: skip
    g.case("IP beyond the limit of 16-bit code", "jmp CODE16HIGH:sixteen@\n bits 16\n sixteen@: mov ecx, 0x10000\n f@: jmp ecx\n bits 32",
           qemu=LIMITS)  # fmt: skip
    g.data("r_ax: dd 0\n r_cx: dd 0\n r_dx: dd 0")


def _real(g: SystemGuest) -> None:
    def real(name: str, source: str, before: str = "", show: str = "ax cx dx", **unlike: str) -> None:
        g.case(name, _REAL.format(before, source), show=show.split(), **unlike)

    vector = "mov word [4 * {}], handler@\n mov word [4 * {} + 2], 0\n"
    real("real mode", "mov ax, cs\n movzx ecx, ax\n mov edx, cr0\n and edx, 1\n xor eax, eax")
    real(
        "segment times 16",
        "mov ax, 0x2345\n mov fs, ax\n mov dword [fs:0x10], 0x777\n mov ax, 0x2346\n mov gs, ax\n mov eax, [gs:0]",
    )
    real("above 1 MiB", "mov ax, 0xffff\n mov fs, ax\n mov dword [fs:0x1000], 0x31\n mov eax, [fs:0x1000]")
    real(
        "address wraps at 64 KiB",
        "mov bx, 0xfff0\n mov si, 0x20\n mov word [0x10], 0x4242\n mov ax, [bx + si]\n movzx eax, ax",
    )
    real("INT and IRET", vector.format(0x61, 0x61) + "mov dx, sp\n sti\n int 0x61\n cli\n sub dx, sp\n jmp end@\n"
         "handler@: pushf\n pop cx\n and cx, 0x200\n mov ax, 5\n iret\n end@: nop")  # fmt: skip
    real("#DE saves the instruction's own IP", vector.format(0, 0)
         + "xor bx, bx\n fault@: div bx\n jmp end@\n handler@: pop cx\n sub cx, fault@\n add cx, 2 + fault@\n push cx\n sub cx, fault@\n iret\n end@: xor eax, eax")  # fmt: skip
    real(
        "#UD",
        vector.format(6, 6)
        + "jmp fault@\n handler@: pop cx\n sub cx, fault@\n popf\n popf\n jmp end@\n fault@: ud2\n end@: xor eax, eax",
    )
    real("#GP at the end of the segment", vector.format(13, 13) + "jmp fault@\n handler@: pop cx\n sub cx, fault@\n popf\n popf\n mov dx, 13\n jmp end@\n"
         "fault@: mov ax, [0xffff]\n end@: xor eax, eax", qemu=LIMITS)  # fmt: skip
    real("#UD for LAR", vector.format(6, 6) + "jmp fault@\n handler@: pop cx\n sub cx, fault@\n popf\n popf\n mov dx, 6\n jmp end@\n"
         "fault@: lar ax, ax\n end@: xor eax, eax")  # fmt: skip
    real("big real mode", "mov dword [fs:0x400000], 0x1357\n mov eax, [fs:0x400000]", "mov ax, FLAT\n mov fs, ax")
    real("big real mode outlives a load", "mov ax, 0x1000\n mov fs, ax\n mov edx, 0x400000 - 0x10000\n mov dword [fs:edx], 0x6543\n mov eax, [fs:edx]\n xor edx, edx",
         "mov ax, FLAT\n mov fs, ax")  # fmt: skip
    real(
        "32-bit push and far call",
        "mov dx, sp\n push dword 0x12345678\n pop eax\n mov cx, sp\n sub dx, cx\n call 0:far@\n jmp end@\n far@: retf\n end@: mov cx, cs",
    )


def _virtual(g: SystemGuest) -> None:
    """Code at 0x30000 in V86 mode: CS 0x3000, stack 0x3800:0x1000."""
    g.code("mov byte [IDT + 8 * RETURN + 5], 0xee")

    def virtual(
        name: str, source: str, flags: int = 0x20002, show: str = "ax cx", before: str = "", **unlike: str
    ) -> None:
        # The code is copied to its segment, so that its IP is relative to it.
        g.case(name, f"""
            {before}
            mov esi, code@
            mov edi, 0x30000
            mov ecx, end@ - code@
            rep movsb
            push 0x3300
            push 0x3200
            push 0x3100
            push 0x3000
            push 0x3800
            push 0x1000
            push {flags}
            push 0x3000
            push 0
            xor eax, eax
            iret
            bits 16
            code@: {source}
            end@:
            bits 32
            """, relative="0", show=[*show.split(), "vm:f_flags & 0x20000", "ss:f_ss & 0xffff", "sp:f_sp & 0xffff"],
            **unlike)  # fmt: skip

    iopl3 = 0x23002
    virtual("segments", "mov ax, ds\n mov cx, es\n int 0x30", iopl3)
    virtual("stack and memory", "push ax\n mov word [0x10], 0x7788\n mov cx, [0x10]\n int 0x30", iopl3)
    virtual("INT n with IOPL 3 through a gate of DPL 3", "mov ax, 7\n int 0x30", iopl3)
    virtual("INT n with IOPL 3 through a gate of DPL 0", "mov ax, 7\n int 0x31", iopl3)
    virtual("INT n with IOPL 0", "mov ax, 8\n int 0x30")
    virtual("INT3 with IOPL 0", "int3", before="mov byte [IDT + 8 * 3 + 5], 0xee")
    virtual("CLI with IOPL 0", "cli\n int 0x30")
    virtual(
        "CLI with IOPL 3",
        "sti\n pushf\n pop ax\n cli\n pushf\n pop cx\n and ax, 0x200\n and cx, 0x200\n int 0x30",
        iopl3,
    )
    virtual("PUSHF with IOPL 0", "pushf\n int 0x30")
    virtual("POPF with IOPL 0", "popf")
    virtual("IRET with IOPL 0", "iret")
    virtual(
        "IRET with IOPL 3",
        "push word 0x3002\n push word 0x3000\n push there@ - code@\n iret\n hlt\n there@: mov ax, 0x55\n int 0x30",
        iopl3,
    )
    virtual("HLT", "hlt", iopl3)
    virtual("MOV to CR0", "mov cr0, eax", iopl3)
    virtual("LAR", "lar ax, ax", iopl3)
    virtual("IN by the bitmap, denied", "in al, 0x80", iopl3)
    virtual(
        "OUT by the bitmap, allowed",
        "out 0x80, al\n mov ax, 3\n int 0x30",
        iopl3,
        before="mov byte [tss + 0x68 + 0x10], 0xfe",
    )
    virtual("loading segments", "mov ax, 0x2345\n mov es, ax\n mov cx, es\n mov word [es:0], 0x99\n int 0x30", iopl3)
    virtual("limit is 64 KiB", "mov ebx, 0x10000\n mov ax, [ebx]\n int 0x30", iopl3, qemu=LIMITS)
    virtual("#DE", "xor bx, bx\n div bx", iopl3)
    virtual("far jump", "jmp 0x2fff:there@ - code@ + 16\n nop\n nop\n there@: mov ax, cs\n int 0x30", iopl3)
