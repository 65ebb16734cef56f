//! String instructions: faults, exits and budgets in the middle, MMIO, overlaps.

use crate::cpu::Cpu;
use crate::state::*;
use crate::testing::*;

const REP_MOVSB: &[u8] = &[0xf3, 0xa4];
const REP_MOVSQ: &[u8] = &[0xf3, 0x48, 0xa5];
const REP_STOSD: &[u8] = &[0xf3, 0xab];

fn pointers(cpu: &mut Cpu, rsi: u64, rdi: u64, rcx: u64) {
    cpu.r.gpr[reg::RSI] = rsi;
    cpu.r.gpr[reg::RDI] = rdi;
    cpu.r.gpr[reg::RCX] = rcx;
}

fn state(cpu: &Cpu) -> [u64; 3] {
    [cpu.r.gpr[reg::RSI], cpu.r.gpr[reg::RDI], cpu.r.gpr[reg::RCX]]
}

/// Both ways of doing it, and without a TLB.
fn each(test: impl Fn(Box<Cpu>)) {
    for (bulk, tlb) in [(true, true), (false, true), (true, false)] {
        let mut cpu = long_mode();
        cpu.config.optimise.bulk_strings = bulk;
        cpu.config.optimise.tlb = tlb;
        test(cpu);
    }
}

#[test]
fn copies_over_many_pages_count_every_iteration() {
    each(|mut cpu| {
        let data: Vec<u8> = (0..20_000u32).map(|n| (n * 7 % 251) as u8).collect();
        poke(&cpu, DATA + 13, &data);
        pointers(&mut cpu, DATA + 13, DATA + 0x8_0005, 20_000);
        step(&mut cpu, REP_MOVSB).unwrap();
        assert_eq!(peek(&cpu, DATA + 0x8_0005, 20_000), data);
        assert_eq!(state(&cpu), [DATA + 13 + 20_000, DATA + 0x8_0005 + 20_000, 0]);
        assert_eq!(cpu.rep_iterations, 19_999);
    });
}

#[test]
fn no_iterations_change_nothing() {
    each(|mut cpu| {
        pointers(&mut cpu, 1 << 63, 1 << 63, 0);
        step(&mut cpu, REP_MOVSQ).unwrap();
        assert_eq!(state(&cpu), [1 << 63, 1 << 63, 0]);
        assert_eq!(cpu.rep_iterations, 0);
    });
}

#[test]
fn a_fault_leaves_the_finished_iterations() {
    each(|mut cpu| {
        // 2 MiB after DATA are not present.
        poke(&cpu, 0x3000 + 8 * ((DATA >> 21) + 1), &0u64.to_le_bytes());
        let end = DATA + (2 << 20);
        poke(&cpu, DATA, &[0xab; 100]);
        pointers(&mut cpu, DATA, end - 42, 100);
        assert!(step(&mut cpu, REP_MOVSQ).is_err());
        let f = fault(&mut cpu);
        assert_eq!((f.vector, f.error, f.address), (vector::PF, Some(2), end));
        assert_eq!(state(&cpu), [DATA + 40, end - 2, 95]);
        assert_eq!((cpu.rep_iterations, cpu.r.rip), (5, CODE));
        assert_eq!(peek(&cpu, end - 42, 42), [&[0xab; 40][..], &[0, 0]].concat());
    });
}

