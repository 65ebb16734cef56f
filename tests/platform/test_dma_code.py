"""A disk's DMA over code that runs: when its interrupt arrives, the new code is what the CPU executes."""

import os
import threading
from pathlib import Path

import pytest

from nonroot.backends.image import Image
from nonroot.backends.raw import RawImage
from nonroot.backends.service import BlockService
from nonroot.devices.ide_unit import Disk
from nonroot.devices.storage import attach_storage
from nonroot.engines import select
from nonroot.hvm.machine import Machine, MachineConfig, Outputs, Reason
from nonroot.hvm.pc import Board
from nonroot.testing.asm import assemble
from tests.hvm.guests import BASE, pvh
from tests.storage.parts import FailingImage
from tests.waiting import PATIENCE

MIB = 1 << 20
GUEST = """
routine equ 0x180000
idt     equ 0x190000
table   equ 0x1a0000
master  equ 0xc000

    lgdt [gdtr]
    jmp 8:flat
flat:
    mov eax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x170000
    mov dword [routine], 0x1b8          ; mov eax, 1
    mov dword [routine + 4], 0xc300     ; ret
    mov dword [table], routine
    mov dword [table + 4], 0x80000200
    mov dword [idt + 0x76 * 8], 0x80000 + (handler & 0xffff)
    mov dword [idt + 0x76 * 8 + 4], (handler & 0xffff0000) + 0x8e00
    lidt [idtr]
    mov esi, init
    mov ecx, 10
ports:                                  ; the interrupt controllers: IRQ 14 is vector 0x76, nothing else comes
    movzx edx, byte [esi]
    mov al, [esi + 1]
    out dx, al
    add esi, 2
    dec ecx
    jnz ports
    mov ebx, routine
    mov ecx, 50000
hot:
    call ebx
    dec ecx
    jnz hot
    add al, 0x30
    mov dx, 0x3f8
    out dx, al
    mov esi, disk
    mov ecx, 14
doublewords:                            ; bus master and disk: (port, width, value)
    mov edx, [esi]
    mov eax, [esi + 8]
    cmp dword [esi + 4], 4
    je wide
    out dx, al
    jmp next
wide:
    out dx, eax
next:
    add esi, 12
    dec ecx
    jnz doublewords
    sti
spin:                                   ; the old code runs until the interrupt
    call ebx
    jmp spin
handler:
    call ebx
    add al, 0x30
    mov dx, 0x3f8
    out dx, al
    mov dx, 0x604
    mov ax, 0x3400
    out dx, ax
    hlt

init:
    db 0x20, 0x11, 0x21, 0x08, 0x21, 4, 0x21, 1, 0x21, 0xfb
    db 0xa0, 0x11, 0xa1, 0x70, 0xa1, 2, 0xa1, 1, 0xa1, 0xbf
disk:
    dd 0xcf8, 4, 0x80000920
    dd 0xcfc, 4, master + 1
    dd 0xcf8, 4, 0x80000904
    dd 0xcfc, 4, 5
    dd master + 4, 4, table
    dd master, 1, 8
    dd master + 2, 1, 6
    dd 0x1f6, 1, 0xe0
    dd 0x1f2, 1, 1
    dd 0x1f3, 1, 0
    dd 0x1f4, 1, 0
    dd 0x1f5, 1, 0
    dd 0x1f7, 1, 0xc8
    dd master, 1, 9
gdtr:
    dw 23
    dd gdt
idtr:
    dw 0x7ff
    dd idt
gdt:
    dq 0, 0x00cf9a000000ffff, 0x00cf92000000ffff
"""
NEW_CODE = bytes.fromhex("b802000000c3").ljust(4096, b"\0")  # mov eax, 2; ret


@pytest.fixture(params=["by the thread", "at once"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Image:
    """A disk whose data goes through a buffer, and one from which it goes straight to the guest's frames."""
    if request.param == "by the thread":
        return FailingImage(NEW_CODE)
    path = tmp_path / "disk.img"
    path.write_bytes(NEW_CODE)
    with path.open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(512)], 0, os.RWF_NOWAIT)
        except OSError:
            pytest.skip("this file system does not say what is at hand")
    return RawImage(os.fspath(path), read_only=True)


@pytest.mark.parametrize("scramble", [None, 3])
@pytest.mark.parametrize("engine", sorted(set(select.ENGINES) - {"lockstep"}))
def test_code_that_a_disk_overwrites(engine: str, scramble: int | None, image: Image) -> None:
    services: list[BlockService] = []

    def attach(board: Board) -> None:
        services.append(BlockService(image, board.post))
        attach_storage(board, [Disk(services[0]), None, None, None], enabled=True)

    said = bytearray()
    kernel = pvh(assemble(GUEST, bits=32, origin=BASE).code)
    config = MachineConfig(16 * MIB, kernel, attach=[attach], agent=False, scramble_seed=scramble)
    machine = Machine(config, select.create(engine), Outputs(console=lambda number, data: said.extend(data)))
    timer = threading.Timer(PATIENCE, machine.stop)
    timer.start()
    try:
        outcome = machine.run()
    finally:
        timer.cancel()
        services[0].close()
    assert (outcome.reason, bytes(said)) == (Reason.POWER_OFF, b"12")
    assert (services[0].requests, services[0].at_once) == (1, int(isinstance(image, RawImage)))
