//! The architectural state of one vCPU and the vocabulary of the interpreter:
//! how an instruction ends, what a fault is, why `run` returns.

use crate::flags::Flags;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};

/// Register numbers as instructions encode them.
pub mod reg {
    #![allow(missing_docs)]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    /// Always reads as zero: an absent base or index.
    pub const ZERO: usize = 16;
    /// Instruction pointer of the running block's first instruction.
    pub const BLOCK_RIP: usize = 17;
}

/// Segment register numbers as instructions encode them.
pub mod seg {
    #![allow(missing_docs)]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Exception vectors.
pub mod vector {
    #![allow(missing_docs)]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

/// RFLAGS bits.
pub mod rflags {
    #![allow(missing_docs)]
    pub const CF: u64 = 1 << 0;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six status flags, which live in [`crate::flags::Flags`].
    pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
}

/// CR0 bits.
pub mod cr0 {
    #![allow(missing_docs)]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// CR4 bits.
pub mod cr4 {
    #![allow(missing_docs)]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits.
pub mod efer {
    #![allow(missing_docs)]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// Access-rights bits of [`Segment::ar`], in VMX's layout (SDM 3C, table 25-2).
pub mod ar {
    #![allow(missing_docs)]
    pub const TYPE: u32 = 0xf;
    pub const ACCESSED: u32 = 1;
    /// Data: writable. Code: readable.
    pub const RW: u32 = 2;
    /// Data: expand down. Code: conforming.
    pub const DC: u32 = 4;
    pub const CODE: u32 = 8;
    pub const S: u32 = 1 << 4;
    pub const DPL_SHIFT: u32 = 5;
    pub const P: u32 = 1 << 7;
    pub const AVL: u32 = 1 << 12;
    pub const L: u32 = 1 << 13;
    /// D/B: 32-bit operands, stack pointer or upper bound.
    pub const DB: u32 = 1 << 14;
    pub const G: u32 = 1 << 15;
    pub const UNUSABLE: u32 = 1 << 16;
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (granularity already applied).
    pub limit: u32,
    /// Access rights, see [`ar`].
    pub ar: u32,
    /// Visible selector.
    pub selector: u16,
}

impl Segment {
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.ar >> ar::DPL_SHIFT) as u8 & 3
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit: offset of the last byte.
    pub limit: u16,
}

/// An instruction did not complete. [`Cpu::stop`] says why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop;

/// Result of an instruction or a part of it.
pub type X<T = ()> = Result<T, Stop>;

/// Why an instruction did not complete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// It raised an exception, to be delivered to the guest.
    Fault(Fault),
    /// It needs the caller of `run`; it has not changed anything and is
    /// executed again, or completed, on the next `run`.
    Exit(Exit),
    /// It completed, `rip` goes on, and the caller of `run` is needed.
    ExitAfter(Exit),
    /// It ended early for an interrupt between iterations (REP), `rip` still
    /// points at it and registers are consistent.
    Restart,
    /// The block that it is in was overwritten: look it up again.
    Stale,
}

/// An exception on its way to delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Exception vector.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// Linear address (goes to CR2 for #PF).
    pub address: u64,
    /// Trap (reported after the instruction, `rip` already advanced) or fault.
    pub trap: bool,
    /// For #DB: the DR6 bits to set.
    pub dr6: u64,
}

/// What `run` returns: the VM exits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// IN, OUT, INS, OUTS. For input the data comes with the next `run`
    /// through [`Cpu::set_exit_data`].
    PortIo {
        /// Port number.
        port: u16,
        /// Bytes of one access: 1, 2 or 4.
        size: u8,
        /// OUT or OUTS.
        write: bool,
        /// Number of accesses (REP), all to the same port.
        count: u32,
        /// `size * count` bytes that were written; empty for input.
        data: Vec<u8>,
    },
    /// Access to guest-physical memory without RAM behind it.
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// Bytes: 1, 2, 4, 8 (or more for vector and string accesses).
        size: u8,
        /// Store.
        write: bool,
        /// The bytes stored; empty for a load.
        data: Vec<u8>,
    },
    /// HLT with nothing pending.
    Halt,
    /// VMCALL or VMMCALL; the instruction is complete, registers hold the arguments.
    Hypercall {
        /// Whether it was VMMCALL.
        vmmcall: bool,
    },
    /// RDMSR of a register that the policy leaves to the caller.
    MsrRead {
        /// ECX.
        index: u32,
    },
    /// WRMSR of a register that the policy leaves to the caller.
    MsrWrite {
        /// ECX.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// CPUID of a leaf that the policy leaves to the caller.
    Cpuid {
        /// EAX.
        leaf: u32,
        /// ECX.
        subleaf: u32,
    },
    /// End of a level-triggered interrupt.
    IoapicEoi {
        /// Its vector.
        vector: u8,
    },
    /// The vCPU takes an interrupt from the PIC: the caller gives the vector
    /// through [`Cpu::set_pic_vector`].
    PicAcknowledge,
    /// The guest can now take an interrupt, as was asked for.
    InterruptWindow,
    /// An exception that the caller intercepts; not delivered.
    Exception {
        /// Its vector.
        vector: u8,
        /// Its error code.
        error: Option<u32>,
        /// CR2 to be, for #PF.
        address: u64,
    },
    /// A write of a control register that the caller intercepts.
    CrWrite {
        /// 0, 3, 4 or 8.
        register: u8,
        /// The new value.
        value: u64,
    },
    /// A debug event asked for by the caller (single step, hardware breakpoint).
    Debug {
        /// DR6 bits.
        dr6: u64,
    },
    /// Triple fault: the vCPU is in shutdown.
    TripleFault,
    /// An interrupt command of this vCPU for others (INIT, SIPI, NMI...).
    Ipi(nonroot_lapic::Ipi),
    /// `kick` was called, or a deadline or an instruction limit was reached.
    Interrupted,
    /// The engine cannot go on: an instruction or state it does not implement.
    Failure {
        /// One sentence that says what.
        reason: String,
    },
}

/// What the vCPU does between runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Executing instructions.
    Running,
    /// After HLT (or MWAIT): waits for an interrupt.
    Halted,
    /// After INIT: waits for a start-up IPI.
    WaitForSipi,
    /// After a triple fault.
    Shutdown,
}

