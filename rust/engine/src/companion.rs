//! `Companion`: all of a vCPU but the execution of its instructions. An engine whose guest code something else
//! executes has a vCPU of the interpreter beside it, whose local APIC, plain MSRs, mailbox, clock and sleep it uses.

use crate::exits;
use crate::vcpu::Vcpu;
use nonroot_interpret::msr::MsrError;
use nonroot_interpret::state::{request, rflags, Activity, Exit};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use std::sync::atomic::Ordering;

const ENTER: u8 = 0;
const ENTER_FOR_WINDOW: u8 = 1;
const INJECT: u8 = 2;
const INJECT_NMI: u8 = 3;
const RETURN: u8 = 4;
const REPLACE: u8 = 5;

const MODE_INIT: u8 = 5;
const MODE_STARTUP: u8 = 6;

/// What a vCPU is besides its instructions.
#[pyclass(frozen, module = "nonroot._engine")]
pub struct Companion {
    vcpu: Py<Vcpu>,
}

/// What is to be done before the guest is entered.
enum Next {
    Enter { window: bool },
    Inject(u8),
    Nmi,
    Return(Exit),
    Replace,
}

fn next(vcpu: &mut nonroot_interpret::Vcpu, interruptible: bool) -> Next {
    let cpu = &mut vcpu.cpu;
    if cpu.mailbox.requests.load(Ordering::Acquire) & request::MESSAGE != 0 {
        let messages = cpu.mailbox.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if messages.iter().any(|m| matches!(m.mode, MODE_INIT | MODE_STARTUP)) {
            return Next::Replace;
        }
    }
    let requests = cpu.mailbox.requests.swap(0, Ordering::AcqRel);
    if requests & request::NMI != 0 {
        cpu.nmi_pending = true;
    }
    if requests & request::MESSAGE != 0 {
        cpu.take_messages();
    }
    let now = cpu.now_ns();
    if cpu.lapic.deadline().is_some_and(|at| at <= now) {
        cpu.lapic.advance(now);
    }
    if !cpu.pending_exits.is_empty() {
        cpu.mailbox.requests.fetch_or(requests & request::KICK, Ordering::AcqRel);
        return Next::Return(cpu.pending_exits.remove(0));
    }
    if requests & request::KICK != 0 {
        return Next::Return(Exit::Interrupted);
    }
    match cpu.activity {
        Activity::Shutdown => return Next::Return(Exit::TripleFault),
        Activity::WaitForSipi => return Next::Return(Exit::Halt),
        Activity::Running | Activity::Halted => {}
    }
    if cpu.nmi_pending {
        cpu.nmi_pending = false;
        cpu.activity = Activity::Running;
        return Next::Nmi;
    }
    if interruptible {
        let vector =
            cpu.injected.take().or_else(|| cpu.pic_vector.take()).or_else(|| cpu.lapic.acknowledge());
        if let Some(vector) = vector {
            cpu.activity = Activity::Running;
            cpu.stats.interrupts += 1;
            return Next::Inject(vector);
        }
        if cpu.mailbox.pic_line.load(Ordering::Acquire) && cpu.lapic.accepts_pic() {
            return Next::Return(Exit::PicAcknowledge);
        }
        if cpu.want_window {
            cpu.want_window = false;
            return Next::Return(Exit::InterruptWindow);
        }
    }
    let waiting = cpu.interrupt_waiting();
    if cpu.activity == Activity::Halted {
        if !waiting || cpu.r.rflags & rflags::IF == 0 {
            return Next::Return(Exit::Halt);
        }
        cpu.activity = Activity::Running;
    }
    Next::Enter { window: waiting }
}

fn set_cr8(vcpu: &mut nonroot_interpret::Vcpu, cr8: u8) {
    let lapic = &mut vcpu.cpu.lapic;
    // Bits 3:0 of the task priority are not in CR8: they stay where it is the same.
    if lapic.cr8() != u64::from(cr8 & 15) {
        lapic.set_cr8(u64::from(cr8 & 15));
    }
}

fn status<T: Default>(result: Result<T, MsrError>) -> (u8, T) {
    match result {
        Ok(value) => (0, value),
        Err(MsrError::Unknown) => (1, T::default()),
        Err(MsrError::Refused) => (2, T::default()),
    }
}

