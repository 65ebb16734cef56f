//! The plans without generated code: moves, masked and gathered memory, x87
//! control, XSAVE. These run in every build.

mod common;

use common::{Random, Refused, TestCpu, ADDRESS};
use iced_x86::code_asm::*;
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, MemoryOperand, Register};
use nonroot_native::state::{fsw, fx};
use nonroot_native::{precheck, simd_fault, xstate, Class, Plan, Stop, Trap, VectorState};

/// One instruction from the assembler, decoded.
fn assemble(
    bitness: u32,
    emit: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Instruction {
    let mut assembler = CodeAssembler::new(bitness).expect("a valid bitness");
    emit(&mut assembler).expect("a valid instruction");
    let bytes = assembler.assemble(0).expect("encodable");
    Decoder::with_ip(bitness, &bytes, 0, DecoderOptions::NONE).decode()
}

/// A gather into register 1, from base, index, scale and displacement.
fn gather_of(code: Code, address: (Register, Register, u32, i64), mask: Register) -> Instruction {
    let (base, index, scale, displacement) = address;
    let memory = MemoryOperand::new(base, index, scale, displacement, 1, false, Register::None);
    let dst = if mask.is_ymm() { Register::YMM1 } else { Register::XMM1 };
    Instruction::with3(code, dst, memory, mask).expect("valid operands")
}

fn cpu() -> (TestCpu, VectorState) {
    let mut cpu = TestCpu::new();
    cpu.randomise(&mut Random::new(7));
    cpu.state.fx = VectorState::default().fx;
    let before = cpu.state.clone();
    (cpu, before)
}

fn bytes(count: u8) -> Vec<u8> {
    (1..=count).collect()
}

#[test]
fn loads_clear_or_keep_the_rest_of_the_register() {
    type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    // Emitter, bytes, where they land, up to where the register is cleared.
    let cases: [(Emit, usize, usize, usize); 12] = [
        (|a| a.movups(xmm9, ptr(rax)), 16, 0, 16),
        (|a| a.movdqa(xmm9, ptr(rax)), 16, 0, 16),
        (|a| a.movss(xmm9, dword_ptr(rax)), 4, 0, 16),
        (|a| a.movsd_2(xmm9, qword_ptr(rax)), 8, 0, 16),
        (|a| a.movd(xmm9, dword_ptr(rax)), 4, 0, 16),
        (|a| a.movq(xmm9, qword_ptr(rax)), 8, 0, 16),
        (|a| a.movlps(xmm9, qword_ptr(rax)), 8, 0, 0),
        (|a| a.movhpd(xmm9, qword_ptr(rax)), 8, 8, 0),
        (|a| a.vmovups(xmm9, ptr(rax)), 16, 0, 32),
        (|a| a.vmovss(xmm9, dword_ptr(rax)), 4, 0, 32),
        (|a| a.vmovq(xmm9, qword_ptr(rax)), 8, 0, 32),
        (|a| a.vmovdqu(ymm9, ymmword_ptr(rax)), 32, 0, 32),
    ];
    for (emit, size, at, clear_to) in cases {
        let instruction = assemble(64, emit);
        let (mut cpu, mut expected) = cpu();
        cpu.put(ADDRESS, &bytes(size as u8));
        assert!(matches!(cpu.compile(&instruction).plan, Plan::Load { .. }), "{instruction}");
        cpu.run(&instruction, ADDRESS).expect("memory is there");
        let register = &mut expected.ymm[9];
        register[at..at + size].copy_from_slice(&bytes(size as u8));
        if clear_to > at + size {
            register[at + size..clear_to].fill(0);
        }
        assert!(cpu.state == expected, "{instruction}: {:x?}", cpu.state.ymm[9]);
        assert_eq!(cpu.log, [(ADDRESS, size, false)], "{instruction}");
    }
}

#[test]
fn stores_write_exactly_their_bytes() {
    type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [(Emit, usize, usize); 8] = [
        (|a| a.movups(ptr(rax), xmm12), 16, 0),
        (|a| a.movntdq(ptr(rax), xmm12), 16, 0),
        (|a| a.movss(dword_ptr(rax), xmm12), 4, 0),
        (|a| a.movq(qword_ptr(rax), xmm12), 8, 0),
        (|a| a.movhps(qword_ptr(rax), xmm12), 8, 8),
        (|a| a.vmovlpd(qword_ptr(rax), xmm12), 8, 0),
        (|a| a.vmovd(dword_ptr(rax), xmm12), 4, 0),
        (|a| a.vmovntps(ymmword_ptr(rax), ymm12), 32, 0),
    ];
    for (emit, size, at) in cases {
        let instruction = assemble(64, emit);
        let (mut cpu, before) = cpu();
        cpu.put(ADDRESS, &bytes(size as u8));
        cpu.run(&instruction, ADDRESS).expect("memory is there");
        assert_eq!(cpu.get(ADDRESS, size), before.ymm[12][at..at + size], "{instruction}");
        assert_eq!(cpu.log, [(ADDRESS, size, true)], "{instruction}");
        assert!(cpu.state == before, "{instruction}");
    }
}

#[test]
fn moves_between_register_files() {
    let (mut cpu, mut expected) = cpu();
    let value = cpu.gpr[13];
    cpu.run(&assemble(64, |a| a.movd(xmm1, r13d)), 0).expect("no memory");
    expected.ymm[1][..16].fill(0);
    expected.ymm[1][..4].copy_from_slice(&value.to_le_bytes()[..4]);
    cpu.run(&assemble(64, |a| a.vmovq(xmm2, r13)), 0).expect("no memory");
    expected.ymm[2].fill(0);
    expected.ymm[2][..8].copy_from_slice(&value.to_le_bytes());
    cpu.run(&assemble(64, |a| a.movd(r8d, xmm2)), 0).expect("no memory");
    assert_eq!(cpu.gpr[8], value & 0xffff_ffff);
    cpu.run(&assemble(64, |a| a.movq(r8, xmm2)), 0).expect("no memory");
    assert_eq!(cpu.gpr[8], value);
    cpu.run(&assemble(64, |a| a.pxor(xmm3, xmm3)), 0).expect("no memory");
    expected.ymm[3][..16].fill(0);
    cpu.run(&assemble(64, |a| a.vxorps(xmm4, xmm5, xmm5)), 0).expect("no memory");
    expected.ymm[4].fill(0);
    cpu.run(&assemble(64, |a| a.movaps(xmm6, xmm7)), 0).expect("no memory");
    expected.ymm[6] = [&expected.ymm[7][..16], &expected.ymm[6][16..]].concat().try_into().expect("32 bytes");
    cpu.run(&assemble(64, |a| a.vmovaps(xmm8, xmm7)), 0).expect("no memory");
    expected.ymm[8].fill(0);
    let low: [u8; 16] = expected.ymm[7][..16].try_into().expect("16 bytes");
    expected.ymm[8][..16].copy_from_slice(&low);
    assert!(cpu.state == expected);
}

#[test]
fn outside_64_bit_mode_only_eight_registers_are_cleared() {
    for (all, from) in [(false, 16), (true, 0)] {
        for (long, count) in [(true, 16), (false, 8)] {
            let (mut cpu, mut expected) = cpu();
            cpu.control.long = long;
            let instruction = assemble(64, |a| if all { a.vzeroall() } else { a.vzeroupper() });
            cpu.run(&instruction, 0).expect("no memory");
            expected.ymm[..count].iter_mut().for_each(|register| register[from..].fill(0));
            assert!(cpu.state == expected);
        }
    }
}

#[test]
fn masked_moves_touch_only_selected_elements() {
    let (mut cpu, before) = cpu();
    let mut mask = [0u8; 32];
    mask[7] = 0x80; // element 1 of doublewords
    mask[31] = 0xff; // element 7
    cpu.state.ymm[2] = mask;
    cpu.put(ADDRESS + 4, &[1, 2, 3, 4]);
    cpu.put(ADDRESS + 28, &[5, 6, 7, 8]);
    let load = assemble(64, |a| a.vmaskmovps(ymm1, ymm2, ymmword_ptr(rax)));
    cpu.run(&load, ADDRESS).expect("the rest is not touched");
    let mut expected = [0; 32];
    expected[4..8].copy_from_slice(&[1, 2, 3, 4]);
    expected[28..].copy_from_slice(&[5, 6, 7, 8]);
    assert_eq!(cpu.state.ymm[1], expected);
    let store = assemble(64, |a| a.vpmaskmovd(ymmword_ptr(rax), ymm2, ymm3));
    cpu.run(&store, ADDRESS).expect("the rest is not touched");
    assert_eq!(cpu.get(ADDRESS + 4, 4), before.ymm[3][4..8]);
    assert_eq!(cpu.get(ADDRESS + 28, 4), before.ymm[3][28..]);
    // A selected element that is not there faults, and a load changes nothing then.
    cpu.state.ymm[2][3] = 0x80;
    let fault = Refused { address: ADDRESS, write: false };
    let kept = cpu.state.clone();
    assert_eq!(cpu.run(&load, ADDRESS), Err(Stop::Memory(fault)));
    assert!(cpu.state == kept);
    // An empty mask touches nothing at all.
    cpu.state.ymm[2] = [0x7f; 32];
    cpu.run(&load, 0).expect("nothing is selected");
    assert_eq!(cpu.state.ymm[1], [0; 32]);
}

#[test]
fn byte_masked_stores_go_to_rdi() {
    let (mut cpu, before) = cpu();
    cpu.state.ymm[5] = [0; 32];
    cpu.state.ymm[5][3] = 0x80;
    cpu.state.ymm[5][15] = 0xff;
    cpu.gpr[7] = ADDRESS;
    cpu.put(ADDRESS + 3, &[0]);
    cpu.put(ADDRESS + 15, &[0]);
    cpu.run(&assemble(64, |a| a.maskmovdqu(xmm4, xmm5)), 0).expect("the rest is not touched");
    assert_eq!(cpu.get(ADDRESS + 3, 1), before.ymm[4][3..4]);
    assert_eq!(cpu.get(ADDRESS + 15, 1), before.ymm[4][15..16]);
    // 32-bit code: EDI, and an address size of 32 bits.
    cpu.gpr[7] = 0xdead_0000_0000_8000;
    cpu.put(0x8003, &[0]);
    cpu.put(0x800f, &[0]);
    cpu.run(&assemble(32, |a| a.maskmovdqu(xmm4, xmm5)), 0).expect("the rest is not touched");
    assert_eq!(cpu.get(0x800f, 1), before.ymm[4][15..16]);
}

#[test]
fn mmx_masked_stores_see_physical_registers() {
    let (mut cpu, _) = cpu();
    cpu.state.set_top(5);
    // Physical register 1 is ST(4), 6 is ST(1) when TOP is 5.
    cpu.state.fx[fx::ST + 16 * 4..][..8].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
    cpu.state.fx[fx::ST + 16..][..8].copy_from_slice(&[0, 0xff, 0, 0, 0, 0, 0, 0x80]);
    cpu.gpr[7] = ADDRESS;
    cpu.put(ADDRESS + 1, &[0]);
    cpu.put(ADDRESS + 7, &[0]);
    cpu.run(&assemble(64, |a| a.maskmovq(mm1, mm6)), 0).expect("the rest is not touched");
    assert_eq!((cpu.get(ADDRESS + 1, 1), cpu.get(ADDRESS + 7, 1)), (vec![2], vec![8]));
    assert_eq!((cpu.state.top(), cpu.state.fx[fx::FTW]), (0, 0xff));
    assert_eq!(cpu.state.mm(1), [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn gathers_restart_where_they_faulted() {
    let (mut cpu, before) = cpu();
    let gather = gather_of(
        Code::VEX_Vpgatherdd_ymm_vm32y_ymm,
        (Register::RBX, Register::YMM2, 4, 0x10),
        Register::YMM3,
    );
    let indices: [i32; 8] = [0, 2, -1, 5, 7, 1, 3, 100];
    for (n, index) in indices.iter().enumerate() {
        cpu.state.ymm[2][4 * n..][..4].copy_from_slice(&index.to_le_bytes());
    }
    let mask = [1u32 << 31, 0, u32::MAX, 1 << 31, 0x7fff_ffff, u32::MAX, 1 << 31, 0];
    for (n, element) in mask.iter().enumerate() {
        cpu.state.ymm[3][4 * n..][..4].copy_from_slice(&element.to_le_bytes());
    }
    cpu.gpr[3] = ADDRESS;
    let address = |n: usize| ADDRESS.wrapping_add(0x10).wrapping_add((indices[n] as i64 * 4) as u64);
    for n in [0, 2] {
        cpu.put(address(n), &[n as u8 + 1; 4]);
    }
    let fault = Refused { address: address(3), write: false };
    assert_eq!(cpu.run(&gather, 0), Err(Stop::Memory(fault)));
    assert_eq!(cpu.state.ymm[1][..4], [1; 4]);
    assert_eq!(cpu.state.ymm[1][8..12], [3; 4]);
    assert_eq!(cpu.state.ymm[1][12..], before.ymm[1][12..], "elements to come are untouched");
    let left: Vec<u32> =
        cpu.state.ymm[3].chunks(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect();
    assert_eq!(left, [0, 0, 0, u32::MAX, 0, u32::MAX, u32::MAX, 0]);
    for n in [3, 5, 6] {
        cpu.put(address(n), &[n as u8 + 1; 4]);
    }
    cpu.log.clear();
    cpu.run(&gather, 0).expect("all elements are there");
    assert_eq!(cpu.log.len(), 3, "only the elements that were left");
    for (n, element) in mask.iter().enumerate() {
        let expected =
            if element >> 31 != 0 { vec![n as u8 + 1; 4] } else { before.ymm[1][4 * n..][..4].to_vec() };
        assert_eq!(cpu.state.ymm[1][4 * n..][..4], expected, "element {n}");
    }
    assert_eq!(cpu.state.ymm[3], [0; 32]);
}

#[test]
fn gather_addresses_have_the_address_size() {
    let (mut cpu, _) = cpu();
    cpu.state.ymm[2] = [0; 32];
    cpu.state.ymm[2][..8].copy_from_slice(&0x10u64.to_le_bytes());
    cpu.state.ymm[3] = [0; 32];
    cpu.state.ymm[3][7] = 0x80;
    cpu.gpr[3] = 0xffff_ffff_ffff_fff8;
    cpu.put(8, &[9; 8]);
    let gather =
        gather_of(Code::VEX_Vgatherqpd_xmm_vm64x_xmm, (Register::EBX, Register::XMM2, 1, 0), Register::XMM3);
    cpu.run(&gather, 0).expect("wraps at 32 bits");
    assert_eq!(cpu.state.ymm[1][..8], [9; 8]);
    assert_eq!(cpu.state.ymm[1][16..], [0; 16]);
    let same =
        gather_of(Code::VEX_Vgatherqpd_xmm_vm64x_xmm, (Register::EBX, Register::XMM2, 1, 0), Register::XMM1);
    assert_eq!(cpu.unit.compile(&same), Err(nonroot_native::Unsupported::InvalidOperands));
}

#[test]
fn mxcsr_loads_check_reserved_bits() {
    let (mut cpu, _) = cpu();
    let load = assemble(64, |a| a.ldmxcsr(dword_ptr(rax)));
    cpu.put(ADDRESS, &0x1_1f80u32.to_le_bytes());
    assert_eq!(cpu.run(&load, ADDRESS), Err(Stop::Trap(Trap::GeneralProtection)));
    assert_eq!(cpu.state.mxcsr, 0x1f80);
    cpu.put(ADDRESS, &0xffffu32.to_le_bytes());
    cpu.run(&load, ADDRESS).expect("no reserved bit");
    cpu.put(ADDRESS, &[0; 4]);
    cpu.run(&assemble(64, |a| a.vstmxcsr(dword_ptr(rax))), ADDRESS).expect("memory is there");
    assert_eq!(cpu.get(ADDRESS, 4), 0xffffu32.to_le_bytes());
}

#[test]
fn environments_hold_the_pointers_of_each_mode() {
    let (mut cpu, _) = cpu();
    cpu.state.set_fx64(fx::FIP, 0x0009_8765);
    cpu.state.set_fx64(fx::FDP, 0x0004_3210);
    cpu.state.set_fx16(fx::FOP, 0x5a3);
    cpu.state.set_fx16(fx::FSW, 3 << fsw::TOP_SHIFT);
    cpu.put(ADDRESS, &[0; 28]);
    let wide = assemble(64, |a| a.fnstenv(ptr(rax)));
    let narrow = Decoder::with_ip(64, &[0x66, 0xd9, 0x30], 0, DecoderOptions::NONE).decode();
    let u32s = |cpu: &TestCpu| -> Vec<u32> {
        cpu.get(ADDRESS, 28).chunks(4).map(|b| u32::from_le_bytes(b.try_into().expect("4 bytes"))).collect()
    };
    cpu.run(&wide, ADDRESS).expect("memory is there");
    let expected =
        [0xffff_037f, 0xffff_1800, 0xffff_ffff, 0x0009_8765, 0x05a3_0000, 0x0004_3210, 0xffff_0000];
    assert_eq!(u32s(&cpu), expected);
    cpu.control.real = true;
    cpu.run(&wide, ADDRESS).expect("memory is there");
    let expected =
        [0xffff_037f, 0xffff_1800, 0xffff_ffff, 0xffff_8765, 0x0000_95a3, 0xffff_3210, 0x0000_4000];
    assert_eq!(u32s(&cpu), expected);
    cpu.run(&narrow, ADDRESS).expect("memory is there");
    let expected: Vec<u8> = [0x037fu16, 0x1800, 0xffff, 0x8765, 0x95a3, 0x3210, 0x4000]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    assert_eq!(cpu.get(ADDRESS, 14), expected);
    // And back.
    let saved = cpu.state.clone();
    cpu.state.fx[..24].fill(0x11);
    cpu.state.fx[fx::FTW + 1] = 0;
    let load = Decoder::with_ip(64, &[0x66, 0xd9, 0x20], 0, DecoderOptions::NONE).decode();
    cpu.run(&load, ADDRESS).expect("memory is there");
    assert_eq!(cpu.state.fx[..24], saved.fx[..24]);
}

#[test]
fn control_registers_decide_what_may_start() {
    use Trap::{DeviceNotAvailable as Nm, InvalidOpcode as Ud};
    const PE: u64 = 1;
    const MP: u64 = 2;
    const EM: u64 = 4;
    const TS: u64 = 8;
    const OSFXSR: u64 = 1 << 9;
    const OSXSAVE: u64 = 1 << 18;
    let cases = [
        (Class::X87, 0, 0, 0, Ok(())),
        (Class::X87, EM, 0, 0, Err(Nm)),
        (Class::X87, TS, 0, 0, Err(Nm)),
        (Class::Wait, TS, 0, 0, Ok(())),
        (Class::Wait, EM, 0, 0, Ok(())),
        (Class::Wait, TS | MP, 0, 0, Err(Nm)),
        (Class::Mmx, 0, 0, 0, Ok(())),
        (Class::Mmx, EM | TS, 0, 0, Err(Ud)),
        (Class::Mmx, TS, 0, 0, Err(Nm)),
        (Class::Sse, 0, OSFXSR, 0, Ok(())),
        (Class::Sse, TS, 0, 0, Err(Ud)),
        (Class::Sse, EM, OSFXSR, 0, Err(Ud)),
        (Class::Sse, TS, OSFXSR, 0, Err(Nm)),
        (Class::SseMmx, TS, OSFXSR, 0, Err(Nm)),
        (Class::Avx, PE, OSXSAVE, 7, Ok(())),
        (Class::Avx, PE | EM, OSXSAVE, 7, Ok(())),
        (Class::Avx, PE, OSXSAVE, 3, Err(Ud)),
        (Class::Avx, PE, OSFXSR, 7, Err(Ud)),
        (Class::Avx, 0, OSXSAVE, 7, Err(Ud)),
        (Class::Avx, PE | TS, OSXSAVE, 7, Err(Nm)),
        (Class::Fxsr, EM, 0, 0, Err(Nm)),
        (Class::Fxsr, 0, 0, 0, Ok(())),
        (Class::Xsave, TS, 0, 0, Err(Ud)),
        (Class::Xsave, TS, OSXSAVE, 0, Err(Nm)),
        (Class::Xsave, EM, OSXSAVE, 0, Ok(())),
    ];
    for (class, c0, c4, xc0, expected) in cases {
        assert_eq!(precheck(class, c0, c4, xc0), expected, "{class:?} {c0:#x} {c4:#x} {xc0:#x}");
    }
    assert_eq!(simd_fault(1 << 10), Trap::SimdFault);
    assert_eq!(simd_fault(0), Ud);
}

/// A state in which every component differs from its initial configuration.
fn busy() -> TestCpu {
    let (mut cpu, _) = cpu();
    let mut random = Random::new(9);
    for n in 0..8 {
        random.fill(&mut cpu.state.fx[fx::ST + 16 * n..][..10]);
    }
    cpu.state.set_fx16(fx::FCW, 0x027f);
    cpu.state.set_fx16(fx::FSW, 5 << fsw::TOP_SHIFT | 0x21);
    cpu.state.fx[fx::FTW] = 0x3c;
    cpu.state.set_fx64(fx::FIP, 0x1234_5678_9abc);
    cpu.state.set_fx64(fx::FDP, 0xfedc_ba98_7654);
    cpu.state.mxcsr = 0x1fa0;
    cpu.put(ADDRESS, &[0xee; xstate::AREA_SIZE]);
    cpu.put(ADDRESS + 24, &0x1f80u32.to_le_bytes());
    cpu.put(ADDRESS + 512, &[0; 64]);
    cpu
}

#[test]
fn fxsave_and_fxrstor_are_inverse() {
    let mut cpu = busy();
    let saved = cpu.state.clone();
    cpu.run(&assemble(64, |a| a.fxsave64(ptr(rax))), ADDRESS).expect("memory is there");
    assert_eq!(cpu.get(ADDRESS + 28, 4), 0xffffu32.to_le_bytes(), "MXCSR_MASK");
    assert_eq!(cpu.get(ADDRESS + 416, 96), [0xee; 96], "the end is not written");
    cpu.state = VectorState::default();
    cpu.run(&assemble(64, |a| a.fxrstor64(ptr(rax))), ADDRESS).expect("memory is there");
    for n in 0..16 {
        assert_eq!(cpu.state.ymm[n][..16], saved.ymm[n][..16]);
        assert_eq!(cpu.state.ymm[n][16..], [0; 16], "not a part of it");
    }
    assert_eq!((cpu.state.fx, cpu.state.mxcsr), (saved.fx, saved.mxcsr));
    // The 32-bit form has 32-bit pointers.
    cpu.run(&assemble(64, |a| a.fxsave(ptr(rax))), ADDRESS).expect("memory is there");
    assert_eq!(cpu.get(ADDRESS + 8, 8), 0x5678_9abcu64.to_le_bytes());
    // Outside 64-bit mode, XMM8 and up are neither stored nor loaded.
    cpu.control.long = false;
    cpu.put(ADDRESS, &[0x77; 512]);
    cpu.run(&assemble(32, |a| a.fxsave(ptr(eax))), ADDRESS).expect("memory is there");
    assert_eq!(cpu.get(ADDRESS + 288, 224), [0x77; 224]);
    // Without CR4.OSFXSR, no XMM register is.
    cpu.control.cr4 = 0;
    cpu.put(ADDRESS, &[0x77; 512]);
    cpu.run(&assemble(32, |a| a.fxsave(ptr(eax))), ADDRESS).expect("memory is there");
    assert_eq!(cpu.get(ADDRESS + 160, 352), [0x77; 352]);
    cpu.put(ADDRESS + 24, &0x8000_1f80u32.to_le_bytes());
    let bad = cpu.run(&assemble(32, |a| a.fxrstor(ptr(eax))), ADDRESS);
    assert_eq!(bad, Err(Stop::Trap(Trap::GeneralProtection)));
}

#[test]
fn xsave_and_xrstor_keep_to_the_requested_components() {
    for compact in [false, true] {
        for request in 0..8u64 {
            let mut cpu = busy();
            let saved = cpu.state.clone();
            cpu.gpr[0] = request | 0xffff_ff00;
            cpu.gpr[2] = u64::MAX;
            let save = assemble(64, |a| if compact { a.xsavec64(ptr(rax)) } else { a.xsave64(ptr(rax)) });
            cpu.run(&save, ADDRESS).expect("memory is there");
            assert_eq!(cpu.get(ADDRESS + 512, 8), request.to_le_bytes(), "XSTATE_BV");
            let layout = if compact { request | 1 << 63 } else { 0 };
            assert_eq!(cpu.get(ADDRESS + 520, 8), layout.to_le_bytes(), "XCOMP_BV");
            cpu.state = VectorState::default();
            cpu.state.ymm = [[0xaa; 32]; 16];
            cpu.state.set_fx16(fx::FCW, 0x0b7f);
            cpu.state.mxcsr = 0x9f80;
            let other = cpu.state.clone();
            // Ask for everything: what was not saved becomes initial.
            cpu.gpr[0] = 7;
            cpu.run(&assemble(64, |a| a.xrstor64(ptr(rax))), ADDRESS).expect("a valid header");
            let initial = VectorState::default();
            let from = |bit: u64| if request & bit != 0 { &saved } else { &initial };
            assert_eq!(cpu.state.fx, from(1).fx);
            // MXCSR goes with SSE, in the standard format with AVX as well.
            let with_mxcsr = request & if compact { 2 } else { 6 } != 0;
            assert_eq!(cpu.state.mxcsr, if with_mxcsr { saved.mxcsr } else { 0x1f80 });
            for n in 0..16 {
                assert_eq!(cpu.state.ymm[n][..16], from(2).ymm[n][..16]);
                assert_eq!(cpu.state.ymm[n][16..], from(4).ymm[n][16..]);
            }
            // Ask for nothing: nothing changes.
            cpu.state = other.clone();
            cpu.gpr[0] = 0;
            cpu.run(&assemble(64, |a| a.xrstor64(ptr(rax))), ADDRESS).expect("a valid header");
            assert!(cpu.state == other);
        }
    }
}

#[test]
fn xsaveopt_leaves_initial_components_alone() {
    let mut cpu = busy();
    for register in &mut cpu.state.ymm {
        register[16..].fill(0);
    }
    assert_eq!(xstate::in_use(&cpu.state), 3);
    (cpu.gpr[0], cpu.gpr[2]) = (7, 0);
    cpu.put(ADDRESS + 512, &[0xff]);
    cpu.run(&assemble(64, |a| a.xsaveopt64(ptr(rax))), ADDRESS).expect("memory is there");
    assert_eq!(cpu.get(ADDRESS + 512, 1), [0xfb], "bits that were not asked for stay");
    assert_eq!(cpu.get(ADDRESS + 576, 256), [0xee; 256]);
    assert_eq!(cpu.get(ADDRESS + 24, 4), cpu.state.mxcsr.to_le_bytes());
}

#[test]
fn xrstor_refuses_bad_headers() {
    let general_protection = Err(Stop::Trap(Trap::GeneralProtection));
    // XSTATE_BV, XCOMP_BV, a byte of the rest of the header, MXCSR.
    let cases = [
        (8u64, 0u64, 0, 0x1f80u32),
        (1, 1, 0, 0x1f80),
        (1, 0, 16, 0x1f80),
        (3, 0, 0, 0x1_0000),
        (0, 0, 0, 0x1_0000),
        (4, 3 | 1 << 63, 0, 0x1f80),
        (1, 9 | 1 << 63, 0, 0x1f80),
        (1, 7 | 1 << 63, 24, 0x1f80),
        (2, 7 | 1 << 63, 0, 0x1_0000),
    ];
    for (present, layout, rest, mxcsr) in cases {
        let mut cpu = busy();
        let before = cpu.state.clone();
        (cpu.gpr[0], cpu.gpr[2]) = (7, 0);
        cpu.put(ADDRESS + 512, &present.to_le_bytes());
        cpu.put(ADDRESS + 520, &layout.to_le_bytes());
        if rest != 0 {
            cpu.put(ADDRESS + 512 + rest, &[1]);
        }
        cpu.put(ADDRESS + 24, &mxcsr.to_le_bytes());
        let result = cpu.run(&assemble(64, |a| a.xrstor64(ptr(rax))), ADDRESS);
        assert_eq!(result, general_protection, "{present:x} {layout:x} {rest} {mxcsr:x}");
        assert!(cpu.state == before);
    }
    // XSTATE_BV may not have what XCR0 has not.
    let mut cpu = busy();
    cpu.control.xcr0 = 3;
    (cpu.gpr[0], cpu.gpr[2]) = (3, 0);
    cpu.put(ADDRESS + 512, &[4]);
    assert_eq!(cpu.run(&assemble(64, |a| a.xrstor64(ptr(rax))), ADDRESS), general_protection);
}
