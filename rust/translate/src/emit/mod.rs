//! From guest instructions to host code: registers, flags, memory operands.
//!
//! The code of a block has two entries. At the live one the guest's status
//! flags are in the host's; at the saved one they are in [`Frame::flags`]. A TLB
//! lookup spoils the host's flags, so before one they are saved, unless they can
//! be made again from registers that still have their values (a *recipe*: a
//! comparison is simply repeated). Nothing is saved that the next instruction to
//! touch flags overwrites, except where an exit could come in between.

mod bits;
mod cold;
mod flags;
mod flow;
mod instructions;
mod memory;
mod overlay;
mod privilege;
mod spilled;
mod strings;
mod window;
mod x87;

use crate::analysis::{self, Abilities, Guest, Kind};
use crate::assembler::{host, Assembler};
use crate::frame::{self, exit, field, Routines};
use cold::Cold;
use flags::{Event, Flags};
use iced_x86::{Encoder, InstructionInfoFactory, Register};
use memory::Group;
use nonroot_interpret::state::Mode;
use nonroot_interpret::window::Part;
pub use window::Outlook;

const RAX: u8 = host::RAX;
const R15: u8 = host::R15;

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
    /// Its code that runs often, for its place.
    pub often: Vec<u8>,
    /// Its code that runs rarely.
    pub rarely: Vec<u8>,
    /// Offsets in the arena of the entries with live and with saved flags.
    pub entry: [usize; 2],
    /// Offsets in the arena of the code that leaves at the block's start, for each entry.
    pub refuse: [usize; 2],
    /// Jumps that may be chained, numbered from the first number given.
    pub links: Vec<Link>,
    /// Offsets in the arena of instructions that may fault, ascending, and of where to go on then.
    pub sites: Vec<(u32, u32)>,
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
    /// Registers without a host register are loaded only where they must be.
    pub spilled: bool,
    /// What instructions change of the flags is made again from their result.
    pub overlays: bool,
    /// What a register was is kept to make flags again.
    pub stashes: bool,
    /// Flags that a block overwrites are not restored for instructions that would leave them as they were.
    pub dead: bool,
    /// Code that runs rarely is kept apart.
    pub apart: bool,
    /// The host has BMI2.
    pub bmi2: bool,
    /// The code is for an address space that has the windows.
    pub windowed: bool,
}

/// Where a block is, and goes.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Offset in its page of the block.
    pub start: u16,
    /// Offset in the arena of its code.
    pub origin: usize,
    /// The same of what runs rarely.
    pub rare: usize,
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
    /// Offset in the arena of what runs rarely.
    rare: usize,
    flags: Flags,
    group: Option<Group>,
    /// RSP minus its value at the block's start (while that is known), and how often it was lost.
    delta: i64,
    /// The first instruction of the present part of the block, which ends with a branch.
    first: usize,
    /// Whether that part's instructions, so many, are counted.
    counted: bool,
    count: i32,
    /// Offset in the page of the block.
    start: u16,
    /// The number by which exits name it.
    block: u32,
    at: usize,
    entry: [Option<usize>; 2],
    /// Offset in the page of the last x87 instruction, if the frame does not have it yet.
    x87_ip: Option<u16>,
    /// What R15 and RAX hold of guest registers without a host register, as far as nothing else is emitted.
    kept: ([Option<u8>; 2], usize),
    /// The code is for an address space that has the windows.
    windowed: bool,
    /// What was checked to be in a window.
    safe: Vec<(memory::Key, Part)>,
    /// See [`Translated::sites`].
    sites: Vec<(u32, u32)>,
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
        let Place { start, origin, rare, first_link, block } = place;
        let jump = if switches.lookup { routines.jump } else { routines.lookup_failed };
        let routines = Routines { jump, ..routines };
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
            rare,
            flags: Flags::Live(None),
            group: None,
            delta: 0,
            first: 0,
            counted: false,
            count: Self::part(guests),
            start,
            block,
            at: 0,
            entry: [None; 2],
            x87_ip: None,
            kept: ([None; 2], 0),
            windowed: switches.windowed,
            safe: Vec::new(),
            sites: Vec::new(),
        }
    }

    /// Code for a link whose target must be looked up, though it is in the page: it crosses into the next,
    /// which may change.
    pub fn crossing(mut self, target: u16, live: bool) -> Vec<u8> {
        self.flags = if live { Flags::Live(None) } else { Flags::Saved };
        self.across(i32::from(target));
        self.a.code
    }

    /// Code that has the block at `callee` interpreted.
    pub fn callout(mut self, callee: u64) -> Translated {
        self.entry[0] = Some(self.a.here());
        frame::save_flags(&mut self.a);
        self.entry[1] = Some(self.a.here());
        self.flags = Flags::Saved;
        self.a.store_imm(field!(offset), i32::from(self.start));
        self.a.store_imm(field!(adjust), 0);
        self.a.bytes(&[0x48, 0xb8]); // mov rax, imm64
        self.a.bytes(&callee.to_le_bytes());
        self.a.store(true, field!(callee), RAX);
        self.a.jmp_to(self.routines.callout);
        self.finish()
    }

    /// Translates.
    pub fn run(mut self) -> Emitted<Translated> {
        self.entry[0] = Some(self.a.here());
        let vectors = self.guests.iter().map(|g| g.vectors).max().unwrap_or(0);
        // Whether the vector registers are the guest's is looked at first, which takes the flags.
        let x87 = self.guests.iter().any(|g| g.x87);
        let event = if vectors == 0 && !x87 { self.first_event() } else { Event::Spoil };
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
        if x87 {
            self.check_x87();
        }
        let guests = self.guests;
        let mut ended = false;
        for (n, g) in guests.iter().enumerate() {
            self.at = n;
            ended = self.instruction(g)?;
            if ended && n + 1 < guests.len() {
                (self.first, self.count, self.counted) = (n + 1, Self::part(&guests[n + 1..]), false);
            }
        }
        if !ended {
            let last = &guests[guests.len() - 1].i;
            self.at = guests.len();
            self.edge(last.next_ip() as i32)?;
        }
        Ok(self.finish())
    }

    /// Instructions up to the first branch, and with it.
    fn part(guests: &[Guest]) -> i32 {
        let branch = guests.iter().position(|g| g.kind == Kind::Branch);
        branch.map_or(guests.len(), |at| at + 1) as i32
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

    fn finish(mut self) -> Translated {
        let often = self.a.here();
        if self.switches.apart {
            self.a.split = Some((often, self.rare));
        }
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
        let rarely = if self.switches.apart { self.a.code.split_off(often) } else { Vec::new() };
        let place = |offset| self.a.place(offset);
        let (entry, refuse) = ([live, saved].map(place), refuse.map(place));
        Translated { often: self.a.code, rarely, entry, refuse, links: self.links, sites: self.sites }
    }
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
