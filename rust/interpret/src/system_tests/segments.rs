use super::*;

const MOV_DS: &[u8] = &[0x8e, 0xd8];
const MOV_ES: &[u8] = &[0x8e, 0xc0];
const MOV_SS: &[u8] = &[0x8e, 0xd0];
const MOV_FS: &[u8] = &[0x8e, 0xe0];

#[track_caller]
fn load(cpu: &mut Cpu, mov: &[u8], selector: u16) {
    rax(cpu, u64::from(selector));
    ok(cpu, mov);
}

#[track_caller]
fn load_faults(cpu: &mut Cpu, mov: &[u8], selector: u16) -> (u8, Option<u32>) {
    rax(cpu, u64::from(selector));
    faults(cpu, mov)
}

#[test]
fn data_segments() {
    let mut cpu = protected();
    set_descriptor(&cpu, DATA3, descriptor(0x1234_5678, 0x12345, 0xf2, 4));
    load(&mut cpu, MOV_DS, DATA3);
    let want = Segment { base: 0x1234_5678, limit: 0x12345, ar: 0x40f3, selector: DATA3 };
    assert_eq!(cpu.r.seg[seg::DS], want);
    // The accessed bit is in memory.
    assert_eq!(get_descriptor(&cpu, DATA3) >> 40 & 0xff, 0xf3);
    assert!(!cpu.flat);
    load(&mut cpu, MOV_DS, DATA0);
    assert_eq!(cpu.r.seg[seg::DS].limit, 0xffff_ffff);
    load(&mut cpu, MOV_DS, CODE0);
    load(&mut cpu, MOV_ES, 3);
    assert_eq!(cpu.r.seg[seg::ES], Segment { base: 0, limit: 0, ar: ar::UNUSABLE, selector: 3 });
    assert_eq!(cpu.shadow, 0);
    assert_eq!(load_faults(&mut cpu, MOV_DS, ABSENT_DATA), np(0x50));
    assert_eq!(load_faults(&mut cpu, MOV_DS, EXECUTE_ONLY), gp(0x60));
    assert_eq!(load_faults(&mut cpu, MOV_DS, TSS_SELECTOR), gp(0x28));
    assert_eq!(load_faults(&mut cpu, MOV_DS, OUTSIDE | 2), gp(0x100));
    // No LDT.
    assert_eq!(load_faults(&mut cpu, MOV_DS, 0xc), gp(0xc));
    // RPL above DPL.
    assert_eq!(load_faults(&mut cpu, MOV_DS, DATA0 | 1), gp(0x10));
    let mut cpu = protected3();
    assert_eq!(load_faults(&mut cpu, MOV_DS, DATA0), gp(0x10));
    // A conforming code segment is for everyone.
    load(&mut cpu, MOV_DS, CONFORMING0 | 3);
    load(&mut cpu, MOV_DS, READ_ONLY | 3);
}

#[test]
fn table_limit_is_the_last_byte() {
    let mut cpu = protected();
    cpu.r.gdtr.limit = DATA3 & !7 | 6;
    assert_eq!(load_faults(&mut cpu, MOV_DS, DATA3), gp(0x20));
    cpu.r.gdtr.limit = DATA3 & !7 | 7;
    load(&mut cpu, MOV_DS, DATA3);
}