#[test]
fn budgets_and_requests_stop_between_iterations() {
    each(|mut cpu| {
        poke(&cpu, DATA, &[0x5a; 9000]);
        pointers(&mut cpu, DATA, DATA + 0x4000, 9000);
        cpu.rep_budget = 300;
        assert!(step(&mut cpu, REP_MOVSB).is_err());
        assert_eq!(cpu.stop.take(), Some(StopReason::Restart));
        assert_eq!(state(&cpu), [DATA + 300, DATA + 0x4000 + 300, 8700]);
        assert_eq!((cpu.rep_iterations, cpu.rep_budget), (300, 0));
        // A spent budget still allows one iteration, so there is always progress.
        assert!(step(&mut cpu, REP_MOVSB).is_err());
        assert_eq!(state(&cpu)[2], 8699);
        cpu.rep_budget = u64::MAX;
        cpu.mailbox.requests.store(request::KICK, std::sync::atomic::Ordering::Relaxed);
        assert!(step(&mut cpu, REP_MOVSB).is_err());
        assert_eq!(cpu.stop.take(), Some(StopReason::Restart));
        assert!(state(&cpu)[2] > 0);
        cpu.mailbox.requests.store(0, std::sync::atomic::Ordering::Relaxed);
        step(&mut cpu, REP_MOVSB).unwrap();
        assert_eq!(state(&cpu), [DATA + 9000, DATA + 0x4000 + 9000, 0]);
        // All iterations but the last, which is the instruction's own.
        assert_eq!(cpu.rep_iterations, 8999);
        assert_eq!(peek(&cpu, DATA + 0x4000, 9001), [&[0x5a; 9000][..], &[0]].concat());
    });
}

#[test]
fn overlapping_copies_repeat_the_pattern() {
    each(|mut cpu| {
        poke(&cpu, DATA, b"abc");
        pointers(&mut cpu, DATA, DATA + 3, 3000);
        step(&mut cpu, REP_MOVSB).unwrap();
        let want: Vec<u8> = b"abc".iter().copied().cycle().take(3003).collect();
        assert_eq!(peek(&cpu, DATA, 3003), want);
        // Two linear pages of one frame overlap as well.
        let mut cpu2 = long_mode();
        cpu2.config.optimise = cpu.config.optimise;
        let frame = DATA & !0x1f_ffff;
        poke(&cpu2, 0x3000 + 8 * 100, &(frame | 0x87).to_le_bytes());
        let alias = 100 << 21 | DATA & 0x1f_ffff;
        poke(&cpu2, DATA, b"abc");
        pointers(&mut cpu2, DATA, alias + 3, 300);
        step(&mut cpu2, REP_MOVSB).unwrap();
        assert_eq!(peek(&cpu2, DATA, 303), want[..303]);
    });
}

#[test]
fn fills_and_backward_fills() {
    each(|mut cpu| {
        cpu.r.gpr[reg::RAX] = 0x1234_5678;
        pointers(&mut cpu, 0, DATA + 2, 3000);
        step(&mut cpu, REP_STOSD).unwrap();
        let want: Vec<u8> = 0x1234_5678u32.to_le_bytes().iter().copied().cycle().take(12_000).collect();
        assert_eq!(peek(&cpu, DATA + 2, 12_000), want);
        assert_eq!(state(&cpu), [0, DATA + 2 + 12_000, 0]);
        cpu.set_rflags(2 | rflags::DF);
        cpu.r.gpr[reg::RAX] = 0;
        pointers(&mut cpu, 0, DATA + 2 + 11_996, 3000);
        step(&mut cpu, REP_STOSD).unwrap();
        assert_eq!(peek(&cpu, DATA + 2, 12_000), vec![0; 12_000]);
        assert_eq!(state(&cpu), [0, DATA - 2, 0]);
    });
}

#[test]
fn searches_over_pages() {
    each(|mut cpu| {
        poke(&cpu, DATA + 9000, &[7]);
        cpu.r.gpr[reg::RAX] = 7;
        pointers(&mut cpu, 0, DATA + 10, 20_000);
        step(&mut cpu, &[0xf2, 0xae]).unwrap(); // repne scasb
        assert_eq!(state(&cpu), [0, DATA + 9001, 20_000 - 8991]);
        assert!(cpu.r.flags.zf());
        assert_eq!(cpu.rep_iterations, 8990);
        cpu.rep_iterations = 0;
        pointers(&mut cpu, DATA + 9001, DATA + 1, 20_000);
        step(&mut cpu, &[0xf3, 0xa6]).unwrap(); // repe cmpsb: 0 .. until DATA+9000 (7)
        assert_eq!(state(&cpu)[1], DATA + 9001);
        assert!(!cpu.r.flags.zf() && cpu.r.flags.cf(), "0 - 7 borrows");
        assert_eq!(cpu.rep_iterations, 8999);
        // A count that runs out keeps the last comparison.
        pointers(&mut cpu, DATA, DATA + 1, 5000);
        step(&mut cpu, &[0xf3, 0xa6]).unwrap();
        assert!(cpu.r.flags.zf() && state(&cpu)[2] == 0);
    });
}