#[pymethods]
impl Companion {
    #[new]
    fn new(vcpu: Py<Vcpu>) -> Self {
        Companion { vcpu }
    }

    fn attend<'py>(&self, py: Python<'py>, interruptible: bool, cr8: u8) -> PyResult<Bound<'py, PyTuple>> {
        let mut inner = self.vcpu.get().inner()?;
        let vcpu = &mut inner.vcpu;
        set_cr8(vcpu, cr8);
        let timer = |vcpu: &nonroot_interpret::Vcpu| vcpu.cpu.lapic.deadline();
        match next(vcpu, interruptible) {
            Next::Enter { window: false } => (ENTER, 0, timer(vcpu)).into_pyobject(py),
            Next::Enter { window: true } => (ENTER_FOR_WINDOW, 0, timer(vcpu)).into_pyobject(py),
            Next::Inject(vector) => (INJECT, vector, None::<u64>).into_pyobject(py),
            Next::Nmi => (INJECT_NMI, 0, None::<u64>).into_pyobject(py),
            Next::Return(exit) => {
                let exit = exits::to_python(py, &exit)?;
                (RETURN, exit, None::<u64>).into_pyobject(py)
            }
            Next::Replace => (REPLACE, 0, None::<u64>).into_pyobject(py),
        }
    }

    fn take_messages(&self) -> PyResult<()> {
        let mut inner = self.vcpu.get().inner()?;
        inner.vcpu.cpu.mailbox.requests.fetch_and(!request::MESSAGE, Ordering::AcqRel);
        inner.vcpu.cpu.take_messages();
        Ok(())
    }

    fn halt(&self, interrupts_on: bool) -> PyResult<()> {
        let mut inner = self.vcpu.get().inner()?;
        let cpu = &mut inner.vcpu.cpu;
        cpu.activity = Activity::Halted;
        cpu.r.rflags = cpu.r.rflags & !rflags::IF | if interrupts_on { rflags::IF } else { 0 };
        Ok(())
    }

    fn shut_down(&self) -> PyResult<()> {
        self.vcpu.get().inner()?.vcpu.cpu.activity = Activity::Shutdown;
        Ok(())
    }

    fn apic_read<'py>(
        &self,
        py: Python<'py>,
        gpa: u64,
        size: usize,
        cr8: u8,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let mut inner = self.vcpu.get().inner()?;
        let vcpu = &mut inner.vcpu;
        if vcpu.cpu.lapic.mmio_page() != Some(gpa & !0xfff) || size > 8 {
            return Ok(None);
        }
        set_cr8(vcpu, cr8);
        let mut data = [0; 8];
        // A load from the local APIC's page never stops.
        let _ = vcpu.cpu.mmio_load(gpa, &mut data[..size]);
        Ok(Some(PyBytes::new(py, &data[..size])))
    }

    fn apic_write(&self, gpa: u64, data: &[u8], cr8: u8) -> PyResult<Option<u8>> {
        let mut inner = self.vcpu.get().inner()?;
        let vcpu = &mut inner.vcpu;
        if vcpu.cpu.lapic.mmio_page() != Some(gpa & !0xfff) {
            return Ok(None);
        }
        set_cr8(vcpu, cr8);
        // Nor does a store: what it asks of others is in the pending exits.
        let _ = vcpu.cpu.mmio_store(gpa, data);
        Ok(Some(vcpu.cpu.lapic.cr8() as u8))
    }

    fn msr_read(&self, index: u32, cr8: u8) -> PyResult<(u8, u64)> {
        let mut inner = self.vcpu.get().inner()?;
        set_cr8(&mut inner.vcpu, cr8);
        Ok(status(inner.vcpu.cpu.read_msr(index)))
    }

    fn msr_write(&self, index: u32, value: u64, cr8: u8) -> PyResult<(u8, u8)> {
        let mut inner = self.vcpu.get().inner()?;
        set_cr8(&mut inner.vcpu, cr8);
        let (result, ()) = status(inner.vcpu.cpu.write_msr(index, value));
        Ok((result, inner.vcpu.cpu.lapic.cr8() as u8))
    }

    fn cpuid(&self, leaf: u32, subleaf: u32) -> PyResult<(u32, u32, u32, u32)> {
        let [a, b, c, d] = self.vcpu.get().inner()?.vcpu.cpu.cpuid(leaf, subleaf);
        Ok((a, b, c, d))
    }
}
