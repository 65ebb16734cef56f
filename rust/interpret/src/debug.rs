//! Debug registers of the guest, and breakpoints and single step for the caller.

use crate::cpu::Cpu;

/// What the caller of `run` wants to stop at; invisible to the guest.
#[derive(Clone, Debug, Default)]
pub struct GuestDebug {
    /// Stop after every instruction.
    pub single_step: bool,
    /// (linear address, length, type: 0 execute, 1 write, 3 read or write).
    pub breakpoints: Vec<(u64, u8, u8)>,
}

impl Cpu {
    /// Whether a page holds a data breakpoint (of guest or caller): it stays out of the TLB.
    pub fn watches_page(&self, lin: u64) -> bool {
        let _ = lin;
        false
    }

    /// Notes data breakpoints hit by an access in [`Cpu::pending_db`].
    pub fn data_breakpoint(&mut self, lin: u64, len: usize, write: bool) {
        let _ = (lin, len, write);
    }
}
