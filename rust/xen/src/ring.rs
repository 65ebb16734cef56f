//! The backend's end of a shared ring. Source: xen/include/public/io/ring.h.

use nonroot_memory::{Memory, MemoryError};
use std::sync::atomic::{fence, AtomicU32, Ordering};
use std::sync::Arc;

const HEADER: usize = 64;
const PAGE: usize = 4096;
const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 1;
const RSP_PROD: usize = 2;
const RSP_EVENT: usize = 3;

/// A place in the domain's backings; it stays valid whatever happens to the p2m.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The backing's number.
    pub backing: usize,
    /// Bytes.
    pub offset: u64,
}

/// A ring in pages that the guest has granted.
pub struct Ring {
    pages: Vec<*mut u8>,
    slot: usize,
    size: u32,
    /// Keeps the pages mapped.
    _memory: Arc<Memory>,
}

// SAFETY: the pages are mapped as long as `_memory` lives, and are only touched by atomics and raw copies.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    /// `slot`: bytes of the longer of request and response.
    pub fn new(memory: &Arc<Memory>, places: &[Place], slot: usize) -> Result<Ring, MemoryError> {
        let pages: Result<Vec<*mut u8>, MemoryError> =
            places.iter().map(|p| memory.place(p.backing, p.offset, PAGE as u64)).collect();
        let pages = pages?;
        if pages.is_empty() || places.iter().any(|p| p.offset % PAGE as u64 != 0) {
            return Err(MemoryError::BadBacking);
        }
        let fit = ((pages.len() * PAGE - HEADER) / slot) as u32;
        let size = 1 << fit.ilog2();
        Ok(Ring { pages, slot, size, _memory: memory.clone() })
    }

    fn word(&self, index: usize) -> &AtomicU32 {
        // SAFETY: an aligned word of the first page, which is mapped as long as self lives.
        unsafe { AtomicU32::from_ptr(self.pages[0].add(4 * index).cast()) }
    }

    /// The index behind the last published response.
    pub fn published(&self) -> u32 {
        self.word(RSP_PROD).load(Ordering::Acquire)
    }

    /// Requests from `index` on; None if there are more than the ring can hold.
    pub fn pending(&self, index: u32) -> Option<u32> {
        let count = self.word(REQ_PROD).load(Ordering::Acquire).wrapping_sub(index);
        (count <= self.size).then_some(count)
    }

    /// Calls `f` with (place, at, bytes) of each page's part of a slot's beginning.
    fn parts(&self, index: u32, length: usize, mut f: impl FnMut(*mut u8, usize, usize)) {
        let mut at = HEADER + (index & (self.size - 1)) as usize * self.slot;
        let mut done = 0;
        while done < length.min(self.slot) {
            let part = (PAGE - at % PAGE).min(length - done);
            // SAFETY: the slots end before the pages do, and the part before its page does.
            f(unsafe { self.pages[at / PAGE].add(at % PAGE) }, done, part);
            at += part;
            done += part;
        }
    }

    /// A copy of a slot's beginning.
    pub fn read(&self, index: u32, out: &mut [u8]) {
        self.parts(index, out.len(), |page, at, part| {
            // SAFETY: `part` bytes of a mapped page into `out`, which has as many from `at` on; memory
            // that the guest may change meanwhile, to which there are no references.
            unsafe { std::ptr::copy_nonoverlapping(page, out.as_mut_ptr().add(at), part) };
        });
    }

    /// Writes a slot's beginning.
    pub fn write(&self, index: u32, data: &[u8]) {
        self.parts(index, data.len(), |page, at, part| {
            // SAFETY: as in `read`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(at), page, part) };
        });
    }

    /// Publishes responses up to `new`, the last ones being from `old` on; whether the guest wants to hear of it.
    pub fn push(&self, old: u32, new: u32) -> bool {
        if old == new {
            return false;
        }
        self.word(RSP_PROD).store(new, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.word(RSP_EVENT).load(Ordering::Acquire);
        new.wrapping_sub(event) < new.wrapping_sub(old)
    }

    /// Asks to be notified when there are `wanted` requests from `index` on; whether there are already.
    pub fn final_check(&self, index: u32, wanted: u32) -> bool {
        self.word(REQ_EVENT).store(index.wrapping_add(wanted), Ordering::Release);
        fence(Ordering::SeqCst);
        self.word(REQ_PROD).load(Ordering::Acquire).wrapping_sub(index) >= wanted
    }
}
