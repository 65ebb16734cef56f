//! Decoded code: blocks of operations, how they are found, and how they are
//! dropped when the bytes they came from change.
//!
//! A block is a run of instructions of one page under one decoding mode. It is
//! keyed by guest-physical address and mode, so that address spaces share it.
//! The jump cache finds blocks by linear address without translating.

use crate::cpu::Cpu;
use crate::state::*;
use crate::walk::{Access, Kind};
use iced_x86::Instruction;
use nonroot_memory::{P2M_CODE, P2M_FLAGS, P2M_FOREIGN};
use rustc_hash::FxHashMap;

/// Executes one operation of a block.
pub type Handler = fn(&mut Cpu, &Op) -> X;

/// One operation: an instruction, or two that were fused.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Op {
    /// What it does.
    pub run: Handler,
    /// Displacement of the memory operand (RIP-relative ones are relative to the block).
    pub disp: u64,
    /// Immediate, branch target relative to the block, or pointer to the decoded instruction.
    pub imm: u64,
    /// Offset of this instruction from the block's start.
    pub offset: u16,
    /// Offset of the following instruction.
    pub next: u16,
    /// Number of instructions of the block before this one.
    pub index: u16,
    /// Destination register.
    pub dst: u8,
    /// Source register.
    pub src: u8,
    /// Base register (or [`reg::ZERO`], [`reg::BLOCK_RIP`]).
    pub base: u8,
    /// Index register.
    pub idx: u8,
    /// log2 of the index scale.
    pub scale: u8,
    /// Segment register.
    pub segment: u8,
    /// How the linear address is made, see `fast::address`.
    pub address: u8,
    /// Condition code, or another small parameter.
    pub cc: u8,
    /// [`SETS_RIP`] and the like.
    pub traits: u8,
    /// How this operation may be fused with its neighbour, see `fast::fuse`.
    pub fuse: u8,
    /// Branch target relative to the block's start.
    pub target: i32,
}

/// In [`Op::traits`]: the operation sets `rip`, so that the block needs no end.
pub const SETS_RIP: u8 = 1;

/// A block of decoded instructions.
pub struct Block {
    /// The operations; the last one sets `rip`.
    pub ops: Box<[Op]>,
    /// Instructions that run in the general executor, pointed to by their ops.
    pub instructions: Vec<Box<Instruction>>,
    /// Plans of vector instructions, pointed to by their ops.
    pub plans: Vec<Box<crate::vector::VectorOp>>,
    /// Guest-physical address of the first byte.
    pub gpa: u64,
    /// Bytes of code.
    pub len: u16,
    /// Instructions.
    pub count: u16,
    /// Guest-physical page of the part beyond the page's end (one instruction
    /// that crosses), or `NO_PAGE`.
    pub second_page: u64,
    /// Key it is filed under.
    key: u64,
    /// The accelerator's: how often it was offered the block.
    pub offered: u32,
    /// Its frame knows the accelerator's code for it.
    jumped_to: bool,
    /// The accelerator's: its code for the block, if any.
    pub native: [u32; 2],
}

impl Block {
    /// What it is filed under: guest-physical address, mode.
    pub(crate) fn key(&self) -> u64 {
        self.key
    }
}

/// [`Block::second_page`] of a block inside one page.
pub const NO_PAGE: u64 = u64::MAX;

#[derive(Default)]
struct Frame {
    blocks: Vec<*mut Block>,
    /// Generated code of the accelerator that has been jumped to: key of its block, address.
    jumps: Vec<(u64, u64)>,
    /// A bit for each 64 bytes that hold decoded code.
    granules: u64,
}

#[derive(Clone, Copy)]
struct Jump {
    lin: u64,
    key: u64,
    block: *mut Block,
}

const EMPTY: Jump = Jump { lin: 0, key: 0, block: std::ptr::null_mut() };
const JUMP_GROUPS: usize = 64;
const JUMP_GROUP: usize = 128;
/// [`CodeCache::mode_key`] of 64-bit code that reaches memory through the windows.
pub const WINDOWED: u64 = 5;
/// Key bit of blocks of one instruction.
const SINGLE: u64 = 1 << 4;
/// Operations after which the whole cache is dropped.
const MAX_OPS: usize = 3_000_000;

