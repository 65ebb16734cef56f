//! The general executor: every integer instruction, in every mode, straight
//! from its decoded form. It is the reference that the specialised operations
//! are compared with, so it is written to be right and plain before fast.
//!
//! The caller sets `r.rip` to the instruction and `next_rip` to the following
//! one. An instruction that stops has changed nothing, except for the finished
//! iterations of a string instruction and memory below the stack pointer.

mod arithmetic;
mod atomic;
mod bits;
mod control;
mod decimal;
mod logic;
mod port_io;
pub mod random;
mod shifts;
mod stack;
mod strings;
#[cfg(test)]
mod tests;
mod transfer;

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::{ConditionCode, EncodingKind, Instruction, Mnemonic as M};

impl Cpu {
    /// Executes an integer instruction; `Ok(false)` if it is none of these (system
    /// and vector instructions, segment loads, far transfers).
    pub fn execute_general(&mut self, i: &Instruction) -> X<bool> {
        match i.mnemonic() {
            M::Mov => return self.op_mov(i),
            M::Movzx => self.op_movzx(i)?,
            M::Movsx | M::Movsxd => self.op_movsx(i)?,
            M::Movnti => self.op_movnti(i)?,
            M::Movbe => self.op_movbe(i)?,
            M::Lea => self.op_lea(i),
            M::Xlatb => self.op_xlat(i)?,
            M::Bswap => self.op_bswap(i),
            M::Cbw | M::Cwde | M::Cdqe => self.op_cbw(i),
            M::Cwd | M::Cdq | M::Cqo => self.op_cwd(i),
            M::Xchg => self.op_xchg(i)?,
            M::Xadd => self.op_xadd(i)?,
            M::Cmpxchg => self.op_cmpxchg(i)?,
            M::Cmpxchg8b => self.op_cmpxchg8b(i)?,
            M::Cmpxchg16b => self.op_cmpxchg16b(i)?,

            M::Add => self.alu(i, |a, b, _, size| Flags::add(a, b, false, size))?,
            M::Adc => self.alu(i, Flags::add)?,
            M::Sub => self.alu(i, |a, b, _, size| Flags::sub(a, b, false, size))?,
            M::Sbb => self.alu(i, Flags::sub)?,
            M::And => self.alu(i, |a, b, _, size| (a & b, Flags::logic(a & b, size)))?,
            M::Or => self.alu(i, |a, b, _, size| (a | b, Flags::logic(a | b, size)))?,
            M::Xor => self.alu(i, |a, b, _, size| (a ^ b, Flags::logic(a ^ b, size)))?,
            M::Cmp => self.compare(i, |a, b, size| Flags::sub(a, b, false, size).1)?,
            M::Test => self.compare(i, |a, b, size| Flags::logic(a & b, size))?,
            M::Inc => self.unary(i, |flags, a, size| flags.inc(a, size))?,
            M::Dec => self.unary(i, |flags, a, size| flags.dec(a, size))?,
            M::Neg => self.unary(i, |_, a, size| Flags::sub(0, a, false, size))?,
            M::Not => self.unary(i, |flags, a, _| (!a, flags))?,
            M::Mul => self.op_mul(i, false)?,
            M::Imul if i.op_count() == 1 => self.op_mul(i, true)?,
            M::Imul => self.op_imul(i)?,
            M::Div => self.op_div(i, false)?,
            M::Idiv => self.op_div(i, true)?,
            M::Mulx => self.op_mulx(i)?,
            M::Adcx => self.op_adx(i, false)?,
            M::Adox => self.op_adx(i, true)?,
            M::Aaa => self.op_aaa(true),
            M::Aas => self.op_aaa(false),
            M::Daa => self.op_daa(true),
            M::Das => self.op_daa(false),
            M::Aam => self.op_aam(i)?,
            M::Aad => self.op_aad(i),

            M::Shl | M::Sal => self.shift(i, Flags::shl)?,
            M::Shr => self.shift(i, Flags::shr)?,
            M::Sar => self.shift(i, Flags::sar)?,
            M::Rol => self.shift(i, Flags::rol)?,
            M::Ror => self.shift(i, Flags::ror)?,
            M::Rcl => self.shift(i, Flags::rcl)?,
            M::Rcr => self.shift(i, Flags::rcr)?,
            M::Shld => self.double_shift(i, Flags::shld)?,
            M::Shrd => self.double_shift(i, Flags::shrd)?,
            M::Shlx => self.shift_without_flags(i, Flags::shl)?,
            M::Shrx => self.shift_without_flags(i, Flags::shr)?,
            M::Sarx => self.shift_without_flags(i, Flags::sar)?,
            M::Rorx => self.shift_without_flags(i, Flags::ror)?,

            M::Bt | M::Bts | M::Btr | M::Btc => self.op_bt(i)?,
            M::Bsf | M::Bsr => self.op_bsf(i)?,
            M::Tzcnt | M::Lzcnt => self.op_tzcnt(i)?,
            M::Popcnt => self.op_popcnt(i)?,
            M::Andn => self.op_andn(i)?,
            M::Bextr if i.encoding() == EncodingKind::VEX => self.op_bextr(i)?,
            M::Blsi | M::Blsr | M::Blsmsk => self.op_bls(i)?,
            M::Bzhi => self.op_bzhi(i)?,
            M::Pdep | M::Pext => self.op_pdep(i)?,
            M::Crc32 => self.op_crc32(i)?,
            M::Rdrand | M::Rdseed => self.op_rdrand(i),

            M::Push => self.op_push(i)?,
            M::Pop => return self.op_pop(i),
            M::Pusha | M::Pushad => self.op_pusha(i)?,
            M::Popa | M::Popad => self.op_popa(i)?,
            M::Pushf | M::Pushfd | M::Pushfq => self.op_pushf(i)?,
            M::Popf | M::Popfd | M::Popfq => self.op_popf(i)?,
            M::Enter => self.op_enter(i)?,
            M::Leave => self.op_leave(i)?,

            M::Call | M::Jmp => return self.op_jmp(i),
            M::Ret => self.op_ret(i)?,
            M::Jcxz | M::Jecxz | M::Jrcxz => self.op_jcxz(i)?,
            M::Loop | M::Loope | M::Loopne => self.op_loop(i)?,
            M::Int => self.op_int(i.immediate8())?,
            M::Int1 => self.op_int1()?,
            M::Int3 => self.op_int3()?,
            M::Into => self.op_into()?,
            M::Bound => self.op_bound(i)?,
            M::Ud0 | M::Ud1 | M::Ud2 => return Err(self.ud()),

            M::Clc => self.r.flags.set_cf(false),
            M::Stc => self.r.flags.set_cf(true),
            M::Cmc => self.r.flags.set_cf(!self.r.flags.cf()),
            M::Cld => self.r.rflags &= !rflags::DF,
            M::Std => self.r.rflags |= rflags::DF,
            M::Cli => self.op_cli()?,
            M::Sti => self.op_sti()?,
            M::Lahf => self.op_lahf(),
            M::Sahf => self.op_sahf(),
            M::Salc => self.op_salc(),

            M::Movsb | M::Movsw | M::Movsq => self.op_movs(i)?,
            M::Movsd if i.is_string_instruction() => self.op_movs(i)?,
            M::Cmpsb | M::Cmpsw | M::Cmpsq => self.op_cmps(i)?,
            M::Cmpsd if i.is_string_instruction() => self.op_cmps(i)?,
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => self.op_stos(i)?,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => self.op_lods(i)?,
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => self.op_scas(i)?,
            M::Insb | M::Insw | M::Insd => self.op_ins(i)?,
            M::Outsb | M::Outsw | M::Outsd => self.op_outs(i)?,
            M::In => self.op_in(i)?,
            M::Out => self.op_out(i)?,

            // Hints, and RDSSP without shadow stacks.
            M::Nop | M::Pause | M::Endbr32 | M::Endbr64 | M::Reservednop | M::Cldemote => {}
            M::Prefetch | M::Prefetchw | M::Prefetchwt1 | M::Prefetchnta => {}
            M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 | M::Prefetchit0 | M::Prefetchit1 => {}
            M::Rdsspd | M::Rdsspq => {}
            M::Lfence | M::Sfence => {}
            M::Mfence => std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst),
            M::Clflush | M::Clflushopt | M::Clwb => self.op_clflush(i)?,

            // Jcc, SETcc and CMOVcc.
            _ => return self.conditional(i),
        }
        Ok(true)
    }

    fn conditional(&mut self, i: &Instruction) -> X<bool> {
        let cc = i.condition_code();
        if cc == ConditionCode::None {
            return Ok(false);
        }
        let taken = self.r.flags.condition(cc as u8 - 1);
        if i.is_jcc_short_or_near() {
            if taken {
                let target = self.branch_target(i);
                self.jump_near(target)?;
            }
        } else if i.op_count() == 1 {
            self.write_operand(i, 0, u64::from(taken))?;
        } else if i.op_count() == 2 && i.op_register(0).is_gpr() {
            // CMOVcc reads its source in any case, and a 32-bit destination is
            // zero-extended in any case.
            let new = self.read_operand(i, 1)?;
            let r = i.op_register(0);
            let old = self.read_reg(r);
            self.write_reg(r, if taken { new } else { old });
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// VEX-encoded integer instructions do not exist in real and virtual-8086 mode.
    fn check_vex(&mut self, i: &Instruction) -> X {
        if i.encoding() != EncodingKind::Legacy && !self.protected() {
            return Err(self.ud());
        }
        Ok(())
    }
}
