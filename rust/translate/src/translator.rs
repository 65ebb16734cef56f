//! Running translated blocks: translating what is hot, entering, chaining, dropping.

use crate::analysis::{self, Abilities, Guest};
use crate::arena::Arena;
use crate::assembler::Assembler;
use crate::emit::{self, Emitter, Link};
use crate::faults::{self, Sites};
use crate::frame::{self, exit, Calls, Frame, Routines, Stack};
use crate::switches::Switches;
use iced_x86::{Instruction, InstructionInfoFactory};
use nonroot_interpret::accelerate::{Accelerator, Ran};
use nonroot_interpret::code_cache::{Block, NO_PAGE, WINDOWED};
use nonroot_interpret::cpu::Cpu;
use nonroot_interpret::flags::Flags;
use nonroot_interpret::state::*;
use nonroot_interpret::tlb::context;
use nonroot_interpret::window::{Missed, Part, DISTANCE, LOW_END};
use nonroot_memory::{P2M_FLAGS, P2M_FOREIGN, P2M_PRESENT};
use std::cell::RefCell;
use std::collections::HashMap;

/// Bytes of generated code before all of it is dropped.
const CAPACITY: usize = 64 << 20;
/// A block is translated when it is offered for this time.
const HOT: u32 = 4;
/// [`Block::native`] of a block that is never translated.
const NEVER: u32 = 1;
/// Room for one more block, at least.
const RESERVE: usize = 256 << 10;
/// Blocks that are translated as one, at most, and their instructions.
const LONG_PARTS: usize = 4;
const LONG_COUNT: usize = 64;

/// Counters.
#[derive(Clone, Copy, Debug, Default)]
struct Statistics {
    translated_blocks: u64,
    translated_instructions: u64,
    untranslatable_blocks: u64,
    entries: u64,
    interpreted_blocks: u64,
    exits: [u64; 8],
    chained: u64,
    native_instructions: u64,
    flushes: u64,
    narrowed_blocks: u64,
    called_blocks: u64,
    strayed: u64,
    granted: u64,
    windows: [u64; 2],
}

/// GS base of code that uses the windows.
const WINDOW_BASE: u64 = DISTANCE.wrapping_neg();
/// The mode key of 64-bit code that does not.
const LONG: u64 = 4;
/// Instructions that an address space runs at privilege level 3 before it gets the windows: at first, and after it lost
/// them for not being worth their while; and after it lost them for another reason.
const PATIENCE: u64 = 60_000_000;
const MOST_PATIENCE: u64 = 1 << 34;
const LITTLE_PATIENCE: u64 = 2_000_000;

/// Who is to have the windows.
#[derive(Default)]
struct Candidate {
    /// Instructions at privilege level 3 without windows, by page table, since they were last given.
    instructions: HashMap<u64, u64>,
    /// Twice those that their owner ran, less those that others did: while it is above 0, the owner keeps them.
    owner: u64,
    /// Instructions that it needs; by page table, if not the usual.
    patience: HashMap<u64, u64>,
    /// Nobody gets them: the host does not let them be.
    hopeless: bool,
    /// In place of [`PATIENCE`], for tests; 0: none.
    instead: u64,
    /// The thread that may have the signal.
    thread: libc::pthread_t,
}

/// The translator of one vCPU.
pub struct Translator {
    arena: Arena,
    stack: Stack,
    routines: Routines,
    /// Where the routines end and blocks begin.
    floor: usize,
    switches: Switches,
    abilities: Abilities,
    info: RefCell<InstructionInfoFactory>,
    links: Vec<Link>,
    /// Blocks by number, and how often lookups for several of their instructions failed.
    blocks: Vec<(*mut Block, u32)>,
    /// A jump that may be chained to the block that is offered next, if that is at this
    /// address and found by this key.
    pending: Option<(u32, u64, u64)>,
    /// Each block is compared with the interpreter.
    lockstep: bool,
    /// Offers after which a block is translated.
    hot: u32,
    /// The next block is the interpreter's.
    interpret_next: bool,
    /// Links that lead to each block, by its first entry.
    incoming: HashMap<u32, Vec<u32>>,
    /// Where each block's entries are turned away to when it is dropped.
    refuse: HashMap<u32, [u32; 2]>,
    /// Blocks whose code goes on with that of others, by each of those.
    longer: HashMap<*mut Block, Vec<*mut Block>>,
    /// Instructions that may fault.
    sites: Box<Sites>,
    /// Which window instructions use (`None`: neither), and how often they were wrong: by twice the guest-physical
    /// address, plus one for the stack.
    places: HashMap<u64, (Option<Part>, u8)>,
    candidate: Candidate,
    statistics: Statistics,
}

/// Whether this host can run translated code, or why not.
pub fn available() -> Result<(), String> {
    // SAFETY: getauxval reads the process's auxiliary vector.
    let features = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    if features & 2 == 0 {
        return Err("the host's kernel does not let processes use WRGSBASE".to_string());
    }
    for (there, name) in [
        (std::arch::is_x86_feature_detected!("bmi1"), "BMI1"),
        (std::arch::is_x86_feature_detected!("sse4.2"), "SSE4.2"),
    ] {
        if !there {
            return Err(format!("the host's CPU has no {name}"));
        }
    }
    Ok(())
}

