//! The vCPU object: architectural state, derived state, and the vocabulary that
//! every instruction implementation uses to fault, stop and reach operands.

use crate::audit::Audit;
use crate::code_cache::CodeCache;
use crate::config::Config;
use crate::cpuid::Features;
use crate::mmio::MmioLog;
use crate::msr::Msrs;
use crate::state::*;
use crate::tlb::Tlb;
use nonroot_lapic::Lapic;
use nonroot_native::{NativeUnit, VectorState};
use std::sync::Arc;

/// One vCPU. Field order puts what every instruction touches first.
pub struct Cpu {
    /// Architectural registers.
    pub r: Registers,
    /// Current privilege level.
    pub cpl: u8,
    /// Decoding and addressing mode, derived by [`Cpu::update_mode`].
    pub mode: Mode,
    /// ES, SS, DS and CS are flat 32-bit segments (base 0, limit 4 GiB, writable, usable).
    pub flat: bool,
    /// Where execution goes on after the current instruction, for instructions
    /// run by the general executor: set to the following instruction before it
    /// starts; control transfers change it.
    pub next_rip: u64,
    /// Cached translations.
    pub tlb: Tlb,
    /// Why the current instruction stopped; taken by the run loop.
    pub stop: Option<StopReason>,
    /// DR6 bits of debug traps to report when the current instruction ends.
    pub pending_db: u64,
    /// Interrupt shadow, see [`shadow`]; the run loop clears it after the next instruction.
    pub shadow: u8,
    /// NMIs are blocked until the next IRET.
    pub nmi_blocked: bool,
    /// Running, halted, …
    pub activity: Activity,
    /// Instructions retired.
    pub retired: u64,
    /// Instructions retired by [`Cpu::retired`] when the current block started are
    /// known only at its end; instructions that read time add this.
    pub retired_in_block: u64,
    /// Vector, x87 registers.
    pub fpu: VectorState,
    /// Model-specific registers without a home elsewhere.
    pub msr: Msrs,
    /// What the CPUID policy allows.
    pub features: Features,
    /// Local APIC.
    pub lapic: Lapic,
    /// How time passes.
    pub clock: Clock,
    /// Policy and options.
    pub config: Config,
    /// Guest memory.
    pub mem: SharedMemory,
    /// What other threads ask.
    pub mailbox: Arc<Mailbox>,
    /// Decoded code.
    pub cache: CodeCache,
    /// A faster executor of blocks, if there is one.
    pub accelerator: Option<Box<dyn crate::accelerate::Accelerator>>,
    /// See [`crate::accelerate::Ran::Exit`].
    pub accelerated_exit: Option<Exit>,
    /// What a rehearsal overwrites: host address, old bytes.
    pub write_log: Option<Vec<(u64, Vec<u8>)>>,
    /// Accesses of the current instruction that the caller has answered.
    pub mmio: MmioLog,
    /// The caller's answer to the last port, MSR or CPUID exit.
    pub reply: Option<Reply>,
    /// Executor of vector and x87 instructions.
    pub native: NativeUnit,
    /// An event that is being delivered, for double-fault detection and for
    /// state records taken in the middle.
    pub pending_event: Option<crate::events::Event>,
    /// A vector that the PIC gave in answer to [`Exit::PicAcknowledge`].
    pub pic_vector: Option<u8>,
    /// A vector to inject as soon as interrupts are open.
    pub injected: Option<u8>,
    /// The caller wants [`Exit::InterruptWindow`].
    pub want_window: bool,
    /// Debugging by the caller: single step and breakpoints that the guest cannot see.
    pub guest_debug: crate::debug::GuestDebug,
    /// An NMI waits for delivery.
    pub nmi_pending: bool,
    /// Instructions must be run one by one (debugging); see `needs_stepping`.
    pub stepping: bool,
    /// REP iterations that may still run before the clock, a limit or requests
    /// must be looked at.
    pub rep_budget: u64,
    /// Iterations of the current REP instruction beyond the first, and those before
    /// a restart: added to [`Cpu::retired`] when it ends or stops.
    pub rep_iterations: u64,
    /// Exits to make before the next instruction (interrupt commands, EOIs).
    pub pending_exits: Vec<Exit>,
    /// IA32_APIC_BASE does not hold its usual address.
    pub lapic_moved: bool,
    /// The source of RDRAND and RDSEED.
    pub random: crate::general::random::Random,
    /// The audit of all that is cached, if it is on.
    pub audit: Option<Box<Audit>>,
    /// Counters by name, see `Vcpu::statistics`.
    pub stats: Statistics,
}

/// Counters that cost nothing on the fast path.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// Blocks decoded.
    pub blocks_decoded: u64,
    /// Instructions decoded.
    pub instructions_decoded: u64,
    /// Blocks dropped because their code was overwritten.
    pub blocks_invalidated: u64,
    /// Page walks.
    pub walks: u64,
    /// Whole or per-address-space translation flushes.
    pub flushes: u64,
    /// Exceptions delivered to the guest.
    pub exceptions: u64,
    /// Page faults among them.
    pub page_faults: u64,
    /// Interrupts delivered to the guest.
    pub interrupts: u64,
    /// Instructions run by the general executor.
    pub general: u64,
}

