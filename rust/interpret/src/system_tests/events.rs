use super::*;
use crate::events::{Event, EventKind};

fn int(cpu: &mut Cpu, n: u8) -> (u8, Option<u32>) {
    faults(cpu, &[0xcd, n])
}

fn exception(vector: u8, error: Option<u32>) -> Fault {
    Fault { vector, error, address: 0, trap: false, dr6: 0 }
}

fn external(vector: u8) -> Event {
    Event { kind: EventKind::External, vector, error: None }
}

#[test]
fn real_mode_vectors() {
    let mut cpu = real_mode();
    cpu.r.idtr = TableRegister { base: 0, limit: 0x3ff };
    poke(&cpu, 4 * 0x21, &[0x34, 0x12, 0x00, 0xf0]);
    cpu.r.rflags |= rflags::IF | rflags::TF | rflags::AC;
    cpu.r.flags.set_cf(true);
    ok(&mut cpu, &[0xcd, 0x21]);
    assert_eq!((cpu.r.rip, cpu.r.seg[seg::CS].selector, cpu.r.seg[seg::CS].base), (0x1234, 0xf000, 0xf_0000));
    assert_eq!(words(&cpu, 0x6ffa, 3), [0x7c02, 0, 0x0303]);
    assert_eq!(cpu.rflags(), 3);
    ok(&mut cpu, &[0xcf]);
    assert_eq!((cpu.r.rip, cpu.rflags()), (0x7c02, 0x303));
    // Exceptions push no error code.
    poke(&cpu, 4 * 13, &[0x00, 0x20, 0x00, 0x00]);
    cpu.raise(exception(vector::GP, Some(0))).unwrap();
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x2000, 0x6ffa));
    assert_eq!(words(&cpu, 0x6ffa, 1), [0x7c02]);
    // Beyond the table.
    cpu.r.idtr.limit = 4 * 0x21 + 2;
    assert_eq!(int(&mut cpu, 0x21).0, vector::GP);
}

#[test]
fn same_level() {
    let mut cpu = protected();
    cpu.r.gpr[reg::RSP] = STACK1;
    cpu.r.rflags |= rflags::IF | rflags::NT | rflags::TF | rflags::AC | rflags::RF;
    let rip = cpu.r.rip as u32;
    ok(&mut cpu, &[0xcd, 0x80]);
    assert_eq!((cpu.r.rip, cpu.cpl, cpu.r.seg[seg::CS].selector), (HANDLERS + 0x800, 0, CODE0));
    assert_eq!(cpu.rflags(), 2 | rflags::AC);
    assert_eq!(dwords(&cpu, STACK1 - 12, 3), [rip + 2, u32::from(CODE0), 0x4_4302]);
    // Trap gates leave IF.
    cpu.r.rflags |= rflags::IF;
    ok(&mut cpu, &[0xcd, 0x81]);
    assert_ne!(cpu.r.rflags & rflags::IF, 0);
    // 16-bit gates push words and jump in the first 64 KiB.
    cpu.r.gpr[reg::RSP] = STACK1;
    ok(&mut cpu, &[0xcd, 0x82]);
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x8200, STACK1 - 6));
}

