//! The `interpret` engine: a complete system-level x86 CPU, exact before fast.

pub mod code_cache;
pub mod config;
pub mod cpu;
pub mod debug;
pub mod events;
pub mod flags;
pub mod mem;
pub mod mmio;
pub mod msr;
pub mod operands;
pub mod state;
pub mod tlb;
pub mod walk;
