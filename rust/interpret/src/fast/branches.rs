//! Near jumps, calls and returns, conditional instructions, and comparisons
//! fused with the branch that follows them.

use super::alu::{self, CMP, TEST};
use super::stack::{pop, push};
use super::{addressing as address, fast_width, get, operands, set, sext, Form};
use crate::code_cache::{Handler, Op, SETS_RIP};
use crate::cpu::Cpu;
use crate::decode::plain;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Instruction pointer `offset` bytes from the block's start.
#[inline(always)]
fn rip_at<const S: usize>(cpu: &Cpu, offset: u64) -> u64 {
    let rip = cpu.r.gpr[reg::BLOCK_RIP].wrapping_add(offset);
    if S == 4 {
        rip & 0xffff_ffff
    } else {
        rip
    }
}

#[inline(always)]
fn take<const S: usize>(cpu: &mut Cpu, op: &Op) {
    cpu.r.rip = rip_at::<S>(cpu, op.target as i64 as u64);
}

#[inline(always)]
fn pass<const S: usize>(cpu: &mut Cpu, op: &Op) {
    cpu.r.rip = rip_at::<S>(cpu, u64::from(op.next));
}

fn jmp<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    take::<S>(cpu, op);
    Ok(())
}

fn jcc<const C: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    if cpu.r.flags.condition(C) {
        take::<S>(cpu, op);
    } else {
        pass::<S>(cpu, op);
    }
    Ok(())
}

fn call<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let back = rip_at::<S>(cpu, u64::from(op.next));
    push::<S>(cpu, back)?;
    take::<S>(cpu, op);
    Ok(())
}

/// Checks an indirect target.
#[inline(always)]
fn indirect<const S: usize>(cpu: &mut Cpu, target: u64) -> X<u64> {
    if S == 8 && !Cpu::canonical(target) {
        return Err(cpu.gp(0));
    }
    Ok(target)
}

fn jmp_r<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let t = get(cpu, op.dst) & (u64::MAX >> (64 - 8 * S));
    cpu.r.rip = indirect::<S>(cpu, t)?;
    Ok(())
}

fn jmp_m<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let t = address::load::<S>(cpu, op)?;
    cpu.r.rip = indirect::<S>(cpu, t)?;
    Ok(())
}

fn call_r<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let t = get(cpu, op.dst) & (u64::MAX >> (64 - 8 * S));
    let t = indirect::<S>(cpu, t)?;
    let back = rip_at::<S>(cpu, u64::from(op.next));
    push::<S>(cpu, back)?;
    cpu.r.rip = t;
    Ok(())
}

fn call_m<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let t = address::load::<S>(cpu, op)?;
    let t = indirect::<S>(cpu, t)?;
    let back = rip_at::<S>(cpu, u64::from(op.next));
    push::<S>(cpu, back)?;
    cpu.r.rip = t;
    Ok(())
}

fn ret<const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let sp = cpu.r.gpr[reg::RSP];
    let t = pop::<S>(cpu)?;
    if S == 8 && !Cpu::canonical(t) {
        cpu.r.gpr[reg::RSP] = sp;
        return Err(cpu.gp(0));
    }
    cpu.r.gpr[reg::RSP] = cpu.r.gpr[reg::RSP].wrapping_add(op.imm) & (u64::MAX >> (64 - 8 * S));
    cpu.r.rip = t;
    Ok(())
}

macro_rules! width {
    ($f:ident, $w:expr) => {
        if $w == 8 {
            $f::<8> as Handler
        } else {
            $f::<4>
        }
    };
}

/// Expands to a match over the sixteen condition codes.
macro_rules! conditions {
    ($cc:expr, $f:ident, $($rest:tt)*) => {
        match $cc {
            0 => $f::<0, $($rest)*> as Handler, 1 => $f::<1, $($rest)*>, 2 => $f::<2, $($rest)*>,
            3 => $f::<3, $($rest)*>, 4 => $f::<4, $($rest)*>, 5 => $f::<5, $($rest)*>, 6 => $f::<6, $($rest)*>,
            7 => $f::<7, $($rest)*>, 8 => $f::<8, $($rest)*>, 9 => $f::<9, $($rest)*>, 10 => $f::<10, $($rest)*>,
            11 => $f::<11, $($rest)*>, 12 => $f::<12, $($rest)*>, 13 => $f::<13, $($rest)*>,
            14 => $f::<14, $($rest)*>, _ => $f::<15, $($rest)*>,
        }
    };
}

