"""The small Linux userland around a static busybox, as an initramfs."""

from nonroot.boot.cpio import Cpio
from nonroot.guests.busybox import applets

__all__ = ["INIT", "RECIPE", "build"]

RECIPE = "1"
"""Changes whenever :func:`build` would make something else of the same busybox; cached archives are then made anew."""

INIT = """\
#!/bin/sh
# PID 1 where no command is given: a shell on the console; its end powers the machine off.
export PATH=/bin HOME=/root TERM="${TERM:-linux}" PS1='# '
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/pts
mount -t devpts devpts /dev/pts
mount -t tmpfs tmp /tmp
hostname nonroot
ifconfig lo 127.0.0.1 2>/dev/null
echo "nonroot: $(uname -sr) is up"
cd /root
setsid cttyhack sh -l
poweroff -f
"""

_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/tmp:/bin/sh\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hostname": "nonroot\n",
    "etc/hosts": "127.0.0.1 localhost nonroot\n",
    "etc/profile": "export PATH=/bin HOME=/root\n",
    "etc/shells": "/bin/sh\n",
}
_FOLDERS = ("bin", "dev", "etc", "lib", "mnt", "proc", "root", "run", "sys", "usr", "var")
_LINKS = {
    "sbin": "bin",
    "usr/bin": "../bin",
    "usr/sbin": "../bin",
    "var/run": "../run",
    "var/tmp": "../tmp",
    "linuxrc": "bin/busybox",
}


def build(busybox: bytes, init: str = INIT) -> bytes:
    """A newc archive with ``/init``, busybox under all its names, a console node and the usual folders.

    The same input gives the same bytes.
    """
    archive = Cpio()
    for name in _FOLDERS:
        archive.directory(name)
    archive.directory("tmp", mode=0o1777)
    archive.device("dev/console", 5, 1, mode=0o600)  # the kernel opens it before /init mounts anything
    archive.device("dev/null", 1, 3, mode=0o666)
    for name, text in _FILES.items():
        archive.file(name, text.encode())
    for name, target in _LINKS.items():
        archive.symlink(name, target)
    archive.file("bin/busybox", busybox, mode=0o755)
    for name in applets(busybox):
        if name not in ("busybox", "linuxrc"):
            archive.symlink(f"bin/{name}", "busybox")
    archive.file("init", init.encode(), mode=0o755)
    return archive.finish()
