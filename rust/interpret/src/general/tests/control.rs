//! Control transfers and the stack in 64-bit mode, and what faults leave behind.

use crate::state::*;
use crate::testing::*;
use iced_x86::code_asm::*;

#[test]
fn call_and_ret() {
    let mut cpu = long_mode();
    run(&mut cpu, |a| a.call(CODE + 0x500)).unwrap();
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (CODE + 0x500, STACK - 8));
    assert_eq!(peek64(&cpu, STACK - 8), CODE + 5);
    step(&mut cpu, &[0xc2, 0x10, 0]).unwrap(); // ret 16
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (CODE + 5, STACK + 16));

    cpu.r.rip = CODE;
    cpu.r.gpr[reg::RSP] = STACK;
    cpu.r.gpr[reg::RBX] = DATA;
    poke(&cpu, DATA + 8, &(CODE + 0x900).to_le_bytes());
    run(&mut cpu, |a| a.call(qword_ptr(rbx + 8))).unwrap();
    assert_eq!((cpu.r.rip, peek64(&cpu, STACK - 8)), (CODE + 0x900, CODE + 3));
}

#[test]
fn branches_to_non_canonical_addresses_fault_and_change_nothing() {
    let mut cpu = long_mode();
    cpu.r.gpr[reg::RAX] = 1 << 63;
    for jump in [true, false] {
        assert!(run(&mut cpu, |a| if jump { a.jmp(rax) } else { a.call(rax) }).is_err());
        assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
        assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (CODE, STACK));
    }
    poke(&cpu, STACK, &(1u64 << 63).to_le_bytes());
    assert!(run(&mut cpu, |a| a.ret()).is_err());
    assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
    assert_eq!(cpu.r.gpr[reg::RSP], STACK);
}

#[test]
fn conditional_branches_follow_the_flags() {
    for cc in 0..16u8 {
        for v in 0..0x1000u64 {
            let v = v & rflags::STATUS;
            let bit = |m: u64| v & m != 0;
            use rflags::*;
            let base = match cc >> 1 {
                0 => bit(OF),
                1 => bit(CF),
                2 => bit(ZF),
                3 => bit(CF) || bit(ZF),
                4 => bit(SF),
                5 => bit(PF),
                6 => bit(SF) != bit(OF),
                _ => bit(ZF) || bit(SF) != bit(OF),
            };
            assert_eq!(crate::flags::Flags::from_rflags(v).condition(cc), base != (cc & 1 != 0));
        }
        let mut cpu = long_mode();
        let taken = cpu.r.flags.condition(cc);
        step(&mut cpu, &[0x70 | cc, 0x20]).unwrap();
        assert_eq!(cpu.r.rip, CODE + 2 + if taken { 0x20 } else { 0 });
    }
}

#[test]
fn loops_count_in_the_address_size() {
    let mut cpu = long_mode();
    cpu.r.gpr[reg::RCX] = 1 << 32;
    step(&mut cpu, &[0xe2, 0x10]).unwrap(); // loop
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RCX]), (CODE + 0x12, 0xffff_ffff));
    cpu.r.rip = CODE;
    cpu.r.gpr[reg::RCX] = 5 << 32 | 1;
    step(&mut cpu, &[0x67, 0xe2, 0x10]).unwrap(); // loop with ECX
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RCX]), (CODE + 3, 0));
    cpu.r.gpr[reg::RCX] = 5 << 32;
    cpu.r.rip = CODE;
    step(&mut cpu, &[0x67, 0xe3, 0x10]).unwrap(); // jecxz
    assert_eq!(cpu.r.rip, CODE + 0x13);
    cpu.r.rip = CODE;
    step(&mut cpu, &[0xe3, 0x10]).unwrap(); // jrcxz
    assert_eq!(cpu.r.rip, CODE + 2);
    for (opcode, zf, taken) in
        [(0xe1, true, true), (0xe1, false, false), (0xe0, true, false), (0xe0, false, true)]
    {
        cpu.r.rip = CODE;
        cpu.r.gpr[reg::RCX] = 2;
        cpu.r.flags = cpu.r.flags.with_zf(zf);
        step(&mut cpu, &[opcode, 0x10]).unwrap();
        assert_eq!((cpu.r.rip == CODE + 0x12, cpu.r.gpr[reg::RCX]), (taken, 1));
    }
}

