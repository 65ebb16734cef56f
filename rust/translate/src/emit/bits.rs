//! BT, BTS, BTR and BTC of memory with the bit in a register: the bit may lie anywhere.

use super::flags::Flags;
use super::{Emitted, Emitter, R15, RAX};
use crate::analysis::{self, Guest};
use crate::assembler::{at, Mem};
use crate::frame::{self, field, HOST_OF};
use iced_x86::Mnemonic;

impl Emitter<'_> {
    pub(super) fn bit_string(&mut self, g: &Guest) -> Emitted {
        let m = *g.memory.as_ref().ok_or("no memory")?;
        let bit = analysis::number(g.i.op1_register()).ok_or("no register for the bit")?;
        let opcode = match g.i.mnemonic() {
            Mnemonic::Bt => 0xa3,
            Mnemonic::Bts => 0xab,
            Mnemonic::Btr => 0xb3,
            _ => 0xbb,
        };
        let wide = m.size == 8;
        // The zero flag stays what it is.
        if let Flags::Recipe(r) = self.flags {
            self.cook(r);
        }
        if self.flags != Flags::Saved {
            self.flags = Flags::Live(None);
        }
        self.spoil_flags();
        self.group = None;
        let key = Self::key(&m);
        self.check_segment(&key);
        let again = self.a.here();
        self.address(&key, m.disp);
        // R15: which operand from the one at that address holds the bit.
        let signed: &[u8] = match m.size {
            8 => &[0x8b],
            4 => &[0x63],
            _ => &[0x0f, 0xbf],
        };
        match HOST_OF[bit as usize] {
            Some(reg) => self.a.reg(true, signed, R15, reg),
            None => self.a.mem(true, signed, R15, frame::spilled(bit)),
        }
        let shift = m.size.trailing_zeros() as u8;
        self.a.bytes(&[0x49, 0xc1, 0xff, shift + 3]); // sar r15, imm8
        self.a.lea(self.long(), RAX, Mem { base: Some(RAX), index: Some((R15, shift)), disp: 0 });
        self.probe(again, m.size, m.write, false);
        self.a.mov(R15, RAX);
        let prefix = |emitter: &mut Self| {
            if m.size == 2 {
                emitter.a.bytes(&[0x66]);
            }
        };
        match HOST_OF[bit as usize] {
            Some(reg) if !g.i.has_lock_prefix() => {
                self.want_flags();
                prefix(self);
                self.a.load(wide, RAX, at(R15, 0));
                prefix(self);
                self.a.reg(wide, &[0x0f, opcode], reg, RAX);
                if m.write {
                    prefix(self);
                    self.a.store(wide, at(R15, 0), RAX);
                }
            }
            _ => {
                let reg = self.value(bit, RAX);
                self.a.reg(false, &[0x8b], RAX, reg);
                self.a.bytes(&[0x83, 0xe0, (8 * m.size - 1) as u8]); // and eax, imm8
                self.a.store(false, field!(temporary), RAX);
                self.want_flags();
                self.a.load(false, RAX, field!(temporary));
                if g.i.has_lock_prefix() {
                    self.a.bytes(&[0xf0]);
                }
                prefix(self);
                self.a.mem(wide, &[0x0f, opcode], RAX, at(R15, 0));
            }
        }
        self.flags = Flags::Live(None);
        self.group = None;
        Ok(())
    }
}
