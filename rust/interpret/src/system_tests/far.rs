use super::*;

/// JMP FAR or CALL FAR ptr16:32 (or ptr16:16 with `size` 2).
fn far(call: bool, selector: u16, offset: u64, size: usize) -> Vec<u8> {
    let mut bytes = if size == 2 { vec![0x66] } else { vec![] };
    bytes.push(if call { 0x9a } else { 0xea });
    bytes.extend_from_slice(&offset.to_le_bytes()[..size]);
    bytes.extend_from_slice(&selector.to_le_bytes());
    bytes
}

fn jmp(selector: u16, offset: u64) -> Vec<u8> {
    far(false, selector, offset, 4)
}

fn call(selector: u16, offset: u64) -> Vec<u8> {
    far(true, selector, offset, 4)
}

/// CALL or JMP FAR [RAX], 32- or 64-bit.
fn through_memory(cpu: &mut Cpu, call: bool, selector: u16, offset: u64, size: usize) -> Vec<u8> {
    let at = STACK3 + 0x100;
    rax(cpu, at);
    put(cpu, at, offset);
    poke(cpu, at + size as u64, &selector.to_le_bytes());
    let mut bytes = if size == 8 { vec![0x48] } else { vec![] };
    bytes.extend([0xff, if call { 0x18 } else { 0x28 }]);
    bytes
}

#[test]
fn jumps_at_the_same_level() {
    let mut cpu = protected();
    ok(&mut cpu, &jmp(SMALL_CODE, 0xfff));
    assert_eq!((cpu.r.rip, cpu.cpl), (0xfff, 0));
    let want = Segment { base: 0, limit: 0xfff, ar: 0x409b, selector: SMALL_CODE };
    assert_eq!(cpu.r.seg[seg::CS], want);
    assert_eq!(get_descriptor(&cpu, SMALL_CODE) >> 40 & 0xff, 0x9b);
    let mut cpu = protected();
    assert_eq!(faults(&mut cpu, &jmp(SMALL_CODE, 0x1000)), gp(0));
    assert_eq!(faults(&mut cpu, &jmp(0, 0)), gp(0));
    assert_eq!(faults(&mut cpu, &jmp(3, 0)), gp(0));
    assert_eq!(faults(&mut cpu, &jmp(OUTSIDE, 0)), gp(0x100));
    assert_eq!(faults(&mut cpu, &jmp(DATA0, 0)), gp(0x10));
    assert_eq!(faults(&mut cpu, &jmp(CODE3, 0)), gp(0x18));
    assert_eq!(faults(&mut cpu, &jmp(CODE1, 0)), gp(0x40));
    assert_eq!(faults(&mut cpu, &jmp(ABSENT_CODE, 0)), np(0x80));
    assert_eq!(faults(&mut cpu, &jmp(CODE0 | 1, 0)), gp(0x08));
    assert_eq!(faults(&mut cpu, &jmp(LDT_SELECTOR, 0)), gp(0x68));
    ok(&mut cpu, &jmp(CODE16, 0x1234));
    assert_eq!(cpu.mode, Mode::Protected16);
    // From level 3: level 0 is out of reach, conforming code is not, and keeps the level.
    let mut cpu = protected3();
    assert_eq!(faults(&mut cpu, &jmp(CODE0, 0)), gp(0x08));
    ok(&mut cpu, &jmp(CONFORMING0, 0x10));
    assert_eq!((cpu.cpl, cpu.r.seg[seg::CS].selector), (3, CONFORMING0 | 3));
    assert!(exec(&mut cpu, &jmp(TASK_GATE, 0)).is_err());
    assert!(matches!(cpu.stop, Some(StopReason::Exit(Exit::Failure { .. }))));
}

#[test]
fn calls_at_the_same_level() {
    let mut cpu = protected();
    cpu.r.gpr[reg::RSP] = STACK0;
    let rip = cpu.r.rip;
    ok(&mut cpu, &call(CODE0, 0x1234));
    assert_eq!(dwords(&cpu, STACK0 - 8, 2), [rip as u32 + 7, u32::from(CODE0)]);
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x1234, STACK0 - 8));
    ok(&mut cpu, &far(true, CODE0, 0x5678, 2));
    assert_eq!(words(&cpu, STACK0 - 12, 2), [0x1234 + 6, CODE0]);
    ok(&mut cpu, &[0x66, 0xcb]); // retf, 16 bits
    assert_eq!(cpu.r.rip, 0x123a);
    ok(&mut cpu, &[0xca, 0x10, 0x00]); // retf 16
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (rip + 7, STACK0 + 16));
    // The stack limit.
    cpu.r.seg[seg::SS].limit = 0xff;
    cpu.r.gpr[reg::RSP] = 4;
    assert_eq!(faults(&mut cpu, &call(CODE0, 0)), ss(0));
    cpu.r.gpr[reg::RSP] = 0x108;
    assert_eq!(faults(&mut cpu, &call(CODE0, 0)), ss(0));
}

