//! Page walks: linear → guest-physical, for 32-bit, PAE and 4-level paging
//! (SDM 3A, chapter 4), with permissions, A/D bits and error codes.

use crate::cpu::Cpu;
use crate::state::*;
use nonroot_memory::{P2M_FLAGS, P2M_PRESENT, PHYS_BITS};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// An access to be translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// What it does.
    pub kind: Kind,
    /// An implicit supervisor access (descriptor tables, TSS), whatever CPL is.
    pub system: bool,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address.
    pub gpa: u64,
    /// It lies in a page larger than 4 KiB.
    pub large: bool,
    /// Its page is global: a change of CR3 does not invalidate it.
    pub global: bool,
}

/// Page-fault error code bits.
pub mod pf {
    #![allow(missing_docs)]
    pub const P: u32 = 1;
    pub const W: u32 = 2;
    pub const U: u32 = 4;
    pub const RSVD: u32 = 8;
    pub const ID: u32 = 16;
}

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;
/// Physical-address bits of a 64-bit entry.
const ADDRESS: u64 = ((1 << 52) - 1) & !0xfff;
/// Address bits beyond the guest's physical address width.
const RESERVED_HIGH: u64 = ((1 << 52) - 1) & !((1 << PHYS_BITS) - 1);

/// The entries that a walk used, for setting A and D afterwards.
#[derive(Default)]
pub(crate) struct Trail {
    pub gpa: [u64; 4],
    pub entry: [u64; 4],
    pub len: usize,
}

impl Trail {
    fn push(&mut self, gpa: u64, entry: u64) {
        self.gpa[self.len] = gpa;
        self.entry[self.len] = entry;
        self.len += 1;
    }
}

/// A walk's end.
pub(crate) struct Leaf {
    pub gpa: u64,
    pub writable: bool,
    pub user: bool,
    pub nx: bool,
    pub large: bool,
    pub global: bool,
}

impl Leaf {
    /// The end of a walk of 64-bit entries at an entry that maps `1 << shift` bytes.
    fn of(entry: u64, lin: u64, shift: u32, rights: u64, nx: u64) -> Leaf {
        let mask = (1u64 << shift) - 1;
        Leaf {
            gpa: entry & ADDRESS & !mask | lin & mask,
            writable: rights & RW != 0,
            user: rights & US != 0,
            nx: nx != 0,
            large: shift > 12,
            global: entry & G != 0,
        }
    }
}

pub(crate) enum Bad {
    NotPresent,
    Reserved,
}

impl Cpu {
    /// Translates a linear address, raising #PF as the access demands; sets A and D.
    pub fn translate(&mut self, lin: u64, access: Access) -> X<Translation> {
        if self.r.cr0 & cr0::PG == 0 {
            return Ok(Translation { gpa: lin & 0xffff_ffff, large: false, global: false });
        }
        self.stats.walks += 1;
        let mut trail = Trail { gpa: [0; 4], entry: [0; 4], len: 0 };
        let user = self.cpl == 3 && !access.system;
        let r = &self.r;
        let nxe = r.efer & efer::NXE != 0;
        let mut code = if user { pf::U } else { 0 };
        match access.kind {
            Kind::Write => code |= pf::W,
            Kind::Execute if nxe && r.cr4 & cr4::PAE != 0 || r.cr4 & cr4::SMEP != 0 => code |= pf::ID,
            _ => {}
        }
        let leaf = match self.walk(lin, &mut trail) {
            Ok(leaf) => leaf,
            Err(Bad::NotPresent) => return Err(self.page_fault(lin, code)),
            Err(Bad::Reserved) => return Err(self.page_fault(lin, code | pf::P | pf::RSVD)),
        };
        let r = &self.r;
        let denied = if user {
            !leaf.user
                || match access.kind {
                    Kind::Read => false,
                    Kind::Write => !leaf.writable,
                    Kind::Execute => leaf.nx,
                }
        } else {
            let smap = leaf.user && r.cr4 & cr4::SMAP != 0 && (access.system || r.rflags & rflags::AC == 0);
            match access.kind {
                Kind::Read => smap,
                Kind::Write => smap || !leaf.writable && r.cr0 & cr0::WP != 0,
                Kind::Execute => leaf.nx || leaf.user && r.cr4 & cr4::SMEP != 0,
            }
        };
        if denied {
            return Err(self.page_fault(lin, code | pf::P));
        }
        self.set_accessed(&trail, access.kind == Kind::Write);
        let global = leaf.global && self.r.cr4 & cr4::PGE != 0;
        Ok(Translation { gpa: leaf.gpa, large: leaf.large, global })
    }

