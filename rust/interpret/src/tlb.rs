//! The software TLB: which linear pages are directly readable and writable, and
//! where in host memory.
//!
//! There is a set of entries for each access context, so that changes of CPL or
//! RFLAGS.AC need no flush, and such a group of sets for each of the last few
//! address spaces, so that a switch between them needs none either. Only pages
//! that need no further checks are entered: writable entries have their PTE
//! dirty bit set, their frame in the dirty log, and no decoded code in it.
//!
//! The layout is shared with generated code: `linear ^ tag` of a page that is
//! entered is the offset in the page, and of any other page more than that.

use crate::audit::Invalidated;
use crate::cpu::Cpu;
use crate::state::*;
use crate::window::Windows;
use std::ops::{Deref, DerefMut};

/// Entries of one kind in one context. (A loop in Python missed 1024 of them once in 220 instructions, as its addresses fell.)
pub const ENTRIES: usize = 4096;

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

/// One entry. A tag is the address of a linear page; a tag that belongs into
/// another slot never matches.
#[derive(Clone, Copy, Default)]
#[repr(C, align(32))]
pub struct Entry {
    /// The page, if it is readable.
    pub read: u64,
    /// The page, if it is writable.
    pub write: u64,
    /// Host address of the page.
    pub host: u64,
    /// Not 0 if the page is global: it stays when CR3 changes.
    global: u64,
}

/// Where generated code for a linear address is.
#[derive(Clone, Copy, Default)]
#[repr(C, align(16))]
pub struct Jump {
    /// Linear address of an instruction.
    pub lin: u64,
    /// Host address of its code.
    pub code: u64,
}

/// Entries for jumps of generated code in one context.
pub const JUMPS: usize = 16384;
/// Filled slots that a set remembers, so that clearing it costs no more than filling it did.
const LOG: usize = 1024;
/// The same for jumps.
const JUMP_LOG: usize = 4096;

/// The entries of one context of one address space.
#[repr(C, align(64))]
pub struct Set {
    /// Data pages by bits 12 to 23 of the linear address.
    pub entries: [Entry; ENTRIES],
    /// Code by [`jump_slot`], or in one of the other [`JUMP_WAYS`] slots of its line.
    pub jumps: [Jump; JUMPS],
    /// Which mode the code in `jumps` is for.
    jump_mode: u64,
    filled: usize,
    log: [u16; LOG],
    jumps_filled: usize,
    jump_log: [u16; JUMP_LOG],
    /// A bit for each slot of `jumps` that is in a global page.
    jump_global: [u64; JUMPS / 64],
}

/// Where in [`Set::jumps`] a linear address belongs; generated code computes the same.
#[inline(always)]
pub fn jump_slot(lin: u64) -> usize {
    (lin as u32).wrapping_mul(JUMP_HASH) as usize >> 18
}

/// Slots in which the code of a linear address may be: its own and its neighbours in a line.
pub const JUMP_WAYS: usize = 4;
/// The multiplier of [`jump_slot`].
pub const JUMP_HASH: u32 = 0x9e37_79b1;

impl Set {
    /// What an empty slot holds: zero belongs into slot 0, so slot 0 holds another.
    fn nothing(slot: usize) -> Entry {
        let tag = if slot == 0 { 0x1000 } else { 0 };
        Entry { read: tag, write: tag, host: 0, global: 0 }
    }

    fn no_jump(slot: usize) -> Jump {
        Jump { lin: if slot < JUMP_WAYS { u64::MAX } else { 0 }, code: 0 }
    }

    /// Enters a readable page.
    #[inline]
    fn enter(&mut self, page: u64, host: u64, write: bool, global: bool) {
        let slot = (page >> 12) as usize & (ENTRIES - 1);
        self.log(slot);
        let never = Self::nothing(slot).write;
        let write = if write { page } else { never };
        self.entries[slot] = Entry { read: page, write, host, global: u64::from(global) };
    }

