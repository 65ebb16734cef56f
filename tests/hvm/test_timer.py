"""The 8254 with both interrupt controllers: it needs nobody's time while they ignore it, and nobody can tell."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.hvm.clock import ManualClock
from nonroot.hvm.ioapic import IoApic
from nonroot.hvm.irq import ISA_TIMER_GSI, InterruptRouter, create_pit
from nonroot.hvm.pic import PicPair
from nonroot.hvm.pit import PIT_HZ, Pit

SECOND = 10**9
PERIOD = 1193
"""Ticks: about a millisecond."""
CONTROL = 3
IOREGSEL, IOWIN = 0, 0x10
LOW_HALF = 0x10 + 2 * ISA_TIMER_GSI
MASKED, LEVEL = 1 << 16, 1 << 15


class Board:
    """A timer wired as on the board; ``always``: one that never sleeps."""

    def __init__(self, always: bool = False) -> None:
        self.clock = ManualClock()
        self._level = False
        self.told: list[tuple[int, str, object]] = []
        self.pic = PicPair(self._drive)
        self.ioapic = IoApic(lambda *message: self.told.append((self.clock.time_ns, "message", message)))
        lines = InterruptRouter(self.pic.set_line, self.ioapic.set_line)
        if always:
            self.pit = Pit(self.clock, lines.isa(0))
        else:
            self.pit = create_pit(self.clock, lines, self.pic, self.ioapic)

    def _drive(self, level: bool) -> None:
        self._level = level
        self.told.append((self.clock.time_ns, "INTR", level))

    def intr(self) -> bool:
        """The PIC's output."""
        return self._level

    def pass_ticks(self, ticks: int) -> int:
        """Let time pass as the run loop does; how many deadlines there were."""
        end, stops = self.clock.time_ns + -(-ticks * SECOND // PIT_HZ), 0
        while (deadline := self.pit.deadline()) is not None and deadline <= end:
            self.clock.time_ns = max(self.clock.time_ns, deadline)
            self.pit.advance(self.clock.time_ns)
            stops += 1
        self.clock.time_ns = end
        return stops

    def program(self, mode: int = 2, count: int = PERIOD) -> None:
        self.pit.write(CONTROL, 1, 0x30 | mode << 1)
        self.pit.write(0, 1, count & 0xFF)
        self.pit.write(0, 1, count >> 8)

    def start_pic(self, mask: int) -> None:
        for offset, value in ((0, 0x11), (1, 0x20), (1, 4), (1, 1), (1, mask)):
            self.pic.write(offset, 1, value)

    def redirect(self, entry: int) -> None:
        self.ioapic.write(IOREGSEL, 4, LOW_HALF)
        self.ioapic.write(IOWIN, 4, entry)

    def count(self) -> int:
        self.pit.write(CONTROL, 1, 0)
        return self.pit.read(0, 1) | self.pit.read(0, 1) << 8


@pytest.fixture
def board() -> Board:
    return Board()


def test_masked_everywhere_it_ticks_once_and_counts_on(board: Board) -> None:
    board.start_pic(0xFF)
    board.program()
    board.start_pic(0xFF)  # forgets the edge of the programming itself
    assert board.pass_ticks(PERIOD * 1000 + 100) == 1
    assert board.pit.deadline() is None
    assert board.pic.read(0, 1) & 1, "the request waits, and can be seen"
    assert board.count() == PERIOD - 100 + 1
    assert not board.intr()


def test_unmasked_in_the_pic_the_waiting_request_comes_at_once_and_the_next_in_its_time(board: Board) -> None:
    board.start_pic(0xFF)
    board.program()
    board.pass_ticks(PERIOD * 1000 + 100)
    board.pic.write(1, 1, 0xFE)
    assert board.intr()
    assert board.pic.acknowledge() == 0x20
    assert not board.intr(), "what was missed is one request"
    board.pic.write(0, 1, 0x20)
    board.clock.dirty = False
    assert board.pit.deadline() == -(-(PERIOD * 1001 + 1) * SECOND // PIT_HZ)
    board.pass_ticks(PERIOD - 200)
    assert not board.intr()
    board.pass_ticks(200)
    assert board.intr()


@pytest.mark.parametrize("forget", ["ICW1", "poll", "reset", "record"])
def test_a_request_that_is_forgotten_comes_again_in_its_time(board: Board, forget: str) -> None:
    board.start_pic(0xFF)
    board.program()
    board.pass_ticks(PERIOD * 10 + 100)
    assert board.pit.deadline() is None
    board.clock.dirty = False
    if forget == "ICW1":
        board.start_pic(0xFF)
    elif forget == "poll":
        board.pic.write(1, 1, 0xFE)
        board.pic.write(0, 1, 0x0C)
        assert board.pic.read(0, 1) == 0x80
    elif forget == "reset":
        board.pic.reset()
    else:
        board.pic.from_state(PicPair(lambda level: None).state())
    assert board.clock.dirty, "the run loop asks again"
    assert not board.pic.read(0, 1) & 1
    assert board.pass_ticks(PERIOD) == 1
    assert board.pic.read(0, 1) & 1


def test_the_ioapic_gets_every_edge_while_it_is_unmasked_and_none_of_before(board: Board) -> None:
    board.start_pic(0xFF)
    board.program()
    board.redirect(MASKED | 0x30)
    board.pass_ticks(PERIOD * 10 + 100)
    board.redirect(0x30)
    assert board.told == []
    assert board.pass_ticks(PERIOD * 5) == 5
    assert len(board.told) == 5
    board.redirect(MASKED | 0x30)
    assert board.pass_ticks(PERIOD * 5) == 0
    assert len(board.told) == 5


def test_a_level_input_waits_for_its_end(board: Board) -> None:
    board.start_pic(0xFF)
    board.redirect(LEVEL | 0x30)
    board.program()
    board.pass_ticks(PERIOD * 10)
    assert len(board.told) == 1
    assert board.pit.deadline() is None
    board.clock.dirty = False
    board.ioapic.eoi(0x30)
    assert len(board.told) == 2, "the line is still high"


def test_a_one_shot_ends_unseen_and_is_still_there(board: Board) -> None:
    board.start_pic(0xFF)
    board.program()
    board.pass_ticks(PERIOD * 2)
    board.program(mode=0, count=500)
    assert board.pit.deadline() is None
    board.pass_ticks(1000)
    board.redirect(LEVEL | 0x31)
    assert [told[1] for told in board.told] == ["message"], "OUT is high"


OPERATIONS = st.one_of(
    st.tuples(st.just("pass"), st.integers(0, 5000)),
    st.tuples(st.just("program"), st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, 100, 1193, 3000]))),
    st.tuples(st.just("mask"), st.sampled_from([0xFF, 0xFE, 0xFB, 0])),
    st.tuples(st.just("command"), st.sampled_from([0x20, 0x60, 0x0A, 0x0B, 0x0C, 0x68, 0x48, 0xC0])),
    st.tuples(st.just("start"), st.sampled_from([0xFF, 0xFE])),
    st.tuples(st.just("redirect"), st.sampled_from([MASKED | 0x30, 0x30, LEVEL | 0x31, LEVEL | MASKED | 0x31])),
    st.tuples(st.sampled_from(["acknowledge", "eoi", "read", "count", "reset", "records"]), st.none()),
)


