//! Delivery of exceptions and interrupts (SDM 3A, chapter 6; SDM 2, "INT n").

use crate::cpu::Cpu;
use crate::debug::{dr6, dr7};
use crate::descriptors::*;
use crate::state::*;
use iced_x86::{Instruction, Mnemonic};

/// Where an event comes from; decides error codes, DPL checks and return addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// External interrupt (LAPIC, PIC or injected).
    External,
    /// Non-maskable interrupt.
    Nmi,
    /// Exception raised by an instruction.
    Exception,
    /// INT n.
    SoftInterrupt,
    /// INT1 (ICEBP).
    PrivilegedSoftException,
    /// INT3, INTO.
    SoftException,
}

/// An event to deliver through the IDT (or the real-mode IVT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Source.
    pub kind: EventKind,
    /// Vector.
    pub vector: u8,
    /// Error code to push.
    pub error: Option<u32>,
}

impl Event {
    /// The EXT bit of error codes of faults during delivery: not for INT n, INT3 and INTO.
    fn ext(&self) -> u32 {
        u32::from(!matches!(self.kind, EventKind::SoftInterrupt | EventKind::SoftException))
    }

    /// INT n, INT3 and INTO respect the gate's DPL; INT1 does not.
    fn checks_dpl(&self) -> bool {
        self.ext() == 0
    }

    /// Error code that names the IDT entry.
    fn idt_error(&self) -> u32 {
        u32::from(self.vector) * 8 + 2 + self.ext()
    }
}

/// A gate of the IDT.
#[derive(Clone, Copy, Debug)]
struct Gate {
    selector: u16,
    offset: u64,
    /// Size of the pushes: 2, 4 or 8.
    size: usize,
    /// Interrupt gate: clears IF.
    interrupt: bool,
    ist: u8,
}

/// How exceptions combine to double faults (SDM 3A, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(vector: u8) -> Class {
    match vector {
        vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Class::Contributory,
        vector::PF => Class::PageFault,
        vector::DF => Class::DoubleFault,
        _ => Class::Benign,
    }
}

impl Cpu {
    /// Delivers one event; `self.r.rip` is the return address it pushes. On success
    /// `self.r.rip` is the handler. A fault during delivery is an `Err` with the
    /// fault in `self.stop` and the state unchanged.
    pub fn deliver(&mut self, event: Event) -> X {
        self.deliver_from(event, self.r.rip, self.rflags() & !rflags::RF)?;
        self.r.rip = self.next_rip;
        Ok(())
    }

    /// Delivers an event with return address `rip` and RFLAGS image `image`; the
    /// handler's address goes to `next_rip`.
    fn deliver_from(&mut self, event: Event, rip: u64, image: u64) -> X {
        match self.mode {
            Mode::Real => self.deliver_real(event, rip, image)?,
            _ if self.lma() => self.deliver_long(event, rip, image)?,
            _ => self.deliver_protected(event, rip, image)?,
        }
        self.shadow = 0;
        self.activity = Activity::Running;
        self.interrupts_changed();
        Ok(())
    }

    fn deliver_real(&mut self, event: Event, rip: u64, image: u64) -> X {
        let at = u64::from(event.vector) * 4;
        if at + 3 > u64::from(self.r.idtr.limit) {
            return Err(self.gp(event.idt_error()));
        }
        let entry = self.load_sys(self.wrap_linear(self.r.idtr.base.wrapping_add(at)), 4)?;
        let stack = self.stack_in_use();
        let mut frame = Frame::new(2);
        frame.push(image);
        frame.push(u64::from(self.r.seg[seg::CS].selector));
        frame.push(rip);
        let sp = self.write_frame(&stack, &frame)?;
        self.set_stack(&stack, sp);
        self.r.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        self.load_real_segment(seg::CS, (entry >> 16) as u16);
        self.next_rip = entry & 0xffff;
        self.update_mode();
        Ok(())
    }

