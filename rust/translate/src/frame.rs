//! What generated code keeps in memory, and the code that enters and leaves it.
//!
//! While generated code runs, RSP points at a [`Frame`] at the top of a stack of
//! its own, GS points at the current TLB [`Set`](nonroot_interpret::tlb::Set), and
//! the other host registers hold the guest's ([`HOST_OF`]); RAX and R15 are scratch.

use crate::assembler::{at, host, Assembler, Mem};
use crate::x87;
use nonroot_interpret::cpu::Cpu;
use nonroot_interpret::tlb;
use nonroot_interpret::window::Part;
use nonroot_native::VectorState;
use std::mem::offset_of;

/// The host register of each guest register; `None`: its home is [`Frame::spilled`].
pub const HOST_OF: [Option<u8>; 16] = [
    Some(host::R14),
    Some(host::RCX),
    Some(host::RDX),
    Some(host::RBX),
    Some(host::R11),
    Some(host::RBP),
    Some(host::RSI),
    Some(host::RDI),
    Some(host::R8),
    Some(host::R9),
    Some(host::R10),
    None,
    Some(host::R12),
    Some(host::R13),
    None,
    None,
];

/// Index in [`Frame::spilled`] of guest registers without a host register.
pub fn spill_slot(guest: u8) -> usize {
    match guest {
        11 => 0,
        14 => 1,
        _ => 2,
    }
}

/// Why generated code ended.
pub mod exit {
    /// The interpreter is to execute the instruction at [`super::Frame::offset`].
    pub const SINGLE: u32 = 0;
    /// Nothing of the block at the offset has run; the interpreter is to run it.
    pub const BLOCK: u32 = 1;
    /// A jump inside the page, through [`super::Frame::link`].
    pub const CHAIN: u32 = 2;
    /// The next instruction is at the offset.
    pub const NEXT: u32 = 3;
    /// The next instruction is at [`super::Frame::rip`].
    pub const LOOKUP: u32 = 4;
    /// As SINGLE; a lookup for several instructions failed, in the block [`super::Frame::link`].
    pub const WIDE: u32 = 5;
    /// An interpreted instruction ended with an exit; the vCPU has all state.
    pub const EXIT: u32 = 6;
    /// As SINGLE; an access by a window failed, in the block [`super::Frame::link`].
    pub const WINDOW: u32 = 7;
}

