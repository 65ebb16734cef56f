"""Xen's shared rings, from both ends, and with garbage in the shared page."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.backends.ring import BackRing, FrontRing, RingError, ring_slots

ENTRY, ANSWER = 112, 16


def pair(pages: int = 1) -> tuple[FrontRing, BackRing, list[bytearray]]:
    memory = [bytearray(4096) for _ in range(pages)]
    front = FrontRing([memoryview(page) for page in memory], ENTRY, ANSWER)
    return front, BackRing([memoryview(page) for page in memory], ENTRY, ANSWER), memory


def test_the_sizes_are_xens() -> None:
    assert ring_slots(1, 112) == 32
    assert ring_slots(1, 108) == 32
    assert ring_slots(4, 112) == 128
    assert ring_slots(1, 12) == 256
    assert ring_slots(1, 8) == 256


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60), st.sampled_from([1, 2, 4]))
@settings(max_examples=60)
def test_what_goes_in_comes_out_in_order_and_nobody_sleeps_on_work(steps: list[tuple[int, int]], pages: int) -> None:
    front, back, _ = pair(pages)
    asked: list[bytes] = []
    answered = taken = collected = 0
    back_asleep = front_asleep = False
    for put, get in steps:
        for _ in range(min(put, front.free())):
            data = (len(asked) * 0x9E3779B97F4A7C15).to_bytes(ENTRY, "little")
            front.request(data)
            asked.append(data)
        kicked = front.push()
        assert kicked or not (back_asleep and len(asked) > taken)
        back_asleep = False
        for _ in range(min(get, back.pending())):
            assert back.take() == asked[taken]
            back.respond(taken.to_bytes(ANSWER, "little"))
            taken += 1
        kicked = back.push()
        assert kicked or not (front_asleep and taken > answered)
        answered = taken
        front_asleep = False
        back_asleep = not back.final_check()
        for _ in range(min(put, front.pending())):
            assert int.from_bytes(front.take(), "little") == collected
            collected += 1
        front_asleep = not front.final_check()


@given(st.binary(min_size=16, max_size=16), st.integers(0, 32))
def test_garbage_in_the_indices_is_an_error_or_bounded_work(garbage: bytes, before: int) -> None:
    front, back, memory = pair()
    for number in range(before):
        front.request(number.to_bytes(ENTRY, "little"))
    front.push()
    for _ in range(before // 2):
        back.take()
    memory[0][:16] = garbage
    done = 0
    try:
        while back.pending():
            back.take()
            back.respond(bytes(ANSWER))
            done += 1
            back.push()
            assert done <= 64
        back.final_check()
    except RingError as error:
        assert "overflows" in str(error)  # noqa: PT017 - one of two good ends


def test_an_overflow_is_told() -> None:
    front, back, memory = pair()
    memoryview(memory[0]).cast("I")[0] = 33
    with pytest.raises(RingError, match="overflows: 33 requests and 0 without a response, in 32 slots"):
        back.pending()
    memoryview(memory[0]).cast("I")[2] = 1
    with pytest.raises(RingError, match="1 responses"):
        front.pending()


def test_requests_without_a_response_are_done_again_by_the_next_backend() -> None:
    front, back, memory = pair()
    for number in range(5):
        front.request(number.to_bytes(ENTRY, "little"))
    front.push()
    for _ in range(3):
        back.take()
    back.respond(bytes(ANSWER))
    back.push()
    successor = BackRing([memoryview(memory[0])], ENTRY, ANSWER)
    assert [int.from_bytes(successor.take(), "little") for _ in range(successor.pending())] == [1, 2, 3, 4]


def test_a_wait_for_several_requests_is_not_ended_by_one() -> None:
    front, back, _ = pair()
    assert not back.final_check(3)
    kicks = []
    for _ in range(3):
        front.request(bytes(ENTRY))
        kicks.append(front.push())
    assert kicks == [False, False, True]
    assert back.final_check(3)
