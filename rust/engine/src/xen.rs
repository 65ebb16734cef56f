//! `XenPath`: what of Xen is done without leaving the engine; see the crate `nonroot-xen`.

use crate::memory::Memory;
use crate::vcpu::Vcpu;
use nonroot_interpret::state::{ar, cr0, efer, rflags, seg};
use nonroot_xen::{Action, Card, Disk, Grants, Layout, Path, Place, Port, Service, Turn};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

/// (name, description) of what can be switched off.
pub const SWITCHES: &[(&str, &str)] =
    &[("xen-path", "Xen's event channels, timers and ready disks are served without leaving the engine")];

const SET_TIMER_OP: u32 = 15;
const VCPU_OP: u32 = 24;
const SCHED_OP: u32 = 29;
const EVENT_CHANNEL_OP: u32 = 32;
const SCHED_YIELD: u32 = 0;
const SET_SINGLESHOT_TIMER: u32 = 8;
const STOP_SINGLESHOT_TIMER: u32 = 9;
const SINGLESHOT_FUTURE: u32 = 1;
const EVENT_SEND: u32 = 4;
const EVENT_UNMASK: u32 = 9;
const LATEST: u64 = 1 << 62;
/// A set_timer_op further ahead than that is taken for a mistake, which Python corrects.
const FAR: u64 = 1 << 50;

/// What of Xen is done without leaving the engine.
#[pyclass(frozen, module = "nonroot._engine")]
pub struct XenPath {
    pub path: Arc<Path>,
    memory: Arc<nonroot_memory::Memory>,
    disks: Mutex<HashMap<u32, Arc<Disk>>>,
    cards: Mutex<Vec<(Arc<Card>, [u32; 2])>>,
}

/// A descriptor of our own for the same open file.
fn own(fd: i32) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err(format!("{fd} is no descriptor")));
    }
    // SAFETY: the caller has it open during this call; a bad number is refused by the kernel.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    borrowed.try_clone_to_owned().map_err(|error| PyOSError::new_err(error.to_string()))
}

/// The page that says whose turn it is: a descriptor and an offset.
fn turn_of((fd, offset): (i32, i64)) -> PyResult<Turn> {
    Turn::map(fd, offset, 0)
        .map_err(|errno| PyOSError::new_err((errno, "the page of the rings' turns cannot be mapped")))
}

fn place((backing, offset): (usize, u64)) -> Place {
    Place { backing, offset }
}

