use super::*;

const SYSCALL: &[u8] = &[0x0f, 0x05];
const SYSRETD: &[u8] = &[0x0f, 0x07];
const SYSRETQ: &[u8] = &[0x48, 0x0f, 0x07];
const SYSENTER: &[u8] = &[0x0f, 0x34];
const SYSEXITD: &[u8] = &[0x0f, 0x35];
const SYSEXITQ: &[u8] = &[0x48, 0x0f, 0x35];

fn enabled(mut cpu: Box<Cpu>) -> Box<Cpu> {
    cpu.r.efer |= efer::SCE;
    cpu.msr.star = 0x0023_0010_0000_0000;
    cpu.msr.lstar = 0xffff_8000_0000_1000;
    cpu.msr.fmask = 0x4_7700;
    cpu
}

fn flat(selector: u16, ar: u32) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, ar, selector }
}

#[test]
fn syscall_and_sysret() {
    let mut cpu = enabled(long3());
    cpu.r.rflags |= rflags::IF | rflags::AC | rflags::RF;
    cpu.r.flags.set_cf(true);
    let rip = cpu.r.rip;
    ok(&mut cpu, SYSCALL);
    assert_eq!((cpu.r.rip, cpu.cpl, cpu.mode), (0xffff_8000_0000_1000, 0, Mode::Long64));
    assert_eq!((cpu.r.gpr[reg::RCX], cpu.r.gpr[11]), (rip + 2, 0x4_0203));
    assert_eq!((cpu.rflags(), cpu.r.gpr[reg::RSP]), (3, STACK3));
    assert_eq!(cpu.r.seg[seg::CS], flat(0x10, 0xa09b));
    assert_eq!(cpu.r.seg[seg::SS], flat(0x18, 0xc093));
    cpu.r.gpr[11] |= 1 << 17 | 1 << 16 | 1 << 40 | 1 << 5;
    ok(&mut cpu, SYSRETQ);
    assert_eq!((cpu.r.rip, cpu.cpl, cpu.rflags()), (rip + 2, 3, 0x4_0203));
    assert_eq!(cpu.r.seg[seg::CS], flat(0x33, 0xa0fb));
    assert_eq!(cpu.r.seg[seg::SS], flat(0x2b, 0xc0f3));
    // To compatibility mode.
    ok(&mut cpu, SYSCALL);
    cpu.r.gpr[reg::RCX] = 0x1_2345_6789;
    ok(&mut cpu, SYSRETD);
    assert_eq!((cpu.r.rip, cpu.mode, cpu.cpl), (0x2345_6789, Mode::Protected32, 3));
    assert_eq!(cpu.r.seg[seg::CS], flat(0x23, 0xc0fb));
    // Refusals.
    assert_eq!(faults(&mut long3(), SYSCALL), UD);
    assert_eq!(faults(&mut enabled(compat3()), SYSCALL), UD);
    assert_eq!(faults(&mut enabled(protected()), SYSCALL), UD);
    assert_eq!(faults(&mut enabled(long3()), SYSRETQ), gp(0));
    assert_eq!(faults(&mut long(), SYSRETQ), UD);
    let mut cpu = enabled(long());
    cpu.r.gpr[reg::RCX] = 1 << 47;
    assert_eq!(faults(&mut cpu, SYSRETQ), gp(0));
}

#[test]
fn sysenter_and_sysexit() {
    for (mut cpu, long) in [(protected3(), false), (compat3(), true), (long3(), true)] {
        assert_eq!(faults(&mut cpu, SYSENTER), gp(0));
        cpu.msr.sysenter_cs = 0x13;
        cpu.msr.sysenter_eip = 0x7fff_1234_5678;
        cpu.msr.sysenter_esp = 0x7fff_1111_2222;
        cpu.r.rflags |= rflags::IF;
        ok(&mut cpu, SYSENTER);
        let width = if long { u64::MAX } else { 0xffff_ffff };
        assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x7fff_1234_5678 & width, 0x7fff_1111_2222 & width));
        assert_eq!((cpu.cpl, cpu.rflags(), cpu.long64()), (0, 2, long));
        assert_eq!(cpu.r.seg[seg::CS], flat(0x10, if long { 0xa09b } else { 0xc09b }));
        assert_eq!(cpu.r.seg[seg::SS], flat(0x18, 0xc093));
        cpu.r.gpr[reg::RDX] = 0x1_0000_1234;
        cpu.r.gpr[reg::RCX] = 0x1_0000_5678;
        ok(&mut cpu, SYSEXITD);
        assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP], cpu.cpl), (0x1234, 0x5678, 3));
        assert_eq!(cpu.r.seg[seg::CS], flat(0x23, 0xc0fb));
        assert_eq!(cpu.r.seg[seg::SS], flat(0x2b, 0xc0f3));
        assert_eq!(faults(&mut cpu, SYSEXITD), gp(0));
    }
    let mut cpu = long();
    cpu.msr.sysenter_cs = 0x10;
    cpu.r.gpr[reg::RDX] = 0x1_0000_1234;
    cpu.r.gpr[reg::RCX] = 1 << 47;
    assert_eq!(faults(&mut cpu, SYSEXITQ), gp(0));
    cpu.r.gpr[reg::RCX] = 0x1_0000_5678;
    ok(&mut cpu, SYSEXITQ);
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP], cpu.mode), (0x1_0000_1234, 0x1_0000_5678, Mode::Long64));
    assert_eq!(cpu.r.seg[seg::CS], flat(0x33, 0xa0fb));
    assert_eq!(cpu.r.seg[seg::SS], flat(0x3b, 0xc0f3));
    let mut cpu = real_mode();
    cpu.msr.sysenter_cs = 0x10;
    assert_eq!(faults(&mut cpu, SYSENTER), gp(0));
    cpu.features.sep = false;
    assert_eq!(faults(&mut cpu, SYSENTER), UD);
}

