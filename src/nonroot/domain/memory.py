"""Guest memory seen by a client: mappings of the domain's memory files, through the p2m. Reading sends no message."""

import bisect
import mmap
import os
import struct
from collections.abc import Callable

from nonroot.errors import BadOptionError

__all__ = ["Memory"]

_PAGE = 4096
_RUN = struct.Struct("<QQIQ")
_WRITE = 512 * 1024


class Memory:
    """Guest-physical memory. Addresses and lengths are in bytes."""

    def __init__(self, fetch: Callable[[], list[int]], store: Callable[[int, bytes], None]) -> None:
        """``fetch`` gives descriptors of the p2m's records (gfn, count, backing, offset) and of the backings."""
        self._fetch = fetch
        self._store = store
        self._maps: list[mmap.mmap] | None = None
        self._starts: list[int] = []
        self._runs: list[tuple[int, int, int, int]] = []

    def read(self, address: int, length: int) -> bytes:
        """``length`` bytes from guest-physical ``address`` on, as they are now. BadOptionError if some are not RAM."""
        if length < 0 or address < 0:
            raise BadOptionError("addresses and lengths of guest memory are not negative")
        if self._maps is None:
            self._open()
        assert self._maps is not None
        parts: list[bytes] = []
        at, left = address, length
        while left:
            index = bisect.bisect_right(self._starts, at) - 1
            base, size, backing, offset = self._runs[index] if index >= 0 else (0, 0, 0, 0)
            if at >= base + size:
                raise BadOptionError(f"there is no RAM at guest-physical address {at:#x}")
            n = min(left, base + size - at)
            start = offset + at - base
            parts.append(self._maps[backing][start : start + n])
            at += n
            left -= n
        return b"".join(parts)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write as a device would, ROM too; decoded code is dropped. BadOptionError if it is not RAM."""
        view = memoryview(data).cast("B")
        for at in range(0, len(view), _WRITE):
            self._store(address + at, bytes(view[at : at + _WRITE]))

    @property
    def size(self) -> int:
        """Bytes of RAM."""
        if self._maps is None:
            self._open()
        return sum(run[1] for run in self._runs)

    def close(self) -> None:
        """Unmap."""
        for one in self._maps or []:
            one.close()
        self._maps = None

    def _open(self) -> None:
        fds = self._fetch()
        maps = []
        try:
            records = os.pread(fds[0], os.fstat(fds[0]).st_size, 0)
            for fd in fds[1:]:
                maps.append(mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED, mmap.PROT_READ))  # noqa: PERF401
        finally:
            for fd in fds:
                os.close(fd)
        runs = _RUN.iter_unpack(records)
        self._runs = sorted((gfn * _PAGE, count * _PAGE, backing, offset) for gfn, count, backing, offset in runs)
        self._starts = [run[0] for run in self._runs]
        self._maps = maps
