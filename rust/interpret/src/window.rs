//! Windows: user memory of one address space at host addresses that follow from the guest's.
//!
//! The host's own mappings lie in the upper half of what the kernel gives a process (above 2^46), so what is below can
//! be the guest's: addresses below 512 GiB where they are (programs linked to fixed addresses), those from 2^46 on lower
//! by that much (position-independent programs, libraries, stacks). Generated code then reaches memory without a lookup,
//! once it has checked which of the two an address is; see `emit::window` of the translator.
//!
//! A page is there when it was touched, with the rights that a TLB entry would have, and goes whenever an entry would.
//! One vCPU of a process has the windows, and of its address spaces one.

use crate::cpu::Cpu;
use crate::mem::Target;
use crate::tlb::context;
use crate::walk::{Access, Kind, Trail};
use nonroot_memory::{P2M_CODE, P2M_DIRTY, P2M_WRITABLE};
use rustc_hash::FxHashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::OnceLock;

/// Guest minus host address of the upper window.
pub const DISTANCE: u64 = 1 << 46;
/// First guest address beyond the lower window, and the size of what lies between them and before the host's memory.
pub const LOW_END: u64 = 1 << 39;
/// What an address that was checked, plus or minus a displacement, may reach.
const GAP: u64 = 4 << 30;
/// Below it the kernel maps nothing.
const FIRST: u64 = 1 << 16;
/// Pages that may be there at once: each takes up to two of the host's 65,530 areas.
const MOST_PAGES: usize = 12_000;
/// Instructions that a page that was filled must have been worth, on the whole, and pages that need not.
const WORTH: u64 = 20_000;
const FREE_PAGES: u64 = 2_000;

/// Which window an address is in, or is thought to be in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The host address is the guest's.
    Low,
    /// The host address is the guest's less [`DISTANCE`].
    High,
    /// One or the other: the host address is the guest's modulo [`DISTANCE`].
    Either,
}

impl Part {
    /// That of a guest address, if it is in one.
    pub fn of(lin: u64) -> Option<Part> {
        if (FIRST..LOW_END - GAP).contains(&lin) {
            Some(Part::Low)
        } else if (DISTANCE + LOW_END + GAP..2 * DISTANCE).contains(&lin) {
            Some(Part::High)
        } else {
            None
        }
    }

    /// Whether a guest address is there.
    pub fn has(self, lin: u64) -> bool {
        Part::of(lin).is_some_and(|part| self == Part::Either || self == part)
    }

    fn host(self, lin: u64) -> u64 {
        match self {
            Part::Low => lin,
            Part::High => lin - DISTANCE,
            Part::Either => lin % DISTANCE,
        }
    }
}

