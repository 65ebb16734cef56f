//! The audit: whether all that is cached could have come from the guest's page tables, the p2m and
//! the bytes of its code. Off unless asked for; it only looks, and a difference ends the domain.
//!
//! A translation may be older than the page tables: the architecture lets it live until the guest
//! invalidates it (SDM 3A 4.10.4). So the audit keeps a record of its own of all translations that
//! the guest's walks have given and that it has not invalidated since, by PCID, and every cached one
//! must be among them. The rest has no such excuse and must be true now: the p2m's host addresses,
//! that writable pages are logged as dirty and hold no decoded code, that watched pages and the
//! local APIC are not there, that decoded blocks are made from the bytes that are in memory.

use crate::code_cache::{Block, NO_PAGE};
use crate::cpu::Cpu;
use crate::state::*;
use crate::tlb::{context, Seen};
use crate::walk::{Kind, Leaf, Trail};
use nonroot_memory::{P2M_CODE, P2M_DIRTY, P2M_FLAGS, P2M_FOREIGN, P2M_PRESENT, P2M_WRITABLE};
use rustc_hash::{FxHashMap, FxHashSet};
use std::fmt::Write;
use std::time::Duration;

/// Stands for a PCID where global pages are meant.
const GLOBAL: u64 = u64::MAX;
const PAGE: u64 = !0xfff;
/// Page-table entry bits.
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// What the guest has invalidated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalidated {
    /// Everything.
    All,
    /// Everything but global pages.
    NotGlobal,
    /// What one PCID has, but for global pages.
    Pcid(u64),
    /// One linear address of a PCID; in global pages too, if that is said.
    Address(u64, u64, bool),
}

/// A translation that a walk has given.
#[derive(Clone, Debug)]
struct Walked {
    /// Guest-physical page.
    gpa: u64,
    /// Bytes that the last entry maps.
    size: u64,
    user: bool,
    writable: bool,
    nx: bool,
    /// The dirty bit was set.
    dirty: bool,
    /// The entries, and where they are.
    trail: Vec<(u64, u64)>,
}

/// Translations by linear page.
type Pages = FxHashMap<u64, Vec<Walked>>;

/// The audit of one vCPU.
#[derive(Default)]
pub struct Audit {
    /// Everything is looked at when this many moments have passed.
    every: u32,
    moments: u32,
    /// By PCID, or [`GLOBAL`].
    walked: FxHashMap<u64, Pages>,
    /// Large pages among them: PCID, address, bytes.
    large: FxHashSet<(u64, u64, u64)>,
    /// The bytes that blocks were decoded from, by the block's address.
    bytes: FxHashMap<usize, Vec<u8>>,
    /// Generated code that was entered for jumps: key of its block and second page.
    codes: FxHashMap<u64, (u64, u64)>,
    found: bool,
    /// How often everything was looked at.
    pub rounds: u64,
    /// Translations that were compared.
    pub entries: u64,
    /// Those among them whose page-table entries have changed since, which is allowed.
    pub stale: u64,
    /// Blocks whose bytes were compared.
    pub blocks: u64,
}

impl Audit {
    /// An audit that looks at everything at each `every`th moment; none if that is 0.
    pub fn new(every: u32) -> Option<Box<Audit>> {
        (every > 0).then(|| Box::new(Audit { every, ..Audit::default() }))
    }

    fn invalidate(&mut self, what: Invalidated) {
        match what {
            Invalidated::All => {
                self.walked.clear();
                self.large.clear();
            }
            Invalidated::NotGlobal => self.walked.retain(|&pcid, _| pcid == GLOBAL),
            Invalidated::Pcid(pcid) => drop(self.walked.remove(&pcid)),
            Invalidated::Address(pcid, lin, global) => {
                for space in [Some(pcid), global.then_some(GLOBAL)].into_iter().flatten() {
                    let Some(pages) = self.walked.get_mut(&space) else { continue };
                    pages.remove(&(lin & PAGE));
                    for size in [1 << 21, 1 << 22, 1 << 30] {
                        let base = lin & !(size - 1);
                        if self.large.remove(&(space, base, size)) {
                            // All of a large page's translation goes, whatever part is named.
                            for (_, walked) in pages.iter_mut().filter(|(&at, _)| at & !(size - 1) == base) {
                                walked.retain(|w| w.size != size);
                            }
                        }
                    }
                }
            }
        }
    }

    fn of(&self, pcid: u64, lin: u64) -> &[Walked] {
        self.walked.get(&pcid).and_then(|pages| pages.get(&(lin & PAGE))).map_or(&[], Vec::as_slice)
    }

