"""Files on their way between the host and a guest.

What comes out of a guest is hostile: names are checked part by part, directories are walked by descriptor without
following links, links that lead out of the copied tree are left out, and only permission bits are taken over.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nonroot.domain.frames import Entry
from nonroot.errors import BadFileError, BadOptionError, GuestFileError, NonrootError, OutputLimitError

__all__ = ["CHUNK", "TreeWriter", "parse_copy", "read_tree"]

CHUNK = 128 * 1024
"""Bytes of content per message."""
_TIMES = range(1 << 34)


def parse_copy(text: str, option: str) -> tuple[str, str]:
    r"""``FROM:TO`` of --copy-in and --copy-out; ``\:`` is a colon that separates nothing.

    BadOptionError if it is none.
    """
    parts: list[str] = [""]
    index = 0
    while index < len(text):
        if text.startswith("\\:", index):
            parts[-1] += ":"
            index += 2
            continue
        if text[index] == ":":
            parts.append("")
        else:
            parts[-1] += text[index]
        index += 1
    if len(parts) != 2 or not all(parts):
        form = "HOST:GUEST" if option == "--copy-in" else "GUEST:HOST"
        raise BadOptionError(f"{option} needs {form}, not {text!r}")
    return parts[0], parts[1]


def read_tree(source: str | os.PathLike[str]) -> Iterator[Entry | bytes]:
    """A host file or directory: an Entry for each thing, followed by a regular file's content in pieces.

    Symbolic links stay links, except ``source`` itself. Devices, FIFOs and sockets below are left out. BadFileError
    names what cannot be read.
    """
    top = Path(source)
    try:
        status = top.stat()
    except (OSError, ValueError) as error:
        raise _unreadable(top, error) from None
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise BadFileError(f"{top} is neither a file nor a directory")
    yield from _read(top, b"", status)


def _read(path: Path, relative: bytes, status: os.stat_result) -> Iterator[Entry | bytes]:
    try:
        mtime = min(max(int(status.st_mtime), 0), _TIMES[-1])
        mode = stat.S_IMODE(status.st_mode)
        if stat.S_ISLNK(status.st_mode):
            yield Entry("l", mode, mtime, 0, relative, os.fsencode(path.readlink()))
        elif stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                yield Entry("f", mode, mtime, status.st_size, relative)
                while piece := file.read(CHUNK):
                    yield piece
        elif stat.S_ISDIR(status.st_mode):
            yield Entry("d", mode, mtime, 0, relative)
            for below in sorted(path.iterdir()):
                inner = os.fsencode(below.name)
                yield from _read(below, relative + b"/" + inner if relative else inner, below.lstat())
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> BadFileError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return BadFileError(f"{path} cannot be read: {reason.lower()}")


class TreeWriter:
    """Writes what comes out of a guest, as cp -r does: into the destination if it is a directory, else as that name."""

    def __init__(self, destination: str | os.PathLike[str], name: str, limit: int) -> None:
        """``name`` is the last part of the guest's path; ``limit`` the bytes of content at most."""
        self.skipped: list[str] = []
        """What was left out, and why; one sentence each."""
        self.files = 0
        self._limit = limit
        self._written = 0
        self._file = -1
        self._mtime = 0
        self._root = Path(destination)
        if self._root.is_dir():
            if name in ("", ".", ".."):
                name = "root"
            self._root /= name
        self._is_directory = False
        self._first = True

    def close(self) -> None:
        """End the last file."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.utime(self._file, (self._mtime, self._mtime))
            os.close(self._file)
            self._file = -1

    def entry(self, entry: Entry) -> None:
        """The next thing. GuestFileError if its name is none that a file has; BadFileError if the host refuses."""
        self.close()
        self._mtime = entry.mtime if entry.mtime in _TIMES else 0
        try:
            if self._first:
                self._first = False
                self._top(entry)
            else:
                self._below(entry)
        except OSError as error:
            raise BadFileError(f"{self._root} cannot be written: {(error.strerror or str(error)).lower()}") from None

    def data(self, data: bytes) -> None:
        """Content of the last file."""
        self._written += len(data)
        if self._written > self._limit:
            raise OutputLimitError(f"the guest sent more than {self._limit} bytes of files")
        view = memoryview(data)
        try:
            while view and self._file >= 0:
                view = view[os.write(self._file, view) :]
        except OSError as error:
            raise BadFileError(f"{self._root} cannot be written: {(error.strerror or str(error)).lower()}") from None

    def _top(self, entry: Entry) -> None:
        if entry.path:
            raise GuestFileError("the guest sent a file that nobody asked for")
        if entry.kind == "d":
            self._root.mkdir(exist_ok=True)
            self._root.chmod(entry.mode & 0o777 | 0o700)
            self._is_directory = True
        elif entry.kind == "f":
            self._create(os.fspath(self._root), entry.mode, None, follow=True)
        else:
            raise GuestFileError("what should be copied out of the guest is neither a file nor a directory")

    def _below(self, entry: Entry) -> None:
        parts = entry.path.split(b"/")
        if not self._is_directory or any(part in (b"", b".", b"..") for part in parts):
            raise GuestFileError(f"the guest sent a file with a strange name: {os.fsdecode(entry.path)[:200]!r}")
        if entry.kind == "x":
            self.skipped.append(f"{os.fsdecode(entry.path)!r}: neither a file, a directory nor a link")
            return
        with contextlib.ExitStack() as stack:
            folder = self._open_folder(os.fspath(self._root), None, stack)
            for part in parts[:-1]:
                folder = self._open_folder(part, folder, stack)
            name = parts[-1]
            if entry.kind == "d":
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=folder)
                inner = self._open_folder(name, folder, stack)
                os.fchmod(inner, entry.mode & 0o777 | 0o700)
            elif entry.kind == "f":
                self._create(name, entry.mode, folder, follow=False)
            elif self._leads_out(parts, entry.target):
                self.skipped.append(f"{os.fsdecode(entry.path)!r}: a link that leads out of the copied directory")
            else:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                os.symlink(entry.target, name, dir_fd=folder)

    def _open_folder(self, name: str | bytes, folder: int | None, stack: contextlib.ExitStack) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if folder is not None else 0)
        fd = os.open(name, flags, dir_fd=folder)
        stack.callback(os.close, fd)
        return fd

    def _create(self, name: str | bytes, mode: int, folder: int | None, follow: bool) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        self._file = os.open(name, flags, 0o600, dir_fd=folder)
        if stat.S_ISREG(os.fstat(self._file).st_mode):
            os.fchmod(self._file, mode & 0o777)
        os.set_blocking(self._file, True)
        self.files += 1

    @staticmethod
    def _leads_out(parts: list[bytes], target: bytes) -> bool:
        if not target or target.startswith(b"/") or b"\0" in target:
            return True
        depth = len(parts) - 1
        for step in target.split(b"/"):
            if step == b"..":
                depth -= 1
                if depth < 0:
                    return True
            elif step not in (b"", b"."):
                depth += 1
        return False


def as_error(unexpected: Exception) -> NonrootError:
    """An exception of this module as one of ours."""
    return unexpected if isinstance(unexpected, NonrootError) else BadFileError(str(unexpected))
