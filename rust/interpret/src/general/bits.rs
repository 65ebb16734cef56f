//! Bit tests, scans, counts, BMI1 and BMI2, CRC32.

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::operands::{address_size, mask, sign_extend};
use crate::state::*;
use iced_x86::{Instruction, Mnemonic as M, OpKind};

impl Cpu {
    /// BT, BTS, BTR, BTC. A register bit offset into memory is signed and reaches
    /// outside the operand. Only CF changes (the others, undefined in the manuals, stay).
    pub(super) fn op_bt(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 0);
        let bits = 8 * size as u64;
        let offset = self.read_operand(i, 1)?;
        let bit = 1u64 << (offset & (bits - 1));
        let lock = i.has_lock_prefix();
        let change = match i.mnemonic() {
            M::Bts => |a: u64, bit: u64| a | bit,
            M::Btr => |a: u64, bit: u64| a & !bit,
            M::Btc => |a: u64, bit: u64| a ^ bit,
            _ => |a: u64, _: u64| a,
        };
        let read_only = i.mnemonic() == M::Bt;
        let old = if i.op_kind(0) == OpKind::Memory {
            let (segment, mut ea) = self.memory_operand(i);
            if i.op_kind(1) == OpKind::Register {
                let element = sign_extend(offset, size) as i64 >> bits.trailing_zeros();
                ea = ea.wrapping_add(element.wrapping_mul(size as i64) as u64) & mask(address_size(i));
            }
            if read_only {
                self.load(segment, ea, size)?
            } else {
                self.rmw(segment, ea, size, lock, |a| change(a, bit))?
            }
        } else {
            let r = i.op_register(0);
            let old = self.read_reg(r);
            if !read_only {
                self.write_reg(r, change(old, bit));
            }
            old
        };
        self.r.flags.set_cf(old & bit != 0);
        Ok(())
    }

    /// BSF and BSR. A zero source leaves the whole destination as it is; only ZF
    /// changes (the others, undefined in the manuals, stay).
    pub(super) fn op_bsf(&mut self, i: &Instruction) -> X {
        let value = self.read_operand(i, 1)?;
        if value != 0 {
            let n = if i.mnemonic() == M::Bsf { value.trailing_zeros() } else { 63 - value.leading_zeros() };
            self.write_reg(i.op_register(0), u64::from(n));
        }
        self.r.flags = self.r.flags.with_zf(value == 0);
        Ok(())
    }

    /// TZCNT and LZCNT. Undefined in the manuals: OF stays; SF, AF and PF are clear.
    pub(super) fn op_tzcnt(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 0);
        let bits = 8 * size as u32;
        let value = self.read_operand(i, 1)?;
        let n = if i.mnemonic() == M::Tzcnt {
            value.trailing_zeros().min(bits)
        } else {
            value.leading_zeros() - (64 - bits)
        };
        self.write_reg(i.op_register(0), u64::from(n));
        let kept = self.r.flags.to_rflags() & rflags::OF;
        let zf = if n == 0 { rflags::ZF } else { 0 };
        self.r.flags = Flags::from_rflags(kept | zf | u64::from(value == 0));
        Ok(())
    }

    pub(super) fn op_popcnt(&mut self, i: &Instruction) -> X {
        let value = self.read_operand(i, 1)?;
        self.write_reg(i.op_register(0), u64::from(value.count_ones()));
        self.r.flags = Flags::from_rflags(if value == 0 { rflags::ZF } else { 0 });
        Ok(())
    }

    pub(super) fn op_andn(&mut self, i: &Instruction) -> X {
        self.check_vex(i)?;
        let size = self.operand_size(i, 0);
        let b = self.read_operand(i, 2)?;
        let r = !self.read_operand(i, 1)? & b;
        self.write_reg(i.op_register(0), r);
        self.r.flags = Flags::logic(r, size);
        Ok(())
    }

    /// BEXTR. Undefined in the manuals: AF is set, SF clear, PF follows the result.
    pub(super) fn op_bextr(&mut self, i: &Instruction) -> X {
        self.check_vex(i)?;
        let size = self.operand_size(i, 0);
        let value = self.read_operand(i, 1)?;
        let control = self.read_operand(i, 2)?;
        let (start, len) = (control as u32 & 0xff, control as u32 >> 8 & 0xff);
        let shifted = value.checked_shr(start).unwrap_or(0);
        let r = if len < 64 { shifted & ((1u64 << len) - 1) } else { shifted };
        self.write_reg(i.op_register(0), r);
        let flags = Flags::result(r, false, false, true, size);
        self.r.flags = Flags { sp: flags.sp & !(1 << 63), ..flags };
        Ok(())
    }

    /// BLSI, BLSR, BLSMSK. AF (undefined in the manuals) is clear, PF follows the result.
    pub(super) fn op_bls(&mut self, i: &Instruction) -> X {
        self.check_vex(i)?;
        let size = self.operand_size(i, 0);
        let a = self.read_operand(i, 1)?;
        let r = match i.mnemonic() {
            M::Blsi => a.wrapping_neg() & a,
            M::Blsr => a.wrapping_sub(1) & a,
            _ => a.wrapping_sub(1) ^ a,
        } & mask(size);
        self.write_reg(i.op_register(0), r);
        let cf = (a == 0) ^ (i.mnemonic() == M::Blsi);
        self.r.flags = Flags::result(r, cf, false, false, size);
        Ok(())
    }

    /// BZHI. AF (undefined in the manuals) is clear, PF follows the result.
    pub(super) fn op_bzhi(&mut self, i: &Instruction) -> X {
        self.check_vex(i)?;
        let size = self.operand_size(i, 0);
        let a = self.read_operand(i, 1)?;
        let n = self.read_operand(i, 2)? & 0xff;
        let inside = n < 8 * size as u64;
        let r = if inside { a & ((1u64 << n) - 1) } else { a };
        self.write_reg(i.op_register(0), r);
        self.r.flags = Flags::result(r, !inside, false, false, size);
        Ok(())
    }

    /// PDEP and PEXT.
    pub(super) fn op_pdep(&mut self, i: &Instruction) -> X {
        self.check_vex(i)?;
        let mut m = self.read_operand(i, 2)?;
        let a = self.read_operand(i, 1)?;
        let (mut r, mut n) = (0u64, 0);
        while m != 0 {
            let low = m & m.wrapping_neg();
            if i.mnemonic() == M::Pdep {
                r |= if a >> n & 1 != 0 { low } else { 0 };
            } else {
                r |= u64::from(a & low != 0) << n;
            }
            n += 1;
            m ^= low;
        }
        self.write_reg(i.op_register(0), r);
        Ok(())
    }

    /// CRC32 (the Castagnoli polynomial, bits reflected).
    pub(super) fn op_crc32(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 1);
        let data = self.read_operand(i, 1)?;
        let mut crc = self.read_reg(i.op_register(0)) as u32;
        for byte in &data.to_le_bytes()[..size] {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = crc >> 1 ^ if crc & 1 != 0 { 0x82f6_3b78 } else { 0 };
            }
        }
        self.write_reg(i.op_register(0), u64::from(crc));
        Ok(())
    }

    /// RDRAND and RDSEED: always succeed; CF is set, the other flags are clear.
    pub(super) fn op_rdrand(&mut self, i: &Instruction) {
        let value = self.random.get(&self.clock, self.retired + self.retired_in_block);
        self.write_reg(i.op_register(0), value);
        self.r.flags = Flags::from_rflags(rflags::CF);
    }
}
