//! Shifts, two-operand multiplication, bit tests and counts of bits.

use super::{addressing as address, get, operands, plain_register, set, Form};
use crate::code_cache::{Handler, Op};
use crate::cpu::Cpu;
use crate::decode::plain;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

const SHL: u8 = 0;
const SHR: u8 = 1;
const SAR: u8 = 2;
const ROL: u8 = 3;
const ROR: u8 = 4;

const fn mask<const S: usize>() -> u64 {
    u64::MAX >> (64 - 8 * S)
}

#[inline(always)]
fn shift<const O: u8, const S: usize>(f: Flags, a: u64, count: u64) -> (u64, Flags) {
    let a = a & mask::<S>();
    let count = Flags::shift_count(count, S);
    match O {
        SHL => f.shl(a, count, S),
        SHR => f.shr(a, count, S),
        SAR => f.sar(a, count, S),
        ROL => f.rol(a, count, S),
        _ => f.ror(a, count, S),
    }
}

fn shift_ri<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let (r, f) = shift::<O, S>(cpu.r.flags, get(cpu, op.dst), op.imm);
    cpu.r.flags = f;
    set::<S>(cpu, op.dst, r);
    Ok(())
}

fn shift_rcl<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let count = cpu.r.gpr[reg::RCX];
    let (r, f) = shift::<O, S>(cpu.r.flags, get(cpu, op.dst), count);
    cpu.r.flags = f;
    set::<S>(cpu, op.dst, r);
    Ok(())
}

#[inline(always)]
fn multiply<const S: usize>(a: u64, b: u64) -> (u64, bool) {
    match S {
        4 => {
            let wide = a as i32 as i64 * b as i32 as i64;
            (wide as u64 & 0xffff_ffff, wide != wide as i32 as i64)
        }
        _ => {
            let (r, overflow) = (a as i64).overflowing_mul(b as i64);
            (r as u64, overflow)
        }
    }
}

#[inline(always)]
fn product<const S: usize>(cpu: &mut Cpu, op: &Op, a: u64, b: u64) {
    let (r, overflow) = multiply::<S>(a, b);
    cpu.r.flags = cpu.r.flags.multiplied(overflow);
    set::<S>(cpu, op.dst, r);
}

fn imul_rr<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    product::<S>(cpu, op, a, b);
    Ok(())
}

fn imul_rm<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let b = address::load::<S>(cpu, op)?;
    let a = get(cpu, op.dst);
    product::<S>(cpu, op, a, b);
    Ok(())
}

fn imul_rri<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let a = get(cpu, op.src);
    product::<S>(cpu, op, a, op.imm);
    Ok(())
}

fn bt_ri<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let bit = op.imm & (8 * S as u64 - 1);
    let cf = get(cpu, op.dst) >> bit & 1 != 0;
    cpu.r.flags.set_cf(cf);
    Ok(())
}

fn bt_rr<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let bit = get(cpu, op.src) & (8 * S as u64 - 1);
    let cf = get(cpu, op.dst) >> bit & 1 != 0;
    cpu.r.flags.set_cf(cf);
    Ok(())
}

fn bt_mi<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = address::load::<S>(cpu, op)?;
    let bit = op.imm & (8 * S as u64 - 1);
    cpu.r.flags.set_cf(v >> bit & 1 != 0);
    Ok(())
}

macro_rules! shifts {
    ($f:ident, $o:expr, $s:expr) => {
        match $s {
            1 => $f::<{ $o }, 1> as Handler,
            2 => $f::<{ $o }, 2>,
            4 => $f::<{ $o }, 4>,
            _ => $f::<{ $o }, 8>,
        }
    };
}

macro_rules! by_kind {
    ($f:ident, $o:expr, $s:expr) => {
        match $o {
            SHL => shifts!($f, SHL, $s),
            SHR => shifts!($f, SHR, $s),
            SAR => shifts!($f, SAR, $s),
            ROL => shifts!($f, ROL, $s),
            _ => shifts!($f, ROR, $s),
        }
    };
}

macro_rules! wide {
    ($f:ident, $s:expr) => {
        match $s {
            4 => $f::<4> as Handler,
            8 => $f::<8>,
            _ => return None,
        }
    };
}

pub(super) fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let mut op = plain(imul_rr::<8>);
    match i.mnemonic() {
        Mnemonic::Imul => {
            if i.op_count() == 3 {
                op.dst = plain_register(i.op0_register())?;
                if i.op1_kind() != OpKind::Register {
                    return None;
                }
                op.src = plain_register(i.op1_register())?;
                op.imm = i.immediate(2);
                op.run = wide!(imul_rri, i.op0_register().size());
                return Some(op);
            }
            let (form, size) = operands(cpu, i, &mut op)?;
            op.run = match form {
                Form::RR => wide!(imul_rr, size),
                Form::RM => wide!(imul_rm, size),
                _ => return None,
            };
        }
        Mnemonic::Bt => {
            let (form, size) = operands(cpu, i, &mut op)?;
            op.run = match form {
                Form::RI => wide!(bt_ri, size),
                Form::RR => wide!(bt_rr, size),
                Form::MI => wide!(bt_mi, size),
                _ => return None,
            };
        }
        m => {
            let kind = match m {
                Mnemonic::Shl | Mnemonic::Sal => SHL,
                Mnemonic::Shr => SHR,
                Mnemonic::Sar => SAR,
                Mnemonic::Rol => ROL,
                Mnemonic::Ror => ROR,
                _ => return None,
            };
            let (form, size) = operands(cpu, i, &mut op)?;
            op.run = match form {
                Form::RI => by_kind!(shift_ri, kind, size),
                Form::RR if i.op1_register() == Register::CL => by_kind!(shift_rcl, kind, size),
                _ => return None,
            };
        }
    }
    Some(op)
}
