//! What the caller decides about a vCPU: CPUID, plain MSRs, time, options.

use crate::state::Clock;
use std::collections::HashMap;

/// One CPUID leaf of the policy. Subleaf `u32::MAX` answers every subleaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuidLeaf {
    pub leaf: u32,
    pub subleaf: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Policy and options of one vCPU.
#[derive(Clone, Debug)]
pub struct Config {
    /// Initial local APIC ID.
    pub apic_id: u32,
    /// CPUID policy.
    pub cpuid: Vec<CpuidLeaf>,
    /// Plain storage MSRs: index → (value, writable bits).
    pub msrs: HashMap<u32, (u64, u64)>,
    /// Guest TSC frequency.
    pub tsc_khz: u64,
    /// Local APIC timer input clock.
    pub apic_bus_hz: u64,
    /// Clock at power-on.
    pub clock: Clock,
    /// Unknown MSRs exit instead of raising #GP.
    pub msr_exits: bool,
    /// Exceptions that exit instead of being delivered: bit = vector.
    pub exception_exits: u32,
    /// Control register writes exit.
    pub cr_exits: bool,
    /// Start of the random numbers that RDRAND and RDSEED give in virtual time; in
    /// host time they are the host's.
    pub random_seed: u64,
    /// All that is cached is compared with what it stands for at each so many moments; 0: never.
    pub audit: u32,
    /// Optimisations that are switched on.
    pub optimise: Optimisations,
}

/// Declares a structure of named optimisations, all on by default.
#[macro_export]
macro_rules! optimisations {
    ($(#[doc = $about:literal])+ pub struct $group:ident { $($(#[doc = $doc:literal])+ $field:ident = $name:literal;)* }) => {
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $group { $($(#[doc = $doc])+ pub $field: bool,)* }
        impl Default for $group {
            fn default() -> Self { $group { $($field: true,)* } }
        }
        impl $group {
            /// (name, description) of each.
            pub const ALL: &'static [(&'static str, &'static str)] = &[$(($name, concat!($($doc),+)),)*];
            /// Switches one off; false if there is none of that name.
            pub fn switch_off(&mut self, name: &str) -> bool {
                match name { $($name => { self.$field = false; true })* _ => false }
            }
        }
    };
}

optimisations! {
    /// Named optimisations, all on by default.
    pub struct Optimisations {
        /// Specialised code for frequent instructions instead of the general executor.
        fast_ops = "fast-ops";
        /// Translations are remembered (off: every access walks the page tables).
        tlb = "tlb";
        /// Decoded blocks are remembered (off: every instruction is decoded again).
        block_cache = "block-cache";
        /// Blocks are found by instruction pointer without a lookup by physical address.
        jump_cache = "jump-cache";
        /// REP MOVS, STOS and the like work on whole pages instead of single elements.
        bulk_strings = "bulk-strings";
        /// Compare-and-branch pairs run as one operation.
        fused_branches = "fused-branches";
        /// Translations of other address spaces survive a switch (PCID).
        pcid = "pcid";
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            apic_id: 0,
            cpuid: Vec::new(),
            msrs: HashMap::new(),
            tsc_khz: 1_000_000,
            apic_bus_hz: 25_000_000,
            clock: Clock::Host { offset: 0 },
            msr_exits: false,
            exception_exits: 0,
            cr_exits: false,
            random_seed: 0,
            audit: 0,
            optimise: Optimisations::default(),
        }
    }
}

/// Host monotonic time in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let mut ts = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `ts` is a valid timespec to write to; CLOCK_MONOTONIC always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut ts) };
    ts.tv_sec as u64 * 1_000_000_000 + ts.tv_nsec as u64
}
