//! 16-bit and 32-bit modes: operand and address sizes, limits, decimal arithmetic.

use crate::state::*;
use crate::testing::*;
use iced_x86::code_asm::*;

#[test]
fn real_mode_addresses_wrap_and_have_limits() {
    let mut cpu = real_mode();
    cpu.r.seg[seg::DS].base = 0x1_0000;
    poke(&cpu, 0x1_0004, &[0x34, 0x12]);
    cpu.r.gpr[reg::RBX] = 0xdead_fff0;
    cpu.r.gpr[reg::RSI] = 0xbeef_0014;
    run(&mut cpu, |a| a.mov(ax, word_ptr(bx + si))).unwrap();
    assert_eq!(cpu.r.gpr[reg::RAX], 0x1234);
    // A word at offset FFFFh does not wrap: #GP, and #SS on the stack segment.
    cpu.r.gpr[reg::RBX] = 0xffff;
    assert!(run(&mut cpu, |a| a.mov(ax, word_ptr(bx))).is_err());
    assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
    cpu.r.gpr[reg::RBP] = 0xffff;
    assert!(run(&mut cpu, |a| a.mov(ax, word_ptr(bp))).is_err());
    assert_eq!(fault_code(&mut cpu), (vector::SS, Some(0)));
    // 32-bit addresses beyond the limit fault, unless the limit is big (big real mode).
    cpu.r.gpr[reg::RBX] = 0x20_0000;
    assert!(run(&mut cpu, |a| a.mov(ax, word_ptr(ebx))).is_err());
    cpu.stop = None;
    cpu.r.seg[seg::DS] = Segment { base: 0, limit: 0xffff_ffff, ..cpu.r.seg[seg::DS] };
    poke(&cpu, 0x20_0000, &[0x78, 0x56]);
    run(&mut cpu, |a| a.mov(ax, word_ptr(ebx))).unwrap();
    assert_eq!(cpu.r.gpr[reg::RAX], 0x5678);
}

#[test]
fn sixteen_bit_stack_and_branches() {
    let mut cpu = real_mode();
    cpu.r.gpr[reg::RSP] = 0xaaaa_0002;
    cpu.r.gpr[reg::RAX] = 0x1234_5678;
    run(&mut cpu, |a| a.push(eax)).unwrap_err();
    assert_eq!(fault_code(&mut cpu), (vector::SS, Some(0)), "offset FFFEh, four bytes");
    run(&mut cpu, |a| a.push(ax)).unwrap();
    run(&mut cpu, |a| a.push(ax)).unwrap();
    assert_eq!(cpu.r.gpr[reg::RSP], 0xaaaa_fffe);
    assert_eq!(peek(&cpu, 0xfffe, 2), [0x78, 0x56]);
    run(&mut cpu, |a| a.pop(bx)).unwrap();
    assert_eq!((cpu.r.gpr[reg::RSP], cpu.r.gpr[reg::RBX]), (0xaaaa_0000, 0x5678));

    cpu.r.gpr[reg::RSP] = 0x7000;
    cpu.r.rip = 0xfff0;
    step(&mut cpu, &[0xe9, 0x20, 0]).unwrap(); // jmp over the end of the segment: wraps
    assert_eq!(cpu.r.rip, 0x13);
    step(&mut cpu, &[0xe8, 0xfd, 0xff]).unwrap(); // call to itself
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x13, 0x6ffe));
    assert_eq!(peek(&cpu, 0x6ffe, 2), [0x16, 0]);
    poke(&cpu, 0x7000, &[1, 0]);
    step(&mut cpu, &[0x66, 0xc3]).unwrap_err(); // retd to 10016h: beyond the limit
    assert_eq!(fault_code(&mut cpu).0, vector::GP);
    step(&mut cpu, &[0xc3]).unwrap();
    assert_eq!((cpu.r.rip, cpu.r.gpr[reg::RSP]), (0x16, 0x7000));
}

#[test]
fn thirty_two_bit_near_branches_check_the_limit() {
    let mut cpu = protected32();
    cpu.r.seg[seg::CS].limit = 0x1f_ffff;
    cpu.r.gpr[reg::RAX] = 0x20_0000;
    assert!(run(&mut cpu, |a| a.jmp(eax)).is_err());
    assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)));
    cpu.r.gpr[reg::RAX] = 0x1f_fff0;
    run(&mut cpu, |a| a.jmp(eax)).unwrap();
    assert_eq!(cpu.r.rip, 0x1f_fff0);
    // A 16-bit operand size cuts the instruction pointer.
    cpu.r.rip = CODE;
    step(&mut cpu, &[0x66, 0xeb, 0x10]).unwrap();
    assert_eq!(cpu.r.rip, (CODE + 0x13) & 0xffff);
    cpu.r.rip = CODE;
    step(&mut cpu, &[0x66, 0x74, 0x10]).unwrap(); // not taken: not cut
    assert_eq!(cpu.r.rip, CODE + 3);
}

