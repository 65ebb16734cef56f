"""Disks and CDs for the boot matrix, built without root from Debian's packages and the fetched kernels."""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from nonroot.boot.cpio import Cpio
from nonroot.guests import Guest
from nonroot.guests.busybox import applets
from nonroot.guests.packages import package

__all__ = ["debian_disk", "grub_cd", "isolinux_cd", "missing_tools"]

MIB = 1 << 20
SECTOR = 512
FIRST_SECTOR = 2048
GRUB = "usr/lib/grub/i386-pc"
DISK_MODULES = ("ata_piix", "sd_mod", "ext4", "crc32c_generic")
EXT4_FEATURES = "none,has_journal,ext_attr,dir_index,filetype,extent,sparse_super,large_file,flex_bg,extra_isize"
"""What GRUB 2.06 and every kernel of the matrix read."""

STAGE_1 = """\
#!/bin/sh
# Loads the disk's drivers, then goes on from the disk.
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod /lib/$module; done
tries=0
while [ ! -b /dev/sda1 ] && [ $tries -lt 200 ]; do sleep 0.1; tries=$((tries + 1)); done
mount -t ext4 /dev/sda1 /mnt || { echo "stage 1: there is no root file system"; exec sh; }
umount /proc
mount -o move /dev /mnt/dev
exec switch_root /mnt /sbin/init
"""

INITTAB = """\
::sysinit:/etc/rc
ttyS0::respawn:/sbin/getty -L 115200 ttyS0 vt100
tty1::respawn:/sbin/getty 38400 tty1
::ctrlaltdel:/sbin/reboot
::shutdown:/bin/umount -a -r
"""
RC = """\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -o remount,rw /
hostname disk
echo "root file system: $(grep -c . /etc/boots 2>/dev/null || echo 0) boots before"
date +%s >> /etc/boots
sync
"""


def missing_tools() -> list[str]:
    """Programs of the host that disks are built with and that it lacks."""
    return [tool for tool in ("mke2fs", "dpkg-deb") if shutil.which(tool, path=_path()) is None]


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _run(*command: str | Path, libraries: Sequence[Path] = ()) -> None:
    environment = {**os.environ, "PATH": _path(), "LC_ALL": "C"}
    if libraries:
        environment["LD_LIBRARY_PATH"] = ":".join(map(str, libraries))
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr}"


# ── modules ──


def _modules(guest: Guest, wanted: Iterable[str]) -> list[Path]:
    """The files of kernel modules and of those that they depend on, in the order of loading; built-in ones are left."""
    assert guest.modules is not None
    files = {path.stem.replace("-", "_"): path for path in guest.modules.rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        path = files.get(name.replace("-", "_"))
        if path is None or path in order:
            return
        data = path.read_bytes()
        at = data.find(b"\0depends=") + 9
        if at > 8:
            for other in data[at : data.index(b"\0", at)].decode().split(","):
                add(other)
        # ext4 asks for its checksum by an alias, at run time.
        order.append(path)

    for name in wanted:
        add(name)
    return order


def stage_1(guest: Guest, busybox: bytes) -> bytes:
    """An initramfs that mounts the disk's first partition and goes on there."""
    archive = Cpio()
    for folder in ("bin", "dev", "lib", "mnt", "proc"):
        archive.directory(folder)
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, mode=0o666)
    archive.file("bin/busybox", busybox, mode=0o755)
    for name in ("sh", "mount", "umount", "insmod", "sleep", "cat", "echo", "switch_root"):
        archive.symlink(f"bin/{name}", "busybox")
    files = _modules(guest, DISK_MODULES)
    for path in files:
        archive.file(f"lib/{path.name}", path.read_bytes())
    archive.file("modules", "".join(f"{path.name}\n" for path in files).encode())
    archive.file("init", STAGE_1.encode(), mode=0o755)
    return archive.finish()


# ── disks ──


