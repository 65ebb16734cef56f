//! Debug registers of the guest (SDM 3B, 18.2), and breakpoints and single step
//! for the caller.

use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic};

/// DR6 bits.
pub mod dr6 {
    #![allow(missing_docs)]
    pub const BREAKPOINTS: u64 = 0xf;
    pub const BD: u64 = 1 << 13;
    pub const BS: u64 = 1 << 14;
    pub const BT: u64 = 1 << 15;
    /// Bits that read as one.
    pub const FIXED: u64 = 0xffff_0ff0;
}

/// DR7 bits.
pub mod dr7 {
    #![allow(missing_docs)]
    pub const ENABLE: u64 = 0xff;
    pub const FIXED: u64 = 1 << 10;
    pub const GD: u64 = 1 << 13;
    /// Reserved, and RTM and the like, which this CPU does not have.
    pub const RESERVED: u64 = 0xd800;
}

/// Types of breakpoints (R/W fields of DR7).
const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const READ_WRITE: u64 = 3;

/// What the caller of `run` wants to stop at; invisible to the guest.
#[derive(Clone, Debug, Default)]
pub struct GuestDebug {
    /// Stop after every instruction.
    pub single_step: bool,
    /// (linear address, length, type: 0 execute, 1 write, 3 read or write).
    pub breakpoints: Vec<(u64, u8, u8)>,
    /// Number (as DR6 bits, of the first four) of the caller's data breakpoints that
    /// the current instruction has hit.
    pub hit: u64,
    /// The caller has seen the code breakpoint at this address: go on.
    pub passed: Option<u64>,
    /// The instruction that just ran makes no single-step trap (INT n, SYSCALL that clears TF).
    pub no_trap: bool,
    /// The instruction that just ran loaded RF (IRET): it stays for the next one.
    pub rf_loaded: bool,
    /// Debug traps wait for the end of the next instruction (MOV SS).
    pub held: bool,
}

impl GuestDebug {
    fn active(&self) -> bool {
        self.single_step || !self.breakpoints.is_empty()
    }

    /// DR6 bit of breakpoint `n`; all beyond the third share one.
    fn bit(n: usize) -> u64 {
        1 << n.min(3)
    }
}

/// (address, length, type) of an enabled breakpoint of the guest.
fn breakpoint(r: &Registers, n: usize) -> Option<(u64, u64, u64)> {
    if r.dr7 >> (2 * n) & 3 == 0 {
        return None;
    }
    let kind = r.dr7 >> (16 + 4 * n) & 3;
    let len = match r.dr7 >> (18 + 4 * n) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    };
    // Breakpoints are aligned to their length.
    Some((r.dr[n] & !(len - 1), len, kind))
}

fn overlap(a: u64, a_len: u64, b: u64, b_len: u64) -> bool {
    b.wrapping_sub(a) < a_len || a.wrapping_sub(b) < b_len
}

impl Cpu {
    /// Whether a page holds a data breakpoint (of guest or caller): it stays out of the TLB.
    pub fn watches_page(&self, lin: u64) -> bool {
        if self.r.dr7 & dr7::ENABLE == 0 && self.guest_debug.breakpoints.is_empty() {
            return false;
        }
        let page = lin & !0xfff;
        (0..4)
            .filter_map(|n| breakpoint(&self.r, n))
            .any(|(at, len, kind)| matches!(kind, WRITE | READ_WRITE) && overlap(at, len, page, 0x1000))
            || self
                .guest_debug
                .breakpoints
                .iter()
                .any(|&(at, len, kind)| kind != 0 && overlap(at, u64::from(len), page, 0x1000))
    }

    /// Notes data breakpoints hit by an access in [`Cpu::pending_db`] and for the caller.
    pub fn data_breakpoint(&mut self, lin: u64, len: usize, write: bool) {
        if self.r.dr7 & dr7::ENABLE == 0 && self.guest_debug.breakpoints.is_empty() {
            return;
        }
        let len = len as u64;
        for n in 0..4 {
            if let Some((at, width, kind)) = breakpoint(&self.r, n) {
                if (kind == READ_WRITE || kind == WRITE && write) && overlap(at, width, lin, len) {
                    self.pending_db |= 1 << n;
                }
            }
        }
        let mut hit = 0;
        for (n, &(at, width, kind)) in self.guest_debug.breakpoints.iter().enumerate() {
            if (kind == 3 || kind == 1 && write) && overlap(at, u64::from(width), lin, len) {
                hit |= GuestDebug::bit(n);
            }
        }
        self.guest_debug.hit |= hit;
    }

    /// Notes I/O breakpoints (CR4.DE) hit by an access to a port.
    pub fn io_breakpoint(&mut self, port: u16, len: usize) {
        if self.r.dr7 & dr7::ENABLE == 0 || self.r.cr4 & cr4::DE == 0 {
            return;
        }
        for n in 0..4 {
            if let Some((at, width, IO)) = breakpoint(&self.r, n) {
                if overlap(at, width, u64::from(port), len as u64) {
                    self.pending_db |= 1 << n;
                }
            }
        }
    }

    /// Whether instructions must be run one by one: single step, breakpoints, or
    /// RF, which the next instruction clears.
    pub fn needs_stepping(&self) -> bool {
        self.r.rflags & (rflags::TF | rflags::RF) != 0
            || self.r.dr7 & dr7::ENABLE != 0
            || self.pending_db != 0
            || self.guest_debug.active()
    }

    /// DR6 bits of the guest's code breakpoints at instruction pointer `rip`.
    fn code_breakpoints(&self, rip: u64) -> u64 {
        if self.r.dr7 & dr7::ENABLE == 0 || self.r.rflags & rflags::RF != 0 {
            return 0;
        }
        let lin = self.code_linear(rip);
        let mut bits = 0;
        for n in 0..4 {
            if let Some((at, _, EXECUTE)) = breakpoint(&self.r, n) {
                bits |= u64::from(at == lin) << n;
            }
        }
        bits
    }

