//! Vector and x87 instructions: the bridge to the native unit.

use crate::code_cache::{Block, Op};
use crate::cpu::Cpu;
use iced_x86::Instruction;

/// A vector instruction ready to run.
pub struct VectorOp {}

impl Cpu {
    /// An operation for a vector or x87 instruction; None if it is not one.
    pub fn vector_op(&mut self, block: &mut Block, i: &Instruction) -> Option<Op> {
        let _ = (block, i);
        None
    }
}
