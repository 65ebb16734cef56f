//! `Vcpu`: one vCPU under the `interpret` engine.
//!
//! The vCPU itself is behind a lock that is only ever tried: a second thread
//! that wants to run it gets an error, never a deadlock. What other threads may
//! do goes through the handle and the shared addressing of the local APIC, which
//! need no lock.

use crate::exits::{self, Answer};
use crate::memory::Memory;
use crate::options::{self, Leaf};
use crate::xen;
use crate::{cpu_state, exits::NAMES};
use nonroot_interpret::config::monotonic_ns;
use nonroot_interpret::state::Exit;
use nonroot_interpret::state::{ar, cr0, efer, rflags, seg, Clock};
use nonroot_interpret::Handle;
use nonroot_lapic::Addressing;
use nonroot_xen::Path;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, TryLockError};

/// A vCPU and what its last exit waits for.
pub struct Inner {
    pub vcpu: nonroot_interpret::Vcpu,
    answer: Answer,
    exits: [u64; NAMES.len()],
}

/// One vCPU.
#[pyclass(frozen, module = "nonroot._engine")]
pub struct Vcpu {
    inner: Mutex<Inner>,
    handle: Handle,
    addressing: Arc<Addressing>,
    /// A copy of the vCPU's clock, to tell the time while it runs.
    clock: Mutex<Clock>,
    /// What of Xen is done here.
    xen: OnceLock<Arc<Path>>,
}

impl Vcpu {
    /// The vCPU itself. RuntimeError while another thread uses it.
    pub fn inner(&self) -> PyResult<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::WouldBlock) => {
                Err(PyRuntimeError::new_err("this vCPU is running or waiting in another thread"))
            }
            Err(TryLockError::Poisoned(_)) => {
                Err(PyRuntimeError::new_err("this vCPU is unusable after an internal error of the engine"))
            }
        }
    }

    /// What other threads may do.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Has that of Xen which `path` can do done here.
    pub fn attach_xen(&self, path: Arc<Path>) -> PyResult<()> {
        let free = self.xen.set(path);
        free.map_err(|_| PyValueError::new_err("this vCPU has a path of Xen's already"))
    }

    fn remember_clock(&self, inner: &Inner) {
        if let Ok(mut clock) = self.clock.lock() {
            *clock = inner.vcpu.cpu.clock.clone();
        }
    }
}

/// Moves machine time to `now`.
pub fn set_clock(vcpu: &mut nonroot_interpret::Vcpu, now: u64) -> Result<(), String> {
    let retired = vcpu.cpu.retired;
    match &mut vcpu.cpu.clock {
        Clock::Host { offset } => *offset = now.wrapping_sub(monotonic_ns()) as i64,
        Clock::Virtual { base, num, den } => {
            let run = (u128::from(retired) * u128::from(*num) / u128::from(*den)) as u64;
            *base = now.checked_sub(run).ok_or_else(|| {
                format!("machine time cannot be {now} ns after {retired} instructions of virtual time")
            })?;
        }
    }
    Ok(())
}

fn earlier(one: Option<u64>, other: Option<u64>) -> Option<u64> {
    one.into_iter().chain(other).min()
}

/// Runs until an exit that is not done with here.
fn run_with_xen(
    vcpu: &mut nonroot_interpret::Vcpu,
    path: &Path,
    deadline_ns: Option<u64>,
    limit: Option<u64>,
) -> Exit {
    loop {
        let exit = vcpu.run(earlier(deadline_ns, path.deadline()), limit);
        match exit {
            Exit::Hypercall { .. } if xen::hypercall(vcpu, path) => continue,
            // It may be a kick as well: the caller looks.
            Exit::Interrupted => path.advance(vcpu.cpu.now_ns()),
            _ => {}
        }
        return exit;
    }
}

/// Sleeps; Xen's timer of this vCPU fires meanwhile.
fn wait_with_xen(vcpu: &mut nonroot_interpret::Vcpu, path: &Path, deadline_ns: Option<u64>) -> bool {
    loop {
        let runnable = vcpu.wait(earlier(deadline_ns, path.deadline()));
        let now = vcpu.cpu.now_ns();
        path.advance(now);
        if runnable || deadline_ns.is_some_and(|deadline| deadline <= now) {
            return runnable;
        }
    }
}

