//! The way into a case and back: assembly, and the variables that it shares with Rust.
//!
//! Into the case goes IRETQ, which loads RIP, CS, RFLAGS, RSP and SS at once, to
//! 64-bit or 32-bit code. Out of it leads only a signal; its handler starts in
//! assembly because RFLAGS.AC, the data segments and the FS base (Rust's
//! thread-local storage) are still the case's.

use crate::layout::{feature, XSAVE_BYTES};
use std::mem::offset_of;

/// State that the assembly loads and saves.
#[repr(C, align(64))]
pub struct Context {
    /// In: XSAVE area to load.
    pub vector: [u8; XSAVE_BYTES],
    /// In: general registers (RSP comes from the frame).
    pub gpr: [u64; 16],
    /// In: RIP, CS, RFLAGS, RSP, SS for IRETQ.
    pub frame: [u64; 5],
    /// In: FS and GS bases. Out: what the case left.
    pub fs_base: u64,
    /// See `fs_base`.
    pub gs_base: u64,
    /// In: DS and ES.
    pub data_selector: u64,
    /// Out: DS, ES, FS, GS.
    pub selectors: [u64; 4],
    /// Stack pointer of `nonroot_hostcpu_run`.
    pub host_rsp: u64,
    /// FS base of this process.
    pub host_fs: u64,
    /// Feature bits of the host, see [`feature`].
    pub features: u64,
    /// XSAVE components to load.
    pub components: u64,
    /// A case is running: the next signal is its end.
    pub in_case: u64,
    /// A signal arrived while no case ran.
    pub stray: u64,
}

/// The one context; the tool runs one case at a time.
#[no_mangle]
pub static mut NONROOT_HOSTCPU_CONTEXT: Context = Context {
    vector: [0; XSAVE_BYTES],
    gpr: [0; 16],
    frame: [0; 5],
    fs_base: 0,
    gs_base: 0,
    data_selector: 0,
    selectors: [0; 4],
    host_rsp: 0,
    host_fs: 0,
    features: 0,
    components: 0,
    in_case: 0,
    stray: 0,
};

extern "C" {
    /// Runs the case in [`NONROOT_HOSTCPU_CONTEXT`]; returns when a signal has ended it.
    pub fn nonroot_hostcpu_run();
    /// The signal handler.
    pub fn nonroot_hostcpu_signal();
}

std::arch::global_asm!(
    ".globl nonroot_hostcpu_run",
    "nonroot_hostcpu_run:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "lea rbx, [rip + {ctx}]",
    "mov [rbx + {host_rsp}], rsp",
    "mov rax, [rbx + {components}]",
    "xor edx, edx",
    "xrstor64 [rbx + {vector}]",
    "mov rcx, [rbx + {data_selector}]",
    "test qword ptr [rbx + {features}], {fsgsbase}",
    "jz 2f",
    "rdfsbase rax",
    "mov [rbx + {host_fs}], rax",
    "mov qword ptr [rbx + {in_case}], 1",
    "mov ds, ecx",
    "mov es, ecx",
    "mov rax, [rbx + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rbx + {gs_base}]",
    "wrgsbase rax",
    "jmp 3f",
    "2:",
    "mov qword ptr [rbx + {in_case}], 1",
    "mov ds, ecx",
    "mov es, ecx",
    "3:",
    "mov rax, [rbx + {gpr}]",
    "mov rcx, [rbx + {gpr} + 8]",
    "mov rdx, [rbx + {gpr} + 16]",
    "mov rbp, [rbx + {gpr} + 40]",
    "mov rsi, [rbx + {gpr} + 48]",
    "mov rdi, [rbx + {gpr} + 56]",
    "mov r8, [rbx + {gpr} + 64]",
    "mov r9, [rbx + {gpr} + 72]",
    "mov r10, [rbx + {gpr} + 80]",
    "mov r11, [rbx + {gpr} + 88]",
    "mov r12, [rbx + {gpr} + 96]",
    "mov r13, [rbx + {gpr} + 104]",
    "mov r14, [rbx + {gpr} + 112]",
    "mov r15, [rbx + {gpr} + 120]",
    "lea rsp, [rbx + {frame}]",
    "mov rbx, [rbx + {gpr} + 24]",
    "iretq",
    // On entry: rdi signal, rsi siginfo, rdx ucontext, on the alternate stack.
    ".globl nonroot_hostcpu_signal",
    "nonroot_hostcpu_signal:",
    "pushfq",
    "and qword ptr [rsp], ~0x44500", // AC, NT, DF, TF
    "popfq",
    "lea rax, [rip + {ctx}]",
    "cmp qword ptr [rax + {in_case}], 0",
    "jne 4f",
    "mov qword ptr [rax + {stray}], 1",
    "sub rsp, 8",
    "call {stray_signal}",
    "add rsp, 8",
    "ret",
    "4:",
    "mov [rax + {selectors}], ds",
    "mov [rax + {selectors} + 8], es",
    "mov [rax + {selectors} + 16], fs",
    "mov [rax + {selectors} + 24], gs",
    "xor ecx, ecx",
    "mov ds, ecx",
    "mov es, ecx",
    "test qword ptr [rax + {features}], {fsgsbase}",
    "jz 5f",
    "rdfsbase r8",
    "mov [rax + {fs_base}], r8",
    "rdgsbase r8",
    "mov [rax + {gs_base}], r8",
    "mov fs, ecx",
    "mov gs, ecx",
    "mov r8, [rax + {host_fs}]",
    "wrfsbase r8",
    "5:",
    "sub rsp, 8",
    "call {end_of_case}",
    "lea rax, [rip + {ctx}]",
    "mov qword ptr [rax + {in_case}], 0",
    "mov rsp, [rax + {host_rsp}]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    ctx = sym NONROOT_HOSTCPU_CONTEXT,
    stray_signal = sym crate::runner::stray_signal,
    end_of_case = sym crate::runner::end_of_case,
    vector = const offset_of!(Context, vector),
    gpr = const offset_of!(Context, gpr),
    frame = const offset_of!(Context, frame),
    fs_base = const offset_of!(Context, fs_base),
    gs_base = const offset_of!(Context, gs_base),
    data_selector = const offset_of!(Context, data_selector),
    selectors = const offset_of!(Context, selectors),
    host_rsp = const offset_of!(Context, host_rsp),
    host_fs = const offset_of!(Context, host_fs),
    features = const offset_of!(Context, features),
    components = const offset_of!(Context, components),
    in_case = const offset_of!(Context, in_case),
    stray = const offset_of!(Context, stray),
    fsgsbase = const feature::FSGSBASE,
);
