//! Memory for generated code, mapped twice: executable at one address, writable
//! at another, never both at one.

use std::ptr::NonNull;

/// The part of the size that is for code that runs often: there is less of it.
const SHARE: usize = 3;

/// A region of code in two parts, each filled from its start: what runs often, and what runs rarely.
///
/// The host fetches whole lines and translates whole pages; in the first part nearly all of them are used.
pub struct Arena {
    writable: NonNull<u8>,
    executable: NonNull<u8>,
    size: usize,
    used: usize,
    rare: usize,
}

// SAFETY: the mappings belong to the arena alone and are not bound to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Reserves `size` bytes (a multiple of the page size). The error says what the system refused.
    pub fn new(size: usize) -> Result<Arena, String> {
        let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
        // SAFETY: a constant name; the result is checked.
        let fd = unsafe { libc::memfd_create(c"nonroot-code".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(failed("memfd_create for generated code"));
        }
        let map = |protection| {
            // SAFETY: a new mapping of our own file at an address of the kernel's choice.
            let at = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    size,
                    protection,
                    libc::MAP_SHARED | libc::MAP_NORESERVE,
                    fd,
                    0,
                )
            };
            (at != libc::MAP_FAILED).then(|| NonNull::new(at.cast::<u8>())).flatten()
        };
        // SAFETY: `fd` is ours.
        let sized = unsafe { libc::ftruncate(fd, size as libc::off_t) } == 0;
        let writable = if sized { map(libc::PROT_READ | libc::PROT_WRITE) } else { None };
        let executable = if writable.is_some() { map(libc::PROT_READ | libc::PROT_EXEC) } else { None };
        let result = match (writable, executable) {
            (Some(writable), Some(executable)) => {
                Ok(Arena { writable, executable, size, used: 0, rare: size / SHARE })
            }
            (Some(writable), None) => {
                let message = failed("executable memory for generated code");
                // SAFETY: mapped just above and not used.
                unsafe { libc::munmap(writable.as_ptr().cast(), size) };
                Err(message)
            }
            _ => Err(failed("memory for generated code")),
        };
        // SAFETY: `fd` is ours; the mappings keep the file.
        unsafe { libc::close(fd) };
        result
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used + self.rare - self.size / SHARE
    }

    /// Bytes that still fit, in either part.
    pub fn room(&self) -> usize {
        (self.size / SHARE - self.used).min(self.size - self.rare)
    }

    /// Forgets what comes after the first `keep` bytes, and all that runs rarely.
    pub fn truncate(&mut self, keep: usize) {
        self.used = keep;
        self.rare = self.size / SHARE;
    }

    /// Host address at which the code at `offset` runs.
    pub fn address(&self, offset: usize) -> u64 {
        self.executable.as_ptr() as u64 + offset as u64
    }

    /// Offset of the next byte that runs often.
    pub fn position(&self) -> usize {
        self.used
    }

    /// Offset of the next byte that runs rarely.
    pub fn rare_position(&self) -> usize {
        self.rare
    }

    /// Adds code; the caller has checked that there is room.
    pub fn push(&mut self, often: &[u8], rarely: &[u8]) {
        assert!(often.len().max(rarely.len()) <= self.room(), "generated code beyond its memory");
        for (code, at) in [(often, &mut self.used), (rarely, &mut self.rare)] {
            // SAFETY: the range is inside the writable mapping, and nothing refers to it.
            unsafe {
                std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_ptr().add(*at), code.len());
            }
            *at += code.len();
        }
    }

    /// Overwrites code that is not running.
    pub fn patch(&mut self, offset: usize, code: &[u8]) {
        let end = offset + code.len();
        assert!(
            end <= self.used || offset >= self.size / SHARE && end <= self.rare,
            "patch beyond the generated code"
        );
        // SAFETY: inside the used parts of the writable mapping; the vCPU's thread is here and not in that code.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.as_ptr().add(offset), code.len())
        };
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both were mapped in new() with this size; no code in them runs any more.
        unsafe {
            libc::munmap(self.writable.as_ptr().cast(), self.size);
            libc::munmap(self.executable.as_ptr().cast(), self.size);
        }
    }
}
