//! Generated code: one thunk for each distinct instruction.
//!
//! A thunk is a function `(RDI: &mut VectorState, RSI: &mut ThunkContext) -> EAX`
//! in the System V convention, in which all vector registers are the callee's
//! to use; so the instruction keeps its vector register numbers. Its normal form:
//!
//! * memory operand → `[RSI]`, the context's scratch buffer, no prefixes;
//! * general register operand → R8 (slot 0); implicit RAX, RDX, RCX stay (slots 1 to 3).
//!
//! The thunk does, as far as the instruction needs it: FXRSTOR64 of the x87
//! image; load the vector registers that are read; load general registers, status
//! flags and MXCSR; the instruction; save flags, general registers, MXCSR and
//! x87 image, give the host its own back; return the unmasked SIMD exceptions if there
//! are any; store the vector registers that are written (16 bytes for legacy
//! encodings, which keep the upper half; 32 for VEX, which defines all of it).
//! Code with VEX ends with VZEROUPPER, so that the host's SSE code stays fast.

use crate::arena::Arena;
use crate::classify::{uses_mxcsr, Class};
use crate::plan::{register, MemAccess, ThunkRef, Unsupported};
use crate::state::{fx, VectorState};
use crate::unit::ThunkContext;
use iced_x86::code_asm::CodeAssembler;
use iced_x86::{
    Code, Encoder, EncodingKind, IcedError, Instruction, InstructionInfoFactory, InstructionInfoOptions,
    MemoryOperand, Mnemonic, OpAccess, OpKind, Register,
};
use std::collections::HashMap;
use std::mem::offset_of;

type Entry = unsafe extern "sysv64" fn(*mut VectorState, *mut ThunkContext) -> u32;

/// All thunks of a unit.
pub(crate) struct Thunks {
    arena: Option<Arena>,
    capacity: usize,
    known: HashMap<Vec<u8>, u32>,
    generation: u32,
}

/// What an instruction's normal form reads and writes.
struct Uses {
    vector_in: u16,
    vector_in_ymm: u16,
    vector_out: u16,
    gpr_in: u8,
    gpr_out: u8,
    memory: Option<MemAccess>,
    flags_read: bool,
    flags_written: u16,
    fx: bool,
    mxcsr: bool,
    vex: bool,
}

/// Host registers of the general register slots.
const SLOTS: [Register; 4] = [Register::R8, Register::RAX, Register::RDX, Register::RCX];

impl Thunks {
    /// Whether thunks exist in this build.
    pub(crate) const AVAILABLE: bool = true;

    /// No thunks yet, and room for `capacity` bytes of them.
    pub(crate) fn new(capacity: usize) -> Self {
        Thunks { arena: None, capacity, known: HashMap::new(), generation: crate::arena::next_generation() }
    }

    #[inline]
    pub(crate) fn generation(&self) -> u32 {
        self.generation
    }

    pub(crate) fn usage(&self) -> (usize, usize) {
        (self.known.len(), self.arena.as_ref().map_or(0, Arena::used))
    }

    /// The thunk of `instruction` and its memory operand.
    pub(crate) fn compile(
        &mut self,
        instruction: &Instruction,
        class: Class,
    ) -> Result<(ThunkRef, Option<MemAccess>), Unsupported> {
        let (normal, explicit) = normalise(instruction);
        let uses = Uses::of(&normal, class)?;
        let mut encoder = Encoder::new(64);
        encoder.encode(&normal, 0).map_err(encoding)?;
        let key = encoder.take_buffer();
        let entry = match self.known.get(&key) {
            Some(&entry) => entry,
            None => {
                let code = assemble(&normal, &uses).map_err(encoding)?;
                let entry = self.install(&code)?;
                self.known.insert(key, entry);
                entry
            }
        };
        let thunk = ThunkRef {
            generation: self.generation,
            entry,
            flags_written: uses.flags_written,
            opcode: if class == Class::X87 { x87_opcode(instruction) } else { 0 },
            explicit,
            gpr_in: uses.gpr_in,
            gpr_out: uses.gpr_out,
            flags_read: uses.flags_read,
            fx: uses.fx,
            x87: class == Class::X87,
            mxcsr: uses.mxcsr,
        };
        Ok((thunk, uses.memory))
    }

