"""XenStore's process and its client: restarts by kill -9, conflicts, rings handed over, confinement, idleness."""

import contextlib
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nonroot.cli.main import main as nonroot
from nonroot.xenstore import XenStoreError, XenStoreLostError, daemon, place
from nonroot.xenstore.client import XenStore
from nonroot.xenstore.daemon import Busy, Server
from nonroot.xenstore.journal import Journal
from nonroot.xenstore.store import Store
from nonroot.xenstore.wire import HEADER, Kind, pack
from tests.runtime import own_runtime_folder
from tests.waiting import PATIENCE, lives, wait_until


@pytest.fixture
def home() -> Iterator[Path]:
    """A runtime folder of the test's own."""
    with own_runtime_folder() as folder:
        yield folder


def pid() -> int:
    return int(place.lock_path().read_text())


def end(number: signal.Signals) -> None:
    process = pid()
    os.kill(process, number)
    wait_until(lambda: not lives(process))


def test_nodes_watches_and_clients_outlive_kill_9(home: Path) -> None:
    with XenStore() as store, XenStore() as other:
        store.write("/a/b", "tschüs")
        store.set_permissions("/a/b", ["r0", "b5"])
        watch = store.watch("/a")
        assert next(watch.events(PATIENCE)) == "/a"
        first = pid()
        end(signal.SIGKILL)
        other.write("/a/c", b"\0\xff")  # starts it again
        assert pid() != first
        assert store.read("/a/b") == "tschüs"
        assert store.get_permissions("/a/b") == ["r0", "b5"]
        assert store.read_bytes("/a/c") == b"\0\xff"
        assert next(watch.events(PATIENCE)) == "/a"  # something may have been missed
        other.write("/a/d", "")
        assert next(watch.events(PATIENCE)) == "/a/d"
        assert sorted(store.ls("/a")) == ["b", "c", "d"]
        watch.close()
        other.write("/a/d", "")
        assert list(watch.events(0.05)) == []
        with pytest.raises(XenStoreError, match=r"^XenStore: list /none: there is no such node$"):
            store.ls("/none")
        assert store.read("/none") is None
        assert not store.exists("/none")
        store.rm("/none/deep")


def test_kill_9_while_writing_loses_nothing_that_was_answered(home: Path) -> None:
    written: list[int] = []

    def write() -> None:
        with XenStore() as store:
            for number in range(400):
                store.write(f"/n/{number}", str(number))
                written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    for count in (100, 250):
        while len(written) < count and writer.is_alive():
            time.sleep(0.001)
        end(signal.SIGKILL)
    writer.join(PATIENCE)
    with XenStore() as store:
        assert sorted(map(int, store.ls("/n"))) == list(range(400))
        assert store.control("check") == "OK"


