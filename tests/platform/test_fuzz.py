"""Random accesses to every port and memory-mapped register of a whole PC: nothing raises, nothing hangs.

The fast part makes 100,000 accesses, the soak part ten million in every round, each with another seed.
"""

import os
import random

import pytest

from nonroot.devices.display import attach_display
from nonroot.devices.i6300esb import attach_watchdog
from nonroot.devices.storage import attach_storage
from nonroot.engines import select
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig
from nonroot.hvm.pc import Board

MIB = 1 << 20
FAST = 100_000
SOAK = 10_000_000
PARTS = 4
BATCH = 2_000
"""Accesses between two looks at records and deadlines."""
COUNTS = (1, 2, 3, 8, 16, 30, 64, 513)
"""Loads or stores of a REP."""
INTERESTING = (0, 1, 2, 4, 6, 0x20, 0x80, 0x86, 0xA0, 0xEC, 0xFF, 0x100, 0x8000, 0x8000_0000, 0xFFFF_FFFF)


def attach_empty_drives(board: Board) -> None:
    """Controllers without drives; drives have tests of their own."""
    attach_storage(board, [None] * 4, [None])


def make() -> Machine:
    config = MachineConfig(
        memory_bytes=16 * MIB,
        firmware=Firmware(bytes(256 << 10)),
        attach=[attach_empty_drives, attach_display, attach_watchdog],
        virtual_time=(1, 1),
    )
    return Machine(config, select.create("interpret"))


class Chaos:
    """A guest without sense."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self.random = random.Random(seed)
        self.config_registers = [slot << 11 | function << 8 for slot in range(5) for function in (0, 1, 3)]

    def value(self, size: int) -> int:
        if self.random.random() < 0.5:
            return self.random.choice(INTERESTING) & (1 << 8 * size) - 1
        return self.random.getrandbits(8 * size)

    def ports(self) -> list[tuple[int, int]]:
        """(port, count) of everything that answers now."""
        return [(r.base, r.length) for r in self.machine.ports.ranges]

    def places(self) -> list[tuple[int, int]]:
        return [(r.base, r.length) for r in self.machine.mmio.ranges]

    def configure(self) -> None:
        """A store to configuration space that often hits BARs, commands, PAM and routes."""
        register = self.random.choice([0x04, 0x10, 0x14, 0x18, 0x20, 0x3C, 0x40, 0x58, 0x5C, 0x60, 0x68])
        if self.random.random() < 0.2:
            register = self.random.randrange(0, 256, 4)
        address = 1 << 31 | self.random.choice(self.config_registers) | register
        self.machine.ports.write(0xCF8, 4, address)
        size = self.random.choice([1, 2, 4])
        self.machine.ports.write(0xCFC + self.random.randrange(0, 4, size), size, self.value(size))

    def step(self, ports: list[tuple[int, int]], places: list[tuple[int, int]]) -> None:
        bus, targets, sizes = self.machine.ports, ports, (1, 1, 1, 2, 4)
        choice = self.random.random()
        if choice < 0.05:
            self.configure()
            return
        if choice < 0.3:
            bus, targets, sizes = self.machine.mmio, places, (1, 2, 4, 4, 8)
        size = self.random.choice(sizes)
        base, length = self.random.choice(targets)
        address = base + self.random.randrange(length)
        if choice < 0.6:
            assert 0 <= bus.read(address, size) < 1 << 8 * size
        elif choice < 0.98:
            bus.write(address, size, self.value(size))
        elif choice < 0.99:
            count = self.random.choice(COUNTS)
            assert len(bus.read_block(address, size, count)) == size * count
        else:
            bus.write_block(address, size, self.random.randbytes(size * self.random.choice(COUNTS)))

    def look(self) -> None:
        """Time passes, records are whole; a power-off or a reset is what it is."""
        machine = self.machine
        machine.vcpu.set_now_ns(machine.vcpu.now_ns() + self.random.choice([1, 1000, 10**6, 10**9]))
        now = machine.vcpu.now_ns()
        for part in machine._timed:
            for _ in range(100):
                deadline = part.deadline()
                if deadline is None or deadline > now:
                    break
                part.advance(now)
        records = machine.device_states()
        machine.restore_device_states(records)
        machine.outcome = None
        if self.random.random() < 0.1:
            for device in machine.devices:
                device.reset()

    def run(self, accesses: int) -> None:
        for done in range(accesses):
            if done % BATCH == 0:
                self.look()
                ports, places = self.ports(), self.places()
            self.step(ports, places)


@pytest.fixture
def machine() -> Machine:
    return make()


def test_random_accesses(machine: Machine) -> None:
    Chaos(machine, 1).run(FAST)


@pytest.mark.soak
@pytest.mark.parametrize("part", range(PARTS))
def test_ten_million_random_accesses(machine: Machine, part: int) -> None:
    round_ = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
    Chaos(machine, 1000 + PARTS * round_ + part).run(SOAK // PARTS)


def test_every_port_answers(machine: Machine) -> None:
    for port in range(0x1_0000):
        assert 0 <= machine.ports.read(port, 1) <= 0xFF