/// The caller's answer to an exit whose instruction is not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Bytes: port input, MSR value (8), CPUID (eax, ebx, ecx, edx: 16).
    Data(Vec<u8>),
    /// Done, nothing to return (MSR write accepted).
    Done,
    /// Raise #GP(0).
    Fault,
}

impl Cpu {
    /// A vCPU after power-on: real mode at the reset vector.
    pub fn new(mem: SharedMemory, config: Config) -> Box<Cpu> {
        let mut cpu = Box::new(Cpu {
            r: Registers::default(),
            cpl: 0,
            mode: Mode::Real,
            flat: false,
            next_rip: 0,
            tlb: Tlb::default(),
            stop: None,
            pending_db: 0,
            shadow: 0,
            nmi_blocked: false,
            activity: Activity::Running,
            retired: 0,
            retired_in_block: 0,
            fpu: VectorState::default(),
            msr: Msrs::new(&config),
            features: Features::new(&config),
            lapic: Lapic::new(config.apic_id, config.tsc_khz, config.apic_bus_hz),
            clock: config.clock.clone(),
            random: crate::general::random::Random::new(config.random_seed),
            config,
            mem,
            mailbox: Arc::new(Mailbox::default()),
            cache: CodeCache::default(),
            accelerator: None,
            accelerated_exit: None,
            write_log: None,
            mmio: MmioLog::default(),
            reply: None,
            native: NativeUnit::new(),
            pending_event: None,
            pic_vector: None,
            injected: None,
            want_window: false,
            guest_debug: crate::debug::GuestDebug::default(),
            nmi_pending: false,
            stepping: false,
            rep_budget: 0,
            rep_iterations: 0,
            pending_exits: Vec::new(),
            lapic_moved: false,
            audit: None,
            stats: Statistics::default(),
        });
        cpu.audit = Audit::new(cpu.config.audit);
        cpu.reset();
        cpu
    }

    // ---- how an instruction stops -------------------------------------------------

    /// Raises an exception; use as `return Err(cpu.fault(vector::GP, Some(0)))`.
    #[cold]
    pub fn fault(&mut self, vector: u8, error: Option<u32>) -> Stop {
        self.stop = Some(StopReason::Fault(Fault { vector, error, address: 0, trap: false, dr6: 0 }));
        Stop
    }

    /// #UD.
    #[cold]
    pub fn ud(&mut self) -> Stop {
        self.fault(vector::UD, None)
    }

    /// #GP with an error code (0 or a selector error code).
    #[cold]
    pub fn gp(&mut self, error: u32) -> Stop {
        self.fault(vector::GP, Some(error))
    }

    /// #PF at a linear address.
    #[cold]
    pub fn page_fault(&mut self, address: u64, error: u32) -> Stop {
        self.stop = Some(StopReason::Fault(Fault {
            vector: vector::PF,
            error: Some(error),
            address,
            trap: false,
            dr6: 0,
        }));
        Stop
    }

    /// Leaves `run` before the current instruction has completed; it is executed
    /// again on the next run (with [`Cpu::reply`] or the MMIO log filled in).
    #[cold]
    pub fn exit(&mut self, exit: Exit) -> Stop {
        self.stop = Some(StopReason::Exit(exit));
        Stop
    }

    /// Leaves `run` after the current instruction, which is complete: `rip`
    /// becomes [`Cpu::next_rip`] and it counts as retired.
    #[cold]
    pub fn exit_after(&mut self, exit: Exit) -> Stop {
        self.stop = Some(StopReason::ExitAfter(exit));
        Stop
    }

    /// The engine cannot execute this: [`Exit::Failure`].
    #[cold]
    pub fn unimplemented(&mut self, what: &str) -> Stop {
        let reason = format!("the interpreter does not implement {what}");
        self.exit(Exit::Failure { reason })
    }

    // ---- RFLAGS ---------------------------------------------------------------------

    /// The whole RFLAGS register.
    #[inline]
    pub fn rflags(&self) -> u64 {
        self.r.rflags | self.r.flags.to_rflags()
    }

    /// Replaces the whole RFLAGS register (no privilege checks) and what derives
    /// from it (the access context for AC, the mode for VM).
    pub fn set_rflags(&mut self, value: u64) {
        let value = value & 0x3f_7fd5 | 2;
        let changed = value ^ self.r.rflags;
        self.r.flags = crate::flags::Flags::from_rflags(value);
        self.r.rflags = value & !rflags::STATUS;
        if changed & (rflags::AC | rflags::VM) != 0 {
            self.update_mode();
        }
        if changed & (rflags::IF | rflags::TF) != 0 {
            self.interrupts_changed();
        }
    }

    // ---- modes ----------------------------------------------------------------------

