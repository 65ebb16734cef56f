"""The file system device of virtio (1af4:105a): FUSE requests through queues; who answers them is a backend.

Source: Virtual I/O Device (VIRTIO) version 1.2, chapter 5.11.
"""

import struct
from typing import Final

from nonroot.devices.pci_device import UNCONNECTED, PciConnection
from nonroot.devices.virtio_pci import VirtioPci
from nonroot.hvm.device import NO_EVENTS, Events
from nonroot.hvm.pc import SHARE_SLOTS, Board

__all__ = ["MOST_SHARES", "VirtioFs", "attach_share"]

KIND: Final = 26
CLASS_CODE: Final = 0x01_80_00
TAG_BYTES: Final = 36
URGENT_ENTRIES: Final = 128
"""Of the queue of what has no answer (FORGET)."""
REQUEST_ENTRIES: Final = 1024
"""Of the queue of requests: Linux makes none longer than this, so 1 MiB in pages has to fit."""
MOST_SHARES: Final = len(SHARE_SLOTS)


class VirtioFs(VirtioPci):
    """The device: a tag by which the guest mounts it, one urgent queue, one of requests."""

    def __init__(
        self, tag: str, number: int = 0, connection: PciConnection = UNCONNECTED, events: Events = NO_EVENTS
    ) -> None:
        """ValueError if the tag has more than 36 bytes, or none."""
        encoded = tag.encode()
        if not 0 < len(encoded) <= TAG_BYTES:
            raise ValueError(f"{tag!r} is no tag of a file system")
        config = struct.pack(f"<{TAG_BYTES}sI", encoded, 1)
        sizes = (URGENT_ENTRIES, REQUEST_ENTRIES)
        super().__init__(f"virtio-fs{number}", KIND, CLASS_CODE, sizes, config, connection, events)


def attach_share(board: Board, number: int, tag: str) -> VirtioFs:
    """File system device ``number`` (0 and up) in its slot. Its backend is the caller's to set."""
    slot = SHARE_SLOTS[number]
    device = VirtioFs(tag, number, board.connect(slot), board.events)
    board.add_pci(slot, 0, device)
    return device
