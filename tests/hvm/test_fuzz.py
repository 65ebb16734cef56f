"""Random accesses to the registers of each device: nothing raises, nothing hangs, records stay good.

The fast part makes 100,000 accesses to each, the soak part ten million in every round, each with another seed. The
drives' controllers, the display adapter, and the keyboard's have as many in tests of their own, with commands: here
they get fewer.
"""

import os
import random
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Final

import pytest

from nonroot.devices.floppy import FloppyController
from nonroot.devices.fw_cfg import DMA_HIGH, DMA_LOW, FwCfg
from nonroot.devices.i6300esb import I6300Esb
from nonroot.devices.ide import PiixIde
from nonroot.devices.pci_device import PciConnection
from nonroot.devices.ps2 import Ps2Controller
from nonroot.devices.vga import Vga
from nonroot.devices.virtio_fs import VirtioFs
from nonroot.devices.virtio_pci import VirtioPci
from nonroot.devices.virtqueue import SplitQueue, VirtqueueError
from nonroot.hvm.device import BlockDevice, Device
from nonroot.hvm.pci import PciHost
from tests.hvm.makers import KINDS, Outside
from tests.hvm.test_contract import pass_time, poke
from tests.storage.parts import FakeMemory

SEED: Final = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
FAST: Final = 100_000
FEW: Final = 20_000
SOAK: Final = 10_000_000
BATCH: Final = 2_000
"""Accesses between two looks at records."""
CHOICES: Final = 1024
"""Entries of the tables from which places and values are taken: what happens for each access is little more than it."""
_STEP: Final = struct.Struct("<BHI")
"""What to do, where (ten bits) and with which kind of value (the top bit), a number."""

COMMON: Final = (
    *(0x00, 0x01, 0x02, 0x03, 0x04, 0x08, 0x0A, 0x0B, 0x0C, 0x10, 0x11, 0x13, 0x20, 0x30, 0x34, 0x3F, 0x40, 0x60, 0x68),
    *(0x6A, 0x80, 0x83, 0x86, 0xA0, 0xB4, 0xC0, 0xC7, 0xD0, 0xD1, 0xE0, 0xFE, 0xFF, 0x2000, 0x2001, 0x3C00, 0x8000),
    *(0xFFFF, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF),
)
"""Values that mean something to many devices, taken for half of all stores."""
SPECIAL: Final[dict[type, tuple[int, ...]]] = {
    PciHost: tuple(1 << 31 | function << 8 | register for function in range(4) for register in range(0, 256, 4)),
    FwCfg: (0, 1, 5, 0x19, 0x20, 0x21, 0x22, 0x4000, 0x8019),
    I6300Esb: (0x80, 0x86, 0x100, 0x300),
}
OWN_TESTS: Final = (PiixIde, FloppyController, Vga, Ps2Controller)
"""Have such tests of their own, fast and soak."""
ALL: Final = sorted(KINDS, key=lambda kind: kind.__name__)


