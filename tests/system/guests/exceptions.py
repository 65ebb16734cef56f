"""
Exceptions: every vector that can be provoked, error codes, the saved instruction pointer, IST, double faults, single
step, debug registers, gates.

Sources: Intel SDM volume 3, chapters 6 (interrupts and exceptions) and 17 (debug).
"""

# ruff: noqa: E501 (a case is easiest to read as one line)

from collections.abc import Iterator

from nonroot.testing.system_guest import SystemGuest, descriptor

OWN = {
    "ABSENT": descriptor(0, 0xFFFFF, 0x13, 0xC),
    "ABSENTCODE": descriptor(0, 0xFFFFF, 0x1B, 0xC),
    "SMALL": descriptor(0, 0xFFF, 0x93, 4),
    "TSSABSENT": descriptor(0x3000, 0x67, 0x09),
    "PAD": 0,
    "SMALLUSER": descriptor(0, 0xFFF, 0xF3, 4),
}


# How emulators differ from the manuals:
EXT = "QEMU 7.2 does not set EXT in the error code (SDM volume 3, 6.13)"
INDEX = "QEMU 7.2 gives 16 times the vector in long mode's error codes (SDM volume 3, 6.13: the index of the gate)"
STACK = "QEMU 7.2 raises #GP for a stack address that is not canonical (SDM volume 3, 6.15: #SS)"
LIMITS = "QEMU's software CPU checks no segment limits"
SSE = "QEMU 7.2 raises no SIMD floating-point exceptions and checks no reserved bits of MXCSR"


def guests() -> Iterator[SystemGuest]:
    yield _registers()
    for bits in (32, 64):
        own = OWN | ({"ABSENTCODE": descriptor(0, 0xFFFFF, 0x1B, 0xA)} if bits == 64 else {})
        g = SystemGuest(f"exceptions_{bits}", bits, own)
        _faults(g)
        _gates(g)
        if bits == 64:
            _long(g)
        _debug(g)
        yield g


