//! Moves and conversions.

use crate::cpu::Cpu;
use crate::operands::{address_size, mask, memory_segment, sign_extend};
use crate::state::*;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

impl Cpu {
    /// MOV between general registers, memory and immediates, and from segment
    /// registers. Loads of segment registers, control and debug registers are not here.
    pub(super) fn op_mov(&mut self, i: &Instruction) -> X<bool> {
        let special = |r: Register| r != Register::None && !r.is_gpr();
        let (dest, source) = (i.op0_register(), i.op1_register());
        if special(dest) || special(source) && !source.is_segment_register() {
            return Ok(false);
        }
        let value = self.read_operand(i, 1)?;
        self.write_operand(i, 0, value)?;
        Ok(true)
    }

    pub(super) fn op_movzx(&mut self, i: &Instruction) -> X {
        let value = self.read_operand(i, 1)?;
        self.write_operand(i, 0, value)
    }

    pub(super) fn op_movsx(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 1);
        let value = sign_extend(self.read_operand(i, 1)?, size);
        self.write_operand(i, 0, value)
    }

    pub(super) fn op_movnti(&mut self, i: &Instruction) -> X {
        let value = self.read_operand(i, 1)?;
        self.write_operand(i, 0, value)
    }

    pub(super) fn op_movbe(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 1);
        let value = self.read_operand(i, 1)?.swap_bytes() >> (64 - 8 * size);
        self.write_operand(i, 0, value)
    }

    pub(super) fn op_lea(&mut self, i: &Instruction) {
        let ea = self.effective_address(i);
        self.write_reg(i.op_register(0), ea);
    }

    pub(super) fn op_xlat(&mut self, i: &Instruction) -> X {
        let size = address_size(i);
        let ea = self.gpr(reg::RBX, size).wrapping_add(self.gpr(reg::RAX, 1)) & mask(size);
        let value = self.load(memory_segment(i), ea, 1)?;
        self.set_gpr(reg::RAX, 1, value);
        Ok(())
    }

    /// BSWAP; with 16-bit operands (undefined in the manuals) the result is 0, as on hardware.
    pub(super) fn op_bswap(&mut self, i: &Instruction) {
        let r = i.op_register(0);
        let value = match r.size() {
            2 => 0,
            4 => u64::from((self.read_reg(r) as u32).swap_bytes()),
            _ => self.read_reg(r).swap_bytes(),
        };
        self.write_reg(r, value);
    }

    /// CBW, CWDE, CDQE.
    pub(super) fn op_cbw(&mut self, i: &Instruction) {
        let size = match i.mnemonic() {
            M::Cbw => 2,
            M::Cwde => 4,
            _ => 8,
        };
        let value = sign_extend(self.gpr(reg::RAX, size / 2), size / 2);
        self.set_gpr(reg::RAX, size, value);
    }

    /// CWD, CDQ, CQO.
    pub(super) fn op_cwd(&mut self, i: &Instruction) {
        let size = match i.mnemonic() {
            M::Cwd => 2,
            M::Cdq => 4,
            _ => 8,
        };
        let value = sign_extend(self.gpr(reg::RAX, size), size) as i64 >> 63;
        self.set_gpr(reg::RDX, size, value as u64);
    }

    /// CLFLUSH, CLFLUSHOPT, CLWB: there is no cache to flush, but they fault as loads do.
    pub(super) fn op_clflush(&mut self, i: &Instruction) -> X {
        debug_assert_eq!(i.op_kind(0), OpKind::Memory);
        let (segment, ea) = self.memory_operand(i);
        self.probe_load(segment, ea, 1)
    }
}
