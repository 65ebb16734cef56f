//! Random instructions of every kind, run by the general executor and by the
//! host, compared register by register, flag by flag, byte by byte.

use super::generate::{codes, instruction, registers, NUMBERS};
use super::host::{Host, HostState, WINDOW};
use crate::cpu::Cpu;
use crate::state::*;
use crate::testing::{long_mode, peek, poke, protected32, step, Rng, CODE, DATA, STACK};
use iced_x86::{Encoder, Instruction, Mnemonic as M, OpKind};
use std::sync::atomic::Ordering;
use std::sync::Mutex;

/// Flags and results that the manuals leave undefined: compared only where the
/// host is of the make whose values the executor follows.
fn undefined(i: &Instruction, s: &HostState) -> (u64, bool) {
    use rflags::*;
    let size = match i.op0_kind() {
        OpKind::Register => i.op0_register().size(),
        _ => i.memory_size().size(),
    };
    let count = |n: u32| {
        let raw = if i.op_kind(n) == OpKind::Register { s.gpr[reg::RCX] } else { i.immediate(n) };
        raw & if size == 8 { 63 } else { 31 }
    };
    match i.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar => {
            let n = count(1);
            let mut f = AF;
            if n != 1 {
                f |= OF;
            }
            if n >= 8 * size as u64 {
                f |= CF;
            }
            (f, false)
        }
        M::Rol | M::Ror | M::Rcl | M::Rcr => (if count(1) == 1 { 0 } else { OF }, false),
        M::Shld | M::Shrd => {
            let n = count(2);
            if n > 8 * size as u64 {
                return (STATUS, true);
            }
            (AF | if n == 1 { 0 } else { OF }, false)
        }
        M::Mul | M::Imul => (SF | ZF | AF | PF, false),
        M::Div | M::Idiv => (STATUS, false),
        M::And | M::Or | M::Xor | M::Test => (AF, false),
        M::Bsf | M::Bsr => (STATUS & !ZF, true),
        M::Bt | M::Bts | M::Btr | M::Btc => (OF | SF | AF | PF, false),
        M::Tzcnt | M::Lzcnt => (OF | SF | AF | PF, false),
        M::Andn | M::Blsi | M::Blsr | M::Blsmsk | M::Bzhi => (AF | PF, false),
        M::Bextr => (AF | PF | SF, false),
        M::Bswap if size == 2 => (0, true),
        M::Cmpxchg if size == 4 => (0, true),
        _ => (0, false),
    }
}

fn host_is_amd() -> bool {
    // SAFETY: CPUID exists on every x86-64 processor.
    #[allow(unused_unsafe)]
    let id = unsafe { std::arch::x86_64::__cpuid(0) };
    id.ebx == u32::from_le_bytes(*b"Auth")
}

/// The address of the data window is fixed: one comparison at a time.
static WINDOW_OWNER: Mutex<()> = Mutex::new(());

