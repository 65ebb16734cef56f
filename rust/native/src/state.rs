//! The guest's vector and x87 register file.

/// Byte offsets in [`VectorState::fx`], as FXSAVE64 lays them out (SDM 1, table 10-2).
pub mod fx {
    #![allow(missing_docs)]
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    /// Abridged tags: bit n set if physical register n is not empty.
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const MXCSR_MASK: usize = 28;
    /// ST(0)..ST(7), 16 bytes each of which 10 are used.
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
}

/// The guest's vector and x87 state, laid out for the generated code.
///
/// FCS and FDS are not kept: they always read as zero, as on processors that
/// set CPUID.7.0:EBX\[13\].
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorState {
    /// YMM0..YMM15, 32 bytes each, little-endian (XMMn is the low half).
    pub ymm: [[u8; 32]; 16],
    /// x87 and MMX state as FXSAVE64 stores it; bytes from 24 to 32 and from 160 on are zero.
    pub fx: [u8; 512],
    /// Makes `fx` an XSAVE area: says that its x87 component is there, and nothing else.
    pub header: [u64; 8],
    /// MXCSR.
    pub mxcsr: u32,
}

/// FSW bits.
pub mod fsw {
    #![allow(missing_docs)]
    pub const IE: u16 = 1;
    pub const DE: u16 = 2;
    pub const ZE: u16 = 4;
    pub const OE: u16 = 8;
    pub const UE: u16 = 16;
    pub const PE: u16 = 32;
    pub const SF: u16 = 64;
    /// Exception summary: an unmasked exception is pending.
    pub const ES: u16 = 128;
    pub const B: u16 = 1 << 15;
    pub const TOP_SHIFT: u16 = 11;
}

/// FCW after reset of the FPU by FNINIT.
pub const FCW_INIT: u16 = 0x037f;
/// MXCSR after reset.
pub const MXCSR_INIT: u32 = 0x1f80;
/// Bits of MXCSR that the guest may set.
pub const MXCSR_MASK: u32 = 0xffff;

impl Default for VectorState {
    /// The state after FNINIT with all vector registers zero (the XSAVE initial configuration).
    fn default() -> Self {
        let mut fx = [0u8; 512];
        fx[0..2].copy_from_slice(&FCW_INIT.to_le_bytes());
        VectorState { ymm: [[0; 32]; 16], fx, header: [1, 0, 0, 0, 0, 0, 0, 0], mxcsr: MXCSR_INIT }
    }
}

impl VectorState {
    /// A little-endian 16-bit field of `fx`.
    pub fn fx16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.fx[at], self.fx[at + 1]])
    }

    /// Sets a 16-bit field of `fx`.
    pub fn set_fx16(&mut self, at: usize, value: u16) {
        self.fx[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// A little-endian 64-bit field of `fx` (FIP, FDP).
    pub fn fx64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.fx[at..at + 8]);
        u64::from_le_bytes(bytes)
    }

    /// Sets a 64-bit field of `fx`.
    pub fn set_fx64(&mut self, at: usize, value: u64) {
        self.fx[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// x87 control word.
    pub fn fcw(&self) -> u16 {
        self.fx16(fx::FCW)
    }

    /// x87 status word.
    pub fn fsw(&self) -> u16 {
        self.fx16(fx::FSW)
    }

    /// x87 top-of-stack pointer, 0 to 7.
    pub fn top(&self) -> usize {
        (self.fsw() >> fsw::TOP_SHIFT) as usize & 7
    }

    /// Whether an unmasked x87 exception waits for the next waiting instruction (#MF).
    pub fn x87_pending(&self) -> bool {
        self.fsw() & fsw::ES != 0
    }

    /// Whether all x87 exceptions are masked, so that none is or becomes pending.
    pub fn x87_masked(&self) -> bool {
        self.fcw() & 0x3f == 0x3f && !self.x87_pending()
    }

    /// Makes the exception summary bits of FSW follow from its flags and FCW's masks.
    pub fn update_summary(&mut self) {
        let status = self.fsw() & !(fsw::ES | fsw::B);
        let pending = status & !self.fcw() & 0x3f != 0;
        self.set_fx16(fx::FSW, if pending { status | fsw::ES | fsw::B } else { status });
    }

    /// Sets TOP; the physical registers stay where they are, so the ST slots rotate.
    pub fn set_top(&mut self, top: usize) {
        let turn = (top + 8 - self.top()) & 7;
        self.fx[fx::ST..fx::XMM].rotate_left(16 * turn);
        let status = self.fsw() & !(7 << fsw::TOP_SHIFT);
        self.set_fx16(fx::FSW, status | ((top as u16 & 7) << fsw::TOP_SHIFT));
    }

    /// What every MMX instruction but EMMS does first: TOP 0, all registers valid.
    pub fn enter_mmx(&mut self) {
        self.set_top(0);
        self.fx[fx::FTW] = 0xff;
    }

    /// MM register `n`; meaningful after [`VectorState::enter_mmx`].
    pub fn mm(&self, n: usize) -> [u8; 8] {
        let slot = (n + 8 - self.top()) & 7;
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.fx[fx::ST + 16 * slot..][..8]);
        bytes
    }
}
