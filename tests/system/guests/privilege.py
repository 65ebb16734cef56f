"""
Privilege: the ways into ring 0 and out of it, TSS stacks, IOPL and the I/O bitmap, privileged instructions, conforming
code, call gates and far returns with parameters.

Sources: Intel SDM volume 3, chapters 5 (protection) and 7 (tasks); volume 1, 19.5 (I/O permission bitmap).
"""

# ruff: noqa: E501 (a case is easiest to read as one line)

from collections.abc import Iterator

from nonroot.testing.system_guest import SystemGuest, descriptor

PRIVILEGED = {
    "hlt": "hlt",
    "clts": "clts",
    "lgdt": "lgdt [gdtr]",
    "lidt": "lidt [idtr]",
    "lldt": "xor eax, eax\n f@: lldt ax",
    "ltr": "mov eax, TSS\n f@: ltr ax",
    "lmsw": "lmsw ax",
    "invlpg": "invlpg [%ax]",
    "wbinvd": "wbinvd",
    "rdmsr": "rdmsr",
    "wrmsr": "wrmsr",
    "read CR0": "mov %ax, cr0",
    "write CR0": "mov cr0, %ax",
    "read CR3": "mov %ax, cr3",
    "cli": "cli",
    "sti": "sti",
    "in": "in al, 0x80",
    "out": "out 0x80, al",
    "insb": "insb",
    "outsb": "outsb",
}


def guests() -> Iterator[SystemGuest]:
    for bits in (32, 64):
        own = {
            "CONFORMING": descriptor(0, 0xFFFFF, 0x9F, 0xC if bits == 32 else 0xA),
            "GATE": 0,
            "GATEHIGH": 0,
            "OTHERLEVEL": descriptor(0, 0xFFFFF, 0xB3, 0xC),
        }
        g = SystemGuest(f"privilege_{bits}", bits, own)
        _instructions(g)
        _ports(g)
        _transfers(g)
        if bits == 32:
            _sysenter(g)
        else:
            _syscall(g)
        yield g


def _instructions(g: SystemGuest) -> None:
    for name, source in PRIVILEGED.items():
        g.case(f"{name} in ring 3", g.user(source if "f@" in source else f"f@: {source}"))
    g.case(
        "reads that ring 3 may do",
        g.user("smsw ax\n sgdt [%sp - 32]\n sidt [%sp - 32]\n str cx\n sldt dx"),
        show=["cx", "dx"],
    )
    umip = "mov %ax, cr4\n or eax, 0x800\n mov cr4, %ax\n"
    for name, source in {
        "sgdt": "sgdt [%sp - 32]",
        "sidt": "sidt [%sp - 32]",
        "str": "str ax",
        "sldt": "sldt ax",
        "smsw": "smsw ax",
    }.items():
        g.case(f"UMIP, {name} in ring 3", umip + g.user(f"f@: {source}"))
    g.case("UMIP in ring 0", "str ax", show=["ax"], after="mov %ax, cr4\n and eax, 0xfffff7ff\n mov cr4, %ax")
    g.case(
        "POPF in ring 3 changes neither IF nor IOPL",
        g.user("push 0x3202\n popf\n pushf\n pop %ax"),
        show=["ax & 0x3202"],
    )
    g.case(
        "POPF in ring 3 with IOPL 3 changes IF",
        g.user("push 0x2\n popf\n pushf\n pop %ax", 0x3202),
        show=["ax & 0x3202"],
    )
    g.case("CLI and STI with IOPL 3", g.user("cli\n pushf\n pop %cx\n sti\n nop\n pushf\n pop %dx", 0x3002),
           show=["cx & 0x3200", "dx & 0x3200"])  # fmt: skip
    g.case("TSD", "mov %ax, cr4\n or eax, 4\n mov cr4, %ax\n" + g.user("f@: rdtsc"),
           after="mov %ax, cr4\n and eax, -5\n mov cr4, %ax")  # fmt: skip
    g.case("RDPMC without PCE", g.user("f@: rdpmc"))


