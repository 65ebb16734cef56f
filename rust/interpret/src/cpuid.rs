//! CPUID from the policy, with the bits that depend on the CPU's state, and what
//! the policy's features mean for the engine (SDM 2, "CPUID").

use crate::config::{Config, CpuidLeaf};
use crate::cpu::Cpu;
use crate::state::*;

/// What the engine asks of the CPUID policy, looked up once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// Bits that may be set in CR4.
    pub cr4: u64,
    /// Bits that may be set in XCR0.
    pub xcr0: u64,
    /// Bits that may be set in EFER.
    pub efer: u64,
    /// INVPCID.
    pub invpcid: bool,
    /// RDTSCP.
    pub rdtscp: bool,
    /// RDPID.
    pub rdpid: bool,
    /// MONITOR and MWAIT.
    pub monitor: bool,
    /// XGETBV with ECX = 1.
    pub xgetbv1: bool,
    /// TSC deadlines.
    pub tsc_deadline: bool,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: bool,
    /// x2APIC.
    pub x2apic: bool,
    /// SYSENTER and SYSEXIT.
    pub sep: bool,
}

/// The policy's entry for a leaf and subleaf.
fn find(leaves: &[CpuidLeaf], leaf: u32, subleaf: u32) -> Option<&CpuidLeaf> {
    leaves
        .iter()
        .find(|l| l.leaf == leaf && l.subleaf == subleaf)
        .or_else(|| leaves.iter().find(|l| l.leaf == leaf && l.subleaf == u32::MAX))
}

impl Features {
    /// The features of a policy. Without any CPUID leaf everything is allowed.
    pub fn new(config: &Config) -> Features {
        let leaf = |leaf, subleaf| {
            find(&config.cpuid, leaf, subleaf).map_or([0; 4], |l| [l.eax, l.ebx, l.ecx, l.edx])
        };
        if config.cpuid.is_empty() {
            let cr4 = 0x7ff | cr4::UMIP | cr4::FSGSBASE | cr4::PCIDE | cr4::OSXSAVE | cr4::SMEP | cr4::SMAP;
            return Features {
                cr4: cr4 & !(cr4::VME | cr4::PVI),
                xcr0: 7,
                efer: efer::SCE | efer::LME | efer::LMA | efer::NXE,
                invpcid: true,
                rdtscp: true,
                rdpid: true,
                monitor: false,
                xgetbv1: true,
                tsc_deadline: true,
                tsc_adjust: true,
                x2apic: true,
                sep: true,
            };
        }
        let [_, _, c1, d1] = leaf(1, 0);
        let [_, b7, c7, _] = leaf(7, 0);
        let [xa, _, _, xd] = leaf(0xd, 0);
        let [x1, ..] = leaf(0xd, 1);
        let [_, _, _, de] = leaf(0x8000_0001, 0);
        let bit = |word: u32, n: u32| word >> n & 1 != 0;
        let mut allowed = cr4::TSD | cr4::MCE | cr4::PCE;
        let fxsr = bit(d1, 24);
        for (has, bits) in [
            (bit(d1, 2), cr4::DE),
            (bit(d1, 3) || bit(d1, 17), cr4::PSE),
            (bit(d1, 6), cr4::PAE),
            (bit(d1, 13), cr4::PGE),
            (fxsr, cr4::OSFXSR),
            (bit(d1, 25), cr4::OSXMMEXCPT),
            (bit(c7, 2), cr4::UMIP),
            (bit(b7, 0), cr4::FSGSBASE),
            (bit(c1, 17), cr4::PCIDE),
            (bit(c1, 26), cr4::OSXSAVE),
            (bit(b7, 7), cr4::SMEP),
            (bit(b7, 20), cr4::SMAP),
        ] {
            if has {
                allowed |= bits;
            }
        }
        let mut efer = 0;
        if bit(de, 11) {
            efer |= efer::SCE;
        }
        if bit(de, 29) {
            efer |= efer::LME | efer::LMA;
        }
        if bit(de, 20) {
            efer |= efer::NXE;
        }
        Features {
            cr4: allowed,
            xcr0: (u64::from(xd) << 32 | u64::from(xa)) & nonroot_native::xstate::SUPPORTED | 1,
            efer,
            invpcid: bit(b7, 10),
            rdtscp: bit(de, 27),
            rdpid: bit(c7, 22),
            monitor: bit(c1, 3),
            xgetbv1: bit(x1, 2),
            tsc_deadline: bit(c1, 24),
            tsc_adjust: bit(b7, 1),
            x2apic: bit(c1, 21),
            sep: bit(d1, 11),
        }
    }
}

impl Cpu {
    /// What CPUID returns: EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let leaves = &self.config.cpuid;
        let maximum = |base: u32| find(leaves, base, 0).map_or(0, |l| l.eax);
        let known = if leaf < 0x4000_0000 {
            leaf <= maximum(0)
        } else if leaf < 0x8000_0000 {
            find(leaves, leaf, subleaf).is_some()
        } else {
            leaf <= maximum(0x8000_0000)
        };
        // Intel: beyond the highest leaf comes the highest basic leaf's data (AMD: zeros).
        let leaf = if known { leaf } else { maximum(0) };
        let mut r = find(leaves, leaf, subleaf).map_or([0; 4], |l| [l.eax, l.ebx, l.ecx, l.edx]);
        let id = self.config.apic_id;
        match leaf {
            1 => {
                r[1] = r[1] & 0xff_ffff | id << 24;
                r[2] &= !(1 << 27);
                if self.r.cr4 & cr4::OSXSAVE != 0 {
                    r[2] |= 1 << 27;
                }
                // The APIC's bit is its global enable bit.
                if self.lapic.base() & 1 << 11 == 0 {
                    r[3] &= !(1 << 9);
                }
            }
            7 if subleaf == 0 => r[2] &= !(1 << 4),
            0xb | 0x1f if r != [0; 4] || leaf == 0xb => {
                r[2] = r[2] & !0xff | subleaf & 0xff;
                r[3] = id;
            }
            0xd => self.xsave_sizes(subleaf, &mut r),
            // Intel: SYSCALL exists in 64-bit mode alone.
            0x8000_0001 if self.mode != Mode::Long64 => r[3] &= !(1 << 11),
            _ => {}
        }
        r
    }

    /// Leaf 0xD: EBX holds the size of the area for the components now enabled.
    fn xsave_sizes(&self, subleaf: u32, r: &mut [u32; 4]) {
        if subleaf > 1 || find(&self.config.cpuid, 0xd, 0).is_none_or(|l| l.eax == 0) {
            return;
        }
        let mut size = 576;
        for component in 2..32 {
            if self.r.xcr0 >> component & 1 == 0 {
                continue;
            }
            if let Some(l) = find(&self.config.cpuid, 0xd, component) {
                if subleaf == 0 {
                    size = size.max(l.eax + l.ebx);
                } else {
                    let start = if l.ecx & 2 != 0 { (size + 63) & !63 } else { size };
                    size = start + l.eax;
                }
            }
        }
        if subleaf == 0 || r[0] & 0xa != 0 {
            r[1] = size;
        }
    }

    /// The CPUID instruction.
    pub(crate) fn execute_cpuid(&mut self) {
        let values = self.cpuid(self.r.gpr[reg::RAX] as u32, self.r.gpr[reg::RCX] as u32);
        for (register, value) in [reg::RAX, reg::RBX, reg::RCX, reg::RDX].into_iter().zip(values) {
            self.r.gpr[register] = u64::from(value);
        }
    }
}
