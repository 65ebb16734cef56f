use super::*;

/// MOV CRn, EAX (RAX in 64-bit mode).
fn mov_cr(n: u8) -> Vec<u8> {
    if n == 8 {
        vec![0x44, 0x0f, 0x22, 0xc0]
    } else {
        vec![0x0f, 0x22, 0xc0 | n << 3]
    }
}

#[track_caller]
fn write(cpu: &mut Cpu, n: u8, value: u64) {
    rax(cpu, value);
    ok(cpu, &mov_cr(n));
}

#[track_caller]
fn refuses(cpu: &mut Cpu, n: u8, value: u64) {
    rax(cpu, value);
    assert_eq!(faults(cpu, &mov_cr(n)), gp(0), "CR{n} = {value:#x}");
}

#[test]
fn cr0() {
    let mut cpu = protected();
    let base = cr0::PE | cr0::NE;
    refuses(&mut cpu, 0, base & !cr0::PE | cr0::PG);
    refuses(&mut cpu, 0, base | cr0::NW);
    write(&mut cpu, 0, base | cr0::CD | cr0::NW | 0x00f0_ffc0);
    // Reserved bits are ignored, ET is always set.
    assert_eq!(cpu.r.cr0, base | cr0::CD | cr0::NW | cr0::ET);
    write(&mut cpu, 0, cr0::NE);
    assert_eq!((cpu.mode, cpu.r.cr0), (Mode::Real, cr0::NE | cr0::ET));
    let mut cpu = long();
    let value = 1 << 32 | cpu.r.cr0;
    refuses(&mut cpu, 0, value);
    // Paging cannot end in 64-bit mode.
    let value = cpu.r.cr0 & !cr0::PG;
    refuses(&mut cpu, 0, value);
    rax(&mut cpu, 0);
    ok(&mut cpu, &[0x0f, 0x20, 0xc0]); // mov rax, cr0
    assert_eq!(cpu.r.gpr[reg::RAX], cpu.r.cr0);
    assert_eq!(faults(&mut protected3(), &mov_cr(0)), gp(0));
    assert_eq!(faults(&mut v86(3), &mov_cr(0)), gp(0));
}

#[test]
fn into_and_out_of_long_mode() {
    let mut cpu = long();
    // Out: through compatibility mode of level 0.
    set_descriptor(&cpu, SMALL_CODE, descriptor(0, 0xf_ffff, 0x9a, 0xc));
    rax(&mut cpu, STACK3);
    put(&cpu, STACK3, 0x1234 | u64::from(SMALL_CODE) << 32);
    ok(&mut cpu, &[0xff, 0x28]);
    refuses(&mut cpu, 4, 0); // PAE in long mode
    let paged = cpu.r.cr0;
    write(&mut cpu, 0, paged & !cr0::PG);
    assert_eq!((cpu.r.efer, cpu.mode), (efer::LME | efer::NXE, Mode::Protected32));
    // In: PAE first, no 16-bit TSS, no L.
    write(&mut cpu, 4, 0);
    refuses(&mut cpu, 0, paged);
    write(&mut cpu, 4, cr4::PAE);
    cpu.r.tr.ar = 0x83;
    refuses(&mut cpu, 0, paged);
    cpu.r.tr.ar = 0x8b;
    cpu.r.seg[seg::CS].ar |= ar::L;
    refuses(&mut cpu, 0, paged);
    cpu.r.seg[seg::CS].ar &= !ar::L;
    write(&mut cpu, 0, paged);
    assert_eq!((cpu.lma(), cpu.mode), (true, Mode::Protected32));
    // Without LME it is 32-bit paging with PAE: the PDPTEs count. PML4[0] = 0x2007 has reserved bits.
    write(&mut cpu, 0, paged & !cr0::PG);
    cpu.r.efer = 0;
    refuses(&mut cpu, 0, paged);
    put(&cpu, 0x1000, 0x2001);
    write(&mut cpu, 0, paged);
    assert_eq!((cpu.lma(), cpu.r.pdpte), (false, [0x2001, 0, 0, 0]));
    put(&cpu, 0x1008, 0x8001);
    write(&mut cpu, 3, 0x1000);
    assert_eq!(cpu.r.pdpte[1], 0x8001);
    put(&cpu, 0x1008, 1 << 60 | 1);
    refuses(&mut cpu, 3, 0x1000);
    // CR4 changes load them as well.
    refuses(&mut cpu, 4, cr4::PAE | cr4::PGE);
    put(&cpu, 0x1008, 1 << 60);
    write(&mut cpu, 4, cr4::PAE | cr4::PGE);
    assert_eq!(cpu.r.pdpte[1], 1 << 60);
}

