//! Decimal adjustment: AAA, AAS, AAM, AAD, DAA, DAS (the decoder refuses them in 64-bit mode).

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::Instruction;

impl Cpu {
    /// AAA (`add`) and AAS. OF, SF, ZF and PF (undefined in the manuals) are those of
    /// the 16-bit addition or subtraction of the adjustment.
    pub(super) fn op_aaa(&mut self, add: bool) {
        let ax = self.gpr(reg::RAX, 2);
        let adjust = ax & 0xf > 9 || self.r.flags.af();
        let by = if adjust { 0x106 } else { 0 };
        let (adjusted, f) = adjustment(add)(ax, by, false, 2);
        self.set_gpr(reg::RAX, 2, adjusted & 0xff0f);
        self.r.flags = Flags::result(adjusted, adjust, f.of(), adjust, 2);
    }

    /// DAA (`add`) and DAS. OF (undefined in the manuals) is that of the whole adjustment.
    pub(super) fn op_daa(&mut self, add: bool) {
        let old = self.gpr(reg::RAX, 1);
        let flags = self.r.flags;
        let af = old & 0xf > 9 || flags.af();
        let high = old > 0x99 || flags.cf();
        // DAS keeps the borrow of its first step where the second does not happen.
        let cf = high || !add && af && old < 6;
        let by = if af { 6 } else { 0 } + if high { 0x60 } else { 0 };
        let (al, f) = adjustment(add)(old, by, false, 1);
        self.set_gpr(reg::RAX, 1, al);
        self.r.flags = Flags::result(al, cf, f.of(), af, 1);
    }

    /// AAM: #DE for base 0. OF, AF and CF (undefined in the manuals) are clear.
    pub(super) fn op_aam(&mut self, i: &Instruction) -> X {
        let base = u64::from(i.immediate8());
        if base == 0 {
            return Err(self.fault(vector::DE, None));
        }
        let al = self.gpr(reg::RAX, 1);
        self.set_gpr(reg::RAX, 2, ((al / base) << 8) | (al % base));
        self.r.flags = Flags::logic(al % base, 1);
        Ok(())
    }

    /// AAD. OF, AF and CF (undefined in the manuals) are those of the 8-bit addition.
    pub(super) fn op_aad(&mut self, i: &Instruction) {
        let base = u64::from(i.immediate8());
        let ax = self.gpr(reg::RAX, 2);
        let (al, flags) = Flags::add(ax & 0xff, ((ax >> 8) * base) & 0xff, false, 1);
        self.set_gpr(reg::RAX, 2, al);
        self.r.flags = flags;
    }
}

fn adjustment(add: bool) -> fn(u64, u64, bool, usize) -> (u64, Flags) {
    if add {
        Flags::add
    } else {
        Flags::sub
    }
}
