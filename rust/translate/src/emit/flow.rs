//! Control flow: edges, branches, calls and returns.

use super::cold::Cold;
use super::flags::Flags;
use super::{Emitted, Emitter, R15, RAX};
use crate::analysis::{self, Guest, Kind};
use crate::assembler::{at, Hole};
use crate::frame::{self, exit, field, HOST_OF};

impl Emitter<'_> {
    /// The end of the block at an edge: everything counted, nothing in a recipe.
    pub(super) fn before_edge(&mut self) {
        if let Flags::Recipe(r) = self.flags {
            if !self.counted {
                self.count_now();
            }
            self.cook(r);
            self.flags = Flags::Live(None);
        }
        if !self.counted {
            self.count_without_flags();
        }
    }

    pub(super) fn count_without_flags(&mut self) {
        self.counted = true;
        if self.flags == Flags::Saved {
            self.a.mem_imm(5, field!(budget), self.count);
            return;
        }
        self.group = None;
        self.a.load(false, RAX, field!(budget));
        self.a.lea(false, RAX, at(RAX, -self.count));
        self.a.store(false, field!(budget), RAX);
    }

    pub(super) fn in_page(target: i32) -> bool {
        (0..0x1000).contains(&target)
    }

    pub(super) fn backward(&self, target: i32) -> bool {
        target <= i32::from(self.start)
    }

    /// A jump that leads to `target` (in the page), with flags live or saved.
    pub(super) fn link(&mut self, from: Hole, target: i32, live: bool) {
        self.cold.push(Cold::Link { from, target: target as u16, live });
    }

    /// Goes on at `target`, an offset from the start of the page.
    pub(super) fn edge(&mut self, target: i32) -> Emitted {
        self.before_edge();
        if !Self::in_page(target) {
            self.across(target);
        } else if self.backward(target) {
            self.backward_edge(target);
        } else {
            let hole = self.a.jmp();
            let live = self.flags != Flags::Saved;
            self.link(hole, target, live);
        }
        Ok(())
    }

    /// A jump backwards: the loop's chance to stop.
    pub(super) fn backward_edge(&mut self, target: i32) {
        self.spoil_live();
        self.a.mem_imm(7, field!(budget), 0);
        let hole = self.a.jcc(12);
        self.cold.push(Cold::Budget { from: hole, target: target as u16 });
        let hole = self.a.jmp();
        self.link(hole, target, false);
    }

    /// Saves live flags at an edge, where recipes do not live on.
    pub(super) fn spoil_live(&mut self) {
        match self.flags {
            Flags::Saved => {}
            Flags::Live(_) => frame::save_flags(&mut self.a),
            Flags::Recipe(r) => {
                self.cook(r);
                frame::save_flags(&mut self.a);
            }
        }
        self.flags = Flags::Saved;
    }

    /// Goes on in another page.
    pub(super) fn across(&mut self, target: i32) {
        self.spoil_live();
        self.a.load(true, RAX, field!(code_page));
        self.a.lea(self.long(), RAX, at(RAX, target));
        self.jump_to_rax();
    }

    /// Goes on at the instruction pointer in RAX; flags are saved.
    pub(super) fn jump_to_rax(&mut self) {
        let failed = self.routines.jump;
        for hole in self.jump_lookup() {
            self.a.fill_outside(hole, failed);
        }
    }

    /// Looks up the instruction pointer in RAX and goes there; gives the ways out if that fails.
    pub(super) fn jump_lookup(&mut self) -> Vec<Hole> {
        if !self.switches.lookup {
            return vec![self.a.jmp()];
        }
        self.a.mem_imm(7, field!(budget), 0);
        let used_up = self.a.jcc(12);
        frame::jump_hash(&mut self.a, self.windowed);
        frame::jump_compare(&mut self.a, self.windowed);
        let unknown = self.a.jcc(5);
        frame::jump_take(&mut self.a, self.windowed);
        vec![used_up, unknown]
    }

    pub(super) fn branch(&mut self, g: &Guest) -> Emitted {
        // Restored flags are still saved as well.
        let saved = self.flags == Flags::Saved;
        self.want_flags();
        if !self.counted {
            self.count_without_flags_keeping();
        }
        let condition = g.i.condition_code();
        let cc = condition_number(condition).ok_or("no condition")?;
        let taken = g.i.near_branch_target() as i32;
        let next = g.i.next_ip() as i32;
        let hole = self.a.jcc(cc);
        let flags = Flags::Live(None);
        if !Self::in_page(taken) {
            self.cold.push(Cold::Across { from: hole, target: taken, flags });
        } else if self.backward(taken) {
            self.cold.push(Cold::Backward { from: hole, target: taken as u16, flags });
        } else {
            self.link(hole, taken, true);
        }
        if self.at + 1 < self.guests.len() {
            if saved {
                self.flags = Flags::Saved;
            }
            return Ok(());
        }
        self.flags = flags;
        self.edge(next)
    }

    pub(super) fn count_without_flags_keeping(&mut self) {
        if !self.counted {
            let flags = self.flags;
            self.flags = Flags::Live(None);
            self.count_without_flags();
            self.flags = flags;
        }
    }

    pub(super) fn count_branch(&mut self, g: &Guest) -> Emitted {
        self.before_edge();
        let taken = g.i.near_branch_target() as i32;
        let next = g.i.next_ip() as i32;
        // jrcxz +2 (taken); jmp over (5 bytes would not fit +2): e3 05, then jmp rel32 to the fall-through.
        self.a.bytes(&[0xe3, 5]);
        let over = self.a.jmp();
        let flags = self.flags;
        self.edge(taken)?;
        let here = self.a.here();
        self.a.fill(over, here);
        self.flags = flags;
        self.edge(next)
    }

    /// Pushes the address of the following instruction.
    pub(super) fn push_return(&mut self, g: &Guest) {
        let width = self.width();
        let place = self.reach(self.stack_key(), -width, width as u16, true, true);
        self.a.load(true, R15, field!(code_page));
        self.a.lea(self.long(), R15, at(R15, g.i.next_ip() as i32));
        self.store_place(self.long(), &place, R15);
        self.move_stack(-width);
    }

    pub(super) fn call(&mut self, g: &Guest) -> Emitted {
        self.keep_recipe(g);
        self.push_return(g);
        self.settle_group(g);
        self.at += 1;
        self.edge(g.i.near_branch_target() as i32)
    }

    pub(super) fn indirect(&mut self, g: &Guest) -> Emitted {
        let width = self.width();
        let mut undo = 0;
        let exit;
        match g.kind {
            Kind::Return if g.windowed => {
                self.group = None;
                if let Flags::Recipe(r) = self.flags {
                    self.cook(r);
                    self.flags = Flags::Live(None);
                }
                if let Flags::Live(_) = self.flags {
                    frame::save_flags(&mut self.a);
                    self.flags = Flags::Saved;
                }
                self.count_now();
                let place = self.reach(self.stack_key(), 0, width as u16, false, true);
                exit = self.side_exit(exit::SINGLE);
                self.load_place(self.long(), RAX, &place);
                let extra = if g.i.op_count() == 1 { i32::from(g.i.immediate16()) } else { 0 };
                undo = -(width + extra);
                self.move_stack(width + extra);
            }
            Kind::Return => {
                let disp = self.access(self.stack_key(), 0, width as u16, false);
                if let Flags::Recipe(r) = self.flags {
                    // R15 is free; RAX holds the address.
                    self.cook(r);
                    self.flags = Flags::Live(None);
                    self.a.store(true, field!(temporary), RAX);
                    frame::save_flags(&mut self.a);
                    self.flags = Flags::Saved;
                    self.a.load(true, RAX, field!(temporary));
                } else if let Flags::Live(_) = self.flags {
                    self.a.store(true, field!(temporary), RAX);
                    frame::save_flags(&mut self.a);
                    self.flags = Flags::Saved;
                    self.a.load(true, RAX, field!(temporary));
                }
                self.count_now();
                exit = self.side_exit(exit::SINGLE);
                self.a.load(self.long(), RAX, at(RAX, disp));
                let extra = if g.i.op_count() == 1 { i32::from(g.i.immediate16()) } else { 0 };
                undo = -(width + extra);
                self.move_stack(width + extra);
            }
            _ => {
                match &g.memory {
                    Some(m) => {
                        let place = self.memory(m);
                        self.load_place(self.long(), RAX, &place);
                    }
                    None => {
                        let guest = analysis::number(g.i.op0_register()).ok_or("jump through no register")?;
                        if guest == analysis::RCX || HOST_OF[guest as usize].is_some() {
                            let reg = HOST_OF[guest as usize].unwrap_or(RAX);
                            self.a.reg(self.long(), &[0x8b], RAX, reg);
                        } else {
                            self.a.load(self.long(), RAX, frame::spilled(guest));
                        }
                    }
                }
                self.group = None;
                self.a.store(true, field!(temporary), RAX);
                if let Flags::Recipe(r) = self.flags {
                    self.cook(r);
                    self.flags = Flags::Live(None);
                }
                if let Flags::Live(_) = self.flags {
                    self.flags = Flags::Live(None);
                    self.spoil_flags();
                }
                self.count_now();
                if g.kind == Kind::CallIndirect {
                    self.push_return(g);
                    undo = width;
                }
                exit = self.side_exit(exit::SINGLE);
                self.a.load(true, RAX, field!(temporary));
            }
        }
        // As jump_to_rax(), but a target that is not canonical faults at this instruction.
        let holes = self.jump_lookup();
        self.cold.push(Cold::Indirect { from: holes, undo, exit });
        Ok(())
    }
}

/// The low nibble of Jcc's opcode: iced numbers the conditions in this order, after None.
fn condition_number(condition: iced_x86::ConditionCode) -> Option<u8> {
    (condition as u8).checked_sub(1)
}
