"""The store by itself: permissions, watches, quotas, transactions, saved state."""

import contextlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import pytest

from nonroot.xenstore.errors import StoreError
from nonroot.xenstore.permissions import Access, Permission, parse_permissions
from nonroot.xenstore.quota import Quota
from nonroot.xenstore.session import Session
from nonroot.xenstore.store import Record, Store

Events = list[tuple[str, str]]


def refused(code: str) -> AbstractContextManager[object]:
    return pytest.raises(StoreError, match=f"^{code}:")


def guest(store: Store, domid: int) -> tuple[Session, Events]:
    """An introduced domain with a home of its own, as the toolstack makes it."""
    dom0 = store.connect()
    store.introduce(domid, 0xFEFFC, 1)
    dom0.mkdir(f"/local/domain/{domid}")
    dom0.set_permissions(f"/local/domain/{domid}", parse_permissions([f"n{domid}"]))
    events: Events = []
    session = store.attach(domid, lambda path, token: events.append((path, token)))
    return session, events


class Heard:
    def __init__(self) -> None:
        self.events: Events = []

    def __call__(self, path: str, token: str) -> None:
        self.events.append((path, token))


def watcher(store: Store, domid: int = 0) -> tuple[Session, Events]:
    events: Events = []
    return store.connect(lambda path, token: events.append((path, token)), domid), events


def taken(store: Store, events: Events) -> Events:
    store.flush()
    found = list(events)
    events.clear()
    return found


@pytest.mark.parametrize(
    "path", ["", "//", "/a/", "/a//b", "a/", "/a b", "/ä", "/a\n", "@x", "/" + "a" * 3072, "a" * 2049, "/a\0b"]
)
def test_paths_that_are_none(path: str) -> None:
    with refused("EINVAL"):
        Store().connect().write(path, b"")


def test_relative_paths_are_the_callers_own() -> None:
    store = Store()
    session, _ = guest(store, 7)
    session.write("data/x", b"1")
    assert store.connect().read("/local/domain/7/data/x") == b"1"
    assert session.read("data/x") == b"1"


def test_writing_makes_parents_and_removing_takes_all_below() -> None:
    session = Store().connect()
    session.write("/a/b/c", b"\0\xff")
    assert session.read("/a/b") == b""
    assert session.read("/a/b/c") == b"\0\xff"
    session.rm("/a")
    session.rm("/a")  # no error: the parent is there
    with refused("ENOENT"):
        session.read("/a/b/c")
    with refused("ENOENT"):
        session.rm("/a/b")
    with refused("EINVAL"):
        session.rm("/")


def test_a_stranger_hears_neither_values_nor_absence() -> None:
    store = Store()
    dom0 = store.connect()
    owner, _ = guest(store, 1)
    stranger, _ = guest(store, 2)
    owner.write("secret", b"x")
    for path in ("/local/domain/1/secret", "/local/domain/1/none", "/none"):
        with refused("EACCES"):
            stranger.read(path)
    dom0.set_permissions("/local/domain/1/secret", parse_permissions(["n1", "r2"]))
    assert stranger.read("/local/domain/1/secret") == b"x"
    with refused("EACCES"):
        stranger.write("/local/domain/1/secret", b"y")
    with refused("EACCES"):
        stranger.set_permissions("/local/domain/1/secret", parse_permissions(["n2"]))
    dom0.set_permissions("/local/domain/1/secret", parse_permissions(["n1", "b2"]))
    stranger.write("/local/domain/1/secret/mine", b"z")
    assert dom0.get_permissions("/local/domain/1/secret/mine") == (
        Permission(2, Access.NONE),
        Permission(2, Access.BOTH),
    )
    with refused("EPERM"):
        owner.set_permissions("secret", parse_permissions(["n2"]))


def test_a_target_is_stood_in_for() -> None:
    store = Store()
    model, _ = guest(store, 2)
    guest(store, 1)
    with refused("EACCES"):
        model.write("/local/domain/1/x", b"")
    store.set_target(2, 1)
    model.write("/local/domain/1/x", b"")
    store.release(1)
    assert store.domains[2].target is None


