//! State records of a vCPU: the dictionary of `Vcpu.state` and `Vcpu.set_state`.
//! Its keys are the fields of `nonroot.engines.state.VcpuState`.

use crate::msrs;
use crate::vcpu::set_clock;
use nonroot_interpret::cpu::Cpu;
use nonroot_interpret::events::{Event, EventKind};
use nonroot_interpret::state::{ar, cr0, cr4, efer, request, rflags, seg};
use nonroot_interpret::state::{Activity, Message, Registers, Segment, TableRegister};
use nonroot_interpret::Vcpu;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

const PHYSICAL: u64 = (1 << 40) - 1;
const CR0: u64 = 0xe005_003f;
const CR4: u64 = 0x0077_1fff;
const EFER: u64 = 0xd01;
const RFLAGS: u64 = 0x3f_7fd7;
const ACCESS: u32 = 0x1_f0ff;
const SEGMENTS: [&str; 8] = ["es", "cs", "ss", "ds", "fs", "gs", "ldtr", "tr"];
const KINDS: [EventKind; 6] = [
    EventKind::External,
    EventKind::Nmi,
    EventKind::Exception,
    EventKind::SoftInterrupt,
    EventKind::PrivilegedSoftException,
    EventKind::SoftException,
];
const KEYS: usize = 33;

type RawSegment = (u16, u64, u32, u32);

fn raw_segment(s: &Segment) -> RawSegment {
    (s.selector, s.base, s.limit, s.ar)
}

/// The vCPU's state; the last exit must have been answered and settled.
pub fn to_python<'py>(py: Python<'py>, vcpu: &Vcpu) -> PyResult<Bound<'py, PyDict>> {
    let cpu: &Cpu = &vcpu.cpu;
    let r = &cpu.r;
    let out = PyDict::new(py);
    let mut segments: Vec<RawSegment> = r.seg.iter().chain([&r.ldtr, &r.tr]).map(raw_segment).collect();
    // SS.DPL is the current privilege level, also where SS is a null selector.
    let ss = &mut segments[seg::SS].3;
    if r.cr0 & cr0::PE != 0 {
        *ss = *ss & !(3 << ar::DPL_SHIFT) | u32::from(cpu.cpl) << ar::DPL_SHIFT;
    }
    let mut fx = cpu.fpu.fx;
    fx[24..28].copy_from_slice(&cpu.fpu.mxcsr.to_le_bytes());
    let mut high = [0u8; 256];
    for (i, ymm) in cpu.fpu.ymm.iter().enumerate() {
        fx[160 + 16 * i..176 + 16 * i].copy_from_slice(&ymm[..16]);
        high[16 * i..16 * i + 16].copy_from_slice(&ymm[16..]);
    }
    let event = cpu.pending_event.map(|e| {
        (KINDS.iter().position(|kind| *kind == e.kind).unwrap_or_default() as u8, e.vector, e.error)
    });
    let messages: Vec<(u8, u8, bool)> = {
        let waiting = cpu.mailbox.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        waiting.iter().map(|m| (m.vector, m.mode, m.level)).collect()
    };
    let requests = cpu.mailbox.requests.load(Ordering::Acquire);
    let tuple = |values: &[u64]| pyo3::types::PyTuple::new(py, values);
    out.set_item("gpr", tuple(&r.gpr[..16])?)?;
    out.set_item("rip", r.rip)?;
    out.set_item("rflags", cpu.rflags())?;
    out.set_item("segments", pyo3::types::PyTuple::new(py, segments)?)?;
    out.set_item("gdtr", (r.gdtr.base, r.gdtr.limit))?;
    out.set_item("idtr", (r.idtr.base, r.idtr.limit))?;
    out.set_item("cr0", r.cr0)?;
    out.set_item("cr2", r.cr2)?;
    out.set_item("cr3", r.cr3)?;
    out.set_item("cr4", r.cr4)?;
    out.set_item("efer", r.efer)?;
    out.set_item("xcr0", r.xcr0)?;
    out.set_item("dr", tuple(&r.dr)?)?;
    out.set_item("dr6", r.dr6)?;
    out.set_item("dr7", r.dr7)?;
    out.set_item("pdpte", tuple(&r.pdpte)?)?;
    out.set_item("fx", PyBytes::new(py, &fx))?;
    out.set_item("ymm_high", PyBytes::new(py, &high))?;
    out.set_item("msrs", msrs::read(cpu))?;
    out.set_item("tsc_offset", cpu.msr.tsc_offset)?;
    out.set_item("lapic", PyBytes::new(py, &cpu.lapic.state()))?;
    out.set_item("activity", activity_number(cpu.activity))?;
    out.set_item("shadow", cpu.shadow)?;
    out.set_item("nmi_blocked", cpu.nmi_blocked)?;
    out.set_item("nmi_pending", cpu.nmi_pending || requests & request::NMI != 0)?;
    out.set_item("pic_line", cpu.mailbox.pic_line.load(Ordering::Acquire))?;
    out.set_item("pic_vector", cpu.pic_vector)?;
    out.set_item("injected", cpu.injected)?;
    out.set_item("event", event)?;
    out.set_item("pending_db", cpu.pending_db)?;
    out.set_item("messages", pyo3::types::PyTuple::new(py, messages)?)?;
    out.set_item("now_ns", cpu.now_ns())?;
    out.set_item("retired", cpu.retired)?;
    Ok(out)
}