#[test]
fn to_an_inner_level() {
    let mut cpu = protected3();
    cpu.r.rflags |= rflags::IF;
    let rip = cpu.r.rip as u32;
    ok(&mut cpu, &[0xcd, 0x80]);
    assert_eq!((cpu.cpl, cpu.r.rip, cpu.r.gpr[reg::RSP]), (0, HANDLERS + 0x800, STACK0 - 20));
    let want = [rip + 2, CODE3.into(), 0x202, STACK3 as u32, DATA3.into()];
    assert_eq!(dwords(&cpu, STACK0 - 20, 5), want);
    assert_eq!(cpu.r.seg[seg::SS].selector, DATA0);
    ok(&mut cpu, &[0xcf]);
    assert_eq!((cpu.cpl, cpu.r.rip as u32, cpu.r.gpr[reg::RSP]), (3, rip + 2, STACK3));
    assert_eq!(cpu.rflags(), 0x202);
    // An exception with an error code.
    cpu.raise(exception(vector::GP, Some(0x1234))).unwrap();
    assert_eq!(dwords(&cpu, STACK0 - 24, 2), [0x1234, rip + 2]);
    assert_eq!((cpu.r.rip, cpu.pending_event), (HANDLERS + 16 * 13, None));
    // Conforming handlers stay at level 3.
    let mut cpu = protected3();
    ok(&mut cpu, &[0xcd, 0x83]);
    assert_eq!(
        (cpu.cpl, cpu.r.gpr[reg::RSP], cpu.r.seg[seg::CS].selector),
        (3, STACK3 - 12, CONFORMING0 | 3)
    );
}

#[test]
fn gate_checks() {
    let mut cpu = protected3();
    // DPL 0, absent, no gate, outside: error codes name the IDT entry, without EXT.
    assert_eq!(int(&mut cpu, 0x30), gp(0x30 * 8 + 2));
    assert_eq!(int(&mut cpu, 0x84), np(0x84 * 8 + 2));
    assert_eq!(int(&mut cpu, 0x85), gp(0x85 * 8 + 2));
    cpu.r.idtr.limit = 0x80 * 8 + 6;
    assert_eq!(int(&mut cpu, 0x80), gp(0x80 * 8 + 2));
    cpu.r.idtr.limit = 0xfff;
    // Target selectors.
    for (selector, want) in [
        (0, gp(0)),
        (OUTSIDE, gp(0x100)),
        (DATA0, gp(0x10)),
        (ABSENT_CODE, np(0x80)),
        (TSS_SELECTOR, gp(0x28)),
    ] {
        put(&cpu, IDT + 8 * 0x40, gate(selector, 0, 0xee, 0));
        assert_eq!(int(&mut cpu, 0x40), want);
        // The same for an external interrupt: EXT.
        assert!(cpu.deliver(external(0x40)).is_err());
        assert_eq!(fault_code(&mut cpu), (want.0, want.1.map(|e| e | 1)));
    }
    put(&cpu, IDT + 8 * 0x40, gate(SMALL_CODE, 0x1000, 0xee, 0));
    assert_eq!(int(&mut cpu, 0x40), gp(0));
    // The code's level above the current one.
    let mut cpu = protected();
    put(&cpu, IDT + 8 * 0x40, gate(CODE3, 0, 0xee, 0));
    assert_eq!(int(&mut cpu, 0x40), gp(0x18));
    // Hardware does not care about the gate's DPL, and names itself by EXT.
    let mut cpu = protected3();
    cpu.deliver(external(0x30)).unwrap();
    assert_eq!(cpu.r.rip, HANDLERS + 0x300);
    let mut cpu = protected3();
    assert!(cpu.deliver(external(0x84)).is_err());
    assert_eq!(fault_code(&mut cpu), np(0x84 * 8 + 3));
    // INT1 ignores the DPL, INT3 and INTO do not.
    ok(&mut cpu, &[0xf1]);
    assert_eq!(cpu.r.rip, HANDLERS + 16);
    let mut cpu = protected3();
    ok(&mut cpu, &[0xcc]);
    assert_eq!(cpu.r.rip, HANDLERS + 48);
    let mut cpu = protected3();
    put(&cpu, IDT + 8 * 3, gate(CODE0, 0, 0x8e, 0));
    assert_eq!(faults(&mut cpu, &[0xcc]), gp(3 * 8 + 2));
    let rip = cpu.r.rip;
    ok(&mut cpu, &[0xce]); // into, OF clear
    assert_eq!(cpu.r.rip, rip + 1);
    assert!(exec(&mut cpu, &[0xcd, 0x86]).is_err());
    assert!(matches!(cpu.stop, Some(StopReason::Exit(Exit::Failure { .. }))));
}

