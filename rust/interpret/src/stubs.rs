//! Stand-ins for parts that are being written; whoever adds the real function
//! deletes its line here, and the file goes when it is empty.
#![allow(missing_docs)]

use crate::cpu::Cpu;
use crate::state::*;

impl Cpu {
    /// INT n, INT3, INTO, INT1.
    pub fn soft_interrupt(&mut self, _: crate::events::EventKind, _: u8) -> X {
        Err(self.unimplemented("software interrupts"))
    }
    pub fn execute_system(&mut self, _: &iced_x86::Instruction) -> X<bool> {
        Ok(false)
    }
    pub fn needs_stepping(&self) -> bool {
        false
    }
    /// A code breakpoint at `rip`: a fault for the guest, or an exit for the caller.
    pub fn before_instruction(&mut self) -> Option<Result<Fault, Exit>> {
        None
    }
    /// Traps after an instruction (TF as it was before it, data breakpoints, the caller's single step).
    pub fn after_instruction(&mut self, _tf: bool) -> Option<Result<Fault, Exit>> {
        None
    }
    pub fn deliver_nmi(&mut self) -> Result<(), Exit> {
        Ok(())
    }
    pub fn deliver_external(&mut self, _vector: u8) -> Result<(), Exit> {
        Ok(())
    }
    pub fn init(&mut self) {}
    pub fn sipi(&mut self, _page: u8) {}
}
