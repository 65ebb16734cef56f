"""The PCI host bridge: configuration mechanism 1 and what is on bus 0."""

import struct

import pytest

from nonroot.hvm.pci import ConfigSpace, PciHost
from tests.hvm.makers import Outside


@pytest.fixture
def pci() -> PciHost:
    return PciHost()


def select(pci: PciHost, slot: int, register: int, function: int = 0, bus: int = 0) -> None:
    pci.write(0, 4, 1 << 31 | bus << 16 | slot << 11 | function << 8 | register & 0xFC)


def config(pci: PciHost, slot: int, register: int, size: int, function: int = 0, bus: int = 0) -> int:
    select(pci, slot, register, function, bus)
    return pci.read(4 + (register & 3), size)


def put(pci: PciHost, slot: int, register: int, size: int, value: int) -> None:
    select(pci, slot, register)
    pci.write(4 + (register & 3), size, value)


@pytest.mark.parametrize(
    ("slot", "identity", "class_code"), [(0, 0x1237_8086, 0x06_00_00_02), (1, 0x7000_8086, 0x06_01_00_00)]
)
def test_bridges(pci: PciHost, slot: int, identity: int, class_code: int) -> None:
    assert config(pci, slot, 0, 4) == identity
    assert config(pci, slot, 8, 4) == class_code
    assert config(pci, slot, 2, 2) == identity >> 16
    assert config(pci, slot, 0x0E, 1) == (0x80 if slot else 0)
    assert config(pci, slot, 0x2C, 4) == 0x1100_1AF4


def test_scan_finds_exactly_two_functions(pci: PciHost) -> None:
    found = [
        (bus, slot, function)
        for bus in (0, 1, 255)
        for slot in range(32)
        for function in range(8)
        if config(pci, slot, 0, 4, function, bus) != 0xFFFF_FFFF
    ]
    assert found == [(0, 0, 0), (0, 1, 0)]


def test_address_register(pci: PciHost) -> None:
    pci.write(0, 4, 0xFFFF_FFFF)
    assert pci.read(0, 4) == 0x80FF_FFFC
    pci.write(0, 4, 0x0000_0000)
    assert pci.read(4, 4) == 0xFFFF_FFFF  # not enabled


@pytest.mark.parametrize(
    ("register", "size", "value"), [(0x00, 4, 0), (0x08, 4, 0), (0x0E, 1, 0xFF), (0x3C, 4, 0xFFFF_FFFF)]
)
@pytest.mark.parametrize("slot", [0, 1])
def test_read_only_registers(pci: PciHost, slot: int, register: int, size: int, value: int) -> None:
    before = config(pci, slot, register, size)
    put(pci, slot, register, size, value)
    assert config(pci, slot, register, size) == before


def test_pam_and_pirq_registers_keep_what_is_written(pci: PciHost) -> None:
    put(pci, 0, 0x59, 1, 0x30)
    put(pci, 0, 0x5A, 2, 0x3333)
    assert config(pci, 0, 0x58, 4) == 0x3333_3000
    put(pci, 1, 0x60, 4, 0x0A0B_0A0B)
    assert config(pci, 1, 0x60, 4) == 0x0A0B_0A0B
    pci.reset()
    assert config(pci, 1, 0x60, 4) == 0x8080_8080


def test_an_access_across_the_data_register_reads_as_ones(pci: PciHost) -> None:
    select(pci, 0, 0)
    assert pci.read(7, 2) == 0xFFFF


def test_further_functions() -> None:
    outside = Outside()
    pci = PciHost(outside.event)
    extra = ConfigSpace({0: (4, 0x1234_5678)}, [(0x40, 4, 0x0000_FFFF)])
    pci.add(3, 2, extra)
    assert config(pci, 3, 0, 4, function=2) == 0x1234_5678
    select(pci, 3, 0x40, function=2)
    pci.write(4, 4, 0xFFFF_FFFF)
    assert pci.read(4, 4) == 0x0000_FFFF
    for slot, function in ((3, 2), (0, 0), (32, 0), (2, 8)):
        with pytest.raises(ValueError, match="taken or does not exist"):
            pci.add(slot, function, extra)
    select(pci, 9, 0)
    pci.write(4, 4, 1)
    assert outside.events[-1][:2] == ("pci-host", "no-function")


def test_state_with_changed_identity_is_refused(pci: PciHost) -> None:
    record = pci.state()
    record.i440fx = struct.pack("<I", 0xDEAD_BEEF) + record.i440fx[4:]
    with pytest.raises(ValueError, match="i440fx"):
        pci.from_state(record)


SMRAM = 0x72


def test_system_management_ram_opens_closes_and_locks() -> None:
    told: list[bool] = []
    pci = PciHost(smram=told.append)

    def write(value: int) -> tuple[int, bool]:
        put(pci, 0, SMRAM, 1, value)
        return config(pci, 0, SMRAM, 1), told[-1]

    assert config(pci, 0, SMRAM, 1) == 0x02
    assert write(0x4A) == (0x4A, True)  # as SeaBIOS opens it
    assert write(0x42) == (0x42, False)  # not enabled at all
    assert write(0x4D) == (0x4A, True)  # the base cannot be chosen
    assert write(0x0A) == (0x0A, False)
    assert write(0x5A) == (0x1A, False)  # locking closes
    assert write(0x4A) == (0x1A, False)
    assert write(0x00) == (0x1A, False)
    assert write(0x20) == (0x3A, False)  # D_CLS alone is not locked
    locked = pci.state()
    pci.reset()
    assert told[-1] is False
    assert write(0x4A) == (0x4A, True)
    pci.from_state(locked)
    assert told[-1] is False
    assert write(0x4A) == (0x1A, False)


def test_state_with_open_and_locked_smram_is_refused(pci: PciHost) -> None:
    record = pci.state()
    data = bytearray(record.i440fx)
    data[SMRAM] = 0x5A
    record.i440fx = bytes(data)
    with pytest.raises(ValueError, match="SMRAM"):
        pci.from_state(record)
