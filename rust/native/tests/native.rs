//! Every instruction, compared with the host running it on the same registers
//! in a frame of its own: all vector, general and x87 registers, flags, MXCSR
//! and memory must come out the same.

#![cfg(all(target_arch = "x86_64", unix, not(feature = "portable")))]

mod common;

use common::reference::{host_environment, set_host_mxcsr, Host, HostState};
use common::{instruction, Operands, Random, Refused, TestCpu};
use iced_x86::Mnemonic::{Dppd, Dpps, Vdppd, Vdpps};
use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction};
use nonroot_native::state::{fsw, fx};
use nonroot_native::{
    execute, uses_mxcsr, Class, HostFeatures, MemAccess, NativeUnit, Plan, Stop, Trap, VectorState,
    X87Control,
};

const ROUNDS: usize = 6;

/// A form of every code that the unit compiles on this host, with its plan's class.
fn forms(classes: &[Class]) -> Vec<Instruction> {
    let mut cpu = TestCpu::new();
    let mut all = Vec::new();
    // RSP (4) is not the frame's to load, RBX (3) addresses memory.
    let registers =
        [[1, 2, 3, 5, 6], [9, 14, 8, 15, 12], [0, 0, 0, 0, 0], [8, 8, 1, 7, 2], [15, 1, 15, 2, 3]];
    for code in Code::values() {
        if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX) || code.op_code().fwait() {
            continue;
        }
        let mut bare = Instruction::new();
        bare.set_code(code);
        let Some(class) = nonroot_native::classify(&bare) else { continue };
        if !classes.contains(&class) || !code.op_code().mode64() {
            continue;
        }
        let missing = |&f: &_| !HostFeatures::of_host().contains(HostFeatures::of(f).expect("known"));
        if code.cpuid_features().iter().any(missing) {
            continue;
        }
        for (n, registers) in registers.into_iter().enumerate() {
            for memory in [false, true] {
                let operands = Operands { registers, memory, immediate: [0, 0x1b, 0x4d, 0xff, 0x72][n] };
                let Some(made) = instruction(code, operands, 64) else { continue };
                // Gathers with equal registers are invalid and have a test of their own.
                match cpu.unit.compile(&made) {
                    Ok(compiled) if !matches!(compiled.plan, Plan::Gather(_)) => all.push(made),
                    Ok(_) | Err(nonroot_native::Unsupported::InvalidOperands) => {}
                    Err(why) => panic!("{made} ({code:?}): {why}"),
                }
            }
        }
    }
    all
}

/// x87 registers with values of all kinds, a random stack and random flags
/// (none of which is unmasked).
fn random_x87(state: &mut VectorState, random: &mut Random, unmasked: bool) {
    for n in 0..8 {
        let mantissa = random.next();
        let (mantissa, exponent) = match random.below(9) {
            0 => (0, 0),
            1 => (1 << 63, 0x3fff),
            2 => (mantissa | 1 << 63, 0x3ffe + random.below(5) as u16),
            3 => (mantissa >> 1, 0),
            4 => (1 << 63, 0x7fff),
            5 => (mantissa | 3 << 62, 0x7fff),
            6 => (mantissa >> 1 | 1 << 63, 0x7fff),
            7 => (mantissa | 1 << 63, random.below(0x7fff) as u16),
            _ => (mantissa, random.next() as u16 & 0x7fff),
        };
        let slot = &mut state.fx[fx::ST + 16 * n..][..10];
        slot[..8].copy_from_slice(&mantissa.to_le_bytes());
        let sign = (random.next() as u16) << 15;
        slot[8..].copy_from_slice(&(exponent | sign).to_le_bytes());
    }
    let masks = if unmasked { random.next() as u16 & 0x3f } else { 0x3f };
    let control = random.next() as u16 & 0x0f00 | 0x40 | masks;
    state.set_fx16(fx::FCW, control);
    let flags = random.next() as u16 & masks & random.next() as u16;
    state.set_fx16(fx::FSW, random.next() as u16 & 0x7f00 | flags);
    state.fx[fx::FTW] = match random.below(4) {
        0 => random.next() as u8,
        1 => 0,
        _ => 0xff,
    };
}