#[test]
fn inner_stack_faults() {
    let mut cpu = protected3();
    put(&cpu, TSS + 4, STACK0 | u64::from(DATA3) << 32);
    assert_eq!(int(&mut cpu, 0x80), ts(0x20));
    assert!(cpu.deliver(external(0x80)).is_err());
    assert_eq!(fault_code(&mut cpu), ts(0x21));
    put(&cpu, TSS + 4, STACK0 | u64::from(ABSENT_DATA) << 32);
    assert_eq!(int(&mut cpu, 0x80), ss(0x50));
    cpu.r.tr.limit = 7;
    assert!(cpu.deliver(external(0x80)).is_err());
    assert_eq!(fault_code(&mut cpu), ts(0x29));
    let mut cpu = protected3();
    set_descriptor(&cpu, DATA0, descriptor(0, 0x8fff, 0x93, 4));
    put(&cpu, TSS + 4, 0x10 | u64::from(DATA0) << 32);
    assert_eq!(int(&mut cpu, 0x80), ss(0x10));
    let mut cpu = protected();
    cpu.r.seg[seg::SS].limit = 0xff;
    cpu.r.gpr[reg::RSP] = 0x200;
    assert_eq!(int(&mut cpu, 0x80), ss(0));
    assert!(cpu.deliver(external(0x80)).is_err());
    assert_eq!(fault_code(&mut cpu), ss(1));
}

#[test]
fn out_of_v86_mode() {
    let mut cpu = v86(3);
    ok(&mut cpu, &[0xcd, 0x80]);
    assert_eq!((cpu.mode, cpu.cpl, cpu.r.gpr[reg::RSP]), (Mode::Protected32, 0, STACK0 - 36));
    let want = [0x102, 0x1000, 0x2_3202, 0x800, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000];
    assert_eq!(dwords(&cpu, STACK0 - 36, 9), want);
    for n in [seg::ES, seg::DS, seg::FS, seg::GS] {
        assert_eq!(cpu.r.seg[n], null_segment(0, 0));
    }
    assert_eq!(cpu.rflags(), 0x3002);
    ok(&mut cpu, &[0xcf]);
    assert_eq!((cpu.mode, cpu.cpl, cpu.r.rip, cpu.r.gpr[reg::RSP]), (Mode::V86, 3, 0x102, 0x800));
    assert_eq!(cpu.r.seg.map(|s| s.base), [0x3_0000, 0x1_0000, 0x2_0000, 0x4_0000, 0x5_0000, 0x6_0000]);
    assert_eq!(cpu.rflags(), 0x2_3202);
    // IOPL below 3.
    let mut cpu = v86(2);
    assert_eq!(int(&mut cpu, 0x80), gp(0));
    assert_eq!(faults(&mut cpu, &[0xcf]), gp(0));
    ok(&mut cpu, &[0xcc]);
    // Only to level 0, not through conforming code.
    let mut cpu = v86(3);
    put(&cpu, IDT + 8 * 0x40, gate(CODE1, 0, 0xee, 0));
    assert_eq!(int(&mut cpu, 0x40), gp(0x40));
    assert_eq!(int(&mut cpu, 0x83), gp(0x38));
    // IRET inside V86 mode keeps IOPL and VM.
    let mut cpu = v86(3);
    poke(&cpu, 0x2_0800, &[0x34, 0x12, 0x00, 0x70, 0xd5, 0x0c]);
    ok(&mut cpu, &[0xcf]);
    assert_eq!((cpu.r.rip, cpu.r.seg[seg::CS].base, cpu.r.gpr[reg::RSP]), (0x1234, 0x7_0000, 0x806));
    assert_eq!(cpu.rflags(), 0x2_3cd7);
}

