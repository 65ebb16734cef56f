//! SYSCALL and SYSRETQ: code of the other privilege level goes on in the same run.
//!
//! The vCPU hears of it when generated code calls Rust or ends ([`Frame::crossed`]): its selectors, privilege level
//! and access context follow then. What is not the usual is the interpreter's: masks that leave IF, TF or AC set,
//! interrupts that wait for the return, targets that are not canonical.

use super::cold::Cold;
use super::flags::Flags;
use super::{Emitter, R15, RAX};
use crate::analysis::Guest;
use crate::assembler::{at, host, Hole, Mem};
use crate::frame::{self, exit, field};
use nonroot_interpret::state::rflags;

/// RFLAGS bits that SYSRET loads.
const SYSRET_FLAGS: i32 = 0x3c_7fd7;
/// WRGSBASE RAX.
const WRGSBASE: [u8; 5] = [0xf3, 0x48, 0x0f, 0xae, 0xd8];

impl Emitter<'_> {
    /// `cmp byte [m], value`.
    fn compare_byte(&mut self, m: Mem, value: u8) {
        self.a.mem(false, &[0x80], 7, m);
        self.a.bytes(&[value]);
    }

    /// `mov byte [m], value`.
    fn store_byte(&mut self, m: Mem, value: u8) {
        self.a.mem(false, &[0xc6], 0, m);
        self.a.bytes(&[value]);
    }

    fn interpreted_if(&mut self, from: Vec<Hole>) {
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from, exit });
    }

    /// The saved flags' byte with SF, ZF, AF, PF and CF.
    fn status_byte() -> Mem {
        let flags = field!(flags);
        Mem { disp: flags.disp + 1, ..flags }
    }

    pub(super) fn syscall(&mut self, g: &Guest) {
        self.spoil_live();
        self.count_now();
        self.group = None;
        self.compare_byte(field!(syscalls), 0);
        let hole = self.a.jcc(4);
        self.interpreted_if(vec![hole]);
        self.a.load(true, RAX, field!(code_page));
        self.a.lea(true, host::RCX, at(RAX, g.i.next_ip() as i32));
        // All flags, as in `pushf`.
        self.a.mem(false, &[0x0f, 0xb6], R15, Self::status_byte());
        self.a.mem(false, &[0x0b], R15, field!(rflags));
        self.a.mem(false, &[0x0f, 0xb6], RAX, field!(flags));
        self.a.bytes(&[0xc1, 0xe0, 11]); // shl eax, 11
        self.a.reg(false, &[0x0b], RAX, R15); // or eax, r15d
        self.a.reg_imm(false, 4, RAX, !(rflags::RF as i32));
        self.a.store(true, frame::spilled(11), RAX);
        self.a.mem(false, &[0x23], RAX, field!(syscall_flags)); // and
        self.a.store(false, field!(rflags), RAX);
        self.a.mem(false, &[0x0f, 0xb7], RAX, field!(syscall_status)); // movzx eax, word
        self.a.bytes(&[0x66]);
        self.a.mem(false, &[0x21], RAX, field!(flags)); // and [flags], ax
        self.store_byte(field!(cpl), 0);
        self.store_byte(field!(crossed), 1);
        self.a.load(true, RAX, field!(gs_closed));
        self.a.bytes(&WRGSBASE);
        self.a.load(true, RAX, field!(lstar));
        let windowed = std::mem::replace(&mut self.windowed, false);
        if windowed {
            self.store_byte(field!(window), 0);
        }
        self.jump_to_rax();
        self.windowed = windowed;
    }

    pub(super) fn sysret(&mut self) {
        self.supervisor();
        self.group = None;
        let mut holes = Vec::new();
        self.compare_byte(field!(syscalls), 0);
        holes.push(self.a.jcc(4));
        self.compare_byte(field!(pending), 0);
        holes.push(self.a.jcc(5));
        self.a.mem(true, &[0x83], 7, field!(gs_user)); // cmp qword [gs_user], 0
        self.a.bytes(&[0]);
        holes.push(self.a.jcc(4));
        self.a.mov(R15, host::RCX);
        self.a.bytes(&[0x49, 0xc1, 0xe7, 16]); // shl r15, 16
        self.a.bytes(&[0x49, 0xc1, 0xff, 16]); // sar r15, 16
        self.a.reg(true, &[0x39], R15, host::RCX);
        holes.push(self.a.jcc(5));
        self.a.load(false, R15, frame::spilled(11));
        self.a.bytes(&[0x41, 0xf7, 0xc7]); // test r15d, imm32
        self.a.bytes(&((rflags::TF | rflags::AC) as u32).to_le_bytes());
        holes.push(self.a.jcc(5));
        self.interpreted_if(holes);
        self.a.reg_imm(false, 4, R15, SYSRET_FLAGS);
        self.a.mov(RAX, R15);
        self.a.reg_imm(false, 4, RAX, !(rflags::STATUS as i32));
        self.a.bytes(&[0x83, 0xc8, 2]); // or eax, 2
        self.a.store(false, field!(rflags), RAX);
        self.a.mov(RAX, R15);
        self.a.bytes(&[0xc1, 0xe0, 8]); // shl eax, 8
        self.a.bytes(&[0x41, 0xc1, 0xef, 11]); // shr r15d, 11
        self.a.reg_imm(false, 4, R15, 1);
        self.a.reg(false, &[0x0b], RAX, R15);
        self.a.bytes(&[0x80, 0xcc, 2]); // or ah, 2
        self.a.bytes(&[0x66]);
        self.a.store(false, field!(flags), RAX);
        self.store_byte(field!(cpl), 3);
        self.store_byte(field!(crossed), 2);
        self.a.load(true, RAX, field!(gs_user));
        self.a.bytes(&WRGSBASE);
        self.a.mem(false, &[0x0f, 0xb6], RAX, field!(window_user)); // movzx eax, byte
        self.a.mem(false, &[0x88], RAX, field!(window)); // mov byte
        self.a.reg(false, &[0x85], RAX, RAX);
        self.a.mov(RAX, host::RCX);
        self.a.jcc_to(5, self.routines.jump);
        self.flags = Flags::Saved;
        self.jump_to_rax();
    }
}
