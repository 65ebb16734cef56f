"""One client's dealings with the store: its requests, its watches, its open transactions."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.paths import Names, check_special, is_special, parse_path
from nonroot.xenstore.permissions import Caller, Permissions
from nonroot.xenstore.view import View
from nonroot.xenstore.watches import Watch, event_key

if TYPE_CHECKING:
    from nonroot.xenstore.store import Store

__all__ = ["Session"]

_TOKEN_MAX = 1024  # bytes, so that an event with the longest path fits into a message


class Session:
    """
    Requests in the name of one domain. Every method raises StoreError and then has changed nothing.

    ``transaction``: a number that :meth:`start` gave, or 0. Events go to ``deliver`` when the store's
    :meth:`~nonroot.xenstore.store.Store.flush` is called; while it is None they are lost.
    """

    def __init__(self, store: "Store", domid: int, deliver: Callable[[str, str], None] | None) -> None:
        self.domid = domid
        self.deliver = deliver
        self.replaced: Callable[[], None] | None = None
        """Called when somebody else takes the session over."""
        self.restored = False
        """Was it there before the store was restarted? Then there may be transactions that are not known any more."""
        self._store = store
        self._watches: dict[tuple[Names, str], Watch] = {}
        self._transactions: dict[int, View] = {}

    @property
    def caller(self) -> Caller:
        """On whose behalf it acts."""
        domain = self._store.domains.get(self.domid)
        return Caller(self.domid, domain.target if domain else None)

    @property
    def watches(self) -> list[Watch]:
        """Its watches, in order of registration."""
        return list(self._watches.values())

    @property
    def transactions(self) -> list[int]:
        """Its open transactions."""
        return list(self._transactions)

    # Nodes

    def read(self, path: str, transaction: int = 0) -> bytes:
        """A node's value."""
        return self._view(transaction).read(parse_path(path, self.domid))

    def directory(self, path: str, transaction: int = 0) -> tuple[int, list[str]]:
        """The names of a node's children, and a number that changes when they do."""
        return self._view(transaction).directory(parse_path(path, self.domid))

    def write(self, path: str, value: bytes, transaction: int = 0) -> None:
        """Set a node's value; it and its parents are made where they are missing."""
        names = parse_path(path, self.domid)
        view = self._view(transaction)
        view.write(names, value)
        self._done(view, transaction)

    def mkdir(self, path: str, transaction: int = 0) -> None:
        """Make a node, and its parents, where they are missing."""
        names = parse_path(path, self.domid)
        view = self._view(transaction)
        view.make(names)
        self._done(view, transaction)

    def rm(self, path: str, transaction: int = 0) -> None:
        """Remove a node and all below it."""
        names = parse_path(path, self.domid)
        view = self._view(transaction)
        view.remove(names)
        self._done(view, transaction)

    def get_permissions(self, path: str, transaction: int = 0) -> Permissions:
        """Who may do what with a node, or hear of an event."""
        if is_special(path):
            return self._store.special(check_special(path))
        return self._view(transaction).permissions(parse_path(path, self.domid))

    def set_permissions(self, path: str, permissions: Permissions, transaction: int = 0) -> None:
        """Change that; those of events at once, transaction or not."""
        if is_special(path):
            self._store.set_special(self.caller, check_special(path), permissions)
            return
        names = parse_path(path, self.domid)
        view = self._view(transaction)
        view.set_permissions(names, permissions)
        self._done(view, transaction)

    def check_transaction(self, transaction: int) -> None:
        """StoreError ENOENT unless it is 0 or open."""
        self._view(transaction)

    def _view(self, transaction: int) -> View:
        if not transaction:
            return self._store.view(self.caller)
        view = self._transactions.get(transaction)
        if view is None:
            if not self.restored or not self._store.is_old_transaction(transaction):
                raise StoreError("ENOENT")
            self._check_transactions()
            view = self._transactions[transaction] = self._store.view(self.caller, doomed=True)
        return view

    def _done(self, view: View, transaction: int) -> None:
        if not transaction:
            self._store.commit(view)

    # Transactions

    def start(self) -> int:
        """Begin a transaction. ENOSPC if too many are open."""
        self._check_transactions()
        number = self._store.next_transaction()
        while number in self._transactions:
            number = self._store.next_transaction()
        self._transactions[number] = self._store.view(self.caller)
        return number

    def _check_transactions(self) -> None:
        if not self.caller.privileged and len(self._transactions) >= self._store.quota.transactions:
            raise StoreError("ENOSPC")

    def end(self, transaction: int, commit: bool) -> None:
        """End a transaction, which is over in any case. EAGAIN: it was not done, and should be tried again."""
        view = self._view(transaction)
        if not transaction:
            raise StoreError("ENOENT")
        del self._transactions[transaction]
        if commit:
            self._store.commit(view)

    # Watches

    def watch(self, path: str, token: str, depth: int | None = None) -> None:
        """Hear of changes at and below a node, or of an event; it fires once at once."""
        key = self._key(path)
        if len(token) > _TOKEN_MAX:
            raise StoreError("E2BIG")
        if (key, token) in self._watches:
            raise StoreError("EEXIST")
        limited = not self.caller.privileged and not self._store.restoring
        if limited and len(self._watches) >= self._store.quota.watches:
            raise StoreError("E2BIG")
        watch = Watch(self, path, key, token, depth)
        self._store.watch_added(watch)
        self._watches[key, token] = watch

    def unwatch(self, path: str, token: str) -> None:
        """The reverse of :meth:`watch`. ENOENT."""
        key = self._key(path)
        watch = self._watches.get((key, token))
        if watch is None:
            raise StoreError("ENOENT")
        self._store.watch_removed(watch)
        del self._watches[key, token]

    def _key(self, path: str) -> Names:
        return event_key(check_special(path)) if is_special(path) else parse_path(path, self.domid)

    def reset(self) -> None:
        """Drop all watches and transactions."""
        for watch in self.watches:
            self._store.watch_removed(watch)
            del self._watches[watch.key, watch.token]
        self._transactions.clear()
