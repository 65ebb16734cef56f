//! FXSAVE, XSAVE and their kin, in portable code (SDM 1, chapter 13).
//!
//! Components: x87 (bit 0), SSE (1), AVX (2). XSAVE's area has AVX at offset
//! 576 in both formats, 832 bytes in all. A component counts as in use
//! (XINUSE) if it differs from its initial configuration. XSAVEOPT uses the init
//! optimisation and not the modified one, which the manuals allow.

use crate::execute::{Control, Guest, Stop};
use crate::plan::MemAccess;
use crate::state::{fx, VectorState, FCW_INIT, MXCSR_INIT, MXCSR_MASK};
use crate::x87::sane_control;
use crate::Trap;
use iced_x86::Code;

/// Offset of the XSAVE header.
pub const HEADER: u64 = 512;
/// Offset of the AVX component (CPUID.0xD.2:EBX).
pub const AVX_OFFSET: u64 = 576;
/// Bytes of the AVX component (CPUID.0xD.2:EAX).
pub const AVX_SIZE: usize = 256;
/// Bytes of the whole area with all components.
pub const AREA_SIZE: usize = 832;
/// The XCR0 bits that this unit knows.
pub const SUPPORTED: u64 = 7;

const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
const COMPACT: u64 = 1 << 63;

/// An instruction that saves or restores state as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateOp {
    /// FXSAVE; `wide` with REX.W: 64-bit pointers.
    Fxsave {
        /// FXSAVE64.
        wide: bool,
    },
    /// FXRSTOR.
    Fxrstor {
        /// FXRSTOR64.
        wide: bool,
    },
    /// XSAVE.
    Xsave {
        /// XSAVE64.
        wide: bool,
    },
    /// XSAVEOPT.
    Xsaveopt {
        /// XSAVEOPT64.
        wide: bool,
    },
    /// XSAVEC.
    Xsavec {
        /// XSAVEC64.
        wide: bool,
    },
    /// XRSTOR.
    Xrstor {
        /// XRSTOR64.
        wide: bool,
    },
}

impl StateOp {
    /// The operation of `code` and its operand.
    pub(crate) fn of(code: Code) -> Option<(StateOp, MemAccess)> {
        let (op, size, read, write, align) = match code {
            Code::Fxsave_m512byte => (StateOp::Fxsave { wide: false }, 512, false, true, 16),
            Code::Fxsave64_m512byte => (StateOp::Fxsave { wide: true }, 512, false, true, 16),
            Code::Fxrstor_m512byte => (StateOp::Fxrstor { wide: false }, 512, true, false, 16),
            Code::Fxrstor64_m512byte => (StateOp::Fxrstor { wide: true }, 512, true, false, 16),
            Code::Xsave_mem => (StateOp::Xsave { wide: false }, 832, true, true, 64),
            Code::Xsave64_mem => (StateOp::Xsave { wide: true }, 832, true, true, 64),
            Code::Xsaveopt_mem => (StateOp::Xsaveopt { wide: false }, 832, true, true, 64),
            Code::Xsaveopt64_mem => (StateOp::Xsaveopt { wide: true }, 832, true, true, 64),
            Code::Xsavec_mem => (StateOp::Xsavec { wide: false }, 832, false, true, 64),
            Code::Xsavec64_mem => (StateOp::Xsavec { wide: true }, 832, false, true, 64),
            Code::Xrstor_mem => (StateOp::Xrstor { wide: false }, 832, true, false, 64),
            Code::Xrstor64_mem => (StateOp::Xrstor { wide: true }, 832, true, false, 64),
            _ => return None,
        };
        Some((op, MemAccess { size, read, write, align }))
    }
}

/// XINUSE: the components that are not in their initial configuration. MXCSR does not count.
pub fn in_use(state: &VectorState) -> u64 {
    let mut set = 0;
    let fresh = state.fcw() == FCW_INIT && state.fx[2..fx::MXCSR].iter().all(|&byte| byte == 0);
    if !fresh || state.fx[fx::ST..fx::XMM].iter().any(|&byte| byte != 0) {
        set |= X87;
    }
    if state.ymm.iter().any(|register| register[..16].iter().any(|&byte| byte != 0)) {
        set |= SSE;
    }
    if state.ymm.iter().any(|register| register[16..].iter().any(|&byte| byte != 0)) {
        set |= AVX;
    }
    set
}

/// Sets the components in `set` to their initial configuration; MXCSR stays.
pub fn initialise(state: &mut VectorState, set: u64) {
    if set & X87 != 0 {
        state.fx.fill(0);
        state.set_fx16(fx::FCW, FCW_INIT);
    }
    for register in &mut state.ymm {
        if set & SSE != 0 {
            register[..16].fill(0);
        }
        if set & AVX != 0 {
            register[16..].fill(0);
        }
    }
}

/// The first 24 bytes of the legacy region: FCW to FDP. Without `wide`, FIP and
/// FDP have 32 bits, followed by FCS and FDS, which are zero.
fn x87_header(state: &VectorState, wide: bool) -> [u8; 24] {
    let mut out = [0; 24];
    out.copy_from_slice(&state.fx[..24]);
    out[5] = 0;
    if !wide {
        out[12..16].fill(0);
        out[20..24].fill(0);
    }
    out
}