    /// All that a PCID may have for a page, global or not.
    fn both(&self, pcid: u64, lin: u64) -> impl Iterator<Item = &Walked> {
        self.of(pcid, lin).iter().chain(self.of(GLOBAL, lin))
    }
}

impl Walked {
    /// Whether an access context may use it so.
    fn permits(&self, cpu: &Cpu, context: usize, kind: Kind) -> Result<(), &'static str> {
        let user = matches!(context, context::USER | context::CHECKED);
        if user && !self.user {
            return Err("it is a supervisor's page");
        }
        match kind {
            Kind::Execute if self.nx => Err("it is not executable"),
            Kind::Execute if !user && self.user && cpu.r.cr4 & cr4::SMEP != 0 => Err("SMEP keeps it out"),
            Kind::Execute => Ok(()),
            _ if context == context::SUPERVISOR && self.user => Err("SMAP keeps it out"),
            Kind::Write if !self.writable && (user || cpu.r.cr0 & cr0::WP != 0) => Err("it is read-only"),
            Kind::Write if !self.dirty => Err("its dirty bit was not set"),
            _ => Ok(()),
        }
    }

    /// Its page-table entries have changed meanwhile, but for the accessed and dirty bits.
    fn is_stale(&self, cpu: &Cpu) -> bool {
        let size = if cpu.lma() || cpu.r.cr4 & cr4::PAE != 0 { 8 } else { 4 };
        let changed =
            |&(at, entry): &(u64, u64)| (cpu.phys_load(at, size) ^ entry) & !(ACCESSED | DIRTY) != 0;
        self.trail.iter().any(changed)
    }

    fn describe(&self) -> String {
        let mut text = format!("guest-physical {:#x}", self.gpa);
        for (at, entry) in &self.trail {
            let _ = write!(text, ", {entry:#x} at {at:#x}");
        }
        text
    }
}

/// Names of the access contexts.
const CONTEXTS: [&str; context::COUNT] =
    ["supervisor", "supervisor with access to user pages", "user", "alignment-checked"];

impl Cpu {
    /// The guest has invalidated translations.
    #[inline]
    pub(crate) fn audit_invalidated(&mut self, what: Invalidated) {
        if let Some(audit) = &mut self.audit {
            audit.invalidate(what);
        }
    }

    /// The audit's own walk for a page that has just been translated.
    fn audit_walk(&self, lin: u64) -> Option<(Walked, bool)> {
        let mut trail = Trail::default();
        let leaf = if self.r.cr0 & cr0::PG == 0 {
            let gpa = lin & 0xffff_ffff;
            Leaf { gpa, writable: true, user: true, nx: false, large: false, global: false }
        } else {
            self.walk(lin, &mut trail).ok()?
        };
        let trail: Vec<_> = trail.gpa.into_iter().zip(trail.entry).take(trail.len).collect();
        let size = match (leaf.large, self.lma(), trail.len()) {
            (false, ..) => 1 << 12,
            (true, true, 2) => 1 << 30,
            (true, false, _) if self.r.cr4 & cr4::PAE == 0 => 1 << 22,
            _ => 1 << 21,
        };
        let dirty = trail.last().is_none_or(|&(_, entry)| entry & DIRTY != 0);
        let global = leaf.global && self.r.cr4 & cr4::PGE != 0;
        let (user, writable, nx) = (leaf.user, leaf.writable, leaf.nx);
        Some((Walked { gpa: leaf.gpa & PAGE, size, user, writable, nx, dirty, trail }, global))
    }

    /// A translation has just been made, and may be cached.
    pub(crate) fn audit_translated(&mut self, lin: u64, gpa: u64, kind: Kind) {
        let Some(mut audit) = self.audit.take() else { return };
        let page = lin & PAGE;
        let result = match self.audit_walk(page) {
            None => Err("its page tables do not translate it".to_string()),
            Some((walked, _)) if walked.gpa != gpa & PAGE => {
                Err(format!("its page tables say {}", walked.describe()))
            }
            Some((walked, _)) if walked.trail.iter().any(|(_, entry)| entry & ACCESSED == 0) => {
                Err(format!("an accessed bit is not set: {}", walked.describe()))
            }
            Some((walked, global)) => {
                let permits = walked.permits(self, self.tlb.context, kind);
                let told = permits.map_err(|why| format!("{why}: {}", walked.describe()));
                let space = if global { GLOBAL } else { self.current_pcid() };
                if walked.size > 0x1000 {
                    audit.large.insert((space, page & !(walked.size - 1), walked.size));
                }
                let known = audit.walked.entry(space).or_default().entry(page).or_default();
                known.retain(|w| {
                    (w.gpa, w.size, w.user, w.writable, w.nx, w.dirty)
                        != (walked.gpa, walked.size, walked.user, walked.writable, walked.nx, walked.dirty)
                });
                known.push(walked);
                told
            }
        };
        self.audit = Some(audit);
        if let Err(why) = result {
            self.audit_failed(format!("{page:#x} was translated to {gpa:#x} for {kind:?}, but {why}"));
        }
    }

