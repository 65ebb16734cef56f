//! Instructions that do not end a block.

use super::cold::Cold;
use super::flags::{Flags, How};
use super::memory::Key;
use super::spilled;
use super::window::Place;
use super::{register, Emitted, Emitter, R15, RAX};
use crate::analysis::{self, Guest, Kind, RSP};
use crate::assembler::{at, host, Mem};
use crate::frame::{self, exit, field, HOST_OF};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};
use nonroot_interpret::window::Part;
use std::mem::offset_of;

/// The registers that may still have a guest register which has no host register of its own.
const KEEPERS: [u8; 2] = [R15, RAX];

impl Emitter<'_> {
    /// Emits one instruction; true if it ended the block.
    pub(super) fn instruction(&mut self, g: &Guest) -> Emitted<bool> {
        match g.kind {
            Kind::Branch => return self.branch(g).map(|()| true),
            Kind::CountBranch => return self.count_branch(g).map(|()| true),
            Kind::Jump if self.at + 1 < self.guests.len() => return Ok(false),
            Kind::Jump => return self.edge(g.i.near_branch_target() as i32).map(|()| true),
            Kind::Call => return self.call(g).map(|()| true),
            Kind::JumpIndirect | Kind::CallIndirect | Kind::Return => return self.indirect(g).map(|()| true),
            Kind::Syscall => {
                self.syscall(g);
                return Ok(true);
            }
            Kind::Sysret => {
                self.sysret();
                return Ok(true);
            }
            _ => {}
        }
        self.keep_recipe(g);
        match g.kind {
            Kind::Nop => {}
            Kind::Same => self.same(g)?,
            Kind::Lea => self.lea(g)?,
            Kind::BitString => self.bit_string(g)?,
            Kind::LoadControl => self.load_control(g)?,
            Kind::InitX87 => self.init_x87(),
            Kind::Push => self.push(g)?,
            Kind::Pop => self.pop(g)?,
            Kind::Leave => self.leave(),
            Kind::Divide { signed } => self.divide(g, signed)?,
            Kind::HighByte => self.high_byte(g)?,
            Kind::Cli => self.cli(),
            Kind::Sti => self.sti(),
            Kind::Swapgs => self.swapgs(),
            Kind::Access { open } => self.access_check(open),
            Kind::Cld => {
                self.spoil_flags();
                self.a.mem_imm(4, field!(rflags), !0x400);
            }
            Kind::Pushf => self.pushf(),
            Kind::String => self.string(g)?,
            Kind::TimeStamp { processor } => self.time_stamp(processor),
            _ => return Err(format!("{:?}", g.kind)),
        }
        self.settle_group(g);
        Ok(false)
    }

    /// Flags before an instruction of kind Same or Divide, and its memory operand.
    pub(super) fn flags_before(&mut self, g: &Guest) {
        if g.flags_needed {
            self.want_flags();
        } else if g.flags_changed && !self.counted && !g.windowed {
            // They are about to be overwritten, and nothing can exit before that.
            self.count_now();
        }
    }

    pub(super) fn flags_after(&mut self, g: &Guest) {
        if g.flags_changed {
            self.flags = Flags::Live(if g.kills_flags() { self.recipe(g) } else { None });
            if let Flags::Live(Some(r)) = self.flags {
                // A register that the instruction itself changed is part of it only as its result.
                let result = matches!(r.how, How::Added | How::Subtracted) || r.right == Some(r.left);
                if !result && r.reads(g.writes) {
                    self.flags = Flags::Live(None);
                }
            }
        }
    }

    pub(super) fn same(&mut self, g: &Guest) -> Emitted {
        if self.overlaid(g)? {
            return Ok(());
        }
        let mut place = None;
        if let Some(m) = &g.memory {
            if g.windowed && !matches!(self.flags, Flags::Live(_)) {
                self.count_now();
            }
            place = Some(self.memory(m));
        }
        if g.flags_needed && matches!(self.flags, Flags::Recipe(_)) {
            // Leaves RAX alone.
            self.want_flags();
        }
        let restores = g.flags_needed && self.flags == Flags::Saved;
        if let (Some(p), true) = (place, g.implicit_rax || restores) {
            if p.uses(RAX) {
                self.a.lea(true, R15, p.mem);
                place = Some(Place { mem: at(R15, 0), ..p });
            }
            self.group = None;
        }
        self.flags_before(g);
        if g.implicit_rax {
            self.group = None;
            self.a.mov(RAX, host::R14);
        }
        let stashed = self.stash_shift(g).or_else(|| self.stash_sum(g));
        self.encode(g, place)?;
        if g.implicit_rax && g.writes & 1 != 0 {
            self.a.mov(host::R14, RAX);
        }
        if g.pointers {
            self.x87_pointers(g);
        }
        self.flags_after(g);
        if stashed.is_some() {
            self.flags = Flags::Live(stashed);
        }
        Ok(())
    }

    /// Encodes the instruction with host registers, its memory operand at `place`.
    pub(super) fn encode(&mut self, g: &Guest, place: Option<Place>) -> Emitted {
        let mut out = g.i;
        let mut free: Vec<u8> = Vec::new();
        if !g.implicit_rax && place.is_none_or(|p| !p.uses(RAX)) {
            free.push(RAX);
        }
        if place.is_none_or(|p| !p.uses(R15)) {
            free.push(R15);
        }
        let mut kept = self.kept_now();
        if !free.contains(&RAX) {
            kept[1] = None;
        }
        if !free.contains(&R15) {
            kept[0] = None;
        }
        if place.is_none() && !g.implicit_rax && self.switches.spilled {
            spilled::source_in_memory(&mut out, &kept);
        }
        let needless = self.switches.spilled && spilled::only_writes_first(&g.i);
        let mut scratch: Vec<(u8, u8)> = Vec::new();
        for n in 0..out.op_count() {
            let Some(guest) = Self::spilled_operand(&out, n, g.implicit_rax) else { continue };
            if let Some(at) = kept.iter().position(|&k| k == Some(guest)) {
                let reg = KEEPERS[at];
                if !scratch.contains(&(guest, reg)) {
                    scratch.push((guest, reg));
                    free.retain(|&r| r != reg);
                }
            }
        }
        for n in 0..out.op_count() {
            if out.op_kind(n) != OpKind::Register {
                continue;
            }
            let r = out.op_register(n);
            let Some(guest) = analysis::number(r) else { continue };
            let reg = match HOST_OF[guest as usize] {
                _ if guest == analysis::RAX && g.implicit_rax => RAX,
                Some(reg) => reg,
                None => match scratch.iter().find(|(of, _)| *of == guest) {
                    Some(&(_, reg)) => reg,
                    None => {
                        // One that keeps nothing; R15 first, for RAX may hold a group's address.
                        let rank = |reg: u8| match reg {
                            R15 => usize::from(kept[0].is_some()) * 2,
                            _ => {
                                1 + usize::from(kept[1].is_some()) * 2 + usize::from(self.group.is_some()) * 4
                            }
                        };
                        let reg =
                            free.iter().copied().min_by_key(|&reg| rank(reg)).ok_or("no scratch register")?;
                        free.retain(|&r| r != reg);
                        if reg == RAX {
                            self.group = None;
                        }
                        if !(n == 0 && needless) {
                            self.a.load(true, reg, frame::spilled(guest));
                        }
                        scratch.push((guest, reg));
                        reg
                    }
                },
            };
            out.set_op_register(n, register(reg, r.size()));
        }
        if let Some(place) = place {
            let Mem { base, index, disp } = place.mem;
            let prefix = if place.part == Some(Part::High) { Register::GS } else { Register::None };
            out.set_segment_prefix(prefix);
            out.set_memory_base(base.map_or(Register::None, |base| register(base, 8)));
            out.set_memory_index(index.map_or(Register::None, |(index, _)| register(index, 8)));
            out.set_memory_index_scale(index.map_or(1, |(_, scale)| 1 << scale));
            out.set_memory_displacement64(disp as i64 as u64);
            out.set_memory_displ_size(match disp {
                _ if base.is_none() => 8,
                0 => 0,
                -128..=127 => 1,
                _ => 8,
            });
            self.touch(&place);
        }
        self.raw(&out)?;
        for (guest, reg) in scratch {
            if g.writes & 1 << guest != 0 {
                self.a.store(true, frame::spilled(guest), reg);
            }
            kept[usize::from(reg == RAX)] = Some(guest);
        }
        self.keep(kept);
        Ok(())
    }

    /// The guest register without a host register that an operand is.
    fn spilled_operand(i: &Instruction, n: u32, implicit_rax: bool) -> Option<u8> {
        if i.op_kind(n) != OpKind::Register {
            return None;
        }
        let guest = analysis::number(i.op_register(n))?;
        let own = HOST_OF[guest as usize].is_some() || guest == analysis::RAX && implicit_rax;
        (!own).then_some(guest)
    }

    /// The guest registers that R15 and RAX still have.
    pub(super) fn kept_now(&self) -> [Option<u8>; 2] {
        let (mut kept, at) = self.kept;
        if at != self.a.here() || !self.switches.spilled {
            return [None; 2];
        }
        if self.group.is_some() {
            kept[1] = None;
        }
        kept
    }

    /// R15 and RAX have these guest registers, until something else is emitted.
    pub(super) fn keep(&mut self, kept: [Option<u8>; 2]) {
        self.kept = (kept, self.a.here());
    }

    pub(super) fn raw(&mut self, i: &Instruction) -> Emitted {
        self.encoder.encode(i, 0).map_err(|e| format!("{:?}: {e}", i.code()))?;
        let bytes = self.encoder.take_buffer();
        self.a.bytes(&bytes);
        Ok(())
    }

    /// A guest register in some host register: its own, or `scratch`.
    pub(super) fn value(&mut self, guest: u8, scratch: u8) -> u8 {
        match HOST_OF[guest as usize] {
            Some(reg) => reg,
            None => {
                self.a.load(true, scratch, frame::spilled(guest));
                scratch
            }
        }
    }

    pub(super) fn set(&mut self, guest: u8, from: u8) {
        match HOST_OF[guest as usize] {
            Some(reg) => self.a.mov(reg, from),
            None => self.a.store(true, frame::spilled(guest), from),
        }
    }

    pub(super) fn lea(&mut self, g: &Guest) -> Emitted {
        let m = g.memory.as_ref().ok_or("LEA without memory")?;
        let wide = g.i.op0_register().size() == 8 && !m.short;
        let dst = analysis::number(g.i.op0_register()).ok_or("LEA to no register")?;
        let spilled_parts = [m.base, m.index.map(|(index, _)| index)]
            .iter()
            .flatten()
            .filter(|&&r| HOST_OF[r as usize].is_none())
            .count();
        let mut mem = Mem { base: None, index: None, disp: m.disp };
        let mut kept = self.kept_now();
        let there = |guest: u8, kept: &[Option<u8>; 2]| {
            kept.iter().position(|&k| k == Some(guest)).map(|n| KEEPERS[n])
        };
        if m.rip {
            self.a.load(true, R15, field!(code_page));
            mem.base = Some(R15);
            kept[0] = None;
        }
        let spilled_parts = if spilled_parts == 2
            && (there(m.base.unwrap_or(0), &kept).is_some()
                || there(m.index.map_or(0, |(r, _)| r), &kept).is_some())
        {
            // The one that is there stays, the other goes into the other register.
            3
        } else {
            spilled_parts
        };
        if let Some(base) = m.base {
            mem.base = Some(match there(base, &kept) {
                Some(reg) => reg,
                None if HOST_OF[base as usize].is_some() => self.value(base, R15),
                None => {
                    let scratch =
                        if spilled_parts == 3 && kept[0].is_some() && kept[0] == m.index.map(|(r, _)| r) {
                            self.group = None;
                            RAX
                        } else {
                            R15
                        };
                    kept[usize::from(scratch == RAX)] = Some(base);
                    self.value(base, scratch)
                }
            });
        }
        if let Some((index, scale)) = m.index {
            mem.index = Some((
                match there(index, &kept) {
                    Some(reg) => reg,
                    None if HOST_OF[index as usize].is_some() => self.value(index, R15),
                    None => {
                        let scratch = if spilled_parts >= 2 && mem.base == Some(R15) {
                            self.group = None;
                            RAX
                        } else {
                            R15
                        };
                        kept[usize::from(scratch == RAX)] = Some(index);
                        self.value(index, scratch)
                    }
                },
                scale,
            ));
        }
        match HOST_OF[dst as usize] {
            Some(reg) => self.a.lea(wide, reg, mem),
            None => {
                self.a.lea(wide, R15, mem);
                self.a.store(true, frame::spilled(dst), R15);
                if kept[1] == Some(dst) {
                    kept[1] = None;
                }
                kept[0] = Some(dst);
            }
        }
        self.keep(kept);
        Ok(())
    }

    /// Adds to the guest's RSP without touching flags.
    pub(super) fn move_stack(&mut self, by: i32) {
        let rsp = host::R11;
        self.a.lea(self.long(), rsp, at(rsp, by));
    }

    pub(super) fn push(&mut self, g: &Guest) -> Emitted {
        let width = self.width();
        let mut value = None;
        if let Some(m) = &g.memory {
            let place = self.memory(m);
            self.load_place(self.long(), R15, &place);
            self.a.store(true, field!(temporary), R15);
            value = Some(R15);
        }
        let slot = self.reach(self.stack_key(), -width, width as u16, true, true);
        match g.i.op0_kind() {
            OpKind::Register => {
                let guest = analysis::number(g.i.op0_register()).ok_or("PUSH of no register")?;
                let reg = self.value(guest, R15);
                self.store_place(self.long(), &slot, reg);
            }
            OpKind::Memory => {
                debug_assert!(value.is_some());
                self.a.load(true, R15, field!(temporary));
                self.store_place(self.long(), &slot, R15);
            }
            _ => {
                let immediate = g.i.immediate(0) as i64;
                let immediate = if self.long() {
                    i32::try_from(immediate).map_err(|e| e.to_string())?
                } else {
                    immediate as i32
                };
                self.at_place(self.long(), &[0xc7], 0, &slot);
                self.a.bytes(&immediate.to_le_bytes());
            }
        }
        self.move_stack(-width);
        Ok(())
    }

    pub(super) fn pop(&mut self, g: &Guest) -> Emitted {
        let width = self.width();
        let guest = analysis::number(g.i.op0_register()).ok_or("POP to no register")?;
        let place = self.reach(self.stack_key(), 0, width as u16, false, true);
        if guest == RSP {
            self.load_place(self.long(), host::R11, &place);
            return Ok(());
        }
        match HOST_OF[guest as usize] {
            Some(reg) => self.load_place(self.long(), reg, &place),
            None => {
                self.load_place(self.long(), R15, &place);
                self.a.store(true, frame::spilled(guest), R15);
            }
        }
        self.move_stack(width);
        Ok(())
    }

    pub(super) fn leave(&mut self) {
        let width = self.width();
        let key = Key { base: Some(analysis::RBP), index: None, rip: false, segment: 0, short: !self.long() };
        let place = self.reach(key, 0, width as u16, false, false);
        self.load_place(self.long(), R15, &place);
        self.a.lea(self.long(), host::R11, at(host::RBP, width));
        self.a.mov(host::RBP, R15);
    }

    pub(super) fn divide(&mut self, g: &Guest, signed: bool) -> Emitted {
        let wide = match &g.memory {
            Some(m) => m.size == 8,
            None => g.i.op0_register().size() == 8,
        };
        let divisor = match &g.memory {
            Some(m) => {
                self.spoil_flags();
                let place = self.memory(m);
                self.load_place(wide, R15, &place);
                R15
            }
            None => {
                self.spoil_flags();
                let guest = analysis::number(g.i.op0_register()).ok_or("DIV by no register")?;
                HOST_OF[guest as usize].ok_or("DIV by a spilled register")?
            }
        };
        self.group = None;
        let mut holes = Vec::new();
        if signed {
            // Only RDX = sign of RAX, and a divisor other than 0 and -1.
            self.a.reg(wide, &[0x8b], RAX, host::R14);
            self.a.reg(wide, &[0xc1], 7, RAX); // sar rax, size - 1
            self.a.bytes(&[if wide { 63 } else { 31 }]);
            self.a.reg(wide, &[0x39], host::RDX, RAX);
            holes.push(self.a.jcc(5));
            self.a.lea(wide, RAX, at(divisor, 1));
            self.a.reg_imm(wide, 7, RAX, 1);
            holes.push(self.a.jcc(6));
        } else {
            // The quotient fits exactly if RDX is below the divisor.
            self.a.reg(wide, &[0x39], divisor, host::RDX);
            holes.push(self.a.jcc(3));
        }
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: holes, exit });
        self.a.mov(RAX, host::R14);
        // DIV by RAX means the guest's.
        let divisor = if divisor == host::R14 { RAX } else { divisor };
        self.a.reg(wide, &[0xf7], if signed { 7 } else { 6 }, divisor);
        self.a.mov(host::R14, RAX);
        self.flags = Flags::Live(None);
        Ok(())
    }

    pub(super) fn high_byte(&mut self, g: &Guest) -> Emitted {
        let first = matches!(g.i.op0_register(), Register::AH | Register::CH | Register::DH | Register::BH);
        let source = if first { g.i.op0_register() } else { g.i.op1_register() };
        let guest = match source {
            Register::AH => 0u8,
            Register::CH => 1,
            Register::DH => 2,
            _ => 3,
        };
        self.group = None;
        let reg = self.value(guest, RAX);
        self.a.mov(RAX, reg);
        if first {
            self.flags_before(g);
            let mut i = g.i;
            i.set_op0_register(Register::AH);
            self.raw(&i)?;
            if g.writes != 0 {
                self.a.mov(reg, RAX);
            }
            if g.flags_changed {
                self.flags = Flags::Live(None);
            }
            return Ok(());
        }
        self.a.bytes(&[0x0f, 0xb6, 0xc4]); // movzx eax, ah
        let dst = analysis::number(g.i.op0_register()).ok_or("no destination")?;
        if g.i.mnemonic() == Mnemonic::Movzx {
            self.set(dst, RAX);
        } else {
            let to = match HOST_OF[dst as usize] {
                Some(reg) => reg,
                None => {
                    self.a.load(true, R15, frame::spilled(dst));
                    R15
                }
            };
            let mut i = Instruction::with2(iced_x86::Code::Mov_r8_rm8, register(to, 1), Register::AL)
                .map_err(|e| e.to_string())?;
            i.set_len(0);
            self.raw(&i)?;
            if HOST_OF[dst as usize].is_none() {
                self.a.store(true, frame::spilled(dst), R15);
            }
        }
        Ok(())
    }

    /// Leaves unless CPL is 0.
    pub(super) fn supervisor(&mut self) {
        self.spoil_flags();
        self.a.mem(false, &[0x80], 7, field!(cpl)); // cmp byte [cpl], 0
        self.a.bytes(&[0]);
        let hole = self.a.jcc(5);
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: vec![hole], exit });
    }

    pub(super) fn cli(&mut self) {
        self.supervisor();
        self.a.mem_imm(4, field!(rflags), !0x200);
    }

    /// Only while no interrupt waits: those that come meanwhile are looked at when the budget is used up.
    pub(super) fn sti(&mut self) {
        self.supervisor();
        self.a.mem(false, &[0x80], 7, field!(pending));
        self.a.bytes(&[0]);
        let hole = self.a.jcc(5);
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: vec![hole], exit });
        self.a.mem_imm(1, field!(rflags), 0x200);
    }

    pub(super) fn swapgs(&mut self) {
        self.supervisor();
        self.group = None;
        self.a.load(true, RAX, frame::segment_base(1));
        self.a.load(true, R15, field!(kernel_gs));
        self.a.store(true, field!(kernel_gs), RAX);
        self.a.store(true, frame::segment_base(1), R15);
    }

    /// STAC and CLAC: RFLAGS.AC, and the TLB entries that go with it.
    pub(super) fn access_check(&mut self, open: bool) {
        self.supervisor();
        self.group = None;
        if open {
            self.a.mem_imm(1, field!(rflags), 1 << 18);
            self.a.load(true, RAX, field!(gs_open));
        } else {
            self.a.mem_imm(4, field!(rflags), !(1 << 18));
            self.a.load(true, RAX, field!(gs_closed));
        }
        self.a.bytes(&[0xf3, 0x48, 0x0f, 0xae, 0xd8]); // wrgsbase rax
    }

    pub(super) fn time_stamp(&mut self, processor: bool) {
        self.spoil_flags();
        self.group = None;
        self.a.mem(false, &[0xf6], 0, field!(time_stamps)); // test byte [time_stamps], bit
        self.a.bytes(&[if processor { 2 } else { 1 }]);
        let hole = self.a.jcc(4);
        let exit = self.side_exit(exit::SINGLE);
        self.cold.push(Cold::Exit { from: vec![hole], exit });
        self.a.call_to(self.routines.time_stamp);
        self.a.reg(false, &[0x8b], host::R14, RAX); // mov r14d, eax
        self.a.bytes(&[0x48, 0xc1, 0xe8, 32]); // shr rax, 32
        self.a.mov(host::RDX, RAX);
        if processor {
            self.a.load(false, host::RCX, field!(tsc_aux));
        }
    }

    pub(super) fn pushf(&mut self) {
        // Flags to where they can be read, whatever they are now.
        if let Flags::Recipe(r) = self.flags {
            self.cook(r);
            self.flags = Flags::Live(None);
        }
        if let Flags::Live(_) = self.flags {
            self.flags = Flags::Live(None);
        }
        self.spoil_flags();
        let width = self.width();
        let disp = self.access(self.stack_key(), -width, width as u16, true);
        // R15D: SF ZF AF PF CF from the high byte, OF from the low one, the rest of RFLAGS.
        self.a.mem(
            false,
            &[0x0f, 0xb6],
            R15,
            Mem { disp: offset_of!(frame::Frame, flags) as i32 + 1, ..at(host::RSP, 0) },
        );
        self.a.mem(false, &[0x0b], R15, field!(rflags)); // or
        self.a.store(true, at(RAX, disp), R15);
        self.a.mem(false, &[0x0f, 0xb6], R15, field!(flags));
        self.a.bytes(&[0x41, 0xc1, 0xe7, 11]); // shl r15d, 11
        self.a.mem(true, &[0x09], R15, at(RAX, disp)); // or [slot], r15
        self.move_stack(-width);
    }
}
