"""How a backend and a frontend find each other: device states and keys in XenStore.

The toolstack makes a device's two folders (:func:`create_device`); the backend says what it can and waits; the frontend
writes its rings and its event channel; both go to state 4. Either may close; a frontend that comes back (a guest that
has booted anew) is served anew while the device is ``online``.

Everything that the frontend wrote is hostile: numbers are parsed strictly, and what cannot be right ends in state 5
with a sentence in the error folder.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from typing import Any, Final, Protocol

from nonroot.backends.ring import RingError
from nonroot.backends.supervisor import BackendProcess, Served
from nonroot.xen.backend import EventChannelError, EventChannelPort, FrontendAccess, GrantError

__all__ = ["BackendDevice", "BadFrontendError", "Store", "XenbusState", "create_device", "number"]

PAGE: Final = 4096
LONGEST_VALUE: Final = 256


class XenbusState(IntEnum):
    """States of a device's end."""

    UNKNOWN = 0
    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6
    RECONFIGURING = 7
    RECONFIGURED = 8


class StoreRequests(Protocol):
    """What is asked of XenStore, inside of a transaction and outside."""

    def read(self, path: str) -> str | None:
        """A node's value; None if there is none."""

    def write(self, path: str, value: str) -> None:
        """Set a node's value."""

    def mkdir(self, path: str) -> None:
        """Make a node."""

    def rm(self, path: str) -> None:
        """Remove a node and all below it."""

    def set_permissions(self, path: str, permissions: Iterable[str]) -> None:
        """Say who may do what."""


class Store(StoreRequests, Protocol):
    """XenStore; :class:`nonroot.xenstore.client.XenStore` is one."""

    def transaction(self) -> Iterable[Any]:
        """Attempts, context managers that give :class:`StoreRequests`."""

    def watch(self, path: str, callback: Callable[[str], None] | None = None) -> Any:
        """Hear of changes; what comes back has ``close()``."""


class BadFrontendError(Exception):
    """The frontend asks for what cannot be. One sentence."""


def number(text: str | None, what: str, lowest: int = 0, highest: int = 0xFFFFFFFF) -> int:
    """A number that the frontend wrote. BadFrontendError."""
    if text is None:
        raise BadFrontendError(f"the frontend has written no {what}")
    if not text.isascii() or not text.isdigit() or len(text) > 10 or not lowest <= int(text) <= highest:
        raise BadFrontendError(f"the frontend's {what} is {text[:20]!r}, and has to be {lowest} to {highest}")
    return int(text)


def create_device(
    store: Store,
    kind: str,
    domid: int,
    device: int,
    front: Mapping[str, str],
    back: Mapping[str, str],
    backend_domid: int = 0,
) -> str:
    """
    Make the folders of a device of ``domid`` (kind ``vbd`` or ``vif``), in one transaction, as the toolstack does.

    The frontend's belongs to the guest, the backend's can be read by it. Returns the backend's path.
    """
    frontend = f"/local/domain/{domid}/device/{kind}/{device}"
    backend = f"/local/domain/{backend_domid}/backend/{kind}/{domid}/{device}"
    for attempt in store.transaction():
        with attempt as t:
            t.rm(frontend)
            t.rm(backend)
            t.mkdir(backend)
            t.set_permissions(backend, [f"n{backend_domid}", f"r{domid}"])
            t.mkdir(frontend)
            t.set_permissions(frontend, [f"n{domid}", f"r{backend_domid}"])
            state = str(int(XenbusState.INITIALISING))
            for key, value in {
                "frontend": frontend, "frontend-id": str(domid), "online": "1", "state": state, **back,
            }.items():  # fmt: skip
                t.write(f"{backend}/{key}", value)
            for key, value in {
                "backend": backend, "backend-id": str(backend_domid), "state": state, **front,
            }.items():  # fmt: skip
                t.write(f"{frontend}/{key}", value)
    return backend