/// Executes the instruction in `bytes` at [`CODE`] to its end: in the general
/// executor, or as the run loop does (with its specialised operations).
fn execute(cpu: &mut Cpu, rng: &mut Rng, bytes: &[u8], run_loop: bool) -> Result<(), Option<Fault>> {
    if run_loop {
        poke(cpu, CODE, bytes);
        cpu.config.exception_exits = u32::MAX;
        while cpu.r.rip == CODE {
            let limit = cpu.retired + rng.pick(&[1, 5, 64]);
            // The following byte is an INT3, which stops the loop.
            match cpu.run(None, Some(limit)) {
                Exit::Interrupted => {}
                Exit::Exception { vector, error, address } => {
                    if cpu.r.rip == CODE {
                        return Err(Some(Fault { vector, error, address, trap: false, dr6: 0 }));
                    }
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        return Ok(());
    }
    loop {
        // Repetitions are cut at random places and go on there.
        cpu.rep_budget = rng.pick(&[1, 5, 64, u64::MAX]);
        cpu.mailbox.requests.store(0, Ordering::Relaxed);
        match step(cpu, bytes) {
            Ok(()) => return Ok(()),
            Err(Stop) => match cpu.stop.take() {
                Some(StopReason::Restart) => {}
                Some(StopReason::Fault(fault)) => return Err(Some(fault)),
                _ => return Err(None),
            },
        }
    }
}

/// Runs `rounds` random instructions from `seed`; returns how many were compared.
fn compare(seed: u64, rounds: usize, run_loop: bool) -> usize {
    let _owner = WINDOW_OWNER.lock().unwrap_or_else(|e| e.into_inner());
    let codes = codes(64);
    let mut rng = Rng(seed);
    let mut host = Host::new();
    let mut cpu = long_mode();
    let exact = host_is_amd();
    let mut compared = 0;
    for round in 0..rounds {
        let code = codes[(round + seed as usize) % codes.len()];
        let Some(i) = instruction(&mut rng, code, 64) else { continue };
        let state = registers(&mut rng, &i, 64);
        let bits = matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc);
        if bits && i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register {
            let n = i.op1_register().full_register().number();
            if [reg::RSI, reg::RDI].contains(&n) {
                continue;
            }
        }
        let mut encoder = Encoder::new(64);
        if encoder.encode(&i, cpu.r.rip).is_err() {
            continue;
        }
        let bytes = encoder.take_buffer();

        let sparse = rng.below(3) == 0;
        let mut fill = vec![0u8; WINDOW];
        if !sparse {
            fill.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()));
        }
        poke(&cpu, DATA, &fill);
        host.window().copy_from_slice(&fill);

        cpu.config.optimise.bulk_strings = rng.below(4) != 0;
        let rsp = cpu.r.gpr[reg::RSP];
        cpu.r.gpr[..16].copy_from_slice(&state.gpr);
        cpu.r.gpr[reg::RSP] = rsp;
        cpu.set_rflags(state.flags);
        let context = || format!("seed {seed} round {round}: {:?} {bytes:02x?} {i:?}\n{state:x?}", i.code());
        cpu.r.rip = CODE;
        let mut code = bytes.clone();
        code.push(0xcc);
        let code = if run_loop { &code } else { &bytes };
        if let Err(fault) = execute(&mut cpu, &mut rng, code, run_loop) {
            let division = matches!(i.mnemonic(), M::Div | M::Idiv);
            let expected = division && fault.as_ref().is_some_and(|f| f.vector == vector::DE);
            assert!(expected, "{}\n{fault:?}", context());
            assert_eq!(&cpu.r.gpr[..4], &state.gpr[..4], "{}", context());
            cpu.r.gpr[reg::RSP] = rsp;
            continue;
        }
        let mut after = state.clone();
        host.execute(&bytes, &mut after);

        let (mut flags, result) = undefined(&i, &state);
        if exact {
            flags = 0;
        }
        let ours = HostState {
            gpr: std::array::from_fn(|n| cpu.r.gpr[n]),
            flags: cpu.rflags() & !flags | after.flags & flags,
        };
        if exact || !result {
            for n in NUMBERS {
                let n = *n as usize;
                assert_eq!(
                    ours.gpr[n],
                    after.gpr[n],
                    "register {n}: {}\nours {ours:x?}\nhost {after:x?}",
                    context()
                );
            }
        }
        assert_eq!(ours.flags, after.flags, "flags: {}\nours {ours:x?}\nhost {after:x?}", context());
        let mut memory = vec![0; WINDOW];
        cpu.mem.read(DATA, &mut memory).unwrap();
        if let Some(at) = (0..WINDOW).find(|n| memory[*n] != host.window()[*n]) {
            panic!("memory at {at:#x}: {}", context());
        }
        cpu.r.gpr[reg::RSP] = rsp;
        compared += 1;
    }
    compared
}

fn random_instructions(run_loop: bool) {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let rounds = number("NONROOT_TEST_ROUNDS", 50_000) as usize;
    let seed = number("NONROOT_TEST_SEED", 1);
    assert!(codes(64).len() > 450, "only {} instruction codes are tested", codes(64).len());
    let compared = compare(seed, rounds, run_loop);
    assert!(compared * 10 > rounds * 8, "only {compared} of {rounds} instructions were compared");
}

#[test]
fn random_instructions_agree_with_the_host() {
    random_instructions(false);
}

#[test]
fn random_instructions_in_the_run_loop_agree_with_the_host() {
    random_instructions(true);
}

/// 32-bit mode, where the host cannot be asked: the run loop and the general
/// executor must agree.
#[test]
fn thirty_two_bit_instructions_agree_in_both_executors() {
    let codes = codes(32);
    assert!(codes.len() > 250, "only {} instruction codes are tested", codes.len());
    let mut rng = Rng(3);
    let (mut plain, mut looped) = (protected32(), protected32());
    let mut compared = 0;
    for round in 0..20_000 {
        let Some(i) = instruction(&mut rng, codes[round % codes.len()], 32) else { continue };
        let state = registers(&mut rng, &i, 32);
        let mut encoder = Encoder::new(32);
        if encoder.encode(&i, CODE).is_err() {
            continue;
        }
        let mut bytes = encoder.take_buffer();
        bytes.push(0xcc);
        let mut fill = vec![0u8; WINDOW];
        fill.chunks_exact_mut(8).for_each(|c| c.copy_from_slice(&rng.next().to_le_bytes()));
        let mut results = Vec::new();
        for (cpu, run_loop) in [(&mut plain, false), (&mut looped, true)] {
            poke(cpu, DATA, &fill);
            cpu.r.gpr[..8].copy_from_slice(&state.gpr[..8]);
            cpu.r.gpr[reg::RSP] = STACK;
            cpu.r.rip = CODE;
            cpu.set_rflags(state.flags);
            let result = execute(cpu, &mut rng, &bytes, run_loop);
            let registers: [u64; 8] = std::array::from_fn(|n| cpu.r.gpr[n]);
            results.push((result, registers, cpu.rflags(), peek(cpu, DATA, WINDOW)));
        }
        assert!(
            results[0] == results[1],
            "round {round}: {:?} {bytes:02x?}\n{state:x?}\n{:x?}\n{:x?}",
            i.code(),
            (&results[0].0, results[0].1, results[0].2),
            (&results[1].0, results[1].1, results[1].2)
        );
        compared += u32::from(results[0].0.is_ok());
    }
    assert!(compared > 15_000, "only {compared}");
}