class Quiet(Outside):
    """Counts what it hears, rather than remember it."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: Counter[str] = Counter()

    def event(self, device: str, name: str, detail: int) -> None:
        self.heard[name] += 1

    def call(self, *arguments: object) -> None:
        self.heard["call"] += 1


class Emptying:
    """Behind a virtio device: gives every request back at once, with zeros."""

    def __init__(self, device: VirtioPci) -> None:
        self.device = device
        self.queues: Sequence[SplitQueue | None] = ()

    def started(self, queues: Sequence[SplitQueue | None]) -> None:
        self.queues = queues

    def stopped(self) -> None:
        self.queues = ()

    def notified(self, queue: int) -> None:
        taken = self.queues[queue]
        if taken is None:
            return
        try:
            for _ in range(min(taken.pending(), 8)):
                chain = taken.take()
                taken.give_back(chain, taken.write(chain, memoryview(bytes(64))))
        except VirtqueueError:
            self.device.fail()
        if taken.publish():
            self.device.interrupt()


class Hammer:
    """A guest without sense that knows one device."""

    def __init__(self, device_type: type, seed: int) -> None:
        self.kind = KINDS[device_type]
        self.outside = Quiet()
        self.memory = FakeMemory(bytearray(1 << 16))
        self.device: Device = self.kind.make(self.outside)
        if device_type is FwCfg:
            files = {"etc/one": bytes(range(200)), "two": b""}
            self.device = FwCfg({5: b"\1\0"}, files, PciConnection(dma=self.memory).dma, self.outside.event)
        if device_type is VirtioFs:
            connection = PciConnection(irq=self.outside.irq, dma=self.memory)
            self.device = VirtioFs("tag", 0, connection, self.outside.event)
            self.device.backend = Emptying(self.device)
        self.blocks = self.device if isinstance(self.device, BlockDevice) else None
        self.random = random.Random(f"{device_type.__name__} {seed}")
        values = COMMON + SPECIAL.get(device_type, ()) * 4
        self.values = [values[index % len(values)] for index in range(CHOICES)]
        self.places = self.random_places()

    def random_places(self) -> list[tuple[int, int, int]]:
        """(offset, size, all ones of that size), every size at every offset if there are not too many."""
        kind = self.kind
        offsets = [(offset, size) for size in kind.sizes for offset in range(kind.length - size + 1)]
        offsets += [(offset, size) for size in kind.sizes for offset in kind.further]
        places = [(offset, size, (1 << 8 * size) - 1) for offset, size in offsets]
        self.random.shuffle(places)
        return [places[index % len(places)] for index in range(CHOICES)]

    def batch(self) -> None:
        """:data:`BATCH` accesses."""
        device, places, values = self.device, self.places, self.values
        read, write = device.read, device.write
        for what, choice, number in _STEP.iter_unpack(self.random.randbytes(_STEP.size * BATCH)):
            offset, size, ones = places[choice & 0x3FF]
            if what < 112:
                assert 0 <= read(offset, size) <= ones
            elif what < 244:
                write(offset, size, (number if choice & 0x8000 else values[number & 0x3FF]) & ones)
            elif what < 247:
                pass_time(device, self.outside, number >> (choice >> 10 & 0x1F))
            elif what < 250:
                poke(device, number)
            elif what < 253:
                self.block(offset, size, number)
            elif isinstance(device, FwCfg):
                self.command(number)
            elif isinstance(device, VirtioFs):
                self.drive(device, number)

    def block(self, offset: int, size: int, number: int) -> None:
        """REP INS or REP OUTS."""
        if self.blocks is None:
            return
        count = number % (300 if number & 0x70_0000 == 0 else 30)
        if number & 1 << 31:
            assert len(self.blocks.read_block(offset, size, count)) == size * count
        else:
            self.blocks.write_block(offset, size, self.random.randbytes(size * count))

    def command(self, number: int) -> None:
        """A command of the firmware configuration device by DMA, most often to memory that is there."""
        chance = self.random
        control = (chance.choice(self.values) & 0xFFFF) << 16 | number & 0x1F
        length = chance.choice((0, 1, 16, 300, 0x1_0001, 1 << 24, 0xFFFF_FFFF)) if number & 0x700 else number >> 24
        target = chance.choice((number & 0xFFFF, number, (1 << 64) - 8))
        place = number >> 8 & 0xFFFF
        self.memory.write(place, struct.pack(">IIQ", control, length, target))
        high = 0 if number & 0x8000_0000 else chance.choice((0, 1, 0xFFFF_FFFF))
        self.device.write(DMA_HIGH, 4, int.from_bytes(high.to_bytes(4, "big"), "little"))
        self.device.write(DMA_LOW, 4, int.from_bytes(place.to_bytes(4, "big"), "little"))

    def drive(self, device: VirtioFs, number: int) -> None:
        """Sets the device up, its queues in memory that holds anything, and says that there is something."""
        chance = self.random
        self.memory.write(0, chance.randbytes(0x1000))
        features = ((0x00, 4, 1), (0x08, 4, 1), (0x0C, 4, 1), (0x14, 1, 0x0F))
        for register, size, value in ((0x14, 1, 0), (0x14, 1, 3), *features[:3], (0x14, 1, 0x0B)):
            device.write(register, size, value)
        for queue in range(3):
            entries = 1 << chance.randrange(9)
            for register, size, value in ((0x16, 2, queue), (0x18, 2, entries), (0x1C, 2, 1)):
                if register == 0x1C:
                    for place in (0x20, 0x28, 0x30):
                        device.write(place, 8, chance.choice((0, chance.randrange(0x1000), number, number << 32)))
                device.write(register, size, value)
        device.write(*features[3])
        for queue in range(2):
            available = device.state().driver[queue]
            self.memory.write(available + 2 & 0xFFFF, bytes((chance.randrange(4), 0)))
            device.write(0x3000 + 4 * queue, 2, queue)

    def look(self) -> None:
        """Its record is whole, and taken again without a change; sometimes it is reset; other places from now on."""
        record = self.device.state()
        packed = record.pack()
        self.device.from_state(type(record).unpack(packed))
        assert self.device.state().pack() == packed
        self.outside.sent.clear()
        if self.random.random() < 0.1:
            self.device.reset()
        self.places = self.random_places()

    def run(self, accesses: int) -> None:
        for _ in range(0, accesses, BATCH):
            self.batch()
            self.look()


@pytest.mark.parametrize("device_type", ALL, ids=lambda kind: kind.__name__)
def test_random_accesses(device_type: type) -> None:
    Hammer(device_type, 1).run(FEW if device_type in OWN_TESTS else FAST)


@pytest.mark.soak
@pytest.mark.parametrize("device_type", [kind for kind in ALL if kind not in OWN_TESTS], ids=lambda kind: kind.__name__)
def test_ten_million_random_accesses(device_type: type) -> None:
    Hammer(device_type, 1000 + SEED).run(SOAK)