/// Whether the host has PEXT, and not in microcode, as AMD's had it before family 19h.
fn quick_pext() -> bool {
    // SAFETY: leaves 0 and 1 are on all x86-64 CPUs. (Newer toolchains: needs no unsafe.)
    #[allow(unused_unsafe)]
    let (vendor, version) = unsafe { (std::arch::x86_64::__cpuid(0).ebx, std::arch::x86_64::__cpuid(1).eax) };
    // "Auth" and "Hygo".
    let amd = matches!(vendor, 0x6874_7541 | 0x6f67_7948);
    let family = (version >> 8 & 0xf) + (version >> 20 & 0xff);
    std::arch::is_x86_feature_detected!("bmi2") && (!amd || family >= 0x19)
}

/// Fills the TLB for translated code; 0 if the access can now go on.
///
/// # Safety
/// Called by generated code with its frame, to whose vCPU nothing else refers.
unsafe extern "sysv64" fn refill(frame: *mut Frame, lin: u64, what: u32) -> u32 {
    // SAFETY: by the contract; `enter` uses no reference to frame or vCPU while generated code runs.
    let (f, cpu) = unsafe { (&mut *frame, &mut *(*frame).cpu) };
    if f.crossed != 0 {
        take_privilege(f, cpu);
    } else if (cpu.r.rflags ^ u64::from(f.rflags)) & rflags::AC != 0 {
        cpu.r.rflags ^= rflags::AC;
        cpu.tlb_context_changed();
    }
    u32::from(!cpu.enter_page(lin, (what & 0xffff) as usize, what >> 31 != 0))
}

/// Has the pages of an access be in the windows; 0 if it can now go on.
///
/// # Safety
/// Called by generated code with its frame, to whose vCPU nothing else refers.
unsafe extern "sysv64" fn missed(frame: *mut Frame, lin: u64, what: u32) -> u32 {
    // SAFETY: by the contract; `enter` uses no reference to frame or vCPU while generated code runs.
    let (f, cpu) = unsafe { (&mut *frame, &mut *(*frame).cpu) };
    if f.crossed != 0 {
        take_privilege(f, cpu);
    }
    let part = match what & (frame::missed::LOW | frame::missed::EITHER) {
        0 => Part::High,
        frame::missed::LOW => Part::Low,
        _ => Part::Either,
    };
    // Where it may be in either, its address is the host's by then.
    let host = part == Part::Either && what & frame::missed::STRAYED == 0;
    let lin = if host && lin >= LOW_END { lin.wrapping_add(DISTANCE) } else { lin };
    f.strayed = 0;
    if what & frame::missed::STRAYED != 0 || !part.has(lin) {
        f.strayed = lin & !3 | 2 | u64::from(what & frame::missed::STACK != 0);
        return 1;
    }
    let write = what & frame::missed::WRITE != 0;
    u32::from(cpu.fill_windows(lin, (what & 0xffff) as usize, write) != Missed::Filled)
}

/// The guest's time-stamp counter for translated code.
///
/// # Safety
/// Called by generated code with its frame, to whose vCPU nothing else refers.
unsafe extern "sysv64" fn time_stamp(frame: *const Frame) -> u64 {
    // SAFETY: by the contract; `enter` uses no reference to frame or vCPU while generated code runs.
    unsafe { (*(*frame).cpu).tsc() }
}

/// Has a block interpreted for translated code; 0 to leave.
///
/// # Safety
/// Called by generated code with its frame, to whose vCPU nothing else refers; the callee is a live block.
unsafe extern "sysv64" fn callout(frame: *mut Frame) -> u32 {
    // SAFETY: by the contract; `enter` uses no reference to frame or vCPU while generated code runs.
    let (f, cpu) = unsafe { (&mut *frame, &mut *(*frame).cpu) };
    f.kind = exit::NEXT;
    take_state(f, cpu);
    f.called += 1;
    // SAFETY: the code that calls goes with its block, which is that of the present instruction pointer.
    let goes_on = unsafe { cpu.interpret_for_accelerator(f.callee as *const Block, f.until) };
    f.kind = if cpu.accelerated_exit.is_some() { exit::EXIT } else { exit::LOOKUP };
    f.rip = cpu.r.rip;
    f.adjust = 0;
    give_state(f, cpu);
    u32::from(goes_on && cpu.retired < f.until)
}

