"""Random accesses to the storage devices, and random commands: nothing raises, nothing hangs, records stay good.

The seed is the soak round's number, so that every round is another and can be repeated.
"""

import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.devices.block import SECTOR
from nonroot.devices.dma8237 import Dma8237
from nonroot.devices.floppy import FloppyController
from nonroot.devices.floppy_state import FloppyState
from nonroot.devices.ide import PiixIde
from nonroot.devices.ide_record import IdeState
from nonroot.hvm.clock import ManualClock
from nonroot.hvm.device import Device, TimedDevice
from tests.storage.parts import FakeMemory, RamPort, make_ide, pattern

SEED = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
FAST = 100_000
LONG = 10_000_000
INTERESTING = (0x00, 0x01, 0x02, 0x04, 0x08, 0x10, 0x40, 0x80, 0x9, 0xFF, 0xE0, 0xF0, 0xA0)
ATA = (
    0x20,
    0x24,
    0x25,
    0x29,
    0x30,
    0x34,
    0x35,
    0x39,
    0x40,
    0xC4,
    0xC5,
    0xC6,
    0xC8,
    0xCA,
    0xE7,
    0xEC,
    0xEF,
    0xA0,
    0xA1,
    0x08,
    0x90,
)
PACKETS = (
    0x00,
    0x03,
    0x12,
    0x1B,
    0x1E,
    0x23,
    0x25,
    0x28,
    0x2B,
    0x42,
    0x43,
    0x46,
    0x4A,
    0x51,
    0x52,
    0x5A,
    0xA8,
    0xAD,
    0xBD,
    0xBE,
)


def ide(clock: ManualClock) -> PiixIde:
    memory = FakeMemory(bytearray(random.Random(SEED).randbytes(1 << 20)))
    return make_ide(clock, lambda level: None, lambda *event: None, memory, keeps_writes=True)


def floppy(clock: ManualClock) -> tuple[FloppyController, Dma8237]:
    dma = Dma8237(FakeMemory(bytearray(1 << 20)))
    port = RamPort(clock, pattern(2880 * SECTOR))
    return FloppyController([port, None], lambda level: None, dma, clock), dma


def pass_time(device: Device, clock: ManualClock) -> None:
    assert isinstance(device, TimedDevice)
    deadline = device.deadline()
    if deadline is not None:
        clock.time_ns = max(clock.time_ns, deadline)
        device.advance(clock.time_ns)


