//! XCHG, XADD, CMPXCHG.

use super::{addressing as address, get, operands, set, Form};
use crate::code_cache::{Handler, Op};
use crate::cpu::Cpu;
use crate::decode::plain;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic};

const fn mask<const S: usize>() -> u64 {
    u64::MAX >> (64 - 8 * S)
}

fn xchg_rr<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let (a, b) = (get(cpu, op.dst), get(cpu, op.src));
    set::<S>(cpu, op.dst, b);
    set::<S>(cpu, op.src, a);
    Ok(())
}

fn xchg_mr<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let lin = address::linear(cpu, op, S, true)?;
    let new = get(cpu, op.src) & mask::<S>();
    let old = cpu.rmw_lin(op.segment as usize, lin, S, true, |_| new)?;
    set::<S>(cpu, op.src, old);
    Ok(())
}

fn xadd_mr<const S: usize, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> X {
    let lin = address::linear(cpu, op, S, true)?;
    let b = get(cpu, op.src) & mask::<S>();
    let old = cpu.rmw_lin(op.segment as usize, lin, S, LOCK, |a| a.wrapping_add(b) & mask::<S>())?;
    cpu.r.flags = Flags::add(old, b, false, S).1;
    set::<S>(cpu, op.src, old);
    Ok(())
}

fn cmpxchg_mr<const S: usize, const LOCK: bool>(cpu: &mut Cpu, op: &Op) -> X {
    let lin = address::linear(cpu, op, S, true)?;
    let want = cpu.r.gpr[reg::RAX] & mask::<S>();
    let new = get(cpu, op.src) & mask::<S>();
    let old = cpu.rmw_lin(op.segment as usize, lin, S, LOCK, |a| if a == want { new } else { a })?;
    cpu.r.flags = Flags::sub(want, old, false, S).1;
    if old != want {
        set::<S>(cpu, reg::RAX as u8, old);
    }
    Ok(())
}

macro_rules! wide {
    ($f:ident, $s:expr) => {
        match $s {
            4 => $f::<4> as Handler,
            8 => $f::<8>,
            _ => return None,
        }
    };
    ($f:ident, $s:expr, $lock:expr) => {
        match ($s, $lock) {
            (4, false) => $f::<4, false> as Handler,
            (8, false) => $f::<8, false>,
            (4, true) => $f::<4, true>,
            (8, true) => $f::<8, true>,
            _ => return None,
        }
    };
}

pub(super) fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let mut op = plain(xchg_rr::<8>);
    let (mut form, size) = operands(cpu, i, &mut op)?;
    if i.mnemonic() == Mnemonic::Xchg && form == Form::RM {
        form = Form::MR;
        op.src = op.dst;
    }
    let lock = i.has_lock_prefix();
    op.run = match (i.mnemonic(), form) {
        (Mnemonic::Xchg, Form::RR) => wide!(xchg_rr, size),
        (Mnemonic::Xchg, Form::MR) => wide!(xchg_mr, size),
        (Mnemonic::Xadd, Form::MR) => wide!(xadd_mr, size, lock),
        (Mnemonic::Cmpxchg, Form::MR) => wide!(cmpxchg_mr, size, lock),
        _ => return None,
    };
    Some(op)
}
