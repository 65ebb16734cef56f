//! Model-specific registers (SDM 4): those with an effect, and plain storage as
//! the policy has it.

use crate::config::Config;
use crate::cpu::{Cpu, Reply};
use crate::state::*;
use std::collections::BTreeMap;

/// MSR numbers.
pub mod index {
    #![allow(missing_docs)]
    pub const TSC: u32 = 0x10;
    pub const APIC_BASE: u32 = 0x1b;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const PRED_CMD: u32 = 0x49;
    pub const FLUSH_CMD: u32 = 0x10b;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PAT: u32 = 0x277;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const X2APIC_FIRST: u32 = 0x800;
    pub const X2APIC_LAST: u32 = 0x8ff;
    pub const XSS: u32 = 0xda0;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// IA32_PAT after reset.
pub const PAT_RESET: u64 = 0x0007_0406_0007_0406;

/// MSRs with an effect or a fast path, and the policy's plain ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Msrs {
    /// Added to the TSC (IA32_TSC_ADJUST and writes of IA32_TIME_STAMP_COUNTER).
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u32,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// Plain storage: current values of the policy's MSRs.
    pub plain: BTreeMap<u32, u64>,
}

impl Msrs {
    /// The registers after power-up.
    pub fn new(config: &Config) -> Msrs {
        Msrs {
            pat: PAT_RESET,
            plain: config.msrs.iter().map(|(&index, &(value, _))| (index, value)).collect(),
            ..Msrs::default()
        }
    }
}

/// Why an MSR access did not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrError {
    /// There is no such register.
    Unknown,
    /// The value is not allowed.
    Refused,
}

/// Whether every entry of a PAT value is a memory type.
fn valid_pat(value: u64) -> bool {
    value.to_le_bytes().iter().all(|&t| matches!(t, 0 | 1 | 4..=7))
}

fn canonical(value: u64) -> Result<u64, MsrError> {
    if Cpu::canonical(value) {
        Ok(value)
    } else {
        Err(MsrError::Refused)
    }
}

