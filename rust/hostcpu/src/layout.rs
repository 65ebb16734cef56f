//! The memory that a case sees, and the records that travel over the pipes.
//!
//! Everything is little endian. On start the tool writes a **hello**: magic
//! `NRHC`, `u32` version, `u32` features (see [`feature`]), `u32` zero.
//!
//! A **batch** on standard input: magic `BTCH`, `u32` number of cases, `u32`
//! bytes of cases, `u32` zero; then [`DATA_BYTES`] bytes, the data pages'
//! contents at the start of each case, in the order of [`REGIONS`] without the
//! code; then the cases:
//!
//! | offset | field |
//! |---|---|
//! | 0 | `u32` length of the record, a multiple of 8 |
//! | 4 | `u32` flags, see [`case_flag`] |
//! | 8 | `u64` RIP |
//! | 16 | `u64` RFLAGS |
//! | 24 | `u64` × 16 general registers, as encoded (RAX RCX RDX RBX RSP …) |
//! | 152 | `u64` FS base, `u64` GS base |
//! | 168 | `u32` number of patches, `u32` zero |
//! | 176 | 832 bytes of XSAVE area (standard format: legacy, header, YMM high halves) |
//! | 1008 | patches: `u64` address, `u32` length, the bytes, padding to 8 |
//!
//! Patches write code and data before the case starts; all other bytes of the
//! code pages are 0xCC (INT3), which is how a case normally ends.
//!
//! The answer: magic `RSLT`, `u32` number of results, `u32` bytes, `u32` zero, then
//!
//! | offset | field |
//! |---|---|
//! | 0 | `u32` length of the record, a multiple of 8 |
//! | 4 | `u32` status: 0 stopped by a fault, 1 ran too long, 2 killed the process |
//! | 8 | `u32` signal, `u32` trap number |
//! | 16 | `u64` error code, `u64` CR2 |
//! | 32 | `u64` RIP, `u64` RFLAGS, `u64` × 16 general registers |
//! | 176 | `u64` FS base, `u64` GS base |
//! | 192 | `u16` CS, SS, DS, ES, FS, GS, then 4 zero bytes |
//! | 208 | `u32` number of changes, `u32` zero |
//! | 216 | 832 bytes of XSAVE area |
//! | 1048 | changes of the data pages: `u64` address, `u32` length, the bytes, padding to 8 |

/// Bytes in a page.
pub const PAGE: usize = 4096;

/// What a case may do with a region.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Rights {
    /// Read and execute.
    Code,
    /// Read and write.
    Data,
    /// Read.
    ReadOnly,
}

/// A mapped region.
pub struct Region {
    /// Linear address.
    pub base: u64,
    /// Size in pages.
    pub pages: usize,
    /// Rights.
    pub rights: Rights,
}

/// All regions; around each lies nothing, except that the read-only page follows the first data pages.
pub const REGIONS: [Region; 5] = [
    Region { base: 0x1000_0000, pages: 2, rights: Rights::Code },
    Region { base: 0x2000_0000, pages: 2, rights: Rights::Data },
    Region { base: 0x2000_2000, pages: 1, rights: Rights::ReadOnly },
    Region { base: 0x3000_0000, pages: 2, rights: Rights::Data },
    Region { base: 0xf000_0000, pages: 1, rights: Rights::Data },
];
/// Bytes of code pages, at the start of the backing.
pub const CODE_BYTES: usize = 2 * PAGE;
/// Bytes of all other pages, after them.
pub const DATA_BYTES: usize = 6 * PAGE;

/// Bits of a case's flags.
pub mod case_flag {
    /// Run as 32-bit code (compatibility mode).
    pub const COMPAT: u32 = 1;
}

/// Bits of the hello's features.
pub mod feature {
    /// RDFSBASE and friends work; without, FS and GS bases of cases are ignored.
    pub const FSGSBASE: u32 = 1;
    /// AVX state is enabled.
    pub const AVX: u32 = 2;
}

/// Bytes of an XSAVE area with x87, SSE and AVX state.
pub const XSAVE_BYTES: usize = 832;
/// Bytes of a case before its patches.
pub const CASE_HEADER: usize = 1008;
/// Bytes of a result before its changes.
pub const RESULT_HEADER: usize = 1048;

/// Offset in the backing of `len` bytes at a linear address; None if they are not in one region.
pub fn offset_of(address: u64, len: usize) -> Option<usize> {
    let mut start = 0;
    for region in &REGIONS {
        let bytes = region.pages * PAGE;
        if let Some(at) = address.checked_sub(region.base) {
            if at < bytes as u64 && len <= bytes - at as usize {
                return Some(start + at as usize);
            }
        }
        start += bytes;
    }
    None
}

/// Reads a `u32` of a record.
pub fn get32(record: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(record[at..at + 4].try_into().expect("four bytes"))
}

/// Reads a `u64` of a record.
pub fn get64(record: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(record[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_fill_the_backing_in_order() {
        let pages: usize = REGIONS.iter().map(|region| region.pages).sum();
        assert_eq!(pages * PAGE, CODE_BYTES + DATA_BYTES);
        assert_eq!(offset_of(0x1000_0000, 1), Some(0));
        assert_eq!(offset_of(0x2000_0000, 1), Some(CODE_BYTES));
        assert_eq!(offset_of(0x2000_2000, 1), Some(CODE_BYTES + 2 * PAGE));
        assert_eq!(offset_of(0xf000_0fff, 1), Some(CODE_BYTES + DATA_BYTES - 1));
    }

    #[test]
    fn patches_stay_in_one_region() {
        assert_eq!(offset_of(0x1000_0000, CODE_BYTES), Some(0));
        assert_eq!(offset_of(0x1000_0001, CODE_BYTES), None);
        assert_eq!(offset_of(0x2000_1fff, 2), None);
        assert_eq!(offset_of(0x0fff_ffff, 1), None);
        assert_eq!(offset_of(0x1000_2000, 1), None);
        assert_eq!(offset_of(u64::MAX, 1), None);
        assert_eq!(offset_of(0x1000_0000, usize::MAX), None);
    }
}
