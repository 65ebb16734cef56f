"""What Debian's kernel makes of the drives: its own drivers, by DMA, with checksums."""

import hashlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

import nonroot
from nonroot.guests import Guest, cached
from nonroot.testing.modules import STORAGE_MODULES, modules_archive
from tests.storage.parts import pattern

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(300)]

MIB = 1 << 20


@pytest.fixture(scope="module")
def guest() -> Guest:
    found = cached("cloud-amd64")
    if found is None or found.modules is None:
        message = "Debian's cloud-amd64 kernel has not been fetched (make guests)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drives")


@pytest.fixture(scope="module")
def domain(guest: Guest, place: Path) -> Iterator[nonroot.Domain]:
    assert guest.initrd is not None
    assert guest.modules is not None
    initrd = place / "initrd"
    initrd.write_bytes(guest.initrd.read_bytes() + modules_archive(guest.modules, STORAGE_MODULES))
    (place / "disk.img").write_bytes(pattern(16 * MIB))
    (place / "base.img").write_bytes(pattern(8 * MIB, 2))
    (place / "cd.iso").write_bytes(pattern(4 * MIB, 3))
    (place / "other.iso").write_bytes(pattern(2 * MIB, 4))
    with nonroot.Domain(
        kernel=guest.kernel,
        initrd=initrd,
        disks=[place / "disk.img", f"{place / 'base.img'},overlay"],
        cdrom=place / "cd.iso",
        xen=False,  # a Xen's disks would be others
        timeout=200,
    ) as domain:
        # Linux gives disks their letters in the order in which it gets to know them: links have our order.
        domain.run(
            "set -e; sh /etc/load-modules; n=0; cd /sys/bus/scsi/devices; "
            "until test -b /dev/sda -a -b /dev/sdb -a -b /dev/sr0 -o $n = 20; do sleep 0.2; n=$((n + 1)); done; "
            "ln -s $(ls 0:0:0:0/block) /dev/disk; ln -s $(ls 0:0:1:0/block) /dev/layered",
            check=True,
        )
        yield domain


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def guest_sha256(domain: nonroot.Domain, device: str) -> str:
    domain.run("echo 3 > /proc/sys/vm/drop_caches", check=True)
    return domain.run(["sha256sum", device], check=True).stdout.split()[0]


def test_linux_uses_dma(domain: nonroot.Domain) -> None:
    log = domain.run("dmesg | grep -E 'ata[12]'").stdout
    assert "PATA max MWDMA2 cmd 0x1f0 ctl 0x3f6" in log
    assert "NONROOT HARDDISK" in log
    assert "ATAPI: NONROOT CD-ROM" in log
    assert "exception" not in log
    assert "failed" not in log


def test_reads_are_exact(domain: nonroot.Domain) -> None:
    before = domain.stats.exits["PortIo"]
    assert guest_sha256(domain, "/dev/disk") == sha256(pattern(16 * MIB))
    assert domain.stats.exits["PortIo"] - before < 5000, "that was not DMA"
    assert guest_sha256(domain, "/dev/layered") == sha256(pattern(8 * MIB, 2))
    assert guest_sha256(domain, "/dev/sr0") == sha256(pattern(4 * MIB, 3))


def test_writes_reach_the_file(domain: nonroot.Domain, place: Path) -> None:
    domain.run("dd if=/dev/layered of=/dev/disk bs=64k count=32 seek=7 conv=fsync", check=True)
    expected = bytearray(pattern(16 * MIB))
    expected[7 << 16 : (7 + 32) << 16] = pattern(8 * MIB, 2)[: 2 * MIB]
    assert (place / "disk.img").read_bytes() == expected, "after the guest's fsync it is in the file"
    assert guest_sha256(domain, "/dev/disk") == sha256(bytes(expected))


def test_the_overlay_keeps_the_image(domain: nonroot.Domain, place: Path) -> None:
    domain.run("dd if=/dev/zero of=/dev/layered bs=4k count=100 conv=fsync", check=True)
    assert guest_sha256(domain, "/dev/layered") == sha256(bytes(409600) + pattern(8 * MIB, 2)[409600:])
    assert (place / "base.img").read_bytes() == pattern(8 * MIB, 2)


