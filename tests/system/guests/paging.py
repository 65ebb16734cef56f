"""
Paging: 32-bit, PAE and 4-level; accessed and dirty bits, protection, faults, large pages, TLB rules.

Sources: Intel SDM volume 3, chapter 4 (paging), AMD APM volume 2, chapter 5.
"""

# ruff: noqa: E501 (a case is easiest to read as one line)

from collections.abc import Iterator

from nonroot.testing.system_guest import SystemGuest, descriptor

P, W, U, A, D, PS, G = 1, 2, 4, 0x20, 0x40, 0x80, 0x100
PT = 0x110000
PD = 0x111000
#: The page tables of the test page: linear 0x40000000 for all guests.
PAGE = 0x4000_0000

# How emulators differ from the manuals:
RESERVED = "QEMU 7.2 does not set P in the error code of a reserved bit (SDM volume 3, 4.7: P is 1 then)"
PDPTE = "QEMU 7.2 reads page-directory pointers at each walk, checks no reserved bits and sets A"
SS = "QEMU 7.2 raises #GP for an address by RBP that is not canonical (SDM volume 3, 6.15: #SS)"
IMPLICIT = "they let AC allow implicit accesses too (SDM volume 3, 4.6.1: AC counts not)"


def guests() -> Iterator[SystemGuest]:
    yield _two_level()
    yield _pae()
    yield _four_level()
    yield _pcid()


def _protection(g: SystemGuest, entry: str, invalidate: str = f"invlpg [{PAGE}]") -> None:
    """Present, write and user bits of one 4 KiB page, with the A and D bits that each access leaves."""
    show = [f"entry:{entry} & 0xfff"]
    flush = f"mov edx, {PAGE}\n invlpg [%dx]\n"

    def attempt(name: str, bits: int, access: str, mask: int = 0xFFF) -> None:
        g.case(name, f"mov dword {entry[6:]}, DATA + {bits}\n {flush} {access}", show=[f"entry:{entry} & {mask}"])

    read, write = f"f@: mov eax, [{PAGE + 0x10}]", f"f@: mov [{PAGE + 0x10}], ecx"
    user_read, user_write = g.user(read), g.user(write)
    attempt("not present, read", 0, read)
    attempt("not present, write", 0, write)
    attempt("not present, read in ring 3", 0, user_read)
    attempt("not present, write in ring 3", 0, user_write)
    attempt("present, read", P | W, read)
    attempt("present, write", P | W, write)
    attempt("read-only, write with WP", P, write)
    attempt("supervisor, read in ring 3", P | W, user_read)
    attempt("supervisor, write in ring 3", P | W, user_write)
    attempt("user, read in ring 3", P | W | U, user_read)
    attempt("user, write in ring 3", P | W | U, user_write)
    attempt("user read-only, write in ring 3", P | U, user_write)
    attempt("read-modify-write", P | W, f"f@: inc dword [{PAGE}]")
    attempt("read-modify-write of a read-only page", P, f"f@: inc dword [{PAGE}]", 0xFDF)
    attempt("CMPXCHG that does not match", P | W, f"mov eax, 0x55\n f@: cmpxchg [{PAGE + 0x20}], ecx")
    attempt("fetch of a missing page", 0, f"mov eax, {PAGE + 0x30}\n f@: jmp %ax")
    wp_off = "mov %cx, cr0\n and ecx, 0xfffeffff\n mov cr0, %cx\n"
    wp_on = "mov %cx, cr0\n or ecx, 0x10000\n mov cr0, %cx"
    g.case(
        "read-only, write without WP",
        f"mov dword {entry[6:]}, DATA + {P}\n {flush} {wp_off} f@: mov [{PAGE}], edx",
        show=show,
        after=wp_on,
    )
    attempt(
        "write after read sets D",
        P | W,
        f"{read.replace('f@: ', '')}\n mov ebx, {entry[6:]}\n and ebx, 0xfff\n {write}",
    )
    g.case(
        "crossing into a missing page",
        f"mov dword {entry[6:]}, DATA + 3\n {flush} mov %cx, -1\n f@: mov [{PAGE + 0xFFE}], ecx",
        show=[*show, "untouched:dword [DATA + 0xffc]"],
    )
    g.case("REP MOVSB up to a missing page",
           f"mov dword {entry[6:]}, DATA + 3\n {flush} mov esi, stubs\n mov edi, {PAGE + 0xFF0}\n mov ecx, 0x40\n"
           "f@: rep movsb", show=["cx", "di"])  # fmt: skip
    g.case("REP STOSB backwards down to a missing page",
           f"mov dword {entry[6:]}, DATA + 3\n {flush} mov edi, {PAGE + 0xF}\n mov ecx, 0x40\n std\n"
           "f@: rep stosb", show=["cx", "di"])  # fmt: skip
    g.case("stale until INVLPG",
           f"mov dword {entry[6:]}, DATA + 3\n mov dword [DATA], 0x1111\n mov dword [DATA + 0x1000], 0x2222\n {flush}"
           f"mov eax, [{PAGE}]\n mov dword {entry[6:]}, DATA + 0x1003\n {flush} mov ebx, [{PAGE}]",
           show=["ax", "bx"])  # fmt: skip
    g.case("two names of a frame",
           f"mov dword {entry[6:]}, DATA + 3\n {flush} mov dword [{PAGE + 8}], 0x77\n mov eax, [DATA + 8]\n"
           f"mov dword [DATA + 8], 0x88\n mov ebx, [{PAGE + 8}]", show=["ax", "bx"])  # fmt: skip


