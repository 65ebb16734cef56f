//! From guest bytes to blocks: decoding by iced-x86, choosing an operation for
//! each instruction, and where a block ends.

use crate::code_cache::{new_block, Block, Op, SETS_RIP};
use crate::cpu::Cpu;
use crate::state::*;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};
use nonroot_memory::{P2M_FLAGS, P2M_FOREIGN, P2M_PRESENT};

/// Longest instruction in bytes.
const MAX_INSTRUCTION: usize = 15;
/// Most instructions in a block.
const MAX_BLOCK: u16 = 48;

/// Runs an instruction in the general executor.
fn op_general(cpu: &mut Cpu, op: &Op) -> X {
    general(cpu, op)
}

/// The same for an instruction that ends its block.
fn op_general_end(cpu: &mut Cpu, op: &Op) -> X {
    general(cpu, op)?;
    cpu.r.rip = cpu.next_rip;
    Ok(())
}

#[inline(always)]
fn general(cpu: &mut Cpu, op: &Op) -> X {
    // SAFETY: `imm` is the address of an Instruction that the op's block owns.
    let i = unsafe { &*(op.imm as *const Instruction) };
    cpu.prepare_general(op);
    cpu.stats.general += 1;
    cpu.execute(i)
}

/// Falls through to the instruction after the block.
fn op_end(cpu: &mut Cpu, op: &Op) -> X {
    cpu.r.rip = cpu.block_rip(op.offset);
    Ok(())
}

/// The bytes are no instruction.
pub fn op_invalid(cpu: &mut Cpu, _: &Op) -> X {
    Err(cpu.ud())
}

/// F3 90 is PAUSE, but with REX.B before the 90 it is XCHG, which iced does not tell apart.
fn exchange_or_pause(i: Instruction, bytes: &[u8], bitness: u32) -> Instruction {
    let Some(rex) = bytes.len().checked_sub(2) else { return i };
    if bitness != 64 || bytes[rex] & 0xf1 != 0x41 {
        return i;
    }
    let without: Vec<u8> = bytes.iter().copied().filter(|&byte| byte != 0xf3).collect();
    Decoder::new(bitness, &without, DecoderOptions::NONE).decode()
}

/// Whether what iced calls invalid would be an instruction if it might be longer than 15 bytes,
/// which raises #GP instead of #UD (SDM 2A 2.3.11).
fn too_long(bytes: &[u8], bitness: u32) -> bool {
    if bytes.len() < MAX_INSTRUCTION {
        return false;
    }
    let prefix = |byte: u8| {
        matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
            || bitness == 64 && byte & 0xf0 == 0x40
    };
    match bytes.iter().position(|&byte| !prefix(byte)) {
        None => true,
        Some(opcode) => {
            // Operands only matter for the length.
            let mut rest = bytes[opcode..].to_vec();
            rest.resize(MAX_INSTRUCTION, 0);
            !Decoder::new(bitness, &rest, DecoderOptions::NONE).decode().is_invalid()
        }
    }
}

/// An instruction longer than 15 bytes.
fn op_too_long(cpu: &mut Cpu, _: &Op) -> X {
    Err(cpu.gp(0))
}

/// An operation without operands.
pub fn plain(run: crate::code_cache::Handler) -> Op {
    Op {
        run,
        disp: 0,
        imm: 0,
        offset: 0,
        next: 0,
        index: 0,
        dst: 0,
        src: 0,
        base: reg::ZERO as u8,
        idx: reg::ZERO as u8,
        scale: 0,
        segment: seg::DS as u8,
        address: 0,
        cc: 0,
        traits: 0,
        fuse: 0,
        target: 0,
    }
}