@pytest.mark.slow
def test_transactions_of_two_clients_both_happen(home: Path) -> None:
    place.ensure()
    tries: list[int] = []
    killed = threading.Event()

    def count() -> None:
        with XenStore() as store:
            for _ in range(30):
                for attempt in store.transaction():
                    with attempt as t:
                        tries.append(1)
                        t.write("/counter", str(int(t.read("/counter") or 0) + 1))
                if len(tries) > 30:
                    killed.wait(PATIENCE)

    threads = [threading.Thread(target=count) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(tries) <= 30:
        time.sleep(0.001)
    end(signal.SIGKILL)
    killed.set()
    for thread in threads:
        thread.join(PATIENCE)
    with XenStore() as store:
        total = int(store.read("/counter") or 0)
        # A commit whose answer was lost may have been done, and is tried again.
        assert 60 <= total <= 62


def test_a_conflict_is_tried_again_and_an_exception_aborts(home: Path) -> None:
    with XenStore() as store, XenStore() as other:
        store.write("/n", "1")
        seen = []
        for attempt in store.transaction():
            with attempt as t:
                seen.append(t.read("/n"))
                if len(seen) == 1:
                    other.write("/n", "5")
                t.write("/n", f"{seen[-1]}0")
        assert seen == ["1", "5"]
        assert store.read("/n") == "50"
        attempt = next(store.transaction())
        with contextlib.suppress(RuntimeError), attempt as t:
            t.write("/n", "x")
            raise RuntimeError
        assert not attempt.committed
        assert store.read("/n") == "50"
        for attempt in store.transaction():
            with attempt as t:
                t.write("/n", "lost")
                if len(seen) == 2:
                    seen.append("killed")
                    end(signal.SIGKILL)
                    t.write("/n", "never there")
        assert store.read("/n") == "lost"


def receive(sock: socket.socket, count: int) -> list[tuple[int, bytes]]:
    found = []
    for _ in range(count):
        kind, _, _, length = HEADER.unpack(sock.recv(HEADER.size, socket.MSG_WAITALL))
        found.append((kind, sock.recv(length, socket.MSG_WAITALL) if length else b""))
    return found


def test_a_ring_is_handed_over_and_found_again_after_a_restart(home: Path) -> None:
    with XenStore() as store:
        mine, theirs = socket.socketpair()
        introduced = store.watch("@introduceDomain")
        store.introduce(7, 0xFEFFC, 1, theirs)
        theirs.close()
        assert list(itertools.islice(introduced.events(PATIENCE), 2)) == ["@introduceDomain"] * 2
        assert list(introduced.events(0.05)) == []
        store.mkdir("/local/domain/7")
        store.set_permissions("/local/domain/7", ["n7"])
        mine.settimeout(PATIENCE)
        mine.sendall(pack(Kind.WATCH, 1, 0, b"data\0t\0") + pack(Kind.RELEASE, 2, 0, b"7\0"))
        assert receive(mine, 3) == [(Kind.WATCH, b"OK\0"), (Kind.WATCH_EVENT, b"data\0t\0"), (Kind.ERROR, b"EACCES\0")]
        mine.sendall(pack(Kind.WRITE, 1, 0, b"data/x\0yes"))
        assert receive(mine, 2) == [(Kind.WRITE, b"OK\0"), (Kind.WATCH_EVENT, b"data/x\0t\0")]
        assert store.read("/local/domain/7/data/x") == "yes"
        end(signal.SIGKILL)
        assert mine.recv(1) == b""
        mine.close()
        assert store.is_introduced(7)
        mine, theirs = socket.socketpair()
        mine.settimeout(PATIENCE)
        store.introduce(7, 0xFEFFC, 1, theirs)
        theirs.close()
        assert receive(mine, 1) == [(Kind.WATCH_EVENT, b"data\0t\0")]
        mine.sendall(HEADER.pack(Kind.READ, 0, 0, 5000))
        assert mine.recv(1) == b""  # a broken guest is not listened to
        mine.close()
        with XenStore(domid=7) as guest:
            assert guest.read("data/x") == "yes"
            with pytest.raises(XenStoreError, match="permission denied"):
                guest.read("/local/domain/0")
            watch = guest.watch("data/x")
            assert next(watch.events(PATIENCE)) == "data/x"
            end(signal.SIGKILL)
            store.write("/local/domain/7/data/x", "no")
            assert next(watch.events(PATIENCE)) == "data/x"
            store.release(7)
            assert store.ls("/local/domain") == []
            with pytest.raises(XenStoreLostError, match="speaking as domain 7 was refused"):
                guest.read("data/x")


@pytest.mark.slow
def test_callbacks_and_events_across_threads(home: Path) -> None:
    with XenStore() as store:
        heard: list[str] = []
        store.watch("/a", heard.append)
        assert store.dispatch(PATIENCE) == 1
        watch = store.watch("/b")
        got: list[str] = []
        waiter = threading.Thread(target=lambda: got.extend(itertools.islice(watch.events(PATIENCE), 3)))
        waiter.start()
        while len(got) < 1:
            time.sleep(0.001)
        store.write("/b/c", "")  # the answer, and the event before or after it, may be read by this thread
        store.write("/b/d", "")
        waiter.join(PATIENCE)
        assert got == ["/b", "/b/c", "/b/d"]
        store.write("/a/x", "")
        assert store.dispatch(PATIENCE) == 1
        assert heard == ["/a", "/a/x"]


@pytest.mark.slow
def test_many_children_are_listed(home: Path) -> None:
    with XenStore() as store:
        names = [f"a-long-name-{number}" for number in range(400)]
        for attempt in store.transaction():
            with attempt as t:
                for name in names:
                    t.mkdir(f"/d/{name}")
        assert store.ls("/d") == names
        with pytest.raises(XenStoreError, match="too long"):
            store.write("/d", bytes(4096))


@pytest.mark.slow
def test_it_ends_when_idle_and_keeps_its_nodes(home: Path) -> None:
    command = [sys.executable, "-P", "-m", "nonroot.xenstore", "--idle"]
    with subprocess.Popen([*command, "2"], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert re.match(r"nonroot-xenstored \d+: serving, confined by ", first), first
        with XenStore(place.socket_path()) as store:
            store.write("/kept", "yes")
            store.introduce(7, 1, 1)  # nobody carries its ring: its process is gone
            time.sleep(2.5)
            assert process.poll() is None  # not while somebody is there
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read() == ""
    assert not place.socket_path().exists()
    with pytest.raises(XenStoreLostError, match="nobody serves"):
        XenStore(place.socket_path())
    with XenStore() as store:
        assert store.read("/kept") == "yes"
        assert store.is_introduced(7)


def test_files_are_the_users_alone_and_the_process_is_confined(home: Path) -> None:
    path = place.ensure()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert place.journal_path().stat().st_mode & 0o777 == 0o600
    log = (place.folder() / "log").read_text()
    status = Path(f"/proc/{pid()}/status").read_text()
    assert ("seccomp" in log) == (re.search(r"^Seccomp:\t2$", status, re.MULTILINE) is not None)
    assert ("no-new-privileges" in log) == (re.search(r"^NoNewPrivs:\t1$", status, re.MULTILINE) is not None)


CONFINED = """
import ctypes, mmap, os, socket, sys
from pathlib import Path
from nonroot.confine import XENSTORE, confine
folder = Path(sys.argv[1])
force = confine(XENSTORE, folder=os.open(folder, os.O_PATH)).names
def attempt(name, what):
    try:
        what()
    except OSError:
        return
    print(name)
(folder / "new").write_text("x")
(folder / "new").replace(folder / "other")
(folder / "other").unlink()
if "landlock" in force:
    attempt("read", lambda: open("/etc/passwd"))
    attempt("write", lambda: open("/tmp/nonroot-confined", "w"))
    attempt("mkdir", lambda: os.mkdir(folder / "sub"))
if "seccomp" in force:
    attempt("fork", os.fork)
    attempt("exec", lambda: os.execv("/bin/true", ["true"]))
    attempt("inet", lambda: socket.socket(socket.AF_INET))
    attempt("connect", lambda: socket.socket(socket.AF_UNIX).connect(sys.argv[1]))
    attempt("kill", lambda: os.kill(os.getppid(), 0))
    attempt("exec memory", lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC))
print("end", *force)
"""


def test_what_is_confined_cannot_be_done(tmp_path: Path) -> None:
    result = subprocess.run([sys.executable, "-c", CONFINED, tmp_path], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("end"), result.stdout


@pytest.mark.slow
def test_only_one_process_serves_a_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.ensure()
    monkeypatch.setattr(daemon, "_LOCK_SECONDS", 0)
    with pytest.raises(Busy, match="another process serves"):
        Server(place.folder(), 1)


@pytest.mark.slow
def test_the_command_prints_the_path_and_starts_the_process(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nonroot(["xenstore-path", "--no-start"]) == 0
    assert not Path(capsys.readouterr().out.strip()).exists()
    assert nonroot(["xenstore-path"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_socket()


@pytest.mark.slow
def test_a_process_that_cannot_start_says_why(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = b'{"format":"nonroot xenstore 99"}'
    place.journal_path().write_bytes(b"%08x %s\n" % (zlib.crc32(header), header))
    assert nonroot(["xenstore-path"]) == 125
    assert "was written by another version of nonroot" in capsys.readouterr().err


def test_a_torn_or_damaged_line_ends_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    store = Store()
    journal = Journal(path, store)
    assert not journal.restored
    session = store.connect()
    session.write("/a", b"1")
    session.write("/b", b"2")
    journal.close()
    whole = path.read_bytes()
    damage: list[Callable[[bytes], bytes]] = [
        lambda data: data[:-1],
        lambda data: data[:-20],
        lambda data: data[:-5] + b"x" + data[-4:],
        lambda data: data + b"00000000 []\n",
        lambda data: data + b"\n\n\xff\xff garbage",
    ]
    for index, change in enumerate(damage):
        path.write_bytes(change(whole))
        again = Store()
        restored = Journal(path, again)
        assert restored.restored
        assert again.connect().directory("/")[1] == (["a"] if index < 3 else ["a", "b"])
        again.connect().write("/c", b"3")
        restored.close()
        third = Store()
        Journal(path, third).close()
        assert third.connect().read("/c") == b"3"


def test_a_journal_of_another_boot_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    journal = Journal(tmp_path / "journal", store)
    store.connect().write("/a", b"1")
    journal.close()
    monkeypatch.setattr("nonroot.xenstore.journal.boot_id", lambda: "another")
    again = Store()
    other = Journal(tmp_path / "journal", again)
    assert not other.restored
    assert again.connect().directory("/")[1] == []
    other.close()


def test_a_journal_does_not_grow_without_end(tmp_path: Path) -> None:
    store = Store()
    journal = Journal(tmp_path / "journal", store)
    session = store.connect()
    longest = 0
    for number in range(400):
        session.write("/a", bytes([number & 0x7F]) * 2000)
        journal.maintain()
        longest = max(longest, journal.path.stat().st_size)
    assert 250 << 10 < longest < 270 << 10
    journal.close()
    again = Store()
    Journal(tmp_path / "journal", again).close()
    assert again.connect().read("/a") == bytes([399 & 0x7F]) * 2000
