"""A domain's screen, keyboard and mouse, as a client uses them. All methods can be called from any thread."""

import base64
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from nonroot.display.keys import BUTTONS, key_number, parse_keys, strokes
from nonroot.domain.client import DomainClient
from nonroot.errors import BadOptionError, InternalError, UnsupportedError, WaitTimeoutError

if TYPE_CHECKING:
    from PIL.Image import Image

    from nonroot.devices.vga_state import VgaState
    from nonroot.display.render import Renderer

__all__ = ["Keyboard", "Mouse", "Screen"]

ANSWER_TIMEOUT = 60.0
TAIL = 12


class Keyboard:
    """The guest's keyboard: a US one, so what text comes out is for the guest's own keyboard layout to decide."""

    def __init__(self, send: Callable[[list[tuple[int, bool]]], None]) -> None:
        self._send = send

    def type(self, text: str) -> None:
        """Type text; names in ``<>`` are keys: ``"root<ret>"``, ``"<ctrl-alt-del>"``, ``"<f12>"``. ``<lt>`` is ``<``.

        Keys are given to the guest one by one, in its own time; this does not wait for that. BadOptionError for what a
        US keyboard does not have.
        """
        self._send(list(strokes(parse_keys(text))))

    def press(self, *names: str) -> None:
        """Press keys by name (``"ctrl"``, ``"a"``, ``"f1"``) and hold them."""
        self._send([(key_number(name), True) for name in names])

    def release(self, *names: str) -> None:
        """Release keys."""
        self._send([(key_number(name), False) for name in names])


class Mouse:
    """The guest's PS/2 mouse: it moves by steps; where its pointer is, only the guest knows."""

    def __init__(self, send: Callable[[int, int, int, int], None]) -> None:
        self._send = send
        self._held = 0

    def move(self, dx: int, dy: int) -> None:
        """So many steps to the right and down."""
        self._send(dx, dy, 0, self._held)

    def wheel(self, steps: int) -> None:
        """Turn the wheel; down is positive."""
        self._send(0, 0, steps, self._held)

    def press(self, button: str = "left") -> None:
        """Press ``left``, ``right``, ``middle``, ``side`` or ``extra``, and hold it."""
        self._held |= 1 << _button(button)
        self._send(0, 0, 0, self._held)

    def release(self, button: str = "left") -> None:
        """Release it."""
        self._held &= ~(1 << _button(button))
        self._send(0, 0, 0, self._held)

    def click(self, button: str = "left") -> None:
        """Press and release."""
        self.press(button)
        self.release(button)


def _button(name: str) -> int:
    if name not in BUTTONS:
        raise BadOptionError(f"a mouse has no button {name[:40]!r}; there are: {', '.join(BUTTONS)}")
    return BUTTONS[name]


