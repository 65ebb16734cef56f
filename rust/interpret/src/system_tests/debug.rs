use super::*;
use crate::testing::CODE;

/// MOV DRn, RAX and MOV RCX, DRn.
fn to_dr(n: u8) -> [u8; 3] {
    [0x0f, 0x23, 0xc0 | n << 3]
}
fn from_dr(n: u8) -> [u8; 3] {
    [0x0f, 0x21, 0xc1 | n << 3]
}

#[track_caller]
fn write(cpu: &mut Cpu, n: u8, value: u64) {
    rax(cpu, value);
    ok(cpu, &to_dr(n));
}

#[test]
fn registers() {
    let mut cpu = long();
    for n in 0..4u8 {
        write(&mut cpu, n, 0x1234_5678_9abc_def0 + u64::from(n));
        ok(&mut cpu, &from_dr(n));
        assert_eq!(cpu.r.gpr[reg::RCX], 0x1234_5678_9abc_def0 + u64::from(n));
    }
    write(&mut cpu, 6, 0xffff_ffff);
    assert_eq!(cpu.r.dr6, 0xffff_efff);
    write(&mut cpu, 6, 0);
    assert_eq!(cpu.r.dr6, 0xffff_0ff0);
    write(&mut cpu, 7, 0xffff_dfff);
    assert_eq!(cpu.r.dr7, 0xffff_07ff);
    write(&mut cpu, 7, 0);
    assert_eq!(cpu.r.dr7, 0x400);
    for n in [6, 7] {
        rax(&mut cpu, 1 << 32);
        assert_eq!(faults(&mut cpu, &to_dr(n)), gp(0));
    }
    // DR4 and DR5 are DR6 and DR7, unless CR4.DE says that they do not exist.
    ok(&mut cpu, &from_dr(4));
    assert_eq!(cpu.r.gpr[reg::RCX], cpu.r.dr6);
    ok(&mut cpu, &from_dr(5));
    assert_eq!(cpu.r.gpr[reg::RCX], cpu.r.dr7);
    cpu.r.cr4 |= cr4::DE;
    assert_eq!(faults(&mut cpu, &from_dr(4)), UD);
    assert_eq!(faults(&mut long3(), &from_dr(0)), gp(0));
    // General detect.
    cpu.r.dr7 |= 1 << 13;
    assert!(exec(&mut cpu, &from_dr(0)).is_err());
    let Some(StopReason::Fault(f)) = cpu.stop.take() else { panic!() };
    assert_eq!((f.vector, f.dr6, f.trap), (vector::DB, 1 << 13, false));
    cpu.raise(f).unwrap();
    assert_eq!((cpu.r.dr6, cpu.r.dr7), (0xffff_2ff0, 0x400));
}

/// A machine at level 0 in 64-bit mode whose handlers halt, with code at CODE.
fn with_code(code: &[u8]) -> Box<Cpu> {
    let mut cpu = long();
    poke(&cpu, CODE, code);
    for n in 0..256 {
        poke(&cpu, HANDLERS + 16 * n, &[0xf4]);
    }
    cpu.r.gpr[reg::RSP] = STACK1;
    cpu
}

/// Runs until a handler or the code halts: (vector or 999, pushed RIP - CODE, DR6 bits).
fn run(cpu: &mut Cpu) -> (u64, u64, u64) {
    assert_eq!(cpu.run(None, None), Exit::Halt);
    let vector = cpu.r.rip.wrapping_sub(HANDLERS + 1) / 16;
    if vector >= 256 {
        return (999, cpu.r.rip - CODE, 0);
    }
    (vector, peek64(cpu, cpu.r.gpr[reg::RSP]) - CODE, cpu.r.dr6 & !0xffff_0ff0)
}

/// Goes on after a handler ran to its HLT: IRETQ.
fn resume(cpu: &mut Cpu) {
    cpu.activity = Activity::Running;
    ok(cpu, &[0x48, 0xcf]);
}

