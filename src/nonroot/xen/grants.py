"""A domain's grant table, version 1, and the access that others have through it.

The table's frames belong to the hypervisor; the guest maps them and fills entries: flags, the domain that may use the
page, the page's frame. Whoever uses an entry marks it, in one step with the check, and the guest does not take back
what is marked.

Source: Xen's public/grant_table.h; xen/common/grant_table.c for the order of checks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Final, Protocol

from nonroot._engine import Memory
from nonroot.xen.abi import (
    ENTRY_PERMIT,
    ENTRY_READING,
    ENTRY_READONLY,
    ENTRY_TYPE,
    ENTRY_WRITING,
    PAGE_SIZE,
    GrantStatus,
)
from nonroot.xen.backend import GrantError
from nonroot.xen.memory import FIRST_GRANT, GRANT_FRAMES, Page, Physmap, Place, Words

__all__ = ["BackendGrants", "GrantTable"]

ENTRY_SIZE: Final = 8
ENTRIES: Final = PAGE_SIZE // ENTRY_SIZE
"""Entries of one frame."""


class OwnPages(Protocol):
    """Where the table's pages are; :class:`nonroot.xen.memory.Physmap` is one."""

    @property
    def memory(self) -> Memory:
        """That has their backing."""

    def own(self, page: int) -> Page:
        """One of the pages that Xen and the guest share."""


class GrantTable:
    """The table. Any thread."""

    def __init__(self, physmap: OwnPages) -> None:
        self.frames = 1
        """How many frames it has."""
        self.maximum = GRANT_FRAMES
        self._physmap = physmap
        self._words = Words(physmap.memory)
        self._lock = RLock()
        self._uses: dict[int, list[int]] = {}
        """ref -> [users, users that write]."""

    def reset(self) -> None:
        """As at power-on; the pages have been cleared."""
        self.frames = 1
        self._uses.clear()

    def restore(self, frames: int) -> None:
        """The pages have been filled from a saved domain: ``frames`` count, and nobody uses an entry any more."""
        with self._lock:
            self.frames = frames
            self._uses.clear()
            for frame in range(frames):
                page = self._physmap.own(FIRST_GRANT + frame)
                for at, word in enumerate(self._words.load_many(page, ENTRY_SIZE, ENTRIES)):
                    if word & (ENTRY_READING | ENTRY_WRITING):
                        self._words.update(page.plus(at * ENTRY_SIZE), ENTRY_READING | ENTRY_WRITING, 0)

    def frame(self, index: int) -> Page | None:
        """A frame of the table, which grows to have it; None beyond the maximum."""
        if not 0 <= index < self.maximum:
            return None
        self.frames = max(self.frames, index + 1)
        return self._physmap.own(FIRST_GRANT + index)

    @property
    def in_use(self) -> bool:
        """Whether somebody uses an entry."""
        return bool(self._uses)

    def grant(self, ref: int, domid: int, gfn: int, readonly: bool = False) -> None:
        """Fill an entry on the guest's behalf, as the toolstack does for the rings of console and XenStore."""
        entry = self._entry(ref)
        self._words.store(entry.plus(4), gfn)
        self._words.store(entry, domid << 16 | ENTRY_PERMIT | (ENTRY_READONLY if readonly else 0))

    def acquire(self, ref: int, domid: int, write: bool) -> int:
        """Mark an entry as in use by ``domid``; the frame that it names. GrantError."""
        entry = self._entry(ref)
        with self._lock:
            while True:
                word = self._words.load(entry)
                if word & ENTRY_TYPE != ENTRY_PERMIT:
                    raise GrantError(f"grant {ref} is no grant", GrantStatus.BAD_GNTREF)
                if word >> 16 != domid:
                    raise GrantError(f"grant {ref} is for domain {word >> 16}", GrantStatus.PERMISSION_DENIED)
                if write and word & ENTRY_READONLY:
                    raise GrantError(f"grant {ref} is for reading", GrantStatus.PERMISSION_DENIED)
                if self._words.replace(entry, word, word | ENTRY_READING | (ENTRY_WRITING if write else 0)):
                    break
            uses = self._uses.setdefault(ref, [0, 0])
            uses[0] += 1
            uses[1] += write
            return self._words.load(entry.plus(4))

    def release(self, ref: int, write: bool) -> None:
        """Undo one :meth:`acquire`."""
        with self._lock:
            uses = self._uses.get(ref)
            if uses is None:
                return
            uses[0] -= 1
            uses[1] -= write
            clear = (0 if uses[0] else ENTRY_READING) | (0 if uses[1] else ENTRY_WRITING)
            if not uses[0]:
                del self._uses[ref]
            self._words.update(self._entry(ref), clear, 0)

    def release_all(self, domid: int) -> tuple[list[int], int]:
        """
        Clear the marks of another process that acted as ``domid`` and is gone.

        Returns the frames that it may have written, and how many entries were marked. Entries that this process uses
        stay as they are.
        """
        written, marked = [], 0
        with self._lock:
            for ref in range(self.frames * ENTRIES):
                entry = self._entry(ref)
                word = self._words.load(entry)
                if ref in self._uses or word >> 16 != domid or not word & (ENTRY_READING | ENTRY_WRITING):
                    continue
                marked += 1
                if word & ENTRY_WRITING:
                    written.append(self._words.load(entry.plus(4)))
                self._words.update(entry, ENTRY_READING | ENTRY_WRITING, 0)
        return written, marked

    def _entry(self, ref: int) -> Place:
        if not 0 <= ref < self.frames * ENTRIES:
            raise GrantError(f"grant {ref} is outside the table", GrantStatus.BAD_GNTREF)
        frame, index = divmod(ref, ENTRIES)
        return self._physmap.own(FIRST_GRANT + frame).plus(index * ENTRY_SIZE)


