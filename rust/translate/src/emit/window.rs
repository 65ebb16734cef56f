//! Memory operands without a lookup: guest memory at host addresses that follow from the guest's.
//!
//! An access is the instruction itself, with a GS prefix for the upper window, whose base is minus the distance. Before
//! it a register is checked once, for all displacements: the bits of its value above 2^27 are the index of a byte that is
//! mapped if the address is in the window (PEXT and a load, which leave the flags alone and which nothing waits for).
//! Both fault where they must not pass. The signal's handler then goes on at [`Cold::Window`], which asks for the page,
//! or leaves at the instruction: with the guest's flags wherever they were.

use super::cold::{Cold, SideExit};
use super::memory::{Group, Key};
use super::{Emitter, R15, RAX};
use crate::analysis::{Guest, Kind, Operand, Stack, RBP, RSP};
use crate::assembler::{at, Mem};
use crate::frame::{self, exit, field, missed, HOST_OF};
use nonroot_interpret::window::Part;

/// A change of RSP up to which what was checked of it holds: a block has 64 at most.
const SMALL: i32 = 1 << 20;

/// A memory operand as host code reaches it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) mem: Mem,
    /// Its window; `None`: the address is the host's.
    pub(super) part: Option<Part>,
    pub(super) what: u32,
}

impl Place {
    /// RAX plus a displacement, after a lookup.
    pub(super) fn looked_up(disp: i32) -> Place {
        Place { mem: at(RAX, disp), part: None, what: 0 }
    }

    pub(super) fn uses(&self, reg: u8) -> bool {
        self.mem.base == Some(reg) || self.mem.index.is_some_and(|(index, _)| index == reg)
    }
}

/// What is known at the time of translation about the addresses that a block will use.
pub struct Outlook<'a> {
    /// The guest's registers at its start.
    pub registers: &'a [u64],
    /// Its first instruction's address.
    pub rip: u64,
    /// Base of FS.
    pub fs: u64,
    /// What was chosen before for an instruction by its offset in the page, for its stack access if true; else the third
    /// is chosen. `None`: it needs a lookup.
    pub choice: &'a mut dyn FnMut(u16, bool, Part) -> Option<Part>,
}

impl Outlook<'_> {
    /// Chooses the windows of a block's memory operands.
    pub fn plan(&mut self, guests: &mut [Guest]) {
        let mut unchanged = u16::MAX;
        for g in guests {
            self.choose(g, unchanged);
            unchanged &= if g.stack_delta.is_some() { !g.writes | 1 << RSP } else { !g.writes };
        }
    }

    fn choose(&mut self, g: &mut Guest, unchanged: u16) {
        let kind = matches!(
            g.kind,
            Kind::Same
                | Kind::Push
                | Kind::Pop
                | Kind::Leave
                | Kind::Divide { .. }
                | Kind::JumpIndirect
                | Kind::CallIndirect
                | Kind::Call
                | Kind::Return
        );
        if !kind || g.x87 {
            return;
        }
        let offset = g.i.ip() as u16;
        let registers = self.registers;
        let value = |r: u8| (unchanged >> r & 1 != 0).then(|| registers[r as usize]);
        // Programs at fixed addresses have data in both windows.
        let usual = if Part::of(self.rip) == Some(Part::Low) { Part::Either } else { Part::High };
        let mut parts = [None; 2];
        let frame = Operand::stack_frame();
        let memory = if g.kind == Kind::Leave { Some(&frame) } else { g.memory.as_ref() };
        if let Some(m) = memory {
            if m.short || m.segment == 2 || m.segment == 1 && m.index.is_some() || m.size == 0 {
                return;
            }
            let guess = || {
                let start = match (m.segment, m.rip) {
                    (1, _) => Some(self.fs),
                    (_, true) => Some(self.rip & !0xfff),
                    _ => Some(0),
                };
                let base = m.base.map_or(Some(0), value);
                let index = m.index.map_or(Some(0), |(index, scale)| Some(value(index)? << scale));
                let sum = start?.wrapping_add(base?).wrapping_add(index?).wrapping_add(m.disp as i64 as u64);
                Part::of(sum)
            };
            let Some(part) = (self.choice)(offset, false, guess().unwrap_or(usual)) else { return };
            parts[0] = Some(part);
        }
        if g.stack != Stack::None {
            let guess = value(RSP).and_then(Part::of).unwrap_or(Part::High);
            let Some(part) = (self.choice)(offset, true, guess) else { return };
            parts[1] = Some(part);
        }
        if parts != [None; 2] {
            (g.windowed, g.parts) = (true, parts);
        }
    }
}

