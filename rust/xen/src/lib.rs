//! What of Xen is done inside the engine, without an exit to Python and without its lock: event
//! channels with two levels of pending bits, single-shot timers, and the requests of paravirtual disks
//! and network cards that can be served at once. And the pages by which a device model is reached ([`ioreq`]).
//!
//! Python's `nonroot.xen` is the hypervisor: it binds, closes and answers for everything. Here is a
//! mirror of its table of ports, which it keeps up to date. What a mirror cannot do, or what is not plainly
//! right, is left to Python and the backend process: they alone refuse anything.

mod card;
mod disk;
mod events;
mod grants;
pub mod ioreq;
mod ring;
mod turn;

pub use card::Card;
pub use disk::Disk;
pub use events::{Action, Layout, Path, Port, Served, Service};
pub use grants::Grants;
pub use ring::Place;
pub use turn::{Turn, BACKEND, FREE, PATH};
