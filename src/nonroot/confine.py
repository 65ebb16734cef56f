"""Takes away from a process of ours what it does not need: new programs, files, signals to others, privileges.

Three layers, each of which works without privileges: limits, Landlock, and a seccomp filter. A layer that the kernel or
a container's own filter refuses is left out and named in the report, because the process is of use without it.

:func:`confine` is for helpers, which work with the descriptors that they have: no file can be opened but a few for
reading, and only named system calls are allowed; the rest fail with EPERM. :func:`confine_server` is for XenStore's
process, which has files in a folder of its own and takes connections: the filter names what is refused, on x86-64 and
aarch64.

Sources: landlock(7), seccomp(2), Linux's uapi headers.
"""

import ctypes
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["FLOCK", "FOLDER_READER", "FOLDER_WRITER", "NETWORK", "PLAIN", "confine", "confine_server"]

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_DUMPABLE: Final = 4
PR_SET_NO_NEW_PRIVS: Final = 38

LANDLOCK_CREATE_RULESET: Final = 444
LANDLOCK_ADD_RULE: Final = 445
LANDLOCK_RESTRICT_SELF: Final = 446
LANDLOCK_RULE_PATH_BENEATH: Final = 1
LANDLOCK_VERSION_1_RIGHTS: Final = (1 << 13) - 1
LANDLOCK_READ_FILE: Final = 1 << 2
LANDLOCK_READ_DIR: Final = 1 << 3
LANDLOCK_EXECUTE: Final = 1 << 0
LANDLOCK_MAKE_CHAR: Final = 1 << 6
LANDLOCK_MAKE_BLOCK: Final = 1 << 11
LANDLOCK_REFER: Final = 1 << 13
"""From version 2 of Landlock on; without it, nothing can be moved from folder to folder."""
LANDLOCK_TRUNCATE: Final = 1 << 14
"""From version 3 on."""
LANDLOCK_CREATE_RULESET_VERSION: Final = 1

SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
SECCOMP_SET_MODE_FILTER: Final = 1
RET_ALLOW: Final = 0x7FFF0000
RET_EPERM: Final = 0x00050000 | 1
RET_ENOSYS: Final = 0x00050000 | 38
CLONE: Final = 56
CLONE3: Final = 435
CLONE_THREAD: Final = 0x00010000
AUDIT_ARCH_X86_64: Final = 0xC000003E

# System calls by their numbers on x86-64; what is not here fails.
_CALLS: Final = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10,
    "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "ioctl": 16, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32,
    "nanosleep": 35, "getpid": 39, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
    "getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "exit": 60, "uname": 63, "fcntl": 72,
    "fsync": 74, "fdatasync": 75, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "gettid": 186,
    "futex": 202, "epoll_create": 213, "clock_gettime": 228, "clock_nanosleep": 230, "exit_group": 231,
    "epoll_wait": 232,
    "epoll_ctl": 233, "set_robust_list": 273, "ppoll": 271, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
    "getrandom": 318, "preadv": 295, "pwritev": 296, "preadv2": 327,
    "pwritev2": 328, "rseq": 334, "restart_syscall": 219, "sigaltstack": 131,
    "gettimeofday": 96, "time": 201, "tgkill": 234, "fallocate": 285, "accept4": 288, "accept": 43, "openat": 257,
    "newfstatat": 262, "open": 2, "access": 21, "statx": 332, "sendmmsg": 307, "recvmmsg": 299, "getdents64": 217,
}  # fmt: skip
_SOCKETS: Final = {"socket": 41, "connect": 42, "bind": 49, "listen": 50}

PLAIN: Final = frozenset(_CALLS.values())
"""What a helper needs that works with the descriptors it has."""
NETWORK: Final = PLAIN | frozenset(_SOCKETS.values())
"""The same, and new sockets."""

FLOCK: Final = 73
FOLDER_READER: Final = frozenset((89, 137, 138, 267, 303))
"""For who serves a folder: readlink, statfs, fstatfs, readlinkat, name_to_handle_at."""
FOLDER_WRITER: Final = FOLDER_READER | frozenset(
    (76, 77, 90, 91, 133, 258, 259, 260, 263, 264, 265, 266, 268, 280, 306, 316)
)
"""The same, and truncate, chmod, mknod, mkdirat, fchownat, unlinkat, renames, links, utimensat, syncfs."""

_SOCK_FPROG: Final = struct.Struct("HxxxxxxP")