/// Where the host maps nothing of its own is reserved once; or why it cannot be.
fn reserve() -> Result<(), String> {
    static RESERVED: OnceLock<Result<(), String>> = OnceLock::new();
    let result = RESERVED.get_or_init(|| {
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing.
        let at = unsafe {
            libc::mmap(
                FIRST as *mut libc::c_void,
                (DISTANCE + GAP - FIRST) as usize,
                libc::PROT_NONE,
                FLAGS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if at as u64 == FIRST {
            return Ok(());
        }
        if at != libc::MAP_FAILED {
            // SAFETY: mapped just above (by a kernel that does not know the flag).
            unsafe { libc::munmap(at, (DISTANCE + GAP - FIRST) as usize) };
        }
        Err("the lower half of this process's addresses is not free".to_string())
    });
    result.clone()
}

const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Whether a vCPU of this process has the windows.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// The windows, with whatever is in them.
pub struct Windows {
    /// The address space whose pages are there, by its asid (0: none) and page table.
    owner: u64,
    table: u64,
    /// Host address of the frame and whether it is writable, by guest page.
    pages: FxHashMap<u64, (u64, bool)>,
    /// Guest pages by host address of the frame.
    frames: FxHashMap<u64, Vec<u64>>,
    /// The host refused a page.
    refused: bool,
    /// Pages filled for the present owner, instructions that ran for it.
    fills: u64,
    instructions: u64,
    /// Pages ever filled, and how often an owner lost them.
    pub filled: u64,
    /// See above.
    pub lost: u64,
}

impl Windows {
    fn take() -> Result<Windows, String> {
        reserve()?;
        if TAKEN.swap(true, Ordering::AcqRel) {
            return Err("another vCPU of this process has the windows".to_string());
        }
        Ok(Windows {
            owner: 0,
            table: 0,
            pages: FxHashMap::default(),
            frames: FxHashMap::default(),
            refused: false,
            fills: 0,
            instructions: 0,
            filled: 0,
            lost: 0,
        })
    }

    /// Maps a page. False: the host refuses.
    fn fill(&mut self, page: u64, host: u64, write: bool) -> bool {
        let Some(part) = Part::of(page) else { return false };
        if self.pages.len() >= MOST_PAGES {
            self.empty();
        }
        let at = part.host(page) as *mut libc::c_void;
        self.forget(page);
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        // SAFETY: the frame is mapped RAM, of whose shared mapping this makes another one of a page (mremap(2), old_size
        // 0); the new place is in the reserved range, where there is nothing but such pages.
        let there = unsafe { libc::mremap(host as *mut libc::c_void, 0, 0x1000, flags, at) } == at;
        // SAFETY: the page just mapped.
        if !there || !write && unsafe { libc::mprotect(at, 0x1000, libc::PROT_READ) } != 0 {
            // Private memory has no second mapping.
            clear(part.host(page), 0x1000);
            self.refused = true;
            return false;
        }
        self.pages.insert(page, (host, write));
        self.frames.entry(host).or_default().push(page);
        self.fills += 1;
        self.filled += 1;
        true
    }

    /// Whether a page is there, and writable if `write`.
    fn has(&self, page: u64, write: bool) -> bool {
        self.pages.get(&page).is_some_and(|&(_, writable)| writable || !write)
    }

    /// Forgets a page.
    pub(crate) fn forget(&mut self, page: u64) {
        let Some((host, _)) = self.pages.remove(&page) else { return };
        if let Some(pages) = self.frames.get_mut(&host) {
            pages.retain(|&other| other != page);
            if pages.is_empty() {
                self.frames.remove(&host);
            }
        }
        if let Some(part) = Part::of(page) {
            clear(part.host(page), 0x1000);
        }
    }

    /// What leads to the frame at this host address is no more writable.
    pub(crate) fn forget_writable(&mut self, host: u64) {
        for page in self.frames.get(&host).into_iter().flatten() {
            if let (Some(part), Some((_, write))) = (Part::of(*page), self.pages.get_mut(page)) {
                if std::mem::take(write) {
                    let at = part.host(*page) as *mut libc::c_void;
                    // SAFETY: a page of the windows.
                    let done = unsafe { libc::mprotect(at, 0x1000, libc::PROT_READ) } == 0;
                    assert!(done, "the host does not take back the right to write");
                }
            }
        }
    }

    /// Forgets all pages.
    fn empty(&mut self) {
        if self.pages.len() < 64 {
            for page in self.pages.keys().copied().collect::<Vec<_>>() {
                self.forget(page);
            }
            return;
        }
        clear(FIRST, DISTANCE + GAP - FIRST);
        self.pages.clear();
        self.frames.clear();
    }

    /// The owner, if it is `asid`, loses the windows.
    pub(crate) fn lose(&mut self, asid: u64) {
        if self.owner == asid && asid != 0 {
            self.owner = 0;
            self.lost += 1;
            self.empty();
        }
    }

    /// Nobody has the windows.
    pub(crate) fn lose_all(&mut self) {
        self.lose(self.owner);
    }
}

/// Puts nothing at host addresses of the windows.
fn clear(at: u64, size: u64) {
    let place = at as *mut libc::c_void;
    // SAFETY: the range is in that of `reserve`, where there are only pages of the windows, to which nothing refers but
    // generated code, which is not running.
    let done =
        unsafe { libc::mmap(place, size as usize, libc::PROT_NONE, FLAGS | libc::MAP_FIXED, -1, 0) } == place;
    assert!(done, "the host does not take back pages of a window");
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.empty();
        TAKEN.store(false, Ordering::Release);
    }
}

/// How a page that generated code missed was come by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missed {
    /// It is there now.
    Filled,
    /// The access is for the interpreter.
    Other,
}

const PTE_DIRTY: u64 = 1 << 6;

impl Cpu {
    /// Whether the present address space has the windows, whatever the privilege level.
    #[inline]
    pub fn window_is_here(&self) -> bool {
        self.tlb.windows.as_ref().is_some_and(|w| w.owner == self.tlb.asid)
    }

    /// Whether code that uses the windows runs now.
    #[inline]
    pub fn windowed(&self) -> bool {
        self.cpl == 3 && self.tlb.context == context::USER && self.window_is_here()
    }

    /// Whether some address space has the windows.
    pub fn windows_are_owned(&self) -> bool {
        self.tlb.windows.as_ref().is_some_and(|w| w.owner != 0)
    }

    /// Whether guest memory can be mapped a second time now.
    pub fn windows_are_possible(&self) -> bool {
        !self.mem.may_be_private()
    }

