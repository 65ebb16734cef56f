//! A vCPU reduced to what the unit needs, and instructions made from iced's codes.
#![allow(dead_code)]

#[cfg(all(target_arch = "x86_64", unix, not(feature = "portable")))]
pub mod reference;

use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, Instruction, MemorySize, OpCodeOperandKind as Kind, OpKind,
    Register,
};
use nonroot_native::{execute, Compiled, Control, Guest, NativeUnit, Stop, VectorState};
use std::collections::HashMap;

/// A repeatable source of test data (xorshift64*).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15))
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn fill(&mut self, bytes: &mut [u8]) {
        bytes.iter_mut().for_each(|byte| *byte = self.next() as u8);
    }

    /// A vector with plausible and with odd floating-point elements.
    pub fn vector(&mut self) -> [u8; 32] {
        const DOUBLES: [u64; 10] = [
            0,
            0x8000_0000_0000_0000,
            0x3ff0_0000_0000_0000,
            0x4008_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0xfff8_0000_0000_0123,
            0x000f_0000_1234_0000,
            0x7fef_ffff_ffff_ffff,
            0x3fb9_9999_9999_999a,
        ];
        const SINGLES: [u32; 10] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0x4049_0fdb,
            0x7f80_0000,
            0x7f80_0001,
            0xffc0_0123,
            0x0040_1234,
            0x7f7f_ffff,
            0x3dcc_cccd,
        ];
        let mut out = [0; 32];
        self.fill(&mut out);
        match self.below(4) {
            0 => {}
            1 => out.chunks_exact_mut(8).for_each(|lane| {
                lane.copy_from_slice(&DOUBLES[self.below(10) as usize].to_le_bytes());
            }),
            2 => out.chunks_exact_mut(4).for_each(|lane| {
                lane.copy_from_slice(&SINGLES[self.below(10) as usize].to_le_bytes());
            }),
            _ => out.chunks_exact_mut(4).for_each(|lane| {
                let value = (self.next() as i32 >> 12) as f32 / 256.0;
                lane.copy_from_slice(&value.to_le_bytes());
            }),
        }
        out
    }
}

/// An access that the memory refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    pub address: u64,
    pub write: bool,
}

/// The vCPU. Its memory holds only the bytes that were put there; others fault.
pub struct TestCpu {
    pub unit: NativeUnit,
    pub state: VectorState,
    pub gpr: [u64; 16],
    pub flags: u64,
    pub rip: u64,
    pub control: Control,
    pub memory: HashMap<u64, u8>,
    pub read_only: bool,
    /// Accesses as (address, bytes, write).
    pub log: Vec<(u64, usize, bool)>,
}

/// Where test operands lie; deliberately not aligned.
pub const ADDRESS: u64 = 0x1_2345_6001;

impl TestCpu {
    pub fn new() -> Self {
        TestCpu {
            unit: NativeUnit::new(),
            state: VectorState::default(),
            gpr: [0; 16],
            flags: 2,
            rip: 0x40_1000,
            control: Control { cr0: 0x8005_0033, cr4: 0x406f0, xcr0: 7, long: true, real: false },
            memory: HashMap::new(),
            read_only: false,
            log: Vec::new(),
        }
    }

    /// Fills all registers with test data.
    pub fn randomise(&mut self, random: &mut Random) {
        for n in 0..16 {
            self.state.ymm[n] = random.vector();
            self.gpr[n] = random.next();
        }
        self.flags = random.next() & 0x8d5 | 2;
        for n in 0..8 {
            random.fill(&mut self.state.fx[32 + 16 * n..][..10]);
        }
        self.state.fx[4] = random.next() as u8;
    }

    pub fn put(&mut self, address: u64, bytes: &[u8]) {
        for (n, &byte) in bytes.iter().enumerate() {
            self.memory.insert(address + n as u64, byte);
        }
    }

    pub fn get(&self, address: u64, count: usize) -> Vec<u8> {
        (0..count as u64).map(|n| self.memory[&(address + n)]).collect()
    }

    pub fn compile(&mut self, instruction: &Instruction) -> Compiled {
        match self.unit.compile(instruction) {
            Ok(compiled) => compiled,
            Err(why) => panic!("{instruction} ({:?}): {why}", instruction.code()),
        }
    }

    pub fn run(&mut self, instruction: &Instruction, address: u64) -> Result<(), Stop<Refused>> {
        let compiled = self.compile(instruction);
        execute(self, &compiled, address)
    }
}

