//! Memory operands: TLB lookups, and one lookup for several accesses.

use super::cold::Cold;
use super::window::Place;
use super::{Emitter, R15, RAX};
use crate::analysis::{Guest, Kind, Operand, Stack, RSP};
use crate::assembler::{at, Mem};
use crate::frame::{self, exit, field, HOST_OF};
use nonroot_interpret::tlb;
use std::mem::offset_of;

/// Guest instructions that a group of accesses may span.
const LOOKAHEAD: usize = 24;
/// Bytes that a group may span.
const SPAN: i64 = 1024;

/// What a memory address is made of, for telling that two are near each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Key {
    pub(super) base: Option<u8>,
    pub(super) index: Option<(u8, u8)>,
    pub(super) rip: bool,
    pub(super) segment: u8,
    pub(super) short: bool,
}

/// RAX holds the host address of `low`, and all up to `high` is in the same page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) key: Key,
    pub(super) low: i64,
    pub(super) high: i64,
    pub(super) write: bool,
    /// RAX holds the address in either window of the key alone instead.
    pub(super) either: bool,
}

impl Emitter<'_> {
    pub(super) fn key(m: &Operand) -> Key {
        Key { base: m.base, index: m.index, rip: m.rip, segment: m.segment, short: m.short }
    }

    pub(super) fn stack_key(&self) -> Key {
        Key { base: Some(RSP), index: None, rip: false, segment: 0, short: !self.long() }
    }

    /// The displacement in terms of RSP at the block's start.
    pub(super) fn normal_disp(key: &Key, disp: i64, delta: i64) -> i64 {
        if key.base == Some(RSP) {
            disp + delta
        } else {
            disp
        }
    }

    /// Linear address of `key` plus `disp` (present RSP) into RAX; spoils R15 if need be.
    pub(super) fn address(&mut self, key: &Key, disp: i32) {
        let wide = !key.short;
        let mut m = Mem { base: None, index: None, disp };
        if key.rip {
            self.a.load(true, RAX, field!(code_page));
            m.base = Some(RAX);
        }
        if let Some(base) = key.base {
            m.base = Some(match HOST_OF[base as usize] {
                Some(reg) => reg,
                None => {
                    self.a.load(true, RAX, frame::spilled(base));
                    RAX
                }
            });
        }
        if let Some((index, scale)) = key.index {
            let reg = match HOST_OF[index as usize] {
                Some(reg) => reg,
                None => {
                    self.a.load(true, R15, frame::spilled(index));
                    R15
                }
            };
            m.index = Some((reg, scale));
        }
        match m {
            Mem { base: Some(base), index: None, disp: 0 } if wide => self.a.mov(RAX, base),
            _ => self.a.lea(wide, RAX, m),
        }
        if key.segment != 0 {
            let base = frame::segment_base(usize::from(key.segment) - 1);
            self.a.mem(self.long(), &[0x03], RAX, base); // add
        }
    }

    /// Looks up `bytes` at `key` plus `disp`: RAX becomes their host address. The guest's flags are safe already.
    /// `wide`: the instruction itself needs less.
    pub(super) fn lookup(&mut self, key: &Key, disp: i32, bytes: u16, write: bool, wide: bool) {
        self.check_segment(key);
        let again = self.a.here();
        self.address(key, disp);
        self.probe(again, bytes, write, wide);
    }

    /// Leaves unless the segment is flat.
    pub(super) fn check_segment(&mut self, key: &Key) {
        if key.segment != 0 && !self.long() {
            self.a.mem(false, &[0xf6], 0, field!(segments)); // test byte [segments], bit
            self.a.bytes(&[key.segment]);
            let hole = self.a.jcc(4);
            let exit = self.side_exit(exit::SINGLE);
            self.cold.push(Cold::Exit { from: vec![hole], exit });
        }
    }

    /// The rest of a lookup: RAX is a linear address, and becomes that of the host. `again` makes RAX anew.
    pub(super) fn probe(&mut self, again: usize, bytes: u16, write: bool, wide: bool) {
        if self.switches.bmi2 {
            self.a.bytes(&[0xc4, 0x63, 0x7b, 0xf0, 0xf8, 7]); // rorx r15d, eax, 7
        } else {
            self.a.reg(false, &[0x8b], R15, RAX); // mov r15d, eax
            self.a.bytes(&[0x41, 0xc1, 0xef, 7]); // shr r15d, 7
        }
        self.a.bytes(&[0x41, 0x81, 0xe7]); // and r15d, imm32
        self.a.bytes(&(((tlb::ENTRIES - 1) * size_of::<tlb::Entry>()) as u32).to_le_bytes());
        let tag = if write { offset_of!(tlb::Entry, write) } else { offset_of!(tlb::Entry, read) };
        if self.windowed {
            self.a.mem(true, &[0x03], R15, field!(set)); // add
        }
        frame::in_set(&mut self.a, true, &[0x33], RAX, at(R15, tag as i32), self.windowed); // xor rax, tag
        self.a.bytes(&[0x48, 0x3d]); // cmp rax, imm32
        self.a.bytes(&(0x1000 - u32::from(bytes)).to_le_bytes());
        let hole = self.a.jcc(7);
        let exit = self.side_exit(if wide { exit::WIDE } else { exit::SINGLE });
        self.cold.push(Cold::Refill { from: hole, again, bytes, write, exit });
        let host = at(R15, offset_of!(tlb::Entry, host) as i32);
        frame::in_set(&mut self.a, true, &[0x03], RAX, host, self.windowed); // add rax, host
    }

    /// Makes RAX plus the returned displacement the host address of an access.
    pub(super) fn access(&mut self, key: Key, disp: i32, bytes: u16, write: bool) -> i32 {
        let disp = i64::from(disp);
        let normal = Self::normal_disp(&key, disp, self.delta);
        if let Some(group) = self.group {
            let inside = normal >= group.low && normal + i64::from(bytes) <= group.high;
            if group.key == key && inside && (group.write || !write) && !group.either {
                return (normal - group.low) as i32;
            }
        }
        let group = self.extent(key, normal, bytes, write);
        self.spoil_flags();
        let low = group.low - (normal - disp);
        match i32::try_from(low) {
            Ok(low) => {
                let span = (group.high - group.low) as u16;
                self.lookup(&key, low, span, group.write, span != bytes || group.write != write);
                self.group = Some(group);
                (normal - group.low) as i32
            }
            Err(_) => {
                self.lookup(&key, disp as i32, bytes, write, false);
                self.group = None;
                0
            }
        }
    }

    /// What the next accesses near this one span.
    pub(super) fn extent(&self, key: Key, normal: i64, bytes: u16, write: bool) -> Group {
        let mut group = Group { key, low: normal, high: normal + i64::from(bytes), write, either: false };
        if !self.switches.groups || self.at >= self.guests.len() {
            return group;
        }
        let registers = key.base.map_or(0, |r| 1 << r) | key.index.map_or(0, |(r, _)| 1 << r);
        let mut delta = self.delta;
        for (n, g) in self.guests[self.at..].iter().enumerate().take(LOOKAHEAD) {
            if n > 0 && g.windowed {
                // It needs no lookup.
                match g.stack_delta {
                    Some(change) => delta += i64::from(change),
                    None if key.base == Some(RSP) => break,
                    None => {}
                }
                let changed = if g.stack_delta.is_some() { g.writes & !(1 << RSP) } else { g.writes };
                if changed & registers != 0 || g.implicit_rax {
                    break;
                }
                continue;
            }
            let include = |key2: Key, disp: i64, bytes: u16, write: bool, group: &mut Group| {
                if key2 != key {
                    return;
                }
                let at = Self::normal_disp(&key2, disp, delta);
                let (low, high) = (group.low.min(at), group.high.max(at + i64::from(bytes)));
                if high - low <= SPAN {
                    (group.low, group.high) = (low, high);
                    group.write |= write;
                }
            };
            if n > 0
                && (g.implicit_rax
                    || matches!(
                        g.kind,
                        Kind::HighByte
                            | Kind::Divide { .. }
                            | Kind::BitString
                            | Kind::String
                            | Kind::TimeStamp { .. }
                    ))
            {
                break;
            }
            if n > 0 {
                match g.stack {
                    Stack::Read(bytes) => include(self.stack_key(), 0, u16::from(bytes), false, &mut group),
                    Stack::Write(bytes) => {
                        include(self.stack_key(), -i64::from(bytes), u16::from(bytes), true, &mut group);
                    }
                    Stack::None => {}
                }
                if let Some(m) = &g.memory {
                    if !matches!(g.kind, Kind::Lea | Kind::Nop) {
                        include(Self::key(m), i64::from(m.disp), m.size, m.write, &mut group);
                    }
                }
            }
            if g.kind == Kind::Branch {
                // What comes after it may not happen.
                break;
            }
            match g.stack_delta {
                Some(change) => delta += i64::from(change),
                None if key.base == Some(RSP) => break,
                None => {}
            }
            let changed = if g.stack_delta.is_some() { g.writes & !(1 << RSP) } else { g.writes };
            if changed & registers != 0 {
                break;
            }
        }
        group
    }

    /// After an instruction: what it changed that a group rests on.
    pub(super) fn settle_group(&mut self, g: &Guest) {
        self.settle_windows(g);
        match g.stack_delta {
            Some(change) => self.delta += i64::from(change),
            None => {
                self.delta = 0;
                if self.group.is_some_and(|group| group.key.base == Some(RSP)) {
                    self.group = None;
                }
            }
        }
        let changed = if g.stack_delta.is_some() { g.writes & !(1 << RSP) } else { g.writes };
        if let Some(group) = self.group {
            let registers = group.key.base.map_or(0, |r| 1 << r) | group.key.index.map_or(0, |(r, _)| 1 << r);
            if changed & registers != 0 {
                self.group = None;
            }
        }
    }

    /// The memory operand of the present instruction.
    pub(super) fn memory(&mut self, m: &Operand) -> Place {
        if self.guests[self.at].windowed {
            // Where it must be aligned, the host's instruction faults as well.
            return self.reach(Self::key(m), m.disp, m.size, m.write, false);
        }
        if m.align > 1 {
            self.spoil_flags();
        }
        let disp = self.access(Self::key(m), m.disp, m.size, m.write);
        if m.align > 1 {
            if disp == 0 {
                self.a.bytes(&[0xa8, m.align - 1]); // test al, imm8
            } else {
                self.a.lea(true, R15, at(RAX, disp));
                self.a.bytes(&[0x41, 0xf6, 0xc7, m.align - 1]); // test r15b, imm8
            }
            let hole = self.a.jcc(5);
            let exit = self.side_exit(exit::SINGLE);
            self.cold.push(Cold::Exit { from: vec![hole], exit });
        }
        Place::looked_up(disp)
    }

    pub(super) fn check_vectors(&mut self, needed: u8) {
        let again = self.a.here();
        self.a.mem(false, &[0xf6], 0, field!(vectors)); // test byte [vectors], bits
        self.a.bytes(&[if needed == 3 { 2 } else { 1 }]);
        let hole = self.a.jcc(4);
        let exit = self.side_exit(exit::BLOCK);
        self.cold.push(Cold::Vectors { from: hole, again, needed, exit });
    }
}
