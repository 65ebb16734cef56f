//! What the binding sees of a vCPU: running it, answering exits, waiting, and
//! a handle for other threads.

use crate::config::Config;
use crate::cpu::{Cpu, Reply};
use crate::state::*;
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

/// A vCPU and its handle.
pub struct Vcpu {
    /// The CPU itself.
    pub cpu: Box<Cpu>,
    last: Option<Pending>,
}

/// The exit that waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pending {
    Input,
    MmioLoad,
    Msr,
    Cpuid,
    Pic,
}

/// What other threads may do to a vCPU, running or not.
#[derive(Clone)]
pub struct Handle(Arc<Mailbox>);

impl Handle {
    fn request(&self, bits: u32) {
        self.0.requests.fetch_or(bits, Ordering::AcqRel);
        // The lock orders this with a waiter that has just looked at the requests.
        drop(self.0.wake_lock.lock().unwrap());
        self.0.wake.notify_all();
    }

    /// Makes `run` and `wait` return soon.
    pub fn kick(&self) {
        self.request(request::KICK);
    }

    /// Delivers an interrupt message to the local APIC.
    pub fn signal(&self, vector: u8, mode: u8, level: bool) {
        self.0.messages.lock().unwrap().push(Message { vector, mode, level });
        self.request(request::MESSAGE);
    }

    /// Signals an NMI.
    pub fn nmi(&self) {
        self.request(request::NMI);
    }

    /// Sets the PIC's INTR output.
    pub fn set_pic_line(&self, asserted: bool) {
        self.0.pic_line.store(asserted, Ordering::Release);
        if asserted {
            self.request(request::PIC);
        }
    }

    /// Instructions retired, as published at the last exit or slice.
    pub fn retired(&self) -> u64 {
        self.0.retired.load(Ordering::Relaxed)
    }
}

impl Vcpu {
    /// A vCPU after power-on.
    pub fn new(mem: SharedMemory, config: Config) -> Vcpu {
        Vcpu { cpu: Cpu::new(mem, config), last: None }
    }

    /// A handle for other threads.
    pub fn handle(&self) -> Handle {
        Handle(self.cpu.mailbox.clone())
    }

    /// Runs until an exit. An exit that was not answered is answered with ones
    /// (input) or #GP (MSRs).
    pub fn run(&mut self, deadline_ns: Option<u64>, limit: Option<u64>) -> Exit {
        match self.last.take() {
            None => {}
            Some(Pending::Input | Pending::MmioLoad | Pending::Cpuid) => {
                self.give(&[]);
            }
            Some(Pending::Msr) => self.cpu.reply = Some(Reply::Fault),
            Some(Pending::Pic) => {}
        }
        let exit = self.cpu.run(deadline_ns, limit);
        self.last = match &exit {
            Exit::PortIo { write: false, .. } => Some(Pending::Input),
            Exit::Mmio { write: false, .. } => Some(Pending::MmioLoad),
            Exit::MsrRead { .. } | Exit::MsrWrite { .. } => Some(Pending::Msr),
            Exit::Cpuid { .. } => Some(Pending::Cpuid),
            Exit::PicAcknowledge => Some(Pending::Pic),
            _ => None,
        };
        exit
    }

    fn give(&mut self, data: &[u8]) {
        if self.cpu.mmio.active() {
            self.cpu.mmio.answer(data);
        } else {
            self.cpu.reply = Some(Reply::Data(data.to_vec()));
        }
    }

    /// Answers input, an MMIO load, an MSR access or CPUID.
    pub fn complete(&mut self, data: &[u8]) -> Result<(), &'static str> {
        match self.last.take() {
            Some(Pending::Input | Pending::MmioLoad | Pending::Cpuid) => self.give(data),
            Some(Pending::Msr) => {
                self.cpu.reply = Some(if data.is_empty() { Reply::Done } else { Reply::Data(data.to_vec()) });
            }
            other => {
                self.last = other;
                return Err("the last exit does not wait for data");
            }
        }
        Ok(())
    }

    /// Answers an MSR exit with #GP.
    pub fn fail(&mut self) -> Result<(), &'static str> {
        match self.last.take() {
            Some(Pending::Msr) => {
                self.cpu.reply = Some(Reply::Fault);
                Ok(())
            }
            other => {
                self.last = other;
                Err("the last exit is not an MSR access")
            }
        }
    }

    /// Answers [`Exit::PicAcknowledge`].
    pub fn set_pic_vector(&mut self, vector: u8) {
        if self.last == Some(Pending::Pic) {
            self.last = None;
        }
        self.cpu.pic_vector = Some(vector);
    }

    /// Completes an instruction whose exits have all been answered, so that the
    /// state is that of an instruction boundary.
    pub fn settle(&mut self) {
        let waiting =
            matches!(self.last, Some(Pending::Input | Pending::MmioLoad | Pending::Msr | Pending::Cpuid));
        if !waiting && (self.cpu.mmio.active() || self.cpu.reply.is_some()) {
            let exit = self.cpu.finish_instruction();
            self.cpu.pending_exits.extend(exit);
        }
    }

    /// Drops the last exit and what was answered to it: the state is about to be replaced.
    pub fn forget_exit(&mut self) {
        self.last = None;
        self.cpu.reply = None;
        self.cpu.mmio.clear();
    }

    /// Sleeps until there is something to run, `kick`, or machine time reaches the
    /// deadline. True if there is something to run.
    pub fn wait(&mut self, deadline_ns: Option<u64>) -> bool {
        let mailbox = self.cpu.mailbox.clone();
        loop {
            if self.cpu.wakes() {
                return true;
            }
            let now = self.cpu.now_ns();
            let timer = if self.cpu.activity == Activity::Halted { self.cpu.lapic.deadline() } else { None };
            let until = match (deadline_ns, timer) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            if deadline_ns.is_some_and(|d| d <= now) {
                return false;
            }
            let guard = mailbox.wake_lock.lock().unwrap();
            let urgent = request::KICK | request::MESSAGE | request::NMI | request::PIC;
            if mailbox.requests.load(Ordering::Acquire) & urgent != 0 {
                drop(guard);
                if self.cpu.wakes() {
                    return true;
                }
                // Something came that does not wake this vCPU (masked): look at it no more.
                mailbox
                    .requests
                    .fetch_and(!(request::MESSAGE | request::NMI | request::PIC), Ordering::AcqRel);
                self.cpu.interrupts_changed();
                continue;
            }
            match until {
                Some(t) if t <= now => {}
                Some(t) => match &mut self.cpu.clock {
                    // Virtual time is not slept away: it moves on at once.
                    Clock::Virtual { base, .. } => *base += t - now,
                    Clock::Host { .. } => {
                        let nap = Duration::from_nanos(t - now);
                        drop(mailbox.wake.wait_timeout(guard, nap).unwrap());
                    }
                },
                None => drop(mailbox.wake.wait(guard).unwrap()),
            }
        }
    }
}