/// Decoded blocks of one vCPU.
pub struct CodeCache {
    jumps: Box<[Jump]>,
    blocks: FxHashMap<u64, *mut Block>,
    frames: FxHashMap<u64, Frame>,
    /// Every block that was made since the last flush, dropped ones too: one may
    /// be running.
    owned: Vec<*mut Block>,
    ops: usize,
    /// The accelerator is running, and so not to be had.
    pub(crate) accelerator_runs: bool,
    /// Blocks that were dropped meanwhile.
    pub(crate) dropped: Vec<*mut Block>,
    /// Key of the current mode, context and address space for the jump cache.
    pub exec_key: u64,
    /// Linear base of the code segment (0 in 64-bit mode).
    pub cs_base: u64,
    /// Mode bits of the block key.
    pub mode_key: u64,
}

// SAFETY: the raw pointers are blocks that this object owns.
unsafe impl Send for CodeCache {}

impl Default for CodeCache {
    fn default() -> Self {
        CodeCache {
            jumps: vec![EMPTY; JUMP_GROUPS * JUMP_GROUP].into_boxed_slice(),
            blocks: FxHashMap::default(),
            frames: FxHashMap::default(),
            owned: Vec::new(),
            ops: 0,
            accelerator_runs: false,
            dropped: Vec::new(),
            exec_key: 0,
            cs_base: 0,
            mode_key: 0,
        }
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        self.free_all();
    }
}

#[inline(always)]
fn jump_group(lin: u64) -> usize {
    let page = lin >> 12;
    (page ^ page >> 6) as usize & (JUMP_GROUPS - 1)
}

#[inline(always)]
fn jump_index(lin: u64) -> usize {
    jump_group(lin) * JUMP_GROUP + ((lin ^ lin >> 7) as usize & (JUMP_GROUP - 1))
}

/// Runs in place of every operation of a dropped block.
fn op_stale(cpu: &mut Cpu, _: &Op) -> X {
    cpu.stop = Some(StopReason::Stale);
    Err(Stop)
}

impl CodeCache {
    /// Forgets how blocks of one linear page are found.
    pub fn forget_linear_page(&mut self, lin: u64) {
        let group = jump_group(lin) * JUMP_GROUP;
        self.jumps[group..group + JUMP_GROUP].fill(EMPTY);
    }

    /// Forgets how one block is found.
    pub fn forget_jump(&mut self, lin: u64) {
        self.jumps[jump_index(lin)] = EMPTY;
    }

    /// The block of several instructions at a guest-physical address, in the present mode.
    pub fn block_at(&self, gpa: u64) -> Option<*mut Block> {
        self.blocks.get(&(gpa << 5 | self.mode_key)).copied()
    }

    #[inline(always)]
    fn jump(&self, lin: u64) -> Option<*mut Block> {
        let j = &self.jumps[jump_index(lin)];
        (j.lin == lin && j.key == self.exec_key && !j.block.is_null()).then_some(j.block)
    }

    /// Forgets the accelerator's code of every block.
    pub fn forget_native(&mut self) {
        for &block in &self.owned {
            // SAFETY: owned blocks live until free_all; none is running.
            let b = unsafe { &mut *block };
            (b.native, b.jumped_to) = ([0; 2], false);
        }
        self.frames.values_mut().for_each(|frame| frame.jumps.clear());
    }

    fn free_all(&mut self) {
        self.jumps.fill(EMPTY);
        self.blocks.clear();
        for block in self.owned.drain(..) {
            // SAFETY: owned blocks come from Box::into_raw and appear once; none is
            // running (callers are between blocks).
            drop(unsafe { Box::from_raw(block) });
        }
        self.ops = 0;
    }

    /// What the jump cache holds: linear address, key, block.
    pub(crate) fn live_jumps(&self) -> impl Iterator<Item = (u64, u64, &Block)> {
        // SAFETY: blocks live until free_all, which empties the jump cache.
        let live = self.jumps.iter().filter(|j| !j.block.is_null());
        live.map(|j| (j.lin, j.key, unsafe { &*j.block }))
    }

