"""The tree of nodes: immutable, so that a snapshot of all of it is a reference.

A change makes new nodes along the path to the root and shares all others. Each node remembers the generations (numbers
that only grow) in which its aspects changed last; comparing them between two trees tells whether somebody who read an
aspect in the one would read the same in the other.
"""

from collections.abc import Iterator
from enum import IntEnum
from typing import Final

from nonroot.xenstore.paths import Names
from nonroot.xenstore.permissions import Permissions

__all__ = ["Aspect", "Node", "State", "depth_of", "find", "generation_of", "walk", "with_node"]

_OVERHEAD: Final = 32
"""Bytes that a node counts besides its name and its value."""


class Aspect(IntEnum):
    """What can be read of a node, each with a generation of its own."""

    EXISTENCE = 0
    VALUE = 1
    PERMISSIONS = 2
    CHILDREN = 3
    """Which children there are, not what is in them."""


class Node:
    """One node. Never changed once it is in a tree."""

    __slots__ = ("children", "generations", "permissions", "value")

    def __init__(
        self,
        value: bytes,
        permissions: Permissions,
        children: dict[str, "Node"],
        generations: tuple[int, int, int, int],
    ) -> None:
        self.value = value
        self.permissions = permissions
        self.children = children
        self.generations = generations
        """By :class:`Aspect`."""

    @classmethod
    def new(cls, permissions: Permissions, generation: int) -> "Node":
        """An empty node without children."""
        return cls(b"", permissions, {}, (generation,) * 4)

    def with_value(self, value: bytes, generation: int) -> "Node":
        """The node with another value."""
        created, _, permissions, children = self.generations
        return Node(value, self.permissions, self.children, (created, generation, permissions, children))

    def with_permissions(self, permissions: Permissions, generation: int) -> "Node":
        """The node with other permissions."""
        created, value, _, children = self.generations
        return Node(self.value, permissions, self.children, (created, value, generation, children))

    def size(self, name: str) -> int:
        """What the node counts against its owner's quota, in bytes."""
        return _OVERHEAD + len(name) + len(self.value)

    @property
    def owner(self) -> int:
        """The owner's domain id."""
        return self.permissions[0].domid


class State:
    """All nodes, and what each domain uses of them."""

    __slots__ = ("root", "usage")

    def __init__(self, root: Node, usage: dict[int, tuple[int, int]]) -> None:
        self.root = root
        self.usage = usage
        """domid → (nodes, bytes)."""

    def copy(self) -> "State":
        """A snapshot: changes to one do not show in the other."""
        return State(self.root, dict(self.usage))

    def charge(self, domid: int, nodes: int, size: int) -> None:
        """Count nodes and bytes to a domain, or off it."""
        old_nodes, old_size = self.usage.get(domid, (0, 0))
        if old_nodes + nodes or old_size + size:
            self.usage[domid] = (old_nodes + nodes, old_size + size)
        else:
            self.usage.pop(domid, None)


def find(root: Node, names: Names) -> Node | None:
    """The node of that path, or None."""
    node: Node | None = root
    for name in names:
        if node is None:
            return None
        node = node.children.get(name)
    return node


def depth_of(root: Node, names: Names) -> int:
    """How many components of the path are there."""
    node = root
    for depth, name in enumerate(names):
        child = node.children.get(name)
        if child is None:
            return depth
        node = child
    return len(names)


def with_node(root: Node, names: Names, node: Node | None, generation: int) -> Node:
    """The tree with ``node`` at ``names``, or without what is there. The parent exists; the root stays."""
    if not names:
        assert node is not None
        return node
    chain = [root]
    for name in names[:-1]:
        chain.append(chain[-1].children[name])
    for depth in range(len(names) - 1, -1, -1):
        parent, name = chain[depth], names[depth]
        children = dict(parent.children)
        generations = parent.generations
        if (name in children) != (node is not None):
            generations = (*generations[:3], generation)
        if node is None:
            del children[name]
        else:
            children[name] = node
        node = Node(parent.value, parent.permissions, children, generations)
    assert node is not None
    return node


def generation_of(root: Node, names: Names, aspect: Aspect) -> int:
    """When that aspect of a node changed last; -1 if there is no such node."""
    node = find(root, names)
    return -1 if node is None else node.generations[aspect]


def walk(node: Node, names: Names) -> Iterator[tuple[Names, Node]]:
    """A node at ``names`` and all below it, parents before children."""
    waiting = [(names, node)]
    while waiting:
        at, found = waiting.pop()
        yield at, found
        waiting.extend(((*at, name), child) for name, child in reversed(found.children.items()))
