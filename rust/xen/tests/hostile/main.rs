//! Hostile rings, grants and notifications. More of them: `NONROOT_FUZZ_ROUNDS=20000 NONROOT_FUZZ_SEED=7 cargo test`.

mod cards;
mod disks;
mod grants;
mod guest;
mod ports;