#[test]
fn real_mode_transfers() {
    let mut cpu = real_mode();
    ok(&mut cpu, &[0x9a, 0x34, 0x12, 0x00, 0xf0]); // call 0xf000:0x1234
    assert_eq!((cpu.r.rip, cpu.r.seg[seg::CS].base), (0x1234, 0xf_0000));
    assert_eq!(words(&cpu, 0x6ffc, 2), [0x7c05, 0]);
    ok(&mut cpu, &[0xcb]);
    assert_eq!((cpu.r.rip, cpu.r.seg[seg::CS].base, cpu.r.gpr[reg::RSP]), (0x7c05, 0, 0x7000));
    assert_eq!(faults(&mut cpu, &[0x66, 0xea, 0, 0, 1, 0, 0, 0]), gp(0));
    // The frame wraps at the end of the segment.
    cpu.r.gpr[reg::RSP] = 0xabcd_0002;
    ok(&mut cpu, &[0x9a, 0x34, 0x12, 0x00, 0xf0]);
    assert_eq!(cpu.r.gpr[reg::RSP], 0xabcd_fffe);
    assert_eq!((words(&cpu, 0, 1), words(&cpu, 0xfffe, 1)), (vec![0], vec![0x7c0a]));
    let mut cpu = v86(0);
    ok(&mut cpu, &[0xea, 0x34, 0x12, 0x00, 0xf0]);
    assert_eq!(cpu.r.seg[seg::CS], Segment { base: 0xf_0000, limit: 0xffff, ar: 0xf3, selector: 0xf000 });
    assert_eq!(cpu.cpl, 3);
}

#[test]
fn call_gate_to_an_inner_level() {
    let mut cpu = protected3();
    put(&cpu, STACK3, 0x2222_2222_1111_1111);
    let rip = cpu.r.rip as u32;
    ok(&mut cpu, &call(GATE32 | 3, 0xdead));
    assert_eq!((cpu.cpl, cpu.r.rip, cpu.r.seg[seg::CS].selector), (0, 0x1_2345, CODE0));
    assert_eq!((cpu.r.seg[seg::SS].selector, cpu.r.gpr[reg::RSP]), (DATA0, STACK0 - 24));
    let want = [rip + 7, CODE3.into(), 0x1111_1111, 0x2222_2222, STACK3 as u32, DATA3.into()];
    assert_eq!(dwords(&cpu, STACK0 - 24, 6), want);
    // Back: RETF 8 releases the parameters on both stacks and clears what level 3 may not use.
    cpu.r.seg[seg::ES] = Segment { ar: 0xc093, selector: DATA0, ..cpu.r.seg[seg::SS] };
    ok(&mut cpu, &[0xca, 0x08, 0x00]);
    assert_eq!((cpu.cpl, cpu.r.rip as u32, cpu.r.gpr[reg::RSP]), (3, rip + 7, STACK3 + 8));
    assert_eq!((cpu.r.seg[seg::SS].selector, cpu.r.seg[seg::SS].dpl()), (DATA3, 3));
    assert_eq!((cpu.r.seg[seg::ES].selector, cpu.r.seg[seg::ES].ar), (0, ar::UNUSABLE));
    assert_eq!(cpu.r.seg[seg::DS].selector, DATA3);

    let mut cpu = protected3();
    put(&cpu, STACK3, 0x4444_3333_2222_1111);
    ok(&mut cpu, &call(GATE16, 0));
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x2345, STACK0 - 12));
    let want = [rip as u16 + 7, CODE3, 0x1111, 0x2222, STACK3 as u16, DATA3];
    assert_eq!(words(&cpu, STACK0 - 12, 6), want);
}

#[test]
fn call_gate_checks() {
    let mut cpu = protected3();
    // JMP cannot change the level.
    assert_eq!(faults(&mut cpu, &jmp(GATE32, 0)), gp(0x08));
    set_descriptor(&cpu, GATE32, gate(CODE0, 0, 0xcc, 0)); // DPL 2
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), gp(0x88));
    set_descriptor(&cpu, GATE32, gate(CODE0, 0, 0x6c, 0)); // absent
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), np(0x88));
    set_descriptor(&cpu, GATE32, gate(0, 0, 0xec, 0));
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), gp(0));
    set_descriptor(&cpu, GATE32, gate(DATA0, 0, 0xec, 0));
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), gp(0x10));
    set_descriptor(&cpu, GATE32, gate(ABSENT_CODE, 0, 0xec, 0));
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), np(0x80));
    set_descriptor(&cpu, GATE32, gate(SMALL_CODE, 0x1000, 0xec, 0));
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), gp(0));
    set_descriptor(&cpu, GATE32, gate(CODE3, 0x77, 0xec, 5));
    ok(&mut cpu, &call(GATE32, 0));
    assert_eq!((cpu.cpl, cpu.r.gpr[reg::RSP], cpu.r.rip), (3, STACK3 - 8, 0x77));
    ok(&mut cpu, &jmp(GATE32, 0));
    // Level 1 through its stack in the TSS.
    set_descriptor(&cpu, GATE32, gate(CODE1, 0x77, 0xec, 0));
    ok(&mut cpu, &call(GATE32, 0));
    assert_eq!((cpu.cpl, cpu.r.gpr[reg::RSP], cpu.r.seg[seg::SS].selector), (1, STACK1 - 16, DATA1 | 1));
}

