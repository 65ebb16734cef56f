//! The local APIC: xAPIC and x2APIC registers, the interrupt state machine and
//! the timer (one-shot, periodic, TSC-deadline). A pure object: time comes in
//! as nanoseconds of the machine's clock, effects go out as return values.
//!
//! Source: Intel SDM volume 3, chapter "Advanced Programmable Interrupt
//! Controller (APIC)".

mod addressing;
mod record;
mod timer;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use timer::Timer;

pub use addressing::Addressing;
pub use record::RECORD_LENGTH;

/// What a register write asks of the rest of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// An interrupt command to deliver to (other) local APICs.
    pub ipi: Option<Ipi>,
    /// A level-triggered interrupt of this vector ended: tell the IOAPIC.
    pub eoi: Option<u8>,
}

/// An interrupt command (ICR write).
///
/// Commands for this local APIC alone (the *self* shorthand, a physical
/// destination that is its own ID) with fixed delivery never become one: they
/// are accepted at once. Whoever carries the command to all matching local
/// APICs includes this one, unless the shorthand says *all excluding self*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Vector (or start page for a start-up IPI).
    pub vector: u8,
    /// Delivery mode, ICR bits 10:8.
    pub mode: u8,
    /// Destination shorthand, ICR bits 19:18 (0 none, 1 self, 2 all, 3 all others).
    pub shorthand: u8,
    /// Logical destination mode.
    pub logical: bool,
    /// Level-triggered.
    pub level: bool,
    /// Assert (true) or de-assert.
    pub assert: bool,
    /// Destination APIC ID.
    pub destination: u32,
}

/// The access raises #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// Bits of IA32_APIC_BASE.
pub mod apic_base {
    /// Bootstrap processor.
    pub const BSP: u64 = 1 << 8;
    /// x2APIC mode.
    pub const EXTD: u64 = 1 << 10;
    /// Enabled.
    pub const EN: u64 = 1 << 11;
    /// Physical address bits that may be set (40-bit physical addresses).
    pub const ADDRESS: u64 = ((1 << 40) - 1) & !0xfff;
}

/// Version register: version 0x14, seven LVT entries.
const VERSION: u32 = 0x0006_0014;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_WRITABLE: u32 = 0x3ff;
const LVT_MASKED: u32 = 1 << 16;
const LVT_MODE_SHIFT: u32 = 8;
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_REGISTER: u32 = 1 << 7;

/// Indices into the local vector table, in the order of the xAPIC registers 0x2f0,
/// 0x320 (timer), 0x330 (thermal), 0x340 (performance), 0x350, 0x360, 0x370.
pub(crate) mod lvt {
    pub const CMCI: usize = 0;
    pub const TIMER: usize = 1;
    pub const LINT0: usize = 4;
    pub const ERROR: usize = 6;
    pub const COUNT: usize = 7;
    /// Writable bits of each entry.
    pub const WRITABLE: [u32; COUNT] = [0x107ff, 0x700ff, 0x107ff, 0x107ff, 0x1a7ff, 0x1a7ff, 0x100ff];
}

/// Delivery modes.
mod delivery {
    pub const FIXED: u32 = 0;
    pub const LOWEST: u32 = 1;
    pub const NMI: u32 = 4;
    pub const INIT: u32 = 5;
    pub const EXTINT: u32 = 7;
}

/// A set of the 256 vectors.
type Vectors = [u64; 4];

fn highest(set: &Vectors) -> Option<u8> {
    (0..4).rev().find(|&i| set[i] != 0).map(|i| (i as u32 * 64 + 63 - set[i].leading_zeros()) as u8)
}

fn bit(set: &Vectors, vector: u8) -> bool {
    set[vector as usize >> 6] >> (vector & 63) & 1 != 0
}

fn assign(set: &mut Vectors, vector: u8, value: bool) {
    let word = &mut set[vector as usize >> 6];
    *word = *word & !(1 << (vector & 63)) | (value as u64) << (vector & 63);
}

