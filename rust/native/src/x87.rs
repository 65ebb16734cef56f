//! x87 control instructions, in portable code over the FXSAVE64 image.
//!
//! Arithmetic, loads and stores run natively, **with the guest's own exception
//! masks**: the host does not raise #MF before its next waiting instruction,
//! and the thunk saves the state (FXSAVE64 does not wait) and initialises the
//! FPU (FNINIT does not wait either) first. So the hardware itself decides what
//! an unmasked exception leaves undone, and sets ES and B; the guest sees #MF at
//! its next waiting x87 or MMX instruction, as SDM 1, chapter 8.6 says. A store
//! whose exception prevents the result (all but precision) writes no memory.
//!
//! Pointers: FIP is the address of the last non-control instruction, FDP the
//! effective address of its memory operand (kept if it had none), FOP its opcode
//! if it raised an unmasked exception (the Pentium 4's and later rule). FCS and
//! FDS read as zero.

use crate::state::{fsw, fx, VectorState, FCW_INIT};
use iced_x86::Code;

/// An instruction on the x87 environment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X87Control {
    /// WAIT, FWAIT.
    Wait,
    /// FNINIT.
    Init,
    /// FNCLEX.
    ClearExceptions,
    /// FNENI, FNDISI, FNSETPM: nothing since the 387.
    Nothing,
    /// FNSTSW AX.
    StoreStatusAx,
    /// FNSTSW m16.
    StoreStatus,
    /// FNSTCW m16.
    StoreControl,
    /// FLDCW m16.
    LoadControl,
    /// FNSTENV; `wide` is the 28-byte form.
    StoreEnvironment {
        /// 32-bit form.
        wide: bool,
    },
    /// FLDENV.
    LoadEnvironment {
        /// 32-bit form.
        wide: bool,
    },
    /// FNSAVE; 94 or 108 bytes.
    Save {
        /// 32-bit form.
        wide: bool,
    },
    /// FRSTOR.
    Restore {
        /// 32-bit form.
        wide: bool,
    },
    /// EMMS.
    Emms,
}

impl X87Control {
    /// The operation of `code`, its bytes of memory, and whether it writes them.
    pub(crate) fn of(code: Code) -> Option<(X87Control, u16, bool)> {
        Some(match code {
            Code::Wait => (X87Control::Wait, 0, false),
            Code::Fninit => (X87Control::Init, 0, false),
            Code::Fnclex => (X87Control::ClearExceptions, 0, false),
            Code::Fneni | Code::Fndisi | Code::Fnsetpm => (X87Control::Nothing, 0, false),
            Code::Fnstsw_AX => (X87Control::StoreStatusAx, 0, false),
            Code::Fnstsw_m2byte => (X87Control::StoreStatus, 2, true),
            Code::Fnstcw_m2byte => (X87Control::StoreControl, 2, true),
            Code::Fldcw_m2byte => (X87Control::LoadControl, 2, false),
            Code::Fnstenv_m14byte => (X87Control::StoreEnvironment { wide: false }, 14, true),
            Code::Fnstenv_m28byte => (X87Control::StoreEnvironment { wide: true }, 28, true),
            Code::Fldenv_m14byte => (X87Control::LoadEnvironment { wide: false }, 14, false),
            Code::Fldenv_m28byte => (X87Control::LoadEnvironment { wide: true }, 28, false),
            Code::Fnsave_m94byte => (X87Control::Save { wide: false }, 94, true),
            Code::Fnsave_m108byte => (X87Control::Save { wide: true }, 108, true),
            Code::Frstor_m94byte => (X87Control::Restore { wide: false }, 94, false),
            Code::Frstor_m108byte => (X87Control::Restore { wide: true }, 108, false),
            Code::Emms => (X87Control::Emms, 0, false),
            _ => return None,
        })
    }

    /// Whether a pending exception raises #MF before it.
    pub fn waits(self) -> bool {
        use X87Control::*;
        matches!(self, Wait | LoadControl | LoadEnvironment { .. } | Restore { .. } | Emms)
    }
}

/// FNINIT: the registers keep their contents, all tagged empty.
pub fn init(state: &mut VectorState) {
    state.set_top(0);
    state.fx[..fx::MXCSR].fill(0);
    state.set_fx16(fx::FCW, FCW_INIT);
}

/// FNCLEX.
pub fn clear_exceptions(state: &mut VectorState) {
    let status = state.fsw() & 0x7f00;
    state.set_fx16(fx::FSW, status);
}

/// FLDCW: reserved bits are forced, and flags that are now unmasked become pending.
pub fn set_control(state: &mut VectorState, value: u16) {
    state.set_fx16(fx::FCW, sane_control(value));
    state.update_summary();
}

/// What the control word becomes when `value` is loaded: bit 6 reads as 1, bits 7 and 13 to 15 as 0.
pub(crate) fn sane_control(value: u16) -> u16 {
    value & 0x1f3f | 0x40
}

/// The full tag word (SDM 1, 8.1.7), computed from the registers.
pub fn tag_word(state: &VectorState) -> u16 {
    let top = state.top();
    let mut tags = 0;
    for physical in 0..8 {
        let tag = if state.fx[fx::FTW] & 1 << physical == 0 {
            3
        } else {
            let slot = &state.fx[fx::ST + 16 * ((physical + 8 - top) & 7)..][..10];
            register_tag(slot)
        };
        tags |= tag << (2 * physical);
    }
    tags
}