/// The context of generated code.
#[repr(C, align(64))]
pub struct Frame {
    /// Guest registers without a host register.
    pub spilled: [u64; 3],
    /// Saved status flags: OF in the low byte, SF ZF AF PF CF as LAHF gives them in the high one.
    pub flags: u16,
    /// Bit 0: vector registers are the guest's; bit 1: AVX may be used.
    pub vectors: u8,
    /// What `vectors` may become.
    pub vectors_allowed: u8,
    /// Instructions that may still run.
    pub budget: i32,
    /// Linear address of the page that runs.
    pub code_page: u64,
    /// RFLAGS without the status flags.
    pub rflags: u32,
    /// Current privilege level.
    pub cpl: u8,
    /// Bit 0: FS, bit 1: GS are 4 GiB data segments (32-bit mode).
    pub segments: u8,
    /// An interrupt waits for RFLAGS.IF.
    pub pending: u8,
    /// 1: the x87 state is the guest's.
    pub x87: u8,
    /// Linear bases of FS and GS.
    pub base: [u64; 2],
    /// Scratch.
    pub temporary: u64,
    /// What a register was that flags are to be made from.
    pub stash: u64,
    /// See [`exit`].
    pub kind: u32,
    /// Offset in the page of the guest instruction that comes next.
    pub offset: u32,
    /// Correction of the budget.
    pub adjust: i32,
    /// The jump that may be chained.
    pub link: u32,
    /// Guest instruction pointer of a lookup that failed.
    pub rip: u64,
    /// Guest registers of the interpreter.
    pub gpr: *mut u64,
    /// The vCPU.
    pub cpu: *mut Cpu,
    /// Its vector registers.
    pub fpu: *mut VectorState,
    /// Host stack pointer.
    pub host_rsp: u64,
    /// GS base to run with.
    pub gs: u64,
    /// Code to run.
    pub code: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs: u64,
    /// GS base with RFLAGS.AC clear and set, for the present privilege level.
    pub gs_closed: u64,
    /// See above.
    pub gs_open: u64,
    /// The interpreted block to run.
    pub callee: u64,
    /// Retired instructions at which to end.
    pub until: u64,
    /// Instructions that ran here so far, but for those since the budget was last set.
    pub ran: u64,
    /// Interpreted blocks that were called.
    pub called: u64,
    /// Host MXCSR.
    pub mxcsr: u32,
    /// What the budget was set to.
    pub granted: i32,
    /// Caller-saved registers around a call of Rust.
    pub saved: [u64; 8],
    /// The guest's x87 instruction and data pointers while its x87 state is loaded.
    pub x87_ip: u64,
    /// See above.
    pub x87_dp: u64,
    /// Its last opcode.
    pub x87_opcode: u32,
    /// Host x87 control word.
    pub host_control: u16,
    /// The guest's, around a call of Rust.
    pub guest_control: u16,
    /// What `x87` may become.
    pub x87_allowed: u8,
    /// 1: SYSCALL and SYSRETQ run here.
    pub syscalls: u8,
    /// The privilege level was last changed by: 0 nothing, 1 SYSCALL, 2 SYSRETQ. The vCPU does not know yet.
    pub crossed: u8,
    /// Bit 0: RDTSC is allowed at any privilege level; bit 1: RDTSCP too.
    pub time_stamps: u8,
    /// IA32_TSC_AUX.
    pub tsc_aux: u32,
    /// Saved status flags that SYSCALL keeps.
    pub syscall_status: u16,
    /// Other flags that it keeps.
    pub syscall_flags: u32,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// Host minus guest address of what MOVS and STOS read and write.
    pub string: [u64; 2],
    /// GS base at privilege level 3; 0: none for 64-bit code now.
    pub gs_user: u64,
    /// The TLB set of code that uses the windows, whose GS base is theirs.
    pub set: u64,
    /// The bits of an address that tell which window it is in.
    pub window_mask: u64,
    /// The bits of an address that are the host's where it may be in either window.
    pub either_mask: u64,
    /// A guest address that turned out to be in another window than was thought; 0: none.
    pub strayed: u64,
    /// RAX, R15 and RFLAGS around a page that is missed in a window.
    pub missed: [u64; 3],
    /// 1: the code that runs uses the windows.
    pub window: u8,
    /// 1: code at privilege level 3 does.
    pub window_user: u8,
}

macro_rules! field {
    ($field:ident) => {
        crate::assembler::at(
            crate::assembler::host::RSP,
            std::mem::offset_of!(crate::frame::Frame, $field) as i32,
        )
    };
}
pub(crate) use field;

/// Where a guest register without a host register lives.
pub fn spilled(guest: u8) -> Mem {
    at(host::RSP, (offset_of!(Frame, spilled) + 8 * spill_slot(guest)) as i32)
}

/// The number, in place of a guest register's, of [`Frame::stash`].
pub const STASH: u8 = 16;

/// The host register of a guest register, if it has one.
pub fn host_of(guest: u8) -> Option<u8> {
    HOST_OF.get(guest as usize).copied().flatten()
}

/// Where a guest register without a host register lives, or the stash.
pub fn home(guest: u8) -> Mem {
    if guest == STASH {
        field!(stash)
    } else {
        spilled(guest)
    }
}

/// Where the base of FS (0) or GS (1) is.
pub fn segment_base(n: usize) -> Mem {
    at(host::RSP, (offset_of!(Frame, base) + 8 * n) as i32)
}

/// The same field seen from inside a called routine.
pub(crate) fn below(m: Mem) -> Mem {
    Mem { disp: m.disp + 8, ..m }
}

/// Offsets of the common routines in the arena.
#[derive(Clone, Copy, Debug, Default)]
pub struct Routines {
    /// `extern "sysv64" fn(*mut Frame)`: runs [`Frame::code`] until an exit.
    pub enter: usize,
    /// Leaves, with the guest's flags in the host's.
    pub leave_live: usize,
    /// Leaves, with the guest's flags in [`Frame::flags`].
    pub leave: usize,
    /// Leaves with [`exit::LOOKUP`]; RAX: instruction pointer.
    pub lookup_failed: usize,
    /// TLB miss: RAX: linear address, R15D: bytes, and bit 31 for a write. EAX: 0 if it was entered.
    pub refill: usize,
    /// RAX: the guest's time-stamp counter.
    pub time_stamp: usize,
    /// Gives the guest its vector registers.
    pub load_vectors: usize,
    /// Gives the guest its x87 state.
    pub load_x87: usize,
    /// Goes to the code of the instruction pointer in RAX, if it is known; flags are saved.
    pub jump: usize,
    /// A page that is missed in a window: RAX: linear address, R15D: see [`missed`]. EAX: 0 if it is there now.
    pub missed: usize,
    /// Has [`Frame::callee`] interpreted, which is at [`Frame::offset`], and goes on; flags are saved.
    pub callout: usize,
}

