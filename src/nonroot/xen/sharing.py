"""What a process that serves a domain's devices gets of it: descriptors of its memory; and the accounts of that.

A backend process maps the guest's RAM, the pages that Xen and the guest share (the grant table is there), and the table
of frames. It marks grants as in use itself, in the table, by atomic operations, as Xen does. What it cannot do is tell
this process's vCPUs that code has been overwritten. So

* frames that it keeps mapped for writing are `foreign`: no vCPU runs them from decoded or translated code;
* frames that it writes now and then are touched by this process before the guest hears that they were written; until
  then their grants stay marked for writing.

So the marks in the grant table say at any time what a process may have written: when it dies, its frames are
found there.
"""

import os
from collections.abc import Iterable
from threading import Lock

from nonroot.xen.grants import GrantTable
from nonroot.xen.memory import RAM, Physmap

__all__ = ["Sharing"]

BACKEND_DOMID = 0


class Sharing:
    """One domain's memory, shared with backend processes that act as domain 0. Any thread."""

    def __init__(self, physmap: Physmap, table: GrantTable) -> None:
        self._physmap, self._table = physmap, table
        self._lock = Lock()
        self._foreign: dict[int, int] = {}

    def descriptors(self) -> list[int]:
        """New descriptors, the caller's: of RAM and of the shared pages to write, of the table of frames to read."""
        return [
            self._physmap.descriptor(RAM),
            self._physmap.descriptor(self._physmap.own_backing),
            os.open(f"/proc/self/fd/{self._physmap.share_frames()}", os.O_RDONLY | os.O_CLOEXEC),
        ]

    def touch(self, frames: Iterable[int]) -> None:
        """Frames have been written: what was decoded of them is dropped, and they count as dirty."""
        touch = self._physmap.memory.touch
        for gfn in frames:
            touch(gfn)

    def keep(self, gfn: int) -> None:
        """A frame is mapped for writing from now on."""
        with self._lock:
            count = self._foreign.get(gfn, 0)
            self._foreign[gfn] = count + 1
            if not count:
                self._physmap.memory.foreign(gfn, True)

    def release(self, gfn: int) -> None:
        """Undo one :meth:`keep`."""
        with self._lock:
            count = self._foreign.get(gfn, 0)
            if count > 1:
                self._foreign[gfn] = count - 1
            elif count:
                del self._foreign[gfn]
                self._physmap.memory.foreign(gfn, False)

    def died(self) -> int:
        """The backend process is gone, whatever it did last: nothing is in use any more. How many grants were."""
        with self._lock:
            kept = list(self._foreign)
            self._foreign.clear()
        for gfn in kept:
            self._physmap.memory.foreign(gfn, False)
        written, marked = self._table.release_all(BACKEND_DOMID)
        self.touch(written)
        return marked
