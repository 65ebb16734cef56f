//! The audit finds what is planted, and nothing where all is well.

use super::*;
use crate::audit::Audit;
use crate::walk::{Access, Kind};
use nonroot_memory::{P2M_DIRTY, P2M_FLAGS};

/// A linear page of its own, mapped by a 4 KiB entry at [`PT`].
const LIN: u64 = 0x4000_0000;
const PT: u64 = 0x10_1000;
const FRAME: u64 = 0x20_0000;

fn audited() -> Box<Cpu> {
    let mut cpu = long_mode();
    let put = |at: u64, value: u64| poke(&cpu, at, &value.to_le_bytes());
    put(0x2008, 0x10_0007);
    put(0x10_0000, PT | 7);
    put(PT, FRAME | 7);
    put(PT + 8, (FRAME + 0x1000) | 5);
    cpu.audit = Audit::new(1);
    cpu.memory_changed();
    cpu.flush_tlb_all();
    cpu
}

fn host(cpu: &Cpu, gpa: u64) -> u64 {
    cpu.mem.entry(gpa >> 12) & !P2M_FLAGS
}

fn load(cpu: &mut Cpu, lin: u64) -> u64 {
    cpu.load_lin(seg::DS, lin, 1).unwrap()
}

fn store(cpu: &mut Cpu, lin: u64) {
    cpu.store_lin(seg::DS, lin, 8, 0).unwrap();
}

/// What the audit says, if anything.
fn audit(cpu: &mut Cpu) -> Option<String> {
    cpu.audit_now();
    cpu.pending_exits.pop().map(|exit| match exit {
        Exit::Failure { reason } => reason,
        other => panic!("{other:?}"),
    })
}

fn finds(cpu: &mut Cpu, what: &str) {
    let found = audit(cpu).expect("nothing was found");
    assert!(found.contains(what), "{found}");
    assert_eq!(audit(cpu), None, "one report is enough");
}

#[test]
fn nothing_is_wrong() {
    let mut cpu = audited();
    poke(&cpu, FRAME + 0x1000, &[0x90, 0xf4]);
    load(&mut cpu, LIN);
    store(&mut cpu, LIN);
    load(&mut cpu, LIN + 0x1000);
    store(&mut cpu, 0x30_0000);
    cpu.r.rip = LIN + 0x1000;
    cpu.find_block().unwrap();
    assert_eq!(audit(&mut cpu), None);
    let audit_ = cpu.audit.as_ref().unwrap();
    assert!(audit_.entries >= 4 && audit_.blocks == 1 && audit_.stale == 0);
}

#[test]
fn a_stale_translation_is_allowed_until_it_is_invalidated() {
    let mut cpu = audited();
    load(&mut cpu, LIN);
    poke(&cpu, PT, &((FRAME + 0x2000) | 7).to_le_bytes());
    assert_eq!(audit(&mut cpu), None);
    assert_eq!(cpu.audit.as_ref().unwrap().stale, 1);
    let old = host(&cpu, FRAME);
    cpu.r.gpr[reg::RAX] = LIN;
    ok(&mut cpu, &[0x0f, 0x01, 0x38]); // INVLPG [RAX]
    assert_eq!(audit(&mut cpu), None);
    cpu.tlb.enter(LIN, old, false, false);
    finds(&mut cpu, "0x40000000 (supervisor with access to user pages, readable, PCID 0)");
}

#[test]
fn wrong_translations_are_found() {
    for (lin, gpa, write, global, what) in [
        (LIN, FRAME + 0x1000, false, false, "the p2m leads elsewhere"),
        (LIN, FRAME, true, false, "its dirty bit was not set"),
        (LIN + 0x1000, FRAME + 0x1000, true, false, "it is read-only"),
        (LIN, FRAME, false, true, "no walk gave it"),
        (LIN + 0x2000, FRAME, false, false, "no walk gave it"),
    ] {
        let mut cpu = audited();
        load(&mut cpu, LIN);
        load(&mut cpu, LIN + 0x1000);
        assert_eq!(audit(&mut cpu), None);
        cpu.tlb.enter(lin, host(&cpu, gpa), write, global);
        finds(&mut cpu, what);
    }
}

