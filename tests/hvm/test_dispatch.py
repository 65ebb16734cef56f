"""What is done about each type of exit, from hand-made exits."""

import typing
from dataclasses import dataclass, field
from typing import Any

import pytest

from nonroot.engines import exits
from nonroot.hvm.bus import Bus
from nonroot.hvm.debug_port import DebugPort
from nonroot.hvm.dispatch import HANDLERS, handle_exit
from nonroot.hvm.ioapic import IoApic
from nonroot.hvm.outcome import Outcome, Reason
from nonroot.hvm.pic import PicPair
from nonroot.xen.host import XenHost

Call = tuple[Any, ...]


class Answers:
    """The answering side of a vCPU: remembers what it was told."""

    def __init__(self, identity: int = 0) -> None:
        self.identity = identity
        self.calls: list[Call] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *arguments: self.calls.append((name, *arguments))

    def lapic_matches(self, destination: int, logical: bool) -> bool:
        return destination == self.identity or destination == 0xFF


@dataclass
class Target:
    """The machine as the handlers see it."""

    sent: bytearray = field(default_factory=bytearray)
    outcome: Outcome | None = None
    xen: XenHost | None = None
    waits: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.vcpus: tuple[Any, ...] = (Answers(0), Answers(1), Answers(2))
        self.ports = Bus("port", 16)
        self.mmio = Bus("mmio", 52)
        self.pic = PicPair(lambda level: None)
        self.messages: list[Call] = []
        self.ioapic = IoApic(lambda *message: self.messages.append(message))
        self.debug = DebugPort(self.sent.append)
        self.ports.add(0x80, 1, self.debug)
        self.ports.add(0xE9, 1, self.debug, 1)
        self.mmio.add(0xFEC0_0000, 0x100, self.ioapic, sizes=(4,))

    def idle(self, vcpu: Any) -> None:
        self.waits.append("idle")

    def interrupted(self, vcpu: Any) -> None:
        self.waits.append("interrupted")


CASES: list[tuple[exits.Exit, list[Call], Reason | None]] = [
    (exits.PortIo(0xE9, 1, False, 1, b""), [("complete", b"\xe9")], None),
    (exits.PortIo(0x80, 1, True, 1, b"\x42"), [], None),
    (exits.PortIo(0x1234, 4, False, 1, b""), [("complete", b"\xff\xff\xff\xff")], None),
    (exits.PortIo(0xE9, 1, False, 3, b""), [("complete", b"\xe9\xe9\xe9")], None),
    (exits.PortIo(0xE9, 1, True, 3, b"abc"), [], None),
    (exits.Mmio(0xFEC0_0010, 4, False, b""), [("complete", b"\0\0\0\0")], None),
    (exits.Mmio(0xFEC0_0000, 4, True, b"\x01\0\0\0"), [], None),
    (exits.Mmio(0xD000_0000, 8, False, b""), [("complete", b"\xff" * 8)], None),
    (exits.Mmio(0xD000_0000, 8, True, bytes(8)), [], None),
    (exits.Halt(), [], None),
    (exits.MsrRead(0x1234), [("fail",)], None),
    (exits.MsrWrite(0x1234, 5), [("fail",)], None),
    (exits.Cpuid(0x1234, 0), [("complete", bytes(16))], None),
    (exits.IoapicEoi(0x50), [], None),
    (exits.PicAcknowledge(), [("set_pic_vector", 7)], None),
    (exits.InterruptWindow(), [("request_interrupt_window", False)], None),
    (exits.ExceptionRaised(13, 0, 0), [], Reason.FAILURE),
    (exits.CrWrite(3, 0), [], Reason.FAILURE),
    (exits.Debug(1), [], Reason.FAILURE),
    (exits.TripleFault(), [], Reason.TRIPLE_FAULT),
    (exits.Ipi(0x40, 0, 0, False, False, True, 0), [("signal", 0x40, 0, False)], None),
    (exits.Interrupted(), [], None),
    (exits.Failure("the engine is broken"), [], Reason.FAILURE),
]


@pytest.mark.parametrize(("exit_", "calls", "reason"), CASES, ids=lambda value: type(value).__name__)
def test_each_exit(exit_: exits.Exit, calls: list[Call], reason: Reason | None) -> None:
    target = Target()
    outcome = handle_exit(exit_, target, target.vcpus[0])
    assert target.vcpus[0].calls == calls
    assert (outcome and outcome.reason) == reason
    if reason is not None:
        assert outcome is not None
        assert outcome.detail


def test_every_exit_type_has_a_handler_and_a_case() -> None:
    everything = set(typing.get_args(exits.Exit))
    assert set(HANDLERS) == everything
    assert {type(case[0]) for case in CASES} == everything - {exits.Hypercall}  # below, with a real vCPU


def test_unknown_exit_is_a_failure() -> None:
    target = Target()
    outcome = handle_exit("surprise", target, target.vcpus[0])  # type: ignore[arg-type]
    assert outcome is not None
    assert outcome.reason == Reason.FAILURE
    assert "surprise" in outcome.detail


def test_effects_reach_the_devices() -> None:
    target = Target()
    vcpu = target.vcpus[0]
    handle_exit(exits.PortIo(0x80, 1, True, 1, b"\x42"), target, vcpu)
    handle_exit(exits.PortIo(0xE9, 1, True, 3, b"abc"), target, vcpu)
    assert (target.debug.post_code, bytes(target.sent)) == (0x42, b"abc")
    handle_exit(exits.Halt(), target, vcpu)
    handle_exit(exits.Interrupted(), target, vcpu)
    assert target.waits == ["idle", "interrupted"]


def test_eoi_reaches_the_ioapic() -> None:
    target = Target()
    target.ioapic.write(0, 4, 0x10 + 18)
    target.ioapic.write(0x10, 4, 0x50 | 1 << 15)
    target.ioapic.set_line(9, True)
    handle_exit(exits.IoapicEoi(0x50), target, target.vcpus[0])
    assert len(target.messages) == 2


@pytest.mark.parametrize(
    "exit_", [exits.PortIo(0x80, 1, True, 1, b"x"), exits.Mmio(0, 1, True, b"x"), exits.Halt(), exits.Interrupted()]
)
def test_an_outcome_that_a_device_caused_ends_the_run(exit_: exits.Exit) -> None:
    target = Target(outcome=Outcome(Reason.RESET))
    assert handle_exit(exit_, target, target.vcpus[0]) == Outcome(Reason.RESET)


@pytest.mark.parametrize(
    ("shorthand", "destination", "mode", "reached"),
    [
        (0, 1, 0, [1]),
        (0, 0xFF, 0, [0, 1, 2]),
        (0, 0xFF, 1, [0]),
        (0, 9, 0, []),
        (1, 0, 0, [0]),
        (2, 0, 0, [0, 1, 2]),
        (3, 0, 0, [1, 2]),
    ],
)
def test_ipi_destinations(shorthand: int, destination: int, mode: int, reached: list[int]) -> None:
    target = Target()
    handle_exit(exits.Ipi(0x40, mode, shorthand, False, False, True, destination), target, target.vcpus[0])
    assert [v.identity for v in target.vcpus if v.calls] == reached


def test_init_deassert_does_nothing() -> None:
    target = Target()
    handle_exit(exits.Ipi(0, exits.DeliveryMode.INIT, 2, False, True, False, 0), target, target.vcpus[0])
    assert all(v.calls == [] for v in target.vcpus)