def _two_level() -> SystemGuest:
    g = SystemGuest("paging_two_level", 32)
    directory = 0x120000
    g.code(f"""
        mov edi, {PT}
        mov ecx, 0x11000 // 4
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
    _protection(g, f"dword [{PT}]")
    pde = f"[{directory + 4 * (PAGE >> 22)}]"
    flush = "mov eax, cr3\n mov cr3, eax\n"
    g.case("directory entry gets A, never D", f"mov dword {pde}, {PT} + 7\n mov dword [{PT}], DATA + 3\n {flush}"
           f"mov [{PAGE}], ecx", show=[f"pde:dword {pde} & 0xff"])  # fmt: skip
    g.case("read-only directory entry", f"mov dword {pde}, {PT} + 5\n {flush} f@: mov [{PAGE}], ecx")
    g.case("supervisor directory entry", f"mov dword {pde}, {PT} + 3\n mov dword [{PT}], DATA + 7\n {flush}"
           + g.user(f"f@: mov eax, [{PAGE}]"))  # fmt: skip
    g.case("missing directory entry", f"mov dword {pde}, 0\n {flush} f@: mov eax, [{PAGE + 0x123}]")
    g.case("4 MiB page", f"mov dword {pde}, 0x400083\n {flush} mov dword [{PAGE + 0x12345}], 0x99\n"
           "mov eax, [0x412345]", show=["ax", f"pde:dword {pde}"])  # fmt: skip
    # A reserved bit of the 4 MiB page's directory entry (bit 21: above PSE-36's and below the frame).
    g.case("4 MiB page, reserved bit", f"mov dword {pde}, 0x600083\n {flush} f@: mov eax, [{PAGE}]", qemu=RESERVED)
    g.case("global page survives CR3",
           f"mov dword {pde}, {PT} + 7\n mov eax, cr4\n or eax, 0x80\n mov cr4, eax\n"
           f"mov dword [DATA], 0x11\n mov dword [DATA + 0x1000], 0x22\n"
           f"mov dword [{PT}], DATA + 0x1003\n mov ecx, {PAGE}\n invlpg [ecx]\n mov ebx, [ecx]", show=["bx"])  # fmt: skip
    return g


def _long_entries(g: SystemGuest, pde: str, flush: str) -> None:
    """What PAE and 4-level paging share: NX, reserved bits, 2 MiB pages."""
    high = f"[{PT} + 4]"
    nx = "mov ecx, 0xc0000080\n rdmsr\n {} eax, {}\n wrmsr\n xor eax, eax\n xor ecx, ecx\n xor edx, edx\n"
    nx_on, nx_off = nx.format("or", 0x800), nx.format("and", 0xFFFFF7FF)
    ret = f"mov byte [DATA + 0x30], 0xc3\n mov eax, {PAGE + 0x30}\n f@: call %ax"
    g.case("fetch, NX off", f"{nx_off} mov dword [{PT}], DATA + 7\n {flush} {ret}", show=[f"pte:dword [{PT}] & 0xfff"])
    g.case(
        "NX bit while NX is off is reserved",
        f"{nx_off} mov dword {high}, 0x80000000\n {flush} f@: mov eax, [{PAGE}]",
        qemu=RESERVED,
    )
    g.code(nx_on)
    g.case("fetch from an NX page", f"mov dword {high}, 0x80000000\n {flush} mov byte [DATA + 0x30], 0xc3\n"
           f"mov eax, {PAGE + 0x30}\n mov dword [{PT}], DATA + 7\n call %ax")  # fmt: skip
    g.case("fetch from an NX page in ring 3", g.user(f"mov eax, {PAGE + 0x30}\n jmp %ax"))
    g.case("read of an NX page", f"{flush} f@: mov eax, [{PAGE + 0x30}]\n and eax, 0xff", show=["ax"])
    g.case("fetch of a missing page, NX on", f"mov dword [{PT}], 0\n {flush} mov eax, {PAGE + 0x40}\n jmp %ax",
           show=["f_ip"])  # fmt: skip
    g.case("fetch of a missing page in ring 3, NX on", g.user(f"mov eax, {PAGE + 0x40}\n jmp %ax"))
    g.case(
        "reserved bit 51",
        f"mov dword [{PT}], DATA + 7\n mov dword {high}, 0x80000\n {flush} f@: mov [{PAGE}], eax",
        qemu=RESERVED,
    )
    g.case("reserved bit 51, ring 3", g.user(f"f@: mov eax, [{PAGE}]"), qemu=RESERVED)
    g.case("reserved bit of a missing page counts not", f"mov dword [{PT}], DATA + 6\n {flush} f@: mov eax, [{PAGE}]")
    g.code(f"mov dword {high}, 0\n mov dword [{PT}], DATA + 7\n")
    g.case("2 MiB page", f"mov dword [{pde}], 0x600083\n {flush} mov dword [{PAGE + 0x12345}], 0x99\n"
           "mov eax, [0x612345]", show=["ax", f"pde:dword [{pde}]"])  # fmt: skip
    g.case("2 MiB page, reserved bit 13", f"mov dword [{pde}], 0x602083\n {flush} f@: mov eax, [{PAGE}]", qemu=RESERVED)
    g.case("NX in the directory entry", f"mov dword [{pde}], {PT} + 7\n mov dword [{pde} + 4], 0x80000000\n {flush}"
           f"mov eax, {PAGE + 0x30}\n jmp %ax")  # fmt: skip
    g.code(f"mov dword [{pde} + 4], 0\n {flush}")


def _pae() -> SystemGuest:
    g = SystemGuest("paging_pae", 32)
    pointers = 0x120000
    g.code(f"""
        mov edi, {PT}
        mov ecx, 0x11000 // 4
        xor eax, eax
        rep stosd
        mov dword [{pointers}], 0x121001
        mov dword [{pointers} + 8], {PD} + 1
        mov dword [{PD}], {PT} + 7
        mov dword [0x121000], 0x87
        mov dword [0x121008], 0x200087
        mov dword [0x121010], 0x400087
        mov dword [0x121018], 0x600087
        mov eax, 0x20
        mov cr4, eax
        mov eax, {pointers}
        mov cr3, eax
        mov ecx, 0xc0000080
        rdmsr
        or eax, 0x800
        wrmsr
        mov eax, 0x80010033
        mov cr0, eax
    """)
    _protection(g, f"dword [{PT}]")
    flush = "mov edx, cr3\n mov cr3, edx\n"
    _long_entries(g, f"{PD}", flush)
    g.case("page-directory pointers are loaded with CR3", f"mov eax, [{PAGE}]\n mov dword [{pointers} + 8], 0\n"
           f"mov ecx, {PAGE}\n invlpg [ecx]\n f@: mov eax, [{PAGE}]\n mov eax, 1", show=["ax"], qemu=PDPTE)  # fmt: skip
    g.case("after a write of CR3", f"{flush} f@: mov eax, [{PAGE}]")
    g.case("reserved bit of a page-directory pointer", f"mov dword [{pointers} + 8], {PD} + 3\n mov eax, cr3\n"
           "f@: mov cr3, eax", after=f"mov dword [{pointers} + 8], {PD} + 1\n mov eax, cr3\n mov cr3, eax", qemu=PDPTE)  # fmt: skip
    g.case(
        "no A bit in a page-directory pointer", f"mov eax, [{PAGE}]", show=[f"pdpte:dword [{pointers} + 8]"], qemu=PDPTE
    )
    return g


def _four_level() -> SystemGuest:
    g = SystemGuest("paging_four_level", 64, {"LDT": descriptor(PAGE, 0xFFF, 0x82), "LDTHIGH": 0})
    # The kit's own tables map everything by 2 MiB pages: PDPT at TABLES + 0x1000; the second GiB gets our directory.
    pdpte = "TABLES + 0x1008"
    flush = "mov %dx, cr3\n mov cr3, %dx\n"
    g.code(f"""
        mov edi, {PT}
        mov ecx, 0x2000 // 4
        xor eax, eax
        rep stosd
        mov dword [{PD}], {PT} + 7
        mov dword [{pdpte}], {PD} + 7
        {flush}
    """)
    _protection(g, f"dword [{PT}]")
    _long_entries(g, f"{PD}", flush)
    table = f"mov dword [{PD}], {PT} + 7\n mov dword [{PT}], DATA + 7\n"
    for name, place in (("PML4 entry", "TABLES"), ("PDPT entry", pdpte), ("PD entry", f"{PD}")):
        g.case(
            f"{name}, A",
            f"{table} and dword [{place}], -0x21\n {flush} mov eax, [{PAGE}]",
            show=[f"e:dword [{place}] & 0x67"],
        )
    for name, place in (("PDPT entry", pdpte), ("PD entry", f"{PD}")):
        g.case(
            f"{name}, read-only",
            f"and dword [{place}], -3\n {flush} f@: mov [{PAGE}], eax",
            after=f"or dword [{place}], 2",
        )
        g.case(f"{name}, supervisor", f"and dword [{place}], -5\n {flush} " + g.user(f"f@: mov eax, [{PAGE}]"),
               after=f"or dword [{place}], 4")  # fmt: skip
        g.case(
            f"{name}, missing",
            f"and dword [{place}], -2\n {flush} f@: mov eax, [{PAGE}]",
            after=f"or dword [{place}], 1",
        )
        g.case(f"{name}, NX", f"or dword [{place} + 4], 0x80000000\n {flush} mov eax, {PAGE}\n jmp rax",
               after=f"and dword [{place} + 4], 0x7fffffff")  # fmt: skip
        g.case(f"{name}, reserved", f"or dword [{place} + 4], 0x80000\n {flush} f@: mov eax, [{PAGE}]",
               after=f"and dword [{place} + 4], 0xfff7ffff", qemu=RESERVED)  # fmt: skip
    g.case("1 GiB page", f"mov dword [{pdpte}], 0x83\n {flush} mov dword [{PAGE + 0x654320}], 0x42\n mov eax, [0x654320]",
           show=["ax", f"entry:dword [{pdpte}]"])  # fmt: skip
    g.case("1 GiB page, reserved bit 13", f"mov dword [{pdpte}], 0x2083\n {flush} f@: mov eax, [{PAGE}]", qemu=RESERVED)
    g.case("1 GiB page, supervisor", f"mov dword [{pdpte}], 0x83\n {flush}" + g.user(f"f@: mov eax, [{PAGE}]"))
    g.case("PS in a PML4 entry is reserved", "or dword [TABLES + 8], 0x81\n mov rdx, cr3\n mov cr3, rdx\n"
           "mov rdx, 0x8000000000\n f@: mov eax, [rdx]", after="mov dword [TABLES + 8], 0", qemu=RESERVED)  # fmt: skip
    g.case("missing PML4 entry", "mov rdx, 0xffff800000001000\n f@: mov eax, [rdx]")
    g.case("not canonical", "mov rdx, 0x800000000000\n f@: mov eax, [rdx]")
    g.case("not canonical, stack", "mov rbp, 0x800000000000\n f@: mov eax, [rbp]", qemu=SS)
    g.case(
        "not canonical, fetch",
        "mov rdx, 0x800000000000\n f@: jmp rdx",
        qemu="QEMU 7.2 raises #GP at the target, not at the jump (SDM volume 2, JMP)",
    )
    g.case("end of the lower half", "mov rdx, 0x7fffffffffff\n f@: mov al, [rdx]")
    g.case(
        "crossing the end of the lower half",
        "mov rdx, 0x7fffffffffff\n f@: mov ax, [rdx]",
        qemu="QEMU 7.2 translates the first byte before it looks at the second",
    )
    g.code(f"mov dword [{pdpte}], {PD} + 7\n {flush}")
    g.case("global page",
           f"{table} mov rdx, cr4\n or edx, 0x80\n mov cr4, rdx\n mov dword [DATA], 0x11\n mov dword [{PT}], DATA + 0x107\n"
           f"mov edx, {PAGE}\n invlpg [rdx]\n mov eax, [rdx]", show=["ax", f"pte:dword [{PT}] & 0x1ff"])  # fmt: skip
    _smep_smap(g, flush)
    return g


def _smep_smap(g: SystemGuest, flush: str) -> None:
    set_cr4 = "mov rdx, cr4\n or edx, {}\n mov cr4, rdx\n"
    page = f"mov dword [{PT}], DATA + 7\n mov byte [DATA], 0xc3\n"
    # The kit's own code must be in supervisor pages then; its stack and data too.
    g.code(f"and dword [TABLES + 0x2000], -5\n and dword [TABLES + 0x2010], -5\n {page} {flush}")
    g.case("SMEP, fetch of a user page in ring 0", f"{set_cr4.format(0x100000)} mov eax, {PAGE}\n f@: call rax")
    g.case("SMEP, read of a user page", f"mov eax, [{PAGE}]\n and eax, 0xff", show=["ax"])
    g.case("SMEP, fetch of a supervisor page", f"mov dword [{PT}], DATA + 3\n {flush} mov eax, {PAGE}\n call rax")
    g.code(f"mov dword [{PT}], DATA + 7\n {flush}")
    g.case("SMAP, read", f"{set_cr4.format(0x200000)} f@: mov eax, [{PAGE}]")
    g.case("SMAP, write", f"f@: mov [{PAGE}], eax")
    g.case("SMAP, AC set by STAC", f"stac\n mov eax, [{PAGE}]\n clac\n and eax, 0xff", show=["ax"])
    g.case("SMAP, after CLAC", f"stac\n clac\n f@: mov eax, [{PAGE}]")
    # An LDT in a user page: loading a selector from it is an implicit supervisor access.
    g.case("SMAP, implicit accesses ignore AC", "mov eax, LDT\n lldt ax\n stac\n mov eax, 4\n f@: mov fs, ax", after="clac",
           qemu=IMPLICIT, bochs=IMPLICIT)  # fmt: skip
    g.case(
        "SMAP, supervisor page",
        f"mov dword [{PT}], DATA + 3\n {flush} f@: mov eax, [{PAGE}]\n and eax, 0xff",
        show=["ax"],
    )
    g.case("STAC in ring 3", "mov rdx, cr4\n and edx, 0xffcfffff\n mov cr4, rdx\n or dword [TABLES + 0x2000], 4\n" + flush
           + g.user("f@: stac"))  # fmt: skip


def _pcid() -> SystemGuest:
    """PCID: what must be flushed is; what may be kept is not asked, as a CPU may drop translations at any time."""
    g = SystemGuest("paging_pcid", 64)
    g.unlike["qemu"] = "QEMU's software CPU has no PCID"
    pdpte = "TABLES + 0x1008"
    g.code(f"""
        mov edi, {PT}
        mov ecx, 0x2000 // 4
        xor eax, eax
        rep stosd
        mov dword [{PD}], {PT} + 7
        mov dword [{pdpte}], {PD} + 7
        mov dword [{PT}], DATA + 7
        mov dword [DATA], 0x11
        mov dword [DATA + 0x1000], 0x22
        mov rax, cr3
        mov cr3, rax
    """)
    g.case("PCID with a CR3 whose low bits are not zero", "mov rax, cr3\n or eax, 8\n mov cr3, rax\n mov rax, cr4\n or eax, 0x20000\n"
           "f@: mov cr4, rax", after="mov rax, cr3\n and eax, 0xfffff000\n mov cr3, rax")  # fmt: skip
    g.case("bit 63 of CR3 without PCID", "mov rax, cr3\n bts rax, 63\n f@: mov cr3, rax")
    g.case("PCID on", "mov rax, cr4\n or eax, 0x20000\n mov cr4, rax\n mov rax, cr4\n and eax, 0x20000", show=["ax"])
    g.case("bit 63 of CR3 is not kept", "mov eax, TABLES + 1\n bts rax, 63\n mov cr3, rax\n mov rbx, cr3", show=["bx"])
    g.case("CR3 without bit 63 flushes its PCID",
           f"mov eax, TABLES + 1\n mov cr3, rax\n mov ebx, [{PAGE}]\n mov dword [{PT}], DATA + 0x1007\n mov cr3, rax\n"
           f"mov ecx, [{PAGE}]", show=["bx", "cx"])  # fmt: skip
    g.case("INVPCID type 0, one address",
           f"mov eax, [{PAGE}]\n mov dword [{PT}], DATA + 7\n push {PAGE}\n push 1\n xor ecx, ecx\n invpcid rcx, [rsp]\n"
           f"add rsp, 16\n mov ebx, [{PAGE}]", show=["bx"])  # fmt: skip
    g.case("INVPCID type 1, one PCID",
           f"mov eax, [{PAGE}]\n mov dword [{PT}], DATA + 0x1007\n push 0\n push 1\n mov ecx, 1\n invpcid rcx, [rsp]\n"
           f"add rsp, 16\n mov ebx, [{PAGE}]", show=["bx"])  # fmt: skip
    g.case("INVPCID type 2, everything",
           f"mov eax, [{PAGE}]\n mov dword [{PT}], DATA + 7\n push 0\n push 0\n mov ecx, 2\n invpcid rcx, [rsp]\n"
           f"add rsp, 16\n mov ebx, [{PAGE}]", show=["bx"])  # fmt: skip
    g.case("INVPCID type 4", "push 0\n push 0\n mov ecx, 4\n f@: invpcid rcx, [rsp]")
    g.case("INVPCID, bit 12 of the descriptor", "push 0\n push 0x1000\n xor ecx, ecx\n f@: invpcid rcx, [rsp]")
    g.case("INVPCID in ring 3", g.user("mov ecx, 2\n f@: invpcid rcx, [rsp - 64]"))
    g.case(
        "PCID off while CR3 has one", "mov rax, cr4\n and eax, 0xfffdffff\n mov cr4, rax\n mov rbx, cr3", show=["bx"]
    )
    return g
