//! Each behaviour of the local APIC, from the manual's descriptions.

use super::*;

const KHZ: u64 = 1_000_000;
const BUS: u64 = 25_000_000;
/// Nanoseconds of one bus tick with divisor 1.
const TICK: u64 = 40;

fn enabled(id: u32) -> Lapic {
    let mut lapic = Lapic::new(id, KHZ, BUS);
    lapic.mmio_write(0xf0, 0x1ff, 0);
    lapic
}

fn x2(id: u32) -> Lapic {
    let mut lapic = Lapic::new(id, KHZ, BUS);
    lapic.set_base(lapic.base() | apic_base::EXTD).unwrap();
    lapic.msr_write(0x80f, 0x1ff, 0).unwrap();
    lapic
}

/// A running timer: vector 0x40, divisor 1.
fn timer(mode: u32, initial: u32, now: u64) -> Lapic {
    let mut lapic = enabled(0);
    lapic.mmio_write(0x3e0, 0xb, now);
    lapic.mmio_write(0x320, 0x40 | mode << 17, now);
    lapic.mmio_write(0x380, initial, now);
    lapic
}

#[test]
fn power_up_values() {
    let mut lapic = Lapic::new(0, KHZ, BUS);
    assert_eq!(lapic.base(), 0xfee0_0900);
    assert_eq!(lapic.mmio_page(), Some(0xfee0_0000));
    assert_eq!(Lapic::new(3, KHZ, BUS).base(), 0xfee0_0800);
    assert_eq!(Lapic::new(3, KHZ, BUS).mmio_read(0x20, 0), 3 << 24);
    assert_eq!(lapic.mmio_read(0x30, 0), 0x0006_0014);
    assert_eq!(lapic.mmio_read(0xe0, 0), u32::MAX);
    assert_eq!(lapic.mmio_read(0xf0, 0), 0xff);
    for offset in [0x2f0, 0x320, 0x330, 0x340, 0x350, 0x360, 0x370] {
        assert_eq!(lapic.mmio_read(offset, 0), LVT_MASKED);
    }
    assert_eq!(lapic.pending(), None);
    assert_eq!(lapic.deadline(), None);
    assert!(!lapic.accepts_pic());
}

#[test]
fn priorities_and_end_of_interrupt() {
    let mut lapic = enabled(0);
    lapic.accept(0x31, false);
    lapic.accept(0x52, false);
    assert_eq!(lapic.acknowledge(), Some(0x52));
    assert_eq!(lapic.mmio_read(0xa0, 0), 0x50);
    assert_eq!(lapic.pending(), None, "0x31 is below the interrupt in service");
    lapic.accept(0x5f, false);
    assert_eq!(lapic.pending(), None, "the same class does not nest");
    lapic.accept(0x60, false);
    assert_eq!(lapic.acknowledge(), Some(0x60));
    assert_eq!(lapic.mmio_write(0xb0, 0, 0), Effects::default());
    assert_eq!(lapic.pending(), None);
    lapic.mmio_write(0xb0, 0, 0);
    assert_eq!(lapic.acknowledge(), Some(0x5f));
    lapic.mmio_write(0xb0, 0, 0);
    assert_eq!(lapic.acknowledge(), Some(0x31));
    lapic.mmio_write(0xb0, 0, 0);
    assert_eq!(lapic.acknowledge(), None);
    assert_eq!(lapic.mmio_write(0xb0, 0, 0), Effects::default(), "an EOI without an interrupt in service");
}

#[test]
fn task_priority_and_cr8() {
    let mut lapic = enabled(0);
    lapic.accept(0x45, false);
    lapic.set_cr8(4);
    assert_eq!(lapic.mmio_read(0x80, 0), 0x40);
    assert_eq!(lapic.pending(), None);
    lapic.mmio_write(0x80, 0x3f, 0);
    assert_eq!(lapic.cr8(), 3);
    assert_eq!(lapic.mmio_read(0xa0, 0), 0x3f);
    assert_eq!(lapic.pending(), Some(0x45));
    lapic.acknowledge();
    assert_eq!(lapic.mmio_read(0xa0, 0), 0x40);
}

