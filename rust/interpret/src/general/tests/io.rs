//! Ports: privileges, exits, answers, batches.

use crate::cpu::{Cpu, Reply};
use crate::state::*;
use crate::testing::*;

fn port_exit(port: u16, size: u8, write: bool, count: u32, data: &[u8]) -> Exit {
    Exit::PortIo { port, size, write, count, data: data.to_vec() }
}

#[test]
fn input_completes_with_the_answer() {
    let mut cpu = long_mode();
    cpu.r.gpr[reg::RAX] = u64::MAX;
    assert!(step(&mut cpu, &[0xe4, 0x60]).is_err()); // in al, 60h
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(port_exit(0x60, 1, false, 1, &[]))));
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RAX]), (CODE, u64::MAX));
    cpu.reply = Some(Reply::Data(vec![0x12]));
    step(&mut cpu, &[0xe4, 0x60]).unwrap();
    assert_eq!((cpu.r.gpr[reg::RAX], &cpu.reply), (0xffff_ffff_ffff_ff12, &None));

    cpu.r.gpr[reg::RDX] = 0xffff_0cfc;
    assert!(step(&mut cpu, &[0xed]).is_err()); // in eax, dx
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(port_exit(0xcfc, 4, false, 1, &[]))));
    cpu.reply = Some(Reply::Data(vec![1, 2, 3, 4]));
    step(&mut cpu, &[0xed]).unwrap();
    assert_eq!(cpu.r.gpr[reg::RAX], 0x0403_0201);
}

#[test]
fn output_exits_after_the_instruction() {
    let mut cpu = long_mode();
    cpu.r.gpr[reg::RAX] = 0x1122_3344;
    cpu.r.gpr[reg::RDX] = 0x3f8;
    for (bytes, size) in [(&[0xee][..], 1), (&[0x66, 0xef], 2), (&[0xef], 4)] {
        cpu.r.rip = CODE;
        assert!(step(&mut cpu, bytes).is_err());
        let data = &0x1122_3344u32.to_le_bytes()[..size];
        assert_eq!(cpu.stop.take(), Some(StopReason::ExitAfter(port_exit(0x3f8, size as u8, true, 1, data))));
        assert_eq!(cpu.r.rip, CODE + bytes.len() as u64);
    }
}

/// A 32-bit TSS at `DATA` whose bitmap starts at 0x68 and covers ports below 0x400.
fn with_tss(cpu: &mut Cpu) {
    cpu.r.tr = Segment { base: DATA, limit: 0x68 + 0x80, ar: 0x8b, selector: 0x28 };
    poke(cpu, DATA + 0x66, &0x68u16.to_le_bytes());
    poke(cpu, DATA + 0x68, &[0xff; 0x81]);
}

#[test]
fn the_permission_bitmap_decides() {
    let mut cpu = protected32();
    with_tss(&mut cpu);
    cpu.cpl = 3;
    cpu.r.gpr[reg::RDX] = 0x3f7;
    let allowed = |cpu: &mut Cpu, bytes: &[u8]| {
        cpu.r.rip = CODE;
        let _ = step(cpu, bytes);
        match cpu.stop.take() {
            Some(StopReason::ExitAfter(Exit::PortIo { .. })) => true,
            Some(StopReason::Fault(f)) => {
                assert_eq!((f.vector, f.error), (vector::GP, Some(0)));
                false
            }
            other => panic!("{other:?}"),
        }
    };
    assert!(!allowed(&mut cpu, &[0xee]));
    poke(&cpu, DATA + 0x68 + 0x7e, &[0x7f]); // port 3f7h
    assert!(allowed(&mut cpu, &[0xee]));
    assert!(!allowed(&mut cpu, &[0x66, 0xef]), "3f8h too");
    poke(&cpu, DATA + 0x68 + 0x7f, &[0xfe]); // port 3f8h
    assert!(allowed(&mut cpu, &[0x66, 0xef]));
    // The byte after the last one must be inside the limit.
    cpu.r.gpr[reg::RDX] = 0x3f8;
    assert!(allowed(&mut cpu, &[0xee]));
    cpu.r.tr.limit -= 1;
    assert!(!allowed(&mut cpu, &[0xee]));
    cpu.r.rflags |= rflags::IOPL;
    assert!(allowed(&mut cpu, &[0xee]));
    // A 16-bit TSS has no bitmap.
    cpu.r.rflags &= !rflags::IOPL;
    cpu.r.tr.limit = 0xfff;
    assert!(allowed(&mut cpu, &[0xee]));
    cpu.r.tr.ar = 0x83;
    assert!(!allowed(&mut cpu, &[0xee]));
}

fn pointers(cpu: &mut Cpu, rsi: u64, rdi: u64, rcx: u64) {
    (cpu.r.gpr[reg::RSI], cpu.r.gpr[reg::RDI], cpu.r.gpr[reg::RCX]) = (rsi, rdi, rcx);
    cpu.r.gpr[reg::RDX] = 0x6e0;
    cpu.r.rip = CODE;
}

