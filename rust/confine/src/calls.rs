//! seccomp: which system calls are there.

use seccompiler::{
    apply_filter, apply_filter_all_threads, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

const PERMISSION: u32 = libc::EPERM as u32;
const NO_CALL: u32 = libc::ENOSYS as u32;

/// (name, number) of the calls that rules may name, on this architecture.
macro_rules! table {
    ($($name:ident = $constant:ident),* ; $($old:ident = $old_constant:ident),* $(,)?) => {
        fn number(name: &str) -> Option<Option<i64>> {
            $(if name == stringify!($name) { return Some(Some(libc::$constant)); })*
            $(if name == stringify!($old) {
                #[cfg(target_arch = "x86_64")]
                return Some(Some(libc::$old_constant));
                #[cfg(not(target_arch = "x86_64"))]
                return Some(None);
            })*
            None
        }
    };
}

// After the semicolon: calls that only x86-64 has; elsewhere the C library uses the newer ones.
table! {
    read = SYS_read, write = SYS_write, close = SYS_close, fstat = SYS_fstat, lseek = SYS_lseek, mmap = SYS_mmap,
    mprotect = SYS_mprotect, munmap = SYS_munmap, brk = SYS_brk, rt_sigaction = SYS_rt_sigaction,
    rt_sigprocmask = SYS_rt_sigprocmask, rt_sigreturn = SYS_rt_sigreturn, ioctl = SYS_ioctl, pread64 = SYS_pread64,
    pwrite64 = SYS_pwrite64, readv = SYS_readv, writev = SYS_writev, sched_yield = SYS_sched_yield,
    mremap = SYS_mremap, madvise = SYS_madvise, dup = SYS_dup, dup3 = SYS_dup3, nanosleep = SYS_nanosleep,
    getpid = SYS_getpid, getppid = SYS_getppid, sendto = SYS_sendto, recvfrom = SYS_recvfrom, sendmsg = SYS_sendmsg,
    recvmsg = SYS_recvmsg, shutdown = SYS_shutdown, getsockname = SYS_getsockname, getpeername = SYS_getpeername,
    setsockopt = SYS_setsockopt, getsockopt = SYS_getsockopt, exit = SYS_exit, uname = SYS_uname, fcntl = SYS_fcntl,
    fsync = SYS_fsync, fdatasync = SYS_fdatasync, getuid = SYS_getuid, getgid = SYS_getgid, geteuid = SYS_geteuid,
    getegid = SYS_getegid, gettid = SYS_gettid, futex = SYS_futex, clock_gettime = SYS_clock_gettime,
    clock_getres = SYS_clock_getres, clock_nanosleep = SYS_clock_nanosleep, exit_group = SYS_exit_group,
    epoll_ctl = SYS_epoll_ctl, epoll_pwait = SYS_epoll_pwait, epoll_create1 = SYS_epoll_create1,
    set_robust_list = SYS_set_robust_list, ppoll = SYS_ppoll, pselect6 = SYS_pselect6, eventfd2 = SYS_eventfd2,
    getrandom = SYS_getrandom, preadv = SYS_preadv, pwritev = SYS_pwritev, preadv2 = SYS_preadv2,
    pwritev2 = SYS_pwritev2, rseq = SYS_rseq, restart_syscall = SYS_restart_syscall, sigaltstack = SYS_sigaltstack,
    gettimeofday = SYS_gettimeofday, tgkill = SYS_tgkill, fallocate = SYS_fallocate, accept4 = SYS_accept4,
    accept = SYS_accept, openat = SYS_openat, newfstatat = SYS_newfstatat, statx = SYS_statx,
    faccessat = SYS_faccessat, faccessat2 = SYS_faccessat2, sendmmsg = SYS_sendmmsg, recvmmsg = SYS_recvmmsg,
    getdents64 = SYS_getdents64, socket = SYS_socket, socketpair = SYS_socketpair, connect = SYS_connect,
    bind = SYS_bind, listen = SYS_listen, flock = SYS_flock, statfs = SYS_statfs, fstatfs = SYS_fstatfs,
    readlinkat = SYS_readlinkat, name_to_handle_at = SYS_name_to_handle_at, truncate = SYS_truncate,
    ftruncate = SYS_ftruncate, fchmod = SYS_fchmod, fchmodat = SYS_fchmodat, fchown = SYS_fchown,
    fchownat = SYS_fchownat, mknodat = SYS_mknodat, mkdirat = SYS_mkdirat, unlinkat = SYS_unlinkat,
    renameat = SYS_renameat, renameat2 = SYS_renameat2, linkat = SYS_linkat, symlinkat = SYS_symlinkat,
    utimensat = SYS_utimensat, syncfs = SYS_syncfs, memfd_create = SYS_memfd_create, prctl = SYS_prctl,
    getrusage = SYS_getrusage, prlimit64 = SYS_prlimit64, sched_getaffinity = SYS_sched_getaffinity,
    pipe2 = SYS_pipe2, clone = SYS_clone, clone3 = SYS_clone3, execve = SYS_execve, execveat = SYS_execveat,
    kill = SYS_kill, ptrace = SYS_ptrace, mount = SYS_mount, umount2 = SYS_umount2, pivot_root = SYS_pivot_root,
    chroot = SYS_chroot, setns = SYS_setns, unshare = SYS_unshare, bpf = SYS_bpf,
    perf_event_open = SYS_perf_event_open, add_key = SYS_add_key, request_key = SYS_request_key, keyctl = SYS_keyctl,
    init_module = SYS_init_module, finit_module = SYS_finit_module, delete_module = SYS_delete_module,
    kexec_load = SYS_kexec_load, process_vm_readv = SYS_process_vm_readv, process_vm_writev = SYS_process_vm_writev,
    open_by_handle_at = SYS_open_by_handle_at, userfaultfd = SYS_userfaultfd, rt_sigqueueinfo = SYS_rt_sigqueueinfo,
    rt_tgsigqueueinfo = SYS_rt_tgsigqueueinfo, personality = SYS_personality, membarrier = SYS_membarrier,
    pidfd_send_signal = SYS_pidfd_send_signal, pidfd_open = SYS_pidfd_open, pidfd_getfd = SYS_pidfd_getfd,
    io_uring_setup = SYS_io_uring_setup, io_uring_enter = SYS_io_uring_enter,
    io_uring_register = SYS_io_uring_register, open_tree = SYS_open_tree, move_mount = SYS_move_mount,
    fsopen = SYS_fsopen, fsconfig = SYS_fsconfig, fsmount = SYS_fsmount, fspick = SYS_fspick,
    mount_setattr = SYS_mount_setattr, pkey_mprotect = SYS_pkey_mprotect, wait4 = SYS_wait4, waitid = SYS_waitid,
    umask = SYS_umask, capget = SYS_capget, fadvise64 = SYS_fadvise64, copy_file_range = SYS_copy_file_range,
    sendfile = SYS_sendfile, timerfd_create = SYS_timerfd_create, timerfd_settime = SYS_timerfd_settime ;
    open = SYS_open, stat = SYS_stat, lstat = SYS_lstat, access = SYS_access, poll = SYS_poll, select = SYS_select,
    epoll_create = SYS_epoll_create, epoll_wait = SYS_epoll_wait, time = SYS_time, readlink = SYS_readlink,
    chmod = SYS_chmod, rename = SYS_rename, mknod = SYS_mknod, mkdir = SYS_mkdir, rmdir = SYS_rmdir,
    unlink = SYS_unlink, fork = SYS_fork, vfork = SYS_vfork, arch_prctl = SYS_arch_prctl, dup2 = SYS_dup2,
}

/// Whether rules may name this call, whether this architecture has it or not.
pub fn known(name: &str) -> bool {
    number(name).is_some()
}

/// What calls there are.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// The calls that are allowed; or, with `refuse`, those that are not.
    pub calls: Vec<String>,
    /// Everything is allowed but what is named.
    pub refuse: bool,
    /// It may start further threads; processes never.
    pub threads: bool,
    /// It may have memory made executable.
    pub executable: bool,
    /// Address families of the sockets that it may make.
    pub families: Vec<i32>,
    /// For the threads that there are already, too.
    pub all_threads: bool,
}