/// Moves flags from the host's into [`Frame::flags`]; spoils RAX.
pub fn save_flags(a: &mut Assembler) {
    a.bytes(&[0x9f, 0x0f, 0x90, 0xc0]); // lahf; seto al
    a.bytes(&[0x66]);
    a.store(false, field!(flags), host::RAX);
}

/// Moves flags from [`Frame::flags`] into the host's; spoils RAX.
pub fn restore_flags(a: &mut Assembler) {
    a.mem(false, &[0x0f, 0xb7], host::RAX, field!(flags)); // movzx eax, word
    a.bytes(&[0x04, 0x7f, 0x9e]); // add al, 0x7f; sahf
}

const CALLEE_SAVED: [u8; 6] = [host::RBX, host::RBP, host::R12, host::R13, host::R14, host::R15];
const CALLER_SAVED: [u8; 8] =
    [host::RCX, host::RDX, host::RSI, host::RDI, host::R8, host::R9, host::R10, host::R11];

fn vector_moves(a: &mut Assembler, base: u8, store: bool, avx: bool) {
    for n in 0..16u8 {
        let m = at(base, offset_of!(VectorState, ymm) as i32 + 32 * i32::from(n));
        if avx {
            // VEX.256.0F.WIG 10/11 (vmovups).
            a.bytes(&[0xc4, 0x61 | u8::from(n < 8) << 7 | u8::from(base < 8) << 5, 0x7c]);
            a.mem_without_rex(if store { 0x11 } else { 0x10 }, n, m);
        } else {
            a.mem(false, if store { &[0x0f, 0x11] } else { &[0x0f, 0x10] }, n, m);
        }
    }
}

fn mxcsr(a: &mut Assembler, load: bool, m: Mem) {
    a.mem(false, &[0x0f, 0xae], if load { 2 } else { 3 }, m);
}

/// Fills the TLB for an access; 0 if it was.
pub type Refill = unsafe extern "sysv64" fn(*mut Frame, u64, u32) -> u32;
/// What the argument of [`Routines::missed`] says besides the access's bytes.
pub mod missed {
    /// It is a write.
    pub const WRITE: u32 = 1 << 31;
    /// The address is not what it was thought to be.
    pub const STRAYED: u32 = 1 << 30;
    /// It was thought to be in the lower window.
    pub const LOW: u32 = 1 << 29;
    /// It is that of the stack.
    pub const STACK: u32 = 1 << 28;
    /// It was thought to be in one of the windows.
    pub const EITHER: u32 = 1 << 27;
}

/// The guest's time-stamp counter.
pub type TimeStamp = unsafe extern "sysv64" fn(*const Frame) -> u64;
/// Runs [`Frame::callee`]: 0 to leave.
pub type Callout = unsafe extern "sysv64" fn(*mut Frame) -> u32;

fn registers_from_frame(a: &mut Assembler) {
    a.load(true, host::RAX, field!(gpr));
    for guest in 0..16u8 {
        let from = at(host::RAX, 8 * i32::from(guest));
        match HOST_OF[guest as usize] {
            Some(reg) => a.load(true, reg, from),
            None => {
                a.load(true, host::R15, from);
                a.store(true, spilled(guest), host::R15);
            }
        }
    }
}

