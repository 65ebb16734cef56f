//! Random instructions with operands and registers that fit them.

use super::host::HostState;
use crate::state::*;
use crate::testing::{Rng, DATA};
use iced_x86::OpCodeOperandKind as K;
use iced_x86::{Code, CpuidFeature, Instruction, Mnemonic as M, OpKind, Register};

const MNEMONICS: &[M] = &[
    M::Add,
    M::Adc,
    M::Sub,
    M::Sbb,
    M::And,
    M::Or,
    M::Xor,
    M::Cmp,
    M::Test,
    M::Inc,
    M::Dec,
    M::Neg,
    M::Not,
    M::Mul,
    M::Imul,
    M::Div,
    M::Idiv,
    M::Mulx,
    M::Adcx,
    M::Adox,
    M::Shl,
    M::Sal,
    M::Shr,
    M::Sar,
    M::Rol,
    M::Ror,
    M::Rcl,
    M::Rcr,
    M::Shld,
    M::Shrd,
    M::Shlx,
    M::Shrx,
    M::Sarx,
    M::Rorx,
    M::Bt,
    M::Bts,
    M::Btr,
    M::Btc,
    M::Bsf,
    M::Bsr,
    M::Tzcnt,
    M::Lzcnt,
    M::Popcnt,
    M::Andn,
    M::Bextr,
    M::Blsi,
    M::Blsr,
    M::Blsmsk,
    M::Bzhi,
    M::Pdep,
    M::Pext,
    M::Crc32,
    M::Mov,
    M::Movzx,
    M::Movsx,
    M::Movsxd,
    M::Movnti,
    M::Movbe,
    M::Lea,
    M::Xlatb,
    M::Bswap,
    M::Cbw,
    M::Cwde,
    M::Cdqe,
    M::Cwd,
    M::Cdq,
    M::Cqo,
    M::Xchg,
    M::Xadd,
    M::Cmpxchg,
    M::Cmpxchg8b,
    M::Cmpxchg16b,
    M::Clc,
    M::Stc,
    M::Cmc,
    M::Lahf,
    M::Sahf,
    M::Nop,
    M::Movsb,
    M::Movsw,
    M::Movsd,
    M::Movsq,
    M::Cmpsb,
    M::Cmpsw,
    M::Cmpsd,
    M::Cmpsq,
    M::Stosb,
    M::Stosw,
    M::Stosd,
    M::Stosq,
    M::Lodsb,
    M::Lodsw,
    M::Lodsd,
    M::Lodsq,
    M::Scasb,
    M::Scasw,
    M::Scasd,
    M::Scasq,
    M::Seta,
    M::Setae,
    M::Setb,
    M::Setbe,
    M::Sete,
    M::Setg,
    M::Setge,
    M::Setl,
    M::Setle,
    M::Setne,
    M::Setno,
    M::Setnp,
    M::Setns,
    M::Seto,
    M::Setp,
    M::Sets,
    M::Cmova,
    M::Cmovae,
    M::Cmovb,
    M::Cmovbe,
    M::Cmove,
    M::Cmovg,
    M::Cmovge,
    M::Cmovl,
    M::Cmovle,
    M::Cmovne,
    M::Cmovno,
    M::Cmovnp,
    M::Cmovns,
    M::Cmovo,
    M::Cmovp,
    M::Cmovs,
];

