//! Control registers, XCR0 and the instructions that flush translations
//! (SDM 3A, 2.5, 4.1, 4.10 and 10.8.5; SDM 2, "MOV—Move to/from Control Registers").

use crate::audit::Invalidated;
use crate::cpu::Cpu;
use crate::descriptors::system_type;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic, OpKind};
use nonroot_memory::PHYS_BITS;

/// CR0 bits that exist.
const CR0_BITS: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;

/// CR4 bits that change what cached translations mean.
const CR4_PAGING: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP;
/// CR4 bits whose change reloads the PAE page-directory-pointer entries.
const CR4_PDPTE: u64 = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP;
/// CR3 bit 63 of a MOV with CR4.PCIDE: keep the translations of the new PCID.
const CR3_KEEP: u64 = 1 << 63;

impl Cpu {
    /// Whether 32-bit PAE paging is in force with these control registers.
    fn pae_paging(&self, cr0: u64, cr4: u64, efer: u64) -> bool {
        cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && efer & efer::LMA == 0
    }

    /// Writes CR0 with all checks.
    pub fn write_cr0(&mut self, value: u64) -> X {
        if value >> 32 != 0 {
            return Err(self.gp(0));
        }
        // Reserved bits are ignored, ET is always set.
        let value = value & CR0_BITS | cr0::ET;
        let old = self.r.cr0;
        let changed = value ^ old;
        if value & (cr0::PG | cr0::PE) == cr0::PG || value & (cr0::NW | cr0::CD) == cr0::NW {
            return Err(self.gp(0));
        }
        let mut efer = self.r.efer;
        if changed & cr0::PG != 0 {
            if value & cr0::PG != 0 {
                if efer & efer::LME != 0 {
                    let tss16 =
                        matches!(self.r.tr.ar & ar::TYPE, system_type::TSS16 | system_type::TSS16_BUSY);
                    let long_code = self.r.seg[seg::CS].ar & ar::L != 0;
                    if self.r.cr4 & cr4::PAE == 0 || long_code || tss16 {
                        return Err(self.gp(0));
                    }
                    efer |= efer::LMA;
                }
            } else {
                if self.mode == Mode::Long64 || self.r.cr4 & cr4::PCIDE != 0 {
                    return Err(self.gp(0));
                }
                efer &= !efer::LMA;
            }
        }
        if changed & (cr0::PG | cr0::CD | cr0::NW) != 0 && self.pae_paging(value, self.r.cr4, efer) {
            self.load_pdptes(self.r.cr3)?;
        }
        self.r.cr0 = value;
        self.r.efer = efer;
        self.update_mode();
        if changed & (cr0::PG | cr0::WP) != 0 {
            self.flush_tlb_all();
        }
        Ok(())
    }

    /// Writes CR3 with all checks.
    pub fn write_cr3(&mut self, value: u64) -> X {
        let pcide = self.r.cr4 & cr4::PCIDE != 0;
        let keep = pcide && value & CR3_KEEP != 0;
        let value = if pcide { value & !CR3_KEEP } else { value };
        if value >> PHYS_BITS != 0 {
            return Err(self.gp(0));
        }
        if self.pae_paging(self.r.cr0, self.r.cr4, self.r.efer) {
            self.load_pdptes(value)?;
        }
        self.r.cr3 = value;
        if !keep {
            self.audit_invalidated(Invalidated::Pcid(self.current_pcid()));
        }
        self.tlb_switch(keep);
        self.audit_now();
        Ok(())
    }

    /// Writes CR4 with all checks.
    pub fn write_cr4(&mut self, value: u64) -> X {
        let changed = value ^ self.r.cr4;
        if value & !self.features.cr4 != 0 || self.lma() && value & cr4::PAE == 0 {
            return Err(self.gp(0));
        }
        if changed & value & cr4::PCIDE != 0 && (!self.lma() || self.r.cr3 & 0xfff != 0) {
            return Err(self.gp(0));
        }
        if changed & CR4_PDPTE != 0 && self.pae_paging(self.r.cr0, value, self.r.efer) {
            self.load_pdptes(self.r.cr3)?;
        }
        self.r.cr4 = value;
        self.update_mode();
        if changed & CR4_PAGING != 0 {
            self.flush_tlb_all();
        }
        if changed & cr4::DE != 0 {
            self.interrupts_changed();
        }
        Ok(())
    }

    /// Writes CR8: the task priority.
    pub fn write_cr8(&mut self, value: u64) -> X {
        if value > 15 {
            return Err(self.gp(0));
        }
        self.lapic.set_cr8(value);
        self.interrupts_changed();
        Ok(())
    }

    fn mov_to_control(&mut self, number: usize, value: u64) -> X {
        match number {
            0 => self.write_cr0(value)?,
            2 => self.r.cr2 = value,
            3 => self.write_cr3(value)?,
            4 => self.write_cr4(value)?,
            8 => self.write_cr8(value)?,
            _ => return Err(self.ud()),
        }
        self.control_register_written(number, value)
    }

    /// The exit of an intercepted write, which is complete.
    fn control_register_written(&mut self, number: usize, value: u64) -> X {
        if self.config.cr_exits && number != 2 {
            return Err(self.exit_after(Exit::CrWrite { register: number as u8, value }));
        }
        Ok(())
    }