const NOPS: [u8; 4] = [0x90, 0x90, 0x90, 0xf4];

#[test]
fn single_step() {
    let mut cpu = with_code(&NOPS);
    cpu.r.rflags |= rflags::TF;
    assert_eq!(run(&mut cpu), (1, 1, 1 << 14));
    assert_eq!(cpu.rflags() & rflags::TF, 0);
    // IRET sets TF: one instruction, then the trap.
    resume(&mut cpu);
    assert_eq!(run(&mut cpu), (1, 2, 1 << 14));
    // Out of POPF: after the next instruction. pushfq; or byte [rsp+1], 1; popfq; nop; hlt
    let mut cpu = with_code(&[0x9c, 0x80, 0x4c, 0x24, 0x01, 0x01, 0x9d, 0x90, 0xf4]);
    assert_eq!(run(&mut cpu), (1, 8, 1 << 14));
    // INT n takes its handler without a trap.
    let mut cpu = with_code(&[0xcd, 0x80]);
    cpu.r.rflags |= rflags::TF;
    assert_eq!(run(&mut cpu), (0x80, 2, 0));
    // A fault comes instead of the trap.
    let mut cpu = with_code(&[0x0f, 0x0b]);
    cpu.r.rflags |= rflags::TF;
    assert_eq!(run(&mut cpu), (6, 0, 0));
    // HLT ends by the trap.
    let mut cpu = with_code(&[0xf4]);
    cpu.r.rflags |= rflags::TF;
    assert_eq!(cpu.run(None, None), Exit::Halt);
    assert_eq!(run(&mut cpu), (1, 1, 1 << 14));
    // MOV SS loses it. mov eax, ss; mov ss, eax; nop; hlt
    let mut cpu = with_code(&[0x8e, 0xd0, 0x90, 0xf4]);
    rax(&mut cpu, u64::from(DATA0));
    cpu.r.rflags |= rflags::TF;
    assert_eq!(run(&mut cpu), (1, 3, 1 << 14));
}

#[test]
fn code_breakpoints() {
    let mut cpu = with_code(&NOPS);
    cpu.r.dr = [CODE + 1, 0, 0, CODE + 1];
    cpu.r.dr7 = 0x400 | 2 | 1 << 6;
    assert!(cpu.needs_stepping() && cpu.code_breakpoint(CODE + 1) && !cpu.code_breakpoint(CODE));
    cpu.interrupts_changed();
    assert_eq!(run(&mut cpu), (1, 1, 9));
    // The handler resumes with RF set.
    let at = cpu.r.gpr[reg::RSP] + 16;
    assert_eq!(peek64(&cpu, at) & rflags::RF, 0);
    put(&cpu, at, peek64(&cpu, at) | rflags::RF);
    resume(&mut cpu);
    assert_ne!(cpu.r.rflags & rflags::RF, 0);
    assert_eq!(run(&mut cpu), (999, 4, 0));
    assert_eq!(cpu.r.rflags & rflags::RF, 0);
    // Disabled.
    let mut cpu = with_code(&NOPS);
    cpu.r.dr = [CODE + 1; 4];
    assert_eq!(run(&mut cpu), (999, 4, 0));
}

#[test]
fn resume_flag_lasts_one_instruction() {
    let mut cpu = with_code(&[0x90, 0x90, 0x0f, 0x0b]);
    cpu.r.rflags |= rflags::RF;
    cpu.interrupts_changed();
    assert_eq!(run(&mut cpu), (6, 2, 0));
    // #UD itself pushes it set; a software interrupt after it would not.
    let mut cpu = with_code(&[0x90, 0xcd, 0x80]);
    cpu.r.rflags |= rflags::RF;
    cpu.interrupts_changed();
    run(&mut cpu);
    assert_eq!(peek64(&cpu, cpu.r.gpr[reg::RSP] + 16) & rflags::RF, 0);
}