#[test]
fn long_mode() {
    let mut cpu = long();
    cpu.r.gpr[reg::RSP] = STACK1 - 3;
    cpu.r.rflags |= rflags::IF;
    let (rip, ss) = (cpu.r.rip, cpu.r.seg[seg::SS]);
    ok(&mut cpu, &[0xcd, 0x80]);
    let at = ((STACK1 - 3) & !15) - 40;
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP], cpu.r.seg[seg::SS]), (HANDLERS + 0x800, at, ss));
    assert_eq!(qwords(&cpu, at, 5), [rip + 2, CODE0.into(), 0x202, STACK1 - 3, ss.selector.into()]);
    assert_eq!(cpu.rflags(), 2);
    for (mut cpu, cs) in [(long3(), LONG3), (compat3(), CODE3)] {
        cpu.r.rflags |= rflags::AC | rflags::IF;
        ok(&mut cpu, &[0xcd, 0x81]);
        let want = [rip + 2, cs.into(), 0x4_0202, STACK3, DATA3.into()];
        assert_eq!(qwords(&cpu, STACK0 - 40, 5), want);
        assert_eq!((cpu.mode, cpu.cpl, cpu.r.gpr[reg::RSP]), (Mode::Long64, 0, STACK0 - 40));
        assert_eq!((cpu.r.seg[seg::SS].selector, cpu.r.seg[seg::SS].ar), (0, ar::UNUSABLE));
        assert_eq!(cpu.rflags(), 0x4_0202);
        ok(&mut cpu, &[0x48, 0xcf]);
        assert_eq!((cpu.cpl, cpu.r.gpr[reg::RSP], cpu.r.seg[seg::CS].selector), (3, STACK3, cs));
    }
    // IST, also without a change of level; the stack pointer is aligned.
    let mut cpu = long();
    cpu.deliver(external(0x90)).unwrap();
    assert_eq!(cpu.r.gpr[reg::RSP], 0xd000 - 40);
    assert_eq!(cpu.r.seg[seg::SS].selector, DATA0);
    // An error code.
    let mut cpu = long3();
    cpu.raise(exception(vector::NP, Some(0x50))).unwrap();
    assert_eq!(qwords(&cpu, STACK0 - 48, 2), [0x50, rip]);
}

#[test]
fn long_mode_checks() {
    let mut cpu = long3();
    assert_eq!(int(&mut cpu, 0x82), gp(0x82 * 8 + 2));
    assert_eq!(int(&mut cpu, 0x83), gp(0x18));
    assert_eq!(int(&mut cpu, 0x30), gp(0x30 * 8 + 2));
    put(&cpu, TSS + 4, (1 << 47) + 0x1000);
    assert_eq!(int(&mut cpu, 0x80), ss(0));
    assert!(cpu.deliver(external(0x80)).is_err());
    assert_eq!(fault_code(&mut cpu), ss(1));
    cpu.r.tr.limit = 10;
    assert_eq!(int(&mut cpu, 0x80), ts(0x28));
    cpu.r.idtr.limit = 0x80 * 16 + 14;
    assert_eq!(int(&mut cpu, 0x80), gp(0x80 * 8 + 2));
    // A non-canonical handler.
    let mut cpu = long3();
    put(&cpu, IDT + 16 * 0x80 + 8, 0x8000);
    assert_eq!(int(&mut cpu, 0x80), gp(0));
}