/// The condition in the encoding's low nibble: iced numbers them in this order, after None.
fn condition(i: &Instruction) -> Option<u8> {
    (i.condition_code() as u8).checked_sub(1)
}

fn direct_target(i: &Instruction, width: usize, op: &mut Op) -> Option<()> {
    match (i.op0_kind(), width) {
        (OpKind::NearBranch64, 8) => op.target = i32::try_from(i.near_branch64() as i64).ok()?,
        (OpKind::NearBranch32, 4) => op.target = i.near_branch32() as i32,
        _ => return None,
    }
    Some(())
}

pub(super) fn select(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let width = fast_width(cpu)?;
    let mut op = plain(jmp::<8>);
    op.traits = SETS_RIP;
    op.run = match i.mnemonic() {
        Mnemonic::Ret => {
            let natural = if width == 8 {
                matches!(i.code(), iced_x86::Code::Retnq | iced_x86::Code::Retnq_imm16)
            } else {
                matches!(i.code(), iced_x86::Code::Retnd | iced_x86::Code::Retnd_imm16)
            };
            if !natural {
                return None;
            }
            op.imm = if i.op_count() == 1 { i.immediate(0) & 0xffff } else { 0 };
            width!(ret, width)
        }
        Mnemonic::Jmp | Mnemonic::Call => {
            let is_call = i.mnemonic() == Mnemonic::Call;
            match i.op0_kind() {
                OpKind::Register if i.op0_register().size() == width => {
                    op.dst = i.op0_register().number() as u8;
                    if is_call {
                        width!(call_r, width)
                    } else {
                        width!(jmp_r, width)
                    }
                }
                OpKind::Memory if i.is_jmp_near_indirect() || i.is_call_near_indirect() => {
                    if i.memory_size().size() != width {
                        return None;
                    }
                    address::fill(cpu, i, &mut op)?;
                    if is_call {
                        width!(call_m, width)
                    } else {
                        width!(jmp_m, width)
                    }
                }
                _ => {
                    direct_target(i, width, &mut op)?;
                    if is_call {
                        width!(call, width)
                    } else {
                        width!(jmp, width)
                    }
                }
            }
        }
        _ => {
            let cc = condition(i)?;
            direct_target(i, width, &mut op)?;
            op.cc = cc;
            op.fuse = FUSE_JCC | if width == 8 { 1 } else { 0 };
            if width == 8 {
                conditions!(cc, jcc, 8)
            } else {
                conditions!(cc, jcc, 4)
            }
        }
    };
    Some(op)
}

fn cmov_rr<const C: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = get(cpu, if cpu.r.flags.condition(C) { op.src } else { op.dst });
    set::<S>(cpu, op.dst, v);
    Ok(())
}

fn cmov_rm<const C: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let m = address::load::<S>(cpu, op)?;
    let v = if cpu.r.flags.condition(C) { m } else { get(cpu, op.dst) };
    set::<S>(cpu, op.dst, v);
    Ok(())
}

fn setcc_r<const C: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = cpu.r.flags.condition(C) as u64;
    set::<1>(cpu, op.dst, v);
    Ok(())
}

fn setcc_m<const C: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let v = cpu.r.flags.condition(C) as u64;
    address::store::<1>(cpu, op, v)
}

/// CMOVcc and SETcc.
pub(super) fn select_conditional(cpu: &Cpu, i: &Instruction) -> Option<Op> {
    let cc = condition(i)?;
    let mut op = plain(setcc_r::<0, 1>);
    if i.is_jcc_short_or_near() || i.is_loop() || i.is_loopcc() {
        return None;
    }
    let (form, size) = operands(cpu, i, &mut op)?;
    op.run = match (form, size) {
        (Form::RR, 4) => conditions!(cc, cmov_rr, 4),
        (Form::RR, 8) => conditions!(cc, cmov_rr, 8),
        (Form::RM, 4) => conditions!(cc, cmov_rm, 4),
        (Form::RM, 8) => conditions!(cc, cmov_rm, 8),
        (Form::R, 1) => conditions!(cc, setcc_r, 1),
        (Form::M, 1) => conditions!(cc, setcc_m, 1),
        _ => return None,
    };
    Some(op)
}

