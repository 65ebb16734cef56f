//! The run loop: blocks, requests, interrupts, time, exits.

use crate::accelerate::Ran;
use crate::code_cache::Block;
use crate::cpu::Cpu;
use crate::events::{Event, EventKind};
use crate::state::*;
use std::sync::atomic::Ordering;

/// Instructions between two looks at the clock, interpreted, and under an accelerator: some tens of microseconds. (At
/// 20,000 a fast loop spent a twelfth of its time on them.)
const SLICE: u64 = 20_000;
const FAST_SLICE: u64 = 100_000;

/// Instructions by which an accelerator may run past the end of its slice: more than a page holds.
const OVERSHOOT: u64 = 8192;

/// How a block ended.
pub(crate) enum Ended {
    /// Its last operation set `rip`.
    Complete,
    /// An exit for the caller.
    Exit(Exit),
    /// Look for the next block (exception delivered, stale code, …).
    Again,
}

impl Cpu {
    /// Runs the guest until an exit. `deadline_ns`: machine time, `limit`: retired
    /// instructions (total), at which to return [`Exit::Interrupted`].
    pub fn run(&mut self, deadline_ns: Option<u64>, limit: Option<u64>) -> Exit {
        let mut exit = self.run_inner(deadline_ns.unwrap_or(u64::MAX), limit.unwrap_or(u64::MAX));
        if self.audit.is_some() {
            self.audit_now();
            let failure = self.pending_exits.iter().position(|e| matches!(e, Exit::Failure { .. }));
            exit = failure.map_or(exit, |n| self.pending_exits.remove(n));
        }
        self.mailbox.retired.store(self.retired, Ordering::Relaxed);
        exit
    }

    fn run_inner(&mut self, deadline_ns: u64, limit: u64) -> Exit {
        self.memory_changed();
        // Something may have changed while nobody was looking.
        self.interrupts_changed();
        if self.mmio.active() || self.reply.is_some() {
            if let Some(exit) = self.finish_instruction() {
                return exit;
            }
        }
        if self.pending_event.is_some() {
            // Out of a state record.
            if let Err(exit) = self.deliver_pending_event() {
                return exit;
            }
        }
        let mut slice_end = self.retired;
        loop {
            if self.mailbox.requests.load(Ordering::Relaxed) != 0 {
                if let Some(exit) = self.attend(limit) {
                    return exit;
                }
                // Timers may have been set anew.
                slice_end = self.retired;
                continue;
            }
            if self.retired >= slice_end {
                if let Some(exit) = self.tick(deadline_ns, limit) {
                    return exit;
                }
                slice_end = self.next_slice(deadline_ns, limit);
                if self.mailbox.requests.load(Ordering::Relaxed) != 0 {
                    continue;
                }
            }
            if self.activity != Activity::Running {
                return self.idle_exit();
            }
            if self.stepping {
                if let Some(exit) = self.step(limit) {
                    return exit;
                }
                continue;
            }
            let block = match self.find_block() {
                Ok(block) => block,
                Err(Stop) => match self.stopped(0) {
                    Ended::Exit(exit) => return exit,
                    _ => continue,
                },
            };
            // SAFETY: blocks live until the cache is flushed, which only find_block does.
            let b = unsafe { &*block };
            if self.retired + u64::from(b.count) > slice_end {
                // An exact limit may lie inside the block.
                if self.retired + u64::from(b.count) > limit || matches!(self.clock, Clock::Virtual { .. }) {
                    if let Some(exit) = self.step(limit) {
                        return exit;
                    }
                    continue;
                }
            }
            let until = slice_end.min(limit.saturating_sub(OVERSHOOT));
            if self.accelerates() && self.retired < until {
                if let Some(exit) = self.run_accelerated(block, until, limit) {
                    match exit {
                        Some(exit) => return exit,
                        None => continue,
                    }
                }
            }
            // What a REP at the end of the block may do after the instructions before it.
            self.rep_budget = slice_end.saturating_sub(self.retired + u64::from(b.count) - 1).max(1);
            match self.run_block(b) {
                Ended::Complete | Ended::Again => {}
                Ended::Exit(exit) => return exit,
            }
        }
    }

