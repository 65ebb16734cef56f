"""The guest's console as the domain's process keeps it: the last part of the output, and the search for a panic."""

import os
from collections import deque
from pathlib import Path

__all__ = ["ConsoleFile", "ConsoleLog", "PanicWatch", "printable"]

_MARKER = b"Kernel panic - not syncing"
_MAX_LINE = 400


def printable(data: bytes) -> str:
    """Console bytes as text that is harmless to a terminal: line breaks and tabs stay, controls and escapes go."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    kept: list[str] = []
    skipping = False
    for character in text:
        if skipping:  # an escape sequence ends with a letter
            skipping = not (character.isalpha() or character in "~\n")
        elif character == "\x1b":
            skipping = True
        elif character in "\n\t" or (character.isprintable() and character != "\x7f"):
            kept.append(character)
    return "".join(kept)


class ConsoleLog:
    """The last ``limit`` bytes (or somewhat more) of the console."""

    def __init__(self, limit: int = 256 * 1024) -> None:
        self.file: ConsoleFile | None = None
        """Where everything goes as well."""
        self._limit = limit
        self._parts: deque[bytes] = deque()
        self._size = 0

    def add(self, data: bytes) -> None:
        """More output."""
        if data:
            self._parts.append(data)
            self._size += len(data)
            if self.file is not None:
                self.file.add(data)
        while self._size - len(self._parts[0] if self._parts else b"") > self._limit:
            self._size -= len(self._parts.popleft())

    def everything(self) -> bytes:
        """What is kept."""
        return b"".join(self._parts)

    def tail(self, lines: int = 12) -> str:
        """The last lines, as harmless text; after a panic, those from its announcement on."""
        everything = self.everything()
        panic = everything.rfind(_MARKER)
        panic = everything.rfind(_MARKER, 0, panic) if everything[:panic].endswith(b"end ") else panic
        if panic >= 0:
            start = everything.rfind(b"\n", 0, panic) + 1
            return "\n".join(line[:300] for line in printable(everything[start:][:20_000]).splitlines()[:40])
        return "\n".join(line[:300] for line in printable(everything[-lines * 300 :]).splitlines()[-lines:])


class ConsoleFile:
    """The console's output in a file of at most ``limit`` bytes.

    When half of that is reached, the file becomes ``NAME.1`` instead of the one before it, and a new one begins.
    """

    def __init__(self, path: Path, limit: int = 1 << 20) -> None:
        """Begin a new file; what is there becomes ``NAME.1``. OSError."""
        self.path = path
        self._limit = max(limit // 2, 1)
        self._size = 0
        self._fd = -1
        if path.exists():
            path.replace(self._older())
        self._open()

    def _older(self) -> Path:
        return self.path.with_name(self.path.name + ".1")

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd, self._size = os.open(self.path, flags, 0o600), 0

    def add(self, data: bytes) -> None:
        """More output. Where the disk takes no more, the file ends there: the guest goes on."""
        view = memoryview(data)
        try:
            while view and self._fd >= 0:
                if self._size >= self._limit:
                    os.close(self._fd)
                    self._fd = -1
                    self.path.replace(self._older())
                    self._open()
                written = os.write(self._fd, view[: self._limit - self._size])
                self._size += written
                view = view[written:]
        except OSError:
            self.close()

    def close(self) -> None:
        """Keep no more. Safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class PanicWatch:
    """Finds Linux's ``Kernel panic - not syncing: …`` in the console, however it is split."""

    def __init__(self) -> None:
        self.message = ""
        """What the kernel said, once it has panicked."""
        self._line = bytearray()

    def feed(self, data: bytes) -> bool:
        """True if ``data`` completes the news."""
        if self.message:
            return False
        for part in data.splitlines(keepends=True):
            if len(self._line) < _MAX_LINE:
                self._line += part[: _MAX_LINE - len(self._line)]
            if part[-1:] in b"\r\n" and part:
                if _MARKER in self._line:
                    text = printable(bytes(self._line[self._line.index(_MARKER) + len(_MARKER) :]))
                    self.message = text.strip(": \n\t") or "no reason given"
                    return True
                self._line.clear()
        return False
