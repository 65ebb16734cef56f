"""kill -9 of the stub domain at random moments: of a boot, and of writing a disk."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nonroot.backends.drive import Drive, open_image
from nonroot.backends.handover import describe_image
from nonroot.engines import select
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig
from nonroot.stubdom.model import DeviceModel, Parts
from tests.matrix.conftest import fetched
from tests.matrix.pc import Pc, engines
from tests.platform.test_reset import BY_CF9, rom
from tests.stubdom.machines import pci_write

SECTORS = 160
MOST = 5


@contextmanager
def killer(model: DeviceModel, seed: int, longest: float) -> Iterator[None]:
    """Kill its process at random moments, as often as it is replaced."""
    source = random.Random(seed)
    over = threading.Event()

    def kill() -> None:
        for _ in range(MOST):
            if over.wait(source.uniform(0.05, longest)):
                return
            if model.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(model.pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    yield
    over.set()
    thread.join()


@pytest.mark.slow
@pytest.mark.guest
@pytest.mark.parametrize("seed", range(3))
def test_grub_boots_all_the_same(seed: int) -> None:
    cd = fetched("grub-rescue-pc", "usr/lib/grub-rescue/grub-rescue-cdrom.iso")
    with Pc(engine=engines()[-1], cd=cd, boot="d", model="stub") as pc:
        assert pc.model is not None
        with killer(pc.model, seed, 1.5):
            pc.wait_screen("Press enter to boot", 90)
            pc.press("c")
            pc.wait_screen("^grub>")
            pc.press("ls<ret>")
            pc.wait_screen(r"^\(cd\)")
            pc.press("<esc>")
            pc.shows("grub-menu")
        assert pc.model.restarted >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_disk_has_what_was_written(tmp_path: Path, seed: int) -> None:
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(512 * SECTORS))
    contents = random.Random(seed).randbytes(512 * SECTORS)
    image = open_image(Drive.parse(os.fspath(disk)))
    described = describe_image(image)
    assert described is not None
    place = {"cd": False, "serial": "NR00000001", "medium": {"image": described[0], "files": len(described[1])}}
    model = DeviceModel(Parts(["storage"], [place, None, None, None], files=described[1]))
    config = MachineConfig(16 << 20, firmware=Firmware(rom(BY_CF9)), agent=False, attach=[model.attach])
    machine = Machine(config, select.create("interpret"))
    try:
        pci_write(machine, 1, 1, 4, 2, 5)
        with killer(model, seed, 0.4):
            while model.restarted < 3:
                for number in range(SECTORS):
                    command(machine, number, 0x30)
                    machine.ports.write_block(0x1F0, 2, contents[512 * number : 512 * (number + 1)])
                    wait(machine, 0x80, 0)
                for number in range(SECTORS):
                    command(machine, number, 0x20)
                    found = machine.ports.read_block(0x1F0, 2, 256)
                    assert found == contents[512 * number : 512 * (number + 1)], number
    finally:
        model.close()
        image.close()
    assert disk.read_bytes() == contents


def command(machine: Machine, number: int, code: int) -> None:
    for port, value in ((6, 0xE0), (2, 1), (3, number & 0xFF), (4, number >> 8), (5, 0), (7, code)):
        machine.ports.write(0x1F0 + port, 1, value)
    wait(machine, 0x88, 0x08)


def wait(machine: Machine, mask: int, value: int) -> None:
    end = time.monotonic() + 30
    while (status := machine.ports.read(0x1F7, 1)) & mask != value:
        assert time.monotonic() < end, hex(status)
        assert machine.outcome is None, machine.outcome
