"""A domain's memory as a backend process sees it, and the grants in it: the other end of :mod:`nonroot.xen.sharing`.

The process has RAM, the pages that Xen and the guest share, and the table of frames mapped. Entries of the grant table
are marked and unmarked here, by atomic exchanges; nobody is asked. What the domain's process has to know of writes is
told through ``tell``: which pages stay mapped, and which have been written, before the guest hears of it.
"""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from nonroot._engine import Memory
from nonroot.xen.abi import ENTRY_PERMIT, ENTRY_READING, ENTRY_READONLY, ENTRY_TYPE, ENTRY_WRITING, GrantStatus
from nonroot.xen.backend import GRANT_PAGE, GrantError
from nonroot.xen.frame_table import OWN, PRESENT, SHIFT, WRITABLE
from nonroot.xen.grants import ENTRY_SIZE, GrantTable
from nonroot.xen.memory import FIRST_GRANT, Page, Place

__all__ = ["GuestPages", "ProcessGrants"]

Tell = Callable[[str, Sequence[int]], None]
"""(``keep``, ``release`` or ``touch``; frames): returns when the domain's process has done it."""
IN_USE: Final = ENTRY_READING | ENTRY_WRITING
MOST_UNSETTLED: Final = 512
"""Pages written before they are settled at the latest."""


class GuestPages:
    """The mappings. Any thread."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        """``descriptors``: as :meth:`nonroot.xen.sharing.Sharing.descriptors` gives them; they are closed. OSError."""
        ram, own, frames = descriptors
        self.memory = Memory()
        self._own_backing = self.memory.add_backing(own, os.fstat(own).st_size)
        self._views = {
            False: memoryview(mmap.mmap(ram, os.fstat(ram).st_size)),
            True: memoryview(mmap.mmap(own, os.fstat(own).st_size)),
        }
        self._words = memoryview(mmap.mmap(frames, os.fstat(frames).st_size, prot=mmap.PROT_READ)).cast("I")
        self._frames = len(self._words)
        for fd in descriptors:
            os.close(fd)

        self.grants = self._views[True][FIRST_GRANT * GRANT_PAGE :].cast("I")
        """The grant table: two words an entry, flags and domain, then the frame."""

    def exchange(self, ref: int, expected: int, new: int) -> bool:
        """Change an entry's first word in one step; whether it was ``expected``."""
        place = FIRST_GRANT * GRANT_PAGE + ref * ENTRY_SIZE
        return self.memory.compare_exchange(self._own_backing, place, expected, new) == expected

    def own(self, page: int) -> Page:
        """One of the pages that Xen and the guest share."""
        return Place(self._own_backing, page * GRANT_PAGE)

    def page(self, ref: int, gfn: int, write: bool) -> memoryview:
        """What lies behind a frame. GrantError."""
        word = self._words[gfn] if gfn < self._frames else 0
        if not word & (WRITABLE if write else PRESENT):
            raise GrantError(f"grant {ref} names a frame that is no memory", GrantStatus.BAD_PAGE)
        at = word >> SHIFT << 12
        return self._views[bool(word & OWN)][at : at + GRANT_PAGE]


class ProcessGrants:
    """:class:`nonroot.xen.backend.GrantAccess` for one device's thread; the table is for all devices' threads."""

    def __init__(self, pages: GuestPages, table: GrantTable, tell: Tell, domid: int = 0) -> None:
        self._pages, self._table, self._tell, self._domid = pages, table, tell, domid
        self._maps: dict[int, tuple[memoryview, int, bool, int]] = {}
        self._unsettled: dict[int, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def map(self, ref: int, readonly: bool = False) -> memoryview:
        """The granted page. GrantError."""
        with self._lock:
            found = self._maps.get(ref)
            if found is not None and (readonly or not found[2]):
                self._maps[ref] = (*found[:3], found[3] + 1)
                return found[0]
            gfn = self._table.acquire(ref, self._domid, not readonly)
            try:
                view = self._pages.page(ref, gfn, not readonly)
            except GrantError:
                self._table.release(ref, not readonly)
                raise
            if readonly:
                view = view.toreadonly()
            else:
                self._tell("keep", [gfn])
            self._maps[ref] = view, gfn, readonly, 1
            return view

    def unmap(self, ref: int) -> None:
        """Undo one :meth:`map`. GrantError if it is not mapped."""
        with self._lock:
            found = self._maps.get(ref)
            if found is None:
                raise GrantError(f"grant {ref} is not mapped", GrantStatus.BAD_HANDLE)
            view, gfn, readonly, count = found
            if count > 1:
                self._maps[ref] = view, gfn, readonly, count - 1
                return
            del self._maps[ref]
            if not readonly:
                self._tell("release", [gfn])
            self._table.release(ref, not readonly)

    def copy_from(self, ref: int, offset: int, length: int) -> bytes:
        """Bytes of the granted page. GrantError.

        Nothing is marked: a guest that takes a page back before it has its response gets other bytes of its own read.
        """
        _check(ref, offset, length)
        self._granted(ref)
        page = self._pages.page(ref, self._pages.grants[2 * ref + 1], False)
        return bytes(page[offset : offset + length])

    def copy_to(self, ref: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes into the granted page; the grant stays marked until :meth:`settle`. GrantError."""
        _check(ref, offset, len(data))
        if len(self._unsettled) >= MOST_UNSETTLED:
            self.settle()
        found = self._unsettled.get(ref)
        if found is None:
            found = self._mark(ref)
        page = self._pages.page(ref, found[0], True)
        page[offset : offset + len(data)] = data

    def _granted(self, ref: int) -> int:
        """An entry's first word. GrantError if it grants this domain nothing."""
        if not 0 <= 2 * ref < len(self._pages.grants):
            raise GrantError(f"grant {ref} is outside the table", GrantStatus.BAD_GNTREF)
        word = self._pages.grants[2 * ref]
        if word & ENTRY_TYPE != ENTRY_PERMIT:
            raise GrantError(f"grant {ref} is no grant", GrantStatus.BAD_GNTREF)
        if word >> 16 != self._domid:
            raise GrantError(f"grant {ref} is for domain {word >> 16}", GrantStatus.PERMISSION_DENIED)
        return word

    def _mark(self, ref: int) -> tuple[int, int]:
        """Mark an entry for writing; its frame, and the bits to clear afterwards. GrantError."""
        while True:
            word = self._granted(ref)
            if word & ENTRY_READONLY:
                raise GrantError(f"grant {ref} is for reading", GrantStatus.PERMISSION_DENIED)
            if self._pages.exchange(ref, word, word | IN_USE):
                break
        found = self._unsettled[ref] = self._pages.grants[2 * ref + 1], ~word & IN_USE
        return found

    def settle(self) -> None:
        """The domain's process hears of what was copied."""
        if not self._unsettled:
            return
        written, self._unsettled = self._unsettled, {}
        self._tell("touch", [gfn for gfn, _ in written.values()])
        for ref, (_, bits) in written.items():
            while not self._pages.exchange(ref, word := self._pages.grants[2 * ref], word & ~bits):
                pass

    def close(self) -> None:
        """Give back what is in use."""
        self.settle()
        for ref, (_, _, _, count) in list(self._maps.items()):
            for _ in range(count):
                self.unmap(ref)


def _check(ref: int, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > GRANT_PAGE:
        raise GrantError(f"grant {ref} has no {length} bytes at {offset}", GrantStatus.BAD_COPY_ARG)