fn register_tag(slot: &[u8]) -> u16 {
    let exponent = u16::from_le_bytes([slot[8], slot[9]]) & 0x7fff;
    let integer = slot[7] & 0x80 != 0;
    let zero = slot[..8].iter().all(|&byte| byte == 0);
    match exponent {
        0 if zero => 1,
        0 | 0x7fff => 2,
        _ if integer => 0,
        _ => 2,
    }
}

fn abridge(tags: u16) -> u8 {
    (0..8).filter(|n| tags >> (2 * n) & 3 != 3).fold(0, |set, n| set | 1 << n)
}

/// The 14- or 28-byte environment; `real` selects the format of real and virtual-8086 mode.
pub fn store_environment(state: &VectorState, wide: bool, real: bool) -> Vec<u8> {
    let (fip, fdp, fop) = (state.fx64(fx::FIP), state.fx64(fx::FDP), state.fx16(fx::FOP) & 0x7ff);
    let words = [state.fcw(), state.fsw(), tag_word(state)];
    let mut out = Vec::with_capacity(28);
    if wide {
        for word in words {
            out.extend_from_slice(&(u32::from(word) | 0xffff_0000).to_le_bytes());
        }
        let pointers = if real {
            [
                fip as u32 & 0xffff | 0xffff_0000,
                ((fip as u32 >> 16) << 12) | u32::from(fop),
                fdp as u32 & 0xffff | 0xffff_0000,
                (fdp as u32 >> 16) << 12,
            ]
        } else {
            [fip as u32, u32::from(fop) << 16, fdp as u32, 0xffff_0000]
        };
        pointers.iter().for_each(|pointer| out.extend_from_slice(&pointer.to_le_bytes()));
    } else {
        let pointers = if real {
            let high = |pointer: u64| ((pointer >> 16) as u16 & 0xf) << 12;
            [fip as u16, high(fip) | fop, fdp as u16, high(fdp)]
        } else {
            [fip as u16, 0, fdp as u16, 0]
        };
        words.iter().chain(&pointers).for_each(|word| out.extend_from_slice(&word.to_le_bytes()));
    }
    out
}

/// FLDENV from 14 or 28 bytes.
pub fn load_environment(state: &mut VectorState, bytes: &[u8], wide: bool, real: bool) {
    let word = |n: usize| {
        let at = if wide { 4 * n } else { 2 * n };
        u16::from_le_bytes([bytes[at], bytes[at + 1]])
    };
    let long =
        |n: usize| u32::from_le_bytes([bytes[4 * n], bytes[4 * n + 1], bytes[4 * n + 2], bytes[4 * n + 3]]);
    let (fip, fdp, fop): (u32, u32, u16) = match (wide, real) {
        (true, true) => (
            u32::from(word(3)) | (long(4) >> 12 & 0xffff) << 16,
            u32::from(word(5)) | (long(6) >> 12 & 0xffff) << 16,
            word(4) & 0x7ff,
        ),
        (true, false) => (long(3), long(5), (long(4) >> 16) as u16 & 0x7ff),
        (false, true) => (
            u32::from(word(3)) | u32::from(word(4) >> 12) << 16,
            u32::from(word(5)) | u32::from(word(6) >> 12) << 16,
            word(4) & 0x7ff,
        ),
        (false, false) => (u32::from(word(3)), u32::from(word(5)), 0),
    };
    let (control, status, tags) = (word(0), word(1), word(2));
    state.set_top((status >> fsw::TOP_SHIFT) as usize & 7);
    state.set_fx16(fx::FCW, sane_control(control));
    state.set_fx16(fx::FSW, status);
    state.fx[fx::FTW] = abridge(tags);
    state.set_fx16(fx::FOP, fop);
    state.set_fx64(fx::FIP, fip.into());
    state.set_fx64(fx::FDP, fdp.into());
    state.update_summary();
}

/// FNSTENV's effect on the FPU after the store: all exceptions masked.
pub fn mask_exceptions(state: &mut VectorState) {
    let control = state.fcw() | 0x3f;
    state.set_fx16(fx::FCW, control);
    state.update_summary();
}

/// FNSAVE's image: the environment and the registers from ST(0) on. The caller
/// then does [`init`].
pub fn save(state: &VectorState, wide: bool, real: bool) -> Vec<u8> {
    let mut out = store_environment(state, wide, real);
    for n in 0..8 {
        out.extend_from_slice(&state.fx[fx::ST + 16 * n..][..10]);
    }
    out
}

/// FRSTOR from 94 or 108 bytes.
pub fn restore(state: &mut VectorState, bytes: &[u8], wide: bool, real: bool) {
    let environment = if wide { 28 } else { 14 };
    load_environment(state, &bytes[..environment], wide, real);
    for n in 0..8 {
        let slot = &mut state.fx[fx::ST + 16 * n..][..16];
        slot[..10].copy_from_slice(&bytes[environment + 10 * n..][..10]);
        slot[10..].fill(0);
    }
}

/// EMMS: all registers empty.
pub fn emms(state: &mut VectorState) {
    state.enter_mmx();
    state.fx[fx::FTW] = 0;
}
