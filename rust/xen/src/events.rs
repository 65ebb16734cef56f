//! Ports, their pending bits and the upcall. Source: Xen's xen/common/event_2l.c.

use crate::ring::Place;
use nonroot_memory::Memory;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{fence, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

/// Where things are in the guest's shared page, which depends on its word size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Ports of one word of the pending bits.
    pub bits: u32,
    /// Offset of the pending bits.
    pub pending: u64,
    /// Offset of the mask.
    pub mask: u64,
    /// Offset of a vCPU's selector in its information.
    pub selector: u64,
}

/// A device that is served here.
pub trait Service: Send + Sync {
    /// Does what the guest has asked for.
    fn serve(&self, memory: &Memory) -> Served;
    /// Requests and bytes so far.
    fn counts(&self) -> (u64, u64);
}

/// What [`Service::serve`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Ports of the guest to raise.
    pub raise: [Option<u32>; 2],
    /// Nothing is left for the backend.
    pub all: bool,
}

/// What a guest's notification of a port does.
#[derive(Clone, Default)]
pub enum Action {
    /// Python knows.
    #[default]
    Python,
    /// Nothing: nobody is bound.
    Nothing,
    /// Another port of the same guest is raised.
    Raise(u32),
    /// A backend sleeps on an eventfd.
    Bell(Arc<OwnedFd>),
    /// A device is served here; what it leaves is the backend's.
    Serve(Arc<OwnedFd>, Arc<dyn Service>),
}

/// One port.
#[derive(Clone, Default)]
pub struct Port {
    /// The vCPU that its events are delivered to.
    pub vcpu: usize,
    /// What a notification does.
    pub action: Action,
}

#[derive(Default)]
struct Table {
    layout: Option<Layout>,
    ports: HashMap<u32, Port>,
    /// Each vCPU's information.
    infos: Vec<Option<Place>>,
    /// Each vCPU's upcall vector; 0: none.
    vectors: Vec<u8>,
    /// The port of each vCPU's VIRQ_TIMER; 0: none.
    timers: Vec<u32>,
}

/// Has an interrupt message delivered to a vCPU: (its number, vector).
type Signal = Box<dyn Fn(usize, u8) + Send + Sync>;

/// The mirror. Any thread.
pub struct Path {
    memory: Arc<Memory>,
    shared: Place,
    table: Mutex<Table>,
    signal: Signal,
    /// Machine time of vCPU 0's single shot; `u64::MAX`: none.
    shot: AtomicU64,
    /// Notifications done here.
    pub sends: AtomicU64,
    /// Other hypercalls done here.
    pub others: AtomicU64,
}

impl Path {
    /// `shared`: the shared page.
    pub fn new(memory: Arc<Memory>, shared: Place, vcpus: usize, signal: Signal) -> Path {
        let table = Table {
            infos: vec![None; vcpus],
            vectors: vec![0; vcpus],
            timers: vec![0; vcpus],
            ..Table::default()
        };
        Path {
            memory,
            shared,
            table: Mutex::new(table),
            signal,
            shot: AtomicU64::new(u64::MAX),
            sends: AtomicU64::new(0),
            others: AtomicU64::new(0),
        }
    }

    /// The domain's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The layout that the guest uses; None: everything is Python's.
    pub fn set_layout(&self, layout: Option<Layout>) {
        self.table().layout = layout;
    }

    /// Where a vCPU's information is. False if there is no such vCPU.
    pub fn set_info(&self, vcpu: usize, place: Option<Place>) -> bool {
        self.table().infos.get_mut(vcpu).map(|info| *info = place).is_some()
    }

    /// A vCPU's upcall vector; 0: Python tells it. False if there is no such vCPU.
    pub fn set_vector(&self, vcpu: usize, vector: u8) -> bool {
        self.table().vectors.get_mut(vcpu).map(|own| *own = vector).is_some()
    }

    /// The port of a vCPU's VIRQ_TIMER; 0: none. False if there is no such vCPU.
    pub fn set_timer(&self, vcpu: usize, port: u32) -> bool {
        self.table().timers.get_mut(vcpu).map(|own| *own = port).is_some()
    }

    /// What a port is; None: closed.
    pub fn set_port(&self, number: u32, port: Option<Port>) {
        let mut table = self.table();
        match port {
            Some(port) => table.ports.insert(number, port),
            None => table.ports.remove(&number),
        };
    }

    /// Has a device served here from now on, whose backend sleeps on the port's eventfd. False if the
    /// port is no backend's.
    pub fn attach(&self, number: u32, service: Arc<dyn Service>) -> bool {
        let mut table = self.table();
        let Some(port) = table.ports.get_mut(&number) else { return false };
        let (Action::Bell(bell) | Action::Serve(bell, _)) = &port.action else { return false };
        port.action = Action::Serve(bell.clone(), service);
        true
    }

    /// The backend does everything again. When this returns, nothing is being served here.
    pub fn detach(&self, number: u32) {
        let mut table = self.table();
        if let Some(port) = table.ports.get_mut(&number) {
            if let Action::Serve(bell, _) = &port.action {
                port.action = Action::Bell(bell.clone());
            }
        }
    }

