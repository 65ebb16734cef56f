//! Where the system instructions are dispatched, and reset, INIT and SIPI.

use crate::cpu::Cpu;
use crate::cpuid::Features;
use crate::debug::dr7;
use crate::msr::Msrs;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic};
use nonroot_native::VectorState;

impl Cpu {
    /// Executes a system instruction; `rip` and `next_rip` are set. `Ok(false)`:
    /// it is none.
    pub fn execute_system(&mut self, i: &Instruction) -> X<bool> {
        match i.mnemonic() {
            Mnemonic::Rdmsr => self.rdmsr()?,
            Mnemonic::Wrmsr => self.wrmsr()?,
            Mnemonic::Cpuid => self.execute_cpuid(),
            _ => {
                return Ok(self.execute_syscall(i)?
                    || self.execute_segments(i)?
                    || self.execute_iret(i)?
                    || self.execute_interrupts(i)?
                    || self.execute_control(i)?
                    || self.execute_debug(i)?
                    || self.execute_far(i)?);
            }
        }
        Ok(true)
    }

    /// Power-on reset: everything but time and what the caller has asked for.
    pub fn reset(&mut self) {
        self.features = Features::new(&self.config);
        self.fpu = VectorState::default();
        self.msr = Msrs::new(&self.config);
        // Through the disabled state, as the x2APIC mode has no other way back.
        let bsp = if self.config.apic_id == 0 { 1 << 8 } else { 0 };
        for base in [0xfee0_0000 | bsp, 0xfee0_0800 | bsp] {
            let accepted = self.lapic.set_base(base);
            debug_assert!(accepted.is_ok());
        }
        self.reset_registers(0x6000_0010, 1);
        self.tsc_offset_changed();
        self.lapic_base_changed();
        // The processor with ID 0 starts, the others wait for it.
        self.activity = if self.config.apic_id == 0 { Activity::Running } else { Activity::WaitForSipi };
    }

    /// INIT: the architectural registers as after reset, but for the x87 and vector
    /// registers, MSRs, XCR0, CR0.CD and NW (SDM 3A, table 10-1).
    pub fn init(&mut self) {
        let cr0 = self.r.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        self.reset_registers(cr0, self.r.xcr0);
        self.lapic.reset();
        self.activity =
            if self.lapic.base() & 1 << 8 != 0 { Activity::Running } else { Activity::WaitForSipi };
        self.interrupts_changed();
    }

    /// A start-up IPI: starts at `page << 12` if the vCPU waits for one.
    pub fn sipi(&mut self, page: u8) {
        if self.activity != Activity::WaitForSipi {
            return;
        }
        let cs = &mut self.r.seg[seg::CS];
        cs.selector = u16::from(page) << 8;
        cs.base = u64::from(page) << 12;
        self.r.rip = 0;
        self.activity = Activity::Running;
        self.update_mode();
        self.interrupts_changed();
    }

    fn reset_registers(&mut self, cr0: u64, xcr0: u64) {
        self.r = Registers { cr0, xcr0, dr7: dr7::FIXED, ..Registers::default() };
        let signature = self.cpuid(1, 0)[0];
        if signature != 0 {
            self.r.gpr[reg::RDX] = u64::from(signature);
        }
        self.cpl = 0;
        self.next_rip = self.r.rip;
        self.stop = None;
        self.pending_db = 0;
        self.shadow = 0;
        self.nmi_blocked = false;
        self.nmi_pending = false;
        self.pending_event = None;
        self.injected = None;
        self.pic_vector = None;
        self.reply = None;
        self.mmio.clear();
        self.update_mode();
        self.flush_tlb_all();
        self.interrupts_changed();
    }
}
