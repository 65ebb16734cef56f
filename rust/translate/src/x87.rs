//! The x87 and MMX state: the guest's while [`Frame::x87`] is 1.
//!
//! It is loaded by the first block that needs it and stored when generated code
//! ends, by XRSTOR and XSAVE of this component alone. That is done only while
//! the guest masks all x87 exceptions, so nothing is ever pending. The host's
//! pointers mean nothing to the guest: its own are kept in the frame, which
//! generated code updates. A call of Rust in between finds the host's control
//! word, but the guest's registers: no Rust uses those.

use crate::assembler::{at, host, Assembler, Mem};
#[cfg(doc)]
use crate::frame::Frame;
use crate::frame::{below, field};
use nonroot_native::state::fx;
use nonroot_native::VectorState;
use std::mem::offset_of;

/// `[r15 + ...]`: a field of the guest's image.
fn image(offset: usize) -> Mem {
    at(host::R15, (offset_of!(VectorState, fx) + offset) as i32)
}

/// RDX:RAX, the state components that XSAVE and XRSTOR are for: x87.
fn component(a: &mut Assembler) {
    a.bytes(&[0xb8, 1, 0, 0, 0]); // mov eax, 1
    a.bytes(&[0x31, 0xd2]); // xor edx, edx
}

fn control(a: &mut Assembler, load: bool, m: Mem) {
    a.mem(false, &[0xd9], if load { 5 } else { 7 }, m); // fldcw, fnstcw
}

/// Loads the guest's state, inside a called routine. Spoils RAX, R15 and the flags.
pub fn load(a: &mut Assembler) {
    a.store(true, below(field!(saved)), host::RDX);
    a.load(true, host::R15, below(field!(fpu)));
    for (offset, to) in [(fx::FIP, field!(x87_ip)), (fx::FDP, field!(x87_dp))] {
        a.load(true, host::RAX, image(offset));
        a.store(true, below(to), host::RAX);
    }
    a.mem(false, &[0x0f, 0xb7], host::RAX, image(fx::FOP)); // movzx eax, word
    a.store(false, below(field!(x87_opcode)), host::RAX);
    control(a, false, below(field!(host_control)));
    component(a);
    a.mem(true, &[0x0f, 0xae], 5, image(0)); // xrstor64
    a.load(true, host::RDX, below(field!(saved)));
    a.mem(false, &[0xc6], 0, below(field!(x87))); // mov byte [x87], 1
    a.bytes(&[1]);
}

/// Stores the guest's state if it is loaded. Spoils RAX, RDX, R15 and the flags.
pub fn store(a: &mut Assembler) {
    a.mem(false, &[0x80], 7, field!(x87)); // cmp byte [x87], 0
    a.bytes(&[0]);
    let none = a.jcc(4);
    a.load(true, host::R15, field!(fpu));
    component(a);
    a.mem(true, &[0x0f, 0xae], 4, image(0)); // xsave64
    a.store_imm_wide(at(host::R15, offset_of!(VectorState, header) as i32), 1);
    for (from, offset) in [(field!(x87_ip), fx::FIP), (field!(x87_dp), fx::FDP)] {
        a.load(true, host::RAX, from);
        a.store(true, image(offset), host::RAX);
    }
    a.load(false, host::RAX, field!(x87_opcode));
    a.bytes(&[0x66]);
    a.store(false, image(fx::FOP), host::RAX);
    a.bytes(&[0xdb, 0xe3]); // fninit
    control(a, true, field!(host_control));
    a.mem(false, &[0xc6], 0, field!(x87)); // mov byte [x87], 0
    a.bytes(&[0]);
    let here = a.here();
    a.fill(none, here);
}

/// Before a call of Rust, inside a called routine.
pub fn suspend(a: &mut Assembler) {
    a.mem(false, &[0x80], 7, below(field!(x87)));
    a.bytes(&[0]);
    let none = a.jcc(4);
    control(a, false, below(field!(guest_control)));
    control(a, true, below(field!(host_control)));
    let here = a.here();
    a.fill(none, here);
}

/// After it. Spoils the flags only.
pub fn resume(a: &mut Assembler) {
    a.mem(false, &[0x80], 7, below(field!(x87)));
    a.bytes(&[0]);
    let none = a.jcc(4);
    control(a, true, below(field!(guest_control)));
    let here = a.here();
    a.fill(none, here);
}
