"""The records of all devices of a machine, and of their memories, by name."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from nonroot.devices.pci_device import DeviceRam
from nonroot.hvm.device import Device, StateError, StateRecord
from nonroot.hvm.memory_record import MemoryRecord

__all__ = ["MEMORY_PREFIX", "restore_records", "take_records"]

MEMORY_PREFIX: Final = "memory."
"""Before the name of a memory, which may be that of its device."""


@lru_cache(maxsize=64)
def _parsed(kind: Any, data: bytes) -> StateRecord:
    """A record; who goes back to a snapshot again and again needs the same ones. Nobody changes them."""
    record: StateRecord = kind.unpack(data)
    return record


def take_records(devices: Sequence[Device], memories: Mapping[str, DeviceRam]) -> dict[str, bytes]:
    """The packed record of every device and of every memory (``memory.vga``)."""
    records = {device.name: device.state().pack() for device in devices}
    for name, ram in memories.items():
        records[MEMORY_PREFIX + name] = MemoryRecord.of(name, ram.view).pack()
    return records


def restore_records(devices: Sequence[Device], memories: Mapping[str, DeviceRam], records: Mapping[str, bytes]) -> None:
    """
    Check all records, then apply them in the order of ``devices``.

    StateError (nothing changed) for a hostile, missing or unknown one.
    """
    if set(records) != {device.name for device in devices} | {MEMORY_PREFIX + name for name in memories}:
        raise StateError("the records are not those of this machine's devices")
    kinds: list[Any] = [type(device.state()) for device in devices]
    parsed = [(device, _parsed(kind, records[device.name])) for device, kind in zip(devices, kinds, strict=True)]
    contents = [
        (ram.view, MemoryRecord.unpack(name, ram.size, records[MEMORY_PREFIX + name])) for name, ram in memories.items()
    ]
    # Memory before the devices: their registers say what is made of it.
    for view, record in contents:
        record.apply(view)
    for device, state in parsed:
        device.from_state(state)
