"""The machine with the real engine: small guests, every outcome, time, threads, records."""

import gc
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from nonroot import _engine
from nonroot.boot.errors import BootError
from nonroot.engines import select
from nonroot.engines.exits import PortIo
from nonroot.engines.native import InterpretEngine
from nonroot.errors import BadOptionError
from nonroot.hvm.device import StateError
from nonroot.hvm.dispatch import PORT_ACCESS_NS
from nonroot.hvm.machine import Machine, MachineConfig, Outcome, Outputs, Reason
from tests.hvm import guests
from tests.hvm.guests import HALT, POWER_OFF, SPIN, mov_edx, out8, out16, out32, pvh, say
from tests.waiting import PATIENCE

MIB = 1 << 20
SECOND = 10**9


class Output:
    """What a guest has said."""

    def __init__(self) -> None:
        self.console = [bytearray() for _ in range(4)]
        self.agent = bytearray()
        self.debug = bytearray()
        self.heard = threading.Condition()

    def outputs(self) -> Outputs:
        return Outputs(self._console, self._agent, debug=self.debug.extend)

    def _console(self, number: int, data: bytes) -> None:
        with self.heard:
            self.console[number] += data
            self.heard.notify_all()

    def _agent(self, data: bytes) -> None:
        with self.heard:
            self.agent += data
            self.heard.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.heard:
            assert self.heard.wait_for(condition, 30), bytes(self.console[0])


def make(code: bytes, data: bytes = b"", output: Output | None = None, **options: Any) -> Machine:
    config = MachineConfig(memory_bytes=16 * MIB, kernel=pvh(code, data))
    return Machine(
        replace(config, **options),
        InterpretEngine(),
        (output or Output()).outputs(),
    )


def run(machine: Machine) -> Outcome:
    """Run with a time limit, so that a test that fails does not hang."""
    timer = threading.Timer(PATIENCE, machine.stop)
    timer.start()
    try:
        return machine.run()
    finally:
        timer.cancel()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (POWER_OFF + HALT, Reason.POWER_OFF),
        (out8(0xCF9, 0x06) + HALT, Reason.RESET),
        (out8(0x64, 0xFE) + HALT, Reason.RESET),
        (out8(0x92, 0x03) + HALT, Reason.RESET),
        (guests.TRIPLE_FAULT, Reason.TRIPLE_FAULT),
    ],
)
def test_outcomes(code: bytes, reason: Reason) -> None:
    assert run(make(code)).reason == reason


def test_console_and_debug_output() -> None:
    output = Output()
    code = say(b"hello\nwor") + out8(0x2F8, 0x42) + out8(0xE9, 0x21) + say(b"ld") + POWER_OFF
    assert run(make(code, output=output)).reason == Reason.POWER_OFF
    assert bytes(output.console[0]) == b"hello\nworld"
    assert (bytes(output.console[1]), bytes(output.debug)) == (b"B", b"!")


def test_statistics_count_exits_and_events() -> None:
    machine = make(say(b"abc") + out8(0x1234, 1) + POWER_OFF)
    run(machine)
    assert machine.statistics() == {"exit.PortIo": 5, "event.port.floating-write": 1}


def test_stop_from_another_thread_and_run_on() -> None:
    machine = make(SPIN)
    threading.Timer(0.05, machine.stop).start()
    assert run(machine).reason == Reason.STOPPED
    before = machine.vcpu.retired()
    while machine.vcpu.retired() == before:  # a busy machine may come to it only after the stop
        threading.Timer(0.05, machine.stop).start()
        assert run(machine).reason == Reason.STOPPED


def test_stop_wakes_a_halted_guest() -> None:
    machine = make(HALT)
    threading.Timer(0.05, machine.stop).start()
    began = time.monotonic()
    assert run(machine).reason == Reason.STOPPED
    assert time.monotonic() - began < 10


def test_stop_before_run() -> None:
    machine = make(SPIN)
    machine.stop()
    assert run(machine).reason == Reason.STOPPED


