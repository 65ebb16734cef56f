//! Takes away from the calling process what it does not need, for good.
//!
//! Each function is one layer, works without privileges, and says what the host did not grant. Which layers a process
//! takes, and with what exceptions, is decided in Python (`nonroot.confine`).

mod calls;
mod files;
mod process;

pub use calls::{known, restrict_calls, Rules};
pub use files::{landlock_version, restrict_files, Below};
pub use process::{close_others, drop_capabilities, enter_namespaces, refuse_privileges, seccomp_is_there};
