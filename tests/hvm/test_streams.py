"""Output in pieces and input on demand."""

from nonroot.hvm.clock import ManualClock
from nonroot.hvm.streams import FLUSH_NS, InputQueue, OutputBuffer


def test_output_goes_line_by_line() -> None:
    clock, pieces = ManualClock(), list[bytes]()
    out = OutputBuffer(clock, pieces.append)
    for byte in b"one\ntwo":
        out.put(byte)
    assert pieces == [b"one\n"]
    out.flush()
    out.flush()
    assert pieces == [b"one\n", b"two"]


def test_partial_line_waits_only_so_long() -> None:
    clock, pieces = ManualClock(1000), list[bytes]()
    out = OutputBuffer(clock, pieces.append)
    assert out.deadline() is None
    out.put(0x24)
    assert clock.dirty
    assert out.deadline() == 1000 + FLUSH_NS
    out.advance(1000 + FLUSH_NS - 1)
    assert pieces == []
    out.advance(1000 + FLUSH_NS)
    assert pieces == [b"$"]
    assert out.deadline() is None


def test_input_waits_until_it_is_wanted() -> None:
    taken = bytearray()
    room = 3

    def receive(data: bytes) -> int:
        nonlocal room
        accepted = min(room, len(data))
        room -= accepted
        taken.extend(data[:accepted])
        return accepted

    queue = InputQueue(receive, piece=2)
    queue.add(b"hello")
    assert (bytes(taken), len(queue)) == (b"hel", 2)
    room = 10
    queue.feed()
    assert (bytes(taken), len(queue)) == (b"hello", 0)


def test_device_that_asks_for_more_while_it_is_fed() -> None:
    taken = bytearray()

    def receive(data: bytes) -> int:
        taken.extend(data[:1])
        queue.feed()
        return 1

    queue = InputQueue(receive, piece=16)
    queue.add(b"abc")
    assert taken == b"abc"
