//! Executable memory that is never writable and executable at once.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

static GENERATION: AtomicU32 = AtomicU32::new(1);

/// A number that no other filling of any arena has. (It wraps after four
/// billion fillings, each of which takes milliseconds.)
pub(crate) fn next_generation() -> u32 {
    loop {
        let number = GENERATION.fetch_add(1, Ordering::Relaxed);
        if number != 0 {
            return number;
        }
    }
}

/// A region of code, filled from its start.
pub(crate) struct Arena {
    base: NonNull<u8>,
    size: usize,
    used: usize,
}

// SAFETY: the region belongs to the arena alone and is not bound to a thread.
unsafe impl Send for Arena {}
// SAFETY: through a shared reference the region can only be read and executed.
unsafe impl Sync for Arena {}

const ALIGNMENT: usize = 32;
const PAGE: usize = 4096;
const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const READ_EXECUTE: libc::c_int = libc::PROT_READ | libc::PROT_EXEC;

impl Arena {
    /// Reserves at least `size` bytes.
    pub(crate) fn new(size: usize) -> Result<Arena, &'static str> {
        let size = size.max(1).next_multiple_of(PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let region = unsafe { libc::mmap(std::ptr::null_mut(), size, READ_WRITE, flags, -1, 0) };
        if region == libc::MAP_FAILED {
            return Err("the system gives no memory for generated code");
        }
        let base = NonNull::new(region.cast()).ok_or("the system gives no memory for generated code")?;
        let arena = Arena { base, size, used: 0 };
        // Fails early where executable memory is forbidden.
        arena.protect(READ_EXECUTE)?;
        Ok(arena)
    }

    fn protect(&self, protection: libc::c_int) -> Result<(), &'static str> {
        // SAFETY: the region is ours, and `&self` methods that run code in it are not active in this
        // thread; other threads have no access, since changing it needs `&mut self`.
        let result = unsafe { libc::mprotect(self.base.as_ptr().cast(), self.size, protection) };
        if result == 0 {
            Ok(())
        } else {
            Err("the system forbids executable memory")
        }
    }

    /// Adds code and gives its offset; `None` if it does not fit any more.
    pub(crate) fn push(&mut self, code: &[u8]) -> Result<Option<u32>, &'static str> {
        let start = self.used.next_multiple_of(ALIGNMENT);
        let Some(end) = start.checked_add(code.len()).filter(|&end| end <= self.size) else {
            return Ok(None);
        };
        self.protect(READ_WRITE)?;
        // SAFETY: start..end is inside the region, which is writable now and exclusively ours.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.base.as_ptr().add(start), code.len()) };
        self.used = end;
        self.protect(READ_EXECUTE)?;
        Ok(Some(start as u32))
    }

    /// Forgets all code.
    pub(crate) fn clear(&mut self) {
        self.used = 0;
    }

    /// Bytes in use.
    pub(crate) fn used(&self) -> usize {
        self.used
    }

    /// The address of the code at `offset`.
    #[inline]
    pub(crate) fn address(&self, offset: u32) -> *const u8 {
        self.base.as_ptr().wrapping_add(offset as usize)
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the region was mapped by `new` with this size, and no code runs in it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
    }
}
