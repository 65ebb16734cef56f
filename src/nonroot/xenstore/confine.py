"""What XenStore's process gives up before it serves anybody, as far as the kernel under it can.

* no new privileges, no core dumps, no reading of its memory by other processes of the user (``PR_SET_DUMPABLE``)
* Landlock: no files but those in its own folder; where the kernel knows of them, no TCP and no signals to others
* seccomp: no programs, no processes, no sockets but Unix ones and no connecting, no executable memory, none of the
  kernel's large interfaces (mounts, namespaces, BPF, io_uring, keys, modules, …)
"""

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

__all__ = ["confine"]

_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38

# Landlock (linux/landlock.h). Its system calls have these numbers on every architecture.
_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_REG, _MAKE_SOCK = (1 << bit for bit in (1, 2, 3, 5, 8, 9))
_TRUNCATE: Final = 1 << 14
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 4: 15}
"""Rights on files by version of Landlock; later versions have 16."""

# seccomp (linux/seccomp.h, linux/bpf_common.h).
_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_AT_LEAST: Final = 0x35
_JUMP_BITS: Final = 0x45
_RETURN: Final = 0x06
_ALLOW: Final = 0x7FFF_0000
_KILL: Final = 0x8000_0000
_REFUSE: Final = 0x0005_0000 | errno.EPERM
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


def confine(folder: Path) -> list[str]:
    """Give it all up, for good; only files in ``folder`` stay in reach. Returns what is in force, by name."""
    libc = ctypes.CDLL(None, use_errno=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return []
    found = ["no-new-privileges"]
    if _landlock(libc, folder):
        found.append("landlock")
    if _seccomp(libc):
        found.append("seccomp")
    return found


def _landlock(libc: ctypes.CDLL, folder: Path) -> bool:
    version = libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    if version < 1:
        return False
    rights = (1 << _FS_BITS.get(version, 16)) - 1
    attributes = struct.pack("<Q", rights)
    if version >= 4:
        attributes += struct.pack("<Q", 3)  # TCP: bind, connect
    if version >= 6:
        attributes += struct.pack("<Q", 3)  # abstract Unix sockets, signals
    ruleset = libc.syscall(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint(0))
    if ruleset < 0:
        return False
    inside = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        allowed = _WRITE_FILE | _READ_FILE | _READ_DIR | _REMOVE_FILE | _MAKE_REG | _MAKE_SOCK | _TRUNCATE
        rule = struct.pack("<Qi", allowed & rights, inside)
        if libc.syscall(_ADD_RULE, ruleset, 1, rule, ctypes.c_uint(0)) != 0:
            return False
        return int(libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint(0))) == 0
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
        program += [(_JUMP_AT_LEAST, 0, 1, 0x4000_0000), (_RETURN, 0, 0, _REFUSE)]
    for number in (*_REFUSED[machine], *_NEW):
        program += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    program += [  # socket: AF_UNIX only
        (_JUMP_EQUAL, 0, 4, _SOCKET[machine]),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_JUMP_EQUAL, 1, 0, 1),
        (_RETURN, 0, 0, _REFUSE),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for number in (_MMAP[machine], _MPROTECT[machine], _PKEY_MPROTECT[machine]):
        program += [  # the third argument has the protection
            (_JUMP_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS_AT + 2 * 8),
            (_JUMP_BITS, 0, 1, _PROT_EXEC),
            (_RETURN, 0, 0, _REFUSE),
            (_LOAD, 0, 0, _NUMBER_AT),
        ]
    program.append((_RETURN, 0, 0, _ALLOW))
    return program


def _seccomp(libc: ctypes.CDLL) -> bool:
    machine = os.uname().machine
    if machine not in _AUDIT or sys.byteorder != "little" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    filters = _pack(_program(machine))
    code = ctypes.create_string_buffer(filters, len(filters))
    header = struct.pack("<HxxxxxxQ", len(filters) // 8, ctypes.addressof(code))
    return int(libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0)) == 0


def _pack(program: Iterable[tuple[int, int, int, int]]) -> bytes:
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