def test_watches_fire_at_once_and_for_everything_below() -> None:
    store = Store()
    session, events = watcher(store)
    session.watch("/a/b", "t")
    assert taken(store, events) == [("/a/b", "t")]
    session.write("/a/b/c/d", b"")
    session.write("/a/bb", b"")
    session.mkdir("/a/b/c/d")  # was there: nothing changes
    assert taken(store, events) == [("/a/b/c/d", "t")]
    session.rm("/a")
    assert taken(store, events) == [("/a/b", "t")]  # exactly the watched node
    with refused("EEXIST"):
        session.watch("/a/b", "t")
    session.watch("/a/b", "u")
    session.unwatch("/a/b", "t")
    with refused("ENOENT"):
        session.unwatch("/a/b", "t")
    session.write("/a/b", b"")
    assert taken(store, events) == [("/a/b", "u"), ("/a/b", "u")]


def test_relative_watches_report_relative_paths_and_depth_limits() -> None:
    store = Store()
    session, events = guest(store, 5)
    session.watch("device", "d", 1)
    taken(store, events)
    session.write("device/vbd", b"")
    session.write("device/vbd/51712", b"")
    store.connect().rm("/local/domain/5/device")
    assert taken(store, events) == [("device/vbd", "d"), ("device", "d")]


def test_watches_do_not_tell_what_reading_would_not() -> None:
    store = Store()
    owner, _ = guest(store, 1)
    stranger, heard = guest(store, 2)
    stranger.watch("/local/domain/1", "t")
    taken(store, heard)
    owner.write("secret", b"x")
    owner.rm("secret")
    assert taken(store, heard) == []
    owner.write("open", b"x")
    owner.set_permissions("open", parse_permissions(["n1", "r2"]))
    owner.set_permissions("open", parse_permissions(["n1"]))  # that it cannot be read any more is heard, too
    assert taken(store, heard) == [("/local/domain/1/open", "t")] * 2


def test_events_of_domains_are_for_dom0_and_whom_it_allows() -> None:
    store = Store()
    session, events = watcher(store)
    other, heard = guest(store, 3)
    for each in (session, other):
        each.watch("@introduceDomain", "i")
        each.watch("@releaseDomain", "r")
    taken(store, events), taken(store, heard)
    store.introduce(9, 1, 1)
    store.introduce(9, 2, 2)  # a new ring, no new domain
    assert taken(store, events) == [("@introduceDomain", "i")]
    assert taken(store, heard) == []
    with refused("EACCES"):
        other.set_permissions("@releaseDomain", parse_permissions(["r0"]))
    session.set_permissions("@releaseDomain", parse_permissions(["n0", "r3"]))
    store.shutdown(9)
    store.release(9)
    store.flush()
    assert heard == [("@releaseDomain", "r")] * 2
    assert taken(store, events) == heard


def test_release_takes_what_was_the_domains() -> None:
    store = Store()
    session, events = guest(store, 4)
    dom0, told = watcher(store)
    session.write("data/x", b"1")
    session.watch("data", "t")
    dom0.write("/shared", b"")
    dom0.set_permissions("/shared", parse_permissions(["n0", "r4", "r5"]))
    dom0.watch("/local/domain/4/data/x", "t")
    taken(store, told)
    events.clear()
    store.release(4)
    assert taken(store, told) == [("/local/domain/4/data/x", "t")]
    assert taken(store, events) == []
    assert dom0.directory("/local/domain")[1] == []
    assert dom0.get_permissions("/shared") == parse_permissions(["n0", "r5"])
    assert len(store.watches) == 1
    assert store.check() == []
    with refused("ENOENT"):
        store.release(4)


