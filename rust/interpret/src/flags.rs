//! The six status flags, kept as the values they derive from and computed when
//! an instruction asks.

use crate::operands::{mask, sign_extend};
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

/// Constructors: the flags after an operation. `size` is in bytes (1, 2, 4, 8);
/// operands must be zero-extended from it, results are. Where the manuals leave
/// a flag undefined it gets the value that AMD's Zen processors give it, which
/// is named in each comment.
impl Flags {
    /// Flags of a result: ZF, SF and PF from it, and the carry vector as given.
    #[inline(always)]
    fn of_result(r: u64, cv: u64, size: usize) -> Self {
        Flags { zf: r, sp: r << (64 - 8 * size) | r & 0xff, cv }
    }

    /// A carry vector with CF, OF and AF.
    #[inline(always)]
    fn carries(cf: bool, of: bool, af: bool) -> u64 {
        (cf as u64) << 63 | ((cf != of) as u64) << 62 | (af as u64) << 3
    }

    /// ADD, ADC: `a + b + carry`.
    #[inline(always)]
    pub fn add(a: u64, b: u64, carry: bool, size: usize) -> (u64, Self) {
        let r = a.wrapping_add(b).wrapping_add(carry as u64) & mask(size);
        let c = a & b | (a | b) & !r;
        (r, Self::of_result(r, c << (64 - 8 * size) | c & 8, size))
    }

    /// SUB, SBB, CMP: `a - b - borrow`.
    #[inline(always)]
    pub fn sub(a: u64, b: u64, borrow: bool, size: usize) -> (u64, Self) {
        let r = a.wrapping_sub(b).wrapping_sub(borrow as u64) & mask(size);
        let c = !a & b | (!a | b) & r;
        (r, Self::of_result(r, c << (64 - 8 * size) | c & 8, size))
    }

    /// AND, OR, XOR, TEST, ANDN: CF and OF are clear; AF too (undefined in the manuals).
    #[inline(always)]
    pub fn logic(r: u64, size: usize) -> Self {
        Self::of_result(r, 0, size)
    }

    /// INC: keeps CF.
    #[inline(always)]
    pub fn inc(self, a: u64, size: usize) -> (u64, Self) {
        let (r, mut f) = Self::add(a, 1, false, size);
        f.set_cf(self.cf());
        (r, f)
    }

    /// DEC: keeps CF.
    #[inline(always)]
    pub fn dec(self, a: u64, size: usize) -> (u64, Self) {
        let (r, mut f) = Self::sub(a, 1, false, size);
        f.set_cf(self.cf());
        (r, f)
    }

    /// The shift count that hardware uses: 5 bits, 6 for 64-bit operands.
    #[inline(always)]
    pub fn shift_count(count: u64, size: usize) -> u32 {
        (count & if size == 8 { 63 } else { 31 }) as u32
    }

    /// SHL by a masked count. Undefined in the manuals: AF is set; OF is
    /// MSB xor CF for every count; CF is 0 when more than all bits are shifted out.
    #[inline(always)]
    pub fn shl(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        let r = a << count & mask(size);
        let cf = count <= bits && a >> (bits - count) & 1 != 0;
        let of = (r >> (bits - 1) & 1 != 0) != cf;
        (r, Self::of_result(r, Self::carries(cf, of, true), size))
    }

    /// SHR by a masked count. Undefined in the manuals: AF is set; OF is the xor of
    /// the result's top two bits for every count.
    #[inline(always)]
    pub fn shr(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let r = a >> count;
        let cf = a >> (count - 1) & 1 != 0;
        (r, Self::of_result(r, Self::carries(cf, Self::top_two_differ(r, size), true), size))
    }

    /// SAR by a masked count. Undefined in the manuals: AF is set; OF is clear for every count.
    #[inline(always)]
    pub fn sar(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let wide = sign_extend(a, size) as i64;
        let r = (wide >> count) as u64 & mask(size);
        let cf = wide >> (count - 1) & 1 != 0;
        (r, Self::of_result(r, Self::carries(cf, false, true), size))
    }

    #[inline(always)]
    fn top_two_differ(r: u64, size: usize) -> bool {
        let bits = 8 * size as u32;
        (r >> (bits - 1) ^ r >> (bits - 2)) & 1 != 0
    }

    /// Replaces CF and OF, keeping the rest.
    #[inline(always)]
    pub fn with_cf_of(self, cf: bool, of: bool) -> Self {
        Flags { cv: Self::carries(cf, of, self.af()), ..self }
    }