    /// Whether a code breakpoint of the guest is at `rip` (and RF does not hold it back).
    pub fn code_breakpoint(&self, rip: u64) -> bool {
        self.code_breakpoints(rip) != 0
    }

    /// What happens before the instruction at `rip`: a debug trap that was held back
    /// or a code breakpoint's fault for the guest, or an exit for the caller.
    pub fn before_instruction(&mut self) -> Option<Result<Fault, Exit>> {
        let rip = self.r.rip;
        let lin = self.code_linear(rip);
        self.guest_debug.hit = 0;
        self.guest_debug.no_trap = false;
        self.guest_debug.rf_loaded = false;
        let held = std::mem::take(&mut self.guest_debug.held) || self.shadow & shadow::MOV_SS != 0;
        if self.reply.is_some() || self.mmio.active() {
            // The same instruction again, after an exit.
            return None;
        }
        if self.pending_db != 0 && !held {
            let dr6 = std::mem::take(&mut self.pending_db);
            return Some(Ok(Fault { vector: vector::DB, error: None, address: 0, trap: true, dr6 }));
        }
        if self.guest_debug.passed.take() != Some(lin) {
            let at = |&(_, &(at, _, kind)): &(usize, &(u64, u8, u8))| kind == 0 && at == lin;
            if let Some((n, _)) = self.guest_debug.breakpoints.iter().enumerate().find(at) {
                self.guest_debug.passed = Some(lin);
                return Some(Err(Exit::Debug { dr6: GuestDebug::bit(n) }));
            }
        }
        let bits = self.code_breakpoints(rip);
        if bits != 0 {
            return Some(Ok(Fault { vector: vector::DB, error: None, address: 0, trap: false, dr6: bits }));
        }
        None
    }

    /// What happens after an instruction; `tf` is RFLAGS.TF as it was before it.
    /// Clears RF. For the guest: the #DB trap of single step and data breakpoints;
    /// for the caller: its own single step and breakpoints.
    pub fn after_instruction(&mut self, tf: bool) -> Option<Result<Fault, Exit>> {
        if !std::mem::take(&mut self.guest_debug.rf_loaded) {
            self.r.rflags &= !rflags::RF;
        }
        let single = tf && !std::mem::take(&mut self.guest_debug.no_trap);
        let hit = std::mem::take(&mut self.guest_debug.hit);
        if hit != 0 || self.guest_debug.single_step {
            // The guest's own trap waits until the caller has looked.
            if single {
                self.pending_db |= dr6::BS;
            }
            let step = if self.guest_debug.single_step { dr6::BS } else { 0 };
            return Some(Err(Exit::Debug { dr6: hit | step }));
        }
        if self.shadow & shadow::MOV_SS != 0 {
            // Data breakpoints of MOV SS and POP SS wait for the next instruction, the
            // single-step trap is lost.
            self.guest_debug.held = true;
            return None;
        }
        let bits = std::mem::take(&mut self.pending_db) | if single { dr6::BS } else { 0 };
        if bits == 0 {
            return None;
        }
        Some(Ok(Fault { vector: vector::DB, error: None, address: 0, trap: true, dr6: bits }))
    }

    /// What the caller wants to stop at from now on.
    pub fn set_guest_debug(&mut self, single_step: bool, breakpoints: Vec<(u64, u8, u8)>) {
        self.guest_debug = GuestDebug { single_step, breakpoints, ..GuestDebug::default() };
        self.debug_changed();
    }

    /// Breakpoints changed: watched pages leave the TLB, and the run loop looks again.
    pub(crate) fn debug_changed(&mut self) {
        self.flush_tlb_all();
        self.interrupts_changed();
    }

    fn mov_debug(&mut self, i: &Instruction, number: usize, load: bool) -> X {
        let number = match number {
            4 | 5 if self.r.cr4 & cr4::DE != 0 => return Err(self.ud()),
            4 | 5 => number + 2,
            0..=7 => number,
            _ => return Err(self.ud()),
        };
        self.need_cpl0()?;
        if self.r.dr7 & dr7::GD != 0 {
            let fault = Fault { vector: vector::DB, error: None, address: 0, trap: false, dr6: dr6::BD };
            self.stop = Some(StopReason::Fault(fault));
            return Err(Stop);
        }
        if !load {
            let value = match number {
                6 => self.r.dr6,
                7 => self.r.dr7,
                n => self.r.dr[n],
            };
            self.write_reg(i.op0_register(), value);
            return Ok(());
        }
        let value = self.read_reg(i.op1_register());
        if number >= 6 && value >> 32 != 0 {
            return Err(self.gp(0));
        }
        match number {
            6 => self.r.dr6 = value & (dr6::BREAKPOINTS | dr6::BD | dr6::BS | dr6::BT) | dr6::FIXED,
            7 => self.r.dr7 = value & !dr7::RESERVED | dr7::FIXED,
            n => self.r.dr[n] = value,
        }
        if number == 7 || number < 4 && self.r.dr7 & dr7::ENABLE != 0 {
            self.debug_changed();
        }
        Ok(())
    }

    /// MOV to and from debug registers. `Ok(false)`: not one of them.
    pub(crate) fn execute_debug(&mut self, i: &Instruction) -> X<bool> {
        if i.mnemonic() != Mnemonic::Mov {
            return Ok(false);
        }
        let (to, from) = (i.op0_register(), i.op1_register());
        if to.is_dr() {
            self.mov_debug(i, to.number(), true)?;
        } else if from.is_dr() {
            self.mov_debug(i, from.number(), false)?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }
}