#[test]
fn bases() {
    let mut cpu = long();
    cpu.r.seg[seg::GS].base = 1;
    cpu.msr.kernel_gs_base = 2;
    ok(&mut cpu, &[0x0f, 0x01, 0xf8]);
    assert_eq!((cpu.r.seg[seg::GS].base, cpu.msr.kernel_gs_base), (2, 1));
    assert_eq!(faults(&mut long3(), &[0x0f, 0x01, 0xf8]), gp(0));
    let mut cpu = long3();
    assert_eq!(faults(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]), UD);
    cpu.r.cr4 |= cr4::FSGSBASE;
    rax(&mut cpu, 0x7fff_1234_5678);
    ok(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xd0]); // wrfsbase rax
    ok(&mut cpu, &[0xf3, 0x0f, 0xae, 0xd8]); // wrgsbase eax
    assert_eq!((cpu.r.seg[seg::FS].base, cpu.r.seg[seg::GS].base), (0x7fff_1234_5678, 0x1234_5678));
    ok(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xc1]); // rdfsbase rcx
    assert_eq!(cpu.r.gpr[reg::RCX], 0x7fff_1234_5678);
    ok(&mut cpu, &[0xf3, 0x0f, 0xae, 0xc1]); // rdfsbase ecx
    assert_eq!(cpu.r.gpr[reg::RCX], 0x1234_5678);
    rax(&mut cpu, 1 << 47);
    assert_eq!(faults(&mut cpu, &[0xf3, 0x48, 0x0f, 0xae, 0xd8]), gp(0));
}

#[test]
fn stac_and_clac() {
    let mut cpu = long();
    ok(&mut cpu, &[0x0f, 0x01, 0xcb]);
    assert_ne!(cpu.rflags() & rflags::AC, 0);
    ok(&mut cpu, &[0x0f, 0x01, 0xca]);
    assert_eq!(cpu.rflags() & rflags::AC, 0);
    assert_eq!(faults(&mut long3(), &[0x0f, 0x01, 0xcb]), UD);
    cpu.features.cr4 &= !cr4::SMAP;
    assert_eq!(faults(&mut cpu, &[0x0f, 0x01, 0xcb]), UD);
}

#[test]
fn exits_and_missing_extensions() {
    let mut cpu = long();
    let rip = cpu.r.rip;
    assert!(exec(&mut cpu, &[0xf4]).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::ExitAfter(Exit::Halt)));
    assert_eq!((cpu.activity, cpu.r.rip), (Activity::Halted, rip + 1));
    assert_eq!(faults(&mut long3(), &[0xf4]), gp(0));
    for (bytes, vmmcall) in [([0x0f, 0x01, 0xc1], false), ([0x0f, 0x01, 0xd9], true)] {
        let mut cpu = long3();
        assert!(exec(&mut cpu, &bytes).is_err());
        assert_eq!(cpu.stop.take(), Some(StopReason::ExitAfter(Exit::Hypercall { vmmcall })));
    }
    // vmlaunch, vmxoff, vmrun, stgi, monitor, mwait, getsec, rsm, vmread, invlpga
    for bytes in [
        &[0x0f, 0x01, 0xc2][..],
        &[0x0f, 0x01, 0xc4],
        &[0x0f, 0x01, 0xd8],
        &[0x0f, 0x01, 0xdc],
        &[0x0f, 0x01, 0xc8],
        &[0x0f, 0x01, 0xc9],
        &[0x0f, 0x37],
        &[0x0f, 0xaa],
        &[0x0f, 0x78, 0xc0],
        &[0x0f, 0x01, 0xdf],
    ] {
        assert_eq!(faults(&mut long(), bytes), UD, "{bytes:02x?}");
    }
    let mut cpu = long();
    cpu.features.monitor = true;
    cpu.r.gpr[reg::RCX] = 0;
    ok(&mut cpu, &[0x0f, 0x01, 0xc8]);
    ok(&mut cpu, &[0x0f, 0x01, 0xc9]);
}
