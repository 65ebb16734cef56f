//! The `interpret` engine: a complete system-level x86 CPU, exact before fast.

pub mod accelerate;
pub mod audit;
pub mod code_cache;
pub mod config;
pub mod control_registers;
pub mod cpu;
pub mod cpuid;
pub mod debug;
pub mod decode;
pub mod descriptors;
pub mod events;
pub mod far;
mod fast;
pub mod flags;
pub mod general;
pub mod iret;
pub mod mem;
pub mod mmio;
pub mod msr;
pub mod operands;
pub mod rehearse;
pub mod run;
pub mod segments;
pub mod state;
pub mod syscall;
pub mod system;
#[cfg(test)]
mod system_tests;
#[cfg(test)]
mod testing;
pub mod tlb;
pub mod vcpu;
pub mod vector;
pub mod walk;
pub mod window;

pub use config::Config;
pub use vcpu::{Handle, Vcpu};
