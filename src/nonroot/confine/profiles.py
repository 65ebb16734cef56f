"""What each kind of process keeps: its system calls, sockets, capabilities, limits.

Calls that depend on their arguments are narrower than their names say: ``mmap`` and ``mprotect`` make no memory
executable (unless :attr:`Profile.executable`), ``ioctl`` types nothing into a terminal, ``fcntl`` sends no signals,
``tgkill`` reaches this process only, ``prctl`` names threads, ``prlimit64`` reads limits, ``socket`` makes sockets of
:attr:`Profile.families` and ``clone`` threads, where there may be some. See the crate ``nonroot-confine``.
"""

import socket
from dataclasses import dataclass, replace
from typing import Final

__all__ = [
    "BACKEND",
    "DOMAIN",
    "FOLDER_READER",
    "FOLDER_WRITER",
    "NETWORK",
    "PLAIN",
    "STUB",
    "SWITCH",
    "XENSTORE",
    "Profile",
]

_CHOWN, _DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _FSETID, _SETGID, _SETUID = 0, 1, 2, 3, 4, 6, 7
_NET_BIND_SERVICE, _NET_RAW, _MKNOD, _SETFCAP = 10, 13, 27, 31
"""Capabilities by their numbers, from Linux's ``capability.h``."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What one kind of process keeps."""

    name: str
    calls: frozenset[str]
    """System calls that it has; with ``refuses``, those that it has not."""
    refuses: bool = False
    threads: bool = False
    """Whether it may start further threads. No profile may start processes."""
    executable: bool = False
    """Whether it may make memory executable."""
    families: tuple[int, ...] = ()
    """Address families of new sockets."""
    tcp: bool = False
    """Whether it may use TCP ports."""
    namespaces: bool = False
    """Whether it can do in namespaces of its own: it makes no connections, and looks at nobody's user id."""
    capabilities: tuple[int, ...] = ()
    """What it keeps if it has it, which is if root started it."""
    memory: int = 1 << 30
    """Bytes of address space beyond those that it has already."""
    files: int = 1024
    """Descriptors."""
    writes_files: bool = False
    """Whether it may write to regular files that it has open."""


_CALLS: Final = frozenset(
    """
    read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask
    rt_sigreturn ioctl pread64 pwrite64 readv writev select sched_yield mremap madvise dup nanosleep getpid
    sendto recvfrom sendmsg recvmsg shutdown getsockname getpeername setsockopt getsockopt exit uname fcntl
    fsync fdatasync getuid getgid geteuid getegid gettid futex epoll_create clock_gettime clock_getres
    clock_nanosleep exit_group epoll_wait epoll_ctl set_robust_list ppoll pselect6 epoll_pwait eventfd2
    epoll_create1 getrandom preadv pwritev preadv2 pwritev2 rseq restart_syscall sigaltstack gettimeofday time
    tgkill fallocate accept4 accept openat newfstatat open access faccessat faccessat2 statx sendmmsg recvmmsg
    getdents64 prctl
    """.split()
)

PLAIN: Final = Profile("plain", _CALLS)
"""It works with the descriptors that it has. Files can be opened only where Landlock lets it."""

BACKEND: Final = replace(PLAIN, name="backend", threads=True, writes_files=True, namespaces=True)
"""Disks and network cards of one domain."""

STUB: Final = Profile(
    "stub domain",
    frozenset(
        """
        read write close fstat lseek poll mmap mprotect munmap brk mremap madvise rt_sigaction rt_sigprocmask
        rt_sigreturn pread64 pwrite64 readv writev preadv pwritev preadv2 pwritev2 fsync fdatasync fallocate
        recvmsg getsockopt futex sched_yield nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday
        getpid exit exit_group set_robust_list rseq sigaltstack tgkill restart_syscall getrandom fcntl prctl
        newfstatat
        """.split()
    ),
    threads=True,
    writes_files=True,
    namespaces=True,
    memory=512 << 20,
    files=64,
)
"""The device model of one domain: opens nothing, not even what Landlock would let it, and sends nothing."""

SWITCH: Final = replace(PLAIN, name="switch", calls=_CALLS | {"flock"})
"""A network between domains."""

NETWORK: Final = replace(
    PLAIN,
    name="network",
    calls=_CALLS | {"socket", "connect", "bind", "listen"},
    families=(socket.AF_INET, socket.AF_INET6),
    tcp=True,
    capabilities=(_NET_BIND_SERVICE, _NET_RAW),
)
"""libslirp: connections for the guest."""

DOMAIN: Final = replace(
    PLAIN,
    name="domain",
    calls=_CALLS
    | frozenset(
        "memfd_create ftruncate socketpair getrusage prlimit64 pipe2 dup3 fadvise64 copy_file_range sendfile".split()
    ),
    families=(socket.AF_UNIX,),
    threads=True,
    executable=True,
    files=4096,
    writes_files=True,
)
"""A domain's process with vCPU and devices: translated code, memory files; sockets in pairs only."""

_FOLDER: Final = frozenset("readlink readlinkat statfs fstatfs name_to_handle_at".split())
_CHANGES: Final = frozenset(
    """
    truncate ftruncate chmod fchmod mknod mknodat mkdirat fchownat unlinkat renameat renameat2 linkat
    symlinkat fchmodat utimensat syncfs
    """.split()
)
_FILE_CAPABILITIES: Final = (_DAC_OVERRIDE, _DAC_READ_SEARCH, _CHOWN, _FOWNER, _FSETID, _MKNOD, _SETFCAP)

FOLDER_READER: Final = replace(
    PLAIN, name="folder, read-only", calls=_CALLS | _FOLDER, capabilities=(_DAC_OVERRIDE, _DAC_READ_SEARCH)
)
"""A shared folder that the guest cannot change."""

FOLDER_WRITER: Final = replace(
    PLAIN,
    name="folder",
    calls=_CALLS | _FOLDER | _CHANGES,
    capabilities=_FILE_CAPABILITIES,
    writes_files=True,
)
"""A shared folder that it can."""

XENSTORE: Final = Profile(
    "xenstore",
    frozenset(
        """
        clone fork vfork execve execveat kill ptrace connect socketpair mount umount2 pivot_root chroot setns
        unshare bpf perf_event_open add_key request_key keyctl init_module finit_module delete_module
        kexec_load process_vm_readv process_vm_writev open_by_handle_at userfaultfd rt_sigqueueinfo
        rt_tgsigqueueinfo personality clone3 pidfd_send_signal pidfd_open pidfd_getfd io_uring_setup
        io_uring_enter io_uring_register open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr
        socket mmap mprotect pkey_mprotect
        """.split()
    ),
    refuses=True,
    families=(socket.AF_UNIX,),
    writes_files=True,
    memory=4 << 30,
    files=1 << 20,
)
"""XenStore: files in a folder of its own, and Unix sockets that it listens at."""
