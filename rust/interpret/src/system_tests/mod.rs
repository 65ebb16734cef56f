//! Tests of the system side with small descriptor tables in guest memory.

mod audit;
mod control;
mod debug;
mod events;
mod far;
mod iret;
mod msr;
mod segments;
mod syscall;

use crate::cpu::Cpu;
pub use crate::descriptors::null_segment;
use crate::state::*;
pub use crate::testing::{bits, fault_code, long_mode, peek, peek64, poke, protected32, real_mode};
use iced_x86::{Decoder, DecoderOptions};

pub const GDT: u64 = 0x5000;
pub const IDT: u64 = 0x6000;
pub const TSS: u64 = 0x7000;
pub const LDT: u64 = 0x7800;
/// Stacks that the TSS has.
pub const STACK0: u64 = 0x9000;
pub const STACK1: u64 = 0xa000;
/// Stack of level 3.
pub const STACK3: u64 = 0x2_0000;
/// First of the interrupt handlers; vector n is at HANDLERS + 16 n.
pub const HANDLERS: u64 = 0x4_0000;

// Selectors of the GDT, same in the 32-bit and the 64-bit one unless named otherwise.
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3: u16 = 0x18 | 3;
pub const DATA3: u16 = 0x20 | 3;
pub const TSS_SELECTOR: u16 = 0x28;
pub const CONFORMING0: u16 = 0x38;
pub const CODE1: u16 = 0x40;
pub const DATA1: u16 = 0x48;
pub const ABSENT_DATA: u16 = 0x50;
pub const READ_ONLY: u16 = 0x58;
pub const EXECUTE_ONLY: u16 = 0x60;
pub const LDT_SELECTOR: u16 = 0x68;
pub const EXPAND_DOWN: u16 = 0x78;
pub const ABSENT_CODE: u16 = 0x80;
pub const GATE32: u16 = 0x88;
pub const GATE16: u16 = 0x90;
pub const SMALL_CODE: u16 = 0x98;
pub const TASK_GATE: u16 = 0xa0;
/// 64-bit code of level 3 (64-bit GDT).
pub const LONG3: u16 = 0xa8 | 3;
/// 16-byte call gate (64-bit GDT).
pub const GATE64: u16 = 0xb0;
pub const CODE16: u16 = 0xc0;
pub const STACK16: u16 = 0xc8;
/// Beyond the table.
pub const OUTSIDE: u16 = 0x100;
const GDT_LIMIT: u16 = 0xff;

