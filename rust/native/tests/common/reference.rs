//! Runs one instruction on the host with all of its registers loaded and saved:
//! code of its own, which shares nothing with the unit's thunks.

use iced_x86::code_asm::*;
use iced_x86::{Encoder, Instruction};
use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, Once};

/// All registers. RSP is not loaded.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct HostState {
    pub ymm: [[u8; 32]; 16],
    pub fx: [u8; 512],
    pub gpr: [u64; 16],
    pub rflags: u64,
    pub mxcsr: u32,
    pub host_mxcsr: u32,
}

impl Default for HostState {
    fn default() -> Self {
        HostState { ymm: [[0; 32]; 16], fx: [0; 512], gpr: [0; 16], rflags: 2, mxcsr: 0x1f80, host_mxcsr: 0 }
    }
}

const PAGE: usize = 4096;
/// Bytes of data before the inaccessible page.
const DATA: usize = 2 * PAGE;

/// Executable memory and data memory that ends at an inaccessible page.
pub struct Host {
    code: *mut u8,
    data: *mut u8,
    _lock: MutexGuard<'static, ()>,
}

static LOCK: Mutex<()> = Mutex::new(());
static HANDLER: Once = Once::new();
static LENGTH: AtomicUsize = AtomicUsize::new(0);
static FAULT_MXCSR: AtomicU32 = AtomicU32::new(0);
const NO_FAULT: u32 = u32::MAX;

impl Host {
    pub fn new() -> Self {
        assert!(is_x86_feature_detected!("avx"), "the reference frame needs a host with AVX");
        let lock = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        HANDLER.call_once(|| {
            // SAFETY: the handler only changes the interrupted context and atomics.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fpe;
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_SIGINFO;
                assert_eq!(libc::sigaction(libc::SIGFPE, &action, std::ptr::null_mut()), 0);
            }
        });
        let map = |size| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new anonymous mapping.
            let at = unsafe {
                libc::mmap(std::ptr::null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
            };
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<u8>()
        };
        let (code, data) = (map(PAGE), map(DATA + PAGE));
        // SAFETY: the last page of our own mapping.
        unsafe { assert_eq!(libc::mprotect(data.add(DATA).cast(), PAGE, libc::PROT_NONE), 0) };
        Host { code, data, _lock: lock }
    }

    /// Address of the last `size` bytes before the inaccessible page.
    pub fn buffer(&self, size: usize) -> u64 {
        self.data as u64 + (DATA - size) as u64
    }

    pub fn write(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - self.data as u64) as usize;
        assert!(at + bytes.len() <= DATA);
        // SAFETY: inside the accessible part of our mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.data.add(at), bytes.len()) };
    }

    pub fn read(&self, address: u64, size: usize) -> Vec<u8> {
        let at = (address - self.data as u64) as usize;
        assert!(at + size <= DATA);
        // SAFETY: inside the accessible part of our mapping.
        unsafe { std::slice::from_raw_parts(self.data.add(at), size).to_vec() }
    }

    /// Loads the code that runs `instruction`.
    pub fn prepare(&mut self, instruction: &Instruction) {
        let bytes = assemble(instruction).expect("the frame assembles");
        assert!(bytes.len() <= PAGE);
        let mut encoder = Encoder::new(64);
        LENGTH.store(encoder.encode(instruction, 0).expect("encodable"), Ordering::SeqCst);
        // SAFETY: the code page is ours and not running.
        unsafe {
            let writable = libc::PROT_READ | libc::PROT_WRITE;
            assert_eq!(libc::mprotect(self.code.cast(), PAGE, writable), 0);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code, bytes.len());
            assert_eq!(libc::mprotect(self.code.cast(), PAGE, libc::PROT_READ | libc::PROT_EXEC), 0);
        }
    }

    /// Runs the prepared instruction. If it raised an unmasked SIMD exception,
    /// gives MXCSR as the handler found it; the instruction was skipped then.
    pub fn run(&mut self, state: &mut HostState) -> Option<u32> {
        FAULT_MXCSR.store(NO_FAULT, Ordering::SeqCst);
        state.fx[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        // SAFETY: `prepare` left a complete function there, which keeps to the calling convention; the
        // instruction's memory operand points into our data.
        unsafe {
            let entry: extern "sysv64" fn(*mut HostState) = std::mem::transmute(self.code);
            entry(state);
        }
        Some(FAULT_MXCSR.load(Ordering::SeqCst)).filter(|&mxcsr| mxcsr != NO_FAULT)
    }
}

