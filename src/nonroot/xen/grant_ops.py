"""grant_table_op: what a guest may ask about grants. Every element of an operation's array has its own status.

Grants of other domains cannot be mapped or copied by a guest yet; its own can, as in Xen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from nonroot._engine import Memory
from nonroot.hvm.device import StateError
from nonroot.saved.fields import Fields
from nonroot.xen.abi import (
    DOMID_SELF,
    MAP_HOST,
    MAP_READONLY,
    PAGE_SIZE,
    Errno,
    Grant,
    GrantStatus,
    HypercallError,
)
from nonroot.xen.backend import GrantError
from nonroot.xen.call import Call
from nonroot.xen.grants import BackendGrants, GrantTable
from nonroot.xen.layout import GET_VERSION, MAP_GRANT, QUERY_SIZE, UNMAP_GRANT
from nonroot.xen.memory import MAXIMUM_GFN, Physmap

__all__ = ["GrantOps"]

MAXIMUM_COUNT: Final = 4096
"""Elements of one hypercall; Xen would go on later, no guest asks for so many."""
MAXIMUM_MAPPED: Final = 4096
SOURCE_IS_REF: Final = 1
DEST_IS_REF: Final = 2


@dataclass(slots=True)
class _Mapped:
    ref: int
    gfn: int
    write: bool


class GrantOps:
    """The operations on one domain's table. In the vCPU's thread."""

    def __init__(self, table: GrantTable, physmap: Physmap, domid: int) -> None:
        self._table = table
        self._physmap = physmap
        self._domid = domid
        self._own = BackendGrants(table, physmap, domid)
        self._mapped: dict[int, _Mapped] = {}
        self._next_handle = 1

    def reset(self) -> None:
        """As at power-on."""
        self._mapped.clear()

    def saved(self) -> dict[str, Any]:
        """What the guest has mapped."""
        mapped = [[handle, m.ref, m.gfn, int(m.write)] for handle, m in self._mapped.items()]
        return {"mapped": mapped, "next": self._next_handle}

    def restore(self, record: Fields) -> None:
        """As :meth:`saved` found it; the p2m and the table have been restored. StateError."""
        mapped = record.rows("mapped", 1 << 32, 1 << 32, MAXIMUM_GFN, 1)
        if len(mapped) > MAXIMUM_MAPPED:
            raise StateError("xen grants state: too much is mapped")
        self._next_handle = record.number("next", 1 << 32)
        self._mapped.clear()
        for handle, ref, gfn, write in mapped:
            try:
                self._table.acquire(ref, self._domid, bool(write))
            except GrantError as error:
                raise StateError(f"xen grants state: {error}") from None
            self._mapped[handle] = _Mapped(ref, gfn, bool(write))

    def __call__(self, call: Call) -> int:
        """The hypercall."""
        command, pointer, count = call.args[0] & 0xFFFF_FFFF, call.args[1], call.args[2] & 0xFFFF_FFFF
        handlers: dict[int, tuple[int, Callable[[Call, bytes], bytes]]] = {
            Grant.MAP_GRANT_REF: (MAP_GRANT.size, self._map),
            Grant.UNMAP_GRANT_REF: (UNMAP_GRANT.size, self._unmap),
            Grant.SETUP_TABLE: (call.abi.setup_table.size, self._setup),
            Grant.COPY: (call.abi.grant_copy.size, self._copy),
            Grant.QUERY_SIZE: (QUERY_SIZE.size, self._query),
            Grant.SET_VERSION: (4, self._set_version),
            Grant.GET_VERSION: (GET_VERSION.size, self._get_version),
        }
        if command not in handlers:
            raise HypercallError(Errno.ENOSYS)
        if count > MAXIMUM_COUNT:
            raise HypercallError(Errno.E2BIG)
        if command in (Grant.SETUP_TABLE, Grant.QUERY_SIZE) and count != 1:
            raise HypercallError(Errno.EINVAL)
        size, handler = handlers[command]
        for index in range(1 if command in (Grant.SET_VERSION, Grant.GET_VERSION) else count):
            place = pointer + index * size
            call.write(place, handler(call, call.read(place, size)))
        return 0

    def _is_self(self, domid: int) -> bool:
        return domid in (DOMID_SELF, self._domid)

    def _query(self, call: Call, data: bytes) -> bytes:
        domid, _, _, _ = QUERY_SIZE.unpack(data)
        if not self._is_self(domid):
            return QUERY_SIZE.pack(domid, 0, 0, GrantStatus.BAD_DOMAIN)
        return QUERY_SIZE.pack(domid, self._table.frames, self._table.maximum, GrantStatus.OKAY)

    def _setup(self, call: Call, data: bytes) -> bytes:
        layout = call.abi.setup_table
        domid, frames, _, pointer = layout.unpack(data)
        if not self._is_self(domid):
            return layout.pack(domid, frames, GrantStatus.BAD_DOMAIN, pointer)
        if frames > self._table.maximum:
            return layout.pack(domid, frames, GrantStatus.GENERAL_ERROR, pointer)
        if frames:
            self._table.frame(frames - 1)
        # A translated guest knows the frames only where it has mapped them: Xen, too, gives it invalid numbers.
        invalid = (1 << 8 * call.abi.word) - 1
        call.write(pointer, b"".join(call.abi.frame(invalid) for _ in range(frames)))
        return layout.pack(domid, frames, GrantStatus.OKAY, pointer)

    def _set_version(self, call: Call, data: bytes) -> bytes:
        version = int.from_bytes(data, "little")
        if version != 1:
            # Like a Xen that is told to offer version 1 only.
            raise HypercallError(Errno.EINVAL)
        return (1).to_bytes(4, "little")

    def _get_version(self, call: Call, data: bytes) -> bytes:
        domid, _ = GET_VERSION.unpack(data)
        if not self._is_self(domid):
            raise HypercallError(Errno.ESRCH)
        return GET_VERSION.pack(domid, 1)

    def _map(self, call: Call, data: bytes) -> bytes:
        address, flags, ref, domid, _, _, _ = MAP_GRANT.unpack(data)
        handle = 0
        status = GrantStatus.OKAY
        if not self._is_self(domid):
            status = GrantStatus.BAD_DOMAIN
        elif not flags & MAP_HOST or address % PAGE_SIZE:
            status = GrantStatus.GENERAL_ERROR
        elif len(self._mapped) >= MAXIMUM_MAPPED:
            status = GrantStatus.NO_DEVICE_SPACE
        else:
            write = not flags & MAP_READONLY
            target = address // PAGE_SIZE
            try:
                gfn = self._table.acquire(ref, self._domid, write)
                try:
                    page = self._physmap.page(gfn, write)
                    if page is None:
                        raise GrantError("no memory", GrantStatus.BAD_PAGE)
                    self._physmap.show_alias(target, page, write)
                except BaseException:
                    self._table.release(ref, write)
                    raise
                handle, self._next_handle = self._next_handle, self._next_handle + 1
                self._mapped[handle] = _Mapped(ref, target, write)
            except GrantError as error:
                status = GrantStatus(error.status)
            except HypercallError:
                status = GrantStatus.GENERAL_ERROR
        return MAP_GRANT.pack(address, flags, ref, domid, status, handle, 0)

    def _unmap(self, call: Call, data: bytes) -> bytes:
        address, device, handle, _ = UNMAP_GRANT.unpack(data)
        mapped = self._mapped.get(handle)
        status = GrantStatus.OKAY
        if mapped is None:
            status = GrantStatus.BAD_HANDLE
        elif address != mapped.gfn * PAGE_SIZE:
            status = GrantStatus.BAD_VIRT_ADDR
        else:
            del self._mapped[handle]
            self._physmap.hide_alias(mapped.gfn)
            self._table.release(mapped.ref, mapped.write)
        return UNMAP_GRANT.pack(address, device, handle, status)

    def _copy(self, call: Call, data: bytes) -> bytes:
        layout = call.abi.grant_copy
        source, source_domain, source_offset, dest, dest_domain, dest_offset, length, flags, _ = layout.unpack(data)
        status = GrantStatus.OKAY
        if not (self._is_self(source_domain) and self._is_self(dest_domain)):
            status = GrantStatus.BAD_DOMAIN
        elif max(source_offset, dest_offset) + length > PAGE_SIZE:
            status = GrantStatus.BAD_COPY_ARG
        else:
            try:
                if flags & SOURCE_IS_REF:
                    copied = self._own.copy_from(source & 0xFFFF_FFFF, source_offset, length)
                else:
                    copied = self._frame(source, False).read(source * PAGE_SIZE + source_offset, length)
                if flags & DEST_IS_REF:
                    self._own.copy_to(dest & 0xFFFF_FFFF, dest_offset, copied)
                else:
                    self._frame(dest, True).write(dest * PAGE_SIZE + dest_offset, copied)
            except GrantError as error:
                status = GrantStatus(error.status)
        return layout.pack(source, source_domain, source_offset, dest, dest_domain, dest_offset, length, flags, status)

    def _frame(self, gfn: int, write: bool) -> Memory:
        if self._physmap.page(gfn, write) is None:
            raise GrantError("no memory", GrantStatus.BAD_PAGE)
        return self._physmap.memory
