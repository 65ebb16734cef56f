"""
What an engine is: the seam between the hypervisor and whatever executes guest instructions.

Every engine passes :mod:`nonroot.testing.engine_contract`. Not every engine can do everything: what it cannot is
missing in its :attr:`Engine.capabilities`, and asking for it raises :class:`CapabilityError`.

Threads: one thread at a time calls ``run`` or ``wait`` of a vCPU, both release the GIL; ``kick``, ``signal``, ``nmi``
and ``set_pic_line`` are for any thread at any time. Everything else is for the vCPU's own thread, between runs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from nonroot.errors import UnsupportedError

if TYPE_CHECKING:
    from nonroot._engine import Memory
    from nonroot.engines.exits import Exit
    from nonroot.engines.policy import CpuPolicy
    from nonroot.engines.state import VcpuState

__all__ = ["Capability", "CapabilityError", "Engine", "EngineOptions", "Vcpu"]


class Capability(enum.StrEnum):
    """What an engine may be able to do beyond running guests."""

    #: Exact instruction limits of ``run`` and exact ``retired`` counts.
    INSTRUCTION_LIMIT = "instruction-limit"
    #: Time as a function of retired instructions.
    VIRTUAL_TIME = "virtual-time"
    #: Single step for the caller, invisible to the guest.
    SINGLE_STEP = "single-step"
    #: Hardware breakpoints for the caller, invisible to the guest.
    BREAKPOINTS = "breakpoints"
    #: Exits for exceptions.
    EXCEPTION_EXITS = "exception-exits"
    #: Exits for control register writes.
    CR_EXITS = "cr-exits"
    #: Exits for unknown MSRs.
    MSR_EXITS = "msr-exits"
    #: The dirty log counts the guest's own writes.
    DIRTY_LOG = "dirty-log"
    #: Instructions that CPUID does not show are undefined, whatever the host's CPU has.
    EXACT_CPU = "exact-cpu"
    #: Named optimisations that can be switched off.
    OPTIMISATIONS = "optimisations"


class CapabilityError(UnsupportedError):
    """The engine cannot do this; another may."""

    code = "engine_capability"

    def __init__(self, engine: str, capability: Capability) -> None:
        super().__init__(
            f"the {engine} engine cannot do {capability.value}", engine=engine, capability=capability.value
        )
        self.engine = engine
        self.capability = capability


@dataclass(frozen=True)
class EngineOptions:
    """What a domain asks of its engine beyond the CPU policy."""

    #: None for real time, or (numerator, denominator): ns per retired instruction.
    virtual_time: tuple[int, int] | None = None
    #: Where RDRAND and RDSEED start under virtual time; in real time they are the host's.
    random_seed: int = 0
    #: Names of optimisations to switch off.
    off: frozenset[str] = field(default_factory=frozenset)
    #: Unknown MSRs exit instead of raising #GP.
    msr_exits: bool = False
    #: Exception vectors that exit instead of being delivered.
    exception_exits: frozenset[int] = field(default_factory=frozenset)
    #: Writes of CR0, CR3, CR4, CR8 exit.
    cr_exits: bool = False

    def needed(self) -> frozenset[Capability]:
        """The capabilities that these options use."""
        asked = {
            Capability.VIRTUAL_TIME: self.virtual_time is not None,
            Capability.OPTIMISATIONS: bool(self.off),
            Capability.MSR_EXITS: self.msr_exits,
            Capability.EXCEPTION_EXITS: bool(self.exception_exits),
            Capability.CR_EXITS: self.cr_exits,
        }
        return frozenset(capability for capability, used in asked.items() if used)


@runtime_checkable
class Vcpu(Protocol):
    """One vCPU with its local APIC."""

    def run(self, deadline_ns: int | None = None, limit: int | None = None) -> Exit:
        """
        Run guest instructions until there is an exit.

        :param deadline_ns: machine time at which to return ``Interrupted``.
        :param limit: total of retired instructions at which to return ``Interrupted``, exactly.
        :raises RuntimeError: if another thread is running this vCPU.
        """

    def complete(self, data: bytes) -> None:
        """Answer the last input, load, MSR read or CPUID exit. ValueError if the length is wrong."""

    def fail(self) -> None:
        """Answer the last MSR exit with #GP in the guest."""

    def set_pic_vector(self, vector: int) -> None:
        """Answer ``PicAcknowledge``."""

    def kick(self) -> None:
        """Make ``run`` or ``wait`` return soon, from any thread; if neither runs, the next one returns at once."""

    def wait(self, deadline_ns: int | None = None) -> bool:
        """
        Sleep until there is something to run, a kick, or the deadline (machine time in ns). The local APIC's own timer
        is taken care of. True if the vCPU has something to run.
        """

    def set_pic_line(self, asserted: bool) -> None:
        """Drive the PIC's INTR output, from any thread."""

    def signal(self, vector: int, mode: int = 0, level: bool = False) -> None:
        """Deliver an interrupt message to this local APIC (``mode`` as in the ICR), from any thread."""

    def lapic_matches(self, destination: int, logical: bool) -> bool:
        """Whether an interrupt message with this destination is for this local APIC."""

    def nmi(self) -> None:
        """Raise an NMI, from any thread."""

    def interrupt(self, vector: int) -> None:
        """Inject an external interrupt as soon as the guest can take it, past the local APIC and the PIC."""

    def request_interrupt_window(self, wanted: bool) -> None:
        """Ask for (or no longer for) an ``InterruptWindow`` exit as soon as the guest can take an interrupt."""

    def set_guest_debug(self, single_step: bool = False, breakpoints: Sequence[tuple[int, int, int]] = ()) -> None:
        """
        ``Debug`` exits for the caller, invisible to the guest.

        :param breakpoints: up to four (linear address, length 1, 2, 4 or 8, type: 0 execute, 1 write, 3 access).
        """

    def state(self) -> VcpuState:
        """The complete architectural state."""

    def set_state(self, state: VcpuState) -> None:
        """Check, then apply. ValueError (:class:`nonroot.engines.state.StateError`) changes nothing."""

    def now_ns(self) -> int:
        """Machine time in ns."""

    def set_now_ns(self, now: int) -> None:
        """Move machine time: idle time under virtual time, restored domains."""

    def retired(self) -> int:
        """Guest instructions retired so far; a REP iteration counts as one."""

    def statistics(self) -> Mapping[str, int]:
        """Counters by name, for people to read."""

    def hypercall_arguments(self) -> tuple[bool, int, list[int]]:
        """After ``Hypercall``: whether 64-bit code made it, at which privilege level, and the general registers."""

    def set_register(self, index: int, value: int) -> None:
        """Set a general register, numbered as in :attr:`nonroot.engines.state.VcpuState.gpr`."""

    def translate(self, linear: int) -> int | None:
        """Guest-physical address of a linear address, as supervisor, without side effects; None if it is not mapped."""

    def flush(self) -> None:
        """Drop cached translations and decoded code."""


@runtime_checkable
class Engine(Protocol):
    """A way to run guests."""

    @property
    def name(self) -> str:
        """Its name: ``interpret``, later ``translate`` and ``kvm``."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What it can do."""

    @property
    def cpu_features(self) -> frozenset[str]:
        """The CPU features that it implements on this machine, names of :data:`nonroot.engines.policy.FEATURES`."""

    @property
    def tsc_khz(self) -> int:
        """The TSC frequency that its guests have unless another is asked for, in kHz."""

    def optimisations(self) -> Mapping[str, str]:
        """Optimisations that ``EngineOptions.off`` can switch off: name to description."""

    def create_vcpu(
        self, memory: Memory, policy: CpuPolicy, apic_id: int = 0, options: EngineOptions | None = None
    ) -> Vcpu:
        """
        A vCPU after power-up (``apic_id`` 0 is the bootstrap processor).

        :raises CapabilityError: if the options ask for what the engine cannot do.
        :raises nonroot.errors.BadOptionError: for unknown optimisations and features, and absurd numbers.
        """