impl Cpu {
    /// Reads an MSR as RDMSR does.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, MsrError> {
        use index::*;
        Ok(match msr {
            TSC => self.tsc(),
            APIC_BASE => self.lapic.base(),
            TSC_ADJUST if self.features.tsc_adjust => self.msr.tsc_adjust,
            SYSENTER_CS if self.features.sep => self.msr.sysenter_cs,
            SYSENTER_ESP if self.features.sep => self.msr.sysenter_esp,
            SYSENTER_EIP if self.features.sep => self.msr.sysenter_eip,
            PAT => self.msr.pat,
            TSC_DEADLINE if !self.features.tsc_deadline => return Err(MsrError::Unknown),
            TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                let now = self.now_ns();
                self.lapic.msr_read(msr, now).map_err(|_| MsrError::Refused)?
            }
            EFER => self.r.efer,
            STAR => self.msr.star,
            LSTAR => self.msr.lstar,
            CSTAR => self.msr.cstar,
            FMASK => self.msr.fmask,
            FS_BASE => self.r.seg[seg::FS].base,
            GS_BASE => self.r.seg[seg::GS].base,
            KERNEL_GS_BASE => self.msr.kernel_gs_base,
            TSC_AUX if self.features.rdtscp || self.features.rdpid => u64::from(self.msr.tsc_aux),
            // Commands, which cannot be read.
            PRED_CMD | FLUSH_CMD if self.msr.plain.contains_key(&msr) => return Err(MsrError::Refused),
            _ => *self.msr.plain.get(&msr).ok_or(MsrError::Unknown)?,
        })
    }

    /// Writes an MSR as WRMSR does.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), MsrError> {
        use index::*;
        match msr {
            TSC => {
                let delta = value.wrapping_sub(self.tsc());
                self.msr.tsc_adjust = self.msr.tsc_adjust.wrapping_add(delta);
                self.move_tsc(delta);
            }
            TSC_ADJUST if self.features.tsc_adjust => {
                let delta = value.wrapping_sub(self.msr.tsc_adjust);
                self.msr.tsc_adjust = value;
                self.move_tsc(delta);
            }
            APIC_BASE => {
                self.lapic.set_base(value).map_err(|_| MsrError::Refused)?;
                self.lapic_base_changed();
            }
            SYSENTER_CS if self.features.sep => self.msr.sysenter_cs = value,
            SYSENTER_ESP if self.features.sep => self.msr.sysenter_esp = canonical(value)?,
            SYSENTER_EIP if self.features.sep => self.msr.sysenter_eip = canonical(value)?,
            PAT => {
                if !valid_pat(value) {
                    return Err(MsrError::Refused);
                }
                self.msr.pat = value;
            }
            TSC_DEADLINE if !self.features.tsc_deadline => return Err(MsrError::Unknown),
            TSC_DEADLINE | X2APIC_FIRST..=X2APIC_LAST => {
                let now = self.now_ns();
                let effects = self.lapic.msr_write(msr, value, now).map_err(|_| MsrError::Refused)?;
                // Effects become exits later; the write itself cannot stop.
                let _ = self.lapic_effects(effects);
            }
            EFER => self.write_efer(value)?,
            STAR => self.msr.star = value,
            LSTAR => self.msr.lstar = canonical(value)?,
            CSTAR => self.msr.cstar = canonical(value)?,
            FMASK => self.msr.fmask = value & 0xffff_ffff,
            FS_BASE => self.r.seg[seg::FS].base = canonical(value)?,
            GS_BASE => self.r.seg[seg::GS].base = canonical(value)?,
            KERNEL_GS_BASE => self.msr.kernel_gs_base = canonical(value)?,
            TSC_AUX if self.features.rdtscp || self.features.rdpid => {
                self.msr.tsc_aux = u32::try_from(value).map_err(|_| MsrError::Refused)?;
            }
            // Commands: the predictors and caches they flush are not there.
            PRED_CMD | FLUSH_CMD if self.msr.plain.contains_key(&msr) => {
                if value > 1 {
                    return Err(MsrError::Refused);
                }
            }
            // Microcode updates: writes of the revision are how it is read, updates do nothing.
            BIOS_SIGN_ID | BIOS_UPDT_TRIG => {}
            _ => {
                let &(_, writable) = self.config.msrs.get(&msr).ok_or(MsrError::Unknown)?;
                let stored = self.msr.plain.entry(msr).or_default();
                if (*stored ^ value) & !writable != 0 {
                    return Err(MsrError::Refused);
                }
                *stored = value;
            }
        }
        Ok(())
    }

    fn move_tsc(&mut self, delta: u64) {
        self.msr.tsc_offset = self.msr.tsc_offset.wrapping_add(delta);
        self.tsc_offset_changed();
    }

    /// Tells the local APIC's timer about [`Msrs::tsc_offset`].
    pub fn tsc_offset_changed(&mut self) {
        self.lapic.set_tsc_offset(self.msr.tsc_offset as i64);
        self.interrupts_changed();
    }

    /// IA32_APIC_BASE changed: the registers may be elsewhere.
    pub fn lapic_base_changed(&mut self) {
        self.lapic_moved = self.lapic.mmio_page() != Some(0xfee0_0000);
        self.flush_tlb_all();
        self.interrupts_changed();
    }

    fn write_efer(&mut self, value: u64) -> Result<(), MsrError> {
        // LMA is read-only: writes of it are ignored.
        let lma = self.r.efer & efer::LMA;
        if value & !(self.features.efer | efer::LMA) != 0 {
            return Err(MsrError::Refused);
        }
        let value = value & !efer::LMA | lma;
        let changed = value ^ self.r.efer;
        if changed & efer::LME != 0 && self.r.cr0 & cr0::PG != 0 {
            return Err(MsrError::Refused);
        }
        self.r.efer = value;
        if changed & efer::NXE != 0 {
            self.flush_tlb_all();
        }
        Ok(())
    }

    /// All MSRs that hold state outside [`Registers`] and the local APIC, for state records.
    pub fn saved_msrs(&self) -> BTreeMap<u32, u64> {
        use index::*;
        let m = &self.msr;
        let mut all = m.plain.clone();
        all.extend([
            (TSC_ADJUST, m.tsc_adjust),
            (SYSENTER_CS, m.sysenter_cs),
            (SYSENTER_ESP, m.sysenter_esp),
            (SYSENTER_EIP, m.sysenter_eip),
            (PAT, m.pat),
            (STAR, m.star),
            (LSTAR, m.lstar),
            (CSTAR, m.cstar),
            (FMASK, m.fmask),
            (KERNEL_GS_BASE, m.kernel_gs_base),
            (TSC_AUX, u64::from(m.tsc_aux)),
        ]);
        all
    }

    /// Loads one of [`Cpu::saved_msrs`], without the effects of WRMSR. Read-only
    /// bits may change. Checks the value.
    pub fn restore_msr(&mut self, msr: u32, value: u64) -> Result<(), MsrError> {
        use index::*;
        let m = &mut self.msr;
        match msr {
            TSC_ADJUST => m.tsc_adjust = value,
            SYSENTER_CS => m.sysenter_cs = value,
            SYSENTER_ESP => m.sysenter_esp = canonical(value)?,
            SYSENTER_EIP => m.sysenter_eip = canonical(value)?,
            PAT if valid_pat(value) => m.pat = value,
            PAT => return Err(MsrError::Refused),
            STAR => m.star = value,
            LSTAR => m.lstar = canonical(value)?,
            CSTAR => m.cstar = canonical(value)?,
            FMASK => m.fmask = value & 0xffff_ffff,
            KERNEL_GS_BASE => m.kernel_gs_base = canonical(value)?,
            TSC_AUX => m.tsc_aux = u32::try_from(value).map_err(|_| MsrError::Refused)?,
            _ => *m.plain.get_mut(&msr).ok_or(MsrError::Unknown)? = value,
        }
        Ok(())
    }

    // ---- the instructions ----------------------------------------------------------------------

    pub(crate) fn rdmsr(&mut self) -> X {
        self.need_cpl0()?;
        let msr = self.r.gpr[reg::RCX] as u32;
        let value = match self.read_msr(msr) {
            Ok(value) => value,
            Err(MsrError::Unknown) if self.config.msr_exits => match self.reply.take() {
                None => return Err(self.exit(Exit::MsrRead { index: msr })),
                Some(Reply::Data(bytes)) => {
                    bytes.iter().take(8).enumerate().fold(0, |v, (n, &b)| v | u64::from(b) << (8 * n))
                }
                Some(Reply::Done) => 0,
                Some(Reply::Fault) => return Err(self.gp(0)),
            },
            Err(_) => return Err(self.gp(0)),
        };
        self.r.gpr[reg::RAX] = value & 0xffff_ffff;
        self.r.gpr[reg::RDX] = value >> 32;
        Ok(())
    }

    pub(crate) fn wrmsr(&mut self) -> X {
        self.need_cpl0()?;
        let msr = self.r.gpr[reg::RCX] as u32;
        let value = self.r.gpr[reg::RDX] << 32 | self.r.gpr[reg::RAX] & 0xffff_ffff;
        match self.write_msr(msr, value) {
            Ok(()) => Ok(()),
            Err(MsrError::Unknown) if self.config.msr_exits => match self.reply.take() {
                None => Err(self.exit(Exit::MsrWrite { index: msr, value })),
                Some(Reply::Fault) => Err(self.gp(0)),
                Some(_) => Ok(()),
            },
            Err(_) => Err(self.gp(0)),
        }
    }
}
