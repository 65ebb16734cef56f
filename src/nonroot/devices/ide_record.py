"""The state of the IDE controller as a record: two channels, four units, the bus master's registers."""

from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Final

from nonroot.devices.block import SECTOR
from nonroot.hvm.device import StateError, StateRecord, array, blob, fifo
from nonroot.hvm.pci import CONFIG_SIZE

__all__ = ["BUS_MASTER_FIELDS", "CHANNEL_FIELDS", "CHUNK", "UNIT_FIELDS", "Action", "IdeState", "Phase"]

CHUNK: Final = 256 * 1024
"""Bytes that a channel buffers at most."""


class Phase(IntEnum):
    """What a channel is doing."""

    IDLE = 0
    WORK = 1
    """A request is on its way; BSY."""
    DATA_IN = 2
    """The guest reads the buffer through the data register; DRQ."""
    DATA_OUT = 3
    """The guest fills the buffer through the data register; DRQ."""
    DMA = 4
    """The bus master has not been started yet, or its table was too short; DRQ."""


class Action(IntEnum):
    """Which command a channel is in the middle of."""

    NONE = 0
    READ = 1
    READ_DMA = 2
    WRITE = 3
    WRITE_DMA = 4
    VERIFY = 5
    FLUSH = 6
    REPLY = 7
    """Data of the device's own (IDENTIFY)."""
    PACKET = 8
    """The twelve bytes of a packet command are coming."""
    CD_READ = 9
    CD_READ_DMA = 10
    CD_REPLY = 11
    """A packet command's answer."""
    CD_REPLY_DMA = 12


WRITES: Final = (Action.WRITE, Action.WRITE_DMA)
FROM_DISK: Final = (Action.READ, Action.READ_DMA, Action.WRITE, Action.WRITE_DMA, Action.VERIFY, Action.FLUSH)
FROM_CD: Final = (Action.PACKET, Action.CD_READ, Action.CD_READ_DMA, Action.CD_REPLY, Action.CD_REPLY_DMA)
READS: Final = (Action.READ, Action.READ_DMA, Action.VERIFY, Action.CD_READ, Action.CD_READ_DMA)
DMA_ACTIONS: Final = (Action.READ_DMA, Action.WRITE_DMA, Action.CD_READ_DMA, Action.CD_REPLY_DMA)
IN_ACTIONS: Final = (Action.READ, Action.REPLY, Action.CD_READ, Action.CD_REPLY)
OUT_ACTIONS: Final = (Action.WRITE, Action.PACKET)
PACKET_LENGTH: Final = 12


