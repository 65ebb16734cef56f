"""A client of XenStore's process: for dom0, for backends, for tools and tests.

    with XenStore() as store:
        store.write("/local/domain/7/name", "web")
        for attempt in store.transaction():
            with attempt as t:
                t.write("/counter", str(int(t.read("/counter") or "0") + 1))
        watch = store.watch("/local/domain/7/control/shutdown")
        for path in watch.events(timeout=5):
            ...

Texts are values as UTF-8 with undecodable bytes kept (``surrogateescape``). Should the process go away, the next
request starts it or finds it again, registers the watches anew, and is sent once more; each watch fires then, since
changes may have been missed. Methods may be called from any thread; watches' callbacks run in the thread that calls
:meth:`XenStore.dispatch`.
"""

import contextlib
import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final

from nonroot.xenstore import place
from nonroot.xenstore.errors import CODES, XenStoreError, XenStoreLostError
from nonroot.xenstore.wire import HEADER, PAYLOAD_MAX, Kind, pack

__all__ = ["Attempt", "Request", "Requests", "Watch", "XenStore", "asking", "permitting", "texts", "writing"]

_ATTEMPTS: Final = 100
"""Times that a transaction is tried."""
_REPLY_SECONDS: Final = 30.0
_PATIENCE: Final = (0.0, 0.01, 0.1, 0.5, None)
"""Seconds to wait before a lost request is sent again: one that dies may still accept connections for a moment."""


class _Lost(Exception):  # noqa: N818
    """The connection is gone; the request may have been done."""


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")


def _payload(*texts: str) -> bytes:
    return b"".join(_bytes(text) + b"\0" for text in texts)


def texts(payload: bytes) -> list[str]:
    """The strings in a payload, each of which ends with a zero."""
    return payload.decode("utf-8", "surrogateescape").split("\0")[:-1]


Request = tuple[Kind, bytes, str]
"""Kind, payload, and what begins the error's sentence."""
MOST_AT_ONCE: Final = 32
"""Requests that are sent before the first reply is read: both ends have room for so many."""


def writing(path: str, value: str | bytes) -> Request:
    """The request of :meth:`Requests.write`."""
    return Kind.WRITE, _payload(path) + _bytes(value), f"write {path}"


def permitting(path: str, permissions: Iterable[str]) -> Request:
    """The request of :meth:`Requests.set_permissions`."""
    return Kind.SET_PERMS, _payload(path, *permissions), f"set the permissions of {path}"


def asking(kind: Kind, path: str) -> Request:
    """A request that takes a path only."""
    return kind, _payload(path), f"{kind.name.lower()} {path}"


