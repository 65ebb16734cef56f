//! Operands of a decoded instruction, for the general executor.
//!
//! Instructions are decoded once for each physical page, with an `ip()` that is
//! only an offset, so RIP-relative and branch targets are taken relative to it.

use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::{CodeSize, Instruction, OpKind, Register};

/// Mask for an address or operand of `size` bytes.
#[inline]
pub fn mask(size: usize) -> u64 {
    match size {
        1 => 0xff,
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

/// Sign-extends the low `size` bytes.
#[inline]
pub fn sign_extend(value: u64, size: usize) -> u64 {
    let shift = 64 - 8 * size as u32;
    ((value << shift) as i64 >> shift) as u64
}

/// Number of the segment register of an instruction's memory operand. 64-bit mode ignores
/// overrides other than FS and GS (SDM 1 3.4.4), which shows in #SS or #GP.
pub fn memory_segment(i: &Instruction) -> usize {
    let segment = segment_number(i.memory_segment());
    if segment < seg::FS && i.code_size() == CodeSize::Code64 && i.has_segment_prefix() {
        let stack = matches!(i.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
        return if stack { seg::SS } else { seg::DS };
    }
    segment
}

/// Number of a segment register as [`seg`] has it.
pub fn segment_number(r: Register) -> usize {
    match r {
        Register::ES => seg::ES,
        Register::CS => seg::CS,
        Register::SS => seg::SS,
        Register::FS => seg::FS,
        Register::GS => seg::GS,
        _ => seg::DS,
    }
}

/// Address size in bytes of an instruction's memory operand.
pub fn address_size(i: &Instruction) -> usize {
    let base = i.memory_base();
    let index = i.memory_index();
    match base {
        Register::RIP => 8,
        Register::EIP => 4,
        Register::None if index == Register::None => match i.memory_displ_size() {
            2 => 2,
            4 => 4,
            _ => 8,
        },
        Register::None => index.size(),
        _ => base.size(),
    }
}

impl Cpu {
    /// Reads any general register by iced's name (incl. AH..BH, SPL.., and segment registers' selectors).
    pub fn read_reg(&self, r: Register) -> u64 {
        if r.is_segment_register() {
            return u64::from(self.r.seg[segment_number(r)].selector);
        }
        match r {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                self.r.gpr[r as usize - Register::AH as usize] >> 8 & 0xff
            }
            _ => self.gpr(r.full_register().number(), r.size()),
        }
    }

    /// Writes any general register by iced's name, as instructions do.
    pub fn write_reg(&mut self, r: Register, value: u64) {
        match r {
            Register::AH | Register::CH | Register::DH | Register::BH => {
                let g = &mut self.r.gpr[r as usize - Register::AH as usize];
                *g = *g & !0xff00 | (value & 0xff) << 8;
            }
            _ => self.set_gpr(r.full_register().number(), r.size(), value),
        }
    }

    /// Effective address (offset in the segment) of the memory operand, wrapped
    /// to the address size. Not for string instructions.
    pub fn effective_address(&self, i: &Instruction) -> u64 {
        let size = address_size(i);
        let base = i.memory_base();
        let mut ea = i.memory_displacement64();
        match base {
            Register::None => {}
            Register::RIP | Register::EIP => ea = ea.wrapping_sub(i.ip()).wrapping_add(self.r.rip),
            _ => ea = ea.wrapping_add(self.r.gpr[base.number()]),
        }
        if i.memory_index() != Register::None {
            let index = self.r.gpr[i.memory_index().number()] & mask(size);
            ea = ea.wrapping_add(index.wrapping_mul(u64::from(i.memory_index_scale())));
        }
        ea & mask(size)
    }

    /// (segment number, effective address) of the memory operand.
    pub fn memory_operand(&self, i: &Instruction) -> (usize, u64) {
        (memory_segment(i), self.effective_address(i))
    }

    /// Size in bytes of operand `n`.
    pub fn operand_size(&self, i: &Instruction, n: u32) -> usize {
        match i.op_kind(n) {
            OpKind::Register => i.op_register(n).size(),
            OpKind::Memory => i.memory_size().size(),
            OpKind::Immediate8 => 1,
            OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
            OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
            _ => 8,
        }
    }

    /// Reads operand `n` (register, memory or immediate), zero-extended from its
    /// own size; sign-extended immediates come extended to the operand size.
    pub fn read_operand(&mut self, i: &Instruction, n: u32) -> X<u64> {
        match i.op_kind(n) {
            OpKind::Register => Ok(self.read_reg(i.op_register(n))),
            OpKind::Memory => {
                let (segment, ea) = self.memory_operand(i);
                self.load(segment, ea, i.memory_size().size())
            }
            _ => Ok(i.immediate(n)),
        }
    }

    /// Writes operand `n` (register or memory).
    pub fn write_operand(&mut self, i: &Instruction, n: u32, value: u64) -> X {
        match i.op_kind(n) {
            OpKind::Register => {
                self.write_reg(i.op_register(n), value);
                Ok(())
            }
            _ => {
                let (segment, ea) = self.memory_operand(i);
                self.store(segment, ea, i.memory_size().size(), value)
            }
        }
    }

    /// Reads, changes and writes back operand `n`; atomic if it is memory and
    /// `lock`. Returns the old value. Nothing is written if `f` never runs.
    pub fn modify_operand(
        &mut self,
        i: &Instruction,
        n: u32,
        lock: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> X<u64> {
        match i.op_kind(n) {
            OpKind::Register => {
                let r = i.op_register(n);
                let old = self.read_reg(r);
                self.write_reg(r, f(old));
                Ok(old)
            }
            _ => {
                let (segment, ea) = self.memory_operand(i);
                self.rmw(segment, ea, i.memory_size().size(), lock, f)
            }
        }
    }

    /// Target of a near branch with an immediate operand, wrapped to its size.
    pub fn branch_target(&self, i: &Instruction) -> u64 {
        let target = i.near_branch_target().wrapping_sub(i.ip()).wrapping_add(self.r.rip);
        match i.op_kind(0) {
            OpKind::NearBranch16 => target & 0xffff,
            OpKind::NearBranch32 => target & 0xffff_ffff,
            _ => target,
        }
    }

    /// Continues at `target` after checking it: canonical in 64-bit mode (#GP(0)),
    /// inside the code segment's limit otherwise.
    pub fn jump_near(&mut self, target: u64) -> X {
        if self.mode == Mode::Long64 {
            if !Self::canonical(target) {
                return Err(self.gp(0));
            }
        } else if target > u64::from(self.r.seg[seg::CS].limit) {
            return Err(self.gp(0));
        }
        self.next_rip = target;
        Ok(())
    }

    /// Default operand size in bytes of stack and branch instructions in the
    /// current mode without prefixes.
    pub fn default_size(&self) -> usize {
        match self.mode {
            Mode::Long64 => 8,
            Mode::Protected32 => 4,
            _ => 2,
        }
    }
}
