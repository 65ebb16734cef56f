//! Exchanges: XCHG, XADD, CMPXCHG and its wide forms.

use crate::cpu::Cpu;
use crate::flags::Flags;
use crate::state::*;
use iced_x86::{Instruction, OpKind};

impl Cpu {
    /// XCHG; with memory it is always atomic.
    pub(super) fn op_xchg(&mut self, i: &Instruction) -> X {
        // The memory operand may be either.
        let (other, own) = if i.op_kind(1) == OpKind::Memory { (1, 0) } else { (0, 1) };
        let r = i.op_register(own);
        let new = self.read_reg(r);
        let old = self.modify_operand(i, other, true, |_| new)?;
        self.write_reg(r, old);
        Ok(())
    }

    pub(super) fn op_xadd(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 0);
        let r = i.op_register(1);
        let b = self.read_reg(r);
        if i.op_kind(0) == OpKind::Register {
            let a = self.read_reg(i.op_register(0));
            let (sum, flags) = Flags::add(a, b, false, size);
            // The sum is written last: it stays if both are the same register.
            self.write_reg(r, a);
            self.write_reg(i.op_register(0), sum);
            self.r.flags = flags;
            return Ok(());
        }
        let lock = i.has_lock_prefix();
        let a = self.modify_operand(i, 0, lock, |a| Flags::add(a, b, false, size).0)?;
        self.write_reg(r, a);
        self.r.flags = Flags::add(a, b, false, size).1;
        Ok(())
    }

    /// CMPXCHG. Memory is written in any case; a register that does not match stays
    /// as it is, upper half included (as on Zen).
    pub(super) fn op_cmpxchg(&mut self, i: &Instruction) -> X {
        let size = self.operand_size(i, 0);
        let new = self.read_reg(i.op_register(1));
        let expected = self.gpr(reg::RAX, size);
        let old = if i.op_kind(0) == OpKind::Register {
            let r = i.op_register(0);
            let old = self.read_reg(r);
            if old == expected {
                self.write_reg(r, new);
            }
            old
        } else {
            let lock = i.has_lock_prefix();
            self.modify_operand(i, 0, lock, |old| if old == expected { new } else { old })?
        };
        if old != expected {
            self.set_gpr(reg::RAX, size, old);
        }
        self.r.flags = Flags::sub(expected, old, false, size).1;
        Ok(())
    }

    pub(super) fn op_cmpxchg8b(&mut self, i: &Instruction) -> X {
        let pair = |cpu: &Cpu, high, low| cpu.gpr(high, 4) << 32 | cpu.gpr(low, 4);
        let expected = pair(self, reg::RDX, reg::RAX);
        let new = pair(self, reg::RCX, reg::RBX);
        let (segment, ea) = self.memory_operand(i);
        let lock = i.has_lock_prefix();
        let old = self.rmw(segment, ea, 8, lock, |old| if old == expected { new } else { old })?;
        if old != expected {
            self.set_gpr(reg::RAX, 4, old);
            self.set_gpr(reg::RDX, 4, old >> 32);
        }
        self.r.flags = self.r.flags.with_zf(old == expected);
        Ok(())
    }

    /// CMPXCHG16B: #GP(0) unless aligned to 16 bytes.
    pub(super) fn op_cmpxchg16b(&mut self, i: &Instruction) -> X {
        let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
        let g = &self.r.gpr;
        let expected = pair(g[reg::RDX], g[reg::RAX]);
        let new = pair(g[reg::RCX], g[reg::RBX]);
        let (segment, ea) = self.memory_operand(i);
        let lin = self.linear(segment, ea, 16, true)?;
        if lin & 15 != 0 {
            return Err(self.gp(0));
        }
        let old = if let Some(host) = self.host_rw(lin, 16) {
            // SAFETY: `host` is writable guest RAM, and aligned as `lin` is, because
            // frames are mapped at page-aligned host addresses.
            unsafe { compare_exchange_16(host.cast(), expected, new) }
        } else {
            self.probe_store(segment, ea, 16)?;
            let mut bytes = [0; 16];
            self.load_bytes(segment, ea, &mut bytes)?;
            let old = u128::from_le_bytes(bytes);
            let write = if old == expected { new } else { old };
            self.store_bytes(segment, ea, &write.to_le_bytes())?;
            old
        };
        if old != expected {
            self.r.gpr[reg::RAX] = old as u64;
            self.r.gpr[reg::RDX] = (old >> 64) as u64;
        }
        self.r.flags = self.r.flags.with_zf(old == expected);
        Ok(())
    }
}

/// Compares and exchanges 16 bytes, atomically where the host can; returns the old value.
///
/// # Safety
/// `host` must be valid for reads and writes of 16 bytes and aligned to 16.
unsafe fn compare_exchange_16(host: *mut u128, expected: u128, new: u128) -> u128 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("cmpxchg16b") {
        // SAFETY: the feature is there; the pointer is good by the caller's contract.
        return unsafe { native_16(host, expected, new) };
    }
    // SAFETY: by the caller's contract.
    unsafe {
        let old = host.read();
        if old == expected {
            host.write(new);
        }
        old
    }
}

/// LOCK CMPXCHG16B itself. (The intrinsic of the standard library leaves a call
/// to a function that no library here has.)
///
/// # Safety
/// The host has the instruction; `host` as for [`compare_exchange_16`].
#[cfg(target_arch = "x86_64")]
unsafe fn native_16(host: *mut u128, expected: u128, new: u128) -> u128 {
    let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
    // SAFETY: by the caller's contract; RBX, which the compiler keeps to itself, is
    // exchanged with a scratch register around the instruction and restored.
    unsafe {
        std::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [{host}]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            host = in(reg) host,
            inout("rax") low,
            inout("rdx") high,
            in("rcx") (new >> 64) as u64,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}
