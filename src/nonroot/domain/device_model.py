"""Where a domain's emulated devices are: in its own process, or in one of their own."""

from typing import TYPE_CHECKING, Final

from nonroot.errors import BadOptionError

if TYPE_CHECKING:
    from nonroot.domain.drives import Drives
    from nonroot.domain.options import DomainOptions
    from nonroot.hvm.pc import Board
    from nonroot.stubdom.model import DeviceModel

__all__ = ["CHOICES", "DOM0", "INTERNAL", "STUB", "attach_model", "check_device_model", "make_model"]

INTERNAL: Final = "internal"
"""In the domain's own process."""
STUB: Final = "stub"
"""In a stub domain: a confined process, which has the domain's memory and disks and nothing else."""
DOM0: Final = "dom0"
"""In a process that nothing confines, as Xen's were in domain zero."""
CHOICES: Final = (INTERNAL, STUB, DOM0)


def check_device_model(name: str) -> None:
    """BadOptionError if there is no such place."""
    if name not in CHOICES:
        raise BadOptionError(f"there is no device model {name!r}; there are: {', '.join(CHOICES)}")


def make_model(options: "DomainOptions", drives: "Drives", domid: int) -> "DeviceModel | None":
    """The device model's own process, not started yet. None: there is none. UnsupportedError."""
    wanted = options.has_display or options.firmware is not None or drives.wanted
    if options.device_model == INTERNAL or not wanted:
        return None
    from nonroot.stubdom.model import DeviceModel, Parts

    devices = ["display"] if options.has_display else []
    if options.firmware is not None:
        devices.append("watchdog")
    if drives.wanted:
        devices.append("storage")
    places, floppies, files = drives.describe()
    parts = Parts(devices, places, floppies, files, enabled=options.firmware is None)
    return DeviceModel(parts, domid, options.device_model == STUB, options.virtual_time)


def attach_model(model: "DeviceModel", drives: "Drives", board: "Board") -> None:
    """Start it, and put its devices onto the board."""
    model.attach(board)
    if drives.wanted:
        drives.attach_remote(board, model.storage)