#[test]
fn vector_registers_and_level_eoi() {
    let mut lapic = enabled(0);
    lapic.accept(0xfe, true);
    lapic.accept(0x21, false);
    assert_eq!(lapic.mmio_read(0x270, 0), 1 << 30);
    assert_eq!(lapic.mmio_read(0x1f0, 0), 1 << 30);
    assert_eq!(lapic.mmio_read(0x210, 0), 1 << 1);
    assert_eq!(lapic.mmio_read(0x190, 0), 0);
    assert_eq!(lapic.acknowledge(), Some(0xfe));
    assert_eq!(lapic.mmio_read(0x170, 0), 1 << 30);
    assert_eq!(lapic.mmio_write(0xb0, 0, 0).eoi, Some(0xfe));
    lapic.accept(0xfe, false);
    lapic.acknowledge();
    assert_eq!(lapic.mmio_write(0xb0, 0, 0).eoi, None, "an edge clears the TMR bit");
}

#[test]
fn software_disabled() {
    let mut lapic = enabled(0);
    lapic.mmio_write(0x350, 0x700, 0);
    assert!(lapic.accepts_pic());
    lapic.accept(0x80, false);
    lapic.mmio_write(0xf0, 0xff, 0);
    assert!(!lapic.accepts_pic());
    lapic.accept(0x90, false);
    assert_eq!(lapic.pending(), Some(0x80), "pending interrupts are held, new ones ignored");
    lapic.mmio_write(0x350, 0x700, 0);
    assert_eq!(lapic.mmio_read(0x350, 0), 0x10700, "the mask cannot be cleared");
}

#[test]
fn base_transitions() {
    use apic_base::{BSP, EN, EXTD};
    let mut lapic = Lapic::new(0, KHZ, BUS);
    let page = 0xfee0_0000 | BSP;
    assert!(lapic.set_base(page | EXTD).is_err());
    assert!(lapic.set_base(page | EN | 1).is_err());
    assert!(lapic.set_base(page | EN | 1 << 9).is_err());
    assert!(lapic.set_base(1 << 40 | EN).is_err());
    lapic.set_base(0xfec1_0000 | BSP | EN).unwrap();
    assert_eq!(lapic.mmio_page(), Some(0xfec1_0000));
    assert!(lapic.msr_read(0x802, 0).is_err());
    lapic.set_base(page | EN | EXTD).unwrap();
    assert_eq!(lapic.mmio_page(), None);
    assert!(lapic.set_base(page | EN).is_err(), "x2APIC to xAPIC");
    assert_eq!(lapic.base(), page | EN | EXTD);
    lapic.set_base(page).unwrap();
    assert!(lapic.accepts_pic(), "a disabled APIC passes the PIC through");
    assert!(!lapic.matches(0, false));
    assert!(lapic.set_base(page | EN | EXTD).is_err(), "disabled to x2APIC");
    lapic.set_base(page | EN).unwrap();
    assert_eq!(lapic.mmio_read(0xf0, 0), 0xff, "disabling resets");
}

#[test]
fn reset_keeps_the_mode() {
    let mut lapic = x2(0x25);
    lapic.accept(0x40, false);
    lapic.reset();
    assert!(lapic.x2apic());
    assert_eq!(lapic.msr_read(0x80d, 0), Ok(0x0002_0020));
    assert_eq!(lapic.pending(), None);
}

