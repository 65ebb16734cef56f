//! What an instruction compiles to, and the choice of plans that need no thunk.

use crate::classify::Class;
use crate::masked::{self, GatherPlan, MaskPlan};
use crate::x87::X87Control;
use crate::xstate::StateOp;
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// How an instruction reaches its memory operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemAccess {
    /// Bytes. For masked, gathered and XSAVE operands an upper bound of what one access moves.
    pub size: u16,
    /// It is read.
    pub read: bool,
    /// It is written.
    pub write: bool,
    /// A linear address that is not a multiple of this raises #GP(0); 1 if any may do.
    pub align: u8,
}

/// A thunk as a compiled instruction refers to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThunkRef {
    /// Generation of the thunk memory: globally unique, never 0.
    pub(crate) generation: u32,
    /// Offset of the code in the thunk memory.
    pub(crate) entry: u32,
    /// Status flags that it leaves, as a mask of RFLAGS; 0 if it leaves them alone.
    pub(crate) flags_written: u16,
    /// x87: the last 11 bits of the opcode, for FOP.
    pub(crate) opcode: u16,
    /// Guest register of slot 0 (slots 1, 2, 3 are RAX, RDX, RCX).
    pub(crate) explicit: u8,
    /// Slots to fill before, as a mask.
    pub(crate) gpr_in: u8,
    /// Slots to take over after, as a mask.
    pub(crate) gpr_out: u8,
    /// Reads status flags.
    pub(crate) flags_read: bool,
    /// Works on the x87 and MMX registers.
    pub(crate) fx: bool,
    /// Is an x87 instruction: updates the x87 instruction and data pointers.
    pub(crate) x87: bool,
    /// Depends on MXCSR.
    pub(crate) mxcsr: bool,
}

/// How a compiled instruction is carried out.
///
/// In the plans that copy bytes, `clear_to` says up to which byte the register
/// is zeroed above what was written (16: legacy scalar loads, 32: VEX; 0: not).
/// Callers may run [`Plan::Load`], [`Plan::Store`], [`Plan::Copy`] and
/// [`Plan::Zero`] themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Memory to bytes `offset..offset + size` of a vector register.
    Load {
        /// Vector register.
        dst: u8,
        /// First byte in it.
        offset: u8,
        /// Bytes.
        size: u8,
        /// See [`Plan`].
        clear_to: u8,
    },
    /// Bytes `offset..offset + size` of a vector register to memory.
    Store {
        /// Vector register.
        src: u8,
        /// First byte in it.
        offset: u8,
        /// Bytes.
        size: u8,
    },
    /// The low `size` bytes of a vector register to another.
    Copy {
        /// Destination.
        dst: u8,
        /// Source.
        src: u8,
        /// Bytes.
        size: u8,
        /// See [`Plan`].
        clear_to: u8,
    },
    /// The low `size` bytes become zero (XORPS and PXOR of a register with itself).
    Zero {
        /// Vector register.
        dst: u8,
        /// Bytes.
        size: u8,
    },
    /// MOVD or MOVQ from a general register.
    FromGpr {
        /// Vector register.
        dst: u8,
        /// General register.
        src: u8,
        /// 4 or 8.
        size: u8,
        /// See [`Plan`].
        clear_to: u8,
    },
    /// MOVD or MOVQ to a general register; 4 bytes zero-extend.
    ToGpr {
        /// General register.
        dst: u8,
        /// Vector register.
        src: u8,
        /// 4 or 8.
        size: u8,
    },
    /// VZEROUPPER, VZEROALL (8 registers outside 64-bit mode).
    ClearRegisters {
        /// VZEROALL.
        all: bool,
    },
    /// LDMXCSR.
    LoadMxcsr,
    /// STMXCSR.
    StoreMxcsr,
    /// x87 control instructions, WAIT, EMMS.
    X87Control(X87Control),
    /// FXSAVE, XSAVE and their kin.
    State(StateOp),
    /// MASKMOVDQU, VMASKMOVPS, VPMASKMOVD...
    Masked(MaskPlan),
    /// VGATHERDPS, VPGATHERQQ...
    Gather(GatherPlan),
    /// Generated code.
    Thunk(ThunkRef),
}

/// An instruction ready to execute. Small and copyable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compiled {
    /// For [`crate::precheck`].
    pub class: Class,
    /// The memory operand, if it has one.
    pub memory: Option<MemAccess>,
    /// How to do it.
    pub plan: Plan,
}

/// Why an instruction does not compile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// [`crate::classify`] does not know it.
    NotThisUnit,
    /// It belongs to an extension outside the unit's feature set: #UD for the guest.
    Feature,
    /// Its operands make it #UD (a gather whose registers coincide).
    InvalidOperands,
    /// The host executes no x86-64 instructions, or gives no executable memory.
    Host(&'static str),
    /// The encoder refused it.
    Encoding(String),
}

