"""Saved, restored and forked domains that have Xen's disks and network cards."""

import contextlib
import os
import random
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot import BadFileError, Domain, UnsupportedError
from nonroot.backends.drive import Drive
from nonroot.backends.overlay import OverlayImage
from nonroot.backends.raw import RawImage
from nonroot.domain.networks import Network
from nonroot.domain.saved_devices import (
    SavedCard,
    SavedDevices,
    SavedDisk,
    SavedMedium,
    put_layer,
    read_layer,
)
from nonroot.errors import BadOptionError
from nonroot.guests import cached
from nonroot.hvm.device import StateError
from nonroot.saved.container import Reader, Writer
from nonroot.saved.fields import Fields

ROUND = int(os.environ.get("NONROOT_SOAK_ROUND", "0"))
MIB = 1 << 20


# ── records ──


def test_records_are_what_they_were(tmp_path: Path) -> None:
    disk = SavedDisk("xvda", 51712, Drive.parse("/a,,b.img,overlay,format=raw"), False, 4, 1 << 20, (5, 6), "xvda")
    card = SavedCard(2, Network.parse("user,mac=00:16:3e:00:00:01,isolated,loopback", ["127.0.0.1:80:8080/udp"]), 2)
    lab = SavedCard(0, Network.parse("lab,ip=10.9.0.1/24"), 6)
    medium = SavedMedium("disk0", Drive.parse("/c.img,ro"), 512, (512, 1))
    saved = SavedDevices((disk,), (card, lab), (medium,))
    assert SavedDevices.from_json(Fields("devices", saved.to_json())) == saved
    with pytest.raises(BadFileError, match="has been changed since the domain was saved"):
        saved.check_images()


@pytest.mark.parametrize(
    "damage",
    [
        {"number": -1}, {"number": "1"}, {"state": 7}, {"identity": [1]}, {"identity": [1, -1]}, {"size": 1 << 60},
        {"drive": ""}, {"drive": "/a,nonsense"}, {"drive": "x" * 9000}, {"vdev": 5}, {"cdrom": 1},
    ],
)  # fmt: skip
def test_records_that_cannot_be(damage: dict[str, object]) -> None:
    disk = SavedDisk("xvda", 51712, Drive.parse("/a"), False, 4, 1 << 20, (5, 6)).to_json()
    with pytest.raises((StateError, BadOptionError)):
        SavedDevices.from_json(Fields("devices", {"disks": [disk | damage], "cards": [], "media": []}))
    with pytest.raises(StateError, match="two devices"):
        SavedDevices.from_json(Fields("devices", {"disks": [disk, disk], "cards": [], "media": []}))


def overlay(tmp_path: Path, size: int = 3 * MIB + 512) -> OverlayImage:
    image = tmp_path / "below.img"
    image.write_bytes(os.urandom(size))
    return OverlayImage(RawImage(str(image), read_only=True), str(tmp_path))


def test_overlays_are_saved(tmp_path: Path) -> None:
    image = overlay(tmp_path)
    chance = random.Random(4)
    for _ in range(40):
        image.write(chance.randrange(0, image.size - 9000), chance.randbytes(chance.randrange(1, 9000)))
    image.write(image.size - 300, bytes(300))  # the last cluster, which ends with the image
    before = image.read(0, image.size)
    with Writer(tmp_path / "saved") as writer:
        put_layer(writer, "xvd7", image)
    with Reader(tmp_path / "saved") as reader:
        again = OverlayImage.adopt(RawImage(image_path(image), read_only=True), *read_layer(reader, "xvd7", image.size))
        with pytest.raises(StateError, match="larger than its disk"):
            read_layer(reader, "xvd7", 4096)
    copied = OverlayImage.adopt(RawImage(image_path(image), read_only=True), *image.copy_layer(str(tmp_path)))
    assert again.read(0, image.size) == before
    assert copied.read(0, image.size) == before
    again.write(5000, b"other")
    assert image.read(0, image.size) == before == copied.read(0, image.size)
    for one in (image, again, copied):
        one.close()


def image_path(image: OverlayImage) -> str:
    assert isinstance(image.base, RawImage)
    return image.base.path


# ── guests ──


def formatted(path: Path, size: int = 32 * MIB) -> Path:
    tool = shutil.which("mkfs.ext4") or shutil.which("mkfs.ext4", path="/usr/sbin:/sbin")
    if tool is None:
        pytest.skip("mkfs.ext4 is not installed (package e2fsprogs)")
    if cached("cloud-amd64") is None:
        pytest.skip("Debian's cloud-amd64 kernel has not been fetched (make guests)")
    with path.open("wb") as file:
        file.truncate(size)
    subprocess.run([tool, "-q", "-F", str(path)], check=True)
    return path