#[test]
fn resume_flag() {
    let flags = |cpu: &Cpu| dwords(cpu, STACK0 - 12, 1)[0] as u64;
    // Faults push RF set.
    let mut cpu = protected3();
    cpu.raise(exception(vector::UD, None)).unwrap();
    assert_eq!(flags(&cpu) & rflags::RF, rflags::RF);
    assert_eq!(cpu.r.rflags & rflags::RF, 0);
    // Traps and instruction breakpoints do not.
    let mut cpu = protected3();
    cpu.raise(Fault { trap: true, dr6: 1 << 14, ..exception(vector::DB, None) }).unwrap();
    assert_eq!(flags(&cpu) & rflags::RF, 0);
    let mut cpu = protected3();
    cpu.raise(Fault { dr6: 1, ..exception(vector::DB, None) }).unwrap();
    assert_eq!(flags(&cpu) & rflags::RF, 0);
    // The DR access fault does.
    let mut cpu = protected3();
    cpu.raise(Fault { dr6: 1 << 13, ..exception(vector::DB, None) }).unwrap();
    assert_eq!(flags(&cpu) & rflags::RF, rflags::RF);
    // Interrupts do not.
    let mut cpu = protected3();
    cpu.r.rflags |= rflags::RF;
    cpu.deliver_external(0x40).unwrap();
    assert_eq!(flags(&cpu) & rflags::RF, 0);
}

#[test]
fn page_faults_set_cr2_and_debug_sets_dr6() {
    let mut cpu = protected3();
    cpu.raise(Fault { address: 0x1234, ..exception(vector::PF, Some(4)) }).unwrap();
    assert_eq!((cpu.r.cr2, cpu.r.rip), (0x1234, HANDLERS + 16 * 14));
    cpu.r.dr6 = 0xffff_0ff1;
    cpu.r.dr7 = 0x2400;
    cpu.raise(Fault { dr6: 1 << 14, trap: true, ..exception(vector::DB, None) }).unwrap();
    assert_eq!((cpu.r.dr6, cpu.r.dr7), (0xffff_4ff0, 0x400));
}

/// Raises `first` where delivering it faults with `second` (#GP, #NP, #PF or none).
fn double(first: u8, second: u8) -> (Result<(), Exit>, u64) {
    let mut cpu = long3();
    let entry = IDT + 16 * u64::from(first);
    match second {
        vector::GP => put(&cpu, entry, gate(DATA0, 0, 0x8e, 0)),
        vector::NP => put(&cpu, entry, gate(CODE0, 0, 0x0e, 0)),
        vector::PF => {
            put(&cpu, TSS + 28 + 8, 0x4000_1000); // IST 1 is not mapped
            put(&cpu, entry, gate(CODE0, 0, 0x8e, 1));
        }
        _ => unreachable!(),
    }
    let error = (first == vector::PF || first == vector::GP || first == vector::NP).then_some(0);
    let result = cpu.raise(Fault { address: 0x1234, ..exception(first, error) });
    (result, cpu.r.rip.wrapping_sub(HANDLERS) / 16)
}

#[test]
fn double_faults() {
    use vector::*;
    // (being delivered, comes up, handler that runs)
    for (first, second, handler) in [
        (UD, GP, GP),
        (UD, PF, PF),
        (DB, NP, NP),
        (DE, GP, DF),
        (DE, PF, PF),
        (NP, GP, DF),
        (GP, NP, DF),
        (GP, PF, PF),
        (PF, GP, DF),
        (PF, NP, DF),
        (PF, PF, DF),
    ] {
        assert_eq!(double(first, second), (Ok(()), u64::from(handler)), "{first} {second}");
    }
    // #DF pushes error code 0 and #PF has set CR2.
    let mut cpu = long3();
    put(&cpu, IDT + 16 * 14, gate(CODE0, 0, 0x0e, 0));
    cpu.raise(Fault { address: 0x1234, ..exception(PF, Some(4)) }).unwrap();
    assert_eq!((cpu.r.cr2, qwords(&cpu, STACK0 - 48, 1)), (0x1234, vec![0]));
    // Triple fault.
    let mut cpu = long3();
    put(&cpu, IDT + 16 * 8, gate(CODE0, 0, 0x0e, 0));
    put(&cpu, IDT + 16 * 13, gate(CODE0, 0, 0x0e, 0));
    assert_eq!(cpu.raise(exception(GP, Some(0))), Err(Exit::TripleFault));
    assert_eq!(cpu.activity, Activity::Shutdown);
    // An external interrupt is benign: its fault is delivered as such.
    let mut cpu = long3();
    put(&cpu, IDT + 16 * 0x40, gate(CODE0, 0, 0x0e, 0));
    cpu.deliver_external(0x40).unwrap();
    assert_eq!(cpu.r.rip, HANDLERS + 16 * 11);
    assert_eq!(qwords(&cpu, STACK0 - 48, 1), [0x40 * 8 + 3]);
}

