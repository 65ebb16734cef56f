"""Between a guest's ring and XenStore's process: keeps requests until they are answered, so that none is lost with it.

Pure: whoever pumps the ring gives and takes bytes. After the process came back and the connection speaks for the domain
again, :meth:`Relay.resend` sends what was not answered; answers that only say that it had been done before are put
right.

A guest that goes on from a saved one may have another number than the one that it knows. Paths that it learnt before
name the old number; the relay puts the present one in their place (:meth:`Relay.rename`), and the old one back into
the events of what is watched by such a path.
"""

import re
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final

from nonroot.xenstore.wire import HEADER, PAYLOAD_MAX, Kind, pack

__all__ = ["Relay"]

_OUTSTANDING_MAX: Final = 20
"""Requests without an answer; xenstored allows a domain as many."""
_WITHOUT_PATH: Final = (
    *(Kind.TRANSACTION_START, Kind.TRANSACTION_END, Kind.INTRODUCE, Kind.RELEASE, Kind.GET_DOMAIN_PATH),
    *(Kind.IS_DOMAIN_INTRODUCED, Kind.RESUME, Kind.SET_TARGET, Kind.RESET_WATCHES, Kind.CONTROL),
)
"""Requests that do not begin with a path."""
_NUMBERED: Final = re.compile(rb"/local/domain/(?:0/backend/[a-z]+/)?([1-9][0-9]{0,4})(?=[/\0])")
"""How paths begin in which there is a domain's number."""
HARMLESS: Final = (Kind.READ, Kind.DIRECTORY, Kind.DIRECTORY_PART, Kind.GET_PERMS, Kind.GET_DOMAIN_PATH)


@dataclass(slots=True)
class _Request:
    kind: int
    number: int
    message: bytes
    """As XenStore gets it."""
    asked: bytes
    """What the guest gave along."""
    resent: bool = False
    silent: bool = False
    """The guest that asked is gone."""