    /// The IDT entry of an event in protected mode, with the checks on it.
    fn idt_gate(&mut self, event: &Event) -> X<Gate> {
        use system_type::*;
        let long = self.lma();
        let size = if long { 16 } else { 8 };
        let at = u64::from(event.vector) * size;
        if at + size - 1 > u64::from(self.r.idtr.limit) {
            return Err(self.gp(event.idt_error()));
        }
        let address = self.wrap_linear(self.r.idtr.base.wrapping_add(at));
        let mut bytes = [0u8; 16];
        self.load_bytes_lin(seg::DS, address, &mut bytes[..size as usize], true)?;
        let low = u64::from_le_bytes([
            bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
        ]);
        let high = u64::from(u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]));
        let d = Descriptor { raw: low, address };
        let kind = d.kind();
        let allowed = if long {
            matches!(kind, INTERRUPT_GATE | TRAP_GATE)
        } else {
            matches!(kind, INTERRUPT_GATE | TRAP_GATE | INTERRUPT_GATE16 | TRAP_GATE16 | TASK_GATE)
        };
        if d.is_segment() || !allowed || event.checks_dpl() && d.dpl() < self.cpl {
            return Err(self.gp(event.idt_error()));
        }
        if !d.is_present() {
            return Err(self.fault(vector::NP, Some(event.idt_error())));
        }
        if kind == TASK_GATE {
            return Err(self.unimplemented("hardware task switch"));
        }
        let offset = low & 0xffff | low >> 32 & 0xffff_0000 | high << 32;
        let wide = kind & 8 != 0;
        Ok(Gate {
            selector: (low >> 16) as u16,
            offset: if wide { offset } else { offset & 0xffff },
            size: if long {
                8
            } else if wide {
                4
            } else {
                2
            },
            interrupt: kind & 1 == 0,
            ist: (low >> 32) as u8 & 7,
        })
    }

    /// RFLAGS as a handler starts with it.
    fn handler_flags(&mut self, gate: &Gate) {
        self.r.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if gate.interrupt {
            self.r.rflags &= !rflags::IF;
        }
    }

    fn deliver_protected(&mut self, event: Event, rip: u64, image: u64) -> X {
        let ext = event.ext();
        let gate = self.idt_gate(&event)?;
        let target = self.gate_target(gate.selector, ext)?;
        let v86 = self.mode == Mode::V86;
        let inner = !target.is_conforming() && target.dpl() < self.cpl;
        // Interrupts out of virtual-8086 mode go to level 0 and nowhere else.
        if v86 && (!inner || target.dpl() != 0) {
            return Err(self.gp(selector_error(gate.selector) | ext));
        }
        let mut frame = Frame::new(gate.size);
        let stack = if inner {
            let stack = self.inner_stack(target.dpl(), ext)?;
            if v86 {
                for n in [seg::GS, seg::FS, seg::DS, seg::ES] {
                    frame.push(u64::from(self.r.seg[n].selector));
                }
            }
            frame.push(u64::from(self.r.seg[seg::SS].selector));
            frame.push(self.r.gpr[reg::RSP]);
            stack
        } else {
            Stack { error: ext, ..self.stack_in_use() }
        };
        frame.push(image);
        frame.push(u64::from(self.r.seg[seg::CS].selector));
        frame.push(rip);
        if let Some(error) = event.error {
            frame.push(u64::from(error));
        }
        self.check_target(&target, gate.offset, ext)?;
        self.mark_accessed(&target)?;
        let sp = self.write_frame(&stack, &frame)?;
        let cpl = if inner { target.dpl() } else { self.cpl };
        self.handler_flags(&gate);
        if v86 {
            for n in [seg::GS, seg::FS, seg::DS, seg::ES] {
                self.r.seg[n] = null_segment(0, 0);
            }
        }
        self.set_stack(&stack, sp);
        self.set_code_segment(&target, gate.selector, cpl, gate.offset);
        self.update_mode();
        Ok(())
    }

    fn deliver_long(&mut self, event: Event, rip: u64, image: u64) -> X {
        let ext = event.ext();
        let gate = self.idt_gate(&event)?;
        let target = self.gate_target(gate.selector, ext)?;
        let inner = !target.is_conforming() && target.dpl() < self.cpl;
        let cpl = if inner { target.dpl() } else { self.cpl };
        let tss_error = selector_error(self.r.tr.selector) | ext;
        let sp = if gate.ist != 0 {
            self.load_tss(28 + 8 * u64::from(gate.ist), 8, tss_error)?
        } else if inner {
            self.load_tss(4 + 8 * u64::from(cpl), 8, tss_error)?
        } else {
            self.r.gpr[reg::RSP]
        };
        let segment = if inner { null_segment(u16::from(cpl), cpl) } else { self.r.seg[seg::SS] };
        let stack = Stack { segment, sp: sp & !0xf, long: true, cpl, error: ext };
        let mut frame = Frame::new(8);
        frame.push(u64::from(self.r.seg[seg::SS].selector));
        frame.push(self.r.gpr[reg::RSP]);
        frame.push(image);
        frame.push(u64::from(self.r.seg[seg::CS].selector));
        frame.push(rip);
        if let Some(error) = event.error {
            frame.push(u64::from(error));
        }
        self.check_target(&target, gate.offset, ext)?;
        self.mark_accessed(&target)?;
        let sp = self.write_frame(&stack, &frame)?;
        self.handler_flags(&gate);
        self.set_stack(&stack, sp);
        self.set_code_segment(&target, gate.selector, cpl, gate.offset);
        self.update_mode();
        Ok(())
    }

    // ---- exceptions ----------------------------------------------------------------------------

    /// Raises an exception: CR2, DR6, double and triple faults included. `Err`:
    /// the vCPU must be left (intercepted exception, triple fault, or a device
    /// access by the delivery itself).
    pub fn raise(&mut self, fault: Fault) -> Result<(), Exit> {
        self.raise_during(Class::Benign, fault)
    }

    /// Raises an exception that came up while one of `class` was being delivered.
    fn raise_during(&mut self, mut before: Class, mut fault: Fault) -> Result<(), Exit> {
        loop {
            let now = class(fault.vector);
            let double = match before {
                Class::Benign => false,
                Class::Contributory => now == Class::Contributory,
                Class::PageFault => matches!(now, Class::Contributory | Class::PageFault),
                Class::DoubleFault => {
                    self.pending_event = None;
                    self.activity = Activity::Shutdown;
                    return Err(Exit::TripleFault);
                }
            };
            if double {
                if fault.vector == vector::PF {
                    self.r.cr2 = fault.address;
                }
                fault = Fault { vector: vector::DF, error: Some(0), address: 0, trap: false, dr6: 0 };
            }
            if self.config.exception_exits >> (fault.vector & 31) & 1 != 0 {
                return Err(Exit::Exception {
                    vector: fault.vector,
                    error: fault.error,
                    address: fault.address,
                });
            }
            match fault.vector {
                vector::PF => self.r.cr2 = fault.address,
                vector::DB => {
                    self.r.dr6 = self.r.dr6 & !dr6::BREAKPOINTS | fault.dr6;
                    self.r.dr7 &= !dr7::GD;
                }
                _ => self.pending_db = 0,
            }
            let event = Event { kind: EventKind::Exception, vector: fault.vector, error: fault.error };
            // Fault-class exceptions restart their instruction with RF set, but for
            // instruction breakpoints, whose handler decides.
            let breakpoint = fault.vector == vector::DB && fault.dr6 & dr6::BD == 0;
            let abort = matches!(fault.vector, vector::DF | vector::MC);
            let mut image = self.rflags();
            if !(fault.trap || breakpoint || abort) {
                image |= rflags::RF;
            }
            self.pending_event = Some(event);
            match self.deliver_from(event, self.r.rip, image) {
                Ok(()) => {
                    self.pending_event = None;
                    self.r.rip = self.next_rip;
                    return Ok(());
                }
                Err(Stop) => match self.stop.take() {
                    Some(StopReason::Fault(next)) => {
                        before = class(fault.vector);
                        fault = next;
                    }
                    Some(StopReason::Exit(exit) | StopReason::ExitAfter(exit)) => {
                        // The instruction runs again and raises the exception again.
                        self.pending_event = None;
                        return Err(exit);
                    }
                    _ => {
                        self.pending_event = None;
                        return Ok(());
                    }
                },
            }
        }
    }

    // ---- interrupts -----------------------------------------------------------------------------

    /// Delivers an external interrupt between instructions.
    pub fn deliver_external(&mut self, vector: u8) -> Result<(), Exit> {
        self.deliver_interrupt_event(Event { kind: EventKind::External, vector, error: None })
    }

    /// Delivers an NMI and blocks further ones until IRET.
    pub fn deliver_nmi(&mut self) -> Result<(), Exit> {
        self.deliver_interrupt_event(Event { kind: EventKind::Nmi, vector: vector::NMI, error: None })?;
        self.nmi_blocked = true;
        Ok(())
    }

    fn deliver_interrupt_event(&mut self, event: Event) -> Result<(), Exit> {
        match self.deliver(event) {
            Ok(()) => Ok(()),
            Err(Stop) => match self.stop.take() {
                Some(StopReason::Fault(fault)) => self.raise_during(Class::Benign, fault),
                Some(StopReason::Exit(exit) | StopReason::ExitAfter(exit)) => {
                    // Once more after the exit.
                    match event.kind {
                        EventKind::Nmi => self.nmi_pending = true,
                        _ => self.injected = Some(event.vector),
                    }
                    self.interrupts_changed();
                    Err(exit)
                }
                _ => Ok(()),
            },
        }
    }

    /// Delivers the event that a state record has in flight ([`Cpu::pending_event`]).
    /// Software interrupts need nothing: their instruction runs again.
    pub fn deliver_pending_event(&mut self) -> Result<(), Exit> {
        let Some(event) = self.pending_event.take() else { return Ok(()) };
        match event.kind {
            EventKind::External => self.deliver_external(event.vector),
            EventKind::Nmi => self.deliver_nmi(),
            // What it did to CR2 and DR6 is in the record.
            EventKind::Exception => {
                let (cr2, dr6, dr7) = (self.r.cr2, self.r.dr6, self.r.dr7);
                let fault = Fault {
                    vector: event.vector,
                    error: event.error,
                    address: cr2,
                    trap: event.vector == vector::DB,
                    dr6: dr6 & dr6::BREAKPOINTS,
                };
                let result = self.raise(fault);
                if event.vector == vector::DB {
                    (self.r.dr6, self.r.dr7) = (dr6, dr7);
                }
                result
            }
            _ => Ok(()),
        }
    }

    /// INT n, INT3, INTO (taken) and INT1: `r.rip` is the instruction, `next_rip`
    /// the return address; on success the handler.
    pub fn soft_interrupt(&mut self, kind: EventKind, vector: u8) -> X {
        if kind != EventKind::SoftInterrupt && self.config.exception_exits >> (vector & 31) & 1 != 0 {
            return Err(self.exit(Exit::Exception { vector, error: None, address: 0 }));
        }
        // Without CR4.VME, INT n in virtual-8086 mode is for IOPL 3; INT3, INTO and INT1 are not.
        if kind == EventKind::SoftInterrupt && self.mode == Mode::V86 && self.iopl() < 3 {
            return Err(self.gp(0));
        }
        let event = Event { kind, vector, error: None };
        self.deliver_from(event, self.next_rip, self.rflags() & !rflags::RF)?;
        self.guest_debug.no_trap = true;
        Ok(())
    }

    /// The software interrupts. `Ok(false)`: not one of them.
    pub(crate) fn execute_interrupts(&mut self, i: &Instruction) -> X<bool> {
        match i.mnemonic() {
            Mnemonic::Int => self.soft_interrupt(EventKind::SoftInterrupt, i.immediate8())?,
            Mnemonic::Int3 => self.soft_interrupt(EventKind::SoftException, vector::BP)?,
            Mnemonic::Into => {
                if self.r.flags.of() {
                    self.soft_interrupt(EventKind::SoftException, vector::OF)?;
                }
            }
            Mnemonic::Int1 => self.soft_interrupt(EventKind::PrivilegedSoftException, vector::DB)?,
            _ => return Ok(false),
        }
        Ok(true)
    }
}
