//! String instructions with and without REP. Registers are committed after
//! every iteration, so that faults, interrupts and exits find them consistent;
//! plain RAM is worked on in runs that stay in one page.

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::mem::{host_load, host_store};
use crate::operands::{mask, memory_segment};
use crate::state::*;
use iced_x86::{Instruction, OpKind};
use std::sync::atomic::Ordering;

/// A string instruction's parameters.
pub(super) struct Form {
    /// Bytes of an element.
    pub size: usize,
    /// Bytes of the index and count registers used.
    pub address_size: usize,
    /// Segment of the source.
    pub segment: usize,
    /// Change of an index after each element (wrapping).
    pub step: u64,
    /// The value of ZF that ends a repetition, for CMPS and SCAS.
    pub until_zf: Option<bool>,
    /// Repeated.
    pub repeat: bool,
}

impl Form {
    fn forward(&self) -> bool {
        (self.step as i64) > 0
    }
}

/// Does one element.
type One = fn(&mut Cpu, &Form) -> X;
/// Does up to so many elements at once if that is easy; returns how many.
type Bulk = fn(&mut Cpu, &Form, u64) -> u64;

impl Cpu {
    pub(super) fn string_form(&self, i: &Instruction) -> Form {
        let address_size = (0..i.op_count())
            .find_map(|n| match i.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
                OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
                OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
                _ => None,
            })
            .unwrap_or(8);
        let size = i.memory_size().size();
        let down = self.r.rflags & rflags::DF != 0;
        Form {
            size,
            address_size,
            segment: memory_segment(i),
            step: if down { (size as u64).wrapping_neg() } else { size as u64 },
            until_zf: None,
            repeat: i.has_rep_prefix() || i.has_repne_prefix(),
        }
    }

    pub(super) fn index(&self, n: usize, form: &Form) -> u64 {
        self.gpr(n, form.address_size)
    }

    pub(super) fn advance(&mut self, n: usize, form: &Form, elements: u64) {
        let value = self.gpr(n, form.address_size).wrapping_add(form.step.wrapping_mul(elements));
        self.set_gpr(n, form.address_size, value);
    }

    /// Counts `done` finished iterations of an instruction that goes on, and stops
    /// between iterations if something else must be looked at.
    pub(super) fn between_iterations(&mut self, done: u64) -> X {
        self.rep_iterations += done;
        self.rep_budget = self.rep_budget.saturating_sub(done);
        if self.rep_budget == 0 || self.pending_db != 0 || self.mailbox.requests.load(Ordering::Relaxed) != 0
        {
            self.stop = Some(StopReason::Restart);
            return Err(Stop);
        }
        Ok(())
    }

    fn repeat(&mut self, form: &Form, one: One, bulk: Bulk) -> X {
        if !form.repeat {
            return one(self, form);
        }
        let bulk_strings = self.config.optimise.bulk_strings;
        let mut count = self.gpr(reg::RCX, form.address_size);
        while count != 0 {
            let mut done = 0;
            if bulk_strings && form.forward() {
                done = bulk(self, form, count.min(self.rep_budget.max(1)));
            }
            if done == 0 {
                one(self, form)?;
                done = 1;
            }
            count -= done;
            self.set_gpr(reg::RCX, form.address_size, count);
            self.mmio.clear();
            if count == 0 || form.until_zf == Some(self.r.flags.zf()) {
                self.rep_iterations += done - 1;
                self.rep_budget = self.rep_budget.saturating_sub(done - 1);
                break;
            }
            self.between_iterations(done)?;
        }
        Ok(())
    }

    /// The host address of the elements at an index register and how many (at most
    /// `max`) follow each other there in one page; `None` if that is not plain RAM
    /// whose translation is at hand.
    fn page_run(
        &mut self,
        segment: usize,
        n: usize,
        form: &Form,
        max: u64,
        write: bool,
    ) -> Option<(*mut u8, u64)> {
        let size = form.size as u64;
        let offset = self.index(n, form);
        let before_wrap = (mask(form.address_size) - offset) / size;
        let mut count = max.min(before_wrap);
        let result = self.linear(segment, offset, form.size, write).and_then(|lin| {
            count = count.min((0x1000 - (lin & 0xfff)) / size);
            self.linear(segment, offset, (count.max(1) * size) as usize, write)
        });
        let Ok(lin) = result else {
            // The slow path finds the element that faults.
            self.stop = None;
            return None;
        };
        if count == 0 {
            return None;
        }
        let at_hand = |cpu: &mut Cpu| {
            if write {
                cpu.host_rw(lin, 1)
            } else {
                cpu.host_r(lin, 1).map(<*const u8>::cast_mut)
            }
        };
        // Source and destination may want the same slot: what the first found stays good.
        let host = match at_hand(self) {
            None if self.enter_page(lin, form.size, write) => at_hand(self)?,
            found => found?,
        };
        Some((host, count))
    }

    // ---- MOVS -------------------------------------------------------------------------

    pub(super) fn op_movs(&mut self, i: &Instruction) -> X {
        let form = self.string_form(i);
        self.repeat(&form, Self::movs_one, Self::movs_bulk)
    }

    fn movs_one(&mut self, form: &Form) -> X {
        let value = self.load(form.segment, self.index(reg::RSI, form), form.size)?;
        self.store(seg::ES, self.index(reg::RDI, form), form.size, value)?;
        self.advance(reg::RSI, form, 1);
        self.advance(reg::RDI, form, 1);
        Ok(())
    }

    fn movs_bulk(&mut self, form: &Form, max: u64) -> u64 {
        let Some((source, count)) = self.page_run(form.segment, reg::RSI, form, max, false) else {
            return 0;
        };
        let Some((dest, count)) = self.page_run(seg::ES, reg::RDI, form, count, true) else {
            return 0;
        };
        let bytes = count as usize * form.size;
        let ahead = (dest as usize).wrapping_sub(source as usize);
        // SAFETY: both runs lie inside mapped guest frames for `bytes` bytes.
        unsafe {
            if ahead != 0 && ahead < bytes {
                // The source is overwritten on the way: copy element by element.
                for at in (0..bytes).step_by(form.size) {
                    host_store(dest.add(at), form.size, host_load(source.add(at), form.size));
                }
            } else {
                std::ptr::copy(source, dest, bytes);
            }
        }
        self.advance(reg::RSI, form, count);
        self.advance(reg::RDI, form, count);
        count
    }

    // ---- STOS -------------------------------------------------------------------------

    pub(super) fn op_stos(&mut self, i: &Instruction) -> X {
        let form = self.string_form(i);
        self.repeat(&form, Self::stos_one, Self::stos_bulk)
    }

    fn stos_one(&mut self, form: &Form) -> X {
        let value = self.gpr(reg::RAX, form.size);
        self.store(seg::ES, self.index(reg::RDI, form), form.size, value)?;
        self.advance(reg::RDI, form, 1);
        Ok(())
    }

    fn stos_bulk(&mut self, form: &Form, max: u64) -> u64 {
        let Some((dest, count)) = self.page_run(seg::ES, reg::RDI, form, max, true) else {
            return 0;
        };
        let bytes = count as usize * form.size;
        let value = self.gpr(reg::RAX, form.size);
        let same = value & 0xff;
        // SAFETY: the run lies inside a mapped, writable guest frame for `bytes` bytes.
        unsafe {
            if value == same.wrapping_mul(0x0101_0101_0101_0101) & mask(form.size) {
                std::ptr::write_bytes(dest, same as u8, bytes);
            } else {
                for at in (0..bytes).step_by(form.size) {
                    host_store(dest.add(at), form.size, value);
                }
            }
        }
        self.advance(reg::RDI, form, count);
        count
    }

    // ---- LODS -------------------------------------------------------------------------

    pub(super) fn op_lods(&mut self, i: &Instruction) -> X {
        let form = self.string_form(i);
        self.repeat(&form, Self::lods_one, |_, _, _| 0)
    }

    fn lods_one(&mut self, form: &Form) -> X {
        let value = self.load(form.segment, self.index(reg::RSI, form), form.size)?;
        self.set_gpr(reg::RAX, form.size, value);
        self.advance(reg::RSI, form, 1);
        Ok(())
    }

    // ---- CMPS -------------------------------------------------------------------------

    pub(super) fn op_cmps(&mut self, i: &Instruction) -> X {
        let mut form = self.string_form(i);
        form.until_zf = Some(i.has_repne_prefix());
        self.repeat(&form, Self::cmps_one, Self::cmps_bulk)
    }

    fn cmps_one(&mut self, form: &Form) -> X {
        let a = self.load(form.segment, self.index(reg::RSI, form), form.size)?;
        let b = self.load(seg::ES, self.index(reg::RDI, form), form.size)?;
        self.r.flags = Flags::sub(a, b, false, form.size).1;
        self.advance(reg::RSI, form, 1);
        self.advance(reg::RDI, form, 1);
        Ok(())
    }

    /// Passes over the elements that do not end the repetition; the last one is
    /// always left to [`Cpu::cmps_one`].
    fn cmps_bulk(&mut self, form: &Form, max: u64) -> u64 {
        let Some((left, count)) = self.page_run(form.segment, reg::RSI, form, max - 1, false) else {
            return 0;
        };
        let Some((right, count)) = self.page_run(seg::ES, reg::RDI, form, count, false) else {
            return 0;
        };
        let end_equal = form.until_zf == Some(true);
        let mut done = 0;
        let (mut last_a, mut last_b) = (0, 0);
        while done < count {
            let at = done as usize * form.size;
            // SAFETY: both runs lie inside mapped guest frames for `count` elements.
            let (a, b) = unsafe { (host_load(left.add(at), form.size), host_load(right.add(at), form.size)) };
            if (a == b) == end_equal {
                break;
            }
            (last_a, last_b) = (a, b);
            done += 1;
        }
        if done != 0 {
            self.r.flags = Flags::sub(last_a, last_b, false, form.size).1;
            self.advance(reg::RSI, form, done);
            self.advance(reg::RDI, form, done);
        }
        done
    }

    // ---- SCAS -------------------------------------------------------------------------

    pub(super) fn op_scas(&mut self, i: &Instruction) -> X {
        let mut form = self.string_form(i);
        form.until_zf = Some(i.has_repne_prefix());
        self.repeat(&form, Self::scas_one, Self::scas_bulk)
    }

    fn scas_one(&mut self, form: &Form) -> X {
        let a = self.gpr(reg::RAX, form.size);
        let b = self.load(seg::ES, self.index(reg::RDI, form), form.size)?;
        self.r.flags = Flags::sub(a, b, false, form.size).1;
        self.advance(reg::RDI, form, 1);
        Ok(())
    }

    /// As [`Cpu::cmps_bulk`].
    fn scas_bulk(&mut self, form: &Form, max: u64) -> u64 {
        let Some((right, count)) = self.page_run(seg::ES, reg::RDI, form, max - 1, false) else {
            return 0;
        };
        let a = self.gpr(reg::RAX, form.size);
        let end_equal = form.until_zf == Some(true);
        let (mut done, mut last) = (0, 0);
        while done < count {
            // SAFETY: the run lies inside a mapped guest frame for `count` elements.
            let b = unsafe { host_load(right.add(done as usize * form.size), form.size) };
            if (a == b) == end_equal {
                break;
            }
            last = b;
            done += 1;
        }
        if done != 0 {
            self.r.flags = Flags::sub(a, last, false, form.size).1;
            self.advance(reg::RDI, form, done);
        }
        done
    }
}
