"""Frames between the domain process and the agent in the guest: u8 type, u32 length (little-endian), payload.

The formats are described in docs/agent.md; guest/agent.c is the other side. What comes from the guest is hostile: the
decoder holds at most one frame of at most :data:`MAX_PAYLOAD` bytes and raises :class:`FrameError` on anything else.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, IntFlag

__all__ = [
    "MAX_PAYLOAD",
    "PROTOCOL_VERSION",
    "Entry",
    "ExitKind",
    "ExitReport",
    "FrameDecoder",
    "FrameError",
    "FromGuest",
    "Hello",
    "StartFlag",
    "ToGuest",
    "encode",
    "encode_freshen",
    "encode_start",
]

PROTOCOL_VERSION = 1
MAX_PAYLOAD = 256 * 1024
"""Bytes of a frame's payload, in both directions."""
MAX_STRINGS = 8192
"""Arguments and environment strings of one command."""

_HEADER = struct.Struct("<BI")
_START = struct.Struct("<IHHIII")
_ENTRY = struct.Struct("<BIqQ")


class FrameError(ValueError):
    """Something that no agent of ours would send."""


class ToGuest(IntEnum):
    """Frames to the agent."""

    START = 0x01
    STDIN = 0x02
    STDIN_EOF = 0x03
    SIGNAL = 0x04
    WINDOW_SIZE = 0x05
    CREDIT = 0x06
    COPY_IN = 0x07
    ENTRY = 0x08
    DATA = 0x09
    COPY_IN_END = 0x0A
    COPY_OUT = 0x0B
    POWER_OFF = 0x0C
    PING = 0x0D
    CANCEL = 0x0E
    FRESHEN = 0x0F


class FromGuest(IntEnum):
    """Frames from the agent."""

    HELLO = 0x81
    STDOUT = 0x82
    STDERR = 0x83
    STARTED = 0x84
    EXIT = 0x85
    STDIN_CREDIT = 0x86
    ENTRY = 0x87
    DATA = 0x88
    RESULT = 0x89
    LOG = 0x8A
    BYE = 0x8B
    PONG = 0x8C


class StartFlag(IntFlag):
    """How a command gets its standard streams."""

    PIPES = 0
    PTY = 1
    """On a pseudo terminal: one stream, line discipline, job control."""
    CONSOLE = 2
    """On the guest's console; nothing comes over the channel."""
    NO_STDIN = 4
    """stdin is /dev/null."""


class ExitKind(IntEnum):
    """How a command ended."""

    EXITED = 0
    SIGNALLED = 1
    EXEC_FAILED = 2
    CHDIR_FAILED = 3
    SETUP_FAILED = 4


@dataclass(frozen=True, slots=True)
class Hello:
    """What the agent says of itself and its kernel."""

    bits: int
    transport: str
    system: str
    release: str
    machine: str

    @classmethod
    def parse(cls, payload: bytes) -> "Hello":
        """FrameError if it is not a hello of this protocol's version."""
        if len(payload) < 12:
            raise FrameError("the agent's greeting is too short")
        version, bits, transport = struct.unpack_from("<III", payload)
        if version != PROTOCOL_VERSION:
            raise FrameError(f"the agent speaks version {version}, not {PROTOCOL_VERSION}")
        texts = [t.decode("ascii", "replace")[:64] for t in payload[12:].split(b"\0")] + ["", "", ""]
        names = {0: "ports", 1: "serial", 2: "stdio"}
        return cls(bits, names.get(transport, "unknown"), texts[0], texts[1], texts[2])