@pytest.mark.parametrize("limit", [1, 2, 1000, 123_457])
def test_limit_is_exact(limit: int) -> None:
    machine = make(SPIN)
    assert machine.run(limit).reason == Reason.STOPPED
    assert machine.vcpu.retired() == limit


def test_limit_in_the_middle_of_output() -> None:
    whole = Output()
    machine = make(say(b"0123456789") + POWER_OFF, output=whole)
    steps = 0
    while (outcome := machine.run(machine.vcpu.retired() + 1)).reason == Reason.STOPPED:
        steps += 1
    assert outcome.reason == Reason.POWER_OFF
    assert bytes(whole.console[0]) == b"0123456789"
    assert steps >= 30


def test_pause_stops_the_guest_and_its_time() -> None:
    machine = make(SPIN)
    thread = threading.Thread(target=machine.run)
    thread.start()
    try:
        machine.pause()
        stands = threading.Event()
        machine.post(stands.set)
        assert stands.wait(30)
        time.sleep(0.05)
        began = time.monotonic_ns()
        now, retired = machine.vcpu.now_ns(), machine.vcpu.retired()
        time.sleep(0.3)
        assert machine.vcpu.retired() == retired
        asked = threading.Event()
        machine.post(asked.set)
        machine.resume()
        assert asked.wait(30)
        passed = machine.vcpu.now_ns() - now
        assert passed < time.monotonic_ns() - began - 0.29 * SECOND
    finally:
        machine.stop()
        thread.join(30)
    with pytest.raises(RuntimeError):
        machine.resume()


def test_stop_ends_a_pause() -> None:
    machine = make(SPIN)
    machine.pause()
    thread = threading.Thread(target=machine.run)
    thread.start()
    machine.stop()
    thread.join(30)
    assert not thread.is_alive()


# LSR until data, RBR, THR; "q" powers off.
ECHO = (
    mov_edx(0x3FD)
    + b"\xec\xa8\x01\x74\xf6"  # again: in al,dx; test al,1; jz to the mov
    + mov_edx(0x3F8)
    + b"\xec\x3c\x71\x74\x03\xee\xeb\xe9"  # in al,dx; cmp al,'q'; je +3; out dx,al; jmp to the start
    + POWER_OFF
)


def test_console_input_arrives_whole_and_in_order() -> None:
    output = Output()
    machine = make(ECHO, output=output)
    text = bytes(range(32, 112)) * 20

    def type_all() -> None:
        for start in range(0, len(text), 77):
            machine.console_input(text[start : start + 77])
        machine.console_input(b"q")

    thread = threading.Thread(target=type_all)
    thread.start()
    assert run(machine).reason == Reason.POWER_OFF
    thread.join()
    assert bytes(output.console[0]) == text
    assert machine.console_backlog(0) == 0


# REP OUTSB of 5 bytes at DATA, wait for 5 bytes, REP INSB them to DATA + 0x100, send them back.
AGENT = (
    b"\xfc"
    + mov_edx(0x6E0)
    + b"\xbe"
    + guests.DATA.to_bytes(4, "little")
    + b"\xb9\x05\x00\x00\x00\xf3\x6e"
    + mov_edx(0x6E4)
    + b"\xed\x83\xf8\x05\x75\xfa"  # in eax,dx; cmp eax,5; jne back
    + mov_edx(0x6E0)
    + b"\xbf"
    + (guests.DATA + 0x100).to_bytes(4, "little")
    + b"\xb9\x05\x00\x00\x00\xf3\x6c"
    + b"\xbe"
    + (guests.DATA + 0x100).to_bytes(4, "little")
    + b"\xb9\x05\x00\x00\x00\xf3\x6e"
    + POWER_OFF
)


def test_agent_channel_moves_blocks() -> None:
    output = Output()
    machine = make(AGENT, b"HELLO", output=output)
    machine.agent_input(b"wo")
    machine.agent_input(b"rld")
    assert machine.agent_backlog() in (0, 2, 5)
    assert run(machine).reason == Reason.POWER_OFF
    assert bytes(output.agent) == b"HELLOworld"
    assert machine.agent_backlog() == 0
    assert machine.exit_counts[type_of_port_io()] < 100_000