@dataclass(slots=True)
class _Mapping:
    view: memoryview
    gfn: int
    readonly: bool
    count: int = 1


class BackendGrants:
    """What a domain has granted to one other; see :class:`nonroot.xen.backend.GrantAccess`. Any thread."""

    def __init__(self, table: GrantTable, physmap: Physmap, domid: int = 0) -> None:
        """``domid``: the other domain."""
        self._table = table
        self._physmap = physmap
        self._domid = domid
        self._lock = RLock()
        self._mappings: dict[tuple[int, bool], _Mapping] = {}

    def map(self, ref: int, readonly: bool = False) -> memoryview:
        """The granted page. GrantError."""
        with self._lock:
            mapping = self._mappings.get((ref, readonly))
            if mapping is not None:
                mapping.count += 1
                return mapping.view
            gfn = self._table.acquire(ref, self._domid, not readonly)
            try:
                page = self._page(ref, gfn, not readonly)
                view = self._physmap.view(page)
            except GrantError:
                self._table.release(ref, not readonly)
                raise
            mapping = _Mapping(view.toreadonly() if readonly else view, gfn, readonly)
            self._mappings[ref, readonly] = mapping
            return mapping.view

    def place(self, ref: int) -> Page:
        """Where a page is that is mapped. GrantError if it is not."""
        with self._lock:
            mapping = self._mappings.get((ref, False)) or self._mappings.get((ref, True))
            if mapping is None:
                raise GrantError(f"grant {ref} is not mapped", GrantStatus.BAD_HANDLE)
            return self._page(ref, mapping.gfn, not mapping.readonly)

    def unmap(self, ref: int) -> None:
        """Undo one :meth:`map`. GrantError if it is not mapped."""
        with self._lock:
            key = next((key for key in ((ref, False), (ref, True)) if key in self._mappings), None)
            if key is None:
                raise GrantError(f"grant {ref} is not mapped", GrantStatus.BAD_HANDLE)
            mapping = self._mappings[key]
            mapping.count -= 1
            if not mapping.readonly:
                self._physmap.memory.touch(mapping.gfn)
            if not mapping.count:
                del self._mappings[key]
                self._table.release(ref, not mapping.readonly)

    def copy_from(self, ref: int, offset: int, length: int) -> bytes:
        """Bytes of the granted page. GrantError."""
        _check(ref, offset, length)
        with self._used(ref, False) as gfn:
            try:
                return self._physmap.memory.read(gfn * PAGE_SIZE + offset, length)
            except (ValueError, OverflowError):
                raise GrantError(f"grant {ref} has lost its memory", GrantStatus.BAD_PAGE) from None

    def copy_to(self, ref: int, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes into the granted page, like DMA. GrantError."""
        _check(ref, offset, len(data))
        with self._used(ref, True) as gfn:
            try:
                self._physmap.memory.write(gfn * PAGE_SIZE + offset, data)
            except (ValueError, OverflowError):
                raise GrantError(f"grant {ref} has lost its memory", GrantStatus.BAD_PAGE) from None

    def settle(self) -> None:
        """Nothing: what was copied counts at once."""

    def close(self) -> None:
        """Give back everything that is mapped."""
        with self._lock:
            for (ref, readonly), mapping in self._mappings.items():
                if not readonly:
                    self._physmap.memory.touch(mapping.gfn)
                self._table.release(ref, not readonly)
            self._mappings.clear()

    @contextmanager
    def _used(self, ref: int, write: bool) -> Iterator[int]:
        gfn = self._table.acquire(ref, self._domid, write)
        try:
            self._page(ref, gfn, write)
            yield gfn
        finally:
            self._table.release(ref, write)

    def _page(self, ref: int, gfn: int, write: bool) -> Page:
        page = self._physmap.page(gfn, write)
        if page is None:
            raise GrantError(f"grant {ref} names a frame that is no memory", GrantStatus.BAD_PAGE)
        return page


def _check(ref: int, offset: int, length: int) -> None:
    if offset < 0 or length < 0 or offset + length > PAGE_SIZE:
        raise GrantError(f"grant {ref} has no {length} bytes at {offset}", GrantStatus.BAD_COPY_ARG)
