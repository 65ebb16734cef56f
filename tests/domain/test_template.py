"""Domains' processes that are forks of a template, without guests."""

import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.domain.child import Child, Template
from nonroot.domain.wire import VERSION, WireDecoder, pack_json
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    made = Template()
    yield made
    made._ours.shutdown(socket.SHUT_RDWR)


def started(template: Template) -> tuple[Child, socket.socket]:
    ours, theirs = socket.socketpair()
    output = os.memfd_create("output")
    with theirs:
        child = template.start(theirs, output)
    os.close(output)
    assert child is not None
    return child, ours


def hello(control: socket.socket) -> dict[str, object]:
    control.settimeout(60)
    control.sendall(pack_json({"id": 1, "method": "hello", "params": {}}))
    decoder = WireDecoder()
    while True:
        data = control.recv(4096)
        assert data, "it has ended"
        for message in decoder.feed(data):
            return dict(message.record["result"])


def test_each_is_a_process_of_its_own_that_ends_with_its_client(template: Template) -> None:
    first, one = started(template)
    second, other = started(template)
    assert hello(one) == {"version": VERSION, "pid": first.pid}
    assert hello(other) == {"version": VERSION, "pid": second.pid}
    assert first.pid != second.pid
    assert first.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.wait(0.01)
    one.close()
    assert first.wait(60) == 0
    assert second.poll() is None
    second.send_signal(signal.SIGKILL)
    assert second.wait(60) == -signal.SIGKILL
    second.send_signal(signal.SIGKILL)  # nobody else's process is hit
    other.close()


def test_it_has_the_present_environment(template: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(prefix="nr-") as folder:  # the paths of sockets are short
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        child, control = started(template)
        with control:
            control.sendall(pack_json({"id": 1, "method": "register", "params": {"name": "templates"}}))
            wait_until(lambda: (Path(folder) / "nonroot" / "templates.json").exists())
        assert child.wait(60) == 0


def test_without_a_template_there_are_no_processes_of_it() -> None:
    template = Template()
    child, control = started(template)
    hello(control)
    assert template._process is not None
    template._process.kill()
    assert child.wait(60) == -signal.SIGKILL
    assert not template.usable
    ours, theirs = socket.socketpair()
    assert template.start(theirs, 1) is None  # a program of its own is started instead
    for sock in (ours, theirs, control):
        sock.close()
