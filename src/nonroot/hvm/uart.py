"""The 16550A serial port.

Transmission takes no time: a byte written to THR is at the sink at once and THR is empty again. Reception is paced by
the guest: :meth:`Uart.receive` accepts what fits into the FIFO and says how much that was.
Source: National Semiconductor PC16550D datasheet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.hvm.device import (
    NO_EVENTS,
    Clock,
    Events,
    IrqLine,
    Sink,
    StateError,
    StateRecord,
    assign,
    capture,
    expect,
    fifo,
    flag,
    i64,
    u8,
)

__all__ = ["RX_TIMEOUT_NS", "Uart", "UartState"]

# Register offsets. With LCR's DLAB set, 0 and 1 are the divisor latch.
DATA: Final = 0
"""Read: RBR. Write: THR."""
IER: Final = 1
IIR_FCR: Final = 2
"""Read: IIR. Write: FCR."""
LCR: Final = 3
MCR: Final = 4
LSR: Final = 5
MSR: Final = 6
SCR: Final = 7

IER_RECEIVE: Final = 0b0000_0001
IER_THRE: Final = 0b0000_0010
IER_LINE: Final = 0b0000_0100
IER_MODEM: Final = 0b0000_1000

IIR_NONE: Final = 0b0000_0001
IIR_MODEM: Final = 0b0000_0000
IIR_THRE: Final = 0b0000_0010
IIR_DATA: Final = 0b0000_0100
IIR_LINE: Final = 0b0000_0110
IIR_TIMEOUT: Final = 0b0000_1100
IIR_FIFOS: Final = 0b1100_0000

FCR_ENABLE: Final = 0b0000_0001
FCR_CLEAR_RX: Final = 0b0000_0010
TRIGGER_LEVELS: Final = (1, 4, 8, 14)

LCR_DLAB: Final = 0b1000_0000

MCR_DTR: Final = 0b0000_0001
MCR_RTS: Final = 0b0000_0010
MCR_OUT1: Final = 0b0000_0100
MCR_OUT2: Final = 0b0000_1000
"""On the PC, connects the interrupt output to the bus."""
MCR_LOOPBACK: Final = 0b0001_0000
MCR_WRITABLE: Final = 0b0001_1111

LSR_DATA: Final = 0b0000_0001
LSR_OVERRUN: Final = 0b0000_0010
LSR_EMPTY: Final = 0b0110_0000
"""THRE and TEMT: the transmitter is always empty."""

MSR_DELTA: Final = 0b0000_1111
MSR_CTS: Final = 0b0001_0000
MSR_DSR: Final = 0b0010_0000
MSR_RI: Final = 0b0100_0000
MSR_DCD: Final = 0b1000_0000
MSR_TRAILING_RI: Final = 0b0000_0100
MSR_CONNECTED: Final = MSR_CTS | MSR_DSR | MSR_DCD

FIFO_SIZE: Final = 16
RX_TIMEOUT_NS: Final = 4 * 10 * 1_000_000_000 // 115_200
"""Four characters of ten bits at 115200 baud. The divisor latch does not change it: see docs/devices/uart.md."""


def _no_space_wanted() -> None:
    pass


@dataclass(slots=True)
class UartState(StateRecord):
    """Registers, the receive FIFO and pending interrupt conditions."""

    NAME: ClassVar[str] = "uart"

    ier: int = u8(maximum=0x0F)
    fcr: int = u8()
    lcr: int = u8()
    mcr: int = u8(maximum=MCR_WRITABLE)
    modem: int = u8(default=MSR_CONNECTED)
    delta: int = u8(maximum=MSR_DELTA)
    scr: int = u8()
    dll: int = u8()
    dlm: int = u8()
    overrun: bool = flag()
    thre_pending: bool = flag()
    timed_out: bool = flag()
    timeout_at: int = i64(default=-1, minimum=-1)
    received: bytes = fifo(FIFO_SIZE)

    def check_consistency(self) -> None:
        """The FIFO holds no more than its mode allows; modem lines have no other bits."""
        if self.modem & MSR_DELTA:
            raise StateError("uart state: modem has bits that are no line")
        if not self.fcr & FCR_ENABLE and len(self.received) > 1:
            raise StateError("uart state: received has more than one byte without FIFO")
        if self.fcr & ~0b1100_0001:
            raise StateError("uart state: fcr has bits that are not kept")


class Uart:
    """One serial port."""

    _ier: int
    _fcr: int
    _lcr: int
    _mcr: int
    _modem: int
    _delta: int
    _scr: int
    _dll: int
    _dlm: int
    _overrun: bool
    _thre_pending: bool
    _timed_out: bool
    _timeout_at: int
    _received: bytearray
    # Derived from the registers:
    _loopback: bool
    _plain_transmit: bool
    _thre_interrupts: bool
    _capacity: int
    _trigger: int

    def __init__(
        self,
        name: str,
        clock: Clock,
        irq: IrqLine,
        sink: Sink,
        events: Events = NO_EVENTS,
        wants_input: Callable[[], object] = _no_space_wanted,
        rx_timeout_ns: int = RX_TIMEOUT_NS,
    ) -> None:
        """
        ``sink`` takes each byte sent. ``wants_input`` is called when the receiver has become empty, so that whoever
        had bytes refused by :meth:`receive` may offer them again.
        """
        self.name = name
        self._clock = clock
        self._irq = irq
        self._sink = sink
        self._events = events
        self._wants_input = wants_input
        self._rx_timeout_ns = rx_timeout_ns
        self._load(UartState())

    def reset(self) -> None:
        """Master reset; the modem lines keep their levels, which the other end drives."""
        self._load(UartState(modem=self._modem))

    # ── the other end of the line ──

    def receive(self, data: bytes | bytearray | memoryview) -> int:
        """Bytes arrive; returns how many were accepted (0 if the FIFO is full or loopback is on)."""
        if self._loopback:
            return 0
        accepted = min(len(data), self._capacity - len(self._received))
        if accepted > 0:
            self._received.extend(data[:accepted])
            self._restart_timeout()
            self._update()
        return max(accepted, 0)

    def set_modem_lines(self, lines: int) -> None:
        """Drive CTS, DSR, RI and DCD (bits as in MSR)."""
        lines &= ~MSR_DELTA & 0xFF
        if not self._loopback:
            self._note_delta(self._modem, lines)
        self._modem = lines
        self._update()

    # ── registers ──

    def write(self, offset: int, size: int, value: int) -> None:
        """One of the eight registers."""
        if offset == DATA:
            if self._plain_transmit:
                self._sink(value)
                if self._thre_interrupts and not self._thre_pending:
                    self._thre_pending = True
                    self._update()
                return
            self._write_data(value)
        elif offset == IER:
            self._write_ier(value)
        elif offset == IIR_FCR:
            self._write_fcr(value)
        elif offset == LCR:
            self._lcr = value
            self._derive()
        elif offset == MCR:
            self._write_mcr(value & MCR_WRITABLE)
        elif offset == SCR:
            self._scr = value
        else:
            # LSR and MSR are read-only.
            self._events(self.name, "read-only-register", offset)

    def read(self, offset: int, size: int) -> int:
        """One of the eight registers."""
        if offset == LSR:
            value = LSR_EMPTY | (LSR_DATA if self._received else 0)
            if self._overrun:
                value |= LSR_OVERRUN
                self._overrun = False
                self._update()
            return value
        if offset == DATA:
            return self._dll if self._lcr & LCR_DLAB else self._read_data()
        if offset == IIR_FCR:
            return self._read_iir()
        if offset == IER:
            return self._dlm if self._lcr & LCR_DLAB else self._ier
        if offset == LCR:
            return self._lcr
        if offset == MCR:
            return self._mcr
        if offset == MSR:
            value = self._modem_seen() | self._delta
            self._delta = 0
            self._update()
            return value
        if offset == SCR:
            return self._scr
        self._events(self.name, "unknown-register", offset)
        return 0xFF

    def _write_data(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._dll = value
            return
        # Loopback: the transmitter feeds the receiver, and an unread byte is overrun.
        if len(self._received) < self._capacity:
            self._received.append(value)
            self._restart_timeout()
        else:
            if not self._fcr & FCR_ENABLE:
                self._received[-1] = value
            self._overrun = True
        self._thre_pending = True
        self._update()

    def _write_ier(self, value: int) -> None:
        if self._lcr & LCR_DLAB:
            self._dlm = value
            return
        if value & IER_THRE and not self._ier & IER_THRE:
            # Enabling the interrupt while THR is empty raises it.
            self._thre_pending = True
        self._ier = value & 0x0F
        self._derive()
        self._update()

    def _write_fcr(self, value: int) -> None:
        enabled = bool(value & FCR_ENABLE)
        if enabled != bool(self._fcr & FCR_ENABLE) or (enabled and value & FCR_CLEAR_RX):
            self._clear_received()
        self._fcr = value & 0b1100_0001 if enabled else 0
        self._derive()
        self._restart_timeout()
        self._update()
        if not self._received:
            self._wants_input()

    def _write_mcr(self, value: int) -> None:
        before = self._modem_seen()
        was_loopback = self._loopback
        self._mcr = value
        self._derive()
        if self._loopback and was_loopback:
            self._note_delta(before, self._modem_seen())
        self._update()
        if was_loopback and not self._loopback and not self._received:
            self._wants_input()

    def _read_data(self) -> int:
        received = self._received
        if not received:
            return 0
        value = received.pop(0)
        self._restart_timeout()
        self._update()
        if not received and not self._loopback:
            self._wants_input()
        return value

    def _read_iir(self) -> int:
        cause = self._cause()
        if cause == IIR_THRE:
            self._thre_pending = False
            self._update()
        return cause | IIR_FIFOS if self._fcr & FCR_ENABLE else cause

    # ── time ──

    def deadline(self) -> int | None:
        """When the receiver's time-out is due."""
        if self._timeout_at < 0 or not self._ier & IER_RECEIVE:
            return None
        return self._timeout_at

    def advance(self, now_ns: int) -> None:
        """Raises the time-out interrupt if it is due."""
        if 0 <= self._timeout_at <= now_ns:
            self._timeout_at = -1
            self._timed_out = True
            self._clock.rearm()
            self._update()

    # ── state ──

    def state(self) -> UartState:
        """Everything the guest could notice."""
        return capture(UartState, self)

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply; drives the interrupt line."""
        self._load(expect(UartState, state))

    def _load(self, state: UartState) -> None:
        assign(self, state)
        self._derive()
        self._clock.rearm()
        self._update()

    def _derive(self) -> None:
        """Recompute what the fast paths look at."""
        self._loopback = bool(self._mcr & MCR_LOOPBACK)
        self._plain_transmit = not self._loopback and not self._lcr & LCR_DLAB
        self._thre_interrupts = bool(self._ier & IER_THRE)
        self._capacity = FIFO_SIZE if self._fcr & FCR_ENABLE else 1
        self._trigger = TRIGGER_LEVELS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1

    def _clear_received(self) -> None:
        self._received.clear()
        self._timed_out = False

    def _restart_timeout(self) -> None:
        """A byte came or went: the time-out condition ends and starts anew."""
        self._timed_out = False
        waiting = 0 < len(self._received) < self._trigger
        timeout_at = self._clock.now_ns() + self._rx_timeout_ns if waiting else -1
        if timeout_at != self._timeout_at:
            self._timeout_at = timeout_at
            self._clock.rearm()

    def _modem_seen(self) -> int:
        """Modem lines as MSR shows them: in loopback, they are the modem control outputs."""
        if not self._loopback:
            return self._modem
        mcr = self._mcr
        return (
            (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )

    def _note_delta(self, before: int, after: int) -> None:
        changed = (before ^ after) >> 4
        trailing = MSR_TRAILING_RI if before & MSR_RI and not after & MSR_RI else 0
        self._delta |= changed & ~MSR_TRAILING_RI | trailing

    def _cause(self) -> int:
        ier = self._ier
        if ier & IER_LINE and self._overrun:
            return IIR_LINE
        if ier & IER_RECEIVE:
            if len(self._received) >= self._trigger:
                return IIR_DATA
            if self._timed_out:
                return IIR_TIMEOUT
        if ier & IER_THRE and self._thre_pending:
            return IIR_THRE
        if ier & IER_MODEM and self._delta:
            return IIR_MODEM
        return IIR_NONE

    def _update(self) -> None:
        connected = self._mcr & MCR_OUT2 and not self._loopback
        self._irq(bool(connected) and self._cause() != IIR_NONE)
