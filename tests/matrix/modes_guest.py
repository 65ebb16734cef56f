"""A boot sector that sets one display mode after the other by the VGA BIOS, fills its memory, and waits for a key.

When a mode is filled, its number goes to the serial line.
"""

from dataclasses import dataclass

from nonroot.testing.asm import assemble

__all__ = ["MODES", "BiosMode", "floppy"]

PLAIN, BANKS, PLANES = 0, 1, 2
FLOPPY_SIZE = 1440 << 10
VBE_FIRST = 0x100


@dataclass(frozen=True)
class BiosMode:
    """A mode, and how the guest fills its memory."""

    name: str
    number: int
    """For INT 10h AH=0, or the VBE number."""
    size: tuple[int, int]
    segment: int = 0xA000
    access: int = PLAIN
    parts: int = 1
    """Banks or planes."""
    length: int = 0
    """Bytes of each part; 0 means 64 KiB."""
    shift: int = 8
    """A byte is its address shifted so far: how far colours are apart."""
    spread: int = 0
    """Bits of the address that tell bytes of one pixel apart, which get different values then."""


MODES = (
    BiosMode("text-40", 0x01, (360, 400), 0xB800, length=2000, spread=3),
    BiosMode("cga-4", 0x04, (320, 200), 0xB800, length=0x4000),
    BiosMode("cga-2", 0x06, (640, 200), 0xB800, length=0x4000),
    BiosMode("planar-12h", 0x12, (640, 480), access=PLANES, parts=4, length=0x2800),
    BiosMode("chained-13h", 0x13, (320, 200), length=64000, shift=10),
    BiosMode("vbe-640x480x8", 0x101, (640, 480), access=BANKS, parts=5, shift=11),
    BiosMode("vbe-800x600x4", 0x102, (800, 600), access=PLANES, parts=4, length=0x2000),
    BiosMode("vbe-640x480x16", 0x111, (640, 480), access=BANKS, parts=10, shift=11, spread=1),
    BiosMode("vbe-640x480x24", 0x112, (640, 480), access=BANKS, parts=15, shift=10),
    BiosMode("vbe-1024x768x32", 0x144, (1024, 768), access=BANKS, parts=24, shift=10, spread=3),
)

SOURCE = """
    bits 16
    org 0x7c00
start:
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    cld
    mov si, table
next:
    mov ax, [si]
    cmp ax, 0x100
    jae extended
    int 0x10
    jmp draw
extended:
    mov bx, ax
    mov ax, 0x4f02
    int 0x10
draw:
    mov ax, [si+2]
    mov es, ax
    xor dx, dx
part:
    cmp word [si+6], 1
    jb fill
    ja plane
    mov ax, 0x4f05
    xor bx, bx
    push si
    push dx
    int 0x10
    pop dx
    pop si
    jmp fill
plane:
    mov cl, dl
    mov ax, 0x0102
    shl ah, cl
    push dx
    mov dx, 0x3c4
    out dx, ax
    pop dx
fill:
    xor di, di
    mov cx, [si+8]
    push cx
    mov cl, [si+10]
put:
    mov ax, di
    shr ax, cl
    mov bx, di
    and bl, [si+12]
    shl bl, 6
    add al, bl
    mov bl, dl
    shl bl, 3
    add al, bl
    stosb
    pop bx
    dec bx
    push bx
    jnz put
    pop bx
    inc dx
    cmp dx, [si+4]
    jb part
    mov dx, 0x3f8
    mov ax, [si]
    out dx, al
    mov ah, 0
    int 0x16
    add si, 14
    cmp si, table_end
    jb next
    mov ax, 3
    int 0x10
stop:
    hlt
    jmp stop
table:
"""


def floppy() -> bytes:
    """A floppy image that goes through :data:`MODES`."""
    rows = [f"    dw {m.number}, {m.segment}, {m.parts}, {m.access}, {m.length}, {m.shift}, {m.spread}" for m in MODES]
    code = assemble("\n".join([SOURCE, *rows, "table_end:"]), bits=16, origin=0x7C00).code
    assert len(code) <= 510
    return (code.ljust(510, b"\0") + b"\x55\xaa").ljust(FLOPPY_SIZE, b"\0")