    fn clear(&mut self) {
        if self.filled == 0 && self.jumps_filled == 0 {
            return;
        }
        if self.filled <= LOG {
            for n in 0..self.filled {
                let slot = self.log[n] as usize;
                self.entries[slot] = Self::nothing(slot);
            }
        } else {
            self.entries.fill(Entry::default());
            self.entries[0] = Self::nothing(0);
        }
        self.filled = 0;
        self.clear_jumps();
    }

    fn jump_is_global(&self, slot: usize) -> bool {
        self.jump_global[slot / 64] >> (slot % 64) & 1 != 0
    }

    fn put_jump(&mut self, slot: usize, jump: Jump, global: bool) {
        self.log_jump(slot);
        self.jumps[slot] = jump;
        let (word, bit) = (slot / 64, 1 << (slot % 64));
        if global {
            self.jump_global[word] |= bit;
        } else {
            self.jump_global[word] &= !bit;
        }
    }

    fn for_mode(&mut self, mode: u64) {
        if self.jump_mode != mode {
            self.clear_jumps();
            self.jump_mode = mode;
        }
    }

    fn clear_jumps(&mut self) {
        if self.jumps_filled <= JUMP_LOG {
            for n in 0..self.jumps_filled {
                let slot = self.jump_log[n] as usize;
                self.jumps[slot] = Self::no_jump(slot);
            }
        } else {
            self.jumps.fill(Jump::default());
            self.jumps[..JUMP_WAYS].fill(Self::no_jump(0));
        }
        self.jumps_filled = 0;
        self.jump_global.fill(0);
    }

    /// Forgets code that begins in a page, or crosses into it.
    fn forget_jumps_of(&mut self, page: u64) {
        let there = |lin: u64| lin >> 12 == page >> 12;
        let mut forget = |slot: usize| {
            let lin = self.jumps[slot].lin;
            if there(lin) || there(lin.wrapping_add(MAX_INSTRUCTION - 1)) {
                self.jumps[slot] = Self::no_jump(slot);
            }
        };
        match self.jump_log.get(..self.jumps_filled) {
            Some(log) => log.iter().for_each(|&slot| forget(slot as usize)),
            None => (0..JUMPS).for_each(forget),
        }
    }

    /// Notes that a slot is filled.
    fn log(&mut self, slot: usize) {
        if self.filled < LOG {
            self.log[self.filled] = slot as u16;
        }
        self.filled += 1;
    }

    /// Notes that a slot of the jumps is filled.
    fn log_jump(&mut self, slot: usize) {
        if self.jumps_filled < JUMP_LOG {
            self.jump_log[self.jumps_filled] = slot as u16;
        }
        self.jumps_filled += 1;
    }

    /// Forgets what is not in global pages.
    fn keep_global(&mut self) {
        let filled = std::mem::take(&mut self.filled);
        let known = filled <= LOG;
        for n in 0..if known { filled } else { ENTRIES } {
            // What is noted again is never ahead of what is read.
            let slot = if known { self.log[n] as usize } else { n };
            if self.entries[slot].global == 0 {
                self.entries[slot] = Self::nothing(slot);
            } else {
                self.log(slot);
            }
        }
        let filled = std::mem::take(&mut self.jumps_filled);
        let known = filled <= JUMP_LOG;
        for n in 0..if known { filled } else { JUMPS } {
            // What is noted again is never ahead of what is read.
            let slot = if known { self.jump_log[n] as usize } else { n };
            if self.jump_is_global(slot) {
                self.log_jump(slot);
            } else {
                self.jumps[slot] = Self::no_jump(slot);
            }
        }
    }

    /// Takes what is in global pages from another set; this one is empty.
    fn inherit(&mut self, from: &Set) {
        let known = from.filled <= LOG;
        for n in 0..if known { from.filled } else { ENTRIES } {
            let slot = if known { from.log[n] as usize } else { n };
            if from.entries[slot].global != 0 {
                self.entries[slot] = from.entries[slot];
                self.log(slot);
            }
        }
        for (word, &all) in from.jump_global.iter().enumerate() {
            let mut bits = all;
            while bits != 0 {
                let slot = 64 * word + bits.trailing_zeros() as usize;
                self.jumps[slot] = from.jumps[slot];
                self.log_jump(slot);
                bits &= bits - 1;
            }
        }
        self.jump_global = from.jump_global;
        self.jump_mode = from.jump_mode;
    }

