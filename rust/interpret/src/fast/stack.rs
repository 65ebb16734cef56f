//! PUSH, POP, LEAVE with the mode's natural operand size.

use super::{addressing as address, fast_width, get, plain_register, set};
use crate::code_cache::Op;
use crate::cpu::Cpu;
use crate::decode::plain;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Masks a stack address: 64-bit mode or a flat 32-bit stack.
#[inline(always)]
fn stack<const S: usize>(sp: u64) -> u64 {
    if S == 4 {
        sp & 0xffff_ffff
    } else {
        sp
    }
}

/// Pushes `S` bytes.
#[inline(always)]
pub(super) fn push<const S: usize>(cpu: &mut Cpu, v: u64) -> X {
    let sp = stack::<S>(cpu.r.gpr[reg::RSP].wrapping_sub(S as u64));
    cpu.store_lin(seg::SS, sp, S, v)?;
    cpu.r.gpr[reg::RSP] = sp;
    Ok(())
}

/// Pops `S` bytes.
#[inline(always)]
pub(super) fn pop<const S: usize>(cpu: &mut Cpu) -> X<u64> {
    let sp = stack::<S>(cpu.r.gpr[reg::RSP]);
    let v = cpu.load_lin(seg::SS, sp, S)?;
    cpu.r.gpr[reg::RSP] = stack::<S>(sp.wrapping_add(S as u64));
    Ok(v)
}

fn push_r<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = get(cpu, op.dst);
    push::<S>(cpu, v)
}

fn push_i<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    push::<S>(cpu, op.imm)
}

fn push_m<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = address::load::<S>(cpu, op)?;
    push::<S>(cpu, v)
}

fn pop_r<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = pop::<S>(cpu)?;
    set::<S>(cpu, op.dst, v);
    Ok(())
}

fn leave<const S: usize>(cpu: &mut Cpu, _: &Op) -> X {
    let bp = stack::<S>(cpu.r.gpr[reg::RBP]);
    let v = cpu.load_lin(seg::SS, bp, S)?;
    cpu.r.gpr[reg::RSP] = stack::<S>(bp.wrapping_add(S as u64));
    cpu.r.gpr[reg::RBP] = v;
    Ok(())
}

pub(super) fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let width = fast_width(cpu)?;
    if i.stack_pointer_increment().unsigned_abs() as usize != width && i.mnemonic() != Mnemonic::Leave {
        return None;
    }
    let mut op = plain(leave::<8>);
    let eight = width == 8;
    op.run = match (i.mnemonic(), i.op0_kind()) {
        (Mnemonic::Leave, _) => {
            if i.code() != (if eight { iced_x86::Code::Leaveq } else { iced_x86::Code::Leaved }) {
                return None;
            }
            if eight {
                leave::<8>
            } else {
                leave::<4>
            }
        }
        (Mnemonic::Push, OpKind::Register) => {
            op.dst = plain_register(i.op0_register())?;
            if eight {
                push_r::<8>
            } else {
                push_r::<4>
            }
        }
        (Mnemonic::Push, OpKind::Memory) => {
            address::fill(cpu, i, &mut op)?;
            if eight {
                push_m::<8>
            } else {
                push_m::<4>
            }
        }
        (Mnemonic::Push, _) => {
            op.imm = i.immediate(0);
            if eight {
                push_i::<8>
            } else {
                push_i::<4>
            }
        }
        (Mnemonic::Pop, OpKind::Register) => {
            op.dst = plain_register(i.op0_register())?;
            if eight {
                pop_r::<8>
            } else {
                pop_r::<4>
            }
        }
        _ => return None,
    };
    Some(op)
}
