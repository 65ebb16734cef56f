//! Near control transfers, software interrupts, BOUND.

use crate::cpu::Cpu;
use crate::events::EventKind;
use crate::operands::{mask, sign_extend};
use crate::state::*;
use iced_x86::{Code, Instruction, MemorySize, Mnemonic as M, OpKind};

impl Cpu {
    /// CALL and JMP; the far forms are not here.
    pub(super) fn op_jmp(&mut self, i: &Instruction) -> X<bool> {
        let target = match i.op_kind(0) {
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => self.branch_target(i),
            OpKind::Register => self.read_reg(i.op_register(0)),
            OpKind::Memory
                if matches!(
                    i.memory_size(),
                    MemorySize::WordOffset | MemorySize::DwordOffset | MemorySize::QwordOffset
                ) =>
            {
                self.read_operand(i, 0)?
            }
            _ => return Ok(false),
        };
        if i.mnemonic() == M::Call {
            let size = i.stack_pointer_increment().unsigned_abs() as usize;
            let back = self.next_rip;
            self.jump_near(target)?;
            self.push(size, back)?;
        } else {
            self.jump_near(target)?;
        }
        Ok(true)
    }

    pub(super) fn op_ret(&mut self, i: &Instruction) -> X {
        let size = match i.code() {
            Code::Retnw | Code::Retnw_imm16 => 2,
            Code::Retnd | Code::Retnd_imm16 => 4,
            _ => 8,
        };
        let extra = if i.op_count() == 1 { u64::from(i.immediate16()) } else { 0 };
        let sp = self.r.gpr[reg::RSP] & self.stack_mask();
        let target = self.load(seg::SS, sp, size)?;
        self.jump_near(target)?;
        self.set_sp(sp.wrapping_add(size as u64 + extra));
        Ok(())
    }

    pub(super) fn op_jcxz(&mut self, i: &Instruction) -> X {
        let size = match i.mnemonic() {
            M::Jcxz => 2,
            M::Jecxz => 4,
            _ => 8,
        };
        if self.gpr(reg::RCX, size) == 0 {
            let target = self.branch_target(i);
            self.jump_near(target)?;
        }
        Ok(())
    }

    /// LOOP, LOOPE, LOOPNE.
    pub(super) fn op_loop(&mut self, i: &Instruction) -> X {
        let size = loop_counter_size(i.code());
        let count = self.gpr(reg::RCX, size).wrapping_sub(1) & mask(size);
        let wanted = match i.mnemonic() {
            M::Loope => self.r.flags.zf(),
            M::Loopne => !self.r.flags.zf(),
            _ => true,
        };
        if count != 0 && wanted {
            let target = self.branch_target(i);
            self.jump_near(target)?;
        }
        self.set_gpr(reg::RCX, size, count);
        Ok(())
    }

    pub(super) fn op_int(&mut self, vector: u8) -> X {
        if self.mode == Mode::V86 && self.iopl() < 3 {
            return Err(self.gp(0));
        }
        self.soft_interrupt(EventKind::SoftInterrupt, vector)
    }

    pub(super) fn op_int1(&mut self) -> X {
        self.soft_interrupt(EventKind::PrivilegedSoftException, vector::DB)
    }

    pub(super) fn op_int3(&mut self) -> X {
        self.soft_interrupt(EventKind::SoftException, vector::BP)
    }

    pub(super) fn op_into(&mut self) -> X {
        if !self.r.flags.of() {
            return Ok(());
        }
        self.soft_interrupt(EventKind::SoftException, vector::OF)
    }

    /// BOUND: #BR unless lower <= index <= upper (signed).
    pub(super) fn op_bound(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 0);
        let (segment, ea) = self.memory_operand(i);
        let mut bounds = [0u8; 8];
        self.load_bytes(segment, ea, &mut bounds[..2 * size])?;
        let both = u64::from_le_bytes(bounds);
        let signed = |v: u64| sign_extend(v & mask(size), size) as i64;
        let index = signed(self.read_reg(i.op_register(0)));
        if index < signed(both) || index > signed(both >> (8 * size)) {
            return Err(self.fault(vector::BR, None));
        }
        Ok(())
    }
}

/// Bytes of the counter that LOOP, LOOPE and LOOPNE use (the address size).
fn loop_counter_size(code: Code) -> usize {
    match code {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => 2,
        Code::Loop_rel8_16_ECX
        | Code::Loop_rel8_32_ECX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_16_ECX
        | Code::Loope_rel8_32_ECX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_16_ECX
        | Code::Loopne_rel8_32_ECX
        | Code::Loopne_rel8_64_ECX => 4,
        _ => 8,
    }
}
