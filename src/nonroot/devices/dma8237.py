"""The two 8237 DMA controllers with their page registers, as far as the floppy needs them.

Channels 0..3 move bytes; 4 is the cascade; 5..7 have registers and nothing that would use them. Devices ask for a
transfer when they have the data: it is done at once, as far as the channel's count goes.
Source: Intel 8237A datasheet (231466); page registers: 82371SB (290550).
"""

from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.pci_device import Dma
from nonroot.hvm.device import NO_EVENTS, Events, StateRecord, array, expect

__all__ = ["MASTER", "PAGES", "SLAVE", "Dma8237", "Dma8237State"]

# Device offsets of the fixed ranges
MASTER: Final = 0x00
"""Ports 0x00..0x0F: channels 0..3."""
PAGES: Final = 0x10
"""Ports 0x80..0x8F; 0x80 itself is the POST port."""
SLAVE: Final = 0x20
"""Ports 0xC0..0xDF: channels 4..7, a register every second port."""

PAGE_OF: Final = {0: 0x7, 1: 0x3, 2: 0x1, 3: 0x2, 4: 0xF, 5: 0xB, 6: 0x9, 7: 0xA}
"""Channel -> place among the page registers."""

COMMAND_DISABLE: Final = 0x04
MODE_TO_MEMORY: Final = 0x04
MODE_FROM_MEMORY: Final = 0x08
MODE_TRANSFER: Final = 0x0C
MODE_AUTOMATIC: Final = 0x10
MODE_DOWN: Final = 0x20
ALL_MASKED: Final = 0x0F


@dataclass(slots=True)
class Dma8237State(StateRecord):
    """Eight channels, two controllers, sixteen page registers."""

    NAME: ClassVar[str] = "dma8237"

    base_address: tuple[int, ...] = array("H", 8)
    base_count: tuple[int, ...] = array("H", 8)
    address: tuple[int, ...] = array("H", 8)
    count: tuple[int, ...] = array("H", 8)
    mode: tuple[int, ...] = array("B", 8)
    command: tuple[int, ...] = array("B", 2)
    status: tuple[int, ...] = array("B", 2)
    mask: tuple[int, ...] = array("B", 2, default=ALL_MASKED, maximum=ALL_MASKED)
    high_byte: tuple[int, ...] = array("B", 2, maximum=1)
    page: tuple[int, ...] = array("B", 16)


