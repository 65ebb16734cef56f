//! Maps the regions, prepares a case, runs it, and writes down what it did.

use crate::layout::*;
use crate::trampoline::{nonroot_hostcpu_run, nonroot_hostcpu_signal, Context, NONROOT_HOSTCPU_CONTEXT};
use std::ptr::{addr_of, addr_of_mut};

/// What the signal that ended a case said.
#[repr(C)]
struct Ending {
    signal: i32,
    registers: [i64; 23],
    vector: [u8; XSAVE_BYTES],
}

static mut ENDING: Ending = Ending { signal: 0, registers: [0; 23], vector: [0; XSAVE_BYTES] };

/// Linux's selectors of flat user segments.
const USER32_CS: u64 = 0x23;
const USER_DS: u64 = 0x2b;
const USER_CS: u64 = 0x33;

/// Called by the signal handler at the end of a case.
///
/// # Safety
/// `context` must be the ucontext that the kernel gave to the handler.
pub unsafe extern "C" fn end_of_case(
    signal: i32,
    _: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
) {
    // SAFETY: signals are not blocked in the handler, but none arrives in it except the timer, whose
    // handler then runs nested: it stores the same kind of ending, for a case that is repeated.
    let (ending, machine) = unsafe { (&mut *addr_of_mut!(ENDING), &(*context).uc_mcontext) };
    ending.signal = signal;
    ending.registers = machine.gregs;
    // SAFETY: on x86-64 Linux the frame's FPU pointer leads to an XSAVE area in standard format; its
    // legacy part has 512 bytes and says in its software-reserved bytes how long the whole is.
    unsafe {
        let area = machine.fpregs as *const u8;
        let magic = (area.add(464) as *const u32).read_unaligned();
        let size = (area.add(464 + 16) as *const u32).read_unaligned() as usize;
        let whole = if magic == 0x4650_5853 { size.min(XSAVE_BYTES) } else { 512 };
        ending.vector.fill(0);
        std::ptr::copy_nonoverlapping(area, ending.vector.as_mut_ptr(), whole);
        if whole < 576 {
            ending.vector[512] = 3;
        }
    }
}

/// Called by the signal handler when no case runs: the timer, or a bug of this tool.
pub extern "C" fn stray_signal(signal: i32) {
    if signal != libc::SIGVTALRM {
        // SAFETY: leaves without running anything else; the parent reports the status.
        unsafe { libc::_exit(100 + signal) };
    }
}

/// The mapped regions.
pub struct Runner {
    /// The same memory as the cases', but always writable.
    alias: *mut u8,
    /// Range of the code pages that is not INT3.
    dirty_code: Vec<(usize, usize)>,
    /// The data pages at the start of the case, patches included.
    before: Vec<u8>,
}

/// Feature bits of this host.
pub fn features() -> u32 {
    let mut bits = 0;
    // SAFETY: getauxval only reads; bit 1 of AT_HWCAP2 says that the kernel allows RDFSBASE and friends.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0 {
        bits |= feature::FSGSBASE;
    }
    if std::arch::is_x86_feature_detected!("avx") {
        bits |= feature::AVX;
    }
    bits
}