    /// Forgets a page if it is here.
    fn forget(&mut self, page: u64) {
        let slot = (page >> 12) as usize & (ENTRIES - 1);
        if self.entries[slot].read == page {
            self.entries[slot] = Self::nothing(slot);
        }
    }
}

/// An entry as the audit sees it.
pub(crate) struct Seen {
    pub page: u64,
    pub host: u64,
    pub write: bool,
    pub global: bool,
}

impl Set {
    fn seen(&self, slot: usize) -> Option<Seen> {
        let e = &self.entries[slot];
        let hits = |tag: u64| (tag >> 12) as usize % ENTRIES == slot;
        // (A page that is writable only is no less wrong or right.)
        let page = if hits(e.read) { e.read } else { e.write };
        let any = hits(e.read) || hits(e.write);
        any.then(|| Seen { page, host: e.host, write: hits(e.write), global: e.global != 0 })
    }

    /// The entries that hit.
    pub(crate) fn live_entries(&self) -> impl Iterator<Item = Seen> + '_ {
        let slots = if self.filled == 0 { 0 } else { ENTRIES };
        (0..slots).filter_map(|slot| self.seen(slot))
    }

    /// The entry of a page, if it hits.
    pub(crate) fn live_entry(&self, page: u64) -> Option<Seen> {
        self.seen((page >> 12) as usize % ENTRIES).filter(|e| e.page == page)
    }

    /// The jumps that hit, with their mode and whether they are in a global page.
    pub(crate) fn live_jumps(&self) -> impl Iterator<Item = (Jump, u64, bool)> + '_ {
        let jumps = if self.jumps_filled == 0 { &[] } else { &self.jumps[..] };
        let live = jumps.iter().enumerate().filter(|(_, jump)| jump.code != 0);
        live.map(|(slot, &jump)| (jump, self.jump_mode, self.jump_is_global(slot)))
    }
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
    /// The page is global.
    pub global: bool,
}

/// Entries for instruction fetch: so many pages, for so many address spaces (by their asid), and
/// for the upper half of all.
const EXEC_PAGES: usize = 256;
const EXEC_SPACES: usize = 4;
const EXEC_ENTRIES: usize = EXEC_PAGES * (EXEC_SPACES + 1);

/// Bytes of the longest instruction.
const MAX_INSTRUCTION: u64 = 15;

/// Address spaces whose entries are kept.
const SPACES: usize = 8;

/// The sets of one address space.
type Space = [Set; context::COUNT];

/// All cached translations of a vCPU.
pub struct Tlb {
    /// Set in use.
    pub current: *mut Set,
    /// Current asid (1..=4095).
    pub asid: u64,
    spaces: Spaces,
    /// Whose entries each space has; 0: nobody's.
    owner: [u64; SPACES],
    /// When each space was last switched to.
    used: [u64; SPACES],
    switches: u64,
    space: usize,
    /// Context in use.
    pub context: usize,
    /// Instruction fetch.
    pub exec: Box<[ExecEntry; EXEC_ENTRIES]>,
    next_asid: u64,
    /// How often asids were given anew.
    pub rounds: u64,
    pcid_asid: Box<[u16; 4096]>,
    /// Large pages that have entries: a bloom filter over linear address >> 21.
    large: Box<[u64; 64]>,
    any_large: bool,
    /// Pages of the lower half were global: other address spaces may have them.
    low_global: bool,
    /// Pages that have jumps: a bloom filter of two bits each over linear address >> 12.
    jump_pages: Box<[u64; 1024]>,
    /// Generation of the p2m that the entries were made from.
    pub generation: u64,
    /// Generation of the dirty log in which write entries were made.
    pub dirty_generation: u64,
    /// The windows, once this vCPU has had them.
    pub windows: Option<Box<Windows>>,
}

