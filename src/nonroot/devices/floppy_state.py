"""The floppy controller's record, and the formats of floppies."""

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import ClassVar, Final

from nonroot.devices.block import SECTOR
from nonroot.hvm.device import StateError, StateRecord, array, fifo, i64, u8

__all__ = ["FIELDS", "GEOMETRIES", "FloppyState", "Geometry", "Phase", "geometry_of"]

TRACK_MAXIMUM: Final = 36 * SECTOR


@dataclass(frozen=True, slots=True)
class Geometry:
    """A floppy's format."""

    cylinders: int
    heads: int
    sectors: int
    rate: int
    """Data rate code: 0 is 500 kbit/s, 1 300, 2 250, 3 1000."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.cylinders * self.heads * self.sectors * SECTOR


GEOMETRIES: Final = (
    Geometry(80, 2, 18, 0),
    Geometry(80, 2, 36, 3),
    Geometry(80, 2, 21, 0),
    Geometry(80, 2, 15, 0),
    Geometry(80, 2, 9, 2),
    Geometry(40, 2, 9, 2),
    Geometry(40, 2, 8, 2),
    Geometry(40, 1, 9, 2),
    Geometry(40, 1, 8, 2),
)
"""1.44 MB first: the format of what has no format of its own."""


def geometry_of(size: int) -> Geometry:
    """The format of an image: of its exact size, else the smallest from 1.44 MB up that holds it."""
    for geometry in GEOMETRIES:
        if geometry.size == size:
            return geometry
    return GEOMETRIES[0] if size <= GEOMETRIES[0].size else GEOMETRIES[1]


class Phase(IntEnum):
    """What the controller is doing."""

    COMMAND = 0
    WORK = 1
    RESULT = 2


@dataclass(slots=True)
class FloppyState(StateRecord):
    """Registers, drives, and the transfer under way."""

    NAME: ClassVar[str] = "floppy"

    dor: int = u8()
    tape: int = u8(maximum=3)
    rate: int = u8(default=2, maximum=3)
    phase: int = u8(maximum=2)
    interrupt: int = u8(maximum=1)
    pending: tuple[int, ...] = array("B", 4)
    changed: tuple[int, ...] = array("B", 4, default=1, maximum=1)
    cylinders: tuple[int, ...] = array("B", 4)
    specify: tuple[int, ...] = array("B", 2)
    configure: tuple[int, ...] = array("B", 2)
    perpendicular: int = u8(maximum=0x7F)
    lock: int = u8(maximum=1)
    command: bytes = fifo(16)
    result: bytes = fifo(16)
    transfer: bytes = fifo(16)
    drive: int = u8(maximum=3)
    cylinder: int = u8()
    head: int = u8(maximum=1)
    sector: int = u8()
    count: int = u8(maximum=36)
    terminal: int = u8(maximum=1)
    issued: int = i64(minimum=0)
    buffer: bytes = fifo(TRACK_MAXIMUM)

    def check_consistency(self) -> None:
        """The phase has what it needs."""
        if (self.phase == Phase.RESULT) != bool(self.result):
            raise StateError("floppy state: result does not fit the phase")
        if self.phase != Phase.COMMAND and self.command:
            raise StateError("floppy state: command is being taken in the wrong phase")
        if self.phase != Phase.WORK:
            if self.buffer:
                raise StateError("floppy state: buffer is there without a transfer")
            return
        if len(self.transfer) not in (6, 9) or self.count < 1 or self.sector < 1:
            raise StateError("floppy state: transfer, count or sector cannot be")
        code = self.transfer[0] & 0x1F
        writing = code in (0x05, 0x09, 0x0D)
        if (code == 0x0D) != (len(self.transfer) == 6) or code not in (0x02, 0x05, 0x06, 0x09, 0x0C, 0x0D, 0x16):
            raise StateError("floppy state: transfer is no transfer command")
        if len(self.buffer) != (self.count * SECTOR if writing else 0):
            raise StateError("floppy state: buffer does not fit the transfer")


FIELDS: Final = tuple(f.name for f in fields(FloppyState))
"""Names of the record's fields."""
