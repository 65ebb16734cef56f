"""The domain process's side of a screen: what its clients may ask of display, keyboard and mouse.

The loop's thread calls this; what concerns the devices is done in the vCPU's thread, between two instructions. Clients
draw by themselves: they get the adapter's record, and its memory as a descriptor. Who waits for a change is answered
when there is one, found by looking at a bounded rate while the guest runs; while it is halted, nobody looks.
"""

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from nonroot.errors import BadOptionError, NonrootError, UnsupportedError

if TYPE_CHECKING:
    from nonroot.devices.display import Console
    from nonroot.devices.vga_state import VgaState
    from nonroot.stubdom.proxies import RemoteConsole

__all__ = ["DisplayService", "Seat"]

LOOK_EVERY = 0.03
"""Seconds between two looks, while somebody waits and the guest runs."""
MAX_STROKES = 8192


class Client(Protocol):
    """Who asks."""

    def reply(self, request: int, result: dict[str, Any], fds: list[int] | None = None) -> None:
        """The answer."""

    def fail(self, request: int, error: NonrootError) -> None:
        """The answer is an error."""


@dataclass
class Seat:
    """A machine's console as the vCPU's thread sees it."""

    devices: "Console | RemoteConsole"
    memory_fd: int
    """A read-only descriptor of the adapter's memory."""
    progress: Callable[[], int]
    """Counts the guest's instructions: the same as last time, and nothing has been drawn."""
    watch: Callable[[], object]
    """Ask to be told once, when the guest has gone on."""
    serial: int = 1
    seen: int = -1
    ran: int = -1

    def look(self) -> "Look":
        """Whether the picture may have changed since the last look. In the vCPU's thread."""
        vga = self.devices.vga
        ran = self.progress()
        idle, self.ran = ran == self.ran, ran
        if idle:
            self.watch()
        damage = vga.memory.take_damage()
        changed = vga.changes != self.seen
        self.seen = vga.changes
        if not changed and damage:
            changed = _is_shown(vga.state(), damage)
        if changed:
            self.serial += 1
        return Look(self.serial, vga.state(), idle)

    def type(self, strokes: list[tuple[int, bool]]) -> int:
        """Keys for the guest; returns how many found no room. In the vCPU's thread."""
        return sum(not self.devices.ps2.key(key, pressed) for key, pressed in strokes)


@dataclass(frozen=True, slots=True)
class Look:
    """What a look has found."""

    serial: int
    """Grows when the picture may have changed."""
    state: "VgaState"
    idle: bool
    """The guest has not run since the last look."""

    def to_wire(self) -> dict[str, Any]:
        """As a reply carries it."""
        return {"serial": self.serial, "record": base64.b64encode(self.state.pack()).decode()}


def _is_shown(state: "VgaState", damage: list[tuple[int, int]]) -> bool:
    """Whether some of ``damage`` is on the screen."""
    from nonroot.devices.vga_state import SHADOW, SHADOW_SIZE, picture

    shown = picture(state)
    if shown.is_text and state.shadow:
        low, high = SHADOW, SHADOW + SHADOW_SIZE
    elif shown.is_text or state.shadow or shown.split < shown.height or shown.row_bits:
        return True
    else:
        low, high = shown.start, shown.start + shown.extent()
    return any(offset < high and low < offset + length for offset, length in damage)