#[test]
fn data_breakpoints() {
    // mov [rax], ecx; mov ecx, [rax]; hlt
    const ACCESSES: [u8; 5] = [0x89, 0x08, 0x8b, 0x08, 0xf4];
    for (kind, len, offset, want) in [
        (1u64, 4u64, 0u64, (1, 2, 1)), // write
        (3, 4, 0, (1, 2, 1)),          // read or write
        (1, 1, 3, (1, 2, 1)),          // last byte
        (1, 1, 4, (999, 5, 0)),        // the byte after
        (1, 8, 4, (1, 2, 1)),          // aligned down to 8
        (1, 2, 0xffff_ffff_ffff_fffe, (999, 5, 0)),
    ] {
        let mut cpu = with_code(&ACCESSES);
        // Warm: the page is in the TLB already.
        rax(&mut cpu, STACK3);
        ok(&mut cpu, &[0x89, 0x08]);
        cpu.r.rip = CODE;
        cpu.r.dr[0] = STACK3.wrapping_add(offset);
        let code = match len {
            1 => 0,
            2 => 1,
            8 => 2,
            _ => 3,
        };
        rax(&mut cpu, 0x400 | 1 | kind << 16 | code << 18);
        ok(&mut cpu, &to_dr(7));
        cpu.r.rip = CODE;
        rax(&mut cpu, STACK3);
        assert_eq!(run(&mut cpu), want, "{kind} {len} {offset:#x}");
    }
    // A read hits a read-or-write breakpoint only.
    for (kind, want) in [(1u64, (999, 3, 0)), (3, (1, 2, 1))] {
        let mut cpu = with_code(&ACCESSES[2..]);
        cpu.r.dr[0] = STACK3;
        cpu.r.dr7 = 0x400 | 1 | kind << 16 | 3 << 18;
        rax(&mut cpu, STACK3);
        assert_eq!(run(&mut cpu), want);
    }
    // MOV SS from a watched address: the trap waits for the next instruction.
    let mut cpu = with_code(&[0x8e, 0x10, 0x90, 0x90, 0xf4]);
    cpu.r.dr[0] = STACK3;
    cpu.r.dr7 = 0x400 | 1 | 3 << 16 | 1 << 18;
    put(&cpu, STACK3, u64::from(DATA0));
    rax(&mut cpu, STACK3);
    assert_eq!(run(&mut cpu), (1, 3, 1));
    // An access that faults in the end is no hit.
    let mut cpu = with_code(&[0x48, 0xff, 0x30, 0xf4]); // push [rax], bad stack
    cpu.r.dr[0] = STACK3;
    cpu.r.dr7 = 0x400 | 1 | 3 << 16;
    put(&cpu, IDT + 16 * 12, gate(CODE0, HANDLERS + 16 * 12, 0x8e, 1));
    cpu.r.gpr[reg::RSP] = (1 << 47) + 0x1000;
    rax(&mut cpu, STACK3);
    assert_eq!(cpu.run(None, None), Exit::Halt);
    assert_eq!((cpu.r.rip, cpu.pending_db, cpu.r.dr6), (HANDLERS + 16 * 12 + 1, 0, 0xffff_0ff0));
}

#[test]
fn io_breakpoints() {
    let mut cpu = long();
    cpu.r.dr[2] = 0x60;
    cpu.r.dr7 = 0x400 | 1 << 4 | 2 << 24 | 1 << 26;
    cpu.io_breakpoint(0x61, 1);
    assert_eq!(cpu.pending_db, 0);
    cpu.r.cr4 |= cr4::DE;
    cpu.io_breakpoint(0x62, 1);
    assert_eq!(cpu.pending_db, 0);
    cpu.io_breakpoint(0x61, 1);
    assert_eq!(cpu.pending_db, 4);
}