    fn mov_control(&mut self, i: &Instruction) -> X {
        let (to, from) = (i.op0_register(), i.op1_register());
        let number = if to.is_cr() { to.number() } else { from.number() };
        if !(matches!(number, 0 | 2 | 3 | 4) || number == 8 && self.long64()) {
            return Err(self.ud());
        }
        self.need_cpl0()?;
        if to.is_cr() {
            let value = self.read_reg(from);
            return self.mov_to_control(number, value);
        }
        let value = match number {
            0 => self.r.cr0,
            2 => self.r.cr2,
            3 => self.r.cr3,
            4 => self.r.cr4,
            _ => self.lapic.cr8(),
        };
        self.write_reg(to, value);
        Ok(())
    }

    fn lmsw(&mut self, i: &Instruction) -> X {
        self.need_cpl0()?;
        let value = self.read_operand(i, 0)?;
        // LMSW sets PE but never clears it.
        let low = cr0::MP | cr0::EM | cr0::TS;
        let value = self.r.cr0 & !low | value & (low | cr0::PE);
        self.write_cr0(value)?;
        self.control_register_written(0, value)
    }

    fn clts(&mut self) -> X {
        self.need_cpl0()?;
        self.r.cr0 &= !cr0::TS;
        self.control_register_written(0, self.r.cr0)
    }

    // ---- XCR0 ------------------------------------------------------------------------------------

    fn xsetbv(&mut self) -> X {
        if self.r.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.ud());
        }
        self.need_cpl0()?;
        let value = self.r.gpr[reg::RDX] << 32 | self.r.gpr[reg::RAX] & 0xffff_ffff;
        let index = self.r.gpr[reg::RCX] as u32;
        let avx_without_sse = value & 6 == 4;
        if index != 0 || value & 1 == 0 || avx_without_sse || value & !self.features.xcr0 != 0 {
            return Err(self.gp(0));
        }
        self.r.xcr0 = value;
        Ok(())
    }

    fn xgetbv(&mut self) -> X {
        if self.r.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.ud());
        }
        let value = match self.r.gpr[reg::RCX] as u32 {
            0 => self.r.xcr0,
            1 if self.features.xgetbv1 => {
                // MXCSR counts for the SSE component here.
                let mut used = nonroot_native::xstate::in_use(&self.fpu);
                if self.fpu.mxcsr != 0x1f80 {
                    used |= 2;
                }
                self.r.xcr0 & used
            }
            _ => return Err(self.gp(0)),
        };
        self.r.gpr[reg::RAX] = value & 0xffff_ffff;
        self.r.gpr[reg::RDX] = value >> 32;
        Ok(())
    }

    // ---- translations ----------------------------------------------------------------------------

    fn invlpg(&mut self, i: &Instruction) -> X {
        self.need_cpl0()?;
        let (segment, ea) = self.memory_operand(i);
        let base = if self.long64() && segment < seg::FS { 0 } else { self.r.seg[segment].base };
        let lin = self.wrap_linear(base.wrapping_add(ea));
        // A non-canonical address does nothing.
        if !self.lma() || Self::canonical(lin) {
            self.audit_invalidated(Invalidated::Address(self.current_pcid(), lin, true));
            self.flush_tlb_page(lin);
            self.audit_page(lin);
        }
        Ok(())
    }

    fn invpcid(&mut self, i: &Instruction) -> X {
        if !self.features.invpcid {
            return Err(self.ud());
        }
        self.need_cpl0()?;
        let kind = self.read_reg(i.op0_register());
        let (segment, ea) = self.memory_operand(i);
        let mut bytes = [0u8; 16];
        self.load_bytes(segment, ea, &mut bytes)?;
        let whole = u128::from_le_bytes(bytes);
        let (pcid, lin) = (whole as u64, (whole >> 64) as u64);
        if kind > 3 || pcid >> 12 != 0 {
            return Err(self.gp(0));
        }
        if kind < 2 && self.r.cr4 & cr4::PCIDE == 0 && pcid != 0 {
            return Err(self.gp(0));
        }
        match kind {
            0 => {
                if !Self::canonical(lin) {
                    return Err(self.gp(0));
                }
                self.audit_invalidated(Invalidated::Address(pcid, lin, false));
                if pcid == self.current_pcid() {
                    self.flush_tlb_page(lin);
                } else {
                    self.flush_tlb_pcid(pcid);
                }
                self.audit_page(lin);
            }
            1 => {
                self.audit_invalidated(Invalidated::Pcid(pcid));
                self.flush_tlb_pcid(pcid);
            }
            2 => self.flush_tlb_all(),
            _ => {
                self.audit_invalidated(Invalidated::NotGlobal);
                self.flush_tlb_all();
            }
        }
        self.audit_now();
        Ok(())
    }

    /// The instructions of this file. `Ok(false)`: not one of them.
    pub(crate) fn execute_control(&mut self, i: &Instruction) -> X<bool> {
        match i.mnemonic() {
            Mnemonic::Mov
                if i.op0_kind() == OpKind::Register
                    && i.op1_kind() == OpKind::Register
                    && (i.op0_register().is_cr() || i.op1_register().is_cr()) =>
            {
                self.mov_control(i)?;
            }
            Mnemonic::Lmsw => self.lmsw(i)?,
            Mnemonic::Clts => self.clts()?,
            Mnemonic::Xsetbv => self.xsetbv()?,
            Mnemonic::Xgetbv => self.xgetbv()?,
            Mnemonic::Invlpg => self.invlpg(i)?,
            Mnemonic::Invpcid => self.invpcid(i)?,
            Mnemonic::Invd | Mnemonic::Wbinvd | Mnemonic::Wbnoinvd => self.need_cpl0()?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}