fn os_error(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

impl Runner {
    /// Maps the regions and installs the signal handlers.
    pub fn new() -> Result<Runner, String> {
        let bytes = CODE_BYTES + DATA_BYTES;
        // SAFETY: fresh mappings of a fresh memfd; MAP_FIXED_NOREPLACE replaces nothing that exists.
        let alias = unsafe {
            let fd = libc::memfd_create(c"nonroot-hostcpu".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 || libc::ftruncate(fd, bytes as i64) != 0 {
                return Err(os_error("cannot make the memory of the cases"));
            }
            let map = |at: u64, len: usize, rights: i32, flags: i32, offset: usize| {
                libc::mmap(
                    at as *mut _,
                    len,
                    rights,
                    libc::MAP_SHARED | libc::MAP_POPULATE | flags,
                    fd,
                    offset as i64,
                )
            };
            let alias = map(0, bytes, libc::PROT_READ | libc::PROT_WRITE, 0, 0);
            if alias == libc::MAP_FAILED {
                return Err(os_error("cannot map the memory of the cases"));
            }
            // Every page exists before it is mapped for the cases, so that populating finds it.
            std::ptr::write_bytes(alias as *mut u8, 0xcc, bytes);
            let mut offset = 0;
            for region in &REGIONS {
                let rights = match region.rights {
                    Rights::Code => libc::PROT_READ | libc::PROT_EXEC,
                    Rights::Data => libc::PROT_READ | libc::PROT_WRITE,
                    Rights::ReadOnly => libc::PROT_READ,
                };
                let len = region.pages * PAGE;
                let got = map(region.base, len, rights, libc::MAP_FIXED_NOREPLACE, offset);
                if got as u64 != region.base {
                    return Err(os_error(&format!("cannot map {:#x}", region.base)));
                }
                offset += len;
            }
            alias as *mut u8
        };
        install_handlers()?;
        // SAFETY: no case runs, nothing else refers to the context now.
        unsafe {
            let context = &mut *addr_of_mut!(NONROOT_HOSTCPU_CONTEXT);
            context.features = features() as u64;
            context.components = if features() & feature::AVX != 0 { 7 } else { 3 };
        }
        Ok(Runner { alias, dirty_code: Vec::new(), before: vec![0; DATA_BYTES] })
    }

    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: `alias` maps these bytes for the process's life; cases, the only others that write
        // them, do not run while the slice exists.
        unsafe { std::slice::from_raw_parts_mut(self.alias, CODE_BYTES + DATA_BYTES) }
    }

    /// Runs one case and appends its result record.
    pub fn run(&mut self, case: &[u8], template: &[u8], out: &mut Vec<u8>) -> Result<(), String> {
        for attempt in 0..3 {
            self.prepare(case, template)?;
            // SAFETY: the context holds a complete case; code that it jumps to was written by the
            // generator, which never emits system calls, and every way out of it is a signal.
            unsafe { nonroot_hostcpu_run() };
            // SAFETY: the case is over; nothing writes ENDING now.
            let signal = unsafe { (*addr_of!(ENDING)).signal };
            if signal != libc::SIGVTALRM || attempt == 2 {
                break;
            }
        }
        self.record(out);
        Ok(())
    }

    fn prepare(&mut self, case: &[u8], template: &[u8]) -> Result<(), String> {
        let dirty = std::mem::take(&mut self.dirty_code);
        let memory = self.memory();
        for (start, end) in dirty {
            memory[start..end].fill(0xcc);
        }
        memory[CODE_BYTES..].copy_from_slice(template);
        let mut at = CASE_HEADER;
        let mut written = Vec::new();
        for _ in 0..get32(case, 168) {
            if at + 12 > case.len() {
                return Err("a case ends inside a patch".into());
            }
            let (address, len) = (get64(case, at), get32(case, at + 8) as usize);
            let start =
                offset_of(address, len).ok_or(format!("no region holds the patch at {address:#x}"))?;
            let bytes = case.get(at + 12..at + 12 + len).ok_or("a case ends inside a patch")?;
            memory[start..start + len].copy_from_slice(bytes);
            if start < CODE_BYTES {
                written.push((start, start + len));
            }
            at = (at + 12 + len).next_multiple_of(8);
        }
        self.dirty_code = written;
        // SAFETY: `alias` maps CODE_BYTES + DATA_BYTES bytes, `before` is separate memory.
        unsafe {
            let data = self.alias.add(CODE_BYTES);
            std::ptr::copy_nonoverlapping(data, self.before.as_mut_ptr(), DATA_BYTES);
        }
        let compat = get32(case, 4) & case_flag::COMPAT != 0;
        // SAFETY: no case runs, nothing else refers to the context now.
        let context: &mut Context = unsafe { &mut *addr_of_mut!(NONROOT_HOSTCPU_CONTEXT) };
        for (n, register) in context.gpr.iter_mut().enumerate() {
            *register = get64(case, 24 + 8 * n);
        }
        let cs = if compat { USER32_CS } else { USER_CS };
        context.frame = [get64(case, 8), cs, get64(case, 16), context.gpr[4], USER_DS];
        context.data_selector = if compat { USER_DS } else { 0 };
        context.fs_base = get64(case, 152);
        context.gs_base = get64(case, 160);
        context.vector.copy_from_slice(&case[176..176 + XSAVE_BYTES]);
        Ok(())
    }

    fn record(&mut self, out: &mut Vec<u8>) {
        // SAFETY: the case is over; neither is written until the next one.
        let (ending, context) = unsafe { (&*addr_of!(ENDING), &*addr_of!(NONROOT_HOSTCPU_CONTEXT)) };
        let start = out.len();
        let register = |n: i32| ending.registers[n as usize] as u64;
        let too_long = ending.signal == libc::SIGVTALRM;
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&u32::from(too_long).to_le_bytes());
        out.extend_from_slice(&ending.signal.to_le_bytes());
        out.extend_from_slice(&(register(libc::REG_TRAPNO) as u32).to_le_bytes());
        use libc::*;
        let order = [
            REG_ERR, REG_CR2, REG_RIP, REG_EFL, REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
            REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
        ];
        for n in order {
            out.extend_from_slice(&register(n).to_le_bytes());
        }
        out.extend_from_slice(&context.fs_base.to_le_bytes());
        out.extend_from_slice(&context.gs_base.to_le_bytes());
        let packed = register(REG_CSGSFS);
        let [ds, es, fs, gs] = context.selectors;
        for selector in [packed, packed >> 48, ds, es, fs, gs] {
            out.extend_from_slice(&(selector as u16).to_le_bytes());
        }
        out.extend_from_slice(&[0; 12]);
        out.extend_from_slice(&normalised(&ending.vector));
        let count = self.changes(out);
        out[start + 208..start + 212].copy_from_slice(&count.to_le_bytes());
        let length = (out.len() - start) as u32;
        out[start..start + 4].copy_from_slice(&length.to_le_bytes());
    }

    fn changes(&self, out: &mut Vec<u8>) -> u32 {
        // SAFETY: as in `memory`; no case runs.
        let after = unsafe { std::slice::from_raw_parts(self.alias.add(CODE_BYTES), DATA_BYTES) };
        let mut count = 0;
        let mut base = 0;
        for region in REGIONS.iter().filter(|region| region.rights != Rights::Code) {
            let bytes = region.pages * PAGE;
            let (old, new) = (&self.before[base..base + bytes], &after[base..base + bytes]);
            base += bytes;
            let mut at = 0;
            while at < bytes {
                if old[at..(at + 256).min(bytes)] == new[at..(at + 256).min(bytes)] {
                    at += 256;
                    continue;
                }
                let end_of_block = (at + 256).min(bytes);
                while at < end_of_block {
                    if old[at] == new[at] {
                        at += 1;
                        continue;
                    }
                    let first = at;
                    while at < end_of_block && old[at] != new[at] {
                        at += 1;
                    }
                    out.extend_from_slice(&(region.base + first as u64).to_le_bytes());
                    out.extend_from_slice(&((at - first) as u32).to_le_bytes());
                    out.extend_from_slice(&new[first..at]);
                    out.resize(out.len().next_multiple_of(8), 0);
                    count += 1;
                }
            }
        }
        count
    }
}