    /// A block was decoded.
    pub(crate) fn audit_decoded(&mut self, block: *const Block) {
        if self.audit.is_none() {
            return;
        }
        // SAFETY: the caller has just made it.
        let bytes = self.audit_bytes(unsafe { &*block });
        if let (Some(audit), Some(bytes)) = (&mut self.audit, bytes) {
            audit.bytes.insert(block as usize, bytes);
        }
    }

    /// All decoded blocks are freed.
    pub(crate) fn audit_freed(&mut self) {
        if let Some(audit) = &mut self.audit {
            audit.bytes.clear();
            audit.codes.clear();
        }
    }

    /// Generated code of a block is found by jumps from now on.
    pub(crate) fn audit_jump(&mut self, block: &Block, code: u64) {
        if let Some(audit) = &mut self.audit {
            audit.codes.insert(code, (block.key(), block.second_page));
        }
    }

    /// What memory holds where a block was decoded; None if that is not all RAM.
    fn audit_bytes(&self, b: &Block) -> Option<Vec<u8>> {
        let mut bytes = vec![0; usize::from(b.len)];
        let room = bytes.len().min(0x1000 - (b.gpa & 0xfff) as usize);
        let (first, rest) = bytes.split_at_mut(room);
        self.mem.read(b.gpa, first).ok()?;
        if !rest.is_empty() {
            self.mem.read(b.second_page, rest).ok()?;
        }
        Some(bytes)
    }

    /// Whether memory holds these bytes where a block was decoded.
    fn audit_same(&self, b: &Block, then: &[u8]) -> bool {
        let room = then.len().min(0x1000 - (b.gpa & 0xfff) as usize);
        [(b.gpa, &then[..room]), (b.second_page, &then[room..])].into_iter().all(|(gpa, then)| {
            let entry = if then.is_empty() { 0 } else { self.mem.entry(gpa >> 12) };
            let host = ((entry & !P2M_FLAGS) + (gpa & 0xfff)) as *const u8;
            // SAFETY: the frame is mapped RAM and the bytes are inside it; they are only looked at.
            let same = |(n, &byte): (usize, &u8)| unsafe { host.add(n).read_volatile() } == byte;
            then.is_empty() || entry & P2M_PRESENT != 0 && then.iter().enumerate().all(same)
        })
    }

    fn audit_failed(&mut self, what: String) {
        let Some(audit) = &mut self.audit else { return };
        if !std::mem::replace(&mut audit.found, true) {
            let reason = format!(
                "the audit found a wrong cache entry: {what} (rip {:#x}, cr3 {:#x})",
                self.r.rip, self.r.cr3
            );
            self.pending_exits.push(Exit::Failure { reason });
            self.interrupts_changed();
        }
    }

    /// A moment at which everything cached must be coherent. A failure is in [`Cpu::pending_exits`].
    #[inline]
    pub fn audit_now(&mut self) {
        if self.audit.is_some() {
            self.audit_moment();
        }
    }

    /// Writes from outside that have not been attended to yet.
    fn audit_must_wait(&self) -> bool {
        self.mem.generation() != self.tlb.generation
            || self.mem.dirty_generation() != self.tlb.dirty_generation
            || self.mem.stale_code_pending()
    }

    #[cold]
    fn audit_moment(&mut self) {
        let Some(mut audit) = self.audit.take() else { return };
        audit.moments += 1;
        let all = audit.moments >= audit.every;
        if all {
            audit.moments = 0;
            audit.rounds += 1;
        }
        let mut result = Ok(());
        if !self.audit_must_wait() {
            result = self.audit_caches(&mut audit, all);
            if result.is_err() && !audit.found {
                // Another thread may be about to say what it has changed.
                std::thread::sleep(Duration::from_millis(50));
                result = if self.audit_must_wait() { Ok(()) } else { self.audit_caches(&mut audit, all) };
            }
        }
        self.audit = Some(audit);
        if let Err(what) = result {
            self.audit_failed(what);
        }
    }

    fn audit_caches(&self, audit: &mut Audit, all: bool) -> Result<(), String> {
        self.audit_state()?;
        if all {
            self.audit_data(audit)?;
            self.audit_fetches(audit)?;
            self.audit_jumps(audit)?;
            self.audit_code(audit)?;
        }
        Ok(())
    }

