"""XenStore as a dictionary: slow, obvious, and written from the protocol's description rather than from our store."""

from dataclasses import dataclass, field
from typing import Any

Path = tuple[str, ...]
Perms = tuple[tuple[int, str], ...]
"""(domid, letter); the owner first."""


class RefusedError(Exception):
    pass


@dataclass
class Model:
    nodes: dict[Path, tuple[bytes, Perms]] = field(default_factory=lambda: {(): (b"", ((0, "n"),))})
    fired: list[Path] = field(default_factory=list)

    def copy(self) -> "Model":
        return Model(dict(self.nodes))

    def do(self, domid: int, operation: str, path: Path, argument: Any = None) -> Any:
        """The reply, or "E…"."""
        before = dict(self.nodes)
        try:
            return getattr(self, operation)(domid, path, *([] if argument is None else [argument]))
        except RefusedError as refusal:
            self.nodes = before
            return str(refusal)

    def letter(self, domid: int, path: Path) -> str:
        perms = self.nodes[path][1]
        if domid in (0, perms[0][0]):
            return "b"
        return next((letter for entry, letter in perms[1:] if entry == domid), perms[0][1])

    def check(self, domid: int, path: Path, letters: str) -> None:
        nearest = path
        while nearest not in self.nodes:
            nearest = nearest[:-1]
        if self.letter(domid, nearest) not in letters:
            raise RefusedError("EACCES")

    def existing(self, domid: int, path: Path, letters: str) -> None:
        self.check(domid, path, letters)
        if path not in self.nodes:
            raise RefusedError("ENOENT")

    def read(self, domid: int, path: Path) -> bytes:
        self.existing(domid, path, "rb")
        return self.nodes[path][0]

    def directory(self, domid: int, path: Path) -> list[str]:
        self.existing(domid, path, "rb")
        return sorted(other[-1] for other in self.nodes if other and other[:-1] == path)

    def get_perms(self, domid: int, path: Path) -> Perms:
        self.existing(domid, path, "rb")
        return self.nodes[path][1]

    def make(self, domid: int, path: Path) -> bool:
        self.check(domid, path, "wb")
        if path in self.nodes:
            return False
        for depth in range(1, len(path) + 1):
            if path[:depth] not in self.nodes:
                perms = self.nodes[path[: depth - 1]][1]
                if domid:
                    perms = ((domid, perms[0][1]), *perms[1:])
                self.nodes[path[:depth]] = (b"", perms)
        return True

    def mkdir(self, domid: int, path: Path) -> None:
        if self.make(domid, path):
            self.fired.append(path)

    def write(self, domid: int, path: Path, value: bytes) -> None:
        self.make(domid, path)
        self.nodes[path] = (value, self.nodes[path][1])
        self.fired.append(path)

    def rm(self, domid: int, path: Path) -> None:
        self.check(domid, path, "wb")
        if path in self.nodes:
            if not path:
                raise RefusedError("EINVAL")
            for other in [other for other in self.nodes if other[: len(path)] == path]:
                del self.nodes[other]
            self.fired.append(path)
        elif path[:-1] not in self.nodes:
            raise RefusedError("ENOENT")

    def set_perms(self, domid: int, path: Path, perms: Perms) -> None:
        self.existing(domid, path, "wb")
        if domid not in (0, self.nodes[path][1][0][0]):
            raise RefusedError("EACCES")
        if domid and perms[0][0] != self.nodes[path][1][0][0]:
            raise RefusedError("EPERM")
        self.nodes[path] = (self.nodes[path][0], perms)
        self.fired.append(path)
