//! Instructions on single flags: LAHF, SAHF, SALC, CLI, STI.

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::*;

impl Cpu {
    pub(super) fn op_lahf(&mut self) {
        let ah = self.r.flags.to_rflags() & 0xd5 | 2;
        let rax = self.r.gpr[reg::RAX];
        self.r.gpr[reg::RAX] = rax & !0xff00 | ah << 8;
    }

    pub(super) fn op_sahf(&mut self) {
        let ah = self.r.gpr[reg::RAX] >> 8 & 0xd5;
        let kept = self.r.flags.to_rflags() & rflags::OF;
        self.r.flags = Flags::from_rflags(ah | kept);
    }

    /// SALC: AL = CF ? FFh : 0 (undocumented, but in every x86).
    pub(super) fn op_salc(&mut self) {
        let al = if self.r.flags.cf() { 0xff } else { 0 };
        self.set_gpr(reg::RAX, 1, al);
    }

    /// The privilege to change IF: IOPL 3 in virtual-8086 mode, CPL <= IOPL in
    /// protected mode. (CR4.VME and CR4.PVI are not supported.)
    fn check_if_privilege(&mut self) -> X {
        let refused = match self.mode {
            Mode::Real => false,
            Mode::V86 => self.iopl() < 3,
            _ => self.cpl > self.iopl(),
        };
        if refused {
            return Err(self.gp(0));
        }
        Ok(())
    }

    pub(super) fn op_cli(&mut self) -> X {
        self.check_if_privilege()?;
        self.r.rflags &= !rflags::IF;
        self.interrupts_changed();
        Ok(())
    }

    /// STI: interrupts stay closed for one more instruction if they were closed.
    pub(super) fn op_sti(&mut self) -> X {
        self.check_if_privilege()?;
        if self.r.rflags & rflags::IF == 0 {
            self.r.rflags |= rflags::IF;
            self.shadow |= shadow::STI;
            self.interrupts_changed();
        }
        Ok(())
    }
}