def _ports(g: SystemGuest) -> None:
    allow, deny = "mov byte [tss + 0x68 + 0x10], 0xfe", "mov byte [tss + 0x68 + 0x10], 0xff"
    g.case("I/O bitmap, port allowed", f"{allow}\n" + g.user("mov al, 7\n out 0x80, al\n mov ecx, 1"), show=["cx"])
    g.case("I/O bitmap, next port", g.user("f@: out 0x81, al"))
    g.case("I/O bitmap, word of which one half is allowed", g.user("f@: out 0x80, ax"))
    g.case("I/O bitmap, word allowed", "mov byte [tss + 0x68 + 0x10], 0xfc\n" + g.user("out 0x80, ax\n mov ecx, 1"), show=["cx"],
           after=deny)  # fmt: skip
    g.case("I/O bitmap, word across two bytes", "mov word [tss + 0x68 + 0x10], 0xfe7f\n" + g.user("out 0x87, ax\n mov ecx, 1"),
           show=["cx"], after="mov word [tss + 0x68 + 0x10], 0xffff")  # fmt: skip
    g.case("I/O bitmap, port beyond the TSS's limit", g.user("mov edx, 0x500\n f@: in al, dx"))
    g.case("IOPL 3 needs no bitmap", g.user("out 0x80, al\n mov ecx, 1", 0x3002), show=["cx"])
    g.case(
        "I/O bitmap beyond the TSS",
        "mov word [tss + 0x66], 0x2000\n" + g.user("f@: out 0x80, al"),
        after="mov word [tss + 0x66], 0x68",
    )


