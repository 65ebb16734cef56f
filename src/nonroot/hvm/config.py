"""What a machine is made of, and where its output goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nonroot.hvm.guest_ram import RamBase
from nonroot.hvm.pc import Attach
from nonroot.xen.config import XenConfig

if TYPE_CHECKING:
    from nonroot.hvm.firmware import Firmware

__all__ = ["MachineConfig", "Outputs"]


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What a machine is made of."""

    memory_bytes: int
    kernel: bytes = b""
    """A bzImage, or an ELF with a PVH note; nothing with ``firmware``."""
    firmware: "Firmware | None" = None
    """Start in firmware, at the reset vector, instead of a kernel."""
    attach: Sequence[Attach] = ()
    """Devices of the PC: called with the board, in order, while the machine is made."""
    reboot: bool | None = None
    """Whether a reset (or a triple fault) starts the machine again, rather than ending the run. None: with firmware."""
    cmdline: str = ""
    initrd: bytes | None = None
    protocol: str = "auto"
    """``auto``, ``pvh``, ``linux64`` or ``linux32``."""
    base_wall_ns: int = 0
    """UTC at power-on, ns since 1970: what the RTC shows."""
    uarts: int = 2
    """Serial ports, 1..4."""
    agent: bool = True
    """Whether the agent's ports are there."""
    scramble_seed: int | None = None
    """Place every guest frame at a random place of the backing."""
    virtual_time: tuple[int, int] | None = None
    """Time as a function of retired instructions: (numerator, denominator) ns each. None: real time."""
    random_seed: int = 0
    generation_id: bytes = bytes(16)
    """The VM generation ID at power-on: 16 bytes that no other machine has."""
    """Where RDRAND starts in virtual time; in real time it is the host's."""
    engine_off: frozenset[str] = field(default_factory=frozenset)
    """Optimisations of the engine to switch off."""
    resumed: bool = False
    """The machine goes on from the records of another (:mod:`nonroot.hvm.saved`): no kernel and no tables are put into
    its memory. ``protocol`` says how the other was started."""
    ram_base: RamBase | None = None
    """The files over which the RAM is private, which stay the caller's; None: zeros, in a file of its own."""
    xen: XenConfig | None = None
    """Be a Xen for the guest; None: no Xen."""


def _nobody(*arguments: object) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the guest's output goes. All are called in the vCPU's thread; one that blocks stops the guest."""

    console: Callable[[int, bytes], object] = _nobody
    """(number of the serial port, bytes)."""
    agent: Callable[[bytes], object] = _nobody
    """Bytes of the agent channel."""
    agent_wants_input: Callable[[], object] = _nobody
    """The agent has read everything that was sent to it."""
    debug: Callable[[bytes], object] = _nobody
    """Bytes of the debug console (port 0xE9)."""
