"""The agent channel: a byte stream each way between the domain process and the agent in the guest, over private ports.

The machine maps 0x6E0 here. The agent moves whole buffers with REP OUTSB and REP INSB, one exit each; the streams carry
frames (type u8, length u32 little-endian, payload) that this device does not look into. A byte on ttyS1 is the host's
doorbell (see :mod:`nonroot.hvm.machine`), so the agent need not poll.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import NO_EVENTS, Events, StateRecord, expect, fifo

__all__ = ["CAPACITY", "MAGIC", "AgentPort", "AgentPortState"]

DATA: Final = 0
"""Bytes; REP OUTSB sends, REP INSB receives. Reading more than is waiting gives zeros."""
WAITING: Final = 4
"""32-bit read: bytes waiting for the guest."""
MAGIC_REGISTER: Final = 8
"""32-bit read: "NRA1"."""
LENGTH: Final = 12

MAGIC: Final = int.from_bytes(b"NRA1", "little")
CAPACITY: Final = 64 * 1024
"""Bytes that may wait for the guest; more are not accepted until it has read."""


def _nobody() -> None:
    pass


@dataclass(slots=True)
class AgentPortState(StateRecord):
    """The bytes waiting for the guest."""

    NAME: ClassVar[str] = "agent"

    waiting: bytes = fifo(CAPACITY)


class AgentPort:
    """Both streams. What the guest sends goes to ``sink`` at once, in the pieces the guest sent."""

    name = "agent"

    def __init__(
        self,
        sink: Callable[[bytes], object],
        wants_input: Callable[[], object] = _nobody,
        events: Events = NO_EVENTS,
    ) -> None:
        """
        ``sink`` may block: that stops the guest until the bytes are taken. ``wants_input`` is called when the guest has
        emptied the buffer, so that whoever had bytes refused by :meth:`receive` may offer them again.
        """
        self._sink = sink
        self._wants_input = wants_input
        self._events = events
        self._waiting = bytearray()

    def reset(self) -> None:
        """Nothing waits."""
        self._waiting.clear()

    def receive(self, data: bytes | bytearray | memoryview) -> int:
        """Bytes for the guest; returns how many were accepted."""
        accepted = min(len(data), CAPACITY - len(self._waiting))
        self._waiting += data[:accepted]
        return accepted

    @property
    def waiting(self) -> int:
        """Bytes that wait for the guest."""
        return len(self._waiting)

    def read(self, offset: int, size: int) -> int:
        """One byte of data, or one of the two 32-bit registers."""
        if offset == DATA:
            return int.from_bytes(self.read_block(offset, size, 1), "little")
        if offset == WAITING and size == 4:
            return len(self._waiting)
        if offset == MAGIC_REGISTER and size == 4:
            return MAGIC
        self._events(self.name, "unknown-register", offset)
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """One byte of data; other registers are read-only."""
        if offset == DATA:
            self._sink(value.to_bytes(size, "little"))
        else:
            self._events(self.name, "read-only-register", offset)

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """Bytes for the guest, padded with zeros if fewer are waiting."""
        if offset != DATA:
            return b"".join(self.read(offset, size).to_bytes(size, "little") for _ in range(count))
        wanted = size * count
        block = bytes(self._waiting[:wanted])
        if block:
            del self._waiting[:wanted]
            if not self._waiting:
                self._wants_input()
        return block.ljust(wanted, b"\0")

    def write_block(self, offset: int, size: int, data: bytes) -> None:
        """Bytes from the guest."""
        if offset == DATA:
            self._sink(data)
        else:
            self._events(self.name, "read-only-register", offset)

    def state(self) -> AgentPortState:
        """The bytes waiting for the guest."""
        return AgentPortState(bytes(self._waiting))

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        self._waiting[:] = expect(AgentPortState, state).waiting