fn host_has(code: Code) -> bool {
    code.cpuid_features().iter().all(|f| match f {
        CpuidFeature::BMI1 => is_x86_feature_detected!("bmi1"),
        CpuidFeature::BMI2 => is_x86_feature_detected!("bmi2"),
        CpuidFeature::ADX => is_x86_feature_detected!("adx"),
        CpuidFeature::MOVBE => is_x86_feature_detected!("movbe"),
        CpuidFeature::LZCNT => is_x86_feature_detected!("lzcnt"),
        CpuidFeature::POPCNT => is_x86_feature_detected!("popcnt"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        CpuidFeature::TBM | CpuidFeature::KNC => false,
        CpuidFeature::INTEL386_A0_ONLY | CpuidFeature::INTEL486_A_ONLY => false,
        _ => true,
    })
}

/// Instruction codes to test in 64-bit or 32-bit mode: forms without privileges or
/// control transfers.
pub fn codes(bits: u32) -> Vec<Code> {
    let exists = |c: Code| if bits == 64 { c.op_code().mode64() } else { c.op_code().mode32() };
    Code::values()
        .filter(|c| MNEMONICS.contains(&c.mnemonic()) && exists(*c) && host_has(*c))
        .filter(|c| {
            let o = c.op_code();
            (0..o.op_count()).all(|n| operand_supported(o.op_kind(n)))
        })
        .collect()
}

fn operand_supported(k: K) -> bool {
    use K::*;
    matches!(
        k,
        mem | r8_or_mem
            | r16_or_mem
            | r32_or_mem
            | r64_or_mem
            | r8_reg
            | r8_opcode
            | r16_reg
            | r16_rm
            | r16_opcode
            | r32_reg
            | r32_rm
            | r32_opcode
            | r32_vvvv
            | r64_reg
            | r64_rm
            | r64_opcode
            | r64_vvvv
            | al
            | cl
            | ax
            | eax
            | rax
            | imm8
            | imm8_const_1
            | imm8sex16
            | imm8sex32
            | imm8sex64
            | imm16
            | imm32
            | imm32sex64
            | imm64
            | seg_rSI
            | es_rDI
            | seg_rBX_al
    )
}

/// General registers an operand may be: not RSP, and not R15 (the host's own).
pub const NUMBERS: &[u32] = &[0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14];

fn register(rng: &mut Rng, size: usize, bits: u32) -> Register {
    let n = rng.pick(if bits == 64 { NUMBERS } else { &NUMBERS[..7] });
    match size {
        1 => {
            if rng.below(4) == 0 || bits == 32 && n > 3 {
                return rng.pick(&[Register::AH, Register::CH, Register::DH, Register::BH]);
            }
            // 5..7 as bytes are BPL, SIL, DIL here.
            Register::AL
                + match n {
                    0..=3 => n,
                    n => n + 4,
                }
        }
        2 => Register::AX + n,
        4 => Register::EAX + n,
        _ => Register::RAX + n,
    }
}

fn value(rng: &mut Rng) -> u64 {
    const EDGES: &[u64] = &[
        0,
        1,
        2,
        3,
        7,
        8,
        0xf,
        0x10,
        0x1f,
        0x20,
        0x3f,
        0x40,
        0x7f,
        0x80,
        0xff,
        0x100,
        0x7fff,
        0x8000,
        0xffff,
        0x1_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        i64::MAX as u64,
        i64::MIN as u64,
    ];
    match rng.below(5) {
        0 => rng.pick(EDGES),
        1 => rng.pick(EDGES).wrapping_neg(),
        2 => rng.below(256),
        3 => 1u64.rotate_left(rng.below(64) as u32).wrapping_sub(rng.below(3)),
        _ => rng.next(),
    }
}

/// Builds a random instruction of `code`; `None` if its operands cannot be combined.
pub fn instruction(rng: &mut Rng, code: Code, bits: u32) -> Option<Instruction> {
    let o = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let memory = rng.below(2) == 0;
    let string_widths = if bits == 64 { 2 } else { 1 };
    let mut uses_memory = false;
    for n in 0..o.op_count() {
        let k = o.op_kind(n);
        let reg = |i: &mut Instruction, r: Register| {
            i.set_op_kind(n, OpKind::Register);
            i.set_op_register(n, r);
        };
        let either = |rng: &mut Rng, i: &mut Instruction, size: usize, used: &mut bool| {
            if memory {
                i.set_op_kind(n, OpKind::Memory);
                *used = true;
            } else {
                i.set_op_kind(n, OpKind::Register);
                i.set_op_register(n, register(rng, size, bits));
            }
        };
        let immediate = |i: &mut Instruction, kind: OpKind, v: u64| {
            i.set_op_kind(n, kind);
            i.set_immediate_u64(n, v);
        };
        let v = value(rng);
        match k {
            K::mem => {
                i.set_op_kind(n, OpKind::Memory);
                uses_memory = true;
            }
            K::r8_or_mem => either(rng, &mut i, 1, &mut uses_memory),
            K::r16_or_mem => either(rng, &mut i, 2, &mut uses_memory),
            K::r32_or_mem => either(rng, &mut i, 4, &mut uses_memory),
            K::r64_or_mem => either(rng, &mut i, 8, &mut uses_memory),
            K::r8_reg | K::r8_opcode => reg(&mut i, register(rng, 1, bits)),
            K::r16_reg | K::r16_rm | K::r16_opcode => reg(&mut i, register(rng, 2, bits)),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => reg(&mut i, register(rng, 4, bits)),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => reg(&mut i, register(rng, 8, bits)),
            K::al => reg(&mut i, Register::AL),
            K::cl => reg(&mut i, Register::CL),
            K::ax => reg(&mut i, Register::AX),
            K::eax => reg(&mut i, Register::EAX),
            K::rax => reg(&mut i, Register::RAX),
            K::imm8 => immediate(&mut i, OpKind::Immediate8, v & 0xff),
            K::imm8_const_1 => immediate(&mut i, OpKind::Immediate8, 1),
            K::imm8sex16 => immediate(&mut i, OpKind::Immediate8to16, v as i8 as u64),
            K::imm8sex32 => immediate(&mut i, OpKind::Immediate8to32, v as i8 as u64),
            K::imm8sex64 => immediate(&mut i, OpKind::Immediate8to64, v as i8 as u64),
            K::imm16 => immediate(&mut i, OpKind::Immediate16, v & 0xffff),
            K::imm32 => immediate(&mut i, OpKind::Immediate32, v & 0xffff_ffff),
            K::imm32sex64 => immediate(&mut i, OpKind::Immediate32to64, v as i32 as u64),
            K::imm64 => immediate(&mut i, OpKind::Immediate64, v),
            K::seg_rSI => {
                let kind = rng.pick(&[OpKind::MemorySegESI, OpKind::MemorySegRSI][..string_widths]);
                // Both index registers have the same width.
                let kind = match i.op0_kind() {
                    OpKind::MemoryESRDI => OpKind::MemorySegRSI,
                    OpKind::MemoryESEDI => OpKind::MemorySegESI,
                    _ => kind,
                };
                i.set_op_kind(n, kind);
            }
            K::es_rDI => {
                let kind = match i.op0_kind() {
                    OpKind::MemorySegRSI => OpKind::MemoryESRDI,
                    OpKind::MemorySegESI => OpKind::MemoryESEDI,
                    _ => rng.pick(&[OpKind::MemoryESEDI, OpKind::MemoryESRDI][..string_widths]),
                };
                i.set_op_kind(n, kind);
            }
            K::seg_rBX_al => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(if bits == 64 { Register::RBX } else { Register::EBX });
                i.set_memory_index(Register::AL);
            }
            _ => return None,
        }
    }
    if uses_memory {
        let wide = bits == 64 && rng.below(4) != 0;
        let (base, index) = if wide {
            (rng.pick(&[Register::RSI, Register::RDI]), Register::R8)
        } else {
            (
                rng.pick(&[Register::ESI, Register::EDI]),
                if bits == 64 { Register::R8D } else { Register::EBP },
            )
        };
        i.set_memory_base(base);
        let aligned = code.mnemonic() == M::Cmpxchg16b;
        if !aligned && rng.below(2) == 0 {
            i.set_memory_index(index);
            i.set_memory_index_scale(rng.pick(&[1, 2, 4, 8]));
        }
        let displacement = if aligned { 16 * rng.below(8) } else { rng.below(128) };
        i.set_memory_displacement64(displacement);
        i.set_memory_displ_size(1);
    }
    if o.can_use_lock_prefix() && uses_memory && i.op0_kind() == OpKind::Memory && rng.below(3) == 0 {
        i.set_has_lock_prefix(true);
    }
    if i.is_string_instruction() {
        match rng.below(3) {
            0 => i.set_has_rep_prefix(true),
            1 => i.set_has_repne_prefix(true),
            _ => {}
        }
    }
    Some(i)
}