    /// Offers a block to the accelerator. `None`: it is to be interpreted; else the exit, if any.
    #[inline]
    fn run_accelerated(&mut self, block: *mut Block, until: u64, limit: u64) -> Option<Option<Exit>> {
        let mut accelerator = self.accelerator.take()?;
        self.cache.accelerator_runs = true;
        // SAFETY: the run loop has just found the block for the present state.
        let ran = unsafe { accelerator.run(self, block, until) };
        self.cache.accelerator_runs = false;
        for block in self.cache.dropped.drain(..) {
            // SAFETY: blocks live until the cache is flushed, which only find_block does.
            accelerator.drop_block(unsafe { &mut *block });
        }
        self.accelerator = Some(accelerator);
        match ran {
            Ran::Exit => Some(self.accelerated_exit.take()),
            Ran::Again => Some(None),
            Ran::Single => Some(self.step(limit)),
            Ran::Block => None,
        }
    }

    /// Runs one block.
    #[inline(always)]
    pub(crate) fn run_block(&mut self, b: &Block) -> Ended {
        self.r.gpr[reg::BLOCK_RIP] = self.r.rip;
        // Raw pointers, because an operation may replace the handlers of later ones
        // of its own block (stale code).
        let range = b.ops.as_ptr_range();
        let mut p = range.start;
        while p != range.end {
            // SAFETY: `p` is inside the block's operations, which live until the cache is flushed.
            let op = unsafe { &*p };
            if (op.run)(self, op).is_err() {
                return self.stopped_at(op);
            }
            // SAFETY: at most one past the end.
            p = unsafe { p.add(1) };
        }
        self.retired += u64::from(b.count) + self.rep_iterations;
        self.rep_iterations = 0;
        self.retired_in_block = 0;
        Ended::Complete
    }

    #[cold]
    #[inline(never)]
    fn stopped_at(&mut self, op: &crate::code_cache::Op) -> Ended {
        self.r.rip = self.block_rip(op.offset);
        self.stopped(u64::from(op.index))
    }

    /// An instruction stopped after `before` others of its block; `rip` is its own.
    fn stopped(&mut self, before: u64) -> Ended {
        self.retired += before + self.rep_iterations;
        self.rep_iterations = 0;
        self.retired_in_block = 0;
        match self.stop.take() {
            None | Some(StopReason::Restart) => {
                self.mmio.clear();
                Ended::Again
            }
            Some(StopReason::Stale) => {
                let lin = self.code_linear(self.r.rip);
                self.cache.forget_jump(lin);
                self.cache.forget_linear_page(lin);
                Ended::Again
            }
            Some(StopReason::Exit(exit)) => {
                self.mmio.rewind();
                Ended::Exit(exit)
            }
            Some(StopReason::ExitAfter(exit)) => {
                self.r.rip = self.next_rip;
                self.retired += 1;
                self.mmio.clear();
                self.reply = None;
                self.shadow = 0;
                Ended::Exit(exit)
            }
            Some(StopReason::Fault(fault)) => {
                self.mmio.clear();
                self.reply = None;
                self.shadow = 0;
                self.stats.exceptions += 1;
                self.stats.page_faults += u64::from(fault.vector == vector::PF);
                match self.raise(fault) {
                    Ok(()) => {
                        self.interrupts_changed();
                        Ended::Again
                    }
                    Err(exit) => {
                        if exit == Exit::TripleFault {
                            self.activity = Activity::Shutdown;
                        }
                        Ended::Exit(exit)
                    }
                }
            }
        }
    }

    /// Executes again an instruction whose access the caller has answered; its
    /// next exit, if it asks for more.
    pub fn finish_instruction(&mut self) -> Option<Exit> {
        self.rep_budget = 1;
        self.step(u64::MAX)
    }

