"""The user's running domains, by name: a folder of sockets that only this user can enter.

A domain ``NAME`` has two files there: ``NAME.json`` says what it is, and is locked by its holder for as long as it
runs; ``NAME.sock`` is where it listens, speaking the control protocol. An entry whose lock is free is stale, and is
removed by whoever notices. The holder is the domain's process; another one (a dom0) may hold entries for domains of its
own, as long as the socket speaks the protocol.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nonroot.errors import BadOptionError, NotRunningError, TransientError
from nonroot.xen.config import LAST_DOMID

__all__ = ["ZERO_NAME", "Entry", "Registration", "check_name", "entries", "find", "runtime_dir", "sweep"]

ZERO_NAME: Final = "Domain-0"
"""What xl's users call the control process; no domain is named so."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
AGAIN: Final = "again"
MAX_ENTRY = 1 << 16
"""Bytes of an entry."""
_LONGEST = 100
"""Bytes of a socket's path; the kernel takes 107."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One running domain."""

    name: str
    socket: Path
    pid: int
    """Of the process that holds the entry."""
    started: float
    """Seconds since 1970."""
    facts: dict[str, Any]
    """What it says of itself: ``kernel``, ``memory``, ``engine``, ``display``."""


def check_name(name: str) -> str:
    """``name``, if a domain can have it. BadOptionError."""
    if not _NAME.fullmatch(name):
        raise BadOptionError(
            f"{name[:60]!r} is no name for a domain: use up to 40 letters and digits, and '.', '_', '-' inside"
        )
    if name.isdigit() or name == ZERO_NAME:
        what = "a number" if name.isdigit() else "the control process"
        raise BadOptionError(f"{name!r} is no name for a domain: it would be taken for {what}")
    return name


def runtime_dir() -> Path:
    """``$XDG_RUNTIME_DIR/nonroot``; where that is not possible, a folder of the user's own under the temporary folder.

    TransientError if neither can be made, or is not the user's alone.
    """
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    candidates = [Path(given) / "nonroot"] if given.startswith("/") else []
    import tempfile  # most need it not: it takes milliseconds

    candidates.append(Path(tempfile.gettempdir()) / f"nonroot-run-{os.getuid()}")
    for folder in candidates:
        if len(os.fsencode(folder)) + 46 > _LONGEST:
            continue
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
            facts = folder.lstat()
            if stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid():
                if facts.st_mode & 0o077:
                    folder.chmod(0o700)
                return folder
    tried = " and ".join(str(folder) for folder in candidates)
    raise TransientError(f"there is no private folder for running domains: tried {tried}")


def allocate_domid(taken: Iterable[int] = ()) -> int:
    """
    A number for a domain, that none of the user's running domains has, nor any in ``taken``.

    Numbers grow, and begin anew after :data:`LAST_DOMID`. TransientError.
    """
    with (runtime_dir() / "next-domid").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        # The number, and a word once numbers have been used before: only then is it worth the time to look who has one.
        text, _, again = file.read(40).strip().partition(" ")
        number = int(text) if text.isdigit() else 1
        if number > LAST_DOMID or not text:
            again = AGAIN
        used = {entry.facts.get("domid") for entry in entries()} if again else set()
        used |= set(taken)
        for _ in range(LAST_DOMID):
            number = number if 1 <= number <= LAST_DOMID else 1
            if number not in used:
                break
            number += 1
        else:
            raise TransientError("there are no numbers left for another domain")
        file.truncate(0)
        file.write(f"{number + 1} {again}\n")
    return number


