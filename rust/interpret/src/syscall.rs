//! SYSCALL, SYSENTER and their returns, FS and GS bases, time stamps, HLT,
//! hypercalls, and the instructions of other operating modes that do not exist
//! here (SDM 2).

use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic};

/// Access rights of the flat segments that SYSCALL and SYSENTER load.
const CODE64: u32 = 0xa09b;
const CODE32: u32 = 0xc09b;
const DATA: u32 = 0xc093;
/// The same with DPL 3.
const USER: u32 = 3 << ar::DPL_SHIFT;
/// RFLAGS bits that SYSRET loads from R11.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

impl Cpu {
    /// Loads CS and SS with flat segments at privilege level `cpl`.
    fn flat_segments(&mut self, cs: u16, code: u32, ss: u16, cpl: u8) {
        let user = if cpl == 3 { USER } else { 0 };
        let segment = |selector, ar| Segment { base: 0, limit: 0xffff_ffff, ar: ar | user, selector };
        self.r.seg[seg::CS] = segment(cs, code);
        self.r.seg[seg::SS] = segment(ss, DATA);
        self.cpl = cpl;
        self.update_mode();
    }

    fn syscall(&mut self) -> X {
        // Intel: in 64-bit mode alone (AMD: in compatibility and legacy mode as well).
        if self.mode != Mode::Long64 || self.r.efer & efer::SCE == 0 {
            return Err(self.ud());
        }
        let flags = self.rflags() & !rflags::RF;
        self.r.gpr[reg::RCX] = self.next_rip;
        self.r.gpr[11] = flags;
        let cleared = flags & !self.msr.fmask;
        self.r.flags = crate::flags::Flags::from_rflags(cleared);
        self.r.rflags = cleared & !rflags::STATUS | 2;
        self.next_rip = self.msr.lstar;
        self.crossed_by_syscall();
        // The single-step trap is by TF as it is now.
        self.guest_debug.no_trap = cleared & rflags::TF == 0;
        if cleared & (rflags::IF | rflags::TF) != 0 {
            self.interrupts_changed();
        }
        Ok(())
    }

    /// The segments and privilege level after SYSCALL; RFLAGS are as it leaves them.
    pub fn crossed_by_syscall(&mut self) {
        let cs = (self.msr.star >> 32) as u16 & !3;
        self.flat_segments(cs, CODE64, cs.wrapping_add(8), 0);
    }

    /// The same after SYSRET to 64-bit code.
    pub fn crossed_by_sysret(&mut self) {
        let base = (self.msr.star >> 48) as u16;
        self.flat_segments(base.wrapping_add(16) | 3, CODE64, base.wrapping_add(8) | 3, 3);
    }

    /// Whether SYSCALL is on, and leaves IF, TF and AC clear.
    #[inline]
    pub fn quick_syscalls(&self) -> bool {
        let cleared = rflags::IF | rflags::TF | rflags::AC;
        self.r.efer & efer::SCE != 0 && self.msr.fmask & cleared == cleared
    }

    fn sysret(&mut self, wide: bool) -> X {
        if self.mode != Mode::Long64 || self.r.efer & efer::SCE == 0 {
            return Err(self.ud());
        }
        self.need_cpl0()?;
        let rcx = self.r.gpr[reg::RCX];
        // Intel: checked here, at level 0 (AMD: the fetch at level 3 faults).
        if wide && !Self::canonical(rcx) {
            return Err(self.gp(0));
        }
        let flags = self.r.gpr[11] & SYSRET_FLAGS | 2;
        self.r.flags = crate::flags::Flags::from_rflags(flags);
        self.r.rflags = flags & !rflags::STATUS;
        self.next_rip = if wide { rcx } else { rcx & 0xffff_ffff };
        if wide {
            self.crossed_by_sysret();
        } else {
            let base = (self.msr.star >> 48) as u16;
            self.flat_segments(base | 3, CODE32, base.wrapping_add(8) | 3, 3);
        }
        self.interrupts_changed();
        Ok(())
    }