#[test]
fn stack_segment() {
    let mut cpu = protected();
    load(&mut cpu, MOV_SS, STACK16);
    assert_eq!(cpu.shadow, shadow::MOV_SS);
    assert_eq!(cpu.stack_size(), 2);
    cpu.shadow = 0;
    assert_eq!(load_faults(&mut cpu, MOV_SS, 0), gp(0));
    assert_eq!(load_faults(&mut cpu, MOV_SS, DATA3), gp(0x20));
    assert_eq!(load_faults(&mut cpu, MOV_SS, DATA0 | 1), gp(0x10));
    assert_eq!(load_faults(&mut cpu, MOV_SS, READ_ONLY), gp(0x58));
    assert_eq!(load_faults(&mut cpu, MOV_SS, CODE0), gp(0x08));
    assert_eq!(load_faults(&mut cpu, MOV_SS, ABSENT_DATA), ss(0x50));
    assert_eq!(load_faults(&mut cpu, MOV_SS, OUTSIDE), gp(0x100));
    // 64-bit mode: null below level 3, with RPL = CPL.
    let mut cpu = long();
    load(&mut cpu, MOV_SS, 0);
    assert_eq!(cpu.r.seg[seg::SS].ar, ar::UNUSABLE);
    cpu.shadow = 0;
    assert_eq!(load_faults(&mut cpu, MOV_SS, 1), gp(0));
    let mut cpu = long3();
    assert_eq!(load_faults(&mut cpu, MOV_SS, 3), gp(0));
    assert_eq!(load_faults(&mut compat3(), MOV_SS, 3), gp(0));
}

#[test]
fn descriptor_tables_are_supervisor_memory() {
    // At level 3 with the tables in a supervisor page: loads work.
    let mut cpu = long3();
    put(&cpu, 0x3000, 0x83);
    put(&cpu, 0x3000 + 8, 1 << 21 | 0x87);
    cpu.flush_tlb_all();
    load(&mut cpu, MOV_DS, DATA3);
    // In a read-only page: setting the accessed bit faults.
    put(&cpu, 0x3000, 0x81);
    cpu.flush_tlb_all();
    set_descriptor(&cpu, DATA3, descriptor(0, 0xf_ffff, 0xf2, 0xc));
    rax(&mut cpu, u64::from(DATA3));
    assert!(exec(&mut cpu, MOV_DS).is_err());
    let Some(StopReason::Fault(f)) = cpu.stop.take() else { panic!() };
    assert_eq!((f.vector, f.error, f.address), (vector::PF, Some(3), GDT + 0x25));
}

#[test]
fn real_and_v86_mode() {
    let mut cpu = real_mode();
    cpu.r.seg[seg::DS].limit = 0xffff_ffff;
    load(&mut cpu, MOV_DS, 0x1234);
    let want = Segment { base: 0x12340, limit: 0xffff_ffff, ar: 0x93, selector: 0x1234 };
    assert_eq!(cpu.r.seg[seg::DS], want);
    let mut cpu = v86(0);
    load(&mut cpu, MOV_DS, 0);
    assert_eq!(cpu.r.seg[seg::DS], Segment { base: 0, limit: 0xffff, ar: 0xf3, selector: 0 });
}

#[test]
fn push_and_pop() {
    let mut cpu = protected();
    poke(&cpu, STACK0 - 8, &[0xaa; 8]);
    cpu.r.gpr[reg::RSP] = STACK0;
    cpu.r.seg[seg::FS].selector = 0x1234;
    ok(&mut cpu, &[0x0f, 0xa0]); // push fs
    assert_eq!(dwords(&cpu, STACK0 - 4, 1), [0xaaaa_1234]);
    assert_eq!(cpu.r.gpr[reg::RSP], STACK0 - 4);
    ok(&mut cpu, &[0x66, 0x16]); // push ss, 16 bits
    assert_eq!(words(&cpu, STACK0 - 6, 1), [cpu.r.seg[seg::SS].selector]);
    cpu.r.gpr[reg::RSP] = STACK0 - 8;
    put(&cpu, STACK0 - 8, u64::from(DATA3));
    ok(&mut cpu, &[0x1f]); // pop ds
    assert_eq!((cpu.r.seg[seg::DS].selector, cpu.r.gpr[reg::RSP]), (DATA3, STACK0 - 4));
    put(&cpu, STACK0 - 4, u64::from(OUTSIDE));
    assert_eq!(faults(&mut cpu, &[0x1f]), gp(0x100));
    // POP SS increments the old stack.
    put(&cpu, STACK0 - 4, u64::from(STACK16));
    ok(&mut cpu, &[0x17]);
    assert_eq!((cpu.r.gpr[reg::RSP], cpu.shadow), (STACK0, shadow::MOV_SS));
    let mut cpu = long();
    cpu.r.gpr[reg::RSP] = STACK0;
    put(&cpu, STACK0 - 8, u64::MAX);
    cpu.r.seg[seg::GS].selector = 0x1234;
    ok(&mut cpu, &[0x0f, 0xa8]); // push gs
    assert_eq!(qwords(&cpu, STACK0 - 8, 1), [0x1234]);
}

