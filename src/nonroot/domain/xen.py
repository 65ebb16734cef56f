"""A Xen domain's dealings with XenStore: its number, its nodes, its ring, and the end of all that.

Whoever makes a domain does here what Xen's toolstack does. Numbers of domains that are gone without having said so are
found by the process that is noted for each, and given back.
"""

import contextlib
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from nonroot.confine import give_up_files
from nonroot.errors import TransientError
from nonroot.hvm.device import StateError
from nonroot.saved.fields import Fields
from nonroot.xen.config import LAST_DOMID
from nonroot.xen.host import STORE_GFN, XenHost
from nonroot.xenstore.client import Request, Requests, Watch, XenStore, asking, permitting, texts, writing
from nonroot.xenstore.errors import XenStoreError, XenStoreLostError
from nonroot.xenstore.relay import Relay
from nonroot.xenstore.wire import Kind

__all__ = ["StoreLink", "XenServices", "start_time"]

DOMAINS: Final = "/tool/nonroot/domain"
"""Below it, for each domain: the process that has it, and when that was started (:func:`start_time`)."""
READ_SIZE: Final = 1 << 16
PATIENCE: Final = 2.0
RETRIES: Final = 300
RETRY_SECONDS: Final = 0.1
FEATURES: Final = ("poweroff", "reboot", "suspend", "sysrq")
OWN_NODES: Final = (
    *("control/shutdown", "control/sysrq", "data", "drivers", "feature", "attr", "error"),
    *(f"control/feature-{name}" for name in FEATURES),
)
"""Nodes that the guest may write."""
HOSTS_NODES: Final = ("name", "domid", "console/tty", "memory/static-max")
"""Nodes that say what this domain is, whatever it was before."""
OFTEN_SWEPT: Final = 16
"""With more domains than this, one in so many new ones looks for those that are dead."""
MOST_NODES: Final = 4096
BACKENDS: Final = ("vbd", "vif")


class StoreLink:
    """
    Carries the bytes of a domain's ring to XenStore's process and back, in a thread of its own.

    If the process goes away and comes back, ``reconnect`` is asked for a new socket, and requests without an answer are
    sent again.
    """

    def __init__(self, host: XenHost, sock: socket.socket, reconnect: Callable[[], socket.socket | None]) -> None:
        """``sock``: connected to the store, as the domain. ``reconnect`` returns another such, or None for good."""
        self._socket = sock
        self._reconnect = reconnect
        self._lock = threading.RLock()
        self._out = bytearray()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = threading.Event()
        self._sealing: threading.Event | None = None
        self._relay = Relay(self._to_store, self._to_guest)
        self._deliver = host.attach_store(self._from_guest, lambda: self._relay.room)
        self._thread = threading.Thread(target=self._run, name="xenstore-ring", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more is carried. Any thread."""
        self._closing.set()
        os.eventfd_write(self._wake, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE)

    @property
    def idle(self) -> bool:
        """Whether the guest waits for nothing."""
        with self._lock:
            return self._relay.idle and not self._out

    def saved(self) -> tuple[list[bytes], bytes]:
        """What the guest watches, and the part of a request that has come."""
        with self._lock:
            return self._relay.watches, self._relay.begun

    @property
    def changes(self) -> int:
        """Requests of the guest that may have changed something."""
        return self._relay.changes

    def resume(self, watches: list[bytes], begun: bytes, former: Collection[int], number: int) -> None:
        """The guest goes on from a saved one, which watched that, and had ``former`` numbers. Before it does."""
        with self._lock:
            self._relay.rename(former, number)
            self._relay.resume(watches, begun)

    def restart(self) -> None:
        """The guest starts again: nothing of what it asked for before is for it. In the vCPU's thread."""
        with self._lock:
            self._relay.reset()

    def seal(self) -> None:
        """Have the thread give up files and capabilities; done when this returns."""
        done = self._sealing = threading.Event()
        os.eventfd_write(self._wake, 1)
        if not done.wait(PATIENCE) and self._thread.is_alive():
            raise TransientError("the thread that carries XenStore's requests does not answer")

    def _seal_thread(self) -> None:
        sealing, self._sealing = self._sealing, None
        if sealing is not None:
            give_up_files()
            sealing.set()

    def _from_guest(self, data: bytes) -> None:
        with self._lock:
            self._relay.from_guest(data)

    def _to_store(self, message: bytes) -> None:
        self._out += message
        os.eventfd_write(self._wake, 1)

    def _to_guest(self, message: bytes) -> None:
        self._deliver(message)

    def _run(self) -> None:
        while not self._closing.is_set():
            with contextlib.suppress(OSError):
                self._carry()
            self._socket.close()
            if self._closing.is_set() or self._relay.broken is not None:
                return
            replacement = self._reconnect()
            if replacement is None:
                return
            self._socket = replacement
            with self._lock:
                self._out.clear()
                self._relay.resend()

    def _carry(self) -> None:
        """Until the socket ends, or this is closed."""
        sock = self._socket
        sock.setblocking(False)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(sock, selectors.EVENT_READ)
            while not self._closing.is_set():
                with self._lock:
                    if self._out:
                        with contextlib.suppress(BlockingIOError):
                            del self._out[: sock.send(self._out)]
                    wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._out else 0)
                selector.modify(sock, wanted)
                for key, mask in selector.select():
                    if key.fileobj is sock and mask & selectors.EVENT_READ:
                        data = sock.recv(READ_SIZE)
                        if not data:
                            return
                        with self._lock:
                            self._relay.from_store(data)
                    elif key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                        self._seal_thread()