fn when(conditions: Vec<(u8, SeccompCmpOp, u64)>) -> Result<Vec<SeccompRule>, String> {
    let conditions: Result<Vec<_>, _> = conditions
        .into_iter()
        .map(|(argument, compare, value)| {
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)
        })
        .collect();
    let rule = conditions.and_then(SeccompRule::new).map_err(|error| format!("seccomp: {error}"))?;
    Ok(vec![rule])
}

/// The rules under which a call that depends on its arguments is harmless; none for the others. Empty: never.
fn harmless(name: &str, rules: &Rules) -> Result<Option<Vec<SeccompRule>>, String> {
    use SeccompCmpOp::{Eq, MaskedEq, Ne};
    // A terminal's input buffer is not for us to fill.
    const TIOCSTI: u64 = 0x5412;
    const TIOCLINUX: u64 = 0x541c;
    const F_SETOWN: u64 = 8;
    const F_SETSIG: u64 = 10;
    const F_SETOWN_EX: u64 = 15;
    Ok(Some(match name {
        "mmap" | "mprotect" | "pkey_mprotect" if !rules.executable => {
            when(vec![(2, MaskedEq(libc::PROT_EXEC as u64), 0)])?
        }
        "ioctl" => when(vec![(1, Ne, TIOCSTI), (1, Ne, TIOCLINUX)])?,
        "fcntl" => when(vec![(1, Ne, F_SETOWN), (1, Ne, F_SETSIG), (1, Ne, F_SETOWN_EX)])?,
        "tgkill" => when(vec![(0, Eq, u64::from(std::process::id()))])?,
        "prctl" => when(vec![(0, Eq, libc::PR_SET_NAME as u64)])?,
        "prlimit64" => when(vec![(0, Eq, 0), (2, Eq, 0)])?,
        "clone" if rules.threads => {
            when(vec![(0, MaskedEq(libc::CLONE_THREAD as u64), libc::CLONE_THREAD as u64)])?
        }
        "clone" | "clone3" => Vec::new(),
        "socket" | "socketpair" => {
            let mut all = Vec::new();
            for &family in &rules.families {
                all.append(&mut when(vec![(0, Eq, family as u64)])?);
            }
            all
        }
        _ => return Ok(None),
    }))
}

