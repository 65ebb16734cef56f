//! Running compiled instructions: what the interpreter provides, and the order
//! in which an instruction reads, runs, writes and commits.

use crate::classify::{simd_fault, Class, Trap};
use crate::masked::{GatherPlan, MaskKind, MaskPlan};
use crate::plan::{Compiled, Plan, ThunkRef};
use crate::state::{fsw, fx, VectorState, MXCSR_MASK};
use crate::unit::NativeUnit;
use crate::x87::{self, X87Control};
use crate::xstate;

/// Why an instruction did not complete. Nothing has changed then, but for the
/// elements that a gather or a masked store has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop<F> {
    /// Memory said no.
    Memory(F),
    /// The instruction raises an exception.
    Trap(Trap),
    /// The thunk memory was emptied since the instruction was compiled: compile
    /// it again. ([`NativeUnit::generation`] has changed.)
    Stale,
}

/// Control registers and mode, for the instructions that depend on them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// 64-bit mode (CS.L).
    pub long: bool,
    /// Real-address or virtual-8086 mode.
    pub real: bool,
}

/// What the unit needs of the vCPU whose instruction it executes.
pub trait Guest {
    /// What a failed memory access is.
    type Fault;

    /// Reads `buffer.len()` bytes (up to 512, also across pages) at an effective
    /// address; segment and translation are the implementer's. All or nothing.
    fn read(&mut self, address: u64, buffer: &mut [u8]) -> Result<(), Self::Fault>;

    /// Writes up to 512 bytes. All or nothing.
    fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Self::Fault>;

    /// Raises what writing `length` bytes would raise, without writing.
    fn probe_write(&mut self, address: u64, length: usize) -> Result<(), Self::Fault>;

    /// A general register (RAX is 0 ... R15 is 15).
    fn gpr(&self, register: u8) -> u64;

    /// Sets all 64 bits of a general register.
    fn set_gpr(&mut self, register: u8, value: u64);

    /// RFLAGS; only the status flags need be right.
    fn flags(&self) -> u64;

    /// Sets CF, PF, AF, ZF, SF and OF to those in `flags`; other bits of `flags` mean nothing.
    fn set_status_flags(&mut self, flags: u64);

    /// Address of the instruction, as an offset in CS.
    fn instruction_pointer(&self) -> u64;

    /// Control registers and mode.
    fn control(&self) -> Control;

    /// The vector register file.
    fn vectors(&mut self) -> &mut VectorState;

    /// The unit that compiled the instruction, and the vector register file.
    fn parts(&mut self) -> (&mut NativeUnit, &mut VectorState);
}

const STATUS_FLAGS: u64 = 0x8d5;

/// Executes a compiled instruction. `address` is the effective address of its
/// memory operand (0 if it has none; not used by gathers and by MASKMOVQ and
/// MASKMOVDQU, which compute theirs from the registers).
///
/// [`crate::precheck`] and the alignment of the operand are the caller's business.
#[inline]
pub fn execute<G: Guest>(guest: &mut G, compiled: &Compiled, address: u64) -> Result<(), Stop<G::Fault>> {
    match compiled.plan {
        Plan::Load { dst, offset, size, clear_to } => {
            let mut buffer = [0; 32];
            let (offset, size) = (offset as usize, size as usize);
            guest.read(address, &mut buffer[..size]).map_err(Stop::Memory)?;
            let register = &mut guest.vectors().ymm[dst as usize & 15];
            register[offset..offset + size].copy_from_slice(&buffer[..size]);
            clear(register, offset + size, clear_to);
            Ok(())
        }
        Plan::Store { src, offset, size } => {
            let register = guest.vectors().ymm[src as usize & 15];
            guest.write(address, &register[offset as usize..][..size as usize]).map_err(Stop::Memory)
        }
        Plan::Copy { dst, src, size, clear_to } => {
            let vectors = guest.vectors();
            let source = vectors.ymm[src as usize & 15];
            let size = size as usize;
            let register = &mut vectors.ymm[dst as usize & 15];
            register[..size].copy_from_slice(&source[..size]);
            clear(register, size, clear_to);
            Ok(())
        }
        Plan::Zero { dst, size } => {
            guest.vectors().ymm[dst as usize & 15][..size as usize].fill(0);
            Ok(())
        }
        Plan::FromGpr { dst, src, size, clear_to } => {
            let value = guest.gpr(src).to_le_bytes();
            let size = size as usize;
            let register = &mut guest.vectors().ymm[dst as usize & 15];
            register[..size].copy_from_slice(&value[..size]);
            clear(register, size, clear_to);
            Ok(())
        }
        Plan::ToGpr { dst, src, size } => {
            let mut value = [0; 8];
            let size = size as usize;
            value[..size].copy_from_slice(&guest.vectors().ymm[src as usize & 15][..size]);
            guest.set_gpr(dst, u64::from_le_bytes(value));
            Ok(())
        }
        Plan::Thunk(thunk) => run_thunk(guest, compiled, &thunk, address),
        plan => run_portable(guest, plan, compiled.class, address),
    }
}

