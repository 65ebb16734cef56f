//! The software TLB: which linear pages are directly readable and writable, and
//! where in host memory.
//!
//! Entries are tagged with an address-space number (asid), so that a switch of
//! address spaces costs a new number instead of a clearing. There is a set of
//! entries for each access context, so that changes of CPL or RFLAGS.AC need no
//! flush either. Only pages that need no further checks are entered: writable
//! entries have their PTE dirty bit set, their frame in the dirty log, and no
//! decoded code in it.

use crate::cpu::Cpu;
use crate::state::*;
use std::alloc::{alloc_zeroed, handle_alloc_error, Layout};

/// Entries of one kind in one context.
pub const ENTRIES: usize = 1024;

/// Access contexts.
pub mod context {
    /// Supervisor without access to user pages (SMAP in force).
    pub const SUPERVISOR: usize = 0;
    /// Supervisor with access to user pages (no SMAP, or RFLAGS.AC set).
    pub const SUPERVISOR_AC: usize = 1;
    /// CPL 3.
    pub const USER: usize = 2;
    /// CPL 3 with alignment checks: never holds entries.
    pub const CHECKED: usize = 3;
    /// Number of contexts.
    pub const COUNT: usize = 4;
}

/// One entry. `tag = linear page | asid`; 0 never matches.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Entry {
    /// Linear page address and asid.
    pub tag: u64,
    /// Host address minus linear address (wrapping).
    pub addend: u64,
}

/// The entries of one context.
#[repr(C)]
pub struct Set {
    /// Readable pages.
    pub read: [Entry; ENTRIES],
    /// Writable pages.
    pub write: [Entry; ENTRIES],
}

/// An executable page: where its instructions are.
#[derive(Clone, Copy, Default)]
pub struct ExecEntry {
    /// Linear page | asid.
    pub tag: u64,
    /// CPL-and-context key it was checked under.
    pub context: u64,
    /// Guest-physical page.
    pub gpa: u64,
}

/// Entries for instruction fetch.
pub const EXEC_ENTRIES: usize = 256;

/// All cached translations of a vCPU.
pub struct Tlb {
    /// Set in use.
    pub current: *mut Set,
    /// Current asid (1..=4095).
    pub asid: u64,
    sets: Box<[Set; context::COUNT]>,
    /// Context in use.
    pub context: usize,
    /// Instruction fetch.
    pub exec: Box<[ExecEntry; EXEC_ENTRIES]>,
    next_asid: u64,
    pcid_asid: Box<[u16; 4096]>,
    /// Large pages that have entries: a bloom filter over linear address >> 21.
    large: Box<[u64; 64]>,
    any_large: bool,
    /// Generation of the p2m that the entries were made from.
    pub generation: u64,
    /// Generation of the dirty log in which write entries were made.
    pub dirty_generation: u64,
}

// SAFETY: `current` points into `sets`, which this object owns.
unsafe impl Send for Tlb {}

impl Default for Tlb {
    fn default() -> Self {
        let layout = Layout::new::<[Set; context::COUNT]>();
        // SAFETY: the layout is that of the type and not empty; Set is plain old data for
        // which all zeroes is a valid (empty) value.
        let sets: Box<[Set; context::COUNT]> = unsafe {
            let zeroed = alloc_zeroed(layout);
            if zeroed.is_null() {
                handle_alloc_error(layout);
            }
            Box::from_raw(zeroed.cast())
        };
        let mut t = Tlb {
            current: std::ptr::null_mut(),
            asid: 1,
            sets,
            context: 0,
            exec: Box::new([ExecEntry::default(); EXEC_ENTRIES]),
            next_asid: 2,
            pcid_asid: Box::new([0; 4096]),
            large: Box::new([0; 64]),
            any_large: false,
            generation: 0,
            dirty_generation: 0,
        };
        t.select(0);
        t
    }
}

fn large_bit(lin: u64) -> (usize, u64) {
    let h = (lin >> 21).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    ((h >> 6) as usize & 63, 1 << (h & 63))
}

impl Tlb {
    /// Switches to a context.
    pub fn select(&mut self, context: usize) {
        self.context = context;
        self.current = &mut self.sets[context];
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for set in self.sets.iter_mut() {
            set.read.fill(Entry::default());
            set.write.fill(Entry::default());
        }
        self.exec.fill(ExecEntry::default());
        self.pcid_asid.fill(0);
        self.large.fill(0);
        self.any_large = false;
        self.asid = 1;
        self.next_asid = 2;
    }

    fn fresh_asid(&mut self) -> u64 {
        if self.next_asid >= 4096 {
            self.clear();
        }
        let asid = self.next_asid;
        self.next_asid += 1;
        asid
    }

