use super::*;

const IRETD: &[u8] = &[0xcf];
const IRETQ: &[u8] = &[0x48, 0xcf];

/// Puts a frame of dwords on the stack.
fn frame32(cpu: &mut Cpu, items: &[u32]) {
    cpu.r.gpr[reg::RSP] = STACK1;
    for (n, item) in items.iter().enumerate() {
        poke(cpu, STACK1 + 4 * n as u64, &item.to_le_bytes());
    }
}

fn frame64(cpu: &mut Cpu, items: &[u64]) {
    cpu.r.gpr[reg::RSP] = STACK1;
    for (n, item) in items.iter().enumerate() {
        put(cpu, STACK1 + 8 * n as u64, *item);
    }
}

const ALL: u32 = 0x003f_ffff & !(1 << 17) & !(1 << 14);

#[test]
fn flags_at_level_0() {
    let mut cpu = protected();
    frame32(&mut cpu, &[0x1234, CODE0.into(), ALL]);
    ok(&mut cpu, IRETD);
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x1234, STACK1 + 12));
    assert_eq!(cpu.rflags(), 0x3d_3fd7);
    // 16 bits: the upper half stays.
    frame32(&mut cpu, &[u32::from(CODE0) << 16 | 0x1234, 0]);
    ok(&mut cpu, &[0x66, 0xcf]);
    assert_eq!((cpu.rflags(), cpu.r.rip), (0x3d_0002, 0x1234));
}

#[test]
fn flags_at_level_3() {
    let mut cpu = protected3();
    cpu.r.rflags |= rflags::IF | 1 << 12;
    frame32(&mut cpu, &[0x1234, CODE3.into(), 0]);
    ok(&mut cpu, IRETD);
    // IOPL and, with IOPL 1, IF are out of reach.
    assert_eq!(cpu.rflags(), 0x1202);
    frame32(&mut cpu, &[0x1234, CODE3.into(), ALL]);
    ok(&mut cpu, IRETD);
    assert_eq!(cpu.rflags(), 0x25_1fd7);
    cpu.r.rflags |= rflags::IOPL;
    frame32(&mut cpu, &[0x1234, CODE3.into(), 0]);
    ok(&mut cpu, IRETD);
    assert_eq!(cpu.rflags(), 0x3002);
    // VM in the image means nothing at level 3.
    frame32(&mut cpu, &[0x1234, CODE3.into(), 1 << 17]);
    ok(&mut cpu, IRETD);
    assert_eq!((cpu.mode, cpu.rflags()), (Mode::Protected32, 0x3002));
}

#[test]
fn to_an_outer_level() {
    let mut cpu = protected();
    cpu.r.seg[seg::FS] = null_segment(0, 0);
    cpu.r.seg[seg::GS] = Segment { ar: 0xc09f, selector: CONFORMING0, ..cpu.r.seg[seg::DS] };
    frame32(&mut cpu, &[0x1234, CODE3.into(), 0x202, STACK3 as u32, DATA3.into()]);
    ok(&mut cpu, IRETD);
    assert_eq!((cpu.cpl, cpu.r.gpr[reg::RSP], cpu.rflags()), (3, STACK3, 0x202));
    assert_eq!(cpu.r.seg.map(|s| s.selector), [0, CODE3, DATA3, 0, 0, CONFORMING0]);
    // To a 16-bit stack only SP is loaded.
    let mut cpu = protected();
    set_descriptor(&cpu, STACK16, descriptor(0, 0xffff, 0xf3, 0));
    frame32(&mut cpu, &[0x1234, CODE3.into(), 2, 0x5678_1000, u32::from(STACK16) | 3]);
    cpu.r.gpr[reg::RSP] |= 0x10_0000;
    poke(&cpu, 0x10_0000 + STACK1, &peek(&cpu, STACK1, 20));
    ok(&mut cpu, IRETD);
    assert_eq!(cpu.r.gpr[reg::RSP], 0x10_1000);
}

