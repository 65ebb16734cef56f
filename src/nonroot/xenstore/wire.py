"""XenStore's wire protocol (io/xs_wire.h, docs/misc/xenstore.txt): one :class:`Connection` for each client.

A connection is fed bytes, from a guest's ring or a socket, and gives bytes. Nothing that a client sends raises
anything: requests that make no sense are answered with an ERROR message, and one that breaks the framing breaks the
connection, which then ignores what follows.
"""

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.permissions import FIRST_RESERVED, format_permissions, parse_permissions
from nonroot.xenstore.quota import Quota
from nonroot.xenstore.session import Session
from nonroot.xenstore.store import Store

__all__ = ["HEADER", "PAYLOAD_MAX", "Connection", "Kind", "pack", "split_strings"]

HEADER: Final = struct.Struct("<IIII")
"""Type, request number, transaction, length of the payload."""
PAYLOAD_MAX: Final = 4096
"""Bytes."""
_BACKLOG_MAX: Final = 16 << 10
"""Bytes that a client may leave unread before its events wait in a queue where equal ones become one."""
_EVENTS_MAX: Final = 4096
"""Events that may wait."""


class Kind(IntEnum):
    """Types of messages."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


def pack(kind: int, request: int, transaction: int, payload: bytes) -> bytes:
    """One message."""
    return HEADER.pack(kind, request, transaction, len(payload)) + payload


def split_strings(payload: bytes, least: int, most: int | None = None) -> list[str]:
    """
    NUL-terminated strings that fill the payload, at least and at most so many (None: no limit). StoreError EINVAL.

    Bytes are taken as Latin-1: no path has others than ASCII, and tokens come back as they were.
    """
    if not payload.endswith(b"\0"):
        raise StoreError("EINVAL")
    texts = payload[:-1].decode("latin-1").split("\0")
    if not least <= len(texts) <= (len(texts) if most is None else most):
        raise StoreError("EINVAL")
    return texts


def _strings(texts: list[str]) -> bytes:
    return "".join(f"{text}\0" for text in texts).encode("latin-1")


def _number(text: str, limit: int = 1 << 32) -> int:
    """A decimal number below ``limit``. StoreError EINVAL."""
    if not text.isascii() or not text.isdigit() or len(text) > 10 or int(text) >= limit:
        raise StoreError("EINVAL")
    return int(text)


_OK: Final = b"OK\0"


class Connection:
    """One client: domain 0's tools over a socket, or an introduced domain's ring, whatever carries it."""

    def __init__(
        self,
        store: Store,
        send: Callable[[bytes], None],
        domid: int = 0,
        *,
        backlog: Callable[[], int] = lambda: 0,
        on_introduce: Callable[[int], None] = lambda domid: None,
        on_broken: Callable[[], None] = lambda: None,
    ) -> None:
        """
        ``send``: gets whole messages for the client. ``backlog``: bytes given to ``send`` that the client has not
        taken; when it has, call :meth:`drained`. ``on_introduce`` hears of domains that this client introduced;
        ``on_broken``, that nothing more can come. StoreError ENOENT if ``domid`` has not been introduced.
        """
        self.store = store
        self.broken: str | None = None
        """Why the connection is of no use any more, as half a sentence."""
        self.on_introduce = on_introduce
        self.on_broken = on_broken
        self._send = send
        self._backlog = backlog
        self._buffer = bytearray()
        self._waiting: dict[tuple[str, str], None] = {}
        self._session: Session
        if domid:
            self._session = store.attach(domid, self._event, self._replaced)
            store.flush()
        else:
            self._session = store.connect(self._event)

    @property
    def domid(self) -> int:
        """On whose behalf it speaks."""
        return self._session.domid

    def close(self) -> None:
        """The client has gone."""
        self._stop("it was closed")

    def feed(self, data: bytes) -> None:
        """Bytes from the client, cut anywhere."""
        if self.broken is not None:
            return
        buffer = self._buffer
        buffer += data
        at = 0
        while len(buffer) - at >= HEADER.size:
            kind, request, transaction, length = HEADER.unpack_from(buffer, at)
            if length > PAYLOAD_MAX:
                self._stop(f"a message of {length} bytes")
                return
            end = at + HEADER.size + length
            if len(buffer) < end:
                break
            payload = bytes(memoryview(buffer)[at + HEADER.size : end])
            at = end
            self._request(kind, request, transaction, payload)
            if self._ended():
                return
        del buffer[:at]

    # Requests

    def _request(self, kind: int, request: int, transaction: int, payload: bytes) -> None:
        try:
            handler = _HANDLERS.get(kind)
            if handler is None:
                raise StoreError("ENOSYS")
            if kind in _PRIVILEGED and self.domid != 0:
                raise StoreError("EACCES")
            self._session.check_transaction(transaction)
            reply = handler(self, payload, transaction)
            if len(reply) > PAYLOAD_MAX:
                raise StoreError("E2BIG")
        except StoreError as error:
            kind, reply = Kind.ERROR, _strings([error.code])
        self._send(pack(kind, request, transaction, reply))
        self.store.flush()

    def _directory(self, payload: bytes, transaction: int) -> bytes:
        (path,) = split_strings(payload, 1, 1)
        return _strings(self._session.directory(path, transaction)[1])

    def _directory_part(self, payload: bytes, transaction: int) -> bytes:
        path, offset = split_strings(payload, 2, 2)
        at = _number(offset)
        generation, names = self._session.directory(path, transaction)
        reply = _strings([str(generation)])
        everything = _strings(names)
        rest = everything[at:]
        room = PAYLOAD_MAX - len(reply) - 1
        if len(rest) > room:  # whole names only
            return reply + rest[: rest.rfind(b"\0", 0, room) + 1]
        return reply + rest + b"\0"  # an empty name says that this is all

    def _read(self, payload: bytes, transaction: int) -> bytes:
        (path,) = split_strings(payload, 1, 1)
        return self._session.read(path, transaction)

    def _write(self, payload: bytes, transaction: int) -> bytes:
        path, found, value = payload.partition(b"\0")
        if not found:
            raise StoreError("EINVAL")
        self._session.write(path.decode("latin-1"), value, transaction)
        return _OK

    def _mkdir(self, payload: bytes, transaction: int) -> bytes:
        (path,) = split_strings(payload, 1, 1)
        self._session.mkdir(path, transaction)
        return _OK

    def _rm(self, payload: bytes, transaction: int) -> bytes:
        (path,) = split_strings(payload, 1, 1)
        self._session.rm(path, transaction)
        return _OK

    def _get_perms(self, payload: bytes, transaction: int) -> bytes:
        (path,) = split_strings(payload, 1, 1)
        return _strings(format_permissions(self._session.get_permissions(path, transaction)))

    def _set_perms(self, payload: bytes, transaction: int) -> bytes:
        path, *entries = split_strings(payload, 2)
        self._session.set_permissions(path, parse_permissions(entries), transaction)
        return _OK

    def _watch(self, payload: bytes, transaction: int) -> bytes:
        path, token, *depth = split_strings(payload, 2, 3)
        self._session.watch(path, token, _number(depth[0]) if depth else None)
        return _OK

    def _unwatch(self, payload: bytes, transaction: int) -> bytes:
        path, token = split_strings(payload, 2, 2)
        self._session.unwatch(path, token)
        return _OK

    def _reset_watches(self, payload: bytes, transaction: int) -> bytes:
        self._session.reset()
        self._waiting.clear()
        return _OK

    def _transaction_start(self, payload: bytes, transaction: int) -> bytes:
        if transaction:
            raise StoreError("EBUSY")
        return _strings([str(self._session.start())])

    def _transaction_end(self, payload: bytes, transaction: int) -> bytes:
        (word,) = split_strings(payload, 1, 1)
        if word not in ("T", "F"):
            raise StoreError("EINVAL")
        self._session.end(transaction, word == "T")
        return _OK

    # Requests about domains

    def _introduce(self, payload: bytes, transaction: int) -> bytes:
        domid, gfn, port, *_ = split_strings(payload, 3, 4)
        number = _number(domid)
        self.store.introduce(number, _number(gfn), _number(port))
        self.on_introduce(number)
        return _OK

    def _release(self, payload: bytes, transaction: int) -> bytes:
        self.store.release(self._domid(payload))
        return _OK

    def _resume(self, payload: bytes, transaction: int) -> bytes:
        domid = self._domid(payload)
        if domid == 0:
            raise StoreError("EINVAL")
        if not self.store.is_introduced(domid):
            raise StoreError("ENOENT")
        return _OK  # whether a domain has shut down is dom0's to know; nothing is kept of it here

    def _set_target(self, payload: bytes, transaction: int) -> bytes:
        domid, target = (_number(text) for text in split_strings(payload, 2, 2))
        self.store.set_target(domid, target)
        return _OK

    def _get_domain_path(self, payload: bytes, transaction: int) -> bytes:
        return _strings([self.store.domain_path(self._domid(payload))])

    def _is_domain_introduced(self, payload: bytes, transaction: int) -> bytes:
        return b"T\0" if self.store.is_introduced(self._domid(payload)) else b"F\0"

    @staticmethod
    def _domid(payload: bytes) -> int:
        (text,) = split_strings(payload, 1, 1)
        return _number(text, FIRST_RESERVED)

    def _control(self, payload: bytes, transaction: int) -> bytes:
        command, *arguments = split_strings(payload, 1)
        if command == "help" and not arguments:
            return _strings(["attach domid\ncheck\nhelp\nquota [name value]\nshutdown domid\n"])
        if command == "check" and not arguments:
            return _strings(["\n".join(self.store.check())]) if self.store.check() else _OK
        if command == "quota" and not arguments:
            quota = self.store.quota
            return _strings(["".join(f"{name}: {getattr(quota, name)}\n" for name in Quota.names())])
        if command == "quota" and len(arguments) == 2:
            self.store.set_quota(arguments[0], _number(arguments[1]))
            return _OK
        if command == "shutdown" and len(arguments) == 1:
            self.store.shutdown(_number(arguments[0]))
            return _OK
        if command == "attach" and len(arguments) == 1:
            self._attach(_number(arguments[0]))
            return _OK
        raise StoreError("EINVAL")

    def _attach(self, domid: int) -> None:
        """From now on this client is that domain, and no more: the last thing that it does as domain 0."""
        session = self.store.attach(domid, self._event, self._replaced)
        self.store.disconnect(self._session)
        self._session = session

    # Events

    def _event(self, path: str, token: str) -> None:
        if self._waiting or self._backlog() > _BACKLOG_MAX:
            self._waiting[path, token] = None
            if len(self._waiting) > _EVENTS_MAX and self.domid:
                self._stop(f"it left {len(self._waiting)} events unread")
        else:
            self._send_event(path, token)

    def _send_event(self, path: str, token: str) -> None:
        self._send(pack(Kind.WATCH_EVENT, 0, 0, _strings([path, token])))

    def drained(self) -> None:
        """The client has taken what was sent: events that waited go out."""
        while self._waiting and self._backlog() <= _BACKLOG_MAX:
            path, token = next(iter(self._waiting))
            del self._waiting[path, token]
            self._send_event(path, token)

    # The end

    def _ended(self) -> bool:
        return self.broken is not None

    def _replaced(self) -> None:
        self._session.deliver = self._session.replaced = None
        self._stop("the domain was released, or has another connection")

    def _stop(self, reason: str) -> None:
        if self.broken is None:
            self.broken = reason
            self._buffer.clear()
            self._waiting.clear()
            if self._session.deliver is not None:
                self.store.disconnect(self._session)
            self.on_broken()


_HANDLERS: Final[dict[int, Callable[[Connection, bytes, int], bytes]]] = {
    Kind.CONTROL: Connection._control,
    Kind.DIRECTORY: Connection._directory,
    Kind.READ: Connection._read,
    Kind.GET_PERMS: Connection._get_perms,
    Kind.WATCH: Connection._watch,
    Kind.UNWATCH: Connection._unwatch,
    Kind.TRANSACTION_START: Connection._transaction_start,
    Kind.TRANSACTION_END: Connection._transaction_end,
    Kind.INTRODUCE: Connection._introduce,
    Kind.RELEASE: Connection._release,
    Kind.GET_DOMAIN_PATH: Connection._get_domain_path,
    Kind.WRITE: Connection._write,
    Kind.MKDIR: Connection._mkdir,
    Kind.RM: Connection._rm,
    Kind.SET_PERMS: Connection._set_perms,
    Kind.IS_DOMAIN_INTRODUCED: Connection._is_domain_introduced,
    Kind.RESUME: Connection._resume,
    Kind.SET_TARGET: Connection._set_target,
    Kind.RESET_WATCHES: Connection._reset_watches,
    Kind.DIRECTORY_PART: Connection._directory_part,
}
_PRIVILEGED: Final = frozenset((Kind.CONTROL, Kind.INTRODUCE, Kind.RELEASE, Kind.RESUME, Kind.SET_TARGET))
