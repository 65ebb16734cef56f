"""A domain's memory as the hypervisor side uses it: its own pages, shared words, and changes to the p2m.

Pages that Xen and the guest share (shared information, grant tables, the rings of console and XenStore) lie in a
backing of their own; guests map them where they like. RAM that leaves the p2m goes to a pool, and back to the host,
until the guest populates some frame with it.
"""

import fcntl
import mmap
import os
from collections.abc import Callable
from threading import Lock
from typing import Any, Final, NamedTuple

from nonroot._engine import Memory
from nonroot.errors import OutOfMemoryError
from nonroot.hvm.device import StateError
from nonroot.hvm.memory_record import MemoryRecord
from nonroot.saved.fields import Fields
from nonroot.xen.abi import PAGE_SIZE, Errno, HypercallError
from nonroot.xen.frame_table import FrameTable, Run

__all__ = ["GRANT_FRAMES", "Page", "Physmap", "Place", "Words"]

SHARED_INFO: Final = 0
CONSOLE: Final = 1
STORE: Final = 2
FIRST_GRANT: Final = 8
GRANT_FRAMES: Final = 64
"""The most frames that a grant table can have."""
OWN_PAGES: Final = FIRST_GRANT + GRANT_FRAMES

SPECIAL_GFN: Final = 0xFEFF8
"""The first of the frames that hold the rings at power-on, in the hole below 4 GiB."""
SPECIAL_FRAMES: Final = 8
MAXIMUM_GFN: Final = (1 << 28) - 1
FIXED: Final = ((0xA0, 0x100), (0xFEC00, 0xFEC01), (0xFEE00, 0xFEE01), (0xFFC00, 0x100000))
"""Frames (first, end) that belong to the board: VGA window and firmware, I/O APIC, local APIC, ROM."""
RAM: Final = 0
"""The number of the RAM's backing."""


class Place(NamedTuple):
    """A place in the domain's backings; it stays valid whatever happens to the p2m."""

    backing: int
    offset: int

    def plus(self, offset: int) -> "Place":
        """That many bytes further on."""
        return Place(self.backing, self.offset + offset)


Page = Place
"""The place of a page."""


class Words:
    """Aligned 32-bit words that the guest changes at the same time. Any thread."""

    def __init__(self, memory: Memory) -> None:
        self._exchange = memory.compare_exchange

    def load(self, place: Place) -> int:
        """The word."""
        return self._exchange(place.backing, place.offset, 0, 0)

    def load_many(self, place: Place, step: int, count: int) -> list[int]:
        """``count`` words, ``step`` bytes apart."""
        exchange, (backing, first) = self._exchange, place
        return [exchange(backing, offset, 0, 0) for offset in range(first, first + step * count, step)]

    def replace(self, place: Place, expected: int, new: int) -> bool:
        """Whether the word was ``expected`` and is ``new`` now."""
        return self._exchange(place.backing, place.offset, expected, new) == expected

    def update(self, place: Place, clear: int, set_: int) -> int:
        """Clear bits, set bits; what the word was."""
        exchange, (backing, offset) = self._exchange, place
        found = exchange(backing, offset, 0, 0)
        while True:
            before = exchange(backing, offset, found, found & ~clear | set_)
            if before == found:
                return found
            found = before

    def store(self, place: Place, value: int) -> None:
        """Put a value there, whatever there was."""
        self.update(place, 0xFFFF_FFFF, value)

    def store_bytes(self, place: Place, data: bytes) -> None:
        """A whole number of words, one after the other."""
        for at in range(0, len(data), 4):
            self.store(place.plus(at), int.from_bytes(data[at : at + 4], "little"))

    def load_bytes(self, place: Place, length: int) -> bytes:
        """A whole number of words, one after the other."""
        return b"".join(self.load(place.plus(at)).to_bytes(4, "little") for at in range(0, length, 4))