def confine(
    calls: frozenset[int],
    readable: Iterable[str] = (),
    *,
    memory: int = 1 << 30,
    files: int = 1024,
    writes_files: bool = False,
    folder: int | None = None,
    threads: bool = False,
) -> list[str]:
    """
    Confine this process and all its threads to come, for good. To be called before other threads start.

    ``calls``: :data:`PLAIN` or :data:`NETWORK`; ``readable``: files that may be opened for reading later; ``memory``:
    bytes of address space beyond today's; ``files``: descriptors; ``writes_files``: whether it may write to regular
    files that it has open; ``folder``: the descriptor of one below which everything may be reached, also for changes if
    ``writes_files``; ``threads``: whether it may start
    further threads. Returns the layers that could not be had, each as half a sentence.
    """
    missing = []
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not writes_files:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    most = min(files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with open("/proc/self/statm") as statm:  # noqa: PTH123
        used = int(statm.read().split()[0]) * os.sysconf("SC_PAGESIZE")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = used + memory if hard == resource.RLIM_INFINITY else min(used + memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    if not _no_new_privileges():
        return ["privileges cannot be given up"]
    if reason := _landlock(readable, folder, writes_files):
        missing.append(f"files stay reachable: {reason}")
    if reason := _seccomp(calls, threads):
        missing.append(f"system calls are not filtered: {reason}")
    return missing


def _no_new_privileges() -> bool:
    """Nobody of the user's may look into this process, and no program that it started would have more rights."""
    _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    return not _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _landlock(readable: Iterable[str], folder: int | None, changes: bool) -> str | None:
    version = _libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_CREATE_RULESET_VERSION)
    handled = LANDLOCK_VERSION_1_RIGHTS
    if folder is not None:
        handled |= (LANDLOCK_REFER if version >= 2 else 0) | (LANDLOCK_TRUNCATE if version >= 3 else 0)
    rights = ctypes.c_uint64(handled)
    ruleset = _libc.syscall(LANDLOCK_CREATE_RULESET, ctypes.byref(rights), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return f"Landlock: {os.strerror(ctypes.get_errno())}"

    def allow(what: int, fd: int) -> None:
        rule = struct.pack("=Qi", what, fd)
        _libc.syscall(LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, ctypes.c_char_p(rule), 0)

    try:
        for path in readable:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            allow(LANDLOCK_READ_FILE, fd)
            os.close(fd)
        if folder is not None and changes:
            allow(handled & ~(LANDLOCK_EXECUTE | LANDLOCK_MAKE_CHAR | LANDLOCK_MAKE_BLOCK), folder)
        elif folder is not None:
            allow(LANDLOCK_READ_FILE | LANDLOCK_READ_DIR, folder)
        if _libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0):
            return f"Landlock: {os.strerror(ctypes.get_errno())}"
    finally:
        os.close(ruleset)
    return None


def _seccomp(calls: frozenset[int], threads: bool) -> str | None:
    if platform.machine() != "x86_64":
        return "the list is x86-64's"

    def instruction(code: int, constant: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, true, false, constant)

    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        instruction(load, 4),
        instruction(equal, AUDIT_ARCH_X86_64, 1, 0),
        instruction(give, RET_EPERM),
        instruction(load, 0),
        instruction(at_least, 0x40000000, 0, 1),  # x32's numbers
        instruction(give, RET_EPERM),
    ]
    for number in sorted(calls):
        program += [instruction(equal, number, 0, 1), instruction(give, RET_ALLOW)]
    if threads:
        program += [
            instruction(equal, CLONE3, 0, 1),
            instruction(give, RET_ENOSYS),  # its flags are in memory: the C library takes clone() then
            instruction(equal, CLONE, 0, 3),
            instruction(load, 16),  # the first argument's lower half
            instruction(any_bit, CLONE_THREAD, 0, 1),
            instruction(give, RET_ALLOW),
        ]
    program.append(instruction(give, RET_EPERM))
    return _install(b"".join(program))