/// Loads the x87 component from the legacy region's header and registers.
fn load_x87(state: &mut VectorState, header: &[u8], registers: &[u8], wide: bool) {
    state.fx[..24].copy_from_slice(&header[..24]);
    state.fx[5] = 0;
    let opcode = state.fx16(fx::FOP) & 0x7ff;
    state.set_fx16(fx::FOP, opcode);
    if !wide {
        state.fx[12..16].fill(0);
        state.fx[20..24].fill(0);
    }
    for n in 0..8 {
        let slot = &mut state.fx[fx::ST + 16 * n..][..16];
        slot[..10].copy_from_slice(&registers[16 * n..][..10]);
        slot[10..].fill(0);
    }
    let control = sane_control(state.fcw());
    state.set_fx16(fx::FCW, control);
    state.update_summary();
}

fn xmm_count(control: &Control) -> usize {
    if control.long {
        16
    } else {
        8
    }
}

fn xmm_image(state: &VectorState, count: usize) -> [u8; 256] {
    let mut out = [0; 256];
    for (slot, register) in out.chunks_exact_mut(16).zip(&state.ymm[..count]) {
        slot.copy_from_slice(&register[..16]);
    }
    out
}

fn mxcsr_of(bytes: &[u8]) -> Result<u32, Trap> {
    let value = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    if value & !MXCSR_MASK != 0 {
        Err(Trap::GeneralProtection)
    } else {
        Ok(value)
    }
}

/// Does `op` with the area at effective address `address`, whose alignment the caller checked.
pub fn perform<G: Guest>(guest: &mut G, op: StateOp, address: u64) -> Result<(), Stop<G::Fault>> {
    let control = guest.control();
    let requested = (guest.gpr(2) << 32 | guest.gpr(0) & 0xffff_ffff) & control.xcr0 & SUPPORTED;
    match op {
        StateOp::Fxsave { wide } => fxsave(guest, &control, address, wide && control.long),
        StateOp::Fxrstor { wide } => fxrstor(guest, &control, address, wide && control.long),
        StateOp::Xsave { wide } => xsave(guest, &control, address, requested, wide, false),
        StateOp::Xsaveopt { wide } => xsave(guest, &control, address, requested, wide, true),
        StateOp::Xsavec { wide } => xsavec(guest, &control, address, requested, wide),
        StateOp::Xrstor { wide } => xrstor(guest, &control, address, requested, wide),
    }
}

const CR4_OSFXSR: u64 = 1 << 9;