    /// Whether what derives from the state is derived from this one.
    fn audit_state(&self) -> Result<(), String> {
        let (context, key) = (self.access_context(), self.exec_key());
        if self.tlb.context != context {
            return Err(format!(
                "the access context is {}, not {}",
                CONTEXTS[self.tlb.context], CONTEXTS[context]
            ));
        }
        if self.cache.exec_key != key {
            return Err(format!("blocks are found by the key {:#x}, not {key:#x}", self.cache.exec_key));
        }
        let pcid = self.current_pcid();
        if !self.tlb.is_current(pcid) {
            return Err(format!("the address space in use is not that of PCID {pcid}"));
        }
        Ok(())
    }

    /// One page has been invalidated: what there is for it must have been walked since.
    pub(crate) fn audit_page(&mut self, lin: u64) {
        let Some(audit) = self.audit.take() else { return };
        let pcids = self.tlb.pcids();
        let mut result = Ok(());
        for (asid, context, set) in self.tlb.sets() {
            if let (Some(&pcid), Some(e)) = (pcids.get(&asid), set.live_entry(lin & PAGE)) {
                result = result.and(self.audit_entry(&audit, pcid, context, &e).map(drop));
            }
        }
        self.audit = Some(audit);
        if let (Err(what), false) = (result, self.audit_must_wait()) {
            self.audit_failed(what);
        }
        self.audit_now();
    }

    /// Entries for data of all address spaces that may come back.
    fn audit_data(&self, audit: &mut Audit) -> Result<(), String> {
        let pcids = self.tlb.pcids();
        for (asid, context, set) in self.tlb.sets() {
            let Some(&pcid) = pcids.get(&asid) else { continue };
            for e in set.live_entries() {
                audit.entries += 1;
                audit.stale += u64::from(self.audit_entry(audit, pcid, context, &e)?);
            }
        }
        Ok(())
    }

    /// One entry for data; whether its page tables have changed since.
    fn audit_entry(&self, audit: &Audit, pcid: u64, context: usize, e: &Seen) -> Result<bool, String> {
        let wrong = |why: &str| {
            let kind = if e.write { "writable" } else { "readable" };
            let global = if e.global { "global, " } else { "" };
            let (page, host, context) = (e.page, e.host, CONTEXTS[context]);
            Err(format!(
                "TLB entry {page:#x} ({global}{context}, {kind}, PCID {pcid}) at host {host:#x}: {why}"
            ))
        };
        if context == context::CHECKED {
            return wrong("that context has no entries");
        }
        let kind = if e.write { Kind::Write } else { Kind::Read };
        let mut why = "no walk gave it since it was invalidated".to_string();
        for walked in audit.of(if e.global { GLOBAL } else { pcid }, e.page).iter().rev() {
            let right = walked
                .permits(self, context, kind)
                .and_then(|()| self.audit_frame(walked.gpa, e.host, e.write));
            if let Err(reason) = right {
                why = format!("{reason}: {}", walked.describe());
                continue;
            }
            if self.watches_page(e.page) {
                return wrong("it has a data breakpoint");
            }
            if walked.size > 0x1000 && !self.tlb.maybe_large(e.page) {
                return wrong("it is not noted as part of a large page");
            }
            return Ok(walked.is_stale(self));
        }
        wrong(&why)
    }

