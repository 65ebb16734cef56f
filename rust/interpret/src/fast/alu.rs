//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT.

use super::{addressing as address, get, operands, set, sext, Form};
use crate::code_cache::{Handler, Op};
use crate::cpu::Cpu;
use crate::decode::plain;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic};

pub(super) const ADD: u8 = 0;
pub(super) const OR: u8 = 1;
pub(super) const ADC: u8 = 2;
pub(super) const SBB: u8 = 3;
pub(super) const AND: u8 = 4;
pub(super) const SUB: u8 = 5;
pub(super) const XOR: u8 = 6;
pub(super) const CMP: u8 = 7;
pub(super) const TEST: u8 = 8;
const INC: u8 = 9;
const DEC: u8 = 10;
const NEG: u8 = 11;
const NOT: u8 = 12;

/// Carry vector in [`Flags`]' layout from the carries out of each bit.
#[inline(always)]
fn carries<const S: usize>(c: u64) -> u64 {
    if S == 8 {
        c
    } else {
        c << (64 - 8 * S) | c & 8
    }
}

/// The operation on the low `S` bytes (upper bits of the operands do not
/// matter); upper bits of the result are undefined.
#[inline(always)]
pub(super) fn compute<const O: u8, const S: usize>(f: &mut Flags, a: u64, b: u64) -> u64 {
    let (r, c) = match O {
        ADD => {
            let r = a.wrapping_add(b);
            (r, a & b | (a | b) & !r)
        }
        ADC => {
            let r = a.wrapping_add(b).wrapping_add(f.cf() as u64);
            (r, a & b | (a | b) & !r)
        }
        SUB | CMP => {
            let r = a.wrapping_sub(b);
            (r, !a & b | (!a | b) & r)
        }
        SBB => {
            let r = a.wrapping_sub(b).wrapping_sub(f.cf() as u64);
            (r, !a & b | (!a | b) & r)
        }
        NEG => {
            let r = 0u64.wrapping_sub(a);
            (r, a | r)
        }
        INC => {
            let r = a.wrapping_add(1);
            (r, a & 1 | (a | 1) & !r)
        }
        DEC => {
            let r = a.wrapping_sub(1);
            (r, !a & 1 | (!a | 1) & r)
        }
        AND | TEST => (a & b, 0),
        OR => (a | b, 0),
        XOR => (a ^ b, 0),
        _ => return !a,
    };
    let s = sext::<S>(r);
    let cf = f.cf();
    f.zf = s;
    f.sp = s;
    f.cv = carries::<S>(c);
    if O == INC || O == DEC {
        f.set_cf(cf);
    }
    r
}

const fn writes(o: u8) -> bool {
    o != CMP && o != TEST
}

fn rr<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    let r = compute::<O, S>(&mut cpu.r.flags, a, b);
    if writes(O) {
        set::<S>(cpu, op.dst, r);
    }
    Ok(())
}

fn ri<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let a = get(cpu, op.dst);
    let r = compute::<O, S>(&mut cpu.r.flags, a, op.imm);
    if writes(O) {
        set::<S>(cpu, op.dst, r);
    }
    Ok(())
}

fn rm<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let b = address::load::<S>(cpu, op)?;
    let a = get(cpu, op.dst);
    let r = compute::<O, S>(&mut cpu.r.flags, a, b);
    if writes(O) {
        set::<S>(cpu, op.dst, r);
    }
    Ok(())
}

#[inline(always)]
fn memory<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op, b: u64) -> X {
    if !writes(O) {
        let a = address::load::<S>(cpu, op)?;
        compute::<O, S>(&mut cpu.r.flags, a, b);
        return Ok(());
    }
    let lin = address::linear(cpu, op, S, true)?;
    if let Some(host) = cpu.host_rw(lin, S) {
        // SAFETY: host_rw gives writable guest RAM for S bytes.
        unsafe {
            let a = crate::mem::host_load(host, S);
            let r = compute::<O, S>(&mut cpu.r.flags, a, b);
            crate::mem::host_store(host, S, r);
        }
        return Ok(());
    }
    let before = cpu.r.flags;
    let mut flags = before;
    cpu.rmw_lin(op.segment as usize, lin, S, false, |a| {
        flags = before;
        compute::<O, S>(&mut flags, a, b) & mask::<S>()
    })?;
    cpu.r.flags = flags;
    Ok(())
}

const fn mask<const S: usize>() -> u64 {
    u64::MAX >> (64 - 8 * S)
}

fn mr<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let b = get(cpu, op.src);
    memory::<O, S>(cpu, op, b)
}

fn mi<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    memory::<O, S>(cpu, op, op.imm)
}

fn one<const O: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let a = get(cpu, op.dst);
    let r = compute::<O, S>(&mut cpu.r.flags, a, 0);
    set::<S>(cpu, op.dst, r);
    Ok(())
}

macro_rules! sizes {
    ($f:ident, $o:expr, $s:expr) => {
        match $s {
            1 => $f::<{ $o }, 1> as Handler,
            2 => $f::<{ $o }, 2>,
            4 => $f::<{ $o }, 4>,
            _ => $f::<{ $o }, 8>,
        }
    };
}

macro_rules! forms {
    ($o:expr, $form:expr, $s:expr) => {
        match $form {
            Form::RR => sizes!(rr, $o, $s),
            Form::RI => sizes!(ri, $o, $s),
            Form::RM => sizes!(rm, $o, $s),
            Form::MR => sizes!(mr, $o, $s),
            Form::MI => sizes!(mi, $o, $s),
            _ => return None,
        }
    };
}

macro_rules! unary {
    ($o:expr, $form:expr, $s:expr) => {
        match $form {
            Form::R => sizes!(one, $o, $s),
            Form::M => sizes!(mi, $o, $s),
            _ => return None,
        }
    };
}

pub(super) fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let mut op = plain(rr::<ADD, 8>);
    let (mut form, size) = operands(cpu, i, &mut op)?;
    if i.mnemonic() == Mnemonic::Test && form == Form::RM {
        form = Form::MR;
        op.src = op.dst;
    }
    op.run = match i.mnemonic() {
        Mnemonic::Add => forms!(ADD, form, size),
        Mnemonic::Or => forms!(OR, form, size),
        Mnemonic::Adc => forms!(ADC, form, size),
        Mnemonic::Sbb => forms!(SBB, form, size),
        Mnemonic::And => forms!(AND, form, size),
        Mnemonic::Sub => forms!(SUB, form, size),
        Mnemonic::Xor => forms!(XOR, form, size),
        Mnemonic::Cmp => forms!(CMP, form, size),
        Mnemonic::Test => forms!(TEST, form, size),
        Mnemonic::Inc => unary!(INC, form, size),
        Mnemonic::Dec => unary!(DEC, form, size),
        Mnemonic::Neg => unary!(NEG, form, size),
        Mnemonic::Not => unary!(NOT, form, size),
        _ => return None,
    };
    if matches!(i.mnemonic(), Mnemonic::Cmp | Mnemonic::Test) {
        op.fuse = super::branches::fuse_class(i.mnemonic() == Mnemonic::Test, form, size);
    }
    Some(op)
}