#[test]
fn x2apic_registers() {
    let mut lapic = x2(0x123);
    assert_eq!(lapic.msr_read(0x802, 0), Ok(0x123));
    assert_eq!(lapic.msr_read(0x80d, 0), Ok(0x12 << 16 | 1 << 3));
    for absent in [0x800, 0x80b, 0x80e, 0x831, 0x83f, 0x840, 0x8ff] {
        assert!(lapic.msr_read(absent, 0).is_err(), "read of {absent:#x}");
    }
    for read_only in [0x802, 0x803, 0x80a, 0x80d, 0x810, 0x820, 0x839, 0x831, 0x80e] {
        assert!(lapic.msr_write(read_only, 0, 0).is_err(), "write of {read_only:#x}");
    }
    for (msr, value) in [
        (0x808, 0x100),
        (0x80b, 1),
        (0x80f, 1 << 12),
        (0x828, 1),
        (0x830, 1 << 13),
        (0x830, 1 << 20),
        (0x832, 1 << 19),
        (0x835, 1 << 17),
        (0x838, 1 << 32),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert!(lapic.msr_write(msr, value, 0).is_err(), "{value:#x} to {msr:#x}");
    }
    lapic.msr_write(0x808, 0x20, 0).unwrap();
    assert_eq!(lapic.cr8(), 2);
    lapic.msr_write(0x83f, 0x55, 0).unwrap();
    assert_eq!(lapic.acknowledge(), Some(0x55));
    lapic.msr_write(0x80b, 0, 0).unwrap();
    assert_eq!(lapic.msr_read(0x80a, 0), Ok(0x20));
    let command = 0x5_0000_0000 | 0x4061;
    let ipi = lapic.msr_write(0x830, command, 0).unwrap().ipi.unwrap();
    assert_eq!((ipi.destination, ipi.vector, ipi.assert, ipi.shorthand), (5, 0x61, true, 0));
    assert_eq!(lapic.msr_read(0x830, 0), Ok(command));
}

#[test]
fn interrupt_commands() {
    let mut lapic = enabled(2);
    let mut send = |high: u32, low: u32| {
        lapic.mmio_write(0x310, high << 24, 0);
        let ipi = lapic.mmio_write(0x300, low, 0).ipi;
        (ipi, lapic.acknowledge().inspect(|_| assert_eq!(lapic.mmio_write(0xb0, 0, 0).eoi, None)))
    };
    assert_eq!(send(0, 0x4_0044), (None, Some(0x44)), "self");
    assert_eq!(send(0, 0x4_0444), (None, None), "NMI to self is invalid");
    assert_eq!(send(2, 0x0_4045), (None, Some(0x45)), "physical, own ID");
    let (ipi, own) = send(7, 0x0_0c00);
    let expected =
        Ipi { vector: 0, mode: 4, shorthand: 0, logical: true, level: false, assert: false, destination: 7 };
    assert_eq!((ipi, own), (Some(expected), None));
    assert_eq!(send(0, 0xc_4033).0.unwrap().shorthand, 3);
    assert_eq!(send(0xff, 0x0_4033).0.unwrap().destination, 0xff);
    assert_eq!(send(1, 0x0_8500).0, None, "INIT level de-assert");
    assert_eq!(send(1, 0x0_c500).0.unwrap().mode, 5);
    assert_eq!(send(1, 0x0_4608).0.unwrap().vector, 8, "a start-up IPI's page is no vector");
    assert_eq!(send(1, 0x0_4008).0, None);
    assert_eq!(lapic.mmio_read(0x300, 0), 0x4008);
    lapic.mmio_write(0x280, 0, 0);
    assert_eq!(lapic.mmio_read(0x280, 0), ESR_SEND_ILLEGAL);
}

#[test]
fn errors() {
    let mut lapic = enabled(0);
    lapic.mmio_write(0x370, 0xfe, 0);
    lapic.mmio_read(0x40, 0);
    assert_eq!(lapic.mmio_read(0x280, 0), 0, "the ESR shows errors only after a write");
    lapic.mmio_write(0x280, 0, 0);
    assert_eq!(lapic.mmio_read(0x280, 0), ESR_REGISTER);
    assert_eq!(lapic.acknowledge(), Some(0xfe));
    lapic.mmio_write(0xb0, 0, 0);
    lapic.accept(5, false);
    assert_eq!(lapic.acknowledge(), Some(0xfe));
    lapic.mmio_write(0xb0, 0, 0);
    lapic.accept(5, false);
    assert_eq!(lapic.pending(), None, "the same error again does not interrupt");
    lapic.mmio_write(0x280, 0, 0);
    assert_eq!(lapic.mmio_read(0x280, 0), ESR_RECEIVE_ILLEGAL);
    lapic.mmio_write(0x280, 0, 0);
    assert_eq!(lapic.mmio_read(0x280, 0), 0);
    lapic.mmio_write(0x370, 3, 0);
    lapic.mmio_write(0x3f0, 0x40, 0);
    assert_eq!(lapic.pending(), None, "self IPI is x2APIC's");
    lapic.mmio_write(0x280, 0, 0);
    assert_eq!(lapic.mmio_read(0x280, 0), ESR_REGISTER | ESR_RECEIVE_ILLEGAL);
}