/// What generated code needs of a vCPU's state, but for the registers.
fn give_state(f: &mut Frame, cpu: &mut Cpu) {
    let status = cpu.r.flags.to_rflags();
    let segment = |n: usize| {
        let s = &cpu.r.seg[n];
        let flat = ar::S | ar::RW | ar::P;
        let mask = ar::S | ar::CODE | ar::RW | ar::DC | ar::P | ar::UNUSABLE;
        s.limit == u32::MAX && s.ar & mask == flat
    };
    f.segments = u8::from(segment(seg::FS)) | u8::from(segment(seg::GS)) << 1;
    let sse = cpu.r.cr0 & (cr0::EM | cr0::TS) == 0
        && cpu.r.cr4 & cr4::OSFXSR != 0
        && cpu.fpu.mxcsr & 0x1f80 == 0x1f80;
    let avx = sse && cpu.r.cr4 & cr4::OSXSAVE != 0 && cpu.r.xcr0 & 6 == 6;
    f.flags = (status as u16 & 0xff) << 8 | 2 << 8 | (status >> 11) as u16 & 1;
    f.vectors = 0;
    f.vectors_allowed = u8::from(sse) | u8::from(avx) << 1;
    f.x87 = 0;
    f.x87_allowed = u8::from(cpu.r.cr0 & (cr0::EM | cr0::TS) == 0 && cpu.fpu.x87_masked());
    f.granted = f.until.saturating_sub(cpu.retired).clamp(1, 1 << 30) as i32;
    f.budget = f.granted;
    f.code_page = cpu.r.rip & !0xfff;
    f.rflags = cpu.r.rflags as u32;
    f.pending = u8::from(cpu.interrupt_waiting());
    f.kernel_gs = cpu.msr.kernel_gs_base;
    let (context, mode) = (cpu.tlb.context, cpu.cache.mode_key);
    f.set = cpu.tlb.set(context, mode) as u64;
    f.window = u8::from(mode == WINDOWED);
    f.gs = if mode == WINDOWED { WINDOW_BASE } else { f.set };
    if context == context::SUPERVISOR || context == context::SUPERVISOR_AC {
        f.gs_open = cpu.tlb.set(context::SUPERVISOR_AC, mode) as u64;
        let smap = cpu.r.cr4 & cr4::SMAP != 0;
        f.gs_closed = if smap { cpu.tlb.set(context::SUPERVISOR, mode) as u64 } else { f.gs_open };
    }
    f.cpl = cpu.cpl;
    f.crossed = 0;
    (f.time_stamps, f.tsc_aux) = cpu.time_stamps();
    f.syscalls = 0;
    if cpu.mode == Mode::Long64 && cpu.quick_syscalls() {
        give_syscalls(f, cpu);
    }
    f.base = [cpu.r.seg[seg::FS].base, cpu.r.seg[seg::GS].base];
}

/// What SYSCALL and SYSRETQ need.
fn give_syscalls(f: &mut Frame, cpu: &mut Cpu) {
    let user_mode = if cpu.window_is_here() { WINDOWED } else { LONG };
    let mode = LONG;
    let kept = !cpu.msr.fmask;
    f.syscalls = 1;
    f.lstar = cpu.msr.lstar;
    f.syscall_flags = (kept & !rflags::STATUS) as u32 | 2;
    let overflow = if kept & rflags::OF != 0 { 0xff } else { 0 };
    f.syscall_status = ((kept & rflags::STATUS) as u16 & 0xff) << 8 | 2 << 8 | overflow;
    if f.cpl == 3 {
        f.gs_user = if cpu.tlb.context == context::USER { f.gs } else { 0 };
        f.window_user = f.window;
        f.gs_open = cpu.tlb.set(context::SUPERVISOR_AC, mode) as u64;
        let smap = cpu.r.cr4 & cr4::SMAP != 0;
        f.gs_closed = if smap { cpu.tlb.set(context::SUPERVISOR, mode) as u64 } else { f.gs_open };
    } else {
        f.gs_user = cpu.tlb.set_of_mode(context::USER, user_mode).map_or(0, |set| set as u64);
        f.window_user = u8::from(user_mode == WINDOWED && f.gs_user != 0);
        if f.window_user != 0 {
            f.set = f.gs_user;
            f.gs_user = WINDOW_BASE;
        }
    }
}

/// Tells a vCPU that SYSCALL or SYSRETQ changed the privilege level.
fn take_privilege(f: &mut Frame, cpu: &mut Cpu) {
    cpu.r.rflags = u64::from(f.rflags);
    if std::mem::take(&mut f.crossed) == 1 {
        cpu.crossed_by_syscall();
    } else {
        cpu.crossed_by_sysret();
    }
}

/// Gives a vCPU its state back from generated code, but for the registers.
fn take_state(f: &mut Frame, cpu: &mut Cpu) {
    let status = f.flags;
    cpu.r.flags = Flags::from_rflags(u64::from(status >> 8) | u64::from(status & 1) << 11);
    if f.crossed != 0 {
        take_privilege(f, cpu);
    }
    let kept = rflags::IF | rflags::DF | rflags::AC;
    let changed = (cpu.r.rflags ^ u64::from(f.rflags)) & kept;
    cpu.r.rflags ^= changed;
    cpu.r.seg[seg::GS].base = f.base[1];
    cpu.msr.kernel_gs_base = f.kernel_gs;
    if changed & rflags::AC != 0 {
        cpu.tlb_context_changed();
    }
    let ran = (i64::from(f.granted) - i64::from(f.budget) + i64::from(f.adjust)).max(0) as u64;
    f.granted = f.budget;
    f.ran += ran;
    cpu.retired += ran;
    if ran > 0 {
        cpu.shadow = 0;
    }
    cpu.r.rip =
        if matches!(f.kind, exit::LOOKUP | exit::EXIT) { f.rip } else { f.code_page + u64::from(f.offset) };
    if cpu.mode != Mode::Long64 {
        cpu.r.rip &= 0xffff_ffff;
    }
}