/// Whether nothing may follow the instruction in its block.
fn ends_block(i: &Instruction) -> bool {
    use Mnemonic::*;
    if i.flow_control() != FlowControl::Next {
        return true;
    }
    match i.mnemonic() {
        Sti | Popf | Popfd | Popfq | Wrmsr | Lgdt | Lidt | Lldt | Ltr | Lmsw | Clts | Hlt | Invlpg
        | Invpcid | Xsetbv | Lds | Les | Lfs | Lgs | Lss | Wbinvd | Invd | Swapgs | Mwait | Monitor
        | Stac | Clac => true,
        Mov => {
            i.op0_kind() == OpKind::Register && {
                let r = i.op0_register();
                r.is_segment_register() || r.is_cr() || r.is_dr()
            }
        }
        Pop => i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register(),
        _ => false,
    }
}

impl Cpu {
    /// `offset` bytes after the block's start, wrapped to the mode's width.
    #[inline(always)]
    pub fn block_rip(&self, offset: u16) -> u64 {
        let rip = self.r.gpr[reg::BLOCK_RIP].wrapping_add(u64::from(offset));
        match self.mode {
            Mode::Long64 => rip,
            _ => rip & 0xffff_ffff,
        }
    }

    /// Sets `rip` and `next_rip` for an instruction that runs in the general executor.
    #[inline(always)]
    pub fn prepare_general(&mut self, op: &Op) {
        self.r.rip = self.block_rip(op.offset);
        self.next_rip = self.block_rip(op.next);
        self.retired_in_block = u64::from(op.index);
    }

    /// Executes one instruction; `rip` and `next_rip` are set.
    pub fn execute(&mut self, i: &Instruction) -> X {
        if self.execute_general(i)? || self.execute_system(i)? {
            return Ok(());
        }
        // What is left belongs to extensions that CPUID does not promise.
        Err(self.ud())
    }

    fn bitness(&self) -> u32 {
        match self.mode {
            Mode::Long64 => 64,
            Mode::Protected32 => 32,
            _ => 16,
        }
    }

