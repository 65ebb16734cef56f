"""Domains as a person at the command line has them: made by ``nonroot create``, used by ``nonroot console``."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nonroot.boot.cpio import Cpio
from nonroot.domain import registry
from nonroot.guests import Guest, initramfs
from nonroot.guests.busybox import applets
from nonroot.testing.modules import modules_archive
from nonroot.toolstack.client import Toolstack
from nonroot.xenstore.client import XenStore

MIB = 1 << 20
PATIENCE = 120.0
"""Seconds for what takes a few on an idle machine."""

READER = """stty -echo; dmesg -n 1; echo "rea""dy"; \
while IFS= read -r line; do eval "$line" < /dev/null; echo "<end $?>"; done"""
"""A shell that neither echoes nor edits, and says how each line ended."""

ROOT_INIT = """\
#!/bin/sh
# PID 1 of the disk.
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
mount -o remount,rw /
ifconfig lo 127.0.0.1
cd /root
setsid cttyhack sh -l
"""
ROOT_END = """\
#!/bin/sh
# What the kernel calls when XenStore's control/shutdown says so.
sync
mount -o remount,ro /
exec busybox {verb} -f
"""
TO_ROOT = """\
#!/bin/sh
# From the initramfs to the disk.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
sh /etc/load-modules
n=0
while [ ! -b /dev/xvda ] && [ $n -lt 200 ]; do sleep 0.1; n=$((n + 1)); done
[ -b /dev/xvda ] || echo "there is no disk xvda"
mount -t ext4 -o ro /dev/xvda /mnt || exec sh
umount /proc /sys
mount --move /dev /mnt/dev
exec switch_root /mnt /etc/init
"""


class Outcome:
    """What a command line gave."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def xl(*arguments: str | Path, status: int | None = 0) -> Outcome:
    """``nonroot ARGUMENTS``, in a process of its own; ``status``: what it has to end with, or None."""
    command = [sys.executable, "-P", "-m", "nonroot", *map(str, arguments)]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
        check=False,
    )
    assert status is None or done.returncode == status, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


def until(condition: Callable[[], Any], seconds: float = PATIENCE, what: str = "it did not happen") -> Any:
    """What ``condition`` gives as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def domains() -> dict[str, dict[str, Any]]:
    """All of them, by name."""
    with Toolstack() as toolstack:
        return {one["name"]: one for one in toolstack.request("list")["domains"]}


def dom0_pid() -> int:
    with Toolstack() as toolstack:
        return int(toolstack.request("hello")["pid"])


def destroy_all() -> None:
    for entry in registry.entries():
        xl("destroy", entry.name, status=None)


def store_tree(path: str = "/") -> dict[str, str]:
    """All nodes of XenStore below a path, with what they hold and who may use them."""
    found: dict[str, str] = {}
    with XenStore() as store:
        left = [path]
        while left:
            node = left.pop()
            found[node] = f"{store.read(node)!r} {store.get_permissions(node)}"
            left += [f"{node.rstrip('/')}/{name}" for name in store.ls(node)]
    return found


class Console:
    """``nonroot console DOMAIN``, with a shell at its other end."""

    def __init__(self, domain: str, replay: bool = True) -> None:
        command = [sys.executable, "-P", "-m", "nonroot", "console", *([] if replay else ["--no-replay"]), domain]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._seen = bytearray()
        self._at = 0
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 1 << 16):
            with self._changed:
                self._seen += data
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Leave. The domain goes on."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        self._thread.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def text(self) -> str:
        return self._seen.decode(errors="replace").replace("\r", "")

    def expect(self, pattern: str, seconds: float = PATIENCE) -> re.Match[bytes]:
        """Wait for what matches, after what was waited for before."""
        wanted = re.compile(pattern.encode())
        with self._changed:
            self._changed.wait_for(lambda: wanted.search(self._seen, self._at) or self._ended, seconds)
            found = wanted.search(self._seen, self._at)
            assert found is not None, f"no {pattern!r} in {self.text()[-3000:]}"
            self._at = found.end()
            return found

    def key(self, keys: str) -> None:
        """Type keys, and no more."""
        assert self.process.stdin is not None
        self.process.stdin.write(keys.encode())
        self.process.stdin.flush()

    def type(self, line: str) -> None:
        """Type a line."""
        self.key(f"{line}\n")

    def shell(self) -> Self:
        """Wait for a shell's prompt, and make it one for :meth:`sh`."""
        self.expect("# ")
        self.type(f"exec sh -c '{READER}'")
        self.expect("ready\r?\n")
        return self

    def sh(self, line: str, seconds: float = PATIENCE, status: int | None = 0) -> str:
        """Run one line; its output."""
        begin = self._at
        self.type(line)
        end = self.expect(r"<end (\d+)>\r?\n", seconds)
        output = self._seen[begin : end.start()].decode(errors="replace").replace("\r", "")
        assert status is None or int(end[1]) == status, f"{line!r} ended with {int(end[1])}: {output}"
        return output.strip()


# ── software ──


def busybox(guest: Guest) -> bytes:
    root = guest.kernel.parents[1]
    return next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.is_file()).read_bytes()


def ramdisk(guest: Guest, path: Path, modules: tuple[str, ...] = ("xen-blkfront", "crc32c_generic", "ext4")) -> Path:
    """An initramfs that goes on to an ext4 root on xvda."""
    assert guest.modules is not None
    there = {file.name.partition(".")[0] for file in guest.modules.rglob("*.ko*")}
    drivers = modules_archive(guest.modules, [name for name in modules if name in there])
    path.write_bytes(initramfs.build(busybox(guest), TO_ROOT) + drivers)
    return path


def root_disk(
    guest: Guest, image: Path, folder: Path, size: int = 64 * MIB, files: dict[str, bytes] | None = None
) -> Path:
    """An ext4 file system with busybox, a shell on the console, ends for control/shutdown, and more ``files``."""
    for name, data in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for name in ("bin", "dev", "etc", "mnt", "proc", "root", "sys", "tmp"):
        (folder / name).mkdir(parents=True)
    (folder / "sbin").mkdir()
    program = busybox(guest)
    for name, data in {"bin/busybox": program, "etc/init": ROOT_INIT.encode()}.items():
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o755)
    for name in applets(program):
        if name not in ("busybox", "poweroff", "reboot"):
            (folder / "bin" / name).symlink_to("busybox")
    for verb in ("poweroff", "reboot"):
        (folder / "sbin" / verb).write_text(ROOT_END.format(verb=verb))
        (folder / "sbin" / verb).chmod(0o755)
    (folder / "etc/profile").write_text("export PATH=/sbin:/bin PS1='# '\n")
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-E", "root_owner=0:0", "-d", folder, image], check=True)
    return image


def allocated(pid: int, name: str = "nonroot-ram") -> int:
    """Bytes that the host has given to a process's memory file of that name."""
    for link in Path(f"/proc/{pid}/fd").iterdir():
        if os.fspath(link.readlink()).startswith(f"/memfd:{name}"):
            return link.stat().st_blocks * 512
    raise AssertionError(f"the process {pid} has no memory file {name}")


def children(pid: int, module: str) -> list[int]:
    """Processes that a process has started, by the Python module that they run."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                command = (path / "cmdline").read_bytes()
            except OSError:
                continue
            if parent == pid and module.encode() in command:
                found.append(int(path.name))
    return found


def script_archive(name: str, text: str) -> bytes:
    """One program, to append to an initramfs."""
    archive = Cpio()
    archive.file(name, text.encode(), mode=0o755)
    return archive.finish()