// SAFETY: the block pointers belong to the vCPU that owns this object; they go where it goes.
unsafe impl Send for Translator {}

impl Translator {
    /// A translator without code. The error says what the host lacks.
    pub fn new(switches: Switches) -> Result<Translator, String> {
        available()?;
        let avx = std::arch::is_x86_feature_detected!("avx") && std::arch::is_x86_feature_detected!("avx2");
        let mut arena = Arena::new(CAPACITY)?;
        let mut a = Assembler::new(64);
        let routines = frame::routines(&mut a, avx, Calls { refill, callout, time_stamp, missed });
        arena.push(&[0xcc; 64], &[]);
        arena.push(&a.code, &[]);
        let floor = arena.position();
        let mut switches = switches;
        switches.windows &= quick_pext();
        let tables = if switches.windows { Stack::with_tables().ok() } else { None };
        switches.windows = tables.is_some();
        let stack = tables.map_or_else(Stack::new, Ok)?;
        let x87 = switches.x87 && std::arch::is_x86_feature_detected!("xsave");
        let abilities = Abilities {
            avx,
            vectors: switches.vectors,
            x87,
            interrupt_flag: switches.interrupt_flag,
            strings: switches.strings,
            syscalls: switches.syscalls,
            time_stamps: switches.time_stamps,
        };
        Ok(Translator {
            arena,
            stack,
            routines,
            floor,
            switches,
            abilities,
            info: RefCell::new(InstructionInfoFactory::new()),
            links: Vec::new(),
            blocks: Vec::new(),
            pending: None,
            lockstep: false,
            hot: HOT,
            interpret_next: false,
            incoming: HashMap::new(),
            refuse: HashMap::new(),
            longer: HashMap::new(),
            sites: Box::default(),
            places: HashMap::new(),
            candidate: Candidate::default(),
            statistics: Statistics::default(),
        })
    }

    /// Translates a block when it is offered for the `hot`th time.
    pub fn set_hot(&mut self, hot: u32) {
        self.hot = hot;
    }

    /// Gives user code windows after so many instructions.
    pub fn set_patience(&mut self, instructions: u64) {
        self.candidate.instead = instructions;
    }

    /// Compares every block with the interpreter from now on.
    pub fn set_lockstep(&mut self) {
        self.lockstep = true;
        self.hot = 1;
        self.switches.chain = false;
        self.switches.long_blocks = false;
        self.switches.callouts = false;
        self.abilities.syscalls = false;
        // One iteration of the interpreter's is none of the translator's, which has no budget left.
        self.abilities.strings = false;
        self.abilities.time_stamps = false;
        self.switches.jump_lookup = false;
        self.switches.windows = false;
    }

    fn forget_all(&mut self) {
        self.arena.truncate(self.floor);
        self.links.clear();
        self.blocks.clear();
        self.refuse.clear();
        self.incoming.clear();
        self.longer.clear();
        self.sites.list.clear();
        self.places.clear();
        self.pending = None;
        self.statistics.flushes += 1;
    }