    /// Runs exactly one instruction, with debug traps before and after.
    #[inline(never)]
    pub fn step(&mut self, limit: u64) -> Option<Exit> {
        let debugging = self.needs_stepping();
        if debugging {
            if let Some(fault) = self.before_instruction() {
                return match fault {
                    Ok(fault) => {
                        self.stop = Some(StopReason::Fault(fault));
                        match self.stopped(0) {
                            Ended::Exit(exit) => Some(exit),
                            _ => None,
                        }
                    }
                    Err(exit) => Some(exit),
                };
            }
        }
        let tf = self.r.rflags & rflags::TF != 0;
        let had_shadow = self.shadow;
        let block = match self.find_single() {
            Ok(block) => block,
            Err(Stop) => {
                return match self.stopped(0) {
                    Ended::Exit(exit) => Some(exit),
                    _ => None,
                }
            }
        };
        if self.retired >= limit {
            return Some(Exit::Interrupted);
        }
        self.rep_budget = self.rep_budget.min(limit - self.retired).max(1);
        if tf || self.guest_debug.single_step {
            // A trap after each iteration (SDM 3A 17.3.1.4).
            self.rep_budget = 1;
        }
        let retired = self.retired;
        // SAFETY: blocks live until the cache is flushed, which only find_single does.
        let b = unsafe { &*block };
        let ended = self.run_block(b);
        let exit = match ended {
            Ended::Complete => {
                self.mmio.clear();
                self.reply = None;
                if self.shadow == had_shadow {
                    self.shadow = 0;
                    self.interrupts_changed();
                }
                None
            }
            Ended::Again => None,
            Ended::Exit(exit) => Some(exit),
        };
        if debugging && self.retired != retired && exit != Some(Exit::TripleFault) {
            match self.after_instruction(tf) {
                Some(Ok(fault)) => {
                    self.stop = Some(StopReason::Fault(fault));
                    if let Ended::Exit(e) = self.stopped(0) {
                        return Some(exit.unwrap_or(e));
                    }
                }
                Some(Err(e)) => return Some(exit.unwrap_or(e)),
                None => {}
            }
        }
        exit
    }

    /// Lets time pass; the caller's deadline and limit.
    fn tick(&mut self, deadline_ns: u64, limit: u64) -> Option<Exit> {
        // Writes by other threads that nobody announced.
        self.memory_changed();
        self.audit_now();
        let now = self.now_ns();
        if self.lapic.deadline().is_some_and(|d| d <= now) {
            self.lapic.advance(now);
            self.interrupts_changed();
        }
        if self.retired >= limit || now >= deadline_ns {
            return Some(Exit::Interrupted);
        }
        self.mailbox.retired.store(self.retired, Ordering::Relaxed);
        None
    }

    /// Retired instructions at which [`Cpu::tick`] is due.
    fn next_slice(&mut self, deadline_ns: u64, limit: u64) -> u64 {
        let slice = match self.clock {
            Clock::Host { .. } if self.accelerates() => self.retired + FAST_SLICE,
            Clock::Host { .. } => self.retired + SLICE,
            Clock::Virtual { base, num, den } => {
                let next = self.lapic.deadline().unwrap_or(u64::MAX).min(deadline_ns);
                let ns = next.saturating_sub(base);
                // First instruction count whose time is not before `next`.
                let n = (u128::from(ns) * u128::from(den)).div_ceil(u128::from(num));
                u64::try_from(n).unwrap_or(u64::MAX).max(self.retired + 1).min(self.retired + SLICE)
            }
        };
        slice.min(limit).max(self.retired)
    }

    fn idle_exit(&mut self) -> Exit {
        match self.activity {
            Activity::Shutdown => Exit::TripleFault,
            _ => Exit::Halt,
        }
    }

    /// Looks at what other threads asked and at pending interrupts.
    #[inline(never)]
    fn attend(&mut self, limit: u64) -> Option<Exit> {
        let requests = self.mailbox.requests.swap(0, Ordering::AcqRel);
        if requests & request::MEMORY != 0 || self.mem.stale_code_pending() {
            self.memory_changed();
        }
        if requests & request::NMI != 0 {
            self.nmi_pending = true;
        }
        if requests & request::MESSAGE != 0 {
            self.take_messages();
        }
        self.stepping = self.needs_stepping();
        if !self.pending_exits.is_empty() {
            self.interrupts_changed();
            if requests & request::KICK != 0 {
                self.mailbox.requests.fetch_or(request::KICK, Ordering::AcqRel);
            }
            return Some(self.pending_exits.remove(0));
        }
        if requests & request::KICK != 0 {
            // What else was asked is looked at again by the next run.
            return Some(Exit::Interrupted);
        }
        if matches!(self.activity, Activity::Shutdown | Activity::WaitForSipi) {
            return None;
        }
        if self.shadow != 0 && self.activity == Activity::Running {
            // The instruction after STI or MOV SS runs first, also if what it holds back
            // arrives only now: STI, HLT must not lose a wake-up.
            return self.step(limit);
        }
        if self.nmi_pending && !self.nmi_blocked {
            self.nmi_pending = false;
            self.activity = Activity::Running;
            self.interrupts_changed();
            return self.deliver_event(Event { kind: EventKind::Nmi, vector: vector::NMI, error: None });
        }
        if self.r.rflags & rflags::IF != 0 {
            if let Some(vector) = self.injected.take() {
                return self.deliver_interrupt(vector);
            }
            if let Some(vector) = self.pic_vector.take() {
                return self.deliver_interrupt(vector);
            }
            if self.lapic.pending().is_some() {
                if let Some(vector) = self.lapic.acknowledge() {
                    return self.deliver_interrupt(vector);
                }
            }
            if self.mailbox.pic_line.load(Ordering::Acquire) && self.lapic.accepts_pic() {
                return Some(Exit::PicAcknowledge);
            }
            if self.want_window {
                self.want_window = false;
                return Some(Exit::InterruptWindow);
            }
        }
        None
    }