/// Registers that fit the instruction: pointers into the window, divisors that
/// mostly do not overflow, bit offsets that stay near.
pub fn registers(rng: &mut Rng, i: &Instruction, bits: u32) -> HostState {
    let index = if bits == 64 { 8 } else { reg::RBP };
    let mut s = HostState { gpr: [0; 16], flags: rng.next() & rflags::STATUS | 0x202 };
    for g in s.gpr.iter_mut() {
        *g = if bits == 64 { value(rng) } else { value(rng) & 0xffff_ffff };
    }
    match i.mnemonic() {
        M::Div | M::Idiv => {
            s.gpr[reg::RDX] = rng.pick(&[0, 1, u64::MAX, s.gpr[reg::RDX]]);
        }
        M::Bt | M::Bts | M::Btr | M::Btc if i.op1_kind() == OpKind::Register => {
            s.gpr[i.op1_register().full_register().number()] = rng.below(8192).wrapping_sub(4096);
        }
        M::Cmpxchg | M::Cmpxchg8b | M::Cmpxchg16b if rng.below(2) == 0 => {
            // Memory is filled with bytes 0 often enough for matches.
            s.gpr[reg::RAX] = 0;
            s.gpr[reg::RDX] = 0;
        }
        M::Xlatb => s.gpr[reg::RBX] = DATA + 0x800,
        _ => {}
    }
    let bit_test = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
    let uses_memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if i.is_string_instruction() {
        s.gpr[reg::RSI] = DATA + 0x800 + rng.below(0x1000);
        s.gpr[reg::RDI] = DATA + 0x800 + rng.below(0x1000);
        if rng.below(3) == 0 {
            // Overlapping.
            s.gpr[reg::RDI] = s.gpr[reg::RSI].wrapping_add(rng.below(32)).wrapping_sub(16);
        }
        let many = rng.below(200);
        s.gpr[reg::RCX] = rng.pick(&[0, 1, 2, many]);
        if rng.below(4) == 0 {
            s.flags |= rflags::DF;
        }
        if rng.below(2) == 0 {
            s.gpr[reg::RAX] = rng.pick(&[0, 0x0101_0101_0101_0101]);
        }
    } else if uses_memory {
        let align = if i.mnemonic() == M::Cmpxchg16b { !15 } else { !0 };
        for r in [reg::RSI, reg::RDI] {
            // A register that is also the bit offset, added to its own address, stays inside
            // because the offset reaches 1/8 of it: the comparison leaves such combinations out.
            s.gpr[r] = DATA + 0xc00 + (rng.below(0x800) & align);
        }
        s.gpr[index] = rng.below(16);
        if bit_test && i.op1_kind() == OpKind::Register {
            let n = i.op1_register().full_register().number();
            if ![reg::RSI, reg::RDI].contains(&n) {
                s.gpr[n] = if n == index { rng.below(64) } else { rng.below(8192).wrapping_sub(4096) };
            }
        }
    }
    if bits == 32 {
        s.gpr.iter_mut().for_each(|g| *g &= 0xffff_ffff);
    }
    s
}
