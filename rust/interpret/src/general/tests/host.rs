//! Runs one instruction on the host over given registers and memory.

use crate::testing::{assemble, DATA};
use iced_x86::code_asm::*;

/// Bytes of memory that instructions may touch, at [`DATA`] in guest and host.
pub const WINDOW: usize = 0x3000;

/// What an instruction sees and changes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct HostState {
    /// RAX..R15; RSP and R15 are not the instruction's.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
}

/// A page of code and the data window.
pub struct Host {
    code: *mut u8,
    prologue: Vec<u8>,
    epilogue: Vec<u8>,
}

const OPERANDS: [AsmRegister64; 14] = [rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14];

fn slot(r: AsmRegister64) -> AsmMemoryOperand {
    let r: iced_x86::Register = r.into();
    qword_ptr(r15 + 8 * r.number() as i32)
}

impl Host {
    pub fn new() -> Host {
        // SAFETY: anonymous mappings; the second one replaces nothing (NOREPLACE).
        let (code, data) = unsafe {
            let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            (
                libc::mmap(std::ptr::null_mut(), 4096, rwx, flags, -1, 0),
                libc::mmap(
                    DATA as *mut libc::c_void,
                    WINDOW,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags | libc::MAP_FIXED_NOREPLACE,
                    -1,
                    0,
                ),
            )
        };
        assert_ne!(code, libc::MAP_FAILED);
        assert_eq!(data as u64, DATA, "the host's address {DATA:#x} is taken");
        let prologue = assemble(64, |a| {
            for r in [rbx, rbp, r12, r13, r14, r15] {
                a.push(r)?;
            }
            a.mov(r15, rdi)?;
            a.push(qword_ptr(r15 + 128))?;
            for r in OPERANDS {
                a.mov(r, slot(r))?;
            }
            a.popfq()
        });
        let epilogue = assemble(64, |a| {
            for r in OPERANDS {
                a.mov(slot(r), r)?;
            }
            a.pushfq()?;
            a.pop(qword_ptr(r15 + 128))?;
            a.cld()?;
            for r in [r15, r14, r13, r12, rbp, rbx] {
                a.pop(r)?;
            }
            a.ret()
        });
        Host { code: code.cast(), prologue, epilogue }
    }

    /// Executes the instruction in `bytes`, which must not fault, branch or use the stack.
    pub fn execute(&mut self, bytes: &[u8], state: &mut HostState) {
        let all: Vec<u8> = [&self.prologue, bytes, &self.epilogue].concat();
        assert!(all.len() <= 4096);
        // SAFETY: the page is ours and large enough; the code keeps the System V ABI as
        // long as the instruction keeps RSP and R15, which callers see to.
        unsafe {
            std::ptr::copy_nonoverlapping(all.as_ptr(), self.code, all.len());
            let f: extern "sysv64" fn(*mut HostState) = std::mem::transmute(self.code);
            f(state);
        }
    }

    /// The data window.
    pub fn window(&mut self) -> &mut [u8] {
        // SAFETY: mapped in new() and used by this object alone.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, WINDOW) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in new().
        unsafe {
            libc::munmap(self.code.cast(), 4096);
            libc::munmap(DATA as *mut libc::c_void, WINDOW);
        }
    }
}
