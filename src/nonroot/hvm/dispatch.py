"""What is done about each exit: a function of the exit and the machine, one handler for every type of exit.

A handler returns None if the vCPU is to run on, or the outcome of the run. An exit that nobody asked for, or of a type
that is not known, is a failure and never ignored.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from nonroot.engines import exits
from nonroot.engines.exits import Exit
from nonroot.engines.protocol import Vcpu
from nonroot.hvm.bus import Bus
from nonroot.hvm.ioapic import IoApic
from nonroot.hvm.outcome import Outcome, Reason
from nonroot.hvm.pic import PicPair
from nonroot.xen.host import XenHost

__all__ = ["HANDLERS", "VIRTUAL_TIME_HANDLERS", "ExitTarget", "handle_exit"]

SHORTHAND_NONE: Final = 0
SHORTHAND_SELF: Final = 1
SHORTHAND_ALL: Final = 2

PORT_ACCESS_NS: Final = 1000
"""What an access to a port takes in virtual time: about a cycle of the ISA bus."""
HYPERCALL_NOT_SUPPORTED: Final = (1 << 64) - 38
"""-ENOSYS."""
RAX: Final = 0


class ExitTarget(Protocol):
    """What the handlers need of the machine."""

    ports: Bus
    mmio: Bus
    pic: PicPair
    ioapic: IoApic
    outcome: Outcome | None
    """Set by a device in the course of an access: power-off or reset."""
    xen: XenHost | None

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """All vCPUs; index 0 is the bootstrap processor."""

    def idle(self, vcpu: Vcpu) -> None:
        """Wait until the halted vCPU has something to do, or something is due."""

    def interrupted(self, vcpu: Vcpu) -> None:
        """A deadline was reached, or somebody kicked the vCPU."""


Handler = Callable[[Any, ExitTarget, Vcpu], Outcome | None]


def _port_io(exit_: exits.PortIo, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    port, size = exit_.port, exit_.size
    if exit_.count == 1:
        # The bus's tables are looked at here, without a call: this is the most frequent exit by far.
        if exit_.write:
            data = exit_.data
            value = data[0] if size == 1 else int.from_bytes(data, "little")
            target = machine.ports.writes.get(port << 4 | size)
            if target is not None:
                target[0](target[1], size, value)
            else:
                machine.ports.write(port, size, value)
        else:
            source = machine.ports.reads.get(port << 4 | size)
            value = source[0](source[1], size) if source is not None else machine.ports.read(port, size)
            vcpu.complete(value.to_bytes(size, "little"))
    elif exit_.write:
        machine.ports.write_block(port, size, exit_.data)
    else:
        vcpu.complete(machine.ports.read_block(port, size, exit_.count))
    return machine.outcome


def _virtual_port_io(exit_: exits.PortIo, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    """
    In virtual time an access takes as long as on a real machine's bus (a REP once, as a burst).

    Otherwise programs that wait at a port would look at it again and again for each microsecond, each time an exit.
    """
    vcpu.set_now_ns(vcpu.now_ns() + PORT_ACCESS_NS)
    return _port_io(exit_, machine, vcpu)


def _mmio(exit_: exits.Mmio, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    if exit_.write:
        machine.mmio.write(exit_.gpa, exit_.size, int.from_bytes(exit_.data, "little"))
    else:
        vcpu.complete(machine.mmio.read(exit_.gpa, exit_.size).to_bytes(exit_.size, "little"))
    return machine.outcome


def _halt(exit_: exits.Halt, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    machine.idle(vcpu)
    return machine.outcome


def _interrupted(exit_: exits.Interrupted, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    machine.interrupted(vcpu)
    return machine.outcome


def _hypercall(exit_: exits.Hypercall, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    if machine.xen is not None:
        machine.xen.hypercall(machine.vcpus.index(vcpu))
        return machine.outcome
    # Without Xen there are no hypercalls; as in Xen, an unknown one returns -ENOSYS in RAX.
    state = vcpu.state()
    gpr = list(state.gpr)
    gpr[RAX] = HYPERCALL_NOT_SUPPORTED
    vcpu.set_state(replace(state, gpr=tuple(gpr)))
    return None


def _msr(exit_: exits.MsrRead | exits.MsrWrite, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    if machine.xen is not None:
        if isinstance(exit_, exits.MsrRead):
            value = machine.xen.read_msr(exit_.index)
            if value is not None:
                vcpu.complete(value.to_bytes(8, "little"))
                return None
        elif machine.xen.write_msr(exit_.index, exit_.value, machine.vcpus.index(vcpu)):
            return None
    vcpu.fail()
    return None


def _cpuid(exit_: exits.Cpuid, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    # A leaf that the policy does not have reads as zeros.
    vcpu.complete(bytes(16))
    return None


def _ioapic_eoi(exit_: exits.IoapicEoi, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    if machine.xen is not None:
        machine.xen.upcalls.look()
    machine.ioapic.eoi(exit_.vector)
    return None


def _pic_acknowledge(exit_: exits.PicAcknowledge, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    vcpu.set_pic_vector(machine.pic.acknowledge())
    return None


def _interrupt_window(exit_: exits.InterruptWindow, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    # Nobody injects past the interrupt controllers; a stale request just ends.
    vcpu.request_interrupt_window(False)
    return None


def _ipi(exit_: exits.Ipi, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    if exit_.mode == exits.DeliveryMode.INIT and not exit_.asserted:
        # INIT level de-assert only synchronises arbitration IDs of buses that no longer exist.
        return None
    for target in machine.vcpus:
        if exit_.shorthand == SHORTHAND_SELF:
            addressed = target is vcpu
        elif exit_.shorthand == SHORTHAND_NONE:
            addressed = target.lapic_matches(exit_.destination, exit_.logical)
        else:
            addressed = target is not vcpu or exit_.shorthand == SHORTHAND_ALL
        if addressed:
            target.signal(exit_.vector, exit_.mode, exit_.level)
            if exit_.mode == exits.DeliveryMode.LOWEST_PRIORITY:
                break
    return None


def _triple_fault(exit_: exits.TripleFault, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    return Outcome(Reason.TRIPLE_FAULT, "the guest's CPU shut down after a triple fault")


def _failure(exit_: exits.Failure, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    return Outcome(Reason.FAILURE, exit_.reason)


def _unasked(exit_: Exit, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    return Outcome(Reason.FAILURE, f"the engine made an exit that nobody asked for: {exit_}")


HANDLERS: Final[dict[type, Handler]] = {
    exits.PortIo: _port_io,
    exits.Mmio: _mmio,
    exits.Halt: _halt,
    exits.Hypercall: _hypercall,
    exits.MsrRead: _msr,
    exits.MsrWrite: _msr,
    exits.Cpuid: _cpuid,
    exits.IoapicEoi: _ioapic_eoi,
    exits.PicAcknowledge: _pic_acknowledge,
    exits.InterruptWindow: _interrupt_window,
    exits.ExceptionRaised: _unasked,
    exits.CrWrite: _unasked,
    exits.Debug: _unasked,
    exits.TripleFault: _triple_fault,
    exits.Ipi: _ipi,
    exits.Interrupted: _interrupted,
    exits.Failure: _failure,
}
"""Every type of exit; the run loop looks here itself."""
VIRTUAL_TIME_HANDLERS: Final = HANDLERS | {exits.PortIo: _virtual_port_io}
"""The same in virtual time."""


def handle_exit(exit_: Exit, machine: ExitTarget, vcpu: Vcpu) -> Outcome | None:
    """Do what ``exit_`` of ``vcpu`` asks for. None: run on."""
    handler = HANDLERS.get(type(exit_))
    if handler is None:
        return Outcome(Reason.FAILURE, f"the engine made an unknown exit: {exit_!r}")
    return handler(exit_, machine, vcpu)