// ---- fusion -----------------------------------------------------------------------------

const FUSE_JCC: u8 = 0x80;

/// Class of a comparison for [`fuse`]; 0 if it is not fused.
pub(super) fn fuse_class(test: bool, form: Form, size: usize) -> u8 {
    let form = match form {
        Form::RR => 0,
        Form::RI => 1,
        Form::MR => 2,
        Form::MI => 3,
        Form::RM => 4,
        _ => return 0,
    };
    let size = match size {
        1 => 0,
        2 => return 0,
        4 => 1,
        _ => 2,
    };
    1 + (test as u8 * 5 + form) * 3 + size
}

/// The condition computed from the operands of a comparison, not from the flags.
#[inline(always)]
fn holds<const O: u8, const C: u8, const S: usize>(a: u64, b: u64) -> bool {
    let (ua, ub) = (a & (u64::MAX >> (64 - 8 * S)), b & (u64::MAX >> (64 - 8 * S)));
    let (sa, sb) = (sext::<S>(a) as i64, sext::<S>(b) as i64);
    let r = if O == TEST { ua & ub } else { ua.wrapping_sub(ub) };
    let sr = sext::<S>(r) as i64;
    let v = match C >> 1 {
        0 => O == CMP && sext::<S>((a ^ b) & (a ^ r)) as i64 >> 63 != 0,
        1 => O == CMP && ua < ub,
        2 => sr == 0,
        3 => {
            if O == CMP {
                ua <= ub
            } else {
                sr == 0
            }
        }
        4 => sr < 0,
        5 => (r as u8).count_ones() & 1 == 0,
        6 => {
            if O == CMP {
                sa < sb
            } else {
                sr < 0
            }
        }
        _ => {
            if O == CMP {
                sa <= sb
            } else {
                sr <= 0
            }
        }
    };
    v ^ (C & 1 != 0)
}

/// A comparison and the branch after it (64-bit mode).
fn fused<const C: u8, const O: u8, const F: u8, const S: usize>(cpu: &mut Cpu, op: &Op) -> X {
    let (a, b) = match F {
        0 => (get(cpu, op.dst), get(cpu, op.src)),
        1 => (get(cpu, op.dst), op.imm),
        2 => (address::load::<S>(cpu, op)?, get(cpu, op.src)),
        3 => (address::load::<S>(cpu, op)?, op.imm),
        _ => {
            let b = address::load::<S>(cpu, op)?;
            (get(cpu, op.dst), b)
        }
    };
    alu::compute::<O, S>(&mut cpu.r.flags, a, b);
    if holds::<O, C, S>(a, b) {
        take::<8>(cpu, op);
    } else {
        pass::<8>(cpu, op);
    }
    Ok(())
}

macro_rules! fused_sizes {
    ($class:expr, $cc:expr, $o:expr, $f:expr) => {
        match $class {
            0 => conditions!($cc, fused, { $o }, { $f }, 1),
            1 => conditions!($cc, fused, { $o }, { $f }, 4),
            _ => conditions!($cc, fused, { $o }, { $f }, 8),
        }
    };
}

/// Turns a comparison into comparison-and-branch, if the pair has a fused form.
pub fn fuse(compare: &mut Op, branch: &Op) -> bool {
    if compare.fuse == 0 || compare.fuse & FUSE_JCC != 0 || branch.fuse != FUSE_JCC | 1 {
        return false;
    }
    let class = compare.fuse - 1;
    let (kind, size, cc) = (class / 3, class % 3, branch.cc);
    compare.run = match kind {
        0 => fused_sizes!(size, cc, CMP, 0),
        1 => fused_sizes!(size, cc, CMP, 1),
        2 => fused_sizes!(size, cc, CMP, 2),
        3 => fused_sizes!(size, cc, CMP, 3),
        4 => fused_sizes!(size, cc, CMP, 4),
        5 => fused_sizes!(size, cc, TEST, 0),
        6 => fused_sizes!(size, cc, TEST, 1),
        7 => fused_sizes!(size, cc, TEST, 2),
        8 => fused_sizes!(size, cc, TEST, 3),
        _ => return false,
    };
    compare.target = branch.target;
    compare.next = branch.next;
    compare.traits = SETS_RIP;
    compare.fuse = 0;
    true
}
