"""Pages that move: physmap, ballooning, grants."""

import struct

import pytest

from nonroot.xen.backend import GrantError
from nonroot.xen.layout import MAP_GRANT, QUERY_SIZE, UNMAP_GRANT
from tests.xen.domain import ARGUMENTS, RAM, Domain

both = pytest.mark.parametrize("long", [True, False], ids=["64", "32"])
PAGES = (RAM - (128 << 10)) // 4096
LIST = ARGUMENTS + 0x1000
GRANTS_GFN = 0x4000  # beyond the RAM


def reserve(domain: Domain, command: int, gfns: list[int], order: int = 0) -> int:
    domain.memory.write(LIST, b"".join(domain.abi.frame(gfn) for gfn in gfns))
    return domain.call_with(12, command, domain.abi.reservation.pack(LIST, len(gfns), order, 0, 0x7FF0))[0]


def map_grants(domain: Domain, index: int = 0, gfn: int = GRANTS_GFN) -> int:
    return domain.call_with(12, 7, domain.abi.add_to_physmap.pack(0x7FF0, 0, 1, index, gfn))[0]


def grant(domain: Domain, ref: int, gfn: int, flags: int = 1, domid: int = 0) -> None:
    domain.memory.write(GRANTS_GFN * 4096 + 8 * ref, struct.pack("<HHI", flags, domid, gfn))


@both
def test_ballooning_gives_pages_back_and_takes_them_again(long: bool) -> None:
    domain = Domain(long)
    domain.memory.write(0x200 * 4096, b"old")
    gfns = list(range(0x200, 0x210))
    assert reserve(domain, 1, gfns) == 16
    assert domain.memory.lookup(0x200) is None
    domain.memory.write(ARGUMENTS, struct.pack("<H", 0x7FF0))
    assert domain.call(12, 3, ARGUMENTS) == PAGES - 16
    assert domain.call(12, 4, ARGUMENTS) == PAGES
    assert reserve(domain, 1, [0x200]) == 0  # gone already
    assert reserve(domain, 1, [0x300, 0xFEC00, 0x301]) == 1  # up to the one that is the board's
    assert reserve(domain, 6, [0x8000, 0x8001]) == 2  # anywhere outside
    assert domain.memory.read(0x8000 * 4096, 4096) == bytes(4096)
    assert reserve(domain, 6, [0x8000]) == 0
    assert reserve(domain, 6, list(range(0x200, 0x210))) == 15  # no more than was given back
    assert reserve(domain, 1, [0x400], order=19) == -22


@both
def test_frames_move(long: bool) -> None:
    domain = Domain(long)
    domain.memory.write(0x300 * 4096, b"contents")
    assert domain.call_with(12, 7, domain.abi.add_to_physmap.pack(0x7FF0, 0, 2, 0x300, 0x9000))[0] == 0
    assert domain.memory.lookup(0x300) is None
    assert domain.memory.read(0x9000 * 4096, 8) == b"contents"
    assert domain.call_with(12, 15, domain.abi.remove_from_physmap.pack(0x7FF0, 0x9000))[0] == 0
    assert domain.call_with(12, 15, domain.abi.remove_from_physmap.pack(0x7FF0, 0x9000))[0] == -2
    assert domain.call_with(12, 7, domain.abi.add_to_physmap.pack(0x7FF0, 0, 0, 0, 0xFEE00))[0] == -22
    assert domain.call_with(12, 7, domain.abi.add_to_physmap.pack(3, 0, 0, 0, 0x80))[0] == -3
    domain.map_shared_info(0x70)
    domain.map_shared_info(0x71)  # the page is at one place only
    assert domain.memory.lookup(0x70) is None
    assert domain.memory.read(0x71 * 4096 + 32, 32) == domain.host.shared.time_record()


@both
def test_memory_map_is_the_machines(long: bool) -> None:
    domain = Domain(long)
    result, data = domain.call_with(12, 9, domain.abi.memory_map.pack(32, LIST))
    entries = domain.map.e820()
    assert result == 0
    assert domain.abi.memory_map.unpack(data)[0] == len(entries) + 1  # no gap where the board has something
    assert domain.memory.read(LIST, 20) == struct.pack("<QQI", entries[0].base, entries[0].length, 1)
    assert domain.call_with(12, 9, domain.abi.memory_map.pack(1, LIST))[0] == -22