fn prepare(cpu: &mut TestCpu, host: &mut Host, random: &mut Random, memory: Option<MemAccess>) -> u64 {
    let size = memory.map_or(64, |m| m.size as usize);
    let address = host.buffer(size.next_multiple_of(memory.map_or(1, |m| m.align as usize)));
    let mut data = Vec::new();
    while data.len() < size {
        data.extend(random.vector());
    }
    cpu.memory.clear();
    cpu.put(address, &data[..size]);
    host.write(address, &data[..size]);
    cpu.gpr[3] = address;
    cpu.gpr[7] = address;
    address
}

fn host_state(cpu: &TestCpu) -> HostState {
    HostState {
        ymm: cpu.state.ymm,
        fx: cpu.state.fx,
        gpr: cpu.gpr,
        rflags: cpu.flags,
        mxcsr: cpu.state.mxcsr,
        ..HostState::default()
    }
}

/// Compares everything but the x87 pointers, which have tests of their own.
fn assert_same(cpu: &TestCpu, host: &Host, expected: &HostState, address: u64, what: &str) {
    for n in 0..16 {
        assert_eq!(cpu.state.ymm[n], expected.ymm[n], "{what}: YMM{n}");
        if n != 4 {
            assert_eq!(cpu.gpr[n], expected.gpr[n], "{what}: general register {n}");
        }
    }
    assert_eq!(cpu.flags & 0x8d5, expected.rflags & 0x8d5, "{what}: flags");
    assert_eq!(cpu.state.mxcsr, expected.mxcsr, "{what}: MXCSR");
    assert_eq!(cpu.state.fcw(), u16::from_le_bytes([expected.fx[0], expected.fx[1]]), "{what}: FCW");
    assert_eq!(cpu.state.fsw(), u16::from_le_bytes([expected.fx[2], expected.fx[3]]), "{what}: FSW");
    assert_eq!(cpu.state.fx[fx::FTW], expected.fx[fx::FTW], "{what}: FTW");
    for n in 0..8 {
        let range = fx::ST + 16 * n..fx::ST + 16 * n + 10;
        assert_eq!(cpu.state.fx[range.clone()], expected.fx[range], "{what}: ST({n})");
    }
    assert!(cpu.state.fx[fx::XMM..].iter().all(|&byte| byte == 0), "{what}: the image's unused part");
    let size = cpu.memory.len();
    assert_eq!(cpu.get(address, size), host.read(address, size), "{what}: memory");
}

#[test]
fn vector_instructions_do_what_the_host_does() {
    let mut host = Host::new();
    let mut random = Random::new(1);
    let mut cpu = TestCpu::new();
    let forms = forms(&[Class::Sse, Class::Avx, Class::Mmx, Class::SseMmx]);
    assert!(forms.len() > 4000, "only {} forms", forms.len());
    for made in forms {
        let compiled = cpu.compile(&made);
        host.prepare(&made);
        for round in 0..ROUNDS {
            cpu.randomise(&mut random);
            random_x87(&mut cpu.state, &mut random, false);
            cpu.state.mxcsr = 0x1f80 | random.next() as u32 & 0xe07f;
            let address = prepare(&mut cpu, &mut host, &mut random, compiled.memory);
            if matches!(compiled.plan, Plan::LoadMxcsr) {
                let value = (random.next() as u32 & 0xffff | 0x1f80).to_le_bytes();
                cpu.put(address, &value);
                host.write(address, &value);
            }
            let mut expected = host_state(&cpu);
            assert_eq!(host.run(&mut expected), None);
            let what = format!("{made} ({:?}), round {round}", made.code());
            assert_eq!(execute(&mut cpu, &compiled, address), Ok(()), "{what}");
            assert_same(&cpu, &host, &expected, address, &what);
        }
    }
}

