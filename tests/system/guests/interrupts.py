"""
Interrupts: PIC and PIT, the local APIC's timer, self-IPIs, priorities, NMI, the shadow of STI, waking from HLT.

Nothing here depends on how fast anything is. Sources: Intel SDM volume 3, chapters 6 and 10; Intel 8259A and 8254 data
sheets.
"""

# ruff: noqa: E501 (a case is easiest to read as one line)

from collections.abc import Iterator

from nonroot.testing.system_guest import SystemGuest

APIC = 0xFEE00000
TPR, PPR, EOI, SVR, IRR, ICR, ICR_HIGH = (APIC + r for r in (0x80, 0xA0, 0xB0, 0xF0, 0x200, 0x300, 0x310))
TIMER, LINT0, INITIAL, CURRENT, DIVIDE = (APIC + r for r in (0x320, 0x350, 0x380, 0x390, 0x3E0))
SELF = 0x44000
# How an emulator differs from the manuals:
CLASSES = "Bochs 2.7 compares vectors with those in service, not their priority classes (SDM volume 3, 10.8.3.1)"

# OUT 0 goes low with the control word, the PIC's initialization forgets older edges, then the count runs.
_PIT = """
    mov al, {control}
    out 0x43, al
    mov al, 0x11
    out 0x20, al
    mov al, 0x20
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, {mask}
    out 0x21, al
    mov al, {count} & 0xff
    out 0x40, al
    mov al, {count} >> 8
    out 0x40, al
"""
_PENDING = """
    mov al, 0x0a
    out 0x20, al
pending@:
    in al, 0x20
    test al, 1
    je pending@
    xor eax, eax
"""
ONE_SHOT, RATE = 0x30, 0x34


def guests() -> Iterator[SystemGuest]:
    for bits in (32, 64):
        g = SystemGuest(f"interrupts_{bits}", bits)
        g.data("ticks: dd 0\n log: dd 0\n seen: dd 0")
        g.data("""
        pic_tick:
            push %ax
            mov al, 0x20
            out 0x20, al
            inc dword [ticks]
            pop %ax
            add %sp, 2 * CELL
            iret
        """)
        g.data(f"""
        apic_tick:
            push %ax
            inc dword [ticks]
            mov eax, [log]
            shl eax, 8
            or eax, [%sp + CELL]
            mov [log], eax
            mov eax, {EOI}
            mov dword [%ax], 0
            pop %ax
            add %sp, 2 * CELL
            iret
        """)
        # Virtual wire: the PIC's output reaches the processor through LINT0.
        g.code(f"mov eax, {SVR}\n mov dword [%ax], 0x1ff\n mov eax, {LINT0}\n mov dword [%ax], 0x700")
        _pic(g)
        _apic(g)
        _nmi(g)
        yield g


def _start(handler: str) -> str:
    return f"mov dword [ticks], 0\n mov dword [log], 0\n mov dword [hook], {handler}\n"


def _pit(control: int = ONE_SHOT, mask: int = 0xFE, count: int = 1200) -> str:
    return _PIT.format(control=control, mask=mask, count=count)


def _pic(g: SystemGuest) -> None:
    ticks = ["ticks:dword [ticks]"]
    shot = _start("pic_tick") + _pit()
    g.case("IRQ 0 wakes HLT", f"{_pit()} sti\n f@: hlt\n nop", show=["fl & 0x200"], after="mov al, 0x20\n out 0x20, al")
    g.case("one shot", f"{shot} sti\n hlt\n cli", show=ticks)
    g.case("rate generator", f"{_start('pic_tick')} {_pit(RATE)} again@: sti\n hlt\n cli\n cmp dword [ticks], 5\n jb again@\n mov ecx, 1", show=["cx"],
           after=_PIT.format(control=ONE_SHOT, mask=0xFF, count=1))  # fmt: skip
    g.case("IF 0 holds it back", f"{shot} {_PENDING} nop\n nop", show=ticks)
    g.case("STI delays by one instruction", f"{shot} {_PENDING} sti\n cli\n nop", show=ticks)
    g.case("after that instruction it comes", f"{shot} {_PENDING} sti\n nop\n cli", show=ticks)
    g.case("where it comes", f"{_pit()} {_PENDING} sti\n f@: nop\n nop\n nop", after="mov al, 0x20\n out 0x20, al")
    g.case(
        "POPF delays nothing",
        f"{_pit()} {_PENDING} push 0x202\n f@: popf\n nop\n nop",
        after="mov al, 0x20\n out 0x20, al",
    )
    g.case("masked at the PIC", f"{_start('pic_tick')} {_pit(mask=0xFF)} {_PENDING} sti\n nop\n nop\n cli", show=ticks)
    g.case(
        "unmasked later",
        f"{_start('pic_tick')} {_pit(mask=0xFF)} {_PENDING} sti\n mov al, 0xfe\n out 0x21, al\n mov ecx, 1000\n spin@: dec ecx\n jne spin@\n cli",
        show=ticks,
    )
    g.case("in service until EOI", f"{_pit()} sti\n f@: hlt\n nop", after="mov al, 0x0b\n out 0x20, al\n in al, 0x20\n movzx eax, al\n"
           "mov [seen], eax\n mov al, 0x20\n out 0x20, al\n in al, 0x20\n mov [seen + 1], al", show=["isr:dword [seen] & 0xffff"])  # fmt: skip
    g.case(
        "IRQ 0 in ring 3",
        _pit() + g.user("f@: jmp f@", 0x202),
        show=["f_sp", "f_ss"],
        after="mov al, 0x20\n out 0x20, al",
    )
    g.code("mov al, 0xff\n out 0x21, al")