#[test]
fn checks() {
    let with = |cs: u16, rip: u32, ss_selector: u16| {
        let mut cpu = protected();
        frame32(&mut cpu, &[rip, cs.into(), 2, STACK3 as u32, ss_selector.into()]);
        faults(&mut cpu, IRETD)
    };
    assert_eq!(with(0, 0, DATA3), gp(0));
    assert_eq!(with(OUTSIDE, 0, DATA3), gp(0x100));
    assert_eq!(with(DATA0, 0, DATA3), gp(0x10));
    assert_eq!(with(CODE3 & !3, 0, DATA3), gp(0x18));
    assert_eq!(with(ABSENT_CODE, 0, DATA3), np(0x80));
    assert_eq!(with(SMALL_CODE, 0x1000, DATA3), gp(0));
    assert_eq!(with(CODE3, 0, 0), gp(0));
    assert_eq!(with(CODE3, 0, DATA0), gp(0x10));
    assert_eq!(with(CODE3, 0, READ_ONLY | 3), gp(0x58));
    let mut cpu = protected3();
    frame32(&mut cpu, &[0, CODE0.into(), 2]);
    assert_eq!(faults(&mut cpu, IRETD), gp(0x08));
    // A nested task.
    let mut cpu = protected();
    cpu.r.rflags |= rflags::NT;
    assert!(exec(&mut cpu, IRETD).is_err());
    assert!(matches!(cpu.stop, Some(StopReason::Exit(Exit::Failure { .. }))));
    let mut cpu = long();
    cpu.r.rflags |= rflags::NT;
    assert_eq!(faults(&mut cpu, IRETQ), gp(0));
    // V86 mode has 16 bits of EIP.
    let mut cpu = protected();
    frame32(&mut cpu, &[0x1_0000, 0, 0x2_0002, 0, 0, 0, 0, 0, 0]);
    assert_eq!(faults(&mut cpu, IRETD), gp(0));
}

#[test]
fn long_mode() {
    // 64-bit mode pops SS:RSP at the same level, too; null SS is fine there.
    let mut cpu = long();
    frame64(&mut cpu, &[0x1234, CODE0.into(), 0x202, 0x5678, 0]);
    ok(&mut cpu, IRETQ);
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP], cpu.rflags()), (0x1234, 0x5678, 0x202));
    assert_eq!(cpu.r.seg[seg::SS], null_segment(0, 0));
    let mut cpu = long();
    frame64(&mut cpu, &[0x1234, LONG3.into(), 0x202, 0x5678, 3]);
    assert_eq!(faults(&mut cpu, IRETQ), gp(0));
    frame64(&mut cpu, &[0x1234, CODE3.into(), 0x202, 0x5678, 0]);
    assert_eq!(faults(&mut cpu, IRETQ), gp(0));
    frame64(&mut cpu, &[1 << 47, LONG3.into(), 0x202, 0x5678, DATA3.into()]);
    assert_eq!(faults(&mut cpu, IRETQ), gp(0));
    cpu.r.seg[seg::FS].base = 0x1234_5678;
    cpu.r.seg[seg::FS].ar = ar::UNUSABLE;
    frame64(&mut cpu, &[0x1234, LONG3.into(), 0x202 | rflags::VM, 0x5678, DATA3.into()]);
    ok(&mut cpu, IRETQ);
    assert_eq!((cpu.mode, cpu.cpl, cpu.rflags()), (Mode::Long64, 3, 0x202));
    // A base that MSRs or WRFSBASE gave stays.
    assert_eq!(cpu.r.seg[seg::FS].base, 0x1234_5678);
    // 32-bit frames in 64-bit mode.
    let mut cpu = long();
    frame32(&mut cpu, &[0x1234, CODE0.into(), 2, 0x5678, DATA0.into()]);
    ok(&mut cpu, IRETD);
    assert_eq!(cpu.r.gpr[reg::RSP], 0x5678);
    // Compatibility mode at the same level pops three.
    let mut cpu = compat3();
    frame32(&mut cpu, &[0x1234, CODE3.into(), 2]);
    ok(&mut cpu, IRETD);
    assert_eq!(cpu.r.gpr[reg::RSP], STACK1 + 12);
    // A stack that is not canonical.
    let mut cpu = long();
    cpu.r.gpr[reg::RSP] = 1 << 47;
    assert_eq!(faults(&mut cpu, IRETQ), ss(0));
}

#[test]
fn real_mode() {
    let mut cpu = super::real_mode();
    cpu.r.rflags |= rflags::VIF;
    poke(&cpu, 0x7000, &[0x34, 0x12, 0, 0, 0x00, 0xf0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    ok(&mut cpu, &[0x66, 0xcf]);
    assert_eq!((cpu.r.rip, cpu.r.seg[seg::CS].base, cpu.r.gpr[reg::RSP]), (0x1234, 0xf_0000, 0x700c));
    // VM, VIF and VIP stay as they are.
    assert_eq!(cpu.rflags(), 0x2d_7fd7);
    assert_eq!(cpu.mode, Mode::Real);
}