#[test]
fn sixteen_bit_indexes_wrap() {
    for bulk in [true, false] {
        let mut cpu = real_mode();
        cpu.config.optimise.bulk_strings = bulk;
        poke(&cpu, 0xfff0, &[1; 16]);
        poke(&cpu, 0, &[2; 16]);
        cpu.r.seg[seg::ES].base = 0x2_0000;
        pointers(&mut cpu, 0xaaaa_fff0, 0xbbbb_0100, 0xcccc_0020);
        step(&mut cpu, REP_MOVSB).unwrap();
        assert_eq!(state(&cpu), [0xaaaa_0010, 0xbbbb_0120, 0xcccc_0000]);
        assert_eq!(peek(&cpu, 0x2_0100, 32), [[1; 16], [2; 16]].concat());
        // A word across the end of the segment faults after the words before it.
        pointers(&mut cpu, 0, 0xfffb, 10);
        assert!(step(&mut cpu, &[0xf3, 0xab]).is_err()); // rep stosw
        assert_eq!((fault_code(&mut cpu), state(&cpu)), ((vector::GP, Some(0)), [0, 0xffff, 8]));
    }
}

#[test]
fn segment_overrides_and_limits() {
    let mut cpu = protected32();
    poke(&cpu, DATA + 0x100, b"override");
    cpu.r.seg[seg::FS].base = DATA;
    pointers(&mut cpu, 0x100, DATA, 8);
    step(&mut cpu, &[0x64, 0xf3, 0xa4]).unwrap(); // rep movsb with fs:
    assert_eq!(peek(&cpu, DATA, 8), b"override");
    // The limit of ES stops a copy inside a page.
    cpu.r.seg[seg::ES].limit = DATA as u32 + 99;
    cpu.update_segments();
    pointers(&mut cpu, DATA, DATA + 40, 100);
    assert!(step(&mut cpu, REP_MOVSB).is_err());
    assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
    assert_eq!(state(&cpu), [DATA + 60, DATA + 100, 40]);
}

/// Each access to what is not RAM is one exit, made once and in order.
#[test]
fn copies_to_and_from_mmio() {
    each(|mut cpu| {
        pointers(&mut cpu, MMIO, DATA, 3);
        for n in 0..3u64 {
            assert!(step(&mut cpu, &[0xf3, 0xa5]).is_err()); // rep movsd
            let exit = Exit::Mmio { gpa: MMIO + 4 * n, size: 4, write: false, data: Vec::new() };
            assert_eq!(cpu.stop.take(), Some(StopReason::Exit(exit)));
            assert_eq!(state(&cpu)[2], 3 - n);
            cpu.mmio.answer(&(0x100 + n as u32).to_le_bytes());
        }
        step(&mut cpu, &[0xf3, 0xa5]).unwrap();
        assert_eq!(peek(&cpu, DATA, 12), [0, 1, 0, 0, 1, 1, 0, 0, 2, 1, 0, 0]);
        assert_eq!(state(&cpu), [MMIO + 12, DATA + 12, 0]);

        cpu.r.gpr[reg::RAX] = 0x77;
        pointers(&mut cpu, 0, MMIO + 5, 2);
        for n in 0..2u64 {
            assert!(step(&mut cpu, &[0xf3, 0xaa]).is_err()); // rep stosb
            let exit = Exit::Mmio { gpa: MMIO + 5 + n, size: 1, write: true, data: vec![0x77] };
            assert_eq!(cpu.stop.take(), Some(StopReason::Exit(exit)));
        }
        step(&mut cpu, &[0xf3, 0xaa]).unwrap();
        assert_eq!(state(&cpu), [0, MMIO + 7, 0]);
    });
}
