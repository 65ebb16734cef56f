//! Privileges, capabilities, namespaces, descriptors.

use std::io::Error;
use std::os::fd::RawFd;

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: libc::c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Whether the kernel has seccomp's filters.
pub fn seccomp_is_there() -> bool {
    const GET_ACTION_AVAIL: libc::c_uint = 2;
    let action: u32 = libc::SECCOMP_RET_ERRNO;
    // SAFETY: the call reads four bytes that live until it returns.
    unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, &raw const action) == 0 }
}

/// No program that this process starts has more rights than it; no other process of the user's may look into it.
pub fn refuse_privileges() -> Result<(), Error> {
    // SAFETY: these options take numbers only.
    let refused = unsafe {
        libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
    };
    if refused {
        Err(Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Gives up this thread's capabilities but those in `keep` (bits by their numbers) that it has.
pub fn drop_capabilities(keep: u64) -> Result<(), Error> {
    let mut header = Header { version: CAPABILITY_VERSION_3, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: both structures have the layout that the version names, and live until the calls return.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) } != 0 {
        return Err(Error::last_os_error());
    }
    for (half, set) in sets.iter_mut().enumerate() {
        let kept = (keep >> (32 * half)) as u32 & set.permitted;
        *set = Sets { effective: kept, permitted: kept, inheritable: 0 };
    }
    // SAFETY: as above.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) } != 0 {
        return Err(Error::last_os_error());
    }
    Ok(())
}

/// Enters new namespaces: of users, network, System V's IPC, host names. To be called before other threads start.
///
/// Without the right to make one of users, whoever may makes the others alone.
pub fn enter_namespaces() -> Result<(), Error> {
    let inner = libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    // SAFETY: the call takes a number only.
    if unsafe { libc::unshare(libc::CLONE_NEWUSER | inner) } == 0 {
        return Ok(());
    }
    let refused = Error::last_os_error();
    // SAFETY: as above.
    if unsafe { libc::unshare(inner) } == 0 {
        Ok(())
    } else {
        Err(refused)
    }
}

/// Closes every descriptor from `first` on that is not in `keep`.
pub fn close_others(first: u32, keep: &[RawFd]) -> Result<(), Error> {
    let mut kept: Vec<u32> =
        keep.iter().filter_map(|&fd| u32::try_from(fd).ok()).filter(|&fd| fd >= first).collect();
    kept.sort_unstable();
    kept.dedup();
    let mut begin = first;
    let close = |from: u32, to: u32| {
        // SAFETY: closing descriptors that the caller says nobody uses; the numbers are a range.
        if from <= to && unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) } != 0 {
            return Err(Error::last_os_error());
        }
        Ok(())
    };
    for fd in kept {
        if fd > begin {
            close(begin, fd - 1)?;
        }
        begin = fd + 1;
    }
    close(begin, u32::MAX)
}