/// Stores the guest's registers, the vector registers too if they are loaded.
fn registers_to_frame(a: &mut Assembler, avx: bool) {
    a.load(true, host::RAX, field!(gpr));
    for guest in 0..16u8 {
        let to = at(host::RAX, 8 * i32::from(guest));
        match HOST_OF[guest as usize] {
            Some(reg) => a.store(true, to, reg),
            None => {
                a.load(true, host::R15, spilled(guest));
                a.store(true, to, host::R15);
            }
        }
    }
    x87::store(a);
    a.mem(false, &[0x80], 7, field!(vectors)); // cmp byte [vectors], 0
    a.bytes(&[0]);
    let none = a.jcc(4);
    a.load(true, host::RAX, field!(fpu));
    store_vectors(a, host::RAX, avx, field!(mxcsr));
    a.mem(false, &[0xc6], 0, field!(vectors)); // mov byte [vectors], 0
    a.bytes(&[0]);
    let here = a.here();
    a.fill(none, here);
}

/// Looks at each way of the instruction pointer in RAX.
fn jump_ways(a: &mut Assembler, failed: usize, windowed: bool) {
    jump_hash(a, windowed);
    for way in 0..tlb::JUMP_WAYS {
        if way > 0 {
            // From way - 1 to way.
            a.bytes(&[0x49, 0x83, 0xf7, (16 * (way ^ (way - 1))) as u8]); // xor r15, imm8
        }
        jump_compare(a, windowed);
        let next = a.jcc(5);
        jump_take(a, windowed);
        let here = a.here();
        a.fill(next, here);
    }
    a.jmp_to(failed);
}

/// `opcode reg, [m]`, where R15 in it is the offset in the present set, or with windows the address there.
pub fn in_set(a: &mut Assembler, wide: bool, opcode: &[u8], reg: u8, m: Mem, windowed: bool) {
    if windowed {
        a.mem(wide, opcode, reg, m);
    } else {
        a.gs_mem(wide, opcode, reg, m);
    }
}

/// R15: offset of the slot of the instruction pointer in RAX; see [`in_set`].
pub fn jump_hash(a: &mut Assembler, windowed: bool) {
    a.reg(false, &[0x69], host::R15, host::RAX); // imul r15d, eax, imm32
    a.bytes(&tlb::JUMP_HASH.to_le_bytes());
    a.bytes(&[0x41, 0xc1, 0xef, 14]); // shr r15d, 14
    a.bytes(&[0x41, 0x81, 0xe7, 0xf0, 0xff, 3, 0]); // and r15d, 0x3fff0
    if windowed {
        a.mem(true, &[0x03], host::R15, field!(set)); // add
    }
}

/// Compares the instruction pointer in RAX with that of the slot at R15.
pub fn jump_compare(a: &mut Assembler, windowed: bool) {
    let lin = offset_of!(tlb::Set, jumps) + offset_of!(tlb::Jump, lin);
    in_set(a, true, &[0x3b], host::RAX, at(host::R15, lin as i32), windowed);
}

/// Goes to the code of the slot at R15, which is that of the instruction pointer in RAX.
pub fn jump_take(a: &mut Assembler, windowed: bool) {
    a.bytes(&[0x48, 0x25, 0x00, 0xf0, 0xff, 0xff]); // and rax, -4096
    a.store(true, field!(code_page), host::RAX);
    let code = offset_of!(tlb::Set, jumps) + offset_of!(tlb::Jump, code);
    in_set(a, false, &[0xff], 4, at(host::R15, code as i32), windowed); // jmp
}

/// Inside a called routine: calls Rust with the frame, RAX and R15 as arguments, and keeps all registers but those.
fn call_rust(a: &mut Assembler, avx: bool, function: usize) {
    let saved = |n: usize| below(at(host::RSP, (offset_of!(Frame, saved) + 8 * n) as i32));
    for (n, reg) in CALLER_SAVED.iter().enumerate() {
        a.store(true, saved(n), *reg);
    }
    a.mov(host::RSI, host::RAX);
    a.mov(host::RDX, host::R15);
    a.lea(true, host::RDI, at(host::RSP, 8));
    // R15 keeps what `vectors` was: the callee preserves it.
    a.mem(false, &[0x0f, 0xb6], host::R15, below(field!(vectors))); // movzx r15d, byte
    a.reg(false, &[0x85], host::R15, host::R15); // test r15d, r15d
    let none = a.jcc(4);
    a.load(true, host::RAX, below(field!(fpu)));
    store_vectors(a, host::RAX, avx, below(field!(mxcsr)));
    let here = a.here();
    a.fill(none, here);
    x87::suspend(a);
    a.bytes(&[0x48, 0x83, 0xec, 0x08]); // sub rsp, 8
    a.bytes(&[0x48, 0xb8]); // mov rax, imm64
    a.bytes(&(function as u64).to_le_bytes());
    a.bytes(&[0xff, 0xd0]); // call rax
    a.bytes(&[0x48, 0x83, 0xc4, 0x08]); // add rsp, 8
    x87::resume(a);
    a.reg(false, &[0x85], host::R15, host::R15);
    let none = a.jcc(4);
    a.load(true, host::RDX, below(field!(fpu)));
    load_registers(a, host::RDX, avx);
    let here = a.here();
    a.fill(none, here);
    for (n, reg) in CALLER_SAVED.iter().enumerate() {
        a.load(true, *reg, saved(n));
    }
    a.bytes(&[0xc3]);
}

