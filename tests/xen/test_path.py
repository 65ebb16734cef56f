"""What of Xen is done in the engine: the same as in Python, bit by bit, or it is left to Python."""

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot._engine import Memory, XenPath, translate_unavailable
from nonroot.engines.native import InterpretEngine, TranslateEngine
from nonroot.engines.policy import CpuPolicy
from nonroot.engines.protocol import EngineOptions
from nonroot.xen.abi import DOMID_SELF, HypercallError, Virq
from nonroot.xen.backend import EventChannelError
from nonroot.xen.events import BackendPort
from nonroot.xen.memory import SHARED_INFO, Place
from tests.xen.domain import Domain

VECTOR = 0xF3
PORTS = 12


def make_path(memory: Memory, shared: Place) -> XenPath:
    engine = InterpretEngine()
    return XenPath(memory, [engine.create_vcpu(memory, CpuPolicy.build(engine.cpu_features)).raw], shared)


class Side:
    """A domain, with the engine's part or without, and what its backends heard."""

    def __init__(self, has_path: bool, long: bool) -> None:
        self.domain = Domain(long, None, make_path if has_path else lambda memory, shared: None)
        self.host = self.domain.host
        self.host.shared.use_abi(self.domain.abi)
        self.path = self.host.path
        self.page = self.host.physmap.view(self.host.physmap.own(SHARED_INFO))
        self.backends: list[tuple[BackendPort, int]] = []
        self.host.upcalls.set_vector(0, VECTOR)
        self.served = 0

    def do(self, what: str, port: int, other: int) -> object:
        """One step; what came of it."""
        channels, abi = self.host.channels, self.domain.abi
        try:
            match what:
                case "unbound":
                    return channels.alloc_unbound(other % 2 * DOMID_SELF)
                case "loopback":
                    return channels.bind_loopback(port)
                case "ipi":
                    return channels.bind_ipi(0)
                case "virq":
                    return channels.bind_virq(Virq.TIMER, 0)
                case "close":
                    channels.close(port)
                case "send":
                    if self.path is not None and self.path.send(port):
                        self.served += 1
                        return None
                    channels.send(port)
                case "unmask":
                    if self.path is not None and self.path.unmask(port):
                        self.served += 1
                        return None
                    channels.unmask(port)
                case "timer":
                    if self.path is not None:
                        self.path.set_shot(1, 1)
                    else:
                        channels.raise_virq(Virq.TIMER, 0)
                case "mask":
                    self.page[abi.mask + port // 8] |= 1 << port % 8
                case "take":
                    self.page[abi.pending + port // 8] &= ~(1 << port % 8)
                case "look":
                    self.page[0] = 0
                    self.page[abi.selector : abi.selector + 4] = bytes(4)
                case "bind":
                    self._bind(port)
                case "unbind":
                    if self.backends:
                        self.backends[other % len(self.backends)][0].close()
                case "notify":
                    if self.backends:
                        backend = self.backends[other % len(self.backends)][0]
                        if self.path is None or not self.path.raise_event(backend.guest_port):
                            backend.notify()
        except (HypercallError, EventChannelError) as error:
            return str(error)
        return None

    def _bind(self, port: int) -> None:
        bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            backend = self.host.channels.bind_backend(port, lambda: os.eventfd_write(bell, 1), bell=bell)
        except EventChannelError:
            os.close(bell)
            raise
        self.backends.append((backend, bell))

    def bells(self) -> list[int]:
        """How often each backend was rung for."""
        return [_count(bell) for _, bell in self.backends]

    def close(self) -> None:
        for _, bell in self.backends:
            os.close(bell)
        self.page.release()
        self.host.close()


def _count(bell: int) -> int:
    try:
        return os.eventfd_read(bell)
    except BlockingIOError:
        return 0


STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            "unbound loopback ipi virq close send send send unmask timer mask take look bind bind unbind notify".split()
        ),
        st.integers(0, PORTS),
        st.integers(0, 3),
    ),
    max_size=60,
)


@given(steps=STEPS, long=st.booleans())
@settings(max_examples=25, deadline=None)
def test_every_step_ends_as_in_python(steps: list[tuple[str, int, int]], long: bool) -> None:
    ours, judge = Side(True, long), Side(False, long)
    try:
        for step in steps:
            if step[0] == "notify" and judge.backends:
                # A backend that has closed its end raises nothing; the engine is only asked for ports that are bound.
                backend = judge.backends[step[2] % len(judge.backends)][0]
                if judge.host.channels.status(backend.guest_port).backend is not backend:
                    continue
            assert ours.do(*step) == judge.do(*step), step
            assert bytes(ours.page[: 8 + 64]) == bytes(judge.page[: 8 + 64]), step
            assert bytes(ours.page[2048:3072]) == bytes(judge.page[2048:3072]), step
            assert ours.bells() == judge.bells(), step
    finally:
        ours.close()
        judge.close()


def test_the_engine_does_what_it_can() -> None:
    side = Side(True, True)
    assert side.path is not None
    port = side.host.channels.alloc_unbound(0)
    side.do("bind", port, 0)
    assert side.bells() == [1]
    assert side.path.send(port)
    assert side.bells() == [1]
    side.host.upcalls.reset()  # nobody is told by a vector any more
    assert not side.path.send(port)
    assert not side.path.send(4000)
    side.host.reset()
    assert not side.path.send(port)
    side.close()


def test_wrong_arguments_are_refused() -> None:
    side = Side(True, True)
    path = side.path
    assert path is not None
    calls: list[Any] = [
        lambda: path.vector(1, VECTOR),
        lambda: path.info(7, None),
        lambda: path.timer(1, 3),
        lambda: path.layout(16, 0, 0, 0),
        lambda: path.bell(1, 0, -1),
        lambda: XenPath(side.domain.memory, [], (9, 0)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r".{10}"):
            call()
    side.close()


@pytest.mark.skipif(translate_unavailable() is not None, reason="translated code runs on x86-64 hosts")
def test_only_the_translator_in_real_time_has_it_and_it_can_be_switched_off() -> None:
    domain = Domain()
    place = domain.host.physmap.own(SHARED_INFO)

    def has(engine: InterpretEngine, options: EngineOptions) -> bool:
        vcpu = engine.create_vcpu(domain.memory, CpuPolicy.build(engine.cpu_features), 0, options)
        return vcpu.xen_path(domain.memory, place) is not None

    assert has(TranslateEngine(), EngineOptions())
    assert not has(TranslateEngine(), EngineOptions(off=frozenset({"xen-path"})))
    assert not has(TranslateEngine(), EngineOptions(virtual_time=(1, 1)))
    assert not has(InterpretEngine(), EngineOptions())
    assert "xen-path" in TranslateEngine().optimisations()
    domain.host.close()
