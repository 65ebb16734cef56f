//! Segment registers, descriptor tables and the instructions that load, store
//! and test them (SDM 3A, chapters 3 and 5).

use crate::cpu::Cpu;
use crate::descriptors::*;
use crate::operands::{address_size, mask, segment_number};
use crate::state::*;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

impl Cpu {
    // ---- loading segment registers ------------------------------------------------------

    /// Loads ES, SS, DS, FS or GS as MOV, POP and the like do. Nothing changes on `Err`.
    pub fn load_segment(&mut self, segment: usize, selector: u16) -> X {
        if !self.protected() {
            self.load_real_segment(segment, selector);
        } else {
            let loaded = if segment == seg::SS {
                self.check_stack_segment(selector)?
            } else {
                self.check_data_segment(selector)?
            };
            self.r.seg[segment] = loaded;
        }
        if segment <= seg::DS {
            self.update_segments();
        }
        Ok(())
    }

    /// Loads a segment register in real or virtual-8086 mode. In real mode the
    /// limit stays (big real mode).
    pub fn load_real_segment(&mut self, segment: usize, selector: u16) {
        let v86 = self.mode == Mode::V86;
        let s = &mut self.r.seg[segment];
        s.selector = selector;
        s.base = u64::from(selector) << 4;
        if v86 {
            s.limit = 0xffff;
            s.ar = 0xf3;
        } else {
            s.ar = s.ar & (ar::DB | ar::G) | 0x93;
        }
    }

    fn check_stack_segment(&mut self, selector: u16) -> X<Segment> {
        if is_null(selector) {
            if self.mode == Mode::Long64 && self.cpl < 3 && rpl(selector) == self.cpl {
                return Ok(null_segment(selector, self.cpl));
            }
            return Err(self.gp(0));
        }
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        if rpl(selector) != self.cpl || !d.is_writable() || d.dpl() != self.cpl {
            return Err(self.gp(selector_error(selector)));
        }
        if !d.is_present() {
            return Err(self.fault(vector::SS, Some(selector_error(selector))));
        }
        self.mark_accessed(&d)?;
        Ok(d.segment(selector))
    }

