"""What a device model may ask of the hypervisor: Xen's dm_op operations, and a few of our own.

A device model's operations go through its own ring to its own domain's hypervisor: there is no way to another domain.
The domain's number in each is checked all the same, as Xen checks it.

==================== =================================================================================
operation            arguments
==================== =================================================================================
MAP_IO_RANGE         PCI function (slot << 3 | function), number of its BAR, address: it is decoded there
UNMAP_IO_RANGE       the same: no more
TRACK_DIRTY_VRAM     number of a memory: status is how many pages were written, the bitmap says which
SET_PCI_INTX_LEVEL   slot, pin (0 is INTA#), level
SET_ISA_IRQ_LEVEL    interrupt, level
MODIFIED_MEMORY      first frame, number of frames: written by the device model
INJECT_MSI           address, data
REMOTE_SHUTDOWN      0 power off, 1 reset
SHOW_MEMORY          number of a memory, address, offset, length; its bit 63: the guest may write
HIDE_MEMORY          number of a memory, address, length
UPDATE_P2M           write the p2m into its file; status is the number of runs
REARM                the deadline of the devices is another
==================== =================================================================================

Source: Xen's public/hvm/dm_op.h; from 0x8000 on they are ours.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Final

__all__ = ["EINVAL", "ENOSYS", "EPERM", "WANTS_STATUS", "DmOp", "Operations", "Shutdown"]

WANTS_STATUS: Final = 1
"""A flag: somebody waits for the status."""
EPERM: Final = 1
EINVAL: Final = 22
ENOSYS: Final = 38


class DmOp(IntEnum):
    """XEN_DMOP_…"""

    MAP_IO_RANGE = 3
    UNMAP_IO_RANGE = 4
    TRACK_DIRTY_VRAM = 7
    SET_PCI_INTX_LEVEL = 8
    SET_ISA_IRQ_LEVEL = 9
    MODIFIED_MEMORY = 11
    INJECT_MSI = 14
    REMOTE_SHUTDOWN = 16
    SHOW_MEMORY = 0x8000
    HIDE_MEMORY = 0x8001
    UPDATE_P2M = 0x8002
    REARM = 0x8003


class Shutdown(IntEnum):
    """SHUTDOWN_…"""

    POWER_OFF = 0
    REBOOT = 1


Handler = Callable[[Sequence[int]], int]
"""Takes the five arguments; returns a status. ValueError, KeyError and OverflowError are -EINVAL."""


class Operations:
    """The operations that one device model has, on its target. Whatever it asks for, nothing raises."""

    def __init__(self, target: int, handlers: dict[int, Handler]) -> None:
        """``target``: the domain's number."""
        self._target = target
        self._handlers = handlers
        self.refused = 0
        """How many were not done."""

    def do(self, domid: int, op: int, args: Sequence[int]) -> int:
        """Do one; its status: what it returns, or minus an error number."""
        if domid != self._target:
            status = -EPERM
        else:
            handler = self._handlers.get(op)
            try:
                status = -ENOSYS if handler is None else handler(args)
            except (ValueError, KeyError, OverflowError):
                status = -EINVAL
        if status < 0:
            self.refused += 1
        return status
