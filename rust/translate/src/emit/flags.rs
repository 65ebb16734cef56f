//! The status flags: where they are, and how they are made again.

use super::overlay::Overlay;
use super::{Emitter, R15, RAX};
use crate::analysis::{self, Guest, Kind, Stack};
use crate::assembler::{at, Assembler};
use crate::frame::{self, field, HOST_OF};
use iced_x86::{Mnemonic, OpKind};

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Flags {
    /// In the host's, and how to make them again.
    Live(Option<Recipe>),
    /// In [`frame::Frame::flags`].
    Saved,
    /// Nowhere, but they can be made again.
    Recipe(Recipe),
}

/// How to make the status flags from guest registers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Recipe {
    pub(super) how: How,
    /// Guest registers.
    pub(super) left: u8,
    pub(super) right: Option<u8>,
    pub(super) immediate: i32,
    /// Operand bytes: 4 or 8 (1 for a comparison of low bytes).
    pub(super) size: u8,
    /// What has changed some of them since.
    pub(super) over: Option<Overlay>,
}

/// What happens to the flags that a block begins with.
pub(super) enum Event {
    /// They are needed, or handed on, as they are.
    Need,
    /// All are overwritten.
    Overwrite,
    /// Something needs the host's flags in between.
    Spoil,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum How {
    /// CMP left, right or immediate.
    Compare,
    /// TEST left, right or immediate.
    Test,
    /// Those of the addition of the right operand that gave left.
    Added,
    /// Those of the subtraction of the right operand that gave left.
    Subtracted,
    /// Those in [`frame::Frame::flags`].
    Saved,
}

impl Recipe {
    /// The flags in [`frame::Frame::flags`].
    pub(super) const SAVED: Recipe =
        Recipe { how: How::Saved, left: 0, right: None, immediate: 0, size: 8, over: None };

    pub(super) fn reads(&self, registers: u16) -> bool {
        let left = self.how != How::Saved && registers & 1 << self.left != 0;
        let others = [self.right, self.over.map(|over| over.guest)];
        left || others.iter().flatten().any(|r| registers & 1 << r != 0)
    }
}

impl Emitter<'_> {
    /// What happens first to the flags that the block begins with.
    pub(super) fn first_event(&self) -> Event {
        for g in self.guests {
            let memory = g.memory.is_some() && !matches!(g.kind, Kind::Lea | Kind::Nop);
            let other = matches!(
                g.kind,
                Kind::Divide { .. }
                    | Kind::Cli
                    | Kind::Cld
                    | Kind::Pushf
                    | Kind::JumpIndirect
                    | Kind::CallIndirect
                    | Kind::String
                    | Kind::TimeStamp { .. }
                    | Kind::Syscall
                    | Kind::Sysret
            );
            if memory || other || g.stack != Stack::None {
                return Event::Spoil;
            }
            if g.kind == Kind::Jump {
                return self.edge_event(g.i.near_branch_target() as i32);
            }
            if g.flags_needed || g.kind == Kind::Branch {
                return Event::Need;
            }
            if g.flags_changed {
                return Event::Overwrite;
            }
        }
        self.edge_event(self.guests[self.guests.len() - 1].i.next_ip() as i32)
    }

    pub(super) fn edge_event(&self, target: i32) -> Event {
        if Self::in_page(target) && !self.backward(target) {
            Event::Need
        } else {
            Event::Spoil
        }
    }

    /// Counts the block's instructions, where the host's flags are free.
    pub(super) fn count_now(&mut self) {
        if !self.counted {
            self.counted = true;
            self.a.mem_imm(5, field!(budget), self.count);
        }
    }

    /// Makes the host's flags free to be overwritten, without losing the guest's. RAX may be spoilt.
    pub(super) fn spoil_flags(&mut self) {
        match self.flags {
            Flags::Live(Some(recipe)) => self.flags = Flags::Recipe(recipe),
            Flags::Live(None) => {
                frame::save_flags(&mut self.a);
                self.group = None;
                self.flags = Flags::Saved;
            }
            Flags::Saved | Flags::Recipe(_) => {}
        }
        self.count_now();
    }

    /// Puts the guest's flags into the host's. RAX or R15 may be spoilt.
    pub(super) fn want_flags(&mut self) {
        match self.flags {
            Flags::Live(_) => {}
            Flags::Saved => {
                frame::restore_flags(&mut self.a);
                self.group = None;
                self.flags = Flags::Live(None);
            }
            Flags::Recipe(recipe) => {
                self.cook(recipe);
                self.flags = Flags::Live(Some(recipe));
            }
        }
    }

