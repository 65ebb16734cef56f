"""Who wants to hear of which nodes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nonroot.xenstore.paths import Names, join

if TYPE_CHECKING:
    from nonroot.xenstore.session import Session

__all__ = ["Watch", "WatchTable", "event_key"]


def event_key(name: str) -> Names:
    """What watches of an event are found by: the path of no node."""
    return ("", name)


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """One registration."""

    session: "Session"
    path: str
    """As it was given: relative paths are reported relative."""
    key: Names
    """The node's components, or :func:`event_key`."""
    token: str
    depth: int | None
    """How far below the node changes are reported; None: without limit."""

    def reported(self, names: Names) -> str:
        """How this watch's owner calls a node at or below the watched one."""
        if self.path.startswith(("/", "@")):
            return join(names) if not self.path.startswith("@") else self.path
        return "/".join(names[3:])  # without local/domain/N

    def reaches(self, names: Names) -> bool:
        """Is a change there near enough?"""
        return self.depth is None or len(names) - len(self.key) <= self.depth


class WatchTable:
    """All watches by what they watch."""

    def __init__(self) -> None:
        self._by_key: dict[Names, list[Watch]] = {}
        self._lengths: Counter[int] = Counter()
        """How many keys have so many components: of deep paths only few prefixes need a look."""

    def add(self, watch: Watch) -> None:
        """Register it."""
        there = self._by_key.setdefault(watch.key, [])
        self._lengths[len(watch.key)] += not there
        there.append(watch)

    def remove(self, watch: Watch) -> None:
        """Forget it."""
        there = self._by_key[watch.key]
        there.remove(watch)
        if not there:
            del self._by_key[watch.key]
            self._lengths[len(watch.key)] -= 1

    def at_or_above(self, names: Names) -> Iterator[Watch]:
        """Watches that a change of a node concerns."""
        for depth in sorted((length for length, keys in self._lengths.items() if keys), reverse=True):
            if depth > len(names):
                continue
            yield from self._by_key.get(names[:depth], ())

    def below(self, names: Names) -> list[Watch]:
        """Watches of nodes inside of a subtree."""
        depth = len(names)
        return [
            watch for key, there in self._by_key.items() if len(key) > depth and key[:depth] == names for watch in there
        ]

    def event(self, name: str) -> list[Watch]:
        """Watches of an event."""
        return list(self._by_key.get(event_key(name), ()))

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))