// SAFETY: `current` points into `spaces`, which this object owns.
unsafe impl Send for Tlb {}

/// All sets. Their memory is the host's zeroes until it is used: allocated with their alignment it would be filled with
/// zeroes, which takes as long as all the rest of making a vCPU.
struct Spaces {
    /// Owns what `place` points into; it is never touched itself.
    _memory: Vec<u8>,
    place: *mut [Space; SPACES],
}

impl Spaces {
    fn zeroed() -> Spaces {
        let mut memory = vec![0u8; size_of::<[Space; SPACES]>() + align_of::<[Space; SPACES]>()];
        let start = memory.as_mut_ptr();
        let pad = start.align_offset(align_of::<[Space; SPACES]>());
        // SAFETY: the allocation is larger than the type by its alignment, so the pad lies inside.
        let place = unsafe { start.add(pad).cast() };
        Spaces { _memory: memory, place }
    }
}

impl Deref for Spaces {
    type Target = [Space; SPACES];

    fn deref(&self) -> &[Space; SPACES] {
        // SAFETY: aligned, inside of the allocation, and initialised: a Space is plain old data for which all zeroes is
        // a valid value (and, but for the first slots, an empty one). Nothing else refers to the bytes.
        unsafe { &*self.place }
    }
}

impl DerefMut for Spaces {
    fn deref_mut(&mut self) -> &mut [Space; SPACES] {
        // SAFETY: as above, and self is borrowed for as long.
        unsafe { &mut *self.place }
    }
}

impl Default for Tlb {
    fn default() -> Self {
        let mut spaces = Spaces::zeroed();
        for set in spaces.iter_mut().flatten() {
            set.entries[0] = Set::nothing(0);
            set.jumps[..JUMP_WAYS].fill(Set::no_jump(0));
        }
        let mut owner = [0; SPACES];
        owner[0] = 1;
        let mut t = Tlb {
            current: std::ptr::null_mut(),
            asid: 1,
            spaces,
            owner,
            used: [0; SPACES],
            switches: 0,
            space: 0,
            context: 0,
            exec: Box::new([ExecEntry::default(); EXEC_ENTRIES]),
            next_asid: 2,
            rounds: 0,
            pcid_asid: Box::new([0; 4096]),
            large: Box::new([0; 64]),
            any_large: false,
            low_global: false,
            jump_pages: Box::new([0; 1024]),
            generation: 0,
            dirty_generation: 0,
            windows: None,
        };
        t.select(0);
        t
    }
}

/// The place of a number in a bloom filter of 4096 bits.
fn bloom(number: u64) -> (usize, u64) {
    let h = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
    ((h >> 6) as usize & 63, 1 << (h & 63))
}

/// The two places of a number in a bloom filter of 65536 bits.
fn bloom_pair(number: u64) -> [(usize, u64); 2] {
    let h = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    [h >> 48, h >> 32].map(|h| ((h >> 6) as usize & 1023, 1 << (h & 63)))
}

impl Tlb {
    /// Switches to a context.
    pub fn select(&mut self, context: usize) {
        self.context = context;
        self.current = &mut self.spaces[self.space][context];
    }

    /// The set of a context in the present address space, for code of a mode.
    pub fn set(&mut self, context: usize, mode: u64) -> *mut Set {
        let set = &mut self.spaces[self.space][context];
        set.for_mode(mode);
        set
    }

    /// The same, unless the set has code of another mode.
    pub fn set_of_mode(&mut self, context: usize, mode: u64) -> Option<*mut Set> {
        let set = &mut self.spaces[self.space][context];
        if set.jumps_filled == 0 {
            set.jump_mode = mode;
        }
        (set.jump_mode == mode).then_some(set as *mut Set)
    }

    /// Makes a set current that is always empty, until the next [`Tlb::select`].
    pub fn hide(&mut self) {
        self.current = &mut self.spaces[self.space][context::CHECKED];
    }

