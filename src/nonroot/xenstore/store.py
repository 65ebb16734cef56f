"""XenStore: a tree of nodes that domains and the toolstack tell each other things in.

Pure: no files, sockets or clocks. What has to outlive the process is given to ``record`` before it takes effect; events
wait until :meth:`Store.flush`, so that who asked can be answered first.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.paths import Names, domain_path, join, parse_path
from nonroot.xenstore.permissions import (
    FIRST_RESERVED,
    Access,
    Caller,
    Permission,
    Permissions,
    format_permissions,
    parse_permissions,
)
from nonroot.xenstore.quota import Quota
from nonroot.xenstore.session import Session
from nonroot.xenstore.tree import Node, State, find, walk
from nonroot.xenstore.view import Change, Kind, View, perform
from nonroot.xenstore.watches import Watch, WatchTable

__all__ = ["INTRODUCE", "RELEASE", "Domain", "Record", "Store"]

INTRODUCE: Final = "@introduceDomain"
RELEASE: Final = "@releaseDomain"

Record = list[Any]
"""One step of the store's history, in JSON's types: a name and its arguments."""

_ONLY_DOM0: Final = (Permission(0, Access.NONE),)
_EPOCH_SHIFT: Final = 20
_EPOCHS: Final = 1 << 12
_MISFITS: Final = (StoreError, LookupError, TypeError, ValueError, AttributeError, AssertionError)


@dataclass(slots=True)
class Domain:
    """A domain that was introduced. Its session lasts until it is released, whoever carries its bytes."""

    domid: int
    gfn: int
    """Guest frame of its ring."""
    port: int
    """Its event channel."""
    session: Session
    target: int | None = None


class Store:
    """The nodes, the domains, who watches what."""

    def __init__(self, quota: Quota | None = None, record: Callable[[list[Record]], None] | None = None) -> None:
        """
        ``record``: keeps the records of one change, all or none of them; it may raise StoreError, and then the change
        is not made.
        """
        self.quota = quota or Quota()
        self.record = record or (lambda records: None)
        root = Node.new(_ONLY_DOM0, 0)
        self.state = State(root, {})
        self.state.charge(0, 1, root.size(""))
        self.domains: dict[int, Domain] = {}
        self.watches = WatchTable()
        self.sessions: set[Session] = set()
        """Those of clients, not of introduced domains."""
        self._specials: dict[str, Permissions] = {INTRODUCE: _ONLY_DOM0, RELEASE: _ONLY_DOM0}
        self._generations = itertools.count(1)
        self._transactions = itertools.count(1)
        self._epoch = 0
        self._events: deque[tuple[Watch, str]] = deque()
        self.restoring = False
        """Is it being restored? Then nothing is recorded or announced, and no limit holds."""

    # Clients

    def connect(self, deliver: Callable[[str, str], None] | None = None, domid: int = 0) -> Session:
        """A client's session, until :meth:`disconnect`."""
        session = Session(self, domid, deliver)
        self.sessions.add(session)
        return session

    def disconnect(self, session: Session) -> None:
        """The client has gone; an introduced domain's session is only detached."""
        session.deliver = session.replaced = None
        if session in self.sessions:
            session.reset()
            self.sessions.discard(session)

    def attach(
        self, domid: int, deliver: Callable[[str, str], None], replaced: Callable[[], None] | None = None
    ) -> Session:
        """
        The session of an introduced domain, whose events go to ``deliver`` from now on. ENOENT.

        Whoever had it is told by ``replaced``. Every watch fires once, since events may have been lost.
        """
        if domid not in self.domains:
            raise StoreError("ENOENT")
        session = self.domains[domid].session
        if session.replaced is not None:
            session.replaced()
        session.deliver, session.replaced = deliver, replaced
        for watch in session.watches:
            self._events.append((watch, watch.path))
        return session

    def flush(self) -> None:
        """Hand out the events that happened."""
        while self._events:
            watch, path = self._events.popleft()
            if watch.session.deliver is not None:
                watch.session.deliver(path, watch.token)

    # Views

    def view(self, caller: Caller, *, doomed: bool = False) -> View:
        """A view of the store as it is now."""
        return View(self.state, caller, self.quota, self._generations.__next__, doomed=doomed)

    def next_transaction(self) -> int:
        """A number for a transaction, u32, not 0. It says in which life of the store it was given."""
        number = next(self._transactions) % ((1 << _EPOCH_SHIFT) - 1) + 1
        return self._epoch << _EPOCH_SHIFT | number

    def is_old_transaction(self, number: int) -> bool:
        """Was the number given in an earlier life of the store?"""
        return number >> _EPOCH_SHIFT != self._epoch

    def commit(self, view: View) -> None:
        """Make a view's changes the store's, if its reads still hold: all of them or, with StoreError, none."""
        if not view.log and not view.doomed:
            return  # it has seen the store as it was at one moment
        state = view.state
        if view.doomed or view.conflicts(self.state):
            raise StoreError("EAGAIN")
        if view.base.root is not self.state.root:
            state = self.state.copy()
            for change in view.log:
                perform(state, change, next(self._generations))
            self._check_usage(view.caller, state)
        self.record([change.record() for change in view.log])
        self.state = state
        self._announce(view.log)

    def _check_usage(self, caller: Caller, state: State) -> None:
        if caller.privileged:
            return
        nodes, size = state.usage.get(caller.domid, (0, 0))
        old_nodes, old_size = self.state.usage.get(caller.domid, (0, 0))
        if (nodes > old_nodes and nodes > self.quota.nodes) or (size > old_size and size > self.quota.bytes):
            raise StoreError("ENOSPC")

    # Watches

    def watch_added(self, watch: Watch) -> None:
        """A session has a new watch."""
        self._record_watch("watch", watch)
        self.watches.add(watch)
        if not self.restoring:
            self._events.append((watch, watch.path))

    def watch_removed(self, watch: Watch) -> None:
        """A session has one watch less."""
        self._record_watch("unwatch", watch)
        self.watches.remove(watch)
        if any(waiting is watch for waiting, _ in self._events):
            self._events = deque(event for event in self._events if event[0] is not watch)

    def _record_watch(self, name: str, watch: Watch) -> None:
        domain = self.domains.get(watch.session.domid)
        if domain is not None and domain.session is watch.session and not self.restoring:
            self.record([[name, domain.domid, watch.path, watch.token, watch.depth]])

    def _announce(self, log: list[Change]) -> None:
        said: set[tuple[int, Names]] = set()

        def say(watch: Watch, names: Names, permissions: list[Permissions]) -> None:
            caller = watch.session.caller
            heard = caller.privileged or any(caller.access(each) & Access.READ for each in permissions)
            if heard and watch.reaches(names) and (id(watch), names) not in said:
                said.add((id(watch), names))
                self._events.append((watch, watch.reported(names)))

        for change in log:
            if not change.notify:
                continue
            names, before = change.names, change.before
            near = [find(self.state.root, names), find(self.state.root, names[:-1])]
            if change.kind in (Kind.REMOVE, Kind.PERMISSIONS):
                near.append(before)
            permissions = [node.permissions for node in near if node is not None]
            for watch in self.watches.at_or_above(names):
                say(watch, names, permissions)
            if change.kind is Kind.REMOVE and before is not None:
                for watch in self.watches.below(names):
                    below = watch.key[len(names) :]
                    node, parent = find(before, below), find(before, below[:-1])
                    if node is not None and parent is not None:
                        say(watch, watch.key, [node.permissions, parent.permissions])

    def _announce_event(self, name: str) -> None:
        for watch in self.watches.event(name):
            if watch.session.caller.access(self._specials[name]) & Access.READ:
                self._events.append((watch, name))

    def special(self, name: str) -> Permissions:
        """Who may hear of an event. ENOENT."""
        if name not in self._specials:
            raise StoreError("ENOENT")
        return self._specials[name]

    def set_special(self, caller: Caller, name: str, permissions: Permissions) -> None:
        """Change that. EACCES, ENOENT."""
        if not caller.owns(self.special(name)):
            raise StoreError("EACCES")
        self.record([["special", name, format_permissions(permissions)]])
        self._specials[name] = permissions

    # Domains

    def introduce(self, domid: int, gfn: int, port: int) -> Domain:
        """A domain may use the store from now on. EINVAL for a number that is no domain's."""
        if not 0 < domid < FIRST_RESERVED:
            raise StoreError("EINVAL")
        self.record([["introduce", domid, gfn, port]])
        domain = self.domains.get(domid)
        if domain is None:
            domain = self.domains[domid] = Domain(domid, gfn, port, Session(self, domid, None))
            if not self.restoring:
                self._announce_event(INTRODUCE)
        domain.gfn, domain.port = gfn, port
        return domain

    def is_introduced(self, domid: int) -> bool:
        """Domain 0 always is."""
        return domid == 0 or domid in self.domains

    def release(self, domid: int) -> None:
        """A domain is gone for good, and with it what it owned and was allowed. EINVAL, ENOENT."""
        domain = self._domain(domid)
        state, log = self.state.copy(), self._without(domid)
        for change in log:
            perform(state, change, next(self._generations))
        self.record([*(change.record() for change in log), ["release", domid]])
        self.state = state
        self._forget(domain)
        self._announce(log)
        self._announce_event(RELEASE)

    def shutdown(self, domid: int) -> None:
        """A domain has shut down or crashed: who watches for released domains should look (VIRQ_DOM_EXC)."""
        self._domain(domid)
        self._announce_event(RELEASE)

    def set_target(self, domid: int, target: int) -> None:
        """A domain may do what another may: a device model for its guest. ENOENT."""
        domain = self._domain(domid)
        self._domain(target)
        self.record([["target", domid, target]])
        domain.target = target

    def set_quota(self, name: str, value: int) -> None:
        """Change a limit. EINVAL."""
        quota = self.quota.changed(name, value)
        self.record([["quota", name, value]])
        self.quota = quota

    def _domain(self, domid: int) -> Domain:
        if domid == 0:
            raise StoreError("EINVAL")
        if domid not in self.domains:
            raise StoreError("ENOENT")
        return self.domains[domid]

    def _forget(self, domain: Domain) -> None:
        del self.domains[domain.domid]
        domain.session.reset()
        if domain.session.replaced is not None:
            domain.session.replaced()
        domain.session.deliver = domain.session.replaced = None
        for session in [each for each in self.sessions if each.domid == domain.domid]:
            session.reset()
        for other in self.domains.values():
            if other.target == domain.domid:
                other.target = None

    def _without(self, domid: int) -> list[Change]:
        """What has to change so that nothing is a domain's."""
        log = []
        waiting: list[tuple[Names, Node]] = [((), self.state.root)]
        while waiting:
            names, node = waiting.pop()
            if names and node.owner == domid:
                log.append(Change(Kind.REMOVE, names))
                continue
            kept = tuple(entry for entry in node.permissions[1:] if entry.domid != domid)
            if len(kept) != len(node.permissions) - 1:
                log.append(Change(Kind.PERMISSIONS, names, permissions=(node.permissions[0], *kept), notify=False))
            waiting.extend(((*names, name), child) for name, child in reversed(node.children.items()))
        return log

    # Saved state

    def initialise(self) -> None:
        """The nodes that a store has from its beginning, where they are missing."""
        session = self.connect()
        session.mkdir("/tool/xenstored")
        self.disconnect(session)
        self._events.clear()

    def records(self) -> Iterator[Record]:
        """All that :meth:`restore` needs to make an empty store into this one."""
        yield ["epoch", self._epoch]
        for name in Quota.names():
            if getattr(self.quota, name) != getattr(Quota(), name):
                yield ["quota", name, getattr(self.quota, name)]
        for name, permissions in self._specials.items():
            yield ["special", name, format_permissions(permissions)]
        for names, node in walk(self.state.root, ()):
            kind = Kind.CREATE if names else Kind.PERMISSIONS
            yield Change(kind, names, permissions=node.permissions).record()
            if node.value:
                yield Change(Kind.VALUE, names, value=node.value).record()
        for domain in self.domains.values():
            yield ["introduce", domain.domid, domain.gfn, domain.port]
            for watch in domain.session.watches:
                yield ["watch", domain.domid, watch.path, watch.token, watch.depth]
        for domain in self.domains.values():
            if domain.target is not None:
                yield ["target", domain.domid, domain.target]

    def restore(self, records: Iterable[Record]) -> None:
        """Do again what was recorded, silently, in an empty store; begins a new epoch. ValueError if it cannot be."""
        keep, self.record, self.restoring = self.record, lambda records: None, True
        try:
            for record in records:
                try:
                    self._restore(*record)
                except (
                    StoreError,
                    KeyError,
                    IndexError,
                    TypeError,
                    ValueError,
                    AttributeError,
                    AssertionError,
                ) as error:
                    raise ValueError(f"the saved state has a record that does not fit: {record!r:.100}") from error
        finally:
            self.record, self.restoring = keep, False
        self._events.clear()
        for domain in self.domains.values():
            domain.session.restored = True
        self._epoch = (self._epoch + 1) % _EPOCHS
        # Clients see the generations of lists of children: they should not come again in another life.
        self._generations = itertools.count(next(self._generations) + (self._epoch << 32))
        self.record([["epoch", self._epoch]])

    def _restore(self, name: str, *arguments: Any) -> None:
        if name in tuple(Kind):
            kind, names = Kind(name), parse_path(arguments[0], 0)
            change = Change(kind, names)
            if kind is Kind.VALUE:
                change.value = arguments[1].encode("latin-1")
            elif kind is not Kind.REMOVE:
                change.permissions = parse_permissions(arguments[1])
            perform(self.state, change, next(self._generations))
        elif name == "release":
            self._forget(self._domain(*arguments))
        elif name == "watch":
            domid, path, token, depth = arguments
            self._domain(domid).session.watch(path, token, depth)
        elif name == "unwatch":
            domid, path, token, _ = arguments
            self._domain(domid).session.unwatch(path, token)
        elif name == "special":
            self._specials[arguments[0]] = parse_permissions(arguments[1])
        elif name == "epoch":
            (epoch,) = arguments
            self._epoch = int(epoch)
        elif name == "introduce":
            self.introduce(*arguments)
        elif name == "target":
            self.set_target(*arguments)
        elif name == "quota":
            self.set_quota(*arguments)
        else:
            raise ValueError("it has an unknown name")

    def check(self) -> list[str]:
        """What is inconsistent, as sentences; nothing, unless there is a defect."""
        found = []
        counted = State(self.state.root, {})
        for names, node in walk(self.state.root, ()):
            counted.charge(node.owner, 1, node.size(names[-1] if names else ""))
            if any(generation < node.generations[0] for generation in node.generations):
                found.append(f"{join(names)} is newer than its contents")
        if counted.usage != self.state.usage:
            found.append(f"counted {counted.usage}, kept {self.state.usage}")
        return found

    def domain_path(self, domid: int) -> str:
        """Where a domain's nodes are, whether it exists or not. EINVAL."""
        if not 0 <= domid < FIRST_RESERVED:
            raise StoreError("EINVAL")
        return domain_path(domid)