/// What the routines call.
#[derive(Clone, Copy)]
pub struct Calls {
    /// See [`Refill`].
    pub refill: Refill,
    /// See [`Callout`].
    pub callout: Callout,
    /// See [`TimeStamp`].
    pub time_stamp: TimeStamp,
    /// As [`Refill`], for windows.
    pub missed: Refill,
}

/// Emits the common routines.
pub fn routines(a: &mut Assembler, avx: bool, calls: Calls) -> Routines {
    let mut r = Routines { enter: a.origin + a.here(), ..Routines::default() };
    for reg in CALLEE_SAVED {
        if reg >= 8 {
            a.bytes(&[0x41]);
        }
        a.bytes(&[0x50 | reg & 7]);
    }
    a.store(true, at(host::RDI, offset_of!(Frame, host_rsp) as i32), host::RSP);
    a.mov(host::RSP, host::RDI);
    mxcsr(a, false, field!(mxcsr));
    a.load(true, host::RAX, field!(gs));
    a.bytes(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]); // wrgsbase rax
    registers_from_frame(a);
    a.mem(false, &[0xff], 4, field!(code)); // jmp [code]

    r.lookup_failed = a.origin + a.here();
    a.store(true, field!(rip), host::RAX);
    a.store_imm(field!(kind), exit::LOOKUP as i32);
    a.store_imm(field!(adjust), 0);
    let leave_now = a.jmp();
    r.leave_live = a.origin + a.here();
    save_flags(a);
    let here = a.here();
    a.fill(leave_now, here);
    r.leave = a.origin + here;
    registers_to_frame(a, avx);
    let stored = a.here();
    a.load(true, host::RSP, field!(host_rsp));
    for reg in CALLEE_SAVED.iter().rev() {
        if *reg >= 8 {
            a.bytes(&[0x41]);
        }
        a.bytes(&[0x58 | reg & 7]);
    }
    a.bytes(&[0xc3]);

    r.callout = a.origin + a.here();
    registers_to_frame(a, avx);
    a.mov(host::RDI, host::RSP);
    a.bytes(&[0x48, 0xb8]); // mov rax, imm64
    a.bytes(&(calls.callout as usize as u64).to_le_bytes());
    a.bytes(&[0xff, 0xd0]); // call rax
    a.reg(false, &[0x85], host::RAX, host::RAX);
    let none = a.jcc(4);
    a.fill(none, stored);
    a.load(true, host::RAX, field!(gs));
    a.bytes(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]); // wrgsbase rax
    registers_from_frame(a);
    a.load(true, host::RAX, field!(rip));
    r.jump = a.origin + a.here();
    a.mem_imm(7, field!(budget), 0);
    a.jcc_to(12, r.lookup_failed);
    a.mem(false, &[0x80], 7, field!(window)); // cmp byte [window], 0
    a.bytes(&[0]);
    let windowed = a.jcc(5);
    jump_ways(a, r.lookup_failed, false);
    let here = a.here();
    a.fill(windowed, here);
    jump_ways(a, r.lookup_failed, true);

    r.refill = a.origin + a.here();
    call_rust(a, avx, calls.refill as usize);

    r.missed = a.origin + a.here();
    call_rust(a, avx, calls.missed as usize);

    r.time_stamp = a.origin + a.here();
    call_rust(a, avx, calls.time_stamp as usize);

    r.load_vectors = a.origin + a.here();
    a.load(true, host::RAX, below(field!(fpu)));
    load_registers(a, host::RAX, avx);
    a.mem(false, &[0x0f, 0xb6], host::RAX, below(field!(vectors_allowed)));
    a.mem(false, &[0x88], host::RAX, below(field!(vectors))); // mov [vectors], al
    a.bytes(&[0xc3]);

    r.load_x87 = a.origin + a.here();
    x87::load(a);
    a.bytes(&[0xc3]);
    r
}