#[test]
fn push_all_and_pop_all() {
    let mut cpu = protected32();
    for n in 0..8 {
        if n != reg::RSP {
            cpu.r.gpr[n] = 0x1111_1111 * (n as u64 + 1);
        }
    }
    let before = cpu.r.gpr;
    run(&mut cpu, |a| a.pushad()).unwrap();
    assert_eq!(cpu.r.gpr[reg::RSP], STACK - 32);
    let saved: Vec<u32> = peek(&cpu, STACK - 32, 32)
        .chunks(4)
        .map(|c| u32::from_le_bytes(c.try_into().unwrap()))
        .rev()
        .collect();
    assert_eq!(saved, before[..8].iter().map(|v| *v as u32).collect::<Vec<_>>());
    for n in 0..8 {
        if n != reg::RSP {
            cpu.r.gpr[n] = 0;
        }
    }
    run(&mut cpu, |a| a.popad()).unwrap();
    assert_eq!(cpu.r.gpr, before);
    run(&mut cpu, |a| a.pusha()).unwrap();
    assert_eq!((cpu.r.gpr[reg::RSP], peek(&cpu, STACK - 2, 2)), (STACK - 16, vec![0x11, 0x11]));
    // Popping sixteen bits keeps the upper halves.
    poke(&cpu, STACK - 16, &[0xee; 16]);
    run(&mut cpu, |a| a.popa()).unwrap();
    assert_eq!((cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RSP]), (0x1111_eeee, STACK));
    // A stack that faults half way changes no register.
    let mut cpu = protected32();
    cpu.r.seg[seg::SS].limit = STACK as u32 + 15;
    cpu.update_segments();
    let before = cpu.r.gpr;
    assert!(run(&mut cpu, |a| a.popad()).is_err());
    assert_eq!((fault_code(&mut cpu), cpu.r.gpr), ((vector::SS, Some(0)), before));
}

/// Decimal additions and subtractions of all two-digit numbers come out right.
#[test]
fn packed_decimal_arithmetic() {
    let bcd = |n: u64| ((n / 10) << 4) | (n % 10);
    let mut cpu = protected32();
    for a in 0..100u64 {
        for b in 0..100u64 {
            cpu.r.rip = CODE;
            (cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RBX]) = (bcd(a), bcd(b));
            run_bytes(&mut cpu, &[&[0x00, 0xd8], &[0x27]]); // add al, bl; daa
            assert_eq!(cpu.r.gpr[reg::RAX] & 0xff, bcd((a + b) % 100), "{a} + {b}");
            assert_eq!(cpu.r.flags.cf(), a + b >= 100, "{a} + {b}");
            cpu.r.rip = CODE;
            (cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RBX]) = (bcd(a), bcd(b));
            run_bytes(&mut cpu, &[&[0x28, 0xd8], &[0x2f]]); // sub al, bl; das
            assert_eq!(cpu.r.gpr[reg::RAX] & 0xff, bcd((100 + a - b) % 100), "{a} - {b}");
            assert_eq!(cpu.r.flags.cf(), a < b, "{a} - {b}");
            assert_eq!(cpu.r.flags.zf(), a == b);
        }
    }
}

fn run_bytes(cpu: &mut crate::cpu::Cpu, instructions: &[&[u8]]) {
    for bytes in instructions {
        step(cpu, bytes).unwrap();
    }
}

/// A number below 200 as AAA, AAS and AAM make it: tens in AH, ones in AL.
fn unpacked(n: u64) -> u64 {
    ((n / 10) << 8) | (n % 10)
}

#[test]
fn unpacked_decimal_arithmetic() {
    let mut cpu = protected32();
    for a in 0..10u64 {
        for b in 0..10u64 {
            cpu.r.rip = CODE;
            (cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RBX]) = (a, b);
            run_bytes(&mut cpu, &[&[0x00, 0xd8], &[0x37]]); // add al, bl; aaa
            assert_eq!(cpu.r.gpr[reg::RAX], unpacked(a + b));
            assert_eq!((cpu.r.flags.cf(), cpu.r.flags.af()), (a + b > 9, a + b > 9));
            cpu.r.rip = CODE;
            (cpu.r.gpr[reg::RAX], cpu.r.gpr[reg::RBX]) = (0x100 | a, b);
            run_bytes(&mut cpu, &[&[0x28, 0xd8], &[0x3f]]); // sub al, bl; aas
            assert_eq!(cpu.r.gpr[reg::RAX], unpacked(10 + a - b));
            assert_eq!(cpu.r.flags.cf(), a < b);
            cpu.r.rip = CODE;
            cpu.r.gpr[reg::RAX] = a * b;
            run_bytes(&mut cpu, &[&[0xd4, 10]]); // aam
            assert_eq!(cpu.r.gpr[reg::RAX], unpacked(a * b));
            run_bytes(&mut cpu, &[&[0xd5, 10]]); // aad
            assert_eq!(cpu.r.gpr[reg::RAX], a * b);
        }
    }
    assert!(step(&mut cpu, &[0xd4, 0]).is_err());
    assert_eq!(fault_code(&mut cpu), (vector::DE, None));
}