def check_file_system(path: Path) -> None:
    """After its journal, if there is one to be done."""
    tool = shutil.which("e2fsck") or shutil.which("e2fsck", path="/usr/sbin:/sbin") or ""
    for _ in range(2):
        subprocess.run([tool, "-p", str(path)], check=False, stdout=subprocess.DEVNULL)
    subprocess.run([tool, "-fn", str(path)], check=True, stdout=subprocess.DEVNULL)


def out(domain: Domain, script: str) -> str:
    return domain.run(["sh", "-c", script], check=True, timeout=60).stdout


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[tuple[Domain, Path]]:
    image = formatted(tmp_path / "a.img")
    with Domain(memory="128M", disks=[image], networks=["lab,ip=10.9.0.1/24"], flavour="cloud-amd64") as domain:
        out(domain, "mkdir /mnt; mount /dev/xvda /mnt; echo one > /mnt/file")
        yield domain, image


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_disks_and_cards_go_on(mounted: tuple[Domain, Path], tmp_path: Path) -> None:
    domain, image = mounted
    assert out(domain, "cat /mnt/file") == "one\n"
    domain.save(tmp_path / "a.saved", stay=True)
    domain.destroy()
    engines = ("interpret", "auto", "auto")
    for number, engine in enumerate(engines):
        # Its number as Xen's domain is another each time, and paths that it knows have the first.
        with Domain.restore(tmp_path / "a.saved", engine=engine) as restored:
            assert out(restored, f"echo {number} >> /mnt/file; sync; wc -l < /mnt/file").strip() == f"{number + 2}"
            assert "10.9.0.1" in out(restored, "ifconfig eth0")
            (disk,), (card,) = restored.disks(), restored.networks()
            assert (disk["image"], disk["state"], card["network"]) == (str(image), "connected", "lab")
            restored.save(tmp_path / "a.saved", stay=True)
    with Domain.restore(tmp_path / "a.saved") as restored:
        second = formatted(tmp_path / "b.img")
        restored.add_disk(second, "xvdb")
        out(restored, "until [ -b /dev/xvdb ]; do usleep 10000; done; mount /dev/xvdb /tmp; umount /tmp")
        out(restored, "umount /mnt")
        restored.shutdown()
    check_file_system(image)


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_image_that_was_changed_is_refused(mounted: tuple[Domain, Path], tmp_path: Path) -> None:
    domain, _ = mounted
    domain.save(tmp_path / "a.saved")  # and it goes on
    with pytest.raises(BadFileError, match="is locked|is used|in use"):
        Domain.restore(tmp_path / "a.saved").start()
    out(domain, "echo more >> /mnt/file; sync")
    domain.destroy()
    with pytest.raises(BadFileError, match="has been changed since the domain was saved"):
        Domain.restore(tmp_path / "a.saved").start()


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nobody_forks_a_domain_that_writes_to_an_image(mounted: tuple[Domain, Path]) -> None:
    domain, _ = mounted
    with pytest.raises(UnsupportedError, match="with ,overlay"):
        domain.fork()
    with pytest.raises(UnsupportedError, match="fork it instead"):
        domain.snapshot()
    assert out(domain, "cat /mnt/file") == "one\n"


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_forks_have_disks_and_addresses_of_their_own(tmp_path: Path) -> None:
    image = formatted(tmp_path / "a.img")
    before = image.read_bytes()
    options = {"memory": "128M", "flavour": "cloud-amd64", "networks": ["lab,ip=10.9.0.1/24"]}
    with contextlib.ExitStack() as stack:
        parent = stack.enter_context(Domain(disks=[f"{image},overlay"], **options))  # type: ignore[arg-type]
        out(parent, "mkdir /mnt; mount /dev/xvda /mnt; echo one > /mnt/file; sync")
        children = [stack.enter_context(child) for child in parent.fork(2)]
        for number, child in enumerate(children):
            out(child, f"echo child {number} > /mnt/file; sync; echo 3 > /proc/sys/vm/drop_caches")
        grandchild = stack.enter_context(children[1].fork())
        everybody = [parent, *children, grandchild]
        assert [out(one, "cat /mnt/file") for one in everybody] == ["one\n", "child 0\n", "child 1\n", "child 1\n"]
        addresses = [one.networks()[0]["mac"] for one in everybody]
        assert len(set(addresses)) == 4
        for one, address in zip(everybody, addresses, strict=True):
            assert address in out(one, "cat /sys/class/net/eth0/address")
        assert "10.9.0.1" in out(parent, "ifconfig eth0")
        assert "10.9.0.1" not in out(children[0], "ifconfig eth0")
        grandchild.save(tmp_path / "a.saved", stay=True)
        restored = stack.enter_context(Domain.restore(tmp_path / "a.saved", engine="interpret"))
        assert out(restored, "cat /mnt/file; umount /mnt; mount /dev/xvda /mnt; cat /mnt/file") == 2 * "child 1\n"
    assert image.read_bytes() == before


