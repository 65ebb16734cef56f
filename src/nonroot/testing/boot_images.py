"""Disks and CDs that boot Debian's kernels, built without root from Debian's packages: for tests.

A disk has one ext4 partition with busybox as its userland, and GRUB; a CD has ISOLINUX. Both reach a login on the first
serial port (``root``, no password). Images are kept in the user's cache: take an overlay, or a copy, of what they give.
"""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from nonroot.errors import SoftwareMissingError
from nonroot.guests import Guest, cache, fetch, initramfs
from nonroot.guests.busybox import applets
from nonroot.guests.packages import package
from nonroot.testing.modules import modules_archive

__all__ = ["debian_cd", "debian_disk", "grub_disk", "isolinux_cd", "mbr", "run_tool"]

RECIPE: Final = "4"
"""Changes whenever an image made of the same software would be another."""
MIB: Final = 1 << 20
SECTOR: Final = 512
PARTITION_START: Final = MIB
DISK_SIZE: Final = 192 * MIB
LINUX_PARTITION: Final = 0x83
BOOT_CODE: Final = 440
GRUB_MODULES: Final = (
    *("biosdisk", "part_msdos", "ext2", "normal", "linux", "serial", "terminal", "configfile", "echo", "test"),
    *("reboot", "halt", "ls", "cat", "minicmd", "vga_text"),
)
ROOT_MODULES: Final = ("ata_piix", "sd_mod", "sr_mod", "crc32c_generic", "ext4", "xen-blkfront", "xen-netfront")
CD_MODULES: Final = ("ata_piix", "sd_mod", "sr_mod", "isofs")

INITRAMFS_INIT: Final = """\
#!/bin/sh
# Finds the root file system that the kernel's command line names, and goes there: in a Xen domain, sda1 is xvda1.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for word in $(cat /proc/cmdline); do
    case "$word" in root=*) root="${word#root=}" ;; esac
done
sh /etc/load-modules
n=0
while [ ! -b "$root" ] && [ $n -lt 100 ]; do
    xen="/dev/xvd${root#/dev/sd}"
    [ -b "$xen" ] && root="$xen" || sleep 0.1
    n=$((n + 1))
done
mount -t ext4 -o rw "$root" /mnt || exec sh
umount /proc /sys
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
"""
CD_INIT: Final = """\
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
sh /etc/load-modules
exec init
"""
ETC: Final = {
    "etc/inittab": """\
::sysinit:/etc/init.d/rcS
ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
""",
    "etc/init.d/rcS": """\
#!/bin/sh
mount -t proc proc /proc 2>/dev/null
mount -t sysfs sys /sys 2>/dev/null
mount -t tmpfs tmp /tmp
hostname nonroot
""",
    "etc/passwd": "root::0:0:root:/root:/bin/sh\n",
    "etc/group": "root:x:0:\ntty:x:5:\n",
    "etc/hostname": "nonroot\n",
    "etc/issue": "nonroot test system\n",
    "etc/profile": "export PATH=/bin:/sbin PS1='# '\n",
    "etc/fstab": "/dev/sda1 / ext4 rw 0 1\n",
}
GRUB_CONFIG: Final = """\
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
set timeout=1
set default=0
menuentry "Debian on nonroot" {{
    linux /boot/vmlinuz root=/dev/sda1 console=ttyS0 {append}
    initrd /boot/initrd
}}
"""
ISOLINUX_CONFIG: Final = """\
SERIAL 0 115200
DEFAULT debian
PROMPT 1
TIMEOUT 10
LABEL debian
    KERNEL /boot/vmlinuz
    INITRD /boot/initrd
    APPEND console=ttyS0 {append}
"""
APPEND: Final = "panic=-1 cryptomgr.notests"


# ── tools out of packages ──