    /// Translates a block, or marks it as one that is not.
    fn translate(&mut self, cpu: &mut Cpu, b: &mut Block, groups: bool) {
        if self.arena.room() < RESERVE {
            cpu.cache.forget_native();
            cpu.tlb.forget_jumps();
            self.forget_all();
        }
        b.native = [NEVER; 2];
        let entry = cpu.mem.entry(b.gpa >> 12);
        let start = (b.gpa & 0xfff) as usize;
        let len = usize::from(b.len);
        let crosses = b.second_page != NO_PAGE;
        let second = if crosses { cpu.mem.entry(b.second_page >> 12) } else { entry };
        let room = len.min(0x1000 - start);
        if crosses && !(self.switches.page_crossing && self.switches.jump_lookup)
            || entry & second & P2M_PRESENT == 0
            || (entry | second) & P2M_FOREIGN != 0
            || room < len && !crosses
        {
            self.statistics.untranslatable_blocks += 1;
            return;
        }
        let mut bytes = vec![0u8; len];
        let from = ((entry & !P2M_FLAGS) as usize + start) as *const u8;
        // SAFETY: the frame is mapped RAM and the range inside it.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), room) };
        if crosses {
            let from = (second & !P2M_FLAGS) as *const u8;
            // SAFETY: as above; what is left is less than an instruction.
            unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(room), len - room) };
        }
        let start = start as u16;
        let info = self.info.get_mut();
        let mut plan = emit::plan(&bytes, start, b.count, cpu.mode, self.abilities, info);
        if let (Some(guests), false) = (&mut plan, crosses) {
            self.lengthen(cpu, b, guests);
        }
        let windowed = cpu.cache.mode_key == WINDOWED;
        if let (Some(guests), true) = (&mut plan, windowed) {
            let page = b.gpa & !0xfff;
            let places = &mut self.places;
            let mut choice = |offset: u16, stack: bool, part: Part| {
                let key = (page | u64::from(offset)) << 1 | u64::from(stack);
                places.entry(key).or_insert((Some(part), 0)).0
            };
            let (registers, fs) = (&cpu.r.gpr[..16], cpu.r.seg[seg::FS].base);
            emit::Outlook { registers, rip: cpu.r.rip, fs, choice: &mut choice }.plan(guests);
        }
        let translated = plan.as_ref().and_then(|guests| self.emitter(guests, start, cpu, groups).run().ok());
        if translated.is_none() {
            self.statistics.untranslatable_blocks += 1;
        }
        let translated = match translated {
            Some(translated) => translated,
            None if self.switches.callouts && !crosses => {
                self.emitter(&[], start, cpu, groups).callout(b as *const Block as u64)
            }
            None => return,
        };
        self.arena.push(&translated.often, &translated.rarely);
        self.links.extend(translated.links);
        self.sites.list.extend(translated.sites);
        self.blocks.push((b, 0));
        b.native = translated.entry.map(|at| at as u32);
        self.refuse.insert(b.native[0], translated.refuse.map(|at| at as u32));
        self.statistics.translated_blocks += 1;
        self.statistics.translated_instructions += plan.map_or(0, |guests| guests.len() as u64);
    }

    /// Goes on with the blocks after `b`, of which the plan is, where branches are not taken.
    fn lengthen(&mut self, cpu: &mut Cpu, b: &mut Block, guests: &mut Vec<Guest>) {
        let owner: *mut Block = b;
        let mut parts = vec![owner];
        while self.switches.long_blocks && parts.len() < LONG_PARTS {
            let Some(offset) = guests.last().and_then(Self::goes_on) else { break };
            let Some(next) = self.block_after(cpu, b.gpa & !0xfff | u64::from(offset)) else { break };
            // SAFETY: blocks live until the next flush.
            let n = unsafe { &*next };
            let seen = n.offered > 0 || n.native[0] > NEVER || self.hot == 1;
            let room = usize::from(n.len) <= 0x1000 - usize::from(offset);
            if !seen || n.second_page != NO_PAGE || !room || parts.contains(&next) {
                break;
            }
            let mut bytes = vec![0u8; usize::from(n.len)];
            if cpu.mem.read(n.gpa, &mut bytes).is_err() {
                break;
            }
            let info = self.info.get_mut();
            let Some(more) = emit::plan(&bytes, offset, n.count, cpu.mode, self.abilities, info) else {
                break;
            };
            // Looking at vector registers first must not become dearer, and x87 pointers are a block's last.
            let vectors = |guests: &[Guest]| guests.iter().map(|g| g.vectors).max();
            let x87 = more.iter().chain(guests.iter()).any(|g| g.x87);
            if x87 || vectors(&more) > vectors(guests) || guests.len() + more.len() > LONG_COUNT {
                break;
            }
            guests.extend(more);
            parts.push(next);
            self.longer.entry(next).or_default().push(owner);
        }
    }

    /// Where in the page a block goes on after its last instruction, if the code after it may be its own.
    fn goes_on(last: &Guest) -> Option<u16> {
        use analysis::Kind;
        let next = match last.kind {
            Kind::Jump => last.i.near_branch_target(),
            Kind::CountBranch
            | Kind::Call
            | Kind::JumpIndirect
            | Kind::CallIndirect
            | Kind::Return
            | Kind::Syscall
            | Kind::Sysret => return None,
            _ => last.i.next_ip(),
        };
        u16::try_from(next).ok().filter(|&next| next < 0x1000)
    }

    /// The block at a guest-physical address.
    fn block_after(&self, cpu: &mut Cpu, gpa: u64) -> Option<*mut Block> {
        let found = cpu.cache.block_at(gpa);
        if found.is_none() && self.hot == 1 && cpu.mode == Mode::Long64 && gpa & 0xfff < 0xf00 {
            // For tests of code that runs once; the page is that of a block that runs.
            return cpu.decode_block(cpu.r.rip, gpa, false).ok();
        }
        found
    }

    /// An access was not where it was thought to be: the next time it is looked for where it was, or looked up.
    fn was_elsewhere(&mut self, cpu: &mut Cpu, number: u32, strayed: u64) {
        let Some(&(block, _)) = self.blocks.get(number as usize) else { return };
        // SAFETY: blocks live until the next flush, which empties the list.
        let gpa = unsafe { (*block).gpa } & !0xfff | cpu.r.rip & 0xfff;
        let there = Part::of(strayed & !3).map(|_| Part::Either);
        let (part, changes) = self.places.entry(gpa << 1 | strayed & 1).or_insert((None, 0));
        *part = there.filter(|_| *changes == 0);
        *changes = changes.saturating_add(1);
        self.statistics.strayed += 1;
        self.translate_again(cpu, number, true);
    }

    /// A lookup for several instructions failed: if that goes on, each gets one of its own.
    fn failed_wide(&mut self, cpu: &mut Cpu, number: u32) {
        let Some((_, count)) = self.blocks.get_mut(number as usize) else { return };
        *count += 1;
        if *count == 8 {
            self.translate_again(cpu, number, false);
            self.statistics.narrowed_blocks += 1;
        }
    }

    fn translate_again(&mut self, cpu: &mut Cpu, number: u32, groups: bool) {
        let Some((block, _)) = self.blocks.get_mut(number as usize) else { return };
        // SAFETY: blocks live until the next flush, which empties the list.
        let b = unsafe { &mut **block };
        let old = b.native;
        if old[0] <= NEVER {
            return;
        }
        self.translate(cpu, b, groups);
        if b.native[0] <= NEVER || !self.refuse.contains_key(&old[0]) {
            return;
        }
        self.refuse.remove(&old[0]);
        if let Some(links) = self.incoming.remove(&old[0]) {
            self.incoming.insert(b.native[0], links);
        }
        for (old, new) in old.into_iter().zip(b.native) {
            self.arena.patch(old as usize, &[0xe9]);
            self.jump_from(old as usize + 1, new as usize);
        }
    }

    /// Nothing enters a block's code any more; `instead` is put in its place.
    fn turn_away(&mut self, block: &mut Block, instead: u32) {
        let native = std::mem::replace(&mut block.native, [instead; 2]);
        let Some(refuse) = self.refuse.remove(&native[0]) else { return };
        for link in self.incoming.remove(&native[0]).unwrap_or_default() {
            let Link { site, stub, .. } = self.links[link as usize];
            self.jump_from(site as usize, stub as usize);
        }
        for (entry, refuse) in native.into_iter().zip(refuse) {
            self.arena.patch(entry as usize, &[0xe9]);
            self.jump_from(entry as usize + 1, refuse as usize);
        }
    }

    /// Points a link at a lookup of its target.
    fn link_crossing(&mut self, cpu: &Cpu, site: usize, target: u16, live: bool) {
        if self.arena.room() < RESERVE {
            return;
        }
        let origin = self.arena.position();
        let code = self.emitter(&[], 0, cpu, true).crossing(target, live);
        self.arena.push(&code, &[]);
        self.jump_from(site, origin);
    }

    fn emitter<'a>(&self, guests: &'a [Guest], start: u16, cpu: &Cpu, groups: bool) -> Emitter<'a> {
        let switches = emit::Switches {
            lookup: self.switches.jump_lookup,
            recipes: self.switches.flag_recipes,
            groups: self.switches.page_groups && groups,
            spilled: self.switches.spilled_operands,
            overlays: self.switches.flag_overlays,
            stashes: self.switches.flag_stashes,
            dead: self.switches.dead_flags,
            apart: self.switches.cold_apart,
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            windowed: cpu.cache.mode_key == WINDOWED,
        };
        let (first_link, block) = (self.links.len() as u32, self.blocks.len() as u32);
        let (origin, rare) = (self.arena.position(), self.arena.rare_position());
        let place = emit::Place { start, origin, rare, first_link, block };
        Emitter::new(guests, cpu.mode, place, self.routines, switches)
    }

    fn jump_from(&mut self, hole: usize, target: usize) {
        let relative = target as i64 - (hole as i64 + 4);
        self.arena.patch(hole, &(relative as i32).to_le_bytes());
    }

    /// This thread may have the signal of faults in windows.
    fn let_fault(&mut self) {
        // SAFETY: it names the calling thread, and touches nothing.
        let thread = unsafe { libc::pthread_self() };
        if self.candidate.thread != thread {
            faults::unblock();
            self.candidate.thread = thread;
        }
    }

    /// After user code ran: whether its address space is to have the windows, or to have them no more.
    fn consider_windows(&mut self, cpu: &mut Cpu, kind: u32, ran: u64) {
        let table = cpu.r.cr3 & !0xfff;
        let c = &mut self.candidate;
        if c.hopeless || cpu.mode != Mode::Long64 || !cpu.windows_are_possible() {
            return;
        }
        if cpu.windowed() {
            if cpu.windows_are_refused() {
                c.hopeless = true;
                cpu.revoke_windows();
            } else if !cpu.windows_are_worth(ran) && c.instead == 0 {
                let patience = c.patience.entry(table).or_insert(PATIENCE);
                *patience = (*patience * 8).clamp(8 * PATIENCE, MOST_PATIENCE);
                c.instructions.clear();
                cpu.revoke_windows();
            }
            c.owner = (c.owner + 2 * ran).min(2 * PATIENCE);
            self.statistics.windows = cpu.window_statistics().into();
            return;
        }
        if c.patience.len().max(c.instructions.len()) > 64 {
            c.patience.clear();
            c.instructions.clear();
        }
        let instructions = c.instructions.entry(table).or_insert(0);
        *instructions += ran;
        c.owner = c.owner.saturating_sub(ran);
        let owned = cpu.windows_are_owned();
        let least = if owned { PATIENCE } else { 0 };
        let patience = match c.instead {
            0 => c.patience.get(&table).copied().unwrap_or(PATIENCE).max(least),
            after => after,
        };
        if kind != exit::NEXT && c.instead == 0
            || *instructions < patience
            || owned && c.owner > 0 && c.instead == 0
            || cpu.tlb.context != context::USER
        {
            return;
        }
        c.owner = 0;
        c.instructions.clear();
        c.patience.entry(table).or_insert(LITTLE_PATIENCE);
        self.sites.arena = (self.arena.address(0), CAPACITY as u64);
        let granted = cpu.grant_windows().and_then(|()| faults::claim(&self.sites));
        match granted {
            Ok(()) => self.statistics.granted += 1,
            Err(_) => {
                cpu.revoke_windows();
                self.candidate.hopeless = true;
            }
        }
    }

    /// Runs translated code until it ends.
    fn enter(&mut self, cpu: &mut Cpu, code: u64, until: u64) -> Ran {
        let frame = self.stack.frame();
        // SAFETY: the frame is ours, zero or as left by the last run; generated code is not running.
        let f: &mut Frame = unsafe { &mut *frame };
        f.until = until;
        f.ran = 0;
        f.called = 0;
        give_state(f, cpu);
        f.gpr = cpu.r.gpr.as_mut_ptr();
        f.fpu = &mut cpu.fpu;
        f.cpu = cpu;
        f.code = code;
        f.window_mask = u64::MAX << frame::WINDOW_SHIFT;
        f.either_mask = DISTANCE - 1;
        if f.window | f.window_user != 0 {
            self.let_fault();
        }
        // SAFETY: the address is that of the routine, which has this signature.
        let run: unsafe extern "sysv64" fn(*mut Frame) =
            unsafe { std::mem::transmute(self.arena.address(self.routines.enter)) };
        // SAFETY: the frame is complete, and its code is a translation for the vCPU's present mode, valid as
        // long as its block is. Generated code touches the frame, the registers and vector registers of the
        // vCPU, its TLB and guest RAM that the TLB gives; it keeps the callee-saved registers and MXCSR. GS is
        // not used by anything else in this process.
        unsafe { run(frame) };
        // SAFETY: as above.
        let f: &mut Frame = unsafe { &mut *frame };
        take_state(f, cpu);
        self.statistics.native_instructions += f.ran;
        self.statistics.called_blocks += f.called;
        self.statistics.exits[f.kind as usize & 7] += 1;
        let (kind, link, strayed) = (f.kind, f.link, f.strayed);
        if self.switches.windows && cpu.cpl == 3 {
            let ran = f.ran;
            self.consider_windows(cpu, kind, ran);
        }
        match kind {
            exit::SINGLE => Ran::Single,
            exit::WINDOW => {
                if strayed != 0 {
                    self.was_elsewhere(cpu, link, strayed);
                }
                Ran::Single
            }
            exit::EXIT => Ran::Exit,
            exit::WIDE => {
                self.failed_wide(cpu, link);
                Ran::Single
            }
            exit::BLOCK => {
                self.interpret_next = true;
                Ran::Again
            }
            exit::CHAIN => {
                self.pending = Some((link, cpu.r.rip, cpu.cache.exec_key));
                Ran::Again
            }
            _ => Ran::Again,
        }
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        faults::release(&self.sites);
    }
}