class BackendDevice:
    """
    The backend's end of one device. Subclasses say what it can, and connect it.

    Methods are for one thread, that which dispatches the store's watches; :meth:`wake` is for any.
    """

    def __init__(self, store: Store, path: str, access: FrontendAccess) -> None:
        """``path``: the backend's folder. BadFrontendError if it is none."""
        self.store, self.path, self.access = store, path, access
        self.frontend = store.read(f"{path}/frontend") or ""
        if not self.frontend:
            raise BadFrontendError(f"{path} is no backend's folder")
        self.state = XenbusState.UNKNOWN
        self.failure = ""
        """Why the device was closed, if the frontend made an error."""
        self.ports: list[EventChannelPort] = []
        """Bound event channels of the frontend's."""
        self.adopted = False
        """Whether the frontend is one that was connected elsewhere: what it was offered there is not known."""
        self._mapped: list[int] = []
        self._watch: Any = None

    # ── for subclasses ──

    def features(self) -> dict[str, str]:
        """What the backend can, as keys."""
        raise NotImplementedError

    def connect(self) -> dict[str, str]:
        """Read what the frontend wrote, and begin to serve; keys to write before state 4. BadFrontendError."""
        raise NotImplementedError

    def disconnect(self) -> None:
        """Serve no more; rings and ports are given back by the caller. Also after a :meth:`connect` that failed."""
        raise NotImplementedError

    def release(self) -> None:
        """The device is gone for good."""

    def front(self, key: str) -> str | None:
        """What the frontend wrote, if it is no longer than any sensible value."""
        value = self.store.read(f"{self.frontend}/{key}")
        return value if value is None or len(value) <= LONGEST_VALUE else value[:LONGEST_VALUE]

    def front_flag(self, key: str) -> bool:
        """Whether the frontend wrote 1."""
        return self.front(key) == "1"

    def map_ring(self, references: list[int]) -> list[memoryview]:
        """The pages of a ring. BadFrontendError."""
        pages = []
        for reference in references:
            try:
                pages.append(self.access.grants.map(reference))
            except GrantError as error:
                raise BadFrontendError(f"the frontend's ring cannot be mapped: {error}") from None
            self._mapped.append(reference)
        return pages

    def bind(self, port: int, on_event: Callable[[], object], bell: int | None = None) -> EventChannelPort:
        """An event channel of the frontend's. BadFrontendError."""
        try:
            bound = self.access.bind_interdomain(port, on_event, bell)
        except EventChannelError as error:
            raise BadFrontendError(f"the frontend's event channel cannot be bound: {error}") from None
        self.ports.append(bound)
        return bound

    def serve(self, process: BackendProcess, served: Served, ports: list[int]) -> None:
        """Have a process serve the connected device, whose events are those of ``ports``. BadFrontendError."""
        bound = [self.bind(port, served.wake, served.wake_fd) for port in ports]
        served.notify = [bound[min(index, len(bound) - 1)].notify for index in range(len(served.notify_fds))]
        error = process.serve(served)
        if error is not None:
            raise BadFrontendError(error)

    # ── the life of a device ──

    def start(self) -> None:
        """Publish, and wait for the frontend."""
        self._publish()
        self._watch = self.store.watch(f"{self.frontend}/state", lambda _: self.frontend_changed())

    def _publish(self) -> None:
        self.adopted = False
        self._write(self.features())
        self._switch(XenbusState.INIT_WAIT)

    def _write(self, keys: Mapping[str, str]) -> None:
        for attempt in self.store.transaction():
            with attempt as t:
                for key, value in keys.items():
                    t.write(f"{self.path}/{key}", value)

    def _switch(self, state: XenbusState) -> None:
        self.state = state
        self.store.write(f"{self.path}/state", str(int(state)))

    def frontend_changed(self) -> None:
        """Look at the frontend's state, and follow."""
        text = self.store.read(f"{self.frontend}/state")
        try:
            theirs = XenbusState(int(text)) if text and text.isdigit() and len(text) < 3 else XenbusState.UNKNOWN
        except ValueError:
            theirs = XenbusState.UNKNOWN
        connected = bool(self._mapped or self.ports)
        match theirs:
            case XenbusState.INITIALISING:
                if connected:
                    self._disconnect()  # the guest has started anew without saying goodbye
                if self.state is not XenbusState.INIT_WAIT:
                    self._publish()
            case XenbusState.INITIALISED | XenbusState.CONNECTED:
                if self.state is XenbusState.INIT_WAIT:
                    self._connect()
            case XenbusState.CLOSING:
                if connected:
                    self._disconnect()
                if self.state not in (XenbusState.CLOSING, XenbusState.CLOSED):
                    self._switch(XenbusState.CLOSING)
            case XenbusState.CLOSED | XenbusState.UNKNOWN:
                if connected:
                    self._disconnect()
                if self.state is not XenbusState.CLOSED:
                    self._switch(XenbusState.CLOSED)

    def _connect(self) -> None:
        try:
            keys = self.connect()
        except (BadFrontendError, RingError, GrantError) as error:
            self.fail(str(error))
            return
        self._write(keys)
        self._switch(XenbusState.CONNECTED)

    def _disconnect(self) -> None:
        self.disconnect()
        for port in self.ports:
            port.close()
        self.ports.clear()
        for reference in self._mapped:
            with contextlib.suppress(GrantError):  # the domain is gone
                self.access.grants.unmap(reference)
        self._mapped.clear()

    def ask_to_close(self) -> None:
        """Tell a connected frontend that the device is to go: it closes its end, and we follow."""
        self._switch(XenbusState.CLOSING)

    def fail(self, reason: str) -> None:
        """End the connection because of what the frontend did."""
        self.failure = reason
        self._disconnect()
        self.store.write(f"{self.path}/error", reason)
        self._switch(XenbusState.CLOSING)

    def republish(self, keys: Mapping[str, str]) -> None:
        """Tell a connected frontend that something is new: keys, then state 4 again."""
        self._write(keys)
        if self.state is XenbusState.CONNECTED:
            self._switch(XenbusState.CONNECTED)

    def suspend(self) -> XenbusState:
        """
        Serve no more and listen no more, and leave everything as it is: rings, nodes, and the state, which is returned.

        :meth:`adopt` goes on, of this device or of one that was made for the same guest elsewhere.
        """
        state = self.state
        self.stop()
        self.state = state
        return state

    def adopt(self, state: XenbusState) -> None:
        """
        Go on in ``state`` with a frontend that knows nothing of what was between. Its nodes are there.

        Requests in its rings without a response are done, and it is notified: what it was told may have been lost.
        """
        self.adopted = True
        keys = self.features()
        if state is XenbusState.CONNECTED:
            try:
                keys |= self.connect()
            except (BadFrontendError, RingError, GrantError) as error:
                self._write(keys)
                self.fail(str(error))
                state = self.state
        self._write(keys)
        self._switch(state)
        for port in self.ports:
            port.notify()
        self._watch = self.store.watch(f"{self.frontend}/state", lambda _: self.frontend_changed())

    def close(self) -> None:
        """The device goes away, whatever the frontend says. Safe to call again."""
        try:
            self.stop()
        finally:
            self.release()

    def stop(self) -> None:
        """Serve no more and listen no more, without a word to the frontend. :meth:`start` begins anew."""
        self._disconnect()
        self.state = XenbusState.UNKNOWN
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
