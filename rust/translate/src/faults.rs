//! Faults of generated code that uses windows: the signal's handler goes on where the translator said.

use libc::{c_int, c_void, siginfo_t};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Where generated code may fault, and where it goes on then.
#[derive(Default)]
pub struct Sites {
    /// Host address of the arena, and its bytes.
    pub arena: (u64, u64),
    /// Offsets in the arena of instructions, ascending, and of what follows a fault of each.
    pub list: Vec<(u32, u32)>,
}

/// Those of the translator that has the windows. They change only while none of its code runs.
static PRESENT: AtomicPtr<Sites> = AtomicPtr::new(ptr::null_mut());

/// What handled the signal before; it is written by [`claim`] alone, before the handler can run, and never freed.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(ptr::null_mut());

/// Has faults handled by the sites, which stay where they are until [`release`]; the error says what the system refused.
pub fn claim(sites: &Sites) -> Result<(), String> {
    let refused = || Err("the system does not let faults be handled".to_string());
    let here = handler as *const () as usize;
    // SAFETY: zero is a valid sigaction; the handler has the signature that SA_SIGINFO asks for.
    unsafe {
        let mut before: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGSEGV, ptr::null(), &mut before) != 0 {
            return refused();
        }
        // Somebody may have put another one there since the last time.
        if before.sa_sigaction != here {
            BEFORE.store(Box::into_raw(Box::new(before)), Ordering::Release);
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = here;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            if libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) != 0 {
                return refused();
            }
        }
    }
    PRESENT.store(ptr::from_ref(sites).cast_mut(), Ordering::Release);
    Ok(())
}

/// The sites are about to go.
pub fn release(sites: &Sites) {
    let mine = ptr::from_ref(sites).cast_mut();
    let _ = PRESENT.compare_exchange(mine, ptr::null_mut(), Ordering::AcqRel, Ordering::Acquire);
}

/// Lets this thread have the signal: a fault while it is blocked ends the process.
pub fn unblock() {
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGSEGV);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut());
    }
}

unsafe extern "C" fn handler(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: with SA_SIGINFO the third argument is the context. The sites belong to a translator that lives, and if the
    // fault is in its arena, this is its thread, which runs that code and changes no sites.
    unsafe {
        let rip = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize];
        if let Some(sites) = PRESENT.load(Ordering::Acquire).as_ref() {
            let offset = (*rip as u64).wrapping_sub(sites.arena.0);
            if offset < sites.arena.1 {
                if let Ok(n) = sites.list.binary_search_by_key(&(offset as u32), |&(site, _)| site) {
                    *rip = (sites.arena.0 + u64::from(sites.list[n].1)) as i64;
                    return;
                }
            }
        }
        let Some(before) = BEFORE.load(Ordering::Acquire).as_ref() else { return };
        match before.sa_sigaction {
            libc::SIG_DFL | libc::SIG_IGN => {
                // The instruction faults once more.
                libc::sigaction(signal, before, ptr::null_mut());
            }
            other if before.sa_flags & libc::SA_SIGINFO != 0 => {
                let other: unsafe extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
                    std::mem::transmute(other);
                other(signal, info, context);
            }
            other => {
                let other: unsafe extern "C" fn(c_int) = std::mem::transmute(other);
                other(signal);
            }
        }
    }
}
