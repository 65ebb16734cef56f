"""Messages between a domain's process and its backend process: JSON in packets, with descriptors."""

import array  # noqa: F401 - socket.recv_fds imports it when it is called: too late for a confined process
import json
import os
import socket
from collections.abc import Sequence
from typing import Any, Final

__all__ = ["LostError", "message_pair", "receive", "send"]

LONGEST: Final = 1 << 16
MOST_DESCRIPTORS: Final = 16


class LostError(ConnectionError):
    """The other process is gone, or has stopped to answer."""


def message_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends, not inherited."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send one. LostError."""
    data = json.dumps(message).encode()
    try:
        if descriptors:
            socket.send_fds(sock, [data], list(descriptors), socket.MSG_NOSIGNAL)
        else:
            sock.send(data, socket.MSG_NOSIGNAL)
    except OSError as error:
        raise LostError(error.errno, "the other process is gone") from None


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next, and its descriptors, which are the caller's. LostError; also if what came is no message."""
    descriptors: list[int] = []
    try:
        data, descriptors, flags, _ = socket.recv_fds(sock, LONGEST, MOST_DESCRIPTORS)
        message = json.loads(data) if data and not flags & socket.MSG_TRUNC else None
    except (OSError, ValueError):
        message = None
    if not isinstance(message, dict):
        for fd in descriptors:
            os.close(fd)
        raise LostError("the other process is gone")
    return message, descriptors
