//! Masked and gathered memory operands: element by element, touching no byte
//! whose mask element is clear.

use crate::plan::{base_register, register, MemAccess, Plan, Unsupported};
use iced_x86::{Code, Instruction, OpKind, Register};

/// What a masked move does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MaskKind {
    /// VMASKMOV and VPMASKMOV from memory: other elements become zero.
    Load,
    /// VMASKMOV and VPMASKMOV to memory.
    Store,
    /// MASKMOVDQU and VMASKMOVDQU: byte elements, address in rDI.
    StoreBytes,
    /// MASKMOVQ: byte elements of MMX registers, address in rDI.
    StoreMmx,
}

/// A masked move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskPlan {
    /// Direction and register file.
    pub kind: MaskKind,
    /// Register with the data (destination of a load).
    pub data: u8,
    /// Register with the mask: the top bit of each element counts.
    pub mask: u8,
    /// Bytes an element.
    pub element: u8,
    /// Elements.
    pub count: u8,
    /// For the forms with the address in rDI: the bits of rDI that count.
    pub address_mask: u64,
}

/// A gather. Faults leave the elements done so far in place and their mask
/// elements clear, so that the instruction goes on where it stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatherPlan {
    /// Destination.
    pub dst: u8,
    /// Mask, cleared element by element.
    pub mask: u8,
    /// Vector register with the indices.
    pub index: u8,
    /// Base register, if any.
    pub base: Option<u8>,
    /// Displacement, sign-extended.
    pub displacement: u64,
    /// 1, 2, 4 or 8.
    pub scale: u8,
    /// Bytes an index: 4 or 8.
    pub index_size: u8,
    /// Bytes an element: 4 or 8.
    pub element: u8,
    /// Elements.
    pub count: u8,
    /// Bits of the address that count (address size).
    pub address_mask: u64,
}

fn size_mask(bits: u32) -> u64 {
    if bits >= 64 {
        u64::MAX
    } else {
        (1 << bits) - 1
    }
}

