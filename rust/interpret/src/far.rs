//! Far JMP, CALL and RET: code segments, call gates, stack switches
//! (SDM 3A, 5.8; SDM 2, "CALL", "JMP", "RET").

use crate::cpu::Cpu;
use crate::descriptors::*;
use crate::operands::mask;
use crate::state::*;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

/// A call gate.
#[derive(Clone, Copy, Debug)]
struct CallGate {
    selector: u16,
    offset: u64,
    /// Operand size of the pushes: 2, 4 or 8.
    size: usize,
    /// Parameters to copy to the inner stack.
    parameters: usize,
}

impl Cpu {
    // ---- checks shared with event delivery and IRET -----------------------------------------

    /// Whether `rip` may be the instruction pointer in code segment `d`.
    pub(crate) fn check_target(&mut self, d: &Descriptor, rip: u64, ext: u32) -> X {
        let ok = if self.lma() && d.ar() & ar::L != 0 {
            Self::canonical(rip)
        } else {
            rip <= u64::from(d.limit())
        };
        if ok {
            Ok(())
        } else {
            Err(self.gp(ext))
        }
    }

    /// Whether a code descriptor has both L and D set in IA-32e mode, which is reserved.
    pub(crate) fn reserved_code(&self, d: &Descriptor) -> bool {
        self.lma() && d.ar() & (ar::L | ar::DB) == ar::L | ar::DB
    }

    /// Makes `d` the code segment at privilege level `cpl` and goes on at `rip`.
    /// The caller has checked and marked it, and calls [`Cpu::update_mode`] later.
    pub(crate) fn set_code_segment(&mut self, d: &Descriptor, selector: u16, cpl: u8, rip: u64) {
        self.r.seg[seg::CS] = d.segment(selector & !3 | u16::from(cpl));
        self.cpl = cpl;
        self.next_rip = rip;
    }

    /// The code segment that a gate leads to (call, interrupt and trap gates).
    pub(crate) fn gate_target(&mut self, selector: u16, ext: u32) -> X<Descriptor> {
        if is_null(selector) {
            return Err(self.gp(ext));
        }
        let error = selector_error(selector) | ext;
        let d = self.read_descriptor(selector, vector::GP, ext)?;
        if !d.is_code() || d.dpl() > self.cpl {
            return Err(self.gp(error));
        }
        if self.lma() && d.ar() & (ar::L | ar::DB) != ar::L {
            return Err(self.gp(error));
        }
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        Ok(d)
    }

    /// The stack that the TSS has for privilege level `cpl`, with all checks.
    pub(crate) fn inner_stack(&mut self, cpl: u8, ext: u32) -> X<Stack> {
        let tr = self.r.tr;
        let tss_error = selector_error(tr.selector) | ext;
        let level = u64::from(cpl);
        if self.lma() {
            let sp = self.load_tss(4 + 8 * level, 8, tss_error)?;
            let segment = null_segment(u16::from(cpl), cpl);
            return Ok(Stack { segment, sp, long: true, cpl, error: ext });
        }
        let (sp, selector) = if tr.ar & 8 != 0 {
            let at = 4 + 8 * level;
            // SS first: its last byte is what must be inside the limit.
            let ss = self.load_tss(at + 4, 2, tss_error)?;
            (self.load_tss(at, 4, tss_error)?, ss)
        } else {
            let both = self.load_tss(2 + 4 * level, 4, tss_error)?;
            (both & 0xffff, both >> 16)
        };
        let selector = selector as u16;
        let error = selector_error(selector) | ext;
        if is_null(selector) {
            return Err(self.fault(vector::TS, Some(ext)));
        }
        let d = self.read_descriptor(selector, vector::TS, ext)?;
        if rpl(selector) != cpl || d.dpl() != cpl || !d.is_writable() {
            return Err(self.fault(vector::TS, Some(error)));
        }
        if !d.is_present() {
            return Err(self.fault(vector::SS, Some(error)));
        }
        self.mark_accessed(&d)?;
        Ok(Stack { segment: d.segment(selector), sp, long: false, cpl, error })
    }

    /// Reads the TSS; #TS beyond its limit.
    pub(crate) fn load_tss(&mut self, offset: u64, size: usize, error: u32) -> X<u64> {
        let tr = self.r.tr;
        if tr.ar & ar::UNUSABLE != 0 || offset + size as u64 - 1 > u64::from(tr.limit) {
            return Err(self.fault(vector::TS, Some(error)));
        }
        self.load_sys(self.wrap_linear(tr.base.wrapping_add(offset)), size)
    }

    /// Makes a stack the current one, at stack pointer `sp`.
    pub(crate) fn set_stack(&mut self, stack: &Stack, sp: u64) {
        self.r.seg[seg::SS] = stack.segment;
        self.r.gpr[reg::RSP] = stack.merge(self.r.gpr[reg::RSP], sp);
    }

