"""A transaction: one caller's reading and changing of a snapshot, with what is needed to carry it over later.

Every request runs in a view. A request outside of transactions gets a view of its own, which is committed at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.paths import Names, join
from nonroot.xenstore.permissions import Access, Caller, Permission, Permissions, format_permissions
from nonroot.xenstore.quota import Quota
from nonroot.xenstore.tree import Aspect, Node, State, depth_of, find, generation_of, walk, with_node

__all__ = ["Change", "Kind", "View", "perform"]


class Kind(StrEnum):
    """What a change does; also its name in saved state."""

    CREATE = "create"
    VALUE = "value"
    PERMISSIONS = "permissions"
    REMOVE = "remove"


@dataclass(slots=True)
class Change:
    """One step that cannot fail where its preconditions hold."""

    kind: Kind
    names: Names
    value: bytes = b""
    permissions: Permissions = ()
    notify: bool = True
    """Do watches hear of it? Not of a creation that a value follows."""
    before: Node | None = None
    """The node that it changed or removed, as it was."""

    def record(self) -> list[Any]:
        """For the saved state: JSON's types."""
        record: list[Any] = [self.kind.value, join(self.names)]
        if self.kind is Kind.VALUE:
            record.append(self.value.decode("latin-1"))
        elif self.kind is not Kind.REMOVE:
            record.append(format_permissions(self.permissions))
        return record


def perform(state: State, change: Change, generation: int) -> None:
    """Do it, and count it. The node exists; for CREATE it does not, and parents that are missing come with it."""
    names = change.names
    name = names[-1] if names else ""
    before = find(state.root, names)
    change.before = before
    after: Node | None
    if change.kind is Kind.CREATE:
        assert before is None
        existing = depth_of(state.root, names)
        after = Node.new(change.permissions, generation)
        state.charge(after.owner, 1, after.size(name))
        for depth in range(len(names) - 1, existing, -1):
            after = Node(b"", change.permissions, {names[depth]: after}, (generation,) * 4)
            state.charge(after.owner, 1, after.size(names[depth - 1]))
        names = names[: existing + 1]
    elif change.kind is Kind.REMOVE:
        assert before is not None
        after = None
        for below, node in walk(before, names):
            state.charge(node.owner, -1, -node.size(below[-1]))
    else:
        assert before is not None
        if change.kind is Kind.VALUE:
            after = before.with_value(change.value, generation)
        else:
            after = before.with_permissions(change.permissions, generation)
        state.charge(before.owner, -1, -before.size(name))
        state.charge(after.owner, 1, after.size(name))
    state.root = with_node(state.root, names, after, generation)


_COALESCED: Final = (Kind.VALUE, Kind.PERMISSIONS)


