"""Debian's GRUB for PVH domains, as Xen's users start systems from a disk: it finds kernel and root on Xen's disk."""

from pathlib import Path

import pytest

from nonroot.errors import SoftwareMissingError
from nonroot.guests.packages import package
from tests.acceptance.guests import Console, domains, ramdisk, root_disk, until, xl
from tests.needed import need

pytestmark = [pytest.mark.guest, pytest.mark.slow, pytest.mark.timeout(600)]

IMAGE = "usr/lib/grub-xen/grub-i386-xen_pvh.bin"
MENU = """\
set timeout=60
menuentry "Debian" {
    linux /boot/vmlinuz console=hvc0 quiet cryptomgr.notests
    initrd /boot/initrd
}
"""


def test_grub_boots_debian_from_a_paravirtual_disk(runtime: Path, tmp_path: Path) -> None:
    try:
        grub = package("grub-xen-host") / IMAGE
    except SoftwareMissingError as error:
        pytest.skip(str(error))
    guest = need("cloud-amd64")
    files = {
        "boot/vmlinuz": guest.kernel.read_bytes(),
        "boot/initrd": ramdisk(guest, tmp_path / "initrd").read_bytes(),
        "boot/grub/grub.cfg": MENU.encode(),
    }
    image = root_disk(guest, tmp_path / "root.img", tmp_path / "tree", files=files)
    config = tmp_path / "grub.cfg"
    config.write_text(f"kernel = '{grub}'; type = 'pvh'; memory = 192\ndisk = ['{image},raw,xvda,w']\n")
    xl("create", config)
    with Console("grub") as console:
        console.expect("Debian")
        console.key("c")
        console.expect("grub> ")
        console.key("ls (xen/xvda)/boot\r")
        console.expect("vmlinuz")
        console.expect("grub> ")
        console.key("\x1b")
        console.expect("Debian")
        console.key("\r")
        console.shell()
        assert console.sh("cat /sys/hypervisor/type; cat /proc/mounts | grep ' / '").startswith("xen\n/dev/xvda / ext4")
        assert xl("shutdown", "-w", "--timeout", "120", "--json", "grub").json["by"] == "xenstore"
        until(lambda: "grub" not in domains())
