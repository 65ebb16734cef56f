"""The domain's process by itself: its socket for further clients, and how it ends."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nonroot.domain.wire import Kind, WireDecoder, pack, pack_json


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.socket.settimeout(30)
        self.decoder = WireDecoder()
        self.number = 0
        self.events: list[dict[str, Any]] = []

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.socket.sendall(pack_json({"id": self.number, "method": method, "params": params}))
        while True:
            data = self.socket.recv(65536)
            if not data:
                raise EOFError
            for message in self.decoder.feed(data):
                if message.record.get("id") == self.number:
                    return message.record
                self.events.append(message.record)


class Process:
    def __init__(self, path: Path) -> None:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "nonroot.domain", "--control-fd", str(theirs.fileno()), "--socket", str(path)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        self.primary = Client(ours)
        self.path = path
        self.clients: list[Client] = []

    def connect(self) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        client = Client(sock)
        self.clients.append(client)
        sock.connect(os.fspath(self.path))
        return client


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    made = Process(tmp_path / "socket")
    yield made
    made.primary.socket.close()
    made.process.kill()
    made.process.wait()
    for client in made.clients:
        client.socket.close()


def test_several_clients(process: Process, tmp_path: Path) -> None:
    assert process.primary.ask("hello")["result"]["pid"] == process.process.pid
    assert (tmp_path / "socket").stat().st_mode & 0o077 == 0
    second = process.connect()
    assert second.ask("hello")["result"]["version"] == 1
    second.socket.close()
    assert process.primary.ask("hello")["result"]["version"] == 1
    process.primary.ask("destroy")
    assert process.process.wait(10) == 0
    assert not (tmp_path / "socket").exists()


def test_it_ends_with_its_client(process: Process, tmp_path: Path) -> None:
    second = process.connect() if process.primary.ask("hello") else None
    process.primary.socket.close()
    assert process.process.wait(10) == 0
    assert second is not None
    with pytest.raises((EOFError, OSError)):
        second.ask("hello")
    second.socket.close()


def test_a_detached_one_stays(process: Process, tmp_path: Path) -> None:
    process.primary.ask("detach")
    process.primary.socket.close()
    time.sleep(0.3)
    second = process.connect()
    assert second.ask("hello")["result"]["pid"] == process.process.pid
    process.process.send_signal(signal.SIGTERM)
    assert process.process.wait(10) == 128 + signal.SIGTERM
    assert not (tmp_path / "socket").exists()
    second.socket.close()


@pytest.mark.parametrize(
    "nonsense", [b"\xff" * 100, b"\0\0\0\0", b"\x05\0\0\0\0\xff\xff\xff\xff", pack(Kind.JSON, b"xx")]
)
def test_a_client_that_speaks_nonsense_is_dropped_and_harms_nobody(
    process: Process, tmp_path: Path, nonsense: bytes
) -> None:
    process.primary.ask("hello")
    second = process.connect()
    second.socket.sendall(nonsense)
    assert second.socket.recv(100) == b""
    second.socket.close()
    assert process.primary.ask("hello")["result"]["version"] == 1


def test_mistaken_requests_are_answered_with_errors(process: Process) -> None:
    ask = process.primary.ask
    assert ask("nonsense")["error"]["code"] == "usage"
    assert ask("stats")["error"]["code"] == "not_running"
    assert ask("run", argv=["true"])["error"]["code"] == "not_running"
    assert ask("detach", extra=1)["result"] == {}
    assert ask("create", memory=5)["error"]["code"] == "bad_option"
    assert ask("create", nonsense=5)["error"]["code"] == "bad_option"
    assert ask("create", kernel="/nowhere")["error"]["code"] == "bad_file"
    assert ask("create", memory="x")["error"]["code"] in ("internal", "bad_option")
    assert ask("hello")["result"]["version"] == 1
