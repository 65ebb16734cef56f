//! Vector and x87 instructions: the bridge between the interpreter and the
//! native unit, which executes them.

use crate::code_cache::{Block, Op};
use crate::cpu::Cpu;
use crate::decode::{op_invalid, plain};
use crate::operands::{address_size, mask, memory_segment};
use crate::state::*;
use iced_x86::{Instruction, Register};
use nonroot_native::{
    execute, precheck, Compiled, Control, Guest, NativeUnit, Plan, Trap, Unsupported, VectorState,
};

/// A vector instruction ready to run.
pub struct VectorOp {
    compiled: Compiled,
    instruction: Instruction,
}

/// The vCPU as the native unit sees it during one instruction.
struct Operand<'a> {
    cpu: &'a mut Cpu,
    segment: usize,
    mask: u64,
}

impl Guest for Operand<'_> {
    type Fault = Stop;

    #[inline(always)]
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> X {
        let lin = self.cpu.linear(self.segment, address & self.mask, buffer.len(), false)?;
        self.cpu.load_vector(self.segment, lin, buffer)
    }

    #[inline(always)]
    fn write(&mut self, address: u64, bytes: &[u8]) -> X {
        let lin = self.cpu.linear(self.segment, address & self.mask, bytes.len(), true)?;
        self.cpu.store_vector(self.segment, lin, bytes)
    }

    fn probe_write(&mut self, address: u64, length: usize) -> X {
        let lin = self.cpu.linear(self.segment, address & self.mask, length, true)?;
        self.cpu.probe_write(self.segment, lin, length)
    }

    #[inline(always)]
    fn gpr(&self, register: u8) -> u64 {
        self.cpu.r.gpr[register as usize & 15]
    }

    #[inline(always)]
    fn set_gpr(&mut self, register: u8, value: u64) {
        self.cpu.r.gpr[register as usize & 15] = value;
    }

    fn flags(&self) -> u64 {
        self.cpu.rflags()
    }

    fn set_status_flags(&mut self, flags: u64) {
        self.cpu.r.flags = crate::flags::Flags::from_rflags(flags);
    }

    fn instruction_pointer(&self) -> u64 {
        self.cpu.r.rip
    }

    fn control(&self) -> Control {
        let r = &self.cpu.r;
        Control {
            cr0: r.cr0,
            cr4: r.cr4,
            xcr0: r.xcr0,
            long: self.cpu.mode == Mode::Long64,
            real: !self.cpu.protected(),
        }
    }

    #[inline(always)]
    fn vectors(&mut self) -> &mut VectorState {
        &mut self.cpu.fpu
    }

    #[inline(always)]
    fn parts(&mut self) -> (&mut NativeUnit, &mut VectorState) {
        (&mut self.cpu.native, &mut self.cpu.fpu)
    }
}

impl Cpu {
    /// Loads any number of bytes; fast if they lie in one cached page.
    #[inline(always)]
    pub fn load_vector(&mut self, segment: usize, lin: u64, out: &mut [u8]) -> X {
        if let Some(host) = self.host_r(lin, out.len()) {
            // SAFETY: host_r gives readable guest RAM for that many bytes.
            unsafe { std::ptr::copy_nonoverlapping(host, out.as_mut_ptr(), out.len()) };
            return Ok(());
        }
        self.check_data(segment, lin, out.len())?;
        self.load_bytes_lin(segment, lin, out, false)
    }

    /// Stores any number of bytes; fast if they lie in one cached page.
    #[inline(always)]
    pub fn store_vector(&mut self, segment: usize, lin: u64, data: &[u8]) -> X {
        if let Some(host) = self.host_rw(lin, data.len()) {
            // SAFETY: host_rw gives writable guest RAM for that many bytes.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), host, data.len()) };
            return Ok(());
        }
        self.check_data(segment, lin, data.len())?;
        self.store_bytes_lin(segment, lin, data, false)
    }

    #[cold]
    fn vector_trap(&mut self, trap: Trap) -> Stop {
        let error = (trap == Trap::GeneralProtection).then_some(0);
        self.fault(trap.vector(), error)
    }

    /// An operation for a vector or x87 instruction; None if it is not one.
    pub fn vector_op(&mut self, block: &mut Block, i: &Instruction) -> Option<Op> {
        let compiled = match self.native.compile(i) {
            Ok(compiled) => compiled,
            Err(Unsupported::NotThisUnit) => return None,
            Err(Unsupported::Feature | Unsupported::InvalidOperands) => return Some(plain(op_invalid)),
            Err(Unsupported::Host(_) | Unsupported::Encoding(_)) => return None,
        };
        let plan = Box::new(VectorOp { compiled, instruction: *i });
        let mut op = plain(op_vector);
        op.imm = &*plan as *const VectorOp as u64;
        block.plans.push(plan);
        if self.config.optimise.fast_ops && self.mode == Mode::Long64 {
            self.fast_vector(i, &compiled, &mut op);
        }
        Some(op)
    }