fn store_vectors(a: &mut Assembler, base: u8, avx: bool, host_mxcsr: Mem) {
    vector_moves(a, base, true, avx);
    mxcsr(a, false, at(base, offset_of!(VectorState, mxcsr) as i32));
    mxcsr(a, true, host_mxcsr);
    if avx {
        a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
    }
}

fn load_registers(a: &mut Assembler, base: u8, avx: bool) {
    vector_moves(a, base, false, avx);
    mxcsr(a, true, at(base, offset_of!(VectorState, mxcsr) as i32));
}

/// What an address is shifted by to check which window it is in.
pub const WINDOW_SHIFT: u32 = 27;
/// Behind the frame: the byte at the shifted address is there for addresses of the upper window (from its page 128 + 1 on
/// to 255), but not where an address above or below would lead to memory of the host or of the lower window ...
const HIGH_TABLE: usize = size_of::<Frame>();
const HIGH_THERE: (usize, usize) = ((1 << 19) + 0x1000, 1 << 20);
/// ... and at the same from here on for those of the lower one. What cannot be in either, nor in the host's memory, may
/// pass: it faults by itself.
const LOW_TABLE: usize = HIGH_TABLE + (2 << 20);
const LOW_THERE: (usize, usize) = (0, 0x1000);
/// The third table is for both, and as long as any address needs, for none faults by itself.
const EITHER_TABLE: usize = HIGH_TABLE + (4 << 20);
const TABLES: usize = (4 << 20) + (1 << (64 - WINDOW_SHIFT));

/// Where the byte for an address shifted in R15 is.
pub fn window_table(part: Part) -> Mem {
    let disp = match part {
        Part::Low => LOW_TABLE,
        Part::High => HIGH_TABLE,
        Part::Either => EITHER_TABLE,
    };
    Mem { base: Some(host::RSP), index: Some((host::R15, 0)), disp: disp as i32 }
}

/// The stack of generated code, with the frame at its top, and the tables for windows behind it.
pub struct Stack {
    base: *mut u8,
    size: usize,
}

// SAFETY: the mapping belongs to the Stack alone.
unsafe impl Send for Stack {}

const STACK: usize = 256 * 1024;
const GUARD: usize = 4096;

impl Stack {
    /// Maps a stack with an inaccessible page below it.
    pub fn new() -> Result<Stack, String> {
        Self::sized(0)
    }

    /// The same with the tables for windows, which are address space and next to no memory.
    pub fn with_tables() -> Result<Stack, String> {
        let stack = Self::sized(TABLES)?;
        for (table, (from, to)) in [
            (HIGH_TABLE, HIGH_THERE),
            (LOW_TABLE, LOW_THERE),
            (EITHER_TABLE, HIGH_THERE),
            (EITHER_TABLE, LOW_THERE),
        ] {
            let table = GUARD + STACK - size_of::<Frame>() + table;
            stack.protect(table + from, table + to, libc::PROT_READ)?;
        }
        Ok(stack)
    }

    fn sized(more: usize) -> Result<Stack, String> {
        let size = GUARD + STACK + more;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, libc::PROT_NONE, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err("the system gives no memory for the stack of generated code".to_string());
        }
        let stack = Stack { base: base.cast(), size };
        stack.protect(GUARD, GUARD + STACK, libc::PROT_READ | libc::PROT_WRITE)?;
        Ok(stack)
    }

    fn protect(&self, from: usize, to: usize, rights: libc::c_int) -> Result<(), String> {
        // SAFETY: inside of this object's mapping, where nothing is yet.
        let done = unsafe { libc::mprotect(self.base.add(from).cast(), to - from, rights) } == 0;
        done.then_some(())
            .ok_or_else(|| "the system gives no memory for the stack of generated code".to_string())
    }

    /// The frame; zero at first, which is a valid value.
    pub fn frame(&self) -> *mut Frame {
        // The stack's end is page-aligned and the frame's size a multiple of its alignment.
        (self.base as usize + STACK + GUARD - size_of::<Frame>()) as *mut Frame
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: mapped in sized() with this size; no generated code runs.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}
