"""A device model in a process of its own: it does what the same devices do at home, and no more."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot import _engine
from nonroot.backends.drive import Drive, open_image
from nonroot.backends.handover import describe_image
from nonroot.confine.host import observe
from nonroot.hvm.dm_op import DmOp
from nonroot.hvm.machine import Machine
from nonroot.hvm.outcome import Reason
from nonroot.stubdom.model import DeviceModel
from tests.stubdom.machines import DOMID, elsewhere, internal, pci_read, pci_write
from tests.waiting import wait_until

PORTS = [*range(0x3B0, 0x3E0), 0x60, 0x64, 0x1F0, *range(0x1F1, 0x1F8), 0x3F6, *range(0x170, 0x178), 0x376]
PORTS += [*range(0x3F0, 0x3F6), *range(0x10), *range(0xC0, 0xE0), 0x1CE, 0x1CF, 0x510, 0x511]
SECTOR = bytes(range(256)) * 2


@pytest.fixture
def media(tmp_path: Path) -> tuple[Path, Path]:
    disk, floppy = tmp_path / "disk.img", tmp_path / "floppy.img"
    disk.write_bytes(SECTOR * 2048)
    floppy.write_bytes(bytes(1_474_560))
    return disk, floppy


@pytest.fixture
def stub(media: tuple[Path, Path]) -> Iterator[tuple[Machine, DeviceModel]]:
    with elsewhere(*media) as both:
        yield both


def scramble(machine: Machine, seed: int) -> list[int]:
    """Accesses of all kinds, the same for each machine; what they read."""
    source = random.Random(seed)
    found: list[int] = []
    for _ in range(1500):
        kind = source.randrange(10)
        size = source.choice((1, 1, 1, 2, 4))
        port = source.choice(PORTS)
        if kind < 4:
            found.append(machine.ports.read(port, size))
        elif kind < 8:
            machine.ports.write(port, size, source.randrange(1 << 8 * size))
        elif kind == 8:
            slot, function = source.choice(((1, 1), (2, 0), (3, 0)))
            register = source.randrange(0, 0x60, 4)
            if source.randrange(2):
                found.append(pci_read(machine, slot, function, register))
            else:
                pci_write(machine, slot, function, register, 4, source.randrange(1 << 32))
        else:
            address = 0xA0000 + source.randrange(0x20000 - 8)
            if machine.memory.lookup(address >> 12) is None:
                if source.randrange(2):
                    found.append(machine.mmio.read(address, size))
                else:
                    machine.mmio.write(address, size, source.randrange(1 << 8 * size))
    found += machine.ports.read_block(0x1F0, 2, 64)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_it_does_what_the_same_devices_do_at_home(media: tuple[Path, Path], seed: int) -> None:
    with internal(*media) as home, elsewhere(*media) as (away, model):
        assert scramble(away, seed) == scramble(home, seed)
        assert away.device_states() == home.device_states()
        assert away.memory.runs() == home.memory.runs()
        assert model.requests > 1000
        assert model.refused == 0


def test_records_go_from_one_arrangement_to_the_other(media: tuple[Path, Path]) -> None:
    with internal(*media) as home, elsewhere(*media) as (away, _):
        scramble(home, 11)
        away.restore_device_states(home.device_states())
        assert away.device_states() == home.device_states()


def test_a_reset_reaches_every_device(media: tuple[Path, Path]) -> None:
    with elsewhere(*media) as (away, _), internal(*media) as home:
        scramble(away, 3)
        for machine in (away, home):
            for device in machine.devices:
                device.reset()
        ours, theirs = away.device_states(), home.device_states()
        assert {name: ours[name] for name in ("ide", "ps2", "vga")} == {n: theirs[n] for n in ("ide", "ps2", "vga")}


def read_sector(machine: Machine, number: int) -> bytes:
    """A disk's sector, by PIO."""
    pci_write(machine, 1, 1, 4, 2, 5)
    for port, value in ((0x1F6, 0xE0), (0x1F2, 1), (0x1F3, number), (0x1F4, 0), (0x1F5, 0), (0x1F7, 0x20)):
        machine.ports.write(port, 1, value)
    end = time.monotonic() + 20
    while machine.ports.read(0x1F7, 1) & 0x88 != 0x08:
        assert time.monotonic() < end
    return machine.ports.read_block(0x1F0, 2, 256)


def test_a_sector(media: tuple[Path, Path]) -> None:
    with elsewhere(*media, virtual=False) as (machine, model):
        before = model.requests
        assert read_sector(machine, 5) == SECTOR
        assert model.requests - before < 40
        assert machine.exit_counts  # nothing ran: the test is the vCPU


