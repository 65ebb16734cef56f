"""The 8259A pair, by behaviour."""

import pytest

from nonroot.hvm.pic import PicPair
from tests.hvm.makers import Outside

M, MD, S, SD, ME, SE = range(6)


def make(outside: Outside, icw4: int = 0x01, masks: tuple[int, int] = (0, 0)) -> PicPair:
    """A pair as the PC sets it up: vectors 0x20 and 0x28."""
    pic = PicPair(outside.irq, outside.event)
    for command, base, cascade in ((M, 0x20, 4), (S, 0x28, 2)):
        pic.write(command, 1, 0x11)
        for value in (base, cascade, icw4):
            pic.write(command + 1, 1, value)
    pic.write(MD, 1, masks[0])
    pic.write(SD, 1, masks[1])
    return pic


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.mark.parametrize("irq", [irq for irq in range(16) if irq != 2])
def test_each_line_gives_its_vector(outside: Outside, irq: int) -> None:
    pic = make(outside)
    pic.set_line(irq, True)
    assert outside.high()
    assert pic.acknowledge() == 0x20 + irq
    assert not outside.high()


def test_masked_line_waits(outside: Outside) -> None:
    pic = make(outside, masks=(0xFF, 0xFF))
    pic.set_line(4, True)
    assert not outside.high()
    assert pic.read(M, 1) == 1 << 4
    pic.write(MD, 1, 0xEF)
    assert outside.high()
    assert pic.acknowledge() == 0x24