def _transfers(g: SystemGuest) -> None:
    wide = g.bits == 64
    code, user = ("CODE64", "USER64") if wide else ("CODE32", "USER32")
    far = "o64 retf" if wide else "retf"
    iret = "iret"
    g.case("stack of an INT from ring 3", g.user("int RETURN"), show=["f_at", "f_sp", "f_ss", "f_cs"])
    g.case(
        "IRET to ring 3 with a supervisor CS",
        f"push FLAT\n push USERSTACK\n push 2\n push {code} + 3\n push 0\n f@: {iret}",
    )
    g.case("IRET to ring 3 with a bad SS", f"push FLAT\n push USERSTACK\n push 2\n push {user}\n push 0\n f@: {iret}")
    g.case("IRET to ring 3 with a null SS", f"push 0\n push USERSTACK\n push 2\n push {user}\n push 0\n f@: {iret}")
    g.case("IRET with a null CS", f"push FLAT\n push USERSTACK\n push 2\n push 0\n push 0\n f@: {iret}")
    g.case(
        "IRET in ring 3 to ring 0", g.user(f"push FLAT\n push USERSTACK\n push 2\n push {code}\n push 0\n f@: {iret}")
    )
    if wide:
        g.case("IRET with NT", "pushf\n or dword [rsp], 0x4000\n popf\n f@: iret", after="push 2\n popf")
    g.case("far return to ring 3", f"push USERDATA\n push USERSTACK\n push {user}\n push there@\n {far}\n"
           "there@: mov eax, cs\n mov ecx, ss\n int RETURN", show=["ax", "cx", "sp"])  # fmt: skip
    g.case("far return with parameters", f"push USERDATA\n push USERSTACK\n push 0x77\n push {user}\n push there@\n {far} CELL\n"
           "there@: mov %bx, %sp\n int RETURN", show=["bx"])  # fmt: skip
    g.case("far return in ring 3 to ring 0", g.user(f"push {code}\n push 0\n f@: {far}"))
    g.case("segments that ring 3 may not keep are null", "mov eax, FLAT\n mov fs, ax\n mov eax, USERDATA\n mov gs, ax\n"
           + g.user("mov eax, fs\n mov ecx, gs"), show=["ax", "cx"])  # fmt: skip
    g.case("ring 0 data segment in ring 3", g.user("mov eax, FLAT\n f@: mov fs, ax"))
    g.case("RPL weakens", "mov eax, FLAT + 3\n f@: mov fs, ax")
    g.case("LAR in ring 3", g.user("mov eax, FLAT\n lar ecx, eax\n sete bl\n mov eax, USERDATA\n lar ecx, eax\n sete bh"),
           show=["bx", "cx & 0xf0ff00"])  # fmt: skip
    for name, instruction in {"VERR": "verr ax", "VERW": "verw ax"}.items():
        g.case(f"{name}", f"mov eax, FLAT\n {instruction}\n sete cl\n mov eax, {code}\n {instruction}\n sete ch\n"
               f"mov eax, FLAT + 3\n {instruction}\n sete dl\n xor eax, eax\n {instruction}\n sete dh", show=["cx", "dx"])  # fmt: skip
    g.case(
        "LSL", "mov eax, FLAT\n lsl ecx, eax\n sete bl\n mov eax, TSS\n lsl edx, eax\n sete bh", show=["bx", "cx", "dx"]
    )
    g.case("conforming code from ring 3 stays in ring 3", g.user(
        "mov dword [%sp - 32], conforming\n mov word [%sp - 28], CONFORMING\n f@: call far fword [%sp - 32]"),
        show=["ax", "cx"])  # fmt: skip
    g.data("conforming:\n mov eax, cs\n mov ecx, ss\n int RETURN")
    g.case("jump to ring 0 code from ring 3", g.user(
        f"mov dword [%sp - 32], conforming\n mov word [%sp - 28], {code}\n f@: jmp far fword [%sp - 32]"))  # fmt: skip
    # A call gate at GATE: ring 3 calls it. In long mode it takes no parameters.
    count = 0 if wide else 2
    g.code(f"""
        mov eax, gate_target
        mov [gdt + GATE], ax
        mov word [gdt + GATE + 2], {code}
        mov word [gdt + GATE + 4], 0xec00 + {count}
        shr eax, 16
        mov [gdt + GATE + 6], ax
    """)
    if wide:
        g.code("mov dword [gdt + GATE + 8], 0\n mov dword [gdt + GATE + 12], 0")
    call = "call far fword [%sp - 64]"
    pointer = "mov dword [%sp - 64], 0\n mov word [%sp - 60], GATE + 3\n"
    g.data(f"""
    gate_target:
        mov ecx, cs
        mov edx, ss
        mov %si, [%sp + 2 * CELL]
        mov %di, %sp
        {far} {count} * 4
    """)
    g.case("call gate from ring 3", g.user(f"push 0x1111\n push 0x2222\n {pointer} {call}\n mov %bx, %sp\n mov eax, cs"),
           show=["ax", "bx", "cx", "dx", "si", "di"])  # fmt: skip
    g.case("call gate from ring 0", f"{pointer} mov dword [%sp - 8], 0\n {call}\n mov eax, cs", show=["ax", "cx"])
    g.case("call gate with DPL 0 from ring 3", "and byte [gdt + GATE + 5], 0x9f\n" + g.user(f"{pointer} f@: {call}"),
           after="or byte [gdt + GATE + 5], 0x60")  # fmt: skip
    g.case("absent call gate", "and byte [gdt + GATE + 5], 0x7f\n" + g.user(f"{pointer} f@: {call}"),
           after="or byte [gdt + GATE + 5], 0x80")  # fmt: skip
    g.case("jump through a gate to more privilege", g.user(f"{pointer} f@: {call.replace('call', 'jmp')}"))