/// The plan of a masked move or a gather; `None` for other instructions.
pub(crate) fn plan(instruction: &Instruction) -> Result<Option<(Plan, Option<MemAccess>)>, Unsupported> {
    use Code::*;
    use MaskKind::{Load, Store, StoreBytes, StoreMmx};
    let mask = |kind, element: u8, count: u8| {
        let (data, mask) = match kind {
            Load => (0, 1),
            Store => (2, 1),
            StoreBytes | StoreMmx => (1, 2),
        };
        let bits = match instruction.op_kind(0) {
            OpKind::MemorySegDI => 16,
            OpKind::MemorySegEDI => 32,
            _ => 64,
        };
        let plan = MaskPlan {
            kind,
            data: register(instruction, data),
            mask: register(instruction, mask),
            element,
            count,
            address_mask: size_mask(bits),
        };
        let size = u16::from(element) * u16::from(count);
        let memory = MemAccess { size, read: kind == Load, write: kind != Load, align: 1 };
        Ok(Some((Plan::Masked(plan), Some(memory))))
    };
    match instruction.code() {
        VEX_Vmaskmovps_xmm_xmm_m128 | VEX_Vpmaskmovd_xmm_xmm_m128 => mask(Load, 4, 4),
        VEX_Vmaskmovps_ymm_ymm_m256 | VEX_Vpmaskmovd_ymm_ymm_m256 => mask(Load, 4, 8),
        VEX_Vmaskmovpd_xmm_xmm_m128 | VEX_Vpmaskmovq_xmm_xmm_m128 => mask(Load, 8, 2),
        VEX_Vmaskmovpd_ymm_ymm_m256 | VEX_Vpmaskmovq_ymm_ymm_m256 => mask(Load, 8, 4),
        VEX_Vmaskmovps_m128_xmm_xmm | VEX_Vpmaskmovd_m128_xmm_xmm => mask(Store, 4, 4),
        VEX_Vmaskmovps_m256_ymm_ymm | VEX_Vpmaskmovd_m256_ymm_ymm => mask(Store, 4, 8),
        VEX_Vmaskmovpd_m128_xmm_xmm | VEX_Vpmaskmovq_m128_xmm_xmm => mask(Store, 8, 2),
        VEX_Vmaskmovpd_m256_ymm_ymm | VEX_Vpmaskmovq_m256_ymm_ymm => mask(Store, 8, 4),
        Maskmovdqu_rDI_xmm_xmm | VEX_Vmaskmovdqu_rDI_xmm_xmm => mask(StoreBytes, 1, 16),
        Maskmovq_rDI_mm_mm => mask(StoreMmx, 1, 8),
        VEX_Vpgatherdd_xmm_vm32x_xmm | VEX_Vgatherdps_xmm_vm32x_xmm => gather(instruction, 4, 4, 4),
        VEX_Vpgatherdd_ymm_vm32y_ymm | VEX_Vgatherdps_ymm_vm32y_ymm => gather(instruction, 4, 4, 8),
        VEX_Vpgatherdq_xmm_vm32x_xmm | VEX_Vgatherdpd_xmm_vm32x_xmm => gather(instruction, 4, 8, 2),
        VEX_Vpgatherdq_ymm_vm32x_ymm | VEX_Vgatherdpd_ymm_vm32x_ymm => gather(instruction, 4, 8, 4),
        VEX_Vpgatherqd_xmm_vm64x_xmm | VEX_Vgatherqps_xmm_vm64x_xmm => gather(instruction, 8, 4, 2),
        VEX_Vpgatherqd_xmm_vm64y_xmm | VEX_Vgatherqps_xmm_vm64y_xmm => gather(instruction, 8, 4, 4),
        VEX_Vpgatherqq_xmm_vm64x_xmm | VEX_Vgatherqpd_xmm_vm64x_xmm => gather(instruction, 8, 8, 2),
        VEX_Vpgatherqq_ymm_vm64y_ymm | VEX_Vgatherqpd_ymm_vm64y_ymm => gather(instruction, 8, 8, 4),
        _ => Ok(None),
    }
}

fn gather(
    instruction: &Instruction,
    index_size: u8,
    element: u8,
    count: u8,
) -> Result<Option<(Plan, Option<MemAccess>)>, Unsupported> {
    let (dst, mask) = (register(instruction, 0), register(instruction, 2));
    let index = instruction.memory_index().number() as u8;
    if dst == mask || dst == index || mask == index {
        return Err(Unsupported::InvalidOperands);
    }
    let base = instruction.memory_base();
    let bits = match base {
        Register::None if instruction.memory_displ_size() == 8 => 64,
        Register::None => 32,
        _ => base.size() as u32 * 8,
    };
    let plan = GatherPlan {
        dst,
        mask,
        index,
        base: base_register(base),
        displacement: instruction.memory_displacement64(),
        scale: instruction.memory_index_scale() as u8,
        index_size,
        element,
        count,
        address_mask: size_mask(bits),
    };
    let memory = MemAccess { size: element.into(), read: true, write: false, align: 1 };
    Ok(Some((Plan::Gather(plan), Some(memory))))
}

impl MaskPlan {
    /// Whether element `n` of the mask register's bytes is set.
    pub(crate) fn selected(&self, mask: &[u8], n: usize) -> bool {
        let element = self.element as usize;
        mask[n * element + element - 1] & 0x80 != 0
    }
}

impl GatherPlan {
    /// The effective address of element `n`, from the index register's bytes and the base's value.
    pub(crate) fn address(&self, index: &[u8; 32], base: u64, n: usize) -> u64 {
        let size = self.index_size as usize;
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&index[n * size..][..size]);
        let mut value = u64::from_le_bytes(bytes);
        if size == 4 {
            value = value as u32 as i32 as i64 as u64;
        }
        let offset = value.wrapping_mul(self.scale.into());
        base.wrapping_add(offset).wrapping_add(self.displacement) & self.address_mask
    }
}