#[inline]
fn clear(register: &mut [u8; 32], from: usize, to: u8) {
    let to = to as usize;
    if from < to {
        register[from..to].fill(0);
    }
}

fn run_thunk<G: Guest>(
    guest: &mut G,
    compiled: &Compiled,
    thunk: &ThunkRef,
    address: u64,
) -> Result<(), Stop<G::Fault>> {
    let (unit, state) = guest.parts();
    if !unit.is_current(thunk) {
        return Err(Stop::Stale);
    }
    if thunk.fx && state.x87_pending() {
        return Err(Stop::Trap(Trap::MathFault));
    }
    if let Some(memory) = compiled.memory.filter(|memory| memory.read) {
        let mut buffer = [0; 32];
        let size = memory.size as usize & 63;
        guest.read(address, &mut buffer[..size]).map_err(Stop::Memory)?;
        guest.parts().0.context().scratch[..32].copy_from_slice(&buffer);
    }
    for slot in slots(thunk.gpr_in) {
        let value = guest.gpr(slot_register(thunk, slot));
        guest.parts().0.context().gpr[slot] = value;
    }
    if thunk.flags_read {
        let flags = guest.flags() & STATUS_FLAGS | 0x202;
        guest.parts().0.context().rflags = flags;
    }
    let (unit, state) = guest.parts();
    if thunk.mxcsr {
        unit.context().set_mxcsr(state.mxcsr);
    }
    if thunk.fx {
        unit.context().load_fx(&state.fx);
    }
    let Some(unmasked) = unit.call(thunk, state) else { return Err(Stop::Stale) };
    if unmasked != 0 {
        let raised = unit.context().mxcsr_out & 0x3f;
        state.mxcsr |= reported(unmasked & 0x3f, raised);
        return Err(Stop::Trap(simd_fault(guest.control().cr4)));
    }
    if let Some(memory) = compiled.memory.filter(|memory| memory.write) {
        let size = memory.size as usize & 63;
        if !thunk.fx || store_done(state.fcw(), unit.context().fsw()) {
            let buffer = unit.context().scratch;
            guest.write(address, &buffer[..size]).map_err(Stop::Memory)?;
        } else {
            // An unmasked exception stores nothing, but the address is checked all the same.
            guest.probe_write(address, size).map_err(Stop::Memory)?;
        }
    }
    if thunk.mxcsr {
        let (unit, state) = guest.parts();
        state.mxcsr |= unit.context().mxcsr_out & 0x3f;
    }
    if thunk.fx {
        commit_fx(guest, compiled, thunk, address);
    }
    for slot in slots(thunk.gpr_out) {
        let value = guest.parts().0.context().gpr[slot];
        guest.set_gpr(slot_register(thunk, slot), value);
    }
    if thunk.flags_written != 0 {
        let written = u64::from(thunk.flags_written);
        let new = guest.parts().0.context().rflags & written;
        let kept = if written == STATUS_FLAGS { 0 } else { guest.flags() & STATUS_FLAGS & !written };
        guest.set_status_flags(new | kept);
    }
    Ok(())
}

/// The general register slots in a mask.
#[inline(always)]
fn slots(mask: u8) -> impl Iterator<Item = usize> {
    let count = if mask == 0 { 0 } else { 4 };
    (0..count).filter(move |slot| mask & 1 << slot != 0)
}

fn slot_register(thunk: &ThunkRef, slot: usize) -> u8 {
    [thunk.explicit, 0, 2, 1][slot]
}