/// What makes such a call harmful: for the list of those that are refused.
fn harmful(name: &str, rules: &Rules) -> Result<Vec<SeccompRule>, String> {
    use SeccompCmpOp::{MaskedEq, Ne};
    let executable = libc::PROT_EXEC as u64;
    match name {
        "mmap" | "mprotect" | "pkey_mprotect" => when(vec![(2, MaskedEq(executable), executable)]),
        "socket" => when(rules.families.iter().map(|&family| (0, Ne, family as u64)).collect()),
        _ => Ok(Vec::new()),
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> Result<BpfProgram, String> {
    let failed = |error: seccompiler::BackendError| format!("seccomp: {error}");
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(failed)?;
    let filter = SeccompFilter::new(rules, otherwise, matching, arch).map_err(failed)?;
    BpfProgram::try_from(filter).map_err(failed)
}

fn install(program: &BpfProgram, all_threads: bool) -> Result<(), String> {
    let installed = if all_threads { apply_filter_all_threads(program) } else { apply_filter(program) };
    installed.map_err(|error| format!("seccomp: {error}"))
}

/// Leaves this thread, those that it starts and, with `all_threads`, all of the process's only these calls.
///
/// What is refused fails with EPERM. An error is half a sentence.
pub fn restrict_calls(rules: &Rules) -> Result<(), String> {
    let mut map = BTreeMap::new();
    for name in &rules.calls {
        let Some(number) = number(name).ok_or_else(|| format!("seccomp: there is no call {name}"))? else {
            continue;
        };
        if rules.refuse {
            map.insert(number, harmful(name, rules)?);
            continue;
        }
        match harmless(name, rules)? {
            Some(conditions) if conditions.is_empty() => {}
            Some(conditions) => drop(map.insert(number, conditions)),
            None => drop(map.insert(number, Vec::new())),
        }
    }
    let refused = SeccompAction::Errno(PERMISSION);
    let program = if rules.refuse {
        compile(map, SeccompAction::Allow, refused)?
    } else {
        if rules.threads {
            if let Some(thread) = harmless("clone", rules)? {
                map.insert(libc::SYS_clone, thread);
            }
            map.insert(libc::SYS_clone3, Vec::new());
        }
        compile(map, refused, SeccompAction::Allow)?
    };
    if !rules.refuse && rules.threads {
        // Its flags are in memory, where no filter sees them: the C library takes clone() when there is no clone3().
        let without = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        install(&compile(without, SeccompAction::Allow, SeccompAction::Errno(NO_CALL))?, rules.all_threads)?;
    }
    install(&program, rules.all_threads)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_calls_or_unknown() {
        assert_eq!(number("read"), Some(Some(libc::SYS_read)));
        assert_eq!(number("reed"), None);
        assert!(known("open") && known("clone3") && !known(""));
    }

    #[test]
    fn a_filter_of_each_kind_compiles() {
        for (refuse, threads, executable) in
            [(false, true, false), (false, false, true), (true, false, false)]
        {
            let calls = ["read", "mmap", "mprotect", "socket", "tgkill", "ioctl"].map(String::from).to_vec();
            let rules = Rules { calls, refuse, threads, executable, families: vec![2], all_threads: false };
            let mut map = BTreeMap::new();
            for name in &rules.calls {
                let number = number(name).unwrap().unwrap();
                if refuse {
                    map.insert(number, harmful(name, &rules).unwrap());
                } else if let Some(conditions) = harmless(name, &rules).unwrap() {
                    map.insert(number, conditions);
                }
            }
            assert!(!compile(map, SeccompAction::Errno(1), SeccompAction::Allow).unwrap().is_empty());
        }
    }
}
