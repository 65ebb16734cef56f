//! MOVS and STOS, with REP and without: the host's own, page by page.
//!
//! While the host's instruction runs, RSI and RDI are host addresses: a guest address plus [`Frame::string`]. Each turn
//! does what lies in one page of source and of destination, and no more iterations than the budget has; the guest's
//! registers are exact between turns. What goes downwards is the interpreter's, and so is an element in two pages.

use super::cold::Cold;
use super::memory::Key;
use super::{Emitted, Emitter, R15, RAX};
use crate::analysis::{Guest, RCX, RDI, RSI};
use crate::assembler::{host, Mem};
use crate::frame::{exit, field};
use iced_x86::Mnemonic;

/// Where the difference of host and guest addresses is: of the source (0) and the destination (1).
fn difference(n: usize) -> Mem {
    let first = field!(string);
    Mem { disp: first.disp + 8 * n as i32, ..first }
}

impl Emitter<'_> {
    pub(super) fn string(&mut self, g: &Guest) -> Emitted {
        let size = g.i.memory_size().size() as u16;
        let copies =
            matches!(g.i.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq);
        let repeated = g.i.has_rep_prefix();
        let long = self.long();
        self.spoil_flags();
        self.group = None;
        let exit = self.side_exit(exit::SINGLE);
        let mut leave = Vec::new();
        self.a.mem(false, &[0xf7], 0, field!(rflags)); // test dword [rflags], DF
        self.a.bytes(&0x400u32.to_le_bytes());
        leave.push(self.a.jcc(5));
        if !long {
            for reg in [host::RCX, host::RSI, host::RDI] {
                self.a.reg(false, &[0x8b], reg, reg); // mov reg32, reg32
            }
        }
        let top = self.a.here();
        let mut none = None;
        if repeated {
            self.a.reg(true, &[0x85], host::RCX, host::RCX);
            none = Some(self.a.jcc(4));
        }
        if copies {
            self.string_place(RSI, host::RSI, size, 0);
            if repeated {
                self.string_room(host::RSI, size);
                self.a.store(true, field!(temporary), R15);
            }
        }
        self.string_place(RDI, host::RDI, size, 1);
        if repeated {
            self.string_room(host::RDI, size);
            self.a.reg(true, &[0x3b], R15, host::RCX); // cmp
            self.a.reg(true, &[0x0f, 0x47], R15, host::RCX); // cmova
            if copies {
                self.a.mem(true, &[0x3b], R15, field!(temporary));
                self.a.mem(true, &[0x0f, 0x47], R15, field!(temporary));
            }
            self.a.load(false, RAX, field!(budget));
            self.a.reg(false, &[0x85], RAX, RAX);
            leave.push(self.a.jcc(14));
            self.a.reg(true, &[0x3b], R15, RAX);
            self.a.reg(true, &[0x0f, 0x47], R15, RAX);
            self.a.mem(false, &[0x29], R15, field!(budget)); // sub
            self.a.mov(RAX, host::RCX);
            self.a.reg(true, &[0x29], R15, RAX); // sub rax, r15
            self.a.store(true, field!(temporary), RAX);
            self.a.mov(host::RCX, R15);
        }
        let ends = [(host::RSI, 0), (host::RDI, 1)];
        let ends = if copies { &ends[..] } else { &ends[1..] };
        for &(reg, n) in ends {
            self.a.mem(true, &[0x03], reg, difference(n)); // add
        }
        if !copies {
            self.a.mov(RAX, host::R14);
        }
        if repeated {
            self.a.bytes(&[0xf3]);
        }
        let opcode = if copies { 0xa4 } else { 0xaa };
        match size {
            1 => self.a.bytes(&[opcode]),
            2 if repeated => {
                // The prefixes in the usual order.
                let last = self.a.here() - 1;
                self.a.code[last] = 0x66;
                self.a.bytes(&[0xf3, opcode | 1]);
            }
            2 => self.a.bytes(&[0x66, opcode | 1]),
            4 => self.a.bytes(&[opcode | 1]),
            _ => self.a.bytes(&[0x48, opcode | 1]),
        }
        for &(reg, n) in ends {
            self.a.mem(long, &[0x2b], reg, difference(n)); // sub
        }
        if repeated {
            self.a.load(true, host::RCX, field!(temporary));
            self.a.reg(true, &[0x85], host::RCX, host::RCX);
            let more = self.a.jcc(5);
            self.a.fill(more, top);
            // The instruction itself is counted already.
            self.a.mem_imm(0, field!(budget), 1);
        }
        if let Some(none) = none {
            let here = self.a.here();
            self.a.fill(none, here);
        }
        self.cold.push(Cold::Exit { from: leave, exit });
        debug_assert!(!repeated || g.writes & 1 << RCX != 0);
        Ok(())
    }

    /// Looks up an element and keeps the difference of its host and guest address.
    fn string_place(&mut self, guest: u8, reg: u8, size: u16, n: usize) {
        let key = Key { base: Some(guest), index: None, rip: false, segment: 0, short: !self.long() };
        self.lookup(&key, 0, size, n == 1, false);
        self.a.reg(true, &[0x2b], RAX, reg); // sub
        self.a.store(true, difference(n), RAX);
    }

    /// R15: elements from an address to the end of its page.
    fn string_room(&mut self, reg: u8, size: u16) {
        self.a.mov(R15, reg);
        self.a.bytes(&[0x49, 0x81, 0xcf]); // or r15, -4096
        self.a.bytes(&(-4096i32).to_le_bytes());
        self.a.bytes(&[0x49, 0xf7, 0xdf]); // neg r15
        if size > 1 {
            self.a.bytes(&[0x49, 0xc1, 0xef, size.trailing_zeros() as u8]); // shr r15, n
        }
    }
}
