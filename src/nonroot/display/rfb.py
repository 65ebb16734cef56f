"""RFB 3.8, the server's side of the conversation: bytes in, events and bytes out. No sockets, no pictures.

Everything that a viewer sends is checked here, and what is kept of it is bounded.

Source: RFC 6143; the registry of RFB encodings (DesktopSize, QEMU's extended key events and pointer motion change).
"""

import struct
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

__all__ = [
    "CutText",
    "Encoding",
    "Key",
    "PixelFormat",
    "Pointer",
    "ProtocolError",
    "RfbSession",
    "SetEncodings",
    "SetPixelFormat",
    "Started",
    "UpdateRequest",
]

VERSION: Final = b"RFB 003.008\n"
VERSIONS: Final = (b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n")
NO_AUTHENTICATION: Final = 1
VNC_AUTHENTICATION: Final = 2
CHALLENGE: Final = 16
MAX_CUT_TEXT: Final = 1 << 20
MAX_ENCODINGS: Final = 1024
MAX_BUFFERED: Final = 1 << 16


class ProtocolError(ValueError):
    """The viewer does not speak this protocol, or may not come in; the message says which."""


class Encoding(IntEnum):
    """Encodings and pseudo-encodings that a viewer may name and we know."""

    RAW = 0
    TIGHT = 7
    ZRLE = 16
    DESKTOP_SIZE = -223
    POINTER_MOTION = -257
    EXTENDED_KEYS = -258


@dataclass(frozen=True, slots=True)
class PixelFormat:
    """How a viewer wants its pixels."""

    bits: int = 32
    depth: int = 24
    big_endian: bool = False
    true_colour: bool = True
    maxima: tuple[int, int, int] = (255, 255, 255)
    shifts: tuple[int, int, int] = (16, 8, 0)

    _LAYOUT = struct.Struct(">BBBBHHHBBB3x")

    def pack(self) -> bytes:
        """16 bytes."""
        return self._LAYOUT.pack(self.bits, self.depth, self.big_endian, self.true_colour, *self.maxima, *self.shifts)

    @classmethod
    def unpack(cls, data: bytes) -> "PixelFormat":
        """ProtocolError for a format that no screen has."""
        bits, depth, big, true, red, green, blue, *shifts = cls._LAYOUT.unpack(data)
        if bits not in (8, 16, 32) or not 1 <= depth <= bits:
            raise ProtocolError(f"pixels of {bits} bits, {depth} of them used")
        if not true:
            # Colours come in a map, which is made from this format.
            return cls(bits, depth, bool(big), False, (7, 7, 3), (0, 3, 6))
        maxima = (red, green, blue)
        for maximum, shift in zip(maxima, shifts, strict=True):
            if maximum & maximum + 1 or maximum.bit_length() + shift > bits:
                raise ProtocolError(f"a colour of up to {maximum}, shifted by {shift} in {bits} bits")
        masks = [maximum << shift for maximum, shift in zip(maxima, shifts, strict=True)]
        if masks[0] & masks[1] or masks[0] & masks[2] or masks[1] & masks[2]:
            raise ProtocolError("colours that share bits")
        return cls(bits, depth, bool(big), True, maxima, (shifts[0], shifts[1], shifts[2]))


@dataclass(frozen=True, slots=True)
class Started:
    """The handshake is over: the screen's size and name have been sent."""

    shared: bool


@dataclass(frozen=True, slots=True)
class SetPixelFormat:
    """From now on, pixels like this."""

    format: PixelFormat


@dataclass(frozen=True, slots=True)
class SetEncodings:
    """What the viewer understands, best first; numbers that we do not know are left out."""

    encodings: tuple[Encoding, ...]


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """Send what has changed (``incremental``), or everything, of a rectangle."""

    incremental: bool
    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Key:
    """A key: its X11 symbol, and its scan code if the viewer knows it (0 if not)."""

    pressed: bool
    keysym: int
    code: int = 0


@dataclass(frozen=True, slots=True)
class Pointer:
    """Where the pointer is, and the buttons held: bit 0 left, 1 middle, 2 right, 3 wheel up, 4 wheel down."""

    buttons: int
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class CutText:
    """The viewer's clipboard has changed; its contents are not kept."""

    length: int


Event = Started | SetPixelFormat | SetEncodings | UpdateRequest | Key | Pointer | CutText

Conversation = Generator[int | Event, bytes, None]
Reader = Generator[int, bytes, Event | None]


class RfbSession:
    """One viewer's conversation."""

    def __init__(
        self, size: tuple[int, int], title: str, check: Callable[[bytes, bytes], bool] | None, challenge: bytes = b""
    ) -> None:
        """``check``: whether a response fits ``challenge`` (16 random bytes); None lets everybody in."""
        self.size = size
        self.outgoing = bytearray(VERSION)
        """Bytes for the viewer; whoever sends them clears it."""
        self.started = False
        self._title = title
        self._check = check
        self._challenge = challenge
        self._buffer = bytearray()
        self._skip = 0
        self._version = 0
        self._steps = self._conversation()
        first = next(self._steps)
        assert isinstance(first, int)
        self._wanted = first

    def feed(self, data: bytes) -> list[Event]:
        """What the viewer says with ``data``. ProtocolError if it must go; ``outgoing`` may have a last word for it."""
        events: list[Event] = []
        buffer = self._buffer
        buffer += data
        while True:
            if self._skip:
                dropped = min(self._skip, len(buffer))
                del buffer[:dropped]
                self._skip -= dropped
            if self._skip or len(buffer) < self._wanted:
                break
            piece = bytes(buffer[: self._wanted])
            del buffer[: self._wanted]
            answer = self._steps.send(piece)
            if not isinstance(answer, int):
                events.append(answer)
                answer = next(self._steps)
                assert isinstance(answer, int)
            self._wanted = answer
        if len(buffer) > MAX_BUFFERED:
            raise ProtocolError("a message that is too long")
        return events

    def _conversation(self) -> Conversation:
        yield from self._handshake()
        self.started = True
        while True:
            kind = (yield 1)[0]
            reader = _READERS.get(kind)
            if reader is None:
                raise ProtocolError(f"a message of unknown type {kind}")
            event = yield from reader(self)
            if event is not None:
                yield event

    def _handshake(self) -> Conversation:
        version = yield 12
        if version not in VERSIONS:
            raise ProtocolError("not RFB 3.3, 3.7 or 3.8")
        self._version = minor = version[10] - 0x30
        kind = NO_AUTHENTICATION if self._check is None else VNC_AUTHENTICATION
        if minor == 3:
            self.outgoing += struct.pack(">I", kind)
        else:
            self.outgoing += bytes((1, kind))
            chosen = (yield 1)[0]
            if chosen != kind:
                self._refuse("that kind of authentication is not offered")
        if self._check is not None:
            self.outgoing += self._challenge
            response = yield CHALLENGE
            if not self._check(self._challenge, response):
                self._refuse("wrong password")
        if minor == 8 or self._check is not None:
            self.outgoing += struct.pack(">I", 0)
        shared = (yield 1)[0]
        name = self._title.encode()[:200]
        width, height = self.size
        self.outgoing += struct.pack(">HH", width, height) + PixelFormat().pack() + struct.pack(">I", len(name)) + name
        yield Started(bool(shared))

    def _refuse(self, reason: str) -> None:
        self.outgoing += struct.pack(">I", 1)
        if self._version == 8:
            self.outgoing += struct.pack(">I", len(reason)) + reason.encode()
        raise ProtocolError(reason)

    # ── messages; each asks for what follows its type ──

    def _set_pixel_format(self) -> Reader:
        data = yield 19
        return SetPixelFormat(PixelFormat.unpack(data[3:]))

    def _set_encodings(self) -> Reader:
        (count,) = struct.unpack(">xH", (yield 3))
        if count > MAX_ENCODINGS:
            raise ProtocolError(f"{count} encodings")
        numbers = struct.unpack(f">{count}i", (yield 4 * count)) if count else ()
        known = []
        for number in numbers:
            try:
                known.append(Encoding(number))
            except ValueError:
                continue
        return SetEncodings(tuple(dict.fromkeys(known)))

    def _update_request(self) -> Reader:
        incremental, x, y, width, height = struct.unpack(">BHHHH", (yield 9))
        return UpdateRequest(bool(incremental), x, y, width, height)

    def _key(self) -> Reader:
        pressed, keysym = struct.unpack(">BxxI", (yield 7))
        return Key(bool(pressed), keysym)

    def _pointer(self) -> Reader:
        return Pointer(*struct.unpack(">BHH", (yield 5)))

    def _cut_text(self) -> Reader:
        (length,) = struct.unpack(">3xI", (yield 7))
        if length > MAX_CUT_TEXT:
            raise ProtocolError(f"a clipboard of {length} bytes")
        self._skip = length
        return CutText(length)

    def _qemu(self) -> Reader:
        kind = (yield 1)[0]
        if kind != 0:
            raise ProtocolError(f"a message of QEMU's of unknown type {kind}")
        pressed, keysym, code = struct.unpack(">HII", (yield 10))
        return Key(bool(pressed), keysym, code if code < 0x100 else 0)


_READERS: Final = {
    0: RfbSession._set_pixel_format,
    2: RfbSession._set_encodings,
    3: RfbSession._update_request,
    4: RfbSession._key,
    5: RfbSession._pointer,
    6: RfbSession._cut_text,
    255: RfbSession._qemu,
}