#[test]
fn destinations() {
    let mut lapic = enabled(4);
    assert!(lapic.matches(4, false) && lapic.matches(0xff, false) && !lapic.matches(5, false));
    lapic.mmio_write(0xd0, 0x12ff_ffff, 0);
    assert_eq!(lapic.mmio_read(0xd0, 0), 0x1200_0000);
    assert!(lapic.matches(0x02, true) && lapic.matches(0xf0, true) && !lapic.matches(0x0d, true));
    lapic.mmio_write(0xe0, 0, 0);
    assert_eq!(lapic.mmio_read(0xe0, 0), 0x0fff_ffff);
    assert!(lapic.matches(0x13, true) && lapic.matches(0xff, true));
    assert!(!lapic.matches(0x22, true) && !lapic.matches(0x11, true));
    let shared = lapic.addressing();
    assert!(shared.matches(0x13, true));
    let mut other = enabled(4);
    lapic.set_state(&other.state()).unwrap();
    assert!(!shared.matches(0x13, true), "other threads see a loaded record");
    other.set_base(0).unwrap();
    assert!(!other.addressing().matches(4, false));
    let lapic = x2(0x34);
    assert!(lapic.matches(0x34, false) && lapic.matches(u32::MAX, false) && !lapic.matches(0xff, false));
    assert!(lapic.matches(0x3_0010, true) && lapic.matches(0x3_ffff, true) && lapic.matches(u32::MAX, true));
    assert!(!lapic.matches(0x3_0020, true) && !lapic.matches(0x2_0010, true));
}

#[test]
fn local_pins() {
    let mut lapic = Lapic::new(0, KHZ, BUS);
    assert!(!lapic.set_lint(1, true), "masked at power-up");
    lapic.mmio_write(0xf0, 0x1ff, 0);
    lapic.set_lint(1, false);
    lapic.mmio_write(0x360, 0x400, 0);
    assert!(lapic.set_lint(1, true));
    assert!(!lapic.set_lint(1, true), "only the edge");
    lapic.mmio_write(0x350, 0x38, 0);
    assert!(!lapic.accepts_pic());
    assert!(!lapic.set_lint(0, true));
    assert_eq!(lapic.acknowledge(), Some(0x38));
}

#[test]
fn one_shot() {
    let mut lapic = timer(0, 100, 1000);
    assert_eq!(lapic.deadline(), Some(1000 + 100 * TICK));
    assert_eq!(lapic.mmio_read(0x390, 1000), 100);
    assert_eq!(lapic.mmio_read(0x390, 1000 + TICK - 1), 100);
    assert_eq!(lapic.mmio_read(0x390, 1000 + TICK), 99);
    lapic.advance(1000 + 100 * TICK - 1);
    assert_eq!(lapic.pending(), None);
    lapic.advance(1000 + 100 * TICK);
    assert_eq!(lapic.acknowledge(), Some(0x40));
    assert_eq!(lapic.deadline(), None);
    assert_eq!(lapic.mmio_read(0x390, 9000), 0);
    assert_eq!(lapic.mmio_read(0x380, 9000), 100);
    lapic.mmio_write(0xb0, 0, 9000);
    lapic.advance(1 << 40);
    assert_eq!(lapic.pending(), None);
    lapic.mmio_write(0x380, 10, 1 << 40);
    assert_eq!(lapic.deadline(), Some((1 << 40) + 10 * TICK));
    lapic.mmio_write(0x380, 0, 1 << 40);
    assert_eq!(lapic.deadline(), None);
}

#[test]
fn divide_configuration() {
    for (register, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut lapic = timer(0, 0, 0);
        lapic.mmio_write(0x3e0, register, 0);
        assert_eq!(lapic.mmio_read(0x3e0, 0), register);
        lapic.mmio_write(0x380, 1000, 0);
        assert_eq!(lapic.deadline(), Some(1000 * TICK * divisor), "{register}");
    }
    let mut lapic = timer(PERIODIC, 100, 0);
    lapic.mmio_write(0x3e0, 0, 50 * TICK);
    assert_eq!(lapic.mmio_read(0x390, 50 * TICK), 50, "the count goes on at the new rate");
    assert_eq!(lapic.deadline(), Some(150 * TICK));
    lapic.advance(150 * TICK);
    assert_eq!(lapic.deadline(), Some(350 * TICK));
}

