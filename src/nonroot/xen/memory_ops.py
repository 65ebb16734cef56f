"""memory_op: where the guest's pages are, and how many it has."""

from collections.abc import Callable, Iterator
from typing import Final

from nonroot.hvm.memory_map import FIRMWARE_START, VGA_START, E820Entry, E820Type, MemoryMap
from nonroot.xen.abi import (
    DOMID_SELF,
    MEMOP_CMD_BITS,
    SPACE_GMFN,
    SPACE_GMFN_RANGE,
    SPACE_GRANT_TABLE,
    SPACE_SHARED_INFO,
    Errno,
    HypercallError,
    Mem,
)
from nonroot.xen.call import Call
from nonroot.xen.grants import GrantTable
from nonroot.xen.layout import E820_ENTRY
from nonroot.xen.memory import MAXIMUM_GFN, SHARED_INFO, Physmap

__all__ = ["MemoryOps"]

MAXIMUM_ORDER: Final = 18
PER_CALL: Final = 4096
"""Pages that one call moves at most; the count that it returns tells the guest to ask again."""


class MemoryOps:
    """The operations on one domain's memory. In the vCPU's thread."""

    def __init__(self, physmap: Physmap, table: GrantTable, memory_map: MemoryMap, domid: int) -> None:
        self._physmap = physmap
        self._table = table
        self._map = memory_map
        self._domid = domid
        self.limit = self._all
        """Pages that the domain may have at most; what it has beyond it keeps. Any thread may set it."""

    def __call__(self, call: Call) -> int:
        """The hypercall."""
        command = call.args[0] & (1 << MEMOP_CMD_BITS) - 1
        handlers: dict[int, Callable[[Call], int]] = {
            Mem.INCREASE_RESERVATION: self._increase,
            Mem.DECREASE_RESERVATION: self._decrease,
            Mem.POPULATE_PHYSMAP: self._populate,
            Mem.MAXIMUM_RAM_PAGE: lambda call: self._maximum_gpfn(),
            Mem.MAXIMUM_GPFN: lambda call: self._maximum_gpfn(),
            Mem.CURRENT_RESERVATION: lambda call: self._reservation(call, self._physmap.pool),
            Mem.MAXIMUM_RESERVATION: lambda call: self._reservation(call, self._all - self.limit),
            Mem.ADD_TO_PHYSMAP: self._add,
            Mem.ADD_TO_PHYSMAP_BATCH: self._add_batch,
            Mem.REMOVE_FROM_PHYSMAP: self._remove,
            Mem.MEMORY_MAP: self._memory_map,
        }
        if command not in handlers:
            raise HypercallError(Errno.ENOSYS)
        return handlers[command](call)

    def _check_domain(self, domid: int) -> None:
        if domid not in (DOMID_SELF, self._domid):
            raise HypercallError(Errno.ESRCH)

    def _maximum_gpfn(self) -> int:
        top = (1 << 32) + self._map.high_bytes if self._map.high_bytes else self._map.low_end
        return (top >> 12) - 1

    def _reservation(self, call: Call, missing: int) -> int:
        self._check_domain(int.from_bytes(call.read(call.args[1], 2), "little"))
        return self._all - missing

    @property
    def _all(self) -> int:
        """Pages that the domain was made with."""
        return sum(part.length for part in self._map.ram()) // 4096

    # ── ballooning ──

    def _extents(self, call: Call) -> tuple[int, int, Iterator[int]]:
        """(extents done before, order, the first frames of those that are left). HypercallError."""
        start, count, order, _, domid = call.abi.reservation.unpack(call.read(call.args[1], call.abi.reservation.size))
        done = (call.args[0] & 0xFFFF_FFFF) >> MEMOP_CMD_BITS
        self._check_domain(domid)
        if order > MAXIMUM_ORDER or done > count:
            raise HypercallError(Errno.EINVAL)

        def frames() -> Iterator[int]:
            for index in range(done, min(count, done + max(PER_CALL >> order, 1))):
                yield call.abi.frames(call.read(start + index * call.abi.word, call.abi.word))[0]

        return done, order, frames()

    def _each(self, call: Call, change: Callable[[int], bool]) -> int:
        """Change the pages of each extent until something is refused; how many extents are done."""
        done, order, frames = self._extents(call)
        try:
            for first in frames:
                if not 0 <= first <= MAXIMUM_GFN or not all(change(first + page) for page in range(1 << order)):
                    break
                done += 1
        except HypercallError:
            pass  # an array that ends early: what was done counts
        return done

    def _increase(self, call: Call) -> int:
        # For guests whose frames Xen does not choose, this is no way to more memory.
        return self._extents(call)[0]

    def _decrease(self, call: Call) -> int:
        return self._each(call, self._physmap.remove)

    def _populate(self, call: Call) -> int:
        allowed = self.limit - (self._all - self._physmap.pool)

        def populate(gfn: int) -> bool:
            nonlocal allowed
            allowed -= 1
            return allowed >= 0 and self._physmap.populate(gfn)

        return self._each(call, populate)

    # ── frames ──

    def _add(self, call: Call) -> int:
        domid, size, space, index, gfn = call.abi.add_to_physmap.unpack(
            call.read(call.args[1], call.abi.add_to_physmap.size)
        )
        self._check_domain(domid)
        if space == SPACE_GMFN_RANGE:
            for offset in range(size):
                self._add_one(SPACE_GMFN, index + offset, gfn + offset)
        else:
            self._add_one(space, index, gfn)
        return 0

    def _add_batch(self, call: Call) -> int:
        layout, word = call.abi.add_to_physmap_batch, call.abi.word
        domid, space, count, _, indices, gfns, errors = layout.unpack(call.read(call.args[1], layout.size))
        self._check_domain(domid)
        if space not in (SPACE_SHARED_INFO, SPACE_GRANT_TABLE, SPACE_GMFN):
            raise HypercallError(Errno.EOPNOTSUPP)
        for at in range(count):
            index = call.abi.frames(call.read(indices + at * word, word))[0]
            gfn = call.abi.frames(call.read(gfns + at * word, word))[0]
            result = 0
            try:
                self._add_one(space, index, gfn)
            except HypercallError as error:
                result = -error.errno
            call.write(errors + at * 4, result.to_bytes(4, "little", signed=True))
        return 0

    def _add_one(self, space: int, index: int, gfn: int) -> None:
        if space == SPACE_SHARED_INFO:
            if index != 0:
                raise HypercallError(Errno.EINVAL)
            self._physmap.place_page(gfn, self._physmap.own(SHARED_INFO))
        elif space == SPACE_GRANT_TABLE:
            frame = self._table.frame(index)
            if frame is None:
                raise HypercallError(Errno.EINVAL)
            self._physmap.place_page(gfn, frame)
        elif space == SPACE_GMFN:
            self._physmap.move(index, gfn)
        else:
            raise HypercallError(Errno.ENOSYS)

    def _remove(self, call: Call) -> int:
        domid, gfn = call.abi.remove_from_physmap.unpack(call.read(call.args[1], call.abi.remove_from_physmap.size))
        self._check_domain(domid)
        if not self._physmap.remove(gfn):
            raise HypercallError(Errno.ENOENT)
        return 0

    def _memory_map(self, call: Call) -> int:
        room, buffer = call.abi.memory_map.unpack(call.read(call.args[1], call.abi.memory_map.size))
        # GRUB puts shared pages into the first gap: the board's own must not look like one.
        board = E820Entry(VGA_START, FIRMWARE_START - VGA_START, E820Type.RESERVED)
        entries = sorted([*self._map.e820(), board], key=lambda entry: entry.base)
        if room < len(entries):
            raise HypercallError(Errno.EINVAL)
        call.write(buffer, b"".join(E820_ENTRY.pack(e.base, e.length, e.type) for e in entries))
        call.write(call.args[1], call.abi.memory_map.pack(len(entries), buffer))
        return 0
