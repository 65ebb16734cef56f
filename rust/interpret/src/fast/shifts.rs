//! Shifts, two-operand multiplication, bit tests.

use crate::code_cache::Op;
use crate::cpu::Cpu;
use iced_x86::Instruction;

pub(super) fn select(_: &Cpu, _: &Instruction) -> Option<Op> {
    None
}