class Relay:
    """One domain's requests and answers, in whole messages."""

    def __init__(self, to_store: Callable[[bytes], None], to_guest: Callable[[bytes], None]) -> None:
        """Both callbacks take whole messages."""
        self.broken: str | None = None
        """Why the guest's bytes make no sense any more, as half a sentence; the ring is of no use then."""
        self._to_store = to_store
        self._to_guest = to_guest
        self._requests: deque[_Request] = deque()
        self._guest = bytearray()
        self._store = bytearray()
        self._watches: dict[bytes, None] = {}
        self._former: Collection[int] = ()  # numbers that the guest had
        self._number = b""  # the one that it has
        self._events: dict[bytes, list[tuple[bytes, bytes]]] = {}  # token: (XenStore's path, the guest's)
        self._transactions: set[int] = set()
        self.changes = 0
        """Requests of the guest that may have changed something, its watches included."""

    @property
    def idle(self) -> bool:
        """Whether no request is under way and no transaction is open."""
        return not self._requests and not self._transactions and not self._store

    @property
    def watches(self) -> list[bytes]:
        """What the guest watches: path and token, each with a NUL after it."""
        return list(self._watches)

    def rename(self, former: Collection[int], number: int) -> None:
        """Where the guest names itself, or backends of its devices, by a ``former`` number, it means ``number``."""
        self._former, self._number = former, b"%d" % number

    @property
    def begun(self) -> bytes:
        """The part of a request that has come."""
        return bytes(self._guest)

    def resume(self, watches: list[bytes], begun: bytes) -> None:
        """For a guest that goes on from a saved one: what it watched then. Each watch fires once."""
        self._guest[:] = begun
        for payload in watches:
            message = pack(Kind.WATCH, 0, 0, self._put_in(Kind.WATCH, payload))
            self._requests.append(_Request(Kind.WATCH, 0, message, payload, silent=True))
            self._to_store(message)

    @property
    def room(self) -> bool:
        """May more be taken from the ring? Otherwise not until something was answered."""
        return self.broken is None and len(self._requests) < _OUTSTANDING_MAX

    def from_guest(self, data: bytes) -> None:
        """Bytes of the ring's request half, cut anywhere."""
        if self.broken is not None:
            return
        self._guest += data
        while len(self._guest) >= HEADER.size:
            kind, number, transaction, length = HEADER.unpack_from(self._guest)
            if length > PAYLOAD_MAX:
                self.broken = f"a message of {length} bytes"
                return
            end = HEADER.size + length
            if len(self._guest) < end:
                return
            message = bytes(self._guest[:end])
            del self._guest[:end]
            self.changes += kind not in HARMLESS
            asked = message[HEADER.size :]
            if self._former:
                message = pack(kind, number, transaction, self._put_in(kind, asked))
            self._requests.append(_Request(kind, number, message, asked))
            self._to_store(message)

    def from_store(self, data: bytes) -> None:
        """Bytes from the process, cut anywhere. Answers come in the order of the requests, events in between."""
        self._store += data
        while len(self._store) >= HEADER.size:
            kind, _, _, length = HEADER.unpack_from(self._store)
            end = HEADER.size + length
            if len(self._store) < end:
                return
            message = bytes(self._store[:end])
            del self._store[:end]
            if kind != Kind.WATCH_EVENT:
                if not self._requests:
                    continue  # no guest waits for it
                request = self._requests.popleft()
                self._note(request, message)
                if request.silent:
                    continue
                message = self._put_right(request, message)
            elif self._events:
                message = self._put_back(message)
            self._to_guest(message)

    def resend(self) -> None:
        """The connection is a new one: send again what has no answer."""
        self._store.clear()
        waiting = list(self._requests)
        for request in waiting:
            request.resent = True
        for request in waiting:
            self._to_store(request.message)

    def reset(self) -> None:
        """The guest starts again: nothing of what went before is for it, and its watches and transactions are gone."""
        self._guest.clear()
        for request in self._requests:
            request.silent = True
        self._former = ()  # a guest that starts learns everything anew
        message = pack(Kind.RESET_WATCHES, 0, 0, b"\0")
        self._requests.append(_Request(Kind.RESET_WATCHES, 0, message, b"\0", silent=True))
        self._to_store(message)

    def _note(self, request: _Request, answer: bytes) -> None:
        """Keep account of watches and transactions."""
        kind, _, _, _ = HEADER.unpack_from(answer)
        transaction = HEADER.unpack_from(request.message)[2]
        payload = request.asked
        if request.kind == Kind.TRANSACTION_END:
            self._transactions.discard(transaction)
        elif request.kind == Kind.RESET_WATCHES:
            self._watches.clear()
            self._events.clear()
            self._transactions.clear()
        elif kind == Kind.ERROR:
            return
        elif request.kind == Kind.WATCH:
            self._watches[payload] = None
            if request.message[HEADER.size :] != payload:
                self._events.setdefault(_token(payload), []).append(_paths(request))
        elif request.kind == Kind.UNWATCH:
            self._watches.pop(payload, None)
            if _paths(request) in self._events.get(_token(payload), ()):
                self._events[_token(payload)].remove(_paths(request))
        elif request.kind == Kind.TRANSACTION_START:
            text = answer[HEADER.size :].rstrip(b"\0")
            if text.isdigit():
                self._transactions.add(int(text))

    def _put_in(self, kind: int, payload: bytes) -> bytes:
        """``payload`` with the present name of the place that it begins with."""
        match = None if kind in _WITHOUT_PATH else _NUMBERED.match(payload)
        if match is None or int(match[1]) not in self._former:
            return payload
        renamed = payload[: match.start(1)] + self._number + payload[match.end(1) :]
        return renamed if len(renamed) <= PAYLOAD_MAX else payload

    def _put_back(self, event: bytes) -> bytes:
        """The event as the guest expects it: with the path by which it watches."""
        path, _, rest = event[HEADER.size :].partition(b"\0")
        for theirs, asked in self._events.get(rest.partition(b"\0")[0], ()):
            if path == theirs or path.startswith(theirs + b"/"):
                return pack(Kind.WATCH_EVENT, 0, 0, asked + path[len(theirs) :] + b"\0" + rest)
        return event

    @staticmethod
    def _put_right(request: _Request, answer: bytes) -> bytes:
        kind, number, transaction, _ = HEADER.unpack_from(answer)
        if not request.resent or kind != Kind.ERROR:
            return answer
        error = answer[HEADER.size :]
        if (request.kind, error) in ((Kind.WATCH, b"EEXIST\0"), (Kind.UNWATCH, b"ENOENT\0")):
            return pack(request.kind, number, transaction, b"OK\0")
        if request.kind == Kind.TRANSACTION_END and error == b"ENOENT\0":
            if request.message.endswith(b"F\0"):
                return pack(request.kind, number, transaction, b"OK\0")
            return pack(Kind.ERROR, number, transaction, b"EAGAIN\0")  # whether it was done is not known
        return answer


def _token(payload: bytes) -> bytes:
    """Of a request to watch, or to watch no more."""
    return payload.partition(b"\0")[2].partition(b"\0")[0]


def _paths(request: _Request) -> tuple[bytes, bytes]:
    """What is watched, as XenStore calls it, and the guest."""
    return request.message[HEADER.size :].partition(b"\0")[0], request.asked.partition(b"\0")[0]
