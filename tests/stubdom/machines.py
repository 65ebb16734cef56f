"""Machines with and without a device model of their own, whose devices a test reaches as an exit would."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.handover import describe_image
from nonroot.backends.service import LATENCY_NS, BlockService
from nonroot.devices.display import attach_display
from nonroot.devices.i6300esb import attach_watchdog
from nonroot.devices.ide_unit import CdRom, Disk
from nonroot.devices.storage import attach_storage
from nonroot.engines import select
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig
from nonroot.hvm.pc import Board
from nonroot.stubdom.model import DeviceModel, Parts
from tests.platform.test_reset import BY_CF9, rom

MIB = 1 << 20
DOMID = 7


@contextmanager
def internal(disk: Path, floppy: Path, *, virtual: bool = True) -> Iterator[Machine]:
    """All devices in this process."""

    def drives(board: Board) -> None:
        latency = LATENCY_NS if virtual else None
        ports = [
            BlockService(open_image(Drive.parse(f"{p},overlay")), board.post, board.clock, latency)
            for p in (disk, floppy)
        ]
        services.extend(ports)
        attach_storage(board, [Disk(ports[0], "NR00000001"), None, CdRom(None), None], [ports[1]])

    services: list[BlockService] = []
    yield _machine([drives, attach_display, attach_watchdog], virtual)
    for service in services:
        service.close()


@contextmanager
def elsewhere(
    disk: Path, floppy: Path, *, confined: bool = True, virtual: bool = True, **more: Any
) -> Iterator[tuple[Machine, DeviceModel]]:
    """The same devices in a process of their own."""
    images = [open_image(Drive.parse(f"{path},overlay")) for path in (disk, floppy)]
    media: list[dict[str, Any]] = []
    files: list[int] = []
    for image in images:
        described = describe_image(image)
        assert described is not None
        media.append({"image": described[0], "files": len(described[1])})
        files += described[1]
    drives: list[dict[str, Any] | None] = [
        {"cd": False, "serial": "NR00000001", "medium": media[0]},
        None,
        {"cd": True, "serial": "NR00000003", "medium": None},
        None,
    ]
    parts = Parts(["storage", "display", "watchdog"], drives, [media[1]], files)
    model = DeviceModel(parts, DOMID, confined, virtual, **more)
    try:
        yield _machine([model.attach], virtual), model
    finally:
        model.close()
        for image in images:
            image.close()


def _machine(attach: list[Any], virtual: bool) -> Machine:
    config = MachineConfig(
        memory_bytes=16 * MIB,
        firmware=Firmware(rom(BY_CF9)),
        agent=False,
        attach=attach,
        virtual_time=(1, 1) if virtual else None,
    )
    return Machine(config, select.create("interpret"))


def pci_read(machine: Machine, slot: int, function: int, register: int, size: int = 4) -> int:
    """A load from configuration space."""
    machine.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | function << 8 | register & 0xFC)
    return machine.ports.read(0xCFC + (register & 3), size)


def pci_write(machine: Machine, slot: int, function: int, register: int, size: int, value: int) -> None:
    """A store."""
    machine.ports.write(0xCF8, 4, 1 << 31 | slot << 11 | function << 8 | register & 0xFC)
    machine.ports.write(0xCFC + (register & 3), size, value)
