"""The firmware configuration device: items, files, DMA, and garbage."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nonroot.devices.fw_cfg import FwCfg, FwCfgState
from nonroot.hvm.device import StateError

FILES = {"etc/b": b"bee", "a": bytes(range(256)) * 3, "empty": b""}


class Memory:
    """Guest memory of 64 KiB."""

    def __init__(self) -> None:
        self.data = bytearray(1 << 16)

    def read(self, address: int, length: int) -> bytes:
        return bytes(self.data[address : address + length]).ljust(length, b"\xff")

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        if address + len(data) <= len(self.data):
            self.data[address : address + len(data)] = data

    def read_file(self, descriptor: int, offset: int, parts: list[tuple[int, int]]) -> int:
        return 0


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def device(memory: Memory) -> FwCfg:
    return FwCfg({5: b"\x01\x00"}, FILES, memory)


def item(device: FwCfg, key: int, length: int) -> bytes:
    device.write(0, 2, key)
    return device.read_block(1, 1, length)


def directory(device: FwCfg) -> dict[str, tuple[int, int]]:
    (count,) = struct.unpack(">I", item(device, 0x19, 4))
    result = {}
    for _ in range(count):
        size, key, _, name = struct.unpack(">IHH56s", device.read_block(1, 1, 64))
        result[name.rstrip(b"\0").decode()] = (key, size)
    return result


def command(device: FwCfg, memory: Memory, control: int, length: int, target: int, at: int = 0x100) -> int:
    memory.write(at, struct.pack(">IIQ", control, length, target))
    device.write(4, 4, 0)
    device.write(8, 4, int.from_bytes(struct.pack(">I", at), "little"))
    (result,) = struct.unpack(">I", memory.read(at, 4))
    assert isinstance(result, int)
    return result


def test_signature_and_features(device: FwCfg) -> None:
    assert item(device, 0, 4) == b"QEMU"
    assert item(device, 1, 4) == b"\3\0\0\0"
    assert item(device, 5, 4) == b"\1\0\0\0"
    assert device.read(4, 4).to_bytes(4, "little") + device.read(8, 4).to_bytes(4, "little") == b"QEMU CFG"


def test_files_are_found_by_name(device: FwCfg) -> None:
    found = directory(device)
    assert sorted(found) == sorted(FILES)
    for name, (key, size) in found.items():
        assert item(device, key, size) == FILES[name]
        assert device.read(1, 1) == 0  # after the end


def test_bytes_and_blocks_read_the_same(device: FwCfg) -> None:
    key, size = directory(device)["a"]
    device.write(0, 2, key)
    assert bytes(device.read(1, 1) for _ in range(size)) == FILES["a"]


def test_dma(device: FwCfg, memory: Memory) -> None:
    key, size = directory(device)["a"]
    assert command(device, memory, key << 16 | 0b1000 | 0b10, 16, 0x2000) == 0
    assert memory.read(0x2000, 16) == FILES["a"][:16]
    assert command(device, memory, 0b100, 84, 0) == 0
    assert command(device, memory, 0b10, size, 0x3000) == 0
    assert memory.read(0x3000, size) == FILES["a"][100:].ljust(size, b"\0")


@pytest.mark.parametrize("control", [0b1_0000, 0b1_0010])
def test_writing_items_is_refused(device: FwCfg, memory: Memory, control: int) -> None:
    memory.write(0x2000, b"mine")
    assert command(device, memory, control, 4, 0x2000) == 1
    assert memory.read(0x2000, 4) == b"mine"
    assert item(device, 0, 4) == b"QEMU"


def test_transfers_are_bounded(device: FwCfg, memory: Memory) -> None:
    assert command(device, memory, 0b10, 0xFFFF_FFFF, 0x2000) == 1


def test_state_goes_on_in_the_middle(device: FwCfg, memory: Memory) -> None:
    key, _ = directory(device)["a"]
    assert item(device, key, 10) == FILES["a"][:10]
    record = device.state()
    other = FwCfg({5: b"\x01\x00"}, FILES, memory)
    other.from_state(FwCfgState.unpack(record.pack()))
    assert other.read(1, 1) == 10
    for bad in (FwCfgState(key, 10_000, 0), FwCfgState(0x7777, 1, 0), FwCfgState(0, 0, 5)):
        with pytest.raises(StateError):
            other.from_state(bad)


@pytest.mark.parametrize("name", ["", "n" * 56])
def test_names_are_checked(memory: Memory, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        FwCfg({}, {name: b""}, memory)


@given(st.integers(0, 0xFFFF_FFFF), st.integers(0, 0x1_0000), st.integers(0, (1 << 64) - 1))
def test_any_command_ends(control: int, length: int, target: int) -> None:
    memory = Memory()
    device = FwCfg({}, FILES, memory)
    assert command(device, memory, control, length, target) in (0, 1, control)


def test_random_accesses_with_structured_commands(device: FwCfg, memory: Memory) -> None:
    random_ = random.Random(5)
    for _ in range(20_000):
        choice = random_.randrange(6)
        if choice == 0:
            control = random_.choice([0b10, 0b1010, 0b100, 0b1100, 0b10000, random_.getrandbits(32)])
            control |= random_.choice([0, 0x19, 0x20, 0x21, 0x22, 0xFFFF]) << 16
            length = random_.choice([0, 1, 64, 4096, random_.getrandbits(17)])
            command(device, memory, control, length, random_.getrandbits(18), random_.getrandbits(16) & 0xFFF0)
        elif choice == 1:
            device.write(random_.randrange(12), random_.choice([1, 2, 4]), random_.getrandbits(32))
        elif choice == 2:
            assert len(device.read_block(1, 1, random_.randrange(300))) < 300
        else:
            size = random_.choice([1, 2, 4])
            assert 0 <= device.read(random_.randrange(13 - size), size) < 1 << 8 * size
        device.state().check()