    /// Whether the p2m gives a frame this host address, for such accesses without an exit.
    fn audit_frame(&self, gpa: u64, host: u64, write: bool) -> Result<(), &'static str> {
        let entry = self.mem.entry(gpa >> 12);
        if entry & P2M_PRESENT == 0 {
            return Err("that is not RAM");
        }
        if entry & !P2M_FLAGS != host {
            return Err("the p2m leads elsewhere");
        }
        if self.lapic.mmio_page() == Some(gpa) {
            return Err("that is the local APIC");
        }
        if write && entry & P2M_WRITABLE == 0 {
            return Err("that is ROM");
        }
        if write && entry & P2M_DIRTY == 0 {
            return Err("that is not in the dirty log");
        }
        if write && entry & P2M_CODE != 0 {
            return Err("that holds decoded code");
        }
        Ok(())
    }

    /// Entries for instruction fetch.
    fn audit_fetches(&self, audit: &mut Audit) -> Result<(), String> {
        let pcids = self.tlb.pcids();
        for e in self.tlb.exec.iter().filter(|e| e.tag != 0) {
            let (page, asid) = (e.tag & PAGE, e.tag & 0xfff);
            let pcid = match pcids.get(&asid) {
                _ if e.global => GLOBAL,
                Some(&pcid) => pcid,
                None => continue,
            };
            audit.entries += 1;
            let context = e.context as usize;
            let permits = |w: &Walked| w.gpa == e.gpa && w.permits(self, context, Kind::Execute).is_ok();
            if !audit.of(pcid, page).iter().any(permits) {
                let walked: Vec<_> = audit.of(pcid, page).iter().map(Walked::describe).collect();
                return Err(format!(
                    "fetch entry {page:#x} ({}) of guest-physical {:#x}: walks gave {walked:?}",
                    CONTEXTS[context], e.gpa
                ));
            }
        }
        Ok(())
    }

    /// Whether an instruction of an address space is the block of this key.
    fn audit_leads(&self, audit: &Audit, pcid: u64, context: usize, lin: u64, key: u64, second: u64) -> bool {
        let executable = |w: &&Walked| w.permits(self, context, Kind::Execute).is_ok();
        let first = audit.both(pcid, lin).filter(executable).any(|w| w.gpa | lin & 0xfff == key >> 5);
        let next = (lin & PAGE).wrapping_add(0x1000);
        first && (second == NO_PAGE || audit.both(pcid, next).filter(executable).any(|w| w.gpa == second))
    }

    /// The tables by which blocks and generated code are found by linear address.
    fn audit_jumps(&self, audit: &Audit) -> Result<(), String> {
        if !self.config.optimise.tlb {
            return Ok(());
        }
        let pcids = self.tlb.pcids();
        for (asid, context, set) in self.tlb.sets() {
            let Some(&pcid) = pcids.get(&asid) else { continue };
            for (jump, mode, global) in set.live_jumps() {
                let Some(&(key, second)) = audit.codes.get(&jump.code) else {
                    return Err(format!(
                        "jump entry {:#x} leads to {:#x}, which no block has",
                        jump.lin, jump.code
                    ));
                };
                let space = if global { GLOBAL } else { pcid };
                if key & 0xf != mode & 0xf || !self.audit_leads(audit, space, context, jump.lin, key, second)
                {
                    let global = if global { "global, " } else { "" };
                    return Err(format!(
                        "jump entry {:#x} ({global}{}, PCID {pcid}, mode {mode}) leads to the code of \
                         guest-physical {:#x}, mode {}",
                        jump.lin,
                        CONTEXTS[context],
                        key >> 5,
                        key & 0xf
                    ));
                }
            }
        }
        for (lin, key, block) in self.cache.live_jumps() {
            let (asid, context, mode) = (key & 0xfff, (key >> 12 & 0xf) as usize, key >> 16 & 0xf);
            let Some(&pcid) = pcids.get(&asid) else { continue };
            if self.cache.is_older(key) {
                continue;
            }
            let found = block.key();
            if mode != found & 0xf || !self.audit_leads(audit, pcid, context, lin, found, block.second_page) {
                return Err(format!(
                    "block entry {lin:#x} ({}, PCID {pcid}, mode {mode}) leads to guest-physical {:#x}, mode {}",
                    CONTEXTS[context], block.gpa, found & 0xf
                ));
            }
            if self.mem.entry(block.gpa >> 12) & P2M_FOREIGN != 0 {
                return Err(format!("block entry {lin:#x} leads into a page that another process may write"));
            }
        }
        Ok(())
    }

    /// Decoded blocks: their keys, and that their bytes are those in memory.
    fn audit_code(&self, audit: &mut Audit) -> Result<(), String> {
        for (gfn, block) in self.cache.live_blocks() {
            let at = block.gpa;
            if self.mem.entry(gfn) & P2M_PRESENT != 0 && self.mem.entry(gfn) & P2M_CODE == 0 {
                return Err(format!("block {at:#x}: writes to its page {:#x} are not noticed", gfn << 12));
            }
            if block.key() >> 5 != at {
                return Err(format!("block {at:#x} is filed as {:#x}", block.key() >> 5));
            }
            if at >> 12 != gfn {
                continue;
            }
            audit.blocks += 1;
            let Some(then) = audit.bytes.get(&(block as *const Block as usize)) else { continue };
            if [gfn, block.second_page >> 12].iter().any(|&gfn| self.mem.entry(gfn) & P2M_FOREIGN != 0) {
                continue;
            }
            if !self.audit_same(block, then) {
                let now = self.audit_bytes(block);
                return Err(format!(
                    "block {at:#x} was decoded from {then:02x?}, memory holds {:02x?}",
                    now.unwrap_or_default()
                ));
            }
        }
        self.cache.misfiled().map_or(Ok(()), Err)
    }
}
