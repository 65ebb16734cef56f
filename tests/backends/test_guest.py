"""Debian's kernel with its own paravirtual drivers: a disk, and a network."""

import contextlib
import hashlib
import os
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nonroot.backends.drive import Drive
from nonroot.backends.slirp import Forward, UserNetwork
from nonroot.backends.switch import join_network
from nonroot.hvm.outcome import Reason
from nonroot.xenstore.client import XenStore
from tests.backends.test_user_network import free_port
from tests.backends.xen_guest import DHCP, WAIT_FOR_DISK, XenGuest

pytestmark = [pytest.mark.slow, pytest.mark.guest]

MEGABYTES = 200
MOST_SECONDS = 150
"""For both transfers; a machine that does nothing else needs a tenth of it."""


def run(guest: XenGuest) -> None:
    outcome = guest.run()
    assert outcome.reason == Reason.POWER_OFF, guest.text()[-2000:]


def test_a_disk_is_written_rebooted_found_intact_and_clean(store: XenStore, folder: Path) -> None:
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True)
    socket_path = folder / "store" / "socket"
    write = f"""{WAIT_FOR_DISK}
mount -t ext4 /dev/xvda /mnt || leave no mount
dd if=/dev/urandom of=/mnt/random bs=64k count=320 conv=fsync 2>/dev/null
sha256sum /mnt/random | cut -c1-64 > /mnt/sum
umount /mnt
leave $(sha256sum /dev/xvda | cut -c1-64)
"""
    first = XenGuest(store, socket_path, write)
    first.devices.add_disk("xvda", Drive.parse(str(image)))
    run(first)
    assert first.result() == hashlib.sha256(image.read_bytes()).hexdigest()
    check = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    second = XenGuest(
        store,
        socket_path,
        f"""{WAIT_FOR_DISK}
mount -t ext4 -o ro /dev/xvda /mnt || leave no mount
[ "$(sha256sum /mnt/random | cut -c1-64)" = "$(cat /mnt/sum)" ] || leave another file
echo x > /dev/xvda && leave read-only disk was written
leave intact
""",
    )
    second.devices.add_disk("xvda", Drive.parse(f"{image},ro"))
    run(second)
    assert second.result() == "intact"


def test_dhcp_transfers_both_ways_and_a_published_port(store: XenStore, folder: Path) -> None:
    data = os.urandom(MEGABYTES << 20)
    got = hashlib.sha256()
    down, up = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))

    seconds: list[float] = []

    def serve() -> None:
        with down, down.accept()[0] as peer:
            began = time.monotonic()
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            peer.recv(1)  # the guest has it all when it closes its end
            seconds.append(time.monotonic() - began)
        with up, up.accept()[0] as peer:
            began = time.monotonic()
            while part := peer.recv(1 << 20):
                got.update(part)
            seconds.append(time.monotonic() - began)

    server = threading.Thread(target=serve)
    server.start()
    published = free_port()
    script = f"""{DHCP}
nc 10.0.2.2 {down.getsockname()[1]} > /tmp/data </dev/null
echo "sum: $(sha256sum /tmp/data | cut -c1-64)"
nc -w 60 10.0.2.2 {up.getsockname()[1]} < /tmp/data
echo hello, host | nc -l -p 7000 > /tmp/word &
echo "listening"
wait
leave $(ifconfig eth0 | grep -o 'inet addr:[0-9.]*') $(cat /tmp/word)
"""
    guest = XenGuest(store, folder / "store" / "socket", script, memory=640 << 20)
    guest.devices.add_card(
        UserNetwork(host_loopback=True, publish=[Forward("127.0.0.1", published, 7000)]), "00:16:3e:00:00:01"
    )
    answers: list[bytes] = []

    def knock() -> None:
        guest.wait_for("listening\n", 200)
        for _ in range(60):  # its nc may not listen yet: then the connection is closed at once
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection(("127.0.0.1", published), timeout=20) as peer,
            ):
                peer.sendall(b"hello, guest\n")
                answers[:] = [peer.makefile("rb").readline()]
            if answers == [b"hello, host\n"]:
                return
            time.sleep(0.5)

    knocker = threading.Thread(target=knock, daemon=True)
    knocker.start()
    run(guest)
    server.join()
    assert f"sum: {hashlib.sha256(data).hexdigest()}" in guest.text()
    assert got.hexdigest() == hashlib.sha256(data).hexdigest()
    assert guest.result() == "inet addr:10.0.2.15 hello, guest"
    assert answers == [b"hello, host\n"]
    print(f"{MEGABYTES} MB to the guest in {seconds[0]:.1f} s, from it in {seconds[1]:.1f} s")
    assert sum(seconds) < MOST_SECONDS, seconds


def test_two_domains_talk_over_a_network_of_their_own(store: XenStore, folder: Path) -> None:
    path = folder / "store" / "socket"
    up = "ifconfig eth0 192.168.9.{} up || leave no card\n"
    server = XenGuest(store, path, up.format(1) + "nc -l -p 80 > /tmp/got\nleave $(sha256sum /tmp/got)")
    other = XenStore(path)
    knock = """\
for i in $(seq 60); do ping -c 1 -W 1 192.168.9.1 >/dev/null && break; done
dd if=/dev/urandom of=/tmp/sent bs=64k count=64 2>/dev/null
for i in $(seq 200); do nc 192.168.9.1 80 < /tmp/sent && break; sleep 0.3; done
leave $(sha256sum /tmp/sent)
"""
    client = XenGuest(other, path, up.format(2) + knock)
    server.devices.join(join_network(folder, "lan"), "00:16:3e:00:00:01")
    client.devices.join(join_network(folder, "lan"), "00:16:3e:00:00:02")
    threads = [threading.Thread(target=run, args=(guest,)) for guest in (server, client)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(client.result()) > 64
    assert client.result().split()[0] == server.result().split()[0]