fn activity_number(activity: Activity) -> u8 {
    match activity {
        Activity::Running => 0,
        Activity::Halted => 1,
        Activity::WaitForSipi => 2,
        Activity::Shutdown => 3,
    }
}

fn bad(field: &str) -> PyErr {
    PyValueError::new_err(format!("the vCPU state's {field} is not possible"))
}

fn field<'py, T: FromPyObjectOwned<'py>>(state: &Bound<'py, PyDict>, name: &str) -> PyResult<T> {
    let value = state
        .get_item(name)?
        .ok_or_else(|| PyValueError::new_err(format!("the vCPU state has no {name}")))?;
    value.extract().map_err(|_| {
        PyValueError::new_err(format!("the vCPU state's {name} has a value of the wrong type or size"))
    })
}

fn items<'py, T: FromPyObjectOwned<'py>, const N: usize>(
    state: &Bound<'py, PyDict>,
    name: &str,
) -> PyResult<[T; N]> {
    let values: Vec<T> = field(state, name)?;
    values.try_into().map_err(|_| PyValueError::new_err(format!("the vCPU state's {name} has not {N} items")))
}

fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// A parsed and checked record.
pub struct Record {
    r: Registers,
    rflags: u64,
    cpl: u8,
    fx: [u8; 512],
    mxcsr: u32,
    ymm: [[u8; 32]; 16],
    msrs: BTreeMap<u32, u64>,
    tsc_offset: u64,
    lapic: Vec<u8>,
    activity: Activity,
    shadow: u8,
    nmi_blocked: bool,
    nmi_pending: bool,
    pic_line: bool,
    pic_vector: Option<u8>,
    injected: Option<u8>,
    event: Option<Event>,
    pending_db: u64,
    messages: Vec<Message>,
    now_ns: u64,
    retired: u64,
}

