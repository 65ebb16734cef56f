//! Instructions on the vector and x87 register files, executed by the host CPU
//! itself. See the module documentation of each part.

/// The guest's vector and x87 state, laid out for the generated code.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct VectorState {
    /// YMM0..YMM15, 32 bytes each, little-endian (XMMn is the low half).
    pub ymm: [[u8; 32]; 16],
    /// x87 and MMX state as FXSAVE64 stores it (its XMM part is unused).
    pub fx: [u8; 512],
    /// MXCSR.
    pub mxcsr: u32,
}

impl Default for VectorState {
    fn default() -> Self {
        let mut fx = [0u8; 512];
        fx[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        VectorState { ymm: [[0; 32]; 16], fx, mxcsr: 0x1f80 }
    }
}