    /// Gives plain loads and stores a direct form.
    fn fast_vector(&self, i: &Instruction, compiled: &Compiled, op: &mut Op) {
        let Some(memory) = compiled.memory else { return };
        let before = *op;
        if crate::fast::address(self, i, op).is_none() {
            *op = before;
            return;
        }
        match compiled.plan {
            Plan::Load { offset: 0, size: 16, clear_to: 16, dst } => {
                op.run = if memory.align == 16 { load16::<true> } else { load16::<false> };
                op.dst = dst;
            }
            Plan::Store { offset: 0, size: 16, src } => {
                op.run = if memory.align == 16 { store16::<true> } else { store16::<false> };
                op.dst = src;
            }
            _ => *op = before,
        }
    }

    #[inline(always)]
    fn vector_allowed(&mut self, compiled: &Compiled) -> X {
        match precheck(compiled.class, self.r.cr0, self.r.cr4, self.r.xcr0) {
            Ok(()) => Ok(()),
            Err(trap) => Err(self.vector_trap(trap)),
        }
    }
}

/// The compiled instruction of an operation.
#[inline(always)]
fn plan_of(op: &Op) -> &VectorOp {
    // SAFETY: `imm` is the address of a VectorOp that the op's block owns.
    unsafe { &*(op.imm as *const VectorOp) }
}

fn load16<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> X {
    cpu.vector_allowed(&plan_of(op).compiled)?;
    let lin = crate::fast::linear(cpu, op, 16, false)?;
    if ALIGNED && lin & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let mut bytes = [0u8; 16];
    cpu.load_vector(op.segment as usize, lin, &mut bytes)?;
    cpu.fpu.ymm[op.dst as usize & 15][..16].copy_from_slice(&bytes);
    Ok(())
}

fn store16<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> X {
    cpu.vector_allowed(&plan_of(op).compiled)?;
    let lin = crate::fast::linear(cpu, op, 16, true)?;
    if ALIGNED && lin & 15 != 0 {
        return Err(cpu.gp(0));
    }
    let mut bytes = [0u8; 16];
    bytes.copy_from_slice(&cpu.fpu.ymm[op.dst as usize & 15][..16]);
    cpu.store_vector(op.segment as usize, lin, &bytes)
}

/// Runs a vector instruction.
fn op_vector(cpu: &mut Cpu, op: &Op) -> X {
    let plan = plan_of(op);
    cpu.prepare_general(op);
    cpu.vector_allowed(&plan.compiled)?;
    if matches!(plan.compiled.class, nonroot_native::Class::Avx) && cpu.mode == Mode::V86 {
        return Err(cpu.ud());
    }
    let i = &plan.instruction;
    let (mut segment, mut address, mut width) = (seg::DS, 0, u64::MAX);
    if i.memory_base() != Register::None || i.memory_index() != Register::None || i.memory_displ_size() != 0 {
        segment = memory_segment(i);
        width = mask(address_size(i));
        if !i.is_vsib() {
            address = cpu.effective_address(i);
        }
    } else if plan.compiled.memory.is_some() {
        // MASKMOVQ and MASKMOVDQU: (E)DI or RDI, whose width iced gives by the operand.
        segment = memory_segment(i);
        width = match i.op0_kind() {
            iced_x86::OpKind::MemorySegDI => 0xffff,
            iced_x86::OpKind::MemorySegEDI => 0xffff_ffff,
            _ => u64::MAX,
        };
    }
    if let Some(memory) = plan.compiled.memory {
        if memory.align > 1 {
            let lin = cpu.linear(segment, address, usize::from(memory.size), memory.write)?;
            if lin & (u64::from(memory.align) - 1) != 0 {
                return Err(cpu.gp(0));
            }
        }
    }
    let mut compiled = plan.compiled;
    loop {
        let mut guest = Operand { cpu, segment, mask: width };
        match execute(&mut guest, &compiled, address) {
            Ok(()) => return Ok(()),
            Err(nonroot_native::Stop::Memory(stop)) => return Err(stop),
            Err(nonroot_native::Stop::Trap(trap)) => return Err(cpu.vector_trap(trap)),
            Err(nonroot_native::Stop::Stale) => match cpu.native.compile(i) {
                // Once more; the stale plan of the block is compiled again each time until
                // the block itself is.
                Ok(fresh) => compiled = fresh,
                Err(why) => {
                    let reason = format!("{:?}: {why}", i.code());
                    return Err(cpu.exit(Exit::Failure { reason }));
                }
            },
        }
    }
}
