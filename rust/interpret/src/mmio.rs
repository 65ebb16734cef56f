//! Accesses to guest-physical memory without RAM behind it.
//!
//! An instruction that makes one stops with [`Exit::Mmio`] and is executed
//! again when the caller has answered; the log then lets the answered accesses
//! pass, so that an instruction with several of them makes each exactly once.

use crate::cpu::Cpu;
use crate::state::*;

/// One answered access.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MmioAccess {
    /// Guest-physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u8,
    /// Store or load.
    pub write: bool,
    /// What a load returned.
    pub data: Vec<u8>,
    /// The caller has answered (stores need no answer).
    pub answered: bool,
}

/// The accesses of the current instruction, in order.
#[derive(Clone, Debug, Default)]
pub struct MmioLog {
    /// Accesses so far.
    pub done: Vec<MmioAccess>,
    /// How many of them this execution has passed.
    pub cursor: usize,
}

impl MmioLog {
    /// Starts another execution of the same instruction.
    pub fn rewind(&mut self) {
        self.cursor = 0;
    }
    /// The instruction (or a string iteration) is complete.
    #[inline]
    pub fn clear(&mut self) {
        self.done.clear();
        self.cursor = 0;
    }
    /// Whether an instruction is waiting to be executed again.
    #[inline]
    pub fn active(&self) -> bool {
        !self.done.is_empty()
    }
    /// Gives the answer to a load.
    pub fn answer(&mut self, data: &[u8]) {
        if let Some(last) = self.done.last_mut() {
            if !last.answered {
                let n = usize::from(last.size);
                last.data = (0..n).map(|i| data.get(i).copied().unwrap_or(0xff)).collect();
                last.answered = true;
            }
        }
    }
}

impl Cpu {
    fn is_lapic(&self, gpa: u64) -> bool {
        self.lapic.mmio_page() == Some(gpa & !0xfff)
    }

    /// Loads from MMIO space (never crossing a page).
    #[cold]
    pub fn mmio_load(&mut self, gpa: u64, out: &mut [u8]) -> X {
        if self.write_log.is_some() {
            // A rehearsal goes no further: devices would notice.
            self.stop = Some(StopReason::Restart);
            return Err(Stop);
        }
        if self.is_lapic(gpa) {
            let now = self.now_ns();
            let word = self.lapic.mmio_read(gpa as u32 & 0xff0, now).to_le_bytes();
            for (i, b) in out.iter_mut().enumerate() {
                *b = word.get((gpa as usize & 15) + i).copied().unwrap_or(0);
            }
            return Ok(());
        }
        let log = &mut self.mmio;
        if let Some(a) = log.done.get(log.cursor) {
            if !a.write && a.gpa == gpa && usize::from(a.size) == out.len() && a.answered {
                out.copy_from_slice(&a.data);
                log.cursor += 1;
                return Ok(());
            }
            log.done.truncate(log.cursor);
        }
        let size = out.len() as u8;
        log.done.push(MmioAccess { gpa, size, write: false, data: Vec::new(), answered: false });
        Err(self.exit(Exit::Mmio { gpa, size, write: false, data: Vec::new() }))
    }

    /// Stores to MMIO space (never crossing a page).
    #[cold]
    pub fn mmio_store(&mut self, gpa: u64, data: &[u8]) -> X {
        if self.write_log.is_some() {
            // A rehearsal goes no further: devices would notice.
            self.stop = Some(StopReason::Restart);
            return Err(Stop);
        }
        if self.is_lapic(gpa) {
            let offset = gpa as u32 & 0xfff;
            if offset & 15 == 0 && data.len() == 4 {
                let now = self.now_ns();
                let value = u32::from_le_bytes([data[0], data[1], data[2], data[3]]);
                let effects = self.lapic.mmio_write(offset, value, now);
                return self.lapic_effects(effects);
            }
            return Ok(());
        }
        let log = &mut self.mmio;
        if let Some(a) = log.done.get(log.cursor) {
            if a.write && a.gpa == gpa && usize::from(a.size) == data.len() {
                log.cursor += 1;
                return Ok(());
            }
            log.done.truncate(log.cursor);
        }
        let size = data.len() as u8;
        log.done.push(MmioAccess { gpa, size, write: true, data: Vec::new(), answered: true });
        Err(self.exit(Exit::Mmio { gpa, size, write: true, data: data.to_vec() }))
    }

    /// Remembers what a local APIC write asks of others. The access itself is
    /// complete; the exits are made before the next instruction.
    pub fn lapic_effects(&mut self, effects: nonroot_lapic::Effects) -> X {
        if let Some(vector) = effects.eoi {
            self.pending_exits.push(Exit::IoapicEoi { vector });
        }
        if let Some(ipi) = effects.ipi {
            self.pending_exits.push(Exit::Ipi(ipi));
        }
        self.interrupts_changed();
        Ok(())
    }
}