    /// Gives the present address space the windows. The error says why it cannot have them.
    pub fn grant_windows(&mut self) -> Result<(), String> {
        if self.audit.is_some() || self.write_log.is_some() || !self.config.optimise.tlb {
            return Err("what is remembered is looked at".to_string());
        }
        let asid = self.tlb.asid;
        let table = self.r.cr3 & !0xfff;
        if self.tlb.windows.is_none() {
            self.tlb.windows = Some(Box::new(Windows::take()?));
        }
        if let Some(w) = &mut self.tlb.windows {
            w.lose_all();
            (w.owner, w.table, w.fills, w.instructions) = (asid, table, 0, 0);
        }
        self.update_exec_key();
        Ok(())
    }

    /// Takes the windows away.
    pub fn revoke_windows(&mut self) {
        if let Some(w) = &mut self.tlb.windows {
            w.lose_all();
        }
        self.update_exec_key();
    }

    /// Whether the host refused to map a page of guest memory a second time, which it does with private memory.
    pub fn windows_are_refused(&self) -> bool {
        self.tlb.windows.as_ref().is_some_and(|w| w.refused)
    }

    /// So many instructions ran in the windows; false if that is too few for the pages it took.
    pub fn windows_are_worth(&mut self, instructions: u64) -> bool {
        let Some(w) = &mut self.tlb.windows else { return false };
        w.instructions += instructions;
        w.fills.saturating_sub(FREE_PAGES) * WORTH <= w.instructions
    }

    /// Pages filled and owners that lost them so far.
    pub fn window_statistics(&self) -> (u64, u64) {
        self.tlb.windows.as_ref().map_or((0, 0), |w| (w.filled, w.lost))
    }

    /// Before the present translations are forgotten: what [`Cpu::keep_windows`] needs.
    pub(crate) fn window_owner(&self) -> Option<u64> {
        self.tlb.windows.as_ref().filter(|w| w.owner != 0).map(|w| w.table)
    }

    /// After they were: the same page table has the windows still, empty.
    pub(crate) fn keep_windows(&mut self, before: Option<u64>) {
        let (asid, table) = (self.tlb.asid, self.r.cr3 & !0xfff);
        if let Some(w) = &mut self.tlb.windows {
            if w.owner == 0 && before == Some(table) && !self.mem.may_be_private() {
                (w.owner, w.table) = (asid, table);
            }
        }
    }

    /// Makes the pages of an access by generated code be in the windows.
    pub fn fill_windows(&mut self, lin: u64, size: usize, write: bool) -> Missed {
        let missed = self.try_fill_windows(lin, size, write);
        if let (Missed::Other, Some(w)) = (missed, &mut self.tlb.windows) {
            // It cost as much.
            w.fills += 1;
        }
        missed
    }

    fn try_fill_windows(&mut self, lin: u64, size: usize, write: bool) -> Missed {
        let mut filled = false;
        let first = lin & !0xfff;
        let last = lin.wrapping_add(size.max(1) as u64 - 1) & !0xfff;
        for page in [first, last] {
            if self.tlb.windows.as_ref().is_none_or(|w| w.has(page, write)) {
                continue;
            }
            if Part::of(page).is_none() || !self.fill_window(page, write) {
                return Missed::Other;
            }
            filled = true;
        }
        // What was there all along, and yet faulted, faults for another reason.
        if filled {
            Missed::Filled
        } else {
            Missed::Other
        }
    }

    fn fill_window(&mut self, page: u64, write: bool) -> bool {
        if !self.windowed() || self.watches_page(page) {
            return false;
        }
        let access = Access { kind: if write { Kind::Write } else { Kind::Read }, system: false };
        let Ok(t) = self.translate(page, access) else {
            self.stop = None;
            return false;
        };
        let Target::Ram(host, entry) = self.target(t.gpa, write) else { return false };
        if write && entry & P2M_CODE != 0 {
            return false;
        }
        if write {
            self.before_ram_write(t.gpa, 1, entry);
        }
        if t.large {
            self.tlb.note_large(page);
        }
        let write = write || self.is_written(page, entry);
        self.tlb.windows.as_mut().is_some_and(|w| w.fill(page, host as u64, write))
    }

    /// Whether a page that is read may be written as well, without anybody having to be told.
    fn is_written(&self, page: u64, entry: u64) -> bool {
        let ready = P2M_DIRTY | P2M_WRITABLE;
        if entry & (ready | P2M_CODE) != ready {
            return false;
        }
        let mut trail = Trail::default();
        let Ok(leaf) = self.walk(page, &mut trail) else { return false };
        leaf.writable && trail.len > 0 && trail.entry[trail.len - 1] & PTE_DIRTY != 0
    }
}