impl std::fmt::Display for Unsupported {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unsupported::NotThisUnit => write!(f, "not an instruction on vector or x87 registers"),
            Unsupported::Feature => write!(f, "an extension that this CPU does not have"),
            Unsupported::InvalidOperands => write!(f, "operands that the instruction does not allow"),
            Unsupported::Host(why) => write!(f, "{why}"),
            Unsupported::Encoding(why) => write!(f, "cannot be encoded: {why}"),
        }
    }
}

impl std::error::Error for Unsupported {}

const fn access(size: u16, read: bool, write: bool, align: u8) -> Option<MemAccess> {
    Some(MemAccess { size, read, write, align })
}

/// A plan that needs no thunk, if there is one.
pub(crate) fn portable(instruction: &Instruction) -> Result<Option<(Plan, Option<MemAccess>)>, Unsupported> {
    if let Some(found) = moves(instruction) {
        return Ok(Some(found));
    }
    if let Some((op, size, write)) = X87Control::of(instruction.code()) {
        return Ok(Some((
            Plan::X87Control(op),
            (size != 0).then_some(()).and(access(size, !write, write, 1)),
        )));
    }
    if let Some((op, memory)) = StateOp::of(instruction.code()) {
        return Ok(Some((Plan::State(op), Some(memory))));
    }
    match instruction.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => Ok(Some((Plan::LoadMxcsr, access(4, true, false, 1)))),
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => Ok(Some((Plan::StoreMxcsr, access(4, false, true, 1)))),
        Mnemonic::Vzeroupper => Ok(Some((Plan::ClearRegisters { all: false }, None))),
        Mnemonic::Vzeroall => Ok(Some((Plan::ClearRegisters { all: true }, None))),
        _ => masked::plan(instruction),
    }
}

/// Register number of operand `operand`.
pub(crate) fn register(instruction: &Instruction, operand: u32) -> u8 {
    let register = instruction.op_register(operand);
    let number = if register.is_gpr() { register.full_register().number() } else { register.number() };
    number as u8
}

enum Move {
    /// Register or memory to register.
    Load { offset: u8, size: u8, align: u8 },
    /// Register to register or memory.
    Store { offset: u8, size: u8, align: u8 },
    /// Two registers become zero if they are the same.
    Xor { size: u8 },
}

fn moves(instruction: &Instruction) -> Option<(Plan, Option<MemAccess>)> {
    let code = instruction.code();
    let vex = code.encoding() == EncodingKind::VEX;
    let memory = |op| instruction.op_kind(op) == OpKind::Memory;
    let kind = kind_of_move(code)?;
    match kind {
        Move::Xor { size } => {
            let first = instruction.op_count() - 2;
            let same = !memory(first + 1) && register(instruction, first) == register(instruction, first + 1);
            let dst = register(instruction, 0);
            same.then_some((Plan::Zero { dst, size: if vex { 32 } else { size } }, None))
        }
        Move::Load { offset, size, align } => {
            let dst = register(instruction, 0);
            // Full and scalar moves clear what is above; MOVLPS and MOVHPS do not.
            let merges = matches!(
                code,
                Code::Movlps_xmm_m64 | Code::Movlpd_xmm_m64 | Code::Movhps_xmm_m64 | Code::Movhpd_xmm_m64
            );
            let clear_to = match (vex, merges) {
                (true, _) => 32,
                (false, true) => 0,
                (false, false) => 16,
            };
            if memory(1) {
                return Some((
                    Plan::Load { dst, offset, size, clear_to },
                    access(size.into(), true, false, align),
                ));
            }
            let src = register(instruction, 1);
            if instruction.op_register(1).is_gpr() {
                return Some((Plan::FromGpr { dst, src, size, clear_to }, None));
            }
            // MOVSS and MOVSD between registers merge: left to a thunk. MOVLPS and
            // MOVHPS between registers are other instructions with other codes.
            let merging = matches!(code, Code::Movss_xmm_xmmm32 | Code::Movsd_xmm_xmmm64) || merges;
            (!merging).then_some((Plan::Copy { dst, src, size, clear_to }, None))
        }
        Move::Store { offset, size, align } => {
            let src = register(instruction, 1);
            if memory(0) {
                return Some((Plan::Store { src, offset, size }, access(size.into(), false, true, align)));
            }
            let dst = register(instruction, 0);
            if instruction.op_register(0).is_gpr() {
                return Some((Plan::ToGpr { dst, src, size }, None));
            }
            let merging = matches!(code, Code::Movss_xmmm32_xmm | Code::Movsd_xmmm64_xmm);
            let clear_to = if vex { 32 } else { 16 };
            (!merging && offset == 0).then_some((Plan::Copy { dst, src, size, clear_to }, None))
        }
    }
}