    /// Whether a key is from before asids were given anew.
    pub(crate) fn is_older(&self, key: u64) -> bool {
        key >> 32 != self.exec_key >> 32
    }

    /// All blocks whose bytes have not changed, by each of their frames.
    pub(crate) fn live_blocks(&self) -> impl Iterator<Item = (u64, &Block)> {
        // SAFETY: blocks live until free_all, before which the frames are forgotten.
        self.frames.iter().flat_map(|(&gfn, frame)| frame.blocks.iter().map(move |&b| (gfn, unsafe { &*b })))
    }

    /// A block that is filed by another's key, or that should be gone.
    pub(crate) fn misfiled(&self) -> Option<String> {
        self.blocks.iter().find_map(|(&key, &block)| {
            // SAFETY: as above.
            let b = unsafe { &*block };
            let frame = self.frames.get(&(b.gpa >> 12));
            if b.key != key {
                Some(format!("block {:#x} is filed as {:#x}", b.gpa, key >> 5))
            } else if !frame.is_some_and(|frame| frame.blocks.contains(&block)) {
                Some(format!("block {:#x} is found, but was dropped", b.gpa))
            } else {
                None
            }
        })
    }

    fn drop_block(&mut self, block: *mut Block) {
        // SAFETY: blocks live until free_all.
        let b = unsafe { &mut *block };
        for op in b.ops.iter_mut() {
            op.run = op_stale;
        }
        if self.blocks.get(&b.key) == Some(&block) {
            self.blocks.remove(&b.key);
        }
    }
}

impl Cpu {
    /// The key that blocks are found by, of the present mode, context and address space.
    pub(crate) fn exec_key(&self) -> u64 {
        self.tlb.asid
            | (self.tlb.context as u64) << 12
            | self.mode_key() << 16
            | (self.tlb.rounds << 1 | 1) << 32
    }

    fn mode_key(&self) -> u64 {
        let mode = match self.mode {
            Mode::Real => 0,
            Mode::V86 => 1,
            Mode::Protected16 => 2,
            Mode::Protected32 => 3,
            Mode::Long64 if self.windowed() => WINDOWED,
            Mode::Long64 => 4,
        };
        mode | (self.flat as u64) << 3
    }

    /// Recomputes the keys that blocks are found by.
    pub fn update_exec_key(&mut self) {
        self.cache.mode_key = self.mode_key();
        self.cache.exec_key = self.exec_key();
        self.cache.cs_base = if self.mode == Mode::Long64 { 0 } else { self.r.seg[seg::CS].base };
    }

    /// The block at `rip`; decodes it if need be.
    #[inline(always)]
    pub fn find_block(&mut self) -> X<*mut Block> {
        let lin = self.code_linear(self.r.rip);
        if let Some(block) = self.cache.jump(lin) {
            return Ok(block);
        }
        self.find_block_slow(lin)
    }

