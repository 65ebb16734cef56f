//! From guest instructions to host code: registers, flags, memory operands.
//!
//! The code of a block has two entries. At the live one the guest's status
//! flags are in the host's; at the saved one they are in [`Frame::flags`]. A TLB
//! lookup spoils the host's flags, so before one they are saved, unless they can
//! be made again from registers that still have their values (a *recipe*: a
//! comparison is simply repeated). Nothing is saved that the next instruction to
//! touch flags overwrites, except where an exit could come in between.

use crate::analysis::{self, Abilities, Guest, Kind, Operand, Stack, RSP};
use crate::assembler::{at, host, Assembler, Hole, Mem};
use crate::frame::{self, exit, field, Routines, HOST_OF};
use iced_x86::{Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};
use nonroot_interpret::state::Mode;
use nonroot_interpret::tlb;
use std::mem::offset_of;

const RAX: u8 = host::RAX;
const R15: u8 = host::R15;
/// Guest instructions that a group of accesses may span.
const LOOKAHEAD: usize = 24;
/// Bytes that a group may span.
const SPAN: i64 = 1024;

/// Where the guest's status flags are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Flags {
    /// In the host's, and how to make them again.
    Live(Option<Recipe>),
    /// In [`frame::Frame::flags`].
    Saved,
    /// Nowhere, but they can be made again.
    Recipe(Recipe),
}

/// How to make the status flags from guest registers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Recipe {
    how: How,
    /// Guest registers.
    left: u8,
    right: Option<u8>,
    immediate: i32,
    /// Operand bytes: 4 or 8 (1 for a comparison of low bytes).
    size: u8,
}

/// What happens to the flags that a block begins with.
enum Event {
    /// They are needed, or handed on, as they are.
    Need,
    /// All are overwritten.
    Overwrite,
    /// Something needs the host's flags in between.
    Spoil,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    /// CMP left, right or immediate.
    Compare,
    /// TEST left, right or immediate.
    Test,
    /// Those of the addition of the right operand that gave left.
    Added,
    /// Those of the subtraction of the right operand that gave left.
    Subtracted,
}

impl Recipe {
    fn reads(&self, registers: u16) -> bool {
        registers & 1 << self.left != 0 || self.right.is_some_and(|r| registers & 1 << r != 0)
    }
}

/// What a memory address is made of, for telling that two are near each other.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Key {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    rip: bool,
    segment: u8,
    short: bool,
}

/// RAX holds the host address of `low`, and all up to `high` is in the same page.
#[derive(Clone, Copy, Debug)]
struct Group {
    key: Key,
    low: i64,
    high: i64,
    write: bool,
}

/// Code that runs rarely, after the rest.
enum Cold {
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
    /// Vector registers are not the guest's yet.
    Vectors { from: Hole, again: usize, needed: u8, exit: SideExit },
    /// An indirect target that may not be canonical.
    Indirect { from: Vec<Hole>, undo: i32, exit: SideExit },
}

#[derive(Clone, Copy)]
struct SideExit {
    kind: u32,
    offset: u16,
    /// Goes with [`exit::WIDE`].
    block: u32,
    /// Instructions of the block that are complete.
    done: i32,
    counted: bool,
    flags: Flags,
}

/// A jump that may be chained: offset in the arena of its displacement.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Where.
    pub site: u32,
    /// Offset in the page of the instruction that it leads to.
    pub target: u16,
    /// It arrives with the flags in the host's.
    pub live: bool,
    /// Offset in the arena of the code that leaves instead.
    pub stub: u32,
}

/// A translated block.
pub struct Translated {
    /// Its code, for the assembler's origin.
    pub code: Vec<u8>,
    /// Offsets of the entries with live and with saved flags.
    pub entry: [usize; 2],
    /// Offsets of the code that leaves at the block's start, for each entry.
    pub refuse: [usize; 2],
    /// Jumps that may be chained, numbered from the first number given.
    pub links: Vec<Link>,
}

/// What is switched on.
#[derive(Clone, Copy, Debug)]
pub struct Switches {
    /// Jumps to other pages and indirect ones look their target up inline.
    pub lookup: bool,
    /// Flags are made again instead of saved.
    pub recipes: bool,
    /// One lookup serves accesses that are near each other.
    pub groups: bool,
}

/// Where a block is, and goes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Offset in its page of the block.
    pub start: u16,
    /// Offset in the arena of its code.
    pub origin: usize,
    /// Number of its first link.
    pub first_link: u32,
    /// The number by which exits name it.
    pub block: u32,
}