def _sysenter(g: SystemGuest) -> None:
    write = "mov ecx, {}\n xor edx, edx\n mov eax, {}\n wrmsr\n"
    g.case("SYSENTER without a CS", write.format(0x174, 0) + g.user("f@: sysenter"))
    setup = write.format(0x174, "CODE32") + write.format(0x175, "STACK0") + write.format(0x176, "entered@")
    g.case("SYSENTER and SYSEXIT", setup + g.user(
        "sysenter\n entered@: mov ebx, cs\n mov esi, ss\n mov edi, esp\n pushf\n pop eax\n mov ecx, USERSTACK\n mov edx, left@\n"
        "sysexit\n left@: mov ecx, cs\n mov edx, ss", 0x202),
        show=["bx", "si", "di", "cx", "dx", "ax & 0x200"])  # fmt: skip
    g.case("SYSEXIT in ring 3", g.user("f@: sysexit"))


def _syscall(g: SystemGuest) -> None:
    # SYSENTER in long mode (AMD: #UD) and SYSCALL in compatibility mode (Intel: #UD) are left out: vendors differ.
    write = "mov ecx, {}\n mov edx, {}\n mov eax, {}\n wrmsr\n"
    g.case("SYSCALL without SCE", g.user("f@: syscall"))
    setup = "mov ecx, 0xc0000080\n rdmsr\n or eax, 1\n wrmsr\n"
    setup += write.format("0xc0000081", "0x200010", "0") + write.format("0xc0000082", "0", "entered@")
    setup += write.format("0xc0000084", "0", "0x600")
    g.case("SYSCALL and SYSRET", setup + g.user(
        "syscall\n after_call@: jmp left@\n entered@: mov ebx, cs\n mov esi, ss\n pushf\n pop rax\n mov rdx, rcx\n sub rdx, after_call@\n"
        "mov r8, r11\n o64 sysret\n left@: mov ecx, cs\n mov edi, ss", 0x202),
        show=["bx", "si", "dx", "cx", "di", "ax & 0x600", "fl & 0x200"])  # fmt: skip
    g.case("SYSRET in ring 3", g.user("f@: o64 sysret"))
    g.case("SWAPGS", write.format("0xc0000101", "0x12", "0x34") + write.format("0xc0000102", "0x56", "0x78")
           + "swapgs\n mov ecx, 0xc0000101\n rdmsr\n mov ebx, eax\n mov esi, edx\n swapgs\n rdmsr", show=["ax", "dx", "bx", "si"])  # fmt: skip
    g.case("SWAPGS in ring 3", g.user("f@: swapgs"))
    g.case("RDFSBASE without FSGSBASE", "f@: rdfsbase rax")
    g.case("WRFSBASE in ring 3", "mov rax, cr4\n or eax, 0x10000\n mov cr4, rax\n" + g.user(
        "mov eax, DATA\n wrfsbase rax\n mov dword [DATA + 8], 0x4321\n mov ebx, [fs:8]\n rdfsbase rcx"), show=["bx", "cx"])  # fmt: skip
    g.case("WRGSBASE, not canonical", "mov rax, 0x800000000000\n f@: wrgsbase rax", qemu="QEMU 7.2 takes any base")
    g.case("MOV to GS clears its base", write.format("0xc0000101", "0x12", "0x34") + "mov eax, FLAT\n mov gs, ax\n mov ecx, 0xc0000101\n rdmsr",
           show=["ax", "dx"])  # fmt: skip
    g.case("IRET to compatibility mode", "push USERDATA\n push USERSTACK\n push 2\n push USER32\n push compat@\n iret\n bits 32\n compat@:\n"
           "mov eax, 0x12345678\n inc eax\n dec eax\n mov ecx, cs\n int RETURN\n bits 64", show=["ax", "cx"])  # fmt: skip
    g.case("far call to 32-bit code and back", "mov dword [DATA], compat@\n mov word [DATA + 4], CODE32\n call far fword [DATA]\n"
           "jmp end@\n bits 32\n compat@:\n mov ebx, cs\n mov ecx, esp\n retf\n bits 64\n end@: mov eax, cs", show=["ax", "bx"])  # fmt: skip