/// Whether the host's result does not define the instruction's (pointers, reserved words).
fn environment(plan: Plan) -> bool {
    matches!(plan, Plan::X87Control(X87Control::StoreEnvironment { .. } | X87Control::Save { .. }))
}

#[test]
fn x87_instructions_do_what_the_host_does() {
    let mut host = Host::new();
    let mut random = Random::new(2);
    let mut cpu = TestCpu::new();
    let forms = forms(&[Class::X87]);
    assert!(forms.len() > 300, "only {} forms", forms.len());
    for made in forms {
        let compiled = cpu.compile(&made);
        host.prepare(&made);
        for round in 0..20 * ROUNDS {
            cpu.randomise(&mut random);
            random_x87(&mut cpu.state, &mut random, round % 2 == 1);
            cpu.state.mxcsr = 0x1f80;
            let address = prepare(&mut cpu, &mut host, &mut random, compiled.memory);
            let mut expected = host_state(&cpu);
            assert_eq!(host.run(&mut expected), None);
            let what = format!("{made} ({:?}), round {round}", made.code());
            assert_eq!(execute(&mut cpu, &compiled, address), Ok(()), "{what}");
            if environment(compiled.plan) {
                // Compared below, without pointers.
                let size = cpu.memory.len();
                let wide = size == 28 || size == 108;
                let (ours, theirs) = (cpu.get(address, size), host.read(address, size));
                let words = if wide { [0, 4, 8] } else { [0, 2, 4] };
                for at in words {
                    assert_eq!(ours[at..at + 2], theirs[at..at + 2], "{what}: word at {at}");
                }
                let registers = if wide { 28 } else { 14 };
                assert_eq!(ours[registers..], theirs[registers..], "{what}: registers");
                cpu.put(address, &theirs);
            }
            assert_same(&cpu, &host, &expected, address, &what);
        }
    }
}

#[test]
fn unmasked_simd_exceptions_change_nothing_but_their_flags() {
    let mut host = Host::new();
    let mut random = Random::new(3);
    let mut cpu = TestCpu::new();
    let mut faults = 0;
    for made in forms(&[Class::Sse, Class::Avx]).into_iter().filter(|made| uses_mxcsr(made.code())) {
        let compiled = cpu.compile(&made);
        host.prepare(&made);
        for round in 0..4 * ROUNDS {
            cpu.randomise(&mut random);
            cpu.state.fx = VectorState::default().fx;
            cpu.state.mxcsr = random.next() as u32 & 0xffc0;
            let address = prepare(&mut cpu, &mut host, &mut random, compiled.memory);
            let mut expected = host_state(&cpu);
            let before = (cpu.state.clone(), cpu.gpr, cpu.flags, cpu.memory.clone());
            let fault = host.run(&mut expected);
            let what = format!("{made} ({:?}), round {round}, MXCSR {:#x}", made.code(), before.0.mxcsr);
            let result = execute(&mut cpu, &compiled, address);
            match fault {
                None => {
                    assert_eq!(result, Ok(()), "{what}");
                    assert_same(&cpu, &host, &expected, address, &what);
                }
                Some(mxcsr) => {
                    faults += 1;
                    assert_eq!(result, Err(Stop::Trap(Trap::SimdFault)), "{what}");
                    // Whether a result that overflowed or underflowed was also inexact is not known.
                    let scaled = mxcsr & !(mxcsr >> 7) & 0x18 != 0;
                    // DPPS and DPPD work in steps; at which one they stopped is not known either.
                    let steps = matches!(made.code().mnemonic(), Dpps | Dppd | Vdpps | Vdppd);
                    let doubtful = if steps { 0x3f } else { u32::from(scaled) << 5 };
                    assert_eq!(cpu.state.mxcsr | doubtful, mxcsr | doubtful, "{what}: flags");
                    cpu.state.mxcsr = before.0.mxcsr;
                    assert!(cpu.state == before.0, "{what}: vector state changed");
                    assert_eq!((cpu.gpr, cpu.flags), (before.1, before.2), "{what}");
                    assert_eq!(cpu.memory, before.3, "{what}");
                }
            }
        }
    }
    assert!(faults > 1000, "only {faults} exceptions");
}

