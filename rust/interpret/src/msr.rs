//! Model-specific registers.

/// MSRs with an effect or a fast path; the rest are in the policy's storage.
#[derive(Clone, Debug, Default)]
pub struct Msrs {
    /// Added to the TSC (IA32_TSC_ADJUST and writes of IA32_TIME_STAMP_COUNTER).
    pub tsc_offset: u64,
}
