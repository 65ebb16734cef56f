use super::control::leaves;
use super::*;
use crate::cpu::Reply;
use crate::cpuid::Features;
use crate::msr::{index::*, MsrError};

const RDMSR: &[u8] = &[0x0f, 0x32];
const WRMSR: &[u8] = &[0x0f, 0x30];

fn set(cpu: &mut Cpu, msr: u32, value: u64) {
    // The upper halves of the registers do not count.
    cpu.r.gpr[reg::RCX] = u64::from(msr) | 0xdead << 32;
    cpu.r.gpr[reg::RAX] = value & 0xffff_ffff | 0xdead << 32;
    cpu.r.gpr[reg::RDX] = value >> 32 | 0xdead << 32;
}

#[track_caller]
fn write(cpu: &mut Cpu, msr: u32, value: u64) {
    set(cpu, msr, value);
    ok(cpu, WRMSR);
}

#[track_caller]
fn read(cpu: &mut Cpu, msr: u32) -> u64 {
    set(cpu, msr, u64::MAX);
    ok(cpu, RDMSR);
    assert_eq!((cpu.r.gpr[reg::RAX] | cpu.r.gpr[reg::RDX]) >> 32, 0);
    cpu.r.gpr[reg::RDX] << 32 | cpu.r.gpr[reg::RAX]
}

#[track_caller]
fn refuses(cpu: &mut Cpu, msr: u32, value: u64) {
    set(cpu, msr, value);
    assert_eq!(faults(cpu, WRMSR), gp(0), "MSR {msr:#x} = {value:#x}");
}

#[test]
fn storage() {
    let mut cpu = long();
    for (msr, good, bad) in [
        (STAR, u64::MAX, None),
        (LSTAR, 0xffff_8000_1234_5678, Some(1 << 47)),
        (CSTAR, 0x7fff_ffff_ffff, Some(0xffff_7fff_ffff_ffff)),
        (FMASK, 0x4_7700, None),
        (SYSENTER_CS, 0x10, None),
        (SYSENTER_ESP, 0xffff_8000_0000_0000, Some(1 << 63)),
        (SYSENTER_EIP, 0x1234, Some(1 << 50)),
        (FS_BASE, 0xffff_ffff_ffff_ffff, Some(1 << 47)),
        (GS_BASE, 0x1234_5678, Some(1 << 47)),
        (KERNEL_GS_BASE, 0x1234_5678_9abc, Some(1 << 47)),
        (TSC_AUX, 0xffff_ffff, Some(1 << 32)),
        (PAT, 0x0706_0504_0100_0606, Some(2)),
        (PAT, 0x0007_0406_0007_0406, Some(0x0800_0000_0000_0000)),
        (TSC_ADJUST, 0x1234_5678_9abc, None),
    ] {
        write(&mut cpu, msr, good);
        assert_eq!(read(&mut cpu, msr), good, "{msr:#x}");
        if let Some(bad) = bad {
            refuses(&mut cpu, msr, bad);
            assert_eq!(read(&mut cpu, msr), good, "{msr:#x}");
        }
    }
    assert_eq!(cpu.r.seg[seg::GS].base, 0x1234_5678);
    assert_eq!(faults(&mut long3(), RDMSR), gp(0));
    assert_eq!(faults(&mut long3(), WRMSR), gp(0));
    assert_eq!(faults(&mut v86(3), WRMSR), gp(0));
}

#[test]
fn efer() {
    let mut cpu = protected();
    write(&mut cpu, EFER, efer::SCE | efer::NXE | efer::LME | efer::LMA);
    // LMA cannot be written.
    assert_eq!(read(&mut cpu, EFER), efer::SCE | efer::NXE | efer::LME);
    for bit in [1, 9, 12, 14, 63] {
        refuses(&mut cpu, EFER, 1 << bit);
    }
    let mut cpu = long();
    refuses(&mut cpu, EFER, efer::LMA | efer::NXE);
    write(&mut cpu, EFER, efer::LME | efer::NXE | efer::SCE);
    assert_eq!(read(&mut cpu, EFER), efer::LME | efer::LMA | efer::NXE | efer::SCE);
}