/// Interrupt shadow bits (as in KVM's and VMX's interruptibility state).
pub mod shadow {
    /// After STI that set IF.
    pub const STI: u8 = 1;
    /// After MOV SS, POP SS.
    pub const MOV_SS: u8 = 2;
}

/// CPU modes that decide how instructions are decoded and addresses made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    V86,
    /// Protected or compatibility mode, 16-bit code segment.
    Protected16,
    /// Protected or compatibility mode, 32-bit code segment.
    Protected32,
    /// 64-bit mode.
    Long64,
}

/// The part of a vCPU that other threads may touch.
#[derive(Default)]
pub struct Mailbox {
    /// Request bits, see [`request`].
    pub requests: AtomicU32,
    /// Interrupt messages on their way: (address-style destination) entries.
    pub messages: Mutex<Vec<Message>>,
    /// Woken by [`request`] bits, for a vCPU that waits in HLT.
    pub wake: Condvar,
    /// The lock of `wake`.
    pub wake_lock: Mutex<()>,
    /// The PIC's INTR output.
    pub pic_line: std::sync::atomic::AtomicBool,
    /// Instructions retired, published at every exit and slice.
    pub retired: AtomicU64,
}

/// Bits of [`Mailbox::requests`].
pub mod request {
    /// Leave `run`.
    pub const KICK: u32 = 1 << 0;
    /// `messages` is not empty.
    pub const MESSAGE: u32 = 1 << 1;
    /// The PIC's output changed.
    pub const PIC: u32 = 1 << 2;
    /// An NMI was signalled.
    pub const NMI: u32 = 1 << 3;
    /// Decoded code or translations may be stale (DMA, p2m change).
    pub const MEMORY: u32 = 1 << 4;
    /// The vCPU itself: pending interrupts, IF or shadows changed.
    pub const LOCAL: u32 = 1 << 5;
}

/// An interrupt message for a local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Vector.
    pub vector: u8,
    /// Delivery mode (0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 start-up, 7 ExtINT).
    pub mode: u8,
    /// Level-triggered.
    pub level: bool,
}

/// How time passes for a vCPU.
#[derive(Clone, Debug)]
pub enum Clock {
    /// Host monotonic time, plus an offset in ns (wrapping).
    Host {
        /// Added to CLOCK_MONOTONIC.
        offset: i64,
    },
    /// A function of retired instructions: `base + retired * num / den` ns.
    Virtual {
        /// Nanoseconds added by idle time.
        base: u64,
        /// Numerator of ns an instruction.
        num: u64,
        /// Denominator.
        den: u64,
    },
}

/// The architectural registers of one vCPU. Everything that a state record
/// holds and nothing that is derived.
#[derive(Clone, Debug)]
pub struct Registers {
    /// RAX..R15, then a constant zero and the block's RIP (see [`reg`]).
    pub gpr: [u64; 32],
    /// Instruction pointer; exact between instructions.
    pub rip: u64,
    /// Status flags, lazily evaluated.
    pub flags: Flags,
    /// RFLAGS without the status flags; bit 1 is always set.
    pub rflags: u64,
    /// ES CS SS DS FS GS.
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table register.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// DR0..DR3.
    pub dr: [u64; 4],
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// XCR0.
    pub xcr0: u64,
    /// EFER.
    pub efer: u64,
    /// PAE page-directory-pointer entries, loaded with CR3 (32-bit PAE paging).
    pub pdpte: [u64; 4],
}

impl Default for Registers {
    /// Power-up state (SDM 3A, table 10-1).
    fn default() -> Self {
        let data = Segment { base: 0, limit: 0xffff, ar: 0x93, selector: 0 };
        let mut seg = [data; 6];
        seg[self::seg::CS] = Segment { base: 0xffff_0000, limit: 0xffff, ar: 0x9b, selector: 0xf000 };
        let mut gpr = [0; 32];
        gpr[reg::RDX] = 0x600;
        Registers {
            gpr,
            rip: 0xfff0,
            flags: Flags::default(),
            rflags: 2,
            seg,
            ldtr: Segment { base: 0, limit: 0xffff, ar: 0x82, selector: 0 },
            tr: Segment { base: 0, limit: 0xffff, ar: 0x8b, selector: 0 },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            efer: 0,
            pdpte: [0; 4],
        }
    }
}

/// Shared handle type used across the crate.
pub type SharedMemory = Arc<nonroot_memory::Memory>;