/// One local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    id: u32,
    base: u64,
    tpr: u32,
    ldr: u32,
    dfr: u32,
    svr: u32,
    /// What reads of the ESR return: the errors up to its last write.
    esr: u32,
    /// The errors since.
    errors: u32,
    icr: u64,
    lvt: [u32; lvt::COUNT],
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    timer: Timer,
    /// Level of the LINT0 and LINT1 pins.
    lint: [bool; 2],
    /// What other threads may ask: whom this APIC takes messages for.
    addressing: Arc<Addressing>,
    /// Highest deliverable vector; kept up to date by [`Lapic::update`].
    deliverable: Option<u8>,
}

impl Lapic {
    /// A local APIC after power-up; `tsc_khz` relates TSC deadlines to nanoseconds,
    /// `bus_hz` is the timer's input clock. ID 0 is the bootstrap processor.
    pub fn new(id: u32, tsc_khz: u64, bus_hz: u64) -> Self {
        let mut lapic = Lapic {
            id,
            base: 0xfee0_0000 | apic_base::EN | if id == 0 { apic_base::BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: 0,
            svr: 0,
            esr: 0,
            errors: 0,
            icr: 0,
            lvt: [0; lvt::COUNT],
            irr: [0; 4],
            isr: [0; 4],
            tmr: [0; 4],
            timer: Timer::new(tsc_khz, bus_hz),
            lint: [false; 2],
            addressing: Arc::new(Addressing::new(id)),
            deliverable: None,
        };
        lapic.reset();
        lapic
    }

    /// INIT reset: all registers but the ID and IA32_APIC_BASE.
    pub fn reset(&mut self) {
        self.tpr = 0;
        self.ldr = if self.x2apic() { self.x2apic_ldr() } else { 0 };
        self.dfr = u32::MAX;
        self.svr = 0xff;
        self.esr = 0;
        self.errors = 0;
        self.icr = 0;
        self.lvt = [LVT_MASKED; lvt::COUNT];
        self.irr = [0; 4];
        self.isr = [0; 4];
        self.tmr = [0; 4];
        self.timer.reset();
        self.update();
        self.publish();
    }

    /// The APIC ID.
    pub fn id(&self) -> u32 {
        self.id
    }

    fn enabled(&self) -> bool {
        self.base & apic_base::EN != 0
    }

    /// Whether the x2APIC mode is on.
    pub fn x2apic(&self) -> bool {
        self.base & (apic_base::EN | apic_base::EXTD) == apic_base::EN | apic_base::EXTD
    }

    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 15)
    }

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Writes IA32_APIC_BASE (SDM 3, "x2APIC State Transitions").
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> {
        use apic_base::{ADDRESS, BSP, EN, EXTD};
        if value & !(ADDRESS | BSP | EN | EXTD) != 0 {
            return Err(GeneralProtection);
        }
        let (from, to) = (self.base & (EN | EXTD), value & (EN | EXTD));
        let allowed = match to {
            0 => true,
            EN => from != EN | EXTD,
            EXTD => false,
            _ => from != 0,
        };
        if !allowed {
            return Err(GeneralProtection);
        }
        self.base = value;
        if to != from {
            if to == EN | EXTD {
                self.ldr = self.x2apic_ldr();
                self.icr &= 0xffff_ffff;
            } else {
                self.reset();
            }
        }
        self.update();
        self.publish();
        Ok(())
    }

    /// Guest-physical page of the xAPIC registers, if they are enabled there.
    pub fn mmio_page(&self) -> Option<u64> {
        (self.enabled() && !self.x2apic()).then_some(self.base & apic_base::ADDRESS)
    }

    /// Reads a 32-bit xAPIC register; `offset` is relative to the page.
    pub fn mmio_read(&mut self, offset: u32, now_ns: u64) -> u32 {
        self.advance(now_ns);
        if offset & 0xf != 0 {
            return 0;
        }
        match offset {
            0x020 => self.id << 24,
            0x090 | 0x0b0 | 0x0c0 => 0,
            0x0e0 => self.dfr,
            0x310 => (self.icr >> 32) as u32,
            _ => match self.read(offset >> 4, now_ns) {
                Some(value) => value,
                None => {
                    self.error(ESR_REGISTER);
                    0
                }
            },
        }
    }

    /// The registers that xAPIC and x2APIC mode read alike, by number (offset / 16).
    fn read(&self, number: u32, now_ns: u64) -> Option<u32> {
        let vectors = |set: &Vectors| (set[(number & 7) as usize >> 1] >> ((number & 1) * 32)) as u32;
        Some(match number {
            0x03 => VERSION,
            0x08 => self.tpr,
            0x0a => self.ppr(),
            0x0d => self.ldr,
            0x0f => self.svr,
            0x10..=0x17 => vectors(&self.isr),
            0x18..=0x1f => vectors(&self.tmr),
            0x20..=0x27 => vectors(&self.irr),
            0x28 => self.esr,
            0x2f => self.lvt[lvt::CMCI],
            0x30 => self.icr as u32,
            0x32..=0x37 => self.lvt[(number - 0x32) as usize + lvt::TIMER],
            0x38 => self.timer.initial(),
            0x39 => self.timer.current(now_ns),
            0x3e => self.timer.divide_register(),
            _ => return None,
        })
    }

    /// Writes a 32-bit xAPIC register; `offset` is relative to the page.
    pub fn mmio_write(&mut self, offset: u32, value: u32, now_ns: u64) -> Effects {
        self.advance(now_ns);
        let mut effects = Effects::default();
        if offset & 0xf != 0 {
            return effects;
        }
        match offset {
            0x080 => self.set_tpr(value & 0xff),
            0x0b0 => effects.eoi = self.end_of_interrupt(),
            0x0d0 => {
                self.ldr = value & 0xff00_0000;
                self.publish();
            }
            0x0e0 => {
                self.dfr = value | 0x0fff_ffff;
                self.publish();
            }
            0x0f0 => self.set_svr(value & SVR_WRITABLE),
            0x280 => self.latch_errors(),
            0x300 => {
                self.icr = self.icr & !0xffff_ffff | (value & 0x000c_cfff) as u64;
                effects.ipi = self.command((self.icr >> 56) as u32);
            }
            0x310 => self.icr = self.icr & 0xffff_ffff | ((value & 0xff00_0000) as u64) << 32,
            0x2f0 => self.set_lvt(lvt::CMCI, value),
            0x320..=0x370 => self.set_lvt((offset as usize - 0x320) / 16 + lvt::TIMER, value),
            0x380 => self.timer.set_initial(value, now_ns),
            0x3e0 => self.timer.set_divide(value & 0xb, now_ns),
            // Read-only: writes are ignored.
            0x020 | 0x030 | 0x090..=0x0a0 | 0x0c0 | 0x100..=0x270 | 0x390 => {}
            _ => self.error(ESR_REGISTER),
        }
        effects
    }

    /// Reads an MSR of the x2APIC block (0x800..=0x8ff) or IA32_TSC_DEADLINE (0x6e0).
    pub fn msr_read(&mut self, msr: u32, now_ns: u64) -> Result<u64, GeneralProtection> {
        self.advance(now_ns);
        if msr == 0x6e0 {
            return Ok(self.timer.tsc_deadline());
        }
        if !self.x2apic() {
            return Err(GeneralProtection);
        }
        match msr {
            0x802 => Ok(self.id as u64),
            0x830 => Ok(self.icr),
            _ => self.read(msr.wrapping_sub(0x800), now_ns).map(u64::from).ok_or(GeneralProtection),
        }
    }

    /// Writes such an MSR.
    pub fn msr_write(&mut self, msr: u32, value: u64, now_ns: u64) -> Result<Effects, GeneralProtection> {
        self.advance(now_ns);
        let mut effects = Effects::default();
        if msr == 0x6e0 {
            self.timer.set_tsc_deadline(value);
            return Ok(effects);
        }
        if !self.x2apic() {
            return Err(GeneralProtection);
        }
        let check =
            |writable: u64| if value & !writable == 0 { Ok(value as u32) } else { Err(GeneralProtection) };
        match msr {
            0x808 => self.set_tpr(check(0xff)?),
            0x80b => {
                check(0)?;
                effects.eoi = self.end_of_interrupt();
            }
            0x80f => self.set_svr(check(SVR_WRITABLE as u64)?),
            0x828 => {
                check(0)?;
                self.latch_errors();
            }
            0x82f => self.set_lvt(lvt::CMCI, check(lvt::WRITABLE[lvt::CMCI] as u64 | 1 << 12)?),
            0x830 => {
                check(0xffff_ffff_000c_dfff)?;
                self.icr = value & !(1 << 12);
                effects.ipi = self.command((value >> 32) as u32);
            }
            0x832..=0x837 => {
                let index = (msr - 0x832) as usize + lvt::TIMER;
                // Delivery status and remote IRR are read-only, not reserved.
                self.set_lvt(index, check(lvt::WRITABLE[index] as u64 | 1 << 12 | 1 << 14)?);
            }
            0x838 => self.timer.set_initial(check(0xffff_ffff)?, now_ns),
            0x83e => self.timer.set_divide(check(0xb)?, now_ns),
            0x83f => {
                let vector = check(0xff)? as u8;
                if vector < 16 {
                    self.error(ESR_SEND_ILLEGAL);
                } else {
                    self.accept(vector, false);
                }
            }
            _ => return Err(GeneralProtection),
        }
        Ok(effects)
    }

    /// CR8.
    pub fn cr8(&self) -> u64 {
        (self.tpr >> 4) as u64
    }

    /// Writes CR8 (0..=15, checked by the caller).
    pub fn set_cr8(&mut self, value: u64) {
        self.set_tpr((value as u32 & 15) << 4);
    }

    /// Accepts a fixed or lowest-priority interrupt into the IRR. A disabled
    /// APIC ignores it.
    pub fn accept(&mut self, vector: u8, level: bool) {
        if !self.enabled() || !self.software_enabled() {
            return;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL);
            return;
        }
        assign(&mut self.irr, vector, true);
        assign(&mut self.tmr, vector, level);
        self.update();
    }

    /// Whether a message to this destination is for this APIC.
    pub fn matches(&self, destination: u32, logical: bool) -> bool {
        self.addressing.matches(destination, logical)
    }

    /// The same question for other threads, which need no lock for it.
    pub fn addressing(&self) -> Arc<Addressing> {
        self.addressing.clone()
    }

    pub(crate) fn publish(&self) {
        self.addressing.publish(self.enabled(), self.x2apic(), self.ldr, self.dfr);
    }

    /// The vector that would be delivered now (above the processor priority).
    #[inline]
    pub fn pending(&self) -> Option<u8> {
        self.deliverable
    }

    /// Moves the pending vector from IRR to ISR and returns it.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.deliverable?;
        assign(&mut self.irr, vector, false);
        assign(&mut self.isr, vector, true);
        self.update();
        Some(vector)
    }

    /// Whether LINT0 is in ExtINT mode and unmasked (or the APIC is disabled):
    /// PIC interrupts reach the vCPU.
    pub fn accepts_pic(&self) -> bool {
        let entry = self.lvt[lvt::LINT0];
        !self.enabled() || (entry & LVT_MASKED == 0 && entry >> LVT_MODE_SHIFT & 7 == delivery::EXTINT)
    }

    /// Drives the LINT0 (`pin` 0) or LINT1 pin for the entries with fixed
    /// delivery (on a rising edge) or NMI; true if the vCPU gets an NMI. ExtINT
    /// is [`Lapic::accepts_pic`]'s. A disabled APIC has INTR and NMI pins instead.
    pub fn set_lint(&mut self, pin: usize, asserted: bool) -> bool {
        let rising = asserted && !self.lint[pin];
        self.lint[pin] = asserted;
        if !rising {
            return false;
        }
        if !self.enabled() {
            return pin == 1;
        }
        let entry = self.lvt[lvt::LINT0 + pin];
        if entry & LVT_MASKED != 0 {
            return false;
        }
        match entry >> LVT_MODE_SHIFT & 7 {
            delivery::FIXED => self.accept(entry as u8, false),
            delivery::NMI => return true,
            _ => {}
        }
        false
    }

    /// When the timer fires next, in ns; None if it is not armed or masked.
    #[inline]
    pub fn deadline(&self) -> Option<u64> {
        if self.lvt[lvt::TIMER] & LVT_MASKED != 0 {
            return None;
        }
        self.timer.deadline()
    }

    /// Lets time pass: raises the timer's interrupt if it is due.
    pub fn advance(&mut self, now_ns: u64) {
        if self.timer.advance(now_ns) && self.lvt[lvt::TIMER] & LVT_MASKED == 0 {
            self.accept(self.lvt[lvt::TIMER] as u8, false);
        }
    }

    /// The guest's TSC is the machine's plus `offset` (IA32_TSC writes,
    /// IA32_TSC_ADJUST): TSC deadlines are in guest TSC.
    pub fn set_tsc_offset(&mut self, offset: i64) {
        self.timer.set_tsc_offset(offset);
    }

    /// Processor priority.
    fn ppr(&self) -> u32 {
        let in_service = highest(&self.isr).unwrap_or(0) as u32;
        if self.tpr >> 4 >= in_service >> 4 {
            self.tpr
        } else {
            in_service & 0xf0
        }
    }

    fn update(&mut self) {
        self.deliverable = match highest(&self.irr) {
            Some(vector) if self.enabled() && (vector >> 4) as u32 > self.ppr() >> 4 => Some(vector),
            _ => None,
        };
    }

    fn set_tpr(&mut self, value: u32) {
        self.tpr = value;
        self.update();
    }

    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = highest(&self.isr)?;
        assign(&mut self.isr, vector, false);
        self.update();
        bit(&self.tmr, vector).then_some(vector)
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value;
        if !self.software_enabled() {
            for entry in &mut self.lvt {
                *entry |= LVT_MASKED;
            }
        }
    }

    fn set_lvt(&mut self, index: usize, value: u32) {
        let mut value = value & lvt::WRITABLE[index];
        if !self.software_enabled() {
            value |= LVT_MASKED;
        }
        self.lvt[index] = value;
        if index == lvt::TIMER {
            self.timer.set_mode(value >> 17 & 3);
        }
    }

    fn latch_errors(&mut self) {
        self.esr = self.errors;
        self.errors = 0;
    }

    fn error(&mut self, error: u32) {
        let fresh = self.errors & error == 0;
        self.errors |= error;
        let entry = self.lvt[lvt::ERROR];
        if !fresh || entry & LVT_MASKED != 0 {
            return;
        }
        if entry & 0xff < 16 {
            self.errors |= ESR_RECEIVE_ILLEGAL;
        } else {
            self.accept(entry as u8, false);
        }
    }

    /// Carries out the command in the ICR; returns it if others take part.
    fn command(&mut self, destination: u32) -> Option<Ipi> {
        let icr = self.icr as u32;
        let ipi = Ipi {
            vector: icr as u8,
            mode: (icr >> 8 & 7) as u8,
            logical: icr >> 11 & 1 != 0,
            assert: icr >> 14 & 1 != 0,
            level: icr >> 15 & 1 != 0,
            shorthand: (icr >> 18 & 3) as u8,
            destination,
        };
        let mode = ipi.mode as u32;
        if matches!(mode, delivery::FIXED | delivery::LOWEST) && ipi.vector < 16 {
            self.error(ESR_SEND_ILLEGAL);
            return None;
        }
        if ipi.shorthand == 1 {
            // Other modes than fixed are invalid with "self".
            if mode == delivery::FIXED {
                self.accept(ipi.vector, false);
            }
            return None;
        }
        if mode == delivery::INIT && ipi.level && !ipi.assert {
            // INIT level de-assert does nothing since the Pentium 4.
            return None;
        }
        let broadcast = if self.x2apic() { u32::MAX } else { 0xff };
        let own = ipi.shorthand == 0 && !ipi.logical && destination == self.id && destination != broadcast;
        if own && matches!(mode, delivery::FIXED | delivery::LOWEST) {
            self.accept(ipi.vector, false);
            return None;
        }
        Some(ipi)
    }
}
