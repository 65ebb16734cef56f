"""Reset ports, the keyboard controller without a keyboard, debug ports and the agent's ports."""

import pytest

from nonroot.hvm.agent_port import CAPACITY, AgentPort
from nonroot.hvm.debug_port import DebugPort
from nonroot.hvm.i8042 import I8042
from nonroot.hvm.reset import ResetControl
from tests.hvm.makers import Outside


@pytest.fixture
def outside() -> Outside:
    return Outside()


@pytest.mark.parametrize("values", [(0x06,), (0x02, 0x06), (0x0E,), (0x04,)])
def test_reset_control_resets_on_a_rising_bit(outside: Outside, values: tuple[int, ...]) -> None:
    reset = ResetControl(outside.call)
    for value in values:
        reset.write(0, 1, value)
    assert outside.calls == [()]
    assert reset.read(0, 1) == values[-1] & 0x0E


def test_reset_control_other_bits_do_nothing(outside: Outside) -> None:
    reset = ResetControl(outside.call)
    reset.write(0, 1, 0xFB)
    assert outside.calls == []
    assert reset.read(0, 1) == 0x0A


def test_port_a(outside: Outside) -> None:
    reset = ResetControl(outside.call)
    assert reset.read(1, 1) == 0x02
    reset.write(1, 1, 0x00)
    assert outside.calls == []
    reset.write(1, 1, 0x01)
    reset.write(1, 1, 0x01)
    assert outside.calls == [()]


@pytest.mark.parametrize(("command", "resets"), [(0xFE, True), (0xF0, True), (0xFF, False), (0xF1, False)])
def test_i8042_pulse(outside: Outside, command: int, resets: bool) -> None:
    keyboard = I8042(outside.call)
    keyboard.write(1, 1, command)
    assert outside.calls == [()] * resets


@pytest.mark.parametrize(("command", "answer"), [(0x20, 0x30), (0xAA, 0x55), (0xAB, 0x01), (0xA9, 0x01), (0xD0, 0x03)])
def test_i8042_answers(outside: Outside, command: int, answer: int) -> None:
    keyboard = I8042(outside.call)
    assert not keyboard.read(1, 1) & 0x01
    keyboard.write(1, 1, command)
    assert keyboard.read(1, 1) & 0x09 == 0x09
    assert keyboard.read(0, 1) == answer
    assert not keyboard.read(1, 1) & 0x01


def test_i8042_mode_and_output_port(outside: Outside) -> None:
    keyboard = I8042(outside.call, outside.event)
    keyboard.write(1, 1, 0x60)
    keyboard.write(0, 1, 0x45)
    keyboard.write(1, 1, 0x20)
    assert keyboard.read(0, 1) == 0x45
    assert keyboard.read(1, 1) & 0x04  # system flag
    keyboard.write(1, 1, 0xD1)
    keyboard.write(0, 1, 0x03)
    assert outside.calls == []
    keyboard.write(1, 1, 0xD1)
    keyboard.write(0, 1, 0x02)
    assert outside.calls == [()]


def test_i8042_has_no_keyboard_behind_it(outside: Outside) -> None:
    keyboard = I8042(outside.call, outside.event)
    keyboard.write(0, 1, 0xFF)
    assert not keyboard.read(1, 1) & 0x01
    keyboard.write(1, 1, 0x77)
    assert outside.events == [("i8042", "no-keyboard", 0xFF), ("i8042", "unknown-command", 0x77)]


def test_debug_ports(outside: Outside) -> None:
    debug = DebugPort(outside.sent.append)
    debug.write(0, 1, 0x42)
    assert (debug.read(0, 1), debug.post_code) == (0x42, 0x42)
    for byte in b"ok":
        debug.write(1, 1, byte)
    assert outside.sent == b"ok"
    assert debug.read(1, 1) == 0xE9


def test_agent_magic_and_count(outside: Outside) -> None:
    agent = AgentPort(outside.sent.extend, outside.call)
    assert agent.read(8, 4).to_bytes(4, "little") == b"NRA1"
    assert agent.read(4, 4) == 0
    assert agent.receive(b"hello") == 5
    assert agent.read(4, 4) == 5


def test_agent_blocks_both_ways(outside: Outside) -> None:
    agent = AgentPort(outside.sent.extend, outside.call)
    agent.write_block(0, 1, b"from the guest")
    agent.write(0, 1, 0x21)
    assert outside.sent == b"from the guest!"
    agent.receive(b"to the guest")
    assert agent.read_block(0, 1, 3) == b"to "
    assert outside.calls == []
    assert agent.read_block(0, 1, 20) == b"the guest" + bytes(11)
    assert outside.calls == [()]
    assert agent.read(0, 1) == 0


def test_agent_buffer_is_bounded(outside: Outside) -> None:
    agent = AgentPort(outside.sent.extend)
    assert agent.receive(bytes(CAPACITY + 100)) == CAPACITY
    assert agent.receive(b"x") == 0
    assert agent.waiting == CAPACITY
    agent.read_block(0, 1, 10)
    assert agent.receive(bytes(100)) == 10


@pytest.mark.parametrize(("offset", "size"), [(4, 1), (8, 2), (2, 1), (11, 1)])
def test_agent_other_registers(outside: Outside, offset: int, size: int) -> None:
    agent = AgentPort(outside.sent.extend, events=outside.event)
    assert agent.read(offset, size) == (1 << 8 * size) - 1
    agent.write(offset, size, 0)
    assert [name for _, name, _ in outside.events] == ["unknown-register", "read-only-register"]
    assert agent.read_block(offset, size, 3) == b"\xff" * 3 * size
    agent.write_block(offset, size, b"abc")
    assert outside.sent == b""