    fn sysenter(&mut self) -> X {
        if !self.features.sep {
            return Err(self.ud());
        }
        let cs = self.msr.sysenter_cs as u16 & !3;
        if self.mode == Mode::Real || cs == 0 {
            return Err(self.gp(0));
        }
        let long = self.lma();
        let width = if long { u64::MAX } else { 0xffff_ffff };
        self.r.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
        self.next_rip = self.msr.sysenter_eip & width;
        self.r.gpr[reg::RSP] = self.msr.sysenter_esp & width;
        self.flat_segments(cs, if long { CODE64 } else { CODE32 }, cs.wrapping_add(8), 0);
        self.interrupts_changed();
        Ok(())
    }

    fn sysexit(&mut self, wide: bool) -> X {
        if !self.features.sep {
            return Err(self.ud());
        }
        let base = self.msr.sysenter_cs as u16 & !3;
        if self.mode == Mode::Real || base == 0 || self.cpl != 0 {
            return Err(self.gp(0));
        }
        let (rip, rsp) = (self.r.gpr[reg::RDX], self.r.gpr[reg::RCX]);
        if wide {
            if !Self::canonical(rip) || !Self::canonical(rsp) {
                return Err(self.gp(0));
            }
            self.next_rip = rip;
            self.r.gpr[reg::RSP] = rsp;
            self.flat_segments(base.wrapping_add(32) | 3, CODE64, base.wrapping_add(40) | 3, 3);
        } else {
            self.next_rip = rip & 0xffff_ffff;
            self.r.gpr[reg::RSP] = rsp & 0xffff_ffff;
            self.flat_segments(base.wrapping_add(16) | 3, CODE32, base.wrapping_add(24) | 3, 3);
        }
        self.interrupts_changed();
        Ok(())
    }