    /// Whether long mode is active (EFER.LMA).
    #[inline(always)]
    pub fn lma(&self) -> bool {
        self.r.efer & efer::LMA != 0
    }

    /// Whether the CPU is in 64-bit mode.
    #[inline(always)]
    pub fn long64(&self) -> bool {
        self.mode == Mode::Long64
    }

    /// Whether protection is on and virtual-8086 mode is not.
    #[inline(always)]
    pub fn protected(&self) -> bool {
        !matches!(self.mode, Mode::Real | Mode::V86)
    }

    /// IOPL.
    #[inline(always)]
    pub fn iopl(&self) -> u8 {
        (self.r.rflags >> 12) as u8 & 3
    }

    /// Recomputes everything that derives from CR0, CR4, EFER, RFLAGS.VM/AC, CS,
    /// the data segments and CPL. Call it after changing any of them.
    pub fn update_mode(&mut self) {
        let r = &self.r;
        let cs = &r.seg[seg::CS];
        self.mode = if r.cr0 & cr0::PE == 0 {
            Mode::Real
        } else if r.rflags & rflags::VM != 0 {
            Mode::V86
        } else if r.efer & efer::LMA != 0 && cs.ar & ar::L != 0 {
            Mode::Long64
        } else if cs.ar & ar::DB != 0 {
            Mode::Protected32
        } else {
            Mode::Protected16
        };
        self.update_segments();
        self.tlb_context_changed();
    }

    /// Recomputes what derives from the data segments alone; call it after
    /// loading DS, ES or SS (cheaper than [`Cpu::update_mode`]).
    pub fn update_segments(&mut self) {
        fn is_flat(s: &Segment) -> bool {
            s.base == 0
                && s.limit == 0xffff_ffff
                && s.ar & (ar::S | ar::CODE | ar::RW | ar::DC | ar::P | ar::UNUSABLE)
                    == ar::S | ar::RW | ar::P
        }
        let s = &self.r.seg;
        let cs = &s[seg::CS];
        self.flat = self.mode == Mode::Protected32
            && cs.base == 0
            && cs.limit == 0xffff_ffff
            && is_flat(&s[seg::DS])
            && is_flat(&s[seg::ES])
            && is_flat(&s[seg::SS])
            && s[seg::SS].ar & ar::DB != 0;
        self.update_exec_key();
    }

    /// Bytes of the stack pointer: 8 in 64-bit mode, else 4 or 2 by SS.B.
    #[inline]
    pub fn stack_size(&self) -> usize {
        if self.mode == Mode::Long64 {
            8
        } else if self.r.seg[seg::SS].ar & ar::DB != 0 {
            4
        } else {
            2
        }
    }

    /// Mask for the stack pointer, see [`Cpu::stack_size`].
    #[inline]
    pub fn stack_mask(&self) -> u64 {
        match self.stack_size() {
            8 => u64::MAX,
            4 => 0xffff_ffff,
            _ => 0xffff,
        }
    }

    /// Writes the stack pointer, keeping the bits that the stack size does not cover.
    #[inline]
    pub fn set_sp(&mut self, value: u64) {
        let mask = self.stack_mask();
        let rsp = &mut self.r.gpr[reg::RSP];
        // A 32-bit stack pointer write zero-extends in compatibility mode too.
        *rsp = if mask == 0xffff { *rsp & !mask | value & mask } else { value & mask };
    }

    // ---- general registers ------------------------------------------------------------

    /// Reads the low `size` bytes (1, 2, 4, 8) of a register; byte registers 4–7
    /// here are SPL..DIL, never AH..BH.
    #[inline]
    pub fn gpr(&self, n: usize, size: usize) -> u64 {
        let v = self.r.gpr[n];
        match size {
            1 => v & 0xff,
            2 => v & 0xffff,
            4 => v & 0xffff_ffff,
            _ => v,
        }
    }

    /// Writes a register as instructions do: 4-byte writes zero-extend, smaller merge.
    #[inline]
    pub fn set_gpr(&mut self, n: usize, size: usize, value: u64) {
        let r = &mut self.r.gpr[n];
        *r = match size {
            1 => *r & !0xff | value & 0xff,
            2 => *r & !0xffff | value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        };
    }

    // ---- time -------------------------------------------------------------------------

    /// Machine time in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        match self.clock {
            Clock::Host { offset } => crate::config::monotonic_ns().wrapping_add(offset as u64),
            Clock::Virtual { base, num, den } => {
                let n = self.retired + self.retired_in_block;
                base + (n as u128 * num as u128 / den as u128) as u64
            }
        }
    }

    /// The time-stamp counter as RDTSC shows it.
    pub fn tsc(&self) -> u64 {
        let (now, khz) = (self.now_ns(), self.config.tsc_khz);
        let ticks = match khz {
            1_000_000 => now,
            _ => (u128::from(now) * u128::from(khz) / 1_000_000) as u64,
        };
        ticks.wrapping_add(self.msr.tsc_offset)
    }
}
