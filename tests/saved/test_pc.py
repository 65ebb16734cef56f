"""Saved, restored and forked PCs: firmware, emulated drives, and disks that are emulated and Xen's in turn."""

import contextlib
import time
from pathlib import Path

import pytest

from nonroot import BadFileError, Domain, UnsupportedError
from nonroot.testing import boot_images
from tests.needed import need
from tests.platform.test_domain import SPIN, UNTIL_POWER_BUTTON, image

MIB = 1 << 20


def made(path: Path, size: int = MIB) -> Path:
    path.write_bytes(bytes(size))
    return path


def test_media_stay_where_they_are(tmp_path: Path) -> None:
    names = ("a.img", "a.iso", "b.iso", "a.floppy", "b.floppy")
    disk, first, second, floppy, other = (made(tmp_path / name, 1_474_560) for name in names)
    bios = image(tmp_path, UNTIL_POWER_BUTTON)
    saved = tmp_path / "a.saved"
    options = {"memory": "16M", "fetch": False, "timeout": 30, "xen": False}
    with Domain(firmware=bios, disks=[disk], cdrom=first, floppy=[floppy, "none"], **options) as domain:  # type: ignore[arg-type]
        domain.console.expect("1", 30)
        domain.insert(second, "cd0")
        domain.insert(f"{other},ro", "fd1")
        domain.eject("fd0")
        with pytest.raises(UnsupportedError, match="with ,overlay"):
            domain.fork()
        with pytest.raises(UnsupportedError, match="fork it instead"):
            domain.snapshot()
        domain.save(saved, stay=True)
    first.unlink()  # nobody needs it any more
    floppy.unlink()
    for _ in range(2):
        with Domain.restore(saved, timeout=30) as domain:
            with pytest.raises(BadFileError, match="lock|use"):
                Domain(firmware=bios, disks=[disk], **options).start()  # type: ignore[arg-type]
            domain.eject("cd0")
            domain.insert(second, "cd0")
            domain.press_power_button()
            assert domain.wait(30).reason == "poweroff"
    second.write_bytes(b"\1" * 2048)
    with pytest.raises(BadFileError, match=r"b\.iso has been changed since the domain was saved"):
        Domain.restore(saved, timeout=30).start()


def test_a_pc_starts_again_after_a_restore(tmp_path: Path) -> None:
    saved = tmp_path / "a.saved"
    with Domain(firmware=image(tmp_path, SPIN), memory="16M", fetch=False, timeout=30) as domain:
        domain.console.expect("1", 30)
        domain.save(saved, stay=True)
    with Domain.restore(saved, timeout=30) as domain, domain.fork() as child:
        for one in (domain, child):
            one.reset()
            one.console.expect("2", 30)
            one.reset()
            assert one.wait(30).reason == "poweroff"


@pytest.mark.guest
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("xen", [True, False], ids=["Xen", "IDE"])
def test_debian_from_its_disk_at_moments_of_its_boot(tmp_path: Path, xen: bool) -> None:
    need("686-pae", "make matrix")
    disk = boot_images.debian_disk("686-pae", modules=("button", "evdev"))
    saved = tmp_path / "a.saved"
    device = "xvda1" if xen else "sda1"
    with contextlib.ExitStack() as stack:
        domain = stack.enter_context(Domain(disks=[f"{disk},overlay"], boot="c", memory="256M", xen=xen))
        domain.console.expect("Linux version 6", 180)
        for _ in range(4):
            time.sleep(0.8)
            domain.save(saved, stay=True)
            domain.destroy()
            domain = stack.enter_context(Domain.restore(saved))
        domain.console.expect("login: ", 180)
        domain.console.write("root\n")
        domain.console.expect("# ", 60)
        domain.console.write("echo hello > /root/file; sync; cat /proc/mounts; echo do''ne\n")
        domain.console.expect("done", 60)
        assert f"/dev/{device} / ext4 rw" in domain.console.text
        child = stack.enter_context(domain.fork())
        domain.save(saved, stay=True)
        domain.destroy()
        domain = stack.enter_context(Domain.restore(saved, engine="interpret"))
        for number, one in enumerate((domain, child)):
            one.console.write(f"echo 3 > /proc/sys/vm/drop_caches; echo {number} >> /root/file; cat /root/file\n")
            one.console.expect(f"hello\r\n{number}\r\n", 60)
        child.console.write("reboot\n")
        child.console.expect("login: ", 300)
