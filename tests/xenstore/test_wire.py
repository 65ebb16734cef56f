"""The wire protocol: every request, sizes at their limits, hostile bytes, clients that do not read; the relay."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nonroot.xenstore import wire
from nonroot.xenstore.relay import Relay
from nonroot.xenstore.store import Record, Store
from nonroot.xenstore.wire import HEADER, PAYLOAD_MAX, Connection, Kind, pack

Message = tuple[int, int, int, bytes]


def messages(data: bytes) -> list[Message]:
    found, at = [], 0
    while at < len(data):
        kind, request, transaction, length = HEADER.unpack_from(data, at)
        assert length <= PAYLOAD_MAX
        payload = data[at + HEADER.size : at + HEADER.size + length]
        assert len(payload) == length
        found.append((kind, request, transaction, payload))
        at += HEADER.size + length
    return found


class Client:
    """A connection and what came out of it."""

    def __init__(self, store: Store, domid: int = 0, **options: Any) -> None:
        self.out = bytearray()
        self.connection = Connection(store, self.out.extend, domid, **options)

    def taken(self) -> list[Message]:
        found = messages(bytes(self.out))
        self.out.clear()
        return found

    def ask(self, kind: int, payload: bytes, transaction: int = 0) -> bytes:
        """The reply's payload; an error's name with an exclamation mark."""
        self.connection.feed(pack(kind, 77, transaction, payload))
        replies = [each for each in self.taken() if each[0] != Kind.WATCH_EVENT]
        assert len(replies) == 1
        assert replies[0][1:3] == (77, transaction)
        if replies[0][0] == Kind.ERROR:
            return b"!" + replies[0][3][:-1]
        assert replies[0][0] == kind
        return replies[0][3]


def introduced(*domids: int) -> tuple[Store, Client, list[Client]]:
    store = Store()
    dom0 = Client(store)
    for domid in domids:
        assert dom0.ask(Kind.INTRODUCE, b"%d\0%d\0%d\0" % (domid, 0xFEFFC, 1)) == b"OK\0"
        dom0.ask(Kind.MKDIR, b"/local/domain/%d\0" % domid)
        dom0.ask(Kind.SET_PERMS, b"/local/domain/%d\0n%d\0" % (domid, domid))
    return store, dom0, [Client(store, domid) for domid in domids]


def test_every_request() -> None:
    store, dom0, (guest,) = introduced(7)
    for kind, payload, expected in (
        (Kind.WRITE, b"data/a\0va\0lue", b"OK\0"),
        (Kind.READ, b"data/a\0", b"va\0lue"),
        (Kind.MKDIR, b"data/b\0", b"OK\0"),
        (Kind.DIRECTORY, b"data\0", b"a\0b\0"),
        (Kind.RM, b"data/b\0", b"OK\0"),
        (Kind.GET_PERMS, b"data/a\0", b"n7\0"),
        (Kind.SET_PERMS, b"data/a\0r7\0b3\0", b"OK\0"),
        (Kind.GET_PERMS, b"data/a\0", b"r7\0b3\0"),
        (Kind.WATCH, b"data\0t\0", b"OK\0"),
        (Kind.UNWATCH, b"data\0t\0", b"OK\0"),
        (Kind.RESET_WATCHES, b"\0", b"OK\0"),
        (Kind.GET_DOMAIN_PATH, b"9\0", b"/local/domain/9\0"),
        (Kind.IS_DOMAIN_INTRODUCED, b"7\0", b"T\0"),
        (Kind.IS_DOMAIN_INTRODUCED, b"9\0", b"F\0"),
        (Kind.IS_DOMAIN_INTRODUCED, b"0\0", b"T\0"),
        (Kind.INTRODUCE, b"9\0001\0001\0", b"!EACCES"),
        (Kind.RELEASE, b"7\0", b"!EACCES"),
        (Kind.RESUME, b"7\0", b"!EACCES"),
        (Kind.SET_TARGET, b"7\0000\0", b"!EACCES"),
        (Kind.CONTROL, b"help\0", b"!EACCES"),
        (Kind.READ, b"data/none\0", b"!ENOENT"),
        (Kind.READ, b"data/a", b"!EINVAL"),
        (Kind.READ, b"", b"!EINVAL"),
        (Kind.READ, b"data/a\0\0", b"!EINVAL"),
        (Kind.WRITE, b"data/a", b"!EINVAL"),
        (Kind.WRITE, b"\xff\0x", b"!EINVAL"),
        (Kind.SET_PERMS, b"data/a\0", b"!EINVAL"),
        (Kind.SET_PERMS, b"data/a\0q7\0", b"!EINVAL"),
        (Kind.SET_PERMS, b"data/a\0n40000\0", b"!EINVAL"),
        (Kind.UNWATCH, b"data\0t\0", b"!ENOENT"),
        (Kind.WATCH, b"data\0" + b"t" * 1025 + b"\0", b"!E2BIG"),
        (Kind.TRANSACTION_END, b"T\0", b"!ENOENT"),
        (Kind.TRANSACTION_END, b"X\0", b"!EINVAL"),
        (Kind.GET_DOMAIN_PATH, b"-1\0", b"!EINVAL"),
        (20, b"", b"!ENOSYS"),
        (Kind.ERROR, b"EIO\0", b"!ENOSYS"),
        (Kind.WATCH_EVENT, b"a\0b\0", b"!ENOSYS"),
        (0xFFFF_FFFF, b"", b"!ENOSYS"),
    ):
        assert guest.ask(kind, payload) == expected, (kind, payload)
    for kind, payload, expected in (
        (Kind.SET_TARGET, b"7\0009\0", b"!ENOENT"),
        (Kind.INTRODUCE, b"9\0001\0001\0", b"OK\0"),
        (Kind.INTRODUCE, b"0\0001\0001\0", b"!EINVAL"),
        (Kind.INTRODUCE, b"x\0001\0001\0", b"!EINVAL"),
        (Kind.INTRODUCE, b"40000\0001\0001\0", b"!EINVAL"),
        (Kind.SET_TARGET, b"7\0009\0", b"OK\0"),
        (Kind.RESUME, b"7\0", b"OK\0"),
        (Kind.RESUME, b"8\0", b"!ENOENT"),
        (Kind.CONTROL, b"check\0", b"OK\0"),
        (Kind.CONTROL, b"quota\0nodes\00055\0", b"OK\0"),
        (Kind.CONTROL, b"quota\0nonsense\00055\0", b"!EINVAL"),
        (Kind.CONTROL, b"shutdown\0007\0", b"OK\0"),
        (Kind.CONTROL, b"nonsense\0", b"!EINVAL"),
        (Kind.RELEASE, b"9\0", b"OK\0"),
        (Kind.RELEASE, b"9\0", b"!ENOENT"),
        (Kind.RELEASE, b"0\0", b"!EINVAL"),
        (Kind.CONTROL, b"attach\0009\0", b"!ENOENT"),
    ):
        assert dom0.ask(kind, payload) == expected, (kind, payload)
    assert b"nodes: 55\n" in dom0.ask(Kind.CONTROL, b"quota\0")
    assert store.quota.nodes == 55


def test_transactions_of_two_clients_conflict() -> None:
    store = Store()
    one, two = Client(store), Client(store)
    one.ask(Kind.WRITE, b"/n\0001")
    number = int(one.ask(Kind.TRANSACTION_START, b"\0")[:-1])
    assert one.ask(Kind.TRANSACTION_START, b"\0", number) == b"!EBUSY"
    assert one.ask(Kind.READ, b"/n\0", number) == b"1"
    assert one.ask(Kind.WRITE, b"/n\0002", number) == b"OK\0"
    assert two.ask(Kind.READ, b"/n\0", number) == b"!ENOENT"  # not its transaction
    assert two.ask(Kind.WRITE, b"/n\0005") == b"OK\0"
    assert one.ask(Kind.TRANSACTION_END, b"T\0", number) == b"!EAGAIN"
    assert one.ask(Kind.READ, b"/n\0", number) == b"!ENOENT"
    assert one.ask(Kind.READ, b"/n\0") == b"5"


def test_answers_come_before_the_events_that_they_cause() -> None:
    client = Client(Store())
    client.connection.feed(pack(Kind.WATCH, 1, 0, b"/a\0tok\0") + pack(Kind.WRITE, 2, 0, b"/a/b\0"))
    assert client.taken() == [
        (Kind.WATCH, 1, 0, b"OK\0"),
        (Kind.WATCH_EVENT, 0, 0, b"/a\0tok\0"),
        (Kind.WRITE, 2, 0, b"OK\0"),
        (Kind.WATCH_EVENT, 0, 0, b"/a/b\0tok\0"),
    ]


@pytest.mark.parametrize("count", [0, 1, 300, 600])
def test_long_directories_come_in_parts(count: int) -> None:
    client = Client(Store())
    client.ask(Kind.MKDIR, b"/d\0")
    names = [f"name-{number}" for number in range(count)]
    for name in names:
        client.ask(Kind.MKDIR, f"/d/{name}\0".encode())
    everything = b"".join(name.encode() + b"\0" for name in names)
    assert client.ask(Kind.DIRECTORY, b"/d\0") == (everything if len(everything) <= PAYLOAD_MAX else b"!E2BIG")
    got, generations = b"", set()
    while True:
        generation, _, part = client.ask(Kind.DIRECTORY_PART, b"/d\0%d\0" % len(got)).partition(b"\0")
        generations.add(generation)
        if part.endswith(b"\0\0") or part == b"\0":
            got += part[:-1]
            break
        assert part
        got += part
    assert got == everything
    assert len(generations) == 1
    assert client.ask(Kind.DIRECTORY_PART, b"/d\0999999\0").endswith(b"\0\0")


def test_a_message_that_is_too_long_ends_the_connection() -> None:
    broken: list[bool] = []
    store, _, _ = introduced(7)
    client = Client(store, 7, on_broken=lambda: broken.append(True))
    client.connection.feed(pack(Kind.WRITE, 1, 0, b"a\0" + bytes(PAYLOAD_MAX - 2)))
    assert client.taken()[0][3] == b"ENOSPC\0"
    client.connection.feed(HEADER.pack(Kind.WRITE, 1, 0, PAYLOAD_MAX + 1))
    assert client.connection.broken
    client.connection.feed(pack(Kind.READ, 1, 0, b"a\0"))
    assert client.taken() == []
    assert broken == [True]


def test_a_second_connection_of_a_domain_takes_over() -> None:
    _, dom0, (first,) = introduced(7)
    first.ask(Kind.WATCH, b"data\0t\0")
    second = Client(first.connection.store)
    assert second.ask(Kind.CONTROL, b"attach\0007\0") == b"OK\0"
    assert first.connection.broken
    assert second.connection.domid == 7
    assert second.ask(Kind.CONTROL, b"help\0") == b"!EACCES"
    dom0.ask(Kind.WRITE, b"/local/domain/7/data\0")
    assert second.taken() == [(Kind.WATCH_EVENT, 0, 0, b"data\0t\0")]
    dom0.ask(Kind.RELEASE, b"7\0")
    assert second.connection.broken


def test_a_closed_connection_leaves_no_watches() -> None:
    store = Store()
    client = Client(store)
    client.ask(Kind.WATCH, b"/\0t\0")
    client.ask(Kind.TRANSACTION_START, b"\0")
    client.connection.close()
    client.connection.close()
    assert len(store.watches) == 0
    assert not store.sessions


def test_events_wait_for_a_client_that_does_not_read_and_equal_ones_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_EVENTS_MAX", 100)
    store, dom0, _ = introduced(7)
    backlog = [1 << 20]
    guest = Client(store, 7, backlog=lambda: backlog[0])
    guest.ask(Kind.WATCH, b"data\0t\0")
    for _ in range(500):
        dom0.ask(Kind.WRITE, b"/local/domain/7/data/a\0x")
    assert guest.taken() == []
    backlog[0] = 0
    guest.connection.drained()
    assert [each[3] for each in guest.taken()] == [b"data\0t\0", b"data/a\0t\0"]
    backlog[0] = 1 << 20
    for number in range(101):
        dom0.ask(Kind.WRITE, b"/local/domain/7/data/%d\0x" % number)
    assert guest.connection.broken


PATH = st.sampled_from(
    [b"/", b"/a", b"/a/b", b"a", b"data/x", b"@introduceDomain", b"@x", b"", b"//", b"/local/domain/1", b"\xff"]
)
WORD = st.one_of(PATH, st.sampled_from([b"0", b"1", b"2", b"T", b"F", b"n1", b"b2", b"attach", b"99999", b"quota"]))
PAYLOAD = st.one_of(
    st.lists(WORD, max_size=4).map(lambda words: b"".join(word + b"\0" for word in words)),
    st.lists(WORD, max_size=4).map(b"\0".join),
    st.binary(max_size=40),
)
REQUEST = st.builds(
    pack,
    st.one_of(st.integers(0, 30), st.integers(0, 0xFFFF_FFFF)),
    st.integers(0, 0xFFFF_FFFF),
    st.one_of(st.just(0), st.integers(0, 6), st.integers(0, 0xFFFF_FFFF)),
    PAYLOAD,
)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(requests=st.lists(REQUEST, max_size=12), who=st.integers(0, 1), cut=st.integers(1, 50), noise=st.binary())
def test_no_bytes_raise_anything(requests: list[bytes], who: int, cut: int, noise: bytes) -> None:
    store, dom0, guests = introduced(1, 2)
    client = [dom0, guests[0]][who]
    other = guests[1]
    data = b"".join(requests)
    for at in range(0, len(data), cut):
        client.connection.feed(data[at : at + cut])
    replies = [each for each in client.taken() if each[0] != Kind.WATCH_EVENT]
    asked = messages(data)
    assert len(replies) == len(asked) or client.connection.broken
    for reply, request in zip(replies, asked, strict=False):
        assert reply[0] in (request[0], Kind.ERROR)
        assert reply[1:3] == request[1:3]
    client.connection.feed(noise)
    assert store.check() == []
    if not other.connection.broken:
        assert other.ask(Kind.GET_DOMAIN_PATH, b"2\0") == b"/local/domain/2\0"


class Restartable:
    """A store that can be lost and made again from what it kept, and a guest behind a relay."""

    def __init__(self) -> None:
        self.kept: list[Record] = []
        self.store = Store(record=self.kept.extend)
        dom0 = Client(self.store)
        dom0.ask(Kind.INTRODUCE, b"7\0001\0001\0")
        dom0.ask(Kind.MKDIR, b"/local/domain/7\0")
        dom0.ask(Kind.SET_PERMS, b"/local/domain/7\0n7\0")
        self.got = bytearray()
        self.relay = Relay(self.to_store, self.got.extend)
        self.connection: Connection | None = None
        self.deaf = False
        self.connect()

    def connect(self) -> None:
        self.connection = Connection(self.store, self.from_store, 7)

    def from_store(self, data: bytes) -> None:
        if not self.deaf:
            self.relay.from_store(data)

    def to_store(self, data: bytes) -> None:
        if self.connection is not None:
            self.connection.feed(data)

    def restart(self) -> None:
        kept = list(self.kept)
        self.store = Store(record=self.kept.extend)
        self.store.restore(kept)
        self.deaf = False
        self.connect()
        self.relay.resend()

    def ask(self, kind: int, payload: bytes, transaction: int = 0, lost: str = "") -> list[Message]:
        """Ask; ``lost``: the store goes away before the request ("request") or before its answer ("answer")."""
        message = pack(kind, 5, transaction, payload)
        self.got.clear()
        connection = self.connection
        if lost == "request":
            self.connection = None
        self.deaf = lost == "answer"
        self.relay.from_guest(message[:10])
        self.relay.from_guest(message[10:])
        assert not (lost and self.got)
        self.connection = connection
        if lost:
            self.restart()
        return [each for each in messages(bytes(self.got)) if each[0] != Kind.WATCH_EVENT]


@pytest.mark.parametrize("lost", ["", "request", "answer"])
def test_a_guest_does_not_notice_a_restart(lost: str) -> None:
    world = Restartable()
    ok: Callable[[int], list[Message]] = lambda kind: [(kind, 5, 0, b"OK\0")]  # noqa: E731
    assert world.ask(Kind.WATCH, b"data\0t\0", lost=lost) == ok(Kind.WATCH)
    assert world.ask(Kind.WRITE, b"data/a\0001", lost=lost) == ok(Kind.WRITE)
    ((_, _, _, number),) = world.ask(Kind.TRANSACTION_START, b"\0", lost=lost)
    transaction = int(number[:-1])
    assert world.ask(Kind.READ, b"data/a\0", transaction, lost) == [(Kind.READ, 5, transaction, b"1")]
    assert world.ask(Kind.WRITE, b"data/a\0002", transaction, lost)[0][0] == Kind.WRITE
    ((kind, _, _, end),) = world.ask(Kind.TRANSACTION_END, b"T\0", transaction, lost)
    assert (kind, end) == ((Kind.ERROR, b"EAGAIN\0") if lost else (Kind.TRANSACTION_END, b"OK\0"))
    assert world.ask(Kind.UNWATCH, b"data\0t\0", lost=lost) == ok(Kind.UNWATCH)
    assert world.ask(Kind.READ, b"data/a\0", lost=lost) == [(Kind.READ, 5, 0, b"1" if lost else b"2")]
    assert world.relay.room
    world.relay.from_guest(HEADER.pack(Kind.READ, 0, 0, 5000))
    assert world.relay.broken
    assert not world.relay.room


def test_a_guest_that_starts_again_gets_nothing_that_was_not_for_it() -> None:
    world = Restartable()
    world.ask(Kind.WATCH, b"data\0t\0")
    world.got.clear()
    connection, world.connection = world.connection, None
    world.relay.from_guest(pack(Kind.READ, 3, 0, b"data\0") + b"half a mess")
    world.relay.reset()
    world.connection = connection
    world.relay.resend()
    assert not world.got
    assert world.ask(Kind.WRITE, b"data\0x") == [(Kind.WRITE, 5, 0, b"OK\0")]
    assert len(world.got) == HEADER.size + 3  # and no event


def events(world: Restartable) -> list[bytes]:
    """Payloads of the events among what the guest got."""
    return [payload for kind, _, _, payload in messages(bytes(world.got)) if kind == Kind.WATCH_EVENT]


def test_a_guest_may_go_on_with_a_number_that_it_had() -> None:
    world = Restartable()
    ours, old = b"/local/domain/7", b"/local/domain/31"
    world.relay.rename({31, 32}, 7)
    assert world.ask(Kind.WRITE, old + b"/data\x00first")[0][0] == Kind.WRITE
    assert world.ask(Kind.READ, ours + b"/data\0")[0][3] == b"first"
    assert world.ask(Kind.READ, b"/local/domain/32/data\0")[0][3] == b"first"
    assert world.ask(Kind.WATCH, old + b"/data\0mine\0") == [(Kind.WATCH, 5, 0, b"OK\0")]
    assert events(world) == [old + b"/data\0mine\0"]
    world.ask(Kind.WATCH, ours + b"/data\0new\0")
    assert events(world) == [ours + b"/data\0new\0"]
    world.ask(Kind.WRITE, b"data/below\0x")
    assert set(events(world)) == {ours + b"/data/below\0new\0", old + b"/data/below\0mine\0"}
    assert world.relay.watches == [old + b"/data\0mine\0", ours + b"/data\0new\0"]
    # A number is a whole one, and other domains' are theirs.
    for path in (b"/local/domain/311/data\0", b"/local/domain/3/data\0", b"/local/domain/310\0"):
        assert world.ask(Kind.READ, path)[0][0] == Kind.ERROR
    # What carries no path is left alone, and so are values.
    world.ask(Kind.WRITE, b"data/value\0" + old)
    assert world.ask(Kind.READ, b"data/value\0")[0][3] == old
    assert world.ask(Kind.UNWATCH, old + b"/data\0mine\0") == [(Kind.UNWATCH, 5, 0, b"OK\0")]
    world.ask(Kind.WRITE, b"data/below\0y")
    assert events(world) == [ours + b"/data/below\0new\0"]
    # A copy of the guest with yet another number: what it watches is what it asked for.
    other = Restartable()
    other.relay.rename({31, 32, 8}, 7)
    other.relay.resume([old + b"/data\0mine\0"], b"")
    assert events(other) == [old + b"/data\0mine\0"]
    # One that starts again has learnt its present number.
    world.relay.reset()
    assert world.ask(Kind.READ, old + b"/data\0")[0][0] == Kind.ERROR


def test_a_path_that_would_be_too_long_stays_what_it_was() -> None:
    world = Restartable()
    world.relay.rename({3}, 31000)
    long = b"/local/domain/3/" + b"x" * 4070
    world.relay.from_guest(pack(Kind.READ, 1, 0, long + b"\0"))
    assert world.relay.idle or world.relay.room