/// The host's own MXCSR, x87 control word and x87 tags, which a thunk must leave
/// as it found them (an empty stack, as the calling convention wants).
pub fn host_environment() -> (u32, u16, u16) {
    let mut mxcsr = 0u32;
    let mut environment = [0u16; 14];
    // SAFETY: both instructions only store, to buffers large enough; FNSTENV's masking of exceptions is
    // undone by FLDENV.
    unsafe {
        std::arch::asm!(
            "stmxcsr [{mxcsr}]",
            "fnstenv [{environment}]",
            "fldenv [{environment}]",
            mxcsr = in(reg) &mut mxcsr,
            environment = in(reg) &mut environment,
            options(nostack),
        );
    }
    (mxcsr, environment[0], environment[4])
}

/// Sets the host's MXCSR for this thread.
pub fn set_host_mxcsr(mxcsr: u32) {
    // SAFETY: only reads the buffer; the value leaves all exceptions masked.
    unsafe { std::arch::asm!("ldmxcsr [{0}]", in(reg) &mxcsr, options(nostack, readonly)) };
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours, with these sizes.
        unsafe {
            libc::munmap(self.code.cast(), PAGE);
            libc::munmap(self.data.cast(), DATA + PAGE);
        }
    }
}

extern "C" fn on_fpe(_signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext with floating-point state.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let fpregs = &mut *context.uc_mcontext.fpregs;
        FAULT_MXCSR.store(fpregs.mxcsr, Ordering::SeqCst);
        fpregs.mxcsr |= 0x1f80;
        context.uc_mcontext.gregs[libc::REG_RIP as usize] += LENGTH.load(Ordering::SeqCst) as i64;
    }
}

const REGISTERS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
const VECTORS: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];

fn assemble(instruction: &Instruction) -> Result<Vec<u8>, iced_x86::IcedError> {
    let gpr = |n: usize| (offset_of!(HostState, gpr) + 8 * n) as i32;
    let at = |offset: usize| offset as i32;
    let mut a = CodeAssembler::new(64)?;
    for saved in [rbx, rbp, r12, r13, r14, r15, rdi] {
        a.push(saved)?;
    }
    a.stmxcsr(dword_ptr(rdi + at(offset_of!(HostState, host_mxcsr))))?;
    a.fxrstor64(ptr(rdi + at(offset_of!(HostState, fx))))?;
    for (n, &vector) in VECTORS.iter().enumerate() {
        a.vmovdqa(vector, ymmword_ptr(rdi + 32 * n as i32))?;
    }
    a.ldmxcsr(dword_ptr(rdi + at(offset_of!(HostState, mxcsr))))?;
    a.push(qword_ptr(rdi + at(offset_of!(HostState, rflags))))?;
    a.popfq()?;
    for (n, &register) in REGISTERS.iter().enumerate().filter(|(n, _)| *n != 4 && *n != 7) {
        a.mov(register, qword_ptr(rdi + gpr(n)))?;
    }
    a.mov(rdi, qword_ptr(rdi + gpr(7)))?;
    a.add_instruction(*instruction)?;
    a.xchg(qword_ptr(rsp), rdi)?;
    for (n, &register) in REGISTERS.iter().enumerate().filter(|(n, _)| *n != 4 && *n != 7) {
        a.mov(qword_ptr(rdi + gpr(n)), register)?;
    }
    a.pushfq()?;
    a.pop(qword_ptr(rdi + at(offset_of!(HostState, rflags))))?;
    a.pop(rax)?;
    a.mov(qword_ptr(rdi + gpr(7)), rax)?;
    for (n, &vector) in VECTORS.iter().enumerate() {
        a.vmovdqa(ymmword_ptr(rdi + 32 * n as i32), vector)?;
    }
    a.stmxcsr(dword_ptr(rdi + at(offset_of!(HostState, mxcsr))))?;
    a.ldmxcsr(dword_ptr(rdi + at(offset_of!(HostState, host_mxcsr))))?;
    a.fxsave64(ptr(rdi + at(offset_of!(HostState, fx))))?;
    a.fninit()?;
    a.vzeroupper()?;
    for saved in [r15, r14, r13, r12, rbp, rbx] {
        a.pop(saved)?;
    }
    a.ret()?;
    a.assemble(0)
}