#[pymethods]
impl Vcpu {
    #[new]
    fn new(
        memory: &Memory,
        apic_id: u32,
        cpuid: Vec<Leaf>,
        msrs: HashMap<u32, (u64, u64)>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        let options = options::config(apic_id, cpuid, msrs, options)?;
        let clock = Mutex::new(options.config.clock.clone());
        let mut vcpu = nonroot_interpret::Vcpu::new(memory.inner.clone(), options.config.clone());
        if options.translate {
            crate::translate::attach(&mut vcpu, &options).map_err(PyValueError::new_err)?;
        }
        let handle = vcpu.handle();
        let addressing = vcpu.cpu.lapic.addressing();
        let inner = Mutex::new(Inner { vcpu, answer: Answer::None, exits: [0; NAMES.len()] });
        Ok(Vcpu { inner, handle, addressing, clock, xen: OnceLock::new() })
    }

    #[pyo3(signature = (deadline_ns = None, limit = None))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        deadline_ns: Option<u64>,
        limit: Option<u64>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let mut inner = self.inner()?;
        let inner = &mut *inner;
        if inner.answer == Answer::MsrWrite {
            // Neither refused nor accepted explicitly: accepted.
            inner.vcpu.complete(&[]).map_err(PyValueError::new_err)?;
        }
        inner.answer = Answer::None;
        let vcpu = &mut inner.vcpu;
        let exit = match self.xen.get() {
            None => py.detach(|| vcpu.run(deadline_ns, limit)),
            Some(path) => py.detach(|| run_with_xen(vcpu, path, deadline_ns, limit)),
        };
        inner.answer = exits::answer(&exit);
        inner.exits[exits::number(&exit)] += 1;
        exits::to_python(py, &exit)
    }

    fn complete(&self, data: &[u8]) -> PyResult<()> {
        let mut inner = self.inner()?;
        match inner.answer {
            Answer::None => return Err(PyValueError::new_err("the last exit does not wait for data")),
            Answer::Bytes(n) if n != data.len() => {
                return Err(PyValueError::new_err(format!(
                    "the last exit is answered with {n} bytes, not with {}",
                    data.len()
                )));
            }
            Answer::MsrWrite if !data.is_empty() => {
                return Err(PyValueError::new_err("an MSR write is answered with no bytes"));
            }
            _ => {}
        }
        inner.vcpu.complete(data).map_err(PyValueError::new_err)?;
        inner.answer = Answer::None;
        Ok(())
    }

    fn fail(&self) -> PyResult<()> {
        let mut inner = self.inner()?;
        inner.vcpu.fail().map_err(PyValueError::new_err)?;
        inner.answer = Answer::None;
        Ok(())
    }

    fn set_pic_vector(&self, vector: u8) -> PyResult<()> {
        self.inner()?.vcpu.set_pic_vector(vector);
        Ok(())
    }

    fn kick(&self) {
        self.handle.kick();
    }

    fn wait(&self, py: Python<'_>, deadline_ns: Option<u64>) -> PyResult<bool> {
        let mut inner = self.inner()?;
        let vcpu = &mut inner.vcpu;
        let runnable = match self.xen.get() {
            None => py.detach(|| vcpu.wait(deadline_ns)),
            Some(path) => py.detach(|| wait_with_xen(vcpu, path, deadline_ns)),
        };
        self.remember_clock(&inner);
        Ok(runnable)
    }

    fn set_pic_line(&self, asserted: bool) {
        self.handle.set_pic_line(asserted);
    }

    fn signal(&self, vector: u8, mode: u8, level: bool) -> PyResult<()> {
        if mode > 7 || mode == 3 {
            return Err(PyValueError::new_err(format!("there is no interrupt delivery mode {mode}")));
        }
        self.handle.signal(vector, mode, level);
        Ok(())
    }

    fn lapic_matches(&self, destination: u32, logical: bool) -> bool {
        self.addressing.matches(destination, logical)
    }

    fn nmi(&self) {
        self.handle.nmi();
    }

    fn interrupt(&self, vector: u8) -> PyResult<()> {
        self.inner()?.vcpu.cpu.injected = Some(vector);
        Ok(())
    }

    fn request_interrupt_window(&self, wanted: bool) -> PyResult<()> {
        self.inner()?.vcpu.cpu.want_window = wanted;
        Ok(())
    }

    fn set_guest_debug(&self, single_step: bool, breakpoints: Vec<(u64, u8, u8)>) -> PyResult<()> {
        if breakpoints.len() > 4 {
            return Err(PyValueError::new_err("there are four hardware breakpoints, not more"));
        }
        for &(address, length, kind) in &breakpoints {
            let fits = matches!(length, 1 | 2 | 4 | 8) && address % u64::from(length.max(1)) == 0;
            if !fits || !matches!(kind, 0 | 1 | 3) || (kind == 0 && length != 1) {
                return Err(PyValueError::new_err(format!(
                    "({address:#x}, {length}, {kind}) is no breakpoint: aligned lengths 1, 2, 4, 8, types 0 \
                     (execute, length 1), 1 (write) and 3 (access)"
                )));
            }
        }
        let mut inner = self.inner()?;
        let cpu = &mut inner.vcpu.cpu;
        cpu.guest_debug =
            nonroot_interpret::debug::GuestDebug { single_step, breakpoints, ..Default::default() };
        // Pages with data breakpoints stay out of the TLB from now on.
        cpu.flush_tlb_all();
        cpu.interrupts_changed();
        Ok(())
    }

    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let mut inner = self.inner()?;
        inner.vcpu.settle();
        inner.vcpu.cpu.take_arrived();
        cpu_state::to_python(py, &inner.vcpu)
    }

    fn set_state(&self, state: &Bound<'_, PyDict>) -> PyResult<()> {
        let mut inner = self.inner()?;
        let record = cpu_state::Record::from_python(state)?;
        record.apply(&mut inner.vcpu).map_err(PyValueError::new_err)?;
        inner.answer = Answer::None;
        self.remember_clock(&inner);
        Ok(())
    }

    fn now_ns(&self) -> u64 {
        if let Ok(inner) = self.inner.try_lock() {
            return inner.vcpu.cpu.now_ns();
        }
        match self.clock.lock().map(|clock| clock.clone()) {
            Ok(Clock::Virtual { base, num, den }) => {
                let retired = u128::from(self.handle.retired());
                base.wrapping_add((retired * u128::from(num) / u128::from(den)) as u64)
            }
            Ok(Clock::Host { offset }) => monotonic_ns().wrapping_add(offset as u64),
            Err(_) => 0,
        }
    }

    fn set_now_ns(&self, now: u64) -> PyResult<()> {
        let mut inner = self.inner()?;
        set_clock(&mut inner.vcpu, now).map_err(PyValueError::new_err)?;
        inner.vcpu.cpu.interrupts_changed();
        self.remember_clock(&inner);
        Ok(())
    }

    fn retired(&self) -> u64 {
        match self.inner.try_lock() {
            Ok(inner) => inner.vcpu.cpu.retired,
            Err(_) => self.handle.retired(),
        }
    }

    fn statistics<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let inner = self.inner()?;
        let cpu = &inner.vcpu.cpu;
        let out = PyDict::new(py);
        out.set_item("instructions", cpu.retired)?;
        for (name, count) in NAMES.iter().zip(inner.exits) {
            out.set_item(format!("exits_{name}"), count)?;
        }
        let s = &cpu.stats;
        for (name, count) in [
            ("blocks_decoded", s.blocks_decoded),
            ("instructions_decoded", s.instructions_decoded),
            ("blocks_invalidated", s.blocks_invalidated),
            ("page_walks", s.walks),
            ("translation_flushes", s.flushes),
            ("exceptions", s.exceptions),
            ("page_faults", s.page_faults),
            ("interrupts", s.interrupts),
            ("general_instructions", s.general),
        ] {
            out.set_item(name, count)?;
        }
        if let Some(audit) = &cpu.audit {
            out.set_item("audit_rounds", audit.rounds)?;
            out.set_item("audited_translations", audit.entries)?;
            out.set_item("audited_translations_stale", audit.stale)?;
            out.set_item("audited_blocks", audit.blocks)?;
        }
        for (name, count) in cpu.accelerator.iter().flat_map(|a| a.statistics()) {
            out.set_item(name, count)?;
        }
        Ok(out)
    }

    /// What a hypercall is made with: 64-bit code or not, the privilege level, the general registers.
    fn hypercall_arguments(&self) -> PyResult<(bool, u8, Vec<u64>)> {
        let inner = self.inner()?;
        let r = &inner.vcpu.cpu.r;
        let long = r.efer & efer::LMA != 0 && r.seg[seg::CS].ar & ar::L != 0;
        let level = match (r.cr0 & cr0::PE != 0, r.rflags & rflags::VM != 0) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => inner.vcpu.cpu.cpl,
        };
        Ok((long, level, r.gpr[..16].to_vec()))
    }

    fn set_register(&self, index: usize, value: u64) -> PyResult<()> {
        if index >= 16 {
            return Err(PyValueError::new_err(format!("there is no general register {index}")));
        }
        self.inner()?.vcpu.cpu.r.gpr[index] = value;
        Ok(())
    }

    fn translate(&self, linear: u64) -> PyResult<Option<u64>> {
        Ok(self.inner()?.vcpu.cpu.translate_quiet(linear))
    }

    fn flush(&self) -> PyResult<()> {
        let mut inner = self.inner()?;
        inner.vcpu.cpu.flush_tlb_all();
        inner.vcpu.cpu.flush_code();
        Ok(())
    }
}