fn fxsave<G: Guest>(
    guest: &mut G,
    control: &Control,
    address: u64,
    wide: bool,
) -> Result<(), Stop<G::Fault>> {
    let state = guest.vectors();
    let mut image = [0u8; 416];
    image[..24].copy_from_slice(&x87_header(state, wide));
    image[24..28].copy_from_slice(&state.mxcsr.to_le_bytes());
    image[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    image[32..160].copy_from_slice(&state.fx[fx::ST..fx::XMM]);
    let count = xmm_count(control);
    image[160..].copy_from_slice(&xmm_image(state, count));
    // Without CR4.OSFXSR the XMM registers are left out, as processors do.
    let end = if control.cr4 & CR4_OSFXSR != 0 { 160 + 16 * count } else { 160 };
    guest.write(address, &image[..end]).map_err(Stop::Memory)
}

fn fxrstor<G: Guest>(
    guest: &mut G,
    control: &Control,
    address: u64,
    wide: bool,
) -> Result<(), Stop<G::Fault>> {
    let mut image = [0u8; 512];
    guest.read(address, &mut image).map_err(Stop::Memory)?;
    let vectors = control.cr4 & CR4_OSFXSR != 0;
    let mxcsr = mxcsr_of(&image[24..28]).map_err(Stop::Trap)?;
    let state = guest.vectors();
    load_x87(state, &image[..24], &image[32..160], wide);
    if vectors {
        state.mxcsr = mxcsr;
        for n in 0..xmm_count(control) {
            state.ymm[n][..16].copy_from_slice(&image[160 + 16 * n..][..16]);
        }
    }
    Ok(())
}

/// Writes the components of `set`, and MXCSR with its mask if `mxcsr`.
fn save_components<G: Guest>(
    guest: &mut G,
    control: &Control,
    address: u64,
    set: u64,
    mxcsr: bool,
    wide: bool,
) -> Result<(), Stop<G::Fault>> {
    let count = xmm_count(control);
    let at = |offset: u64| address.wrapping_add(offset);
    if set & X87 != 0 {
        let header = x87_header(guest.vectors(), wide && control.long);
        let mut registers = [0; 128];
        registers.copy_from_slice(&guest.vectors().fx[fx::ST..fx::XMM]);
        guest.write(address, &header).map_err(Stop::Memory)?;
        guest.write(at(32), &registers).map_err(Stop::Memory)?;
    }
    if mxcsr {
        let mut bytes = [0; 8];
        bytes[..4].copy_from_slice(&guest.vectors().mxcsr.to_le_bytes());
        bytes[4..].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        guest.write(at(24), &bytes).map_err(Stop::Memory)?;
    }
    if set & SSE != 0 {
        let image = xmm_image(guest.vectors(), count);
        guest.write(at(160), &image[..16 * count]).map_err(Stop::Memory)?;
    }
    if set & AVX != 0 {
        let mut image = [0; AVX_SIZE];
        for (slot, register) in image.chunks_exact_mut(16).zip(&guest.vectors().ymm) {
            slot.copy_from_slice(&register[16..]);
        }
        guest.write(at(AVX_OFFSET), &image[..16 * count]).map_err(Stop::Memory)?;
    }
    Ok(())
}

fn read_u64<G: Guest>(guest: &mut G, address: u64) -> Result<u64, Stop<G::Fault>> {
    let mut bytes = [0; 8];
    guest.read(address, &mut bytes).map_err(Stop::Memory)?;
    Ok(u64::from_le_bytes(bytes))
}

fn write_u64<G: Guest>(guest: &mut G, address: u64, value: u64) -> Result<(), Stop<G::Fault>> {
    guest.write(address, &value.to_le_bytes()).map_err(Stop::Memory)
}

fn xsave<G: Guest>(
    guest: &mut G,
    control: &Control,
    address: u64,
    requested: u64,
    wide: bool,
    optimised: bool,
) -> Result<(), Stop<G::Fault>> {
    let header = address.wrapping_add(HEADER);
    let old = read_u64(guest, header)?;
    let used = in_use(guest.vectors()) & requested;
    let saved = if optimised { used } else { requested };
    save_components(guest, control, address, saved, requested & (SSE | AVX) != 0, wide)?;
    write_u64(guest, header, old & !requested | used)
}

fn xsavec<G: Guest>(
    guest: &mut G,
    control: &Control,
    address: u64,
    requested: u64,
    wide: bool,
) -> Result<(), Stop<G::Fault>> {
    let mut used = in_use(guest.vectors()) & requested;
    if requested & SSE != 0 && guest.vectors().mxcsr != MXCSR_INIT {
        used |= SSE;
    }
    save_components(guest, control, address, used, used & SSE != 0, wide)?;
    let header = address.wrapping_add(HEADER);
    write_u64(guest, header.wrapping_add(8), requested | COMPACT)?;
    write_u64(guest, header, used)
}

fn xrstor<G: Guest>(
    guest: &mut G,
    control: &Control,
    address: u64,
    requested: u64,
    wide: bool,
) -> Result<(), Stop<G::Fault>> {
    let mut header = [0; 64];
    guest.read(address.wrapping_add(HEADER), &mut header).map_err(Stop::Memory)?;
    let field = |n: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&header[8 * n..][..8]);
        u64::from_le_bytes(bytes)
    };
    let (present, layout) = (field(0), field(1));
    let compact = layout & COMPACT != 0;
    let bad = if compact {
        layout & !COMPACT & !control.xcr0 != 0
            || present & !layout != 0
            || present & COMPACT != 0
            || header[16..].iter().any(|&byte| byte != 0)
    } else {
        present & !control.xcr0 != 0 || layout != 0 || field(2) != 0
    };
    if bad {
        return Err(Stop::Trap(Trap::GeneralProtection));
    }
    let count = xmm_count(control);
    let load = requested & present;
    let mut legacy = [0; 416];
    let mut upper = [0; AVX_SIZE];
    // Everything is read and checked before anything changes.
    let mxcsr_loaded = if compact { load & SSE != 0 } else { requested & (SSE | AVX) != 0 };
    if load & (X87 | SSE) != 0 || mxcsr_loaded {
        guest.read(address, &mut legacy[..160 + 16 * count]).map_err(Stop::Memory)?;
    }
    if load & AVX != 0 {
        guest.read(address.wrapping_add(AVX_OFFSET), &mut upper[..16 * count]).map_err(Stop::Memory)?;
    }
    let mxcsr = match (mxcsr_loaded, requested & SSE != 0) {
        (true, _) => Some(mxcsr_of(&legacy[24..28]).map_err(Stop::Trap)?),
        (false, true) => Some(MXCSR_INIT),
        (false, false) => None,
    };
    let state = guest.vectors();
    if let Some(value) = mxcsr {
        state.mxcsr = value;
    }
    if requested & X87 != 0 {
        if load & X87 != 0 {
            load_x87(state, &legacy[..24], &legacy[32..160], wide && control.long);
        } else {
            initialise(state, X87);
        }
    }
    for n in 0..count {
        if requested & SSE != 0 {
            // Zero unless loaded: `legacy` holds zeroes or the image.
            let source = if load & SSE != 0 { &legacy[160 + 16 * n..][..16] } else { &[0; 16][..] };
            state.ymm[n][..16].copy_from_slice(source);
        }
        if requested & AVX != 0 {
            state.ymm[n][16..].copy_from_slice(&upper[16 * n..][..16]);
        }
    }
    Ok(())
}