/// The translation of one block.
pub struct Emitter<'a> {
    a: Assembler,
    routines: Routines,
    switches: Switches,
    mode: Mode,
    guests: &'a [Guest],
    encoder: Encoder,
    cold: Vec<Cold>,
    links: Vec<Link>,
    first_link: u32,
    flags: Flags,
    group: Option<Group>,
    /// RSP minus its value at the block's start (while that is known), and how often it was lost.
    delta: i64,
    counted: bool,
    count: i32,
    /// Offset in the page of the block.
    start: u16,
    /// The number by which exits name it.
    block: u32,
    at: usize,
    entry: [Option<usize>; 2],
}

type Emitted<T = ()> = Result<T, String>;

/// Decodes and plans a block of `bytes` at `start` in its page. `None`: not all of it is translated.
pub fn plan(
    bytes: &[u8],
    start: u16,
    count: u16,
    mode: Mode,
    abilities: Abilities,
    info: &mut InstructionInfoFactory,
) -> Option<Vec<Guest>> {
    let bitness = if mode == Mode::Long64 { 64 } else { 32 };
    let mut decoder =
        iced_x86::Decoder::with_ip(bitness, bytes, u64::from(start), iced_x86::DecoderOptions::NONE);
    let mut guests = Vec::with_capacity(count as usize);
    for _ in 0..count {
        guests.push(analysis::guest(&decoder.decode(), mode, abilities, info)?);
    }
    Some(guests)
}

impl<'a> Emitter<'a> {
    /// A translation of `guests` to a place.
    pub fn new(
        guests: &'a [Guest],
        mode: Mode,
        place: Place,
        routines: Routines,
        switches: Switches,
    ) -> Self {
        let Place { start, origin, first_link, block } = place;
        Emitter {
            a: Assembler::new(origin),
            routines,
            switches,
            mode,
            guests,
            encoder: Encoder::new(64),
            cold: Vec::new(),
            links: Vec::new(),
            first_link,
            flags: Flags::Live(None),
            group: None,
            delta: 0,
            counted: false,
            count: guests.len() as i32,
            start,
            block,
            at: 0,
            entry: [None; 2],
        }
    }

    /// Code for a link whose target must be looked up, though it is in the page: it crosses into the next,
    /// which may change.
    pub fn crossing(mut self, target: u16, live: bool) -> Vec<u8> {
        self.flags = if live { Flags::Live(None) } else { Flags::Saved };
        self.across(i32::from(target));
        self.a.code
    }

    /// Translates.
    pub fn run(mut self) -> Emitted<Translated> {
        self.entry[0] = Some(self.a.here());
        let vectors = self.guests.iter().map(|g| g.vectors).max().unwrap_or(0);
        // Whether the vector registers are the guest's is looked at first, which takes the flags.
        let event = if vectors == 0 { self.first_event() } else { Event::Spoil };
        match event {
            Event::Spoil => {
                frame::save_flags(&mut self.a);
                self.flags = Flags::Saved;
                self.entry[1] = Some(self.a.here());
                self.count_now();
            }
            Event::Overwrite => self.entry[1] = self.entry[0],
            // Its saved entry restores them first; see finish().
            Event::Need => {}
        }
        if vectors != 0 {
            self.check_vectors(if vectors == 2 { 3 } else { 1 });
        }
        let guests = self.guests;
        let mut ended = false;
        for (n, g) in guests.iter().enumerate() {
            self.at = n;
            ended = self.instruction(g)?;
        }
        if !ended {
            let last = &guests[guests.len() - 1].i;
            self.at = guests.len();
            self.edge(last.next_ip() as i32)?;
        }
        self.finish()
    }

    fn long(&self) -> bool {
        self.mode == Mode::Long64
    }

    fn width(&self) -> i32 {
        if self.long() {
            8
        } else {
            4
        }
    }

    // ---- flags and counting ----------------------------------------------------------