impl Operand {
    /// What LEAVE reads.
    fn stack_frame() -> Operand {
        Operand {
            base: Some(RBP),
            index: None,
            disp: 0,
            rip: false,
            segment: 0,
            short: false,
            size: 8,
            align: 1,
            write: false,
        }
    }
}

impl Emitter<'_> {
    /// An access in a window, or after a lookup: the operand for host code.
    pub(super) fn reach(&mut self, key: Key, disp: i32, bytes: u16, write: bool, stack: bool) -> Place {
        let part = self.guests.get(self.at).and_then(|g| g.parts[usize::from(stack)].filter(|_| g.windowed));
        match part {
            Some(part) => self.in_window(key, disp, bytes, write, part, stack),
            None => Place::looked_up(self.access(key, disp, bytes, write)),
        }
    }

    fn in_window(&mut self, key: Key, disp: i32, bytes: u16, write: bool, part: Part, stack: bool) -> Place {
        let spilled = |r: u8| HOST_OF[r as usize].is_none();
        let mut mem = Mem { base: None, index: None, disp };
        let either = part == Part::Either;
        let group = self.group.filter(|group| either && group.either && group.key == key);
        let sum = either
            || key.rip
            || key.segment != 0
            || key.base.is_some_and(spilled)
            || key.index.is_some_and(|(index, _)| spilled(index));
        if group.is_some() {
            mem.base = Some(RAX);
        } else if sum {
            self.group = None;
            self.window_address(&key);
            mem.base = Some(RAX);
        } else {
            mem.base = key.base.and_then(|r| HOST_OF[r as usize]);
            mem.index = key.index.and_then(|(index, scale)| Some((HOST_OF[index as usize]?, scale)));
        }
        let what = u32::from(bytes)
            | if write { missed::WRITE } else { 0 }
            | if stack { missed::STACK } else { 0 }
            | match part {
                Part::Low => missed::LOW,
                Part::High => 0,
                Part::Either => missed::EITHER,
            };
        let place = Place { mem, part: Some(part), what };
        self.check_window(&key, place, part);
        if either && group.is_none() {
            self.pext(RAX, RAX, field!(either_mask));
            self.group = Some(Group { key, low: 0, high: 0, write: false, either });
        }
        place
    }

    /// RAX: what `key` stands for, without displacement. Touches no flags.
    fn window_address(&mut self, key: &Key) {
        let mut first = true;
        if key.rip {
            self.a.load(true, RAX, field!(code_page));
            first = false;
        } else if key.segment != 0 {
            self.a.load(true, RAX, frame::segment_base(usize::from(key.segment) - 1));
            first = false;
        }
        if let Some(base) = key.base {
            match HOST_OF[base as usize] {
                Some(reg) if first => self.a.mov(RAX, reg),
                Some(reg) => self.a.lea(true, RAX, Mem { base: Some(RAX), index: Some((reg, 0)), disp: 0 }),
                None if first => self.a.load(true, RAX, frame::spilled(base)),
                None => {
                    self.a.load(true, R15, frame::spilled(base));
                    self.a.lea(true, RAX, Mem { base: Some(RAX), index: Some((R15, 0)), disp: 0 });
                }
            }
            first = false;
        }
        if let Some((index, scale)) = key.index {
            let reg = self.value(index, R15);
            let base = (!first).then_some(RAX);
            self.a.lea(true, RAX, Mem { base, index: Some((reg, scale)), disp: 0 });
        }
    }

    /// Leaves unless the address, without its displacement, is in its window.
    fn check_window(&mut self, key: &Key, place: Place, part: Part) {
        let constant = key.base.is_none() && key.index.is_none();
        // Code runs below 2^47, so that what is near it is neither the host's memory nor, less the distance, the lower
        // window's; and constants are below 2 GiB, or so high that they fault.
        let sure = constant && key.segment == 0 && key.rip == (part == Part::High);
        if sure || self.safe.contains(&(*key, part)) {
            return;
        }
        let source = match place.mem {
            Mem { base: Some(base), index: None, .. } => base,
            mem => {
                self.a.lea(true, R15, Mem { disp: 0, ..mem });
                R15
            }
        };
        self.pext(R15, source, field!(window_mask));
        self.missing(place, missed::STRAYED);
        self.a.mem(false, &[0x0f, 0xb6], R15, frame::window_table(part)); // movzx r15d, byte
        self.safe.push((*key, part));
    }

    /// `pext reg, source, [mask]`.
    fn pext(&mut self, reg: u8, source: u8, mask: Mem) {
        self.a.bytes(&[0xc4, 0x62 | u8::from(reg < 8) << 7, 0x82 | (!source & 15) << 3]);
        self.a.mem_without_rex(0xf5, reg, mask);
    }

    /// What is emitted next may fault.
    fn missing(&mut self, place: Place, more: u32) {
        let exit = self.side_exit(exit::WINDOW);
        let site = self.a.here();
        self.cold.push(Cold::Window { site, place, what: place.what | more, exit });
    }

    /// Before the instruction that has a place as its operand.
    pub(super) fn touch(&mut self, place: &Place) {
        if place.part.is_some() {
            self.missing(*place, 0);
        }
    }

    /// `opcode reg, place`.
    pub(super) fn at_place(&mut self, wide: bool, opcode: &[u8], reg: u8, place: &Place) {
        self.touch(place);
        if place.part == Some(Part::High) {
            self.a.gs_mem(wide, opcode, reg, place.mem);
        } else {
            self.a.mem(wide, opcode, reg, place.mem);
        }
    }

    pub(super) fn load_place(&mut self, wide: bool, reg: u8, place: &Place) {
        self.at_place(wide, &[0x8b], reg, place);
    }

    pub(super) fn store_place(&mut self, wide: bool, place: &Place, reg: u8) {
        self.at_place(wide, &[0x89], reg, place);
    }

    /// After an instruction: what was checked of registers that it changed.
    pub(super) fn settle_windows(&mut self, g: &Guest) {
        if self
            .group
            .is_some_and(|group| group.either && group.key.base.is_some_and(|r| g.writes >> r & 1 != 0))
        {
            self.group = None;
        }
        let small = g.stack_delta.is_some_and(|by| by.abs() <= SMALL);
        let changed = if small { g.writes & !(1 << RSP) } else { g.writes };
        self.safe.retain(|(key, _)| {
            let index = key.index.map(|(index, _)| index);
            [key.base, index].into_iter().flatten().all(|r| changed >> r & 1 == 0)
        });
    }

    /// Code at which the signal's handler goes on: asks for the page and tries again, or leaves.
    pub(super) fn missed(&mut self, site: usize, place: Place, what: u32, exit: SideExit) {
        let kept = field!(missed);
        let word = |n: i32| Mem { disp: kept.disp + 8 * n, ..kept };
        self.sites.push((self.a.place(site) as u32, self.a.place(self.a.here()) as u32));
        self.a.store(true, word(0), RAX);
        self.a.store(true, word(1), R15);
        self.a.bytes(&[0x9c]); // pushf
        self.a.mem(false, &[0x8f], 0, word(2)); // pop
        self.a.lea(true, RAX, place.mem);
        self.a.bytes(&[0x41, 0xbf]); // mov r15d, imm32
        self.a.bytes(&what.to_le_bytes());
        self.a.call_to(self.routines.missed);
        self.a.reg(false, &[0x85], RAX, RAX);
        let leave = self.a.jcc(5);
        self.flags_after_miss(word(2));
        self.a.load(true, R15, word(1));
        self.a.load(true, RAX, word(0));
        let again = self.a.jmp();
        self.a.fill(again, site);
        let here = self.a.here();
        self.a.fill(leave, here);
        self.flags_after_miss(word(2));
        self.leave_with(exit);
    }

    fn flags_after_miss(&mut self, kept: Mem) {
        self.a.mem(false, &[0xff], 6, kept); // push
        self.a.bytes(&[0x9d]); // popf
    }
}