    /// Makes `pcid` current, keeping its entries if `keep`.
    pub fn switch(&mut self, pcid: u64, keep: bool) {
        let known = u64::from(self.pcid_asid[pcid as usize & 0xfff]);
        self.asid = if keep && known != 0 {
            known
        } else {
            let fresh = self.fresh_asid();
            self.pcid_asid[pcid as usize & 0xfff] = fresh as u16;
            fresh
        };
    }

    /// Forgets the entries of a PCID; `current` says that it is the one in use.
    pub fn forget_pcid(&mut self, pcid: u64, current: bool) {
        self.pcid_asid[pcid as usize & 0xfff] = 0;
        if current {
            self.switch(pcid, false);
        }
    }

    /// Forgets the entries of all PCIDs; `pcid` is the one in use.
    pub fn forget_all(&mut self, pcid: u64) {
        self.pcid_asid.fill(0);
        self.switch(pcid, false);
    }

    /// Notes that part of a large page was entered.
    pub fn note_large(&mut self, lin: u64) {
        let (word, bit) = large_bit(lin);
        self.large[word] |= bit;
        self.any_large = true;
    }

    /// Whether `lin` may lie in a large page that has entries.
    pub fn maybe_large(&self, lin: u64) -> bool {
        let (word, bit) = large_bit(lin);
        self.any_large && self.large[word] & bit != 0
    }

    /// Forgets one page in every context (for all asids that share its slot).
    pub fn forget_page(&mut self, lin: u64) {
        let i = (lin >> 12) as usize;
        for set in self.sets.iter_mut() {
            set.read[i & (ENTRIES - 1)] = Entry::default();
            set.write[i & (ENTRIES - 1)] = Entry::default();
        }
        self.exec[i & (EXEC_ENTRIES - 1)] = ExecEntry::default();
    }

    /// Forgets that host pages are writable: all write entries that lead to the
    /// page at this host address.
    pub fn forget_writable(&mut self, host_page: u64) {
        for set in self.sets.iter_mut() {
            for e in set.write.iter_mut() {
                if e.tag != 0 && (e.tag & !0xfff).wrapping_add(e.addend) == host_page {
                    *e = Entry::default();
                }
            }
        }
    }
}

impl Cpu {
    /// Chooses the access context for CPL, SMAP, AC and alignment checking.
    pub fn tlb_context_changed(&mut self) {
        let r = &self.r;
        let ac = r.rflags & rflags::AC != 0;
        let context = if self.cpl == 3 {
            if ac && r.cr0 & cr0::AM != 0 {
                context::CHECKED
            } else {
                context::USER
            }
        } else if r.cr4 & cr4::SMAP != 0 && !ac {
            context::SUPERVISOR
        } else {
            context::SUPERVISOR_AC
        };
        self.tlb.select(context);
        self.update_exec_key();
    }

    /// Forgets all translations of all address spaces (CR0.PG, CR4, p2m changes…).
    pub fn flush_tlb_all(&mut self) {
        self.stats.flushes += 1;
        self.tlb.forget_all(self.current_pcid());
        self.update_exec_key();
    }

    /// Forgets the translations of the current address space (MOV CR3 without bit 63).
    pub fn flush_tlb_current(&mut self) {
        self.stats.flushes += 1;
        let pcid = self.current_pcid();
        self.tlb.forget_pcid(pcid, true);
        self.update_exec_key();
    }

    /// Forgets the translations of one PCID.
    pub fn flush_tlb_pcid(&mut self, pcid: u64) {
        self.stats.flushes += 1;
        let current = self.current_pcid() == pcid;
        self.tlb.forget_pcid(pcid, current);
        self.update_exec_key();
    }

    /// INVLPG: forgets one linear page, global or not, in the current address
    /// space (and, which is allowed, more).
    pub fn flush_tlb_page(&mut self, lin: u64) {
        if self.tlb.maybe_large(lin) {
            self.flush_tlb_all();
        } else {
            self.tlb.forget_page(lin);
            self.cache.forget_linear_page(lin);
        }
    }

    /// Switches to the address space of CR3 (already written).
    /// `keep`: bit 63 was set with CR4.PCIDE, translations of the PCID stay.
    pub fn tlb_switch(&mut self, keep: bool) {
        self.stats.flushes += 1;
        let keep = keep && self.config.optimise.pcid;
        self.tlb.switch(self.current_pcid(), keep);
        self.update_exec_key();
    }

    fn current_pcid(&self) -> u64 {
        if self.r.cr4 & cr4::PCIDE != 0 {
            self.r.cr3 & 0xfff
        } else {
            0
        }
    }
}