#[test]
fn what_must_not_be_written_unnoticed_is_found() {
    let mut cpu = audited();
    store(&mut cpu, LIN);
    cpu.mem.clear_flags(FRAME >> 12, P2M_DIRTY);
    finds(&mut cpu, "that is not in the dirty log");
    let mut cpu = audited();
    store(&mut cpu, LIN);
    cpu.r.rip = LIN;
    cpu.find_block().unwrap();
    assert_eq!(audit(&mut cpu), None);
    cpu.tlb.enter(LIN, host(&cpu, FRAME), true, false);
    finds(&mut cpu, "that holds decoded code");
}

#[test]
fn pages_of_others_are_found() {
    let mut cpu = audited();
    poke(&cpu, PT, &(FRAME | 3).to_le_bytes());
    load(&mut cpu, LIN);
    assert_eq!(audit(&mut cpu), None);
    cpu.cpl = 3;
    cpu.update_mode();
    cpu.tlb.enter(LIN, host(&cpu, FRAME), false, false);
    finds(&mut cpu, "it is a supervisor's page");
}

#[test]
fn code_that_changed_unnoticed_is_found() {
    let mut cpu = audited();
    poke(&cpu, FRAME, &[0x90, 0xf4]);
    cpu.r.rip = LIN;
    cpu.find_block().unwrap();
    assert_eq!(audit(&mut cpu), None);
    // SAFETY: a byte of guest memory that nothing else uses now.
    unsafe { *(host(&cpu, FRAME) as *mut u8) = 0xcc };
    finds(&mut cpu, "block 0x200000 was decoded from [90, f4], memory holds [cc, f4]");
    // Noticed, it is no error.
    let mut cpu = audited();
    poke(&cpu, FRAME, &[0x90, 0xf4]);
    cpu.r.rip = LIN;
    cpu.find_block().unwrap();
    poke(&cpu, FRAME, &[0xcc]);
    assert_eq!(audit(&mut cpu), None);
    cpu.memory_changed();
    assert_eq!(audit(&mut cpu), None);
}

#[test]
fn jumps_into_nothing_are_found() {
    let mut cpu = audited();
    load(&mut cpu, LIN);
    let mode = cpu.cache.mode_key;
    cpu.tlb.enter_jump(LIN, 0x1234, mode, false);
    finds(&mut cpu, "jump entry 0x40000000 leads to 0x1234");
}

#[test]
fn invpcid_of_an_address_reaches_other_address_spaces() {
    let mut cpu = audited();
    cpu.features.invpcid = true;
    cpu.features.cr4 |= cr4::PCIDE;
    let cr4 = cpu.r.cr4 | cr4::PCIDE;
    cpu.write_cr4(cr4).unwrap();
    poke(&cpu, FRAME, &[1]);
    poke(&cpu, FRAME + 0x2000, &[2]);
    cpu.write_cr3(0x1001).unwrap();
    assert_eq!(load(&mut cpu, LIN), 1);
    cpu.write_cr3(0x1002).unwrap();
    poke(&cpu, PT, &((FRAME + 0x2000) | 7).to_le_bytes());
    // INVPCID RCX, [RAX]: type 0, PCID 1.
    (cpu.r.gpr[reg::RCX], cpu.r.gpr[reg::RAX]) = (0, 0x5_0000);
    poke(&cpu, 0x5_0000, &1u64.to_le_bytes());
    poke(&cpu, 0x5_0008, &LIN.to_le_bytes());
    ok(&mut cpu, &[0x66, 0x0f, 0x38, 0x82, 0x08]);
    cpu.write_cr3(1 << 63 | 0x1001).unwrap();
    assert_eq!(load(&mut cpu, LIN), 2);
    assert_eq!(audit(&mut cpu), None);
}

#[test]
fn blocks_of_an_address_space_whose_number_is_used_again_are_forgotten() {
    let mut cpu = audited();
    cpu.audit = None;
    poke(&cpu, FRAME, &[0x90, 0xf4]);
    poke(&cpu, FRAME + 0x2000, &[0xcc]);
    cpu.r.rip = LIN;
    let (asid, first) = (cpu.tlb.asid, cpu.find_block().unwrap());
    poke(&cpu, PT, &((FRAME + 0x2000) | 7).to_le_bytes());
    for _ in 0..3 * 4096 {
        cpu.write_cr3(0x1000).unwrap();
        if cpu.tlb.asid == asid {
            assert_ne!(cpu.find_block().unwrap(), first);
        }
        let access = Access { kind: Kind::Execute, system: false };
        assert_eq!(cpu.translate(LIN, access).unwrap().gpa, FRAME + 0x2000);
    }
}