class Registration:
    """An entry of this process; :meth:`close` removes it. The kernel frees the lock if the process dies."""

    def __init__(self, name: str | None, since: float | None = None, **facts: Any) -> None:
        """Take ``name``, or a free one. BadOptionError if it is taken; TransientError if there is no place.

        ``since`` is when the domain began, in seconds since 1970; None is now.
        """
        folder = runtime_dir()
        if name is not None:
            found = _take(folder, check_name(name))
            if found is None:
                raise BadOptionError(f"a domain named {name!r} is running already")
            self.name, self._fd = name, found
        else:
            self.name, self._fd = self._any(folder, facts.get("domid"))
        self.socket_path = folder / f"{self.name}.sock"
        self.socket_path.unlink(missing_ok=True)
        self._path = folder / f"{self.name}.json"
        self.since = time.time() if since is None else since
        self.facts: dict[str, Any] = {}
        self.describe(**facts)

    @staticmethod
    def _any(folder: Path, hint: object) -> tuple[str, int]:
        """The first free name; from the domain's number on, if it has one, since that is its own."""
        first = hint if isinstance(hint, int) and hint > 0 else 1
        for number in range(first, first + 10_000):
            name = f"domain-{number}"
            fd = _take(folder, name)
            if fd is not None:
                return name, fd
        raise TransientError("there are too many domains")

    def listen(self) -> socket.socket:
        """A listening socket that only this user can reach."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mask = os.umask(0o177)
        try:
            listener.bind(os.fspath(self.socket_path))
        finally:
            os.umask(mask)
        listener.listen(8)
        return listener

    def describe(self, **facts: Any) -> None:
        """Replace what the entry says."""
        record = {"name": self.name, "pid": os.getpid(), "started": self.since, "facts": facts}
        data = json.dumps(record).encode()
        if len(data) > MAX_ENTRY:
            raise BadOptionError(f"what the domain {self.name} says of itself is too long: {len(data)} bytes")
        self.facts = facts
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, data, 0)

    def close(self) -> None:
        """Remove the entry. Safe to call again."""
        if self._fd >= 0:
            with contextlib.suppress(PermissionError):  # a sealed domain's client does it, or whoever looks next
                self.socket_path.unlink(missing_ok=True)
                self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1


def _take(folder: Path, name: str) -> int | None:
    """The locked file of an entry; None if somebody has it."""
    path = folder / f"{name}.json"
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        # Somebody may have removed the file between our opening and locking it.
        try:
            if path.lstat().st_ino == os.fstat(fd).st_ino:
                return fd
        except FileNotFoundError:
            pass
        os.close(fd)


def entries() -> list[Entry]:
    """All running domains, by name; stale entries are removed on the way."""
    try:
        folder = runtime_dir()
        files = sorted(folder.glob("*.json"))
    except (TransientError, OSError):
        return []
    found = []
    for path in files:
        entry = _read(path)
        if entry is not None:
            found.append(entry)
    return found


def sweep(name: str) -> None:
    """Remove what a domain's process has left there that could not do so; nothing happens if it runs."""
    with contextlib.suppress(TransientError, OSError):
        _read(runtime_dir() / f"{check_name(name)}.json")


def find(name: str) -> Entry:
    """The running domain of that name, or with that number (domid). NotRunningError if there is none."""
    check_name(name)
    with contextlib.suppress(TransientError):
        entry = _read(runtime_dir() / f"{name}.json")
        if entry is not None:
            return entry
    running = entries()
    if name.isascii() and name.isdigit():
        for entry in running:
            if entry.facts.get("domid") == int(name):
                return entry
    names = [entry.name for entry in running]
    hint = f"there are: {', '.join(names[:8])}" if names else "none is running"
    raise NotRunningError(f"there is no running domain {name!r}; {hint}")


def _read(path: Path) -> Entry | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _parse(path, os.pread(fd, MAX_ENTRY, 0))
        # Nobody holds it. With the lock ours, nobody can take the name while its files go.
        if os.fstat(fd).st_size and path.lstat().st_ino == os.fstat(fd).st_ino:
            path.with_suffix(".sock").unlink(missing_ok=True)
            path.with_suffix(".vnc").unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        return None
    except FileNotFoundError:
        return None
    finally:
        os.close(fd)


def _parse(path: Path, data: bytes) -> Entry | None:
    try:
        record = json.loads(data)
        return Entry(
            str(record["name"]),
            path.with_suffix(".sock"),
            int(record["pid"]),
            float(record["started"]),
            dict(record["facts"]),
        )
    except (ValueError, KeyError, TypeError):
        return None  # it is being written
