//! Whose turn a ring is: the engine's, or the backend process's. One page that both have mapped.

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU32, Ordering};

/// Nobody serves the ring at the moment.
pub const FREE: u32 = 0;
/// The engine does.
pub const PATH: u32 = 1;
/// The backend process does. A new ring is its own, and so is the ring of one that died in its turn.
pub const BACKEND: u32 = 2;

const PAGE: usize = 4096;

/// Two words: who serves the ring, and the index of the first request without a response.
pub struct Turn {
    page: *mut u8,
    at: usize,
}

// SAFETY: the page is a mapping of its own that lives as long as this object; it is only used through
// atomics.
unsafe impl Send for Turn {}
// SAFETY: as above.
unsafe impl Sync for Turn {}

impl Turn {
    /// Maps the page at `offset` of a file; the words are at byte `at` of it. The errno if that cannot be.
    pub fn map(fd: RawFd, offset: i64, at: usize) -> Result<Turn, i32> {
        if at % 8 != 0 || at + 8 > PAGE {
            return Err(libc::EINVAL);
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh shared mapping; no existing memory is affected.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, rights, libc::MAP_SHARED, fd, offset) };
        if page == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
        }
        Ok(Turn { page: page.cast(), at })
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: aligned, inside the mapping, which lives as long as self.
        unsafe { AtomicU32::from_ptr(self.page.add(self.at + 4 * index).cast()) }
    }

    /// Takes the ring if nobody serves it; the index of the first request without a response.
    pub fn take(&self) -> Option<u32> {
        self.word(0).compare_exchange(FREE, PATH, Ordering::SeqCst, Ordering::SeqCst).ok()?;
        Some(self.word(1).load(Ordering::SeqCst))
    }

    /// Whether the engine has it.
    pub fn is_path(&self) -> bool {
        self.word(0).load(Ordering::SeqCst) == PATH
    }

    /// The backend process has it for good.
    pub fn leave(&self) {
        self.word(0).store(BACKEND, Ordering::SeqCst);
    }

    /// Gives it back.
    pub fn give(&self, index: u32) {
        self.word(1).store(index, Ordering::SeqCst);
        self.word(0).store(FREE, Ordering::SeqCst);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this size; nobody holds self any more.
        unsafe { libc::munmap(self.page.cast(), PAGE) };
    }
}
