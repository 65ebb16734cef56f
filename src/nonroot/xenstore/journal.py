"""The store on disk: a file of records, appended to before a change takes effect, made anew when it has grown.

Each line is one change: the CRC-32 of what follows, as eight hexadecimal digits, a space, and a JSON list of records
(:data:`nonroot.xenstore.store.Record`). The first line is the header. A line that is cut off or damaged ends the file:
it was never answered. Appending is one ``write``, so that killing the process loses nothing; what the whole machine's
end would lose is of no use after it, and a file of an earlier boot of the machine is not read.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.store import Record, Store

__all__ = ["Journal", "boot_id"]

_FORMAT: Final = "nonroot xenstore 1"
_GROWN: Final = 4
"""The file is made anew when it is so many times as long as it was when it was new …"""
_LEAST: Final = 256 << 10
"""… and at least so many bytes."""


def boot_id() -> str:
    """What tells this boot of the machine from others; empty where the kernel does not say."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _line(value: Any) -> bytes:
    text = json.dumps(value, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(data: bytes) -> Iterator[tuple[Any, int]]:
    """Each whole line's value and where it ends."""
    at = 0
    while (end := data.find(b"\n", at)) >= 0:
        text = data[at + 9 : end]
        try:
            if int(data[at : at + 8], 16) != zlib.crc32(text):
                return
            value = json.loads(text)
        except (ValueError, RecursionError):
            return
        at = end + 1
        yield value, at


class Journal:
    """The file of one store. ``restored``: was there a store of this boot in it?"""

    def __init__(self, path: Path, store: Store) -> None:
        """
        Fill the empty ``store`` from the file, and keep its changes there from now on.

        OSError if the file cannot be written; ValueError if it holds what this version cannot read.
        """
        self.path = path
        self.store = store
        self._boot = boot_id()
        self._fd = -1
        self._length = 0
        self._new_length = 0
        data = b""
        with contextlib.suppress(FileNotFoundError):
            data = path.read_bytes()
        self.restored = self._load(data)
        self.renew()
        store.record = self.append

    def _load(self, data: bytes) -> bool:
        values = [value for value, _ in _lines(data)]
        if not values or not isinstance(values[0], dict):
            return False
        if values[0].get("format") != _FORMAT:
            raise ValueError(f"{self.path} was written by another version of nonroot; remove it to begin anew")
        if values[0].get("boot") != self._boot:
            return False
        try:
            self.store.restore(record for value in islice(values, 1, None) for record in value)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}; remove the file to begin anew") from error
        return True

    def append(self, records: list[Record]) -> None:
        """Keep one change. StoreError EIO if it cannot be, and then nothing of it is kept."""
        line = _line(records)
        try:
            written = os.pwrite(self._fd, line, self._length)
        except OSError:
            written = -1
        if written != len(line):
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._length)
            raise StoreError("EIO")
        self._length += len(line)

    def maintain(self) -> None:
        """Make the file anew if it has become much longer than it need be, and there is room."""
        if self._length > max(_LEAST, _GROWN * self._new_length):
            try:
                self.renew()
            except OSError:
                self._new_length = self._length  # the old one goes on being appended to

    def renew(self) -> None:
        """Write the whole store into a new file, and put it in the place of the old one. OSError."""
        draft = self.path.with_name(f".{self.path.name}.new")
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            length = 0
            with open(fd, "wb", closefd=False) as file:
                for line in self._all():
                    length += file.write(line)
            os.fsync(fd)
            draft.replace(self.path)
        except BaseException:
            os.close(fd)
            draft.unlink(missing_ok=True)
            raise
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._length, self._new_length = fd, length, length

    def _all(self) -> Iterator[bytes]:
        yield _line({"format": _FORMAT, "boot": self._boot})
        records: Iterable[Record] = self.store.records()
        for record in records:
            yield _line([record])

    def close(self) -> None:
        """The file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