class Physmap:
    """Changes of the p2m, and views of what lies behind it."""

    def __init__(
        self,
        memory: Memory,
        files: list[int],
        share_ram: Callable[[], object] = lambda: None,
        ram_bytes: int | None = None,
    ) -> None:
        """
        ``files``: a descriptor of each backing so far; that of the own pages is added. OutOfMemoryError.

        ``share_ram``: called before the RAM is mapped again, or given to another process. ``ram_bytes``: its size, if
        its file's is another.
        """
        self.memory = memory
        self._files = files
        self._share_ram = share_ram
        self._ram_bytes = ram_bytes
        self._maps: dict[int, mmap.mmap] = {}
        size = OWN_PAGES * PAGE_SIZE
        fd = os.memfd_create("nonroot-xen", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self.own_backing = memory.add_backing(fd, size)
            self._maps[self.own_backing] = mmap.mmap(fd, size)
            files.append(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            raise OutOfMemoryError(f"the host cannot give {size >> 10} KiB of memory: {error.strerror}") from None
        finally:
            os.close(fd)
        self._original: dict[int, tuple[int, int, bool] | None] = {}
        self._free: list[int] = []
        self._shown: dict[int, int] = {}  # own page's offset -> frame
        self._aliases: set[int] = set()  # frames that show a page which has another frame
        self._changing = Lock()
        self._frames: FrameTable | None = None

    # ── pages ──

    def own(self, page: int) -> Page:
        """A page of the hypervisor's own."""
        return Place(self.own_backing, page * PAGE_SIZE)

    def share_frames(self) -> int:
        """The descriptor of a table of the frames, which follows all changes from now on. It stays this object's."""
        with self._changing:
            if self._frames is None:
                self._frames = FrameTable(self._runs())
            return self._frames.fd

    def _runs(self) -> list[Run]:
        """RAM and own pages as they are now, without the board's frames, which others change."""
        runs: list[Run] = []
        for first, count, backing, offset, writable in self.memory.runs():
            if backing not in (RAM, self.own_backing):
                continue
            at = first
            for low, high in (*sorted(FIXED), (first + count, first + count)):
                end = min(low, first + count)
                if end > at:
                    place = offset + (at - first) * PAGE_SIZE
                    runs.append((at, end - at, place, backing != RAM, writable))
                at = max(at, high)
        return runs

    def descriptor(self, backing: int) -> int:
        """A new descriptor of a backing, to read and write. The descriptors at hand are for reading."""
        if backing == RAM:
            self._share_ram()
        return os.open(f"/proc/self/fd/{self._files[backing]}", os.O_RDWR | os.O_CLOEXEC)

    def view(self, page: Page) -> memoryview:
        """A page, readable and writable, shared with the guest."""
        backing = self._maps.get(page.backing)
        if backing is None:
            fd = self.descriptor(page.backing)
            try:
                backing = self._maps[page.backing] = mmap.mmap(fd, 0)
            finally:
                os.close(fd)
        return memoryview(backing)[page.offset : page.offset + PAGE_SIZE]

    def forget_ram(self) -> None:
        """Another file is behind the RAM: it is mapped anew when it is looked at."""
        self._maps.pop(RAM, None)

    def clear_own(self) -> None:
        """All own pages as at power-on."""
        own = self._maps[self.own_backing]
        own[:] = bytes(len(own))

    def page(self, gfn: int, write: bool = True) -> Page | None:
        """What lies behind a frame, if it is RAM or an own page."""
        if not 0 <= gfn <= MAXIMUM_GFN:
            return None
        found = self.memory.lookup(gfn)
        if found is None or found[0] not in (RAM, self.own_backing) or (write and not found[2]):
            return None
        return Place(found[0], found[1])

    # ── the p2m ──

    def place_page(self, gfn: int, page: Page) -> None:
        """Show an own page at ``gfn``; RAM that was there leaves the domain. HypercallError EINVAL."""
        self._check(gfn)
        before = self._shown.pop(page.offset, None)
        if before is not None and before != gfn:
            self._unmap(before)
        self._drop(gfn)
        self._shown[page.offset] = gfn
        self._map(gfn, page.backing, page.offset)

    def move(self, gfn: int, target: int) -> None:
        """What is at ``gfn`` is at ``target`` afterwards. HypercallError EINVAL."""
        self._check(gfn)
        self._check(target)
        page = self.page(gfn)
        if page is None:
            raise HypercallError(Errno.EINVAL)
        if gfn == target:
            return
        self._drop(target)
        self._remember(gfn)
        self._unmap(gfn)
        if page.backing == self.own_backing:
            self._shown[page.offset] = target
        self._map(target, page.backing, page.offset)

    def remove(self, gfn: int) -> bool:
        """Take a frame out of the p2m; its memory goes to the pool. False if there is none, or it is the board's."""
        if not 0 <= gfn <= MAXIMUM_GFN or _fixed(gfn) or self.page(gfn) is None:
            return False
        self._drop(gfn)
        self._unmap(gfn)
        return True

    def populate(self, gfn: int) -> bool:
        """Put a page of the pool at ``gfn``. False if the pool is empty or the frame is taken, or the board's."""
        if not self._free or not 0 <= gfn <= MAXIMUM_GFN or _fixed(gfn) or self.memory.lookup(gfn) is not None:
            return False
        self._remember(gfn)
        self._map(gfn, RAM, self._free.pop())
        return True

    def show_alias(self, gfn: int, page: Page, writable: bool) -> None:
        """Show some page of the domain at ``gfn`` too; RAM that was there leaves the domain. HypercallError EINVAL."""
        self._check(gfn)
        if self.page(gfn) == page:
            raise HypercallError(Errno.EINVAL)
        self._drop(gfn)
        self._aliases.add(gfn)
        self._map(gfn, page.backing, page.offset, writable)

    def hide_alias(self, gfn: int) -> None:
        """Undo :meth:`show_alias`."""
        if gfn in self._aliases:
            self._aliases.discard(gfn)
            self._unmap(gfn)

    @property
    def pool(self) -> int:
        """Pages that have left the domain."""
        return len(self._free)

    def reset(self) -> None:
        """The p2m as at power-on."""
        for gfn, found in self._original.items():
            if found is None:
                self._unmap(gfn)
            else:
                self._map(gfn, found[0], found[1], found[2])
        self._original.clear()
        self._free.clear()
        self._shown.clear()
        self._aliases.clear()
        self.clear_own()

    # ── saved domains ──

    def own_record(self) -> bytes:
        """The contents of the own pages."""
        return MemoryRecord.of("xen", memoryview(self._maps[self.own_backing])).pack()

    def saved(self) -> dict[str, Any]:
        """What the p2m has become since power-on."""
        changed = [[gfn, *self._numbers(gfn)] for gfn in sorted(self._original)]
        return {
            "changed": changed,
            "free": self._free,
            "shown": [list(item) for item in self._shown.items()],
            "aliases": sorted(self._aliases),
        }

    def restore(self, record: Fields, own: bytes) -> None:
        """The p2m and the own pages as :meth:`saved` and :meth:`own_record` found them. StateError."""
        size = len(self._maps[self.own_backing])
        contents = MemoryRecord.unpack("xen", size, own)
        changed = record.rows("changed", MAXIMUM_GFN, 1, self.own_backing, 1 << 52, 1)
        free = record.numbers("free")
        shown = record.rows("shown", size - PAGE_SIZE, MAXIMUM_GFN)
        aliases = record.numbers("aliases", MAXIMUM_GFN)
        self.reset()
        contents.apply(memoryview(self._maps[self.own_backing]))
        try:
            for gfn, mapped, backing, offset, writable in changed:
                if _fixed(gfn) or (mapped and backing not in (RAM, self.own_backing)):
                    raise ValueError(f"frame {gfn:#x} cannot be changed")
                self._remember(gfn)
                if mapped:
                    self._map(gfn, backing, offset, bool(writable))
                elif self.memory.lookup(gfn) is not None:
                    self._unmap(gfn)
        except (ValueError, OverflowError) as error:
            raise StateError(f"xen memory state: {error}") from None
        top = self._ram_bytes if self._ram_bytes is not None else os.fstat(self._files[RAM]).st_size
        if any(offset % PAGE_SIZE or offset >= top for offset in free) or len(set(free)) != len(free):
            raise StateError("xen memory state: the pool has what is no page of RAM")
        self._free[:] = free
        self._shown = {row[0]: row[1] for row in shown}
        self._aliases = set(aliases)

    def _numbers(self, gfn: int) -> tuple[int, int, int, int]:
        found = self.memory.lookup(gfn)
        return (0, 0, 0, 0) if found is None else (1, found[0], found[1], int(found[2]))

    def _map(self, gfn: int, backing: int, offset: int, writable: bool = True) -> None:
        with self._changing:
            self.memory.map(gfn, 1, backing, offset, writable)
            if self._frames is not None:
                if backing in (RAM, self.own_backing):
                    self._frames.put(gfn, offset, backing != RAM, writable)
                else:
                    self._frames.drop(gfn)

    def _unmap(self, gfn: int) -> None:
        with self._changing:
            if self._frames is not None:
                self._frames.drop(gfn)
            self.memory.unmap(gfn, 1)

    def _check(self, gfn: int) -> None:
        if not 0 <= gfn <= MAXIMUM_GFN or _fixed(gfn):
            raise HypercallError(Errno.EINVAL)

    def _remember(self, gfn: int) -> None:
        if gfn not in self._original:
            self._original[gfn] = self.memory.lookup(gfn)

    def _drop(self, gfn: int) -> None:
        """``gfn`` is about to lose its page. HypercallError EINVAL if that belongs to a device."""
        found = self.memory.lookup(gfn)
        if found is not None and found[0] not in (RAM, self.own_backing):
            raise HypercallError(Errno.EINVAL)
        self._remember(gfn)
        if gfn in self._aliases:
            self._aliases.discard(gfn)
        elif found is not None and found[0] == self.own_backing:
            self._shown.pop(found[1], None)
        elif found is not None and found[0] == RAM:
            self._free.append(found[1])
            self._give_back(found[1])

    def _give_back(self, offset: int) -> None:
        """The host gets a page of RAM back; it reads as zeros from now on."""
        self.view(Place(RAM, offset))
        self._maps[RAM].madvise(mmap.MADV_REMOVE, offset, PAGE_SIZE)

    def close(self) -> None:
        """Unmap what can be unmapped; for the end of the domain."""
        self._maps.clear()
        if self._frames is not None:
            self._frames.close()


def _fixed(gfn: int) -> bool:
    return any(first <= gfn < end for first, end in FIXED)
