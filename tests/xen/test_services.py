"""A domain in XenStore: number, nodes, ring, and what is left when it is gone. The store is the real one."""

import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.domain.xen import DOMAINS, XenServices, start_time
from nonroot.errors import TransientError
from nonroot.xen.config import XenConfig
from nonroot.xenstore.client import XenStore
from nonroot.xenstore.daemon import Server
from nonroot.xenstore.wire import HEADER, Kind, pack
from tests.waiting import PATIENCE
from tests.xen.domain import Domain

PAGE = 0xFEFFC * 4096
MEMORY = 64 << 20


class Process:
    """XenStore's server, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start()

    def start(self) -> None:
        self.server = Server(self.folder, 3600)
        self.thread = threading.Thread(target=self.server.serve, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path)
    yield made
    made.stop()


class RingUser:
    """The guest's end of the ring, by hand."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain

    def index(self, offset: int) -> int:
        return int.from_bytes(self.domain.memory.read(PAGE + offset, 4), "little")

    def ask(self, kind: Kind, payload: bytes, number: int = 7) -> tuple[int, bytes]:
        """A request and its answer."""
        for byte in pack(kind, number, 0, payload):
            at = self.index(2052)
            self.domain.memory.write(PAGE + at % 1024, bytes([byte]))
            self.domain.memory.write(PAGE + 2052, struct.pack("<I", at + 1))
        self.notify()
        answer = b""
        deadline = time.monotonic() + PATIENCE
        while len(answer) < HEADER.size or len(answer) < HEADER.size + HEADER.unpack_from(answer)[3]:
            assert time.monotonic() < deadline, "no answer"
            consumed, produced = self.index(2056), self.index(2060)
            if consumed == produced:
                time.sleep(0.002)
                continue
            answer += self.domain.memory.read(PAGE + 1024 + consumed % 1024, 1)
            self.domain.memory.write(PAGE + 2056, struct.pack("<I", consumed + 1))
        self.notify()
        return HEADER.unpack_from(answer)[0], answer[HEADER.size :]

    def notify(self) -> None:
        assert self.domain.call_with(32, 4, struct.pack("<I", self.domain.host.store_port))[0] == 0


def make(process: Process) -> tuple[XenServices, Domain]:
    services = XenServices(XenStore(process.folder / "socket"), MEMORY)
    domain = Domain(config=XenConfig(domid=services.domid))
    services.attach(domain.host)
    return services, domain


def test_the_guest_finds_its_nodes_through_the_ring(process: Process) -> None:
    services, domain = make(process)
    guest = RingUser(domain)
    assert guest.ask(Kind.READ, b"domid\0") == (Kind.READ, str(services.domid).encode())
    assert guest.ask(Kind.READ, b"memory/target\0") == (Kind.READ, b"65536")
    assert guest.ask(Kind.WRITE, b"control/feature-poweroff\0" + b"1") == (Kind.WRITE, b"OK\0")
    assert guest.ask(Kind.WRITE, b"memory/target\0" + b"1") == (Kind.ERROR, b"EACCES\0")
    assert guest.ask(Kind.READ, f"{DOMAINS}/{services.domid}\0".encode()) == (Kind.ERROR, b"EACCES\0")
    services.set_memory(32 << 20)
    assert guest.ask(Kind.READ, b"memory/target\0") == (Kind.READ, b"32768")
    services.shutdown("reboot")
    assert guest.ask(Kind.READ, b"control/shutdown\0") == (Kind.READ, b"reboot")
    services.close()


def test_the_ring_outlives_the_stores_process(process: Process) -> None:
    services, domain = make(process)
    guest = RingUser(domain)
    assert guest.ask(Kind.WRITE, b"data/key\0value")[1] == b"OK\0"
    process.stop()
    process.start()
    assert guest.ask(Kind.READ, b"data/key\0") == (Kind.READ, b"value")
    services.close()


def test_numbers_are_given_back(process: Process) -> None:
    first, _ = make(process)
    second, _ = make(process)
    assert (first.domid, second.domid) == (1, 2)
    with pytest.raises(TransientError, match="already"):
        XenServices(XenStore(process.folder / "socket"), MEMORY, domid=2)
    first.close()
    first.close()
    with XenStore(process.folder / "socket") as store:
        assert "1" not in store.ls("/local/domain")
        again, _ = make(process)
        assert again.domid == 1
        # A process that died without a word
        store.write("/local/domain/5/name", "ghost")
        store.write(f"{DOMAINS}/5", str(dead_process()))
        # … and one whose number another process has now
        store.write("/local/domain/6/name", "ghost")
        store.write(f"{DOMAINS}/6", f"{os.getpid()} {int(start_time(os.getpid())) - 1}")
        third, _ = make(process)
        assert third.domid == 3
        assert not store.exists("/local/domain/5/name")
        assert not store.exists("/local/domain/6/name")
        assert store.read("/local/domain/2/name") == "domain2"
    for services in (second, third, again):
        services.close()


def test_a_guest_that_starts_again_finds_its_nodes_as_at_first(process: Process) -> None:
    services, domain = make(process)
    guest = RingUser(domain)
    assert not services.listens()
    assert guest.ask(Kind.WRITE, b"control/feature-poweroff\0" + b"1")[1] == b"OK\0"
    assert guest.ask(Kind.WRITE, b"data/key\0value")[1] == b"OK\0"
    assert services.listens()
    services.shutdown("reboot")
    services.set_memory(32 << 20)
    services.sysrq("s")
    assert guest.ask(Kind.READ, b"control/sysrq\0") == (Kind.READ, b"s")
    assert guest.ask(Kind.WATCH, b"control/shutdown\0token\0")[1] == b"OK\0"
    services.restart()
    domain.host.reset()
    guest = RingUser(domain)
    assert guest.ask(Kind.READ, b"control/shutdown\0") == (Kind.READ, b"")
    assert guest.ask(Kind.READ, b"data/key\0")[0] == Kind.ERROR
    assert guest.ask(Kind.READ, b"memory/target\0") == (Kind.READ, b"65536")
    assert guest.ask(Kind.READ, b"control/sysrq\0") == (Kind.READ, b"")
    assert not services.listens()
    assert guest.ask(Kind.WATCH, b"control/shutdown\0token\0")[1] == b"OK\0", "its watches are gone"
    services.close()


def dead_process() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid
