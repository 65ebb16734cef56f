"""How a vCPU is told of events: a vector of its local APIC, a vector past it, or an interrupt line.

- HVMOP_set_evtchn_upcall_vector: an edge-triggered message to that vCPU's local APIC; the guest ends it there.
- CALLBACK_IRQ with a vector: injected like an external interrupt; nobody ends it.
- CALLBACK_IRQ with a GSI or a PCI INTx: a level, asserted while vCPU 0's upcall_pending is set. Nothing says when the
  guest clears that, so it is looked at when an interrupt ends, at hypercalls, and every 100 µs meanwhile.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from nonroot._engine import XenPath
from nonroot.hvm.device import Clock, IrqLine
from nonroot.saved.fields import Fields
from nonroot.xen.abi import CallbackType

__all__ = ["UpcallVcpu", "Upcalls"]

LOOK_NS: Final = 100_000
LOWEST_VECTOR: Final = 0x10


class UpcallVcpu(Protocol):
    """What delivery needs of a vCPU."""

    def signal(self, vector: int, mode: int = 0, level: bool = False) -> None:
        """Take an interrupt message; any thread."""

    def interrupt(self, vector: int) -> None:
        """Inject a vector; in the vCPU's thread."""


class Upcalls:
    """The upcalls of one domain."""

    def __init__(
        self,
        vcpus: Sequence[UpcallVcpu],
        clock: Clock,
        pending: Callable[[int], bool],
        gsi: Callable[[int], IrqLine],
        intx: Callable[[int, int], IrqLine],
        in_thread: Callable[[Callable[[], object]], object],
        path: XenPath | None = None,
    ) -> None:
        """
        ``pending(vcpu)``: upcall_pending. ``gsi(n)`` and ``intx(slot, pin)``: drivers of lines, or ValueError.
        ``in_thread(f)``: have f called in the vCPU's thread, at once if this is it.
        ``path``: is told of vectors: those vCPUs it tells itself.
        """
        self._path = path
        self._vcpus = vcpus
        self._clock = clock
        self._pending = pending
        self._gsi = gsi
        self._intx = intx
        self._in_thread = in_thread
        self._lines: dict[tuple[str, int, int], IrqLine] = {}
        self._vectors: dict[int, int] = {}
        self._callback_vector = 0
        self._line: IrqLine | None = None
        self._asserted = False
        self._look_at = 0

    def reset(self) -> None:
        """As at power-on: nobody is told of anything."""
        self._release()
        for vcpu in self._vectors:
            if self._path is not None:
                self._path.vector(vcpu, 0)
        self._vectors.clear()
        self._callback_vector, self._line = 0, None

    def set_vector(self, vcpu: int, vector: int) -> bool:
        """The vector of a vCPU's local APIC. False if it cannot be."""
        if not LOWEST_VECTOR <= vector <= 0xFF or not 0 <= vcpu < len(self._vcpus):
            return False
        self._vectors[vcpu] = vector
        if self._path is not None:
            self._path.vector(vcpu, vector)
        self.tell(vcpu)
        return True

    def set_callback(self, value: int) -> None:
        """CALLBACK_IRQ; a value that means nothing switches the callback off, as in Xen."""
        self._release()
        self._choose(value)
        self.tell(0)

    def saved(self) -> dict[str, Any]:
        """How the vCPUs are told; the callback is a parameter of the domain."""
        return {
            "vectors": [list(item) for item in self._vectors.items()],
            "asserted": self._asserted,
            "look_at": self._look_at,
        }

    def restore(self, record: Fields, callback: int) -> None:
        """As :meth:`saved` found it: lines are as their devices' records say. StateError."""
        vectors = record.rows("vectors", len(self._vcpus) - 1, 0xFF)
        asserted, self._look_at = record.flag("asserted"), record.number("look_at")
        self._choose(callback)
        self._asserted = asserted and self._line is not None
        self._vectors = {vcpu: vector for vcpu, vector in vectors if vector >= LOWEST_VECTOR}
        if self._path is not None:
            for vcpu, vector in self._vectors.items():
                self._path.vector(vcpu, vector)

    def rearm(self) -> None:
        """
        An upcall may have been on its way to a vCPU, from a thread that goes on while the domain is saved: with the
        mark that it is pending, no other would ever come. A guest that has had it finds nothing to do.
        """
        if not self._asserted:
            for vcpu in range(len(self._vcpus)):
                self.tell(vcpu)

    def _choose(self, value: int) -> None:
        self._callback_vector, self._line = 0, None
        kind = value >> 56
        if kind == CallbackType.VECTOR:
            vector = value & 0xFF
            self._callback_vector = vector if vector >= LOWEST_VECTOR else 0
        elif kind == CallbackType.GSI and value & 0xFFFF_FFFF:
            self._line = self._find(("gsi", value & 0xFFFF_FFFF, 0))
        elif kind == CallbackType.PCI_INTX:
            self._line = self._find(("intx", value >> 11 & 31, value & 3))

    def tell(self, vcpu: int) -> None:
        """The vCPU's upcall_pending may have been set. Any thread."""
        if not self._pending(vcpu):
            return
        vector = self._vectors.get(vcpu)
        if vector is not None:
            self._vcpus[vcpu].signal(vector)
        elif self._callback_vector or self._line is not None:
            self._in_thread(lambda: self._deliver(vcpu))

    def look(self) -> None:
        """The line follows upcall_pending. In the vCPU's thread."""
        if self._asserted and not self._pending(0):
            self._release()

    def deadline(self) -> int | None:
        """When to look at an asserted line again."""
        return self._look_at if self._asserted else None

    def advance(self, now: int) -> None:
        """Look at it."""
        if self._asserted and now >= self._look_at:
            self.look()
            self._look_at = now + LOOK_NS

    def _deliver(self, vcpu: int) -> None:
        if self._callback_vector:
            self._vcpus[vcpu].interrupt(self._callback_vector)
        elif self._line is not None and vcpu == 0 and not self._asserted:
            self._asserted = True
            self._look_at = self._clock.now_ns() + LOOK_NS
            self._line(True)
            self._clock.rearm()

    def _release(self) -> None:
        if self._asserted:
            self._asserted = False
            assert self._line is not None
            self._line(False)

    def _find(self, key: tuple[str, int, int]) -> IrqLine | None:
        if key not in self._lines:
            kind, first, second = key
            try:
                self._lines[key] = self._gsi(first) if kind == "gsi" else self._intx(first, second)
            except ValueError:
                return None
        return self._lines[key]
