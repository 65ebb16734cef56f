//! IN, OUT, INS, OUTS. Input stops with [`Exit::PortIo`] and completes when the
//! instruction is executed again with the caller's [`Reply`].

use super::strings::Form;
use crate::cpu::{Cpu, Reply};
use crate::mem::Target;
use crate::state::*;
use crate::walk::{Access, Kind};
use iced_x86::{Instruction, OpKind, Register};

/// Most bytes of one exit.
const BATCH: u64 = 4096;

impl Cpu {
    /// The privilege to use ports: CPL <= IOPL, or the TSS's I/O permission bitmap;
    /// in virtual-8086 mode always the bitmap (SDM 1, 19.5).
    fn check_port(&mut self, port: u16, size: usize) -> X {
        let free = match self.mode {
            Mode::Real => true,
            Mode::V86 => false,
            _ => self.cpl <= self.iopl(),
        };
        if free {
            return Ok(());
        }
        let tr = self.r.tr;
        let limit = u64::from(tr.limit);
        // Only 32-bit and 64-bit TSSs (available or busy) have a bitmap.
        if tr.ar & ar::UNUSABLE != 0 || tr.ar & 0x1d != 0x9 || limit < 0x67 {
            return Err(self.gp(0));
        }
        let at = |offset: u64, long: bool| {
            let lin = tr.base.wrapping_add(offset);
            if long {
                lin
            } else {
                lin & 0xffff_ffff
            }
        };
        let long = self.lma();
        let map = self.load_sys(at(0x66, long), 2)?;
        // Two bytes are always read, so the second must lie inside the limit too.
        let byte = map + u64::from(port >> 3);
        if byte + 1 > limit {
            return Err(self.gp(0));
        }
        let bits = self.load_sys(at(byte, long), 2)?;
        if bits >> (port & 7) & ((1 << size) - 1) != 0 {
            return Err(self.gp(0));
        }
        Ok(())
    }

    fn port(&self, i: &Instruction, n: u32) -> u16 {
        match i.op_kind(n) {
            OpKind::Register => self.read_reg(Register::DX) as u16,
            _ => u16::from(i.immediate8()),
        }
    }

    /// The caller's answer to an input, if it has come.
    fn take_input(&mut self) -> X<Option<Vec<u8>>> {
        match self.reply.take() {
            None => Ok(None),
            Some(Reply::Data(data)) => Ok(Some(data)),
            Some(Reply::Done) => Ok(Some(Vec::new())),
            Some(Reply::Fault) => Err(self.gp(0)),
        }
    }

    pub(super) fn op_in(&mut self, i: &Instruction) -> X {
        let r = i.op_register(0);
        let port = self.port(i, 1);
        self.check_port(port, r.size())?;
        let Some(data) = self.take_input()? else {
            let size = r.size() as u8;
            return Err(self.exit(Exit::PortIo { port, size, write: false, count: 1, data: Vec::new() }));
        };
        self.io_breakpoint(port, r.size());
        self.write_reg(r, element(&data, 0, r.size()));
        Ok(())
    }

    pub(super) fn op_out(&mut self, i: &Instruction) -> X {
        let r = i.op_register(1);
        let port = self.port(i, 0);
        self.check_port(port, r.size())?;
        self.reply = None;
        self.io_breakpoint(port, r.size());
        let data = self.read_reg(r).to_le_bytes()[..r.size()].to_vec();
        let size = r.size() as u8;
        Err(self.exit_after(Exit::PortIo { port, size, write: true, count: 1, data }))
    }

    /// How many of `count` elements at `offset` one exit can take: more than one
    /// only upwards, in one page of RAM, inside the segment.
    fn batch(&mut self, segment: usize, offset: u64, form: &Form, count: u64, write: bool) -> u64 {
        let size = form.size as u64;
        let count = count.min(BATCH / size);
        if form.step != size || count < 2 {
            return 1;
        }
        let kind = if write { Kind::Write } else { Kind::Read };
        let found = (|| {
            let lin = self.linear(segment, offset, form.size, write)?;
            if !Self::canonical(lin) && self.lma() {
                return Ok(1);
            }
            let count = count.min((0x1000 - (lin & 0xfff)) / size).max(1);
            let before_wrap = (crate::operands::mask(form.address_size) - offset) / size;
            let count = count.min(before_wrap).max(1);
            self.linear(segment, offset, (count * size) as usize, write)?;
            let t = self.translate(lin, Access { kind, system: false })?;
            let ram = matches!(self.target(t.gpa, write), Target::Ram(..));
            Ok::<u64, Stop>(if ram { count } else { 1 })
        })();
        found.unwrap_or_else(|Stop| {
            // A single element finds the fault.
            self.stop = None;
            1
        })
    }

