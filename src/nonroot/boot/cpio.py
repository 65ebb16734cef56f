"""A writer of cpio archives in the "newc" format, which Linux unpacks as initramfs.

The kernel accepts several archives in a row, so one made here can be appended to any initrd: see :func:`append`.
Source: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from typing import Final

__all__ = ["Cpio", "append"]

MAGIC: Final = b"070701"
TRAILER: Final = b"TRAILER!!!"
ALIGNMENT: Final = 4
BLOCK: Final = 512
"""Archives are padded to this; the kernel skips the zeros before the next one."""

REGULAR: Final = 0o100000
DIRECTORY: Final = 0o040000
SYMLINK: Final = 0o120000
CHARACTER: Final = 0o020000
BLOCK_DEVICE: Final = 0o060000

LIMIT: Final = 0xFFFF_FFFF


class Cpio:
    """An archive under construction. The same calls give the same bytes: owner, group and times are zero."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._finished = False

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file. ValueError if the name or the size does not fit the format."""
        self._entry(name, REGULAR | mode, data)

    def directory(self, name: str, mode: int = 0o755) -> None:
        """A directory; parents come first."""
        self._entry(name, DIRECTORY | mode, b"")

    def symlink(self, name: str, target: str) -> None:
        """A symbolic link to ``target``."""
        self._entry(name, SYMLINK | 0o777, target.encode())

    def device(self, name: str, major: int, minor: int, mode: int = 0o600, block: bool = False) -> None:
        """A device node."""
        self._entry(name, (BLOCK_DEVICE if block else CHARACTER) | mode, b"", major, minor)

    def finish(self) -> bytes:
        """The whole archive, padded to 512 bytes. Nothing may be added afterwards."""
        if not self._finished:
            self._append(TRAILER, 0, b"", 0, 0)
            self._finished = True
        archive = b"".join(self._parts)
        return archive + bytes(-len(archive) % BLOCK)

    def _entry(self, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        if self._finished:
            raise ValueError("the archive is finished")
        encoded = name.encode("utf-8", "surrogateescape")
        if not encoded or b"\0" in encoded or encoded.startswith(b"/") or encoded == TRAILER:
            raise ValueError(f"{name!r} is not a name in an archive")
        if len(data) > LIMIT:
            raise ValueError(f"{name!r} is too large for the archive format")
        self._inode += 1
        self._append(encoded, mode, data, major, minor)

    def _append(self, name: bytes, mode: int, data: bytes, major: int, minor: int) -> None:
        links = 2 if mode & 0o170000 == DIRECTORY else 1
        inode = self._inode if mode else 0
        numbers = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(name) + 1, 0)
        header = MAGIC + b"".join(b"%08X" % number for number in numbers) + name + b"\0"
        self._parts += [header, bytes(-len(header) % ALIGNMENT), data, bytes(-len(data) % ALIGNMENT)]


def append(initrd: bytes, archive: bytes) -> bytes:
    """``initrd`` (compressed or not) with a further archive, whose files win over those before it."""
    return initrd + bytes(-len(initrd) % BLOCK) + archive