    fn swapgs(&mut self) -> X {
        if self.mode != Mode::Long64 {
            return Err(self.ud());
        }
        self.need_cpl0()?;
        std::mem::swap(&mut self.r.seg[seg::GS].base, &mut self.msr.kernel_gs_base);
        Ok(())
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
    fn segment_base(&mut self, i: &Instruction, segment: usize, write: bool) -> X {
        if self.mode != Mode::Long64 || self.r.cr4 & cr4::FSGSBASE == 0 {
            return Err(self.ud());
        }
        let register = i.op0_register();
        if write {
            let value = self.read_reg(register);
            if !Self::canonical(value) {
                return Err(self.gp(0));
            }
            self.r.seg[segment].base = value;
        } else {
            self.write_reg(register, self.r.seg[segment].base);
        }
        Ok(())
    }

    /// STAC and CLAC.
    fn set_ac(&mut self, set: bool) -> X {
        if self.features.cr4 & cr4::SMAP == 0 || self.cpl != 0 {
            return Err(self.ud());
        }
        if set {
            self.r.rflags |= rflags::AC;
        } else {
            self.r.rflags &= !rflags::AC;
        }
        self.tlb_context_changed();
        Ok(())
    }

    /// #GP if CR4.TSD keeps the TSC from this privilege level.
    fn check_tsd(&mut self) -> X {
        if self.cpl > 0 && self.r.cr4 & cr4::TSD != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// Bit 0: RDTSC is allowed at any privilege level, bit 1: RDTSCP too; and IA32_TSC_AUX.
    #[inline]
    pub fn time_stamps(&self) -> (u8, u32) {
        let allowed = self.r.cr4 & cr4::TSD == 0;
        (u8::from(allowed) | u8::from(allowed && self.features.rdtscp) << 1, self.msr.tsc_aux)
    }

    fn rdtsc(&mut self) -> X {
        self.check_tsd()?;
        let tsc = self.tsc();
        self.r.gpr[reg::RAX] = tsc & 0xffff_ffff;
        self.r.gpr[reg::RDX] = tsc >> 32;
        Ok(())
    }

    fn rdtscp(&mut self) -> X {
        if !self.features.rdtscp {
            return Err(self.ud());
        }
        self.rdtsc()?;
        self.r.gpr[reg::RCX] = u64::from(self.msr.tsc_aux);
        Ok(())
    }

    fn rdpid(&mut self, i: &Instruction) -> X {
        if !self.features.rdpid {
            return Err(self.ud());
        }
        self.write_reg(i.op0_register(), u64::from(self.msr.tsc_aux));
        Ok(())
    }

    fn hlt(&mut self) -> X {
        self.need_cpl0()?;
        self.activity = Activity::Halted;
        Err(self.exit_after(Exit::Halt))
    }

    /// MONITOR and MWAIT: stores cannot be watched, so MWAIT ends at once, as it may.
    fn monitor(&mut self) -> X {
        if !self.features.monitor || self.cpl != 0 {
            return Err(self.ud());
        }
        if self.r.gpr[reg::RCX] as u32 > 1 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    /// The instructions of this file. `Ok(false)`: not one of them.
    pub(crate) fn execute_syscall(&mut self, i: &Instruction) -> X<bool> {
        use Mnemonic::*;
        match i.mnemonic() {
            Syscall => self.syscall()?,
            Sysret => self.sysret(false)?,
            Sysretq => self.sysret(true)?,
            Sysenter => self.sysenter()?,
            Sysexit => self.sysexit(false)?,
            Sysexitq => self.sysexit(true)?,
            Swapgs => self.swapgs()?,
            Rdfsbase => self.segment_base(i, seg::FS, false)?,
            Rdgsbase => self.segment_base(i, seg::GS, false)?,
            Wrfsbase => self.segment_base(i, seg::FS, true)?,
            Wrgsbase => self.segment_base(i, seg::GS, true)?,
            Stac => self.set_ac(true)?,
            Clac => self.set_ac(false)?,
            Rdtsc => self.rdtsc()?,
            Rdtscp => self.rdtscp()?,
            Rdpid => self.rdpid(i)?,
            // There is no performance counter.
            Rdpmc => return Err(self.gp(0)),
            Hlt => self.hlt()?,
            Monitor | Mwait => self.monitor()?,
            Vmcall => return Err(self.exit_after(Exit::Hypercall { vmmcall: false })),
            Vmmcall => return Err(self.exit_after(Exit::Hypercall { vmmcall: true })),
            // Virtualization, SMM, SMX, SGX, user interrupts, shadow stacks, and waiting
            // instructions that the policy never offers.
            Vmxon | Vmxoff | Vmclear | Vmptrld | Vmptrst | Vmread | Vmwrite | Vmlaunch | Vmresume
            | Vmfunc | Invept | Invvpid | Vmrun | Vmload | Vmsave | Stgi | Clgi | Skinit | Invlpga
            | Invlpgb | Tlbsync | Vmgexit | Rsm | Getsec | Encls | Enclu | Enclv | Pconfig | Monitorx
            | Mwaitx | Umonitor | Umwait | Tpause | Clui | Stui | Testui | Uiret | Senduipi | Rdpkru
            | Wrpkru | Rdpru | Psmash | Pvalidate | Rmpadjust | Rmpupdate | Rmpquery | Tdcall | Seamret
            | Seamops | Seamcall | Wrmsrns | Rdmsrlist | Wrmsrlist | Pbndkb | Loadall | Xsaves | Xsaves64
            | Xrstors | Xrstors64 | Clrssbsy | Rstorssp | Saveprevssp | Setssbsy | Wrssd | Wrssq | Wrussd
            | Wrussq | Incsspd | Incsspq => return Err(self.ud()),
            _ => return Ok(false),
        }
        Ok(true)
    }
}
