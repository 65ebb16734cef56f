//! Specialised operations for frequent instructions (optimisation `fast-ops`).
//!
//! Each is a small function over an [`Op`] whose fields the decoder filled in.
//! What is not here runs in the general executor, with the same results.

#[path = "address.rs"]
mod addressing;
mod alu;
mod branches;
mod exchange;
mod moves;
mod shifts;
mod stack;

use crate::code_cache::Op;
use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

pub use addressing::{fill as address, linear};
pub use branches::fuse;

/// Operand shapes of two-operand instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Register, register.
    RR,
    /// Register, immediate.
    RI,
    /// Register, memory.
    RM,
    /// Memory, register.
    MR,
    /// Memory, immediate.
    MI,
    /// Register alone.
    R,
    /// Memory alone.
    M,
}

/// A register that is addressed by number alone: not AH..BH, not a segment.
pub(crate) fn plain_register(r: Register) -> Option<u8> {
    match r {
        Register::AH | Register::CH | Register::DH | Register::BH => None,
        // By the full register: iced numbers SPL..R15B from 8 on.
        _ if r.is_gpr() => Some(r.full_register().number() as u8),
        _ => None,
    }
}

fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// Fills in registers, immediate and address of a one- or two-operand
/// instruction; None if an operand needs the general executor.
pub(crate) fn operands(cpu: &Cpu, i: &Instruction, op: &mut Op) -> Option<(Form, usize)> {
    let memory = |op: &mut Op| addressing::fill(cpu, i, op);
    let form = match (i.op_count(), i.op0_kind()) {
        (1, OpKind::Register) => {
            op.dst = plain_register(i.op0_register())?;
            return Some((Form::R, i.op0_register().size()));
        }
        (1, OpKind::Memory) => {
            memory(op)?;
            return Some((Form::M, i.memory_size().size()));
        }
        (2 | 3, OpKind::Register) => {
            op.dst = plain_register(i.op0_register())?;
            match i.op1_kind() {
                OpKind::Register => {
                    op.src = plain_register(i.op1_register())?;
                    Form::RR
                }
                OpKind::Memory => {
                    memory(op)?;
                    Form::RM
                }
                k if is_immediate(k) => {
                    op.imm = i.immediate(1);
                    Form::RI
                }
                _ => return None,
            }
        }
        (2, OpKind::Memory) => {
            memory(op)?;
            match i.op1_kind() {
                OpKind::Register => {
                    op.src = plain_register(i.op1_register())?;
                    Form::MR
                }
                k if is_immediate(k) => {
                    op.imm = i.immediate(1);
                    Form::MI
                }
                _ => return None,
            }
        }
        _ => return None,
    };
    let size = match form {
        Form::MR | Form::MI => i.memory_size().size(),
        _ => i.op0_register().size(),
    };
    Some((form, size))
}

/// A specialised operation for an instruction, if there is one.
pub fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let m = i.mnemonic();
    if matches!(m, Mnemonic::Xchg | Mnemonic::Xadd | Mnemonic::Cmpxchg) {
        return exchange::select(cpu, i);
    }
    if i.has_lock_prefix() {
        return None;
    }
    match m {
        Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32 | Mnemonic::Pause => moves::nop(i),
        Mnemonic::Add
        | Mnemonic::Or
        | Mnemonic::Adc
        | Mnemonic::Sbb
        | Mnemonic::And
        | Mnemonic::Sub
        | Mnemonic::Xor
        | Mnemonic::Cmp
        | Mnemonic::Test
        | Mnemonic::Inc
        | Mnemonic::Dec
        | Mnemonic::Neg
        | Mnemonic::Not => alu::select(cpu, i),
        Mnemonic::Mov
        | Mnemonic::Movzx
        | Mnemonic::Movsx
        | Mnemonic::Movsxd
        | Mnemonic::Lea
        | Mnemonic::Cdqe
        | Mnemonic::Cqo
        | Mnemonic::Cdq
        | Mnemonic::Bswap => moves::select(cpu, i),
        Mnemonic::Shl
        | Mnemonic::Sal
        | Mnemonic::Shr
        | Mnemonic::Sar
        | Mnemonic::Rol
        | Mnemonic::Ror
        | Mnemonic::Imul
        | Mnemonic::Bt => shifts::select(cpu, i),
        Mnemonic::Push | Mnemonic::Pop | Mnemonic::Leave => stack::select(cpu, i),
        Mnemonic::Call | Mnemonic::Jmp | Mnemonic::Ret => branches::select(cpu, i),
        _ if i.is_jcc_short_or_near() => branches::select(cpu, i),
        _ => {
            let cc = i.condition_code() as u8;
            if cc == 0 {
                return None;
            }
            branches::select_conditional(cpu, i)
        }
    }
}

/// Reads a register without a bounds check.
#[inline(always)]
pub(crate) fn get(cpu: &Cpu, n: u8) -> u64 {
    // SAFETY: decoded register numbers are below 18, the array has 32 elements.
    unsafe { *cpu.r.gpr.get_unchecked(n as usize) }
}

/// Writes a register as instructions of `S` bytes do.
#[inline(always)]
pub(crate) fn set<const S: usize>(cpu: &mut Cpu, n: u8, v: u64) {
    // SAFETY: as in get().
    let r = unsafe { cpu.r.gpr.get_unchecked_mut(n as usize) };
    *r = match S {
        1 => *r & !0xff | v & 0xff,
        2 => *r & !0xffff | v & 0xffff,
        4 => v & 0xffff_ffff,
        _ => v,
    };
}

/// Sign-extends the low `S` bytes.
#[inline(always)]
pub(crate) fn sext<const S: usize>(v: u64) -> u64 {
    match S {
        1 => v as i8 as u64,
        2 => v as i16 as u64,
        4 => v as i32 as u64,
        _ => v,
    }
}

/// Mode of stack and branch operations that have fast forms: operand size 8 in
/// 64-bit mode, 4 in flat 32-bit mode.
pub(crate) fn fast_width(cpu: &Cpu) -> Option<usize> {
    match cpu.mode {
        Mode::Long64 => Some(8),
        Mode::Protected32 if cpu.flat => Some(4),
        _ => None,
    }
}