class View:
    """A snapshot, what was read in it, and what was changed."""

    def __init__(
        self, state: State, caller: Caller, quota: Quota, generation: Callable[[], int], *, doomed: bool = False
    ) -> None:
        self.base = state
        """What it started from."""
        self.state = state
        """What its caller sees: a copy as soon as it is changed."""
        self.caller = caller
        self.quota = quota
        self.doomed = doomed
        """It cannot be committed: the store was restarted since it began."""
        self.log: list[Change] = []
        self._generation = generation
        self._reads: set[tuple[Names, Aspect]] = set()
        self._latest: dict[tuple[Kind, Names], Change] = {}

    # Requests

    def read(self, names: Names) -> bytes:
        """READ."""
        node = self._existing(names, Access.READ)
        self._note(names, Aspect.VALUE)
        return node.value

    def directory(self, names: Names) -> tuple[int, list[str]]:
        """DIRECTORY and DIRECTORY_PART: the children's names in order of creation, and their generation."""
        node = self._existing(names, Access.READ)
        self._note(names, Aspect.CHILDREN)
        return node.generations[Aspect.CHILDREN], list(node.children)

    def permissions(self, names: Names) -> Permissions:
        """GET_PERMS."""
        return self._existing(names, Access.READ).permissions

    def write(self, names: Names, value: bytes) -> None:
        """WRITE: makes the node, and its parents, where they are missing."""
        if not self.caller.privileged and len(value) > self.quota.node_size:
            raise StoreError("ENOSPC")
        node = self._resolve(names, Access.WRITE)
        if node is None:
            self._create(names, len(value), notify=False)
        else:
            if node.owner and not self.caller.privileged:
                _, used = self.state.usage[node.owner]
                if len(value) > len(node.value) and used + len(value) - len(node.value) > self.quota.bytes:
                    raise StoreError("ENOSPC")
            self._note(names, Aspect.VALUE)
        self._do(Change(Kind.VALUE, names, value=value))

    def make(self, names: Names) -> None:
        """MKDIR: makes the node, and its parents, where they are missing."""
        if self._resolve(names, Access.WRITE) is None:
            self._create(names, 0, notify=True)

    def remove(self, names: Names) -> None:
        """RM: with all that is below. A node that is not there is no error if its parent is."""
        node = self._resolve(names, Access.WRITE)
        if node is not None:
            if not names:
                raise StoreError("EINVAL")
            self._do(Change(Kind.REMOVE, names))
        elif find(self.state.root, names[:-1]) is None:
            self._note(names[:-1], Aspect.EXISTENCE)
            raise StoreError("ENOENT")

    def set_permissions(self, names: Names, permissions: Permissions) -> None:
        """SET_PERMS: by the owner or domain 0."""
        node = self._existing(names, Access.WRITE)
        self._check_permissions(node.permissions, permissions)
        self._do(Change(Kind.PERMISSIONS, names, permissions=permissions))

    def _check_permissions(self, old: Permissions, new: Permissions) -> None:
        if not self.caller.owns(old):
            raise StoreError("EACCES")
        if not self.caller.privileged:
            if new[0].domid != old[0].domid:
                raise StoreError("EPERM")
            if len(new) > self.quota.permissions:
                raise StoreError("ENOSPC")

    # Looking

    def _existing(self, names: Names, needed: Access) -> Node:
        node = self._resolve(names, needed)
        if node is None:
            raise StoreError("ENOENT")
        return node

    def _resolve(self, names: Names, needed: Access) -> Node | None:
        """The node; None if it is not there and the caller may know that. StoreError EACCES."""
        if not self.caller.privileged and sum(map(len, names)) + len(names) > self.quota.path:
            raise StoreError("EINVAL")
        node = self.state.root
        depth = 0
        for name in names:
            child = node.children.get(name)
            if child is None:
                self._note(names[: depth + 1], Aspect.EXISTENCE)
                break
            node = child
            depth += 1
        self._note(names[:depth], Aspect.EXISTENCE)
        self._note(names[:depth], Aspect.PERMISSIONS)
        # Who may not read the nearest parent does not hear what is below it.
        if needed & ~self.caller.access(node.permissions):
            raise StoreError("EACCES")
        return node if depth == len(names) else None

    def _note(self, names: Names, aspect: Aspect) -> None:
        self._reads.add((names, aspect))
        self._check_length()

    def _check_length(self, more: int = 0) -> None:
        if not self.caller.privileged and len(self._reads) + len(self.log) + more > self.quota.transaction_nodes:
            raise StoreError("ENOSPC")

    # Changing

    def _create(self, names: Names, value: int, *, notify: bool) -> None:
        """The node and its missing parents, if there is room for them and ``value`` bytes. StoreError ENOSPC."""
        existing = depth_of(self.state.root, names)
        parent = find(self.state.root, names[:existing])
        assert parent is not None
        permissions = parent.permissions
        if not self.caller.privileged:  # what a domain makes is its own
            permissions = (Permission(self.caller.domid, permissions[0].access), *permissions[1:])
            nodes, size = self.state.usage.get(self.caller.domid, (0, 0))
            empty = Node.new(permissions, 0)
            needed = value + sum(empty.size(name) for name in names[existing:])
            if nodes + len(names) - existing > self.quota.nodes or size + needed > self.quota.bytes:
                raise StoreError("ENOSPC")
            self._check_length(2)  # this change, and that of the value
        self._do(Change(Kind.CREATE, names, permissions=permissions, notify=notify))

    def _do(self, change: Change) -> None:
        if self.state is self.base:
            self.state = self.base.copy()
        key = (change.kind, change.names)
        same = self._latest.get(key)
        if same is not None and change.kind in _COALESCED:
            # Nothing was removed since: doing it once, with the later value, comes to the same.
            before = same.before
            perform(self.state, change, self._generation())
            same.value, same.permissions, same.before = change.value, change.permissions, before
            return
        self._check_length(1)
        perform(self.state, change, self._generation())
        self.log.append(change)
        if change.kind is Kind.REMOVE:
            self._latest.clear()
        else:
            self._latest[key] = change

    # The end

    def conflicts(self, current: State) -> bool:
        """Would the caller have read anything else, had it begun with ``current``?"""
        if current.root is self.base.root:
            return False
        return any(
            generation_of(self.base.root, names, aspect) != generation_of(current.root, names, aspect)
            for names, aspect in self._reads
        )
