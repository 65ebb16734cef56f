//! Tests of the general executor.

#[cfg(target_arch = "x86_64")]
mod against_host;
mod control;
#[cfg(target_arch = "x86_64")]
mod generate;
#[cfg(target_arch = "x86_64")]
mod host;
mod io;
mod modes;
mod strings;
