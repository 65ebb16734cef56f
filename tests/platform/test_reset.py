"""A machine that starts at the reset vector, and starts again when it is reset."""

import threading

import pytest

from nonroot.engines import select
from nonroot.hvm.firmware import Firmware
from nonroot.hvm.machine import Machine, MachineConfig, Outputs
from nonroot.hvm.outcome import Outcome, Reason
from tests.waiting import PATIENCE, wait_until

MIB = 1 << 20
BY_CF9 = bytes.fromhex("baf90c b006 ee")
BY_PORT_92 = bytes.fromhex("b003 e692")
BY_8042 = bytes.fromhex("b0fe e664")
BY_TRIPLE_FAULT = bytes.fromhex("0f011e1005 cc")  # lidt [0x510], which is zero; int3
WAYS = {"cf9": BY_CF9, "port92": BY_PORT_92, "8042": BY_8042, "triple-fault": BY_TRIPLE_FAULT}


def rom(reset: bytes, rounds: int = 3, size: int = 128 << 10) -> bytes:
    """Counts in memory at 0x500, says the count, and resets until it is ``rounds``; then powers off."""
    say = bytes.fromhex("31c0 8ed8 fe060005 baf803 a00005 0430 ee")
    power_off = bytes.fromhex("ba0406 b80034 ef f4")
    again = reset + bytes.fromhex("f4 ebfd")
    check = bytes.fromhex("803e0005") + bytes([rounds]) + b"\x73" + bytes([len(again)])
    code = say + check + again + power_off
    image = bytearray(b"\xff" * size)
    image[-0x1_0000 : -0x1_0000 + len(code)] = code
    image[-16:-11] = bytes.fromhex("ea000000f0")
    return bytes(image)


def machine(image: bytes, said: bytearray, engine: str = "interpret", **options: object) -> Machine:
    config = MachineConfig(memory_bytes=16 * MIB, firmware=Firmware(image), agent=False, **options)  # type: ignore[arg-type]
    return Machine(config, select.create(engine), Outputs(console=lambda number, data: said.extend(data)))


def run(target: Machine) -> Outcome:
    timer = threading.Timer(PATIENCE, target.stop)
    timer.start()
    try:
        return target.run()
    finally:
        timer.cancel()


@pytest.mark.parametrize("engine", sorted(select.ENGINES))
@pytest.mark.parametrize("way", WAYS)
def test_reset_starts_again(way: str, engine: str) -> None:
    said = bytearray()
    target = machine(rom(WAYS[way]), said, engine)
    assert run(target).reason is Reason.POWER_OFF
    assert said == b"123"
    assert target.resets == 2


def test_memory_and_time_go_on_and_devices_do_not() -> None:
    said = bytearray()
    target = machine(rom(BY_CF9, 2), said, virtual_time=(1, 1))
    target.rtc.preset({0x40: 0x77})
    target.uarts[0].write(3, 1, 0x1B)
    assert run(target).reason is Reason.POWER_OFF
    assert target.uarts[0].read(3, 1) == 0
    target.rtc.write(0, 1, 0x40)
    assert target.rtc.read(1, 1) == 0x77
    assert target.memory.read(0x500, 1) == b"\2"
    assert target.vcpu.now_ns() >= target.vcpu.retired() > 20


def test_a_reset_can_end_the_run() -> None:
    target = machine(rom(BY_CF9), bytearray(), reboot=False)
    assert run(target).reason is Reason.RESET
    assert target.resets == 0


def test_the_shadow_is_gone_after_a_reset() -> None:
    target = machine(rom(BY_CF9), bytearray())
    before = target.memory.read(0xF_0000, 16)
    target.pci.write(0, 4, 0x8000_0058)
    target.pci.write(5, 1, 0x30)
    target.memory.write(0xF_0000, bytes(16))
    target.pci.reset()
    assert target.memory.read(0xF_0000, 16) == before


def test_the_reset_button_works_from_another_thread() -> None:
    said = bytearray()
    spin = bytes.fromhex("ebfe")
    target = machine(rom(spin), said)

    def press() -> None:
        wait_until(lambda: said == b"1")
        target.post(target.request_reset)
        wait_until(lambda: said == b"12")
        target.stop()

    threading.Thread(target=press).start()
    assert run(target).reason is Reason.STOPPED
    assert target.resets == 1
    assert said == b"12"


@pytest.mark.parametrize("size", [128, 256, 512, 1024])
def test_sizes_of_roms(size: int) -> None:
    said = bytearray()
    assert run(machine(rom(BY_CF9, 1, size << 10), said)).reason is Reason.POWER_OFF
    assert said == b"1"