class Screen:
    """What a domain shows, and its input devices. UnsupportedError, at the first use, if it has none."""

    def __init__(self, client: DomainClient) -> None:
        self.keyboard = Keyboard(self._type)
        self.mouse = Mouse(self._point)
        self._client = client
        self._memory: mmap.mmap | None = None
        self._renderer: Renderer | None = None
        self._lock = threading.Lock()

    def image(self) -> "Image":
        """The screen now: a Pillow image, mode RGB, one pixel for each of the guest's."""
        from nonroot.display.render import Renderer

        _, state = self._now()
        memory = self._open()
        with self._lock:
            if self._renderer is None:
                self._renderer = Renderer(memoryview(memory))
            return self._renderer.render(state)

    def text(self) -> str:
        """The text on a screen in text mode, a line each, without trailing blanks. UnsupportedError in others."""
        rows = self._rows(self._now()[1])
        if rows is None:
            raise UnsupportedError("the screen shows a picture, not text")
        return "\n".join(rows).rstrip("\n")

    def wait_for_text(self, text: str, timeout: float = 60.0) -> str:
        """Wait until a text mode shows ``text``, within a line; returns the whole screen's text.

        WaitTimeoutError after ``timeout`` seconds, with what the screen showed. The screen is looked at at most 30
        times a second, and only while the guest runs.
        """
        deadline = time.monotonic() + timeout
        serial, state = self._now()
        while True:
            rows = self._rows(state)
            if rows is not None and any(text in row for row in rows):
                return "\n".join(rows).rstrip("\n")
            left = deadline - time.monotonic()
            pending = self._client.submit("screen_wait", {"serial": serial})
            try:
                serial, state = _parse(pending.wait(max(left, 0)))
            except TimeoutError:
                shown = "a picture" if rows is None else "\n".join([row for row in rows if row][-TAIL:])
                raise WaitTimeoutError(
                    f"the screen did not show {text!r} in {timeout:g} seconds", screen=shown
                ) from None

    def close(self) -> None:
        """Forget the screen's memory."""
        with self._lock:
            self._renderer = None
            self._memory = None  # unmapped with its last view

    # ── inside ──

    def _now(self) -> "tuple[int, VgaState]":
        return _parse(self._client.request("screen", ANSWER_TIMEOUT))

    def _rows(self, state: "VgaState") -> list[str] | None:
        from nonroot.display.text import screen_rows

        return screen_rows(state, memoryview(self._open()))

    def _open(self) -> mmap.mmap:
        from nonroot.devices.vga_state import MEMORY_SIZE

        with self._lock:
            if self._memory is None:
                pending = self._client.submit("screen_memory")
                pending.wait(ANSWER_TIMEOUT)
                try:
                    self._memory = mmap.mmap(pending.fds[0], MEMORY_SIZE, mmap.MAP_SHARED, mmap.PROT_READ)
                except (ValueError, IndexError, OSError) as error:
                    raise InternalError(f"the domain's screen memory cannot be mapped: {error}") from None
                finally:
                    for fd in pending.fds:
                        os.close(fd)
            return self._memory

    def _type(self, keys: Iterable[tuple[int, bool]]) -> None:
        lost = self._client.request("type", ANSWER_TIMEOUT, strokes=[list(key) for key in keys])["lost"]
        if lost:
            raise BadOptionError(f"the guest takes keys more slowly than they come: {lost} of them were dropped")

    def _point(self, dx: int, dy: int, dz: int, buttons: int) -> None:
        if max(abs(dx), abs(dy), abs(dz)) >= 1 << 15:
            raise BadOptionError("a mouse moves at most 32767 steps at once")
        self._client.request("pointer", ANSWER_TIMEOUT, dx=dx, dy=dy, dz=dz, buttons=buttons)


def _parse(reply: dict[str, Any]) -> "tuple[int, VgaState]":
    from nonroot.devices.vga_state import VgaState

    try:
        return int(reply["serial"]), VgaState.unpack(base64.b64decode(reply["record"]))
    except (KeyError, ValueError) as error:
        raise InternalError(f"the domain describes its screen without sense: {error}") from None


class HasScreen:
    """What a domain's public classes offer of its screen; they have a connected ``_client``."""

    _client: DomainClient
    _the_screen: Screen | None = None

    def _seat(self) -> Screen:
        if self._the_screen is None:
            self._the_screen = Screen(self._client)
        return self._the_screen

    def _close_screen(self) -> None:
        if self._the_screen is not None:
            self._the_screen.close()

    def screen(self) -> "Image":
        """The screen now: a Pillow image, mode RGB, one pixel for each of the guest's."""
        return self._seat().image()

    def screen_text(self) -> str:
        """The text on a screen in text mode, a line each, without trailing blanks. UnsupportedError in others."""
        return self._seat().text()

    def wait_for_text(self, text: str, timeout: float = 60.0) -> str:
        """Wait until the screen, in a text mode, shows ``text`` within a line; returns all of its text.

        WaitTimeoutError after ``timeout`` seconds; ``details["screen"]`` has what was shown.
        """
        return self._seat().wait_for_text(text, timeout)

    @property
    def keyboard(self) -> Keyboard:
        """The guest's keyboard."""
        return self._seat().keyboard

    @property
    def mouse(self) -> Mouse:
        """The guest's mouse."""
        return self._seat().mouse

    def vnc(self, address: str | None = None, password: str | None = None) -> str:
        """Start the domain's VNC server, unless it runs; returns where it listens.

        :param address: ``unix:PATH`` or ``127.0.0.1:PORT`` (0: any free one); a private Unix socket without it.
        :param password: up to 8 bytes; needed on a TCP port.
        """
        return str(self._client.request("vnc", ANSWER_TIMEOUT, address=address, password=password)["address"])

    def web(self, progress: Callable[[str, float], None] | None = None) -> str:
        """A link that opens the screen in a browser on this machine, once.

        noVNC is fetched at the first use, with ``progress``; SoftwareMissingError if it cannot be had.
        """
        from nonroot.guests.packages import package

        self.vnc()
        root = package("novnc", progress=progress) / "usr/share/novnc"
        return str(self._client.request("web", ANSWER_TIMEOUT, root=os.fspath(root))["url"])