impl XenPath {
    fn disks(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Arc<Disk>>> {
        self.disks.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Ends the threads of a port's cards, or of all.
    fn stop_cards(&self, number: Option<u32>) {
        let mut cards = self.cards.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        cards.retain(|(card, ports)| {
            let goes = number.is_none_or(|number| ports.contains(&number));
            if goes {
                card.stop();
            }
            !goes
        });
    }

    fn set(&self, py: Python<'_>, number: u32, vcpu: usize, action: Action) {
        py.detach(|| self.path.set_port(number, Some(Port { vcpu, action })));
    }
}

impl Drop for XenPath {
    /// The cards' threads have nobody to work for.
    fn drop(&mut self) {
        self.stop_cards(None);
    }
}

#[pymethods]
impl XenPath {
    #[new]
    fn new(py: Python<'_>, memory: &Memory, vcpus: Vec<Py<Vcpu>>, shared: (usize, u64)) -> PyResult<Self> {
        let inner = memory.inner.clone();
        inner
            .place(shared.0, shared.1, 4096)
            .map_err(|_| PyValueError::new_err("the shared page is not in a backing"))?;
        let handles: Vec<_> = vcpus.iter().map(|vcpu| vcpu.get().handle()).collect();
        let count = handles.len();
        let signal = Box::new(move |vcpu: usize, vector: u8| {
            if let Some(handle) = handles.get(vcpu) {
                handle.signal(vector, 0, false);
            }
        });
        let path = Arc::new(Path::new(inner.clone(), place(shared), count, signal));
        for vcpu in &vcpus {
            let _ = py;
            vcpu.get().attach_xen(path.clone())?;
        }
        Ok(XenPath { path, memory: inner, disks: Mutex::default(), cards: Mutex::default() })
    }

    fn layout(&self, bits: u32, pending: u64, mask: u64, selector: u64) -> PyResult<()> {
        if !matches!(bits, 32 | 64) {
            return Err(PyValueError::new_err(format!("there are no words of {bits} bits")));
        }
        self.path.set_layout(Some(Layout { bits, pending, mask, selector }));
        Ok(())
    }

    fn info(&self, vcpu: usize, info: Option<(usize, u64)>) -> PyResult<()> {
        let known = self.path.set_info(vcpu, info.map(place));
        known.then_some(()).ok_or_else(|| PyValueError::new_err(format!("there is no vCPU {vcpu}")))
    }

    fn vector(&self, vcpu: usize, vector: u8) -> PyResult<()> {
        let known = self.path.set_vector(vcpu, vector);
        known.then_some(()).ok_or_else(|| PyValueError::new_err(format!("there is no vCPU {vcpu}")))
    }

    fn timer(&self, vcpu: usize, port: u32) -> PyResult<()> {
        let known = self.path.set_timer(vcpu, port);
        known.then_some(()).ok_or_else(|| PyValueError::new_err(format!("there is no vCPU {vcpu}")))
    }

    fn closed(&self, py: Python<'_>, number: u32) {
        py.detach(|| self.path.set_port(number, None));
        self.disks().remove(&number);
        self.stop_cards(Some(number));
    }

    fn foreign(&self, py: Python<'_>, number: u32, vcpu: usize) {
        self.set(py, number, vcpu, Action::Python);
    }

    fn unbound(&self, py: Python<'_>, number: u32, vcpu: usize) {
        self.set(py, number, vcpu, Action::Nothing);
    }

    fn raises(&self, py: Python<'_>, number: u32, vcpu: usize, other: u32) {
        self.set(py, number, vcpu, Action::Raise(other));
    }

    fn bell(&self, py: Python<'_>, number: u32, vcpu: usize, bell: i32) -> PyResult<()> {
        self.set(py, number, vcpu, Action::Bell(Arc::new(own(bell)?)));
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn add_disk(
        &self,
        py: Python<'_>,
        number: u32,
        pages: Vec<(usize, u64)>,
        long: bool,
        turn: (i32, i64),
        grants: (usize, u64, u32),
        image: i32,
        end: u64,
        writable: bool,
    ) -> PyResult<bool> {
        let places: Vec<Place> = pages.into_iter().map(place).collect();
        let turn = turn_of(turn)?;
        let grants = Grants { table: place((grants.0, grants.1)), entries: grants.2 };
        let disk = Disk::new(&self.memory, number, &places, long, turn, grants, own(image)?, end, writable)
            .map_err(|_| PyValueError::new_err("the ring's pages are not in a backing"))?;
        let disk = Arc::new(disk);
        let service: Arc<dyn Service> = disk.clone();
        let added = py.detach(|| self.path.attach(number, service));
        if added {
            self.disks().insert(number, disk);
        }
        Ok(added)
    }

    #[allow(clippy::too_many_arguments)]
    fn add_card(
        &self,
        py: Python<'_>,
        ports: (u32, u32),
        tx: (usize, u64),
        rx: (usize, u64),
        turn: (i32, i64),
        grants: (usize, u64, u32),
        link: i32,
        alarm: i32,
    ) -> PyResult<bool> {
        if !self.path.is_ready(0) {
            return Ok(false);
        }
        let turn = turn_of(turn)?;
        let grants = Grants { table: place((grants.0, grants.1)), entries: grants.2 };
        let numbers = [ports.0, ports.1];
        let card =
            Card::new(&self.memory, place(tx), place(rx), numbers, turn, grants, own(link)?, own(alarm)?)
                .map_err(|_| PyValueError::new_err("the rings' pages are not in a backing"))?;
        let card = Arc::new(card);
        let attached = py.detach(|| {
            numbers.iter().all(|&number| self.path.attach(number, card.clone() as Arc<dyn Service>))
        });
        let (runner, path) = (card.clone(), Arc::downgrade(&self.path));
        let thread = std::thread::Builder::new().name("nonroot-card".to_string());
        if !attached || thread.spawn(move || runner.run(&path)).is_err() {
            py.detach(|| numbers.iter().for_each(|&number| self.path.detach(number)));
            return Ok(false);
        }
        self.cards.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push((card, numbers));
        Ok(true)
    }

    fn resize_disk(&self, number: u32, end: u64) {
        if let Some(disk) = self.disks().get(&number) {
            disk.set_end(end);
        }
    }

    fn remove(&self, py: Python<'_>, number: u32) {
        py.detach(|| self.path.detach(number));
        self.disks().remove(&number);
        self.stop_cards(Some(number));
    }

    fn send(&self, py: Python<'_>, number: u32) -> bool {
        py.detach(|| self.path.send(number))
    }

    fn unmask(&self, py: Python<'_>, number: u32) -> bool {
        py.detach(|| self.path.unmask(number))
    }

    fn raise_event(&self, py: Python<'_>, number: u32) -> bool {
        py.detach(|| self.path.raise(number))
    }

    fn set_shot(&self, py: Python<'_>, deadline_ns: Option<u64>, now_ns: u64) {
        py.detach(|| self.path.set_shot(deadline_ns, now_ns));
    }

    fn shot(&self, py: Python<'_>) -> Option<u64> {
        py.detach(|| self.path.deadline())
    }

    fn reset(&self, py: Python<'_>) {
        py.detach(|| self.path.reset());
        self.disks().clear();
        self.stop_cards(None);
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = PyDict::new(py);
        out.set_item("notifications", self.path.sends.load(Ordering::Relaxed))?;
        out.set_item("timers_and_masks", self.path.others.load(Ordering::Relaxed))?;
        let (mut requests, mut bytes) = (0, 0);
        for disk in self.disks().values() {
            let counts = disk.counts();
            requests += counts.0;
            bytes += counts.1;
        }
        let cards = self.cards.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        out.set_item("card_packets", cards.iter().map(|(card, _)| card.counts().0).sum::<u64>())?;
        out.set_item("card_bytes", cards.iter().map(|(card, _)| card.counts().1).sum::<u64>())?;
        out.set_item("disk_requests", requests)?;
        out.set_item("disk_bytes", bytes)?;
        Ok(out)
    }
}

/// Does a hypercall, if it is one of those. False: it is Python's.
pub fn hypercall(vcpu: &mut nonroot_interpret::Vcpu, path: &Path) -> bool {
    let cpu = &mut vcpu.cpu;
    let r = &cpu.r;
    if r.cr0 & cr0::PE == 0 || r.rflags & rflags::VM != 0 || cpu.cpl != 0 {
        return false;
    }
    let long = r.efer & efer::LMA != 0 && r.seg[seg::CS].ar & ar::L != 0;
    // RDI, RSI, RDX, or EBX, ECX, EDX.
    let args = if long {
        [r.gpr[7], r.gpr[6], r.gpr[2]]
    } else {
        [r.gpr[3], r.gpr[1], r.gpr[2]].map(|v| v & 0xffff_ffff)
    };
    let command = args[0] as u32;
    let word = |at: u64| -> Option<u32> {
        if at & 0xfff > 0xffc {
            return None;
        }
        let mut data = [0; 4];
        path.memory().read(cpu.translate_quiet(at)?, &mut data).ok()?;
        Some(u32::from_le_bytes(data))
    };
    let done = match r.gpr[0] as u32 {
        EVENT_CHANNEL_OP if command == EVENT_SEND => word(args[1]).is_some_and(|port| path.send(port)),
        EVENT_CHANNEL_OP if command == EVENT_UNMASK => word(args[1]).is_some_and(|port| path.unmask(port)),
        SCHED_OP => command == SCHED_YIELD,
        VCPU_OP if command == SET_SINGLESHOT_TIMER && args[1] as u32 == 0 && path.keeps_timer() => {
            let fields = [0, 4, 8].map(|at| word(args[2].wrapping_add(at)));
            match fields {
                [Some(low), Some(high), Some(flags)] => {
                    let deadline = (u64::from(high) << 32 | u64::from(low)).min(LATEST);
                    let now = cpu.now_ns();
                    // What is past and must not be is refused by Python.
                    let fine = flags & SINGLESHOT_FUTURE == 0 || deadline >= now;
                    if fine {
                        path.set_shot(Some(deadline), now);
                    }
                    fine
                }
                _ => false,
            }
        }
        VCPU_OP if command == STOP_SINGLESHOT_TIMER && args[1] as u32 == 0 && path.keeps_timer() => {
            path.set_shot(None, cpu.now_ns());
            true
        }
        SET_TIMER_OP if path.keeps_timer() => {
            let deadline = if long { args[0] } else { args[0] | args[1] << 32 };
            let now = cpu.now_ns();
            let fine = deadline < 1 << 63 && deadline <= now + FAR;
            if fine {
                path.set_shot(Some(deadline).filter(|&at| at != 0), now);
            }
            fine
        }
        _ => false,
    };
    if done {
        cpu.r.gpr[0] = 0;
        cpu.interrupts_changed();
    }
    done
}