def _apic(g: SystemGuest) -> None:
    ticks = ["ticks:dword [ticks]"]
    order = [*ticks, "log:dword [log]"]
    store = "mov eax, {}\n mov dword [%ax], {}\n"
    load = "mov eax, {}\n mov ecx, [%ax]\n"

    def put(register: int, value: int) -> str:
        return store.format(register, value)

    start = _start("apic_tick")
    g.code(put(SVR, 0x1FF) + put(TPR, 0) + put(LINT0, 0x10000) + put(ICR_HIGH, 0) + put(DIVIDE, 0xB))
    g.case("APIC timer, one shot", f"{start} {put(TIMER, 0x31)} {put(INITIAL, 50000)} sti\n hlt\n cli\n {load.format(CURRENT)}",
           show=[*order, "cx"])  # fmt: skip
    g.case("APIC timer, periodic", f"{start} {put(TIMER, 0x20031)} {put(INITIAL, 400000)} again@: sti\n hlt\n cli\n cmp dword [ticks], 4\n"
           f"jb again@\n {put(TIMER, 0x10031)} {put(INITIAL, 0)} mov ecx, 1", show=["cx", "log:dword [log] & 0xffff"])  # fmt: skip
    g.code("sti\n nop\n nop\n cli")
    g.case("APIC timer, masked", f"{start} {put(TIMER, 0x10031)} {put(INITIAL, 5000)} again@: {load.format(CURRENT)} test ecx, ecx\n jne again@\n"
           "sti\n nop\n nop\n cli", show=ticks)  # fmt: skip
    g.case("APIC timer, stopped by a zero", f"{start} {put(TIMER, 0x31)} {put(INITIAL, 0x70000000)} {put(INITIAL, 0)} {load.format(CURRENT)} sti\n nop\n cli",
           show=[*ticks, "cx"])  # fmt: skip
    g.case("self-IPI is requested", f"{start} {put(ICR, SELF | 0x33)} {load.format(IRR + 0x10)}", show=[*ticks, "cx"])
    g.case("and delivered", f"{start} sti\n nop\n cli", show=order)
    g.case(
        "two of the same are one",
        f"{start} {put(ICR, SELF | 0x33)} {put(ICR, SELF | 0x33)} sti\n nop\n nop\n nop\n cli",
        show=order,
    )
    g.case("the higher vector first", f"{start} {put(ICR, SELF | 0x22)} {put(ICR, SELF | 0x35)} {put(ICR, SELF | 0x31)} sti\n nop\n nop\n nop\n nop\n cli",
           show=order)  # fmt: skip
    g.case("TPR holds back its class", f"{start} {put(TPR, 0x30)} {put(ICR, SELF | 0x33)} sti\n nop\n nop\n cli\n {load.format(PPR)}",
           show=[*order, "cx"])  # fmt: skip
    g.case(
        "TPR lets higher classes through",
        f"{start} {put(TPR, 0x2F)} sti\n nop\n nop\n cli\n {load.format(PPR)}",
        show=[*order, "cx"],
    )
    g.code(put(TPR, 0))
    if g.bits == 64:
        g.case("CR8 is TPR", f"mov eax, 5\n mov cr8, rax\n {load.format(TPR)} {put(TPR, 0x9A)} mov rbx, cr8\n mov eax, 0\n mov cr8, rax",
               show=["cx", "bx"])  # fmt: skip
        g.case("reserved bits of CR8", "mov eax, 0x10\n f@: mov cr8, rax", qemu="QEMU 7.2 takes any value")
    # The default net leaves the vector in service: no interrupt of its class comes before EOI.
    g.case("left in service", f"{put(ICR, SELF | 0x33)} f@: sti\n nop\n nop\n cli")
    g.case(
        "in service blocks its class",
        f"{start} {put(ICR, SELF | 0x36)} sti\n nop\n nop\n cli\n {load.format(PPR)}",
        show=[*order, "cx"],
        bochs=CLASSES,
    )
    g.case(
        "EOI releases it",
        f"{start} {put(EOI, 0)} sti\n nop\n nop\n cli\n {load.format(PPR)}",
        show=[*order, "cx"],
        bochs=CLASSES,
    )


def _nmi(g: SystemGuest) -> None:
    send = f"mov eax, {ICR}\n mov dword [%ax], 0x4400\n"
    spin = "mov ecx, 1000\n spin@: dec ecx\n jne spin@\n"
    g.data(f"""
    nmi_tick:
        push %ax
        push %cx
        inc dword [ticks]
        cmp dword [ticks], 1
        jne nmi_end
        {send}
        mov ecx, 1000
    nmi_spin:
        dec ecx
        jne nmi_spin
        mov eax, [ticks]
        mov [seen], eax
    nmi_end:
        pop %cx
        pop %ax
        add %sp, 2 * CELL
        iret
    """)
    g.case("NMI ignores IF, and waits for IRET", f"{_start('nmi_tick')} {send} {spin}",
           show=["ticks:dword [ticks]", "seen:dword [seen]"])  # fmt: skip
