"""A throw-away copy-on-write layer: reads come from an image below until a place is written; that goes to a file
without a name, which is gone with its last user.
"""

import mmap
import os
import tempfile
from pathlib import Path
from typing import Final

from nonroot.backends.image import Image
from nonroot.errors import BadFileError

__all__ = ["OverlayImage", "scratch_folder"]

CLUSTER: Final = 4096
"""Bytes that are copied up together."""
LARGEST_SHARED: Final = 1 << 44
"""Bytes of the largest image whose layer another process may adopt: the map of its clusters fits into its limits."""


def _bitmap_bytes(size: int) -> int:
    """Whole pages of a map with a bit for each cluster; it is as sparse as the writes are."""
    return -(-size // (CLUSTER * 8 * mmap.PAGESIZE)) * mmap.PAGESIZE


def scratch_folder() -> str:
    """Where throw-away layers lie: ``$TMPDIR``, else /var/tmp (on a disk, as a rule), else the temporary folder."""
    if wanted := os.environ.get("TMPDIR"):
        return wanted
    return "/var/tmp" if os.access("/var/tmp", os.W_OK | os.X_OK) else tempfile.gettempdir()


class OverlayImage:
    """``base`` with changes that nobody will see again."""

    def __init__(self, base: Image, folder: str | None = None) -> None:
        """``folder``: where the layer's file lies. BadFileError if none can be made there."""
        self.base = base
        self.size = base.size
        place = folder or scratch_folder()
        try:
            self._file = tempfile.TemporaryFile(dir=place, prefix="nonroot-overlay-")  # noqa: SIM115
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise BadFileError(f"an overlay cannot be made in {Path(place)}: {reason}; set TMPDIR") from None
        self._fd = self._file.fileno()
        self._bitmap_fd = os.memfd_create("nonroot-overlay", os.MFD_CLOEXEC)
        os.ftruncate(self._bitmap_fd, _bitmap_bytes(self.size))
        self._bitmap = mmap.mmap(self._bitmap_fd, 0)
        self._changed = False
        """Whether a bit of the map may be set."""

    @classmethod
    def adopt(cls, base: Image, layer: int, bitmap: int) -> "OverlayImage":
        """A layer that another process has made, by its descriptors, which are the image's from now on."""
        image = cls.__new__(cls)
        image.base, image.size = base, base.size
        image._file = os.fdopen(layer, "r+b")
        image._fd, image._bitmap_fd = layer, bitmap
        image._bitmap = mmap.mmap(bitmap, 0)
        image._changed = True
        return image

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