/// The flags that an instruction with unmasked exceptions leaves in MXCSR: if
/// one that is detected before computing is unmasked (invalid, denormal, divide
/// by zero), the others do not come up (SDM 1, 11.5.3).
///
/// Two doubts remain. Beside an unmasked overflow or underflow, precision is
/// always reported, while a processor reports it only if the result, had its
/// exponent not been limited, were inexact. And DPPS and DPPD, which stop at the
/// step that raises an unmasked exception, report those of later steps as well.
fn reported(unmasked: u32, raised: u32) -> u32 {
    const BEFORE: u32 = 7;
    if unmasked & BEFORE != 0 {
        raised & BEFORE
    } else {
        raised
    }
}

/// Whether an x87 store wrote its operand, by the control word and the status
/// word it left: any unmasked exception but precision keeps the result back.
/// (Flags that were set before are masked ones, else the store had not started.)
fn store_done(control: u16, status: u16) -> bool {
    status & !control & (fsw::IE | fsw::DE | fsw::ZE | fsw::OE | fsw::UE) == 0
}

fn commit_fx<G: Guest>(guest: &mut G, compiled: &Compiled, thunk: &ThunkRef, address: u64) {
    let rip = guest.instruction_pointer();
    let (unit, state) = guest.parts();
    unit.context().store_fx(&mut state.fx);
    if thunk.x87 {
        state.set_fx64(fx::FIP, rip);
        if compiled.memory.is_some() {
            state.set_fx64(fx::FDP, address);
        }
        if state.x87_pending() {
            state.set_fx16(fx::FOP, thunk.opcode);
        }
    }
}

#[inline(never)]
fn run_portable<G: Guest>(
    guest: &mut G,
    plan: Plan,
    class: Class,
    address: u64,
) -> Result<(), Stop<G::Fault>> {
    match plan {
        Plan::ClearRegisters { all } => {
            let count = if guest.control().long { 16 } else { 8 };
            let from = if all { 0 } else { 16 };
            guest.vectors().ymm[..count].iter_mut().for_each(|register| register[from..].fill(0));
            Ok(())
        }
        Plan::LoadMxcsr => {
            let mut bytes = [0; 4];
            guest.read(address, &mut bytes).map_err(Stop::Memory)?;
            let value = u32::from_le_bytes(bytes);
            if value & !MXCSR_MASK != 0 {
                return Err(Stop::Trap(Trap::GeneralProtection));
            }
            guest.vectors().mxcsr = value;
            Ok(())
        }
        Plan::StoreMxcsr => {
            let bytes = guest.vectors().mxcsr.to_le_bytes();
            guest.write(address, &bytes).map_err(Stop::Memory)
        }
        Plan::X87Control(op) => x87_control(guest, op, address),
        Plan::State(op) => xstate::perform(guest, op, address),
        Plan::Masked(plan) => masked(guest, &plan, class, address),
        Plan::Gather(plan) => gather(guest, &plan),
        // Those that `execute` does itself.
        Plan::Load { .. } | Plan::Store { .. } | Plan::Copy { .. } | Plan::Zero { .. } => Ok(()),
        Plan::FromGpr { .. } | Plan::ToGpr { .. } | Plan::Thunk(_) => Ok(()),
    }
}

fn x87_control<G: Guest>(guest: &mut G, op: X87Control, address: u64) -> Result<(), Stop<G::Fault>> {
    if op.waits() && guest.vectors().x87_pending() {
        return Err(Stop::Trap(Trap::MathFault));
    }
    let real = guest.control().real;
    match op {
        X87Control::Wait | X87Control::Nothing => {}
        X87Control::Init => x87::init(guest.vectors()),
        X87Control::ClearExceptions => x87::clear_exceptions(guest.vectors()),
        X87Control::StoreStatusAx => {
            let value = guest.gpr(0) & !0xffff | u64::from(guest.vectors().fsw());
            guest.set_gpr(0, value);
        }
        X87Control::StoreStatus => {
            let bytes = guest.vectors().fsw().to_le_bytes();
            guest.write(address, &bytes).map_err(Stop::Memory)?;
        }
        X87Control::StoreControl => {
            let bytes = guest.vectors().fcw().to_le_bytes();
            guest.write(address, &bytes).map_err(Stop::Memory)?;
        }
        X87Control::LoadControl => {
            let mut bytes = [0; 2];
            guest.read(address, &mut bytes).map_err(Stop::Memory)?;
            x87::set_control(guest.vectors(), u16::from_le_bytes(bytes));
        }
        X87Control::StoreEnvironment { wide } => {
            let image = x87::store_environment(guest.vectors(), wide, real);
            guest.write(address, &image).map_err(Stop::Memory)?;
            x87::mask_exceptions(guest.vectors());
        }
        X87Control::LoadEnvironment { wide } => {
            let mut image = [0; 28];
            let size = if wide { 28 } else { 14 };
            guest.read(address, &mut image[..size]).map_err(Stop::Memory)?;
            x87::load_environment(guest.vectors(), &image, wide, real);
        }
        X87Control::Save { wide } => {
            let image = x87::save(guest.vectors(), wide, real);
            guest.write(address, &image).map_err(Stop::Memory)?;
            x87::init(guest.vectors());
        }
        X87Control::Restore { wide } => {
            let mut image = [0; 108];
            let size = if wide { 108 } else { 94 };
            guest.read(address, &mut image[..size]).map_err(Stop::Memory)?;
            x87::restore(guest.vectors(), &image, wide, real);
        }
        X87Control::Emms => x87::emms(guest.vectors()),
    }
    Ok(())
}

