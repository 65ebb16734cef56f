//! Stands in for the generated code where the host executes no x86-64 instructions.

use crate::classify::Class;
use crate::plan::{MemAccess, ThunkRef, Unsupported};
use crate::state::VectorState;
use crate::unit::ThunkContext;
use iced_x86::Instruction;

/// No thunks.
pub(crate) struct Thunks;

impl Thunks {
    /// Whether thunks exist in this build.
    pub(crate) const AVAILABLE: bool = false;

    pub(crate) fn new(_capacity: usize) -> Self {
        Thunks
    }

    /// No thunk has generation 0, so none is ever current.
    pub(crate) fn generation(&self) -> u32 {
        0
    }

    pub(crate) fn usage(&self) -> (usize, usize) {
        (0, 0)
    }

    pub(crate) fn compile(
        &mut self,
        _instruction: &Instruction,
        _class: Class,
    ) -> Result<(ThunkRef, Option<MemAccess>), Unsupported> {
        Err(Unsupported::Host("this host does not execute x86-64 instructions"))
    }

    /// Never called: no thunk is current.
    ///
    /// # Safety
    /// None is needed.
    pub(crate) unsafe fn call(
        &self,
        _thunk: &ThunkRef,
        _state: *mut VectorState,
        _context: *mut ThunkContext,
    ) -> u32 {
        0
    }
}
