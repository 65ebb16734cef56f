//! Where a faster executor of whole blocks plugs in: the run loop offers it each
//! block, and goes on interpreting where it declines.

use crate::code_cache::Block;
use crate::cpu::Cpu;
use crate::run::Ended;
use crate::state::*;
use iced_x86::Instruction;
use std::sync::atomic::Ordering;

/// What an accelerator did with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ran {
    /// It ran this block and perhaps others; `rip` and `retired` are up to date.
    Again,
    /// As [`Ran::Again`], and the instruction at `rip` is to be interpreted.
    Single,
    /// Nothing has happened: the block is to be interpreted.
    Block,
    /// As [`Ran::Again`], and [`Cpu::accelerated_exit`] says why the caller is to be asked.
    Exit,
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
        self.accelerator.is_some() && self.accelerated_mode()
    }

    #[inline(always)]
    fn accelerated_mode(&self) -> bool {
        (self.mode == Mode::Long64 || self.flat) && matches!(self.clock, Clock::Host { .. })
    }

    /// Interprets a block for an accelerator that is running; `retired` and all else is up to date.
    /// False: the accelerator is to end, with [`Ran::Exit`] if there is an exit now.
    ///
    /// # Safety
    /// `block` is a live block for the present state.
    #[inline]
    pub unsafe fn interpret_for_accelerator(&mut self, block: *const Block, until: u64) -> bool {
        // SAFETY: by the caller's contract.
        let b = unsafe { &*block };
        self.rep_budget = until.saturating_sub(self.retired + u64::from(b.count) - 1).max(1);
        if let Ended::Exit(exit) = self.run_block(b) {
            self.accelerated_exit = Some(exit);
            return false;
        }
        self.cache.dropped.is_empty()
            && self.settled()
            && self.activity == Activity::Running
            && self.accelerated_mode()
    }

    /// Whether the run loop has nothing to attend to.
    #[inline]
    fn settled(&mut self) -> bool {
        let requests = self.mailbox.requests.load(Ordering::Relaxed);
        if requests == 0 {
            return true;
        }
        let attend = requests != request::LOCAL
            || self.shadow != 0
            || self.nmi_pending
            || !self.pending_exits.is_empty()
            || self.mem.stale_code_pending()
            || self.needs_stepping()
            || self.r.rflags & rflags::IF != 0 && self.interrupt_waiting();
        if !attend {
            self.mailbox.requests.fetch_and(!request::LOCAL, Ordering::AcqRel);
        }
        !attend
    }
}