def run_tool(command: Sequence[str | os.PathLike[str]], libraries: Sequence[str] = ()) -> None:
    """Run a program; ``libraries``: packages whose shared libraries it may use. SoftwareMissingError if it fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    folders = [os.fspath(package(name) / "usr/lib/x86_64-linux-gnu") for name in libraries]
    folders += [os.fspath(package(name) / "lib/x86_64-linux-gnu") for name in libraries]
    if folders:
        environment["LD_LIBRARY_PATH"] = ":".join(folders)
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if result.returncode:
        said = (result.stderr.strip() or result.stdout.strip() or "it said nothing").splitlines()[-1]
        raise SoftwareMissingError(f"{Path(command[0]).name} failed: {said}")


def _mke2fs() -> Path:
    found = shutil.which("mke2fs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    return Path(found) if found else package("e2fsprogs") / "sbin/mke2fs"


# ── parts ──


def _tree(folder: Path, files: dict[str, bytes], busybox: bytes) -> None:
    """A root file system with busybox under all its names."""
    for name in ("bin", "boot", "dev", "etc/init.d", "lib", "mnt", "proc", "root", "run", "sys", "tmp", "usr", "var"):
        (folder / name).mkdir(parents=True)
    for link, target in (("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin")):
        (folder / link).symlink_to(target)
    (folder / "bin/busybox").write_bytes(busybox)
    (folder / "bin/busybox").chmod(0o755)
    for name in applets(busybox):
        if name != "busybox":
            (folder / "bin" / name).symlink_to("busybox")
    for name, data in {**{k: v.encode() for k, v in ETC.items()}, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755 if name.endswith("rcS") else 0o644)


def _busybox(guest: Guest) -> bytes:
    root = guest.kernel.parents[1]
    return next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.is_file()).read_bytes()


def _modules(guest: Guest, names: Sequence[str]) -> bytes:
    """The archive of those of ``names`` that are modules of this kernel."""
    assert guest.modules is not None
    there = {path.name.partition(".")[0] for path in guest.modules.rglob("*.ko*")}
    return modules_archive(guest.modules, [name for name in names if name in there])


def mbr(boot_code: bytes, start: int, length: int, signature: int = 0x6E6F6E72) -> bytes:
    """A master boot record with one active Linux partition; ``start`` and ``length`` in bytes."""
    beyond_chs = b"\xfe\xff\xff"
    entry = struct.pack("<B3sB3sII", 0x80, beyond_chs, LINUX_PARTITION, beyond_chs, start // SECTOR, length // SECTOR)
    record = boot_code[:BOOT_CODE].ljust(BOOT_CODE, b"\0") + struct.pack("<IH", signature, 0) + entry
    return record.ljust(510, b"\0") + b"\x55\xaa"


def grub_disk(image: Path, tree: Path, size: int = DISK_SIZE, label: str = "root") -> None:
    """Write a disk of ``size`` bytes: GRUB, and one ext4 partition with a copy of ``tree``; its files become root's.

    GRUB reads /boot/grub/grub.cfg of the partition.
    """
    modules = package("grub-pc-bin") / "usr/lib/grub/i386-pc"
    with tempfile.TemporaryDirectory(prefix="nonroot-grub-") as folder:
        core = Path(folder) / "core.img"
        run_tool(
            [
                *(package("grub-common") / "usr/bin/grub-mkimage", "-O", "i386-pc", "-d", modules, "-o", core),
                *("-p", "(hd0,msdos1)/boot/grub", *GRUB_MODULES),
            ],
            ["libdevmapper1.02.1"],
        )
        loader = core.read_bytes()
    if len(loader) > PARTITION_START - SECTOR:
        raise SoftwareMissingError(f"GRUB's image of {len(loader)} bytes does not fit before the first partition")
    image.unlink(missing_ok=True)
    with image.open("wb") as file:
        file.truncate(size)
    blocks = (size - PARTITION_START) // 4096
    options = f"offset={PARTITION_START},root_owner=0:0"
    command: list[str | os.PathLike[str]] = [
        _mke2fs(),
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        "4096",
        "-L",
        label,
        "-E",
        options,
        "-d",
        tree,
        image,
    ]
    run_tool([*command, str(blocks)])
    with image.open("r+b") as file:
        file.write(mbr((modules / "boot.img").read_bytes(), PARTITION_START, blocks * 4096))
        file.seek(SECTOR)  # where boot.img looks for it, and where it looks for its own rest
        file.write(loader)


def isolinux_cd(image: Path, tree: Path) -> None:
    """Write an ISO 9660 image of ``tree`` that boots by ISOLINUX, which reads /isolinux/isolinux.cfg."""
    folder = tree / "isolinux"
    folder.mkdir(exist_ok=True)
    shutil.copy(package("isolinux") / "usr/lib/ISOLINUX/isolinux.bin", folder)
    shutil.copy(package("syslinux-common") / "usr/lib/syslinux/modules/bios/ldlinux.c32", folder)
    run_tool(
        [
            *(package("xorriso") / "usr/bin/xorriso", "-as", "mkisofs", "-quiet", "-o", image, "-V", "NONROOT", "-R"),
            *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4"),
            *("-boot-info-table", tree),
        ],
        ["libisoburn1", "libburn4", "libisofs6", "libjte2"],
    )


# ── whole systems ──


UNUSED_SECONDS = 24 * 3600
"""Images that nobody has asked for that long are removed when another one is made."""


@contextmanager
def _kept(name: str, facts: dict[str, str]) -> Iterator[tuple[Path, Path | None]]:
    """(the image's place in the cache, a draft to write if it is not there yet)."""
    key = hashlib.sha256(json.dumps([RECIPE, facts], sort_keys=True).encode()).hexdigest()[:16]
    folder = cache.cache_dir() / "images"
    folder.mkdir(exist_ok=True)
    stem, _, suffix = name.partition(".")
    final = folder / f"{stem}-{key}.{suffix}"
    with cache.locked("images"):
        if final.is_file():
            os.utime(final, ns=(time.time_ns(), final.stat().st_mtime_ns))
            yield final, None
            return
        draft = final.with_suffix(".draft")
        yield final, draft
        for old in folder.glob(f"{stem}-*.{suffix}"):
            if time.time() - old.stat().st_atime > UNUSED_SECONDS:  # or a test may be at work with it
                old.unlink()
        draft.rename(final)


def debian_disk(flavour: str = "amd64", append: str = APPEND, modules: Sequence[str] = ()) -> Path:
    """
    A disk that boots Debian's kernel of ``flavour`` by GRUB to a login on ttyS0. Do not write to it: it is kept.

    ``modules``: loaded beside those that the disk needs, where the kernel has them as modules.
    """
    guest = fetch(flavour)
    facts = {"flavour": flavour, "version": guest.version, "append": append, "modules": " ".join(modules)}
    with _kept(f"disk-{flavour}.img", facts) as (final, draft):
        if draft is not None:
            busybox = _busybox(guest)
            initrd = initramfs.build(busybox, INITRAMFS_INIT) + _modules(guest, [*ROOT_MODULES, *modules])
            files = {
                "boot/vmlinuz": guest.kernel.read_bytes(),
                "boot/initrd": initrd,
                "boot/grub/grub.cfg": GRUB_CONFIG.format(append=append).encode(),
            }
            with tempfile.TemporaryDirectory(prefix="nonroot-disk-") as folder:
                tree = Path(folder) / "root"
                _tree(tree, files, busybox)
                grub_disk(draft, tree)
    return final


def debian_cd(flavour: str = "amd64", append: str = APPEND, modules: Sequence[str] = ()) -> Path:
    """
    A CD that boots Debian's kernel of ``flavour`` by ISOLINUX to a login on ttyS0; its initramfs is its root.

    ``modules`` as for :func:`debian_disk`.
    """
    guest = fetch(flavour)
    facts = {"flavour": flavour, "version": guest.version, "append": append, "modules": " ".join(modules)}
    with _kept(f"cd-{flavour}.iso", facts) as (final, draft):
        if draft is not None:
            busybox = _busybox(guest)
            with tempfile.TemporaryDirectory(prefix="nonroot-cd-") as folder:
                tree = Path(folder) / "cd"
                (tree / "boot").mkdir(parents=True)
                (tree / "isolinux").mkdir()
                (tree / "boot/vmlinuz").write_bytes(guest.kernel.read_bytes())
                archive = initramfs.build(busybox, CD_INIT) + _etc_archive() + _modules(guest, [*CD_MODULES, *modules])
                (tree / "boot/initrd").write_bytes(archive)
                (tree / "isolinux/isolinux.cfg").write_text(ISOLINUX_CONFIG.format(append=append))
                isolinux_cd(draft, tree)
    return final


def _etc_archive() -> bytes:
    from nonroot.boot.cpio import Cpio

    archive = Cpio()
    archive.directory("etc/init.d")
    for name, text in ETC.items():
        archive.file(name, text.encode(), mode=0o755 if name.endswith("rcS") else 0o644)
    return archive.finish()