def test_transactions_see_a_snapshot_and_their_own_changes() -> None:
    store = Store()
    one, two = store.connect(), store.connect()
    one.write("/a", b"1")
    number = one.start()
    two.write("/a", b"2")
    two.write("/b", b"2")
    assert one.read("/a", number) == b"1"
    with refused("ENOENT"):
        one.read("/b", number)
    one.write("/c/d", b"3", number)
    assert one.read("/c/d", number) == b"3"
    with refused("ENOENT"):
        two.read("/c")
    with refused("EAGAIN"):
        one.end(number, commit=True)
    with refused("ENOENT"):
        one.end(number, commit=True)
    with refused("ENOENT"):
        two.read("/c")


@pytest.mark.parametrize(
    ("mine", "theirs", "conflict"),
    [
        (("read", "/d/a"), ("write", "/d/a"), True),
        (("write", "/d/a"), ("write", "/d/a"), True),
        (("write", "/d/a"), ("write", "/d/b"), False),
        (("write", "/d/new"), ("write", "/d/other"), False),
        (("mkdir", "/d/new"), ("write", "/d/new"), True),
        (("list", "/d"), ("write", "/d/other"), True),
        (("list", "/d"), ("write", "/d/a"), False),
        (("read", "/d/a"), ("rm", "/d"), True),
        (("read", "/d/none"), ("write", "/d/none/deep"), True),
        (("rm", "/d/a"), ("rm", "/d/a"), True),
        (("rm", "/d"), ("write", "/d/a/deep"), False),
        (("perms", "/d/a"), ("write", "/d/a"), False),
        (("read", "/d/a"), ("setperms", "/d/a"), True),
    ],
)
def test_what_is_a_conflict(mine: tuple[str, str], theirs: tuple[str, str], conflict: bool) -> None:
    store = Store()
    session = store.connect()
    for name in ("/d/a", "/d/b"):
        session.write(name, b"0")

    def do(operation: str, path: str, number: int) -> None:
        match operation:
            case "read":
                with contextlib.suppress(StoreError):  # it is not there
                    session.read(path, number)
            case "write":
                session.write(path, b"1", number)
            case "mkdir":
                session.mkdir(path, number)
            case "list":
                session.directory(path, number)
            case "rm":
                session.rm(path, number)
            case "perms":
                session.get_permissions(path, number)
            case "setperms":
                session.set_permissions(path, parse_permissions(["n0", "r3"]), number)

    number = session.start()
    do(*mine, number)
    session.write("/result", b"", number)
    do(*theirs, 0)
    if conflict:
        with refused("EAGAIN"):
            session.end(number, commit=True)
    else:
        session.end(number, commit=True)
        assert session.read("/result") == b""
    assert store.check() == []


def test_a_commit_fires_watches_once_for_each_node() -> None:
    store = Store()
    session, events = watcher(store)
    session.watch("/", "t")
    taken(store, events)
    number = session.start()
    for value in (b"1", b"2"):
        session.write("/a", value, number)
        session.write("/b", value, number)
    assert taken(store, events) == []
    session.end(number, commit=True)
    assert taken(store, events) == [("/a", "t"), ("/b", "t")]
    number = session.start()
    session.write("/a", b"3", number)
    session.end(number, commit=False)
    assert taken(store, events) == []


def test_quotas() -> None:
    store = Store(Quota(nodes=20, bytes=4096, node_size=2048, permissions=3, watches=4, transactions=2))
    session, _ = guest(store, 1)
    for number in range(19):
        session.write(f"n/{number}" if number else "n", b"")
    with refused("ENOSPC"):
        session.mkdir("more")
    with refused("ENOSPC"):
        session.write("n", bytes(2049))
    session.write("n", bytes(2048))
    with refused("ENOSPC"):
        session.write("n/1", bytes(2048))
    with refused("ENOSPC"):
        session.set_permissions("n", parse_permissions(["n1", "r2", "r3", "r4"]))
    for number in range(4):
        session.watch("n", str(number))
    with refused("E2BIG"):
        session.watch("n", "more")
    numbers = [session.start(), session.start()]
    with refused("ENOSPC"):
        session.start()
    session.rm("n/1", numbers[0])
    session.rm("n/2", numbers[1])
    session.mkdir("n/x", numbers[0])
    session.mkdir("n/y", numbers[1])
    session.end(numbers[0], commit=True)
    session.end(numbers[1], commit=True)
    assert store.check() == []
    dom0 = store.connect()
    for number in range(30):
        dom0.write(f"/many/{number}", bytes(3000))