#[test]
fn cr3() {
    let mut cpu = long();
    refuses(&mut cpu, 3, 1 << 40);
    refuses(&mut cpu, 3, 1 << 63 | 0x1000);
    let asid = cpu.tlb.asid;
    write(&mut cpu, 3, 0x1018);
    assert_eq!(cpu.r.cr3, 0x1018);
    assert_ne!(cpu.tlb.asid, asid);
    // PCIDs: only in long mode with PCID 0, and bit 63 keeps translations.
    refuses(&mut cpu, 4, cr4::PAE | cr4::PCIDE);
    write(&mut cpu, 3, 0x1000);
    write(&mut cpu, 4, cr4::PAE | cr4::PCIDE);
    write(&mut cpu, 3, 0x1001);
    let one = cpu.tlb.asid;
    write(&mut cpu, 3, 0x1002);
    assert_ne!(cpu.tlb.asid, one);
    write(&mut cpu, 3, 1 << 63 | 0x1001);
    assert_eq!((cpu.tlb.asid, cpu.r.cr3), (one, 0x1001));
    write(&mut cpu, 3, 0x1001);
    assert_ne!(cpu.tlb.asid, one);
    // Paging cannot be switched off with PCIDs on (nor here for CS.L's sake).
    let value = cpu.r.cr0 & !cr0::PG;
    refuses(&mut cpu, 0, value);
    let mut cpu = protected();
    refuses(&mut cpu, 4, cr4::PCIDE);
}

#[test]
fn cr4_follows_the_policy() {
    let mut cpu = protected();
    for bit in 0..32 {
        let allowed = cpu.features.cr4 >> bit & 1 != 0;
        if allowed && 1 << bit != cr4::PCIDE {
            write(&mut cpu, 4, 1 << bit);
        } else {
            refuses(&mut cpu, 4, 1 << bit);
        }
    }
    assert_eq!(cpu.features.cr4 & (cr4::VME | 1 << 13 | 1 << 22), 0);
    let mut cpu = long();
    refuses(&mut cpu, 4, 1 << 32 | cr4::PAE);
    // A policy without SMAP and PCID.
    cpu.config.cpuid = leaves(&[(1, 0, [0x600, 0, 0, 1 << 6]), (7, 0, [0; 4])]);
    cpu.features = crate::cpuid::Features::new(&cpu.config);
    refuses(&mut cpu, 4, cr4::PAE | cr4::SMAP);
    refuses(&mut cpu, 4, cr4::PAE | cr4::OSFXSR);
    write(&mut cpu, 4, cr4::PAE | cr4::MCE);
    // SMEP and SMAP take effect at once.
    let mut cpu = long();
    rax(&mut cpu, STACK3);
    ok(&mut cpu, &[0x8a, 0x08]);
    write(&mut cpu, 4, cr4::PAE | cr4::SMAP);
    rax(&mut cpu, STACK3);
    assert_eq!(faults(&mut cpu, &[0x8a, 0x08]), (vector::PF, Some(1)));
    ok(&mut cpu, &[0x0f, 0x01, 0xcb]); // stac
    ok(&mut cpu, &[0x8a, 0x08]);
    ok(&mut cpu, &[0x0f, 0x01, 0xca]); // clac
    assert_eq!(faults(&mut cpu, &[0x8a, 0x08]), (vector::PF, Some(1)));
}

pub fn leaves(all: &[(u32, u32, [u32; 4])]) -> Vec<crate::config::CpuidLeaf> {
    let leaf = |&(leaf, subleaf, [eax, ebx, ecx, edx]): &(u32, u32, [u32; 4])| crate::config::CpuidLeaf {
        leaf,
        subleaf,
        eax,
        ebx,
        ecx,
        edx,
    };
    all.iter().map(leaf).collect()
}

#[test]
fn write_protection_takes_effect_at_once() {
    let mut cpu = long();
    put(&cpu, 0x3000, 0x85); // read-only
    let value = cpu.r.cr0 & !cr0::WP;
    write(&mut cpu, 0, value);
    rax(&mut cpu, STACK3);
    ok(&mut cpu, &[0x88, 0x08]);
    let value = cpu.r.cr0 | cr0::WP;
    write(&mut cpu, 0, value);
    rax(&mut cpu, STACK3);
    assert_eq!(faults(&mut cpu, &[0x88, 0x08]), (vector::PF, Some(3)));
}

