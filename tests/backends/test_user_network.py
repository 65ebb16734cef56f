"""libslirp in its process, with a guest that is Python."""

import contextlib
import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nonroot.backends.helper import Helper
from nonroot.backends.link import Link
from nonroot.backends.slirp import Forward, UserNetwork, start_user_network
from nonroot.errors import BadOptionError
from tests.backends.ethernet import Host


@contextmanager
def guest(network: UserNetwork) -> Iterator[tuple[Host, Helper]]:
    sock, helper = start_user_network(network)
    host = Host(Link(sock))
    try:
        yield host, helper
    finally:
        host.close()
        assert helper.close() == 0


def free_port() -> int:
    """A port that nobody has. Usually below those that the kernel gives out, so that nobody gets it meanwhile."""
    for port in random.sample(range(10_000, 32_000), 1000):
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port
    raise AssertionError("a thousand ports are taken")


def one_connection(serve: object) -> tuple[int, threading.Thread]:
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener, listener.accept()[0] as peer:
            serve(peer)  # type: ignore[operator]

    thread = threading.Thread(target=run)
    thread.start()
    return listener.getsockname()[1], thread


def test_dhcp_arp_tcp_and_udp_reach_this_machine_where_that_is_allowed() -> None:
    data = os.urandom(300_000)
    got = bytearray()

    def serve(peer: socket.socket) -> None:
        while part := peer.recv(65536):
            got.extend(part)
        peer.sendall(data)

    port, thread = one_connection(serve)
    with guest(UserNetwork(host_loopback=True, hostname="guest")) as (host, helper):
        assert helper.facts["unconfined"] == []
        options = host.dhcp()
        assert host.address == "10.0.2.15"
        assert options[1] == b"\xff\xff\xff\x00"
        assert options[3] == b"\x0a\x00\x02\x02"
        assert options[6] == b"\x0a\x00\x02\x03"
        assert options[12] == b"guest"
        received = host.exchange("10.0.2.2", port, data[::-1])
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
        assert host.superframes  # what came in was merged
        # A superframe of the guest's is one frame, and goes through.
        thread.join()
        assert bytes(got) == data[::-1]
        echo = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with echo:
            echo.bind(("127.0.0.1", 0))
            echo.settimeout(30)
            answering = threading.Thread(
                target=lambda: echo.sendto(*(lambda m: (m[0][::-1], m[1]))(echo.recvfrom(2000)))
            )
            answering.start()
            assert host.udp("10.0.2.2", echo.getsockname()[1], b"datagram") == b"margatad"
            answering.join()


def test_superframes_of_the_guest_pass() -> None:
    got = bytearray()

    def serve(peer: socket.socket) -> None:
        while part := peer.recv(65536):
            got.extend(part)

    port, thread = one_connection(serve)
    data = os.urandom(200_000)
    with guest(UserNetwork(host_loopback=True)) as (host, _):
        host.dhcp()
        host.exchange("10.0.2.2", port, data, size=30_000)
        thread.join()
    assert bytes(got) == data


def test_this_machines_loopback_is_out_of_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, guest(UserNetwork()) as (host, _):
        listener.settimeout(0.3)
        host.dhcp()
        with pytest.raises((AssertionError, TimeoutError), match="refused|no frame"):
            host.exchange("10.0.2.2", listener.getsockname()[1], b"hello", seconds=0.3)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_published_port_leads_to_the_guest() -> None:
    port = free_port()
    with guest(UserNetwork(publish=[Forward.parse(f"127.0.0.1:{port}:22")])) as (host, _):
        host.dhcp()
        thread = threading.Thread(target=host.accept, args=(22, lambda data: data.upper()))
        thread.start()
        with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
            peer.sendall(b"hello, guest")
            assert peer.recv(100) == b"HELLO, GUEST"
        thread.join()


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(
            BadOptionError, match=f"port {port} of 127.0.0.1 cannot be published: address already in use"
        ):
            start_user_network(UserNetwork(publish=[Forward.parse(f"{port}:22")]))


@pytest.mark.parametrize(
    "text", ["", "22", "1:2:3", "127.0.0.1:0:22", "127.0.0.1:70000:22", "::1:22:22", "a:1:2", "1:2/sctp"]
)
def test_what_publishes_no_port(text: str) -> None:
    with pytest.raises(BadOptionError, match="publishes no port"):
        Forward.parse(text)


def test_garbage_does_not_end_the_process() -> None:
    with guest(UserNetwork(host_loopback=True)) as (host, helper):
        host.dhcp()
        for length in (0, 3, 18, 60, 1500, 65600):
            for fill in (b"\0", b"\xff", b"\x45"):
                host.link.send_message(
                    (b"\0\0\0\0" + host.mac + host.mac + b"\x08\0" + fill * length)[: length + 4] or b"x"
                )
        assert helper.process.poll() is None
        host.neighbours.clear()
        assert host.resolve("10.0.2.2")


def test_the_process_cannot_open_files_or_start_programs() -> None:
    """The confinement itself, in a process of its own."""
    code = """
import os, socket, subprocess
from nonroot.confine import NETWORK, PLAIN, confine
import sys
assert not confine(NETWORK if sys.argv[1] == "network" else PLAIN, ["/etc/hostname"]).missing
def refused(what):
    try: what()
    except (PermissionError, BlockingIOError): return True
    return False
open("/etc/hostname").close()
assert refused(lambda: open("/etc/passwd"))
assert refused(lambda: open("/tmp/nonroot-test", "w"))
assert refused(lambda: os.listdir("/"))
assert refused(lambda: os.execv("/bin/true", ["true"]))
assert refused(os.fork)
assert refused(lambda: os.kill(1, 0))
assert refused(lambda: os.kill(os.getppid(), 0))
assert refused(lambda: socket.socket()) == (sys.argv[1] == "plain")
"""
    for kind in ("network", "plain"):
        subprocess.run([sys.executable, "-c", code, kind], check=True, cwd=Path("/"))