    /// Whether an interrupt is only waiting for IF and shadows.
    pub fn interrupt_waiting(&mut self) -> bool {
        self.injected.is_some()
            || self.pic_vector.is_some()
            || self.want_window
            || self.lapic.pending().is_some()
            || self.mailbox.pic_line.load(Ordering::Acquire) && self.lapic.accepts_pic()
    }

    /// Whether a halted vCPU has a reason to go on.
    pub fn wakes(&mut self) -> bool {
        let requests = self.mailbox.requests.load(Ordering::Acquire);
        if requests & request::NMI != 0 {
            self.nmi_pending = true;
        }
        if requests & request::MESSAGE != 0 {
            self.take_messages();
        }
        let now = self.now_ns();
        if self.lapic.deadline().is_some_and(|d| d <= now) {
            self.lapic.advance(now);
        }
        requests & request::KICK != 0
            || !self.pending_exits.is_empty()
            || self.nmi_pending && !self.nmi_blocked
            || self.activity == Activity::Running
            || self.activity == Activity::Halted
                && self.r.rflags & rflags::IF != 0
                && self.interrupt_waiting()
    }

    fn deliver_interrupt(&mut self, vector: u8) -> Option<Exit> {
        self.activity = Activity::Running;
        self.stats.interrupts += 1;
        self.interrupts_changed();
        self.deliver_event(Event { kind: EventKind::External, vector, error: None })
    }

    fn deliver_event(&mut self, event: Event) -> Option<Exit> {
        let result = match event.kind {
            EventKind::Nmi => self.deliver_nmi(),
            _ => self.deliver_external(event.vector),
        };
        match result {
            Ok(()) => None,
            Err(exit) => {
                if exit == Exit::TripleFault {
                    self.activity = Activity::Shutdown;
                }
                Some(exit)
            }
        }
    }

    /// Takes from the mailbox what has arrived for the vCPU, so that it is part of its state.
    pub fn take_arrived(&mut self) {
        if self.mailbox.requests.fetch_and(!request::NMI, Ordering::AcqRel) & request::NMI != 0 {
            self.nmi_pending = true;
        }
        self.take_messages();
    }

    /// Forgets what has arrived: the state is about to be replaced.
    pub fn forget_arrived(&mut self) {
        self.mailbox.requests.fetch_and(!request::NMI, Ordering::AcqRel);
        self.mailbox.messages.lock().unwrap().clear();
    }

    /// Takes interrupt messages from the mailbox.
    pub fn take_messages(&mut self) {
        let messages = std::mem::take(&mut *self.mailbox.messages.lock().unwrap());
        for m in messages {
            match m.mode {
                0 | 1 => self.lapic.accept(m.vector, m.level),
                4 => self.nmi_pending = true,
                5 => self.init(),
                6 => self.sipi(m.vector),
                7 => self.pic_vector = Some(m.vector),
                _ => {}
            }
        }
        self.interrupts_changed();
    }

    /// Guest memory or its p2m changed from outside.
    pub fn memory_changed(&mut self) {
        let generation = self.mem.generation();
        if generation != self.tlb.generation {
            self.flush_tlb_all();
            self.flush_code();
            self.tlb.generation = generation;
        }
        let dirty = self.mem.dirty_generation();
        if dirty != self.tlb.dirty_generation {
            self.flush_tlb_all();
            self.tlb.dirty_generation = dirty;
        }
        if self.mem.stale_code_pending() {
            self.drop_stale_code();
        }
    }
}
