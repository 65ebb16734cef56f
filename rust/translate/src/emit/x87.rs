//! x87 instructions: the state that they need, and what they leave besides it.

use super::cold::Cold;
use super::{Emitted, Emitter, R15, RAX};
use crate::analysis::{Guest, Operand};
use crate::assembler::{at, Mem};
use crate::frame::{exit, field, HOST_OF};

impl Emitter<'_> {
    /// Gives the guest its x87 state, or leaves.
    pub(super) fn check_x87(&mut self) {
        let again = self.a.here();
        self.a.mem(false, &[0x80], 7, field!(x87)); // cmp byte [x87], 0
        self.a.bytes(&[0]);
        let hole = self.a.jcc(4);
        let exit = self.side_exit(exit::BLOCK);
        self.cold.push(Cold::X87 { from: hole, again, exit });
    }

    /// The instruction and data pointers after an instruction that sets them. The last one of a block
    /// stores its own, which side exits before that do for the others. Touches no flags, and not RAX.
    pub(super) fn x87_pointers(&mut self, g: &Guest) {
        if let Some(m) = &g.memory {
            self.effective(m);
            self.a.store(true, field!(x87_dp), R15);
        }
        let ip = g.i.ip() as u16;
        let last = !self.guests[self.at + 1..].iter().any(|g| g.pointers);
        self.x87_ip = (!last).then_some(ip);
        if last {
            self.store_x87_ip(ip);
        }
    }

    /// Spoils R15 only.
    pub(super) fn store_x87_ip(&mut self, ip: u16) {
        self.a.load(true, R15, field!(code_page));
        self.a.lea(self.long(), R15, at(R15, i32::from(ip)));
        self.a.store(true, field!(x87_ip), R15);
    }

    /// R15: the effective address of an operand, without its segment's base.
    fn effective(&mut self, m: &Operand) {
        let mut mem = Mem { base: None, index: None, disp: m.disp };
        let mut scratch = vec![RAX, R15];
        if m.rip {
            self.a.load(true, R15, field!(code_page));
            mem.base = Some(R15);
        }
        let spilled = |guest: &u8| HOST_OF[*guest as usize].is_none();
        let both = m.base.as_ref().is_some_and(spilled) && m.index.is_some_and(|(index, _)| spilled(&index));
        if both {
            self.a.store(true, field!(temporary), RAX);
        }
        if let Some(base) = m.base {
            let to = if spilled(&base) { scratch.pop().unwrap_or(R15) } else { R15 };
            mem.base = Some(self.value(base, to));
        }
        if let Some((index, scale)) = m.index {
            mem.index = Some((self.value(index, scratch.pop().unwrap_or(R15)), scale));
        }
        self.a.lea(!m.short, R15, mem);
        if both {
            self.a.load(true, RAX, field!(temporary));
        }
    }

    /// FLDCW, unless it unmasks an exception. What is checked is what is loaded: memory may change.
    pub(super) fn load_control(&mut self, g: &Guest) -> Emitted {
        let m = g.memory.as_ref().ok_or("FLDCW without memory")?;
        self.spoil_flags();
        let place = self.memory(m);
        self.at_place(false, &[0x0f, 0xb7], R15, &place); // movzx r15d, word
        self.a.store(false, field!(temporary), R15);
        self.a.bytes(&[0x41, 0xf7, 0xd7]); // not r15d
        self.a.bytes(&[0x41, 0xf6, 0xc7, 0x3f]); // test r15b, 0x3f
        let hole = self.a.jcc(5);
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: vec![hole], exit });
        self.a.mem(false, &[0xd9], 5, field!(temporary)); // fldcw
        Ok(())
    }

    /// FNINIT.
    pub(super) fn init_x87(&mut self) {
        self.a.bytes(&[0xdb, 0xe3]);
        self.x87_ip = None;
        self.a.store_imm_wide(field!(x87_ip), 0);
        self.a.store_imm_wide(field!(x87_dp), 0);
        self.a.store_imm(field!(x87_opcode), 0);
    }
}
