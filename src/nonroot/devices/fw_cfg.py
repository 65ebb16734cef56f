"""The firmware configuration device: how SeaBIOS learns of memory, tables, boot order and option ROMs.

A selector chooses an item; its bytes are read one after the other from the data port, or moved into guest memory by the
DMA interface. Items are fixed when the machine is made; the guest cannot write any.

Source: QEMU's documentation of the device (docs/specs/fw_cfg), which SeaBIOS and OVMF follow.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.pci_device import Dma
from nonroot.hvm.device import NO_EVENTS, Events, StateError, StateRecord, expect, u16, u32, u64

__all__ = ["FW_CFG_PORTS", "FwCfg", "FwCfgState"]

FW_CFG_PORTS: Final = 0x510
LENGTH: Final = 12
# Device offsets; the machine maps 0x510 here.
SELECTOR: Final = 0
DATA: Final = 1
DMA_HIGH: Final = 4
DMA_LOW: Final = 8

KEY_SIGNATURE: Final = 0x00
KEY_ID: Final = 0x01
KEY_FILE_DIRECTORY: Final = 0x19
KEY_FIRST_FILE: Final = 0x20
SIGNATURE: Final = b"QEMU"
DMA_SIGNATURE: Final = b"QEMU CFG"
ID_TRADITIONAL: Final = 1 << 0
ID_DMA: Final = 1 << 1
NAME_LENGTH: Final = 56
FILES_MAXIMUM: Final = 0x1000

CONTROL_ERROR: Final = 1 << 0
CONTROL_READ: Final = 1 << 1
CONTROL_SKIP: Final = 1 << 2
CONTROL_SELECT: Final = 1 << 3
CONTROL_WRITE: Final = 1 << 4
CHUNK: Final = 1 << 16
LONGEST: Final = 1 << 24
"""Bytes of one transfer; longer ones are an error, they would only write zeros."""


@dataclass(slots=True)
class FwCfgState(StateRecord):
    """The selected item, the place in it, and the high half of the DMA address."""

    NAME: ClassVar[str] = "fw-cfg"

    key: int = u16()
    place: int = u32()
    address: int = u64()

    def check_consistency(self) -> None:
        """Only the high half is kept."""
        if self.address & 0xFFFF_FFFF:
            raise StateError("fw-cfg state: address has a low half")


class FwCfg:
    """Ports 0x510..0x51B."""

    name = "fw-cfg"

    def __init__(
        self,
        items: Mapping[int, bytes],
        files: Mapping[str, bytes],
        dma: Dma,
        events: Events = NO_EVENTS,
    ) -> None:
        """
        ``items``: key to bytes, beside the ones that are always there. ``files``: name to contents, which get keys in
        the order of their names. ValueError for names that are too long, and too many files.
        """
        self._dma = dma
        self._events = events
        self._items: dict[int, bytes] = dict(items)
        self._items[KEY_SIGNATURE] = SIGNATURE
        self._items[KEY_ID] = struct.pack("<I", ID_TRADITIONAL | ID_DMA)
        if len(files) > FILES_MAXIMUM:
            raise ValueError(f"{len(files)} files are too many")
        directory = [struct.pack(">I", len(files))]
        for key, (name, data) in enumerate(sorted(files.items()), KEY_FIRST_FILE):
            encoded = name.encode("ascii")
            if not 0 < len(encoded) < NAME_LENGTH:
                raise ValueError(f"the name {name!r} is empty or too long")
            self._items[key] = bytes(data)
            directory.append(struct.pack(">IHH56s", len(data), key, 0, encoded))
        self._items[KEY_FILE_DIRECTORY] = b"".join(directory)
        self._key = 0
        self._place = 0
        self._address = 0

    def reset(self) -> None:
        """The signature is selected."""
        self._key = self._place = self._address = 0

    def read(self, offset: int, size: int) -> int:
        """The item's next byte (zero after its end); the DMA register reads as a signature."""
        if offset == DATA and size == 1:
            data = self._take(1)
            return data[0]
        if DMA_HIGH <= offset <= LENGTH - size:
            at = offset - DMA_HIGH
            return int.from_bytes(DMA_SIGNATURE[at : at + size], "little")
        if offset == SELECTOR and size == 2:
            return self._key
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Select an item, or give the address of a DMA command (big-endian; the low half starts it)."""
        if offset == SELECTOR and size == 2:
            self._select(value)
        elif offset == DMA_HIGH and size == 4:
            self._address = _swap(value) << 32
        elif offset == DMA_LOW and size == 4:
            address, self._address = self._address | _swap(value), 0
            self._command(address)
        else:
            self._events(self.name, "unknown-register", offset)

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """The item's next bytes."""
        if offset == DATA and size == 1:
            return self._take(count)
        return b"".join(self.read(offset, size).to_bytes(size, "little") for _ in range(count))

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """Nothing takes blocks; the last one counts."""
        for start in range(0, len(data), size):
            self.write(offset, size, int.from_bytes(data[start : start + size], "little"))

    def _select(self, key: int) -> None:
        self._key = key & 0xFFFF
        self._place = 0
        if self._key not in self._items:
            self._events(self.name, "unknown-item", self._key)

    def _take(self, count: int) -> bytes:
        item = self._items.get(self._key, b"")
        data = item[self._place : self._place + count]
        self._place = min(self._place + count, len(item))
        return data.ljust(count, b"\0")

    def _command(self, address: int) -> None:
        control, length, target = struct.unpack(">IIQ", self._dma.read(address, 16).ljust(16, b"\xff"))
        if control & CONTROL_SELECT:
            self._select(control >> 16)
        error = control & CONTROL_WRITE or length > LONGEST
        if error:
            self._events(self.name, "refused-command", control)
        elif control & CONTROL_READ:
            while length:
                piece = min(length, CHUNK)
                self._dma.write(target, self._take(piece))
                target += piece
                length -= piece
        elif control & CONTROL_SKIP:
            item = self._items.get(self._key, b"")
            self._place = min(self._place + length, len(item))
        self._dma.write(address, struct.pack(">I", CONTROL_ERROR if error else 0))

    def state(self) -> FwCfgState:
        """What is selected; items are part of the machine's configuration."""
        return FwCfgState(self._key, self._place, self._address)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        record = expect(FwCfgState, state)
        if record.place > len(self._items.get(record.key, b"")):
            raise StateError("fw-cfg state: place is beyond the item's end")
        self._key, self._place, self._address = record.key, record.place, record.address


def _swap(value: int) -> int:
    return int.from_bytes((value & 0xFFFF_FFFF).to_bytes(4, "little"), "big")
