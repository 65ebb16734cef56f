//! Where a faster executor of whole blocks plugs in: the run loop offers it each
//! block, and goes on interpreting where it declines.

use crate::code_cache::Block;
use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::Instruction;

/// What an accelerator did with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// It ran this block and perhaps others; `rip` and `retired` are up to date.
    Again,
    /// As [`Ran::Again`], and the instruction at `rip` is to be interpreted.
    Single,
    /// Nothing has happened: the block is to be interpreted.
    Block,
}

/// Executes blocks instead of the interpreter.
///
/// Whatever it cannot do exactly it leaves to the interpreter, at an instruction
/// boundary with exact registers.
pub trait Accelerator: Send {
    /// Whether it executes an instruction of this mode itself. Blocks are cut
    /// where the answer changes.
    fn supports(&self, mode: Mode, i: &Instruction) -> bool;

    /// Offers the block at `rip`; stops soon after `slice_end` instructions have retired.
    ///
    /// # Safety
    /// `block` is a live block of `cpu`, valid for its present mode and address space.
    unsafe fn run(&mut self, cpu: &mut Cpu, block: *mut Block, slice_end: u64) -> Ran;

    /// The bytes of a block have changed: what was made of it must not run again, and
    /// the block, if it is offered once more, is the interpreter's (which finds it stale).
    fn drop_block(&mut self, block: &mut Block);

    /// All blocks are about to be freed.
    fn flush(&mut self);

    /// Counters by name.
    fn statistics(&self) -> Vec<(&'static str, u64)>;
}

impl Cpu {
    /// Whether an accelerator may run code of the present mode: 64-bit mode and flat
    /// 32-bit protected mode, in host time (virtual time counts every instruction).
    #[inline(always)]
    pub(crate) fn accelerates(&self) -> bool {
        self.accelerator.is_some()
            && (self.mode == Mode::Long64 || self.flat)
            && matches!(self.clock, Clock::Host { .. })
    }
}
