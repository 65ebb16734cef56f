"""The two wire formats, the host's side of the agent, and hostile input to all of them."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.domain import frames, wire
from nonroot.domain.agent import GUEST_BACKLOG, INFLOW, WINDOW, AgentSession
from nonroot.domain.files import TreeWriter
from nonroot.domain.frames import Entry, ExitReport, FrameDecoder, FrameError, FromGuest, Hello, ToGuest
from nonroot.domain.mailbox import Mailbox
from nonroot.domain.options import DomainOptions, parse_size, readable_size
from nonroot.domain.wire import Kind, WireDecoder, WireError
from nonroot.errors import (
    BadFileError,
    BadOptionError,
    GuestFileError,
    InternalError,
    NonrootError,
    UnsupportedError,
    error_from_wire,
)
from tests.waiting import wait_until

FRAMES = st.lists(st.tuples(st.sampled_from(FromGuest), st.binary(max_size=300)), max_size=8)


@settings(deadline=None)
@given(FRAMES, st.integers(1, 50))
def test_frames_survive_any_splitting(sent: list[tuple[FromGuest, bytes]], size: int) -> None:
    data = b"".join(frames.encode(kind, payload) for kind, payload in sent)
    decoder = FrameDecoder()
    received = [f for at in range(0, len(data), size) for f in decoder.feed(data[at : at + size])]
    assert received == sent


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_garbage_frames_are_refused_or_held_but_never_raise_otherwise(data: bytes) -> None:
    try:
        for kind, payload in FrameDecoder().feed(data):
            for parse in (Hello.parse, ExitReport.parse, Entry.parse):
                try:
                    parse(payload)
                except FrameError:
                    continue
            assert isinstance(kind, FromGuest)
    except FrameError:
        pass


def test_too_long_frames_are_refused_before_their_content_comes() -> None:
    with pytest.raises(FrameError, match="the most"):
        list(FrameDecoder().feed(struct.pack("<BI", FromGuest.STDOUT, frames.MAX_PAYLOAD + 1)))
    with pytest.raises(ValueError, match="the most"):
        frames.encode(ToGuest.DATA, bytes(frames.MAX_PAYLOAD + 1))


@settings(deadline=None)
@given(
    st.sampled_from("fdlx"),
    st.integers(0, 0o7777),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**64 - 1),
    st.binary(max_size=50).filter(lambda b: b"\0" not in b),
    st.binary(max_size=50).filter(lambda b: b"\0" not in b),
)
def test_entries_round_trip(kind: str, mode: int, mtime: int, size: int, path: bytes, target: bytes) -> None:
    entry = Entry(kind, mode, mtime, size, path, target)
    assert Entry.parse(entry.pack()) == entry


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.sampled_from([k for k in Kind if k != Kind.JSON]), st.binary(max_size=100)),
            st.tuples(st.just(Kind.JSON), st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers())),
        ),
        max_size=8,
    ),
    st.integers(1, 40),
)
def test_messages_survive_any_splitting(sent: list[tuple[Kind, Any]], size: int) -> None:
    data = b"".join(wire.pack_json(c, b"blob") if k == Kind.JSON else wire.pack(k, c) for k, c in sent)
    decoder = WireDecoder()
    received = [m for at in range(0, len(data), size) for m in decoder.feed(data[at : at + size])]
    assert [(m.kind, m.record if m.kind == Kind.JSON else m.body) for m in received] == sent
    assert all(m.body == b"blob" for m in received if m.kind == Kind.JSON)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_garbage_messages_are_refused(data: bytes) -> None:
    try:
        list(WireDecoder().feed(data))
        list(WireDecoder().feed(struct.pack("<IB", len(data) + 1, 0) + data))
    except WireError:
        pass


def test_errors_travel() -> None:
    for kind in (BadFileError, GuestFileError, UnsupportedError):
        error = error_from_wire(kind("a sentence", path="x", errno=2).to_wire())
        assert type(error) is kind
        assert str(error) == "a sentence"
        assert error.details == {"path": "x", "errno": 2}
    assert type(error_from_wire({"code": "from the future", "message": "m"})) is InternalError

    class NewError(BadFileError):
        code = "new"

    record = NewError("m").to_wire()
    assert record["is"] == ["bad_file", "usage", "error"]
    assert type(error_from_wire(record | {"code": "newer"})) is BadFileError


# ── the session ──


class FakeClient:
    def __init__(self) -> None:
        self.messages: list[tuple[Kind, bytes]] = []
        self.replies: dict[int, dict[str, Any] | NonrootError] = {}
        self.events: list[str] = []
        self.waiting = 0

    def emit(self, kind: Kind, body: bytes) -> None:
        self.messages.append((kind, body))

    def reply(self, request: int, result: dict[str, Any]) -> None:
        assert request not in self.replies
        self.replies[request] = result

    def fail(self, request: int, error: NonrootError) -> None:
        assert request not in self.replies
        self.replies[request] = error

    def event(self, name: str, **fields: Any) -> None:
        self.events.append(name)

    def backlog(self) -> int:
        return self.waiting


class FakeGuest:
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.backlog = 0

    def send(self, data: bytes) -> None:
        self.sent.append(data)
        self.backlog += len(data)

    def waiting(self) -> int:
        return self.backlog

    def frames(self) -> list[tuple[int, bytes]]:
        return [(data[0], data[5:]) for data in self.sent]


HELLO = struct.pack("<III", 1, 64, 0) + b"Linux\x006.1\0x86_64\0"


def session(eager: bool = False) -> tuple[AgentSession, FakeGuest, FakeClient]:
    guest = FakeGuest()
    return AgentSession(guest, eager), guest, FakeClient()


def test_nothing_is_sent_before_the_agent_greets() -> None:
    s, guest, client = session()
    s.run(client, 1, {"argv": ["true"], "env": {}})
    assert guest.sent == []
    s.frame(FromGuest.HELLO, HELLO)
    assert [kind for kind, _ in guest.frames()] == [ToGuest.START]
    s.frame(FromGuest.EXIT, struct.pack("<II", 0, 3))
    assert client.replies == {1: {"kind": "exited", "value": 3}}


def test_operations_wait_for_each_other() -> None:
    s, guest, client = session()
    s.frame(FromGuest.HELLO, HELLO)
    for number in range(3):
        s.run(client, number, {"argv": [str(number)], "env": {}})
    assert len(guest.sent) == 1
    for number in range(3):
        s.frame(FromGuest.EXIT, struct.pack("<II", 0, number))
    assert len(guest.sent) == 3
    assert not s.busy


def test_output_beyond_the_credit_breaks_the_rules() -> None:
    s, _, client = session()
    client.waiting = 1 << 30  # the client takes nothing, so no more is granted
    s.frame(FromGuest.HELLO, HELLO)
    s.run(client, 1, {"argv": ["yes"], "env": {}})
    sent = 0
    while sent < WINDOW:
        s.frame(FromGuest.STDOUT, bytes(32768))
        sent += 32768
    with pytest.raises(FrameError, match="granted"):
        s.frame(FromGuest.STDOUT, b"x")


def test_credit_comes_when_the_client_has_taken_it() -> None:
    s, guest, client = session()
    s.frame(FromGuest.HELLO, HELLO)
    s.run(client, 1, {"argv": ["yes"], "env": {}})
    client.waiting = 1 << 30
    s.frame(FromGuest.STDOUT, bytes(WINDOW))
    s.drained()
    assert [k for k, _ in guest.frames()] == [ToGuest.START]
    client.waiting = 0
    s.drained()
    assert guest.frames()[1:] == [(ToGuest.CREDIT, struct.pack("<I", WINDOW))]
    s.frame(FromGuest.STDOUT, bytes(WINDOW))


def test_a_guest_that_grants_without_end_does_not_fill_our_memory() -> None:
    s, guest, client = session()
    s.frame(FromGuest.HELLO, HELLO)
    s.run(client, 1, {"argv": ["cat"], "env": {}, "stdin": True})
    for _ in range(100):
        s.frame(FromGuest.STDIN_CREDIT, struct.pack("<I", 0xFFFFFFFF))
    given_out = 0
    granted = INFLOW
    while given_out < granted and given_out < 50 << 20:
        s.take(client, Kind.STDIN, bytes(16384))
        given_out += 16384
        granted = sum(struct.unpack("<I", body)[0] for kind, body in client.messages if kind == Kind.CREDIT)
    assert guest.backlog < 2 * GUEST_BACKLOG
    assert given_out <= INFLOW + 2 * GUEST_BACKLOG


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (FromGuest.HELLO, HELLO),
        (FromGuest.STDOUT, b"x"),
        (FromGuest.DATA, b"x"),
        (FromGuest.EXIT, bytes(8)),
        (FromGuest.EXIT, b""),
        (FromGuest.RESULT, bytes(4)),
        (FromGuest.STDIN_CREDIT, b"xx"),
    ],
)
def test_what_nobody_asked_for_breaks_the_rules(kind: FromGuest, payload: bytes) -> None:
    s, _, _ = session()
    s.frame(FromGuest.HELLO, HELLO)
    with pytest.raises(FrameError):
        s.frame(kind, payload)


def test_a_greeting_of_another_version() -> None:
    s, _, _ = session()
    with pytest.raises(FrameError, match="version 2"):
        s.frame(FromGuest.HELLO, struct.pack("<III", 2, 64, 0))
    with pytest.raises(FrameError):
        s.frame(FromGuest.STDOUT, b"before the greeting")


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(FromGuest), st.binary(max_size=64)), max_size=20), st.booleans())
def test_hostile_frames_never_raise_anything_else(sent: list[tuple[FromGuest, bytes]], eager: bool) -> None:
    s, _, client = session(eager)
    s.frame(FromGuest.HELLO, HELLO)
    s.run(client, 1, {"argv": ["x"], "env": {}})
    s.copy_out(client, 2, {"path": "/x"})
    for kind, payload in sent:
        try:
            s.frame(kind, payload)
        except FrameError:
            s.lost(UnsupportedError("broken"))
            break
    s.lost(UnsupportedError("over"))
    assert set(client.replies) == {1, 2}


def test_an_eager_session_starts_only_what_is_complete() -> None:
    s, guest, client = session(eager=True)
    s.frame(FromGuest.HELLO, HELLO)
    assert s.parked()
    s.run(client, 1, {"argv": ["cat"], "env": {}, "stdin": True})
    s.take(client, Kind.STDIN, bytes(100_000))
    assert guest.sent == []
    assert s.parked()
    s.end_of_input(client)
    assert [k for k, _ in guest.frames()] == [ToGuest.START]
    assert not s.parked()
    s.frame(FromGuest.STDIN_CREDIT, struct.pack("<I", 65536))
    assert [k for k, _ in guest.frames()][1:] == [ToGuest.STDIN] * 4


def test_a_client_that_goes_takes_its_command_along() -> None:
    s, guest, client = session()
    s.frame(FromGuest.HELLO, HELLO)
    s.run(client, 1, {"argv": ["sleep"], "env": {}})
    s.run(client, 2, {"argv": ["sleep"], "env": {}})
    s.forget(client)
    assert guest.frames()[-1] == (ToGuest.SIGNAL, struct.pack("<I", 9))
    s.frame(FromGuest.EXIT, struct.pack("<II", 1, 9))
    assert not s.busy


# ── files that come out of a guest ──


def entry(path: bytes, kind: str = "f", target: bytes = b"", mode: int = 0o644) -> Entry:
    return Entry(kind, mode, 0, 0, path, target)


@pytest.mark.parametrize("path", [b"../x", b"/etc/x", b"a/../../x", b"a//x", b".", b"..", b"sub/./x", b""])
def test_names_that_lead_out_are_refused(tmp_path: Path, path: bytes) -> None:
    writer = TreeWriter(tmp_path / "out", "x", 1000)
    writer.entry(entry(b"", "d", mode=0o755))
    with pytest.raises(GuestFileError, match="strange name"):
        writer.entry(entry(path))


def test_links_are_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    out = tmp_path / "out"
    out.mkdir()
    (out / "x").mkdir()
    (out / "x" / "trap").symlink_to(outside)
    (out / "x" / "file").symlink_to(outside / "made")
    writer = TreeWriter(out, "x", 1000)
    writer.entry(entry(b"", "d", mode=0o755))
    for path in (b"trap/evil", b"file"):
        with pytest.raises(BadFileError):
            writer.entry(entry(path))
    writer.close()
    assert list(outside.iterdir()) == []


def test_links_that_lead_out_are_left_out(tmp_path: Path) -> None:
    writer = TreeWriter(tmp_path / "out", "x", 1000)
    writer.entry(entry(b"", "d", mode=0o755))
    writer.entry(entry(b"sub", "d", mode=0o755))
    for name, target in ((b"a", b"/etc/passwd"), (b"sub/b", b"../../x"), (b"c", b"sub/../../x"), (b"d", b"..")):
        writer.entry(entry(name, "l", target))
    writer.entry(entry(b"sub/good", "l", b"../d/./e"))
    writer.close()
    assert len(writer.skipped) == 4
    assert sorted(p.name for p in (tmp_path / "out").rglob("*")) == ["good", "sub"]


def test_only_permission_bits_are_taken_over(tmp_path: Path) -> None:
    writer = TreeWriter(tmp_path / "out", "x", 1000)
    writer.entry(entry(b"", mode=0o6755))
    writer.data(b"content")
    writer.close()
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "out").read_bytes() == b"content"


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Entry,
            st.sampled_from("fdlx"),
            st.integers(0, 0o7777),
            st.integers(),
            st.just(0),
            st.sampled_from([b"", b"a", b"a/b", b"..", b"/x", b"a/../b", b"\xff", b"x" * 300]),
            st.sampled_from([b"", b"a", b"..", b"/"]),
        ),
        max_size=6,
    )
)
def test_hostile_trees_stay_inside(tmp_path_factory: pytest.TempPathFactory, entries: list[Entry]) -> None:
    folder = tmp_path_factory.mktemp("tree")
    writer = TreeWriter(folder / "out", "x", 1000)
    try:
        for one in entries:
            writer.entry(one)
            writer.data(b"x")
    except NonrootError:
        pass
    finally:
        writer.close()
    assert [p.name for p in folder.iterdir()] in ([], ["out"])


# ── sizes, options, the mailbox ──


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("256M", 256 << 20),
        ("1G", 1 << 30),
        ("1.5g", 3 << 29),
        ("64MiB", 64 << 20),
        ("64 MB", 64 << 20),
        ("4096", 4096),
        (77, 77),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-5M", "1X", "1e9", "0x10", "1M2", "١M", True, None, 1.5, "9" * 100])
def test_sizes_that_are_none(text: Any) -> None:
    with pytest.raises(BadOptionError):
        DomainOptions(memory=parse_size(text)).check()


@settings(deadline=None)
@given(st.integers(0, 1 << 50))
def test_readable_sizes_are_exact(size: int) -> None:
    assert parse_size(readable_size(size)) == size


def test_options_travel() -> None:
    options = DomainOptions(append="x", memory=1 << 30, off=["a"])
    assert DomainOptions.from_wire(options.to_wire()) == options
    with pytest.raises(BadOptionError, match="unknown option: nonsense"):
        DomainOptions.from_wire({"nonsense": 1})


def test_mailbox_keeps_order_and_is_bounded() -> None:
    import threading

    mailbox = Mailbox(limit=100)
    posted: list[int] = []

    def post() -> None:
        for number in range(20):
            mailbox.post("n", number, 30)
            posted.append(number)

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    wait_until(lambda: len(posted) >= 4)
    thread.join(0.1)
    assert len(posted) == 4, "the fifth waits for room"
    taken: list[int] = []
    while len(taken) < 20:
        taken += [content for _, content in mailbox.take()]
    thread.join()
    assert taken == list(range(20))


# ── the document ──


def test_the_document_names_every_frame_and_message() -> None:
    text = (Path(__file__).parents[2] / "docs" / "agent.md").read_text()
    to_guest = {k.name: int(k) for k in ToGuest}
    from_guest = {k.name: int(k) for k in FromGuest}
    messages = {k.name: int(k) for k in Kind}
    section = re.split(r"^##+ ", text, flags=re.MULTILINE)
    for title, wanted in (("To the guest", to_guest), ("From the guest", from_guest), ("The control socket", messages)):
        part = next(s for s in section if s.startswith(title))
        rows = re.findall(r"^\| ([0-9][0-9A-Fa-fx, ]*) \| ([A-Z_, ]+) \|", part, re.MULTILINE)
        found = {
            n: int(c, 0) for codes, names in rows for c, n in zip(codes.split(", "), names.split(", "), strict=True)
        }
        assert found == wanted, title