#[test]
fn inner_stack_checks() {
    let with = |selector: u16| {
        let mut cpu = protected3();
        put(&cpu, TSS + 4, STACK0 | u64::from(selector) << 32);
        faults(&mut cpu, &call(GATE32, 0))
    };
    assert_eq!(with(0), ts(0));
    assert_eq!(with(OUTSIDE), ts(0x100));
    assert_eq!(with(DATA0 | 1), ts(0x10));
    assert_eq!(with(DATA3), ts(0x20));
    assert_eq!(with(CODE0), ts(0x08));
    assert_eq!(with(ABSENT_DATA), ss(0x50));
    let mut cpu = protected3();
    cpu.r.tr.limit = 8;
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), ts(0x28));
    cpu.r.tr.limit = 9;
    ok(&mut cpu, &call(GATE32, 0));
    // No room on the inner stack.
    let mut cpu = protected3();
    set_descriptor(&cpu, DATA0, descriptor(0, 0x8fff, 0x93, 4));
    put(&cpu, TSS + 4, 0x10 | u64::from(DATA0) << 32);
    assert_eq!(faults(&mut cpu, &call(GATE32, 0)), ss(0x10));
    // A 16-bit TSS.
    let mut cpu = protected3();
    cpu.r.tr.ar = 0x83;
    put(&cpu, TSS + 2, STACK0 | u64::from(DATA0) << 16);
    ok(&mut cpu, &call(GATE32, 0));
    assert_eq!(cpu.r.gpr[reg::RSP], STACK0 - 24);
}

#[test]
fn return_checks() {
    let with = |cs: u16, rip: u32| {
        let mut cpu = protected();
        cpu.r.gpr[reg::RSP] = STACK0;
        put(&cpu, STACK0, u64::from(rip) | u64::from(cs) << 32);
        put(&cpu, STACK0 + 8, STACK3 | u64::from(DATA3) << 32);
        match exec(&mut cpu, &[0xcb]) {
            Ok(()) => Ok(cpu.cpl),
            Err(_) => Err(fault_code(&mut cpu)),
        }
    };
    assert_eq!(with(CODE0, 0), Ok(0));
    assert_eq!(with(CODE3, 0), Ok(3));
    assert_eq!(with(CONFORMING0 | 3, 0), Ok(3));
    assert_eq!(with(0, 0), Err(gp(0)));
    assert_eq!(with(OUTSIDE, 0), Err(gp(0x100)));
    assert_eq!(with(DATA0, 0), Err(gp(0x10)));
    assert_eq!(with(CODE0 | 3, 0), Err(gp(0x08)));
    assert_eq!(with(CODE1, 0), Err(gp(0x40)));
    assert_eq!(with(ABSENT_CODE, 0), Err(np(0x80)));
    assert_eq!(with(SMALL_CODE, 0x1000), Err(gp(0)));
    // To an inner level.
    let mut cpu = protected3();
    put(&cpu, STACK3, u64::from(CODE0) << 32);
    assert_eq!(faults(&mut cpu, &[0xcb]), gp(0x08));
    // The outer stack.
    let stack = |ss: u16| {
        let mut cpu = protected();
        cpu.r.gpr[reg::RSP] = STACK0;
        put(&cpu, STACK0, u64::from(CODE3) << 32);
        put(&cpu, STACK0 + 8, STACK3 | u64::from(ss) << 32);
        faults(&mut cpu, &[0xcb])
    };
    assert_eq!(stack(0), gp(0));
    assert_eq!(stack(DATA0), gp(0x10));
    assert_eq!(stack(DATA3 & !3), gp(0x20));
    assert_eq!(stack(READ_ONLY | 3), gp(0x58));
    assert_eq!(stack(OUTSIDE | 3), gp(0x100));
}