#[test]
fn cr8_is_the_task_priority() {
    let mut cpu = long();
    write(&mut cpu, 8, 9);
    assert_eq!(cpu.lapic.cr8(), 9);
    ok(&mut cpu, &[0x44, 0x0f, 0x20, 0xc1]); // mov rcx, cr8
    assert_eq!(cpu.r.gpr[reg::RCX], 9);
    refuses(&mut cpu, 8, 16);
}

#[test]
fn cr2_and_missing_registers() {
    let mut cpu = long();
    write(&mut cpu, 2, 0x1234_5678_9abc_def0);
    assert_eq!(cpu.r.cr2, 0x1234_5678_9abc_def0);
    for n in [1u8, 5, 6, 7] {
        let i = iced_x86::Decoder::with_ip(64, &mov_cr(n), 0, 0).decode();
        assert!(i.is_invalid() || faults(&mut cpu, &mov_cr(n)) == UD);
    }
}

#[test]
fn lmsw_and_clts() {
    let mut cpu = real_mode();
    rax(&mut cpu, 0xffff);
    ok(&mut cpu, &[0x0f, 0x01, 0xf0]);
    assert_eq!(cpu.r.cr0 & 0xffff, cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET);
    assert_eq!(cpu.mode, Mode::Protected16);
    rax(&mut cpu, 0);
    ok(&mut cpu, &[0x0f, 0x01, 0xf0]); // PE stays
    assert_eq!(cpu.r.cr0 & 0xffff, cr0::PE | cr0::ET);
    cpu.r.cr0 |= cr0::TS;
    ok(&mut cpu, &[0x0f, 0x06]);
    assert_eq!(cpu.r.cr0 & cr0::TS, 0);
    assert_eq!(faults(&mut protected3(), &[0x0f, 0x06]), gp(0));
    assert_eq!(faults(&mut protected3(), &[0x0f, 0x01, 0xf0]), gp(0));
}

#[test]
fn intercepted_writes() {
    let mut cpu = long();
    cpu.config.cr_exits = true;
    rax(&mut cpu, 0x1000);
    assert!(exec(&mut cpu, &mov_cr(3)).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::ExitAfter(Exit::CrWrite { register: 3, value: 0x1000 })));
    assert_eq!(cpu.r.cr3, 0x1000);
}

#[test]
fn xcr0() {
    const XSETBV: &[u8] = &[0x0f, 0x01, 0xd1];
    const XGETBV: &[u8] = &[0x0f, 0x01, 0xd0];
    let mut cpu = long();
    assert_eq!(faults(&mut cpu, XSETBV), UD);
    assert_eq!(faults(&mut cpu, XGETBV), UD);
    cpu.r.cr4 |= cr4::OSXSAVE;
    cpu.r.gpr[reg::RCX] = 0;
    cpu.r.gpr[reg::RDX] = 0;
    for (value, fine) in [(7, true), (3, true), (1, true), (5, false), (2, false), (0, false), (15, false)] {
        rax(&mut cpu, value);
        if fine {
            ok(&mut cpu, XSETBV);
            assert_eq!(cpu.r.xcr0, value);
        } else {
            assert_eq!(faults(&mut cpu, XSETBV), gp(0), "{value}");
        }
    }
    rax(&mut cpu, 7);
    cpu.r.gpr[reg::RCX] = 1;
    assert_eq!(faults(&mut cpu, XSETBV), gp(0));
    cpu.r.xcr0 = 7;
    cpu.r.gpr[reg::RCX] = 0;
    cpu.r.gpr[reg::RDX] = 1;
    ok(&mut cpu, XGETBV);
    assert_eq!((cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RDX]), (7, 0));
    cpu.r.gpr[reg::RCX] = 1;
    cpu.fpu.ymm[3][0] = 1;
    ok(&mut cpu, XGETBV);
    assert_eq!(cpu.r.gpr[reg::RAX], 2);
    cpu.r.gpr[reg::RCX] = 2;
    assert_eq!(faults(&mut cpu, XGETBV), gp(0));
    let mut cpu = long3();
    cpu.r.cr4 |= cr4::OSXSAVE;
    assert_eq!(faults(&mut cpu, XSETBV), gp(0));
}