#[test]
fn a_page_fault_changes_nothing() {
    let mut random = Random::new(4);
    let mut cpu = TestCpu::new();
    let classes = [Class::Sse, Class::Avx, Class::Mmx, Class::SseMmx, Class::X87];
    for made in forms(&classes) {
        let compiled = cpu.compile(&made);
        let Some(memory) = compiled.memory else { continue };
        if matches!(compiled.plan, Plan::Masked(_)) {
            continue;
        }
        cpu.randomise(&mut random);
        cpu.state.fx = VectorState::default().fx;
        cpu.state.fx[fx::FTW] = 0xff;
        cpu.state.mxcsr = 0x1f80;
        // All bytes but the last are there.
        cpu.memory.clear();
        cpu.put(common::ADDRESS, &vec![0; memory.size as usize - 1]);
        let before = (cpu.state.clone(), cpu.gpr, cpu.flags, cpu.memory.clone());
        let at = common::ADDRESS + u64::from(memory.size) - 1;
        let fault = Refused { address: at, write: !memory.read };
        assert_eq!(execute(&mut cpu, &compiled, common::ADDRESS), Err(Stop::Memory(fault)), "{made}");
        assert!(cpu.state == before.0, "{made}: vector state changed");
        assert_eq!((cpu.gpr, cpu.flags), (before.1, before.2), "{made}");
        assert_eq!(cpu.memory, before.3, "{made}");
    }
}

#[test]
fn code_of_32_bits_gives_the_same_thunks() {
    let mut cpu = TestCpu::new();
    let mut compared = 0;
    for made in forms(&[Class::Sse, Class::Avx, Class::Mmx, Class::SseMmx, Class::X87]) {
        let code = made.code();
        if !code.op_code().mode32() || made.op_kinds().any(|k| k == iced_x86::OpKind::MemorySegRDI) {
            continue;
        }
        for memory in [false, true] {
            let operands = Operands { registers: [1, 2, 3, 5, 6], memory, immediate: 0x1b };
            let (Some(wide), Some(narrow)) =
                (instruction(code, operands, 64), instruction(code, operands, 32))
            else {
                continue;
            };
            let (wide, narrow) = (cpu.compile(&wide), cpu.compile(&narrow));
            assert_eq!(wide, narrow, "{code:?}");
            compared += 1;
        }
    }
    assert!(compared > 1000, "only {compared}");
}

/// A status word with a pending exception stops waiting instructions only.
#[test]
fn pending_x87_exceptions_stop_the_next_waiting_instruction() {
    let mut cpu = TestCpu::new();
    let operands = Operands { registers: [1, 2, 3, 5, 6], memory: false, immediate: 0 };
    let make = |code| instruction(code, operands, 64).expect("encodable");
    cpu.state.set_fx16(fx::FCW, 0x037b); // divide by zero unmasked
    cpu.run(&make(Code::Fld1), 0).expect("no exception");
    cpu.run(&make(Code::Fldz), 0).expect("no exception");
    cpu.rip = 0x7777;
    cpu.run(&make(Code::Fdivp_sti_st0), 0).expect("it is the next one that faults");
    assert_eq!(cpu.state.fsw() & (fsw::ES | fsw::B | fsw::ZE), fsw::ES | fsw::B | fsw::ZE);
    assert_eq!(cpu.state.fx64(fx::FIP), 0x7777);
    let before = cpu.state.clone();
    for code in [Code::Fld1, Code::Wait, Code::Emms, Code::Paddb_mm_mmm64, Code::Fnop] {
        assert_eq!(cpu.run(&make(code), 0), Err(Stop::Trap(Trap::MathFault)), "{code:?}");
    }
    assert!(cpu.state == before);
    cpu.run(&make(Code::Fnstsw_AX), 0).expect("does not wait");
    assert_eq!(cpu.gpr[0] as u16, before.fsw());
    cpu.run(&make(Code::Fnclex), 0).expect("does not wait");
    cpu.run(&make(Code::Fld1), 0).expect("nothing is pending");
}

