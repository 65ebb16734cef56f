//! The stack: PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE.

use crate::cpu::Cpu;
use crate::operands::mask;
use crate::state::*;
use iced_x86::{Code, Instruction, OpKind};

impl Cpu {
    /// PUSH.
    pub(super) fn op_push(&mut self, i: &Instruction) -> X {
        if i.op_kind(0) == OpKind::Register && i.op_register(0).is_segment_register() {
            return self.push_segment(i);
        }
        let size = i.stack_pointer_increment().unsigned_abs() as usize;
        let value = self.read_operand(i, 0)?;
        self.push(size, value)
    }

    /// POP; segment registers are not here. A memory operand's address is made
    /// with the stack pointer already raised.
    pub(super) fn op_pop(&mut self, i: &Instruction) -> X<bool> {
        if i.op_kind(0) == OpKind::Register {
            let r = i.op_register(0);
            if r.is_segment_register() {
                return Ok(false);
            }
            let value = self.pop(r.size())?;
            self.write_reg(r, value);
            return Ok(true);
        }
        let before = self.r.gpr[reg::RSP];
        let value = self.pop(i.memory_size().size())?;
        if let Err(stop) = self.write_operand(i, 0, value) {
            self.r.gpr[reg::RSP] = before;
            return Err(stop);
        }
        Ok(true)
    }

    /// PUSHA, PUSHAD.
    pub(super) fn op_pusha(&mut self, i: &Instruction) -> X {
        let size = if i.code() == Code::Pushaw { 2 } else { 4 };
        let mut sp = self.r.gpr[reg::RSP];
        for n in [reg::RAX, reg::RCX, reg::RDX, reg::RBX, reg::RSP, reg::RBP, reg::RSI, reg::RDI] {
            sp = sp.wrapping_sub(size as u64) & self.stack_mask();
            self.store(seg::SS, sp, size, self.gpr(n, size))?;
        }
        self.set_sp(sp);
        Ok(())
    }

    /// POPA, POPAD; the saved stack pointer is skipped.
    pub(super) fn op_popa(&mut self, i: &Instruction) -> X {
        let size = if i.code() == Code::Popaw { 2 } else { 4 };
        let mut sp = self.r.gpr[reg::RSP] & self.stack_mask();
        let mut values = [0; 8];
        for n in (0..8).rev() {
            if n != reg::RSP {
                values[n] = self.load(seg::SS, sp, size)?;
            }
            sp = sp.wrapping_add(size as u64) & self.stack_mask();
        }
        self.set_sp(sp);
        for (n, value) in values.into_iter().enumerate() {
            if n != reg::RSP {
                self.set_gpr(n, size, value);
            }
        }
        Ok(())
    }

    /// PUSHF: VM and RF read as zero. #GP(0) in virtual-8086 mode with IOPL below 3
    /// (CR4.VME is not supported).
    pub(super) fn op_pushf(&mut self, i: &Instruction) -> X {
        if self.mode == Mode::V86 && self.iopl() < 3 {
            return Err(self.gp(0));
        }
        let size = i.stack_pointer_increment().unsigned_abs() as usize;
        self.push(size, self.rflags() & !(rflags::VM | rflags::RF))
    }

    /// POPF: IOPL changes at CPL 0 alone, IF where CPL <= IOPL; VM, VIF and VIP
    /// never, RF becomes clear.
    pub(super) fn op_popf(&mut self, i: &Instruction) -> X {
        let mut writable = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
        match self.mode {
            Mode::V86 => {
                if self.iopl() < 3 {
                    return Err(self.gp(0));
                }
                writable |= rflags::IF;
            }
            _ => {
                if self.cpl == 0 {
                    writable |= rflags::IOPL;
                }
                if self.cpl <= self.iopl() {
                    writable |= rflags::IF;
                }
            }
        }
        let size = i.stack_pointer_increment().unsigned_abs() as usize;
        let value = self.pop(size)?;
        writable &= mask(size);
        let old = self.rflags();
        self.set_rflags(old & !(writable | rflags::RF) | value & writable);
        if (self.r.rflags ^ old) & (rflags::IF | rflags::TF) != 0 {
            self.interrupts_changed();
        }
        Ok(())
    }

    /// ENTER with nesting. The final stack pointer must be writable before
    /// anything is pushed.
    pub(super) fn op_enter(&mut self, i: &Instruction) -> X {
        let size = match i.code() {
            Code::Enterw_imm16_imm8 => 2,
            Code::Enterd_imm16_imm8 => 4,
            _ => 8,
        };
        let step = size as u64;
        let allocate = u64::from(i.immediate16());
        let level = u64::from(i.immediate8_2nd() & 31);
        let stack = self.stack_mask();
        let before = self.r.gpr[reg::RSP] & stack;
        let frame = before.wrapping_sub(step) & stack;
        let pushes = if level == 0 { 1 } else { level + 1 };
        let last = before.wrapping_sub(step * pushes).wrapping_sub(allocate) & stack;
        self.probe_store(seg::SS, last, size)?;
        for n in 1..=pushes {
            self.probe_store(seg::SS, before.wrapping_sub(step * n) & stack, size)?;
        }

        self.store(seg::SS, frame, size, self.gpr(reg::RBP, size))?;
        let mut sp = frame;
        if level > 0 {
            let mut bp = self.r.gpr[reg::RBP];
            for _ in 1..level {
                bp = bp.wrapping_sub(step) & stack;
                let pointer = self.load(seg::SS, bp, size)?;
                sp = sp.wrapping_sub(step) & stack;
                self.store(seg::SS, sp, size, pointer)?;
            }
            sp = sp.wrapping_sub(step) & stack;
            self.store(seg::SS, sp, size, frame)?;
        }
        // RBP takes the frame pointer in the operand size; the stack pointer goes on
        // in the stack's size.
        self.set_gpr(reg::RBP, size, frame);
        self.set_sp(sp.wrapping_sub(allocate));
        Ok(())
    }

    pub(super) fn op_leave(&mut self, i: &Instruction) -> X {
        let size = match i.code() {
            Code::Leavew => 2,
            Code::Leaved => 4,
            _ => 8,
        };
        let sp = self.r.gpr[reg::RBP] & self.stack_mask();
        let value = self.load(seg::SS, sp, size)?;
        self.set_sp(sp.wrapping_add(size as u64));
        self.set_gpr(reg::RBP, size, value);
        Ok(())
    }
}
