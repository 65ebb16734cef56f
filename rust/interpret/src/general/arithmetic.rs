//! Addition, subtraction and logic with two operands, multiplication, division.

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::operands::{mask, sign_extend};
use crate::state::*;
use iced_x86::Instruction;

impl Cpu {
    /// `op0 = f(op0, op1, CF)` with flags.
    #[inline(always)]
    pub(super) fn alu(&mut self, i: &Instruction, f: impl Fn(u64, u64, bool, usize) -> (u64, Flags)) -> X {
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 1)? & mask(size);
        let carry = self.r.flags.cf();
        let old = self.modify_operand(i, 0, i.has_lock_prefix(), |a| f(a, b, carry, size).0)?;
        self.r.flags = f(old, b, carry, size).1;
        Ok(())
    }

    /// Flags of `f(op0, op1)`; nothing is written.
    #[inline(always)]
    pub(super) fn compare(&mut self, i: &Instruction, f: impl Fn(u64, u64, usize) -> Flags) -> X {
        let size = self.operand_size(i, 0);
        let a = self.read_operand(i, 0)?;
        let b = self.read_operand(i, 1)? & mask(size);
        self.r.flags = f(a, b, size);
        Ok(())
    }

    /// `op0 = f(flags, op0)` with flags.
    #[inline(always)]
    pub(super) fn unary(&mut self, i: &Instruction, f: impl Fn(Flags, u64, usize) -> (u64, Flags)) -> X {
        let size = self.operand_size(i, 0);
        let flags = self.r.flags;
        let old = self.modify_operand(i, 0, i.has_lock_prefix(), |a| f(flags, a, size).0)?;
        self.r.flags = f(flags, old, size).1;
        Ok(())
    }

    /// MUL, and IMUL with one operand.
    pub(super) fn op_mul(&mut self, i: &Instruction, signed: bool) -> X {
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 0)?;
        let a = self.gpr(reg::RAX, size);
        let (low, high, overflow) = multiply(a, b, size, signed);
        if size == 1 {
            self.set_gpr(reg::RAX, 2, high << 8 | low);
        } else {
            self.set_gpr(reg::RAX, size, low);
            self.set_gpr(reg::RDX, size, high);
        }
        self.r.flags = self.r.flags.multiplied(overflow);
        Ok(())
    }

    /// IMUL with two or three operands.
    pub(super) fn op_imul(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 0);
        let (a, b) = if i.op_count() == 3 {
            (self.read_operand(i, 1)?, i.immediate(2) & mask(size))
        } else {
            (self.read_operand(i, 0)?, self.read_operand(i, 1)?)
        };
        let (low, _, overflow) = multiply(a, b, size, true);
        self.write_operand(i, 0, low)?;
        self.r.flags = self.r.flags.multiplied(overflow);
        Ok(())
    }

    /// MULX: op0:op1 = RDX * op2, no flags; if both are the same register, the high half stays.
    pub(super) fn op_mulx(&mut self, i: &Instruction) -> X {
        self.check_vex(i)?;
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 2)?;
        let a = self.gpr(reg::RDX, size);
        let (low, high, _) = multiply(a, b, size, false);
        self.write_reg(i.op_register(1), low);
        self.write_reg(i.op_register(0), high);
        Ok(())
    }

    /// ADCX (carry in CF) and ADOX (carry in OF); the other flags stay.
    pub(super) fn op_adx(&mut self, i: &Instruction, overflow: bool) -> X {
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 1)?;
        let r = i.op_register(0);
        let flags = self.r.flags;
        let carry = if overflow { flags.of() } else { flags.cf() };
        let (sum, f) = Flags::add(self.read_reg(r), b, carry, size);
        self.write_reg(r, sum);
        self.r.flags = if overflow { flags.with_of(f.cf()) } else { flags.with_cf(f.cf()) };
        Ok(())
    }

    /// DIV and IDIV. Flags are undefined in the manuals; as on Zen, SF, ZF and PF
    /// become clear, AF set, CF and OF stay.
    pub(super) fn op_div(&mut self, i: &Instruction, signed: bool) -> X {
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 0)?;
        let dividend = if size == 1 {
            u128::from(self.gpr(reg::RAX, 2))
        } else {
            u128::from(self.gpr(reg::RDX, size)) << (8 * size) | u128::from(self.gpr(reg::RAX, size))
        };
        let result = if signed { divide_signed(dividend, b, size) } else { divide(dividend, b, size) };
        let Some((quotient, remainder)) = result else {
            return Err(self.fault(vector::DE, None));
        };
        if size == 1 {
            self.set_gpr(reg::RAX, 2, (remainder & 0xff) << 8 | quotient & 0xff);
        } else {
            self.set_gpr(reg::RAX, size, quotient);
            self.set_gpr(reg::RDX, size, remainder);
        }
        let f = self.r.flags;
        self.r.flags = Flags::result(1, f.cf(), f.of(), true, size);
        Ok(())
    }
}

/// (low half, high half, the high half is significant).
fn multiply(a: u64, b: u64, size: usize, signed: bool) -> (u64, u64, bool) {
    let bits = 8 * size;
    if signed {
        let p = i128::from(sign_extend(a, size) as i64) * i128::from(sign_extend(b, size) as i64);
        let low = p as u64 & mask(size);
        let fits = i128::from(sign_extend(low, size) as i64) == p;
        (low, (p >> bits) as u64 & mask(size), !fits)
    } else {
        let p = u128::from(a) * u128::from(b);
        let high = (p >> bits) as u64 & mask(size);
        (p as u64 & mask(size), high, high != 0)
    }
}

/// (quotient, remainder), or `None` for #DE.
fn divide(dividend: u128, b: u64, size: usize) -> Option<(u64, u64)> {
    let quotient = dividend.checked_div(u128::from(b))?;
    let remainder = dividend % u128::from(b);
    (quotient <= u128::from(mask(size))).then_some((quotient as u64, remainder as u64))
}

/// As [`divide`], signed: the quotient is cut towards zero, the remainder has the
/// dividend's sign.
fn divide_signed(dividend: u128, b: u64, size: usize) -> Option<(u64, u64)> {
    let unused = 128 - 16 * size as u32;
    let dividend = (dividend << unused) as i128 >> unused;
    let b = i128::from(sign_extend(b, size) as i64);
    let quotient = dividend.checked_div(b)?;
    let remainder = dividend.wrapping_rem(b);
    let fits = i128::from(sign_extend(quotient as u64, size) as i64) == quotient;
    fits.then_some((quotient as u64 & mask(size), remainder as u64 & mask(size)))
}