impl Record {
    /// Reads a dictionary; the error names the bad field.
    pub fn from_python(state: &Bound<'_, PyDict>) -> PyResult<Record> {
        let mut r = Registers::default();
        let gpr: [u64; 16] = items(state, "gpr")?;
        r.gpr[..16].copy_from_slice(&gpr);
        r.rip = field(state, "rip")?;
        let segments: [RawSegment; 8] = items(state, "segments")?;
        let parsed = segments.map(|(selector, base, limit, ar)| Segment { base, limit, ar, selector });
        r.seg.copy_from_slice(&parsed[..6]);
        (r.ldtr, r.tr) = (parsed[6], parsed[7]);
        let (base, limit) = field(state, "gdtr")?;
        r.gdtr = TableRegister { base, limit };
        let (base, limit) = field(state, "idtr")?;
        r.idtr = TableRegister { base, limit };
        r.cr0 = field(state, "cr0")?;
        r.cr2 = field(state, "cr2")?;
        r.cr3 = field(state, "cr3")?;
        r.cr4 = field(state, "cr4")?;
        r.efer = field(state, "efer")?;
        r.xcr0 = field(state, "xcr0")?;
        r.dr = items(state, "dr")?;
        r.dr6 = field(state, "dr6")?;
        r.dr7 = field(state, "dr7")?;
        r.pdpte = items(state, "pdpte")?;
        let fx_bytes: Vec<u8> = field(state, "fx")?;
        let high: Vec<u8> = field(state, "ymm_high")?;
        let mut fx: [u8; 512] = fx_bytes.try_into().map_err(|_| bad("fx"))?;
        if high.len() != 256 {
            return Err(bad("ymm_high"));
        }
        let mxcsr = u32::from_le_bytes([fx[24], fx[25], fx[26], fx[27]]);
        let mut ymm = [[0u8; 32]; 16];
        for (i, register) in ymm.iter_mut().enumerate() {
            register[..16].copy_from_slice(&fx[160 + 16 * i..176 + 16 * i]);
            register[16..].copy_from_slice(&high[16 * i..16 * i + 16]);
        }
        fx[24..32].fill(0);
        fx[160..].fill(0);
        let activity = match field::<u8>(state, "activity")? {
            0 => Activity::Running,
            1 => Activity::Halted,
            2 => Activity::WaitForSipi,
            3 => Activity::Shutdown,
            _ => return Err(bad("activity")),
        };
        let event = match field::<Option<(u8, u8, Option<u32>)>>(state, "event")? {
            None => None,
            Some((kind, vector, error)) => {
                let kind = *KINDS.get(kind as usize).ok_or_else(|| bad("event"))?;
                Some(Event { kind, vector, error })
            }
        };
        let mut messages = Vec::new();
        for (vector, mode, level) in field::<Vec<(u8, u8, bool)>>(state, "messages")? {
            if mode > 7 || mode == 3 {
                return Err(bad("messages"));
            }
            messages.push(Message { vector, mode, level });
        }
        let mut record = Record {
            r,
            rflags: field(state, "rflags")?,
            cpl: 0,
            fx,
            mxcsr,
            ymm,
            msrs: field(state, "msrs")?,
            tsc_offset: field(state, "tsc_offset")?,
            lapic: field(state, "lapic")?,
            activity,
            shadow: field(state, "shadow")?,
            nmi_blocked: field(state, "nmi_blocked")?,
            nmi_pending: field(state, "nmi_pending")?,
            pic_line: field(state, "pic_line")?,
            pic_vector: field(state, "pic_vector")?,
            injected: field(state, "injected")?,
            event,
            pending_db: field(state, "pending_db")?,
            messages,
            now_ns: field(state, "now_ns")?,
            retired: field(state, "retired")?,
        };
        if state.len() != KEYS {
            return Err(PyValueError::new_err("the vCPU state has fields that are not known"));
        }
        record.check().map_err(bad)?;
        record.cpl = if record.r.cr0 & cr0::PE == 0 {
            0
        } else if record.rflags & rflags::VM != 0 {
            3
        } else {
            record.r.seg[seg::SS].dpl()
        };
        Ok(record)
    }