    /// Decodes the block at `lin` (guest-physical `gpa`), or just its first instruction.
    pub fn decode_block(&mut self, lin: u64, gpa: u64, single: bool) -> X<*mut Block> {
        let entry = self.mem.entry(gpa >> 12);
        if entry & P2M_PRESENT == 0 {
            let reason = format!("the guest executes code at {gpa:#x}, where there is no memory");
            return Err(self.exit(Exit::Failure { reason }));
        }
        let at = (gpa & 0xfff) as usize;
        let host = (entry & !P2M_FLAGS) as *const u8;
        let mut bytes = [0u8; 0x1000 + MAX_INSTRUCTION];
        let room = 0x1000 - at;
        // SAFETY: the frame is mapped RAM and the range stays inside it.
        unsafe { std::ptr::copy_nonoverlapping(host.add(at), bytes.as_mut_ptr(), room) };
        let mut block = Box::new(new_block(gpa));
        let mut ops: Vec<Op> = Vec::with_capacity(16);
        let limit = if self.mode == Mode::Long64 {
            u64::MAX
        } else {
            u64::from(self.r.seg[seg::CS].limit).saturating_sub(self.r.rip).saturating_add(1)
        };
        let max = if single { 1 } else { MAX_BLOCK };
        let options = DecoderOptions::NONE;
        let mut decoder = Decoder::with_ip(self.bitness(), &bytes[..room], 0, options);
        let accelerates = self.accelerates();
        let mut accelerated = None;
        while block.count < max && decoder.can_decode() {
            let start = decoder.position();
            let mut i = decoder.decode();
            if i.is_invalid() && too_long(&bytes[start..decoder.position()], self.bitness()) {
                if block.count == 0 {
                    let mut op = plain(op_too_long);
                    op.next = 1;
                    ops.push(op);
                    block.count = 1;
                    block.len = (start + MAX_INSTRUCTION) as u16;
                }
                break;
            }
            if i.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                if room - start >= MAX_INSTRUCTION {
                    if block.count == 0 {
                        let mut op = plain(op_too_long);
                        op.next = 1;
                        ops.push(op);
                        block.count = 1;
                        block.len = MAX_INSTRUCTION as u16;
                    }
                    break;
                }
                if block.count > 0 {
                    break;
                }
                // The first instruction goes on in the next page.
                let second = self.translate_fetch((lin & !0xfff).wrapping_add(0x1000))?;
                let entry = self.mem.entry(second >> 12);
                if entry & P2M_PRESENT == 0 {
                    let reason = format!("the guest executes code at {second:#x}, where there is no memory");
                    return Err(self.exit(Exit::Failure { reason }));
                }
                // SAFETY: as above; the array has room for it.
                unsafe {
                    let from = (entry & !P2M_FLAGS) as *const u8;
                    std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr().add(room), MAX_INSTRUCTION);
                }
                let mut d = Decoder::with_ip(self.bitness(), &bytes[..room + MAX_INSTRUCTION], 0, options);
                i = d.decode();
                block.second_page = second;
                let len = i.len();
                if i.code() == Code::Pause {
                    i = exchange_or_pause(i, &bytes[..len], self.bitness());
                }
                let unfinished = i.is_invalid() && d.last_error() == DecoderError::NoMoreBytes;
                let longer = i.is_invalid() && too_long(&bytes[..MAX_INSTRUCTION], self.bitness());
                if unfinished || longer || len > MAX_INSTRUCTION {
                    let mut op = plain(op_too_long);
                    op.next = 1;
                    ops.push(op);
                    block.count = 1;
                    block.len = (room + 1) as u16;
                } else {
                    self.add_instruction(&mut block, &mut ops, i, 0, len, false);
                }
                break;
            }
            let end = decoder.position();
            if i.code() == Code::Pause {
                i = exchange_or_pause(i, &bytes[start..end], self.bitness());
            }
            if end as u64 > limit {
                if block.count == 0 {
                    return Err(self.gp(0));
                }
                break;
            }
            if accelerates {
                let supported = self.accelerator.as_ref().is_some_and(|a| a.supports(self.mode, &i));
                if *accelerated.get_or_insert(supported) != supported {
                    break;
                }
            }
            let end_here = i.is_invalid() || ends_block(&i);
            self.add_instruction(&mut block, &mut ops, i, start, end - start, !single);
            if end_here {
                break;
            }
        }
        let mut end = plain(op_end);
        end.offset = block.len;
        end.index = block.count;
        end.next = block.len;
        let last_sets_rip = ops.last().is_some_and(|op| op.traits & SETS_RIP != 0);
        if !last_sets_rip {
            ops.push(end);
        }
        block.ops = ops.into_boxed_slice();
        let foreign = entry & P2M_FOREIGN != 0;
        let cached = !foreign && self.config.optimise.block_cache;
        debug_assert!(block.count > 0);
        Ok(self.add_block(block, single, cached))
    }

    fn add_instruction(
        &mut self,
        block: &mut Block,
        ops: &mut Vec<Op>,
        i: Instruction,
        start: usize,
        len: usize,
        may_fuse: bool,
    ) {
        let ends = !i.is_invalid() && ends_block(&i);
        let mut op = if i.is_invalid() {
            plain(op_invalid)
        } else if let Some(op) = self.vector_op(block, &i) {
            op
        } else {
            match if self.config.optimise.fast_ops { crate::fast::select(self, &i) } else { None } {
                Some(op) => op,
                None => {
                    let boxed = Box::new(i);
                    let mut op = plain(if ends { op_general_end } else { op_general });
                    op.imm = &*boxed as *const Instruction as u64;
                    op.traits = if ends { SETS_RIP } else { 0 };
                    block.instructions.push(boxed);
                    op
                }
            }
        };
        op.offset = start as u16;
        op.next = (start + len) as u16;
        op.index = block.count;
        block.count += 1;
        block.len = (start + len) as u16;
        if self.config.optimise.fused_branches && may_fuse {
            if let Some(last) = ops.last_mut() {
                if crate::fast::fuse(last, &op) {
                    return;
                }
            }
        }
        ops.push(op);
    }
}