#[test]
fn time_stamp_counter() {
    let mut cpu = long();
    cpu.clock = Clock::Virtual { base: 1000, num: 1, den: 1 };
    cpu.retired = 0;
    assert_eq!(read(&mut cpu, TSC), 1000);
    write(&mut cpu, TSC, 5000);
    assert_eq!((read(&mut cpu, TSC), read(&mut cpu, TSC_ADJUST)), (5000, 4000));
    write(&mut cpu, TSC_ADJUST, 0);
    assert_eq!(read(&mut cpu, TSC), 1000);
    ok(&mut cpu, &[0x0f, 0x31]);
    assert_eq!((cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RDX]), (1000, 0));
    write(&mut cpu, TSC_AUX, 77);
    ok(&mut cpu, &[0x0f, 0x01, 0xf9]); // rdtscp
    assert_eq!((cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RCX]), (1000, 77));
    ok(&mut cpu, &[0xf3, 0x0f, 0xc7, 0xf9]); // rdpid rcx
    assert_eq!(cpu.r.gpr[reg::RCX], 77);
    let mut cpu = long3();
    ok(&mut cpu, &[0x0f, 0x31]);
    cpu.r.cr4 |= cr4::TSD;
    assert_eq!(faults(&mut cpu, &[0x0f, 0x31]), gp(0));
    assert_eq!(faults(&mut cpu, &[0x0f, 0x01, 0xf9]), gp(0));
    cpu.features.rdtscp = false;
    assert_eq!(faults(&mut cpu, &[0x0f, 0x01, 0xf9]), UD);
    assert_eq!(faults(&mut cpu, &[0x0f, 0x33]), gp(0)); // rdpmc
}

#[test]
fn local_apic() {
    let mut cpu = long();
    assert_eq!(read(&mut cpu, APIC_BASE), 0xfee0_0900);
    refuses(&mut cpu, APIC_BASE, 1 << 50);
    // x2APIC registers exist in x2APIC mode.
    set(&mut cpu, 0x802, 0);
    assert_eq!(faults(&mut cpu, RDMSR), gp(0));
    write(&mut cpu, APIC_BASE, 0xfee0_0d00);
    assert_eq!(read(&mut cpu, 0x802), 0);
    write(&mut cpu, 0x808, 0x20);
    assert_eq!(cpu.lapic.cr8(), 2);
    // An interrupt command becomes an exit.
    write(&mut cpu, 0x80f, 0x1ff);
    write(&mut cpu, 0x830, 1 << 32 | 0x4500);
    assert!(matches!(cpu.pending_exits[..], [Exit::Ipi(ipi)] if ipi.destination == 1 && ipi.mode == 5));
    write(&mut cpu, 0x832, 2 << 17 | 0x40); // TSC-deadline mode
    write(&mut cpu, TSC_DEADLINE, u64::MAX);
    assert_eq!(read(&mut cpu, TSC_DEADLINE), u64::MAX);
    cpu.features.tsc_deadline = false;
    set(&mut cpu, TSC_DEADLINE, 0);
    assert_eq!(faults(&mut cpu, RDMSR), gp(0));
    // Elsewhere: accesses go there.
    let mut cpu = long();
    write(&mut cpu, APIC_BASE, 0x20_0900);
    assert!(cpu.lapic_moved);
    rax(&mut cpu, 0x20_0030);
    poke(&cpu, 0x20_0030, &[0xff; 4]);
    ok(&mut cpu, &[0x8b, 0x08]);
    assert_eq!(cpu.r.gpr[reg::RCX] & 0xff, 0x14); // version
}

#[test]
fn plain_and_unknown() {
    let mut cpu = long();
    cpu.config.msrs.insert(0x1a0, (0x1801, 1));
    cpu.config.msrs.insert(PRED_CMD, (0, 0));
    cpu.reset();
    let msr = cpu.msr.clone();
    let mut cpu = long();
    cpu.config.msrs.insert(0x1a0, (0x1801, 1));
    cpu.config.msrs.insert(PRED_CMD, (0, 0));
    cpu.msr = msr;
    assert_eq!(read(&mut cpu, 0x1a0), 0x1801);
    write(&mut cpu, 0x1a0, 0x1800);
    assert_eq!(read(&mut cpu, 0x1a0), 0x1800);
    refuses(&mut cpu, 0x1a0, 0x1000);
    write(&mut cpu, PRED_CMD, 1);
    refuses(&mut cpu, PRED_CMD, 2);
    set(&mut cpu, PRED_CMD, 0);
    assert_eq!(faults(&mut cpu, RDMSR), gp(0));
    refuses(&mut cpu, 0x1234, 0);
    set(&mut cpu, 0x1234, 0);
    assert_eq!(faults(&mut cpu, RDMSR), gp(0));
    // State records hold them all, and give them back.
    let saved = cpu.saved_msrs();
    assert_eq!(saved[&0x1a0], 0x1800);
    let mut other = long();
    other.msr.plain = cpu.msr.plain.keys().map(|&k| (k, 0)).collect();
    for (&msr, &value) in &saved {
        other.restore_msr(msr, value).unwrap();
    }
    assert_eq!(other.msr, cpu.msr);
    assert_eq!(other.restore_msr(0x1234, 0), Err(MsrError::Unknown));
    assert_eq!(other.restore_msr(LSTAR, 1 << 47), Err(MsrError::Refused));
    // Exits.
    cpu.config.msr_exits = true;
    set(&mut cpu, 0x1234, 0x5_0000_0006);
    assert!(exec(&mut cpu, WRMSR).is_err());
    let want = Exit::MsrWrite { index: 0x1234, value: 0x5_0000_0006 };
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(want)));
    cpu.reply = Some(Reply::Done);
    ok(&mut cpu, WRMSR);
    cpu.reply = Some(Reply::Fault);
    assert_eq!(faults(&mut cpu, WRMSR), gp(0));
    assert!(exec(&mut cpu, RDMSR).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(Exit::MsrRead { index: 0x1234 })));
    cpu.reply = Some(Reply::Data(vec![1, 2, 3, 4, 5, 6, 7, 8]));
    ok(&mut cpu, RDMSR);
    assert_eq!((cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RDX]), (0x0403_0201, 0x0807_0605));
    assert_eq!(cpu.reply, None);
}