    /// What VM entry would check too (SDM 3C); the error is the field's name.
    fn check(&self) -> Result<(), &'static str> {
        let r = &self.r;
        let require = |condition: bool, what: &'static str| if condition { Ok(()) } else { Err(what) };
        require(self.rflags & !RFLAGS == 0 && self.rflags & 2 != 0, "rflags")?;
        let (protected, paging) = (r.cr0 & cr0::PE != 0, r.cr0 & cr0::PG != 0);
        require(r.cr0 & !CR0 == 0 && (protected || !paging), "cr0")?;
        require(r.cr0 & cr0::NW == 0 || r.cr0 & cr0::CD != 0, "cr0")?;
        require(r.efer & !EFER == 0, "efer")?;
        let long = r.efer & efer::LMA != 0;
        require(long == (paging && r.efer & efer::LME != 0), "efer")?;
        require(r.cr4 & !CR4 == 0, "cr4")?;
        require(!long || r.cr4 & cr4::PAE != 0, "cr4")?;
        require(long || r.cr4 & cr4::PCIDE == 0, "cr4")?;
        require(r.cr3 & !PHYSICAL == 0, "cr3")?;
        require(matches!(r.xcr0, 1 | 3 | 7), "xcr0")?;
        require(r.dr6 >> 32 == 0, "dr6")?;
        require(r.dr7 >> 32 == 0, "dr7")?;
        require(self.pending_db & !0xe00f == 0, "pending_db")?;
        require(self.shadow <= 3, "shadow")?;
        require(self.rflags & rflags::VM == 0 || (protected && !long), "rflags")?;
        for (name, s) in SEGMENTS.iter().zip(r.seg.iter().chain([&r.ldtr, &r.tr])) {
            require(s.ar & !ACCESS == 0, name)?;
            let system = matches!(*name, "fs" | "gs" | "ldtr" | "tr");
            require(if long { canonical(s.base) } else { s.base >> 32 == 0 || system }, name)?;
        }
        let cs = r.seg[seg::CS].ar;
        require(!(long && cs & ar::L != 0 && cs & ar::DB != 0), "cs")?;
        require(canonical(r.gdtr.base), "gdtr")?;
        require(canonical(r.idtr.base), "idtr")?;
        require(self.mxcsr & !0xffff == 0, "mxcsr")
    }

    /// Checks against this vCPU, then applies everything; on an error nothing has changed.
    pub fn apply(self, vcpu: &mut Vcpu) -> Result<(), String> {
        let features = vcpu.cpu.features;
        for (name, extra) in [
            ("xcr0", self.r.xcr0 & !features.xcr0),
            ("cr4", self.r.cr4 & !features.cr4),
            ("efer", self.r.efer & !(features.efer | efer::LMA)),
        ] {
            if extra != 0 {
                return Err(format!("the vCPU state's {name} has features that this vCPU lacks"));
            }
        }
        // The last checks are done by setting: what was before comes back if one fails.
        let before = (vcpu.cpu.clock.clone(), vcpu.cpu.retired, vcpu.cpu.msr.clone());
        vcpu.cpu.retired = self.retired;
        let result = set_clock(vcpu, self.now_ns)
            .and_then(|()| msrs::write(&mut vcpu.cpu, &self.msrs))
            .and_then(|()| vcpu.cpu.lapic.set_state(&self.lapic));
        if let Err(reason) = result {
            (vcpu.cpu.clock, vcpu.cpu.retired, vcpu.cpu.msr) = before;
            return Err(reason);
        }
        vcpu.forget_exit();
        vcpu.cpu.forget_arrived();
        let cpu = &mut vcpu.cpu;
        cpu.r = self.r;
        cpu.cpl = self.cpl;
        cpu.fpu.fx = self.fx;
        cpu.fpu.mxcsr = self.mxcsr;
        cpu.fpu.ymm = self.ymm;
        cpu.fpu.update_summary();
        cpu.msr.tsc_offset = self.tsc_offset;
        cpu.lapic.set_tsc_offset(self.tsc_offset as i64);
        cpu.lapic_moved = cpu.lapic.mmio_page() != Some(0xfee0_0000);
        cpu.activity = self.activity;
        cpu.shadow = self.shadow;
        cpu.nmi_blocked = self.nmi_blocked;
        cpu.nmi_pending = self.nmi_pending;
        cpu.pic_vector = self.pic_vector;
        cpu.injected = self.injected;
        cpu.pending_event = self.event;
        cpu.pending_db = self.pending_db;
        cpu.pending_exits.clear();
        cpu.stop = None;
        cpu.mailbox.retired.store(self.retired, Ordering::Relaxed);
        cpu.mailbox.pic_line.store(self.pic_line, Ordering::Release);
        *cpu.mailbox.messages.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = self.messages;
        cpu.mailbox.requests.fetch_and(!request::NMI, Ordering::AcqRel);
        cpu.mailbox.requests.fetch_or(request::MESSAGE | request::PIC, Ordering::AcqRel);
        cpu.set_rflags(self.rflags);
        cpu.update_mode();
        cpu.flush_tlb_all();
        cpu.flush_code();
        cpu.interrupts_changed();
        Ok(())
    }
}
