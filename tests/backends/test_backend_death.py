"""The backend process of a domain dies: with Debian's kernel, in the middle of writes."""

import hashlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from nonroot.backends.drive import Drive
from nonroot.backends.slirp import UserNetwork
from nonroot.backends.supervisor import MOST_DEATHS
from nonroot.backends.xenbus import XenbusState
from nonroot.hvm.outcome import Reason
from nonroot.xenstore.client import XenStore
from tests.backends.xen_guest import DHCP, WAIT_FOR_DISK, XenGuest
from tests.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.guest]

FILES = 12
WRITER = f"""\
{WAIT_FOR_DISK}
mount -t ext4 /dev/xvda /mnt || leave no mount
for i in $(seq {FILES}); do
    dd if=/dev/urandom of=/mnt/file$i bs=256k count=16 conv=fsync 2>/dev/null || leave file $i
    echo "sum $i $(sha256sum /mnt/file$i | cut -c1-64)"
done
umount /mnt || leave no umount
leave $(dmesg | grep -c -i 'i/o error') errors
"""


def kill(guest: XenGuest) -> None:
    """kill -9 of the process that serves the domain."""
    process = guest.devices.process
    assert process is not None
    pid = process.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_it_dies_again_and_again_during_writes_and_nothing_is_lost(store: XenStore, folder: Path) -> None:
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(96 << 20)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", str(image)], check=True)
    guest = XenGuest(store, folder / "store" / "socket", WRITER)
    guest.devices.add_disk("xvda", Drive.parse(str(image)))
    process = guest.devices.process
    assert process is not None
    seen: list[int] = []

    def killer() -> None:
        for number in range(1, MOST_DEATHS):
            guest.wait_for(f"sum {2 * number} ")
            time.sleep(0.03 * number)  # into the next file's writes
            seen.append(process.replaced)
            kill(guest)
            wait_until(lambda: process.replaced > seen[-1])

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    outcome = guest.run()
    thread.join()
    assert outcome.reason == Reason.POWER_OFF, guest.text()[-2000:]
    assert seen == list(range(MOST_DEATHS - 1))
    assert guest.result() == "0 errors", guest.text()[-3000:]
    check = subprocess.run(["e2fsck", "-fn", str(image)], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    sums = dict(line.split()[1:3] for line in guest.text().splitlines() if line.startswith("sum "))
    assert len(sums) == FILES
    for number, digest in sums.items():
        data = subprocess.run(
            ["debugfs", "-R", f"cat /file{number}", str(image)], capture_output=True, check=True
        ).stdout
        assert hashlib.sha256(data).hexdigest() == digest, f"file {number}"


def test_a_card_goes_on_and_one_that_dies_too_often_closes_its_devices(store: XenStore, folder: Path) -> None:
    script = f"""{DHCP}
echo "up"
for i in $(seq 1000); do ping -c 1 -W 1 10.0.2.2 >/dev/null && echo "pong $i"; sleep 0.1; done
leave end
"""
    guest = XenGuest(store, folder / "store" / "socket", script)
    card = guest.devices.add_card(UserNetwork())
    process = guest.devices.process
    assert process is not None

    def killer() -> None:
        guest.wait_for("pong 2")
        kill(guest)
        wait_until(lambda: process.replaced == 1)
        before = guest.text().count("pong")
        wait_until(lambda: guest.text().count("pong") > before + 3)
        while process.replaced < MOST_DEATHS:
            expected = process.replaced + 1
            kill(guest)
            wait_until(lambda: process.replaced >= expected)  # noqa: B023 - called before it changes
        kill(guest)
        wait_until(lambda: card.state in (XenbusState.CLOSING, XenbusState.CLOSED))
        guest.machine.stop()

    thread = threading.Thread(target=killer, daemon=True)
    thread.start()
    guest.run()
    thread.join()
    assert f"died {MOST_DEATHS + 1} times" in card.backend.failure