    /// The checks of a far return's CS (also IRET's): its descriptor.
    pub(crate) fn return_code_segment(&mut self, selector: u16) -> X<Descriptor> {
        if is_null(selector) {
            return Err(self.gp(0));
        }
        let error = selector_error(selector);
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        let level = rpl(selector);
        let bad_level = if d.is_conforming() { d.dpl() > level } else { d.dpl() != level };
        if !d.is_code() || level < self.cpl || bad_level || self.reserved_code(&d) {
            return Err(self.gp(error));
        }
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        Ok(d)
    }

    /// The checks of the SS that a far return or IRET pops, for code segment
    /// `code` at privilege level `cpl`.
    pub(crate) fn return_stack_segment(&mut self, selector: u16, code: &Descriptor, cpl: u8) -> X<Segment> {
        if is_null(selector) {
            if self.lma() && code.ar() & ar::L != 0 && cpl != 3 {
                return Ok(null_segment(selector, cpl));
            }
            return Err(self.gp(0));
        }
        let error = selector_error(selector);
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        if rpl(selector) != cpl || !d.is_writable() || d.dpl() != cpl {
            return Err(self.gp(error));
        }
        if !d.is_present() {
            return Err(self.fault(vector::SS, Some(error)));
        }
        self.mark_accessed(&d)?;
        Ok(d.segment(selector))
    }