impl Guest for TestCpu {
    type Fault = Refused;

    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), Refused> {
        self.log.push((address, buffer.len(), false));
        for (n, byte) in buffer.iter_mut().enumerate() {
            let at = address.wrapping_add(n as u64);
            *byte = *self.memory.get(&at).ok_or(Refused { address: at, write: false })?;
        }
        Ok(())
    }

    fn probe_write(&mut self, address: u64, length: usize) -> Result<(), Refused> {
        let mut addresses = (0..length as u64).map(|n| address.wrapping_add(n));
        match addresses.find(|at| self.read_only || !self.memory.contains_key(at)) {
            Some(at) => Err(Refused { address: at, write: true }),
            None => Ok(()),
        }
    }

    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Refused> {
        self.log.push((address, bytes.len(), true));
        let addresses = (0..bytes.len() as u64).map(|n| address.wrapping_add(n));
        if let Some(at) = addresses.clone().find(|at| self.read_only || !self.memory.contains_key(at)) {
            return Err(Refused { address: at, write: true });
        }
        self.memory.extend(addresses.zip(bytes.iter().copied()));
        Ok(())
    }

    fn gpr(&self, register: u8) -> u64 {
        self.gpr[register as usize]
    }

    fn set_gpr(&mut self, register: u8, value: u64) {
        self.gpr[register as usize] = value;
    }

    fn flags(&self) -> u64 {
        self.flags
    }

    fn set_status_flags(&mut self, flags: u64) {
        self.flags = self.flags & !0x8d5 | flags & 0x8d5;
    }

    fn instruction_pointer(&self) -> u64 {
        self.rip
    }

    fn control(&self) -> Control {
        self.control
    }

    fn vectors(&mut self) -> &mut VectorState {
        &mut self.state
    }

    fn parts(&mut self) -> (&mut NativeUnit, &mut VectorState) {
        (&mut self.unit, &mut self.state)
    }
}

/// Operands to make an instruction of: one register number for each position, or memory where the code allows it.
#[derive(Clone, Copy, Debug)]
pub struct Operands {
    pub registers: [u32; 5],
    pub memory: bool,
    pub immediate: u8,
}

/// The instruction of `code` with these operands in `bitness`-bit code, encoded and decoded
/// again; `None` if the code has no such form (memory only, register only, not encodable).
pub fn instruction(code: Code, operands: Operands, bitness: u32) -> Option<Instruction> {
    let info = code.op_code();
    let mut made = Instruction::new();
    made.set_code(code);
    let mut has_memory = false;
    let mut immediates = 0;
    for n in 0..info.op_count() {
        let number = operands.registers[n as usize];
        let small = if bitness == 64 { number & 15 } else { number & 7 };
        let stack = number & 7;
        let kind = info.op_kind(n);
        let mut memory = || {
            has_memory = true;
            made.set_op_kind(n, OpKind::Memory);
            made.set_memory_base(if bitness == 64 { Register::RBX } else { Register::EBX });
        };
        let register = match kind {
            Kind::mem => {
                memory();
                None
            }
            Kind::mem_vsib32x | Kind::mem_vsib64x => {
                memory();
                made.set_memory_index(Register::XMM0 + small);
                None
            }
            Kind::mem_vsib32y | Kind::mem_vsib64y => {
                memory();
                made.set_memory_index(Register::YMM0 + small);
                None
            }
            Kind::r16_or_mem
            | Kind::r32_or_mem
            | Kind::r64_or_mem
            | Kind::mm_or_mem
            | Kind::xmm_or_mem
            | Kind::ymm_or_mem
                if operands.memory =>
            {
                memory();
                None
            }
            Kind::r16_or_mem | Kind::r16_reg | Kind::r16_rm => Some(Register::AX + small),
            Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm | Kind::r32_vvvv => Some(Register::EAX + small),
            Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm | Kind::r64_vvvv => Some(Register::RAX + small),
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => Some(Register::MM0 + stack),
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
                Some(Register::XMM0 + small)
            }
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
                Some(Register::YMM0 + small)
            }
            Kind::st0 => Some(Register::ST0),
            Kind::sti_opcode => Some(Register::ST0 + stack),
            Kind::ax => Some(Register::AX),
            Kind::imm8 | Kind::imm4_m2z => {
                let kind = if immediates == 0 { OpKind::Immediate8 } else { OpKind::Immediate8_2nd };
                immediates += 1;
                made.set_op_kind(n, kind);
                if kind == OpKind::Immediate8 {
                    made.set_immediate8(operands.immediate);
                } else {
                    made.set_immediate8_2nd(operands.immediate);
                }
                None
            }
            Kind::seg_rDI => {
                has_memory = true;
                made.set_op_kind(n, if bitness == 64 { OpKind::MemorySegRDI } else { OpKind::MemorySegEDI });
                None
            }
            other => panic!("{code:?}: an operand of kind {other:?}"),
        };
        if let Some(register) = register {
            made.set_op_kind(n, OpKind::Register);
            made.set_op_register(n, register);
        }
    }
    if has_memory != operands.memory {
        return None;
    }
    let mut encoder = Encoder::new(bitness);
    encoder.encode(&made, 0).ok()?;
    let bytes = encoder.take_buffer();
    let decoded = Decoder::with_ip(bitness, &bytes, 0, DecoderOptions::NONE).decode();
    (decoded.code() == code).then_some(decoded)
}

/// Bytes of the memory operand that the instruction's definition says.
pub fn operand_size(instruction: &Instruction) -> usize {
    match instruction.memory_size() {
        MemorySize::Unknown => 0,
        size => size.size(),
    }
}