#[test]
fn long_mode_transfers() {
    let mut cpu = long();
    cpu.r.gpr[reg::RSP] = STACK0;
    // To compatibility mode of the same level and back.
    set_descriptor(&cpu, SMALL_CODE, descriptor(0, 0xf_ffff, 0x9a, 0xc));
    let bytes = through_memory(&mut cpu, true, SMALL_CODE, 0x1234, 8);
    let rip = cpu.r.rip;
    ok(&mut cpu, &bytes);
    assert_eq!((cpu.mode, cpu.r.rip), (Mode::Protected32, 0x1234));
    assert_eq!(qwords(&cpu, STACK0 - 16, 2), [rip + 3, u64::from(CODE0)]);
    ok(&mut cpu, &far(false, CODE0, 0x5678, 4));
    assert_eq!((cpu.mode, cpu.r.rip), (Mode::Long64, 0x5678));
    ok(&mut cpu, &[0x48, 0xcb]); // retfq
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (rip + 3, STACK0));
    // Offsets.
    let bytes = through_memory(&mut cpu, false, CODE0, 1 << 47, 8);
    assert_eq!(faults(&mut cpu, &bytes), gp(0));
    let bytes = through_memory(&mut cpu, false, SMALL_CODE, 1 << 32, 8);
    assert_eq!(faults(&mut cpu, &bytes), gp(0));
    // L and D.
    set_descriptor(&cpu, SMALL_CODE, descriptor(0, 0xf_ffff, 0x9a, 0xe));
    let bytes = through_memory(&mut cpu, false, SMALL_CODE, 0, 4);
    assert_eq!(faults(&mut cpu, &bytes), gp(0x98));
    // No 16-bit gates, no TSS.
    let bytes = through_memory(&mut cpu, false, TSS_SELECTOR, 0, 4);
    assert_eq!(faults(&mut cpu, &bytes), gp(0x28));
}

#[test]
fn long_mode_call_gate() {
    put_and_call(long3(), 16);
    put_and_call(compat3(), 8);
    fn put_and_call(mut cpu: Box<Cpu>, _: u64) {
        let (old_cs, rip) = (cpu.r.seg[seg::CS].selector, cpu.r.rip);
        let bytes = through_memory(&mut cpu, true, GATE64, 0, 4);
        ok(&mut cpu, &bytes);
        assert_eq!((cpu.mode, cpu.cpl, cpu.r.rip), (Mode::Long64, 0, 0xffff_8000_0001_2345));
        assert_eq!((cpu.r.seg[seg::SS].selector, cpu.r.seg[seg::SS].ar), (0, ar::UNUSABLE));
        assert_eq!(cpu.r.gpr[reg::RSP], STACK0 - 32);
        let want = [rip + bytes.len() as u64, u64::from(old_cs), STACK3, u64::from(DATA3)];
        assert_eq!(qwords(&cpu, STACK0 - 32, 4), want);
        ok(&mut cpu, &[0x48, 0xcb]);
        assert_eq!((cpu.cpl, cpu.r.gpr[reg::RSP], cpu.r.seg[seg::CS].selector), (3, STACK3, old_cs));
    }
    let mut cpu = long3();
    put(&cpu, TSS + 4, (1 << 47) + 0x1000);
    let bytes = through_memory(&mut cpu, true, GATE64, 0, 4);
    assert_eq!(faults(&mut cpu, &bytes), ss(0));
    put(&cpu, GDT + u64::from(GATE64) + 8, 0x0000_8000);
    assert_eq!(faults(&mut cpu, &bytes).0, vector::GP);
    put(&cpu, GDT + u64::from(GATE64) + 8, 0x1f << 40);
    assert_eq!(faults(&mut cpu, &bytes), gp(0xb0));
    put(&cpu, GDT + u64::from(GATE64) + 8, 0);
    set_descriptor(&cpu, GATE64, gate(CODE3, 0, 0xec, 0));
    assert_eq!(faults(&mut cpu, &bytes), gp(0x18));
}

#[test]
fn inner_stack_page_faults_are_supervisor_accesses() {
    // The inner stack is not mapped: the fault's error code says supervisor write,
    // and the level stays 3.
    let mut cpu = long3();
    put(&cpu, TSS + 4, 0x4000_1000);
    let bytes = through_memory(&mut cpu, true, GATE64, 0, 4);
    assert_eq!(faults(&mut cpu, &bytes), (vector::PF, Some(2)));
    assert_eq!(cpu.cpl, 3);
    // In a supervisor page it works.
    let mut cpu = long3();
    put(&cpu, 0x3000, 0x83);
    cpu.flush_tlb_all();
    put(&cpu, TSS + 4, STACK0);
    let at = 0x20_0000;
    rax(&mut cpu, at);
    put(&cpu, at, u64::from(GATE64) << 32);
    ok(&mut cpu, &[0xff, 0x18]);
    assert_eq!(cpu.r.gpr[reg::RSP], STACK0 - 32);
}