    /// Copies code into executable memory; empties it first if it is full.
    fn install(&mut self, code: &[u8]) -> Result<u32, Unsupported> {
        let arena = match &mut self.arena {
            Some(arena) => arena,
            none => none.insert(Arena::new(self.capacity).map_err(Unsupported::Host)?),
        };
        if let Some(entry) = arena.push(code).map_err(Unsupported::Host)? {
            return Ok(entry);
        }
        arena.clear();
        self.known.clear();
        self.generation = crate::arena::next_generation();
        match arena.push(code).map_err(Unsupported::Host)? {
            Some(entry) => Ok(entry),
            None => Err(Unsupported::Host("a thunk is larger than the memory for thunks")),
        }
    }

    /// Runs a thunk.
    ///
    /// # Safety
    /// `thunk` is of the present generation; `state` and `context` are valid and unaliased.
    #[inline]
    pub(crate) unsafe fn call(
        &self,
        thunk: &ThunkRef,
        state: *mut VectorState,
        context: *mut ThunkContext,
    ) -> u32 {
        let Some(arena) = &self.arena else { return 0 };
        // SAFETY: generations are unique to a unit and a filling of its arena, so `entry` is the start
        // of a thunk in it, which has this signature.
        let entry: Entry = unsafe { std::mem::transmute(arena.address(thunk.entry)) };
        // SAFETY: the thunk touches only `state`, `context`, its stack frame, and caller-saved registers;
        // it restores MXCSR, and leaves the x87 state as FNINIT does.
        unsafe { entry(state, context) }
    }
}

fn encoding(error: IcedError) -> Unsupported {
    Unsupported::Encoding(error.to_string())
}

/// The normal form, and the guest register of slot 0 (0 if unused).
fn normalise(instruction: &Instruction) -> (Instruction, u8) {
    let mut normal = *instruction;
    let mut explicit = 0;
    normal.set_ip(0);
    normal.set_len(0);
    normal.set_has_rep_prefix(false);
    normal.set_has_repne_prefix(false);
    normal.set_has_lock_prefix(false);
    normal.set_segment_prefix(Register::None);
    for operand in 0..normal.op_count() {
        match normal.op_kind(operand) {
            OpKind::Memory => {
                normal.set_memory_base(Register::RSI);
                normal.set_memory_index(Register::None);
                normal.set_memory_index_scale(1);
                normal.set_memory_displacement64(0);
                normal.set_memory_displ_size(0);
            }
            OpKind::Register if normal.op_register(operand).is_gpr() => {
                explicit = register(instruction, operand);
                let host = match normal.op_register(operand).size() {
                    8 => Register::R8,
                    4 => Register::R8D,
                    _ => Register::R8W,
                };
                normal.set_op_register(operand, host);
            }
            _ => {}
        }
    }
    (normal, explicit)
}