    /// What happens first to the flags that the block begins with.
    fn first_event(&self) -> Event {
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

    fn edge_event(&self, target: i32) -> Event {
        if Self::in_page(target) && !self.backward(target) {
            Event::Need
        } else {
            Event::Spoil
        }
    }

    /// Counts the block's instructions, where the host's flags are free.
    fn count_now(&mut self) {
        if !self.counted {
            self.counted = true;
            self.a.mem_imm(5, field!(budget), self.count);
        }
    }

    /// Makes the host's flags free to be overwritten, without losing the guest's. RAX may be spoilt.
    fn spoil_flags(&mut self) {
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
    fn want_flags(&mut self) {
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
    fn cook(&mut self, r: Recipe) {
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
    fn recipe(&self, g: &Guest) -> Option<Recipe> {
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
                return Some(Recipe { how: How::Test, left, right: Some(left), immediate: 0, size });
            }
            _ => return None,
        };
        Some(Recipe { how, left, right, immediate, size })
    }

    fn side_exit(&self, kind: u32) -> SideExit {
        let offset = match self.guests.get(self.at) {
            Some(g) => g.i.ip() as u16,
            None => self.guests[self.at - 1].i.next_ip() as u16,
        };
        SideExit {
            kind,
            offset,
            block: self.block,
            done: self.at as i32,
            counted: self.counted,
            flags: self.flags,
        }
    }

    /// Before an instruction that changes registers that the flags are to be made from.
    fn keep_recipe(&mut self, g: &Guest) {
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

    // ---- memory ------------------------------------------------------------------------

    fn key(m: &Operand) -> Key {
        Key { base: m.base, index: m.index, rip: m.rip, segment: m.segment, short: m.short }
    }

    fn stack_key(&self) -> Key {
        Key { base: Some(RSP), index: None, rip: false, segment: 0, short: !self.long() }
    }

    /// The displacement in terms of RSP at the block's start.
    fn normal_disp(key: &Key, disp: i64, delta: i64) -> i64 {
        if key.base == Some(RSP) {
            disp + delta
        } else {
            disp
        }
    }

    /// Linear address of `key` plus `disp` (present RSP) into RAX; spoils R15 if need be.
    fn address(&mut self, key: &Key, disp: i32) {
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
    fn lookup(&mut self, key: &Key, disp: i32, bytes: u16, write: bool, wide: bool) {
        if key.segment != 0 && !self.long() {
            self.a.mem(false, &[0xf6], 0, field!(segments)); // test byte [segments], bit
            self.a.bytes(&[key.segment]);
            let hole = self.a.jcc(4);
            let exit = self.side_exit(exit::SINGLE);
            self.cold.push(Cold::Exit { from: vec![hole], exit });
        }
        let again = self.a.here();
        self.address(key, disp);
        self.a.reg(false, &[0x8b], R15, RAX); // mov r15d, eax
        self.a.bytes(&[0x41, 0xc1, 0xef, 7]); // shr r15d, 7
        self.a.bytes(&[0x41, 0x81, 0xe7]); // and r15d, imm32
        self.a.bytes(&(((tlb::ENTRIES - 1) * size_of::<tlb::Entry>()) as u32).to_le_bytes());
        let tag = if write { offset_of!(tlb::Entry, write) } else { offset_of!(tlb::Entry, read) };
        self.a.gs_mem(true, &[0x33], RAX, at(R15, tag as i32)); // xor rax, tag
        self.a.bytes(&[0x48, 0x3d]); // cmp rax, imm32
        self.a.bytes(&(0x1000 - u32::from(bytes)).to_le_bytes());
        let hole = self.a.jcc(7);
        let exit = self.side_exit(if wide { exit::WIDE } else { exit::SINGLE });
        self.cold.push(Cold::Refill { from: hole, again, bytes, write, exit });
        self.a.gs_mem(true, &[0x03], RAX, at(R15, offset_of!(tlb::Entry, host) as i32));
        // add rax, host
    }

    /// Makes RAX plus the returned displacement the host address of an access.
    fn access(&mut self, key: Key, disp: i32, bytes: u16, write: bool) -> i32 {
        let disp = i64::from(disp);
        let normal = Self::normal_disp(&key, disp, self.delta);
        if let Some(group) = self.group {
            let inside = normal >= group.low && normal + i64::from(bytes) <= group.high;
            if group.key == key && inside && (group.write || !write) {
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
    fn extent(&self, key: Key, normal: i64, bytes: u16, write: bool) -> Group {
        let mut group = Group { key, low: normal, high: normal + i64::from(bytes), write };
        if !self.switches.groups || self.at >= self.guests.len() {
            return group;
        }
        let registers = key.base.map_or(0, |r| 1 << r) | key.index.map_or(0, |(r, _)| 1 << r);
        let mut delta = self.delta;
        for (n, g) in self.guests[self.at..].iter().enumerate().take(LOOKAHEAD) {
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
            if n > 0 && (g.implicit_rax || matches!(g.kind, Kind::HighByte | Kind::Divide { .. })) {
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
    fn settle_group(&mut self, g: &Guest) {
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

    /// The memory operand of the present instruction: RAX plus the returned displacement.
    fn memory(&mut self, m: &Operand) -> i32 {
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
        disp
    }

    fn check_vectors(&mut self, needed: u8) {
        let again = self.a.here();
        self.a.mem(false, &[0xf6], 0, field!(vectors)); // test byte [vectors], bits
        self.a.bytes(&[if needed == 3 { 2 } else { 1 }]);
        let hole = self.a.jcc(4);
        let exit = self.side_exit(exit::BLOCK);
        self.cold.push(Cold::Vectors { from: hole, again, needed, exit });
    }

    // ---- instructions --------------------------------------------------------------------

    /// Emits one instruction; true if it ended the block.
    fn instruction(&mut self, g: &Guest) -> Emitted<bool> {
        match g.kind {
            Kind::Branch => return self.branch(g).map(|()| true),
            Kind::CountBranch => return self.count_branch(g).map(|()| true),
            Kind::Jump => return self.edge(g.i.near_branch_target() as i32).map(|()| true),
            Kind::Call => return self.call(g).map(|()| true),
            Kind::JumpIndirect | Kind::CallIndirect | Kind::Return => return self.indirect(g).map(|()| true),
            _ => {}
        }
        self.keep_recipe(g);
        match g.kind {
            Kind::Nop => {}
            Kind::Same => self.same(g)?,
            Kind::Lea => self.lea(g)?,
            Kind::Push => self.push(g)?,
            Kind::Pop => self.pop(g)?,
            Kind::Leave => self.leave(),
            Kind::Divide { signed } => self.divide(g, signed)?,
            Kind::HighByte => self.high_byte(g)?,
            Kind::Cli => self.cli(),
            Kind::Sti => self.sti(),
            Kind::Swapgs => self.swapgs(),
            Kind::Access { open } => self.access_check(open),
            Kind::Cld => {
                self.spoil_flags();
                self.a.mem_imm(4, field!(rflags), !0x400);
            }
            Kind::Pushf => self.pushf(),
            _ => return Err(format!("{:?}", g.kind)),
        }
        self.settle_group(g);
        Ok(false)
    }

    /// Flags before an instruction of kind Same or Divide, and its memory operand.
    fn flags_before(&mut self, g: &Guest) {
        if g.flags_needed {
            self.want_flags();
        } else if g.flags_changed && !self.counted {
            // They are about to be overwritten, and nothing can exit before that.
            self.count_now();
        }
    }

    fn flags_after(&mut self, g: &Guest) {
        if g.flags_changed {
            self.flags = Flags::Live(if g.kills_flags() { self.recipe(g) } else { None });
            if let Flags::Live(Some(r)) = self.flags {
                // A register that the instruction itself changed is part of it only as its result.
                let result = matches!(r.how, How::Added | How::Subtracted) || r.right == Some(r.left);
                if !result && r.reads(g.writes) {
                    self.flags = Flags::Live(None);
                }
            }
        }
    }

    fn same(&mut self, g: &Guest) -> Emitted {
        let mut place = None;
        if let Some(m) = &g.memory {
            let disp = self.memory(m);
            place = Some((RAX, disp));
        }
        if g.flags_needed && matches!(self.flags, Flags::Recipe(_)) {
            // Leaves RAX alone.
            self.want_flags();
        }
        let restores = g.flags_needed && self.flags == Flags::Saved;
        if let (Some((_, disp)), true) = (place, g.implicit_rax || restores) {
            self.a.lea(true, R15, at(RAX, disp));
            self.group = None;
            place = Some((R15, 0));
        }
        self.flags_before(g);
        if g.implicit_rax {
            self.group = None;
            self.a.mov(RAX, host::R14);
        }
        self.encode(g, place)?;
        if g.implicit_rax && g.writes & 1 != 0 {
            self.a.mov(host::R14, RAX);
        }
        self.flags_after(g);
        Ok(())
    }

    /// Encodes the instruction with host registers, its memory operand at `place`.
    fn encode(&mut self, g: &Guest, place: Option<(u8, i32)>) -> Emitted {
        let mut out = g.i;
        let mut free: Vec<u8> = Vec::new();
        if !g.implicit_rax && place.is_none_or(|(reg, _)| reg != RAX) {
            free.push(RAX);
        }
        if place.is_none_or(|(reg, _)| reg != R15) {
            free.push(R15);
        }
        // R15 first: RAX may hold a group's address.
        let mut scratch: Vec<(u8, u8)> = Vec::new();
        for n in 0..out.op_count() {
            if out.op_kind(n) != OpKind::Register {
                continue;
            }
            let r = out.op_register(n);
            let Some(guest) = analysis::number(r) else { continue };
            let reg = match HOST_OF[guest as usize] {
                _ if guest == analysis::RAX && g.implicit_rax => RAX,
                Some(reg) => reg,
                None => match scratch.iter().find(|(of, _)| *of == guest) {
                    Some(&(_, reg)) => reg,
                    None => {
                        let reg = free.pop().ok_or("no scratch register")?;
                        if reg == RAX {
                            self.group = None;
                        }
                        self.a.load(true, reg, frame::spilled(guest));
                        scratch.push((guest, reg));
                        reg
                    }
                },
            };
            out.set_op_register(n, register(reg, r.size()));
        }
        if let Some((base, disp)) = place {
            out.set_segment_prefix(Register::None);
            out.set_memory_base(register(base, 8));
            out.set_memory_index(Register::None);
            out.set_memory_index_scale(1);
            out.set_memory_displacement64(disp as i64 as u64);
            out.set_memory_displ_size(match disp {
                0 => 0,
                -128..=127 => 1,
                _ => 8,
            });
        }
        self.raw(&out)?;
        for (guest, reg) in scratch {
            if g.writes & 1 << guest != 0 {
                self.a.store(true, frame::spilled(guest), reg);
            }
        }
        Ok(())
    }

    fn raw(&mut self, i: &Instruction) -> Emitted {
        self.encoder.encode(i, 0).map_err(|e| format!("{:?}: {e}", i.code()))?;
        let bytes = self.encoder.take_buffer();
        self.a.bytes(&bytes);
        Ok(())
    }

    /// A guest register in some host register: its own, or `scratch`.
    fn value(&mut self, guest: u8, scratch: u8) -> u8 {
        match HOST_OF[guest as usize] {
            Some(reg) => reg,
            None => {
                self.a.load(true, scratch, frame::spilled(guest));
                scratch
            }
        }
    }

    fn set(&mut self, guest: u8, from: u8) {
        match HOST_OF[guest as usize] {
            Some(reg) => self.a.mov(reg, from),
            None => self.a.store(true, frame::spilled(guest), from),
        }
    }

    fn lea(&mut self, g: &Guest) -> Emitted {
        let m = g.memory.as_ref().ok_or("LEA without memory")?;
        let wide = g.i.op0_register().size() == 8 && !m.short;
        let dst = analysis::number(g.i.op0_register()).ok_or("LEA to no register")?;
        let spilled_parts = [m.base, m.index.map(|(index, _)| index)]
            .iter()
            .flatten()
            .filter(|&&r| HOST_OF[r as usize].is_none())
            .count();
        let mut mem = Mem { base: None, index: None, disp: m.disp };
        if m.rip {
            self.a.load(true, R15, field!(code_page));
            mem.base = Some(R15);
        }
        if let Some(base) = m.base {
            mem.base = Some(self.value(base, R15));
        }
        if let Some((index, scale)) = m.index {
            let scratch = if spilled_parts == 2 {
                self.group = None;
                RAX
            } else {
                R15
            };
            mem.index = Some((self.value(index, scratch), scale));
        }
        match HOST_OF[dst as usize] {
            Some(reg) => self.a.lea(wide, reg, mem),
            None => {
                self.a.lea(wide, R15, mem);
                self.a.store(true, frame::spilled(dst), R15);
            }
        }
        Ok(())
    }

    /// Adds to the guest's RSP without touching flags.
    fn move_stack(&mut self, by: i32) {
        let rsp = host::R11;
        self.a.lea(self.long(), rsp, at(rsp, by));
    }

    fn push(&mut self, g: &Guest) -> Emitted {
        let width = self.width();
        let mut value = None;
        if let Some(m) = &g.memory {
            let disp = self.memory(m);
            self.a.load(self.long(), R15, at(RAX, disp));
            self.a.store(true, field!(temporary), R15);
            value = Some(R15);
        }
        let disp = self.access(self.stack_key(), -width, width as u16, true);
        let slot = at(RAX, disp);
        match g.i.op0_kind() {
            OpKind::Register => {
                let guest = analysis::number(g.i.op0_register()).ok_or("PUSH of no register")?;
                let reg = self.value(guest, R15);
                self.a.store(self.long(), slot, reg);
            }
            OpKind::Memory => {
                debug_assert!(value.is_some());
                self.a.load(true, R15, field!(temporary));
                self.a.store(self.long(), slot, R15);
            }
            _ => {
                let immediate = g.i.immediate(0) as i64;
                let immediate = if self.long() {
                    i32::try_from(immediate).map_err(|e| e.to_string())?
                } else {
                    immediate as i32
                };
                if self.long() {
                    self.a.store_imm_wide(slot, immediate);
                } else {
                    self.a.store_imm(slot, immediate);
                }
            }
        }
        self.move_stack(-width);
        Ok(())
    }

    fn pop(&mut self, g: &Guest) -> Emitted {
        let width = self.width();
        let guest = analysis::number(g.i.op0_register()).ok_or("POP to no register")?;
        let disp = self.access(self.stack_key(), 0, width as u16, false);
        if guest == RSP {
            self.a.load(self.long(), host::R11, at(RAX, disp));
            return Ok(());
        }
        match HOST_OF[guest as usize] {
            Some(reg) => self.a.load(self.long(), reg, at(RAX, disp)),
            None => {
                self.a.load(self.long(), R15, at(RAX, disp));
                self.a.store(true, frame::spilled(guest), R15);
            }
        }
        self.move_stack(width);
        Ok(())
    }

    fn leave(&mut self) {
        let width = self.width();
        let key = Key { base: Some(analysis::RBP), index: None, rip: false, segment: 0, short: !self.long() };
        let disp = self.access(key, 0, width as u16, false);
        self.a.load(self.long(), R15, at(RAX, disp));
        self.a.lea(self.long(), host::R11, at(host::RBP, width));
        self.a.mov(host::RBP, R15);
    }

    fn divide(&mut self, g: &Guest, signed: bool) -> Emitted {
        let wide = match &g.memory {
            Some(m) => m.size == 8,
            None => g.i.op0_register().size() == 8,
        };
        let divisor = match &g.memory {
            Some(m) => {
                let disp = self.memory(m);
                self.a.load(wide, R15, at(RAX, disp));
                R15
            }
            None => {
                self.spoil_flags();
                let guest = analysis::number(g.i.op0_register()).ok_or("DIV by no register")?;
                HOST_OF[guest as usize].ok_or("DIV by a spilled register")?
            }
        };
        self.group = None;
        let mut holes = Vec::new();
        if signed {
            // Only RDX = sign of RAX, and a divisor other than 0 and -1.
            self.a.reg(wide, &[0x8b], RAX, host::R14);
            self.a.reg(wide, &[0xc1], 7, RAX); // sar rax, size - 1
            self.a.bytes(&[if wide { 63 } else { 31 }]);
            self.a.reg(wide, &[0x39], host::RDX, RAX);
            holes.push(self.a.jcc(5));
            self.a.lea(wide, RAX, at(divisor, 1));
            self.a.reg_imm(wide, 7, RAX, 1);
            holes.push(self.a.jcc(6));
        } else {
            // The quotient fits exactly if RDX is below the divisor.
            self.a.reg(wide, &[0x39], divisor, host::RDX);
            holes.push(self.a.jcc(3));
        }
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: holes, exit });
        self.a.mov(RAX, host::R14);
        // DIV by RAX means the guest's.
        let divisor = if divisor == host::R14 { RAX } else { divisor };
        self.a.reg(wide, &[0xf7], if signed { 7 } else { 6 }, divisor);
        self.a.mov(host::R14, RAX);
        self.flags = Flags::Live(None);
        Ok(())
    }

    fn high_byte(&mut self, g: &Guest) -> Emitted {
        let first = matches!(g.i.op0_register(), Register::AH | Register::CH | Register::DH | Register::BH);
        let source = if first { g.i.op0_register() } else { g.i.op1_register() };
        let guest = match source {
            Register::AH => 0u8,
            Register::CH => 1,
            Register::DH => 2,
            _ => 3,
        };
        self.group = None;
        let reg = self.value(guest, RAX);
        self.a.mov(RAX, reg);
        if first {
            self.flags_before(g);
            let mut i = g.i;
            i.set_op0_register(Register::AH);
            self.raw(&i)?;
            if g.writes != 0 {
                self.a.mov(reg, RAX);
            }
            if g.flags_changed {
                self.flags = Flags::Live(None);
            }
            return Ok(());
        }
        self.a.bytes(&[0x0f, 0xb6, 0xc4]); // movzx eax, ah
        let dst = analysis::number(g.i.op0_register()).ok_or("no destination")?;
        if g.i.mnemonic() == Mnemonic::Movzx {
            self.set(dst, RAX);
        } else {
            let to = match HOST_OF[dst as usize] {
                Some(reg) => reg,
                None => {
                    self.a.load(true, R15, frame::spilled(dst));
                    R15
                }
            };
            let mut i = Instruction::with2(iced_x86::Code::Mov_r8_rm8, register(to, 1), Register::AL)
                .map_err(|e| e.to_string())?;
            i.set_len(0);
            self.raw(&i)?;
            if HOST_OF[dst as usize].is_none() {
                self.a.store(true, frame::spilled(dst), R15);
            }
        }
        Ok(())
    }

    /// Leaves unless CPL is 0.
    fn supervisor(&mut self) {
        self.spoil_flags();
        self.a.mem(false, &[0x80], 7, field!(cpl)); // cmp byte [cpl], 0
        self.a.bytes(&[0]);
        let hole = self.a.jcc(5);
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: vec![hole], exit });
    }

    fn cli(&mut self) {
        self.supervisor();
        self.a.mem_imm(4, field!(rflags), !0x200);
    }

    /// Only while no interrupt waits: those that come meanwhile are looked at when the budget is used up.
    fn sti(&mut self) {
        self.supervisor();
        self.a.mem(false, &[0x80], 7, field!(pending));
        self.a.bytes(&[0]);
        let hole = self.a.jcc(5);
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: vec![hole], exit });
        self.a.mem_imm(1, field!(rflags), 0x200);
    }

    fn swapgs(&mut self) {
        self.supervisor();
        self.group = None;
        self.a.load(true, RAX, frame::segment_base(1));
        self.a.load(true, R15, field!(kernel_gs));
        self.a.store(true, field!(kernel_gs), RAX);
        self.a.store(true, frame::segment_base(1), R15);
    }

    /// STAC and CLAC: RFLAGS.AC, and the TLB entries that go with it.
    fn access_check(&mut self, open: bool) {
        self.supervisor();
        self.group = None;
        if open {
            self.a.mem_imm(1, field!(rflags), 1 << 18);
            self.a.load(true, RAX, field!(gs_open));
        } else {
            self.a.mem_imm(4, field!(rflags), !(1 << 18));
            self.a.load(true, RAX, field!(gs_closed));
        }
        self.a.bytes(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]); // wrgsbase rax
    }

    fn pushf(&mut self) {
        // Flags to where they can be read, whatever they are now.
        if let Flags::Recipe(r) = self.flags {
            self.cook(r);
            self.flags = Flags::Live(None);
        }
        if let Flags::Live(_) = self.flags {
            self.flags = Flags::Live(None);
        }
        self.spoil_flags();
        let width = self.width();
        let disp = self.access(self.stack_key(), -width, width as u16, true);
        // R15D: SF ZF AF PF CF from the high byte, OF from the low one, the rest of RFLAGS.
        self.a.mem(
            false,
            &[0x0f, 0xb6],
            R15,
            Mem { disp: offset_of!(frame::Frame, flags) as i32 + 1, ..at(host::RSP, 0) },
        );
        self.a.mem(false, &[0x0b], R15, field!(rflags)); // or
        self.a.store(true, at(RAX, disp), R15);
        self.a.mem(false, &[0x0f, 0xb6], R15, field!(flags));
        self.a.bytes(&[0x41, 0xc1, 0xe7, 11]); // shl r15d, 11
        self.a.mem(true, &[0x09], R15, at(RAX, disp)); // or [slot], r15
        self.move_stack(-width);
    }

    // ---- control flow -----------------------------------------------------------------------

    /// The end of the block at an edge: everything counted, nothing in a recipe.
    fn before_edge(&mut self) {
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

    fn count_without_flags(&mut self) {
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

    fn in_page(target: i32) -> bool {
        (0..0x1000).contains(&target)
    }

    fn backward(&self, target: i32) -> bool {
        target <= i32::from(self.start)
    }

    /// A jump that leads to `target` (in the page), with flags live or saved.
    fn link(&mut self, from: Hole, target: i32, live: bool) {
        self.cold.push(Cold::Link { from, target: target as u16, live });
    }

    /// Goes on at `target`, an offset from the start of the page.
    fn edge(&mut self, target: i32) -> Emitted {
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
    fn backward_edge(&mut self, target: i32) {
        self.spoil_live();
        self.a.mem_imm(7, field!(budget), 0);
        let hole = self.a.jcc(12);
        self.cold.push(Cold::Budget { from: hole, target: target as u16 });
        let hole = self.a.jmp();
        self.link(hole, target, false);
    }

    /// Saves live flags at an edge, where recipes do not live on.
    fn spoil_live(&mut self) {
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
    fn across(&mut self, target: i32) {
        self.spoil_live();
        self.a.load(true, RAX, field!(code_page));
        self.a.lea(self.long(), RAX, at(RAX, target));
        self.jump_to_rax();
    }

    /// Goes on at the instruction pointer in RAX; flags are saved.
    fn jump_to_rax(&mut self) {
        let failed = self.routines.lookup_failed;
        for hole in self.jump_lookup() {
            self.a.fill_outside(hole, failed);
        }
    }

    /// Looks up the instruction pointer in RAX and goes there; gives the ways out if that fails.
    fn jump_lookup(&mut self) -> Vec<Hole> {
        if !self.switches.lookup {
            return vec![self.a.jmp()];
        }
        self.a.mem_imm(7, field!(budget), 0);
        let used_up = self.a.jcc(12);
        self.hash();
        let slot = offset_of!(tlb::Set, jumps) as i32;
        self.a.gs_mem(true, &[0x3b], RAX, at(R15, slot + offset_of!(tlb::Jump, lin) as i32));
        let unknown = self.a.jcc(5);
        self.a.bytes(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]); // and rax, -4096
        self.a.store(true, field!(code_page), RAX);
        self.a.gs_mem(false, &[0xff], 4, at(R15, slot + offset_of!(tlb::Jump, code) as i32)); // jmp
        vec![used_up, unknown]
    }

    /// R15: offset of the slot of the instruction pointer in RAX.
    fn hash(&mut self) {
        self.a.reg(false, &[0x69], R15, RAX); // imul r15d, eax, imm32
        self.a.bytes(&tlb::JUMP_HASH.to_le_bytes());
        self.a.bytes(&[0x41, 0xc1, 0xef, 15]); // shr r15d, 15
        self.a.bytes(&[0x41, 0x81, 0xe7, 0xf0, 0xff, 1, 0]); // and r15d, 0x1fff0
    }

    fn branch(&mut self, g: &Guest) -> Emitted {
        if !self.counted {
            self.want_flags();
            self.count_without_flags_keeping();
        } else {
            self.want_flags();
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
        self.flags = flags;
        self.edge(next)
    }

    fn count_without_flags_keeping(&mut self) {
        if !self.counted {
            let flags = self.flags;
            self.flags = Flags::Live(None);
            self.count_without_flags();
            self.flags = flags;
        }
    }

    fn count_branch(&mut self, g: &Guest) -> Emitted {
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
    fn push_return(&mut self, g: &Guest) {
        let width = self.width();
        let disp = self.access(self.stack_key(), -width, width as u16, true);
        self.a.load(true, R15, field!(code_page));
        self.a.lea(self.long(), R15, at(R15, g.i.next_ip() as i32));
        self.a.store(self.long(), at(RAX, disp), R15);
        self.move_stack(-width);
    }

    fn call(&mut self, g: &Guest) -> Emitted {
        self.keep_recipe(g);
        self.push_return(g);
        self.settle_group(g);
        self.at += 1;
        self.edge(g.i.near_branch_target() as i32)
    }

    fn indirect(&mut self, g: &Guest) -> Emitted {
        let width = self.width();
        let mut undo = 0;
        let exit;
        match g.kind {
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
                        let disp = self.memory(m);
                        self.a.load(self.long(), RAX, at(RAX, disp));
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

    // ---- cold code ------------------------------------------------------------------------------

    fn leave_with(&mut self, exit: SideExit) {
        let adjust = exit.done - if exit.counted { self.count } else { 0 };
        if let Flags::Recipe(r) = exit.flags {
            self.cook(r);
        }
        self.a.store_imm(field!(kind), exit.kind as i32);
        self.a.store_imm(field!(offset), i32::from(exit.offset));
        self.a.store_imm(field!(adjust), adjust);
        if exit.kind == exit::WIDE {
            self.a.store_imm(field!(link), exit.block as i32);
        }
        let leave = if exit.flags == Flags::Saved { self.routines.leave } else { self.routines.leave_live };
        self.a.jmp_to(leave);
    }

    fn boundary(&mut self, kind: u32, target: u16, live: bool) {
        self.a.store_imm(field!(kind), kind as i32);
        self.a.store_imm(field!(offset), i32::from(target));
        self.a.store_imm(field!(adjust), 0);
        self.a.jmp_to(if live { self.routines.leave_live } else { self.routines.leave });
    }

    fn cold(&mut self, cold: Cold) {
        let here = self.a.here();
        match cold {
            Cold::Refill { from, again, bytes, write, exit } => {
                self.a.fill(from, here);
                let tag = if write { offset_of!(tlb::Entry, write) } else { offset_of!(tlb::Entry, read) };
                self.a.gs_mem(true, &[0x33], RAX, at(R15, tag as i32));
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
                let at = |offset: usize| (self.a.origin + offset) as u32;
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
            Cold::Indirect { from, undo, exit } => {
                for hole in from {
                    self.a.fill(hole, here);
                }
                if self.long() {
                    self.a.mov(R15, RAX);
                    self.a.bytes(&[0x49, 0xc1, 0xe7, 16]); // shl r15, 16
                    self.a.bytes(&[0x49, 0xc1, 0xff, 16]); // sar r15, 16
                    self.a.reg(true, &[0x39], R15, RAX);
                    self.a.jcc_to(4, self.routines.lookup_failed);
                    if undo != 0 {
                        self.move_stack(undo);
                    }
                    self.leave_with(exit);
                } else {
                    self.a.jmp_to(self.routines.lookup_failed);
                }
            }
        }
    }

    fn finish(mut self) -> Emitted<Translated> {
        while !self.cold.is_empty() {
            for cold in std::mem::take(&mut self.cold) {
                self.cold(cold);
            }
        }
        let live = self.entry[0].unwrap_or(0);
        let saved = self.entry[1].unwrap_or_else(|| {
            // Restores the flags, then enters where they are live.
            let here = self.a.here();
            frame::restore_flags(&mut self.a);
            let hole = self.a.jmp();
            self.a.fill(hole, live);
            here
        });
        let mut refuse = [0; 2];
        for (n, live) in [true, false].into_iter().enumerate() {
            refuse[n] = self.a.here();
            self.boundary(exit::NEXT, self.start, live);
        }
        Ok(Translated { code: self.a.code, entry: [live, saved], refuse, links: self.links })
    }
}

/// The low nibble of Jcc's opcode: iced numbers the conditions in this order, after None.
fn condition_number(condition: iced_x86::ConditionCode) -> Option<u8> {
    (condition as u8).checked_sub(1)
}

/// A host register of `size` bytes as iced names it.
fn register(reg: u8, size: usize) -> Register {
    let n = u32::from(reg);
    match size {
        8 => Register::RAX + n,
        4 => Register::EAX + n,
        2 => Register::AX + n,
        _ if reg < 4 => Register::AL + n,
        _ if reg < 8 => Register::SPL + (n - 4),
        _ => Register::R8L + (n - 8),
    }
}
