"""The control protocol between a domain's process and its clients, over a Unix stream socket.

A message is u32 length (little-endian, of what follows), u8 kind, body. Kind 0 is a JSON object, optionally followed by
bytes; the other kinds are raw streams. Described in docs/agent.md, "The control socket".

* request (client → domain): ``{"id": 7, "method": "pause", "params": {…}}``
* reply (domain → client): ``{"id": 7, "result": {…}}`` or
  ``{"id": 7, "error": {"code": …, "message": …, "details": {…}}}``
* event (domain → client): ``{"event": "stopped", …}``

File descriptors travel beside the request or reply that names their number as ``"fds"``.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

__all__ = ["MAX_BODY", "VERSION", "Kind", "Message", "WireDecoder", "WireError", "pack", "pack_json"]

VERSION = 1
MAX_BODY = 1 << 20
"""Bytes of a message after its length."""

_LENGTH = struct.Struct("<I")


class WireError(ValueError):
    """The other end does not speak this protocol."""


class Kind(IntEnum):
    """What a message carries."""

    JSON = 0
    CONSOLE = 1
    """Bytes of the guest's console: output from the domain, input from the client."""
    STDIN = 2
    """For the command; within what CREDIT granted."""
    STDOUT = 3
    STDERR = 4
    ENTRY = 5
    """A file on its way, as in :class:`nonroot.domain.frames.Entry`; both directions."""
    DATA = 6
    """Content of the last ENTRY."""
    CREDIT = 7
    """u32: so many more bytes of STDIN (or ENTRY and DATA) may be sent to the domain."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message. For JSON, ``record`` is the object and ``body`` the bytes that follow it."""

    kind: Kind
    body: bytes
    record: dict[str, Any]


def pack(kind: Kind, body: bytes | bytearray | memoryview) -> bytes:
    """One message of a stream. ValueError if it is too long."""
    if len(body) + 1 > MAX_BODY:
        raise ValueError(f"a message of {len(body)} bytes")
    return b"".join((_LENGTH.pack(len(body) + 1), bytes((kind,)), body))


def pack_json(record: dict[str, Any], blob: bytes = b"") -> bytes:
    """One JSON message with ``blob`` after it. ValueError if it is too long."""
    text = json.dumps(record, separators=(",", ":")).encode()
    return pack(Kind.JSON, _LENGTH.pack(len(text)) + text + blob)


class WireDecoder:
    """Turns received bytes into messages."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Messages completed by ``data``. WireError if the other end sends something else."""
        buffer = self._buffer
        buffer += data
        at = 0
        try:
            while len(buffer) - at >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(buffer, at)
                if not 1 <= length <= MAX_BODY:
                    raise WireError(f"a message of {length} bytes")
                end = at + 4 + length
                if len(buffer) < end:
                    break
                kind, body = buffer[at + 4], bytes(memoryview(buffer)[at + 5 : end])
                at = end
                yield _message(kind, body)
        finally:
            del buffer[:at]


def _message(number: int, body: bytes) -> Message:
    try:
        kind = Kind(number)
    except ValueError:
        raise WireError(f"a message of unknown kind {number}") from None
    if kind != Kind.JSON:
        return Message(kind, body, {})
    try:
        (length,) = _LENGTH.unpack_from(body)
        if length > len(body) - 4:
            raise ValueError("truncated")
        record = json.loads(body[4 : 4 + length])
    except (ValueError, struct.error, RecursionError) as error:
        raise WireError(f"a control message that is no JSON: {error}") from None
    if not isinstance(record, dict):
        raise WireError("a control message that is no JSON object")
    return Message(kind, body[4 + length :], record)