class Dma8237:
    """Both controllers. Offsets: :data:`MASTER`, :data:`PAGES`, :data:`SLAVE`."""

    name = "dma8237"

    def __init__(self, memory: Dma, events: Events = NO_EVENTS) -> None:
        self._memory = memory
        self._events = events
        self._load(Dma8237State())

    def _load(self, state: Dma8237State) -> None:
        self._base_address, self._base_count = list(state.base_address), list(state.base_count)
        self._address, self._count = list(state.address), list(state.count)
        self._mode, self._command, self._status = list(state.mode), list(state.command), list(state.status)
        self._mask, self._high_byte, self._page = list(state.mask), list(state.high_byte), list(state.page)

    def reset(self) -> None:
        """Everything masked."""
        self._load(Dma8237State())

    # ── for devices ──

    def ready(self, channel: int, to_memory: bool) -> int:
        """Bytes that channel 0..3 would move now in that direction; 0 if it is masked or programmed otherwise."""
        wanted = MODE_TO_MEMORY if to_memory else MODE_FROM_MEMORY
        masked = self._mask[0] >> channel & 1 or self._command[0] & COMMAND_DISABLE
        if masked or self._mode[channel] & MODE_TRANSFER not in (wanted, 0):
            return 0
        return self._count[channel] + 1

    def to_memory(self, channel: int, data: bytes) -> tuple[int, bool]:
        """Move bytes from a device to memory: how many were taken, and whether the count is over (terminal count)."""
        taken = min(len(data), self.ready(channel, True))
        if self._mode[channel] & MODE_TRANSFER:
            for start, address, size in self._pieces(channel, taken):
                piece = data[start : start + size]
                self._memory.write(address, piece[::-1] if self._mode[channel] & MODE_DOWN else piece)
        return taken, self._moved(channel, taken)

    def from_memory(self, channel: int, length: int) -> tuple[bytes, bool]:
        """Move at most ``length`` bytes from memory to a device: the bytes, and whether the count is over."""
        taken = min(length, self.ready(channel, False))
        data = b""
        for _, address, size in self._pieces(channel, taken):
            piece = self._memory.read(address, size)
            data += piece[::-1] if self._mode[channel] & MODE_DOWN else piece
        return data, self._moved(channel, taken)

    def _pieces(self, channel: int, length: int) -> list[tuple[int, int, int]]:
        """(bytes before, address, bytes): the address wraps within its 64 KiB page."""
        page = self._page[PAGE_OF[channel]] << 16
        pieces = []
        done, at = 0, self._address[channel]
        while done < length:
            if self._mode[channel] & MODE_DOWN:
                size = min(length - done, at + 1)
                pieces.append((done, page + at - size + 1, size))
                at = (at - size) & 0xFFFF
            else:
                size = min(length - done, 0x1_0000 - at)
                pieces.append((done, page + at, size))
                at = (at + size) & 0xFFFF
            done += size
        return pieces

    def _moved(self, channel: int, length: int) -> bool:
        if not length:
            return False
        step = -length if self._mode[channel] & MODE_DOWN else length
        self._address[channel] = self._address[channel] + step & 0xFFFF
        left = self._count[channel] + 1 - length
        self._count[channel] = left - 1 & 0xFFFF
        if left:
            return False
        self._status[0] |= 1 << channel
        if self._mode[channel] & MODE_AUTOMATIC:
            self._address[channel], self._count[channel] = self._base_address[channel], self._base_count[channel]
        else:
            self._mask[0] |= 1 << channel
        return True

    # ── registers ──

    def read(self, offset: int, size: int) -> int:
        """Current addresses and counts, status, page registers; the others read as all ones."""
        if PAGES <= offset < SLAVE:
            return self._page[offset - PAGES]
        unit, register = _place(offset)
        if register < 8:
            channel = 4 * unit + (register >> 1)
            value = (self._count if register & 1 else self._address)[channel]
            high = self._high_byte[unit]
            self._high_byte[unit] ^= 1
            return value >> 8 if high else value & 0xFF
        if register == 8:
            status, self._status[unit] = self._status[unit], 0
            return status
        self._events(self.name, "unknown-register", offset)
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        """Any register of the datasheet; requests by software do nothing."""
        if PAGES <= offset < SLAVE:
            self._page[offset - PAGES] = value
            return
        unit, register = _place(offset)
        if register < 8:
            self._write_pair(unit, register, value)
        elif register == 8:
            self._command[unit] = value
        elif register == 0xA:
            bit = 1 << (value & 3)
            self._mask[unit] = self._mask[unit] | bit if value & 4 else self._mask[unit] & ~bit
        elif register == 0xB:
            self._mode[4 * unit + (value & 3)] = value & 0xFC
        elif register == 0xC:
            self._high_byte[unit] = 0
        elif register == 0xD:
            self._command[unit] = self._status[unit] = self._high_byte[unit] = 0
            self._mask[unit] = ALL_MASKED
        elif register == 0xE:
            self._mask[unit] = 0
        elif register == 0xF:
            self._mask[unit] = value & ALL_MASKED
        else:
            self._events(self.name, "request-by-software", value)

    def _write_pair(self, unit: int, register: int, value: int) -> None:
        channel = 4 * unit + (register >> 1)
        base, now = (self._base_count, self._count) if register & 1 else (self._base_address, self._address)
        if self._high_byte[unit]:
            base[channel] = base[channel] & 0x00FF | value << 8
        else:
            base[channel] = base[channel] & 0xFF00 | value
        now[channel] = base[channel]
        self._high_byte[unit] ^= 1

    # ── records ──

    def state(self) -> Dma8237State:
        """Everything."""
        return Dma8237State(
            base_address=tuple(self._base_address),
            base_count=tuple(self._base_count),
            address=tuple(self._address),
            count=tuple(self._count),
            mode=tuple(self._mode),
            command=tuple(self._command),
            status=tuple(self._status),
            mask=tuple(self._mask),
            high_byte=tuple(self._high_byte),
            page=tuple(self._page),
        )

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        self._load(expect(Dma8237State, state))


def _place(offset: int) -> tuple[int, int]:
    """(controller, register)."""
    return (1, offset - SLAVE >> 1) if offset >= SLAVE else (0, offset)
