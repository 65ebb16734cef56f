//! `IoreqPages`: the pages between a hypervisor and a device model; see `nonroot_xen::ioreq`.

use nonroot_xen::ioreq::{ring, Next, Operation, Pages, Posted, Reply, Request};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;
use std::time::Duration;

const REPLY: u8 = 0;
const OPERATIONS: u8 = 1;
const LOST: u8 = 2;
const LATE: u8 = 3;
const POKED: u8 = 4;
const WRITES: u8 = 5;
const REQUEST: u8 = 6;

/// The pages, as one side has them mapped.
#[pyclass(frozen, module = "nonroot._engine")]
pub struct IoreqPages {
    pages: Pages,
}

type OperationTuple = (u16, u16, u32, [u64; 5]);

fn duration(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| PyValueError::new_err("no such time"))
}

impl IoreqPages {
    fn await_reply(&self, py: Python<'_>, vcpu: usize, event: i32, life: i32, limit: Duration) -> (u8, u64) {
        match py.detach(|| self.pages.reply(vcpu, event, life, limit)) {
            Reply::Data(data) => (REPLY, data),
            Reply::Operations => (OPERATIONS, 0),
            Reply::Lost => (LOST, 0),
            Reply::Late => (LATE, 0),
        }
    }
}

#[pymethods]
impl IoreqPages {
    #[new]
    fn new(fd: i32, length: usize, vcpus: usize) -> PyResult<Self> {
        match Pages::map(fd, length, vcpus) {
            Ok(pages) => Ok(IoreqPages { pages }),
            Err(errno) => Err(PyOSError::new_err((errno, "the pages cannot be mapped"))),
        }
    }

    // The fields of a request, and whom to wake.
    #[allow(clippy::too_many_arguments)]
    fn submit(
        &self,
        vcpu: usize,
        kind: u8,
        flags: u8,
        addr: u64,
        data: u64,
        size: u32,
        count: u32,
        event: i32,
    ) {
        if self.pages.submit(vcpu, &Request { addr, data, count, size, flags, kind }) {
            ring(event);
        }
    }

    fn reply(&self, py: Python<'_>, vcpu: usize, event: i32, life: i32, seconds: f64) -> PyResult<(u8, u64)> {
        Ok(self.await_reply(py, vcpu, event, life, duration(seconds)?))
    }

    fn post(&self, kind: u8, addr: u32, size: u32, data: u64, event: i32) -> bool {
        let half = |at: u32, data: u64| Posted { kind, size: 3, addr: at, data: data as u32 };
        let woken = match size {
            8 => self.pages.post(&[half(addr, data), half(addr, data >> 32)]),
            1 | 2 | 4 => {
                let size = size.trailing_zeros() as u8;
                self.pages.post(&[Posted { kind, size, addr, data: data as u32 }])
            }
            _ => None,
        };
        if woken == Some(true) {
            ring(event);
        }
        woken.is_some()
    }

    fn posted(&self) -> u32 {
        self.pages.posted()
    }

    fn operation(&self) -> Option<OperationTuple> {
        self.pages.operation().map(|o| (o.domid, o.op, o.flags, o.args))
    }

    fn finish_operation(&self, status: i64, event: i32) {
        if self.pages.finish_operation(status) {
            ring(event);
        }
    }

    fn wait_for_event(&self, py: Python<'_>, event: i32, life: i32) -> bool {
        py.detach(|| self.pages.wait_for_event(event, life))
    }

    fn stamp(&self, now_ns: u64, generation: u64) {
        self.pages.stamp(now_ns, generation);
    }

    fn deadline(&self) -> u64 {
        self.pages.deadline()
    }

    fn state(&self, vcpu: usize) -> u8 {
        self.pages.slot_state(vcpu)
    }

    #[pyo3(signature = (event, life, seconds = None))]
    fn next<'py>(
        &self,
        py: Python<'py>,
        event: i32,
        life: i32,
        seconds: Option<f64>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let limit = seconds.map(duration).transpose()?;
        match py.detach(|| self.pages.next(event, life, limit)) {
            Next::Poked => (POKED,).into_pyobject(py),
            Next::Lost => (LOST,).into_pyobject(py),
            Next::Nothing => (LATE,).into_pyobject(py),
            Next::Request(vcpu, r) => {
                (REQUEST, vcpu, r.kind, r.flags, r.addr, r.data, r.size, r.count).into_pyobject(py)
            }
            Next::Writes(writes) => {
                let writes: Vec<_> = writes.iter().map(|w| (w.kind, w.addr, w.size, w.data)).collect();
                (WRITES, writes).into_pyobject(py)
            }
        }
    }

    fn finish_writes(&self, count: u32) {
        self.pages.finish_writes(count);
    }

    fn respond(&self, vcpu: usize, data: u64, event: i32) {
        if self.pages.respond(vcpu, data) {
            ring(event);
        }
    }

    fn restart(&self) {
        self.pages.restart();
    }

    fn push(&self, domid: u16, op: u16, flags: u32, args: [u64; 5]) -> Option<u32> {
        self.pages.push(&Operation { domid, op, flags, args })
    }

    fn wake_caller(&self, event: i32) {
        if self.pages.caller_sleeps() {
            ring(event);
        }
    }

    fn status(&self, py: Python<'_>, index: u32, event: i32, life: i32) -> Option<i64> {
        py.detach(|| self.pages.status(index, event, life))
    }

    fn now(&self) -> u64 {
        self.pages.now()
    }

    fn generation(&self) -> u64 {
        self.pages.generation()
    }

    fn pushed(&self) -> u32 {
        self.pages.pushed()
    }

    fn set_deadline(&self, deadline_ns: u64) {
        self.pages.set_deadline(deadline_ns);
    }

    fn poke(&self, event: i32) {
        if self.pages.poke() {
            ring(event);
        }
    }

    fn spin_ns(&self) -> u32 {
        self.pages.spin_ns()
    }
}
