//! Which of iced's instruction codes the engine executes, found by trying: one
//! instruction of each code runs on a vCPU of its own, in ring 0 with
//! everything switched on. An exception other than #UD counts as executed.

use iced_x86::{Code, Encoder, EncodingKind, Instruction, OpCodeOperandKind as Kind, OpKind, Register};
use nonroot_interpret::state::{ar, cr4, efer, seg, vector, Exit, Segment};
use nonroot_interpret::{Config, Vcpu};
use nonroot_memory::{Memory, P2M_WRITABLE, PAGE_SIZE};
use std::sync::Arc;

const CODE: u64 = 0x8000;
const DATA: u64 = 0x9000;
const BYTES: u64 = 0x10000;

/// (name, "interpreted", "native" or "missing") of every legacy and VEX code.
pub fn coverage() -> Result<Vec<(String, &'static str)>, String> {
    let memory = memory()?;
    let mut out = Vec::new();
    for code in Code::values() {
        let info = code.op_code();
        if !info.is_instruction() || !matches!(info.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
            continue;
        }
        out.push((format!("{code:?}"), status(&memory, code)));
    }
    Ok(out)
}

fn memory() -> Result<Arc<Memory>, String> {
    let failed = || format!("there is no memory for the trial: {}", std::io::Error::last_os_error());
    // SAFETY: the name is a NUL-terminated string; the result is checked.
    let fd = unsafe { libc::memfd_create(c"nonroot-coverage".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(failed());
    }
    // SAFETY: `fd` is ours.
    let sized = unsafe { libc::ftruncate(fd, BYTES as i64) } == 0;
    let memory = Memory::new();
    let backing = memory.add_backing(fd, BYTES);
    // SAFETY: `fd` is ours; the mapping keeps the file alive.
    unsafe { libc::close(fd) };
    let (true, Ok(backing)) = (sized, backing) else { return Err(failed()) };
    let mapped = memory.map(0, BYTES / PAGE_SIZE, backing, 0, P2M_WRITABLE);
    // An identity map of one page of 1 GiB.
    let tables = mapped
        .and_then(|()| memory.write(0x1000, &0x2003u64.to_le_bytes()))
        .and_then(|()| memory.write(0x2000, &0x83u64.to_le_bytes()));
    tables.map_err(|error| format!("the trial's memory is unusable: {error:?}"))?;
    Ok(Arc::new(memory))
}

fn status(memory: &Arc<Memory>, code: Code) -> &'static str {
    let info = code.op_code();
    let bits = match (info.mode64(), info.mode32()) {
        (true, _) => 64,
        (_, true) => 32,
        _ => 16,
    };
    if matches!(code, Code::Ud0 | Code::Ud2 | Code::Ud0_r16_rm16 | Code::Ud0_r32_rm32 | Code::Ud0_r64_rm64)
        || matches!(code, Code::Ud1_r16_rm16 | Code::Ud1_r32_rm32 | Code::Ud1_r64_rm64)
    {
        // #UD is what they are for.
        return "interpreted";
    }
    let mut best = "missing";
    for with_memory in [true, false] {
        let Some(bytes) = example(code, bits, with_memory) else { continue };
        match try_out(memory, &bytes, bits) {
            "missing" => {}
            "native" => return "native",
            other => best = other,
        }
    }
    best
}

/// Runs one instruction.
fn try_out(memory: &Arc<Memory>, bytes: &[u8], bits: u32) -> &'static str {
    let mut page = [0xf4u8; 64];
    page[..bytes.len()].copy_from_slice(bytes);
    if memory.write(CODE, &page).is_err() || memory.write(DATA, &[0; 4096]).is_err() {
        return "missing";
    }
    let mut vcpu = Vcpu::new(memory.clone(), Config { exception_exits: u32::MAX, ..Config::default() });
    let cpu = &mut vcpu.cpu;
    let data = Segment { base: 0, limit: u32::MAX, ar: 0xc093, selector: 0x10 };
    cpu.r.seg = [data; 6];
    cpu.r.seg[seg::CS] = Segment { ar: if bits == 64 { 0xa09b } else { 0xc09b }, selector: 8, ..data };
    if bits == 16 {
        cpu.r.seg[seg::CS].ar &= !(ar::DB | ar::G);
    }
    cpu.r.ldtr.ar = 0x1_0082;
    cpu.r.cr0 = 0x33;
    cpu.r.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
    cpu.r.xcr0 = 7;
    cpu.r.efer = efer::SCE;
    if bits == 64 {
        cpu.r.cr0 |= 1 << 31;
        cpu.r.cr3 = 0x1000;
        cpu.r.cr4 |= cr4::PAE;
        cpu.r.efer |= efer::LME | efer::LMA;
    }
    cpu.r.gpr[..16].fill(DATA + 0x100);
    cpu.r.gpr[1] = 1;
    cpu.r.rip = CODE;
    cpu.update_mode();
    let mut decoder = iced_x86::Decoder::new(bits, bytes, iced_x86::DecoderOptions::NONE);
    let native = cpu.native.compile(&decoder.decode()).is_ok();
    match vcpu.run(None, Some(1)) {
        Exit::Failure { .. } => "missing",
        Exit::Exception { vector: vector::UD, .. } => "missing",
        _ if native => "native",
        _ => "interpreted",
    }
}