#[test]
fn mov_from_segment() {
    let mut cpu = protected();
    cpu.r.gpr[reg::RCX] = u64::MAX;
    cpu.r.seg[seg::DS].selector = 0x1234;
    ok(&mut cpu, &[0x8c, 0xd9]); // mov ecx, ds
    assert_eq!(cpu.r.gpr[reg::RCX], 0x1234);
    cpu.r.gpr[reg::RCX] = 0xffff_ffff;
    ok(&mut cpu, &[0x66, 0x8c, 0xd9]); // mov cx, ds
    assert_eq!(cpu.r.gpr[reg::RCX], 0xffff_1234);
    put(&cpu, STACK3, u64::MAX);
    rax(&mut cpu, STACK3);
    ok(&mut cpu, &[0x8c, 0x18]); // mov [eax], ds
    assert_eq!(peek64(&cpu, STACK3), 0xffff_ffff_ffff_1234);
}

#[test]
fn far_pointers() {
    let mut cpu = protected();
    rax(&mut cpu, STACK3);
    put(&cpu, STACK3, 0x8765_4321 | u64::from(DATA3) << 32);
    ok(&mut cpu, &[0xc4, 0x08]); // les ecx, [eax]
    assert_eq!((cpu.r.gpr[reg::RCX], cpu.r.seg[seg::ES].selector), (0x8765_4321, DATA3));
    // lfs dx, [eax]: the selector is 0x8765; lss esp, [eax]: the wrong level.
    assert_eq!(faults(&mut cpu, &[0x66, 0x0f, 0xb4, 0x10]), gp(0x8764));
    assert_eq!(faults(&mut cpu, &[0x0f, 0xb2, 0x20]), gp(0x20));
    put(&cpu, STACK3, 0x1000 | u64::from(DATA0) << 32);
    ok(&mut cpu, &[0x0f, 0xb2, 0x20]);
    assert_eq!((cpu.r.gpr[reg::RSP], cpu.r.seg[seg::SS].selector, cpu.shadow), (0x1000, DATA0, 0));
    let mut cpu = long();
    rax(&mut cpu, STACK3);
    put(&cpu, STACK3, 0x1234_5678_9abc_def0);
    put(&cpu, STACK3 + 8, 0);
    ok(&mut cpu, &[0x48, 0x0f, 0xb5, 0x08]); // lgs rcx, [rax]
    assert_eq!(cpu.r.gpr[reg::RCX], 0x1234_5678_9abc_def0);
}

#[test]
fn null_clears_the_base() {
    let mut cpu = long();
    cpu.r.seg[seg::FS].base = 0x1234;
    load(&mut cpu, MOV_FS, 0);
    assert_eq!(cpu.r.seg[seg::FS].base, 0);
}

