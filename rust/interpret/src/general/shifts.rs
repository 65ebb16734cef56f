//! Shifts and rotates.

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::Instruction;

/// A shift: flags before, operand, masked count, size in bytes.
type Shift = fn(Flags, u64, u32, usize) -> (u64, Flags);
type DoubleShift = fn(Flags, u64, u64, u32, usize) -> (u64, Flags);

impl Cpu {
    /// SHL, SHR, SAR, ROL, ROR, RCL, RCR. A count of zero changes no flags, but the
    /// destination is written all the same (and a 32-bit register zero-extended).
    pub(super) fn shift(&mut self, i: &Instruction, f: Shift) -> X {
        let size = self.operand_size(i, 0);
        let count = Flags::shift_count(self.read_operand(i, 1)?, size);
        let flags = self.r.flags;
        let old = self.modify_operand(i, 0, false, |a| f(flags, a, count, size).0)?;
        self.r.flags = f(flags, old, count, size).1;
        Ok(())
    }

    /// SHLD and SHRD.
    pub(super) fn double_shift(&mut self, i: &Instruction, f: DoubleShift) -> X {
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 1)?;
        let count = Flags::shift_count(self.read_operand(i, 2)?, size);
        let flags = self.r.flags;
        let old = self.modify_operand(i, 0, false, |a| f(flags, a, b, count, size).0)?;
        self.r.flags = f(flags, old, b, count, size).1;
        Ok(())
    }

    /// SHLX, SHRX, SARX, RORX: `op0 = f(op1, op2)`.
    pub(super) fn shift_without_flags(&mut self, i: &Instruction, f: Shift) -> X {
        self.check_vex(i)?;
        let size = self.operand_size(i, 0);
        let a = self.read_operand(i, 1)?;
        let count = Flags::shift_count(self.read_operand(i, 2)?, size);
        let (result, _) = f(self.r.flags, a, count, size);
        self.write_operand(i, 0, result)
    }
}
