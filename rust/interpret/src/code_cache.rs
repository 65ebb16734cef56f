//! Decoded code (stub while the decoder is written).

use crate::cpu::Cpu;

/// Decoded blocks.
#[derive(Default)]
pub struct CodeCache {}

impl CodeCache {
    /// Forgets how blocks of one linear page are found.
    pub fn forget_linear_page(&mut self, lin: u64) {
        let _ = lin;
    }
}

impl Cpu {
    /// Recomputes the key that blocks are found by.
    pub fn update_exec_key(&mut self) {}
    /// Guest memory that holds decoded code is about to be written.
    pub fn code_written(&mut self, gpa: u64, len: usize) {
        let _ = (gpa, len);
    }
    /// Something about pending interrupts, IF, TPR or shadows changed: look again
    /// before the next block.
    pub fn interrupts_changed(&mut self) {
        self.attention = true;
    }
}