fn kind_of_move(code: Code) -> Option<Move> {
    use Code::*;
    let load = |size, align| Some(Move::Load { offset: 0, size, align });
    let store = |size, align| Some(Move::Store { offset: 0, size, align });
    match code {
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 => load(16, 1),
        VEX_Vmovups_xmm_xmmm128 | VEX_Vmovupd_xmm_xmmm128 | VEX_Vmovdqu_xmm_xmmm128 => load(16, 1),
        VEX_Vlddqu_xmm_m128 => load(16, 1),
        VEX_Vmovups_ymm_ymmm256 | VEX_Vmovupd_ymm_ymmm256 | VEX_Vmovdqu_ymm_ymmm256 => load(32, 1),
        VEX_Vlddqu_ymm_m256 => load(32, 1),
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 | Movntdqa_xmm_m128 => load(16, 16),
        VEX_Vmovaps_xmm_xmmm128 | VEX_Vmovapd_xmm_xmmm128 | VEX_Vmovdqa_xmm_xmmm128 => load(16, 16),
        VEX_Vmovntdqa_xmm_m128 => load(16, 16),
        VEX_Vmovaps_ymm_ymmm256 | VEX_Vmovapd_ymm_ymmm256 | VEX_Vmovdqa_ymm_ymmm256 => load(32, 32),
        VEX_Vmovntdqa_ymm_m256 => load(32, 32),
        Movss_xmm_xmmm32 | VEX_Vmovss_xmm_m32 | Movd_xmm_rm32 | VEX_Vmovd_xmm_rm32 => load(4, 1),
        Movsd_xmm_xmmm64 | VEX_Vmovsd_xmm_m64 | Movq_xmm_rm64 | VEX_Vmovq_xmm_rm64 => load(8, 1),
        Movq_xmm_xmmm64 | VEX_Vmovq_xmm_xmmm64 => load(8, 1),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => load(8, 1),
        Movhps_xmm_m64 | Movhpd_xmm_m64 => Some(Move::Load { offset: 8, size: 8, align: 1 }),

        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => store(16, 1),
        VEX_Vmovups_xmmm128_xmm | VEX_Vmovupd_xmmm128_xmm | VEX_Vmovdqu_xmmm128_xmm => store(16, 1),
        VEX_Vmovups_ymmm256_ymm | VEX_Vmovupd_ymmm256_ymm | VEX_Vmovdqu_ymmm256_ymm => store(32, 1),
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm => store(16, 16),
        Movntps_m128_xmm | Movntpd_m128_xmm | Movntdq_m128_xmm => store(16, 16),
        VEX_Vmovaps_xmmm128_xmm | VEX_Vmovapd_xmmm128_xmm | VEX_Vmovdqa_xmmm128_xmm => store(16, 16),
        VEX_Vmovntps_m128_xmm | VEX_Vmovntpd_m128_xmm | VEX_Vmovntdq_m128_xmm => store(16, 16),
        VEX_Vmovaps_ymmm256_ymm | VEX_Vmovapd_ymmm256_ymm | VEX_Vmovdqa_ymmm256_ymm => store(32, 32),
        VEX_Vmovntps_m256_ymm | VEX_Vmovntpd_m256_ymm | VEX_Vmovntdq_m256_ymm => store(32, 32),
        Movss_xmmm32_xmm | VEX_Vmovss_m32_xmm | Movd_rm32_xmm | VEX_Vmovd_rm32_xmm => store(4, 1),
        Movsd_xmmm64_xmm | VEX_Vmovsd_m64_xmm | Movq_rm64_xmm | VEX_Vmovq_rm64_xmm => store(8, 1),
        Movq_xmmm64_xmm | VEX_Vmovq_xmmm64_xmm => store(8, 1),
        Movlps_m64_xmm | Movlpd_m64_xmm | VEX_Vmovlps_m64_xmm | VEX_Vmovlpd_m64_xmm => store(8, 1),
        Movhps_m64_xmm | Movhpd_m64_xmm | VEX_Vmovhps_m64_xmm | VEX_Vmovhpd_m64_xmm => {
            Some(Move::Store { offset: 8, size: 8, align: 1 })
        }

        Pxor_xmm_xmmm128 | Xorps_xmm_xmmm128 | Xorpd_xmm_xmmm128 => Some(Move::Xor { size: 16 }),
        VEX_Vpxor_xmm_xmm_xmmm128 | VEX_Vxorps_xmm_xmm_xmmm128 | VEX_Vxorpd_xmm_xmm_xmmm128 => {
            Some(Move::Xor { size: 32 })
        }
        VEX_Vpxor_ymm_ymm_ymmm256 | VEX_Vxorps_ymm_ymm_ymmm256 | VEX_Vxorpd_ymm_ymm_ymmm256 => {
            Some(Move::Xor { size: 32 })
        }
        _ => None,
    }
}

/// The general register number that addresses memory through `register`.
pub(crate) fn base_register(register: Register) -> Option<u8> {
    register.is_gpr().then(|| register.full_register().number() as u8)
}