    /// Translates as supervisor without side effects or faults.
    pub fn translate_quiet(&self, lin: u64) -> Option<u64> {
        if self.r.cr0 & cr0::PG == 0 {
            return Some(lin & 0xffff_ffff);
        }
        if self.lma() && !Self::canonical(lin) {
            return None;
        }
        let mut trail = Trail { gpa: [0; 4], entry: [0; 4], len: 0 };
        self.walk(lin, &mut trail).ok().map(|leaf| leaf.gpa)
    }

    pub(crate) fn walk(&self, lin: u64, trail: &mut Trail) -> Result<Leaf, Bad> {
        if self.lma() {
            self.walk64(lin, trail)
        } else if self.r.cr4 & cr4::PAE != 0 {
            self.walk_pae(lin & 0xffff_ffff, trail)
        } else {
            self.walk32(lin & 0xffff_ffff, trail)
        }
    }

    fn walk64(&self, lin: u64, trail: &mut Trail) -> Result<Leaf, Bad> {
        let mut table = self.r.cr3 & ADDRESS;
        let reserved = RESERVED_HIGH | if self.r.efer & efer::NXE == 0 { NX } else { 0 };
        let (mut rights, mut nx) = (RW | US, 0);
        for level in (0..4u32).rev() {
            let shift = 12 + 9 * level;
            let at = table + (lin >> shift & 0x1ff) * 8;
            let e = self.phys_load(at, 8);
            if e & P == 0 {
                return Err(Bad::NotPresent);
            }
            let large = e & PS != 0 && level > 0;
            let mut bad = reserved;
            if large {
                // PML4 entries cannot map pages; 1 GiB and 2 MiB leaves reserve the low
                // address bits except PAT (bit 12).
                bad |= if level == 3 { PS } else { (1 << shift) - (1 << 13) };
            }
            if e & bad != 0 {
                return Err(Bad::Reserved);
            }
            trail.push(at, e);
            rights &= e;
            nx |= e & NX;
            if large || level == 0 {
                return Ok(Leaf::of(e, lin, shift, rights, nx));
            }
            table = e & ADDRESS;
        }
        unreachable!("level 0 always returns")
    }

    fn walk_pae(&self, lin: u64, trail: &mut Trail) -> Result<Leaf, Bad> {
        let pdpte = self.r.pdpte[(lin >> 30) as usize & 3];
        if pdpte & P == 0 {
            return Err(Bad::NotPresent);
        }
        let mut table = pdpte & ADDRESS;
        let nxe = self.r.efer & efer::NXE != 0;
        let reserved = RESERVED_HIGH | 0x7ff << 52 | if nxe { 0 } else { NX };
        let (mut rights, mut nx) = (RW | US, 0);
        for level in [1u32, 0] {
            let shift = 12 + 9 * level;
            let at = table + (lin >> shift & 0x1ff) * 8;
            let e = self.phys_load(at, 8);
            if e & P == 0 {
                return Err(Bad::NotPresent);
            }
            let large = e & PS != 0 && level > 0;
            if e & (reserved | if large { (1 << shift) - (1 << 13) } else { 0 }) != 0 {
                return Err(Bad::Reserved);
            }
            trail.push(at, e);
            rights &= e;
            nx |= e & NX;
            if large || level == 0 {
                return Ok(Leaf::of(e, lin, shift, rights, nx));
            }
            table = e & ADDRESS;
        }
        unreachable!("level 0 always returns")
    }