#[test]
fn ldt_and_task_register() {
    const LLDT: &[u8] = &[0x0f, 0x00, 0xd0];
    const LTR: &[u8] = &[0x0f, 0x00, 0xd8];
    let mut cpu = protected();
    load(&mut cpu, LLDT, LDT_SELECTOR);
    assert_eq!(cpu.r.ldtr, Segment { base: LDT, limit: 0xf, ar: 0x82, selector: LDT_SELECTOR });
    load(&mut cpu, MOV_DS, 0xc);
    assert_eq!(load_faults(&mut cpu, MOV_DS, 0x14), gp(0x14));
    load(&mut cpu, LLDT, 0);
    assert_eq!(cpu.r.ldtr.ar, ar::UNUSABLE);
    assert_eq!(load_faults(&mut cpu, LLDT, DATA0), gp(0x10));
    assert_eq!(load_faults(&mut cpu, LLDT, LDT_SELECTOR | 4), gp(0x6c));
    set_descriptor(&cpu, LDT_SELECTOR, descriptor(LDT, 0xf, 0x02, 0));
    assert_eq!(load_faults(&mut cpu, LLDT, LDT_SELECTOR), np(0x68));
    // Busy, absent, free.
    assert_eq!(load_faults(&mut cpu, LTR, TSS_SELECTOR), gp(0x28));
    assert_eq!(load_faults(&mut cpu, LTR, 0), gp(0));
    set_descriptor(&cpu, TSS_SELECTOR, descriptor(TSS, 0x67, 0x09, 0));
    assert_eq!(load_faults(&mut cpu, LTR, TSS_SELECTOR), np(0x28));
    set_descriptor(&cpu, TSS_SELECTOR, descriptor(TSS, 0x67, 0x89, 0));
    load(&mut cpu, LTR, TSS_SELECTOR);
    assert_eq!(cpu.r.tr, Segment { base: TSS, limit: 0x67, ar: 0x8b, selector: TSS_SELECTOR });
    assert_eq!(get_descriptor(&cpu, TSS_SELECTOR) >> 40 & 0xff, 0x8b);
    set_descriptor(&cpu, TSS_SELECTOR, descriptor(TSS, 0x2b, 0x81, 0));
    load(&mut cpu, LTR, TSS_SELECTOR);
    assert_eq!(cpu.r.tr.ar, 0x83);
    let mut cpu = protected3();
    assert_eq!(load_faults(&mut cpu, LTR, TSS_SELECTOR), gp(0));
    assert_eq!(load_faults(&mut real_mode(), LLDT, 0), UD);
    assert_eq!(load_faults(&mut v86(3), LTR, 0), UD);
    // 64-bit mode: 16 bytes.
    let mut cpu = long();
    load(&mut cpu, LLDT, LDT_SELECTOR);
    assert_eq!(cpu.r.ldtr.base, 0xffff_8000_0000_0000 | LDT);
    put(&cpu, GDT + u64::from(LDT_SELECTOR) + 8, 0x1234_5678);
    assert_eq!(load_faults(&mut cpu, LLDT, LDT_SELECTOR), gp(0x68));
    put(&cpu, GDT + u64::from(LDT_SELECTOR) + 8, 1 << 40);
    assert_eq!(load_faults(&mut cpu, LLDT, LDT_SELECTOR), gp(0x68));
    set_descriptor(&cpu, TSS_SELECTOR, descriptor(TSS, 0x67, 0x81, 0));
    assert_eq!(load_faults(&mut cpu, LTR, TSS_SELECTOR), gp(0x28));
    cpu.r.gdtr.limit = TSS_SELECTOR + 14;
    set_descriptor(&cpu, TSS_SELECTOR, descriptor(TSS, 0x67, 0x89, 0));
    assert_eq!(load_faults(&mut cpu, LTR, TSS_SELECTOR), gp(0x28));
}