#[test]
fn invalidations() {
    // Map a page elsewhere: the old translation lives until INVLPG.
    let mut cpu = long();
    cpu.config.optimise.tlb = true;
    let (pdpt, pd, pt) = (0x2000u64, 0x10_0000u64, 0x10_1000u64);
    put(&cpu, pdpt + 8, pd | 7);
    put(&cpu, pd, pt | 7);
    put(&cpu, pt, 0x20_0000 | 7);
    poke(&cpu, 0x20_0000, &[1]);
    poke(&cpu, 0x20_1000, &[2]);
    let read = |cpu: &mut Cpu| {
        rax(cpu, 0x4000_0000);
        ok(cpu, &[0x8a, 0x08]);
        cpu.r.gpr[reg::RCX] & 0xff
    };
    assert_eq!(read(&mut cpu), 1);
    put(&cpu, pt, 0x20_1000 | 7);
    assert_eq!(read(&mut cpu), 1);
    ok(&mut cpu, &[0x0f, 0x01, 0x38]); // invlpg [rax]
    assert_eq!(read(&mut cpu), 2);
    rax(&mut cpu, 1 << 47);
    ok(&mut cpu, &[0x0f, 0x01, 0x38]); // not canonical: nothing
    assert_eq!(faults(&mut long3(), &[0x0f, 0x01, 0x38]), gp(0));
    // INVPCID.
    const INVPCID: &[u8] = &[0x66, 0x0f, 0x38, 0x82, 0x08]; // rcx, [rax]
    for kind in 0..4 {
        put(&cpu, pt, 0x20_0000 | 7);
        cpu.flush_tlb_all();
        assert_eq!(read(&mut cpu), 1);
        put(&cpu, pt, 0x20_1000 | 7);
        cpu.r.gpr[reg::RCX] = kind;
        rax(&mut cpu, STACK3);
        put(&cpu, STACK3, 0);
        put(&cpu, STACK3 + 8, 0x4000_0000);
        ok(&mut cpu, INVPCID);
        assert_eq!(read(&mut cpu), 2, "type {kind}");
    }
    rax(&mut cpu, STACK3);
    cpu.r.gpr[reg::RCX] = 4;
    assert_eq!(faults(&mut cpu, INVPCID), gp(0));
    cpu.r.gpr[reg::RCX] = 0;
    put(&cpu, STACK3, 0x1000);
    assert_eq!(faults(&mut cpu, INVPCID), gp(0));
    put(&cpu, STACK3, 1); // without CR4.PCIDE
    assert_eq!(faults(&mut cpu, INVPCID), gp(0));
    put(&cpu, STACK3, 0);
    put(&cpu, STACK3 + 8, 1 << 47);
    assert_eq!(faults(&mut cpu, INVPCID), gp(0));
    cpu.features.invpcid = false;
    assert_eq!(faults(&mut cpu, INVPCID), UD);
    for bytes in [[0x0f, 0x08], [0x0f, 0x09]] {
        ok(&mut cpu, &bytes);
        assert_eq!(faults(&mut long3(), &bytes), gp(0));
    }
}

#[test]
fn reset_init_and_sipi() {
    let mut cpu = long();
    cpu.fpu.ymm[0][0] = 1;
    cpu.msr.lstar = 0x1234;
    cpu.r.xcr0 = 7;
    cpu.r.dr7 = 0x455;
    cpu.r.cr0 |= cr0::CD;
    // An application processor.
    cpu.config.apic_id = 1;
    cpu.lapic = nonroot_lapic::Lapic::new(1, 1_000_000, 25_000_000);
    cpu.sipi(0x12); // does not wait for one
    assert_eq!(cpu.activity, Activity::Running);
    cpu.init();
    assert_eq!((cpu.mode, cpu.cpl, cpu.activity), (Mode::Real, 0, Activity::WaitForSipi));
    assert_eq!((cpu.r.cr0, cpu.r.cr3, cpu.r.cr4, cpu.r.efer), (cr0::CD | cr0::ET, 0, 0, 0));
    assert_eq!((cpu.r.dr7, cpu.rflags(), cpu.r.rip), (0x400, 2, 0xfff0));
    assert_eq!((cpu.fpu.ymm[0][0], cpu.msr.lstar, cpu.r.xcr0), (1, 0x1234, 7));
    cpu.sipi(0x12);
    assert_eq!((cpu.activity, cpu.r.rip), (Activity::Running, 0));
    assert_eq!((cpu.r.seg[seg::CS].selector, cpu.r.seg[seg::CS].base), (0x1200, 0x12000));
    cpu.reset();
    assert_eq!(
        (cpu.activity, cpu.msr.lstar, cpu.r.xcr0, cpu.r.cr0),
        (Activity::WaitForSipi, 0, 1, 0x6000_0010)
    );
    assert_eq!((cpu.fpu.ymm[0][0], cpu.msr.pat), (0, crate::msr::PAT_RESET));
    cpu.config.apic_id = 0;
    cpu.reset();
    assert_eq!((cpu.activity, cpu.r.seg[seg::CS].base, cpu.r.rip), (Activity::Running, 0xffff_0000, 0xfff0));
}