def hammer_ide(count: int, seed: int) -> None:
    """Random accesses, half of them in the shape of commands."""
    chance = random.Random(seed)
    clock = ManualClock()
    device = ide(clock)
    done = 0
    while done < count:
        kind = chance.random()
        base = chance.choice((0x00, 0x10))
        if kind < 0.3:
            size = chance.choice((1, 2, 4))
            offset = chance.randrange(0x30 - size + 1)
            if chance.random() < 0.5:
                assert 0 <= device.read(offset, size) < 1 << 8 * size
            else:
                device.write(offset, size, chance.choice(INTERESTING) if size == 1 else chance.getrandbits(8 * size))
            done += 1
        elif kind < 0.5:
            for register in range(1, 6):
                device.write(base + register, 1, chance.choice((0, 1, 2, 16, chance.randrange(256))))
            device.write(base + 6, 1, chance.choice((0x40, 0x50, 0x00, 0x10)))
            device.write(base + 7, 1, chance.choice(ATA) if chance.random() < 0.9 else chance.randrange(256))
            done += 7
        elif kind < 0.6:
            packet = bytes(
                (chance.choice(PACKETS), *(chance.choice((0, 0, 1, 2, chance.randrange(256))) for _ in range(11)))
            )
            for register, value in ((1, chance.randrange(2)), (4, chance.randrange(256)), (5, chance.randrange(9))):
                device.write(base + register, 1, value)
            device.write(base + 7, 1, 0xA0)
            device.write_block(base, 2, packet)
            done += 5
        elif kind < 0.7:
            words = chance.choice((1, 6, 256, 257, 4096))
            assert len(device.read_block(base, 2, words)) == 2 * words
            done += 1
        elif kind < 0.78:
            device.write_block(base, 2, bytes(2 * chance.choice((1, 6, 256, 2048))))
            done += 1
        elif kind < 0.88:
            device.write(0x24 + base // 2, 4, chance.randrange(1 << 20))
            device.write(0x20 + base // 2, 1, 0)
            device.write(0x20 + base // 2, 1, chance.choice((1, 9)))
            done += 3
        elif kind < 0.97:
            pass_time(device, clock)
        elif kind < 0.98:
            device.write(base + 8, 1, chance.choice((4, 0, 2, 0x80)))
            device.write(base + 8, 1, 0)
            done += 2
        elif kind < 0.985 and chance.random() < 0.1:
            record = device.state().pack()
            device.from_state(IdeState.unpack(record))
            assert device.state().pack() == record
        else:
            device.eject(2, force=chance.random() < 0.5)
            device.insert(2, RamPort(clock, pattern(50 * 2048, 3), read_only=True))


def hammer_floppy(count: int, seed: int) -> None:
    """Random accesses and commands, the DMA controller's among them."""
    chance = random.Random(seed)
    clock = ManualClock()
    device, dma = floppy(clock)
    for number in range(count):
        kind = chance.random()
        if kind < 0.15:
            assert 0 <= device.read(chance.randrange(8), 1) < 256
        elif kind < 0.3:
            offset = chance.randrange(0x40)
            if chance.random() < 0.4:
                assert 0 <= dma.read(offset, 1) < 256
            else:
                dma.write(offset, 1, chance.choice((2, 0x46, 0x4A, 0x06, 0x0A, 0, 0xFF, chance.randrange(256))))
        elif kind < 0.7:
            device.write(
                5, 1, chance.choice((0xE6, 0xC5, 0x4D, 0x07, 0x08, 0x0F, 0x4A, 0, 0, 1, 2, 18, 0xFF, 0x13, 0x94))
            )
        elif kind < 0.75:
            device.write(
                chance.choice((2, 2, 3, 4, 7)), 1, chance.choice((0x0C, 0x1C, 0x1C, 0x00, chance.randrange(256)))
            )
        elif kind < 0.8:
            pass_time(device, clock)
        elif kind < 0.99:
            device.read(5, 1)
        elif number % 10 == 0:
            record = device.state().pack()
            device.from_state(FloppyState.unpack(record))
            assert device.state().pack() == record
            dma.from_state(dma.state())


def test_random_accesses_to_ide() -> None:
    hammer_ide(FAST, SEED)


def test_random_accesses_to_the_floppy() -> None:
    hammer_floppy(FAST, SEED)


@pytest.mark.soak
def test_many_random_accesses_to_ide() -> None:
    hammer_ide(LONG, SEED)


@pytest.mark.soak
def test_many_random_accesses_to_the_floppy() -> None:
    hammer_floppy(LONG, SEED)


packets = st.builds(
    lambda opcode, rest: bytes((opcode, *rest)), st.integers(0, 255), st.binary(min_size=11, max_size=11)
)


@settings(max_examples=100, deadline=None)
@given(packets=st.lists(packets, min_size=1, max_size=6), limit=st.integers(0, 0xFFFF), dma=st.booleans())
def test_any_packet_ends(packets: list[bytes], limit: int, dma: bool) -> None:
    """Every packet command ends in a state in which the next can be given, whatever it says."""
    clock = ManualClock()
    device = ide(clock)
    base = 0x10
    for packet in packets:
        device.write(base + 6, 1, 0)
        for register, value in ((1, int(dma)), (4, limit & 0xFF), (5, limit >> 8)):
            device.write(base + register, 1, value)
        device.write(base + 7, 1, 0xA0)
        device.write_block(base, 2, packet)
        device.write(0x2C, 4, 0x2000)
        device.write(0x28, 1, 9)
        for _ in range(5000):
            status = device.read(base + 7, 1)
            if status & 0x80:
                pass_time(device, clock)
            elif status & 0x08 and not dma:
                device.read_block(base, 2, 4096)
            else:
                break
        device.write(0x28, 1, 0)
        assert not status & 0x80
        if status & 0x08:  # the bus master's table was too short, or no table
            assert dma
            device.write(base + 8, 1, 4)
            device.write(base + 8, 1, 0)
        else:
            assert status & 0x40


tasks = st.tuples(st.integers(0, 255), st.integers(0, 3000), st.integers(0, 300), st.integers(0, 255), st.booleans())


@settings(max_examples=100, deadline=None)
@given(tasks=st.lists(tasks, min_size=1, max_size=5))
def test_any_command_ends(tasks: list[tuple[int, int, int, int, bool]]) -> None:
    """Every ATA command ends, and a disk still answers IDENTIFY after it."""
    clock = ManualClock()
    device = ide(clock)
    for opcode, lba, count, features, second in tasks:
        device.write(6, 1, 0x50 if second else 0x40)
        for register, value in ((1, features), (2, count), (3, lba), (4, lba >> 8), (5, 0)):
            device.write(register, 1, value & 0xFF)
        device.write(7, 1, opcode)
        device.write(0x24, 4, 0x2000)
        for _ in range(3000):
            status = device.read(7, 1)
            if status & 0x80:
                pass_time(device, clock)
            elif status & 0x08:
                before = device.read_block(0, 2, 4096)
                device.write_block(0, 2, before)
                if device.read(7, 1) & 0x08 and device.deadline() is None and device.state().phase[0] == 4:
                    break  # waits for the bus master
            else:
                break
        device.write(8, 1, 4)
        device.write(8, 1, 0)
        device.write(6, 1, 0x50 if second else 0x40)
        device.write(7, 1, 0xEC)
        assert device.read(7, 1) & 0x08
        assert sum(device.read_block(0, 2, 256)) & 0xFF == 0