fn masked<G: Guest>(
    guest: &mut G,
    plan: &MaskPlan,
    class: Class,
    address: u64,
) -> Result<(), Stop<G::Fault>> {
    if class == Class::Mmx && guest.vectors().x87_pending() {
        return Err(Stop::Trap(Trap::MathFault));
    }
    let (element, count) = (plan.element as usize, plan.count as usize);
    let mut mask = guest.vectors().ymm[plan.mask as usize & 15];
    let mut data = guest.vectors().ymm[plan.data as usize & 15];
    let address = match plan.kind {
        MaskKind::Load | MaskKind::Store => address,
        MaskKind::StoreBytes | MaskKind::StoreMmx => guest.gpr(7) & plan.address_mask,
    };
    if plan.kind == MaskKind::StoreMmx {
        let state = guest.vectors();
        mask[..8].copy_from_slice(&state.mm(plan.mask as usize));
        data[..8].copy_from_slice(&state.mm(plan.data as usize));
    }
    let at = |n: usize| match plan.kind {
        MaskKind::Load | MaskKind::Store => address.wrapping_add((n * element) as u64),
        MaskKind::StoreBytes | MaskKind::StoreMmx => {
            address.wrapping_add((n * element) as u64) & plan.address_mask
        }
    };
    if plan.kind == MaskKind::Load {
        let mut result = [0; 32];
        for n in (0..count).filter(|&n| plan.selected(&mask, n)) {
            guest.read(at(n), &mut result[n * element..][..element]).map_err(Stop::Memory)?;
        }
        guest.vectors().ymm[plan.data as usize & 15] = result;
        return Ok(());
    }
    for n in (0..count).filter(|&n| plan.selected(&mask, n)) {
        guest.probe_write(at(n), element).map_err(Stop::Memory)?;
    }
    for n in (0..count).filter(|&n| plan.selected(&mask, n)) {
        guest.write(at(n), &data[n * element..][..element]).map_err(Stop::Memory)?;
    }
    if plan.kind == MaskKind::StoreMmx {
        guest.vectors().enter_mmx();
    }
    Ok(())
}

fn gather<G: Guest>(guest: &mut G, plan: &GatherPlan) -> Result<(), Stop<G::Fault>> {
    let (element, count) = (plan.element as usize, plan.count as usize);
    let base = plan.base.map_or(0, |register| guest.gpr(register));
    let (dst, mask) = (plan.dst as usize & 15, plan.mask as usize & 15);
    let index = guest.vectors().ymm[plan.index as usize & 15];
    let selected = guest.vectors().ymm[mask];
    for n in 0..count {
        let range = n * element..(n + 1) * element;
        // What a fault leaves of the mask is all ones or all zeroes in each element.
        let set = selected[range.end - 1] & 0x80 != 0;
        guest.vectors().ymm[mask][range].fill(if set { 0xff } else { 0 });
    }
    for n in 0..count {
        let range = n * element..(n + 1) * element;
        if selected[range.end - 1] & 0x80 != 0 {
            let mut value = [0; 8];
            guest.read(plan.address(&index, base, n), &mut value[..element]).map_err(Stop::Memory)?;
            let state = guest.vectors();
            state.ymm[dst][range.clone()].copy_from_slice(&value[..element]);
            state.ymm[mask][range].fill(0);
        }
    }
    let state = guest.vectors();
    state.ymm[dst][count * element..].fill(0);
    state.ymm[mask].fill(0);
    Ok(())
}