    /// The sets of all address spaces that may have entries, by their asid and context.
    pub(crate) fn sets(&self) -> impl Iterator<Item = (u64, usize, &Set)> {
        let spaces = self.spaces.iter().zip(self.owner).filter(|&(_, asid)| asid != 0);
        spaces.flat_map(|(space, asid)| {
            space.iter().enumerate().map(move |(context, set)| (asid, context, set))
        })
    }

    /// PCIDs by asid: only these can become current again.
    pub(crate) fn pcids(&self) -> rustc_hash::FxHashMap<u64, u64> {
        let known = self.pcid_asid.iter().enumerate().filter(|(_, &asid)| asid != 0);
        known.map(|(pcid, &asid)| (u64::from(asid), pcid as u64)).collect()
    }

    /// Whether a PCID's entries, in the present context, are those in use.
    pub(crate) fn is_current(&self, pcid: u64) -> bool {
        let set: *const Set = &self.spaces[self.space][self.context];
        let asid = u64::from(self.pcid_asid[pcid as usize & 0xfff]);
        asid == self.asid && self.owner[self.space] == asid && std::ptr::eq(set, self.current)
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.lose_windows();
        for set in self.spaces.iter_mut().flatten() {
            set.clear();
        }
        self.owner.fill(0);
        self.exec.fill(ExecEntry::default());
        self.pcid_asid.fill(0);
        self.large.fill(0);
        self.any_large = false;
        self.jump_pages.fill(0);
        self.next_asid = 1;
        self.rounds += 1;
    }

    fn fresh_asid(&mut self) -> u64 {
        if self.next_asid >= 4096 {
            self.clear();
        }
        let asid = self.next_asid;
        self.next_asid += 1;
        asid
    }

    /// Makes the space of an asid current: its own, a free one, or the one that was not used for longest.
    /// A new one gets the supervisor's entries of global pages from the space `from`.
    fn take_space(&mut self, asid: u64, from: Option<usize>) {
        let known = self.owner.iter().position(|&owner| owner == asid);
        self.space = known.unwrap_or_else(|| {
            let space = self
                .owner
                .iter()
                .position(|&owner| owner == 0)
                .unwrap_or_else(|| (0..SPACES).min_by_key(|&space| self.used[space]).unwrap_or(0));
            self.renew(space, from);
            self.owner[space] = asid;
            space
        });
        self.switches += 1;
        self.used[self.space] = self.switches;
        self.asid = asid;
        self.select(self.context);
    }

    /// Empties a space, but for what it has from `from`.
    fn renew(&mut self, space: usize, from: Option<usize>) {
        if from == Some(space) {
            for (context, set) in self.spaces[space].iter_mut().enumerate() {
                match context {
                    context::SUPERVISOR | context::SUPERVISOR_AC if set.filled + set.jumps_filled > 0 => {
                        set.keep_global();
                    }
                    _ => set.clear(),
                }
            }
            return;
        }
        for set in &mut self.spaces[space] {
            set.clear();
        }
        let Some(from) = from else { return };
        let (low, high) = self.spaces.split_at_mut(space.max(from));
        let (to, from) = if from < space { (&mut high[0], &low[from]) } else { (&mut low[space], &high[0]) };
        for context in [context::SUPERVISOR, context::SUPERVISOR_AC] {
            if from[context].filled + from[context].jumps_filled > 0 {
                to[context].inherit(&from[context]);
            }
        }
    }

    /// Makes `pcid` current, keeping its entries if `keep`; global pages stay in any case.
    pub fn switch(&mut self, pcid: u64, keep: bool) {
        let known = u64::from(self.pcid_asid[pcid as usize & 0xfff]);
        if keep && known != 0 {
            self.take_space(known, Some(self.space));
            return;
        }
        self.release(known);
        let fresh = self.fresh_asid();
        self.pcid_asid[pcid as usize & 0xfff] = fresh as u16;
        self.take_space(fresh, Some(self.space));
    }

