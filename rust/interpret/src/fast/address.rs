//! Linear addresses of memory operands.

use super::get;
use crate::code_cache::Op;
use crate::cpu::Cpu;
use crate::operands::{address_size, memory_segment};
use crate::state::*;
use iced_x86::{Instruction, Register};

/// 64-bit address, segment base zero.
const FLAT64: u8 = 0;
/// 64-bit address, base of FS or GS.
const BASED64: u8 = 1;
/// 32-bit address, segment base zero and no limit.
const FLAT32: u8 = 2;
/// Full segment checks; 16-, 32- or 64-bit address.
const CHECKED16: u8 = 3;
const CHECKED32: u8 = 4;
const CHECKED64: u8 = 5;

/// Fills in the address fields of an operation.
pub fn fill(cpu: &Cpu, i: &Instruction, op: &mut Op) -> Option<()> {
    let size = address_size(i);
    let segment = memory_segment(i);
    op.segment = segment as u8;
    op.disp = i.memory_displacement64();
    op.base = match i.memory_base() {
        Register::None => reg::ZERO as u8,
        Register::RIP | Register::EIP => reg::BLOCK_RIP as u8,
        r if r.is_gpr() => r.number() as u8,
        _ => return None,
    };
    op.idx = match i.memory_index() {
        Register::None => reg::ZERO as u8,
        r if r.is_gpr() => r.number() as u8,
        _ => return None,
    };
    op.scale = i.memory_index_scale().trailing_zeros() as u8;
    let long = cpu.mode == Mode::Long64;
    op.address = match (long, size) {
        (true, 8) if segment < seg::FS => FLAT64,
        (true, 8) => BASED64,
        (true, 4) if segment < seg::FS => FLAT32,
        (true, _) => CHECKED32,
        (false, 4) if cpu.flat && segment < seg::FS && segment != seg::CS => FLAT32,
        (false, 4) => CHECKED32,
        (false, 2) => CHECKED16,
        _ => CHECKED64,
    };
    Some(())
}

/// Effective address before wrapping.
#[inline(always)]
pub fn effective(cpu: &Cpu, op: &Op) -> u64 {
    get(cpu, op.base).wrapping_add(get(cpu, op.idx) << (op.scale & 3)).wrapping_add(op.disp)
}

/// Linear address of the operand, checked for `size` bytes.
#[inline(always)]
pub fn linear(cpu: &mut Cpu, op: &Op, size: usize, write: bool) -> X<u64> {
    let ea = effective(cpu, op);
    if op.address == FLAT64 {
        return Ok(ea);
    }
    other(cpu, op, ea, size, write)
}

#[inline(always)]
fn other(cpu: &mut Cpu, op: &Op, ea: u64, size: usize, write: bool) -> X<u64> {
    match op.address {
        BASED64 => Ok(ea.wrapping_add(cpu.r.seg[op.segment as usize].base)),
        FLAT32 => Ok(ea & 0xffff_ffff),
        _ => checked(cpu, op, ea, size, write),
    }
}

#[inline(never)]
fn checked(cpu: &mut Cpu, op: &Op, ea: u64, size: usize, write: bool) -> X<u64> {
    let ea = match op.address {
        CHECKED16 => ea & 0xffff,
        CHECKED32 => ea & 0xffff_ffff,
        _ => ea,
    };
    cpu.linear(op.segment as usize, ea, size, write)
}

/// Loads `S` bytes from the operand.
#[inline(always)]
pub fn load<const S: usize>(cpu: &mut Cpu, op: &Op) -> X<u64> {
    let lin = linear(cpu, op, S, false)?;
    cpu.load_lin(op.segment as usize, lin, S)
}

/// Stores `S` bytes to the operand.
#[inline(always)]
pub fn store<const S: usize>(cpu: &mut Cpu, op: &Op, v: u64) -> X {
    let lin = linear(cpu, op, S, true)?;
    cpu.store_lin(op.segment as usize, lin, S, v)
}