#[test]
fn tables() {
    let mut cpu = protected();
    rax(&mut cpu, STACK3);
    put(&cpu, STACK3, 0x8765_4321_1234);
    put(&cpu, STACK3 + 8, u64::MAX);
    ok(&mut cpu, &[0x0f, 0x01, 0x10]); // lgdt
    assert_eq!(cpu.r.gdtr, TableRegister { base: 0x8765_4321, limit: 0x1234 });
    ok(&mut cpu, &[0x66, 0x0f, 0x01, 0x18]); // lidt, 24 bits
    assert_eq!(cpu.r.idtr, TableRegister { base: 0x65_4321, limit: 0x1234 });
    put(&cpu, STACK3, 0);
    ok(&mut cpu, &[0x66, 0x0f, 0x01, 0x00]); // sgdt: 32 bits anyway
    assert_eq!(qwords(&cpu, STACK3, 2), [0x8765_4321_1234, u64::MAX]);
    let mut cpu = long();
    rax(&mut cpu, STACK3);
    put(&cpu, STACK3, 0x8000_1234_5678_0fff);
    put(&cpu, STACK3 + 8, 0xffff);
    ok(&mut cpu, &[0x0f, 0x01, 0x18]);
    assert_eq!(cpu.r.idtr, TableRegister { base: 0xffff_8000_1234_5678, limit: 0xfff });
    put(&cpu, STACK3 + 8, 0x7fff);
    assert_eq!(faults(&mut cpu, &[0x0f, 0x01, 0x18]), gp(0));
    ok(&mut cpu, &[0x0f, 0x01, 0x08]); // sidt
    assert_eq!(peek64(&cpu, STACK3), 0x8000_1234_5678_0fff);
    let mut cpu = long3();
    rax(&mut cpu, STACK3);
    assert_eq!(faults(&mut cpu, &[0x0f, 0x01, 0x18]), gp(0));
    ok(&mut cpu, &[0x0f, 0x01, 0x08]);
}

#[test]
fn umip() {
    // sldt, str, smsw ecx; sgdt, sidt [eax]
    for bytes in
        [[0x0f, 0x00, 0xc1], [0x0f, 0x00, 0xc9], [0x0f, 0x01, 0xe1], [0x0f, 0x01, 0x00], [0x0f, 0x01, 0x08]]
    {
        let mut cpu = protected3();
        rax(&mut cpu, STACK3);
        ok(&mut cpu, &bytes);
        cpu.r.cr4 |= cr4::UMIP;
        assert_eq!(faults(&mut cpu, &bytes), gp(0));
        let mut cpu = protected();
        cpu.r.cr4 |= cr4::UMIP;
        rax(&mut cpu, STACK3);
        ok(&mut cpu, &bytes);
    }
    let mut cpu = protected();
    cpu.r.gpr[reg::RCX] = 0xaaaa_aaaa;
    ok(&mut cpu, &[0x0f, 0x00, 0xc9]); // str ecx
    assert_eq!(cpu.r.gpr[reg::RCX], u64::from(TSS_SELECTOR));
    ok(&mut cpu, &[0x0f, 0x01, 0xe1]); // smsw ecx
    assert_eq!(cpu.r.gpr[reg::RCX], cpu.r.cr0);
    assert_eq!(faults(&mut v86(3), &[0x0f, 0x00, 0xc1]), UD);
    ok(&mut real_mode(), &[0x0f, 0x01, 0xe1]);
}

/// Executes `0f op` with ECX = selector; ZF and EAX.
#[track_caller]
fn test_selector(cpu: &mut Cpu, bytes: &[u8], selector: u16) -> (bool, u64) {
    rax(cpu, 0x1111);
    cpu.r.gpr[reg::RCX] = u64::from(selector);
    ok(cpu, bytes);
    (cpu.r.flags.zf(), cpu.r.gpr[reg::RAX])
}

