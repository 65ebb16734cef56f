"""The devices of a domain as a whole: added, found, asked to go."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.backends.drive import Drive
from nonroot.backends.link import link_pair
from nonroot.backends.xenbus import XenbusState
from nonroot.domain.pv_devices import PvDevices
from nonroot.errors import BadOptionError, NotRunningError
from nonroot.xenstore.client import XenStore
from tests.backends.frontend import BlockFront, Guest, xenstore
from tests.backends.test_block import ABI64
from tests.waiting import wait_until


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("xenstore")
    with xenstore(folder):
        yield folder / "socket"


def test_a_disk_comes_is_used_and_goes(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    guest = Guest()
    with XenStore(place) as store, XenStore(place) as toolstack:
        devices = PvDevices(store, guest)
        disk = devices.add_disk("xvda", Drive.parse(str(image)))
        with pytest.raises(BadOptionError, match="there is a disk xvda already"):
            devices.add_disk("xvda", Drive.parse(str(image)))
        with pytest.raises(NotRunningError, match="there is no disk xvdb"):
            devices.resized("xvdb")
        wait_until(lambda: disk.state is XenbusState.INIT_WAIT)
        front = BlockFront(guest, ABI64)
        for key, value in {**front.keys(), "state": "3"}.items():
            toolstack.write(f"{disk.backend.frontend}/{key}", value)
        wait_until(lambda: disk.state is XenbusState.CONNECTED)
        front.write(0, b"paravirtual".ljust(512))
        devices.remove("vbd", 51712)
        wait_until(lambda: toolstack.read(f"{disk.backend.path}/state") == "5")
        assert front.read(0, 512).startswith(b"paravirtual")  # until the guest lets go, the disk works
        toolstack.write(f"{disk.backend.frontend}/state", "6")
        wait_until(lambda: devices.devices() == [])
        assert not guest.mapped
        assert toolstack.read(f"{disk.backend.path}/state") is None
        assert toolstack.read(f"{disk.backend.frontend}/state") is None
        devices.add_disk("xvda", Drive.parse(str(image)))  # its lock is free again
        devices.close()
    assert image.read_bytes().startswith(b"paravirtual")


def test_cards_get_the_lowest_free_number(place: Path) -> None:
    guest = Guest()
    with XenStore(place) as store:
        devices = PvDevices(store, guest)
        ends = [link_pair() for _ in range(3)]
        cards = [devices.join(ours) for ours, _ in ends[:2]]
        assert [card.number for card in cards] == [0, 1]
        wait_until(lambda: cards[0].state is XenbusState.INIT_WAIT)
        devices.remove("vif", 0)
        wait_until(lambda: len(devices.devices()) == 1)
        assert devices.join(ends[2][0]).number == 0
        with pytest.raises(NotRunningError, match="no vif 7"):
            devices.remove("vif", 7)
        devices.close()
        for _, theirs in ends:
            assert theirs.recv(10) == b""
            theirs.close()
