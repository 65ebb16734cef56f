//! Instructions on the vector and x87 register files, executed by the host CPU
//! itself over the guest's registers.
//!
//! The interpreter asks [`classify`] whether an instruction is for this unit,
//! compiles it once at decode time ([`NativeUnit::compile`]), and runs the
//! small, copyable [`Compiled`] every time ([`execute`]):
//!
//! 1. [`precheck`] says whether CR0, CR4 and XCR0 allow the class at all
//!    (#UD, #NM);
//! 2. the interpreter resolves the effective address of the memory operand and
//!    checks its alignment ([`MemAccess::align`]);
//! 3. [`execute`] reads memory, runs the plan, writes memory, and only then
//!    commits registers, so that a fault of any kind leaves the instruction
//!    restartable.
//!
//! A [`Plan`] is either a copy of bytes (plain moves), a portable routine
//! (masked and gathered memory, x87 control, state save and restore), or a
//! **thunk**: generated code that loads the guest's registers, runs the very
//! instruction with its memory operand replaced by a buffer, and stores what it
//! wrote. Thunks are shared by all instructions with the same normal form.
//!
//! On hosts other than x86-64 (and with the `portable` feature) thunks are not
//! available and `compile` says so.

#[cfg(all(target_arch = "x86_64", unix, not(feature = "portable")))]
mod arena;
mod classify;
mod execute;
mod features;
mod masked;
mod plan;
pub mod state;
#[cfg(all(target_arch = "x86_64", unix, not(feature = "portable")))]
mod thunk;
#[cfg(not(all(target_arch = "x86_64", unix, not(feature = "portable"))))]
#[path = "thunk_portable.rs"]
mod thunk;
mod unit;
pub mod x87;
pub mod xstate;

pub use classify::{classify, precheck, simd_fault, uses_mxcsr, Class, Trap};
pub use execute::{execute, Control, Guest, Stop};
pub use features::HostFeatures;
pub use masked::{GatherPlan, MaskPlan};
pub use plan::{Compiled, MemAccess, Plan, ThunkRef, Unsupported};
pub use state::VectorState;
pub use unit::NativeUnit;
pub use x87::X87Control;
pub use xstate::StateOp;