    fn walk32(&self, lin: u64, trail: &mut Trail) -> Result<Leaf, Bad> {
        let at = (self.r.cr3 & 0xffff_f000) + (lin >> 22) * 4;
        let pde = self.phys_load(at, 4);
        if pde & P == 0 {
            return Err(Bad::NotPresent);
        }
        if pde & PS != 0 && self.r.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 20:13 are address bits 39:32; bit 21 is reserved.
            if pde & 1 << 21 != 0 {
                return Err(Bad::Reserved);
            }
            trail.push(at, pde);
            let base = pde & 0xffc0_0000 | (pde >> 13 & 0xff) << 32;
            return Ok(Leaf {
                gpa: base | lin & 0x3f_ffff,
                writable: pde & RW != 0,
                user: pde & US != 0,
                nx: false,
                large: true,
                global: pde & G != 0,
            });
        }
        trail.push(at, pde);
        let at = (pde & 0xffff_f000) + (lin >> 12 & 0x3ff) * 4;
        let pte = self.phys_load(at, 4);
        if pte & P == 0 {
            return Err(Bad::NotPresent);
        }
        trail.push(at, pte);
        let rights = pde & pte;
        Ok(Leaf {
            gpa: pte & 0xffff_f000 | lin & 0xfff,
            writable: rights & RW != 0,
            user: rights & US != 0,
            nx: false,
            large: false,
            global: pte & G != 0,
        })
    }

    fn set_accessed(&mut self, trail: &Trail, write: bool) {
        for i in 0..trail.len {
            let leaf = i + 1 == trail.len;
            let want = if leaf && write { A | D } else { A };
            if trail.entry[i] & want == want {
                continue;
            }
            let gpa = trail.gpa[i];
            let entry = self.mem.entry(gpa >> 12);
            if entry & P2M_PRESENT == 0 {
                continue;
            }
            self.before_ram_write(gpa, 8, entry);
            let host = (entry & !P2M_FLAGS) + (gpa & 0xfff);
            // SAFETY: entries are naturally aligned, so inside the frame, which is mapped RAM.
            unsafe {
                if self.lma() || self.r.cr4 & cr4::PAE != 0 {
                    (*(host as *const AtomicU64)).fetch_or(want, Ordering::SeqCst);
                } else {
                    (*(host as *const AtomicU32)).fetch_or(want as u32, Ordering::SeqCst);
                }
            }
        }
    }

    /// Reads 4 or 8 bytes of guest-physical memory for the MMU; what is not RAM reads as 0.
    pub fn phys_load(&self, gpa: u64, size: usize) -> u64 {
        let entry = self.mem.entry(gpa >> 12);
        if entry & P2M_PRESENT == 0 {
            return 0;
        }
        let host = ((entry & !P2M_FLAGS) + (gpa & 0xfff)) as *const u8;
        // SAFETY: the frame is mapped RAM, and table entries do not cross frames.
        unsafe { crate::mem::host_load(host, size) }
    }

    /// Loads the PAE page-directory-pointer entries from CR3; #GP if one has
    /// reserved bits set (SDM 3A, 4.4.1).
    pub fn load_pdptes(&mut self, cr3: u64) -> X {
        let table = cr3 & 0xffff_ffe0;
        let mut pdpte = [0; 4];
        for (i, e) in pdpte.iter_mut().enumerate() {
            *e = self.phys_load(table + 8 * i as u64, 8);
            if *e & P != 0 && *e & (RESERVED_HIGH | !((1 << 52) - 1) | 0x1e6) != 0 {
                return Err(self.gp(0));
            }
        }
        self.r.pdpte = pdpte;
        Ok(())
    }
}
