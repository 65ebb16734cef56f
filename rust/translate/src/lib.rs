//! The `translate` engine: guest code of 64-bit and flat 32-bit mode carried over
//! to an x86-64 host, block by block.
//!
//! It plugs into the interpreter's run loop as an [`Accelerator`] and shares its
//! state, TLB and block cache: what it does not translate, and every instruction
//! that would fault, exit or touch more than plain memory, the interpreter
//! executes, at an instruction boundary with exact registers.
//!
//! * `analysis`: what an instruction reads, writes and needs;
//! * `emit`: blocks of them as host code;
//! * `frame`: the context of running code, how it is entered and left;
//! * `x87`: how the x87 state is given to the guest and taken back;
//! * `faults`: how an access that faults goes on;
//! * `arena`: the memory that it is in;
//! * `translator`: running, chaining, dropping.
//!
//! [`Accelerator`]: nonroot_interpret::accelerate::Accelerator

#![cfg(target_arch = "x86_64")]

mod analysis;
mod arena;
mod assembler;
mod emit;
mod faults;
mod frame;
pub mod switches;
mod translator;
mod x87;

pub use switches::Switches;
pub use translator::{available, Translator};
