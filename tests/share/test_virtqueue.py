"""The file system device: its registers and queues, with a driver in Python, well-behaved and not."""

import contextlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.devices.virtio_fs import VirtioFs
from nonroot.devices.virtio_pci import (
    ACCESS_CAP,
    ACCESS_DATA,
    CONFIG,
    DRIVER_OK,
    FEATURES_OK,
    ISR,
    NEEDS_RESET,
    NOTIFY,
)
from nonroot.devices.virtqueue import MOST_SEGMENTS, QueuePlace, SplitQueue, VirtqueueError
from tests.share.virtio_driver import RAM, Driver, Ram


class Backend:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.queues: list[SplitQueue | None] = []

    def started(self, queues: object) -> None:
        self.told.append("started")
        self.queues = list(queues)  # type: ignore[call-overload]

    def stopped(self) -> None:
        self.told.append("stopped")

    def notified(self, queue: int) -> None:
        self.told.append(queue)


def test_a_driver_finds_the_device_and_starts_it() -> None:
    driver = Driver("my files")
    backend = driver.device.backend = Backend()
    device = driver.device
    assert device.config_read(0, 4) == 0x105A1AF4
    assert device.config_read(6, 2) & 0x10
    kinds = {}
    at = device.config_read(0x34, 1)
    while at:
        assert device.config_read(at, 1) == 0x09
        kinds[device.config_read(at + 3, 1)] = device.config_read(at + 8, 4)
        at = device.config_read(at + 1, 1)
    assert kinds == {1: 0, 2: NOTIFY, 3: ISR, 4: CONFIG, 5: 0}
    assert driver.config() == struct.pack("<36sI", b"my files", 1)
    assert device.read(18, 2) == 2
    driver.set_up()
    assert backend.told == ["started"]
    device.write(NOTIFY + 4, 2, 1)
    assert backend.told == ["started", 1]
    device.interrupt()
    assert driver.level()
    assert device.read(ISR, 1) == 1
    assert not driver.level()
    device.write(20, 1, 0)
    assert device.read(20, 1) == 0
    assert backend.told[-1] == "stopped"
    device.interrupt()
    assert not driver.level()


def test_features_must_be_agreed_on() -> None:
    device = VirtioFs("a")
    device.write(20, 1, 3)
    device.write(20, 1, 3 | FEATURES_OK)
    assert not device.read(20, 1) & FEATURES_OK
    device.write(20, 1, 3 | DRIVER_OK)
    assert not device.read(20, 1) & DRIVER_OK


def test_the_registers_can_be_reached_through_configuration_space() -> None:
    device = VirtioFs("tag")
    device.config_write(ACCESS_CAP + 8, 4, CONFIG)
    device.config_write(ACCESS_CAP + 12, 4, 4)
    assert device.config_read(ACCESS_DATA, 4) == int.from_bytes(b"tag\0", "little")
    device.config_write(ACCESS_CAP + 8, 4, 20)
    device.config_write(ACCESS_CAP + 12, 4, 1)
    device.config_write(ACCESS_DATA, 1, 1)
    assert device.read(20, 1) == 1


def test_a_record_takes_the_queues_along() -> None:
    driver = Driver()
    driver.device.backend = Backend()
    driver.set_up()
    queue = driver.device.backend.queues[1]
    assert queue is not None
    queue.taken, queue.used = 7, 5
    other = VirtioFs("share0")
    backend = other.backend = Backend()
    other.from_state(type(driver.device.state()).unpack(driver.device.state().pack()))
    restored = backend.queues[1]
    assert restored is not None
    assert (restored.taken, restored.used, restored.place) == (7, 5, queue.place)
    assert other.state() == driver.device.state()


def test_a_broken_driver_has_to_reset() -> None:
    driver = Driver()
    driver.device.backend = Backend()
    driver.set_up()
    driver.device.fail()
    assert driver.device.read(20, 1) & NEEDS_RESET
    assert driver.device.read(ISR, 1) == 2


def memory_queue(size: int = 8) -> tuple[Ram, SplitQueue]:
    class Memory(Ram):
        dma_read = Ram.read
        dma_write = Ram.write

    ram = Memory()
    return ram, SplitQueue(ram, QueuePlace(size, 0x1000, 0x2000, 0x3000))


def offer(ram: Ram, count: int, heads: list[int]) -> None:
    ram.write(0x2002, struct.pack("<H", count) + struct.pack(f"<{len(heads)}H", *heads))


@pytest.mark.parametrize(
    ("descriptors", "sentence"),
    [
        ([(0, 1, 1, 0)], "longer than its table"),
        ([(0, 1, 1, 9)], "no descriptor 9"),
        ([(0, 1, 3, 1), (0, 1, 0, 0)], "after one to write"),
        ([(0x4000, 24, 4, 0)], "a table of descriptors has 24 bytes"),
        ([(0x4000, 0, 4, 0)], "a table of descriptors has 0 bytes"),
        ([(0x4000, 16 * (MOST_SEGMENTS + 1), 4, 0)], "a table of descriptors has"),
        ([(0x4000, 16, 5, 1)], "where none may be"),
    ],
)
def test_chains_that_cannot_be_are_refused(descriptors: list[tuple[int, int, int, int]], sentence: str) -> None:
    ram, queue = memory_queue()
    for index, descriptor in enumerate(descriptors):
        ram.write(0x1000 + 16 * index, struct.pack("<QIHH", *descriptor))
    offer(ram, 1, [0])
    assert queue.pending() == 1
    with pytest.raises(VirtqueueError, match=sentence):
        queue.take()


def test_more_chains_than_fit_are_refused() -> None:
    ram, queue = memory_queue()
    offer(ram, 9, [])
    with pytest.raises(VirtqueueError, match="9 requests in a queue of 8"):
        queue.pending()


def test_an_indirect_table_that_names_itself_is_refused() -> None:
    ram, queue = memory_queue()
    ram.write(0x1000, struct.pack("<QIHH", 0x4000, 32, 4, 0))
    ram.write(0x4000, struct.pack("<QIHH", 0x4000, 32, 4, 0))
    offer(ram, 1, [0])
    with pytest.raises(VirtqueueError, match="where none may be"):
        queue.take()
    ram.write(0x4000, struct.pack("<QIHH", 0, 1, 1, 0) * 2)
    offer(ram, 2, [0, 0])
    with pytest.raises(VirtqueueError, match="longer than its table"):
        queue.take()


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=256), st.binary(max_size=64), st.binary(max_size=256))
def test_random_bytes_in_a_queue_end_in_a_chain_or_an_error(table: bytes, ring: bytes, indirect: bytes) -> None:
    ram, queue = memory_queue()
    ram.write(0x1000, table)
    ram.write(0x2000, ring)
    ram.write(0x4000, indirect)
    with contextlib.suppress(VirtqueueError):
        for _ in range(queue.pending()):
            chain = queue.take()
            assert chain.length >= 0
            assert len(chain.readable) + len(chain.writable) <= MOST_SEGMENTS + 8
            if chain.length < RAM:
                queue.read(chain)
            queue.give_back(chain, queue.write(chain, memoryview(b"answer")))
        queue.publish()
