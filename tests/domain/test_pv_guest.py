"""Debian's kernel in whole domains with Xen's disks and networks, as users start them."""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import nonroot
from tests.backends.test_user_network import free_port
from tests.needed import need
from tests.waiting import wait_until

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _linux() -> None:
    need("cloud-amd64")


def test_a_disk_is_written_booted_again_found_and_clean(tmp_path: Path) -> None:
    if shutil.which("mke2fs") is None:
        pytest.skip("there is no mke2fs on this machine")
    image, second = tmp_path / "root.img", tmp_path / "second.img"
    image.touch()
    os.truncate(image, 64 * MIB)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True)
    second.write_bytes(os.urandom(MIB))
    with nonroot.Domain(flavour="cloud-amd64", disks=[image]) as domain:
        assert domain.description["protocol"] == "pvh"
        assert domain.run(["cat", "/proc/consoles"]).stdout.startswith("hvc0")
        (disk,) = domain.disks()
        assert (disk["vdev"], disk["state"], disk["bytes"]) == ("xvda", "connected", 64 * MIB)
        write = "mount -t ext4 /dev/xvda /mnt; dd if=/dev/urandom of=/mnt/random bs=64k count=99; sha256sum /mnt/random"
        told = domain.run(write, check=True).stdout.split()[0]
        # A disk that is added, grows and goes while the guest runs.
        assert domain.add_disk(second) == "xvdb"
        wait_until(lambda: domain.run("test -b /dev/xvdb").returncode == 0)
        assert domain.run("sha256sum < /dev/xvdb").stdout.split()[0] == hashlib.sha256(second.read_bytes()).hexdigest()
        os.truncate(second, 2 * MIB)
        domain.resize_disk("xvdb")
        wait_until(lambda: domain.run("cat /sys/block/xvdb/size").stdout == "4096\n")
        domain.remove_disk("xvdb")
        wait_until(lambda: len(domain.disks()) == 1)
        # Nothing is unmounted: the end of the guest does it.
        assert domain.shutdown().reason == "poweroff"
    check = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    assert "recover" not in check.stdout
    command = "mount -t ext4 -o ro /dev/xvda /mnt; sha256sum /mnt/random; echo x > /dev/xvda || echo refused"
    result = subprocess.run(
        [sys.executable, "-m", "nonroot", "run", "--json", "--disk", f"{image},ro", "--", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=False,
    )
    record = json.loads(result.stdout)
    assert record["status"] == 0, result.stderr
    assert record["stdout"].split()[0] == told
    assert record["stdout"].endswith("refused\n")


def test_a_network_with_dhcp_a_published_port_and_a_shutdown() -> None:
    data = os.urandom(8 * MIB)
    server = socket.create_server(("127.0.0.1", 0))
    published = free_port()

    def serve() -> None:
        with server, server.accept()[0] as peer:
            peer.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    with nonroot.Domain(networks=["user,loopback,mac=00:16:3e:00:00:42"], publish=[f"{published}:7000"]) as domain:
        (card,) = domain.networks()
        assert card["publish"] == [f"127.0.0.1:{published}:7000"]
        taken = nonroot.Domain(publish=[f"{published}:7000"])
        with pytest.raises(nonroot.BadOptionError, match=rf"port {published} of 127\.0\.0\.1 cannot be published"):
            taken.start()
        address = domain.run("cat /sys/class/net/eth0/address; ip -4 -o addr show eth0; cat /etc/resolv.conf").stdout
        assert address.startswith("00:16:3e:00:00:42\n")
        assert "inet 10.0.2.15/24" in address
        assert "nameserver 10.0.2.3" in address
        got = domain.run(f"nc 10.0.2.2 {server.getsockname()[1]} < /dev/null | sha256sum", timeout=100).stdout
        assert got.split()[0] == hashlib.sha256(data).hexdigest()
        listener = domain.popen("echo from the guest | nc -l -p 7000; sleep 1000")
        answer = b""
        for _ in range(100):  # until its nc listens, connections are closed at once
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", published), timeout=20) as peer:
                answer = peer.makefile("rb").readline()
            if answer:
                break
            time.sleep(0.1)
        assert answer == b"from the guest\n"
        # The guest's kernel is told to power off, and its PID 1 is our agent: it does not wait for the command.
        began = time.monotonic()
        assert domain._client.request("shutdown", 30, how="poweroff") == {"by": "xenstore"}
        assert domain.wait(30).reason == "poweroff"
        assert time.monotonic() - began < 10
        with pytest.raises(nonroot.DomainStoppedError):
            listener.wait(10)


def test_two_domains_on_a_private_network() -> None:
    name = f"lab-{os.getpid()}"
    with (
        nonroot.Domain(networks=[f"{name},ip=10.9.0.1/24"], memory="128M") as one,
        nonroot.Domain(networks=[f"{name},ip=10.9.0.2/24"], memory="128M") as two,
    ):
        one.wait_ready()
        assert "1 packets received" in two.run("ping -c 1 -w 20 10.9.0.1").stdout
        make = "mkdir /www; dd if=/dev/urandom of=/www/data bs=64k count=64 2> /dev/null; httpd -h /www"
        there = one.run(f"{make}; sha256sum < /www/data", check=True).stdout
        assert two.run("wget -q -O - http://10.9.0.1/data | sha256sum", timeout=100).stdout == there
        assert two.run("ping -c 1 -w 2 10.9.0.3").returncode != 0
        one.remove_network(0)
        wait_until(lambda: one.networks() == [])
        # The kernel is told to reboot; for a domain that starts a kernel, that is its end.
        assert two._client.request("shutdown", 30, how="reboot") == {"by": "xenstore"}
        assert two.wait(30).reason == "reset"
