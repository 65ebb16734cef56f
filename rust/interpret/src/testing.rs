//! Helpers for unit tests: memory, vCPUs in each mode, single instructions.
#![allow(missing_docs)]

use crate::config::Config;
use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions};
use nonroot_memory::{Memory, P2M_WRITABLE};
use std::sync::Arc;

/// Where tests put code, data and stack (linear = guest-physical).
pub const CODE: u64 = 0x10_0000;
pub const DATA: u64 = 0x80_0000;
pub const STACK: u64 = 0x30_0000;
/// RAM of a test machine; everything above is not RAM.
pub const RAM: u64 = 16 << 20;
/// An address in the identity map without RAM behind it.
pub const MMIO: u64 = 0x2000_0000;

/// RAM at guest-physical 0..[`RAM`].
pub fn memory() -> Arc<Memory> {
    // SAFETY: the name is a NUL-terminated string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"test".as_ptr(), 0) };
    assert!(fd >= 0, "memfd_create failed");
    // SAFETY: `fd` is ours.
    assert_eq!(unsafe { libc::ftruncate(fd, RAM as i64) }, 0);
    let memory = Memory::new();
    let backing = memory.add_backing(fd, RAM).unwrap();
    // SAFETY: the mapping keeps the file alive.
    unsafe { libc::close(fd) };
    memory.map(0, RAM >> 12, backing, 0, P2M_WRITABLE).unwrap();
    Arc::new(memory)
}

/// A vCPU after power-on with interrupts of the engine's own settled.
pub fn power_on() -> Box<Cpu> {
    Cpu::new(memory(), Config::default())
}

fn flat(ar: u32) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, ar, selector: 0x10 }
}

/// 64-bit mode, CPL 0, identity mapping of 1 GiB in 2 MiB pages at 0x1000.
pub fn long_mode() -> Box<Cpu> {
    let mut cpu = power_on();
    let put = |cpu: &Cpu, at: u64, value: u64| cpu.mem.write(at, &value.to_le_bytes()).unwrap();
    put(&cpu, 0x1000, 0x2007);
    put(&cpu, 0x2000, 0x3007);
    for n in 0..512 {
        put(&cpu, 0x3000 + 8 * n, n << 21 | 0x87);
    }
    let r = &mut cpu.r;
    r.cr0 = cr0::PE | cr0::PG | cr0::WP | cr0::NE | cr0::ET;
    r.cr3 = 0x1000;
    r.cr4 = cr4::PAE;
    r.efer = efer::LME | efer::LMA | efer::NXE;
    r.seg = [flat(0xc093); 6];
    r.seg[seg::CS] = Segment { base: 0, limit: 0xffff_ffff, ar: 0xa09b, selector: 8 };
    start(cpu)
}

/// 32-bit protected mode, flat, no paging, CPL 0.
pub fn protected32() -> Box<Cpu> {
    let mut cpu = power_on();
    let r = &mut cpu.r;
    r.cr0 = cr0::PE | cr0::NE | cr0::ET;
    r.seg = [flat(0xc093); 6];
    r.seg[seg::CS] = Segment { base: 0, limit: 0xffff_ffff, ar: 0xc09b, selector: 8 };
    start(cpu)
}

/// Real mode with all segments at 0; code runs at 0x7c00.
pub fn real_mode() -> Box<Cpu> {
    let mut cpu = power_on();
    let data = Segment { base: 0, limit: 0xffff, ar: 0x93, selector: 0 };
    cpu.r.seg = [data; 6];
    cpu.r.seg[seg::CS].ar = 0x9b;
    cpu.r.gpr[reg::RDX] = 0;
    cpu = start(cpu);
    cpu.r.rip = 0x7c00;
    cpu.r.gpr[reg::RSP] = 0x7000;
    cpu
}

fn start(mut cpu: Box<Cpu>) -> Box<Cpu> {
    cpu.r.rip = CODE;
    cpu.r.gpr[reg::RSP] = STACK;
    cpu.r.gpr[reg::RDX] = 0;
    cpu.cpl = 0;
    cpu.rep_budget = u64::MAX;
    cpu.update_mode();
    cpu.mailbox.requests.store(0, std::sync::atomic::Ordering::Relaxed);
    cpu
}

/// Bits of the current mode.
pub fn bits(cpu: &Cpu) -> u32 {
    match cpu.mode {
        Mode::Long64 => 64,
        Mode::Protected32 => 32,
        _ => 16,
    }
}

/// Machine code of what `f` writes.
pub fn assemble(bits: u32, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    f(&mut a).unwrap();
    a.assemble(CODE & if bits == 16 { 0xffff } else { u64::MAX }).unwrap()
}

/// Executes the one instruction in `bytes` at the current `rip` through the
/// general executor; `rip` moves on if it completes (also with an exit after it).
pub fn step(cpu: &mut Cpu, bytes: &[u8]) -> X {
    let mut decoder = Decoder::with_ip(bits(cpu), bytes, cpu.r.rip, DecoderOptions::NONE);
    let i = decoder.decode();
    assert!(!i.is_invalid(), "cannot decode {bytes:02x?}");
    let width = match cpu.mode {
        Mode::Long64 => u64::MAX,
        Mode::Protected32 => 0xffff_ffff,
        _ => 0xffff,
    };
    cpu.next_rip = i.next_ip() & width;
    cpu.stop = None;
    cpu.mmio.rewind();
    let result = cpu.execute_general(&i);
    match result {
        Ok(done) => assert!(done, "{i:?} is not executed by the general executor"),
        Err(Stop) if !matches!(cpu.stop, Some(StopReason::ExitAfter(_))) => return Err(Stop),
        Err(Stop) => {}
    }
    cpu.r.rip = cpu.next_rip;
    cpu.mmio.clear();
    result.map(|_| ())
}

/// Assembles for the current mode and executes one instruction.
pub fn run(cpu: &mut Cpu, f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> X {
    let bytes = assemble(bits(cpu), f);
    step(cpu, &bytes)
}

/// The fault that the last instruction raised.
pub fn fault(cpu: &mut Cpu) -> Fault {
    match cpu.stop.take() {
        Some(StopReason::Fault(fault)) => fault,
        other => panic!("expected a fault, got {other:?}"),
    }
}

/// (vector, error code) of the fault that the last instruction raised.
pub fn fault_code(cpu: &mut Cpu) -> (u8, Option<u32>) {
    let f = fault(cpu);
    (f.vector, f.error)
}

/// Guest-physical bytes.
pub fn peek(cpu: &Cpu, gpa: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    cpu.mem.read(gpa, &mut out).unwrap();
    out
}

/// A guest-physical little-endian value of 8 bytes.
pub fn peek64(cpu: &Cpu, gpa: u64) -> u64 {
    u64::from_le_bytes(peek(cpu, gpa, 8).try_into().unwrap())
}

/// Writes guest-physical bytes.
pub fn poke(cpu: &Cpu, gpa: u64, data: &[u8]) {
    cpu.mem.write(gpa, data).unwrap();
}

/// splitmix64, for tests whose seed reproduces them.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