    /// The space of an asid that will not come back is free.
    fn release(&mut self, asid: u64) {
        if let Some(windows) = &mut self.windows {
            windows.lose(asid);
        }
        for owner in self.owner.iter_mut().filter(|owner| **owner == asid) {
            *owner = 0;
        }
    }

    /// Forgets the entries of a PCID; `current` says that it is the one in use.
    pub fn forget_pcid(&mut self, pcid: u64, current: bool) {
        if current {
            self.switch(pcid, false);
        } else {
            self.release(u64::from(self.pcid_asid[pcid as usize & 0xfff]));
            self.pcid_asid[pcid as usize & 0xfff] = 0;
        }
    }

    fn lose_windows(&mut self) {
        if let Some(windows) = &mut self.windows {
            windows.lose_all();
        }
    }

    /// Forgets the entries of all PCIDs; `pcid` is the one in use.
    pub fn forget_all(&mut self, pcid: u64) {
        self.lose_windows();
        self.owner.fill(0);
        self.pcid_asid.fill(0);
        self.exec.fill(ExecEntry::default());
        let fresh = self.fresh_asid();
        self.pcid_asid[pcid as usize & 0xfff] = fresh as u16;
        self.take_space(fresh, None);
    }

    /// Enters a page that is readable in the current context, and writable if `write`.
    #[inline]
    pub fn enter(&mut self, page: u64, host: u64, write: bool, global: bool) {
        self.low_global |= global && page >> 63 == 0;
        // SAFETY: `current` points at a live Set of this object.
        unsafe { (*self.current).enter(page, host, write, global) };
    }

    /// Where in [`Tlb::exec`] a page of the present address space belongs.
    #[inline(always)]
    pub fn exec_slot(&self, lin: u64) -> usize {
        let space = if lin >> 63 == 0 { self.asid as usize % EXEC_SPACES } else { EXEC_SPACES };
        (lin >> 12) as usize % EXEC_PAGES + space * EXEC_PAGES
    }

    /// Notes that code of this page may be found by [`Set::jumps`].
    pub fn note_jump_page(&mut self, lin: u64) {
        for (word, bit) in bloom_pair(lin >> 12) {
            self.jump_pages[word] |= bit;
        }
    }

    /// Enters the generated code of an instruction in the current context. Only code
    /// of one mode is ever there. `crosses`: the instruction goes on in the next page.
    pub fn enter_jump(&mut self, lin: u64, code: u64, mode: u64, crosses: bool) {
        self.note_jump_page(lin);
        let e = &self.exec[self.exec_slot(lin)];
        let global =
            !crosses && e.global && e.tag & !0xfff == lin & !0xfff && e.context == self.context as u64;
        // SAFETY: as in enter().
        let set = unsafe { &mut *self.current };
        set.for_mode(mode);
        let own = jump_slot(lin);
        let ways = || (0..JUMP_WAYS).map(|way| own ^ way);
        let slot = match ways().find(|&slot| set.jumps[slot].lin == lin) {
            Some(slot) if set.jumps[slot].code == code => return,
            Some(slot) => slot,
            None => match ways().find(|&slot| set.jumps[slot].code == 0) {
                Some(slot) => slot,
                None => {
                    // The oldest goes, the others are looked at later.
                    for way in (1..JUMP_WAYS).rev() {
                        let (jump, bit) = (set.jumps[own ^ (way - 1)], set.jump_is_global(own ^ (way - 1)));
                        set.put_jump(own ^ way, jump, bit);
                    }
                    own
                }
            },
        };
        set.put_jump(slot, Jump { lin, code }, global);
        self.low_global |= global && lin >> 63 == 0;
    }

    /// Forgets all generated code.
    pub fn forget_jumps(&mut self) {
        for set in self.spaces.iter_mut().flatten() {
            set.clear_jumps();
        }
        self.jump_pages.fill(0);
    }

    /// Notes that part of a large page was entered.
    pub fn note_large(&mut self, lin: u64) {
        let (word, bit) = bloom(lin >> 21);
        self.large[word] |= bit;
        self.any_large = true;
    }

