"""Debian's kernels with their root on Xen's disk, as PVH and as HVM: used, rebooted, saved, restored, found
intact, shut down, clean.
"""

import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.acceptance.guests import Console, domains, ramdisk, root_disk, until, xl
from tests.needed import need

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """\
name = "{name}"
type = "{kind}"
kernel = "{kernel}"
ramdisk = "{ramdisk}"
extra = "quiet cryptomgr.notests"
memory = 160
disk = [ '{image},raw,xvda,w' ]
"""
CASES = [
    ("cloud-amd64", "pvh", r"Booting (paravirtualized )?kernel on Xen PVH\n"),
    ("cloud-amd64", "hvm", r"Booting (paravirtualized )?kernel on Xen HVM\n"),
    ("686-pae", "hvm", r"Booting (paravirtualized )?kernel on Xen HVM\n"),
]
TROUBLE = re.compile(r"Oops|BUG:|WARNING:|Call Trace|Unable to handle|soft lockup|clocksource.*unstable|EXT4-fs error")


@pytest.mark.parametrize(("flavour", "kind", "mark"), CASES, ids=["cloud-amd64 PVH", "cloud-amd64 HVM", "686-pae HVM"])
def test_the_root_is_written_rebooted_found_intact_and_clean(
    runtime: Path, tmp_path: Path, flavour: str, kind: str, mark: str
) -> None:
    for tool in ("mke2fs", "e2fsck", "debugfs"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} on this machine")
    guest = need(flavour)
    image = root_disk(guest, tmp_path / "root.img", tmp_path / "tree")
    config = tmp_path / f"{flavour}-{kind}.cfg"
    initrd = ramdisk(guest, tmp_path / "initrd")
    config.write_text(CONFIG.format(name=config.stem, kind=kind, kernel=guest.kernel, ramdisk=initrd, image=image))
    name = config.stem
    assert xl("create", config).err == ""
    first = domains()[name]
    with Console(name) as console:
        console.shell()
        # Xen is found and used.
        messages = console.sh("dmesg")
        assert re.search(mark, messages)
        assert "Xen version 4.17" in messages
        assert "Xen: using vcpuop timer interface" in messages
        assert not TROUBLE.search(messages)
        assert console.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") == "xen"
        assert re.search(r"[1-9]\d* +xen-percpu +-virq +timer0", console.sh("cat /proc/interrupts"))
        assert console.sh("cat /proc/consoles").startswith("hvc0")
        assert console.sh("cat /proc/mounts | grep ' / '").startswith("/dev/xvda / ext4 rw")
        # Through a reboot.
        told = console.sh("dd if=/dev/urandom of=/root/first bs=64k count=128 2> /dev/null; sha256sum /root/first")
        assert xl("reboot", "-w", "--timeout", "120", "--json", name).json["by"] == "xenstore"
        console.shell()
        assert domains()[name]["domid"] > first["domid"]
        assert domains()[name]["uuid"] == first["uuid"]
        assert console.sh("sha256sum /root/first") == told
        assert not TROUBLE.search(console.sh("dmesg"))
        assert "recovery" not in console.sh("dmesg")
    # Through a file.
    number = domains()[name]["domid"]
    xl("save", name, tmp_path / "saved")
    assert name not in domains()
    xl("restore", tmp_path / "saved")
    assert domains()[name]["domid"] != number
    assert domains()[name]["uuid"] == first["uuid"]
    with Console(name, replay=False) as console:
        assert console.sh("sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum /root/first") == told
        assert not TROUBLE.search(console.sh("dmesg"))
        # To its end.
        told = console.sh("dd if=/dev/urandom of=/root/second bs=64k count=64 2> /dev/null; sha256sum /root/second")
        assert xl("shutdown", "-w", "--timeout", "120", "--json", name).json["by"] == "xenstore"
        until(lambda: name not in domains())
    check = subprocess.run(["e2fsck", "-fn", image], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout
    assert "recover" not in check.stdout
    data = subprocess.run(["debugfs", "-R", "cat /root/second", image], capture_output=True, check=True).stdout
    assert hashlib.sha256(data).hexdigest() == told.split()[0]
