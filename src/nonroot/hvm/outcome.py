"""How a run of the machine ended."""

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Outcome", "Reason"]


class Reason(StrEnum):
    """Why :meth:`nonroot.hvm.machine.Machine.run` returned."""

    POWER_OFF = "power-off"
    """The guest entered S5."""
    RESET = "reset"
    """The guest asked for a reset, by one of the ports."""
    TRIPLE_FAULT = "triple-fault"
    """The vCPU shut down: an exception while delivering a double fault."""
    CRASH = "crash"
    """The guest told its hypervisor that it has crashed."""
    STOPPED = "stopped"
    """Somebody called ``stop``, or the limit of the run was reached; the machine can run on."""
    FAILURE = "failure"
    """The engine cannot go on, or made an exit that nobody asked for."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """A reason and, where there is more to say, one sentence."""

    reason: Reason
    detail: str = ""