    /// Whether `lin` may lie in a large page that has entries.
    pub fn maybe_large(&self, lin: u64) -> bool {
        let (word, bit) = bloom(lin >> 21);
        self.any_large && self.large[word] & bit != 0
    }

    /// Forgets one page in every context of the present address space, and in all if it is global.
    pub fn forget_page(&mut self, lin: u64) {
        if let Some(windows) = &mut self.windows {
            windows.forget(lin & !0xfff);
        }
        // Translations of other address spaces stay, but for those of global pages (SDM 3A 4.10.4.1).
        let all = lin >> 63 != 0 || self.low_global;
        let spaces = if all { &mut self.spaces[..] } else { &mut self.spaces[self.space..=self.space] };
        for set in spaces.iter_mut().flatten() {
            set.forget(lin & !0xfff);
        }
        for space in 0..=EXEC_SPACES {
            self.exec[(lin >> 12) as usize % EXEC_PAGES + space * EXEC_PAGES] = ExecEntry::default();
        }
        if bloom_pair(lin >> 12).iter().all(|&(word, bit)| self.jump_pages[word] & bit != 0) {
            for set in spaces.iter_mut().flatten().filter(|set| set.jumps_filled != 0) {
                set.forget_jumps_of(lin & !0xfff);
            }
        }
    }

    /// Forgets that host pages are writable: all write entries that lead to the
    /// page at this host address.
    pub fn forget_writable(&mut self, host_page: u64) {
        if let Some(windows) = &mut self.windows {
            windows.forget_writable(host_page);
        }
        for set in self.spaces.iter_mut().flatten().filter(|set| set.filled != 0) {
            let known = set.filled <= LOG;
            for n in 0..if known { set.filled } else { ENTRIES } {
                let slot = if known { set.log[n] as usize } else { n };
                if set.entries[slot].host == host_page {
                    set.entries[slot].write = Set::nothing(slot).write;
                }
            }
        }
    }
}

impl Cpu {
    /// The access context by CPL, SMAP, AC and alignment checking.
    pub(crate) fn access_context(&self) -> usize {
        let r = &self.r;
        let ac = r.rflags & rflags::AC != 0;
        if self.cpl == 3 {
            if ac && r.cr0 & cr0::AM != 0 {
                context::CHECKED
            } else {
                context::USER
            }
        } else if r.cr4 & cr4::SMAP != 0 && !ac {
            context::SUPERVISOR
        } else {
            context::SUPERVISOR_AC
        }
    }

    /// Chooses the access context.
    pub fn tlb_context_changed(&mut self) {
        self.tlb.select(self.access_context());
        self.update_exec_key();
    }

    /// Forgets all translations of all address spaces (CR0.PG, CR4, p2m changes…).
    pub fn flush_tlb_all(&mut self) {
        self.audit_invalidated(Invalidated::All);
        self.stats.flushes += 1;
        let windows = self.window_owner();
        self.tlb.forget_all(self.current_pcid());
        self.keep_windows(windows);
        self.update_exec_key();
    }

    /// Forgets the translations of the current address space (MOV CR3 without bit 63).
    pub fn flush_tlb_current(&mut self) {
        self.stats.flushes += 1;
        let pcid = self.current_pcid();
        let windows = self.window_owner();
        self.tlb.forget_pcid(pcid, true);
        self.keep_windows(windows);
        self.update_exec_key();
    }

    /// Forgets the translations of one PCID.
    pub fn flush_tlb_pcid(&mut self, pcid: u64) {
        self.stats.flushes += 1;
        let current = self.current_pcid() == pcid;
        let windows = self.window_owner();
        self.tlb.forget_pcid(pcid, current);
        self.keep_windows(windows);
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
        let windows = self.window_owner();
        self.tlb.switch(self.current_pcid(), keep);
        self.keep_windows(windows);
        self.update_exec_key();
    }

    pub(crate) fn current_pcid(&self) -> u64 {
        if self.r.cr4 & cr4::PCIDE != 0 {
            self.r.cr3 & 0xfff
        } else {
            0
        }
    }
}