def _faults(g: SystemGuest) -> None:
    wide = g.bits == 64
    g.case("#DE, by zero", "mov eax, 7\n f@: div ecx")
    g.case("#DE, IDIV overflow", "mov eax, 0x80000000\n mov edx, -1\n mov ecx, -1\n f@: idiv ecx", show=["ax"])
    g.case("#DE, quotient too large", "mov edx, 5\n mov ecx, 5\n f@: div ecx")
    if not wide:
        g.case("#DE, AAM 0", "f@: db 0xd4, 0")
        g.case("#OF", "mov eax, 0x7fffffff\n inc eax\n f@: into")
        g.case("INTO without overflow", "xor eax, eax\n into")
        g.case("#BR", "mov dword [DATA], 1\n mov dword [DATA + 4], 5\n mov eax, 6\n f@: bound eax, [DATA]")
        g.case("BOUND inside", "mov eax, 5\n bound eax, [DATA]")
    g.case("#BP", "f@: int3")
    g.case("INT1", "f@: int1", qemu="QEMU 7.2 raises #UD in place of #DB")
    g.case("#UD, UD2", "f@: ud2")
    g.case("#UD, LOCK with a register", "f@: db 0xf0, 0x01, 0xc0")
    g.case("#UD, LOCK MOV", "f@: db 0xf0, 0x89, 0x02", qemu="QEMU 7.2 ignores LOCK here")
    g.case("#UD, MOV to CS", "f@: db 0x8e, 0xc8")
    g.case("#UD, CR1", "f@: db 0x0f, 0x20, 0xc8")
    g.case(
        "#NM, EM",
        "mov %ax, cr0\n or eax, 4\n mov cr0, %ax\n f@: fnop",
        after="mov %ax, cr0\n and eax, -5\n mov cr0, %ax",
    )
    g.case("#NM, TS", "mov %ax, cr0\n or eax, 8\n mov cr0, %ax\n f@: fnop", after="clts")
    g.case("WAIT with TS only", "mov %ax, cr0\n and eax, -3\n or eax, 8\n mov cr0, %ax\n wait", after="clts")
    g.case("#NM, WAIT with TS and MP", "mov %ax, cr0\n or eax, 10\n mov cr0, %ax\n f@: wait", after="clts")
    g.case("#UD, SSE without OSFXSR", "mov %ax, cr4\n and eax, 0xfffffdff\n mov cr4, %ax\n f@: xorps xmm0, xmm0")
    g.case("#MF, at the next waiting instruction", "mov %ax, cr0\n or eax, 0x22\n mov cr0, %ax\n fninit\n"
           "fldcw [zero_control]\n fldz\n fld1\n fdivrp st1, st0\n fnstsw ax\n f@: fwait", show=["ax & 0x3f"],
           after="fninit")  # fmt: skip
    g.data("zero_control: dw 0\n mxcsr_unmasked: dd 0\n align 16\n ones: dd 0x3f800000, 0, 0, 0\n zeros: dd 0, 0, 0, 0")
    g.case("#XM", "mov %ax, cr4\n or eax, 0x600\n mov cr4, %ax\n ldmxcsr [mxcsr_unmasked]\n movss xmm0, [ones]\n"
           "f@: divss xmm0, [zeros]", qemu=SSE)  # fmt: skip
    g.case("#GP, reserved bit of MXCSR", "mov dword [DATA], 0x10000\n f@: ldmxcsr [DATA]", qemu=SSE)
    g.case("#GP, MOVAPS not aligned", "f@: movaps xmm0, [DATA + 4]")
    g.case(
        "#AC in ring 3",
        "mov %ax, cr0\n or eax, 0x40000\n mov cr0, %ax\n" + g.user("f@: mov eax, [DATA + 1]", 0x40002),
        qemu="QEMU's software CPU checks no alignment",
    )
    g.case("no #AC in ring 0", "push 0x40002\n popf\n mov eax, [DATA + 1]\n mov eax, 1", show=["ax"],
           after="mov %ax, cr0\n and eax, 0xfffbffff\n mov cr0, %ax")  # fmt: skip
    g.case("#GP, limit of the GDT", "mov eax, 0x1230\n f@: mov fs, ax")
    g.case("#GP, LDT selector without an LDT", "mov eax, 0x1234\n f@: mov fs, ax")
    g.case(
        "#GP, null into SS",
        "xor eax, eax\n f@: mov ss, ax" if not wide else "mov eax, 3\n f@: mov ss, ax",
        **({"qemu": "QEMU 7.2 takes RPL 3 in ring 0 (SDM volume 2, MOV)"} if wide else {}),
    )
    g.case("#GP, system segment into DS", "mov eax, TSS\n f@: mov ds, ax")
    g.case("#GP, SS with the wrong RPL", "mov eax, USERDATA\n f@: mov ss, ax")
    g.case("#NP, data segment", "mov eax, ABSENT\n f@: mov gs, ax")
    g.case("#SS, absent stack segment", "mov eax, ABSENT\n f@: mov ss, ax")
    g.case(
        "#NP, code segment",
        "push ABSENTCODE\n push 0x1234\n f@: retf" if not wide else "push ABSENTCODE\n push 0x1234\n f@: o64 retf",
    )
    g.case("#NP, LTR", "mov eax, TSSABSENT\n f@: ltr ax")
    g.case("#GP, LTR of a busy TSS", "mov eax, TSS\n f@: ltr ax")
    g.case("#GP, LLDT of a TSS", "mov eax, TSS\n f@: lldt ax")
    if not wide:
        # In ring 3, so that the exception itself has a good stack.
        small = "mov eax, SMALLUSER + 3\n mov ss, ax\n mov ebp, 0xffd\n"
        g.case("#SS, stack limit", g.user(small + "f@: mov eax, [ebp]"), qemu=LIMITS)
        g.case(
            "#SS, PUSH beyond the limit", g.user(small + "mov esp, 0x1002\n f@: push eax"), show=["f_sp"], qemu=LIMITS
        )
        g.case("#GP, data limit", "mov eax, SMALL\n mov fs, ax\n f@: mov eax, [fs:0xffd]", qemu=LIMITS)
        g.case("last word inside the limit", "mov eax, SMALL\n mov fs, ax\n f@: mov ax, [fs:0xffe]\n xor eax, eax")
    g.case("restart, nothing is written by a PUSH that faults", "mov ebx, esp\n mov eax, 0x1230\n push %ax\n f@: pop fs",
           show=["bx", "sp"])  # fmt: skip


def _registers() -> SystemGuest:
    """Values that control registers and MSRs refuse."""
    g = SystemGuest("control_registers", 32)
    g.unlike["qemu"] = "QEMU 7.2 takes whatever is written to CR0, and unknown MSRs"
    g.case("#GP, CR0 with PG without PE", "mov eax, 0x80000010\n f@: mov cr0, %ax")
    g.case("#GP, CR0 with NW without CD", "mov %ax, cr0\n or eax, 0x20000000\n f@: mov cr0, %ax")
    g.case("#GP, unknown MSR", "mov ecx, 0x12345678\n f@: rdmsr")
    g.case("#GP, reserved bit of EFER", "mov ecx, 0xc0000080\n rdmsr\n or eax, 0x10000000\n f@: wrmsr")
    g.case("#GP, reserved bit of CR4", "mov eax, 0x80000000\n f@: mov cr4, %ax")
    return g


