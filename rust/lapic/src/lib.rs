//! The local APIC: xAPIC and x2APIC registers, the interrupt state machine and
//! the timer (one-shot, periodic, TSC-deadline). A pure object: time comes in
//! as nanoseconds of the machine's clock, effects go out as return values.

/// What a register write asks of the rest of the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// An interrupt command to deliver to (other) local APICs.
    pub ipi: Option<Ipi>,
    /// A level-triggered interrupt of this vector ended: tell the IOAPIC.
    pub eoi: Option<u8>,
}

/// An interrupt command (ICR write).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Vector (or start page for a start-up IPI).
    pub vector: u8,
    /// Delivery mode, ICR bits 10:8.
    pub mode: u8,
    /// Destination shorthand, ICR bits 19:18.
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

/// One local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    id: u32,
}

impl Lapic {
    /// A local APIC after reset; `tsc_khz` relates TSC deadlines to nanoseconds,
    /// `bus_hz` is the timer's input clock.
    pub fn new(id: u32, tsc_khz: u64, bus_hz: u64) -> Self {
        let _ = (tsc_khz, bus_hz);
        Lapic { id }
    }
    /// INIT or power-up reset.
    pub fn reset(&mut self) {}
    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 { 0xfee0_0900 }
    /// Writes IA32_APIC_BASE.
    pub fn set_base(&mut self, value: u64) -> Result<(), GeneralProtection> { let _ = value; Ok(()) }
    /// Guest-physical page of the xAPIC registers, if they are enabled there.
    pub fn mmio_page(&self) -> Option<u64> { Some(0xfee0_0000) }
    /// Reads a 32-bit xAPIC register.
    pub fn mmio_read(&mut self, offset: u32, now_ns: u64) -> u32 { let _ = (offset, now_ns); self.id }
    /// Writes a 32-bit xAPIC register.
    pub fn mmio_write(&mut self, offset: u32, value: u32, now_ns: u64) -> Effects { let _ = (offset, value, now_ns); Effects::default() }
    /// Reads an MSR of the x2APIC block (0x800..=0x8ff) or IA32_TSC_DEADLINE (0x6e0).
    pub fn msr_read(&mut self, msr: u32, now_ns: u64) -> Result<u64, GeneralProtection> { let _ = (msr, now_ns); Ok(0) }
    /// Writes such an MSR.
    pub fn msr_write(&mut self, msr: u32, value: u64, now_ns: u64) -> Result<Effects, GeneralProtection> { let _ = (msr, value, now_ns); Ok(Effects::default()) }
    /// CR8.
    pub fn cr8(&self) -> u64 { 0 }
    /// Writes CR8 (0..=15, checked by the caller).
    pub fn set_cr8(&mut self, value: u64) { let _ = value; }
    /// Accepts a fixed or lowest-priority interrupt into the IRR.
    pub fn accept(&mut self, vector: u8, level: bool) { let _ = (vector, level); }
    /// Whether a message to this destination is for this APIC.
    pub fn matches(&self, destination: u32, logical: bool) -> bool { let _ = logical; destination == self.id }
    /// The vector that would be delivered now (above the processor priority).
    pub fn pending(&self) -> Option<u8> { None }
    /// Moves the pending vector from IRR to ISR and returns it.
    pub fn acknowledge(&mut self) -> Option<u8> { None }
    /// Whether LINT0 is in ExtINT mode and unmasked (or the APIC is disabled):
    /// PIC interrupts reach the vCPU.
    pub fn accepts_pic(&self) -> bool { true }
    /// When the timer fires next, in ns; None if it is not armed.
    pub fn deadline(&self) -> Option<u64> { None }
    /// Lets time pass: raises the timer's interrupt if it is due.
    pub fn advance(&mut self, now_ns: u64) { let _ = now_ns; }
    /// All registers as a fixed-layout record.
    pub fn state(&self) -> Vec<u8> { Vec::new() }
    /// Loads a record of [`Lapic::state`]; refuses a hostile one, changing nothing.
    pub fn set_state(&mut self, record: &[u8]) -> Result<(), String> { let _ = record; Ok(()) }
}
