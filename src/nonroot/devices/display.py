"""What a person sits at: display adapter, keyboard and mouse, put onto a board."""

from dataclasses import dataclass
from typing import Final

from nonroot.devices.ps2 import Ps2Controller
from nonroot.devices.vga import DISPI, PORT_BASE, WINDOW, WINDOW_BASE, WINDOW_SIZE, Vga
from nonroot.devices.vga_state import MEMORY_SIZE
from nonroot.hvm import board as places
from nonroot.hvm.acpi import IsaDevice
from nonroot.hvm.pc import VGA_SLOT, Board

__all__ = ["Console", "attach_display"]

KEYBOARD_IRQ: Final = 1
MOUSE_IRQ: Final = 12
DISPI_INDEX: Final = 0x1CE
PORTS: Final = ((0x3B4, 2), (0x3BA, 1), (0x3C0, 0x10), (0x3D4, 2), (0x3DA, 1))


@dataclass(frozen=True, slots=True)
class Console:
    """The devices of one seat."""

    vga: Vga
    ps2: Ps2Controller


def attach_vga(board: Board) -> Vga:
    """VGA in its slot, with its fixed ports and window."""
    slot, function = VGA_SLOT
    vga = Vga(board.make_ram("vga", MEMORY_SIZE), board.clock, board.connect(slot, function), board.events)
    board.add_pci(slot, function, vga)
    board.has_vga = True
    board.window_hiders.append(vga.hide_window)
    for port, length in PORTS:
        board.ports.add(port, length, vga, port - PORT_BASE, sizes=(1, 2) if length > 1 else (1,))
    board.ports.add(DISPI_INDEX, 3, vga, DISPI, sizes=(2,))
    board.mmio.add(WINDOW_BASE, WINDOW_SIZE, vga, WINDOW, sizes=(1, 2, 4, 8))
    return vga


def attach_ps2(board: Board) -> Ps2Controller:
    """Keyboard controller, keyboard and mouse."""
    ps2 = Ps2Controller(board.clock, board.isa(KEYBOARD_IRQ), board.isa(MOUSE_IRQ), board.request_reset, board.events)
    board.add(ps2)
    board.has_8042 = True
    ports = ((places.I8042_DATA, 1), (places.I8042_COMMAND, 1))
    board.isa_devices += [
        IsaDevice("KBD", "PNP0303", ports, KEYBOARD_IRQ),
        IsaDevice("MOU", "PNP0F13", irq=MOUSE_IRQ),
    ]
    board.ports.add(places.I8042_DATA, 1, ps2, 0)
    board.ports.add(places.I8042_COMMAND, 1, ps2, 1)
    return ps2


def attach_display(board: Board) -> Console:
    """Everything. The board must not have another keyboard controller."""
    return Console(attach_vga(board), attach_ps2(board))
