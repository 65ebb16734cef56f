//! Instructions that change some status flags and leave others: what they change is made again from
//! their result, so that nothing need be restored before them and saved after them.

use super::cold::Cold;
use super::flags::{Flags, Recipe};
use super::{Emitted, Emitter, R15, RAX};
use crate::analysis::{self, Guest};
use crate::assembler::{at, host};
use crate::frame::{self, Frame, HOST_OF};
use iced_x86::{Mnemonic, OpKind, Register};
use std::mem::offset_of;

/// An instruction on a register whose flags follow from its result.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Overlay {
    what: What,
    /// The register with the result; it has a host register.
    pub(super) guest: u8,
    wide: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    /// All but CF.
    Increment,
    /// All but CF.
    Decrement,
    /// CF and OF, of a rotation by so many bits.
    RotateLeft(u8),
    /// CF and OF.
    RotateRight(u8),
}

impl Overlay {
    /// That of an instruction, if it has one.
    fn of(g: &Guest) -> Option<Overlay> {
        let i = &g.i;
        if g.memory.is_some() || i.op0_kind() != OpKind::Register || i.op0_register().size() < 4 {
            return None;
        }
        let guest = analysis::number(i.op0_register())?;
        HOST_OF[guest as usize]?;
        let wide = i.op0_register().size() == 8;
        let count = if i.op_count() == 2 && i.op1_kind() == OpKind::Immediate8 {
            i.immediate8() & if wide { 63 } else { 31 }
        } else {
            0
        };
        let what = match i.mnemonic() {
            Mnemonic::Inc => What::Increment,
            Mnemonic::Dec => What::Decrement,
            Mnemonic::Rol if count != 0 => What::RotateLeft(count),
            Mnemonic::Ror if count != 0 => What::RotateRight(count),
            _ => return None,
        };
        Some(Overlay { what, guest, wide })
    }
}

impl Emitter<'_> {
    /// Emits an instruction that changes some flags, if the rest of them is not in the host's and need not be.
    pub(super) fn overlaid(&mut self, g: &Guest) -> Emitted<bool> {
        if !self.switches.overlays {
            return Ok(false);
        }
        if self.shift_by_count(g)? {
            return Ok(true);
        }
        let Some(over) = Overlay::of(g) else { return Ok(false) };
        let base = match self.flags {
            Flags::Live(Some(r)) | Flags::Recipe(r) => r,
            Flags::Saved => Recipe::SAVED,
            Flags::Live(None) => return Ok(false),
        };
        if base.over.is_some() || base.reads(1 << over.guest) {
            return Ok(false);
        }
        self.flags = Flags::Recipe(base);
        self.count_now();
        self.encode(g, None)?;
        self.flags = Flags::Recipe(Recipe { over: Some(over), ..base });
        Ok(true)
    }

    /// A shift by CL changes all flags or none: none is rare.
    fn shift_by_count(&mut self, g: &Guest) -> Emitted<bool> {
        let i = &g.i;
        let shift = matches!(i.mnemonic(), Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar);
        if !shift
            || g.memory.is_some()
            || i.op_count() != 2
            || i.op1_kind() != OpKind::Register
            || i.op1_register() != Register::CL
            || matches!(self.flags, Flags::Live(_))
        {
            return Ok(false);
        }
        self.count_now();
        let mask = if i.op0_register().size() == 8 { 63 } else { 31 };
        self.a.bytes(&[0xf6, 0xc1, mask]); // test cl, imm8
        let none = self.a.jcc(4);
        self.encode(g, None)?;
        // Making the flags again spoils R15.
        self.keep([None; 2]);
        let again = self.a.here();
        let flags = match self.flags {
            Flags::Recipe(r) => r,
            _ => Recipe::SAVED,
        };
        self.cold.push(Cold::NoShift { from: none, again, flags });
        self.flags = Flags::Live(None);
        Ok(true)
    }

    /// Makes the flags again that an instruction has changed. Spoils R15 only.
    pub(super) fn cook_overlay(&mut self, over: Overlay) {
        let reg = HOST_OF[over.guest as usize].unwrap_or(R15);
        match over.what {
            What::Increment => {
                self.a.lea(over.wide, R15, at(reg, -1));
                self.a.reg(over.wide, &[0xff], 0, R15); // inc
            }
            What::Decrement => {
                self.a.lea(over.wide, R15, at(reg, 1));
                self.a.reg(over.wide, &[0xff], 1, R15); // dec
            }
            What::RotateLeft(count) => self.rotate_twice(reg, over.wide, [1, 0], count),
            What::RotateRight(count) => self.rotate_twice(reg, over.wide, [0, 1], count),
        }
    }

    /// There and back: the flags are those of the second rotation (0: left, 1: right).
    fn rotate_twice(&mut self, reg: u8, wide: bool, ways: [u8; 2], count: u8) {
        self.a.mov(R15, reg);
        for way in ways {
            self.a.reg(wide, &[0xc1], way, R15);
            self.a.bytes(&[count]);
        }
    }

    /// As [`frame::restore_flags`], with RAX as it was.
    pub(super) fn restore_flags_keeping_rax(&mut self) {
        // Where refills keep registers: none is under way.
        let spare = at(host::RSP, offset_of!(Frame, saved) as i32);
        self.a.store(true, spare, RAX);
        frame::restore_flags(&mut self.a);
        self.a.load(true, RAX, spare);
    }
}
