//! A block run for its effects to be looked at, and then undone: the judge of an
//! accelerator in lockstep.

use crate::code_cache::Block;
use crate::cpu::Cpu;
use crate::state::*;
use nonroot_native::VectorState;

/// What a block did.
pub struct Rehearsal {
    /// Instructions that completed.
    pub done: u64,
    /// All of the block's instructions completed.
    pub complete: bool,
    /// Registers after them.
    pub registers: Registers,
    /// Vector registers after them.
    pub vectors: VectorState,
    /// Host addresses of what was written, and what was.
    pub writes: Vec<(u64, Vec<u8>)>,
}

impl Cpu {
    /// Remembers what is about to be overwritten, if a rehearsal asks for it.
    pub(crate) fn log_write(&mut self, host: u64, len: usize) {
        if let Some(log) = &mut self.write_log {
            let mut old = vec![0; len];
            // SAFETY: the caller is about to write these bytes of guest RAM.
            unsafe { std::ptr::copy_nonoverlapping(host as *const u8, old.as_mut_ptr(), len) };
            log.push((host, old));
        }
    }

    /// Runs a block of plain instructions (which touch registers and memory, no more) and
    /// takes everything back, but for accessed bits and cached translations.
    ///
    /// # Safety
    /// `b` is a live block, valid for the present mode and address space.
    pub unsafe fn rehearse(&mut self, b: *const Block) -> Rehearsal {
        let (registers, vectors) = (self.r.clone(), self.fpu.clone());
        let (next_rip, before) = (self.next_rip, self.retired_in_block);
        let context = self.tlb.context;
        let kernel_gs = self.msr.kernel_gs_base;
        let (shadow, requests) =
            (self.shadow, self.mailbox.requests.load(std::sync::atomic::Ordering::Relaxed));
        self.write_log = Some(Vec::new());
        self.tlb.hide();
        self.r.gpr[reg::BLOCK_RIP] = self.r.rip;
        self.rep_budget = u64::MAX;
        // SAFETY: by the caller's contract.
        let (ops, count) = unsafe { (&(&(*b).ops)[..], u64::from((*b).count)) };
        let mut done = count;
        let mut complete = true;
        // Of the writes those of completed instructions count.
        let mut kept = 0;
        for op in ops {
            let logged = |cpu: &Cpu| cpu.write_log.as_ref().map_or(0, Vec::len);
            kept = logged(self);
            if (op.run)(self, op).is_ok() {
                kept = logged(self);
            } else {
                done = u64::from(op.index);
                complete = false;
                self.r.rip = self.block_rip(op.offset);
                break;
            }
        }
        self.stop = None;
        self.mmio.clear();
        self.rep_iterations = 0;
        self.msr.kernel_gs_base = kernel_gs;
        self.tlb.select(context);
        self.update_exec_key();
        self.shadow = shadow;
        if requests & request::LOCAL == 0 {
            self.mailbox.requests.fetch_and(!request::LOCAL, std::sync::atomic::Ordering::Relaxed);
        }
        let mut log = self.write_log.take().unwrap_or_default();
        let mut writes = Vec::with_capacity(log.len());
        for (host, old) in &log[..kept] {
            let mut new = vec![0; old.len()];
            // SAFETY: guest RAM that this block has written.
            unsafe { std::ptr::copy_nonoverlapping(*host as *const u8, new.as_mut_ptr(), new.len()) };
            writes.push((*host, new));
        }
        while let Some((host, old)) = log.pop() {
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(old.as_ptr(), host as *mut u8, old.len()) };
        }
        let rehearsal = Rehearsal {
            done,
            complete,
            registers: std::mem::replace(&mut self.r, registers),
            vectors: std::mem::replace(&mut self.fpu, vectors),
            writes,
        };
        (self.next_rip, self.retired_in_block) = (next_rip, before);
        rehearsal
    }
}
