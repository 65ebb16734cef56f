//! IRET in all modes (SDM 2, "IRET/IRETD/IRETQ").

use crate::cpu::Cpu;
use crate::descriptors::*;
use crate::operands::mask;
use crate::state::*;
use iced_x86::{Code, Instruction};

/// What IRET always loads of RFLAGS.
const COMMON: u64 = rflags::STATUS | rflags::TF | rflags::DF | rflags::NT;
/// What it loads as well with 32- and 64-bit operands.
const WIDE: u64 = rflags::RF | rflags::AC | rflags::ID;

impl Cpu {
    /// IRET with operand size `size`: 2, 4 or 8.
    pub fn iret(&mut self, size: usize) -> X {
        match self.mode {
            Mode::Real => self.iret_real(size)?,
            Mode::V86 => self.iret_v86(size)?,
            _ => self.iret_protected(size)?,
        }
        self.nmi_blocked = false;
        self.guest_debug.rf_loaded = true;
        self.update_mode();
        self.interrupts_changed();
        Ok(())
    }

    /// Replaces the bits `which` of RFLAGS.
    fn load_flags(&mut self, image: u64, which: u64) {
        let value = self.rflags() & !which | image & which;
        self.r.flags = crate::flags::Flags::from_rflags(value);
        self.r.rflags = value & !rflags::STATUS | 2;
    }

    /// The first three items of the frame: instruction pointer, CS, flags.
    fn pop_frame(&mut self, size: usize) -> X<(u64, u16, u64)> {
        let stack = self.stack_in_use();
        let at = |n: usize| stack.sp.wrapping_add((n * size) as u64) & stack.mask();
        let rip = self.load(seg::SS, at(0), size)?;
        let cs = self.load(seg::SS, at(1), size)? as u16;
        let flags = self.load(seg::SS, at(2), size)?;
        Ok((rip, cs, flags))
    }

    /// Releases `n` items of the current stack.
    fn release(&mut self, n: usize, size: usize) {
        let stack = self.stack_in_use();
        let sp = (stack.sp & stack.mask()).wrapping_add((n * size) as u64);
        self.set_stack(&stack, sp);
    }

    fn iret_real(&mut self, size: usize) -> X {
        let (rip, cs, flags) = self.pop_frame(size)?;
        if rip > u64::from(self.r.seg[seg::CS].limit) {
            return Err(self.gp(0));
        }
        self.release(3, size);
        self.load_real_segment(seg::CS, cs);
        self.next_rip = rip;
        let wide = if size == 2 { 0 } else { WIDE };
        self.load_flags(flags, COMMON | rflags::IF | rflags::IOPL | wide);
        Ok(())
    }

    fn iret_v86(&mut self, size: usize) -> X {
        // Without CR4.VME.
        if self.iopl() < 3 {
            return Err(self.gp(0));
        }
        let (rip, cs, flags) = self.pop_frame(size)?;
        if rip > u64::from(self.r.seg[seg::CS].limit) {
            return Err(self.gp(0));
        }
        self.release(3, size);
        self.load_real_segment(seg::CS, cs);
        self.next_rip = rip;
        let wide = if size == 2 { 0 } else { WIDE };
        self.load_flags(flags, COMMON | rflags::IF | wide);
        Ok(())
    }

    fn iret_protected(&mut self, size: usize) -> X {
        if self.r.rflags & rflags::NT != 0 {
            if self.lma() {
                return Err(self.gp(0));
            }
            return Err(self.unimplemented("hardware task switch (IRET with NT set)"));
        }
        let (rip, cs, flags) = self.pop_frame(size)?;
        if size == 4 && flags & rflags::VM != 0 && self.cpl == 0 && !self.lma() {
            return self.iret_to_v86(rip, cs, flags);
        }
        let mut stack = self.stack_in_use();
        let at = |n: usize| stack.sp.wrapping_add((n * size) as u64) & stack.mask();
        if self.mode == Mode::Long64 {
            // 64-bit mode always pops SS:RSP, and before it looks at anything.
            self.load(seg::SS, at(3), size)?;
            self.load(seg::SS, at(4), size)?;
        }
        let d = self.return_code_segment(cs)?;
        let cpl = rpl(cs);
        let with_stack = cpl != self.cpl || self.mode == Mode::Long64;
        if with_stack {
            let sp = self.load(seg::SS, at(3), size)?;
            let ss = self.load(seg::SS, at(4), size)? as u16;
            let segment = self.return_stack_segment(ss, &d, cpl)?;
            let long = self.lma() && d.ar() & ar::L != 0;
            stack = Stack { segment, sp, long, cpl, error: 0 };
        } else {
            stack.sp = at(3);
        }
        let rip = rip & mask(size);
        self.check_target(&d, rip, 0)?;
        self.mark_accessed(&d)?;

        let mut which = COMMON;
        if size > 2 {
            which |= WIDE;
        }
        if self.cpl <= self.iopl() {
            which |= rflags::IF;
        }
        if self.cpl == 0 {
            which |= rflags::IOPL;
            if size > 2 {
                which |= rflags::VIF | rflags::VIP;
            }
        }
        let outer = cpl > self.cpl;
        self.load_flags(flags, which);
        self.set_code_segment(&d, cs, cpl, rip);
        self.set_stack(&stack, stack.sp);
        if outer {
            self.clear_inner_segments();
        }
        Ok(())
    }

    fn iret_to_v86(&mut self, rip: u64, cs: u16, flags: u64) -> X {
        let stack = self.stack_in_use();
        let mut items = [0u64; 6];
        for (n, item) in items.iter_mut().enumerate() {
            let at = stack.sp.wrapping_add(12 + 4 * n as u64) & stack.mask();
            *item = self.load(seg::SS, at, 4)?;
        }
        if rip > 0xffff {
            return Err(self.gp(0));
        }
        self.load_flags(
            flags,
            COMMON | WIDE | rflags::IF | rflags::IOPL | rflags::VM | rflags::VIF | rflags::VIP,
        );
        self.cpl = 3;
        self.mode = Mode::V86;
        let [sp, ss, es, ds, fs, gs] = items;
        for (n, selector) in [
            (seg::CS, u64::from(cs)),
            (seg::SS, ss),
            (seg::ES, es),
            (seg::DS, ds),
            (seg::FS, fs),
            (seg::GS, gs),
        ] {
            self.load_real_segment(n, selector as u16);
        }
        self.r.gpr[reg::RSP] = sp;
        self.next_rip = rip;
        Ok(())
    }

    /// IRET. `Ok(false)`: another instruction.
    pub(crate) fn execute_iret(&mut self, i: &Instruction) -> X<bool> {
        let size = match i.code() {
            Code::Iretw => 2,
            Code::Iretd => 4,
            Code::Iretq => 8,
            _ => return Ok(false),
        };
        self.iret(size)?;
        Ok(true)
    }
}
