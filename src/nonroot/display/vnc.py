"""The VNC server: viewers of one domain's screen, on Unix sockets, loopback ports and WebSockets.

The screen is looked at only while some viewer waits for a change; of a viewer that takes nothing, only the rectangles
that it has not got are remembered. Keys and pointer movements go to the domain one message at a time; what comes while
one is under way is joined (movements), queued up to a limit (keys), or dropped.
"""

import asyncio
import contextlib
import hmac
import os
import secrets
import stat
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol

from nonroot.display import rfb
from nonroot.display.encode import Encoder, Rect, colour_map
from nonroot.display.keys import keysym_to_key
from nonroot.display.link import ControlLink, parse_screen
from nonroot.display.rfb import Encoding, ProtocolError, RfbSession
from nonroot.errors import NonrootError

if TYPE_CHECKING:
    from PIL.Image import Image

    from nonroot.display.render import Renderer

__all__ = ["MAX_VIEWERS", "Transport", "Viewer", "VncServer", "des_response"]

MAX_VIEWERS: Final = 16
HANDSHAKE_TIMEOUT: Final = 20.0
"""Seconds for a viewer to come in."""
REFUSAL_DELAY: Final = 1.0
"""Seconds that a wrong password costs."""
KEYS_QUEUED: Final = 512
MOVES_QUEUED: Final = 64
"""Changes of the mouse's buttons on their way; movements between two of them are joined."""
LOOK_EVERY: Final = 0.02
"""Seconds at least between two looks that viewers cause by asking."""
BAND: Final = 64
"""Rows of the picture that are compared, and sent, together."""
RELATIVE_ORIGIN: Final = 0x7FFF
WHEEL_UP: Final = 8
WHEEL_DOWN: Final = 16


class Transport(Protocol):
    """A stream of bytes to a viewer."""

    async def receive(self) -> bytes:
        """Some bytes; none at the end. OSError."""

    async def send(self, data: bytes) -> None:
        """Send, and wait until most of it has been taken. OSError."""


class SocketTransport:
    """A socket's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def receive(self) -> bytes:
        """Some bytes."""
        return await self._reader.read(1 << 16)

    async def send(self, data: bytes) -> None:
        """Send and wait."""
        self._writer.write(data)
        await self._writer.drain()


def des_response(password: bytes, challenge: bytes) -> bytes:
    """What a viewer that knows the password answers: DES with each byte of the key mirrored, as VNC has it."""
    from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
    from cryptography.hazmat.primitives.ciphers import Cipher, modes

    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password[:8].ljust(8, b"\0"))
    encryptor = Cipher(TripleDES(key * 3), modes.ECB()).encryptor()  # three times the same key is single DES
    return encryptor.update(challenge) + encryptor.finalize()


class Input:
    """What viewers type and point at, on its way to the domain."""

    def __init__(self, link: ControlLink) -> None:
        self._link = link
        self._keys: deque[tuple[int, bool]] = deque()
        self._moves: deque[list[int]] = deque()
        self._wakeup = asyncio.Event()

    def key(self, key: int, pressed: bool) -> None:
        """A key; releases are never dropped."""
        if len(self._keys) < (KEYS_QUEUED if pressed else 2 * KEYS_QUEUED):
            self._keys.append((key, pressed))
            self._wakeup.set()

    def move(self, dx: int, dy: int, dz: int, buttons: int) -> None:
        """The mouse."""
        if self._moves and (self._moves[-1][3] == buttons or len(self._moves) >= MOVES_QUEUED):
            last = self._moves[-1]
            last[:] = [max(-0x4000, min(0x3FFF, old + new)) for old, new in zip(last, (dx, dy, dz), strict=False)]
            last.append(buttons)
        else:
            self._moves.append([dx, dy, dz, buttons])
        self._wakeup.set()

    async def run(self) -> None:
        """Send what there is, one message at a time, for ever."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            with contextlib.suppress(NonrootError):
                if self._keys:
                    strokes = [list(stroke) for stroke in self._keys]
                    self._keys.clear()
                    await self._link.request("type", strokes=strokes)
                while self._moves:
                    dx, dy, dz, buttons = self._moves.popleft()
                    await self._link.request("pointer", dx=dx, dy=dy, dz=dz, buttons=buttons)