def debian_disk(target: Path, guest: Guest, size: int = 160 * MIB) -> Path:
    """A disk that GRUB boots: one ext4 partition with Debian's kernel and a small system with a login."""
    assert guest.initrd is not None
    busybox = (guest.initrd.parents[1] / "bin/busybox").read_bytes()
    root = target.with_suffix(".root")
    for folder in ("bin", "boot/grub", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp"):
        (root / folder).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(busybox)
    (root / "bin/busybox").chmod(0o755)
    for name in applets(busybox):
        if name not in ("busybox", "linuxrc"):
            (root / "bin" / name).symlink_to("busybox")
    for name in ("init", "getty", "reboot", "poweroff"):
        (root / "sbin" / name).symlink_to("../bin/busybox")
    (root / "etc/inittab").write_text(INITTAB)
    (root / "etc/rc").write_text(RC)
    (root / "etc/rc").chmod(0o755)
    (root / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\ntty:x:5:\n")
    (root / "etc/profile").write_text("export PATH=/bin:/sbin\n")
    (root / "etc/securetty").write_text("ttyS0\ntty1\n")
    (root / "etc/issue").write_text("\\n from an ext4 disk\n")
    shutil.copy(guest.kernel, root / "boot/vmlinuz")
    (root / "boot/initrd").write_bytes(stage_1(guest, busybox))
    (root / "boot/grub/grub.cfg").write_text(
        "set timeout=1\n"
        "menuentry 'Debian from the disk' {\n"
        "  linux /boot/vmlinuz root=/dev/sda1 console=tty0 console=ttyS0,115200 cryptomgr.notests panic=-1\n"
        "  initrd /boot/initrd\n"
        "}\n"
    )
    partition = target.with_suffix(".ext4")
    blocks = str((size - FIRST_SECTOR * SECTOR) // 1024)
    _run("mke2fs", "-q", "-F", "-t", "ext4", "-O", EXT4_FEATURES, "-E", "root_owner=0:0", "-d", root, partition, blocks)
    core = target.with_suffix(".core")
    _grub_image(
        core,
        "i386-pc",
        "(hd0,msdos1)/boot/grub",
        ("biosdisk", "part_msdos", "ext2", "linux", "normal", "configfile", "echo", "test"),
    )
    _assemble(target, core, partition, size)
    shutil.rmtree(root)
    partition.unlink()
    core.unlink()
    return target


def _assemble(target: Path, core: Path, partition: Path, size: int) -> None:
    """Boot sector, GRUB's core in the gap behind it, one partition at 1 MiB."""
    boot = bytearray((package("grub-pc-bin") / GRUB / "boot.img").read_bytes())
    # A jump that boot.img has for floppies of bad BIOSes becomes two NOPs, as grub-bios-setup does it for disks.
    boot[0x66:0x68] = b"\x90\x90"
    sectors = size // SECTOR - FIRST_SECTOR
    boot[446:462] = struct.pack("<B3sB3sII", 0x80, b"\x20\x21\x00", 0x83, b"\xff\xff\xff", FIRST_SECTOR, sectors)
    boot[462:512] = bytes(48) + b"\x55\xaa"
    image = core.read_bytes()
    assert len(image) <= (FIRST_SECTOR - 1) * SECTOR
    with target.open("wb") as disk:
        disk.write(boot)
        disk.write(image)
        disk.seek(FIRST_SECTOR * SECTOR)
        with partition.open("rb") as source:
            shutil.copyfileobj(source, disk, MIB)
        disk.truncate(size)


def _grub_image(target: Path, platform: str, prefix: str, modules: Iterable[str]) -> None:
    tool = package("grub-common") / "usr/bin/grub-mkimage"
    folder = package("grub-pc-bin") / GRUB
    _run(tool, "-d", folder, "-O", platform, "-p", prefix, "-o", target, *modules)


# ── CDs ──


def _xorriso(*arguments: str | Path) -> None:
    libraries = [
        package(name) / "usr/lib/x86_64-linux-gnu" for name in ("libisoburn1", "libburn4", "libisofs6", "libjte2")
    ]
    _run(package("xorriso") / "usr/bin/xorriso", "-as", "mkisofs", *arguments, libraries=libraries)


def isolinux_cd(target: Path, guest: Guest, initrd: Path, append: str) -> Path:
    """A CD on which ISOLINUX boots a kernel."""
    folder = target.with_suffix(".cd")
    (folder / "isolinux").mkdir(parents=True)
    shutil.copy(package("isolinux") / "usr/lib/ISOLINUX/isolinux.bin", folder / "isolinux")
    shutil.copy(package("syslinux-common") / "usr/lib/syslinux/modules/bios/ldlinux.c32", folder / "isolinux")
    (folder / "isolinux/isolinux.cfg").write_text(
        f"SERIAL 0 115200\nDEFAULT linux\nLABEL linux\n  KERNEL /vmlinuz\n  INITRD /initrd\n  APPEND {append}\n"
    )
    shutil.copy(guest.kernel, folder / "vmlinuz")
    shutil.copy(initrd, folder / "initrd")
    boot = ("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat", "-no-emul-boot", "-boot-load-size", "4")
    _xorriso("-quiet", "-o", target, *boot, "-boot-info-table", folder)
    shutil.rmtree(folder)
    return target


def grub_cd(target: Path, files: dict[str, Path], config: str) -> Path:
    """A CD on which GRUB runs ``config``; ``files`` lie in its root."""
    folder = target.with_suffix(".cd")
    (folder / "boot").mkdir(parents=True)
    for name, source in files.items():
        shutil.copy(source, folder / name)
    (folder / "boot/grub.cfg").write_text(config)
    modules = ("biosdisk", "iso9660", "normal", "multiboot", "linux16", "linux", "echo", "gzio")
    _grub_image(folder / "boot/grub.img", "i386-pc-eltorito", "/boot", modules)
    boot = ("-b", "boot/grub.img", "-no-emul-boot", "-boot-load-size", "4", "-boot-info-table")
    _xorriso("-quiet", "-o", target, *boot, folder)
    shutil.rmtree(folder)
    return target