#[test]
fn division_errors() {
    let mut cpu = long_mode();
    type Case = (fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>, u64, u64, u64, bool);
    let cases: &[Case] = &[
        (|a| a.div(rcx), 0, 5, 0, false),
        (|a| a.div(rcx), 7, 5, 7, false),
        (|a| a.div(rcx), 6, 5, 7, true),
        (|a| a.idiv(rcx), u64::MAX, 1 << 63, u64::MAX, false),
        (|a| a.idiv(rcx), u64::MAX, 1 << 63, 1, true),
        (|a| a.idiv(ecx), 0xffff_ffff, 1 << 31, 0xffff_ffff, false),
        (|a| a.idiv(rcx), 1 << 63, 0, u64::MAX, false),
        (|a| a.div(cl), 0, 0x0100, 1, false),
        (|a| a.div(cl), 0, 0x00ff, 1, true),
        (|a| a.idiv(cl), 0, 0xff80, 1, true),
        (|a| a.idiv(cl), 0, 0xff7f, 1, false),
        (|a| a.div(cx), 1, 0, 1, false),
    ];
    for (n, (f, high, low, by, good)) in cases.iter().enumerate() {
        cpu.r.rip = CODE;
        (cpu.r.gpr[reg::RDX], cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RCX]) = (*high, *low, *by);
        let result = run(&mut cpu, f);
        assert_eq!(result.is_ok(), *good, "case {n}");
        if !good {
            assert_eq!(fault_code(&mut cpu), (vector::DE, None));
            assert_eq!((cpu.r.gpr[reg::RDX], cpu.r.gpr[reg::RAX], cpu.r.rip), (*high, *low, CODE));
        }
    }
    // The operand is fetched before it is found to be zero.
    cpu.r.gpr[reg::RBX] = 1 << 40;
    assert!(run(&mut cpu, |a| a.div(qword_ptr(rbx))).is_err());
    assert_eq!(fault(&mut cpu).vector, vector::PF);
}

#[test]
fn push_and_pop_of_the_stack_pointer() {
    let mut cpu = long_mode();
    run(&mut cpu, |a| a.push(rsp)).unwrap();
    assert_eq!(peek64(&cpu, STACK - 8), STACK);
    poke(&cpu, STACK - 8, &0x1234_5678u64.to_le_bytes());
    run(&mut cpu, |a| a.pop(rsp)).unwrap();
    assert_eq!(cpu.r.gpr[reg::RSP], 0x1234_5678);
    // pop [rsp+8] addresses with the raised stack pointer.
    cpu.r.gpr[reg::RSP] = STACK - 8;
    poke(&cpu, STACK - 8, &77u64.to_le_bytes());
    run(&mut cpu, |a| a.pop(qword_ptr(rsp + 8))).unwrap();
    assert_eq!((cpu.r.gpr[reg::RSP], peek64(&cpu, STACK + 8)), (STACK, 77));
    // A fault of the store leaves the stack pointer as it was.
    cpu.r.gpr[reg::RBX] = 1 << 40;
    assert!(run(&mut cpu, |a| a.pop(qword_ptr(rbx))).is_err());
    assert_eq!((fault(&mut cpu).vector, cpu.r.gpr[reg::RSP]), (vector::PF, STACK));
    // 16-bit pushes and immediates.
    run(&mut cpu, |a| a.push(ax)).unwrap();
    assert_eq!(cpu.r.gpr[reg::RSP], STACK - 2);
    step(&mut cpu, &[0x6a, 0xfe]).unwrap(); // push -2
    assert_eq!((cpu.r.gpr[reg::RSP], peek64(&cpu, STACK - 10)), (STACK - 10, -2i64 as u64));
    run(&mut cpu, |a| a.push(fs)).unwrap();
    assert_eq!(peek64(&cpu, STACK - 18), 0x10);
}

#[test]
fn enter_and_leave() {
    let mut cpu = long_mode();
    cpu.r.gpr[reg::RBP] = DATA;
    run(&mut cpu, |a| a.enter(0x20, 0)).unwrap();
    assert_eq!((cpu.r.gpr[reg::RBP], cpu.r.gpr[reg::RSP]), (STACK - 8, STACK - 0x28));
    assert_eq!(peek64(&cpu, STACK - 8), DATA);
    run(&mut cpu, |a| a.leave()).unwrap();
    assert_eq!((cpu.r.gpr[reg::RBP], cpu.r.gpr[reg::RSP]), (DATA, STACK));

    poke(&cpu, DATA - 16, &[0x11u64.to_le_bytes(), 0x22u64.to_le_bytes()].concat());
    run(&mut cpu, |a| a.enter(0x10, 3)).unwrap();
    assert_eq!((cpu.r.gpr[reg::RBP], cpu.r.gpr[reg::RSP]), (STACK - 8, STACK - 0x30));
    let frame: Vec<u64> = (1..=4).map(|n| peek64(&cpu, STACK - 8 * n)).collect();
    assert_eq!(frame, [DATA, 0x22, 0x11, STACK - 8]);

    // The new stack pointer must be writable, else nothing happens.
    let mut cpu = long_mode();
    poke(&cpu, 0x3008, &0u64.to_le_bytes()); // 0x200000.. not present
    cpu.r.gpr[reg::RSP] = 0x40_0010;
    cpu.r.gpr[reg::RBP] = 0x1234;
    assert!(run(&mut cpu, |a| a.enter(0x100, 1)).is_err());
    let f = fault(&mut cpu);
    assert_eq!((f.vector, f.error, f.address), (vector::PF, Some(2), 0x3f_ff00));
    assert_eq!((cpu.r.gpr[reg::RSP], cpu.r.gpr[reg::RBP]), (0x40_0010, 0x1234));
    assert_eq!(peek64(&cpu, 0x40_0008), 0);
}

