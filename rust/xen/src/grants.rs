//! What the guest has granted to domain 0. Source: Xen's public/grant_table.h.
//!
//! A disk's pages are not marked: the guest's only vCPU is in the hypercall that its requests are done in, so
//! it takes nothing back meanwhile. Pages that a card's thread writes are.

use crate::ring::Place;
use nonroot_memory::{Memory, P2M_WRITABLE, PAGE_SIZE};
use std::sync::atomic::Ordering;

const PERMIT: u32 = 1;
const TYPE: u32 = 3;
const READONLY: u32 = 4;
const IN_USE: u32 = 8 | 16;
const ENTRY: u64 = 8;
/// Times that an entry is looked at which the guest keeps changing; as many as in Xen's grant_table.c.
const MOST_TRIES: usize = 5;
/// The number of the RAM's backing.
const RAM: usize = 0;

/// The table.
#[derive(Clone, Copy)]
pub struct Grants {
    /// Its first page.
    pub table: Place,
    /// Entries.
    pub entries: u32,
}

/// A granted page.
#[derive(Clone, Copy)]
pub struct Page {
    /// Its address in this process.
    pub host: *mut u8,
    /// The guest's frame.
    pub gfn: u64,
}

impl Grants {
    /// The page of a grant. None if there is no such grant, or not for that, or if its frame is neither RAM nor one of
    /// the pages that the table is among: a device's memory, say.
    pub fn page(&self, memory: &Memory, reference: u32, write: bool) -> Option<Page> {
        if reference >= self.entries {
            return None;
        }
        let at = self.table.offset + u64::from(reference) * ENTRY;
        let word = memory.word(self.table.backing, at).ok()?.load(Ordering::Acquire);
        // The upper half is the domain that may use it: 0.
        if word & TYPE != PERMIT || word >> 16 != 0 || (write && word & READONLY != 0) {
            return None;
        }
        let gfn = u64::from(memory.word(self.table.backing, at + 4).ok()?.load(Ordering::Acquire));
        let run = memory.lookup(gfn)?;
        if !(run.backing == RAM || run.backing == self.table.backing)
            || (write && run.flags & P2M_WRITABLE == 0)
        {
            return None;
        }
        Some(Page { host: memory.place(run.backing, run.offset, PAGE_SIZE).ok()?, gfn })
    }
}

impl Grants {
    /// Has `write` change a granted page, whose entry is marked as in use meanwhile. False, and nothing happens, if
    /// there is no such grant, or if the guest does not leave its entry alone.
    pub fn write(&self, memory: &Memory, reference: u32, write: impl FnOnce(Page)) -> bool {
        let at = self.table.offset + u64::from(reference) * ENTRY;
        let Ok(entry) = memory.word(self.table.backing, at) else { return false };
        let mut before = entry.load(Ordering::Acquire);
        let mut tries = 1..=MOST_TRIES;
        loop {
            if tries.next().is_none() || self.page(memory, reference, true).is_none() {
                return false;
            }
            match entry.compare_exchange(before, before | IN_USE, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => break,
                Err(now) => before = now,
            }
        }
        // What the entry says now stays so: the guest does not change what is in use.
        let page = self.page(memory, reference, true);
        let found = page.is_some();
        if let Some(page) = page {
            write(page);
        }
        entry.fetch_and(!(IN_USE & !before), Ordering::SeqCst);
        found
    }
}

/// Adds bytes of a page to a list for the kernel, joined to the last where they follow it.
pub fn add_piece(pieces: &mut Vec<libc::iovec>, page: Page, offset: u64, length: u64) {
    debug_assert!(offset + length <= PAGE_SIZE);
    let host = page.host as usize + offset as usize;
    match pieces.last_mut() {
        Some(last) if last.iov_base as usize + last.iov_len == host => last.iov_len += length as usize,
        _ => pieces.push(libc::iovec { iov_base: host as *mut libc::c_void, iov_len: length as usize }),
    }
}