class Viewer:
    """One connected viewer."""

    def __init__(self, server: "VncServer", transport: Transport, size: tuple[int, int], trusted: bool) -> None:
        self._server = server
        self._transport = transport
        check = None if server.password is None or trusted else server.check
        self.session = RfbSession(size, server.title, check, secrets.token_bytes(16))
        self.size = size
        """Of the screen as the viewer knows it."""
        self.damage: dict[int, tuple[int, int]] = {}
        """Bands of rows that the viewer has not got: number -> (left, right)."""
        self.wants = False
        """It waits for an update."""
        self._encoder = Encoder()
        self._knows_size = False
        self._tell: list[Encoding] = []
        self._relative = False
        self._last: tuple[int, int] | None = None
        self._wheel = 0
        self._held: set[int] = set()
        self._wakeup = asyncio.Event()

    # ── its life ──

    async def run(self) -> None:
        """Serve it until it goes. ProtocolError and OSError end it, and nothing else does."""
        sender: asyncio.Task[None] | None = None
        try:
            await self._flush()
            async with asyncio.timeout(HANDSHAKE_TIMEOUT):
                while not self.session.started:
                    await self._step()
            sender = asyncio.create_task(self._send_updates())
            while await self._step():
                pass
        finally:
            for key in self._held:
                self._server.input.key(key, False)
            if sender is not None:
                sender.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await sender

    async def _step(self) -> bool:
        data = await self._transport.receive()
        if not data:
            if not self.session.started:
                raise ProtocolError("gone before it came in")
            return False
        try:
            for event in self.session.feed(data):
                self._handle(event)
        except ProtocolError as error:
            if str(error) == "wrong password":
                await asyncio.sleep(REFUSAL_DELAY)
            with contextlib.suppress(OSError):
                await self._flush()
            raise
        await self._flush()
        return True

    async def _flush(self) -> None:
        if self.session.outgoing:
            data = bytes(self.session.outgoing)
            self.session.outgoing.clear()
            await self._transport.send(data)

    # ── what it says ──

    def _handle(self, event: rfb.Event) -> None:
        match event:
            case rfb.UpdateRequest():
                if not event.incremental:
                    self.add_damage((event.x, event.y, event.x + event.width, event.y + event.height))
                self.wants = True
                self._wakeup.set()
                self._server.wake()
            case rfb.Key():
                key = event.code or keysym_to_key(event.keysym)
                if key:
                    (self._held.add if event.pressed else self._held.discard)(key)
                    self._server.input.key(key, event.pressed)
            case rfb.Pointer():
                self._point(event)
            case rfb.SetPixelFormat():
                self._encoder.set_format(event.format)
                if not event.format.true_colour:
                    self.session.outgoing += colour_map()
                self.add_damage((0, 0, *self.size))
            case rfb.SetEncodings():
                self._encoder.encodings = event.encodings
                self._knows_size = Encoding.DESKTOP_SIZE in event.encodings
                told = (Encoding.EXTENDED_KEYS, Encoding.POINTER_MOTION)
                self._tell = [encoding for encoding in told if encoding in event.encodings]
                self._relative = Encoding.POINTER_MOTION in event.encodings
            case _:
                pass

    def _point(self, event: rfb.Pointer) -> None:
        held = event.buttons & 1 | (event.buttons & 4) >> 1 | (event.buttons & 2) << 1
        turned = event.buttons & ~self._wheel
        self._wheel = event.buttons & (WHEEL_UP | WHEEL_DOWN)
        dz = (1 if turned & WHEEL_DOWN else 0) - (1 if turned & WHEEL_UP else 0)
        if self._relative:
            dx, dy = event.x - RELATIVE_ORIGIN, event.y - RELATIVE_ORIGIN
        else:
            last = self._last or (event.x, event.y)
            dx, dy = event.x - last[0], event.y - last[1]
            self._last = (event.x, event.y)
        self._server.input.move(dx, dy, dz, held)

    # ── what it gets ──

    def wake(self) -> None:
        """There may be something to send."""
        self._wakeup.set()

    def add_damage(self, rect: Rect) -> None:
        """It has not got this part of the screen."""
        left, top, right, bottom = rect
        width, height = self.size
        right, bottom = min(right, width), min(bottom, height)
        if left >= right:
            return
        for band in range(top // BAND, -(-bottom // BAND)):
            old = self.damage.get(band, (left, right))
            self.damage[band] = (min(left, old[0]), max(right, old[1]))
        self._wakeup.set()

    async def _send_updates(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            picture = self._server.picture
            if not self.wants or picture is None or not self._server.fresh:
                continue
            data = self._update(picture)
            if data is not None:
                self.wants = False
                await self._transport.send(data)

    def _update(self, picture: "Image") -> bytes | None:
        """The next update; None if there is nothing to tell."""
        extra = []
        if picture.size != self.size and self._knows_size:
            self.size = picture.size
            extra.append(_pseudo(0, 0, *self.size, Encoding.DESKTOP_SIZE))
            self.damage.clear()
            self.add_damage((0, 0, *self.size))
            self._wakeup.clear()
        for encoding in self._tell:
            extra.append(_pseudo(0, 0, *self.size, encoding))  # noqa: PERF401
        self._tell = []
        rects = self._take_damage()
        if not rects and not extra:
            return None
        if picture.size != self.size:  # it cannot be told: it sees what fits
            from PIL import Image

            fitted = Image.new("RGB", self.size)
            fitted.paste(picture, (0, 0))
            picture = fitted
        return self._encoder.update(picture, rects, extra)

    def _take_damage(self) -> list[Rect]:
        rects: list[Rect] = []
        height = self.size[1]
        for band, (left, right) in sorted(self.damage.items()):
            top, bottom = band * BAND, min((band + 1) * BAND, height)
            if rects and rects[-1][3] == top and (rects[-1][0], rects[-1][2]) == (left, right):
                rects[-1] = (left, rects[-1][1], right, bottom)
            elif top < bottom:
                rects.append((left, top, right, bottom))
        self.damage.clear()
        return rects


def _pseudo(x: int, y: int, width: int, height: int, encoding: Encoding) -> bytes:
    return struct.pack(">HHHHi", x, y, width, height, encoding)


class VncServer:
    """The viewers of one domain, and the picture that they share."""

    def __init__(self, link: ControlLink, renderer: "Renderer", title: str, password: str | None) -> None:
        self.title = title
        self.password = None if password is None else password.encode()
        self.input = Input(link)
        self.picture: Image | None = None
        self.fresh = False
        """Whether the picture is what is shown now."""
        self._link = link
        self._renderer = renderer
        self._viewers: set[Viewer] = set()
        self._wakeup = asyncio.Event()
        self._listeners: list[asyncio.Server] = []

    def check(self, challenge: bytes, response: bytes) -> bool:
        """Whether a response to a challenge is the password's."""
        assert self.password is not None
        return hmac.compare_digest(des_response(self.password, challenge), response)

    def wake(self) -> None:
        """Some viewer waits for an update."""
        self._wakeup.set()

    async def run(self) -> None:
        """Look at the screen while somebody waits; for ever. DomainLostError when the domain goes."""
        typing = asyncio.create_task(self.input.run())
        try:
            self._draw(await self._link.request("screen"))
            while True:
                while not any(viewer.wants for viewer in self._viewers):
                    await self._wakeup.wait()
                    self._wakeup.clear()
                # Nobody may have looked for a while.
                serial = self._draw(await self._link.request("screen"))
                self.fresh = True
                for viewer in self._viewers:
                    viewer.wake()
                while any(viewer.wants and not viewer.damage for viewer in self._viewers):
                    serial = self._draw(await self._link.request("screen_wait", serial=serial))
                await asyncio.sleep(LOOK_EVERY)
                self.fresh = False
        finally:
            typing.cancel()

    def _draw(self, reply: dict[str, Any]) -> int:
        from PIL import ImageChops

        serial, state = parse_screen(reply)
        before, now = self.picture, self._renderer.render(state)
        self.picture = now
        if before is None or before.size != now.size:
            rects: list[Rect] = [(0, 0, *now.size)]
        else:
            rects = []
            difference = ImageChops.difference(before, now)
            for top in range(0, now.height, BAND):
                found = difference.crop((0, top, now.width, min(top + BAND, now.height))).getbbox()
                if found is not None:
                    rects.append((found[0], top + found[1], found[2], top + found[3]))
        for viewer in self._viewers:
            for rect in rects:
                viewer.add_damage(rect)
        return serial

    async def serve(self, transport: Transport, trusted: bool = False) -> None:
        """Serve one viewer until it goes; a trusted one is not asked for the password."""
        if len(self._viewers) >= MAX_VIEWERS:
            return
        size = self.picture.size if self.picture is not None else (720, 400)
        viewer = Viewer(self, transport, size, trusted)
        viewer.add_damage((0, 0, *size))
        self._viewers.add(viewer)
        try:
            await viewer.run()
        except (ProtocolError, OSError, TimeoutError):
            pass
        finally:
            self._viewers.discard(viewer)

    # ── sockets ──

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self.serve(SocketTransport(reader, writer))
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def listen_unix(self, path: str) -> str:
        """Listen at a path that only this user can open; an old socket there is replaced. OSError."""
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                raise FileExistsError(17, "there is something else")
            os.unlink(path)  # noqa: PTH108
        mask = os.umask(0o177)
        try:
            self._listeners.append(await asyncio.start_unix_server(self._connected, path, limit=1 << 16))
        finally:
            os.umask(mask)
        return f"unix:{path}"

    async def listen_tcp(self, host: str, port: int) -> str:
        """Listen on a port of this machine's loopback. OSError."""
        server = await asyncio.start_server(self._connected, host, port, limit=1 << 16)
        self._listeners.append(server)
        number = server.sockets[0].getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        return f"{shown}:{number}"