@dataclass(slots=True)
class IdeState(StateRecord):
    """Fields named in :data:`UNIT_FIELDS` have four items (channel * 2 + unit), the others of the channels two."""

    NAME: ClassVar[str] = "ide"

    config: bytes = blob(CONFIG_SIZE)
    # per unit; the 16-bit registers hold the previous byte above the current one
    status: tuple[int, ...] = array("B", 4)
    error: tuple[int, ...] = array("B", 4)
    features: tuple[int, ...] = array("H", 4)
    count: tuple[int, ...] = array("H", 4)
    lba_low: tuple[int, ...] = array("H", 4)
    lba_mid: tuple[int, ...] = array("H", 4)
    lba_high: tuple[int, ...] = array("H", 4)
    device: tuple[int, ...] = array("B", 4)
    multiple: tuple[int, ...] = array("B", 4, maximum=16)
    mode: tuple[int, ...] = array("B", 4)
    write_cache: tuple[int, ...] = array("B", 4, default=1, maximum=1)
    heads: tuple[int, ...] = array("B", 4, default=16, minimum=1, maximum=16)
    sectors: tuple[int, ...] = array("B", 4, default=63, minimum=1)
    sense: tuple[int, ...] = array("I", 4, maximum=0xF_FFFF)
    attention: tuple[int, ...] = array("I", 4, maximum=0xF_FFFF)
    locked: tuple[int, ...] = array("B", 4, maximum=1)
    tray_open: tuple[int, ...] = array("B", 4, maximum=1)
    media_event: tuple[int, ...] = array("B", 4, maximum=3)
    # per channel
    control: tuple[int, ...] = array("B", 2, maximum=0x86)
    selected: tuple[int, ...] = array("B", 2, maximum=1)
    interrupt: tuple[int, ...] = array("B", 2, maximum=1)
    phase: tuple[int, ...] = array("B", 2, maximum=max(Phase))
    action: tuple[int, ...] = array("B", 2, maximum=max(Action))
    actor: tuple[int, ...] = array("B", 2, maximum=1)
    flushing: tuple[int, ...] = array("B", 2, maximum=1)
    flush_after: tuple[int, ...] = array("B", 2, maximum=1)
    lba: tuple[int, ...] = array("Q", 2, maximum=1 << 48)
    left: tuple[int, ...] = array("I", 2)
    block: tuple[int, ...] = array("I", 2, default=SECTOR, minimum=1, maximum=1 << 16)
    position: tuple[int, ...] = array("I", 2, maximum=CHUNK)
    issued: tuple[int, ...] = array("q", 2, minimum=0)
    bm_command: tuple[int, ...] = array("B", 2, maximum=0x09)
    bm_status: tuple[int, ...] = array("B", 2, maximum=0x67)
    bm_table: tuple[int, ...] = array("I", 2)
    prd_next: tuple[int, ...] = array("I", 2)
    prd_address: tuple[int, ...] = array("Q", 2, maximum=1 << 33)
    prd_left: tuple[int, ...] = array("I", 2, maximum=CHUNK + (1 << 16))
    prd_last: tuple[int, ...] = array("B", 2, maximum=1)
    buffer0: bytes = fifo(CHUNK)
    buffer1: bytes = fifo(CHUNK)

    def check_consistency(self) -> None:
        """A transfer under way is one that a command could have begun."""
        for number, buffer in enumerate((self.buffer0, self.buffer1)):
            problem = self._transfer_problem(number, len(buffer))
            if problem:
                raise StateError(f"ide state: {problem} on channel {number}")

    def _transfer_problem(self, number: int, size: int) -> str:
        phase, action = Phase(self.phase[number]), Action(self.action[number])
        left, position = self.left[number], self.position[number]
        wanted = min(left * SECTOR, CHUNK)
        if self.bm_table[number] & 3:
            return "bm_table is not aligned"
        if action in FROM_DISK and left > 0x1_0000:
            return "left is more than a command can ask for"
        if (phase is Phase.IDLE) != (action is Action.NONE):
            return "action does not fit the phase"
        if phase is Phase.WORK:
            flushing = self.flushing[number] == 1
            good = (
                action in READS
                or (action in WRITES and (left > 0 or flushing))
                or (action is Action.FLUSH and flushing)
            )
            if action in WRITES and not flushing:
                good = size > 0 and size % SECTOR == 0 and size <= wanted
            elif action in READS:
                good = left > 0
        elif phase is Phase.DATA_IN:
            good = action in IN_ACTIONS and position < size
        elif phase is Phase.DATA_OUT:
            good = action in OUT_ACTIONS and size < (PACKET_LENGTH if action is Action.PACKET else wanted)
        elif phase is Phase.DMA:
            good = action in DMA_ACTIONS and position <= size and (left > 0 or size > 0)
        else:
            good = size == 0
        return "" if good else "action, left, position and buffer do not fit together"


UNIT_FIELDS: Final = (
    *("status", "error", "features", "count", "lba_low", "lba_mid", "lba_high", "device", "multiple", "mode"),
    *("write_cache", "heads", "sectors", "sense", "attention", "locked", "tray_open", "media_event"),
)
"""Fields of :class:`IdeState` that are a unit's."""
CHANNEL_FIELDS: Final = (
    *("control", "selected", "interrupt", "phase", "action", "actor", "flushing", "flush_after", "lba", "left"),
    *("block", "position", "issued"),
)
"""Fields of :class:`IdeState` that are a channel's."""
BUS_MASTER_FIELDS: Final = (
    *("bm_command", "bm_status", "bm_table"),
    *("prd_next", "prd_address", "prd_left", "prd_last"),
)
"""Fields of :class:`IdeState` that are those of a channel's bus master."""
