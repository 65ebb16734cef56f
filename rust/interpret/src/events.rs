//! Delivery of exceptions and interrupts, and IRET.

use crate::cpu::Cpu;
use crate::state::*;

/// Where an event comes from; decides error codes, DPL checks and return addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// External interrupt (LAPIC, PIC or injected).
    External,
    /// Non-maskable interrupt.
    Nmi,
    /// Exception raised by an instruction.
    Exception,
    /// INT n.
    SoftInterrupt,
    /// INT1 (ICEBP).
    PrivilegedSoftException,
    /// INT3, INTO.
    SoftException,
}

/// An event to deliver through the IDT (or the real-mode IVT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Source.
    pub kind: EventKind,
    /// Vector.
    pub vector: u8,
    /// Error code to push.
    pub error: Option<u32>,
}

impl Cpu {
    /// Delivers one event; `self.r.rip` is the return address it pushes. On success
    /// `self.r.rip` is the handler. A fault during delivery is an `Err` with the
    /// fault in `self.stop` and the state unchanged.
    pub fn deliver(&mut self, event: Event) -> X {
        let _ = event;
        Err(self.unimplemented("event delivery"))
    }

    /// Raises an exception: CR2, DR6, double and triple faults included.
    pub fn raise(&mut self, fault: Fault) -> Result<(), Exit> {
        let _ = fault;
        Err(Exit::TripleFault)
    }
}