#[test]
fn cpuid() {
    let mut cpu = long();
    cpu.config.apic_id = 5;
    cpu.config.cpuid = leaves(&[
        (0, u32::MAX, [0x16, 1, 2, 3]),
        (1, u32::MAX, [0x806f8, 0x0001_0800, 1 << 26, 1 << 9]),
        (4, 0, [0x121, 1, 2, 3]),
        (7, 0, [0, 1, 1 << 4, 0]),
        (0xb, 0, [0, 1, 0x100, 0]),
        (0xd, 0, [7, 0, 832, 0]),
        (0xd, 1, [0xf, 0, 0, 0]),
        (0xd, 2, [256, 576, 0, 0]),
        (0x16, u32::MAX, [1000, 1000, 100, 0]),
        (0x4000_0000, u32::MAX, [0x4000_0000, 7, 8, 9]),
        (0x8000_0000, u32::MAX, [0x8000_0008, 0, 0, 0]),
        (0x8000_0001, u32::MAX, [0, 0, 1, 1 << 11 | 1 << 29]),
    ]);
    let id = |cpu: &mut Cpu, leaf: u32, subleaf: u32| {
        cpu.r.gpr[reg::RAX] = u64::from(leaf) | 1 << 32;
        cpu.r.gpr[reg::RCX] = u64::from(subleaf) | 1 << 32;
        ok(cpu, &[0x0f, 0xa2]);
        [reg::RAX, reg::RBX, reg::RCX, reg::RDX].map(|r| cpu.r.gpr[r])
    };
    assert_eq!(id(&mut cpu, 0, 9), [0x16, 1, 2, 3]);
    assert_eq!(id(&mut cpu, 1, 0), [0x806f8, 0x0501_0800, 1 << 26, 1 << 9]);
    cpu.r.cr4 |= cr4::OSXSAVE;
    assert_eq!(id(&mut cpu, 1, 0)[2], 3 << 26);
    cpu.write_msr(APIC_BASE, 0xfee0_0100).unwrap();
    assert_eq!(id(&mut cpu, 1, 0)[3], 0);
    assert_eq!(id(&mut cpu, 4, 1), [0; 4]);
    assert_eq!(id(&mut cpu, 5, 0), [0; 4]);
    assert_eq!(id(&mut cpu, 7, 0), [0, 1, 0, 0]);
    assert_eq!(id(&mut cpu, 0xb, 0), [0, 1, 0x100, 5]);
    assert_eq!(id(&mut cpu, 0xb, 3), [0, 0, 3, 5]);
    assert_eq!(id(&mut cpu, 0xd, 0), [7, 576, 832, 0]);
    assert_eq!(id(&mut cpu, 0xd, 1), [0xf, 576, 0, 0]);
    cpu.r.xcr0 = 7;
    assert_eq!(id(&mut cpu, 0xd, 0)[1], 832);
    assert_eq!(id(&mut cpu, 0xd, 1)[1], 832);
    assert_eq!(id(&mut cpu, 0xd, 2), [256, 576, 0, 0]);
    assert_eq!(id(&mut cpu, 0x4000_0000, 0), [0x4000_0000, 7, 8, 9]);
    // Beyond the highest leaves: the highest basic leaf.
    for leaf in [0x17, 0x4000_0001, 0x8000_0009, 0xffff_ffff] {
        assert_eq!(id(&mut cpu, leaf, 0), [1000, 1000, 100, 0], "{leaf:#x}");
    }
    assert_eq!(id(&mut cpu, 0x8000_0002, 0), [0; 4]);
    assert_eq!(id(&mut cpu, 0x8000_0001, 0)[3], 1 << 11 | 1 << 29);
    let config = cpu.config.clone();
    let mut cpu = compat3();
    cpu.config = config;
    assert_eq!(id(&mut cpu, 0x8000_0001, 0)[3], 1 << 29);
    let features = Features::new(&cpu.config);
    assert_eq!((features.xcr0, features.efer), (7, efer::SCE | efer::LME | efer::LMA));
    assert!(!features.x2apic && features.xgetbv1 && !features.invpcid);
    assert_eq!(features.cr4, cr4::TSD | cr4::MCE | cr4::PCE | cr4::OSXSAVE | cr4::FSGSBASE);
}