#[test]
fn flags_images_follow_privilege() {
    use rflags::*;
    let mut cpu = long_mode();
    cpu.set_rflags(0x3f_7fd7 & !(VM | VIF | VIP));
    run(&mut cpu, |a| a.pushfq()).unwrap();
    assert_eq!(peek64(&cpu, STACK - 8), 0x3f_7fd7 & !(VM | RF | VIF | VIP));
    let popf = |cpu: &mut crate::cpu::Cpu, cpl: u8, before: u64, value: u64, bits16: bool| {
        cpu.r.rip = CODE;
        cpu.r.gpr[reg::RSP] = STACK;
        cpu.cpl = cpl;
        cpu.set_rflags(before);
        poke(cpu, STACK, &value.to_le_bytes());
        run(cpu, |a| if bits16 { a.popf() } else { a.popfq() }).unwrap();
        let after = cpu.rflags();
        cpu.cpl = 0;
        after
    };
    let all = u64::MAX;
    assert_eq!(popf(&mut cpu, 0, 2, all, false), (STATUS | TF | IF | DF | IOPL | NT | AC | ID) | 2);
    assert_eq!(popf(&mut cpu, 3, 2, all, false), (STATUS | TF | DF | NT | AC | ID) | 2);
    assert_eq!(popf(&mut cpu, 3, 2 | IOPL, all, false), (STATUS | TF | IF | DF | IOPL | NT | AC | ID) | 2);
    assert_eq!(popf(&mut cpu, 3, 2 | IF | IOPL, 0, false), 2 | IOPL);
    assert_eq!(popf(&mut cpu, 3, 2 | IF, 0, false), 2 | IF);
    assert_eq!(popf(&mut cpu, 0, 2 | AC | RF, 0, true), 2 | AC);
}

#[test]
fn interrupt_flag_instructions_need_privilege() {
    let mut cpu = long_mode();
    run(&mut cpu, |a| a.sti()).unwrap();
    assert!(cpu.r.rflags & rflags::IF != 0 && cpu.shadow == shadow::STI);
    cpu.shadow = 0;
    run(&mut cpu, |a| a.sti()).unwrap();
    assert_eq!(cpu.shadow, 0, "no shadow if interrupts were open before");
    run(&mut cpu, |a| a.cli()).unwrap();
    assert_eq!(cpu.r.rflags & rflags::IF, 0);
    cpu.cpl = 3;
    for open in [true, false] {
        assert!(run(&mut cpu, |a| if open { a.sti() } else { a.cli() }).is_err());
        assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
    }
    cpu.r.rflags |= rflags::IOPL;
    run(&mut cpu, |a| a.sti()).unwrap();
    assert!(cpu.r.rflags & rflags::IF != 0);
}

#[test]
fn undefined_instructions() {
    let mut cpu = long_mode();
    for bytes in [&[0x0f, 0x0b][..], &[0x0f, 0xb9, 0xc0], &[0x0f, 0xff, 0xc0]] {
        assert!(step(&mut cpu, bytes).is_err());
        assert_eq!(fault_code(&mut cpu), (vector::UD, None));
    }
}