use super::timer::{PERIODIC, TSC_DEADLINE};

#[test]
fn periodic_does_not_drift() {
    // 3 ticks of 7 Hz: a period that is no whole number of nanoseconds.
    let mut lapic = Lapic::new(0, KHZ, 7);
    lapic.mmio_write(0xf0, 0x1ff, 0);
    lapic.mmio_write(0x3e0, 0xb, 0);
    lapic.mmio_write(0x320, 0x40 | PERIODIC << 17, 0);
    lapic.mmio_write(0x380, 3, 5);
    for k in 1..=10_000u64 {
        let due = lapic.deadline().unwrap();
        assert_eq!(due, 5 + (k * 3 * 1_000_000_000).div_ceil(7));
        lapic.advance(due - 1);
        assert_eq!(lapic.pending(), None);
        lapic.advance(due + k % 3);
        assert_eq!(lapic.acknowledge(), Some(0x40));
        lapic.mmio_write(0xb0, 0, due + k % 3);
    }
}

#[test]
fn periodic_coalesces_and_counts() {
    let mut lapic = timer(PERIODIC, 10, 0);
    lapic.advance(35 * TICK);
    assert_eq!(lapic.acknowledge(), Some(0x40), "missed periods give one interrupt");
    assert_eq!(lapic.deadline(), Some(40 * TICK), "and the phase stays");
    assert_eq!(lapic.mmio_read(0x390, 35 * TICK), 5);
    assert_eq!(lapic.mmio_read(0x390, 40 * TICK), 10);
    lapic.mmio_write(0x320, 0x40, 45 * TICK);
    assert_eq!(lapic.deadline(), Some(50 * TICK), "one-shot from now on");
    lapic.advance(50 * TICK);
    assert_eq!(lapic.deadline(), None);
}

#[test]
fn masked_timer_counts_silently() {
    let mut lapic = timer(PERIODIC, 10, 0);
    lapic.mmio_write(0x320, 0x40 | PERIODIC << 17 | LVT_MASKED, 0);
    assert_eq!(lapic.deadline(), None);
    assert_eq!(lapic.mmio_read(0x390, 13 * TICK), 7);
    lapic.mmio_write(0x320, 0x40 | PERIODIC << 17, 25 * TICK);
    assert_eq!(lapic.pending(), None, "expiries while masked are lost");
    assert_eq!(lapic.deadline(), Some(30 * TICK));
}

#[test]
fn tsc_deadline() {
    let mut lapic = enabled(0);
    lapic.msr_write(0x6e0, 5000, 0).unwrap();
    assert_eq!(lapic.msr_read(0x6e0, 0), Ok(0), "ignored in other modes");
    lapic.mmio_write(0x320, 0x40 | TSC_DEADLINE << 17, 0);
    lapic.mmio_write(0x380, 1000, 0);
    assert_eq!(lapic.deadline(), None, "the initial count is ignored");
    lapic.msr_write(0x6e0, 5000, 0).unwrap();
    assert_eq!((lapic.msr_read(0x6e0, 0), lapic.deadline()), (Ok(5000), Some(5000)));
    lapic.set_tsc_offset(1000);
    assert_eq!(lapic.deadline(), Some(4000));
    lapic.set_tsc_offset(-1000);
    assert_eq!(lapic.deadline(), Some(6000));
    lapic.advance(6000);
    assert_eq!(lapic.acknowledge(), Some(0x40));
    assert_eq!((lapic.msr_read(0x6e0, 6000), lapic.deadline()), (Ok(0), None));
    lapic.msr_write(0x6e0, 1, 7000).unwrap();
    lapic.advance(7000);
    lapic.mmio_write(0xb0, 0, 7000);
    assert_eq!(lapic.pending(), Some(0x40), "a deadline in the past fires at once");
    lapic.msr_write(0x6e0, 1 << 60, 7000).unwrap();
    lapic.msr_write(0x6e0, 0, 7000).unwrap();
    assert_eq!(lapic.deadline(), None);
    lapic.msr_write(0x6e0, u64::MAX, 7000).unwrap();
    lapic.mmio_write(0x320, 0x40, 7000);
    assert_eq!(lapic.msr_read(0x6e0, 7000), Ok(0), "leaving the mode disarms");
}