#[test]
fn x87_pointers_follow_the_last_instruction() {
    let mut cpu = TestCpu::new();
    let make = |bytes: &[u8]| Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
    cpu.put(common::ADDRESS, &1.5f64.to_le_bytes());
    cpu.rip = 0x1000;
    cpu.run(&make(&[0xdd, 0x43, 0x10]), common::ADDRESS).expect("memory is there"); // fld qword [rbx+16]
    assert_eq!((cpu.state.fx64(fx::FIP), cpu.state.fx64(fx::FDP)), (0x1000, common::ADDRESS));
    cpu.rip = 0x2000;
    cpu.run(&make(&[0xd9, 0xe1]), 0).expect("no exception"); // fabs
    assert_eq!((cpu.state.fx64(fx::FIP), cpu.state.fx64(fx::FDP)), (0x2000, common::ADDRESS));
    // Neither control instructions nor MMX leave a trace.
    cpu.rip = 0x3000;
    cpu.run(&make(&[0xdf, 0xe0]), 0).expect("no exception"); // fnstsw ax
    cpu.run(&make(&[0x0f, 0xef, 0xc1]), 0).expect("no exception"); // pxor mm0, mm1
    cpu.run(&make(&[0x0f, 0x77]), 0).expect("no exception"); // emms
    assert_eq!(cpu.state.fx64(fx::FIP), 0x2000);
    assert_eq!(cpu.state.fx16(fx::FOP), 0);
    // An unmasked exception leaves the opcode, as the guest wrote it.
    cpu.state.set_fx16(fx::FCW, 0x037e);
    cpu.run(&make(&[0xd8, 0x43, 0x10]), common::ADDRESS).expect("faults later"); // fadd dword [rbx+16]
    assert_eq!(cpu.state.fx16(fx::FOP), 0x043);
    assert!(cpu.state.x87_pending());
}

#[test]
fn unmasked_exceptions_keep_x87_stores_from_memory() {
    let mut cpu = TestCpu::new();
    let make = |bytes: &[u8]| Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
    let fstp = make(&[0xd9, 0x18]); // fstp dword [rax]
    let big = [0, 0, 0, 0, 0, 0, 0, 0x80, 0x00, 0x60];
    let third = [0xab, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa, 0xfd, 0x3f];
    // Value, control word, whether memory is written and the stack popped.
    let cases = [(big, 0x037f, true), (big, 0x0377, false), (third, 0x037f, true), (third, 0x035f, true)];
    for (value, control, done) in cases {
        cpu.state = VectorState::default();
        cpu.state.set_fx16(fx::FCW, control);
        cpu.state.fx[fx::FTW] = 1;
        cpu.state.fx[fx::ST..fx::ST + 10].copy_from_slice(&value);
        cpu.put(common::ADDRESS, &[0xcc; 4]);
        cpu.run(&fstp, common::ADDRESS).expect("faults later");
        assert_eq!(cpu.get(common::ADDRESS, 4) != [0xcc; 4], done, "{control:#x}");
        assert_eq!(cpu.state.fx[fx::FTW] == 0, done, "{control:#x}");
        assert_eq!(cpu.state.x87_pending(), control != 0x037f);
    }
}