@dataclass(frozen=True, slots=True)
class ExitReport:
    """How a command ended: ``value`` is its status, its signal or an errno, as ``kind`` says."""

    kind: ExitKind
    value: int

    @classmethod
    def parse(cls, payload: bytes) -> "ExitReport":
        """FrameError if it makes no sense."""
        if len(payload) != 8:
            raise FrameError("an exit report has 8 bytes")
        kind, value = struct.unpack("<II", payload)
        limit = {0: 255, 1: 127}.get(kind, 4095)
        if kind > 4 or value > limit:
            raise FrameError(f"an exit report of kind {kind} with value {value}")
        return cls(ExitKind(kind), value)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory or symbolic link on its way; a file's content follows in DATA frames."""

    kind: str
    """``f``, ``d``, ``l``; ``x`` is something that is not copied (a device, a FIFO, a socket)."""
    mode: int
    """Permission bits."""
    mtime: int
    """Seconds since 1970."""
    size: int
    """What the file system said of its size; files may turn out longer or shorter."""
    path: bytes
    """Relative to what was asked for; empty for that itself."""
    target: bytes = b""
    """Where a symbolic link points."""

    def pack(self) -> bytes:
        """The payload of an ENTRY frame."""
        head = _ENTRY.pack(ord(self.kind), self.mode & 0o7777, self.mtime, self.size)
        return head + self.path + b"\0" + self.target + b"\0"

    @classmethod
    def parse(cls, payload: bytes) -> "Entry":
        """FrameError if it makes no sense."""
        if len(payload) < _ENTRY.size + 2 or payload[-1]:
            raise FrameError("a file entry that is too short")
        kind, mode, mtime, size = _ENTRY.unpack_from(payload)
        names = payload[_ENTRY.size : -1].split(b"\0")
        if len(names) != 2 or chr(kind) not in "fdlx":
            raise FrameError("a file entry that is malformed")
        return cls(chr(kind), mode & 0o7777, mtime, size, names[0], names[1])


def encode(kind: ToGuest | FromGuest, payload: bytes = b"") -> bytes:
    """One frame. ValueError if the payload is too long."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame of {len(payload)} bytes; {MAX_PAYLOAD} are the most")
    return _HEADER.pack(kind, len(payload)) + payload


def encode_freshen(utc_ns: int, entropy: bytes) -> bytes:
    """The frame for a guest that was saved and goes on: what time it is, and randomness that nobody else has."""
    seconds, rest = divmod(utc_ns, 1_000_000_000)
    return encode(ToGuest.FRESHEN, struct.pack("<QI", seconds, rest // 1000) + entropy)


def encode_start(
    argv: Sequence[bytes],
    env: Mapping[bytes, bytes],
    cwd: bytes = b"",
    flags: StartFlag = StartFlag.PIPES,
    rows: int = 0,
    cols: int = 0,
    window: int = MAX_PAYLOAD,
) -> bytes:
    """A START frame. ``window``: bytes of output that the agent may send before it needs a CREDIT frame.

    ValueError, with a sentence for the user, if the command cannot be passed on.
    """
    strings = [cwd, *argv, *(k + b"=" + v for k, v in env.items())]
    if not argv or not argv[0]:
        raise ValueError("the command is empty")
    if any(b"\0" in s for s in strings):
        raise ValueError("the command, its environment or its directory contains a NUL character")
    if any(not k or b"=" in k for k in env):
        raise ValueError("the name of an environment variable is empty or contains '='")
    if len(strings) > MAX_STRINGS:
        raise ValueError(
            f"the command has {len(strings) - 1} arguments and environment strings; {MAX_STRINGS - 1} are the most"
        )
    body = b"".join(s + b"\0" for s in strings)
    payload = _START.pack(flags, rows & 0xFFFF, cols & 0xFFFF, window, len(argv), len(env)) + body
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"the command and its environment take {len(payload)} bytes; {MAX_PAYLOAD} are the most")
    return encode(ToGuest.START, payload)


class FrameDecoder:
    """Turns bytes from the guest into frames."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[FromGuest, bytes]]:
        """Frames completed by ``data``. FrameError at the first thing that is no frame; feed no more then."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _HEADER.size:
                kind, length = _HEADER.unpack_from(buffer, at)
                if not FromGuest.HELLO <= kind <= FromGuest.PONG:
                    raise FrameError(f"a frame of unknown type {kind:#x}")
                if length > MAX_PAYLOAD:
                    raise FrameError(f"a frame of {length} bytes; {MAX_PAYLOAD} are the most")
                end = at + _HEADER.size + length
                if len(buffer) < end:
                    break
                payload = bytes(buffer[at + _HEADER.size : end])
                at = end
                yield FromGuest(kind), payload
        finally:
            del buffer[:at]
