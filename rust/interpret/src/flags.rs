//! The six status flags, kept as the values they derive from and computed when
//! an instruction asks.

use crate::state::rflags;

/// Lazily evaluated status flags.
///
/// `ZF = zf == 0`; `SF = bit 63 of sp`; `PF = even parity of sp's low byte`;
/// `CF = bit 63 of cv`; `OF = bit 63 ^ bit 62 of cv`; `AF = bit 3 of cv`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flags {
    /// Zero exactly if ZF is set.
    pub zf: u64,
    /// Sign in bit 63, parity in the low byte.
    pub sp: u64,
    /// Carry vector: carries out of the top two bits and out of bit 3.
    pub cv: u64,
}

impl Default for Flags {
    fn default() -> Self {
        Flags::from_rflags(0)
    }
}

impl Flags {
    /// The flags in RFLAGS' layout (other bits zero).
    #[inline]
    pub fn to_rflags(self) -> u64 {
        (self.cf() as u64)
            | (self.pf() as u64) << 2
            | (self.af() as u64) << 4
            | (self.zf() as u64) << 6
            | (self.sf() as u64) << 7
            | (self.of() as u64) << 11
    }

    /// Takes the six status flags from an RFLAGS value.
    #[inline]
    pub fn from_rflags(v: u64) -> Self {
        let cf = v & 1;
        let of = v >> 11 & 1;
        Flags {
            zf: (v & rflags::ZF) ^ rflags::ZF,
            sp: (v & rflags::SF) << 56 | (v >> 2 & 1 ^ 1),
            cv: cf << 63 | (cf ^ of) << 62 | (v & rflags::AF) >> 1,
        }
    }

    /// CF.
    #[inline(always)]
    pub fn cf(self) -> bool {
        (self.cv as i64) < 0
    }
    /// PF.
    #[inline(always)]
    pub fn pf(self) -> bool {
        (self.sp as u8).count_ones() & 1 == 0
    }
    /// AF.
    #[inline(always)]
    pub fn af(self) -> bool {
        self.cv & 8 != 0
    }
    /// ZF.
    #[inline(always)]
    pub fn zf(self) -> bool {
        self.zf == 0
    }
    /// SF.
    #[inline(always)]
    pub fn sf(self) -> bool {
        (self.sp as i64) < 0
    }
    /// OF.
    #[inline(always)]
    pub fn of(self) -> bool {
        ((self.cv ^ self.cv << 1) as i64) < 0
    }

    /// Condition `cc` as in Jcc's low opcode nibble (0 O, 1 NO, 2 B, ... 15 G).
    #[inline(always)]
    pub fn condition(self, cc: u8) -> bool {
        let v = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        v ^ (cc & 1 != 0)
    }

    /// Replaces CF alone.
    #[inline(always)]
    pub fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.cv = (self.cv & 8) | (cf as u64) << 63 | ((cf != of) as u64) << 62;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rflags_round_trip() {
        for v in 0..=0xfffu64 {
            let want = v & rflags::STATUS;
            assert_eq!(Flags::from_rflags(v).to_rflags(), want);
            for cf in [false, true] {
                let mut f = Flags::from_rflags(v);
                f.set_cf(cf);
                assert_eq!(f.to_rflags(), want & !1 | cf as u64);
            }
        }
    }
}