#[test]
fn gathers_do_what_the_host_does() {
    let mut host = Host::new();
    let mut random = Random::new(5);
    let mut cpu = TestCpu::new();
    let gathers: Vec<Code> = Code::values()
        .filter(|c| format!("{c:?}").starts_with("VEX_V") && format!("{c:?}").contains("gather"))
        .collect();
    assert_eq!(gathers.len(), 16);
    for code in gathers {
        let operands = Operands { registers: [9, 12, 15, 0, 0], memory: true, immediate: 0 };
        let made = instruction(code, operands, 64).expect("encodable");
        let compiled = cpu.compile(&made);
        host.prepare(&made);
        for _ in 0..50 {
            cpu.randomise(&mut random);
            cpu.state.fx = VectorState::default().fx;
            let address = host.buffer(256);
            let mut data = [0; 256];
            random.fill(&mut data);
            cpu.memory.clear();
            cpu.put(address, &data);
            host.write(address, &data);
            cpu.gpr[3] = address;
            let wide = format!("{code:?}").contains("vm64");
            for lane in cpu.state.ymm[12].chunks_exact_mut(if wide { 8 } else { 4 }) {
                lane.fill(0);
                lane[0] = random.below(248) as u8;
            }
            let mut expected = host_state(&cpu);
            assert_eq!(host.run(&mut expected), None);
            assert_eq!(execute(&mut cpu, &compiled, 0), Ok(()), "{made}");
            assert_same(&cpu, &host, &expected, address, &made.to_string());
        }
    }
}

/// XSAVE and its kin against the host's, image and registers.
#[test]
fn state_instructions_do_what_the_host_does() {
    let mut host = Host::new();
    let mut random = Random::new(6);
    let mut cpu = TestCpu::new();
    let operands = Operands { registers: [0; 5], memory: true, immediate: 0 };
    let pairs = [
        (Code::Fxsave64_m512byte, Code::Fxrstor64_m512byte),
        (Code::Fxsave_m512byte, Code::Fxrstor_m512byte),
        (Code::Xsave64_mem, Code::Xrstor64_mem),
        (Code::Xsave_mem, Code::Xrstor_mem),
        (Code::Xsavec64_mem, Code::Xrstor64_mem),
    ];
    for (save, restore) in pairs {
        let save = instruction(save, operands, 64).expect("encodable");
        let restore = instruction(restore, operands, 64).expect("encodable");
        for round in 0..100u64 {
            let what = format!("{save}, round {round}");
            cpu.randomise(&mut random);
            random_x87(&mut cpu.state, &mut random, false);
            cpu.state.mxcsr = 0x1f80 | random.next() as u32 & 0xe07f;
            // Pointers must be canonical to be kept by every processor.
            cpu.state.set_fx64(fx::FIP, random.next() >> 20);
            cpu.state.set_fx64(fx::FDP, random.next() >> 20);
            let address = host.buffer(896);
            let mut area = [0u8; 832];
            area[24..26].copy_from_slice(&0x1f80u16.to_le_bytes());
            cpu.memory.clear();
            cpu.put(address, &area);
            host.write(address, &area);
            cpu.gpr[3] = address;
            (cpu.gpr[0], cpu.gpr[2]) = (round & 7, 0);
            let mut expected = host_state(&cpu);
            host.prepare(&save);
            assert_eq!(host.run(&mut expected), None);
            assert_eq!(cpu.run(&save, address), Ok(()), "{what}");
            // Not compared: the opcode and the pointers, which AMD's processors keep only with a pending
            // exception, and the MXCSR mask, which is the host's own.
            for (at, size) in [(6, 18), (28, 4)] {
                host.write(address + at, &cpu.get(address + at, size));
            }
            assert_same(&cpu, &host, &expected, address, &what);
            // Other state, then back; with other components asked for.
            let image = cpu.get(address, 832);
            cpu.randomise(&mut random);
            random_x87(&mut cpu.state, &mut random, false);
            host.write(address, &image);
            cpu.gpr[3] = address;
            (cpu.gpr[0], cpu.gpr[2]) = (random.below(8), 0);
            let mut expected = host_state(&cpu);
            host.prepare(&restore);
            assert_eq!(host.run(&mut expected), None);
            assert_eq!(cpu.run(&restore, address), Ok(()), "{what}");
            assert_same(&cpu, &host, &expected, address, &format!("{what}, back"));
        }
    }
}