#[test]
fn io_breakpoints_trap_after_the_access() {
    // in al, 0x60; nop; out 0x60, al; hlt
    let mut cpu = with_code(&[0xe4, 0x60, 0x90, 0xe6, 0x60, 0xf4]);
    cpu.r.cr4 |= cr4::DE;
    cpu.r.dr[2] = 0x60;
    cpu.r.dr7 = 0x400 | 1 << 4 | 2 << 24;
    let exit = cpu.run(None, None);
    assert!(matches!(exit, Exit::PortIo { port: 0x60, write: false, .. }), "{exit:?}");
    cpu.reply = Some(crate::cpu::Reply::Data(vec![0x42]));
    assert_eq!(run(&mut cpu), (1, 2, 4));
    assert_eq!(cpu.r.gpr[reg::RAX] & 0xff, 0x42);
    resume(&mut cpu);
    let exit = cpu.run(None, None);
    assert!(matches!(exit, Exit::PortIo { port: 0x60, write: true, .. }), "{exit:?}");
    assert_eq!(run(&mut cpu), (1, 5, 4));
}

#[test]
fn an_exit_in_the_middle_is_no_second_breakpoint() {
    let mut cpu = with_code(&[0xe4, 0x60, 0xf4]);
    cpu.set_guest_debug(false, vec![(CODE, 1, 0)]);
    assert_eq!(cpu.run(None, None), Exit::Debug { dr6: 1 });
    assert!(matches!(cpu.run(None, None), Exit::PortIo { .. }));
    cpu.reply = Some(crate::cpu::Reply::Data(vec![0x42]));
    assert_eq!(cpu.run(None, None), Exit::Halt);
    assert_eq!(cpu.r.gpr[reg::RAX] & 0xff, 0x42);
}

#[test]
fn the_callers_debugging() {
    let mut cpu = with_code(&NOPS);
    cpu.set_guest_debug(true, Vec::new());
    for n in 1..=3 {
        assert_eq!(cpu.run(None, None), Exit::Debug { dr6: 1 << 14 });
        assert_eq!(cpu.r.rip, CODE + n);
    }
    assert_eq!(cpu.r.dr6, 0xffff_0ff0);
    // Breakpoints: before the instruction, once, then on.
    let mut cpu = with_code(&NOPS);
    cpu.set_guest_debug(false, vec![(CODE + 9, 1, 0), (CODE + 2, 1, 0)]);
    assert_eq!(cpu.run(None, None), Exit::Debug { dr6: 2 });
    assert_eq!(cpu.r.rip, CODE + 2);
    assert_eq!(cpu.run(None, None), Exit::Halt);
    // A loop hits it every time. inc ecx; jmp -4
    let mut cpu = with_code(&[0xff, 0xc1, 0xeb, 0xfc]);
    cpu.r.gpr[reg::RCX] = 0;
    cpu.set_guest_debug(false, vec![(CODE + 2, 1, 0)]);
    for n in 1..4 {
        assert_eq!(cpu.run(None, None), Exit::Debug { dr6: 1 });
        assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RCX]), (CODE + 2, n));
    }
    // Data: after the instruction. mov [rax], ecx; hlt
    let mut cpu = with_code(&[0x89, 0x08, 0xf4]);
    rax(&mut cpu, STACK3);
    cpu.set_guest_debug(false, vec![(STACK3 + 3, 1, 1)]);
    assert_eq!(cpu.run(None, None), Exit::Debug { dr6: 1 });
    assert_eq!(cpu.r.rip, CODE + 2);
    cpu.set_guest_debug(false, Vec::new());
    assert_eq!(cpu.run(None, None), Exit::Halt);
    // The guest's own single step is kept for it.
    let mut cpu = with_code(&NOPS);
    cpu.r.rflags |= rflags::TF;
    cpu.set_guest_debug(true, Vec::new());
    assert_eq!(cpu.run(None, None), Exit::Debug { dr6: 1 << 14 });
    cpu.set_guest_debug(false, Vec::new());
    assert_eq!(run(&mut cpu), (1, 1, 1 << 14));
}