def type_of_port_io() -> type:
    from nonroot.engines.exits import PortIo

    return PortIo


def test_agent_input_rings_the_doorbell_once() -> None:
    machine = make(SPIN)
    machine.agent_input(b"one")
    machine.agent_input(b"two")
    machine.stop()
    run(machine)
    assert machine.uarts[1].state().received == b"\x07"


def test_without_agent_its_ports_float() -> None:
    machine = make(POWER_OFF, agent=False)
    assert machine.ports.read(0x6E8, 4) == 0xFFFF_FFFF
    machine = make(POWER_OFF)
    assert machine.ports.read(0x6E8, 4).to_bytes(4, "little") == b"NRA1"


def test_boards_devices_answer_at_their_ports() -> None:
    machine = make(POWER_OFF, uarts=3)
    machine.ports.write(0x70, 1, 0x0D)
    machine.ports.write(0xCF8, 4, 0x8000_0000)
    answers = {
        0x71: 0x80,
        0x21: 0x00,
        0x3FD: 0x60,
        0x2FD: 0x60,
        0x3ED: 0x60,
        0x2ED: 0xFF,
        0xCFC: 0x86,
        0x604: 0x01,
        0x92: 0x02,
        0x64: 0x10,
    }
    assert {port: machine.ports.read(port, 1) for port in answers} == answers
    assert machine.mmio.read(0xFEC0_0000, 4) == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"uarts": 0}, BadOptionError),
        ({"uarts": 5}, BadOptionError),
        ({"memory_bytes": 1000}, BadOptionError),
        ({"memory_bytes": 4 * MIB, "initrd": bytes(4 * MIB)}, BootError),
        ({"kernel": b""}, BootError),
        ({"protocol": "linux64"}, BootError),
        ({"cmdline": "x" * 5000}, BootError),
        ({"engine_off": frozenset({"gravity"})}, BadOptionError),
    ],
)
def test_what_cannot_be_made_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        make(POWER_OFF, **options)
    assert "\n" not in str(caught.value)


def test_device_records_restore_and_hostile_ones_change_nothing() -> None:
    code = (
        out8(0x3FF, 0x5A)
        + out8(0x80, 0x77)
        + out32(0xCF8, 0x8000_0040)
        + out8(0x43, 0x34)
        + out8(0x40, 0x10)
        + out8(0x40, 0x27)
        + out16(0x602, 0x100)
        + SPIN
    )
    machine = make(code)
    machine.run(100)
    records = machine.device_states()
    other = make(SPIN)
    fresh = other.device_states()
    assert records != fresh
    for broken in (
        {},
        {**records, "extra": b""},
        {**records, "pit": records["pit"][:-1]},
        {**records, "pic": b"x" * 60},
    ):
        with pytest.raises(StateError):
            other.restore_device_states(broken)
        assert other.device_states() == fresh
    other.restore_device_states(records)
    assert other.device_states() == records
    assert other.ports.read(0x3FF, 1) == 0x5A
    assert other.ports.read(0x80, 1) == 0x77


def tiny(output: Output, cmdline: str = "", **options: Any) -> Machine:
    config = MachineConfig(memory_bytes=32 * MIB, kernel=_engine.tiny_guest(), cmdline=cmdline, base_wall_ns=10**18)
    return Machine(replace(config, **options), InterpretEngine(), output.outputs())


@pytest.mark.parametrize(
    "options", [{}, {"scramble_seed": 1}, {"virtual_time": (1, 1)}, {"memory_bytes": 5 << 30}], ids=str
)
def test_built_in_guest_checks_the_machine(options: dict[str, Any]) -> None:
    output = Output()
    outcome = run(tiny(output, **options))
    text = output.console[0].decode()
    assert "self-check passed" in text, text
    assert outcome.reason == Reason.POWER_OFF