def _gates(g: SystemGuest) -> None:
    width = 8 if g.bits == 32 else 16
    gate = f"IDT + {width} * 0x31"
    wide_index = {"qemu": INDEX} if g.bits == 64 else {}
    g.case("INT n", "int 0x31\n f@: nop", show=["f_flags & 0x200"])
    g.case("INT n in ring 3, DPL 0", g.user("f@: int 0x31"), **wide_index)
    g.case("INT3 in ring 3, DPL 0", g.user("f@: int3"), **wide_index)
    g.case("INT n beyond the limit of the IDT", "f@: int 0x80", **wide_index)
    g.case(
        "gate not present",
        f"and byte [{gate} + 5], 0x7f\n f@: int 0x31",
        after=f"or byte [{gate} + 5], 0x80",
        **wide_index,
    )
    g.case(
        "gate of a bad type",
        f"mov byte [{gate} + 5], 0x80\n f@: int 0x31",
        after=f"mov byte [{gate} + 5], 0x8e",
        **wide_index,
    )
    g.case("gate with a null selector", f"mov word [{gate} + 2], 0\n f@: int 0x31")
    g.case("gate with a data segment", f"mov word [{gate} + 2], FLAT\n f@: int 0x31")
    g.case("gate beyond the GDT", f"mov word [{gate} + 2], 0x1230\n f@: int 0x31")
    g.case("gate to an absent segment", f"mov word [{gate} + 2], ABSENTCODE\n f@: int 0x31",
           after=f"mov word [{gate} + 2], {'CODE32' if g.bits == 32 else 'CODE64'}")  # fmt: skip
    # The exception itself goes through a bad gate: EXT is set in the error code.
    six = f"IDT + {width} * 6"
    g.case(
        "#UD through an absent gate",
        f"and byte [{six} + 5], 0x7f\n f@: ud2",
        after=f"or byte [{six} + 5], 0x80",
        qemu=EXT,
    )
    g.case("#UD through a data segment", f"mov word [{six} + 2], FLAT\n f@: ud2",
           after=f"mov word [{six} + 2], {'CODE32' if g.bits == 32 else 'CODE64'}", qemu=EXT)  # fmt: skip
    # #GP through an absent gate is #NP on top of a contributory exception: a double fault.
    thirteen = f"IDT + {width} * 13"
    g.case("#GP through an absent gate", f"and byte [{thirteen} + 5], 0x7f\n mov eax, 0x1230\n f@: mov fs, ax",
           after=f"or byte [{thirteen} + 5], 0x80")  # fmt: skip
    g.case("trap gate keeps IF", f"mov byte [{gate} + 5], 0x8f\n mov dword [hook], trapgate\n sti\n int 0x31\n cli",
           show=["ax"], after=f"mov byte [{gate} + 5], 0x8e")  # fmt: skip
    g.data("trapgate:\n pushf\n pop %ax\n and eax, 0x200\n add %sp, 2 * CELL\n iret")
    g.case("interrupt gate clears IF and TF", "mov dword [hook], trapgate\n sti\n int 0x31\n cli", show=["ax"])


def _long(g: SystemGuest) -> None:
    six = "IDT + 16 * 6"
    g.case("no IST, the stack is aligned by 16", "mov rsp, STACK - 0x13\n f@: ud2", show=["f_sp", "f_at"])
    g.case("error codes too", "mov rsp, STACK - 0x1d\n mov eax, 0x1230\n f@: mov fs, ax", show=["f_sp", "f_at"])
    g.case("IST 1", f"mov byte [{six} + 4], 1\n f@: ud2", show=["f_at", "f_sp", "f_ss"])
    g.case("IST 2 from ring 3", f"mov byte [{six} + 4], 2\n" + g.user("f@: ud2"), show=["f_at", "f_sp", "f_ss"],
           after=f"mov byte [{six} + 4], 0")  # fmt: skip
    g.case("ring 3 without IST", g.user("f@: ud2"), show=["f_at", "f_sp", "f_ss"])
    eight = "IDT + 16 * 8"
    g.case("#DF, no stack for a #PF", f"mov byte [{eight} + 4], 1\n mov byte [IDT + 16 * 13 + 4], 1\n"
           "and dword [TABLES + 0x4000], -2\n mov rax, cr3\n mov cr3, rax\n mov rsp, 0x80000800\n f@: push rax",
           show=["f_at", "f_sp"], after="mov byte [IDT + 16 * 13 + 4], 0")  # fmt: skip
    g.case("#DF, stack not canonical", "mov byte [IDT + 16 * 12 + 4], 0\n mov rsp, 0x800000001000\n f@: ud2",
           show=["f_at", "f_sp"])  # fmt: skip
    g.case("#SS on its own stack", "mov byte [IDT + 16 * 12 + 4], 1\n mov rsp, 0x800000001000\n f@: push rax",
           show=["f_at", "f_sp"], qemu=STACK)  # fmt: skip
    g.case("#SS by RBP", "mov rbp, 0x800000000000\n f@: mov eax, [rbp + 8]", qemu=STACK)
    g.case("#UD, 32-bit instructions", "f@: db 0x06")
    g.case(
        "#GP, RIP not canonical by RET",
        "mov rcx, 0x800000000000\n push rcx\n f@: ret",
        qemu="QEMU 7.2 raises #GP at the target, not at the RET (SDM volume 2, RET)",
    )