    /// ROL by a masked count; changes CF and OF alone. OF (undefined for counts
    /// above 1) is MSB xor CF for every count.
    #[inline(always)]
    pub fn rol(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        let n = count & (bits - 1);
        let r = if n == 0 { a } else { (a << n | a >> (bits - n)) & mask(size) };
        let cf = r & 1 != 0;
        (r, self.with_cf_of(cf, (r >> (bits - 1) & 1 != 0) != cf))
    }

    /// ROR by a masked count; changes CF and OF alone. OF (undefined for counts
    /// above 1) is the xor of the result's top two bits for every count.
    #[inline(always)]
    pub fn ror(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        let n = count & (bits - 1);
        let r = if n == 0 { a } else { (a >> n | a << (bits - n)) & mask(size) };
        (r, self.with_cf_of(r >> (bits - 1) & 1 != 0, Self::top_two_differ(r, size)))
    }

    /// RCL by a masked count; changes CF and OF alone, OF as [`Flags::rol`] does.
    #[inline(always)]
    pub fn rcl(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        let n = count % (bits + 1);
        let wide = u128::from(a) | u128::from(self.cf()) << bits;
        let turned = wide << n | wide >> (bits + 1 - n);
        let r = turned as u64 & mask(size);
        let cf = turned >> bits & 1 != 0;
        (r, self.with_cf_of(cf, (r >> (bits - 1) & 1 != 0) != cf))
    }

    /// RCR by a masked count; changes CF and OF alone, OF as [`Flags::ror`] does.
    #[inline(always)]
    pub fn rcr(self, a: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        let n = count % (bits + 1);
        let wide = u128::from(a) | u128::from(self.cf()) << bits;
        let turned = wide >> n | wide << (bits + 1 - n);
        let r = turned as u64 & mask(size);
        (r, self.with_cf_of(turned >> bits & 1 != 0, Self::top_two_differ(r, size)))
    }

    /// SHLD of `a` with bits from `b`, by a masked count. Undefined in the
    /// manuals: AF is set; OF is CF xor the MSB of `a` shifted alone for every
    /// count; 16-bit counts above 16 rotate `b` and clear CF and OF.
    #[inline(always)]
    pub fn shld(self, a: u64, b: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        if count > bits {
            let r = u64::from((b as u16).rotate_left(count - bits));
            return (r, Self::of_result(r, Self::carries(false, false, true), size));
        }
        let wide = (u128::from(a) << bits | u128::from(b)) << count;
        let r = (wide >> bits) as u64 & mask(size);
        let cf = a >> (bits - count) & 1 != 0;
        let of = (a << count >> (bits - 1) & 1 != 0) != cf;
        (r, Self::of_result(r, Self::carries(cf, of, true), size))
    }

    /// SHRD of `a` with bits from `b`, by a masked count. Undefined in the
    /// manuals: AF is set; OF is the xor of the result's top two bits for every
    /// count; 16-bit counts above 16 rotate `b` and clear CF.
    #[inline(always)]
    pub fn shrd(self, a: u64, b: u64, count: u32, size: usize) -> (u64, Self) {
        if count == 0 {
            return (a, self);
        }
        let bits = 8 * size as u32;
        let (r, cf) = if count > bits {
            (u64::from((b as u16).rotate_right(count - bits)), false)
        } else {
            let wide = (u128::from(b) << bits | u128::from(a)) >> count;
            (wide as u64 & mask(size), a >> (count - 1) & 1 != 0)
        };
        (r, Self::of_result(r, Self::carries(cf, Self::top_two_differ(r, size), true), size))
    }

    /// MUL and IMUL: CF and OF say that the upper half is significant; the rest
    /// (undefined in the manuals) stays.
    #[inline(always)]
    pub fn multiplied(self, overflow: bool) -> Self {
        self.with_cf_of(overflow, overflow)
    }

    /// Replaces ZF alone (BSF and BSR; the others, undefined in the manuals, stay).
    #[inline(always)]
    pub fn with_zf(self, zf: bool) -> Self {
        // SF and PF live in `sp`, so ZF is free to change.
        Flags { zf: !zf as u64, ..self }
    }

    /// Replaces CF alone.
    #[inline(always)]
    pub fn with_cf(mut self, cf: bool) -> Self {
        self.set_cf(cf);
        self
    }

    /// Replaces OF alone.
    #[inline(always)]
    pub fn with_of(self, of: bool) -> Self {
        let cf = self.cf();
        self.with_cf_of(cf, of)
    }

    /// ZF, SF and PF from a result, and the other three as given.
    #[inline(always)]
    pub fn result(r: u64, cf: bool, of: bool, af: bool, size: usize) -> Self {
        Self::of_result(r, Self::carries(cf, of, af), size)
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
