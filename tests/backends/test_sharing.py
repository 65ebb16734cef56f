"""A domain's memory given to a backend process: frames, grants marked from outside, what a death leaves."""

import os
from collections.abc import Sequence

import pytest

from nonroot._engine import Memory
from nonroot.backends.handover import describe_image, image_from
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.pages import GuestPages, ProcessGrants
from nonroot.backends.raw import RawImage
from nonroot.backends.ring import HEADER_BYTES, BackRing, FrontRing, journal_bytes
from nonroot.xen.abi import PAGE_SIZE
from nonroot.xen.backend import GrantError
from nonroot.xen.grants import GrantTable
from nonroot.xen.memory import Physmap
from nonroot.xen.sharing import Sharing

PAGES = 64
MARKS = 0x18


class Domain:
    """RAM, a grant table, and a process's view of them, in this process."""

    def __init__(self) -> None:
        fd = os.memfd_create("ram")
        os.ftruncate(fd, PAGES * PAGE_SIZE)
        self.memory = Memory()
        self.memory.map(0, PAGES, self.memory.add_backing(fd, PAGES * PAGE_SIZE), 0)
        self.physmap = Physmap(self.memory, [fd])
        self.table = GrantTable(self.physmap)
        self.sharing = Sharing(self.physmap, self.table)
        self.pages = GuestPages(self.sharing.descriptors())
        self.told: list[tuple[str, list[int]]] = []
        table = GrantTable(self.pages)
        table.frames = table.maximum
        self.grants = ProcessGrants(self.pages, table, self._tell)

    def _tell(self, what: str, frames: Sequence[int]) -> None:
        self.told.append((what, list(frames)))
        if what == "touch":
            self.sharing.touch(frames)
        for gfn in frames:
            if what == "keep":
                self.sharing.keep(gfn)
            elif what == "release":
                self.sharing.release(gfn)

    def marks(self, ref: int) -> int:
        return self.pages.grants[2 * ref] & MARKS


@pytest.fixture
def domain() -> Domain:
    return Domain()


def test_copies_are_settled_before_their_grants_are_free(domain: Domain) -> None:
    domain.table.grant(9, 0, 5)
    domain.memory.take_dirty()
    domain.grants.copy_to(9, 100, b"packet")
    assert domain.marks(9) == MARKS
    assert domain.told == []
    domain.grants.settle()
    assert domain.told == [("touch", [5])]
    assert domain.marks(9) == 0
    assert domain.memory.take_dirty() == [5]
    assert domain.memory.read(5 * PAGE_SIZE + 100, 6) == b"packet"
    assert domain.grants.copy_from(9, 100, 6) == b"packet"


def test_what_is_not_granted_is_refused(domain: Domain) -> None:
    domain.table.grant(9, 3, 5)
    domain.table.grant(10, 0, 5, readonly=True)
    domain.table.grant(11, 0, 1 << 19)
    domain.table.grant(12, 0, 0xFFFF_FFFF)
    for ref in (8, 9, 11, 12, 1 << 20, -1):
        with pytest.raises(GrantError):
            domain.grants.copy_from(ref, 0, 4)
        with pytest.raises(GrantError):
            domain.grants.map(ref)
    with pytest.raises(GrantError, match="for reading"):
        domain.grants.copy_to(10, 0, b"x")
    assert bytes(domain.grants.map(10, readonly=True)) == bytes(PAGE_SIZE)


def test_frames_are_followed_when_the_p2m_changes(domain: Domain) -> None:
    domain.table.grant(9, 0, 5)
    domain.memory.write(5 * PAGE_SIZE, b"five")
    domain.physmap.move(5, 1000)
    with pytest.raises(GrantError, match="no memory"):
        domain.grants.copy_from(9, 0, 4)
    domain.table.grant(10, 0, 1000)
    assert domain.grants.copy_from(10, 0, 4) == b"five"
    assert domain.physmap.remove(1000)
    with pytest.raises(GrantError, match="no memory"):
        domain.grants.copy_from(10, 0, 4)


def test_a_death_leaves_no_mark_and_no_clean_frame_that_was_written(domain: Domain) -> None:
    for ref in range(9, 13):
        domain.table.grant(ref, 0, ref)
    domain.grants.map(9)[:4] = b"ring"
    domain.grants.copy_to(10, 0, b"packet")
    domain.grants.map(11, readonly=True)
    domain.memory.take_dirty()
    assert domain.sharing.died() == 3
    assert [domain.marks(ref) for ref in range(9, 13)] == [0, 0, 0, 0]
    assert domain.memory.take_dirty() == [9, 10]
    assert domain.sharing.died() == 0


def test_an_overlay_goes_on_in_other_hands(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "image")  # noqa: PTH118
    with open(path, "wb") as file:  # noqa: PTH123
        file.write(b"below".ljust(1 << 20, b"\0"))
    first = OverlayImage(RawImage(path, read_only=True))
    first.write(8192, b"before".ljust(512))
    described = describe_image(first)
    assert described is not None
    second = image_from(described[0], [os.dup(fd) for fd in described[1]])
    assert second.read(8192, 6) == b"before"
    assert second.read(0, 5) == b"below"
    second.write(0, b"after".ljust(512))
    second.close()
    assert first.read(0, 5) == b"after"
    first.close()


@pytest.mark.parametrize("published", [False, True])
def test_responses_that_were_being_published_are_not_read_as_requests(published: bool) -> None:
    page, journal = bytearray(PAGE_SIZE), memoryview(bytearray(journal_bytes(1)))
    front = FrontRing([memoryview(page)], 16, 16)
    for number in range(3):
        front.request(bytes([number]) * 16)
    front.push()
    back = BackRing([memoryview(page)], 16, 16, journal)
    for _ in range(2):
        back.respond(b"R" + back.take()[1:])
    before = bytes(page[:HEADER_BYTES])
    back.push()
    # As if it had died in the middle: the journal is full, the slots are overwritten, the index may be there or not.
    journal[:8] = (2).to_bytes(4, "little") + bytes(4)
    if not published:
        page[:HEADER_BYTES] = before
    again = BackRing([memoryview(page)], 16, 16, journal)
    assert front.pending() == 2
    assert [front.take()[:2] for _ in range(2)] == [b"R\0", b"R\1"]
    assert again.pending() == 1
    assert again.take() == b"\2" * 16
    assert bytes(journal[:4]) == bytes(4)