class Requests:
    """What can be asked inside of a transaction and outside. XenStoreError says what was refused, and why."""

    def ask(self, kind: Kind, payload: bytes, what: str) -> bytes:
        """Send one request; returns the reply's payload. ``what`` begins the error's sentence."""
        raise NotImplementedError

    def ask_all(self, requests: Sequence[Request]) -> list[bytes | XenStoreError]:
        """Send many requests; of each its reply's payload, or why it was refused. XenStoreLostError."""
        raise NotImplementedError

    def do_all(self, requests: Sequence[Request]) -> None:
        """Send many requests, such as :func:`writing` makes. XenStoreError: the first that was refused."""
        for reply in self.ask_all(requests):
            if isinstance(reply, XenStoreError):
                raise reply

    def read(self, path: str) -> str | None:
        """A node's value; None if there is no such node."""
        data = self.read_bytes(path)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def read_bytes(self, path: str) -> bytes | None:
        """A node's value as it is; None if there is no such node."""
        try:
            return self.ask(Kind.READ, _payload(path), f"read {path}")
        except XenStoreError as error:
            if error.name == "ENOENT":
                return None
            raise

    def exists(self, path: str) -> bool:
        """Is there such a node?"""
        return self.read_bytes(path) is not None

    def write(self, path: str, value: str | bytes) -> None:
        """Set a node's value; it and its parents are made where they are missing."""
        self.ask(*writing(path, value))

    def mkdir(self, path: str) -> None:
        """Make an empty node where there is none."""
        self.ask(Kind.MKDIR, _payload(path), f"make {path}")

    def rm(self, path: str) -> None:
        """Remove a node and all below it; nothing happens if it is not there."""
        try:
            self.ask(Kind.RM, _payload(path), f"remove {path}")
        except XenStoreError as error:
            if error.name != "ENOENT":
                raise

    def ls(self, path: str) -> list[str]:
        """The names of a node's children, however many. XenStoreError ENOENT."""
        try:
            return texts(self.ask(Kind.DIRECTORY, _payload(path), f"list {path}"))
        except XenStoreError as error:
            if error.name != "E2BIG":
                raise
        while True:
            names = self._ls_in_parts(path)
            if names is not None:
                return names

    def _ls_in_parts(self, path: str) -> list[str] | None:
        """None if the list changed meanwhile."""
        found, began = b"", b""
        while True:
            reply = self.ask(Kind.DIRECTORY_PART, _payload(path, str(len(found))), f"list {path}")
            generation, _, part = reply.partition(b"\0")
            began = began or generation
            if generation != began:
                return None
            if part.endswith(b"\0\0") or part == b"\0":
                return texts(found + part[:-1])
            found += part

    def get_permissions(self, path: str) -> list[str]:
        """``["n0", "r7"]``: the owner with everybody's access, then others."""
        return texts(self.ask(Kind.GET_PERMS, _payload(path), f"get the permissions of {path}"))

    def set_permissions(self, path: str, permissions: Iterable[str]) -> None:
        """The reverse."""
        self.ask(*permitting(path, permissions))


class Attempt(Requests):
    """One try of a transaction: a context manager. An exception inside aborts it."""

    def __init__(self, store: "XenStore") -> None:
        self.committed = False
        self.again = False
        self._store = store
        self._number = 0
        self._life = 0

    def ask(self, kind: Kind, payload: bytes, what: str) -> bytes:
        """In the transaction."""
        return self._store.exchange(kind, payload, what, self._number, self._life)

    def ask_all(self, requests: Sequence[Request]) -> list[bytes | XenStoreError]:
        """In the transaction."""
        return self._store.exchange_all(requests, self._number, self._life)

    def __enter__(self) -> "Attempt":
        with self._store.lock:
            self._number = int(self._store.ask(Kind.TRANSACTION_START, b"\0", "begin a transaction")[:-1])
            self._life = self._store.life
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(value, XenStoreLostError):
            self.again = True
            return True
        try:
            self.ask(Kind.TRANSACTION_END, b"F\0" if value is not None else b"T\0", "commit")
            self.committed = value is None
        except XenStoreLostError:
            self.again = (
                value is None
            )  # whether it was committed is not known: trying again is what callers are made for
        except XenStoreError as error:
            if value is None and error.name != "EAGAIN":
                raise
            self.again = value is None
        return False