def test_the_confined_process_has_what_it_was_given(stub: tuple[Machine, DeviceModel]) -> None:
    machine, model = stub
    assert machine.ports.read(0x64, 1) != 0xFF
    assert model.pid is not None
    landlock, seccomp = _engine.confinement_of_host()
    if landlock and seccomp:
        assert {"no-new-privileges", "landlock", "seccomp"} <= set(model.confinement["confined"])
        assert "seccomp" in observe(model.pid)
    if os.geteuid() == 0:
        links = [os.fspath(fd.readlink()) for fd in Path(f"/proc/{model.pid}/fd").iterdir() if int(fd.name) > 2]
        rest = [link for link in links if not link.startswith(("anon_inode:[event", "socket:"))]
        media = [link for link in rest if link.endswith(".img")]
        assert len(media) == 2
        layers = [link for link in rest if link not in media]
        assert len(layers) == 4, f"memory is mapped, its files are closed: {layers}"
        assert not [link for link in layers if link.startswith("/memfd:") and "overlay" not in link]


def test_an_idle_device_model_sleeps(stub: tuple[Machine, DeviceModel]) -> None:
    machine, model = stub
    machine.ports.read(0x64, 1)

    def used() -> int:
        fields = Path(f"/proc/{model.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]) + int(fields[12])

    before = used()
    time.sleep(0.5)
    assert used() - before <= 1


def test_what_a_hostile_process_asks_for_is_refused(stub: tuple[Machine, DeviceModel]) -> None:
    machine, model = stub
    machine.ports.read(0x64, 1)
    runs = machine.memory.runs()
    do = model._operations.do
    huge = (1 << 64) - 1
    hostile = [
        (DmOp.MAP_IO_RANGE, [2 << 3, 0, 0x1000, 0, 0]),  # RAM there
        (DmOp.MAP_IO_RANGE, [99, 0, 0xE000_0000, 0, 0]),
        (DmOp.MAP_IO_RANGE, [2 << 3, 5, 0xE000_0000, 0, 0]),
        (DmOp.MAP_IO_RANGE, [2 << 3, 0, huge, 0, 0]),
        (DmOp.SHOW_MEMORY, [0, 0x1000, 0, 0x1000, 0]),
        (DmOp.SHOW_MEMORY, [9, 0xA0000, 0, 0x1000, 0]),
        (DmOp.SHOW_MEMORY, [0, 0xA0000, huge, 0x1000, 0]),
        (DmOp.SHOW_MEMORY, [0, 0xA0001, 0, 0x1000, 0]),
        (DmOp.HIDE_MEMORY, [0, 0x10_0000, 0x1000, 0, 0]),
        (DmOp.MODIFIED_MEMORY, [0, huge, 0, 0, 0]),
        (DmOp.MODIFIED_MEMORY, [huge, 1, 0, 0, 0]),
        (DmOp.SET_ISA_IRQ_LEVEL, [0, 1, 0, 0, 0]),  # the timer's
        (DmOp.SET_ISA_IRQ_LEVEL, [8, 1, 0, 0, 0]),
        (DmOp.SET_PCI_INTX_LEVEL, [5, 0, 1, 0, 0]),
        (DmOp.TRACK_DIRTY_VRAM, [4, 0, 0, 0, 0]),
        (DmOp.REMOTE_SHUTDOWN, [77, 0, 0, 0, 0]),
        (0x7777, [0] * 5),
    ]
    for op, args in hostile:
        status = do(DOMID, op, args)
        # A window over RAM is taken note of, and decoded as little as with devices at home.
        assert status < 0 or op == DmOp.MAP_IO_RANGE, (op, args)
    assert do(DOMID + 1, DmOp.SET_ISA_IRQ_LEVEL, [14, 1, 0, 0, 0]) == -1
    source = random.Random(5)
    for _ in range(3000):
        op = source.choice([*DmOp, 0])
        if op not in (DmOp.REMOTE_SHUTDOWN, DmOp.INJECT_MSI):
            bits = source.choice((4, 20, 32, 64))
            do(DOMID, op, [source.randrange(1 << bits) for _ in range(5)])
    for gfn, count, backing, offset, writable in machine.memory.runs():
        if backing == 0:
            assert (gfn, count, backing, offset, writable) in runs


def test_without_restarts_a_dead_device_model_ends_the_domain(media: tuple[Path, Path]) -> None:
    with elsewhere(*media, restarts=False) as (machine, model):
        machine.ports.read(0x64, 1)
        assert model.pid is not None
        os.kill(model.pid, signal.SIGKILL)
        assert machine.ports.read(0x64, 1) == 0xFF
        assert machine.outcome is not None
        assert machine.outcome.reason is Reason.FAILURE
        assert "device model" in machine.outcome.detail


def test_a_device_model_that_dies_while_nobody_asks_it_is_replaced(media: tuple[Path, Path]) -> None:
    with elsewhere(*media) as (machine, model):
        machine.ports.read(0x64, 1)
        machine.pause()
        outcomes: list[object] = []
        thread = threading.Thread(target=lambda: outcomes.append(machine.run()))
        thread.start()
        first = model.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: model.restarted == 1)
        machine.stop()
        machine.resume()
        thread.join(20)
        assert outcomes
        assert model.pid != first
        assert machine.ports.read(0x64, 1) != 0xFF


