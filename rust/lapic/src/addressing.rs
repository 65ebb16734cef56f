//! Which interrupt messages are for a local APIC, as other threads may ask.

use std::sync::atomic::{AtomicU64, Ordering};

const ENABLED: u64 = 1 << 40;
const X2APIC: u64 = 1 << 41;

/// The logical and physical address of one local APIC, always current.
#[derive(Debug)]
pub struct Addressing {
    id: u32,
    /// LDR in bits 31:0, DFR's model in bits 35:32, and the mode.
    word: AtomicU64,
}

impl Addressing {
    pub(crate) fn new(id: u32) -> Self {
        Addressing { id, word: AtomicU64::new(0) }
    }

    pub(crate) fn publish(&self, enabled: bool, x2apic: bool, ldr: u32, dfr: u32) {
        let mode = if enabled { ENABLED } else { 0 } | if x2apic { X2APIC } else { 0 };
        self.word.store(mode | u64::from(dfr >> 28) << 32 | u64::from(ldr), Ordering::Release);
    }

    /// Whether a message to this destination is for the APIC (SDM 3,
    /// "Determining IPI Destination").
    pub fn matches(&self, destination: u32, logical: bool) -> bool {
        let word = self.word.load(Ordering::Acquire);
        let ldr = word as u32;
        if word & ENABLED == 0 {
            return false;
        }
        if destination == u32::MAX {
            return true;
        }
        if word & X2APIC != 0 {
            return if logical {
                destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0
            } else {
                destination == self.id
            };
        }
        if !logical {
            return destination == 0xff || destination == self.id;
        }
        let (mda, own) = (destination & 0xff, ldr >> 24);
        if word >> 32 & 15 == 15 {
            mda & own != 0
        } else {
            mda == 0xff || (mda >> 4 == own >> 4 && mda & own & 0xf != 0)
        }
    }
}