def test_a_locked_image(domain: nonroot.Domain, place: Path) -> None:
    second = nonroot.Domain(flavour="cloud-amd64", disks=[place / "disk.img"])
    with pytest.raises(nonroot.BadFileError, match=rf"in use by .*process {domain.pid} "):
        second.start()


def test_the_cd_is_changed(domain: nonroot.Domain, place: Path) -> None:
    assert domain.eject()
    assert domain.run("dd if=/dev/sr0 of=/dev/null count=1").returncode != 0
    domain.insert(place / "other.iso")
    assert guest_sha256(domain, "/dev/sr0") == sha256(pattern(2 * MIB, 4))
    with pytest.raises(nonroot.BadFileError, match="does not exist"):
        domain.insert(place / "nowhere.iso")


def test_a_full_host_disk_is_an_io_error(domain: nonroot.Domain, place: Path) -> None:
    """The host gives the domain's process no room behind 12 MiB of a file: as with a full disk, writes there fail."""
    before = (place / "disk.img").read_bytes()
    _, most = resource.prlimit(domain.pid, resource.RLIMIT_FSIZE)
    write = "dd if=/dev/zero of=/dev/disk bs=4k count=4 conv=fsync,notrunc seek="
    resource.prlimit(domain.pid, resource.RLIMIT_FSIZE, (12 * MIB, most))
    try:
        failed = domain.run(f"{write}3328", timeout=120)
        domain.run(f"{write}256", check=True)
    finally:
        resource.prlimit(domain.pid, resource.RLIMIT_FSIZE, (most, most))
    assert failed.returncode != 0
    assert "error" in failed.stderr.lower()
    expected = bytearray(before)
    expected[MIB : MIB + 16384] = bytes(16384)
    assert (place / "disk.img").read_bytes() == expected, "what was there before stays"
    domain.run(f"{write}3328", check=True)
    expected[13 * MIB : 13 * MIB + 16384] = bytes(16384)
    assert (place / "disk.img").read_bytes() == expected
    assert guest_sha256(domain, "/dev/disk") == sha256(bytes(expected))


def test_a_failing_disk_is_an_io_error(domain: nonroot.Domain, place: Path) -> None:
    os.truncate(place / "disk.img", 15 * MIB)
    domain.run("echo 3 > /proc/sys/vm/drop_caches", check=True)
    result = domain.run("dd if=/dev/disk of=/dev/null bs=64k skip=240 count=1", timeout=120)
    assert result.returncode != 0
    assert "error" in result.stderr
    assert domain.run("dd if=/dev/disk bs=64k count=1 | sha256sum").stdout.split()[0] == sha256(pattern(65536))


def test_the_floppy_driver(place: Path) -> None:
    """The cloud kernel has none: this one is the amd64 kernel's, which finds the drive in the CMOS memory."""
    guest = cached("amd64")
    if guest is None or guest.modules is None or guest.initrd is None:
        pytest.skip("Debian's amd64 kernel has not been fetched")
    initrd, image = place / "initrd-floppy", place / "floppy.img"
    initrd.write_bytes(guest.initrd.read_bytes() + modules_archive(guest.modules, ("floppy",)))
    content = bytearray(pattern(1_474_560, 5))
    image.write_bytes(content)
    with nonroot.Domain(kernel=guest.kernel, initrd=initrd, floppy=image, timeout=200) as domain:
        domain.run(["sh", "/etc/load-modules"], check=True)
        assert "fd0 is 1.44M" in domain.run(["dmesg"]).stdout
        assert guest_sha256(domain, "/dev/fd0") == sha256(bytes(content))
        domain.run("dd if=/dev/zero of=/dev/fd0 bs=512 count=40 seek=30 conv=notrunc,fsync", check=True)
        content[30 * 512 : 70 * 512] = bytes(40 * 512)
        assert image.read_bytes() == content
        assert guest_sha256(domain, "/dev/fd0") == sha256(bytes(content))