#[test]
fn read_modify_write_of_a_read_only_page_faults_as_a_write() {
    let mut cpu = long_mode();
    // The page of DATA becomes read-only.
    poke(&cpu, 0x3000 + 8 * (DATA >> 21), &(DATA | 0x85).to_le_bytes());
    cpu.r.gpr[reg::RBX] = DATA;
    cpu.r.gpr[reg::RCX] = 1;
    type Write = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let writes: &[Write] = &[
        |a| a.add(qword_ptr(rbx), rax),
        |a| a.lock().inc(dword_ptr(rbx)),
        |a| a.not(byte_ptr(rbx)),
        |a| a.xchg(qword_ptr(rbx), rcx),
        |a| a.lock().xadd(qword_ptr(rbx), rcx),
        |a| a.cmpxchg(qword_ptr(rbx), rcx),
        |a| a.cmpxchg8b(qword_ptr(rbx)),
        |a| a.cmpxchg16b(xmmword_ptr(rbx)),
        |a| a.bts(qword_ptr(rbx), rcx),
        |a| a.shl(dword_ptr(rbx), cl),
        |a| a.sete(byte_ptr(rbx)),
        |a| a.movnti(dword_ptr(rbx), ecx),
        |a| a.pop(qword_ptr(rbx)),
    ];
    for (n, f) in writes.iter().enumerate() {
        let before = cpu.r.clone();
        assert!(run(&mut cpu, f).is_err(), "case {n}");
        let fault = fault(&mut cpu);
        assert_eq!((fault.vector, fault.error, fault.address), (vector::PF, Some(3), DATA), "case {n}");
        assert_eq!((before.gpr, before.flags.to_rflags()), (cpu.r.gpr, cpu.r.flags.to_rflags()), "case {n}");
    }
    run(&mut cpu, |a| a.bt(qword_ptr(rbx), rcx)).unwrap();
    run(&mut cpu, |a| a.clflush(byte_ptr(rbx))).unwrap();
    cpu.r.gpr[reg::RBX] = 1 << 40;
    assert!(run(&mut cpu, |a| a.clflush(byte_ptr(rbx))).is_err());
    assert_eq!(fault(&mut cpu).error, Some(0));
    run(&mut cpu, |a| a.prefetcht0(byte_ptr(rbx))).unwrap();
}

#[test]
fn cmpxchg16b_needs_alignment_and_works_without_the_tlb() {
    for tlb in [true, false] {
        let mut cpu = long_mode();
        cpu.config.optimise.tlb = tlb;
        cpu.r.gpr[reg::RBX] = 0x1111;
        cpu.r.gpr[reg::RCX] = 0x2222;
        cpu.r.gpr[reg::RSI] = DATA + 8;
        assert!(run(&mut cpu, |a| a.cmpxchg16b(xmmword_ptr(rsi))).is_err());
        assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
        cpu.r.gpr[reg::RSI] = DATA;
        run(&mut cpu, |a| a.lock().cmpxchg16b(xmmword_ptr(rsi))).unwrap();
        assert!(cpu.r.flags.zf());
        assert_eq!((peek64(&cpu, DATA), peek64(&cpu, DATA + 8)), (0x1111, 0x2222));
        run(&mut cpu, |a| a.lock().cmpxchg16b(xmmword_ptr(rsi))).unwrap();
        assert!(!cpu.r.flags.zf());
        assert_eq!((cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RDX]), (0x1111, 0x2222));
    }
}

#[test]
fn instructions_of_others_are_refused() {
    let mut cpu = long_mode();
    for bytes in [
        &[0x0f, 0x20, 0xc0][..],      // mov rax, cr0
        &[0x8e, 0xd8],                // mov ds, eax
        &[0x0f, 0xa1],                // pop fs
        &[0xf4],                      // hlt
        &[0x0f, 0xa2],                // cpuid
        &[0xff, 0x2b],                // jmp far [rbx]
        &[0xcb],                      // retf
        &[0x48, 0xcf],                // iretq
        &[0xf2, 0x0f, 0x10, 0xc1],    // movsd xmm0, xmm1
        &[0xf2, 0x0f, 0xc2, 0xc1, 0], // cmpsd xmm0, xmm1, 0
        &[0x66, 0x0f, 0xfe, 0xc1],    // paddd xmm0, xmm1
        &[0xd9, 0xd0],                // fnop
        &[0xda, 0xc1],                // fcmovb st0, st1
    ] {
        let i = iced_x86::Decoder::with_ip(64, bytes, CODE, 0).decode();
        let before = cpu.r.clone();
        assert_eq!(cpu.execute_general(&i), Ok(false), "{bytes:02x?}");
        assert_eq!(before.gpr, cpu.r.gpr);
    }
}

#[test]
fn random_numbers_repeat_in_virtual_time() {
    let draw = || {
        let mut cpu = long_mode();
        cpu.clock = Clock::Virtual { base: 0, num: 1, den: 1 };
        run(&mut cpu, |a| a.rdrand(rax)).unwrap();
        run(&mut cpu, |a| a.rdseed(cx)).unwrap();
        assert_eq!(cpu.r.flags.to_rflags(), rflags::CF);
        (cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RCX])
    };
    assert_eq!(draw(), draw());
    assert_ne!(draw().0, 0);
}
