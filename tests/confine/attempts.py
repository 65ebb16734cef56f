"""Run in a process of its own: confines itself, tries what it must not, and prints what succeeded, as JSON."""

import ctypes
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

from nonroot import confine as package
from nonroot.confine import confine

PTRACE_ATTACH = 16
CLONE_NEWUSER = 0x10000000


def main() -> None:
    profile = getattr(package, sys.argv[1])
    sibling, sealed, stranger = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if len(sys.argv) > 5:  # as an ordinary user; the modules were loaded as root
        user = int(sys.argv[5])
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    libc = ctypes.CDLL(None, use_errno=True)
    target = ctypes.create_string_buffer(16)

    def call(name: str, *arguments: Any) -> None:
        if getattr(libc, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), name)

    class Iovec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    local = Iovec(ctypes.addressof(target), 16)
    remote = Iovec(ctypes.addressof(target), 16)

    def read_memory() -> None:
        call("process_vm_readv", sibling, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)

    def thread() -> None:
        one = threading.Thread(target=lambda: None)
        one.start()
        one.join()

    attempts: dict[str, Callable[[], object]] = {
        "read a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "write a file": lambda: os.open("/tmp/nonroot-attempt", os.O_WRONLY | os.O_CREAT, 0o600),
        "list a folder": lambda: list(os.scandir("/")),
        "look into a process": lambda: os.open(f"/proc/{sibling}/mem", os.O_RDONLY),
        "unix socket": lambda: socket.socket(socket.AF_UNIX),
        "inet socket": lambda: socket.socket(socket.AF_INET),
        "netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "fork": lambda: os.fork() or os._exit(0),
        "fork bomb": lambda: [os.fork() or os._exit(0) for _ in range(10)],
        "ptrace": lambda: call("ptrace", PTRACE_ATTACH, sibling, None, None),
        "read memory": read_memory,
        "kill": lambda: os.kill(sibling, signal.SIGURG),
        "new namespace": lambda: call("unshare", CLONE_NEWUSER),
        "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC),
        "truncate sealed": lambda: os.ftruncate(sealed, 0),
        "write sealed": lambda: os.pwrite(sealed, b"x", 0),
        "stranger's descriptor": lambda: os.fstat(stranger),
        "more limits": lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)),
        "become root": lambda: os.setresuid(0, 0, 0),
        "memory hog": lambda: bytearray(64 << 30),
        "descriptor hog": lambda: [os.dup(0) for _ in range(5000)],
        "thread": thread,
    }
    force = confine(profile, keep=[sealed])
    done = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except (OSError, MemoryError, RuntimeError, ValueError):
            continue
        done.append(name)
        if name == "fork":
            break
    print(json.dumps({"done": done, "names": force.names, "missing": force.missing}), flush=True)
    os._exit(0)


main()