    /// INS: the destination is checked, then the exit asks for the elements, then
    /// the second execution stores them.
    pub(super) fn op_ins(&mut self, i: &Instruction) -> X {
        let form = self.string_form(i);
        let port = self.port(i, 1);
        loop {
            let count = if form.repeat { self.gpr(reg::RCX, form.address_size) } else { 1 };
            if count == 0 {
                return Ok(());
            }
            self.check_port(port, form.size)?;
            let offset = self.index(reg::RDI, &form);
            // How many were asked for decides the budget; how many came, the answer.
            let asked = if self.reply.is_some() { count } else { count.min(self.rep_budget.max(1)) };
            let n = self.batch(seg::ES, offset, &form, asked, true);
            let Some(data) = self.take_input()? else {
                self.probe_store(seg::ES, offset, n as usize * form.size)?;
                let size = form.size as u8;
                return Err(self.exit(Exit::PortIo {
                    port,
                    size,
                    write: false,
                    count: n as u32,
                    data: Vec::new(),
                }));
            };
            let n = (data.len() as u64 / form.size as u64).clamp(1, n);
            let stored = if n == 1 {
                self.store(seg::ES, offset, form.size, element(&data, 0, form.size))
            } else {
                self.store_bytes(seg::ES, offset, &data[..n as usize * form.size])
            };
            if let Err(stop) = stored {
                // The data stay for the execution after an MMIO exit.
                if matches!(self.stop, Some(StopReason::Exit(_))) {
                    self.reply = Some(Reply::Data(data));
                }
                return Err(stop);
            }
            self.io_breakpoint(port, form.size);
            self.advance(reg::RDI, &form, n);
            self.mmio.clear();
            if !form.repeat {
                return Ok(());
            }
            self.set_gpr(reg::RCX, form.address_size, count - n);
            if count == n {
                self.rep_iterations += n - 1;
                return Ok(());
            }
            self.between_iterations(n)?;
        }
    }

    /// OUTS: one exit for each batch. Registers are committed when leaving; the
    /// last batch completes the instruction, the others leave it to be executed again.
    pub(super) fn op_outs(&mut self, i: &Instruction) -> X {
        let form = self.string_form(i);
        let port = self.port(i, 0);
        self.reply = None;
        let count = if form.repeat { self.gpr(reg::RCX, form.address_size) } else { 1 };
        if count == 0 {
            return Ok(());
        }
        self.check_port(port, form.size)?;
        let offset = self.index(reg::RSI, &form);
        let n = self.batch(form.segment, offset, &form, count.min(self.rep_budget.max(1)), false);
        let mut data = vec![0; n as usize * form.size];
        if n == 1 {
            let value = self.load(form.segment, offset, form.size)?;
            data.copy_from_slice(&value.to_le_bytes()[..form.size]);
        } else {
            self.load_bytes(form.segment, offset, &mut data)?;
        }
        self.io_breakpoint(port, form.size);
        self.advance(reg::RSI, &form, n);
        self.mmio.clear();
        let exit = Exit::PortIo { port, size: form.size as u8, write: true, count: n as u32, data };
        if form.repeat {
            self.set_gpr(reg::RCX, form.address_size, count - n);
        }
        if count == n {
            self.rep_iterations += n - 1;
            return Err(self.exit_after(exit));
        }
        self.rep_iterations += n;
        Err(self.exit(exit))
    }
}

/// Element `n` of an answer; missing bytes read as ones, like an empty bus.
fn element(data: &[u8], n: usize, size: usize) -> u64 {
    let byte = |at| u64::from(data.get(at).copied().unwrap_or(0xff));
    (0..size).map(|k| byte(n * size + k) << (8 * k)).sum()
}