    /// The guest notifies the other end of a port. False if Python has to do it.
    pub fn send(&self, number: u32) -> bool {
        // The lock is held meanwhile: `detach` waits for what is being served.
        let table = self.table();
        let Some(port) = table.ports.get(&number) else { return false };
        if !table.ready(port.vcpu) {
            return false;
        }
        match &port.action {
            Action::Python => return false,
            Action::Nothing => {}
            Action::Raise(other) => {
                if table.ports.get(other).is_some_and(|other| !table.ready(other.vcpu)) {
                    return false;
                }
                self.raise_in(&table, *other);
            }
            Action::Bell(bell) => ring_bell(bell),
            Action::Serve(bell, service) => {
                let served = service.serve(&self.memory);
                served.raise.iter().flatten().for_each(|&port| self.raise_in(&table, port));
                if !served.all {
                    ring_bell(bell);
                }
            }
        }
        self.sends.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Wakes the backend of a port.
    pub fn ring(&self, number: u32) {
        let table = self.table();
        if let Some(Port { action: Action::Bell(bell) | Action::Serve(bell, _), .. }) =
            table.ports.get(&number)
        {
            ring_bell(bell);
        }
    }

    /// Whether all events of a vCPU can be delivered from here.
    pub fn is_ready(&self, vcpu: usize) -> bool {
        self.table().ready(vcpu)
    }

    /// The guest clears a port's mask. False if Python has to do it.
    pub fn unmask(&self, number: u32) -> bool {
        let table = self.table();
        let (Some(port), Some(layout)) = (table.ports.get(&number), table.layout) else { return false };
        if !table.ready(port.vcpu) {
            return false;
        }
        let bit = 1 << (number % 32);
        let (Some(mask), Some(pending)) = (self.word(layout.mask, number), self.word(layout.pending, number))
        else {
            return false;
        };
        if mask.fetch_and(!bit, Ordering::SeqCst) & bit != 0 && pending.load(Ordering::SeqCst) & bit != 0 {
            self.select(&table, layout, port.vcpu, number);
        }
        self.others.fetch_add(1, Ordering::Relaxed);
        true
    }

    /// Raises a port's event, if it is open. False if Python has to do it.
    pub fn raise(&self, number: u32) -> bool {
        let table = self.table();
        match table.ports.get(&number) {
            Some(port) if !table.ready(port.vcpu) => false,
            Some(_) => {
                self.raise_in(&table, number);
                true
            }
            None => false,
        }
    }

    fn raise_in(&self, table: &Table, number: u32) {
        let (Some(port), Some(layout)) = (table.ports.get(&number), table.layout) else { return };
        let bit = 1 << (number % 32);
        let (Some(pending), Some(mask)) = (self.word(layout.pending, number), self.word(layout.mask, number))
        else {
            return;
        };
        if pending.fetch_or(bit, Ordering::SeqCst) & bit == 0 && mask.load(Ordering::SeqCst) & bit == 0 {
            self.select(table, layout, port.vcpu, number);
        }
    }

    /// Marks the port's word for a vCPU, and tells it if its upcall becomes pending by that.
    fn select(&self, table: &Table, layout: Layout, vcpu: usize, number: u32) {
        let Some(Some(info)) = table.infos.get(vcpu) else { return };
        let word = number / layout.bits;
        let Ok(selector) =
            self.memory.word(info.backing, info.offset + layout.selector + u64::from(word / 32 * 4))
        else {
            return;
        };
        if selector.fetch_or(1 << (word % 32), Ordering::SeqCst) & 1 << (word % 32) != 0 {
            return;
        }
        let Ok(upcall) = self.memory.word(info.backing, info.offset) else { return };
        let vector = table.vectors.get(vcpu).copied().unwrap_or(0);
        if upcall.fetch_or(1, Ordering::SeqCst) & 0xff == 0 && vector != 0 {
            (self.signal)(vcpu, vector);
        }
    }

    fn word(&self, area: u64, number: u32) -> Option<&std::sync::atomic::AtomicU32> {
        let offset = self.shared.offset + area + u64::from(number / 32 * 4);
        self.memory.word(self.shared.backing, offset).ok()
    }

    // ── vCPU 0's single shot ──

    /// Whether vCPU 0's timer can be kept here.
    pub fn keeps_timer(&self) -> bool {
        let table = self.table();
        table.ready(0) && table.timers.first().is_some_and(|&port| port != 0)
    }

    /// Fires once at `deadline` (machine time, ns), at once if that time has come; None: not at all.
    pub fn set_shot(&self, deadline: Option<u64>, now: u64) {
        self.shot.store(deadline.unwrap_or(u64::MAX), Ordering::Relaxed);
        self.advance(now);
        self.others.fetch_add(1, Ordering::Relaxed);
    }

    /// When the single shot is due.
    pub fn deadline(&self) -> Option<u64> {
        Some(self.shot.load(Ordering::Relaxed)).filter(|&shot| shot != u64::MAX)
    }

    /// The single shot fires if it is due.
    pub fn advance(&self, now: u64) {
        if self.shot.load(Ordering::Relaxed) > now {
            return;
        }
        self.shot.store(u64::MAX, Ordering::Relaxed);
        let table = self.table();
        if let Some(&port) = table.timers.first() {
            self.raise_in(&table, port);
        }
    }

    /// As at power-on.
    pub fn reset(&self) {
        self.shot.store(u64::MAX, Ordering::Relaxed);
        let mut table = self.table();
        table.layout = None;
        table.ports.clear();
        table.infos.fill(None);
        table.vectors.fill(0);
        table.timers.fill(0);
    }
}

impl Table {
    /// Whether a vCPU's events can be delivered from here.
    fn ready(&self, vcpu: usize) -> bool {
        self.layout.is_some() && self.vectors.get(vcpu).is_some_and(|&vector| vector != 0)
    }
}

fn ring_bell(bell: &OwnedFd) {
    fence(Ordering::SeqCst);
    let one = 1u64;
    // SAFETY: eight bytes that live as long as the call; a full counter refuses them, and then whoever
    // sleeps on it is being woken already.
    unsafe { libc::write(bell.as_raw_fd(), (&raw const one).cast(), 8) };
}