#[test]
fn thunks_are_shared_and_their_memory_is_bounded() {
    let mut cpu = TestCpu::new();
    cpu.unit = NativeUnit::new().with_code_capacity(1 << 16);
    let make = |bytes: &[u8]| Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
    // Different addresses and general registers have the same thunk.
    let first = cpu.compile(&make(&[0x66, 0x0f, 0xfc, 0x0b])); // paddb xmm1, [rbx]
    let second = cpu.compile(&make(&[0x65, 0x66, 0x0f, 0xfc, 0x4c, 0x24, 0x20])); // paddb xmm1, gs:[rsp+32]
    assert_eq!(first, second);
    cpu.compile(&make(&[0x66, 0x0f, 0xd7, 0xc1])); // pmovmskb eax, xmm1
    cpu.compile(&make(&[0x66, 0x0f, 0xd7, 0xf9])); // pmovmskb edi, xmm1
    assert_eq!(cpu.unit.usage().0, 2);
    let generation = cpu.unit.generation();
    let mut largest = 0;
    'fill: for n in 0..=0xffffu32 {
        // pshufd, pshuflw, pshufhw with all registers and immediates
        for prefix in [0x66, 0xf2, 0xf3] {
            cpu.compile(&make(&[prefix, 0x0f, 0x70, 0xc0 | (n >> 8) as u8, n as u8]));
            largest = largest.max(cpu.unit.usage().1);
            assert!(largest <= 1 << 16);
            if cpu.unit.generation() != generation {
                break 'fill;
            }
        }
    }
    assert!(largest > 1 << 15, "only {largest} bytes");
    assert_ne!(cpu.unit.generation(), generation);
    let before = cpu.state.clone();
    assert_eq!(execute(&mut cpu, &first, 0), Err(Stop::Stale));
    assert!(cpu.state == before);
    // An instruction of another unit is stale here too.
    let other = TestCpu::new().compile(&make(&[0x66, 0x0f, 0xfc, 0xca]));
    assert_eq!(execute(&mut cpu, &other, 0), Err(Stop::Stale));
    let again = cpu.compile(&make(&[0x66, 0x0f, 0xfc, 0xca])); // paddb xmm1, xmm2
    cpu.state.ymm[1] = [1; 32];
    cpu.state.ymm[2] = [2; 32];
    execute(&mut cpu, &again, 0).expect("it is current");
    assert_eq!(cpu.state.ymm[1][..16], [3; 16]);
    assert_eq!(cpu.state.ymm[1][16..], [1; 16]);
}

#[test]
fn wait_compiles() {
    let mut cpu = TestCpu::new();
    let wait = Decoder::with_ip(64, &[0x9b], 0, DecoderOptions::NONE).decode();
    let compiled = cpu.compile(&wait);
    assert_eq!((compiled.class, compiled.plan), (Class::Wait, Plan::X87Control(X87Control::Wait)));
}

#[test]
fn the_host_keeps_its_own_environment() {
    let mut random = Random::new(8);
    let mut cpu = TestCpu::new();
    // Flush to zero, as a program linked with fast mathematics sets it.
    set_host_mxcsr(0x9f80);
    let expected = (0x9f80, 0x037f, 0xffff);
    let classes = [Class::Sse, Class::Avx, Class::Mmx, Class::SseMmx, Class::X87];
    let forms = forms(&classes);
    for made in &forms {
        cpu.randomise(&mut random);
        random_x87(&mut cpu.state, &mut random, true);
        cpu.state.mxcsr = random.next() as u32 & 0xffc0;
        cpu.put(common::ADDRESS, &random.vector());
        let _ = cpu.run(made, common::ADDRESS);
        assert_eq!(host_environment(), expected, "{made}");
    }
    set_host_mxcsr(0x1f80);
    assert!(forms.len() > 4000);
}
