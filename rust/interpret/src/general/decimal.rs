//! Decimal adjustment: AAA, AAS, AAM, AAD, DAA, DAS (the decoder refuses them in 64-bit mode).

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::Instruction;

impl Cpu {
    /// AAA (`add`) and AAS. SF, ZF and PF (undefined in the manuals) follow AL, OF is clear.
    pub(super) fn op_aaa(&mut self, add: bool) {
        let mut ax = self.gpr(reg::RAX, 2);
        let adjust = ax & 0xf > 9 || self.r.flags.af();
        if adjust {
            ax = if add { ax.wrapping_add(0x106) } else { ax.wrapping_sub(0x106) };
        }
        ax &= 0xff0f;
        self.set_gpr(reg::RAX, 2, ax);
        self.r.flags = Flags::result(ax & 0xff, adjust, false, adjust, 1);
    }

    /// DAA (`add`) and DAS. OF (undefined in the manuals) is clear.
    pub(super) fn op_daa(&mut self, add: bool) {
        let old = self.gpr(reg::RAX, 1);
        let flags = self.r.flags;
        let mut al = old;
        let af = old & 0xf > 9 || flags.af();
        let mut cf = flags.cf();
        if af {
            al = if add { al.wrapping_add(6) } else { al.wrapping_sub(6) };
            // The manual's carry of the first step matters only where the second does not happen.
            cf |= !add && old < 6;
        }
        if old > 0x99 || flags.cf() {
            al = if add { al.wrapping_add(0x60) } else { al.wrapping_sub(0x60) };
            cf = true;
        }
        self.set_gpr(reg::RAX, 1, al);
        self.r.flags = Flags::result(al & 0xff, cf, false, af, 1);
    }

    /// AAM: #DE for base 0. OF, AF and CF (undefined in the manuals) are clear.
    pub(super) fn op_aam(&mut self, i: &Instruction) -> X {
        let base = u64::from(i.immediate8());
        if base == 0 {
            return Err(self.fault(vector::DE, None));
        }
        let al = self.gpr(reg::RAX, 1);
        self.set_gpr(reg::RAX, 2, al / base << 8 | al % base);
        self.r.flags = Flags::logic(al % base, 1);
        Ok(())
    }

    /// AAD. OF, AF and CF (undefined in the manuals) are clear.
    pub(super) fn op_aad(&mut self, i: &Instruction) {
        let base = u64::from(i.immediate8());
        let ax = self.gpr(reg::RAX, 2);
        let al = (ax & 0xff).wrapping_add((ax >> 8) * base) & 0xff;
        self.set_gpr(reg::RAX, 2, al);
        self.r.flags = Flags::logic(al, 1);
    }
}