#[test]
fn tsc_deadline_rounds_up() {
    let mut lapic = Lapic::new(0, 2_999_999, BUS);
    lapic.mmio_write(0xf0, 0x1ff, 0);
    lapic.mmio_write(0x320, 0x40 | TSC_DEADLINE << 17, 0);
    for deadline in [1u64, 2, 3, 1000, 123_456_789, 1 << 62] {
        lapic.msr_write(0x6e0, deadline, 0).unwrap();
        let ns = lapic.deadline().unwrap() as u128;
        assert!(ns * 2_999_999 / 1_000_000 >= deadline as u128);
        assert!((ns - 1) * 2_999_999 / 1_000_000 < deadline as u128);
    }
}

#[test]
fn records_round_trip() {
    let mut lapic = timer(PERIODIC, 1000, 77);
    lapic.mmio_write(0x350, 0x700, 100);
    lapic.mmio_write(0xd0, 0x0100_0000, 100);
    lapic.accept(0x31, true);
    lapic.accept(0x99, false);
    lapic.acknowledge();
    lapic.accept(3, false);
    lapic.set_cr8(1);
    let record = lapic.state();
    assert_eq!(record.len(), RECORD_LENGTH);
    let mut other = Lapic::new(0, KHZ, BUS);
    other.set_state(&record).unwrap();
    assert_eq!(other.state(), record);
    assert_eq!(other.deadline(), lapic.deadline());
    assert!(other.accepts_pic());
    for now in [200, 40_000, 90_000] {
        for l in [&mut lapic, &mut other] {
            l.mmio_write(0xb0, 0, now);
        }
        assert_eq!(lapic.acknowledge(), other.acknowledge());
        assert_eq!(lapic.mmio_read(0x390, now), other.mmio_read(0x390, now));
        assert_eq!(lapic.state(), other.state());
    }
    let x2apic = x2(5);
    let mut other = Lapic::new(5, KHZ, BUS);
    other.set_state(&x2apic.state()).unwrap();
    assert!(other.x2apic());
}

#[test]
fn hostile_records_are_refused() {
    let mut lapic = timer(PERIODIC, 1000, 77);
    let good = lapic.state();
    let before = format!("{lapic:?}");
    let bad: &[(usize, &[u8])] = &[
        (0, b"X"),
        (4, &[2]),
        (8, &[1]),
        (13, &[1]),
        (16, &[1]),
        (17, &[4]),
        (22, &[1]),
        (24, &[1]),
        (28, &[0]),
        (33, &[0x10]),
        (37, &[1]),
        (41, &[1]),
        (44, &[4]),
        (49, &[0x10]),
        (62, &[0xff]),
        (33, &[0]),
        (96, &[0xff, 0xff]),
        (96, &[0, 0]),
        (100, &[8]),
        (112, &[1]),
        (120, &[1]),
        (128, &[1]),
        (160, &[1]),
    ];
    for (at, bytes) in bad {
        let mut record = good.clone();
        record[*at..*at + bytes.len()].copy_from_slice(bytes);
        assert!(lapic.set_state(&record).is_err(), "offset {at}");
        assert_eq!(format!("{lapic:?}"), before);
    }
    assert!(lapic.set_state(&good[1..]).is_err());
    assert!(lapic.set_state(&[]).is_err());
    lapic.set_state(&good).unwrap();
}

