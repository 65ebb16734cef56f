"""Networks between domains."""

import os
import socket
import threading
from pathlib import Path

import pytest

from nonroot.backends.frame import Frame
from nonroot.backends.link import Link
from nonroot.backends.switch import ADDRESSES_PER_PORT, Switch, join_network
from nonroot.errors import BadOptionError
from tests.backends.ethernet import Host
from tests.waiting import wait_until


def mac(number: int) -> bytes:
    return b"\x02\x00" + number.to_bytes(4, "big")


def test_domains_of_a_network_talk_and_others_do_not_hear(tmp_path: Path) -> None:
    a = Host(Link(join_network(tmp_path, "lan")), mac(1), "192.168.7.1")
    b = Host(Link(join_network(tmp_path, "lan")), mac(2), "192.168.7.2")
    c = Host(Link(join_network(tmp_path, "lan")), mac(3), "192.168.7.3")
    other = Host(Link(join_network(tmp_path, "other")), mac(4), "192.168.7.2")
    thread = threading.Thread(target=b.accept, args=(80, lambda data: b"got " + data))
    thread.start()
    assert a.exchange("192.168.7.2", 80, b"a request") == b"got a request"
    thread.join()
    # The third one saw the two questions of ARP, which are for everybody, and nothing of the talk.
    for _ in range(2):
        assert next(c.frames()).data[12:14] == b"\x08\x06"
    with pytest.raises(TimeoutError):
        next(c.frames(0.1))
    with pytest.raises(TimeoutError):
        next(other.frames(0.1))
    for host in (a, b, c, other):
        host.close()


def test_superframes_pass_whole(tmp_path: Path) -> None:
    a, b = Link(join_network(tmp_path, "lan")), Link(join_network(tmp_path, "lan"))
    frame = Frame(mac(2) + mac(1) + b"\x08\0" + os.urandom(65000), 3, 1, 1448)
    a.send(frame)
    host = Host(b)
    assert next(host.frames()) == frame
    a.close()
    b.close()


def test_the_switch_ends_with_its_last_port_and_can_start_again(tmp_path: Path) -> None:
    def is_there() -> bool:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(tmp_path / "lan.switch"))
        except ConnectionRefusedError:
            return False
        return True

    port = join_network(tmp_path, "lan", linger=0.05)
    assert is_there()
    port.close()
    wait_until(lambda: not is_there(), pause=0.2)  # each look is a port for a moment
    again = join_network(tmp_path, "lan", linger=0.05)
    assert is_there()
    again.close()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 32, "-a"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadOptionError, match="is no name for a network"):
        join_network(tmp_path, name)


def ports(count: int) -> tuple[Switch, list[Link]]:
    switch, ends = Switch(), []
    for _ in range(count):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        switch.add(Link(ours))
        ends.append(Link(theirs))
    return switch, ends


def test_a_port_that_floods_addresses_evicts_only_its_own() -> None:
    switch, (a, b, c) = ports(3)
    switch.forward(2, Frame(b"\xff" * 6 + mac(7) + b"\x88\xb5").pack())
    for number in range(1000, 1000 + 5 * ADDRESSES_PER_PORT):
        switch.forward(1, Frame(mac(0) + mac(number) + b"\x88\xb5").pack())
        while b.receive() or c.receive():
            pass
    assert len(switch._where) == ADDRESSES_PER_PORT + 1
    while a.receive():
        pass
    switch.forward(3, Frame(mac(7) + mac(8) + b"\x88\xb5").pack())
    assert b.receive() is not None
    assert a.receive() is None
    for link in (a, b, c):
        link.close()
    for number in list(switch.ports):
        switch.remove(number)
    assert switch._where == {}


def test_a_port_that_takes_nothing_loses_frames_and_nobody_else_does() -> None:
    switch, (a, b, c) = ports(3)
    frame = Frame(b"\xff" * 6 + mac(1) + b"\x88\xb5" + bytes(60_000)).pack()
    for _ in range(400):
        switch.forward(1, frame)
        while c.receive() is not None:
            pass
    assert switch.ports[2].dropped > 0
    assert switch.ports[3].dropped == 0
    for link in (a, b, c):
        link.close()
    switch.serve_port(2)
    assert 2 not in switch.ports
    for number in list(switch.ports):
        switch.remove(number)