    /// Emits a recipe. Spoils R15 only.
    pub(super) fn cook(&mut self, r: Recipe) {
        if r.how == How::Saved {
            self.restore_flags_keeping_rax();
        } else {
            self.cook_base(r);
        }
        if let Some(over) = r.over {
            self.cook_overlay(over);
        }
    }

    fn cook_base(&mut self, r: Recipe) {
        let wide = r.size == 8;
        let source = |a: &mut Assembler, guest: u8| match HOST_OF[guest as usize] {
            Some(reg) => reg,
            None => {
                a.load(true, R15, frame::spilled(guest));
                R15
            }
        };
        let left = source(&mut self.a, r.left);
        match (r.how, r.right) {
            (How::Compare, Some(right)) => match HOST_OF[right as usize] {
                Some(right) => self.a.reg(wide, &[0x39], right, left),
                None => self.a.mem(wide, &[0x3b], left, frame::spilled(right)),
            },
            (How::Test, Some(right)) => match HOST_OF[right as usize] {
                Some(right) => self.a.reg(wide, &[0x85], right, left),
                None => self.a.mem(wide, &[0x85], left, frame::spilled(right)),
            },
            (How::Compare, None) => self.a.reg_imm(wide, 7, left, r.immediate),
            (How::Test, None) => {
                self.a.reg(wide, &[0xf7], 0, left);
                self.a.bytes(&r.immediate.to_le_bytes());
            }
            (How::Saved, _) => {}
            (How::Added, None) => {
                self.a.lea(wide, R15, at(left, r.immediate.wrapping_neg()));
                self.a.reg_imm(wide, 0, R15, r.immediate);
            }
            (How::Subtracted, None) => {
                self.a.lea(wide, R15, at(left, r.immediate));
                self.a.reg_imm(wide, 5, R15, r.immediate);
            }
            (How::Added, Some(right)) => {
                let right = HOST_OF[right as usize].unwrap_or(RAX);
                self.a.mov(R15, left);
                self.a.reg(wide, &[0x29], right, R15);
                self.a.reg(wide, &[0x01], right, R15);
            }
            (How::Subtracted, Some(right)) => {
                let right = HOST_OF[right as usize].unwrap_or(RAX);
                self.a.mov(R15, left);
                self.a.reg(wide, &[0x01], right, R15);
                self.a.reg(wide, &[0x29], right, R15);
            }
        }
    }

    /// How the flags that `i` has just set can be made again.
    pub(super) fn recipe(&self, g: &Guest) -> Option<Recipe> {
        if !self.switches.recipes || g.memory.is_some() || g.i.op_count() != 2 || g.implicit_rax {
            return None;
        }
        let i = &g.i;
        if i.op0_kind() != OpKind::Register {
            return None;
        }
        let size = i.op0_register().size() as u8;
        if size < 4 {
            return None;
        }
        let left = analysis::number(i.op0_register())?;
        let (right, immediate) = match i.op1_kind() {
            OpKind::Register => (Some(analysis::number(i.op1_register())?), 0),
            OpKind::Memory => return None,
            // For 32-bit operands the bits are the same either way.
            _ => (None, i.immediate(1) as i32),
        };
        let arithmetic = right
            .is_none_or(|r| r != left && HOST_OF[r as usize].is_some() && HOST_OF[left as usize].is_some());
        let how = match i.mnemonic() {
            Mnemonic::Cmp => How::Compare,
            Mnemonic::Test => How::Test,
            Mnemonic::Add if arithmetic && immediate != i32::MIN => How::Added,
            Mnemonic::Sub if arithmetic && immediate != i32::MIN => How::Subtracted,
            Mnemonic::And | Mnemonic::Or | Mnemonic::Xor => {
                // Sign, zero and parity of the result; no carry, no overflow.
                return Some(Recipe {
                    how: How::Test,
                    left,
                    right: Some(left),
                    immediate: 0,
                    size,
                    over: None,
                });
            }
            _ => return None,
        };
        Some(Recipe { how, left, right, immediate, size, over: None })
    }

    /// Before an instruction that changes registers that the flags are to be made from.
    pub(super) fn keep_recipe(&mut self, g: &Guest) {
        let registers = g.writes;
        match self.flags {
            Flags::Live(Some(r)) if r.reads(registers) => self.flags = Flags::Live(None),
            Flags::Recipe(r) if r.reads(registers) && !g.kills_flags() => {
                self.cook(r);
                self.flags = Flags::Live(None);
            }
            _ => {}
        }
    }
}