#[test]
fn lar_and_lsl() {
    const LAR: &[u8] = &[0x0f, 0x02, 0xc1];
    const LSL: &[u8] = &[0x0f, 0x03, 0xc1];
    let mut cpu = protected();
    assert_eq!(test_selector(&mut cpu, LAR, DATA3), (true, 0xcf_f300));
    assert_eq!(test_selector(&mut cpu, LSL, DATA3), (true, 0xffff_ffff));
    assert_eq!(test_selector(&mut cpu, LAR, TSS_SELECTOR), (true, 0x8b00));
    assert_eq!(test_selector(&mut cpu, LSL, TSS_SELECTOR), (true, 0x67));
    assert_eq!(test_selector(&mut cpu, LAR, GATE32), (true, 0x1_ec00));
    assert_eq!(test_selector(&mut cpu, LSL, GATE32), (false, 0x1111));
    assert_eq!(test_selector(&mut cpu, LAR, TASK_GATE), (true, 0xe500));
    assert_eq!(test_selector(&mut cpu, LSL, SMALL_CODE), (true, 0xfff));
    // Not present is no obstacle.
    assert_eq!(test_selector(&mut cpu, LAR, ABSENT_DATA), (true, 0xcf_1200));
    for selector in [0, 3, OUTSIDE, 0xc, DATA0 | 1] {
        assert_eq!(test_selector(&mut cpu, LAR, selector), (false, 0x1111), "{selector:#x}");
        assert_eq!(test_selector(&mut cpu, LSL, selector), (false, 0x1111), "{selector:#x}");
    }
    let mut cpu = protected3();
    assert!(!test_selector(&mut cpu, LAR, DATA0).0);
    assert!(test_selector(&mut cpu, LAR, CONFORMING0).0);
    let mut cpu = long();
    assert_eq!(test_selector(&mut cpu, LAR, TSS_SELECTOR), (true, 0x8b00));
    set_descriptor(&cpu, TSS_SELECTOR, descriptor(TSS, 0x67, 0x81, 0));
    assert!(!test_selector(&mut cpu, LAR, TSS_SELECTOR).0);
    assert_eq!(faults(&mut real_mode(), LAR), UD);
    assert_eq!(faults(&mut v86(3), LSL), UD);
}

#[test]
fn verr_and_verw() {
    const VERR: &[u8] = &[0x0f, 0x00, 0xe1];
    const VERW: &[u8] = &[0x0f, 0x00, 0xe9];
    let mut cpu = protected();
    for (selector, read, write) in [
        (DATA0, true, true),
        (READ_ONLY, true, false),
        (CODE0, true, false),
        (EXECUTE_ONLY, false, false),
        (TSS_SELECTOR, false, false),
        (0, false, false),
        (OUTSIDE, false, false),
        (DATA0 | 3, false, false),
        (DATA3, true, true),
        (CONFORMING0 | 3, true, false),
    ] {
        assert_eq!(test_selector(&mut cpu, VERR, selector).0, read, "{selector:#x}");
        assert_eq!(test_selector(&mut cpu, VERW, selector).0, write, "{selector:#x}");
    }
}

#[test]
fn arpl() {
    let mut cpu = protected3();
    cpu.r.gpr[reg::RCX] = 0xffff_0010;
    cpu.r.gpr[reg::RDX] = 3;
    ok(&mut cpu, &[0x63, 0xd1]); // arpl cx, dx
    assert_eq!((cpu.r.gpr[reg::RCX], cpu.r.flags.zf()), (0xffff_0013, true));
    ok(&mut cpu, &[0x63, 0xd1]);
    assert_eq!((cpu.r.gpr[reg::RCX], cpu.r.flags.zf()), (0xffff_0013, false));
    put(&cpu, STACK3, 0x8888_0008);
    rax(&mut cpu, STACK3);
    ok(&mut cpu, &[0x63, 0x10]); // arpl [eax], dx
    assert_eq!(peek64(&cpu, STACK3), 0x8888_000b);
    assert_eq!(faults(&mut real_mode(), &[0x63, 0xd1]), UD);
}

#[test]
fn expand_down() {
    let mut cpu = protected();
    load(&mut cpu, MOV_DS, EXPAND_DOWN);
    assert_eq!(cpu.r.seg[seg::DS].limit, 0xffff);
    rax(&mut cpu, 0xffff);
    assert_eq!(faults(&mut cpu, &[0x8a, 0x08]), gp(0)); // mov cl, [eax]
    rax(&mut cpu, 0x1_0000);
    ok(&mut cpu, &[0x8a, 0x08]);
}
