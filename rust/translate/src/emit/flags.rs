//! The status flags: where they are, and how they are made again.

use super::overlay::Overlay;
use super::{Emitter, R15};
use crate::analysis::{self, Guest, Kind};
use crate::assembler::{at, Assembler};
use crate::frame::{self, field, home, host_of, STASH};
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
    /// Guest registers, or [`STASH`].
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
    /// Those of the subtraction of something from the right operand that gave left.
    SubtractedFrom,
    /// SHL, SHR or SAR (by the number in its encoding) of left, by so many bits.
    Shifted { op: u8, count: u8 },
    /// Those in [`frame::Frame::flags`].
    Saved,
}

impl Recipe {
    /// The flags in [`frame::Frame::flags`].
    pub(super) const SAVED: Recipe =
        Recipe { how: How::Saved, left: 0, right: None, immediate: 0, size: 8, over: None };

    pub(super) fn reads(&self, registers: u16) -> bool {
        let left = self.how != How::Saved && in_set(registers, self.left);
        let others = [self.right, self.over.map(|over| over.guest)];
        left || others.iter().flatten().any(|&r| in_set(registers, r))
    }
}

fn in_set(registers: u16, register: u8) -> bool {
    u32::from(registers) >> register & 1 != 0
}

impl Emitter<'_> {
    /// What happens first to the flags that the block begins with.
    pub(super) fn first_event(&self) -> Event {
        // An instruction before this one leaves some flags as they were, but does not look at any.
        let mut handed_on = false;
        for (n, g) in self.guests.iter().enumerate() {
            if g.spoils() || g.windowed {
                return if handed_on { Event::Need } else { Event::Spoil };
            }
            if g.kind == Kind::Jump && n + 1 == self.guests.len() && !handed_on {
                return self.edge_event(g.i.near_branch_target() as i32);
            }
            if g.flags_read || g.kind == Kind::Branch || g.flags_needed && !self.switches.dead {
                return Event::Need;
            }
            if g.flags_needed {
                handed_on = true;
                continue;
            }
            if g.flags_changed {
                return Event::Overwrite;
            }
        }
        if handed_on {
            return Event::Need;
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
            let kept = self.kept_now();
            self.a.mem_imm(5, field!(budget), self.count);
            self.keep(kept);
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
        let source = |a: &mut Assembler, guest: u8| match host_of(guest) {
            Some(reg) => reg,
            None => {
                a.load(true, R15, home(guest));
                R15
            }
        };
        let left = source(&mut self.a, r.left);
        match (r.how, r.right) {
            (How::Compare, Some(right)) => self.with_register(wide, 0x3b, left, right),
            (How::Test, Some(right)) => self.with_register(wide, 0x85, left, right),
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
                self.a.mov(R15, left);
                self.with_register(wide, 0x2b, R15, right);
                self.with_register(wide, 0x03, R15, right);
            }
            (How::Subtracted, Some(right)) => {
                self.a.mov(R15, left);
                self.with_register(wide, 0x03, R15, right);
                self.with_register(wide, 0x2b, R15, right);
            }
            (How::SubtractedFrom, right) => {
                let right = right.unwrap_or(STASH);
                let old = source(&mut self.a, right);
                self.a.mov(R15, old);
                self.with_register(wide, 0x2b, R15, r.left);
                self.with_memory(wide, 0x39, R15, right);
            }
            (How::Shifted { op, count }, _) => {
                self.a.mov(R15, left);
                self.a.reg(wide, &[0xc1], op, R15);
                self.a.bytes(&[count]);
            }
        }
    }

    /// `opcode right, left`, where right may live in memory.
    fn with_memory(&mut self, wide: bool, opcode: u8, left: u8, right: u8) {
        match host_of(right) {
            Some(reg) => self.a.reg(wide, &[opcode], left, reg),
            None => self.a.mem(wide, &[opcode], left, home(right)),
        }
    }

    /// `opcode left, right`, where right may live in memory.
    fn with_register(&mut self, wide: bool, opcode: u8, left: u8, right: u8) {
        match host_of(right) {
            Some(reg) => self.a.reg(wide, &[opcode], left, reg),
            None => self.a.mem(wide, &[opcode], left, home(right)),
        }
    }

    /// How the flags that `i` has just set can be made again.
    pub(super) fn recipe(&self, g: &Guest) -> Option<Recipe> {
        let i = &g.i;
        let logic = matches!(i.mnemonic(), Mnemonic::And | Mnemonic::Or | Mnemonic::Xor);
        if !self.switches.recipes || g.memory.is_some() && !logic || i.op_count() != 2 || g.implicit_rax {
            return None;
        }
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
            OpKind::Memory => (None, 0),
            // For 32-bit operands the bits are the same either way.
            _ => (None, i.immediate(1) as i32),
        };
        let arithmetic = right.is_none_or(|r| r != left);
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
            Flags::Live(Some(r)) if r.reads(registers) => {
                let own = g.kind == Kind::Same && g.kills_flags();
                self.flags = if own && !self.switches.stashes {
                    Flags::Live(None)
                } else if own {
                    // Until the instruction itself makes others, they can be made again.
                    self.flags
                } else {
                    Flags::Live(if self.spoilt_later(g, false) { self.stash(r, registers) } else { None })
                };
            }
            Flags::Recipe(r) if r.reads(registers) && !g.kills_flags() => match self.stash(r, registers) {
                Some(r) => self.flags = Flags::Recipe(r),
                None => {
                    self.cook(r);
                    self.flags = Flags::Live(None);
                }
            },
            _ => {}
        }
    }

    /// Whether the host's flags are needed for something else while the present instruction's, or those that it
    /// leaves, may still be asked for. `done`: it has looked its own operand up.
    fn spoilt_later(&self, g: &Guest, done: bool) -> bool {
        if g.spoils() && !done {
            // The recipe is all there is from here on.
            let rest = &self.guests[self.at + 1..];
            return rest.iter().find_map(Self::asks).unwrap_or(true);
        }
        for g in &self.guests[self.at + 1..] {
            if g.spoils() {
                return true;
            }
            if g.flags_changed {
                return false;
            }
        }
        false
    }

    /// Whether an instruction may ask for the flags before it; `None`: it does not, but the next may.
    fn asks(g: &Guest) -> Option<bool> {
        if g.flags_needed || g.kind == Kind::Branch || g.spoils() {
            Some(true)
        } else {
            g.kills_flags().then_some(false)
        }
    }

    /// Keeps a copy of the register that is about to change; the recipe that has the copy instead.
    fn stash(&mut self, r: Recipe, registers: u16) -> Option<Recipe> {
        let uses = |register: Option<u8>| register.is_some_and(|r| in_set(registers, r));
        let (left, right) = (r.how != How::Saved && uses(Some(r.left)), uses(r.right));
        let same = r.right == Some(r.left);
        let other = !left && r.left == STASH || !right && r.right == Some(STASH);
        if !self.switches.stashes || uses(r.over.map(|o| o.guest)) || other || left && right && !same {
            return None;
        }
        let guest = if left { r.left } else { r.right? };
        self.keep_copy(guest);
        let mut r = r;
        if left {
            r.left = STASH;
        }
        if right {
            r.right = Some(STASH);
        }
        Some(r)
    }

    fn keep_copy(&mut self, guest: u8) {
        match host_of(guest) {
            Some(reg) => self.a.store(true, field!(stash), reg),
            None => {
                self.a.load(true, R15, home(guest));
                self.a.store(true, field!(stash), R15);
            }
        }
    }

    /// Before an addition or subtraction of memory whose flags will be in the way: keeps a copy of the register.
    pub(super) fn stash_sum(&mut self, g: &Guest) -> Option<Recipe> {
        let i = &g.i;
        let how = match i.mnemonic() {
            Mnemonic::Add => How::Added,
            Mnemonic::Sub => How::SubtractedFrom,
            _ => return None,
        };
        let sources = i.op0_kind() == OpKind::Register && i.op1_kind() == OpKind::Memory;
        // (The instruction itself may leave when it is in a window, with flags made from what is kept now.)
        if !self.switches.stashes || !sources || g.implicit_rax || !g.kills_flags() || g.windowed {
            return None;
        }
        let (size, left) = (i.op0_register().size() as u8, analysis::number(i.op0_register())?);
        if size < 4 || !self.spoilt_later(g, true) {
            return None;
        }
        self.keep_copy(left);
        Some(Recipe { how, left, right: Some(STASH), immediate: 0, size, over: None })
    }

    /// Before a shift by a constant whose flags will be in the way: keeps a copy of the operand.
    pub(super) fn stash_shift(&mut self, g: &Guest) -> Option<Recipe> {
        let i = &g.i;
        let op = match i.mnemonic() {
            Mnemonic::Shl | Mnemonic::Sal => 4,
            Mnemonic::Shr => 5,
            Mnemonic::Sar => 7,
            _ => return None,
        };
        if !self.switches.stashes
            || g.memory.is_some()
            || !g.kills_flags()
            || i.op0_kind() != OpKind::Register
        {
            return None;
        }
        let (size, left) = (i.op0_register().size() as u8, analysis::number(i.op0_register())?);
        let by = i.op_count() == 2 && i.op1_kind() == OpKind::Immediate8;
        let count = if by { i.immediate8() & if size == 8 { 63 } else { 31 } } else { 0 };
        if size < 4 || count == 0 || !self.spoilt_later(g, false) {
            return None;
        }
        self.keep_copy(left);
        let how = How::Shifted { op, count };
        Some(Recipe { how, left: STASH, right: None, immediate: 0, size, over: None })
    }
}
