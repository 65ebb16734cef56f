//! Exits as the tuples of `_engine.pyi`.

use nonroot_interpret::state::Exit;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};

/// Names of the exits, in the order of their numbers.
pub const NAMES: [&str; 17] = [
    "port_io",
    "mmio",
    "halt",
    "hypercall",
    "msr_read",
    "msr_write",
    "cpuid",
    "ioapic_eoi",
    "pic_acknowledge",
    "interrupt_window",
    "exception",
    "cr_write",
    "debug",
    "triple_fault",
    "ipi",
    "interrupted",
    "failure",
];

/// The number of an exit.
pub fn number(exit: &Exit) -> usize {
    match exit {
        Exit::PortIo { .. } => 0,
        Exit::Mmio { .. } => 1,
        Exit::Halt => 2,
        Exit::Hypercall { .. } => 3,
        Exit::MsrRead { .. } => 4,
        Exit::MsrWrite { .. } => 5,
        Exit::Cpuid { .. } => 6,
        Exit::IoapicEoi { .. } => 7,
        Exit::PicAcknowledge => 8,
        Exit::InterruptWindow => 9,
        Exit::Exception { .. } => 10,
        Exit::CrWrite { .. } => 11,
        Exit::Debug { .. } => 12,
        Exit::TripleFault => 13,
        Exit::Ipi(_) => 14,
        Exit::Interrupted => 15,
        Exit::Failure { .. } => 16,
    }
}

/// What answers an exit: bytes of a length, and whether it is an MSR write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    None,
    Bytes(usize),
    MsrWrite,
}

/// The answer that an exit waits for.
pub fn answer(exit: &Exit) -> Answer {
    match exit {
        Exit::PortIo { size, write: false, count, .. } => Answer::Bytes(*size as usize * *count as usize),
        Exit::Mmio { size, write: false, .. } => Answer::Bytes(*size as usize),
        Exit::MsrRead { .. } => Answer::Bytes(8),
        Exit::Cpuid { .. } => Answer::Bytes(16),
        Exit::MsrWrite { .. } => Answer::MsrWrite,
        _ => Answer::None,
    }
}

/// The tuple of an exit.
pub fn to_python<'py>(py: Python<'py>, exit: &Exit) -> PyResult<Bound<'py, PyTuple>> {
    let n = number(exit);
    match exit {
        Exit::PortIo { port, size, write, count, data } => {
            (n, *port, *size, *write, *count, PyBytes::new(py, data)).into_pyobject(py)
        }
        Exit::Mmio { gpa, size, write, data } => {
            (n, *gpa, *size, *write, PyBytes::new(py, data)).into_pyobject(py)
        }
        Exit::Hypercall { vmmcall } => (n, *vmmcall).into_pyobject(py),
        Exit::MsrRead { index } => (n, *index).into_pyobject(py),
        Exit::MsrWrite { index, value } => (n, *index, *value).into_pyobject(py),
        Exit::Cpuid { leaf, subleaf } => (n, *leaf, *subleaf).into_pyobject(py),
        Exit::IoapicEoi { vector } => (n, *vector).into_pyobject(py),
        Exit::Exception { vector, error, address } => (n, *vector, *error, *address).into_pyobject(py),
        Exit::CrWrite { register, value } => (n, *register, *value).into_pyobject(py),
        Exit::Debug { dr6 } => (n, *dr6).into_pyobject(py),
        Exit::Ipi(ipi) => {
            (n, ipi.vector, ipi.mode, ipi.shorthand, ipi.logical, ipi.level, ipi.assert, ipi.destination)
                .into_pyobject(py)
        }
        Exit::Failure { reason } => (n, reason).into_pyobject(py),
        Exit::Halt | Exit::PicAcknowledge | Exit::InterruptWindow | Exit::TripleFault | Exit::Interrupted => {
            (n,).into_pyobject(py)
        }
    }
}