    fn check_data_segment(&mut self, selector: u16) -> X<Segment> {
        if is_null(selector) {
            // Intel: the base is cleared, also in 64-bit mode (AMD keeps it there).
            return Ok(null_segment(selector, 0));
        }
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        let outside = rpl(selector) > d.dpl() || self.cpl > d.dpl();
        if !d.is_readable() || !d.is_conforming() && outside {
            return Err(self.gp(selector_error(selector)));
        }
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(selector_error(selector))));
        }
        self.mark_accessed(&d)?;
        Ok(d.segment(selector))
    }

    /// A system segment (LDT or TSS) for LLDT and LTR: all checks but the type's.
    fn check_system_segment(&mut self, selector: u16, types: &[u32]) -> X<Option<(Descriptor, Segment)>> {
        if is_null(selector) {
            return Ok(None);
        }
        let error = selector_error(selector);
        if selector & 4 != 0 {
            return Err(self.gp(error));
        }
        let d = self.read_descriptor(selector, vector::GP, 0)?;
        if d.is_segment() || !types.contains(&d.kind()) {
            return Err(self.gp(error));
        }
        let mut segment = d.segment(selector);
        if self.mode == Mode::Long64 {
            match self.upper_half(&d, selector)? {
                Some(upper) if upper >> 40 & 0x1f == 0 => segment.base |= upper << 32,
                _ => return Err(self.gp(error)),
            }
            if !Self::canonical(segment.base) {
                return Err(self.gp(error));
            }
        }
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(error)));
        }
        Ok(Some((d, segment)))
    }

    /// #UD in real and virtual-8086 mode.
    fn need_protected(&mut self) -> X {
        if self.protected() {
            Ok(())
        } else {
            Err(self.ud())
        }
    }

    /// #GP(0) outside privilege level 0.
    pub fn need_cpl0(&mut self) -> X {
        if self.cpl == 0 {
            Ok(())
        } else {
            Err(self.gp(0))
        }
    }

    /// #GP(0) outside privilege level 0 if CR4.UMIP is set.
    fn check_umip(&mut self) -> X {
        if self.cpl > 0 && self.r.cr4 & cr4::UMIP != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn lldt(&mut self, i: &Instruction) -> X {
        self.need_protected()?;
        self.need_cpl0()?;
        let selector = self.read_operand(i, 0)? as u16;
        self.r.ldtr = match self.check_system_segment(selector, &[system_type::LDT])? {
            None => null_segment(selector, 0),
            Some((_, segment)) => segment,
        };
        Ok(())
    }

    fn ltr(&mut self, i: &Instruction) -> X {
        self.need_protected()?;
        self.need_cpl0()?;
        let selector = self.read_operand(i, 0)? as u16;
        let types: &[u32] =
            if self.lma() { &[system_type::TSS] } else { &[system_type::TSS, system_type::TSS16] };
        let Some((d, mut segment)) = self.check_system_segment(selector, types)? else {
            return Err(self.gp(0));
        };
        self.or_system_byte(d.address.wrapping_add(5), 2)?;
        segment.ar |= 2;
        self.r.tr = segment;
        Ok(())
    }

    // ---- MOV, PUSH, POP, far pointers -------------------------------------------------------

    fn mov_to_segment(&mut self, i: &Instruction) -> X {
        let segment = segment_number(i.op0_register());
        if segment == seg::CS {
            return Err(self.ud());
        }
        let selector = self.read_operand(i, 1)? as u16;
        self.load_segment(segment, selector)?;
        if segment == seg::SS {
            self.stack_segment_loaded();
        }
        Ok(())
    }

    /// The interrupt shadow of MOV SS and POP SS.
    fn stack_segment_loaded(&mut self) {
        self.shadow = shadow::MOV_SS;
        self.interrupts_changed();
    }

    fn mov_from_segment(&mut self, i: &Instruction) -> X {
        let selector = u64::from(self.r.seg[segment_number(i.op1_register())].selector);
        self.write_operand(i, 0, selector)
    }

    /// Operand size of a PUSH or POP of a segment register.
    fn segment_push_size(i: &Instruction) -> usize {
        match i.code() {
            Code::Pushw_ES | Code::Pushw_CS | Code::Pushw_SS | Code::Pushw_DS | Code::Pushw_FS => 2,
            Code::Pushw_GS | Code::Popw_ES | Code::Popw_SS | Code::Popw_DS | Code::Popw_FS => 2,
            Code::Popw_GS | Code::Popw_CS => 2,
            Code::Pushq_FS | Code::Pushq_GS | Code::Popq_FS | Code::Popq_GS => 8,
            _ => 4,
        }
    }

    /// PUSH of a segment register.
    pub(crate) fn push_segment(&mut self, i: &Instruction) -> X {
        let size = Self::segment_push_size(i);
        let selector = u64::from(self.r.seg[segment_number(i.op0_register())].selector);
        let sp = self.r.gpr[reg::RSP].wrapping_sub(size as u64) & self.stack_mask();
        if size == 4 {
            // Recent Intel processors write 16 bits and leave the rest of the slot (AMD's
            // write zeros).
            self.probe_store(seg::SS, sp, 4)?;
            self.store(seg::SS, sp, 2, selector)?;
        } else {
            self.store(seg::SS, sp, size, selector)?;
        }
        self.set_sp(sp);
        Ok(())
    }

    fn pop_segment(&mut self, i: &Instruction) -> X {
        let size = Self::segment_push_size(i);
        let segment = segment_number(i.op0_register());
        if segment == seg::CS {
            return Err(self.ud());
        }
        let stack = self.stack_in_use();
        let sp = stack.sp & stack.mask();
        let selector = self.load(seg::SS, sp, size)? as u16;
        self.load_segment(segment, selector)?;
        self.r.gpr[reg::RSP] = stack.merge(stack.sp, sp.wrapping_add(size as u64));
        if segment == seg::SS {
            self.stack_segment_loaded();
        }
        Ok(())
    }

    /// Reads a far pointer operand: (selector, offset).
    pub fn far_pointer(&mut self, i: &Instruction, size: usize) -> X<(u16, u64)> {
        let (segment, ea) = self.memory_operand(i);
        let after = ea.wrapping_add(size as u64) & mask(address_size(i));
        let offset = self.load(segment, ea, size)?;
        let selector = self.load(segment, after, 2)? as u16;
        Ok((selector, offset))
    }

    fn load_far(&mut self, i: &Instruction, segment: usize) -> X {
        if i.op1_kind() != OpKind::Memory {
            return Err(self.ud());
        }
        let register = i.op0_register();
        let (selector, offset) = self.far_pointer(i, register.size())?;
        self.load_segment(segment, selector)?;
        self.write_reg(register, offset);
        Ok(())
    }

    // ---- descriptor table registers ------------------------------------------------------------

    fn store_table(&mut self, i: &Instruction, table: TableRegister) -> X {
        self.check_umip()?;
        let (segment, ea) = self.memory_operand(i);
        let mut bytes = [0u8; 10];
        bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
        bytes[2..].copy_from_slice(&table.base.to_le_bytes());
        // With 16-bit operands, too, all 32 bits of the base are stored.
        let len = if self.mode == Mode::Long64 { 10 } else { 6 };
        self.store_bytes(segment, ea, &bytes[..len])
    }

    fn load_table(&mut self, i: &Instruction) -> X<TableRegister> {
        self.need_cpl0()?;
        let (segment, ea) = self.memory_operand(i);
        let long = self.mode == Mode::Long64;
        let mut bytes = [0u8; 10];
        self.load_bytes(segment, ea, &mut bytes[..if long { 10 } else { 6 }])?;
        let limit = u16::from_le_bytes([bytes[0], bytes[1]]);
        let mut base = 0;
        for (n, &byte) in bytes[2..].iter().enumerate() {
            base |= u64::from(byte) << (8 * n);
        }
        if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
            base &= 0xff_ffff;
        }
        if long && !Self::canonical(base) {
            return Err(self.gp(0));
        }
        Ok(TableRegister { base, limit })
    }

    /// SLDT, STR, SMSW: a register gets the whole value, memory 16 bits.
    fn store_word(&mut self, i: &Instruction, value: u64) -> X {
        match i.op0_kind() {
            OpKind::Register => {
                self.write_reg(i.op0_register(), value);
                Ok(())
            }
            _ => {
                let (segment, ea) = self.memory_operand(i);
                self.store(segment, ea, 2, value)
            }
        }
    }

    // ---- tests of selectors ------------------------------------------------------------------

    fn set_zf(&mut self, zf: bool) {
        self.r.flags = self.r.flags.with_zf(zf);
    }

    /// The descriptor that LAR, LSL, VERR and VERW look at, if there is one.
    fn selector_operand(&mut self, i: &Instruction, n: u32) -> X<Option<(u16, Descriptor)>> {
        self.need_protected()?;
        let selector = self.read_operand(i, n)? as u16;
        if is_null(selector) {
            return Ok(None);
        }
        Ok(self.find_descriptor(selector)?.map(|d| (selector, d)))
    }

    /// Whether LAR or LSL may see a descriptor.
    fn visible(&mut self, selector: u16, d: &Descriptor, legacy: u16, long: u16) -> X<bool> {
        if !d.is_segment() {
            let valid = if self.lma() { long } else { legacy };
            if valid >> d.kind() & 1 == 0 {
                return Ok(false);
            }
            if self.mode == Mode::Long64 {
                match self.upper_half(d, selector)? {
                    Some(upper) if upper >> 40 & 0x1f == 0 => {}
                    _ => return Ok(false),
                }
            }
        }
        Ok(d.is_conforming() || self.cpl <= d.dpl() && rpl(selector) <= d.dpl())
    }

    fn lar(&mut self, i: &Instruction) -> X {
        // Types 1-5, 9, 11, 12; in IA-32e mode 2, 9, 11, 12.
        let found = match self.selector_operand(i, 1)? {
            Some((selector, d)) if self.visible(selector, &d, 0x1a3e, 0x1a04)? => Some(d),
            _ => None,
        };
        if let Some(d) = found {
            // The manual leaves bits 19:16 undefined; CPUs give the limit's.
            self.write_reg(i.op0_register(), d.raw >> 32 & 0xff_ff00);
        }
        self.set_zf(found.is_some());
        Ok(())
    }

    fn lsl(&mut self, i: &Instruction) -> X {
        // Types 1-3, 9, 11; in IA-32e mode 2, 9, 11.
        let found = match self.selector_operand(i, 1)? {
            Some((selector, d)) if self.visible(selector, &d, 0x0a0e, 0x0a04)? => Some(d),
            _ => None,
        };
        if let Some(d) = found {
            self.write_reg(i.op0_register(), u64::from(d.limit()));
        }
        self.set_zf(found.is_some());
        Ok(())
    }

    fn verify(&mut self, i: &Instruction, write: bool) -> X {
        let ok = self.selector_operand(i, 0)?.is_some_and(|(selector, d)| {
            let allowed = if write { d.is_writable() } else { d.is_readable() };
            allowed && (d.is_conforming() || self.cpl <= d.dpl() && rpl(selector) <= d.dpl())
        });
        self.set_zf(ok);
        Ok(())
    }

    fn arpl(&mut self, i: &Instruction) -> X {
        self.need_protected()?;
        let source = self.read_reg(i.op1_register()) as u16;
        let (selector, memory) = match i.op0_kind() {
            OpKind::Register => (self.read_reg(i.op0_register()) as u16, None),
            _ => {
                let (segment, ea) = self.memory_operand(i);
                (self.load(segment, ea, 2)? as u16, Some((segment, ea)))
            }
        };
        let adjust = rpl(selector) < rpl(source);
        if adjust {
            let value = u64::from(selector & !3 | source & 3);
            match memory {
                Some((segment, ea)) => self.store(segment, ea, 2, value)?,
                None => {
                    let n = i.op0_register().full_register().number();
                    self.set_gpr(n, 2, value);
                }
            }
        }
        self.set_zf(adjust);
        Ok(())
    }

    /// The instructions of this file. `Ok(false)`: not one of them.
    pub(crate) fn execute_segments(&mut self, i: &Instruction) -> X<bool> {
        let register =
            |n: u32| if i.op_kind(n) == OpKind::Register { i.op_register(n) } else { Register::None };
        match i.mnemonic() {
            Mnemonic::Mov if register(0).is_segment_register() => self.mov_to_segment(i)?,
            Mnemonic::Mov if register(1).is_segment_register() => self.mov_from_segment(i)?,
            Mnemonic::Pop if register(0).is_segment_register() => self.pop_segment(i)?,
            Mnemonic::Lds => self.load_far(i, seg::DS)?,
            Mnemonic::Les => self.load_far(i, seg::ES)?,
            Mnemonic::Lfs => self.load_far(i, seg::FS)?,
            Mnemonic::Lgs => self.load_far(i, seg::GS)?,
            Mnemonic::Lss => self.load_far(i, seg::SS)?,
            Mnemonic::Sgdt => self.store_table(i, self.r.gdtr)?,
            Mnemonic::Sidt => self.store_table(i, self.r.idtr)?,
            Mnemonic::Lgdt => self.r.gdtr = self.load_table(i)?,
            Mnemonic::Lidt => self.r.idtr = self.load_table(i)?,
            Mnemonic::Lldt => self.lldt(i)?,
            Mnemonic::Ltr => self.ltr(i)?,
            Mnemonic::Sldt => {
                self.need_protected()?;
                self.check_umip()?;
                self.store_word(i, u64::from(self.r.ldtr.selector))?;
            }
            Mnemonic::Str => {
                self.need_protected()?;
                self.check_umip()?;
                self.store_word(i, u64::from(self.r.tr.selector))?;
            }
            Mnemonic::Smsw => {
                self.check_umip()?;
                self.store_word(i, self.r.cr0)?;
            }
            Mnemonic::Lar => self.lar(i)?,
            Mnemonic::Lsl => self.lsl(i)?,
            Mnemonic::Verr => self.verify(i, false)?,
            Mnemonic::Verw => self.verify(i, true)?,
            Mnemonic::Arpl => self.arpl(i)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}