class Watch:
    """A registration, until :meth:`close`."""

    def __init__(self, store: "XenStore", path: str, token: str, callback: Callable[[str], None] | None) -> None:
        self.path = path
        self.token = token
        self.callback = callback
        self.fired: deque[str] = deque()
        """Paths of changes that nobody has taken yet."""
        self._store = store

    def events(self, timeout: float | None = None) -> Iterator[str]:
        """Paths at or below the watched one that changed, until none does for ``timeout`` seconds (None: for ever).

        The first one, the watched path itself, comes at once.
        """
        while True:
            if not self.fired:
                self._store.wait(timeout, lambda: bool(self.fired))
            if not self.fired:
                return
            yield self.fired.popleft()

    def close(self) -> None:
        """Hear no more."""
        self._store.unwatch(self)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class XenStore(Requests):
    """A connection to XenStore's process, which is started if need be."""

    def __init__(self, path: Path | None = None, *, domid: int = 0) -> None:
        """
        ``path``: of the socket; without one, that of the user's own. ``domid``: speak as that domain, which has been
        introduced. XenStoreLostError if nobody serves there and the process cannot be started.
        """
        self._path = path
        self._domid = domid
        self.lock = threading.RLock()
        self._socket: socket.socket | None = None
        self._input = bytearray()
        self._numbers = itertools.cycle(range(1, 1 << 31))
        self._tokens = itertools.count(1)
        self._watches: dict[str, Watch] = {}
        self._waiters: set[int] = set()
        self.life = 0
        """Counts its connections: transactions do not outlive theirs."""
        self._closed = False
        self.connector: Callable[[], socket.socket | None] | None = None
        """How a connection is made, by a process that cannot do so itself; None: by the socket's path."""
        with self.lock:
            self._reconnect()
        if domid:  # what an earlier client of that domain watched is not for this one
            self.ask(Kind.RESET_WATCHES, b"\0", "reset watches")

    # Requests

    def ask(self, kind: Kind, payload: bytes, what: str) -> bytes:
        """Outside of transactions; sent again if the process went away."""
        return self.exchange(kind, payload, what)

    def ask_all(self, requests: Sequence[Request]) -> list[bytes | XenStoreError]:
        """Outside of transactions; all that were not answered are sent again if the process went away."""
        return self.exchange_all(requests)

    def exchange_all(
        self, requests: Sequence[Request], transaction: int = 0, life: int = 0
    ) -> list[bytes | XenStoreError]:
        """Many requests, of which several are under way at a time, and their replies. XenStoreLostError."""
        replies: list[bytes | XenStoreError] = []
        for first in range(0, len(requests), MOST_AT_ONCE):
            replies += self._exchange_some(requests[first : first + MOST_AT_ONCE], transaction, life)
        return replies

    def _exchange_some(self, requests: Sequence[Request], transaction: int, life: int) -> list[bytes | XenStoreError]:
        if sum(len(payload) for _, payload, _ in requests) > PAYLOAD_MAX or len(requests) < 2:
            return [self._alone(request, transaction, life) for request in requests]
        with self.lock:
            if self._socket is not None and (not transaction or life == self.life):
                try:
                    return self._pipeline(requests, transaction)
                except _Lost:
                    self._drop()
            # One by one, each with the patience that it takes.
            return [self._alone(request, transaction, life) for request in requests]

    def _alone(self, request: Request, transaction: int, life: int) -> bytes | XenStoreError:
        try:
            return self.exchange(*request, transaction, life)
        except XenStoreError as error:
            return error

    def _pipeline(self, requests: Sequence[Request], transaction: int) -> list[bytes | XenStoreError]:
        connection = self._socket
        assert connection is not None
        numbers = {next(self._numbers): index for index in range(len(requests))}
        message = b"".join(
            pack(kind, number, transaction, payload)
            for number, (kind, payload, _) in zip(numbers, requests, strict=True)
        )
        try:
            connection.sendall(message)
        except OSError:
            raise _Lost from None
        found: dict[int, bytes | XenStoreError] = {}
        while True:
            for reply, answered, data in self._messages():
                if answered in numbers and reply != Kind.WATCH_EVENT:
                    index = numbers[answered]
                    refused = XenStoreError(data.rstrip(b"\0").decode("latin-1"), requests[index][2])
                    found[index] = refused if reply == Kind.ERROR else data
            if len(found) == len(requests):
                return [found[index] for index in range(len(requests))]
            self._receive()

    def exchange(
        self,
        kind: Kind,
        payload: bytes,
        what: str,
        transaction: int = 0,
        life: int = 0,
        fds: tuple[int, ...] = (),
    ) -> bytes:
        """One request and its reply. XenStoreError; XenStoreLostError: within a transaction, or if it cannot be had."""
        if len(payload) > PAYLOAD_MAX:
            raise XenStoreError("E2BIG", what)
        with self.lock:
            for patience in _PATIENCE:
                try:
                    if transaction and (self._socket is None or life != self.life):
                        raise XenStoreLostError(f"XenStore: {what}: its process went away")
                    if self._socket is None:
                        self._connect()
                    reply, data = self._exchange(kind, payload, transaction, fds)
                    break
                except _Lost:
                    self._drop()
                    if not transaction and patience is not None:
                        time.sleep(patience)
                    else:
                        raise XenStoreLostError(f"XenStore: {what}: its process went away") from None
        if reply == Kind.ERROR:
            raise XenStoreError(data.rstrip(b"\0").decode("latin-1"), what)
        return data

    def _exchange(self, kind: Kind, payload: bytes, transaction: int, fds: tuple[int, ...] = ()) -> tuple[int, bytes]:
        connection = self._socket
        assert connection is not None
        number = next(self._numbers)
        message = pack(kind, number, transaction, payload)
        try:
            sent = socket.send_fds(connection, [message], fds)
            connection.sendall(message[sent:])
        except OSError:
            raise _Lost from None
        while True:
            for reply, answered, data in self._messages():
                if answered == number and reply != Kind.WATCH_EVENT:
                    return reply, data
            self._receive()

    def _receive(self) -> None:
        assert self._socket is not None
        try:
            data = self._socket.recv(64 << 10)
        except OSError:
            raise _Lost from None
        if not data:
            raise _Lost
        self._input += data

    def _messages(self) -> Iterator[tuple[int, int, bytes]]:
        """Replies that have come, as (type, request, payload); events go to their watches."""
        while len(self._input) >= HEADER.size:
            kind, number, _, length = HEADER.unpack_from(self._input)
            if length > PAYLOAD_MAX:
                raise _Lost
            end = HEADER.size + length
            if len(self._input) < end:
                return
            payload = bytes(self._input[HEADER.size : end])
            del self._input[:end]
            if kind == Kind.WATCH_EVENT:
                path, token, *_ = (*texts(payload), "", "")
                watch = self._watches.get(token)
                if watch is not None:
                    watch.fired.append(path)
                    self._wake()
            yield kind, number, payload

    # The connection

    def _connect(self) -> None:
        if self._closed:
            raise XenStoreLostError("XenStore: this connection was closed")
        try:
            if self.connector is not None:
                connection = self.connector()
            else:
                connection = place.open_socket(self._path or place.socket_path())
                if connection is None and self._path is None:
                    connection = place.open_socket(place.ensure())
        except OSError as error:
            raise XenStoreLostError(f"XenStore's socket cannot be used: {error.strerror or error}") from error
        if connection is None:
            where = "" if self.connector is not None else f" at {self._path or place.socket_path()}"
            raise XenStoreLostError(f"nobody serves XenStore{where}")
        connection.settimeout(_REPLY_SECONDS)
        self._socket = connection
        self.life += 1
        if self._domid:
            self._again(Kind.CONTROL, _payload("attach", str(self._domid)), f"speaking as domain {self._domid}")
        for watch in self._watches.values():
            # An introduced domain's watches outlive its connection.
            self._again(Kind.WATCH, _payload(watch.path, watch.token), f"watching {watch.path}", "EEXIST")

    def _again(self, kind: Kind, payload: bytes, what: str, ignored: str = "") -> None:
        reply, data = self._exchange(kind, payload, 0)
        name = data.rstrip(b"\0").decode("latin-1")
        if reply == Kind.ERROR and name != ignored:
            self._drop()
            raise XenStoreLostError(f"XenStore: {what} was refused: {CODES.get(name, name)}")

    def _drop(self) -> None:
        self._input.clear()
        self._wake()
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """End the connection, and with it its watches and transactions. Safe to call again."""
        with self.lock:
            self._closed = True
            self._drop()

    def __enter__(self) -> "XenStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The socket, for an event loop: call :meth:`dispatch` when it is readable. It changes on a reconnection."""
        with self.lock:
            if self._socket is None:
                self._reconnect()
            assert self._socket is not None
            return self._socket.fileno()

    # Transactions and watches

    def transaction(self) -> Iterator[Attempt]:
        """Attempts of a transaction, until one is committed: context managers. XenStoreError EAGAIN after 100."""
        for _ in range(_ATTEMPTS):
            attempt = Attempt(self)
            yield attempt
            if not attempt.again:
                return
        raise XenStoreError("EAGAIN", f"a transaction was tried {_ATTEMPTS} times")

    def watch(self, path: str, callback: Callable[[str], None] | None = None) -> Watch:
        """Hear of changes at and below ``path``, or of ``@introduceDomain`` and ``@releaseDomain``."""
        with self.lock:
            watch = Watch(self, path, f"w{next(self._tokens)}", callback)
            self._watches[watch.token] = watch
            try:
                self.ask(Kind.WATCH, _payload(path, watch.token), f"watch {path}")
            except BaseException as error:
                # Sent again over a new connection, which had registered it already.
                if not isinstance(error, XenStoreError) or error.name != "EEXIST":
                    del self._watches[watch.token]
                    raise
            return watch

    def unwatch(self, watch: Watch) -> None:
        """The reverse. Safe to call again."""
        with self.lock:
            if self._watches.pop(watch.token, None) is not None and self._socket is not None:
                with contextlib.suppress(XenStoreError):
                    self.ask(Kind.UNWATCH, _payload(watch.path, watch.token), f"unwatch {watch.path}")

    def wait(self, timeout: float | None, until: Callable[[], bool]) -> bool:
        """Take events until ``until()``, for at most ``timeout`` seconds (None: for ever). Did it come true?"""
        deadline = None if timeout is None else time.monotonic() + timeout
        # Another thread's request may take events, or change the connection.
        wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            with self.lock:
                self._waiters.add(wake)
            while True:
                with self.lock:
                    self._take()
                    if until():
                        return True
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(wake)
                    fd = self.fileno()
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                with contextlib.suppress(OSError, ValueError):
                    select.select([fd, wake], [], [], left)
        finally:
            with self.lock:
                self._waiters.discard(wake)
            os.close(wake)

    def _wake(self) -> None:
        for wake in self._waiters:
            os.eventfd_write(wake, 1)

    def dispatch(self, timeout: float | None = 0.0) -> int:
        """Run the callbacks of watches that fired, waiting for the first for ``timeout`` seconds; how many."""
        self.wait(timeout, lambda: any(watch.fired and watch.callback for watch in self._watches.values()))
        with self.lock:
            calls = []
            for watch in self._watches.values():
                if watch.callback is not None:
                    calls += [(watch.callback, path) for path in watch.fired]
                    watch.fired.clear()
        for callback, path in calls:
            callback(path)
        return len(calls)

    def _take(self) -> None:
        """Events that are there, without waiting."""
        try:
            if self._socket is None:
                raise _Lost
            while select.select([self._socket], [], [], 0)[0]:
                self._receive()
            for _ in self._messages():
                pass
        except _Lost:
            self._reconnect()

    def _reconnect(self) -> None:
        for patience in _PATIENCE:
            self._drop()
            try:
                self._connect()
                return
            except _Lost:
                if patience is None:
                    self._drop()
                    raise XenStoreLostError("XenStore's process goes away again and again") from None
                time.sleep(patience)

    # Domains

    def introduce(self, domid: int, gfn: int, port: int, ring: socket.socket | None = None) -> None:
        """
        A domain may use the store from now on, or is to have another ring.

        ``ring``: a connected stream socket that carries its ring's bytes; it is the store's then (a copy of it is).
        """
        fds = () if ring is None else (ring.fileno(),)
        payload = _payload(str(domid), str(gfn), str(port))
        self.exchange(Kind.INTRODUCE, payload, f"introduce domain {domid}", fds=fds)

    def release(self, domid: int) -> None:
        """A domain is gone: so are its watches, its permissions, and the nodes that it owned, with all below them."""
        self.ask(Kind.RELEASE, _payload(str(domid)), f"release domain {domid}")

    def is_introduced(self, domid: int) -> bool:
        """Is it known?"""
        return self.ask(Kind.IS_DOMAIN_INTRODUCED, _payload(str(domid)), f"ask for domain {domid}") == b"T\0"

    def set_target(self, domid: int, target: int) -> None:
        """A domain may do what another may."""
        self.ask(Kind.SET_TARGET, _payload(str(domid), str(target)), f"set the target of domain {domid}")

    def shutdown(self, domid: int) -> None:
        """A domain has shut down or crashed: fires ``@releaseDomain``."""
        self.control("shutdown", str(domid))

    def control(self, *words: str) -> str:
        """A control command; see ``help``."""
        reply = self.ask(Kind.CONTROL, _payload(*words), f"control {words[0]}")
        return reply.rstrip(b"\0").decode("utf-8", "surrogateescape")