impl Accelerator for Translator {
    fn supports(&self, mode: Mode, i: &Instruction) -> bool {
        analysis::guest(i, mode, self.abilities, &mut self.info.borrow_mut()).is_some()
    }

    unsafe fn run(&mut self, cpu: &mut Cpu, block: *mut Block, until: u64) -> Ran {
        // SAFETY: by the caller's contract the block is live; nothing else refers to it now.
        let b = unsafe { &mut *block };
        let pending = self.pending.take();
        if std::mem::take(&mut self.interpret_next) {
            self.statistics.interpreted_blocks += 1;
            return Ran::Block;
        }
        if b.native[0] == 0 {
            b.offered += 1;
            if b.offered >= self.hot {
                self.translate(cpu, b, true);
            }
        }
        if b.native[0] <= NEVER {
            self.statistics.interpreted_blocks += 1;
            return Ran::Block;
        }
        if let Some((link, rip, key)) = pending {
            let here = rip == cpu.r.rip && key == cpu.cache.exec_key;
            if let Some(&Link { site, target, live, .. }) = self.links.get(link as usize) {
                if here && self.switches.chain && b.second_page != NO_PAGE {
                    self.link_crossing(cpu, site as usize, target, live);
                } else if here && self.switches.chain && u64::from(target) == b.gpa & 0xfff {
                    self.jump_from(site as usize, b.native[usize::from(!live)] as usize);
                    self.incoming.entry(b.native[0]).or_default().push(link);
                    self.statistics.chained += 1;
                }
            }
        }
        let code = self.arena.address(b.native[1] as usize);
        cpu.enter_jump(cpu.r.rip, b, code);
        self.statistics.entries += 1;
        if self.lockstep {
            return self.enter_compared(cpu, block, code);
        }
        self.enter(cpu, code, until)
    }

