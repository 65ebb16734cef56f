"""A guest that drives the VGA by itself, without a BIOS: a kernel with a PVH note, assembled here.

It sets up a text mode with a font of its own, writes a line, and waits, halted, for the keyboard: letters are
echoed on the second line, F1 sets mode 13h and fills it, F2 does the same with the Bochs extension's framebuffer.
"""

import struct
from pathlib import Path

from nonroot.testing.asm import Program, assemble
from tests.devices.modes import MODE_13H, TEXT, Mode

ORIGIN = 0x100000
FONT = {
    **{code: bytes((code,)) * 16 for code in range(0x21, 0x7F)},
    0x20: bytes(16),
}
"""A glyph's every line is its code: a picture tells which character it is."""

FRAMEBUFFER = 0xE000_0000
GREETING = "The screen works"


def _writes(mode: Mode) -> str:
    lines = ["    mov dx, 0x3da", "    in al, dx"]
    for port, value in mode.writes():
        lines += [f"    mov dx, {port:#x}", f"    mov al, {value:#x}", "    out dx, al"]
    return "\n".join(lines)


def _dispi(registers: dict[int, int]) -> str:
    lines = []
    for index, value in registers.items():
        lines += ["    mov dx, 0x1ce", f"    mov ax, {index}", "    out dx, ax"]
        lines += ["    mov dx, 0x1cf", f"    mov ax, {value:#x}", "    out dx, ax"]
    return "\n".join(lines)


def linear_pixel(number: int) -> tuple[int, int, int]:
    """What F2 draws: red, green, blue of the pixel."""
    value = (number * 0x9E3779B1 & 0xFFFF_FFFF) >> 8
    return value >> 16, value >> 8 & 0xFF, value & 0xFF


SOURCE = f"""
    bits 32
    org {ORIGIN:#x}
entry:
    cli
    cld
    mov esp, stack
    lgdt [gdt_pointer]
    jmp 8:flat
flat:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    call text_mode
    ; the font, into plane 2
    mov dx, 0x3c4
    mov ax, 0x0402
    out dx, ax
    mov ax, 0x0704
    out dx, ax
    mov dx, 0x3ce
    mov ax, 0x0005
    out dx, ax
    mov ax, 0x0406
    out dx, ax
    mov ebx, 0x20
glyph:
    mov edi, ebx
    shl edi, 5
    add edi, 0xa0000
    mov ecx, 16
    mov al, bl
    cmp bl, 0x20
    jne solid
    xor al, al
solid:
    rep stosb
    inc ebx
    cmp ebx, 0x7f
    jne glyph
    mov dx, 0x3c4
    mov ax, 0x0302
    out dx, ax
    mov ax, 0x0204
    out dx, ax
    mov dx, 0x3ce
    mov ax, 0x1005
    out dx, ax
    mov ax, 0x0e06
    out dx, ax
    ; colours: the DAC's 64 as EGA has them is more than we need, grey will do
    mov dx, 0x3c8
    xor eax, eax
    out dx, al
    inc edx
    mov ecx, 0
colours:
    mov al, cl
    out dx, al
    out dx, al
    out dx, al
    inc ecx
    cmp ecx, 64
    jne colours
    ; blanks and the greeting
    mov edi, 0xb8000
    mov ecx, 2000
    mov ax, 0x0720
    rep stosw
    mov esi, greeting
    mov edi, 0xb8000
    mov ah, 0x1e
say:
    lodsb
    test al, al
    je said
    stosw
    jmp say
said:
    ; interrupts: the PIC at 0x20, only the keyboard's line open
    mov al, 0x11
    out 0x20, al
    mov al, 0x20
    out 0x21, al
    mov al, 4
    out 0x21, al
    mov al, 1
    out 0x21, al
    mov al, 0xfd
    out 0x21, al
    mov eax, handler
    mov [idt + 0x21 * 8], ax
    mov word [idt + 0x21 * 8 + 2], 8
    mov word [idt + 0x21 * 8 + 4], 0x8e00
    shr eax, 16
    mov [idt + 0x21 * 8 + 6], ax
    lidt [idt_pointer]
    ; the keyboard controller: interrupt, translation, keyboard on
    mov al, 0x60
    out 0x64, al
    mov al, 0x41
    out 0x60, al
    mov edi, 0xb8000 + 160
    sti
wait:
    hlt
    jmp wait

handler:
    push eax
    push ebx
    push edx
    in al, 0x60
    cmp al, 0x3b            ; F1: mode 13h
    je graphics
    cmp al, 0x3c            ; F2: the linear framebuffer
    je linear
    cmp al, 0x80
    jae done
    movzx ebx, al
    mov al, [letters + ebx]
    mov ah, 0x2f
    stosw
done:
    mov al, 0x20
    out 0x20, al
    pop edx
    pop ebx
    pop eax
    iret
graphics:
    push edi
    push ecx
    call mode_13h
    mov edi, 0xa0000
    mov ecx, 64000
fill:
    mov eax, edi
    and al, 0x3f
    stosb
    dec ecx
    jne fill
    pop ecx
    pop edi
    jmp done

linear:
    push edi
    push ecx
    ; BAR 0 of 00:02.0, and memory space on
    mov dx, 0xcf8
    mov eax, 0x80001010
    out dx, eax
    mov dx, 0xcfc
    mov eax, {FRAMEBUFFER:#x}
    out dx, eax
    mov dx, 0xcf8
    mov eax, 0x80001004
    out dx, eax
    mov dx, 0xcfc
    mov ax, 3
    out dx, ax
{_dispi({1: 640, 2: 480, 3: 32, 4: 0x41})}
    mov edi, {FRAMEBUFFER:#x}
    mov ecx, 0
pixel:
    mov eax, ecx
    imul eax, eax, 0x9e3779b1 - 0x100000000
    shr eax, 8
    stosd
    inc ecx
    cmp ecx, 640 * 480
    jne pixel
    pop ecx
    pop edi
    jmp done

text_mode:
{_writes(TEXT)}
    ret
mode_13h:
{_writes(MODE_13H)}
    ret

greeting: db "{GREETING}", 0
letters: db "?e1234567890-=??qwertyuiop[]??asdfghjkl;'`?\\zxcvbnm,./??? "
    times 200 db "?"
    align 8
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdt_pointer: dw 23
    dd gdt
idt_pointer: dw 0x10f
    dd idt
    align 8
idt: times 0x110 db 0
    times 256 db 0
stack: dd 0
"""


def program() -> Program:
    return assemble(SOURCE, bits=32, origin=ORIGIN)


def kernel() -> bytes:
    """An ELF with a PVH note, entered in flat 32-bit mode."""
    made = program()
    code = made.code + bytes(-len(made.code) % 16)
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", made.labels["entry"])
    header = struct.pack(
        "<16sHHIIIIIHHHHHH", b"\x7fELF\1\1\1", 2, 3, 1, made.labels["entry"], 52, 0, 0, 52, 32, 2, 0, 0, 0
    )
    load = struct.pack("<IIIIIIII", 1, 0x1000, ORIGIN, ORIGIN, len(code), len(code), 7, 0x1000)
    notes = struct.pack("<IIIIIIII", 4, 116, 0, 0, len(note), len(note), 4, 4)
    return (header + load + notes + note).ljust(0x1000, b"\0") + code


def write_kernel(path: Path) -> Path:
    path.write_bytes(kernel())
    return path
