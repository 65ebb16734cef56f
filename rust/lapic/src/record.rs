//! The local APIC's state record: fixed layout, little-endian, versioned.
//!
//! | offset | field | offset | field |
//! |---|---|---|---|
//! | 0 | magic "LAPC" | 84 | timer initial count u32 |
//! | 4 | version u32 = 1 | 88 | timer start, ns u64 |
//! | 8 | APIC ID u32 | 96 | ticks to the first expiry u32 |
//! | 12 | TPR u32 | 100 | flags u32: 1 timer runs, 2 LINT0, 4 LINT1 asserted |
//! | 16 | IA32_APIC_BASE u64 | 104 | expiries seen u64 |
//! | 24 | LDR u32 | 112 | IA32_TSC_DEADLINE u64 |
//! | 28 | DFR u32 | 120 | zero u64 |
//! | 32 | SVR u32 | 128 | IRR 32 bytes |
//! | 36 | ESR u32 | 160 | ISR 32 bytes |
//! | 40 | errors not in ESR yet u32 | 192 | TMR 32 bytes |
//! | 44 | divide configuration u32 | | |
//! | 48 | ICR u64 | | |
//! | 56 | LVT: CMCI, timer, thermal, perf, LINT0, LINT1, error u32 | | |

use crate::timer::TSC_DEADLINE;
use crate::{apic_base, lvt, Lapic, Vectors, LVT_MASKED, SVR_ENABLE, SVR_WRITABLE};

/// Bytes in a record.
pub const RECORD_LENGTH: usize = 224;
const MAGIC: &[u8; 4] = b"LAPC";
const VERSION: u32 = 1;

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.0[at..at + 4].try_into().expect("4 bytes"))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.0[at..at + 8].try_into().expect("8 bytes"))
    }
    fn vectors(&self, at: usize) -> Vectors {
        std::array::from_fn(|i| self.u64(at + 8 * i))
    }
}

fn require(condition: bool, what: &str) -> Result<(), String> {
    if condition {
        Ok(())
    } else {
        Err(format!("the local APIC record's {what} is not possible"))
    }
}

impl Lapic {
    /// All registers as a fixed-layout record.
    pub fn state(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(RECORD_LENGTH);
        let t = &self.timer;
        out.extend_from_slice(MAGIC);
        for word in [VERSION, self.id, self.tpr] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.base.to_le_bytes());
        for word in [self.ldr, self.dfr, self.svr, self.esr, self.errors, t.divide] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.icr.to_le_bytes());
        for word in self.lvt.iter().chain([&t.initial]) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&t.start_ns.to_le_bytes());
        let flags = t.running as u32 | (self.lint[0] as u32) << 1 | (self.lint[1] as u32) << 2;
        for word in [t.first, flags] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        for word in [t.expired, t.tsc_deadline, 0].iter().chain(&self.irr).chain(&self.isr).chain(&self.tmr) {
            out.extend_from_slice(&word.to_le_bytes());
        }
        debug_assert_eq!(out.len(), RECORD_LENGTH);
        out
    }

    /// Loads a record of [`Lapic::state`]; refuses a hostile one, changing nothing.
    pub fn set_state(&mut self, record: &[u8]) -> Result<(), String> {
        if record.len() != RECORD_LENGTH {
            return Err(format!(
                "the local APIC record has {} bytes instead of {RECORD_LENGTH}",
                record.len()
            ));
        }
        let r = Reader(record);
        require(&record[0..4] == MAGIC, "magic")?;
        require(r.u32(4) == VERSION, "version")?;
        if r.u32(8) != self.id {
            return Err(format!("the local APIC record is of APIC ID {}, this one is {}", r.u32(8), self.id));
        }
        let mut new = self.clone();
        new.tpr = r.u32(12);
        require(new.tpr <= 0xff, "TPR")?;
        new.base = r.u64(16);
        let known = apic_base::ADDRESS | apic_base::BSP | apic_base::EN | apic_base::EXTD;
        require(new.base & !known == 0, "IA32_APIC_BASE")?;
        require(new.base & (apic_base::EN | apic_base::EXTD) != apic_base::EXTD, "IA32_APIC_BASE")?;
        new.ldr = r.u32(24);
        let ldr_ok = if new.x2apic() { new.ldr == new.x2apic_ldr() } else { new.ldr & 0x00ff_ffff == 0 };
        require(ldr_ok, "LDR")?;
        new.dfr = r.u32(28);
        require(new.dfr & 0x0fff_ffff == 0x0fff_ffff, "DFR")?;
        new.svr = r.u32(32);
        require(new.svr & !SVR_WRITABLE == 0, "SVR")?;
        (new.esr, new.errors) = (r.u32(36), r.u32(40));
        require((new.esr | new.errors) <= 0xff, "ESR")?;
        let t = &mut new.timer;
        t.divide = r.u32(44);
        require(t.divide & !0xb == 0, "divide configuration")?;
        new.icr = r.u64(48);
        require(new.icr & 0xfff3_3000 == 0, "ICR")?;
        for (i, entry) in new.lvt.iter_mut().enumerate() {
            *entry = r.u32(56 + 4 * i);
            require(*entry & !lvt::WRITABLE[i] == 0, "LVT")?;
            require(new.svr & SVR_ENABLE != 0 || *entry & LVT_MASKED != 0, "LVT mask")?;
        }
        t.mode = new.lvt[lvt::TIMER] >> 17 & 3;
        t.initial = r.u32(84);
        t.start_ns = r.u64(88);
        t.first = r.u32(96);
        let flags = r.u32(100);
        require(flags & !7 == 0, "flags")?;
        t.running = flags & 1 != 0;
        new.lint = [flags & 2 != 0, flags & 4 != 0];
        t.expired = r.u64(104);
        t.tsc_deadline = r.u64(112);
        require(r.u64(120) == 0, "reserved field")?;
        require(t.first <= t.initial || t.mode == TSC_DEADLINE, "timer count")?;
        require(!t.running || (t.mode != TSC_DEADLINE && t.first != 0), "timer")?;
        require(t.tsc_deadline == 0 || t.mode == TSC_DEADLINE, "IA32_TSC_DEADLINE")?;
        (new.irr, new.isr, new.tmr) = (r.vectors(128), r.vectors(160), r.vectors(192));
        require((new.irr[0] | new.isr[0]) & 0xffff == 0, "IRR or ISR")?;
        new.timer.schedule();
        new.update();
        *self = new;
        self.publish();
        Ok(())
    }
}