/// An encoding of a code with plausible operands.
fn example(code: Code, bits: u32, with_memory: bool) -> Option<Vec<u8>> {
    let info = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let mut immediates = 0;
    for n in 0..info.op_count() {
        operand(&mut i, n, info.op_kind(n), bits, with_memory, &mut immediates)?;
    }
    i.set_has_lock_prefix(false);
    let mut encoder = Encoder::new(bits);
    encoder.encode(&i, CODE).ok()?;
    Some(encoder.take_buffer())
}

fn operand(
    i: &mut Instruction,
    n: u32,
    kind: Kind,
    bits: u32,
    with_memory: bool,
    immediates: &mut u32,
) -> Option<()> {
    use Kind::*;
    let number = n + 1;
    let name = format!("{kind:?}");
    let base = match bits {
        64 => Register::RBX,
        32 => Register::EBX,
        _ => Register::BX,
    };
    let register = |i: &mut Instruction, register: Register| {
        i.set_op_kind(n, OpKind::Register);
        i.set_op_register(n, register);
    };
    let memory = |i: &mut Instruction, index: Register| {
        i.set_op_kind(n, OpKind::Memory);
        i.set_memory_base(base);
        i.set_memory_index(index);
        i.set_memory_displ_size(0);
    };
    let fixed = match kind {
        al => Some(Register::AL),
        cl => Some(Register::CL),
        ax => Some(Register::AX),
        dx => Some(Register::DX),
        eax => Some(Register::EAX),
        rax => Some(Register::RAX),
        st0 => Some(Register::ST0),
        es => Some(Register::ES),
        cs => Some(Register::CS),
        ss => Some(Register::SS),
        ds => Some(Register::DS),
        fs => Some(Register::FS),
        gs => Some(Register::GS),
        _ => Option::None,
    };
    if let Some(fixed) = fixed {
        register(i, fixed);
        return Some(());
    }
    match kind {
        mem_offs => {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_displ_size(bits / 8);
            i.set_memory_displacement64(DATA);
        }
        mem | mem_mib | mem_mpx | sibmem => memory(i, Register::None),
        mem_vsib32x | mem_vsib64x => memory(i, Register::XMM5),
        mem_vsib32y | mem_vsib64y => memory(i, Register::YMM5),
        seg_rSI => {
            i.set_op_kind(n, pick(bits, [OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI]))
        }
        es_rDI => {
            i.set_op_kind(n, pick(bits, [OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI]))
        }
        seg_rDI => {
            i.set_op_kind(n, pick(bits, [OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI]))
        }
        seg_rBX_al => memory(i, Register::AL),
        br16_1 | br16_2 => {
            i.set_op_kind(n, OpKind::NearBranch16);
            i.set_near_branch16(CODE as u16 + 8);
        }
        br32_1 | br32_4 => {
            i.set_op_kind(n, OpKind::NearBranch32);
            i.set_near_branch32(CODE as u32 + 8);
        }
        br64_1 | br64_4 | xbegin_2 | xbegin_4 => {
            i.set_op_kind(n, OpKind::NearBranch64);
            i.set_near_branch64(CODE + 8);
        }
        farbr2_2 => {
            i.set_op_kind(n, OpKind::FarBranch16);
            i.set_far_branch_selector(8);
            i.set_far_branch16(CODE as u16);
        }
        farbr4_2 => {
            i.set_op_kind(n, OpKind::FarBranch32);
            i.set_far_branch_selector(8);
            i.set_far_branch32(CODE as u32);
        }
        imm8 | imm8_const_1 if *immediates > 0 => i.set_op_kind(n, OpKind::Immediate8_2nd),
        imm8 | imm8_const_1 => i.set_op_kind(n, OpKind::Immediate8),
        imm8sex16 => i.set_op_kind(n, OpKind::Immediate8to16),
        imm8sex32 => i.set_op_kind(n, OpKind::Immediate8to32),
        imm8sex64 => i.set_op_kind(n, OpKind::Immediate8to64),
        imm16 => i.set_op_kind(n, OpKind::Immediate16),
        imm32 => i.set_op_kind(n, OpKind::Immediate32),
        imm32sex64 => i.set_op_kind(n, OpKind::Immediate32to64),
        imm64 => i.set_op_kind(n, OpKind::Immediate64),
        _ if name.contains("or_mem") && with_memory => memory(i, Register::None),
        _ => register(i, any_register(&name, number)?),
    }
    if name.starts_with("imm") {
        i.set_immediate8(1);
        if i.op_kind(n) != OpKind::Immediate8 && i.op_kind(n) != OpKind::Immediate8_2nd {
            i.set_immediate_u64(n, 1);
        }
        *immediates += 1;
    }
    Some(())
}

fn pick(bits: u32, kinds: [OpKind; 3]) -> OpKind {
    kinds[match bits {
        16 => 0,
        32 => 1,
        _ => 2,
    }]
}

/// A register of the class that an operand kind's name starts with.
fn any_register(kind: &str, number: u32) -> Option<Register> {
    let first = match kind.split('_').next()? {
        "r8" => Register::AL,
        "r16" => Register::AX,
        "r32" => Register::EAX,
        "r64" => Register::RAX,
        "mm" => Register::MM0,
        "xmm" | "xmmp3" => Register::XMM0,
        "ymm" => Register::YMM0,
        "k" => Register::K0,
        "bnd" => Register::BND0,
        "tmm" => Register::TMM0,
        "sti" => Register::ST0,
        "seg" => return Some(Register::DS),
        "cr" => return Some(Register::CR2),
        "dr" => return Some(Register::DR1),
        "tr" => return Some(Register::TR6),
        _ => return None,
    };
    Some(first + number)
}