    /// Clears data segment registers that the new, less privileged code may not use.
    pub(crate) fn clear_inner_segments(&mut self) {
        for n in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &mut self.r.seg[n];
            let conforming = s.ar & (ar::CODE | ar::DC) == ar::CODE | ar::DC;
            if s.ar & ar::UNUSABLE == 0 && !conforming && s.dpl() < self.cpl {
                s.selector = 0;
                s.ar = ar::UNUSABLE;
            }
        }
    }

    // ---- JMP and CALL ---------------------------------------------------------------------------

    /// Far JMP (`call` false) or CALL with operand size `size`.
    pub fn far_transfer(&mut self, selector: u16, offset: u64, size: usize, call: bool) -> X {
        let offset = offset & mask(size);
        if !self.protected() {
            return self.far_transfer_real(selector, offset, size, call);
        }
        if is_null(selector) {
            return Err(self.gp(0));
        }
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        if !d.is_segment() {
            return self.far_transfer_system(selector, &d, call);
        }
        let error = selector_error(selector);
        let bad_level = if d.is_conforming() {
            d.dpl() > self.cpl
        } else {
            rpl(selector) > self.cpl || d.dpl() != self.cpl
        };
        if !d.is_code() || bad_level || self.reserved_code(&d) {
            return Err(self.gp(error));
        }
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        self.check_target(&d, offset, 0)?;
        self.mark_accessed(&d)?;
        self.same_level(selector, &d, offset, size, call)
    }

    fn far_transfer_real(&mut self, selector: u16, offset: u64, size: usize, call: bool) -> X {
        if offset > u64::from(self.r.seg[seg::CS].limit) {
            return Err(self.gp(0));
        }
        if call {
            self.push_return(size)?;
        }
        self.load_real_segment(seg::CS, selector);
        self.next_rip = offset;
        self.update_mode();
        Ok(())
    }

    /// Pushes CS and the address of the following instruction on the current stack.
    fn push_return(&mut self, size: usize) -> X {
        let stack = self.stack_in_use();
        let mut frame = Frame::new(size);
        frame.push(u64::from(self.r.seg[seg::CS].selector));
        frame.push(self.next_rip);
        let sp = self.write_frame(&stack, &frame)?;
        self.set_stack(&stack, sp);
        Ok(())
    }

    fn same_level(&mut self, selector: u16, d: &Descriptor, rip: u64, size: usize, call: bool) -> X {
        if call {
            self.push_return(size)?;
        }
        self.set_code_segment(d, selector, self.cpl, rip);
        self.update_mode();
        Ok(())
    }

    fn far_transfer_system(&mut self, selector: u16, d: &Descriptor, call: bool) -> X {
        use system_type::*;
        let error = selector_error(selector);
        let gate = d.kind() == CALL_GATE || !self.lma() && d.kind() == CALL_GATE16;
        let task = !self.lma() && matches!(d.kind(), TASK_GATE | TSS | TSS16);
        if !gate && !task || d.dpl() < self.cpl || d.dpl() < rpl(selector) {
            return Err(self.gp(error));
        }
        let gate = if gate { Some(self.call_gate(selector, d)?) } else { None };
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        let Some(gate) = gate else {
            return Err(self.unimplemented("hardware task switch"));
        };
        let target = self.gate_target(gate.selector, 0)?;
        let inner = !target.is_conforming() && target.dpl() < self.cpl;
        if inner && !call {
            return Err(self.gp(selector_error(gate.selector)));
        }
        if !inner {
            self.check_target(&target, gate.offset, 0)?;
            self.mark_accessed(&target)?;
            return self.same_level(gate.selector, &target, gate.offset, gate.size, call);
        }
        self.call_inner(&gate, &target)
    }

    /// Decodes a call gate.
    fn call_gate(&mut self, selector: u16, d: &Descriptor) -> X<CallGate> {
        let target = (d.raw >> 16) as u16;
        let low = d.raw & 0xffff;
        let wide = low | d.raw >> 32 & 0xffff_0000;
        let parameters = (d.raw >> 32) as usize & 0x1f;
        if self.lma() {
            return match self.upper_half(d, selector)? {
                Some(upper) if upper >> 40 & 0x1f == 0 => {
                    Ok(CallGate { selector: target, offset: wide | upper << 32, size: 8, parameters: 0 })
                }
                _ => Err(self.gp(selector_error(selector))),
            };
        }
        Ok(if d.kind() == system_type::CALL_GATE {
            CallGate { selector: target, offset: wide, size: 4, parameters }
        } else {
            CallGate { selector: target, offset: low, size: 2, parameters }
        })
    }

    /// A call through a gate to a more privileged code segment.
    fn call_inner(&mut self, gate: &CallGate, target: &Descriptor) -> X {
        let cpl = target.dpl();
        let stack = self.inner_stack(cpl, 0)?;
        let old = self.stack_in_use();
        let mut frame = Frame::new(gate.size);
        frame.push(u64::from(old.segment.selector));
        frame.push(old.sp);
        for n in (0..gate.parameters).rev() {
            let at = old.sp.wrapping_add((n * gate.size) as u64) & old.mask();
            let value = self.load(seg::SS, at, gate.size)?;
            frame.push(value);
        }
        frame.push(u64::from(self.r.seg[seg::CS].selector));
        frame.push(self.next_rip);
        self.check_target(target, gate.offset, 0)?;
        self.mark_accessed(target)?;
        let sp = self.write_frame(&stack, &frame)?;
        self.set_stack(&stack, sp);
        self.set_code_segment(target, gate.selector, cpl, gate.offset);
        self.update_mode();
        Ok(())
    }

    // ---- RET -----------------------------------------------------------------------------------

    /// Far RET with operand size `size`, releasing `extra` bytes of parameters.
    pub fn far_return(&mut self, size: usize, extra: u64) -> X {
        let old = self.stack_in_use();
        let at = |n: u64| old.sp.wrapping_add(n) & old.mask();
        let step = size as u64;
        let rip = self.load(seg::SS, at(0), size)?;
        let selector = self.load(seg::SS, at(step), size)? as u16;
        if !self.protected() {
            if rip > u64::from(self.r.seg[seg::CS].limit) {
                return Err(self.gp(0));
            }
            self.set_stack(&old, at(2 * step + extra));
            self.load_real_segment(seg::CS, selector);
            self.next_rip = rip;
            self.update_mode();
            return Ok(());
        }
        let d = self.return_code_segment(selector)?;
        let cpl = rpl(selector);
        if cpl == self.cpl {
            self.check_target(&d, rip, 0)?;
            self.mark_accessed(&d)?;
            self.set_stack(&old, at(2 * step + extra));
            self.set_code_segment(&d, selector, cpl, rip);
            self.update_mode();
            return Ok(());
        }
        let sp = self.load(seg::SS, at(2 * step + extra), size)?;
        let ss = self.load(seg::SS, at(3 * step + extra), size)? as u16;
        let segment = self.return_stack_segment(ss, &d, cpl)?;
        self.check_target(&d, rip, 0)?;
        self.mark_accessed(&d)?;
        self.set_code_segment(&d, selector, cpl, rip);
        let long = self.lma() && d.ar() & ar::L != 0;
        let stack = Stack { segment, sp, long, cpl, error: 0 };
        self.set_stack(&stack, sp.wrapping_add(extra));
        self.clear_inner_segments();
        self.update_mode();
        Ok(())
    }

    // ---- dispatch -------------------------------------------------------------------------------

    /// The instructions of this file. `Ok(false)`: not one of them.
    pub(crate) fn execute_far(&mut self, i: &Instruction) -> X<bool> {
        let size = match i.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 | Code::Jmp_m1616 | Code::Call_m1616 => 2,
            Code::Jmp_ptr1632 | Code::Call_ptr1632 | Code::Jmp_m1632 | Code::Call_m1632 => 4,
            Code::Jmp_m1664 | Code::Call_m1664 => 8,
            Code::Retfw | Code::Retfw_imm16 => 2,
            Code::Retfd | Code::Retfd_imm16 => 4,
            Code::Retfq | Code::Retfq_imm16 => 8,
            _ => return Ok(false),
        };
        if i.mnemonic() == Mnemonic::Retf {
            let extra = if i.op_count() > 0 { u64::from(i.immediate16()) } else { 0 };
            self.far_return(size, extra)?;
            return Ok(true);
        }
        let (selector, offset) = match i.op0_kind() {
            OpKind::FarBranch16 => (i.far_branch_selector(), u64::from(i.far_branch16())),
            OpKind::FarBranch32 => (i.far_branch_selector(), u64::from(i.far_branch32())),
            _ => self.far_pointer(i, size)?,
        };
        self.far_transfer(selector, offset, size, i.mnemonic() == Mnemonic::Call)?;
        Ok(true)
    }
}