impl Uses {
    fn of(normal: &Instruction, class: Class) -> Result<Uses, Unsupported> {
        let mut uses = Uses {
            vector_in: 0,
            vector_in_ymm: 0,
            vector_out: 0,
            gpr_in: 0,
            gpr_out: 0,
            memory: None,
            flags_read: normal.rflags_read() != 0,
            flags_written: rflags(normal.rflags_modified()),
            fx: matches!(class, Class::X87 | Class::Mmx | Class::SseMmx),
            mxcsr: matches!(class, Class::Sse | Class::SseMmx | Class::Avx) && uses_mxcsr(normal.code()),
            vex: class == Class::Avx,
        };
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info_options(normal, InstructionInfoOptions::NONE);
        for used in info.used_registers() {
            let (reads, writes) = directions(used.access());
            let register = used.register();
            if register.is_vector_register() {
                let bit = 1u16 << (register.number() & 15);
                if reads {
                    uses.vector_in |= bit;
                    if !register.is_xmm() {
                        uses.vector_in_ymm |= bit;
                    }
                }
                if writes {
                    uses.vector_out |= bit;
                }
            } else if register.is_gpr() && register.full_register() != Register::RSI {
                let slot = SLOTS.iter().position(|&slot| slot == register.full_register());
                let slot = slot.ok_or_else(|| Unsupported::Encoding(format!("uses {register:?}")))?;
                if writes && register.size() < 4 {
                    // Would keep the rest of the register; no instruction for a thunk does.
                    return Err(Unsupported::Encoding(format!("writes {register:?}")));
                }
                uses.gpr_in |= u8::from(reads) << slot;
                uses.gpr_out |= u8::from(writes) << slot;
            }
        }
        let mut read = false;
        let mut write = false;
        for used in info.used_memory() {
            let (reads, writes) = directions(used.access());
            read |= reads;
            write |= writes;
        }
        if read || write {
            let size = normal.memory_size().size();
            if size == 0 || size > 32 {
                return Err(Unsupported::Encoding(format!("a memory operand of {size} bytes")));
            }
            // What follows the write of the operand must not be able to fail; see `execute`.
            if write && (uses.vector_out != 0 || uses.gpr_out != 0 || uses.flags_written != 0) {
                return Err(Unsupported::Encoding("writes memory and registers".to_string()));
            }
            uses.memory = Some(MemAccess { size: size as u16, read, write, align: alignment(normal, size) });
        }
        Ok(uses)
    }
}

/// Alignment that the memory operand of a thunk needs, given its size.
fn alignment(instruction: &Instruction, size: usize) -> u8 {
    let aligned = match instruction.code().encoding() {
        // Legacy SSE: every 16-byte operand, but for the explicitly unaligned ones.
        EncodingKind::Legacy => {
            size == 16
                && !matches!(
                    instruction.mnemonic(),
                    Mnemonic::Pcmpistri
                        | Mnemonic::Pcmpistrm
                        | Mnemonic::Pcmpestri
                        | Mnemonic::Pcmpestrm
                        | Mnemonic::Pcmpestri64
                        | Mnemonic::Pcmpestrm64
                )
        }
        // VEX: only the aligned moves, which are all plans without a thunk.
        _ => false,
    };
    if aligned {
        16
    } else {
        1
    }
}

fn directions(access: OpAccess) -> (bool, bool) {
    match access {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write => (false, true),
        // What may stay as it was must be there to stay.
        OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
        OpAccess::None | OpAccess::NoMemAccess => (false, false),
    }
}

/// iced's flag bits as RFLAGS bits.
fn rflags(bits: u32) -> u16 {
    use iced_x86::RflagsBits;
    let pairs = [
        (RflagsBits::CF, 1),
        (RflagsBits::PF, 1 << 2),
        (RflagsBits::AF, 1 << 4),
        (RflagsBits::ZF, 1 << 6),
        (RflagsBits::SF, 1 << 7),
        (RflagsBits::OF, 1 << 11),
    ];
    pairs.iter().filter(|(bit, _)| bits & bit != 0).fold(0, |set, (_, flag)| set | flag)
}

/// FOP: the low 11 bits of an x87 opcode as the guest wrote it.
fn x87_opcode(instruction: &Instruction) -> u16 {
    let bitness = match instruction.code_size() {
        iced_x86::CodeSize::Code16 => 16,
        iced_x86::CodeSize::Code32 => 32,
        _ => 64,
    };
    let mut encoder = Encoder::new(bitness);
    if encoder.encode(instruction, instruction.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    let Some(at) = bytes.iter().position(|byte| byte & 0xf8 == 0xd8) else { return 0 };
    u16::from(bytes[at] & 7) << 8 | u16::from(*bytes.get(at + 1).unwrap_or(&0))
}

fn context(offset: usize) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RSI, offset as i64)
}

fn vector(number: u32) -> MemoryOperand {
    let offset = offset_of!(VectorState, ymm) + 32 * number as usize;
    MemoryOperand::with_base_displ(Register::RDI, offset as i64)
}

fn xmm(number: u32) -> Register {
    Register::XMM0 + number
}

fn ymm(number: u32) -> Register {
    Register::YMM0 + number
}

