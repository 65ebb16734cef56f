//! Instructions per second of a small synthetic loop in 64-bit mode: a quick
//! check of the run loop, not a benchmark of guests (that is `make bench`).

use iced_x86::code_asm::*;
use nonroot_interpret::state::*;
use nonroot_interpret::{Config, Vcpu};
use nonroot_memory::{Memory, P2M_WRITABLE};
use nonroot_translate::{Switches, Translator};
use std::sync::Arc;

fn main() {
    let memory = Arc::new(Memory::new());
    // SAFETY: a plain system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"ram".as_ptr(), 0) };
    // SAFETY: `fd` is ours.
    assert_eq!(unsafe { libc::ftruncate(fd, 64 << 20) }, 0);
    let backing = memory.add_backing(fd, 64 << 20).unwrap();
    memory.map(0, 16 << 10, backing, 0, P2M_WRITABLE).unwrap();
    // Identity: PML4 at 0x1000, PDPT at 0x2000, one 1 GiB page.
    memory.write(0x1000, &0x2003u64.to_le_bytes()).unwrap();
    memory.write(0x2000, &0x83u64.to_le_bytes()).unwrap();
    let mut a = CodeAssembler::new(64).unwrap();
    let (mut again, mut callee, mut skip) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut again).unwrap();
    a.mov(rax, qword_ptr(rbx + 8 * rsi)).unwrap();
    a.add(rax, rcx).unwrap();
    a.mov(qword_ptr(rbx + 8 * rsi + 64), rax).unwrap();
    a.lea(rdx, qword_ptr(rax + rcx * 4 + 7)).unwrap();
    a.test(dl, 1).unwrap();
    a.je(skip).unwrap();
    a.xor(edx, eax).unwrap();
    a.shr(rdx, 3).unwrap();
    a.set_label(&mut skip).unwrap();
    a.movzx(r8d, byte_ptr(rbx + 5)).unwrap();
    a.call(callee).unwrap();
    a.inc(rsi).unwrap();
    a.and(esi, 255).unwrap();
    a.sub(rcx, 1).unwrap();
    a.jne(again).unwrap();
    a.hlt().unwrap();
    a.set_label(&mut callee).unwrap();
    a.push(rbp).unwrap();
    a.mov(rbp, rsp).unwrap();
    a.add(r8, r9).unwrap();
    a.pop(rbp).unwrap();
    a.ret().unwrap();
    memory.write(0x10_0000, &a.assemble(0x10_0000).unwrap()).unwrap();

    let mut switches = Switches::default();
    for name in std::env::args().skip(1) {
        assert!(switches.switch_off(&name), "no optimisation named {name}");
    }
    let mut vcpu = Vcpu::new(memory, Config::default());
    vcpu.cpu.accelerator = Some(Box::new(Translator::new(switches).unwrap()));
    let r = &mut vcpu.cpu.r;
    r.cr0 |= cr0::PE | cr0::PG;
    r.cr4 |= cr4::PAE;
    r.efer = efer::LME | efer::LMA;
    r.cr3 = 0x1000;
    let data = Segment { base: 0, limit: 0xffff_ffff, ar: 0xc093, selector: 16 };
    r.seg = [data; 6];
    r.seg[seg::CS] = Segment { base: 0, limit: 0xffff_ffff, ar: 0xa09b, selector: 8 };
    r.rip = 0x10_0000;
    r.gpr[reg::RCX] = 5_000_000;
    r.gpr[reg::RBX] = 0x20_0000;
    r.gpr[reg::RSP] = 0x30_0000;
    vcpu.cpu.update_mode();
    let start = std::time::Instant::now();
    let exit = vcpu.run(None, None);
    let seconds = start.elapsed().as_secs_f64();
    let n = vcpu.cpu.retired;
    println!("{exit:?} after {n} instructions, {:.1} million/s", n as f64 / seconds / 1e6);
}
