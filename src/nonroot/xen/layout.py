"""Layouts of what Xen and guests share, for the 64-bit and the 32-bit interface.

Source: Xen's public/xen.h, vcpu.h, memory.h, event_channel.h, grant_table.h, arch-x86/xen.h.
"""

import struct
from dataclasses import dataclass
from typing import Final

__all__ = ["ABI32", "ABI64", "Abi"]

VCPU_INFO_SIZE: Final = 64
LEGACY_VCPUS: Final = 32
"""vCPUs that have their information in the shared page."""
UPCALL_PENDING: Final = 0
TIME: Final = 32
"""Of the time record in vcpu_info, in both interfaces."""
TIME_RECORD: Final = struct.Struct("<IIQQIbBxx")
TIME_STABLE: Final = 1


@dataclass(frozen=True, slots=True)
class Abi:
    """One of the two interfaces; offsets and sizes in bytes."""

    long: bool
    word: int
    """Bytes of a long, a pointer and a frame number."""
    selector: int
    """evtchn_pending_sel in vcpu_info."""
    pending: int
    """evtchn_pending in the shared page."""
    mask: int
    wall_clock: int
    wall_clock_high: int
    runstate: struct.Struct
    reservation: struct.Struct
    """extent_start, nr_extents, extent_order, mem_flags, domid."""
    add_to_physmap: struct.Struct
    """domid, size, space, idx, gpfn."""
    add_to_physmap_batch: struct.Struct
    """domid, space, size, foreign domid, idxs, gpfns, errs."""
    remove_from_physmap: struct.Struct
    """domid, gpfn."""
    memory_map: struct.Struct
    """nr_entries, buffer."""
    poll: struct.Struct
    """ports, nr_ports, timeout."""
    singleshot: struct.Struct
    """timeout_abs_ns, flags."""
    setup_table: struct.Struct
    """dom, nr_frames, status, frame_list."""
    grant_copy: struct.Struct
    """source, its domid and offset; destination, its domid and offset; length, flags, status."""
    multicall: struct.Struct
    """op, result, six arguments."""

    @property
    def bits(self) -> int:
        """Ports of one word of the pending bits."""
        return 8 * self.word

    @property
    def ports(self) -> int:
        """Event channels that the shared page has room for."""
        return self.bits * self.bits

    def frames(self, data: bytes) -> tuple[int, ...]:
        """Frame numbers, or pointers, of an array."""
        return struct.unpack(f"<{len(data) // self.word}{'Q' if self.long else 'I'}", data)

    def frame(self, value: int) -> bytes:
        """One frame number."""
        return value.to_bytes(self.word, "little")


ABI64: Final = Abi(
    long=True,
    word=8,
    selector=8,
    pending=2048,
    mask=2560,
    wall_clock=3072,
    wall_clock_high=3084,
    runstate=struct.Struct("<i4xQQQQQ"),
    reservation=struct.Struct("<QQIIH6x"),
    add_to_physmap=struct.Struct("<HHIQQ"),
    add_to_physmap_batch=struct.Struct("<HHHHQQQ"),
    remove_from_physmap=struct.Struct("<H6xQ"),
    memory_map=struct.Struct("<I4xQ"),
    poll=struct.Struct("<QI4xQ"),
    singleshot=struct.Struct("<QI4x"),
    setup_table=struct.Struct("<H2xIh6xQ"),
    grant_copy=struct.Struct("<QHH4xQHH4xHHh2x"),
    multicall=struct.Struct("<QqQQQQQQ"),
)
ABI32: Final = Abi(
    long=False,
    word=4,
    selector=4,
    pending=2048,
    mask=2176,
    wall_clock=2304,
    wall_clock_high=2340,
    runstate=struct.Struct("<iQQQQQ"),
    reservation=struct.Struct("<IIIIH2x"),
    add_to_physmap=struct.Struct("<HHIII"),
    add_to_physmap_batch=struct.Struct("<HHHHIII"),
    remove_from_physmap=struct.Struct("<H2xI"),
    memory_map=struct.Struct("<II"),
    poll=struct.Struct("<IIQ"),
    singleshot=struct.Struct("<QI"),
    setup_table=struct.Struct("<H2xIh2xI"),
    grant_copy=struct.Struct("<IHHIHHHHh2x"),
    multicall=struct.Struct("<IiIIIIII"),
)

# The same in both interfaces.
VCPU_INFO_REGISTRATION: Final = struct.Struct("<QII")
"""mfn, offset, reserved."""
HVM_PARAM: Final = struct.Struct("<H2xIQ")
"""domid, index, value."""
UPCALL_VECTOR: Final = struct.Struct("<IB3x")
E820_ENTRY: Final = struct.Struct("<QQI")
MAP_GRANT: Final = struct.Struct("<QIIHhIQ")
"""host_addr, flags, ref, dom, status, handle, dev_bus_addr."""
UNMAP_GRANT: Final = struct.Struct("<QQIh2x")
"""host_addr, dev_bus_addr, handle, status."""
QUERY_SIZE: Final = struct.Struct("<H2xIIh2x")
"""dom, nr_frames, max_nr_frames, status."""
GET_VERSION: Final = struct.Struct("<H2xI")