#[test]
fn string_output_goes_in_batches_of_a_page() {
    let mut cpu = long_mode();
    let data: Vec<u8> = (0..6000u32).map(|n| n as u8).collect();
    poke(&cpu, DATA + 0xf00, &data);
    pointers(&mut cpu, DATA + 0xf00, 0, 6000);
    let mut got = Vec::new();
    let mut batches = Vec::new();
    loop {
        assert!(step(&mut cpu, &[0xf3, 0x6e]).is_err()); // rep outsb
        match cpu.stop.take() {
            Some(StopReason::Exit(Exit::PortIo { port: 0x6e0, size: 1, write: true, count, data })) => {
                assert_eq!(data.len(), count as usize);
                assert_eq!(cpu.r.rip, CODE);
                batches.push(count);
                got.extend(data);
            }
            Some(StopReason::ExitAfter(Exit::PortIo { count, data, .. })) => {
                batches.push(count);
                got.extend(data);
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((got, batches), (data, vec![256, 4096, 1648]));
    assert_eq!((cpu.r.gpr[reg::RSI], cpu.r.gpr[reg::RCX]), (DATA + 0xf00 + 6000, 0));
    assert_eq!((cpu.rep_iterations, cpu.r.rip), (5999, CODE + 2));

    // Downwards, and without REP, one at a time; with no count nothing.
    cpu.set_rflags(2 | rflags::DF);
    pointers(&mut cpu, DATA + 0xf04, 0, 2);
    assert!(step(&mut cpu, &[0xf3, 0x6f]).is_err()); // rep outsd
    let exit = port_exit(0x6e0, 4, true, 1, &[4, 5, 6, 7]);
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(exit)));
    assert_eq!((cpu.r.gpr[reg::RSI], cpu.r.gpr[reg::RCX]), (DATA + 0xf00, 1));
    cpu.r.gpr[reg::RCX] = 0;
    step(&mut cpu, &[0xf3, 0x6f]).unwrap();
}

#[test]
fn string_input_is_stored_with_the_answer() {
    let mut cpu = long_mode();
    pointers(&mut cpu, 0, DATA + 0xffe, 100);
    // Two words fit before the page ends... one does: 0xffe..0x1000.
    assert!(step(&mut cpu, &[0x66, 0xf3, 0x6d]).is_err()); // rep insw
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(port_exit(0x6e0, 2, false, 1, &[]))));
    assert_eq!(cpu.r.gpr[reg::RCX], 100);
    cpu.reply = Some(Reply::Data(vec![1, 2]));
    assert!(step(&mut cpu, &[0x66, 0xf3, 0x6d]).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(port_exit(0x6e0, 2, false, 99, &[]))));
    assert_eq!((cpu.r.gpr[reg::RDI], cpu.r.gpr[reg::RCX]), (DATA + 0x1000, 99));
    // The answer may come when only one iteration is allowed, and may be short.
    cpu.rep_budget = 1;
    cpu.reply = Some(Reply::Data(vec![7; 2 * 90]));
    assert!(step(&mut cpu, &[0x66, 0xf3, 0x6d]).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::Restart));
    assert_eq!((cpu.r.gpr[reg::RDI], cpu.r.gpr[reg::RCX]), (DATA + 0x1000 + 180, 9));
    cpu.rep_budget = u64::MAX;
    cpu.reply = Some(Reply::Data(vec![9; 18]));
    step(&mut cpu, &[0x66, 0xf3, 0x6d]).unwrap();
    assert_eq!(peek(&cpu, DATA + 0xffe, 202), [&[1, 2][..], &[7; 180], &[9; 18], &[0, 0]].concat());
    assert_eq!(cpu.rep_iterations, 99);
}

#[test]
fn string_input_faults_before_the_port_is_read() {
    let mut cpu = long_mode();
    let end = DATA + (2 << 20);
    poke(&cpu, 0x3000 + 8 * (end >> 21), &0u64.to_le_bytes());
    pointers(&mut cpu, 0, end, 4);
    assert!(step(&mut cpu, &[0xf3, 0x6c]).is_err()); // rep insb
    let f = fault(&mut cpu);
    assert_eq!((f.vector, f.error, f.address), (vector::PF, Some(2), end));
    // A destination that is not RAM takes one element: port first, then the store.
    pointers(&mut cpu, 0, MMIO, 4);
    assert!(step(&mut cpu, &[0xf3, 0x6c]).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(port_exit(0x6e0, 1, false, 1, &[]))));
    cpu.reply = Some(Reply::Data(vec![0x42]));
    assert!(step(&mut cpu, &[0xf3, 0x6c]).is_err());
    let store = Exit::Mmio { gpa: MMIO, size: 1, write: true, data: vec![0x42] };
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(store)));
    assert_eq!(cpu.r.gpr[reg::RCX], 4);
    assert!(step(&mut cpu, &[0xf3, 0x6c]).is_err());
    assert_eq!(cpu.stop.take(), Some(StopReason::Exit(port_exit(0x6e0, 1, false, 1, &[]))));
    assert_eq!((cpu.r.gpr[reg::RDI], cpu.r.gpr[reg::RCX]), (MMIO + 1, 3));
}