WRITER = """
cd /mnt; n=0
while :; do
  n=$((n + 1)); i=$((n % 12))
  dd if=/dev/urandom of=data bs=16k count=$((i + 1)) 2>/dev/null
  (md5sum < data; cat data) > new; mv new file.$i; [ $((n % 3)) = 0 ] && sync
  echo $n > count
done
"""
CHECK = """
cd /mnt; echo 3 > /proc/sys/vm/drop_caches
for file in file.*; do
  [ "$(head -n 1 $file)" = "$(tail -n +2 $file | md5sum)" ] || echo WRONG $file
done
"""


def cycles(domain: Domain, folder: Path, count: int, chance: random.Random) -> Domain:
    """Save and restore a domain that writes, so many times; the last one."""
    for number in range(count):
        time.sleep(chance.random() * 0.15)
        domain.save(folder / "w.saved", stay=True)
        domain.destroy()
        engine = "interpret" if number % 10 == 9 else "auto"
        domain = Domain.restore(folder / "w.saved", engine=engine, console=False).start()
    return domain


def write_and_check(folder: Path, count: int, chance: random.Random) -> None:
    image = formatted(folder / "w.img")
    domain = Domain(memory="96M", disks=[image], flavour="cloud-amd64", console=False).start()
    try:
        out(domain, "mkdir /mnt; mount /dev/xvda /mnt")
        writer = f"({WRITER.strip()}) > /dev/null 2>&1 < /dev/null &"
        out(domain, f"{writer}\necho $! > /tmp/writer")
        domain = cycles(domain, folder, count, chance)
        done = int(out(domain, "cat /mnt/count"))
        deadline = time.monotonic() + 60
        while int(out(domain, "cat /mnt/count")) <= done + 2:  # it is still at work
            assert time.monotonic() < deadline, "the guest's writer stands still"
        out(domain, "kill $(cat /tmp/writer); sleep 1")
        assert out(domain, CHECK) == ""
        assert out(domain, "dmesg | grep -i -E 'error|blocked for|corrupt' || true") == ""
        out(domain, "umount /mnt")
    finally:
        domain.destroy()
    tool = shutil.which("e2fsck") or shutil.which("e2fsck", path="/usr/sbin:/sbin") or ""
    subprocess.run([tool, "-fn", str(image)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_disk_that_is_being_written(tmp_path: Path) -> None:
    write_and_check(tmp_path, 12, random.Random(11))


@pytest.mark.soak
@pytest.mark.guest
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("batch", range(10))
def test_a_thousand_times_with_a_disk(tmp_path: Path, batch: int) -> None:
    write_and_check(tmp_path, 100, random.Random(1000 * ROUND + batch))


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_boots_with_cards_are_kept(tmp_path: Path) -> None:
    formatted(tmp_path / "a.img")  # or else the test is skipped
    options = {"memory": "96M", "networks": ["lab,ip=10.9.0.1/24", "lab"], "kept": True}
    options |= {"append": f"test.mark={tmp_path.name}-{os.getpid()}", "flavour": "cloud-amd64"}
    addresses, origins = [], []
    for _ in range(3):
        with Domain(**options) as domain:  # type: ignore[arg-type]
            shown = out(domain, "cat /sys/class/net/eth0/address; ifconfig eth0")
            addresses.append(domain.networks()[0]["mac"])
            assert shown.startswith(addresses[-1])
            assert "10.9.0.1" in shown
            origins.append(domain.origin)
    assert origins == ["fresh", "kept", "kept"]
    assert len(set(addresses)) == 3
    with contextlib.ExitStack() as stack:
        one, two = (stack.enter_context(Domain(**options)) for _ in range(2))  # type: ignore[arg-type]
        out(two, "ifconfig eth0 10.9.0.2")
        assert "1 packets received" in out(one, "ping -c 1 -w 10 10.9.0.2")