@settings(deadline=None)
@given(st.lists(OPERATIONS, max_size=40))
def test_nobody_can_tell_it_from_one_that_never_sleeps(operations: list[tuple[str, object]]) -> None:
    boards = Board(), Board(always=True)
    for name, value in operations:
        seen = [apply(board, name, value) for board in boards]
        assert seen[0] == seen[1], name
    assert boards[0].told == boards[1].told
    assert boards[0].pic.state().irr == boards[1].pic.state().irr
    assert boards[0].ioapic.state().redirection == boards[1].ioapic.state().redirection


def apply(board: Board, name: str, value: object) -> object:
    """Do it; what a guest sees of it."""
    if name == "pass":
        assert isinstance(value, int)
        board.pass_ticks(value)
    elif name == "program":
        assert isinstance(value, tuple)
        board.program(*value)
    elif name == "mask":
        board.pic.write(1, 1, value)  # type: ignore[arg-type]
    elif name == "command":
        board.pic.write(0, 1, value)  # type: ignore[arg-type]
    elif name == "start":
        board.start_pic(value)  # type: ignore[arg-type]
    elif name == "redirect":
        board.redirect(value)  # type: ignore[arg-type]
    elif name == "acknowledge":
        return board.pic.acknowledge() if board.intr() else None
    elif name == "eoi":
        board.ioapic.eoi(0x31)
    elif name == "reset":
        board.pic.reset()
        board.ioapic.reset()
    elif name == "records":
        for device in (board.pit, board.pic, board.ioapic):
            device.from_state(device.state())
    elif name == "count":
        return board.count()
    return board.intr(), board.pic.read(0, 1), board.pic.read(1, 1)
