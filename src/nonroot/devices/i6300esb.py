"""The watchdog of the Intel 6300ESB (8086:25ab): two stages, the second of which resets the machine.

The counters run at 33 MHz divided by 2**15 or 2**5. The first stage's interrupt reaches nobody (systems switch it
off); its status bit is set. Registers that start or stop anything are written after the unlocking sequence only.

Source: Intel 6300ESB I/O controller hub datasheet (300641), chapter 13.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Final

from nonroot.devices.pci_device import UNCONNECTED, Bar, BarKind, PciConnection, PciDevice, PciIdentity
from nonroot.hvm.device import (
    NO_EVENTS,
    Clock,
    Events,
    StateError,
    StateRecord,
    array,
    blob,
    expect,
    flag,
    i64,
    u8,
)
from nonroot.hvm.pc import WATCHDOG_SLOT, Board
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = ["I6300Esb", "I6300EsbState", "attach_watchdog"]

# BAR 0
PRELOAD_1: Final = 0x0
PRELOAD_2: Final = 0x4
STATUS: Final = 0x8
RELOAD: Final = 0xC
LENGTH: Final = 0x10

PRELOAD_MAXIMUM: Final = 0xF_FFFF
STATUS_STAGE_1: Final = 1 << 0
RELOAD_PING: Final = 1 << 8
RELOAD_TIMED_OUT: Final = 1 << 9
UNLOCK: Final = (0x80, 0x86)

# Configuration space
CONFIG: Final = 0x60
CONFIG_FAST: Final = 1 << 2
CONFIG_NO_RESET: Final = 1 << 5
LOCK: Final = 0x68
LOCK_LOCKED: Final = 1 << 0
LOCK_ENABLED: Final = 1 << 1
LOCK_FREE_RUNNING: Final = 1 << 2

CLOCK_HZ: Final = 33_000_000
SECOND: Final = 1_000_000_000
NEVER: Final = -1


@dataclass(slots=True)
class I6300EsbState(StateRecord):
    """Registers, and when the present stage ends (machine time in ns; -1: it does not run)."""

    NAME: ClassVar[str] = "i6300esb"

    config: bytes = blob(CONFIG_SIZE)
    preload: tuple[int, ...] = array("I", 2, default=PRELOAD_MAXIMUM, maximum=PRELOAD_MAXIMUM)
    status: int = u8(maximum=STATUS_STAGE_1)
    timed_out: bool = flag()
    unlocked: int = u8(maximum=2)
    stage: int = u8(default=1, maximum=2)
    ends_ns: int = i64(default=NEVER, minimum=NEVER)

    def check_consistency(self) -> None:
        """Stages are numbered from 1."""
        if self.stage == 0:
            raise StateError("i6300esb state: stage is 0")


class I6300Esb(PciDevice):
    """The watchdog; it does nothing until the guest enables it."""

    def __init__(
        self,
        clock: Clock,
        request_reset: Callable[[], object],
        connection: PciConnection = UNCONNECTED,
        events: Events = NO_EVENTS,
    ) -> None:
        """``request_reset`` is called when the second stage ends."""
        super().__init__(
            "i6300esb",
            PciIdentity(0x8086, 0x25AB, 0x08_80_00),
            [Bar(0, BarKind.MEMORY, LENGTH)],
            connection,
            writable=[(CONFIG, 2, 0x27), (LOCK, 1, 0x07)],
        )
        self._clock = clock
        self._request_reset = request_reset
        self._events = events
        self._load(I6300EsbState(bytes(self.data)))

    def reset(self) -> None:
        """Stopped; that the watchdog has reset the machine stays known."""
        super().reset()
        self._load(I6300EsbState(bytes(self.data), timed_out=self._timed_out))

    # ── registers ──

    def read(self, offset: int, size: int) -> int:
        """The preload values read back, as does the time-out bit; everything else is zero."""
        value = 0
        if offset in (PRELOAD_1, PRELOAD_2):
            value = self._preload[offset // 4]
        elif offset == STATUS:
            value = self._status
        elif offset == RELOAD:
            value = RELOAD_TIMED_OUT if self._timed_out else 0
        else:
            self._events(self.name, "unknown-register", offset)
        return value & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """The unlocking sequence, or what it unlocks."""
        if offset == RELOAD and value == UNLOCK[0]:
            self._unlocked = 1
        elif offset == RELOAD and value == UNLOCK[1] and self._unlocked == 1:
            self._unlocked = 2
        elif offset == STATUS:
            self._status &= ~value
        elif self._unlocked != 2:
            self._events(self.name, "locked-register", offset)
            self._unlocked = 0
        else:
            self._unlocked = 0
            self._unlocked_write(offset, value)

    def _unlocked_write(self, offset: int, value: int) -> None:
        if offset in (PRELOAD_1, PRELOAD_2):
            self._preload[offset // 4] = value & PRELOAD_MAXIMUM
        elif offset == RELOAD:
            if value & RELOAD_TIMED_OUT:
                self._timed_out = False
            if value & RELOAD_PING and self._ends_ns != NEVER:
                self._begin(1, self._clock.now_ns())
        else:
            self._events(self.name, "unknown-register", offset)

    def config_write(self, register: int, size: int, value: int) -> None:
        """A store; while the lock bit is set, the lock register keeps its value."""
        before = self.data[LOCK]
        super().config_write(register, size, value)
        if before & LOCK_LOCKED:
            self.data[LOCK] = before
        if (before ^ self.data[LOCK]) & LOCK_ENABLED:
            if self.data[LOCK] & LOCK_ENABLED:
                self._begin(1, self._clock.now_ns())
            else:
                self._ends_ns = NEVER
                self._clock.rearm()

    # ── time ──

    def _begin(self, stage: int, now_ns: int) -> None:
        shift = 5 if self.data[CONFIG] & CONFIG_FAST else 15
        ticks = max(self._preload[stage - 1], 1) << shift
        self._stage = stage
        self._ends_ns = now_ns + max(ticks * SECOND // CLOCK_HZ, 1)
        self._clock.rearm()

    def deadline(self) -> int | None:
        """The end of the present stage."""
        return None if self._ends_ns == NEVER else self._ends_ns

    def advance(self, now_ns: int) -> None:
        """The end of the first stage begins the second, its end resets the machine (or begins the first again)."""
        if self._ends_ns == NEVER or now_ns < self._ends_ns:
            return
        free_running = self.data[LOCK] & LOCK_FREE_RUNNING
        if self._stage == 1 and not free_running:
            self._status |= STATUS_STAGE_1
            self._begin(2, now_ns)
            return
        if free_running:
            self._status |= STATUS_STAGE_1
            self._begin(1, now_ns)
            return
        self._timed_out = True
        self._begin(1, now_ns)
        self._events(self.name, "timed-out", self.data[CONFIG])
        if not self.data[CONFIG] & CONFIG_NO_RESET:
            self._ends_ns = NEVER
            self._request_reset()

    # ── records ──

    def state(self) -> I6300EsbState:
        """Everything."""
        return I6300EsbState(
            bytes(self.data),
            tuple(self._preload),
            self._status,
            self._timed_out,
            self._unlocked,
            self._stage,
            self._ends_ns,
        )

    def from_state(self, state: StateRecord) -> None:
        """Check, then apply."""
        record = expect(I6300EsbState, state)
        self.load_config(record.config)
        self._load(record)

    def _load(self, record: I6300EsbState) -> None:
        self._preload = list(record.preload)
        self._status = record.status
        self._timed_out = record.timed_out
        self._unlocked = record.unlocked
        self._stage = record.stage
        self._ends_ns = record.ends_ns
        self._clock.rearm()


def attach_watchdog(board: Board) -> I6300Esb:
    """The watchdog in its slot."""
    slot, function = WATCHDOG_SLOT
    watchdog = I6300Esb(board.clock, board.request_reset, board.connect(slot, function), board.events)
    board.add_pci(slot, function, watchdog)
    return watchdog
