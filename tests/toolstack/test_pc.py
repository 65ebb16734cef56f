"""A PC that `nonroot create` makes is Xen's: Debian boots by GRUB from IDE, unplugs the disk, and goes on with xvda."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nonroot.testing import boot_images
from tests.acceptance.guests import Console
from tests.needed import need
from tests.toolstack.conftest import Run, until

pytestmark = [pytest.mark.slow, pytest.mark.guest, pytest.mark.timeout(600)]

BOOT = 240.0
"""Seconds for a boot by BIOS and GRUB on a busy machine."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    need("cloud-amd64", "make matrix")
    image = tmp_path / "root.img"
    shutil.copy(boot_images.debian_disk("cloud-amd64"), image)
    yield image
    image.unlink()


def log_in(console: Console) -> None:
    console.expect("login: ", BOOT)
    console.type("root")
    console.shell()


def test_a_pc_unplugs_its_ide_disk_and_has_it_again_after_a_reset(nonroot: Run, disk: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.img"
    more.write_bytes(b"more" * (1 << 18))
    settings = ("memory=160", f"disk=['{disk},raw,hda,w', ',,hdc,cdrom']", "vif=['bridge=lan']")
    outcome = nonroot("create", "name=pc", *settings)
    assert (outcome.status, outcome.err) == (0, "")
    first = [one for one in nonroot("block-list", "--json", "pc").json if not one["cdrom"]]
    assert [(one["vdev"], one["target"], one["state"]) for one in first] == [("hda", str(disk), "initialising")]
    domid = nonroot("domid", "pc").out
    with Console("pc") as console:
        log_in(console)
        assert "/dev/xvda1" in console.sh("mount")
        assert console.sh("ls /sys/block | grep -v loop | tr '\\n' ' '").split() == ["sr0", "xvda"]
        assert "eth0" in console.sh("ls /sys/class/net")
        assert [one["state"] for one in nonroot("block-list", "--json", "pc").json if not one["cdrom"]] == ["connected"]
        assert "cannot be opened" not in console.sh("echo kept > /root/file; sync; dmesg")
        # A disk that comes, and stays when the guest resets its PC; firmware has the IDE disk again then.
        assert nonroot("block-attach", "pc", f"{more},raw,xvdb,w").status == 0
        until(lambda: console.sh("ls /sys/block/xvdb 2> /dev/null", status=None))
        assert console.sh("head -c 8 /dev/xvdb") == "moremore"
        console.type("reboot")
        log_in(console)
        assert nonroot("domid", "pc").out == domid
        assert console.sh("cat /root/file; head -c 4 /dev/xvdb") == "kept\nmore"
        assert "/dev/xvda1" in console.sh("mount")
        assert "eth0" in console.sh("ls /sys/class/net")
        # It hears XenStore now.
        assert nonroot("sysrq", "--json", "pc", "h").json["by"] == "xenstore"
        until(lambda: "sysrq: HELP" in console.sh("dmesg"))
        assert nonroot("shutdown", "-w", "--timeout", "120", "--json", "pc").json["by"] == "xenstore"
