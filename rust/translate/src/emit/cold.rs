//! Code that runs rarely, after the rest of the block: refills, exits, jumps not chained yet.

use super::flags::{Flags, Recipe};
use super::window::Place;
use super::{Emitter, Link, R15, RAX};
use crate::assembler::{at, Hole};
use crate::frame::{self, exit, field};
use nonroot_interpret::tlb;
use std::mem::offset_of;

/// Code that runs rarely, after the rest.
pub(super) enum Cold {
    /// The entry is not there: make it and look again, or leave.
    Refill { from: Hole, again: usize, bytes: u16, write: bool, exit: SideExit },
    /// Leave.
    Exit { from: Vec<Hole>, exit: SideExit },
    /// A jump inside the page that is not chained yet.
    Link { from: Hole, target: u16, live: bool },
    /// A jump backwards inside the page whose budget may be used up.
    Budget { from: Hole, target: u16 },
    /// A branch backwards inside the page.
    Backward { from: Hole, target: u16, flags: Flags },
    /// A branch to another page.
    Across { from: Hole, target: i32, flags: Flags },
    /// An instruction, or the check before one, that faulted in a window.
    Window { site: usize, place: Place, what: u32, exit: SideExit },
    /// Vector registers are not the guest's yet.
    Vectors { from: Hole, again: usize, needed: u8, exit: SideExit },
    /// The x87 state is not the guest's yet.
    X87 { from: Hole, again: usize, exit: SideExit },
    /// A shift by no bits, which leaves the flags.
    NoShift { from: Hole, again: usize, flags: Recipe },
    /// An indirect target that may not be canonical.
    Indirect { from: Vec<Hole>, undo: i32, exit: SideExit },
}

#[derive(Clone, Copy)]
pub(super) struct SideExit {
    pub(super) kind: u32,
    pub(super) offset: u16,
    /// Goes with [`exit::WIDE`] and [`exit::WINDOW`].
    pub(super) block: u32,
    /// Instructions of the part of the block that are complete, less those that were counted.
    pub(super) adjust: i32,
    pub(super) flags: Flags,
    /// See [`Emitter::x87_ip`].
    pub(super) x87_ip: Option<u16>,
}

impl Emitter<'_> {
    pub(super) fn side_exit(&self, kind: u32) -> SideExit {
        let offset = match self.guests.get(self.at) {
            Some(g) => g.i.ip() as u16,
            None => self.guests[self.at - 1].i.next_ip() as u16,
        };
        SideExit {
            kind,
            offset,
            block: self.block,
            adjust: (self.at - self.first) as i32 - if self.counted { self.count } else { 0 },
            flags: self.flags,
            x87_ip: self.x87_ip,
        }
    }

    pub(super) fn leave_with(&mut self, exit: SideExit) {
        if let Flags::Recipe(r) = exit.flags {
            self.cook(r);
        }
        if let Some(ip) = exit.x87_ip {
            self.store_x87_ip(ip);
        }
        self.a.store_imm(field!(kind), exit.kind as i32);
        self.a.store_imm(field!(offset), i32::from(exit.offset));
        self.a.store_imm(field!(adjust), exit.adjust);
        if matches!(exit.kind, exit::WIDE | exit::WINDOW) {
            self.a.store_imm(field!(link), exit.block as i32);
        }
        let leave = if exit.flags == Flags::Saved { self.routines.leave } else { self.routines.leave_live };
        self.a.jmp_to(leave);
    }

    pub(super) fn boundary(&mut self, kind: u32, target: u16, live: bool) {
        self.a.store_imm(field!(kind), kind as i32);
        self.a.store_imm(field!(offset), i32::from(target));
        self.a.store_imm(field!(adjust), 0);
        self.a.jmp_to(if live { self.routines.leave_live } else { self.routines.leave });
    }

    pub(super) fn cold(&mut self, cold: Cold) {
        let here = self.a.here();
        match cold {
            Cold::Refill { from, again, bytes, write, exit } => {
                self.a.fill(from, here);
                let tag = if write { offset_of!(tlb::Entry, write) } else { offset_of!(tlb::Entry, read) };
                frame::in_set(&mut self.a, true, &[0x33], RAX, at(R15, tag as i32), self.windowed);
                self.a.bytes(&[0x41, 0xbf]); // mov r15d, imm32
                self.a.bytes(&(u32::from(bytes) | u32::from(write) << 31).to_le_bytes());
                self.a.call_to(self.routines.refill);
                self.a.reg(false, &[0x85], RAX, RAX);
                let hole = self.a.jcc(4);
                self.a.fill(hole, again);
                self.leave_with(exit);
            }
            Cold::Exit { from, exit } => {
                for hole in from {
                    self.a.fill(hole, here);
                }
                self.leave_with(exit);
            }
            Cold::Link { from, target, live } => {
                self.a.fill(from, here);
                let number = self.first_link + self.links.len() as u32;
                let at = |offset: usize| self.a.place(offset) as u32;
                self.links.push(Link { site: at(from.0), target, live, stub: at(here) });
                self.a.store_imm(field!(link), number as i32);
                self.boundary(exit::CHAIN, target, live);
            }
            Cold::Budget { from, target } => {
                self.a.fill(from, here);
                self.boundary(exit::NEXT, target, false);
            }
            Cold::Backward { from, target, flags } => {
                self.a.fill(from, here);
                self.flags = flags;
                self.backward_edge(i32::from(target));
            }
            Cold::Across { from, target, flags } => {
                self.a.fill(from, here);
                self.flags = flags;
                self.across(target);
            }
            Cold::Window { site, place, what, exit } => self.missed(site, place, what, exit),
            Cold::Vectors { from, again, needed, exit } => {
                self.a.fill(from, here);
                self.a.mem(false, &[0xf6], 0, field!(vectors_allowed));
                self.a.bytes(&[if needed == 3 { 2 } else { 1 }]);
                let hole = self.a.jcc(4);
                self.a.call_to(self.routines.load_vectors);
                let back = self.a.jmp();
                self.a.fill(back, again);
                let here = self.a.here();
                self.a.fill(hole, here);
                self.leave_with(exit);
            }
            Cold::X87 { from, again, exit } => {
                self.a.fill(from, here);
                self.a.mem(false, &[0xf6], 0, field!(x87_allowed)); // test byte [x87_allowed], 1
                self.a.bytes(&[1]);
                let hole = self.a.jcc(4);
                self.a.call_to(self.routines.load_x87);
                let back = self.a.jmp();
                self.a.fill(back, again);
                let here = self.a.here();
                self.a.fill(hole, here);
                self.leave_with(exit);
            }
            Cold::NoShift { from, again, flags } => {
                self.a.fill(from, here);
                self.cook(flags);
                let back = self.a.jmp();
                self.a.fill(back, again);
            }
            Cold::Indirect { from, undo, exit } => {
                for hole in from {
                    self.a.fill(hole, here);
                }
                if self.long() {
                    self.a.mov(R15, RAX);
                    self.a.bytes(&[0x49, 0xc1, 0xe7, 16]); // shl r15, 16
                    self.a.bytes(&[0x49, 0xc1, 0xff, 16]); // sar r15, 16
                    self.a.reg(true, &[0x39], R15, RAX);
                    self.a.jcc_to(4, self.routines.jump);
                    if undo != 0 {
                        self.move_stack(undo);
                    }
                    self.leave_with(exit);
                } else {
                    self.a.jmp_to(self.routines.jump);
                }
            }
        }
    }
}