def test_a_quota_holds_over_transactions_that_each_fit() -> None:
    store = Store(Quota(nodes=4))
    session, _ = guest(store, 1)
    numbers = [session.start(), session.start()]
    for number in numbers:
        session.mkdir(f"a{number}", number)
        session.mkdir(f"b{number}", number)
    session.end(numbers[0], commit=True)
    with refused("ENOSPC"):
        session.end(numbers[1], commit=True)
    assert store.check() == []


def test_a_transaction_cannot_grow_without_end() -> None:
    store = Store(Quota(transaction_nodes=64))
    session, _ = guest(store, 1)
    number = session.start()
    with refused("ENOSPC"):
        for count in range(100):
            session.write("a", str(count).encode(), number)
            session.rm("a", number)
    for count in range(1000):  # the same node again and again is no growth
        if count == 0:
            number = session.start()
        session.write("b", str(count).encode(), number)
    session.end(number, commit=True)
    assert session.read("b") == b"999"


def test_a_deep_path_is_no_problem() -> None:
    session = Store().connect()
    path = "/a" * 1500
    session.write(path, b"x")
    assert session.read(path) == b"x"
    session.rm("/a")


def test_saved_state_comes_back() -> None:
    kept: list[Record] = []
    store = Store(record=lambda records: kept.extend(json.loads(json.dumps(records))))
    session, _ = guest(store, 6)
    session.write("data", bytes(range(256)))
    session.watch("device", "tökén")
    session.watch("gone", "t")
    session.unwatch("gone", "t")
    guest(store, 8)
    store.set_target(6, 8)
    store.set_quota("nodes", 77)
    store.connect().set_permissions("@releaseDomain", parse_permissions(["r0"]))
    guest(store, 9)
    store.release(9)
    number = session.start()
    session.write("data", b"later", number)

    for history in (kept, json.loads(json.dumps(list(store.records())))):
        other = Store()
        other.restore(history)
        assert sorted(map(str, list(other.records())[1:])) == sorted(map(str, list(store.records())[1:]))
        assert other.check() == []
        heard = Heard()
        again = other.attach(6, heard)
        other.flush()
        assert heard.events == [("device", "tökén")]
        # A transaction from before goes on, and is to be tried again at its end.
        assert again.read("data", number) == bytes(range(256))
        again.write("data", b"later", number)
        with refused("EAGAIN"):
            again.end(number, commit=True)
        assert again.read("data") == bytes(range(256))
        assert again.start() != number


@pytest.mark.parametrize(
    "record",
    [
        ["nonsense"],
        ["value", "/none", "x"],
        ["create", "/", ["n0"]],
        ["create", "/a", ["x0"]],
        ["create", "/a", 5],
        ["remove", "/none"],
        ["watch", 5, "a", "b", None],
        ["quota", "nodes"],
        ["introduce", "x", 1, 1],
        [],
        ["remove", "/"],
    ],
)
def test_saved_state_that_does_not_fit_is_refused(record: Record) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Store().restore([record])


def test_what_cannot_be_kept_is_not_done() -> None:
    def full(records: list[Record]) -> None:
        raise StoreError("EIO")

    store = Store()
    session, events = guest(store, 1)
    store.record = full
    attempts: list[Callable[[], object]] = [
        partial(session.write, "a", b""),
        partial(session.watch, "a", "t"),
        partial(store.introduce, 2, 1, 1),
        partial(store.release, 1),
        partial(store.set_quota, "nodes", 1),
    ]
    for attempt in attempts:
        with refused("EIO"):
            attempt()
    store.record = lambda records: None
    with refused("ENOENT"):
        session.read("a")
    assert list(store.domains) == [1]
    assert not session.watches
    assert taken(store, events) == []