def test_edge_needs_a_new_edge(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(4, True)
    pic.acknowledge()
    pic.write(M, 1, 0x20)
    pic.set_line(4, True)
    assert not outside.high()
    pic.set_line(4, False)
    pic.set_line(4, True)
    assert outside.high()


def test_level_line_requests_again_after_eoi(outside: Outside) -> None:
    pic = make(outside)
    pic.write(SE, 1, 0x02)
    assert pic.read(SE, 1) == 0x02
    pic.set_line(9, True)
    assert pic.acknowledge() == 0x29
    pic.write(S, 1, 0x20)
    pic.write(M, 1, 0x20)
    assert outside.high()
    pic.set_line(9, False)
    assert not outside.high()


def test_elcr_keeps_fixed_edge_lines(outside: Outside) -> None:
    pic = make(outside)
    pic.write(ME, 1, 0xFF)
    pic.write(SE, 1, 0xFF)
    assert (pic.read(ME, 1), pic.read(SE, 1)) == (0xF8, 0xDE)


def test_lower_priority_waits_for_eoi_higher_does_not(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(4, True)
    assert pic.acknowledge() == 0x24
    pic.set_line(5, True)
    assert not outside.high()
    pic.set_line(1, True)
    assert pic.acknowledge() == 0x21
    pic.write(M, 1, 0x0B)
    assert pic.read(M, 1) == 1 << 1 | 1 << 4
    pic.write(M, 1, 0x20)  # non-specific: the highest, 1
    assert pic.read(M, 1) == 1 << 4
    pic.write(M, 1, 0x64)  # specific: 4
    assert pic.read(M, 1) == 0
    assert pic.acknowledge() == 0x25


def test_slave_blocks_its_own_lower_lines_only_until_eoi(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(12, True)
    assert pic.acknowledge() == 0x2C
    pic.set_line(8, True)  # higher on the slave, but the master still serves its input 2
    assert not outside.high()
    pic.write(M, 1, 0x62)
    assert pic.acknowledge() == 0x28


def test_special_fully_nested_master_lets_slave_nest(outside: Outside) -> None:
    pic = make(outside, icw4=0x11)
    pic.set_line(12, True)
    assert pic.acknowledge() == 0x2C
    pic.set_line(8, True)
    assert outside.high()
    assert pic.acknowledge() == 0x28


def test_spurious_interrupts(outside: Outside) -> None:
    pic = make(outside)
    pic.write(ME, 1, 0x20)
    pic.set_line(5, True)
    pic.set_line(5, False)
    assert not outside.high()
    assert pic.acknowledge() == 0x27
    pic.write(M, 1, 0x0B)
    assert pic.read(M, 1) == 0
    assert ("pic", "spurious", 7) in outside.events


def test_spurious_slave_interrupt_is_in_service_on_the_master(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(12, True)
    pic.write(SD, 1, 0xFF)  # masked between request and acknowledge
    assert not outside.high()
    assert pic.acknowledge() == 0x27


def test_auto_eoi(outside: Outside) -> None:
    pic = make(outside, icw4=0x03)
    pic.set_line(3, True)
    assert pic.acknowledge() == 0x23
    pic.write(M, 1, 0x0B)
    assert pic.read(M, 1) == 0


def test_rotation_in_auto_eoi(outside: Outside) -> None:
    pic = make(outside, icw4=0x03)
    pic.write(M, 1, 0x80)
    pic.set_line(0, True)
    pic.set_line(1, True)
    assert pic.acknowledge() == 0x20
    pic.set_line(0, False)
    pic.set_line(0, True)
    assert pic.acknowledge() == 0x21  # 0 is lowest now
    pic.write(M, 1, 0x00)
    assert pic.acknowledge() == 0x20


@pytest.mark.parametrize(("command", "lowest"), [(0xA0, 3), (0xE3, 3), (0xC5, 5)])
def test_priority_rotation(outside: Outside, command: int, lowest: int) -> None:
    pic = make(outside)
    pic.set_line(3, True)
    pic.acknowledge()
    pic.write(M, 1, command)
    pic.write(M, 1, 0x63)
    for line in (lowest, (lowest + 1) & 7):
        if line != 2:
            pic.set_line(line, False)
            pic.set_line(line, True)
    assert pic.acknowledge() == 0x20 + (lowest + 1)


def test_special_mask_mode_lets_lower_lines_in(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(1, True)
    pic.acknowledge()
    pic.set_line(6, True)
    assert not outside.high()
    pic.write(MD, 1, 0x02)
    assert not outside.high()
    pic.write(M, 1, 0x68)
    assert outside.high()
    assert pic.acknowledge() == 0x26
    pic.write(M, 1, 0x48)
    pic.set_line(7, True)
    assert not outside.high()


def test_poll_acknowledges(outside: Outside) -> None:
    pic = make(outside)
    pic.write(M, 1, 0x0C)
    assert pic.read(M, 1) & 0x80 == 0
    pic.set_line(6, True)
    pic.write(M, 1, 0x0C)
    assert pic.read(M, 1) == 0x86
    assert not outside.high()
    pic.write(M, 1, 0x0B)
    assert pic.read(M, 1) == 1 << 6


def test_icw1_clears_and_single_mode_skips_icw3(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(4, True)
    pic.acknowledge()
    pic.write(MD, 1, 0xAA)
    pic.write(M, 1, 0x13)
    pic.write(MD, 1, 0x40)
    pic.write(MD, 1, 0x01)
    assert pic.read(MD, 1) == 0
    pic.write(M, 1, 0x0B)
    assert pic.read(M, 1) == 0
    pic.set_line(4, False)
    pic.set_line(4, True)
    assert pic.acknowledge() == 0x44


def test_icw1_without_icw4(outside: Outside) -> None:
    pic = make(outside, icw4=0x03)
    pic.write(M, 1, 0x10)
    pic.write(MD, 1, 0x20)
    pic.write(MD, 1, 0x04)
    pic.write(MD, 1, 0x55)
    assert pic.read(MD, 1) == 0x55
    pic.set_line(1, True)
    assert pic.acknowledge() == 0x21
    pic.write(M, 1, 0x0B)
    assert pic.read(M, 1) == 1 << 1  # auto-EOI is off again


def test_intr_falls_when_a_level_request_is_withdrawn(outside: Outside) -> None:
    pic = make(outside)
    pic.write(SE, 1, 0x0E)
    pic.set_line(10, True)
    assert outside.high()
    pic.set_line(10, False)
    assert not outside.high()
    assert not pic.pending()


def test_two_slave_requests_are_served_in_turn(outside: Outside) -> None:
    pic = make(outside)
    pic.set_line(8, True)
    pic.set_line(12, True)
    assert pic.acknowledge() == 0x28
    pic.write(S, 1, 0x20)
    pic.write(M, 1, 0x20)
    assert outside.high()
    assert pic.acknowledge() == 0x2C