STEPS = ("taken", "done", "committed", "answered", "writes", "writes-done", "writes-committed")


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_at_any_step_of_a_request_is_not_noticed(media: tuple[Path, Path], step: str, seed: int) -> None:
    is_post = step.startswith("writes")
    faults = [(step, times) for times in ((7, 20, 3) if is_post else (40, 333, 250))]
    virtual = not is_post  # nothing is posted in virtual time
    with internal(*media, virtual=virtual) as home, elsewhere(*media, virtual=virtual, faults=faults) as (away, model):
        if is_post:
            for machine in (home, away):
                graphics(machine)
        found, expected = (draw if is_post else scramble)(away, seed), (draw if is_post else scramble)(home, seed)
        assert model.restarted == len(faults)
        assert found == expected
        ours, theirs = away.device_states(), home.device_states()
        names = ("vga", "memory.vga") if is_post else tuple(theirs)
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}


def graphics(machine: Machine) -> None:
    """Mode X: the window is the planes' logic."""
    for port, value in ((0x3C4, 0x0604), (0x3CE, 0x0506), (0x3C4, 0x0F02)):
        machine.ports.write(port, 2, value)


def draw(machine: Machine, seed: int) -> list[int]:
    """Stores into the window, by every function of the graphics controller, and loads."""
    source = random.Random(seed)
    found = []
    for _ in range(60):
        machine.ports.write(0x3CE, 2, source.randrange(4) << 11 | 0x03)  # replace, and, or, xor
        machine.ports.write(0x3CE, 2, source.randrange(256) << 8 | 0x08)
        found.append(machine.mmio.read(0xA0000 + source.randrange(0x8000), 1))
        for _ in range(source.randrange(40)):
            machine.mmio.write(0xA0000 + source.randrange(0x100), source.choice((1, 2, 4)), source.randrange(256))
    return found


def test_reads_by_dma_survive_a_death_between(media: tuple[Path, Path]) -> None:
    for step in ("poked", "poked-done", "done", "committed"):
        with elsewhere(*media, virtual=False, faults=[(step, 1), (step, 12)]) as (machine, model):
            for number in range(4):
                assert read_sector(machine, number) == SECTOR, step
            assert model.restarted >= (1 if "poked" in step else 2), step


def test_one_that_dies_again_and_again_is_given_up(media: tuple[Path, Path]) -> None:
    with elsewhere(*media, faults=[("done", 2)] * 20) as (machine, model):
        for _ in range(20):
            machine.ports.read(0x64, 1)
        assert machine.outcome is not None
        assert machine.outcome.reason is Reason.FAILURE
        assert "times" in machine.outcome.detail
        assert model.restarted == 5


def test_media_that_were_changed_are_there_after_a_death(media: tuple[Path, Path], tmp_path: Path) -> None:
    disc = tmp_path / "disc.iso"
    disc.write_bytes(bytes(2048 * 16))
    with elsewhere(*media) as (machine, model):
        machine.ports.read(0x64, 1)
        image = open_image(Drive.parse(f"{disc},ro"))
        described = describe_image(image)
        assert described is not None
        model.storage.insert(False, 2, *described)
        image.close()
        before = machine.device_states()
        for _ in range(2):
            assert model.pid is not None
            os.kill(model.pid, signal.SIGKILL)
            assert machine.device_states() == before
        assert model.storage.eject(False, 2, False)


def test_it_ends_with_its_domain(media: tuple[Path, Path]) -> None:
    with elsewhere(*media) as (machine, model):
        machine.ports.read(0x64, 1)
        pid = model.pid
    assert not Path(f"/proc/{pid}").exists()