def _install(code: bytes) -> str | None:
    """Have the kernel run a filter from now on. Why it does not, as half a sentence."""
    buffer = ctypes.create_string_buffer(code, len(code))
    head = ctypes.create_string_buffer(_SOCK_FPROG.pack(len(code) // 8, ctypes.addressof(buffer)))
    if _libc.syscall(SECCOMP[platform.machine()], SECCOMP_SET_MODE_FILTER, 0, head):
        return f"seccomp: {os.strerror(ctypes.get_errno())}"
    return None


# ── XenStore's process ──

_SERVER_RIGHTS: Final = sum(1 << bit for bit in (1, 2, 3, 5, 8, 9, 14))
"""Write, read and truncate files, read folders, remove and make files, make sockets."""
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""Rights on files by version of Landlock; later versions have 16."""

_KILL: Final = 0x8000_0000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_PROT_EXEC: Final = 4

# Common to all architectures: io_uring, new mounts, pidfd, clone3, signals by pidfd.
_NEW: Final = (*range(424, 436), 438, 442)
_REFUSED: Final = {
    # clone fork vfork execve kill ptrace connect socketpair mount umount2 pivot_root chroot setns unshare bpf
    # perf_event_open add_key request_key keyctl init_module finit_module delete_module kexec_load kexec_file_load
    # process_vm_readv process_vm_writev open_by_handle_at userfaultfd execveat rt_sigqueueinfo rt_tgsigqueueinfo
    # personality
    "x86_64": (
        *(56, 57, 58, 59, 62, 101, 42, 53, 165, 166, 155, 161, 308, 272, 321),
        *(298, 248, 249, 250, 175, 313, 176, 246, 320),
        *(310, 311, 304, 323, 322, 129, 297, 135),
    ),
    "aarch64": (
        *(220, 221, 129, 117, 203, 199, 40, 39, 41, 51, 268, 97, 280),
        *(241, 217, 218, 219, 105, 273, 106, 104, 294),
        *(270, 271, 265, 282, 281, 138, 240, 92),
    ),
}
_SOCKET: Final = {"x86_64": 41, "aarch64": 198}
_MMAP: Final = {"x86_64": 9, "aarch64": 222}
_MPROTECT: Final = {"x86_64": 10, "aarch64": 226}
_PKEY_MPROTECT: Final = {"x86_64": 329, "aarch64": 288}
_AUDIT: Final = {"x86_64": 0xC000_003E, "aarch64": 0xC000_00B7}


def confine_server(folder: Path) -> list[str]:
    """Give it all up, for good; only files in ``folder`` stay in reach. Returns what is in force, by name."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not _no_new_privileges():
        return []
    found = ["no-new-privileges"]
    if _landlock_server(folder):
        found.append("landlock")
    if _seccomp_server():
        found.append("seccomp")
    return found


def _landlock_server(folder: Path) -> bool:
    version = _libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    rights = (1 << _FS_BITS.get(version, 16)) - 1
    attributes = struct.pack("<Q", rights)
    if version >= 4:
        attributes += struct.pack("<Q", 3)  # TCP: bind, connect
    if version >= 6:
        attributes += struct.pack("<Q", 3)  # abstract Unix sockets, signals
    ruleset = _libc.syscall(LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if ruleset < 0:
        return False
    inside = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", _SERVER_RIGHTS & rights, inside)
        if _libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, rule, ctypes.c_uint(0)) != 0:
            return False
        return int(_libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, ctypes.c_uint(0))) == 0
    finally:
        os.close(inside)
        os.close(ruleset)


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter: (code, skip if true, skip if false, operand) each."""
    program = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_EQUAL, 1, 0, _AUDIT[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":  # numbers of the x32 ABI
        program += [(_JUMP_AT_LEAST, 0, 1, 0x4000_0000), (_RETURN, 0, 0, RET_EPERM)]
    for number in (*_REFUSED[machine], *_NEW):
        program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, RET_EPERM)]
    program += [  # socket: AF_UNIX only
        (_JUMP_EQUAL, 0, 4, _SOCKET[machine]),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_JUMP_EQUAL, 1, 0, 1),
        (_RETURN, 0, 0, RET_EPERM),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number in (_MMAP[machine], _MPROTECT[machine], _PKEY_MPROTECT[machine]):
        program += [  # the third argument has the protection
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS_AT + 2 * 8),
            (_JUMP_BITS, 0, 1, _PROT_EXEC),
            (_RETURN, 0, 0, RET_EPERM),
            (_LOAD, 0, 0, _NUMBER_AT),
        ]
    program.append((_RETURN, 0, 0, RET_ALLOW))
    return program


def _seccomp_server() -> bool:
    machine = os.uname().machine
    if machine not in _AUDIT or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    return _install(b"".join(struct.pack("=HBBI", *instruction) for instruction in _program(machine))) is None
