"""The console as the domain's process keeps it, and as clients read it."""

import re
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.domain.console import ConsoleLog, PanicWatch, printable
from nonroot.domain.expect import Console
from nonroot.errors import NotRunningError, WaitTimeoutError


@settings(deadline=None)
@given(st.binary(max_size=2000))
def test_printable_text_cannot_control_a_terminal(data: bytes) -> None:
    text = printable(data)
    assert all(c in "\n\t" or c.isprintable() for c in text)


def test_printable_keeps_what_people_read() -> None:
    assert printable(b"a\tb\r\nc \xc3\xbc") == "a\tb\nc ü"
    assert printable(b"\x1b[31mred\x1b[0m \x1b]0;title\x07plain") == "red itle" + "plain"


@settings(deadline=None)
@given(st.integers(1, 60))
def test_panic_is_found_however_it_is_split(size: int) -> None:
    text = b"[ 1.0] something\r\n[ 2.5] Kernel panic - not syncing: VFS: Unable to mount\x1b[0m root\r\n---[ end"
    watch = PanicWatch()
    news = [watch.feed(text[at : at + size]) for at in range(0, len(text), size)]
    assert news.count(True) == 1
    assert watch.message == "VFS: Unable to mount root"


def test_no_panic_where_there_is_none() -> None:
    watch = PanicWatch()
    assert not watch.feed(b"Kernel panic - not syn" + b"x" * 100_000 + b"cing\r\n" + b"\n" * 1000)
    assert watch.message == ""
    assert not watch.feed(b"y" * 10_000 + b"Kernel panic - not syncing: too far right\n")


def test_log_is_bounded() -> None:
    log = ConsoleLog(1000)
    for number in range(10_000):
        log.add(b"line %d\r\n" % number)
    assert len(log.everything()) < 1100
    assert log.tail(2) == "line 9998\nline 9999"


def test_tail_starts_at_the_panic() -> None:
    log = ConsoleLog()
    log.add(b"before\r\n[1.0] Kernel panic - not syncing: x\r\n" + b"trace\r\n" * 30)
    log.add(b"---[ end Kernel panic - not syncing: x ]---\r\n")
    lines = log.tail(5).splitlines()
    assert lines[0] == "[1.0] Kernel panic - not syncing: x"
    assert len(lines) == 32


def test_expect_consumes_up_to_the_match() -> None:
    console = Console(lambda data: None)
    console.feed(b"login: root\r\n# ")
    assert console.expect(r"login: (\w+)").group(1) == b"root"
    assert console.read() == b"\r\n# "
    assert console.read() == b""
    with pytest.raises(WaitTimeoutError, match="in 0.05 seconds"):
        console.expect("root", 0.05)


def test_expect_waits_for_more() -> None:
    console = Console(lambda data: None)

    def later() -> None:
        for piece in (b"he", b"ll", b"o\n"):
            time.sleep(0.02)
            console.feed(piece)

    thread = threading.Thread(target=later)
    thread.start()
    assert console.expect(re.compile(rb"hello"), 5).end() == 5
    thread.join()
    console.end(NotRunningError("over"))
    with pytest.raises(NotRunningError, match="over"):
        console.expect("more", 5)
    assert console.read(None) == b"\n"
    assert console.read(None) == b""


def test_old_output_is_dropped_and_counted() -> None:
    console = Console(lambda data: None)
    for _ in range(100):
        console.feed(bytes(100_000))
    assert console.dropped > 4_000_000
    assert len(console.read()) <= 5 << 20


def test_keys_are_sent_as_bytes() -> None:
    sent: list[bytes] = []
    console = Console(sent.append)
    console.write("ü\n")
    console.write(b"\xff")
    assert sent == [b"\xc3\xbc\n", b"\xff"]