#[test]
fn intercepted_exceptions() {
    let mut cpu = long3();
    cpu.config.exception_exits = 1 << vector::PF | 1 << vector::BP;
    let before = image(&cpu);
    let exit = cpu.raise(Fault { address: 0x1234, ..exception(vector::PF, Some(4)) });
    assert_eq!(exit, Err(Exit::Exception { vector: 14, error: Some(4), address: 0x1234 }));
    assert_eq!(image(&cpu), before);
    assert!(exec(&mut cpu, &[0xcc]).is_err());
    let want = Exit::Exception { vector: 3, error: None, address: 0 };
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(want)));
    cpu.raise(exception(vector::UD, None)).unwrap();
}

#[test]
fn nmi_is_blocked_until_iret() {
    let mut cpu = long();
    cpu.r.gpr[reg::RSP] = STACK1;
    cpu.shadow = shadow::STI;
    cpu.activity = Activity::Halted;
    cpu.deliver_nmi().unwrap();
    assert_eq!((cpu.nmi_blocked, cpu.r.rip, cpu.shadow), (true, HANDLERS + 32, 0));
    assert_eq!(cpu.activity, Activity::Running);
    ok(&mut cpu, &[0x48, 0xcf]);
    assert!(!cpu.nmi_blocked);
}

#[test]
fn events_of_state_records() {
    for (event, handler) in [
        (external(0x40), 0x40),
        (Event { kind: EventKind::Nmi, vector: 2, error: None }, 2),
        (Event { kind: EventKind::Exception, vector: vector::PF, error: Some(4) }, 14),
    ] {
        let mut cpu = long3();
        poke(&cpu, HANDLERS + 16 * handler, &[0xf4]);
        cpu.r.cr2 = 0x1234;
        cpu.pending_event = Some(event);
        assert_eq!(cpu.run(None, None), Exit::Halt);
        assert_eq!((cpu.r.rip, cpu.r.cr2), (HANDLERS + 16 * handler + 1, 0x1234));
        assert_eq!((cpu.nmi_blocked, cpu.pending_event), (handler == 2, None));
    }
    // A software interrupt's instruction runs again.
    let mut cpu = long3();
    poke(&cpu, crate::testing::CODE, &[0xcd, 0x80]);
    poke(&cpu, HANDLERS + 0x800, &[0xf4]);
    cpu.pending_event = Some(Event { kind: EventKind::SoftInterrupt, vector: 0x80, error: None });
    assert_eq!(cpu.run(None, None), Exit::Halt);
    assert_eq!(qwords(&cpu, STACK0 - 40, 1), [crate::testing::CODE + 2]);
}

#[test]
fn pushes_use_the_inner_level() {
    // SMAP: a user page as level-0 stack faults, unless RFLAGS.AC says otherwise.
    let mut cpu = long3();
    cpu.r.cr4 |= cr4::SMAP;
    put(&cpu, 0x3000, 0x83); // tables in a supervisor page
    put(&cpu, TSS + 4, 0x20_1000); // stack in a user page
    cpu.flush_tlb_all();
    assert!(cpu.deliver(external(0x40)).is_err());
    assert_eq!((fault_code(&mut cpu), cpu.cpl), ((vector::PF, Some(3)), 3));
    cpu.r.rflags |= rflags::AC;
    cpu.update_mode();
    cpu.deliver(external(0x40)).unwrap();
    assert_eq!(cpu.r.gpr[reg::RSP], 0x20_1000 - 40);
}