/// A splitmix64 sequence.
fn numbers(mut seed: u64) -> impl FnMut() -> u64 {
    move || {
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (seed ^ seed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z ^ z >> 29
    }
}

#[test]
fn any_record_is_refused_or_harmless() {
    let mut random = numbers(1);
    let good = timer(PERIODIC, 1000, 77).state();
    let mut accepted = 0;
    for _ in 0..20_000 {
        let mut record = good.clone();
        for _ in 0..1 + random() % 3 {
            let at = 12 + random() as usize % (RECORD_LENGTH - 12);
            record[at] = random() as u8;
        }
        let mut lapic = Lapic::new(0, KHZ, BUS);
        if lapic.set_state(&record).is_ok() {
            accepted += 1;
            assert_eq!(lapic.state(), record);
            for now in [0, 1 << 20, u64::MAX] {
                lapic.advance(now);
                lapic.mmio_read(0x390, now);
                lapic.mmio_write(0xb0, 0, now);
                lapic.mmio_write(0x3e0, 1, now);
                lapic.acknowledge();
            }
        }
    }
    assert!(accepted > 1000);
}

/// Registers in both modes, modes, pins, messages and time at random: nothing panics, and what must hold, holds.
/// NONROOT_SOAK_ROUND makes it ten million accesses with another seed.
#[test]
fn random_accesses() {
    const VALUES: [u32; 12] =
        [0, 1, 0xb, 0x10, 0xff, 0x1ff, 0x700, 0x1_0000, 0x2_0040, 0x4_0041, 0x4500, 0xff00_0000];
    let round = std::env::var("NONROOT_SOAK_ROUND").ok();
    let accesses = if round.is_some() { 10_000_000 } else { 100_000 };
    let mut random = numbers(round.map_or(7, |round| 1000 + round.parse::<u64>().expect("a number")));
    let mut lapic = enabled(0);
    let (mut now, mut taken) = (0, 0);
    for step in 0..accesses {
        let chance = random();
        let number = (chance >> 40 & 0x3f) as u32;
        let value = if chance & 1 == 0 {
            VALUES[(chance >> 8) as usize % VALUES.len()]
        } else {
            (chance >> 32) as u32
        };
        let wide = if number == 0x30 { random() & 0xffff_ffff_000c_ffff } else { value as u64 };
        let offset = number << 4 | if chance >> 46 & 15 == 0 { 4 } else { 0 };
        match chance >> 1 & 31 {
            // Nobody comes here by memory while the page is not there.
            0..=15 if lapic.mmio_page().is_none() => {}
            0..=9 => _ = lapic.mmio_write(offset, value, now),
            10..=15 => _ = lapic.mmio_read(offset, now),
            16..=21 => _ = lapic.msr_write(0x800 + number, wide, now),
            22 => _ = lapic.msr_read(0x800 + number, now),
            24 => _ = lapic.msr_write(0x6e0, now + (random() >> 30), now),
            25..=26 => {
                now += random() >> (25 + (chance >> 8) % 39);
                lapic.advance(now);
                assert!(
                    lapic.deadline().is_none_or(|next| next > now),
                    "a deadline that was met comes again"
                );
            }
            27 if chance >> 50 & 7 == 0 => {
                let mode =
                    [0, apic_base::EN, apic_base::EN, apic_base::EN | apic_base::EXTD][number as usize % 4];
                _ = lapic.set_base(0xfee0_0000 | apic_base::BSP | mode);
            }
            27 if lapic.x2apic() => _ = lapic.msr_write(0x80f, 0x1ff, now),
            27 => _ = lapic.mmio_write(0xf0, 0x1ff, now),
            23 | 28 => lapic.accept(value as u8, chance >> 50 & 1 != 0),
            29 => _ = lapic.set_lint(number as usize & 1, number & 2 != 0),
            30 => {
                let pending = lapic.pending();
                assert_eq!(lapic.acknowledge(), pending);
                taken += pending.is_some() as u32;
                if chance >> 50 & 3 != 0 {
                    lapic.end_of_interrupt();
                    lapic.set_cr8(0);
                }
            }
            _ => {
                lapic.set_cr8((value & 15) as u64);
                lapic.set_tsc_offset((random() as i64) >> 30);
            }
        }
        if let Some(vector) = lapic.pending() {
            assert!(vector >= 16 && u32::from(vector >> 4) > lapic.ppr() >> 4);
        }
        if step % 64 == 0 {
            let record = lapic.state();
            if let Err(problem) = lapic.set_state(&record) {
                panic!("{problem}: {lapic:?}");
            }
            assert_eq!(lapic.state(), record);
        }
    }
    assert!(taken > 500, "{taken} interrupts were taken");
}