    /// Linear address of an instruction pointer.
    #[inline(always)]
    pub fn code_linear(&self, rip: u64) -> u64 {
        if self.mode == Mode::Long64 {
            rip
        } else {
            self.cache.cs_base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    #[inline(never)]
    fn find_block_slow(&mut self, lin: u64) -> X<*mut Block> {
        if self.cache.ops > MAX_OPS {
            self.flush_code();
        }
        let gpa = self.translate_fetch(lin)?;
        let key = gpa << 5 | self.cache.mode_key;
        let found =
            if self.config.optimise.block_cache { self.cache.blocks.get(&key).copied() } else { None };
        let block = match found {
            Some(block) => block,
            None => self.decode_block(lin, gpa, false)?,
        };
        // SAFETY: blocks live until the cache is flushed, which happens only above.
        let b = unsafe { &*block };
        if b.second_page != NO_PAGE {
            let second = self.translate_fetch((lin & !0xfff).wrapping_add(0x1000))?;
            if second != b.second_page {
                self.cache.drop_block(block);
                return self.decode_block(lin, gpa, false);
            }
        } else if self.config.optimise.jump_cache
            && self.config.optimise.block_cache
            && self.mem.entry(gpa >> 12) & P2M_FOREIGN == 0
        {
            let key = self.cache.exec_key;
            self.cache.jumps[jump_index(lin)] = Jump { lin, key, block };
        }
        Ok(block)
    }

    /// A block of exactly one instruction at `rip`.
    pub fn find_single(&mut self) -> X<*mut Block> {
        if self.cache.ops > MAX_OPS {
            self.flush_code();
        }
        let lin = self.code_linear(self.r.rip);
        let gpa = self.translate_fetch(lin)?;
        if self.config.optimise.block_cache {
            let key = gpa << 5 | SINGLE | self.cache.mode_key;
            if let Some(&block) = self.cache.blocks.get(&key) {
                // SAFETY: blocks live until the cache is flushed, which happens only above.
                if unsafe { (*block).second_page } == NO_PAGE {
                    return Ok(block);
                }
                self.cache.drop_block(block);
            }
        }
        self.decode_block(lin, gpa, true)
    }

    /// Translates for instruction fetch through the fetch TLB.
    pub fn translate_fetch(&mut self, lin: u64) -> X<u64> {
        if self.lma() && !Self::canonical(lin) {
            return Err(self.gp(0));
        }
        let i = self.tlb.exec_slot(lin);
        let tag = lin & !0xfff | self.tlb.asid;
        let e = self.tlb.exec[i];
        let same = e.tag == tag || e.global && (e.tag ^ tag) < 0x1000;
        if same && e.context == self.tlb.context as u64 {
            return Ok(e.gpa | lin & 0xfff);
        }
        let t = self.translate(lin, Access { kind: Kind::Execute, system: false })?;
        if self.config.optimise.tlb {
            if t.large {
                self.tlb.note_large(lin);
            }
            self.tlb.exec[i] = crate::tlb::ExecEntry {
                tag,
                context: self.tlb.context as u64,
                gpa: t.gpa & !0xfff,
                global: t.global,
            };
            if self.audit.is_some() {
                self.audit_translated(lin, t.gpa, Kind::Execute);
            }
            if !t.global {
                self.import_jumps(lin, t.gpa);
            }
        }
        Ok(t.gpa)
    }

    /// A page begins to run in this address space: generated code that was jumped to in another
    /// is found here as well.
    fn import_jumps(&mut self, lin: u64, gpa: u64) {
        let Some(frame) = self.cache.frames.get(&(gpa >> 12)) else { return };
        let (page, mode) = (lin & !0xfff, self.cache.mode_key);
        for &(key, code) in &frame.jumps {
            if key & 0x1f == mode {
                self.tlb.enter_jump(page | key >> 5 & 0xfff, code, mode, false);
            }
        }
    }

    /// Enters the generated code of a block where jumps look it up, here and in address spaces to come.
    pub fn enter_jump(&mut self, lin: u64, block: &mut Block, code: u64) {
        let mode = self.cache.mode_key;
        let crosses = block.second_page != NO_PAGE;
        // Whether the page is global is known from its entry for fetches, which may have been lost.
        if self.translate_fetch(lin).is_err() {
            self.stop = None;
            return;
        }
        self.audit_jump(block, code);
        self.tlb.enter_jump(lin, code, mode, crosses);
        if crosses {
            self.tlb.note_jump_page(lin.wrapping_add(0x1000));
        } else if !std::mem::replace(&mut block.jumped_to, true) {
            if let Some(frame) = self.cache.frames.get_mut(&(block.gpa >> 12)) {
                frame.jumps.push((block.key, code));
            }
        }
    }

    /// Files a decoded block. `cached`: find it again by its key.
    pub fn add_block(&mut self, mut block: Box<Block>, single: bool, cached: bool) -> *mut Block {
        let gpa = block.gpa;
        block.key = gpa << 5 | if single { SINGLE } else { 0 } | self.cache.mode_key;
        self.stats.blocks_decoded += 1;
        self.stats.instructions_decoded += u64::from(block.count);
        self.cache.ops += block.ops.len() + 8;
        let first = (gpa & 0xfff, u64::from(block.len).min(0x1000 - (gpa & 0xfff)));
        let second = block.second_page;
        let rest = u64::from(block.len) - first.1;
        let key = block.key;
        let raw = Box::into_raw(block);
        self.cache.owned.push(raw);
        if cached {
            self.cache.blocks.insert(key, raw);
        }
        // Uncached blocks are registered as well: they may overwrite themselves.
        self.audit_decoded(raw);
        self.register_code(gpa >> 12, first.0, first.1, raw);
        if second != NO_PAGE {
            self.register_code(second >> 12, 0, rest, raw);
        }
        raw
    }

    fn register_code(&mut self, gfn: u64, offset: u64, len: u64, block: *mut Block) {
        let before = self.mem.set_flags(gfn, P2M_CODE);
        if before & P2M_CODE == 0 {
            self.tlb.forget_writable(before & !P2M_FLAGS);
        }
        let frame = self.cache.frames.entry(gfn).or_default();
        frame.blocks.push(block);
        frame.granules |= granules(offset, len);
    }

    /// Guest memory that holds decoded code is about to be written: drops the
    /// blocks whose bytes change.
    #[cold]
    pub fn code_written(&mut self, gpa: u64, len: usize) {
        let gfn = gpa >> 12;
        let (start, end) = (gpa & 0xfff, (gpa & 0xfff) + len as u64);
        let Some(frame) = self.cache.frames.get_mut(&gfn) else {
            self.mem.clear_flags(gfn, P2M_CODE);
            return;
        };
        if frame.granules & granules(start, len as u64) == 0 {
            return;
        }
        let mut dropped = Vec::new();
        let mut kept = 0u64;
        frame.blocks.retain(|&p| {
            // SAFETY: blocks live until the cache is flushed.
            let b = unsafe { &*p };
            let (s, e) = if b.gpa >> 12 == gfn {
                (b.gpa & 0xfff, (b.gpa & 0xfff) + u64::from(b.len))
            } else {
                (0, u64::from(b.len) - (0x1000 - (b.gpa & 0xfff)))
            };
            if s < end && start < e {
                dropped.push(p);
                false
            } else {
                kept |= granules(s, (e - s).min(0x1000 - s));
                true
            }
        });
        frame.granules = kept;
        // SAFETY: as above.
        frame.jumps.retain(|&(key, _)| !dropped.iter().any(|&b| unsafe { (*b).key } == key));
        if frame.blocks.is_empty() {
            self.cache.frames.remove(&gfn);
            self.mem.clear_flags(gfn, P2M_CODE);
        }
        self.stats.blocks_invalidated += dropped.len() as u64;
        for p in dropped {
            match &mut self.accelerator {
                // SAFETY: blocks live until the cache is flushed.
                Some(accelerator) => accelerator.drop_block(unsafe { &mut *p }),
                // It is told when it ends.
                None if self.cache.accelerator_runs => self.cache.dropped.push(p),
                None => {}
            }
            self.cache.drop_block(p);
        }
    }

    /// Drops everything decoded; only between blocks.
    pub fn flush_code(&mut self) {
        for (&gfn, _) in self.cache.frames.iter() {
            self.mem.clear_flags(gfn, P2M_CODE);
        }
        self.cache.frames.clear();
        self.tlb.forget_jumps();
        if let Some(accelerator) = &mut self.accelerator {
            accelerator.flush();
        }
        self.cache.free_all();
        self.audit_freed();
    }

    /// Drops the decoded code of frames that were written from outside.
    pub fn drop_stale_code(&mut self) {
        for gfn in self.mem.take_stale_code() {
            self.code_written(gfn << 12, 0x1000);
        }
    }

    /// Something about pending interrupts, IF, TPR or shadows changed: look again
    /// before the next block.
    #[inline]
    pub fn interrupts_changed(&mut self) {
        self.mailbox.requests.fetch_or(request::LOCAL, std::sync::atomic::Ordering::Relaxed);
    }
}

fn granules(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let first = offset >> 6;
    let last = (offset + len - 1).min(0xfff) >> 6;
    (u64::MAX >> (63 - (last - first))) << first
}

/// A block under construction.
pub fn new_block(gpa: u64) -> Block {
    Block {
        ops: Box::new([]),
        instructions: Vec::new(),
        plans: Vec::new(),
        gpa,
        len: 0,
        count: 0,
        second_page: NO_PAGE,
        key: 0,
        offered: 0,
        jumped_to: false,
        native: [0; 2],
    }
}