    fn drop_block(&mut self, block: &mut Block) {
        self.turn_away(block, NEVER);
        for owner in self.longer.remove(&(block as *mut Block)).unwrap_or_default() {
            // SAFETY: blocks live until the next flush, which empties the map; `block` is none of them.
            let owner = unsafe { &mut *owner };
            if owner.native[0] > NEVER {
                self.turn_away(owner, 0);
            }
        }
    }

    fn flush(&mut self) {
        self.forget_all();
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let s = &self.statistics;
        vec![
            ("translated_blocks", s.translated_blocks),
            ("translated_instructions", s.translated_instructions),
            ("untranslatable_blocks", s.untranslatable_blocks),
            ("native_instructions", s.native_instructions),
            ("native_entries", s.entries),
            ("interpreted_blocks", s.interpreted_blocks),
            ("native_exits_single", s.exits[exit::SINGLE as usize] + s.exits[exit::WIDE as usize]),
            ("native_exits_window", s.exits[exit::WINDOW as usize]),
            ("native_exits_block", s.exits[exit::BLOCK as usize]),
            ("native_exits_chain", s.exits[exit::CHAIN as usize]),
            ("native_exits_budget", s.exits[exit::NEXT as usize]),
            ("native_exits_lookup", s.exits[exit::LOOKUP as usize]),
            ("chained_jumps", s.chained),
            ("narrowed_blocks", s.narrowed_blocks),
            ("called_blocks", s.called_blocks),
            ("windows_granted", s.granted),
            ("window_pages", s.windows[0]),
            ("windows_lost", s.windows[1]),
            ("window_accesses_elsewhere", s.strayed),
            ("code_flushes", s.flushes),
            ("code_bytes", self.arena.used() as u64),
        ]
    }
}