def test_backends_use_what_is_granted_and_nothing_else() -> None:
    domain = Domain()
    assert map_grants(domain) == 0
    grants = domain.host.grants
    domain.memory.write(0x300 * 4096, b"data")
    grant(domain, 20, 0x300)
    grant(domain, 21, 0x301, flags=1 | 4)
    grant(domain, 22, 0x302, domid=3)
    grant(domain, 23, 0xFEC00)
    view = grants.map(20)
    assert bytes(view[:4]) == b"data"
    view[0:2] = b"DA"
    assert domain.memory.read(0x300 * 4096, 4) == b"DAta"
    entry = GRANTS_GFN * 4096 + 8 * 20
    assert domain.memory.read(entry, 2) == b"\x19\0"  # reading, writing
    assert grants.map(20) is view
    grants.unmap(20)
    assert domain.memory.read(entry, 2) == b"\x19\0"
    grants.unmap(20)
    assert domain.memory.read(entry, 2) == b"\1\0"
    for ref in (22, 23, 24, 512, -1, 1 << 40):
        with pytest.raises(GrantError):
            grants.map(ref)
        with pytest.raises(GrantError):
            grants.copy_from(ref, 0, 4)
    with pytest.raises(GrantError):
        grants.map(21)
    assert grants.map(21, readonly=True).readonly
    with pytest.raises(GrantError):
        grants.copy_to(21, 0, b"x")
    grants.copy_to(20, 4094, b"xy")
    assert grants.copy_from(20, 4093, 3) == b"\0xy"
    for offset, length in ((4095, 2), (-1, 1), (0, 4097)):
        with pytest.raises(GrantError):
            grants.copy_from(20, offset, length)
    assert domain.memory.read(entry, 2) == b"\1\0"
    with pytest.raises(GrantError):
        grants.unmap(20)
    # The guest gave the page away before it was used.
    reserve(domain, 1, [0x300])
    with pytest.raises(GrantError):
        grants.copy_from(20, 0, 1)
    assert domain.memory.read(entry, 2) == b"\1\0"


def test_grant_table_operations() -> None:
    domain = Domain()
    assert map_grants(domain, 3, GRANTS_GFN + 3) == 0
    assert map_grants(domain) == 0
    assert map_grants(domain, 64) == -22
    _, data = domain.call_with(20, 6, QUERY_SIZE.pack(0x7FF0, 0, 0, 9), 1)
    assert QUERY_SIZE.unpack(data) == (0x7FF0, 4, 64, 0)
    _, data = domain.call_with(20, 6, QUERY_SIZE.pack(7, 0, 0, 9), 1)
    assert QUERY_SIZE.unpack(data)[3] == -2
    assert domain.call_with(20, 8, struct.pack("<I", 1), 1) == (0, struct.pack("<I", 1))
    assert domain.call_with(20, 8, struct.pack("<I", 2), 1)[0] == -22
    domain.memory.write(0x300 * 4096, b"shared")
    grant(domain, 9, 0x300, domid=1)
    result, data = domain.call_with(20, 0, MAP_GRANT.pack(0xA000 << 12, 2, 9, 0x7FF0, 0, 0, 0), 1)
    *_, status, handle, _ = MAP_GRANT.unpack(data)
    assert (result, status) == (0, 0)
    assert domain.memory.read(0xA000 << 12, 6) == b"shared"
    wrong = UNMAP_GRANT.pack(0xB000 << 12, 0, handle, 0)
    assert UNMAP_GRANT.unpack(domain.call_with(20, 1, wrong, 1)[1])[3] == -5
    good = UNMAP_GRANT.pack(0xA000 << 12, 0, handle, 0)
    assert UNMAP_GRANT.unpack(domain.call_with(20, 1, good, 1)[1])[3] == 0
    assert UNMAP_GRANT.unpack(domain.call_with(20, 1, good, 1)[1])[3] == -4
    assert domain.memory.lookup(0xA000) is None
    copy = domain.abi.grant_copy
    _, data = domain.call_with(20, 5, copy.pack(9, 1, 0, 0x310, 0x7FF0, 100, 6, 1, 5), 1)
    assert copy.unpack(data)[8] == 0
    assert domain.memory.read(0x310 * 4096 + 100, 6) == b"shared"
    for bad, status in (
        (copy.pack(10, 1, 0, 0x310, 0x7FF0, 0, 6, 1, 5), -3),
        (copy.pack(9, 4, 0, 0x310, 0x7FF0, 0, 6, 1, 5), -2),
        (copy.pack(9, 1, 4000, 0x310, 0x7FF0, 0, 200, 1, 5), -10),
        (copy.pack(9, 1, 0, 0xFEE00, 0x7FF0, 0, 6, 1, 5), -9),
        (copy.pack(9, 1, 0, 1 << 60, 0x7FF0, 0, 6, 1, 5), -9),
    ):
        assert copy.unpack(domain.call_with(20, 5, bad, 1)[1])[8] == status
    assert domain.call(20, 5, ARGUMENTS, 5000) == -7
