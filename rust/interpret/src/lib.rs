//! The `interpret` engine: a complete system-level x86 CPU, exact before fast.

pub mod code_cache;
pub mod config;
pub mod cpu;
pub mod debug;
pub mod decode;
pub mod events;
mod fast;
pub mod flags;
pub mod general;
pub mod mem;
pub mod mmio;
pub mod msr;
pub mod operands;
pub mod run;
pub mod state;
mod stubs;
pub mod tlb;
pub mod vcpu;
pub mod vector;
pub mod walk;

pub use config::Config;
pub use vcpu::{Handle, Vcpu};