impl Translator {
    /// The status flags that the manuals define after a block.
    fn defined_flags(&self, cpu: &Cpu, b: &Block) -> u64 {
        use iced_x86::RflagsBits as Bits;
        let mut bytes = vec![0u8; usize::from(b.len)];
        let _ = cpu.mem.read(b.gpa, &mut bytes);
        let bitness = if cpu.mode == Mode::Long64 { 64 } else { 32 };
        let mut undefined = 0;
        for i in iced_x86::Decoder::new(bitness, &bytes, 0) {
            undefined = undefined & !i.rflags_modified() | i.rflags_undefined();
        }
        let names = [
            (Bits::CF, rflags::CF),
            (Bits::PF, rflags::PF),
            (Bits::AF, rflags::AF),
            (Bits::ZF, rflags::ZF),
            (Bits::SF, rflags::SF),
            (Bits::OF, rflags::OF),
        ];
        names.iter().filter(|(bit, _)| undefined & bit == 0).map(|(_, flag)| flag).sum()
    }

    /// Runs one block translated and interpreted; a difference is a failure of the engine.
    fn enter_compared(&mut self, cpu: &mut Cpu, block: *mut Block, code: u64) -> Ran {
        let before = cpu.r.clone();
        // SAFETY: the block is the one that is run.
        let judge = unsafe { cpu.rehearse(block) };
        let retired = cpu.retired;
        let ran = self.enter(cpu, code, cpu.retired + 1);
        let done = cpu.retired - retired;
        let mut differences = Vec::new();
        // SAFETY: as above.
        let defined = self.defined_flags(cpu, unsafe { &*block });
        if done > judge.done {
            differences.push(format!("translated {done} instructions, interpreted {}", judge.done));
        } else if done == judge.done {
            for n in 0..16 {
                let (a, b) = (cpu.r.gpr[n], judge.registers.gpr[n]);
                if a != b {
                    differences.push(format!("register {n}: translated {a:#x}, interpreted {b:#x}"));
                }
            }
            for (what, a, b) in [
                ("rip", cpu.r.rip, judge.registers.rip),
                ("flags", cpu.r.flags.to_rflags() & defined, judge.registers.flags.to_rflags() & defined),
                ("rflags", cpu.r.rflags, judge.registers.rflags),
                ("gs base", cpu.r.seg[seg::GS].base, judge.registers.seg[seg::GS].base),
                ("mxcsr", u64::from(cpu.fpu.mxcsr), u64::from(judge.vectors.mxcsr)),
            ] {
                if a != b {
                    differences.push(format!("{what}: translated {a:#x}, interpreted {b:#x}"));
                }
            }
            for n in 0..16 {
                let (a, b) = (cpu.fpu.ymm[n], judge.vectors.ymm[n]);
                if a != b {
                    differences.push(format!("ymm{n}: translated {a:02x?}, interpreted {b:02x?}"));
                }
            }
            let (a, b) = (&cpu.fpu.fx[..160], &judge.vectors.fx[..160]);
            if a != b {
                differences.push(format!("x87: translated {a:02x?}, interpreted {b:02x?}"));
            }
            for (host, new) in &judge.writes {
                let mut now = vec![0; new.len()];
                // SAFETY: guest RAM that the interpreter has just written.
                unsafe { std::ptr::copy_nonoverlapping(*host as *const u8, now.as_mut_ptr(), now.len()) };
                if now != *new {
                    differences
                        .push(format!("memory at {host:#x}: translated {now:02x?}, interpreted {new:02x?}"));
                }
            }
        }
        if differences.is_empty() {
            return ran;
        }
        // SAFETY: as above.
        let b = unsafe { &*block };
        let mut bytes = vec![0u8; usize::from(b.len)];
        let _ = cpu.mem.read(b.gpa, &mut bytes);
        let mut text = format!(
            "translated code differs at rip {:#x}, gpa {:#x}, code {:02x?}: {}; registers before: {:x?}, flags {:#x}",
            before.rip,
            b.gpa,
            bytes,
            differences.join("; "),
            &before.gpr[..16],
            before.flags.to_rflags(),
        );
        if judge.done != done {
            text.push_str(&format!("; done {done} and {}", judge.done));
        }
        cpu.pending_exits.push(Exit::Failure { reason: text });
        cpu.interrupts_changed();
        ran
    }
}