/// An XSAVE area with every component spelled out, whatever XSTATE_BV said was in its initial state.
fn normalised(area: &[u8; XSAVE_BYTES]) -> [u8; XSAVE_BYTES] {
    let mut area = *area;
    let present = area[512];
    if present & 1 == 0 {
        area[..24].fill(0);
        area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[32..160].fill(0);
    }
    if present & 2 == 0 {
        area[160..416].fill(0);
    }
    if present & 4 == 0 {
        area[576..].fill(0);
    }
    area[416..576].fill(0);
    area[512] = 7;
    area
}

fn install_handlers() -> Result<(), String> {
    // SAFETY: the alternate stack is leaked, so it stays valid; the handler keeps to what is allowed
    // in one; sigaction and setitimer get properly initialised structures.
    unsafe {
        let size = 256 * 1024;
        let stack = Box::leak(vec![0u8; size].into_boxed_slice());
        let stack = libc::stack_t { ss_sp: stack.as_mut_ptr() as *mut _, ss_flags: 0, ss_size: size };
        if libc::sigaltstack(&stack, std::ptr::null_mut()) != 0 {
            return Err(os_error("cannot set the signal stack"));
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nonroot_hostcpu_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGVTALRM]
        {
            if libc::sigaction(signal, &action, std::ptr::null_mut()) != 0 {
                return Err(os_error("cannot install a signal handler"));
            }
        }
        let tick = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
        let timer = libc::itimerval { it_interval: tick, it_value: tick };
        if libc::setitimer(libc::ITIMER_VIRTUAL, &timer, std::ptr::null_mut()) != 0 {
            return Err(os_error("cannot start the timer"));
        }
    }
    Ok(())
}