class DisplayService:
    """One for each domain process."""

    def __init__(self, seat: Seat | None, call: Callable[[Callable[[], Any], Callable[[Any], None]], None]) -> None:
        """``call``: ask a question in the vCPU's thread; the answer comes in the loop's."""
        self._seat = seat
        self._call = call
        self._waiters: list[tuple[Client, int, int]] = []
        self._looking = False
        self._over: NonrootError | None = None
        self.due: float | None = None
        """When (time.monotonic) :meth:`look` wants to be called; None: not at all."""

    def _need(self) -> Seat:
        if self._seat is None:
            raise UnsupportedError("this domain has no screen and no keyboard: it was made without a display")
        return self._seat

    def check(self) -> None:
        """UnsupportedError if there is no screen."""
        self._need()

    # ── requests ──

    def memory(self, client: Client, request: int) -> None:
        """A descriptor of the adapter's memory."""
        client.reply(request, {}, [self._need().memory_fd])

    def screen(self, client: Client, request: int) -> None:
        """What is shown now."""
        self._ask(client, request, lambda: self._need().look().to_wire())

    def wait(self, client: Client, request: int, params: dict[str, Any]) -> None:
        """Answer when the picture's serial number is another than ``serial``."""
        self._need()
        serial = params.get("serial")
        if not isinstance(serial, int):
            raise BadOptionError("screen_wait needs the serial number of the last picture")
        self._waiters.append((client, request, serial))
        if self.due is None and not self._looking:
            self.due = time.monotonic()

    def type(self, client: Client, request: int, params: dict[str, Any]) -> None:
        """Keys: a list of (number, pressed)."""
        seat = self._need()
        strokes: list[tuple[int, bool]] = []
        given = params.get("strokes")
        if not isinstance(given, list) or len(given) > MAX_STROKES:
            raise BadOptionError(f"type needs a list of at most {MAX_STROKES} strokes")
        for item in given:
            match item:
                case [int(key), bool(pressed)] if 0 < key < 0x100:
                    strokes.append((key, pressed))
                case _:
                    raise BadOptionError("a stroke is a key's number and whether it goes down")
        self._ask(client, request, lambda: {"lost": seat.type(strokes)})

    def pointer(self, client: Client, request: int, params: dict[str, Any]) -> None:
        """Movement and buttons of the mouse."""
        seat = self._need()
        values = [params.get(name, 0) for name in ("dx", "dy", "dz")]
        buttons = params.get("buttons")
        if not all(isinstance(value, int) and abs(value) < 1 << 15 for value in values) or not (
            buttons is None or isinstance(buttons, int)
        ):
            raise BadOptionError("pointer needs small whole numbers dx, dy, dz, and buttons")

        def move() -> dict[str, Any]:
            seat.devices.ps2.move(values[0], values[1], values[2], buttons)
            return {}

        self._ask(client, request, move)

    def _ask(self, client: Client, request: int, question: Callable[[], dict[str, Any]]) -> None:
        self._need()

        def answer(result: dict[str, Any] | NonrootError) -> None:
            if isinstance(result, NonrootError):
                client.fail(request, result)
            else:
                client.reply(request, result)

        self._call(question, answer)

    # ── waiting for a change ──

    def over(self, error: NonrootError) -> None:
        """The guest has stopped: after what has changed last, waiting is in vain."""
        self._over = error
        if self._waiters and not self._looking:
            self.due = time.monotonic()

    def forget(self, client: Client) -> None:
        """A client has gone."""
        self._waiters = [waiter for waiter in self._waiters if waiter[0] is not client]
        if not self._waiters:
            self.due = None

    def look(self) -> None:
        """It is time to look for changes."""
        self.due = None
        if self._seat is not None and self._waiters and not self._looking:
            self._looking = True
            self._call(self._seat.look, self._looked)

    def _looked(self, result: Look | NonrootError) -> None:
        self._looking = False
        if isinstance(result, NonrootError):
            for client, request, _ in self._waiters:
                client.fail(request, result)
            self._waiters.clear()
            return
        ready = [waiter for waiter in self._waiters if waiter[2] != result.serial]
        self._waiters = [waiter for waiter in self._waiters if waiter[2] == result.serial]
        if ready:
            record = result.to_wire()
            for client, request, _ in ready:
                client.reply(request, record)
        if not self._waiters:
            return
        if self._over is not None and result.idle:
            for client, request, _ in self._waiters:
                client.fail(request, self._over)
            self._waiters.clear()
        elif not result.idle:
            self.due = time.monotonic() + LOOK_EVERY

    def goes_on(self) -> None:
        """The guest runs again."""
        if self._waiters and self.due is None and not self._looking:
            self.due = time.monotonic() + LOOK_EVERY
