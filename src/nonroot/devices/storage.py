"""Drives put onto a board: the IDE controller, the DMA controllers and the floppy controller."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from nonroot.devices.block import BlockPort
from nonroot.devices.dma8237 import MASTER, PAGES, SLAVE, Dma8237
from nonroot.devices.floppy import DRIVE_TYPE_1440, DRIVE_TYPE_2880, FloppyController
from nonroot.devices.floppy_state import GEOMETRIES
from nonroot.devices.ide import CONTROL_BLOCK, PRIMARY, SECONDARY, PiixIde
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.hvm.acpi import IsaDevice
from nonroot.hvm.pc import IDE_SLOT, Board

__all__ = ["Storage", "attach_storage"]

IDE_PORTS: Final = ((0x1F0, 0x3F6, 14, PRIMARY), (0x170, 0x376, 15, SECONDARY))
"""(command block, control port, ISA interrupt, offset) of each channel."""
FLOPPY_PORT: Final = 0x3F0
FLOPPY_IRQ: Final = 6
CMOS_FLOPPIES: Final = 0x10
CMOS_EQUIPMENT: Final = 0x14


@dataclass(frozen=True, slots=True)
class Storage:
    """The controllers; ``floppy`` is None on a board without floppy drives."""

    ide: PiixIde
    dma: Dma8237
    floppy: FloppyController | None


def attach_storage(
    board: Board,
    drives: Sequence[Disk | CdRom | None],
    floppies: Sequence[BlockPort | None] = (),
    enabled: bool = False,
) -> Storage:
    """
    Put drives onto ``board``: four places for IDE drives, at most two floppy drives (None: an empty one).

    ``enabled``: the IDE ports are decoded from the beginning, as firmware would leave it. ValueError for drives that do
    not fit.
    """
    slot, function = IDE_SLOT
    lines = (board.isa(IDE_PORTS[0][2]), board.isa(IDE_PORTS[1][2]))
    ide = PiixIde(board.connect(slot, function), drives, lines, board.clock, board.events)
    board.add_pci(slot, function, ide)
    for base, control, _, offset in IDE_PORTS:
        board.ports.add(base, 8, ide, offset, sizes=(1, 2, 4))
        board.ports.add(control, 1, ide, offset + CONTROL_BLOCK)
    if enabled:
        ide.enable()
    dma = Dma8237(board.dma, board.events)
    board.add(dma)
    board.ports.add(0x00, 16, dma, MASTER)
    board.ports.add(0x81, 15, dma, PAGES + 1)
    board.ports.add(0xC0, 32, dma, SLAVE)
    floppy = _attach_floppies(board, dma, floppies) if floppies else None
    return Storage(ide, dma, floppy)


def _attach_floppies(board: Board, dma: Dma8237, media: Sequence[BlockPort | None]) -> FloppyController:
    floppy = FloppyController(media, board.isa(FLOPPY_IRQ), dma, board.clock, board.events)
    board.add(floppy)
    board.ports.add(FLOPPY_PORT, 6, floppy)
    board.ports.add(FLOPPY_PORT + 7, 1, floppy, 7)
    types = [
        DRIVE_TYPE_2880 if port is not None and port.size > GEOMETRIES[2].size else DRIVE_TYPE_1440 for port in media
    ]
    board.cmos[CMOS_FLOPPIES] = types[0] << 4 | (types[1] if len(types) > 1 else 0)
    board.cmos[CMOS_EQUIPMENT] = board.cmos.get(CMOS_EQUIPMENT, 0x06) | 0x01 | (len(media) - 1) << 6
    board.isa_devices.append(IsaDevice("FDC0", "PNP0700", ((FLOPPY_PORT, 6), (FLOPPY_PORT + 7, 1)), FLOPPY_IRQ))
    return floppy