/// (instruction, AX, flags before, AX after, flags after) on a Zen processor, for
/// the flags that the manuals leave undefined.
#[test]
fn decimal_flags_as_on_hardware() {
    use rflags::{AF, CF};
    let cases: &[(u8, u64, u64, u64, u64)] = &[
        (0x27, 0x001a, CF, 0x0080, 0x891),
        (0x27, 0x001b, CF | AF, 0x0081, 0x895),
        (0x2f, 0x0080, AF, 0x007a, 0x810),
        (0x2f, 0x0080, CF | AF, 0x001a, 0x811),
        (0x37, 0x000a, 0, 0x0100, 0x011),
        (0x37, 0x007a, AF, 0x0100, 0x011),
        (0x3f, 0x0006, AF, 0xff00, 0x095),
        (0x3f, 0x0001, CF | AF, 0xfe0b, 0x091),
    ];
    let mut cpu = protected32();
    for (opcode, value, before, value_after, after) in cases {
        cpu.r.gpr[reg::RAX] = *value;
        cpu.set_rflags(*before);
        step(&mut cpu, &[*opcode]).unwrap();
        let got = (cpu.r.gpr[reg::RAX], cpu.r.flags.to_rflags());
        assert_eq!(got, (*value_after, *after), "{opcode:#x} {value:#x} {before:#x}");
    }
}

#[test]
fn bounds() {
    let mut cpu = protected32();
    poke(&cpu, DATA, &[(-5i32).to_le_bytes(), 10i32.to_le_bytes()].concat());
    cpu.r.gpr[reg::RBX] = DATA;
    for (index, good) in [(-6i32, false), (-5, true), (0, true), (10, true), (11, false)] {
        cpu.r.gpr[reg::RAX] = u64::from(index as u32);
        let result = step(&mut cpu, &[0x62, 0x03]); // bound eax, [ebx]
        assert_eq!(result.is_ok(), good);
        if !good {
            assert_eq!(fault_code(&mut cpu), (vector::BR, None));
        }
    }
}

#[test]
fn translate_table_and_carry_byte() {
    let mut cpu = real_mode();
    poke(&cpu, 0x1_0003, &[0x5a]);
    cpu.r.seg[seg::DS].base = 0x1_0000;
    cpu.r.gpr[reg::RBX] = 0xff04;
    cpu.r.gpr[reg::RAX] = 0x77ff;
    step(&mut cpu, &[0xd7]).unwrap(); // xlat: (FF04h + FFh) mod 64K
    assert_eq!(cpu.r.gpr[reg::RAX], 0x775a);
    step(&mut cpu, &[0xf9]).unwrap(); // stc
    step(&mut cpu, &[0xd6]).unwrap(); // salc
    assert_eq!(cpu.r.gpr[reg::RAX], 0x77ff);
}

#[test]
fn virtual_8086_mode_traps_flag_instructions() {
    let mut cpu = real_mode();
    cpu.r.cr0 |= cr0::PE;
    cpu.r.rflags |= rflags::VM;
    cpu.cpl = 3;
    for s in cpu.r.seg.iter_mut() {
        s.ar = 0xf3;
    }
    cpu.update_mode();
    assert_eq!(cpu.mode, Mode::V86);
    for bytes in [&[0x9c][..], &[0x9d], &[0xfa], &[0xfb], &[0xcd, 0x20]] {
        assert!(step(&mut cpu, bytes).is_err());
        assert_eq!(fault_code(&mut cpu), (vector::GP, Some(0)), "{bytes:02x?}");
    }
    cpu.r.rflags |= rflags::IOPL;
    step(&mut cpu, &[0x9c]).unwrap(); // pushf
    step(&mut cpu, &[0xfb]).unwrap(); // sti
    step(&mut cpu, &[0x9d]).unwrap(); // popf: IF as it was, IOPL and VM stay
    assert_eq!(cpu.rflags() & (rflags::IF | rflags::IOPL | rflags::VM), rflags::IOPL | rflags::VM);
    // VEX instructions do not exist here.
    let andn = assemble(32, |a| a.andn(eax, ebx, ecx));
    let i = iced_x86::Decoder::with_ip(32, &andn, 0, 0).decode();
    assert_eq!(cpu.execute_general(&i), Err(Stop));
    assert_eq!(fault_code(&mut cpu), (vector::UD, None));
}
