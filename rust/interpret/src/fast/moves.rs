//! MOV, MOVZX, MOVSX, LEA, CDQE and friends.

use super::{addressing as address, get, operands, plain_register, set, sext, Form};
use crate::code_cache::{Handler, Op};
use crate::cpu::Cpu;
use crate::decode::plain;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic, OpKind};

fn op_nop(_: &mut Cpu, _: &Op) -> X {
    Ok(())
}

pub(super) fn nop(_: &Instruction) -> Option<Op> {
    Some(plain(op_nop))
}

fn mov_rr<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = get(cpu, op.src);
    set::<S>(cpu, op.dst, v);
    Ok(())
}

fn mov_ri<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    set::<S>(cpu, op.dst, op.imm);
    Ok(())
}

fn mov_rm<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = address::load::<S>(cpu, op)?;
    set::<S>(cpu, op.dst, v);
    Ok(())
}

fn mov_mr<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = get(cpu, op.src);
    address::store::<S>(cpu, op, v)
}

fn mov_mi<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    address::store::<S>(cpu, op, op.imm)
}

fn low<const S: usize>(v: u64) -> u64 {
    v & (u64::MAX >> (64 - 8 * S))
}

fn movzx_rr<const D: usize, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = low::<S>(get(cpu, op.src));
    set::<D>(cpu, op.dst, v);
    Ok(())
}

fn movzx_rm<const D: usize, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = address::load::<S>(cpu, op)?;
    set::<D>(cpu, op.dst, v);
    Ok(())
}

fn movsx_rr<const D: usize, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = sext::<S>(get(cpu, op.src));
    set::<D>(cpu, op.dst, v);
    Ok(())
}

fn movsx_rm<const D: usize, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = sext::<S>(address::load::<S>(cpu, op)?);
    set::<D>(cpu, op.dst, v);
    Ok(())
}

fn lea64(cpu: &mut Cpu, op: &Op) -> X {
    let v = address::effective(cpu, op);
    set::<8>(cpu, op.dst, v);
    Ok(())
}

fn lea32(cpu: &mut Cpu, op: &Op) -> X {
    let v = address::effective(cpu, op);
    set::<4>(cpu, op.dst, v);
    Ok(())
}

fn cdqe(cpu: &mut Cpu, _: &Op) -> X {
    let v = sext::<4>(cpu.r.gpr[reg::RAX]);
    cpu.r.gpr[reg::RAX] = v;
    Ok(())
}

fn cdq(cpu: &mut Cpu, _: &Op) -> X {
    let v = sext::<4>(cpu.r.gpr[reg::RAX]) >> 32;
    cpu.r.gpr[reg::RDX] = v;
    Ok(())
}

fn cqo(cpu: &mut Cpu, _: &Op) -> X {
    cpu.r.gpr[reg::RDX] = (cpu.r.gpr[reg::RAX] as i64 >> 63) as u64;
    Ok(())
}

fn bswap4(cpu: &mut Cpu, op: &Op) -> X {
    let v = (get(cpu, op.dst) as u32).swap_bytes();
    set::<4>(cpu, op.dst, u64::from(v));
    Ok(())
}

fn bswap8(cpu: &mut Cpu, op: &Op) -> X {
    let v = get(cpu, op.dst).swap_bytes();
    set::<8>(cpu, op.dst, v);
    Ok(())
}

macro_rules! sizes {
    ($f:ident, $s:expr) => {
        match $s {
            1 => $f::<1> as Handler,
            2 => $f::<2>,
            4 => $f::<4>,
            _ => $f::<8>,
        }
    };
}

macro_rules! widen {
    ($f:ident, $d:expr, $s:expr) => {
        match ($d, $s) {
            (2, 1) => $f::<2, 1> as Handler,
            (4, 1) => $f::<4, 1>,
            (8, 1) => $f::<8, 1>,
            (4, 2) => $f::<4, 2>,
            (8, 2) => $f::<8, 2>,
            (8, 4) => $f::<8, 4>,
            _ => return None,
        }
    };
}

pub(super) fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let mut op = plain(op_nop);
    op.run = match i.mnemonic() {
        Mnemonic::Cdqe => cdqe,
        Mnemonic::Cdq => cdq,
        Mnemonic::Cqo => cqo,
        Mnemonic::Lea => {
            op.dst = plain_register(i.op0_register())?;
            address::fill(cpu, i, &mut op)?;
            match (i.op0_register().size(), crate::operands::address_size(i)) {
                (8, 8) => lea64,
                (4, 8 | 4) => lea32,
                _ => return None,
            }
        }
        Mnemonic::Bswap => {
            op.dst = plain_register(i.op0_register())?;
            match i.op0_register().size() {
                8 => bswap8,
                4 => bswap4,
                _ => return None,
            }
        }
        Mnemonic::Mov => {
            let (form, size) = operands(cpu, i, &mut op)?;
            match form {
                Form::RR => sizes!(mov_rr, size),
                Form::RI => sizes!(mov_ri, size),
                Form::RM => sizes!(mov_rm, size),
                Form::MR => sizes!(mov_mr, size),
                Form::MI => sizes!(mov_mi, size),
                _ => return None,
            }
        }
        m => {
            let (form, size) = operands(cpu, i, &mut op)?;
            let source = match i.op1_kind() {
                OpKind::Register => i.op1_register().size(),
                _ => i.memory_size().size(),
            };
            match (m, form) {
                (Mnemonic::Movzx, Form::RR) => widen!(movzx_rr, size, source),
                (Mnemonic::Movzx, Form::RM) => widen!(movzx_rm, size, source),
                (_, Form::RR) => widen!(movsx_rr, size, source),
                (_, Form::RM) => widen!(movsx_rm, size, source),
                _ => return None,
            }
        }
    };
    Some(op)
}