class XenServices:
    """A domain in XenStore. Made before its machine, for its number; :meth:`attach` connects the machine."""

    def __init__(
        self,
        store: XenStore,
        memory: int,
        name: str | None = None,
        domid: int = 0,
        path: str = DOMAINS,
        resumed: bool = False,
    ) -> None:
        """
        ``memory``: bytes. ``name``: as tools show it. ``domid``: 0 takes a free number.

        ``resumed``: its nodes come from a saved domain, by :meth:`resume`.
        XenStoreError, XenStoreLostError; TransientError if there is no number.
        """
        self.store = store
        self._tool = path
        self._memory = memory
        try:
            self._sweep()
            self.domid = self._take_number(domid)
        except BaseException:
            store.close()
            raise
        self.home = f"/local/domain/{self.domid}"
        self._link: StoreLink | None = None
        self._host: XenHost | None = None
        self._closed = False
        self._own_changes = 0
        self._former: list[int] = []
        self._prepared: tuple[int, list[str]] | None = None  # whose nodes are there already, and which
        self.last_saved: dict[str, Any] | None = None
        """What :meth:`saved` has found last."""
        self._watch: Watch | None = None
        self._nodes: list[list[str]] = []  # as they were when that had last fired
        self._name = name or f"domain{self.domid}"
        if not resumed:
            self._fill(self._name, memory)

    def attach(self, host: XenHost) -> None:
        """Introduce the domain, and connect its ring. Before the guest starts."""
        self._host = host
        self._link = StoreLink(host, self._introduce(), self._introduce_again)

    def saved(self) -> dict[str, Any]:
        """
        The domain's nodes and watches, while its vCPU stands.

        TransientError while the guest is in the middle of a request or transaction.
        """
        link = self._link
        if link is None or not link.idle:
            raise TransientError("the guest is in the middle of a request to XenStore", again=True)
        nodes = self._all_nodes()
        watches, begun = link.saved()
        self.last_saved = {
            "domid": self.domid,
            "former": self._former,
            "nodes": [field for node in nodes for field in node],
            "watches": [watch.hex() for watch in watches],
            "begun": begun.hex(),
        }
        return self.last_saved

    def prepare(self, record: Fields) -> None:
        """Have the nodes that :meth:`saved` found, for a domain that may go on from there later. StateError."""
        self._prepared = self._put_nodes(record, False)

    def resume(self, record: Fields, devices: Callable[[], object] = lambda: None, begun: bool = False) -> None:
        """
        Have the nodes and watches that :meth:`saved` found, under this domain's number. StateError.

        The guest may go on to use the numbers that it had before. ``devices``: called between nodes and watches.
        ``begun``: some of the nodes are there already.
        """
        old, former = record.number("domid", LAST_DOMID), record.numbers("former", LAST_DOMID)
        self._former = [number for number in dict.fromkeys([*former, old]) if number != self.domid]
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            self._put_nodes(record, begun)
        elif prepared != (old, record.texts("nodes")):
            self._remove_nodes(record)
            self._put_nodes(record, True)
        try:
            watches = [bytes.fromhex(watch) for watch in record.texts("watches")]
        except ValueError as error:
            raise StateError(f"XenStore state: {error}") from None
        devices()
        if self._link is not None:
            self._link.resume(watches, record.data("begun", 1 << 16), frozenset(self._former), self.domid)

    def _put_nodes(self, record: Fields, begun: bool) -> tuple[int, list[str]]:
        """What :meth:`saved` found, under this domain's number; whose it was, and what. StateError."""
        old, fields = record.number("domid", LAST_DOMID), record.texts("nodes")
        if len(fields) % 3:
            raise StateError("XenStore state: nodes are not complete")
        try:
            values = [bytes.fromhex(value) for value in fields[1::3]]
            mine = (self._name, str(self.domid), "", str(self._memory >> 10))
            own = dict(zip(HOSTS_NODES, map(str.encode, mine), strict=True))
            requests = []
            whose: dict[str, str] = {}
            for path, value, permissions in zip(fields[::3], values, fields[2::3], strict=True):
                if path.startswith("/"):
                    continue
                whose[path] = permissions
                node = f"{self.home}/{path}" if path else self.home
                if path:
                    requests.append(writing(node, own.pop(path, self._renamed(value, old))))
                # A new node has its parent's.
                if begun or not path or whose.get(path.rpartition("/")[0]) != permissions:
                    requests.append(permitting(node, [_for(p, old, self.domid) for p in permissions.split()]))
            requests += [writing(f"{self.home}/{path}", value) for path, value in own.items()]
            self.store.do_all(requests)  # nobody looks: a transaction would be time for nothing
        except (ValueError, XenStoreError) as error:
            raise StateError(f"XenStore state: {error}") from None
        return old, fields

    def _remove_nodes(self, record: Fields) -> None:
        """All that :meth:`saved` did not find."""
        kept = set(record.texts("nodes")[::3])
        now: list[list[str]] = []
        self._collect(now)
        for path in sorted((node[0] for node in now if node[0] not in kept), reverse=True):
            if path not in HOSTS_NODES:
                self.store.rm(f"{self.home}/{path}")

    def revert(self, record: Fields, seen: tuple[int, int]) -> None:
        """The guest goes back to what :meth:`saved` found, when :meth:`changes` was ``seen``: its nodes are as then."""
        link = self._link
        if (
            link is not None
            and link.idle
            and not link.saved()[1]
            and not record.data("begun", 1 << 16)
            and self.changes() == seen
        ):
            return  # nobody has changed anything
        if link is not None:
            link.restart()
        self._remove_nodes(record)
        self.resume(record, begun=True)

    def changes(self) -> tuple[int, int]:
        """Numbers that grow with what the guest and we may have changed."""
        return (0 if self._link is None else self._link.changes, self._own_changes)

    def _renamed(self, value: bytes, number: int) -> bytes:
        """``value`` with this domain's path instead of that of the domain with another number."""
        for old, new in zip(_places(number), _places(self.domid), strict=True):
            if value == old or value.startswith((old + b"/", old + b"\0")):
                return new + value[len(old) :]
        return value

    def _all_nodes(self) -> list[list[str]]:
        """What :meth:`_collect` finds; nothing is asked again while nothing has changed, which a watch tells."""
        if self._watch is None:
            self._watch = self.store.watch(self.home)
        else:
            self.store.read(f"{self.home}/domid")  # what has fired before comes before the answer
        if self._watch.fired or not self._nodes:
            self._watch.fired.clear()
            nodes: list[list[str]] = []
            self._collect(nodes)
            self._nodes = nodes
        return self._nodes

    def _collect(self, nodes: list[list[str]]) -> None:
        """All nodes, parents before their children: path, value and permissions."""
        level = [""]
        while level:
            places = [f"{self.home}/{path}" if path else self.home for path in level]
            kinds = Kind.READ, Kind.GET_PERMS, Kind.DIRECTORY
            replies = iter(self.store.ask_all([asking(kind, place) for place in places for kind in kinds]))
            below: list[str] = []
            for path, place in zip(level, places, strict=True):
                value, permissions, names = next(replies), next(replies), next(replies)
                if isinstance(value, XenStoreError) or isinstance(permissions, XenStoreError):
                    continue  # it has been removed meanwhile
                # A list may be too long for one reply.
                found = self.store.ls(place) if isinstance(names, XenStoreError) else texts(names)
                nodes.append([path, value.hex(), " ".join(texts(permissions))])
                below += [f"{path}/{name}" if path else name for name in found]
            if len(nodes) + len(below) > MOST_NODES:
                raise TransientError("the domain has too many nodes in XenStore to be saved")
            level = below

    @property
    def attached(self) -> bool:
        """Whether a machine has been connected."""
        return self._link is not None

    def seal(self, connect: Callable[[], socket.socket | None]) -> None:
        """Get ready for a process that is sealed: ``connect`` makes connections to XenStore. TransientError."""
        self.store.connector = connect
        if self._link is not None:
            self._link.seal()

    def shutdown(self, how: str = "poweroff") -> None:
        """Ask the guest to shut down: ``poweroff`` or ``reboot``."""
        self._own_changes += 1
        self.store.write(f"{self.home}/control/shutdown", how)

    def tell_console(self, path: str) -> None:
        """``path``: the pseudo-terminal that is its console. XenStoreError, XenStoreLostError."""
        self._own_changes += 1
        self.store.write(f"{self.home}/console/tty", path)

    def limit_memory(self, size: int) -> None:
        """The guest's balloon is to let it have ``size`` bytes at most, as the hypervisor does."""
        self._own_changes += 1
        self.store.write(f"{self.home}/memory/static-max", str(size >> 10))
        if self._host is not None:
            self._host.limit_memory(size)

    def listens(self) -> bool:
        """Whether the guest has said that it hears :meth:`shutdown`."""
        with contextlib.suppress(XenStoreError, XenStoreLostError):
            return self.store.read(f"{self.home}/control/feature-poweroff") == "1"
        return False

    def sysrq(self, key: str) -> None:
        """Press a magic SysRq key, one character."""
        self._own_changes += 1
        self.store.write(f"{self.home}/control/sysrq", key)

    def restart(self) -> None:
        """The machine starts again: the guest's nodes are as at first. In the vCPU's thread."""
        if self._link is not None:
            self._link.restart()
        with contextlib.suppress(XenStoreError, XenStoreLostError):
            for attempt in self.store.transaction():
                with attempt as t:
                    self._make_own_nodes(t)
                    t.write(f"{self.home}/memory/target", str(self._memory >> 10))

    def set_memory(self, size: int) -> None:
        """Ask the guest's balloon driver to leave it ``size`` bytes."""
        self._own_changes += 1
        self.store.write(f"{self.home}/memory/target", str(size >> 10))

    def close(self) -> None:
        """The domain is over; nothing of it stays. Any thread; closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._link is not None:
            self._link.close()
        with contextlib.suppress(XenStoreError, XenStoreLostError):
            self._remove(self.domid)
        self.store.close()

    # ── inside ──

    def _introduce(self) -> socket.socket:
        host = self._host
        assert host is not None
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self.store.introduce(self.domid, STORE_GFN, host.store_port, theirs)
            except BaseException:
                ours.close()
                raise
        return ours

    def _introduce_again(self) -> socket.socket | None:
        """XenStore's process has gone: it is started anew, by us or by somebody else."""
        for _ in range(RETRIES):
            if self._closed:
                return None
            try:
                return self._introduce()
            except XenStoreLostError:
                time.sleep(RETRY_SECONDS)
            except XenStoreError:
                return None
        return None

    def _take_number(self, wanted: int) -> int:
        for attempt in self.store.transaction():
            with attempt as t:
                if wanted and not t.exists(f"/local/domain/{wanted}"):
                    number: int | None = wanted
                    t.do_all(self._own_requests(wanted))
                    continue
                taken = {int(name) for name in _names(t.ls, "/local/domain") if name.isdigit()}
                candidates = [wanted] if wanted else range(1, LAST_DOMID + 1)
                number = next((n for n in candidates if n not in taken), None)
                if number is None:
                    raise TransientError(
                        f"there is a Xen domain {wanted} already"
                        if wanted
                        else "there are no numbers left for another Xen domain"
                    )
                t.do_all(self._own_requests(number))
        assert number is not None
        return number

    def _own_requests(self, number: int) -> list[Request]:
        process = f"{os.getpid()} {start_time(os.getpid())}"
        return [writing(f"{self._tool}/{number}", process), asking(Kind.MKDIR, f"/local/domain/{number}")]

    def _fill(self, name: str, memory: int) -> None:
        home, domid = self.home, self.domid
        readable = ["n0", f"r{domid}"]
        kilobytes = str(memory >> 10)
        nodes = {
            "name": name,
            "domid": str(domid),
            "memory/target": kilobytes,
            "memory/static-max": kilobytes,
            "control/platform-feature-multiprocessor-suspend": "1",
            "control/platform-feature-xs_reset_watches": "1",
            "cpu/0/availability": "online",
            "device": "",
            "console/type": "xenconsoled",
        }
        for attempt in self.store.transaction():
            with attempt as t:
                t.set_permissions(home, readable)
                for key, value in nodes.items():
                    t.write(f"{home}/{key}", value)
                self._make_own_nodes(t)

    def _make_own_nodes(self, store: Requests) -> None:
        for key in OWN_NODES:
            path = f"{self.home}/{key}"
            store.rm(path)
            store.write(path, "")
            store.set_permissions(path, [f"n{self.domid}"])

    def _sweep(self) -> None:
        """Remove domains whose processes are gone."""
        names = _names(self.store.ls, self._tool)
        if len(names) > OFTEN_SWEPT and os.getpid() % OFTEN_SWEPT:
            return  # with so many, each starting domain need not look at all the others
        for name in names:
            pid, _, start = (self.store.read(f"{self._tool}/{name}") or "").partition(" ")
            if name.isdigit() and pid.isdigit() and not _alive(int(pid), start):
                self._remove(int(name))

    def _remove(self, domid: int) -> None:
        with contextlib.suppress(XenStoreError):
            self.store.release(domid)
        for path in (f"/local/domain/{domid}", f"{self._tool}/{domid}"):
            self.store.rm(path)
        for kind in _names(self.store.ls, "/local/domain/0/backend"):
            self.store.rm(f"/local/domain/0/backend/{kind}/{domid}")


def _places(domid: int) -> list[bytes]:
    """The places in XenStore whose names say a domain's number: its own, and its devices' backends'."""
    backends = [f"/local/domain/0/backend/{kind}/{domid}" for kind in BACKENDS]
    return [name.encode() for name in (f"/local/domain/{domid}", *backends)]


def _for(permission: str, old: int, new: int) -> str:
    """A permission such as ``n7`` for the domain that is ``new`` now."""
    return f"{permission[:1]}{new}" if permission[1:] == str(old) else permission


def _names(ls: Callable[[str], list[str]], path: str) -> list[str]:
    try:
        return ls(path)
    except XenStoreError as error:
        if error.name != "ENOENT":
            raise
        return []


def start_time(pid: int) -> str:
    """When a process was started, in the kernel's ticks: with its number, it is nobody else's. Empty: it has gone.

    Source: proc(5), the 22nd value of /proc/PID/stat.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _alive(pid: int, start: str) -> bool:
    """Whether that process lives, and is the one that was started then, if that is known."""
    now = start_time(pid)
    return now == start if start and now else bool(now)