/// A code, data or system descriptor; `flags` are G, D/B, L, AVL.
pub fn descriptor(base: u64, limit: u64, access: u64, flags: u64) -> u64 {
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// A gate: type with P, DPL and S bits in `access`.
pub fn gate(selector: u16, offset: u64, access: u64, count: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | count << 32 | access << 40 | (offset >> 16 & 0xffff) << 48
}

pub fn put(cpu: &Cpu, at: u64, value: u64) {
    poke(cpu, at, &value.to_le_bytes());
}

pub fn set_descriptor(cpu: &Cpu, selector: u16, value: u64) {
    put(cpu, GDT + u64::from(selector & !7), value);
}

pub fn get_descriptor(cpu: &Cpu, selector: u16) -> u64 {
    peek64(cpu, GDT + u64::from(selector & !7))
}

fn common_tables(cpu: &mut Cpu) {
    let flat = |access| descriptor(0, 0xf_ffff, access, 0xc);
    for (selector, value) in [
        (DATA0, flat(0x93)),
        (DATA3, flat(0xf3)),
        (CODE1, flat(0xbb)),
        (DATA1, flat(0xb3)),
        (ABSENT_DATA, flat(0x12)),
        (READ_ONLY, flat(0xf0)),
        (EXECUTE_ONLY, flat(0xf8)),
        (EXPAND_DOWN, descriptor(0, 0xf, 0x96, 0xc)),
        (CODE16, descriptor(0, 0xffff, 0x9b, 0)),
        (STACK16, descriptor(0x1_0000, 0xffff, 0x92, 0)),
    ] {
        set_descriptor(cpu, selector, value);
    }
    cpu.r.gdtr = TableRegister { base: GDT, limit: GDT_LIMIT };
    cpu.r.idtr = TableRegister { base: IDT, limit: 0xfff };
}

/// 32-bit protected mode without paging, with descriptor tables and a TSS.
pub fn protected() -> Box<Cpu> {
    let mut cpu = protected32();
    common_tables(&mut cpu);
    let flat = |access| descriptor(0, 0xf_ffff, access, 0xc);
    for (selector, value) in [
        (CODE0, flat(0x9b)),
        (CODE3, flat(0xfb)),
        (TSS_SELECTOR, descriptor(TSS, 0x67, 0x8b, 0)),
        (CONFORMING0, flat(0x9e)),
        (LDT_SELECTOR, descriptor(LDT, 0xf, 0x82, 0)),
        (ABSENT_CODE, flat(0x1a)),
        (GATE32, gate(CODE0, 0x1_2345, 0xec, 2)),
        (GATE16, gate(CODE0, 0x1_2345, 0xe4, 2)),
        (SMALL_CODE, descriptor(0, 0xfff, 0x9a, 4)),
        (TASK_GATE, gate(TSS_SELECTOR, 0, 0xe5, 0)),
    ] {
        set_descriptor(&cpu, selector, value);
    }
    put(&cpu, LDT + 8, flat(0x92));
    put(&cpu, TSS + 4, STACK0 | u64::from(DATA0) << 32);
    put(&cpu, TSS + 12, STACK1 | u64::from(DATA1 | 1) << 32);
    // Interrupt gates for level 0 and up; INT 0x80 and INT3 for all; 0x81 a trap gate,
    // 0x82 a 16-bit gate, 0x83 conforming code, 0x84 absent, 0x85 not a gate.
    for n in 0..256u64 {
        let access = if matches!(n, 3 | 4 | 0x80) { 0xee } else { 0x8e };
        put(&cpu, IDT + 8 * n, gate(CODE0, HANDLERS + 16 * n, access, 0));
    }
    put(&cpu, IDT + 8 * 0x81, gate(CODE0, HANDLERS + 16 * 0x81, 0xef, 0));
    put(&cpu, IDT + 8 * 0x82, gate(CODE0, 0x1_8200, 0xe6, 0));
    put(&cpu, IDT + 8 * 0x83, gate(CONFORMING0, HANDLERS + 16 * 0x83, 0xee, 0));
    put(&cpu, IDT + 8 * 0x84, gate(CODE0, HANDLERS, 0x6e, 0));
    put(&cpu, IDT + 8 * 0x85, gate(CODE0, HANDLERS, 0xec, 0));
    put(&cpu, IDT + 8 * 0x86, gate(TSS_SELECTOR, 0, 0xe5, 0));
    cpu.r.tr = Segment { base: TSS, limit: 0x67, ar: 0x8b, selector: TSS_SELECTOR };
    cpu.r.ldtr = null_segment(0, 0);
    cpu.r.rflags = 2;
    cpu
}

/// The same at privilege level 3.
pub fn protected3() -> Box<Cpu> {
    let mut cpu = protected();
    level3(&mut cpu, CODE3, 0xc0fb);
    cpu
}

fn level3(cpu: &mut Cpu, cs: u16, ar: u32) {
    let data = Segment { base: 0, limit: 0xffff_ffff, ar: 0xc0f3, selector: DATA3 };
    cpu.r.seg = [data; 6];
    cpu.r.seg[seg::CS] = Segment { base: 0, limit: 0xffff_ffff, ar, selector: cs };
    cpu.r.gpr[reg::RSP] = STACK3;
    cpu.cpl = 3;
    cpu.update_mode();
}

/// 64-bit mode at level 0, with descriptor tables and a TSS.
pub fn long() -> Box<Cpu> {
    let mut cpu = long_mode();
    common_tables(&mut cpu);
    let flat = |access| descriptor(0, 0xf_ffff, access, 0xc);
    let long = |access| descriptor(0, 0xf_ffff, access, 0xa);
    for (selector, value) in [
        (CODE0, long(0x9b)),
        (CODE3, flat(0xfb)),
        (TSS_SELECTOR, descriptor(TSS, 0x67, 0x8b, 0)),
        (CONFORMING0, long(0x9e)),
        (LDT_SELECTOR, descriptor(LDT, 0xf, 0x82, 0)),
        (ABSENT_CODE, long(0x1a)),
        (SMALL_CODE, descriptor(0, 0xfff, 0x9a, 4)),
        (LONG3, long(0xfb)),
        (GATE64, gate(CODE0, 0x1_2345, 0xec, 0)),
    ] {
        set_descriptor(&cpu, selector, value);
    }
    put(&cpu, GDT + u64::from(TSS_SELECTOR) + 8, 0);
    put(&cpu, GDT + u64::from(LDT_SELECTOR) + 8, 0xffff_8000);
    put(&cpu, GDT + u64::from(GATE64) + 8, 0xffff_8000);
    put(&cpu, TSS + 4, STACK0);
    put(&cpu, TSS + 12, STACK1);
    // IST 1 to 7.
    for n in 1..=7 {
        put(&cpu, TSS + 28 + 8 * n, 0xb008 + 0x1000 * n);
    }
    for n in 0..256u64 {
        let access = if matches!(n, 3 | 4 | 0x80) { 0xee } else { 0x8e };
        let ist = if n == 0x90 { 2 } else { 0 };
        put(&cpu, IDT + 16 * n, gate(CODE0, HANDLERS + 16 * n, access, ist));
        put(&cpu, IDT + 16 * n + 8, 0);
    }
    put(&cpu, IDT + 16 * 0x81, gate(CODE0, HANDLERS + 16 * 0x81, 0xef, 0));
    put(&cpu, IDT + 16 * 0x82, gate(CODE0, 0x8200, 0xe6, 0));
    put(&cpu, IDT + 16 * 0x83, gate(CODE3, 0x8200, 0xee, 0));
    cpu.r.tr = Segment { base: TSS, limit: 0x67, ar: 0x8b, selector: TSS_SELECTOR };
    cpu.r.ldtr = null_segment(0, 0);
    cpu.r.rflags = 2;
    cpu
}

/// 64-bit mode at level 3.
pub fn long3() -> Box<Cpu> {
    let mut cpu = long();
    level3(&mut cpu, LONG3, 0xa0fb);
    cpu
}

/// Compatibility mode at level 3.
pub fn compat3() -> Box<Cpu> {
    let mut cpu = long();
    level3(&mut cpu, CODE3, 0xc0fb);
    cpu
}

/// Virtual-8086 mode: code at 0x1000:0, stack at 0x2000:0x800, IOPL as given.
pub fn v86(iopl: u64) -> Box<Cpu> {
    let mut cpu = protected();
    let segment =
        |selector: u16| Segment { base: u64::from(selector) << 4, limit: 0xffff, ar: 0xf3, selector };
    cpu.r.seg = [0x3000, 0x1000, 0x2000, 0x4000, 0x5000, 0x6000].map(segment);
    cpu.r.rflags = 2 | rflags::VM | rflags::IF | iopl << 12;
    cpu.r.gpr[reg::RSP] = 0x800;
    cpu.r.rip = 0x100;
    cpu.cpl = 3;
    cpu.update_mode();
    cpu
}

/// Executes the instruction in `bytes` at the current `rip`.
pub fn exec(cpu: &mut Cpu, bytes: &[u8]) -> X {
    let i = Decoder::with_ip(bits(cpu), bytes, cpu.r.rip, DecoderOptions::NONE).decode();
    assert!(!i.is_invalid(), "cannot decode {bytes:02x?}");
    cpu.next_rip = cpu.r.rip.wrapping_add(i.len() as u64);
    cpu.stop = None;
    let result = cpu.execute(&i);
    if result.is_ok() || matches!(cpu.stop, Some(StopReason::ExitAfter(_))) {
        cpu.r.rip = cpu.next_rip;
    }
    result
}

/// Executes an instruction that must complete.
#[track_caller]
pub fn ok(cpu: &mut Cpu, bytes: &[u8]) {
    if exec(cpu, bytes).is_err() {
        panic!("{bytes:02x?} stopped: {:?}", cpu.stop);
    }
}

/// Everything that a failed instruction must leave alone.
fn image(cpu: &Cpu) -> String {
    format!("{:?} {} {:?} {} {:?}", cpu.r, cpu.cpl, cpu.mode, cpu.shadow, cpu.msr)
}

/// Executes an instruction that must fault and change nothing: vector and error code.
#[track_caller]
pub fn faults(cpu: &mut Cpu, bytes: &[u8]) -> (u8, Option<u32>) {
    let before = image(cpu);
    assert!(exec(cpu, bytes).is_err(), "{bytes:02x?} did not fault");
    assert_eq!(before, image(cpu), "{bytes:02x?} changed state and faulted");
    fault_code(cpu)
}

pub fn dwords(cpu: &Cpu, at: u64, count: usize) -> Vec<u32> {
    peek(cpu, at, 4 * count).chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect()
}

pub fn words(cpu: &Cpu, at: u64, count: usize) -> Vec<u16> {
    peek(cpu, at, 2 * count).chunks(2).map(|c| u16::from_le_bytes(c.try_into().unwrap())).collect()
}

pub fn qwords(cpu: &Cpu, at: u64, count: usize) -> Vec<u64> {
    peek(cpu, at, 8 * count).chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap())).collect()
}

pub const UD: (u8, Option<u32>) = (vector::UD, None);

pub fn gp(error: u32) -> (u8, Option<u32>) {
    (vector::GP, Some(error))
}

pub fn np(error: u32) -> (u8, Option<u32>) {
    (vector::NP, Some(error))
}

pub fn ss(error: u32) -> (u8, Option<u32>) {
    (vector::SS, Some(error))
}

pub fn ts(error: u32) -> (u8, Option<u32>) {
    (vector::TS, Some(error))
}

pub fn rax(cpu: &mut Cpu, value: u64) {
    cpu.r.gpr[reg::RAX] = value;
}