fn bits(set: u16) -> impl Iterator<Item = u32> {
    (0..16).filter(move |n| set & 1 << n != 0)
}

fn assemble(normal: &Instruction, uses: &Uses) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let flags = offset_of!(ThunkContext, rflags);
    let image = offset_of!(ThunkContext, fx);
    let gpr = |slot: usize| offset_of!(ThunkContext, gpr) + 8 * slot;
    let memory = |code, at: usize| Instruction::with1(code, context(at));
    if uses.mxcsr {
        a.add_instruction(memory(Code::Stmxcsr_m32, offset_of!(ThunkContext, mxcsr_host))?)?;
    }
    if uses.fx {
        // The image's MXCSR is loaded with it: make it the host's.
        a.add_instruction(memory(Code::Stmxcsr_m32, image + fx::MXCSR)?)?;
        a.add_instruction(memory(Code::Fxrstor64_m512byte, image)?)?;
    }
    for n in bits(uses.vector_in) {
        let load = match (uses.vex, uses.vector_in_ymm & 1 << n != 0) {
            (true, true) => Instruction::with2(Code::VEX_Vmovdqa_ymm_ymmm256, ymm(n), vector(n))?,
            (true, false) => Instruction::with2(Code::VEX_Vmovdqa_xmm_xmmm128, xmm(n), vector(n))?,
            (false, _) => Instruction::with2(Code::Movaps_xmm_xmmm128, xmm(n), vector(n))?,
        };
        a.add_instruction(load)?;
    }
    for (slot, &host) in SLOTS.iter().enumerate().filter(|(slot, _)| uses.gpr_in & 1 << slot != 0) {
        a.add_instruction(Instruction::with2(Code::Mov_r64_rm64, host, context(gpr(slot)))?)?;
    }
    if uses.flags_read {
        a.add_instruction(memory(Code::Push_rm64, flags)?)?;
        a.popfq()?;
    }
    if uses.mxcsr {
        a.add_instruction(memory(Code::Ldmxcsr_m32, offset_of!(ThunkContext, mxcsr_in))?)?;
    }
    a.add_instruction(*normal)?;
    if uses.flags_written != 0 {
        a.pushfq()?;
        a.add_instruction(memory(Code::Pop_rm64, flags)?)?;
    }
    for (slot, &host) in SLOTS.iter().enumerate().filter(|(slot, _)| uses.gpr_out & 1 << slot != 0) {
        a.add_instruction(Instruction::with2(Code::Mov_rm64_r64, context(gpr(slot)), host)?)?;
    }
    if uses.mxcsr {
        a.add_instruction(memory(Code::Stmxcsr_m32, offset_of!(ThunkContext, mxcsr_out))?)?;
        a.add_instruction(memory(Code::Ldmxcsr_m32, offset_of!(ThunkContext, mxcsr_host))?)?;
    }
    if uses.fx {
        a.add_instruction(memory(Code::Fxsave64_m512byte, image)?)?;
        a.fninit()?;
    }
    let mut end = a.create_label();
    if uses.mxcsr {
        let raised = offset_of!(ThunkContext, mxcsr_out);
        a.add_instruction(Instruction::with2(Code::Mov_r32_rm32, Register::EAX, context(raised))?)?;
        let unmasked = offset_of!(ThunkContext, unmasked);
        a.add_instruction(Instruction::with2(Code::And_r32_rm32, Register::EAX, context(unmasked))?)?;
        a.jne(end)?;
    } else {
        a.add_instruction(Instruction::with2(Code::Xor_r32_rm32, Register::EAX, Register::EAX)?)?;
    }
    for n in bits(uses.vector_out) {
        let store = if uses.vex {
            Instruction::with2(Code::VEX_Vmovdqa_ymmm256_ymm, vector(n), ymm(n))?
        } else {
            Instruction::with2(Code::Movaps_xmmm128_xmm, vector(n), xmm(n))?
        };
        a.add_instruction(store)?;
    }
    a.set_label(&mut end)?;
    if uses.vex {
        a.vzeroupper()?;
    }
    a.ret()?;
    a.assemble(0)
}