def _debug(g: SystemGuest) -> None:
    dr6 = "mov %ax, dr6\n mov [dr6_seen], %ax\n mov eax, 0\n mov dr7, %ax\n mov eax, 0xffff0ff0\n mov dr6, %ax"
    show = ["dr6:[dr6_seen] & 0xe00f"]
    clear = "mov eax, 0xffff0ff0\n mov dr6, %ax\n xor eax, eax\n"
    g.case("TF, after the next instruction", clear + "push 0x102\n popf\n f@: nop\n nop\n nop", show=show, after=dr6)
    g.case("TF, MOV SS delays it",
           clear + "mov ecx, FLAT\n push 0x102\n popf\n f@: mov ss, cx\n nop\n nop", show=show, after=dr6)  # fmt: skip
    g.case("TF, after each iteration of REP", clear + "mov ecx, 3\n mov edi, DATA\n push 0x102\n popf\n f@: rep stosb\n nop",
           show=[*show, "cx"], after=dr6)  # fmt: skip
    g.case("TF, INT n goes to the handler first", clear + "push 0x102\n popf\n f@: int 0x31\n nop", show=["f_flags & 0x100"],
           after=dr6)  # fmt: skip
    g.case(
        "TF, a fault has priority",
        clear + "push 0x102\n popf\n f@: ud2\n nop",
        show=["f_flags & 0x100", *show],
        after=dr6,
    )
    g.case("TF set by IRET in ring 3", clear + g.user("f@: nop\n nop", 0x102), show=show, after=dr6)
    g.case("DR0, execution", clear + "mov eax, there@\n mov dr0, %ax\n mov eax, 2\n mov dr7, %ax\n f@: nop\n there@: nop",
           show=[*show, "f_flags & 0x10000"], after=dr6)  # fmt: skip
    g.case("RF, once past a breakpoint", clear + "mov dword [hook], resume_flag\n mov eax, there@\n mov dr0, %ax\n mov eax, 2\n"
           "mov dr7, %ax\n there@: inc ebx", show=["bx & 15", "cx"], after=dr6)  # fmt: skip
    g.data("dr6_seen: dq 0\n resume_flag:\n inc ecx\n or dword [%sp + 4 * CELL], 0x10000\n add %sp, 2 * CELL\n iret")
    watch = "mov eax, DATA + 0x100\n mov dr1, %ax\n mov eax, {}\n mov dr7, %ax\n f@: {}\n nop\n nop"
    g.case("DR1, write", clear + watch.format(0xD00008, "mov [DATA + 0x102], al"), show=show, after=dr6)
    g.case(
        "DR1, write does not trigger by a read",
        clear + watch.format(0xD00008, "mov al, [DATA + 0x102]"),
        show=show,
        after=dr6,
    )
    g.case("DR1, access", clear + watch.format(0xF00008, "mov al, [DATA + 0x103]"), show=show, after=dr6)
    g.case("DR1, just behind", clear + watch.format(0xF00008, "mov al, [DATA + 0x104]"), show=show, after=dr6)
    g.case(
        "DR1, an access that overlaps", clear + watch.format(0xF00008, "mov eax, [DATA + 0xfd]"), show=show, after=dr6
    )
    g.case(
        "GD, access to debug registers",
        clear + "mov eax, 0x2000\n mov dr7, %ax\n f@: mov %ax, dr0",
        show=show,
        after=dr6,
        qemu="QEMU's software CPU ignores DR7.GD",
    )
    g.case(
        "DR4 is DR6 without CR4.DE",
        "mov %ax, cr4\n and eax, -9\n mov cr4, %ax\n mov %ax, dr4\n mov ecx, 1",
        show=["cx"],
    )
    g.case("DR4 with CR4.DE", "mov %ax, cr4\n or eax, 8\n mov cr4, %ax\n f@: mov %ax, dr4")
    g.case("debug registers in ring 3", g.user("f@: mov %ax, dr0"))