def test_virtual_time_runs_are_the_same() -> None:
    runs = []
    for seed in (None, 5):
        output = Output()
        machine = tiny(output, virtual_time=(1, 1), scramble_seed=seed)
        outcome = run(machine)
        runs.append((outcome, machine.vcpu.retired(), machine.vcpu.now_ns(), bytes(output.console[0])))
    assert runs[0] == runs[1]


def run_until_timer_request(machine: Machine) -> None:
    """Run, halted in the end, until the timer has asked for an interrupt."""
    for _ in range(100):  # a busy machine may come to it only after the stop
        threading.Timer(0.1, machine.stop).start()
        assert run(machine).reason == Reason.STOPPED
        if machine.pic.read(0, 1) & 1:
            return
    raise AssertionError("the timer asks for nothing")


# PIT counter 0 in mode 0, one shot of about 27 ms; the guest halts with interrupts off, so nothing wakes it.
ONE_SHOT = out8(0x43, 0x30) + out8(0x40, 0x00) + out8(0x40, 0x80) + HALT


def test_idle_virtual_time_passes_at_once() -> None:
    machine = make(ONE_SHOT, virtual_time=(1, 1))
    run_until_timer_request(machine)
    assert machine.vcpu.now_ns() == pytest.approx(3 * PORT_ACCESS_NS + 32769 * SECOND / 1_193_182, abs=2000)
    assert machine.pic.read(0, 1) & 1


# PIT counter 2 in mode 0, 4096 ticks; the guest looks at port B until it is done, as GRUB does.
POLL_PORT_B = (
    (out8(0x61, 0x01) + out8(0x43, 0xB0) + out8(0x42, 0x00) + out8(0x42, 0x10))
    + bytes.fromhex("e461 a820 74fa")
    + POWER_OFF
)


@pytest.mark.parametrize("engine", sorted(select.ENGINES))
def test_waiting_at_a_port_takes_as_many_accesses_as_on_a_bus(engine: str) -> None:
    config = MachineConfig(memory_bytes=16 * MIB, kernel=pvh(POLL_PORT_B), virtual_time=(1, 1))
    machine = Machine(config, select.create(engine), Output().outputs())
    assert run(machine).reason == Reason.POWER_OFF
    duration = 4097 * SECOND / 1_193_182
    assert machine.vcpu.now_ns() == pytest.approx(4 * PORT_ACCESS_NS + duration, abs=3000)
    # An access and three instructions each time.
    assert machine.exit_counts[PortIo] == pytest.approx(duration / (PORT_ACCESS_NS + 3) + 5, abs=2)
    assert machine.vcpu.retired() == 3 * machine.exit_counts[PortIo]


def test_idle_real_time_is_slept() -> None:
    machine = make(ONE_SHOT)
    gc.collect()  # what tests before have left is not this machine's work
    threading.Timer(1, machine.stop).start()
    used = time.thread_time()
    run(machine)
    assert time.thread_time() - used < 0.3
    assert machine.pic.read(0, 1) & 1


# PIT counter 0 in mode 2, about 1 kHz; the PIC masks it, and the guest halts.
MASKED_TIMER = out8(0x21, 0xFF) + out8(0x43, 0x34) + out8(0x40, 0xA9) + out8(0x40, 0x04) + HALT


def test_a_timer_that_is_masked_wakes_nobody() -> None:
    machine = make(MASKED_TIMER, virtual_time=(1, 1))
    run_until_timer_request(machine)
    assert machine.vcpu.now_ns() < 3_000_000, "if something were due, idle virtual time would pass at once"


def test_garbage_to_every_port_and_register_is_survived() -> None:
    """The built-in guest writes random values to every port but those that end the machine."""
    output = Output()
    machine = tiny(output, "garbage=200000 quiet")
    outcome = run(machine)
    assert outcome.reason in (Reason.POWER_OFF, Reason.RESET), (outcome, bytes(output.console[0][-300:]))
    assert machine.vcpu.retired() > 200_000
