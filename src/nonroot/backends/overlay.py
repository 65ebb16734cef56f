"""A throw-away copy-on-write layer: reads come from an image below until a place is written; that goes to a file
without a name, which is gone with its last user.
"""

import contextlib
import errno
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nonroot.backends.image import Image
from nonroot.errors import BadFileError

__all__ = ["CLUSTER", "OverlayImage", "new_layer", "scratch_folder"]

CLUSTER: Final = 4096
"""Bytes that are copied up together."""
LARGEST_SHARED: Final = 1 << 44
"""Bytes of the largest image whose layer another process may adopt: the map of its clusters fits into its limits."""


def _bitmap_bytes(size: int) -> int:
    """Whole pages of a map with a bit for each cluster; it is as sparse as the writes are."""
    return -(-size // (CLUSTER * 8 * mmap.PAGESIZE)) * mmap.PAGESIZE


def copy_data(source: int, target: int) -> None:
    """Copy a file into an empty one; holes stay holes. OSError."""
    place = 0
    while True:
        try:
            place = os.lseek(source, place, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        end = os.lseek(source, place, os.SEEK_HOLE)
        while place < end:
            done = os.copy_file_range(source, target, end - place, place, place)
            if done == 0:
                break  # it has become shorter
            place += done


def scratch_folder() -> str:
    """Where throw-away layers lie: ``$TMPDIR``, else /var/tmp (on a disk, as a rule), else the temporary folder."""
    if wanted := os.environ.get("TMPDIR"):
        return wanted
    return "/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()


def new_layer(size: int, folder: str | None = None) -> tuple[int, int]:
    """Descriptors of an empty layer over an image of ``size`` bytes, and of the map of its clusters. BadFileError.

    ``folder``: where the layer's file lies, which has no name.
    """
    place = folder or scratch_folder()
    try:
        with tempfile.TemporaryFile(dir=place, prefix="nonroot-overlay-") as file:
            layer = os.dup(file.fileno())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise BadFileError(f"an overlay cannot be made in {Path(place)}: {reason}; set TMPDIR") from None
    bitmap = os.memfd_create("nonroot-overlay", os.MFD_CLOEXEC)
    os.ftruncate(bitmap, _bitmap_bytes(size))
    return layer, bitmap


class OverlayImage:
    """``base`` with changes that nobody will see again."""

    def __init__(self, base: Image, folder: str | None = None) -> None:
        """``folder``: where the layer's file lies. BadFileError if none can be made there."""
        self._attach(base, *new_layer(base.size, folder))
        self._changed = False
        """Whether a bit of the map may be set."""

    def _attach(self, base: Image, layer: int, bitmap: int) -> None:
        self.base, self.size = base, base.size
        self._file = os.fdopen(layer, "r+b")
        self._fd, self._bitmap_fd = layer, bitmap
        self._bitmap = mmap.mmap(bitmap, 0)

    @classmethod
    def adopt(cls, base: Image, layer: int, bitmap: int) -> "OverlayImage":
        """A layer that another process has made, by its descriptors, which are the image's from now on."""
        image = cls.__new__(cls)
        image._attach(base, layer, bitmap)
        image._changed = True
        return image

    @contextlib.contextmanager
    def contents(self) -> Iterator[tuple[memoryview, memoryview]]:
        """The layer, in whole clusters, and the map of its clusters, while nobody writes to either."""
        size = os.fstat(self._fd).st_size
        if size % CLUSTER:  # it ends with the image, in the middle of one
            size += -size % CLUSTER
            os.ftruncate(self._fd, size)
        if not size:
            yield memoryview(b""), memoryview(self._bitmap)
            return
        with mmap.mmap(self._fd, size, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as view:
            yield view, memoryview(self._bitmap)

    def copy_layer(self, folder: str | None = None) -> tuple[int, int]:
        """Descriptors of a copy of the layer, and of the map of its clusters, while nobody writes. BadFileError.

        The host's file system may share what is the same.
        """
        layer, bitmap = new_layer(self.size, folder)
        try:
            os.pwrite(bitmap, self._bitmap, 0)
            copy_data(self._fd, layer)
        except OSError as error:
            os.close(layer)
            os.close(bitmap)
            raise BadFileError(f"an overlay cannot be copied: {(error.strerror or str(error)).lower()}") from None
        return layer, bitmap

    def layer(self) -> tuple[int, int] | None:
        """The layer's descriptors, for :meth:`adopt` in another process. None: the image is too large for that."""
        return (self._fd, self._bitmap_fd) if self.size <= LARGEST_SHARED else None

    @property
    def read_only(self) -> bool:
        """Never."""
        return False

    def _has(self, cluster: int) -> bool:
        return bool(self._bitmap[cluster >> 3] >> (cluster & 7) & 1)

    def _mark(self, first: int, last: int) -> None:
        self._changed = True
        bitmap = self._bitmap
        for cluster in range(first, last + 1):
            bitmap[cluster >> 3] |= 1 << (cluster & 7)

    def read(self, offset: int, length: int) -> bytes:
        """From the layer where it has been written, from below elsewhere."""
        parts: list[bytes] = []
        done = 0
        while done < length:
            at = offset + done
            here = self._has(at // CLUSTER)
            end = at - at % CLUSTER + CLUSTER
            while end < offset + length and self._has(end // CLUSTER) == here:
                end += CLUSTER
            want = min(end, offset + length) - at
            try:
                part = self._read_layer(at, want) if here else self.base.read(at, want)
            except OSError:
                if not parts:
                    raise
                break
            parts.append(part)
            done += len(part)
            if len(part) < want:
                break
        return b"".join(parts)

    def _read_layer(self, offset: int, length: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            part = os.pread(self._fd, length - len(data), offset + len(data))
            if not part:
                break  # the file ends in the middle of the last cluster
            data += part
        return data.ljust(length, b"\0")

    def descriptor(self, offset: int, length: int) -> int | None:
        """The layer's or that of the image below, if all is there."""
        first, last = offset // CLUSTER, (offset + length - 1) // CLUSTER
        here = self._changed and self._has(first)
        if self._changed and any(self._has(cluster) != here for cluster in range(first + 1, last + 1)):
            return None
        return self._fd if here else self.base.descriptor(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Into the layer; the rest of a cluster is copied up first. A failure leaves what was there before."""
        first, last = offset // CLUSTER, (offset + len(data) - 1) // CLUSTER
        head, tail = first * CLUSTER, min((last + 1) * CLUSTER, self.size)
        before = b"" if offset == head or self._has(first) else self._below(head, offset - head)
        end = offset + len(data)
        after = b"" if end == tail or self._has(last) else self._below(end, tail - end)
        view = memoryview(before + data + after if before or after else data)
        at = offset - len(before)
        while view:
            count = os.pwrite(self._fd, view, at)
            at += count
            view = view[count:]
        self._mark(first, last)

    def _below(self, offset: int, length: int) -> bytes:
        data = self.base.read(offset, length)
        if len(data) < length:
            data += self.base.read(offset + len(data), length - len(data))  # raises what stands in the way
        return data

    def flush(self) -> None:
        """Nothing: nobody will read the layer after a crash."""

    def close(self) -> None:
        """The layer is gone; the image below is closed."""
        if not self._file.closed:
            self._file.close()
            self._bitmap.close()
            os.close(self._bitmap_fd)
        self.base.close()
