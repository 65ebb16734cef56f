"""Device records that outlive the process of their devices: what a request has done is kept together with its reply.

They lie in memory that both sides share, two copies for each device. After a request, the records of the devices that
it reached go into the copies that do not count, the reply into the place that does not count, and one store of a 64-bit
word makes all of them count. So a process that dies has either not done a request, which is done again, or has, and the
reply is there. What is done twice does no harm: a store by DMA puts the same bytes in the same place, a disk's write
too, lines have levels, and what the VGA's logic makes of a store depends on its registers alone. Short stores by DMA,
such as the end of a firmware configuration command, come after the word: the command would not be found there again.

======= =============================================================================================
0       bits 0 to 61: which copy of a device's record counts; bit 62: of the stores; bit 63: the reply
8       number of the request that was made last, by the hypervisor
16, 32  (number of a request, its reply)
4096    the copies: length, then the record's fields
======= =============================================================================================
"""

import marshal
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Final

from nonroot.hvm.device import Device, StateError

__all__ = ["Records", "answered", "records_length"]

FIRST: Final = 4096
PAGE: Final = 4096
STORES: Final = 62
REPLY: Final = 63
STORES_ROOM: Final = 4096
WORD: Final = (1 << 64) - 1

Stores = list[tuple[int, bytes]]


def _room(size: int) -> int:
    """For a record of so many packed bytes: each number may take five."""
    return (5 * min(size, 4096) + size + 2 * PAGE) // PAGE * PAGE


def records_length(sizes: Sequence[int]) -> int:
    """Bytes of the file for devices with records of these sizes."""
    return FIRST + 2 * STORES_ROOM + 2 * sum(_room(size) for size in sizes)


class Records:
    """The file, as the device model's process uses it."""

    def __init__(self, area: memoryview, devices: Sequence[Device]) -> None:
        self._area = area
        self._words = area[:FIRST].cast("Q")
        self._devices = list(devices)
        self._number = {id(device): number for number, device in enumerate(devices)}
        self._places: list[tuple[int, int]] = []
        place = FIRST + 2 * STORES_ROOM
        for device in devices:
            room = _room(type(device.state()).size())
            self._places.append((place, room))
            place += 2 * room
        self._active = int(self._words[0])

    def commit(self, devices: Iterable[Device], value: int | None = None, stores: Stores | None = None) -> None:
        """What the devices are now counts; with ``value``, the present request is answered by it."""
        active = self._active
        for device in devices:
            number = self._number[id(device)]
            state = device.state()
            data = marshal.dumps(tuple(getattr(state, f.name) for f in fields(state)))  # type: ignore[arg-type]
            place, room = self._places[number]
            active ^= 1 << number
            self._put(place + (room if active >> number & 1 else 0), room, data)
        if value is not None:
            active ^= 1 << STORES | 1 << REPLY
            self._put(FIRST + (STORES_ROOM if active >> STORES & 1 else 0), STORES_ROOM, marshal.dumps(stores or []))
            at = 4 if active >> REPLY & 1 else 2
            self._words[at + 1] = value & WORD
            self._words[at] = self._words[1]
        self._words[0] = self._active = active

    def _put(self, place: int, room: int, data: bytes) -> None:
        if len(data) + 4 > room:
            raise ValueError("a record has no room")
        self._area[place + 4 : place + 4 + len(data)] = data
        self._area[place : place + 4] = len(data).to_bytes(4, "little")

    def _get(self, place: int) -> Any:
        length = int.from_bytes(self._area[place : place + 4], "little")
        return marshal.loads(self._area[place + 4 : place + 4 + length])

    def load(self) -> None:
        """Have the devices go on from the records that count. StateError if one is none of theirs."""
        for number, device in enumerate(self._devices):
            place, room = self._places[number]
            values = self._get(place + (room if self._active >> number & 1 else 0))
            kind = type(device.state())
            try:
                state = kind(*values)
            except TypeError as error:
                raise StateError(f"{device.name} state: {error}") from None
            device.from_state(state)

    def stores(self) -> Stores:
        """The stores that belong to the last reply."""
        found: Stores = self._get(FIRST + (STORES_ROOM if self._active >> STORES & 1 else 0))
        return found


def answered(words: memoryview) -> tuple[int, int]:
    """(number of the request that was answered last, its reply), as the hypervisor finds them."""
    at = 4 if words[0] >> REPLY & 1 else 2
    return int(words[at]), int(words[at + 1])
